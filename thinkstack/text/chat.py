"""The chat format interface (conversations to token ids and back) and the list of our formats.

Control tokens come only from the code of this folder or from a checkpoint's template; message text can never become a
control token. Every prompt of our formats begins with exactly one BOS.
"""

import contextlib
from collections.abc import Sequence
from typing import Protocol

from thinkstack.text.deepseek import STYLES, DeepSeekFormat
from thinkstack.text.formats import ZERO_PREAMBLE, PlainText, TokenizedExample, ZeroFormat
from thinkstack.text.parse import ANSWER_OPEN, ThinkingFormat
from thinkstack.text.template import TemplateFormat
from thinkstack.text.tokenizer import THINK_CLOSE, Tokenizer
from thinkstack.types import ConfigError, Message, RequestError, Tool

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
"""Names of our chat formats."""


class ChatFormat(Protocol):
    """Conversion between the conversations of a model and token ids."""

    @property
    def name(self) -> str:
        """A name in FORMATS, "template" for a checkpoint's template, or "none" for plain text."""

    @property
    def has_template(self) -> bool:
        """Whether the format can write conversations.

        False for a base model (PlainText): `prompt`, `turn` and `example` raise a ConfigError that names the missing
        part; tokenizer and stop_token_ids are used to continue plain text.
        """

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer for the text of a turn."""

    @property
    def prefill(self) -> str:
        """The start of the assistant turn, if the prompt contains it; reward and parser read prefill + completion."""

    @property
    def stop_token_ids(self) -> tuple[int, ...]:
        """Tokens that end the assistant's turn; training uses the first. Empty if the checkpoint names none."""

    def prompt(
        self, messages: Sequence[Message], tools: Sequence[Tool] = (), thinking: bool | None = None
    ) -> list[int]:
        """Return the prompt ids for the next assistant turn.

        thinking: whether the model thinks first, if the format has a switch; None is the format's default.
        Raises RequestError for an unsupported order of roles, and for tools or a switch that the format lacks.
        """

    def opening(self, messages: Sequence[Message], thinking: bool | None = None) -> str:
        """Return the start of the assistant turn that `prompt` with these arguments contains; "" after a tool
        result."""

    def opening_pieces(self, messages: Sequence[Message], thinking: bool | None = None) -> list[str]:
        """Return the start of the assistant turn that the prompt contains, as pieces of text and control tokens.

        If the last message is the assistant's, the prompt is that of `continue_final_message`.
        """

    def continue_final_message(
        self, messages: Sequence[Message], tools: Sequence[Tool] = (), thinking: bool | None = None
    ) -> list[int]:
        """Return the prompt ids to go on from the last message, the assistant's: from its content, or from its
        reasoning if it has reasoning and no content.

        thinking: None turns thinking on for a message with reasoning, if the format has a switch.
        Raises RequestError like `prompt`, for a last message that is not the assistant's or has tool calls, and for a
        template that cannot write an unfinished message.
        """

    def text_of(self, token_ids: Sequence[int], opening: str | None = None) -> str:
        """Return the text of the assistant's turn: opening and decoded ids, without the end token.

        opening: the result of `opening` for the prompt; None is `prefill`.
        """

    def answer(self, text: str) -> list[int]:
        """Return the ids of an assistant turn for training, including the end token; think tags are control tokens."""

    def example(
        self, messages: Sequence[Message], tools: Sequence[Tool] = (), thinking: bool | None = None
    ) -> list[TokenizedExample]:
        """Return a conversation as training sequences: (ids, loss mask with 1 for each trained id).

        The loss mask is 1 for the assistant's content, reasoning and calls, and for its end token. It is 0 for headers
        and all other parts of a prompt, and for turns whose is_trained is False. Each turn follows exactly the ids of
        its `prompt`. A turn extends the last sequence if its prompt continues that sequence; otherwise, for example if
        the history leaves thinking out, it starts a new sequence. thinking: None turns thinking on for turns with
        reasoning, if the format has a switch.
        Raises RequestError like `prompt`, and for a conversation without an assistant turn.
        """


def chat_format(name: str, tokenizer: Tokenizer) -> ChatFormat:
    """Return one of our chat formats by name. Raises ConfigError for an unknown name."""
    if name not in FORMATS:
        raise ConfigError(f"unknown chat format {name!r}; known: {', '.join(FORMATS)}")
    if name.startswith("r1_zero"):
        return ZeroFormat(tokenizer) if name == "r1_zero" else ZeroFormat(tokenizer, preamble="")
    return DeepSeekFormat(tokenizer, name)


def thinking_modes(chat: ChatFormat) -> frozenset[bool]:
    """The values that `thinking` may have with this format; empty if it has no switch and does not tell."""
    found = set()
    for thinking in (False, True):
        with contextlib.suppress(RequestError):
            chat.prompt([Message(role="user", content="1")], (), thinking)
            found.add(thinking)
    return frozenset(found)


def think_end_token_ids(chat: ChatFormat) -> tuple[int, ...]:
    """The tokens that close thinking."""
    tokenizer = chat.tokenizer
    if THINK_CLOSE in tokenizer.control:
        return (tokenizer.control_id(THINK_CLOSE),)
    return tuple(tokenizer.encode(THINK_CLOSE))


def thinking_format(chat: ChatFormat) -> ThinkingFormat:
    """The format of turns: with answer tags if the vocabulary has a token for them, as our tasks train them."""
    return "think_answer_tags" if len(chat.tokenizer.encode(ANSWER_OPEN)) == 1 else "think_then_answer"
