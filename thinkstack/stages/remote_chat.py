"""A model of an OpenAI-compatible server as the model of a chat."""

from collections.abc import Generator, Iterable, Mapping, Sequence
from typing import Any

import httpx2

from thinkstack.config import did_you_mean
from thinkstack.endpoint.reply import Delta, ReplyReader, thinking_fields, usage_counts
from thinkstack.endpoint.requests import CHAT_PATH, encode_body, to_openai
from thinkstack.endpoint.server import CONNECT_SECONDS, OpenAIServer
from thinkstack.stages.chat import TurnSummary
from thinkstack.text.stream_parser import StreamEvent, StreamParser
from thinkstack.types import ConfigError, Message

SILENCE_SECONDS = 600.0
"""Timeout of the next bytes of an answer."""
THINKING_MODES = (True, False)
JSON = {"Content-Type": "application/json"}


class RemoteModel:
    """A model name of a server, reached by /models and /chat/completions below its address."""

    def __init__(
        self,
        url: str,
        name: str = "",
        api_key: str = "",
        options: Mapping[str, Any] | None = None,
        transport: httpx2.BaseTransport | None = None,
    ):
        """url: such as http://127.0.0.1:8000/v1. name: default the first model that the server lists. api_key: default
        `find_api_key`. options: fields of every request, such as temperature. transport: an httpx2 transport, for
        tests.

        Raises ConfigError for an address or name that does not exist, RequestError if the server does not answer.
        """
        self._server = OpenAIServer(url, api_key, key_hint="give --api-key, or set OPENAI_API_KEY")
        self.url, self.summary, self._options = self._server.url, TurnSummary(), dict(options or {})
        timeout = httpx2.Timeout(SILENCE_SECONDS, connect=CONNECT_SECONDS)
        self._client = httpx2.Client(headers=self._server.headers, timeout=timeout, transport=transport)
        names = self.list_names()
        if not (name or names):
            hint = (
                "check the address, which ends in /v1 for most servers, or name a model: thinkstack chat NAME --url URL"
            )
            raise ConfigError(f"{self.url}/models lists no models; {hint}")
        self.name = self._checked(name, names) if name else names[0]

    def stream(self, messages: Sequence[Message], thinking: bool | None) -> Generator[StreamEvent]:
        """Stream the next assistant turn; closing the iterator closes the connection, so that the server stops.

        Thinking is read from `reasoning_content` or `reasoning`, or from a think block at the start of the content.
        Raises RequestError with the message of the server.
        """
        body = {
            "model": self.name,
            "messages": [to_openai(message, with_reasoning=False) for message in messages],
            "stream": True,
            "stream_options": {"include_usage": True},
            **self._options,
            **thinking_fields(thinking),
        }
        reader, parser = ReplyReader(self._server), StreamParser()
        post = self._client.stream("POST", self.url + CHAT_PATH, content=encode_body(body), headers=JSON)
        with self._server.as_failure(), post as reply:
            if not reply.is_success:
                reply.read()
                raise self._server.failure_of(reply)
            for data in reply.iter_bytes():
                yield from _events(reader.feed(data), parser)
            yield from _events(reader.finish(), parser)
            ignored = reply.headers.get("X-Ignored-Fields", "")
        counts = usage_counts(reader.usage)
        self.summary = TurnSummary(
            finish_reason=reader.finish_reason,
            completion_tokens=counts["completion_tokens"],
            prompt_tokens=counts["prompt_tokens"],
            cached_tokens=counts["cached_tokens"],
            ignored=ignored,
        )
        yield from parser.finish("length" if reader.finish_reason == "length" else "stop")

    def explain_empty(self) -> str:
        """The reason why the last answer is empty."""
        return f"the server's finish_reason is {self.summary.finish_reason!r}"

    @property
    def thinking_modes(self) -> tuple[bool, ...]:
        """Both: whether a name has a switch is known to the server alone."""
        return THINKING_MODES

    def list_names(self) -> list[str]:
        """The models that the server lists now; empty if it lists none."""
        with self._server.as_failure():
            return self._server.names_of(self._client.get(f"{self.url}/models", timeout=CONNECT_SECONDS))

    def change(self, name: str) -> None:
        """Change to another name of the server."""
        self.name = self._checked(name, self.list_names())

    def _checked(self, name: str, names: Sequence[str]) -> str:
        if names and name not in names:
            raise ConfigError(f"{self.url} has no model {name!r}{did_you_mean(name, names)}")
        return name


def _events(deltas: Iterable[Delta], parser: StreamParser) -> Generator[StreamEvent]:
    """The events of new texts; a think block at the start of the content is thinking."""
    for kind, text in deltas:
        yield from [StreamEvent("reasoning", text)] if kind == "reasoning" else parser.feed(text)
