"""Conversations to token ids and back: what a chat format is, and which there are.

Structure comes from control tokens and fixed strings written in this folder or in a shipped template; what people
wrote is text, so it can never become a control token. Every prompt of ours begins with exactly one BOS.
"""

from collections.abc import Sequence
from typing import Protocol

from thinkstack.text.deepseek import STYLES, DeepSeekFormat
from thinkstack.text.formats import ZERO_PREAMBLE, PlainText, TokenizedExample, ZeroFormat
from thinkstack.text.template import TemplateFormat
from thinkstack.text.tokenizer import Tokenizer
from thinkstack.types import ConfigError, Message, Tool

__all__ = [
    "FORMATS",
    "ZERO_PREAMBLE",
    "ChatFormat",
    "DeepSeekFormat",
    "PlainText",
    "TemplateFormat",
    "ZeroFormat",
    "chat_format",
]

FORMATS = ("r1_zero", "r1_zero_short", *STYLES, "v3_1_think")
"""Names of the formats of ours."""


class ChatFormat(Protocol):
    """How one model's conversations look in tokens."""

    @property
    def name(self) -> str:
        """Name that `chat_format` knows it by, "template", or "none" without one."""

    @property
    def has_template(self) -> bool:
        """Whether it writes conversations. A base model's (PlainText) does not: `prompt`, `turn` and `example` raise
        ConfigError, which says what is missing; its tokenizer and stop_token_ids serve to continue plain text.
        """

    @property
    def tokenizer(self) -> Tokenizer:
        """What turns the text of a turn into ids."""

    @property
    def prefill(self) -> str:
        """What the prompt of a user's question has already written of the answer; reward and parser read prefill +
        completion.
        """

    @property
    def stop_token_ids(self) -> tuple[int, ...]:
        """Tokens that end the assistant's turn; the first is the one that training teaches. May be empty where a
        checkpoint names none."""

    def prompt(
        self, messages: Sequence[Message], tools: Sequence[Tool] = (), thinking: bool | None = None
    ) -> list[int]:
        """Ids that ask for the next assistant turn.

        thinking: whether the model is to think first, where a format can say so; None is the format's default.
        Raises RequestError for an order of roles that it cannot write, and for tools or a switch that it has not.
        """

    def opening(self, messages: Sequence[Message], thinking: bool | None = None) -> str:
        """What `prompt` of these arguments has already written of the answer; "" after the result of a tool."""

    def text_of(self, token_ids: Sequence[int], opening: str | None = None) -> str:
        """The assistant's whole turn as text: opening and decoded ids, without the token that ended it.

        opening: what `opening` gave for the prompt; None is `prefill`.
        """

    def answer(self, text: str) -> list[int]:
        """Ids of a whole assistant turn for training, its end token included; its think tags become control tokens."""

    def example(
        self, messages: Sequence[Message], tools: Sequence[Tool] = (), thinking: bool | None = None
    ) -> list[TokenizedExample]:
        """A conversation as sequences to learn from: (ids, 1 for each id that is to be learnt, else 0).

        RolloutAdvantages is what the assistant says, thinks and calls, and the token that ends its turn; never a
        header, never what a prompt writes, never a turn whose is_trained is False. Each turn follows exactly the ids
        that `prompt` asks for it with: one sequence for as long as that prompt continues the sequence before, else a
        new one (history leaves thinking out). thinking: None lets each turn think that has thoughts, where a format has
        the switch. Raises RequestError as `prompt`, and for a conversation without a turn of the assistant.
        """


def chat_format(name: str, tokenizer: Tokenizer) -> ChatFormat:
    """One of our families' formats by name. Raises ConfigError for an unknown one."""
    if name not in FORMATS:
        raise ConfigError(f"unknown chat format {name!r}; known: {', '.join(FORMATS)}")
    if name.startswith("r1_zero"):
        return ZeroFormat(tokenizer) if name == "r1_zero" else ZeroFormat(tokenizer, preamble="")
    return DeepSeekFormat(tokenizer, name)
