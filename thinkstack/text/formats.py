"""What all chat formats share, and R1-Zero's plain one: reading a turn, and conversations as examples to learn from."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from thinkstack.text.parse import split_thinking
from thinkstack.text.tokenizer import BOS, EOS, THINK_CLOSE, THINK_OPEN, Control, Tokenizer
from thinkstack.types import ConfigError, Message, RequestError, Tool

TokenizedExample = tuple[list[int], list[int]]
"""Ids of one sequence, and for each 1 if it is to be learnt."""

ZERO_PREAMBLE = (
    "Below, a User puts a question to an Assistant. The Assistant thinks first and answers then: its thoughts stand "
    "between <think> and </think>, its answer stands between <answer> and </answer>. "
)
"""What the plain template says before the question, in the sense of R1 paper's table 1."""


@dataclass(frozen=True)
class TurnFormat:
    """What follows from a format's `prompt` and `turn`, which ask for an assistant's turn and write one."""

    tokenizer: Tokenizer

    @property
    def has_template(self) -> bool:
        """Whether conversations can be written; without, plain text is continued."""
        return True

    @property
    def can_switch(self) -> bool:
        """Whether each prompt says if the model is to think."""
        return False

    @property
    def name(self) -> str:
        raise NotImplementedError

    @property
    def prefill(self) -> str:
        raise NotImplementedError

    @property
    def stop_token_ids(self) -> tuple[int, ...]:
        return (self.tokenizer.control_id(EOS),)

    def opening(self, messages: Sequence[Message], thinking: bool | None = None) -> str:
        return self.prefill

    def prompt(
        self, messages: Sequence[Message], tools: Sequence[Tool] = (), thinking: bool | None = None
    ) -> list[int]:
        raise NotImplementedError

    def turn(self, messages: Sequence[Message], tools: Sequence[Tool], thinking: bool | None) -> list[int]:
        """Ids of the last message as the answer to `prompt` of those before it, its end token included."""
        raise NotImplementedError

    def text_of(self, token_ids: Sequence[int], opening: str | None = None) -> str:
        ids = list(token_ids)
        if ids and ids[-1] in self.stop_token_ids:
            ids.pop()
        return (self.prefill if opening is None else opening) + self.tokenizer.decode(ids)

    def answer(self, text: str) -> list[int]:
        return self.close(self.with_tags(text.removeprefix(self.prefill)))

    def with_tags(self, text: str) -> list[str]:
        """Text in pieces, its think tags made control tokens where the vocabulary has them."""
        pieces = self.tokenizer.cut(text)
        return [piece if piece in (THINK_OPEN, THINK_CLOSE) else str(piece) for piece in pieces]

    def known(self, pieces: Sequence[str]) -> list[str]:
        """The same pieces, a control token that the vocabulary lacks being text."""
        return [piece if piece in self.tokenizer.control else str(piece) for piece in pieces]

    def close(self, pieces: Sequence[str]) -> list[int]:
        """Ids of the pieces of a turn and of the token that ends it. Raises ConfigError if no token is known to."""
        if not self.stop_token_ids:
            raise ConfigError(
                "no token ends a turn, in the template or the checkpoint; name eos_token in tokenizer_config.json"
            )
        return [*self.tokenizer.encode_pieces(pieces), self.stop_token_ids[0]]

    def example(
        self, messages: Sequence[Message], tools: Sequence[Tool] = (), thinking: bool | None = None
    ) -> list[TokenizedExample]:
        examples: list[TokenizedExample] = []
        for index, message in enumerate(messages):
            if message.role != "assistant" or not message.is_trained:
                continue
            read = with_reasoning(message)
            thinks = read.reasoning is not None if thinking is None and self.can_switch else thinking
            prompt = self.prompt(messages[:index], tools, thinks)
            turn = self.turn([*messages[:index], read], tools, thinks)
            if not examples or prompt[: len(examples[-1][0])] != examples[-1][0]:
                examples.append(([], []))
            ids, loss_mask = examples[-1]
            loss_mask += [0] * (len(prompt) - len(ids)) + [1] * len(turn)
            ids += prompt[len(ids) :] + turn
        if not examples:
            raise RequestError("the conversation has no turn of the assistant to learn; add one")
        return examples


def with_reasoning(message: Message) -> Message:
    """The message with a think block that its content begins with taken out as its reasoning."""
    if message.role != "assistant" or message.reasoning is not None or THINK_CLOSE not in message.content:
        return message
    thinking, rest = split_thinking(message.content)
    return message if thinking is None else replace(message, content=rest.strip("\n"), reasoning=thinking.strip("\n"))


def think_block(reasoning: str | None, gap: str = "\n") -> list[str]:
    """Pieces of a think block and of the break after it."""
    return [Control(THINK_OPEN), f"{gap}{reasoning or ''}{gap}", Control(THINK_CLOSE), gap * 2]


def refuse_switch(name: str, thinking: bool | None, always: bool | None) -> None:
    """Raise RequestError if a format without a switch is asked for what it does not do. always: what it does."""
    if thinking is not None and thinking != always:
        raise RequestError(
            f"thinking={thinking} was asked for, and the chat format {name!r} has no switch for it; leave it out"
        )


@dataclass(frozen=True)
class ZeroFormat(TurnFormat):
    """R1-Zero: plain text without chat tokens (R1 paper, table 1)."""

    preamble: str = ZERO_PREAMBLE
    """Instruction before the question; empty for models too small to follow one."""
    prefill = ""

    @property
    def name(self) -> str:
        return "r1_zero" if self.preamble else "r1_zero_short"

    def prompt(
        self, messages: Sequence[Message], tools: Sequence[Tool] = (), thinking: bool | None = None
    ) -> list[int]:
        refuse_switch(self.name, thinking, True)
        self._refuse_tools(messages, tools)
        speakers = {"user": "User: ", "assistant": "Assistant: ", "system": ""}
        turns = "".join(f"{speakers[message.role]}{message.content}\n" for message in messages)
        return self.tokenizer.encode_pieces([Control(BOS), f"{self.preamble}{turns}Assistant: "])

    def _refuse_tools(self, messages: Sequence[Message], tools: Sequence[Tool]) -> None:
        if tools or any(message.tool_calls or message.role == "tool" for message in messages):
            raise RequestError(f"the chat format {self.name!r} has no tools; leave them out")

    def turn(self, messages: Sequence[Message], tools: Sequence[Tool], thinking: bool | None) -> list[int]:
        self._refuse_tools(messages, tools)
        message = messages[-1]
        block = [] if message.reasoning is None else [*think_block(message.reasoning)[:-1], "\n"]
        return self.close([*self.known(block), message.content])


@dataclass(frozen=True)
class PlainText(TurnFormat):
    """A base model: it continues plain text, from what its tokenizer puts first. Conversations are refused."""

    ends: tuple[int, ...] = ()
    """Tokens that end a text; without any it goes on for as long as it may."""
    way_out: str = ""
    """What a chat format is missing from, and how to give it one."""
    name = "none"
    prefill = ""

    @property
    def has_template(self) -> bool:
        return False

    @property
    def stop_token_ids(self) -> tuple[int, ...]:
        return self.ends

    def prompt(
        self, messages: Sequence[Message], tools: Sequence[Tool] = (), thinking: bool | None = None
    ) -> list[int]:
        raise ConfigError(self.way_out)

    def turn(self, messages: Sequence[Message], tools: Sequence[Tool], thinking: bool | None) -> list[int]:
        raise ConfigError(self.way_out)
