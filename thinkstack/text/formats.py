"""Shared code of all chat formats (text of a turn, training examples), the R1-Zero format, and plain text."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from thinkstack.text.parse import split_thinking
from thinkstack.text.tokenizer import BOS, EOS, THINK_CLOSE, THINK_OPEN, Control, Tokenizer
from thinkstack.types import ConfigError, Message, RequestError, Tool

TokenizedExample = tuple[list[int], list[int]]
"""Ids of one sequence, and its loss mask: 1 for each trained id."""

ZERO_PREAMBLE = (
    "Below, a User puts a question to an Assistant. The Assistant thinks first and answers then: its thoughts stand "
    "between <think> and </think>, its answer stands between <answer> and </answer>. "
)
"""Instruction before the question; a paraphrase of table 1 of the R1 paper."""


@dataclass(frozen=True)
class TurnFormat:
    """Methods that every format derives from its `prompt` (the ids before an assistant turn) and `turn` (its ids)."""

    tokenizer: Tokenizer

    @property
    def has_template(self) -> bool:
        """Whether the format supports conversations; if not, the model continues plain text."""
        return True

    @property
    def can_switch(self) -> bool:
        """Whether each prompt can turn thinking on or off."""
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

    def opening_pieces(self, messages: Sequence[Message], thinking: bool | None = None) -> list[str]:
        if not messages or messages[-1].role != "assistant":
            return self.tokenizer.split_controls(self.opening(messages, thinking))
        thinking = self._continued_thinking(messages, thinking)
        return [*self.opening_pieces(messages[:-1], thinking), *self.continuation(messages, (), thinking)]

    def continue_final_message(
        self, messages: Sequence[Message], tools: Sequence[Tool] = (), thinking: bool | None = None
    ) -> list[int]:
        thinking = self._continued_thinking(messages, thinking)
        pieces = self.continuation(messages, tools, thinking)
        return [*self.prompt(messages[:-1], tools, thinking), *self.tokenizer.encode_pieces(pieces)]

    def continuation(self, messages: Sequence[Message], tools: Sequence[Tool], thinking: bool | None) -> list[str]:
        """Return the pieces of the unfinished last message, which follow `prompt` of the earlier messages."""
        raise NotImplementedError

    def _continued_thinking(self, messages: Sequence[Message], thinking: bool | None) -> bool | None:
        """Check a last message to continue, and return the switch for its prompt."""
        if len(messages) < 2 or messages[-1].role != "assistant" or messages[-1].tool_calls:
            raise RequestError(
                "only an assistant message without tool calls can be continued, after at least one other message; add "
                "it as the last message",
                "messages",
            )
        if messages[-1].reasoning is None:
            return thinking
        if thinking is False:
            raise RequestError(
                "the message to continue has reasoning, but thinking is off; turn it on, or remove it", "messages"
            )
        return True if self.can_switch else thinking

    def prompt(
        self, messages: Sequence[Message], tools: Sequence[Tool] = (), thinking: bool | None = None
    ) -> list[int]:
        raise NotImplementedError

    def turn(self, messages: Sequence[Message], tools: Sequence[Tool], thinking: bool | None) -> list[int]:
        """Return the ids of the last message, which follow `prompt` of the earlier messages, with the end token."""
        raise NotImplementedError

    def text_of(self, token_ids: Sequence[int], opening: str | None = None) -> str:
        ids = list(token_ids)
        if ids and ids[-1] in self.stop_token_ids:
            ids.pop()
        return (self.prefill if opening is None else opening) + self.tokenizer.decode(ids)

    def answer(self, text: str) -> list[int]:
        return self.close(self.split_think_tags(text.removeprefix(self.prefill)))

    def split_think_tags(self, text: str) -> list[str]:
        """Split text into pieces, with think tags as control tokens if the vocabulary has them."""
        pieces = self.tokenizer.split_controls(text)
        return [piece if piece in (THINK_OPEN, THINK_CLOSE) else str(piece) for piece in pieces]

    def missing_as_text(self, pieces: Sequence[str]) -> list[str]:
        """Turn control tokens that the vocabulary lacks into text."""
        return [piece if piece in self.tokenizer.control else str(piece) for piece in pieces]

    def close(self, pieces: Sequence[str]) -> list[int]:
        """Return the ids of the pieces of a turn and its end token. Raises ConfigError if there is no end token."""
        if not self.stop_token_ids:
            raise ConfigError(
                "neither the template nor the checkpoint has a token that ends a turn; set eos_token in "
                "tokenizer_config.json"
            )
        return [*self.tokenizer.encode_pieces(pieces), self.stop_token_ids[0]]

    def example(
        self, messages: Sequence[Message], tools: Sequence[Tool] = (), thinking: bool | None = None
    ) -> list[TokenizedExample]:
        examples: list[TokenizedExample] = []
        for index, message in enumerate(messages):
            if message.role != "assistant" or not message.is_trained:
                continue
            parsed = with_reasoning(message)
            is_thinking = parsed.reasoning is not None if thinking is None and self.can_switch else thinking
            prompt = self.prompt(messages[:index], tools, is_thinking)
            turn = self.turn([*messages[:index], parsed], tools, is_thinking)
            if not examples or prompt[: len(examples[-1][0])] != examples[-1][0]:
                examples.append(([], []))
            ids, loss_mask = examples[-1]
            loss_mask += [0] * (len(prompt) - len(ids)) + [1] * len(turn)
            ids += prompt[len(ids) :] + turn
        if not examples:
            raise RequestError("the conversation has no assistant turn to train on; add one")
        return examples


def with_reasoning(message: Message) -> Message:
    """Return the message with a leading think block of its content moved to `reasoning`."""
    if message.role != "assistant" or message.reasoning is not None or THINK_CLOSE not in message.content:
        return message
    thinking, rest = split_thinking(message.content)
    return message if thinking is None else replace(message, content=rest.strip("\n"), reasoning=thinking.strip("\n"))


def think_block(reasoning: str | None, gap: str = "\n") -> list[str]:
    """Return the pieces of a think block and of the line break after it."""
    return [Control(THINK_OPEN), f"{gap}{reasoning or ''}{gap}", Control(THINK_CLOSE), gap * 2]


def check_thinking_switch(name: str, thinking: bool | None, fixed: bool | None) -> None:
    """Raise RequestError if a format without a thinking switch does not support `thinking`. fixed: its behavior."""
    if thinking is not None and thinking != fixed:
        raise RequestError(
            f"thinking={thinking} is not supported: the chat format {name!r} has no switch for it; remove the option"
        )


@dataclass(frozen=True)
class ZeroFormat(TurnFormat):
    """R1-Zero: text without chat tokens (R1 paper, table 1)."""

    preamble: str = ZERO_PREAMBLE
    """Instruction before the question; empty for models that are too small to follow one."""
    prefill = ""

    @property
    def name(self) -> str:
        return "r1_zero" if self.preamble else "r1_zero_short"

    def prompt(
        self, messages: Sequence[Message], tools: Sequence[Tool] = (), thinking: bool | None = None
    ) -> list[int]:
        check_thinking_switch(self.name, thinking, True)
        self._refuse_tools(messages, tools)
        speakers = {"user": "User: ", "assistant": "Assistant: ", "system": ""}
        turns = "".join(f"{speakers[message.role]}{message.content}\n" for message in messages)
        return self.tokenizer.encode_pieces([Control(BOS), f"{self.preamble}{turns}Assistant: "])

    def _refuse_tools(self, messages: Sequence[Message], tools: Sequence[Tool]) -> None:
        if tools or any(message.tool_calls or message.role == "tool" for message in messages):
            raise RequestError(
                f"the chat format {self.name!r} does not support tools; remove tools, tool calls and tool messages"
            )

    def turn(self, messages: Sequence[Message], tools: Sequence[Tool], thinking: bool | None) -> list[int]:
        self._refuse_tools(messages, tools)
        message = messages[-1]
        block = [] if message.reasoning is None else [*think_block(message.reasoning)[:-1], "\n"]
        return self.close([*self.missing_as_text(block), message.content])

    def continuation(self, messages: Sequence[Message], tools: Sequence[Tool], thinking: bool | None) -> list[str]:
        message = messages[-1]
        block = [] if message.reasoning is None else [*think_block(message.reasoning)[:-1], "\n"]
        if block and not message.content:
            block = [block[0], f"\n{message.reasoning}"]
        return [*self.missing_as_text(block), message.content]


@dataclass(frozen=True)
class PlainText(TurnFormat):
    """The format of a base model, which continues plain text after the tokens that the tokenizer prepends.

    Conversations raise ConfigError.
    """

    end_token_ids: tuple[int, ...] = ()
    """Tokens that end a text; if empty, generation stops only at max_tokens."""
    way_out: str = ""
    """Error message for conversations: where the chat template is missing, and how to add one."""
    name = "none"
    prefill = ""

    @property
    def has_template(self) -> bool:
        return False

    @property
    def stop_token_ids(self) -> tuple[int, ...]:
        return self.end_token_ids

    def prompt(
        self, messages: Sequence[Message], tools: Sequence[Tool] = (), thinking: bool | None = None
    ) -> list[int]:
        raise ConfigError(self.way_out)

    def turn(self, messages: Sequence[Message], tools: Sequence[Tool], thinking: bool | None) -> list[int]:
        raise ConfigError(self.way_out)

    def continuation(self, messages: Sequence[Message], tools: Sequence[Tool], thinking: bool | None) -> list[str]:
        raise ConfigError(self.way_out)
