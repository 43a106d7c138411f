"""Chats: the conversation and its commands, precision, and which turns a model is shown."""

import builtins
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.tiny import tiny_model, tiny_tokenizer
from thinkstack.checkpoint.model import pick_precision, save_model
from thinkstack.kernels import choice
from thinkstack.models.config import named
from thinkstack.models.transformer import Transformer
from thinkstack.stages.chat import ChatSession, TurnSummary, converse
from thinkstack.stages.console import write
from thinkstack.stages.local_chat import LocalModel
from thinkstack.text.chat import TemplateFormat
from thinkstack.text.stream_parser import StreamEvent
from thinkstack.text.tokenizer import BOS, EOS, train_tokenizer
from thinkstack.types import ConfigError, Message, RequestError, SamplingParams

SWITCHED = "{{ bos_token }}{% for m in messages %}{{ m['content'] }}{% endfor %}{% if enable_thinking %}!{% endif %}"


class FakeModel:
    """Repeats the last question; "fail" and "stop" raise after the first word."""

    def __init__(self, thinking_modes: tuple[bool, ...] = (True, False)):
        self.name, self.thinking_modes = "fake", thinking_modes
        self.summary = TurnSummary()
        self.seen: list[tuple[int, bool | None]] = []
        """(number of messages, thinking) of each request."""
        self.num_closed = 0

    def stream(self, messages, thinking):
        self.seen.append((len(messages), thinking))
        question = messages[-1].content
        try:
            if thinking:
                yield StreamEvent("reasoning", "hm")
            yield StreamEvent("content", f"{question} ")
            if question == "fail":
                raise RequestError("the server is on fire")
            if question == "stop":
                raise KeyboardInterrupt
            yield StreamEvent("content", "indeed")
            self.summary = TurnSummary(
                finish_reason="length", completion_tokens=3, prompt_tokens=1200, cached_tokens=1024, ignored="seed"
            )
            yield StreamEvent("finish", finish_reason="length")
        finally:
            self.num_closed += 1

    def explain_empty(self):
        return "never"

    def list_names(self):
        return ["fake", "other"]

    def change(self, name):
        if name not in self.list_names():
            raise ConfigError(f"no model {name!r}")
        self.name = name


