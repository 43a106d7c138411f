"""A checkpoint for the tools of others: the answer of a completion, and settings that are refused."""

import pytest

from tests.tiny import GQA_TINY, tiny_model, tiny_tokenizer
from thinkstack.checkpoint.model import save_model
from thinkstack.evals.adapters.local import AnswerStream, LoadedCheckpoint
from thinkstack.text.chat import chat_format
from thinkstack.types import ConfigError

TOKENIZER = tiny_tokenizer()
CHAT = chat_format("r1_zero", TOKENIZER)


def tokens(text):
    return [*TOKENIZER.encode_pieces(TOKENIZER.split_controls(text)), CHAT.stop_token_ids[0]]


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("\n the ball\n", "\n the ball\n"),
        ("<think>2+4=6</think>\n\nthe ball ", "the ball "),
        ("2+4=6</think> the ball", "the ball"),
        ("<think>2+4=6", ""),
        ("the ball <think>2+4", ""),
        ("the cup <think>2+4</think> the ball", "the ball"),
        ("<think>END</think> the ball END the cup", "the ball "),
        ("the ball END the cup</think> 3", "the ball "),
        ("<think></think>", ""),
    ],
)
def test_the_answer_has_no_thinking_and_ends_at_a_stop_string_outside_of_it(text, answer):
    whole, by_token = (AnswerStream(CHAT, stop=("END", "NEVER")) for _ in range(2))
    whole.feed(tokens(text))
    for token in tokens(text):
        by_token.feed([token])
    assert whole.finish() == by_token.finish() == answer


def test_a_prompt_that_ends_inside_of_thinking_needs_the_closing_tag():
    for text, answer in (("2+4=6 END", ""), ("2+4=6 END</think> the ball", "the ball")):
        stream = AnswerStream(CHAT, is_thinking=True, stop=("END",))
        stream.feed(tokens(text))
        assert stream.finish() == answer and not stream.is_stopped


def test_the_stop_string_that_is_complete_first_ends_the_answer():
    stream = AnswerStream(CHAT, stop=("ball is under", "all"))
    stream.feed(tokens("the ball is under"))
    assert stream.is_stopped and stream.finish() == "the b"


@pytest.mark.parametrize(("name", "value"), [("dtype", "fp16"), ("device", "tpu")])
def test_an_unknown_setting_is_refused_by_name(tmp_path, name, value):
    save_model(tmp_path / "model", tiny_model(GQA_TINY, vocab_size=TOKENIZER.vocab_size), TOKENIZER, CHAT)
    with pytest.raises(ConfigError, match=f"unknown {name}='{value}'"):
        LoadedCheckpoint(str(tmp_path / "model"), **{name: value})
