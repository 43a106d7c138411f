"""A conversation with a model, which is a checkpoint here or a name on a server; thinking and answer are streamed."""

import os
import time
from collections.abc import Collection, Generator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from thinkstack.endpoint.requests import to_openai
from thinkstack.files import read_object
from thinkstack.log import write_json
from thinkstack.stages import console
from thinkstack.stages.console import NEW, Command, read_question, styled, write, write_answer
from thinkstack.stages.turns import read_turns
from thinkstack.text.stream_parser import StreamEvent
from thinkstack.types import ConfigError, Message, RequestError

COMMANDS = {
    NEW: console.COMMANDS[NEW],
    "/think": "think before answers from now on",
    "/no-think": "answer without thinking from now on",
    "/model [NAME]": "change the model and keep the conversation; without NAME: show it",
    "/save FILE": "write the conversation as JSON",
    "/load FILE": "go on with a saved conversation",
    **console.COMMANDS,
}


@dataclass(frozen=True, kw_only=True)
class TurnSummary:
    """What a model reports of an answer; None: not reported."""

    finish_reason: str = "stop"
    completion_tokens: int | None = None
    prompt_tokens: int | None = None
    cached_tokens: int | None = None
    """Prompt tokens that were in the prefix cache."""
    ignored: str = ""
    """Fields of the request that the server ignored."""


class ChatModel(Protocol):
    """A model to talk with."""

    name: str
    summary: TurnSummary
    """Of the last answer."""

    def stream(self, messages: Sequence[Message], thinking: bool | None) -> Generator[StreamEvent]:
        """Stream the next assistant turn; closing the iterator ends the request.

        thinking: None is the model's default. Raises RequestError.
        """

    def explain_empty(self) -> str:
        """The reason why the last answer is empty."""

    @property
    def thinking_modes(self) -> Collection[bool]:
        """The values that `thinking` may have; empty if the model decides."""

    def list_names(self) -> Sequence[str]:
        """Names that `change` takes; empty if they cannot be listed. Raises RequestError."""

    def change(self, name: str) -> None:
        """Change to another model. Raises ConfigError, and keeps the current model then."""


class ChatSession:
    """A model and one conversation with it."""

    def __init__(self, model: ChatModel):
        self.model = model
        self.messages: list[Message] = []
        self.thinking: bool | None = None
        """Whether the model thinks; None: its default."""
        self._saved: Path | None = None
        """The file of this conversation, which may be written again."""
        self._has_reasoning, self._seconds = False, 0.0

    def ask(self, question: str) -> Generator[StreamEvent]:
        """Stream the answer to a question, and append question and answer to the conversation when it is complete.

        Raises RequestError, which leaves the conversation as it was.
        """
        asked = Message(role="user", content=question)
        texts = {"reasoning": "", "content": ""}
        started = 0.0
        with closing(self.model.stream([*self.messages, asked], self.thinking)) as events:
            for event in events:
                started = started or time.monotonic()
                if event.kind in texts:
                    texts[event.kind] += event.text
                yield event
        self._has_reasoning, self._seconds = bool(texts["reasoning"]), time.monotonic() - started
        reasoning, content = texts["reasoning"].strip() or None, texts["content"].strip()
        self.messages += [asked, Message(role="assistant", content=content, reasoning=reasoning)]

    def status(self) -> str:
        """The last answer in one line: its tokens and their speed, and what is unusual about it."""
        found, parts = self.model.summary, []
        if found.completion_tokens is not None:
            parts.append(f"{found.completion_tokens:,} tokens")
            if found.completion_tokens > 1 and self._seconds > 0:
                parts.append(f"{(found.completion_tokens - 1) / self._seconds:,.1f} tokens/s")
        if found.prompt_tokens is not None:
            cached = "" if found.cached_tokens is None else f", {found.cached_tokens:,} of them cached"
            parts.append(f"prompt of {found.prompt_tokens:,} tokens{cached}")
        if found.finish_reason == "length":
            parts.append("cut off at the token limit (--max-new-tokens)")
        elif found.finish_reason != "stop":
            parts.append(f"ended by {found.finish_reason}")
        if found.ignored:
            parts.append(f"ignored by the server: {found.ignored}")
        if self.thinking is not None and self.thinking != self._has_reasoning:
            parts.append("thinking is on, but there is none" if self.thinking else "the model thinks nevertheless")
        return "; ".join(parts)

    def reset(self) -> None:
        """Start a new conversation."""
        self.messages.clear()
        self._saved = None

    def set_thinking(self, thinking: bool) -> None:
        """Turn thinking on or off for the next answers. Raises RequestError if the model has no switch."""
        modes = self.model.thinking_modes
        if thinking not in modes:
            never, always = "never thinks", "always thinks"
            behavior = f"it {never if thinking else always}" if modes else "its chat template decides"
            raise RequestError(f"{self.model.name} has no switch for thinking: {behavior}")
        self.thinking = thinking

    def change_model(self, name: str) -> None:
        """Go on with another model; a setting of thinking that it lacks becomes its default. Raises ConfigError."""
        self.model.change(name)
        if self.thinking not in self.model.thinking_modes:
            self.thinking = None

    def save(self, path: Path) -> None:
        """Write the conversation as JSON, atomically: the model, and messages as OpenAI's API has them, thinking as
        `reasoning_content`.

        Raises ConfigError for a file that exists, unless it was saved or loaded by this conversation.
        """
        if path.exists() and path.resolve() != self._saved:
            raise ConfigError(f"{path} exists; choose another name, or delete the file")
        write_json(path, {"model": self.model.name, "messages": [to_openai(message) for message in self.messages]})
        self._saved = path.resolve()

    def load(self, path: Path) -> None:
        """Go on with the conversation in a file of `save`. Raises ConfigError, and keeps the current one then."""
        messages = read_turns(read_object(path).get("messages"), str(path), set(), trains=False)
        self.messages, self._saved = messages, path.resolve()


def converse(session: ChatSession) -> None:
    """Answer questions at the terminal until the user quits. Ctrl-C stops an answer; errors leave the conversation as
    it was."""
    write(f"{session.model.name}: type a question; /help lists the commands, an empty line quits\n", "note")
    while (line := read_question(commands=COMMANDS)) is not None:
        try:
            if isinstance(line, Command):
                write(f"{run_command(session, line)}\n", "note")
                continue
            with closing(session.ask(line)) as events:
                write_answer(styled(events), session.model.explain_empty)
            write(f"({session.status()})\n" if session.status() else "", "note")
        except (ConfigError, RequestError, OSError) as error:
            write(f"{error}\n", "warning")
        except KeyboardInterrupt:
            write(" (stopped)\n", "warning")


def run_command(session: ChatSession, command: Command) -> str:
    """Run a command of `COMMANDS` and return what to tell the user. Raises ConfigError and RequestError."""
    path = Path(os.path.expanduser(command.argument))  # which never fails
    if command.name == NEW:
        session.reset()
        return "a new conversation"
    if command.name in ("/think", "/no-think"):
        session.set_thinking(command.name == "/think")
        return f"thinking is {'on' if session.thinking else 'off'}"
    if command.name == "/save":
        session.save(path)
        return f"wrote {len(session.messages)} messages to {path}"
    if command.name == "/load":
        session.load(path)
        return f"read {len(session.messages)} messages from {path}"
    if not command.argument:
        names = ", ".join(session.model.list_names())
        return f"{session.model.name}; known: {names}" if names else session.model.name
    session.change_model(command.argument)
    return f"{session.model.name} answers from now on"
