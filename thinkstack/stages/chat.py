"""A conversation with a checkpoint: thinking and answer as they are drawn."""

from collections.abc import Iterator
from dataclasses import replace

from thinkstack.checkpoint.model import load_chat, load_model
from thinkstack.engine.engine import Engine, EngineConfig
from thinkstack.models.precision import DTYPES, Precision, Quantization
from thinkstack.stages.console import NEW, read_question, say, say_answer
from thinkstack.text.chat import ZeroFormat
from thinkstack.text.stream import LastToken, StreamEvent, parse_stream, stream_text
from thinkstack.types import Message, RequestError, SamplingParams


class ChatSession:
    """A model, its format, and one conversation."""

    def __init__(
        self, source: str, sampling: SamplingParams, precision: Precision = "fp32", weights: Quantization = "plain"
    ):
        """source: a checkpoint folder, a GGUF file or pip:NAME. sampling: stop_token_ids and seed are filled in here.

        weights: how matrices are kept.
        """
        self.chat = load_chat(source)
        self.model = load_model(source, DTYPES[precision])
        self.engine = Engine(self.model, EngineConfig(max_num_seqs=1, dtype=precision, weights=weights))
        self.sampling = replace(sampling, stop_token_ids=self.chat.stop_token_ids)
        self.messages: list[Message] = []
        self.last = LastToken(self.chat)

    def ask(self, question: str) -> Iterator[StreamEvent]:
        """Stream the answer to the next message; the conversation remembers both."""
        if isinstance(self.chat, ZeroFormat):
            self.forget()  # R1-RLTrainer is trained on one question at a time; an earlier turn would only confuse it
        self.messages.append(Message(role="user", content=question))
        prompt = self.chat.prompt(self.messages)
        room = self.engine.max_model_len - len(prompt)
        sampling = replace(self.sampling, max_tokens=max(min(self.sampling.max_tokens, room), 1))
        whole = ""
        for piece in parse_stream(stream_text(self.chat.text_of, self.last.of(self.engine.stream(prompt, sampling)))):
            whole += piece.text if piece.kind != "thinking" else ""
            yield piece
        self.messages.append(Message(role="assistant", content=whole.strip()))

    def forget(self) -> None:
        """Begin a new conversation."""
        self.messages.clear()

    def converse(self) -> None:
        """Answer at the terminal until the person quits. Ctrl-C stops an answer."""
        while (question := read_question()) is not None:
            if question == NEW:
                self.forget()
                continue
            try:
                say_answer(((piece.kind, piece.text) for piece in self.ask(question)), self.last.text)
            except RequestError as error:
                self.forget()
                say(f"{error}; a new conversation begins\n", "warning")
            except KeyboardInterrupt:
                self.messages.pop()  # what was asked, for no answer follows it
                say(" (stopped)\n", "warning")
