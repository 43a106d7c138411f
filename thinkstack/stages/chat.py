"""A conversation with a checkpoint: thinking and answer as they are drawn."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from thinkstack.checkpoint.model import load_chat, load_model
from thinkstack.engine.engine import Engine, EngineConfig
from thinkstack.models.precision import DTYPES, Precision, Stored
from thinkstack.stages.console import NEW, read_question, say, say_answer
from thinkstack.text.chat import ChatFormat, ZeroFormat
from thinkstack.text.parse import ANSWER_CLOSE, ANSWER_OPEN
from thinkstack.text.tokenizer import THINK_CLOSE, THINK_OPEN
from thinkstack.types import Message, RequestError, Sampling


@dataclass(frozen=True)
class Piece:
    """Some text of an assistant turn."""

    kind: str
    """"thinking", "answer", or "text" for what stands outside both."""
    text: str


class Talk:
    """A model, its format, and one conversation."""

    def __init__(self, source: str, sampling: Sampling, precision: Precision = "fp32", weights: Stored = "plain"):
        """source: a checkpoint folder, a GGUF file or pip:NAME. sampling: stop_ids and seed are filled in here.

        weights: how matrices are kept.
        """
        self.chat = load_chat(source)
        self.model = load_model(source, DTYPES[precision])
        self.engine = Engine(self.model, EngineConfig(max_batch=1, dtype=precision, weights=weights))
        self.sampling = replace(sampling, stop_ids=self.chat.stop_ids)
        self.messages: list[Message] = []
        self.last = LastToken(self.chat)

    def ask(self, question: str) -> Iterator[Piece]:
        """Stream the answer to the next message; the conversation remembers both."""
        if isinstance(self.chat, ZeroFormat):
            self.forget()  # R1-Zero is trained on one question at a time; an earlier turn would only confuse it
        self.messages.append(Message(role="user", content=question))
        prompt = self.chat.prompt(self.messages)
        room = self.engine.max_context - len(prompt)
        sampling = replace(self.sampling, max_tokens=max(min(self.sampling.max_tokens, room), 1))
        whole = ""
        for piece in split_turn(stream_text(self.chat.text_of, self.last.of(self.engine.stream(prompt, sampling)))):
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


class LastToken:
    """The token that a stream ended with, to say why an answer is empty."""

    def __init__(self, chat: ChatFormat):
        self.chat = chat
        self.token: int | None = None

    def of(self, ids: Iterator[int]) -> Iterator[int]:
        """The same ids."""
        self.token = None
        for self.token in ids:
            yield self.token

    def text(self) -> str:
        """How the tokenizer spells it."""
        return "no token" if self.token is None else self.chat.tokenizer.decode([self.token])


def stream_text(text_of: Callable[[Sequence[int]], str], ids: Iterator[int]) -> Iterator[str]:
    """Text as it becomes certain: half characters wait for their other half. text_of: the text of all ids so far."""
    drawn: list[int] = []
    sent = ""
    for token in ids:
        drawn.append(token)
        text = text_of(drawn)
        if not text.endswith("\ufffd") and len(text) > len(sent):
            yield text[len(sent) :]
            sent = text
    rest = text_of(drawn)[len(sent) :]
    if rest:
        yield rest


MARKS = {THINK_OPEN: "thinking", THINK_CLOSE: "text", ANSWER_OPEN: "answer", ANSWER_CLOSE: "text"}


def split_turn(chunks: Iterator[str]) -> Iterator[Piece]:
    """Sort streamed text into thinking, answer and the rest; tags are dropped, half tags wait for their other half."""
    kind, buffer = "text", ""
    for chunk in chunks:
        buffer += chunk
        while True:
            places = [(buffer.index(mark), mark) for mark in MARKS if mark in buffer]
            if not places:
                break
            place, mark = min(places)
            if buffer[:place]:
                yield Piece(kind, buffer[:place])
            kind, buffer = MARKS[mark], buffer[place + len(mark) :]
        held = max((size for mark in MARKS for size in range(1, len(mark)) if buffer.endswith(mark[:size])), default=0)
        ready = buffer[: len(buffer) - held]
        if ready:
            yield Piece(kind, ready)
        buffer = buffer[len(ready) :]
    if buffer:
        yield Piece(kind, buffer)