@pytest.fixture
def chat(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """Type lines into a session and return what is printed."""

    def run(session: ChatSession, *lines: str) -> str:
        typed = iter(lines)

        def type_line(prompt: str) -> str:
            line = next(typed, None)
            if line is None:
                raise EOFError
            return line

        monkeypatch.setattr(builtins, "input", type_line)
        converse(session)
        return capsys.readouterr().out

    return run


def test_an_answer_ends_with_a_line_on_its_tokens_and_what_is_unusual(chat):
    shown = chat(ChatSession(FakeModel()), "hello")
    assert "hello indeed\n(3 tokens; " in shown and " tokens/s; " in shown
    rest = "prompt of 1,200 tokens, 1,024 of them cached; cut off at the token limit (--max-new-tokens); "
    assert shown.endswith(f"{rest}ignored by the server: seed)\n\n")


def test_thinking_is_switched_for_the_answers_that_follow(chat):
    model = FakeModel()
    shown = chat(ChatSession(model), "one", "/think", "two", "/NO_THINK", "three")
    assert [thinking for _, thinking in model.seen] == [None, True, False]
    assert "thinking is on\nhm\ntwo indeed" in shown and "thinking is off\nthree indeed" in shown


def test_a_model_without_a_switch_says_so_and_nothing_changes(chat):
    for modes, wanted, reason in (
        ((True,), "/no-think", "has no switch for thinking: it always thinks"),
        ((False,), "/think", "has no switch for thinking: it never thinks"),
        ((), "/think", "has no switch for thinking: its chat template decides"),
    ):
        model = FakeModel(modes)
        assert reason in chat(ChatSession(model), wanted, "hello")
        assert model.seen == [(1, None)]


def test_a_model_that_does_not_follow_the_switch_is_noticed(chat, monkeypatch):
    model = FakeModel()
    stream = model.stream
    monkeypatch.setattr(model, "stream", lambda messages, thinking: stream(messages, not thinking))
    shown = chat(ChatSession(model), "/think", "one", "/no-think", "two")
    assert "thinking is on, but there is none)" in shown and "the model thinks nevertheless)" in shown


def test_an_error_or_ctrl_c_leaves_the_conversation_as_it_was(chat):
    model = FakeModel()
    session = ChatSession(model)
    shown = chat(session, "one", "fail", "stop", "two")
    assert "fail \nthe server is on fire\n" in shown and "stop  (stopped)\n" in shown
    assert [count for count, _ in model.seen] == [1, 3, 3, 3] and model.num_closed == 4
    assert [message.content for message in session.messages] == ["one", "one indeed", "two", "two indeed"]


def test_a_conversation_is_saved_as_openai_messages_and_loaded_again(chat, tmp_path: Path):
    first, second = ChatSession(FakeModel()), ChatSession(FakeModel())
    file = tmp_path / "a chat.json"
    assert f"wrote 2 messages to {file}" in chat(first, "/think", "one", f"/save {file}")
    assert json.loads(file.read_text(encoding="utf-8")) == {
        "model": "fake",
        "messages": [
            {"role": "user", "content": "one"},
            {"role": "assistant", "reasoning_content": "hm", "content": "one indeed"},
        ],
    }
    chat(second, f"/load {file}", "two")
    assert second.messages[:2] == [
        Message(role="user", content="one"),
        Message(role="assistant", content="one indeed", reasoning="hm", is_trained=False),
    ]
    assert len(second.messages) == 4


def test_a_file_is_overwritten_by_its_own_conversation_only(chat, tmp_path: Path):
    session, file = ChatSession(FakeModel()), tmp_path / "chat.json"
    shown = chat(session, "one", f"/save {file}", "two", f"/save {file}", "/new", "three", f"/save {file}")
    assert "wrote 4 messages" in shown and f"{file} exists; choose another name" in shown
    assert len(json.loads(file.read_text(encoding="utf-8"))["messages"]) == 4


def test_a_file_that_is_no_conversation_is_refused(chat, tmp_path: Path):
    (tmp_path / "list.json").write_text("[1]", encoding="utf-8")
    (tmp_path / "other.json").write_text('{"messages": [{"role": "robot", "content": ""}]}', encoding="utf-8")
    session = ChatSession(FakeModel())
    shown = chat(session, "one", *(f"/load {tmp_path / name}" for name in ("list.json", "other.json", "none.json")))
    assert "not a JSON object" in shown and '"robot" is not supported' in shown and "No such file" in shown
    assert len(session.messages) == 2


def test_a_file_that_cannot_be_written_does_not_end_the_chat(chat, tmp_path: Path):
    names = (f"{tmp_path}/no/such/folder", str(tmp_path), "x" * 300, "~nobody-at-all/x")
    shown = chat(ChatSession(FakeModel()), "one", *(f"/save {name}" for name in names), "two")
    assert shown.count("cannot write") == 2 and "exists" in shown and "File name too long" in shown
    assert "two indeed" in shown


def test_the_model_changes_and_the_conversation_stays(chat):
    model = FakeModel()
    shown = chat(ChatSession(model), "one", "/model", "/model other", "two", "/model nobody", "/model")
    assert "fake; known: fake, other\n" in shown and "other answers from now on" in shown
    assert "no model 'nobody'\nother; known" in shown and [count for count, _ in model.seen] == [1, 3]


def test_a_setting_that_the_next_model_lacks_becomes_its_default(chat):
    model = FakeModel()
    session = ChatSession(model)
    chat(session, "/think")
    model.thinking_modes = (False,)
    chat(session, "/model other")
    assert session.thinking is None


def test_commands_are_named_or_refused_and_a_blank_makes_a_question(chat):
    model = FakeModel()
    shown = chat(ChatSession(model), "/help", "/thikn", "/think hard", "/save", "/bin/ls ?", " /new idea", "/bye", "x")
    assert "/save FILE" in shown and "/thikn is not a command; did you mean /think?" in shown
    assert "/think takes nothing after it" in shown and "/save needs a name: /save FILE" in shown
    assert "/bin/ls ? indeed" in shown and "/new idea indeed" in shown and len(model.seen) == 2


def test_the_text_of_a_model_cannot_command_the_terminal(monkeypatch, capsys):
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    write("\x1b]0;title\x07\r a\tb\n", "note")
    assert capsys.readouterr().out == "\x1b[2m]0;title a\tb\n\x1b[0m"


def test_large_models_are_run_in_bf16_where_it_is_fast_unless_asked_otherwise(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    save_model(tmp_path / "model", Transformer(named("v3-tiny")).initialize(torch.Generator().manual_seed(0)))
    assert pick_precision(tmp_path / "model", "auto") == "fp32"
    monkeypatch.setattr("thinkstack.checkpoint.model.AUTO_BF16_PARAMETERS", 1_000_000)
    for fast in ("bf16", "fp32"):
        monkeypatch.setattr(choice.choices(), "auto_dtype", fast)
        assert pick_precision(tmp_path / "model", "auto") == fast
        assert pick_precision(tmp_path / "model", "auto", "int8") == "bf16"
    assert pick_precision(tmp_path / "model", "fp32") == "fp32"


def test_r1_zero_gets_one_question_at_a_time_and_a_chat_model_the_whole_conversation(tmp_path: Path, monkeypatch):
    """R1-Zero, trained on single questions, answered the second one as if it went on from the first."""
    tokenizer = train_tokenizer(["What is the last digit?"], 640)
    model = Transformer(named("v3-tiny")).initialize(torch.Generator().manual_seed(0))
    for name, is_shown in (("r1_zero_short", False), ("v3", True)):
        save_model(tmp_path / name, model, tokenizer, name)
        session = ChatSession(LocalModel(str(tmp_path / name), SamplingParams(max_tokens=4)))
        prompts, submit = [], session.model.engine.submit
        monkeypatch.setattr(
            session.model.engine, "submit", lambda ids, *rest, do=submit, to=prompts: to.append(ids) or do(ids, *rest)
        )
        for question in ("one", "two"):
            list(session.ask(question))
        assert ("one" in tokenizer.decode(prompts[1])) == is_shown and "two" in tokenizer.decode(prompts[1])


@pytest.fixture
def folders(tmp_path: Path) -> dict[str, Path]:
    """Checkpoints with chat formats that differ in thinking, and one without a format."""
    tokenizer = tiny_tokenizer()
    model = tiny_model(vocab_size=tokenizer.vocab_size, max_positions=64)
    template = TemplateFormat(tokenizer, SWITCHED, BOS, EOS)
    plain = TemplateFormat(tokenizer, SWITCHED.partition("{% if")[0], BOS, EOS)
    formats = {"v3_1": "v3_1", "r1": "r1", "v3": "v3", "switched": template, "plain": plain, "base": None}
    for name, chat in formats.items():
        save_model(tmp_path / name, model, tokenizer, chat)
    return {name: tmp_path / name for name in formats}


def test_the_modes_of_thinking_are_those_of_the_chat_format(folders):
    modes = {"v3_1": {False, True}, "r1": {True}, "v3": {False}, "switched": {False, True}, "plain": set()}
    found = {name: LocalModel(str(folders[name]), SamplingParams()).thinking_modes for name in modes}
    assert found == modes


def test_another_checkpoint_is_loaded_or_the_current_one_stays(folders, chat):
    session = ChatSession(LocalModel(str(folders["v3"]), SamplingParams(max_tokens=4)))
    (folders["r1"] / "model.safetensors").write_bytes(b"damaged")
    shown = chat(session, f"/model {folders['base']}", f"/model {folders['r1']}", "/model nothing/here/at/all", "1+2?")
    assert (
        "this is a base model" in shown and "nothing/here/at/all does not exist" in shown and len(session.messages) == 2
    )
    assert session.model.name == str(folders["v3"])
    chat(session, f"/model {folders['v3_1']}", "/think", "1+2?")
    assert session.model.name == str(folders["v3_1"]) and len(session.messages) == 4 and session.thinking


def test_a_checkpoint_that_fails_while_it_loads_leaves_the_current_one(folders, monkeypatch):
    model = LocalModel(str(folders["v3"]), SamplingParams(max_tokens=4))
    load, wanted = model._load, str(folders["v3_1"])

    def fail(source, chat):
        if source == wanted:
            raise ConfigError("a damaged tensor")
        load(source, chat)

    monkeypatch.setattr(model, "_load", fail)
    with pytest.raises(ConfigError, match="damaged"):
        model.change(wanted)
    assert list(ChatSession(model).ask("1+2?")) and model.name == str(folders["v3"])


def test_a_conversation_that_is_too_long_survives_with_a_way_out(folders, chat):
    session = ChatSession(LocalModel(str(folders["v3"]), SamplingParams(max_tokens=4)))
    shown = chat(session, "1+2?", "3+4? " * 40, "5+6?")
    assert "the maximum context length is 64; /new starts a new one" in shown and len(session.messages) == 4
