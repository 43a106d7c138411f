"""Chat with a checkpoint; thinking and answer are streamed."""

from collections.abc import Iterator
from dataclasses import replace

from thinkstack.checkpoint.model import load_chat, load_model
from thinkstack.engine.engine import Engine, EngineConfig
from thinkstack.kernels.precision import DTYPES, Precision
from thinkstack.models.precision import Quantization
from thinkstack.stages.console import NEW, read_question, styled, write, write_answer
from thinkstack.text.chat import ZeroFormat
from thinkstack.text.parse import ANSWER_OPEN, ThinkingFormat
from thinkstack.text.stream import LastToken, stream_turn
from thinkstack.text.stream_parser import StreamEvent
from thinkstack.types import Message, RequestError, SamplingParams


class ChatSession:
    """A model, its chat format, and one conversation."""

    def __init__(
        self, source: str, sampling: SamplingParams, precision: Precision = "fp32", quantization: Quantization = "none"
    ):
        """source: a checkpoint folder, a GGUF file or pip:NAME. sampling: sampling parameters; the stop tokens of the
        chat format replace its stop_token_ids.

        weights: quantization of the weights.
        """
        self.chat = load_chat(source)
        self.model = load_model(source, DTYPES[precision])
        self.engine = Engine(self.model, EngineConfig(max_num_seqs=1, dtype=precision, quantization=quantization))
        self.sampling = replace(sampling, stop_token_ids=self.chat.stop_token_ids)
        has_answer_tags = len(self.chat.tokenizer.encode(ANSWER_OPEN)) == 1  # as our tasks train them
        self.thinking_format: ThinkingFormat = "think_answer_tags" if has_answer_tags else "think_then_answer"
        self.messages: list[Message] = []
        self.last = LastToken(self.chat)

    def ask(self, question: str) -> Iterator[StreamEvent]:
        """Stream the answer to a question, and append question and answer to the conversation."""
        if isinstance(self.chat, ZeroFormat):
            self.reset()  # R1-Zero is trained on single questions; earlier turns lower its accuracy
        self.messages.append(Message(role="user", content=question))
        prompt = self.chat.prompt(self.messages)
        free_tokens = self.engine.max_model_len - len(prompt)
        sampling = replace(self.sampling, max_tokens=max(min(self.sampling.max_tokens, free_tokens), 1))
        answer = ""
        tokens = self.last.track(self.engine.stream(prompt, sampling))
        opening = self.chat.opening(self.messages)
        for event in stream_turn(self.chat, tokens, opening, self.thinking_format):
            answer += event.text if event.kind == "content" else ""
            yield event
        self.messages.append(Message(role="assistant", content=answer.strip()))

    def reset(self) -> None:
        """Start a new conversation."""
        self.messages.clear()

    def converse(self) -> None:
        """Answer questions at the terminal until the user quits. Ctrl-C stops an answer."""
        while (question := read_question()) is not None:
            if question == NEW:
                self.reset()
                continue
            try:
                write_answer(styled(self.ask(question)), self.last.text)
            except RequestError as error:
                self.reset()
                write(f"{error}; starting a new conversation\n", "warning")
            except KeyboardInterrupt:
                self.messages.pop()  # the question, which has no complete answer
                write(" (stopped)\n", "warning")
