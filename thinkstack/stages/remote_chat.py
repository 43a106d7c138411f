"""A model of an OpenAI-compatible server as the model of a chat."""

import json
import logging
import os
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import httpx2

from thinkstack.config import did_you_mean
from thinkstack.stages.chat import TurnSummary, to_openai
from thinkstack.text.stream_parser import StreamEvent, StreamParser
from thinkstack.types import ConfigError, Message, RequestError

CONNECT_SECONDS, SILENCE_SECONDS = 10.0, 600.0
"""Timeouts of a connection, and of the next bytes of an answer."""
THINKING_MODES = (True, False)
MAX_MESSAGE = 500
"""Characters of a server's error message that are shown."""


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
        self.url, self.summary = url.rstrip("/"), TurnSummary()
        host = _host(self.url)
        logging.getLogger("httpx2").setLevel(logging.WARNING)  # it logs every request
        key, self._options = api_key or find_api_key(host), dict(options or {})
        timeout = httpx2.Timeout(SILENCE_SECONDS, connect=CONNECT_SECONDS)
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        self._client = httpx2.Client(headers=headers, timeout=timeout, transport=transport)
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
        parser, reason, usage = StreamParser(), "", None
        with (
            self._as_request_error(),
            self._client.stream("POST", f"{self.url}/chat/completions", json=body) as reply,
        ):
            self._raise_for_status(reply)
            for chunk in chunks(reply):
                usage = chunk.get("usage") or usage
                for choice in chunk.get("choices") or ():
                    delta = choice.get("delta") or {}
                    thought = _text(delta.get("reasoning_content") or delta.get("reasoning"))
                    yield from [StreamEvent("reasoning", thought)] if thought else ()
                    yield from parser.feed(_text(delta.get("content")))
                    reason = choice.get("finish_reason") or reason
            ignored = reply.headers.get("X-Ignored-Fields", "")
        if not reason:
            raise RequestError(f"{self.url} ended the answer early, without a finish_reason; ask again")
        self.summary = TurnSummary(finish_reason=reason, ignored=ignored, **usage_counts(usage or {}))
        yield from parser.finish("length" if reason == "length" else "stop")

    def explain_empty(self) -> str:
        """The reason why the last answer is empty."""
        return f"the server's finish_reason is {self.summary.finish_reason!r}"

    @property
    def thinking_modes(self) -> tuple[bool, ...]:
        """Both: whether a name has a switch is known to the server alone."""
        return THINKING_MODES

    def list_names(self) -> list[str]:
        """The models that the server lists now; empty if it lists none."""
        with self._as_request_error():
            reply = self._client.get(f"{self.url}/models", timeout=CONNECT_SECONDS)
            if reply.status_code == 404:
                return []
            self._raise_for_status(reply)
            return [str(entry["id"]) for entry in reply.json()["data"]]

    def change(self, name: str) -> None:
        """Change to another name of the server."""
        self.name = self._checked(name, self.list_names())

    def _checked(self, name: str, names: Sequence[str]) -> str:
        if names and name not in names:
            raise ConfigError(f"{self.url} has no model {name!r}{did_you_mean(name, names)}")
        return name

    def _raise_for_status(self, reply: httpx2.Response) -> None:
        status = reply.status_code
        if reply.is_success:
            return
        reply.read()
        try:
            message = error_message(reply.json())
        except ValueError:
            message = reply.text
        hints = {401: "; give --api-key, or set OPENAI_API_KEY", 404: "; the address of most servers ends in /v1"}
        message = " ".join(message.split())[:MAX_MESSAGE] or reply.reason_phrase
        raise RequestError(f"{self.url}: {message} (status {status}){hints.get(status, '')}")

    @contextmanager
    def _as_request_error(self) -> Iterator[None]:
        """Convert errors of the transport and of the protocol to RequestError."""
        try:
            yield
        except httpx2.TimeoutException as error:
            raise RequestError(f"{self.url} did not answer in time ({type(error).__name__}); ask again") from error
        except httpx2.HTTPError as error:
            raise RequestError(f"cannot reach {self.url}: {error}; check that the server runs") from error
        except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
            raise RequestError(f"{self.url} does not answer as OpenAI's API does ({error!r}); check --url") from error


def _host(url: str) -> str:
    try:
        address = httpx2.URL(url)
    except httpx2.InvalidURL:
        address = httpx2.URL("")
    if address.scheme not in ("http", "https") or not address.host:
        raise ConfigError(f"{url!r} is not the address of a server; write it as http://host:port/v1")
    return address.host


def find_api_key(host: str) -> str:
    """The key in the environment: DEEPSEEK_API_KEY for deepseek.com, OPENAI_API_KEY for other hosts; "" without."""
    is_deepseek = host == "deepseek.com" or host.endswith(".deepseek.com")
    return os.environ.get("DEEPSEEK_API_KEY" if is_deepseek else "OPENAI_API_KEY", "")


def thinking_fields(thinking: bool | None) -> dict[str, Any]:
    """The fields that turn thinking on or off: DeepSeek's, and that of vLLM, SGLang and llama.cpp."""
    if thinking is None:
        return {}
    return {
        "thinking": {"type": "enabled" if thinking else "disabled"},
        "chat_template_kwargs": {"thinking": thinking, "enable_thinking": thinking},
    }


def chunks(reply: httpx2.Response) -> Iterator[dict[str, Any]]:
    """The chunks of a stream. Raises RequestError for an error among them."""
    for line in reply.iter_lines():
        field, _, value = line.partition(":")
        if field != "data" or value.strip() == "[DONE]":
            continue
        chunk = json.loads(value)
        if chunk.get("error"):
            raise RequestError(f"the server ended the answer: {error_message(chunk)[:MAX_MESSAGE]}")
        yield chunk


def usage_counts(usage: Mapping[str, Any]) -> dict[str, int | None]:
    """The counts of a `TurnSummary` from the usage of a reply."""
    details = usage.get("prompt_tokens_details") or {}
    return {
        "completion_tokens": usage.get("completion_tokens"),
        "prompt_tokens": usage.get("prompt_tokens"),
        "cached_tokens": details.get("cached_tokens", usage.get("prompt_cache_hit_tokens")),
    }


def error_message(body: Any) -> str:
    """The message of an error: {"error": {"message": ...}}, {"error": ...}, {"message": ...} or {"detail": ...}."""
    found = body
    for name in ("error", "message", "detail"):
        if isinstance(found, dict) and found.get(name):
            found = found[name]
    return found if isinstance(found, str) else json.dumps(found, ensure_ascii=False)


def _text(value: str | None) -> str:
    """The text of a delta; half of a surrogate pair, which cannot be printed, becomes U+FFFD."""
    return (value or "").encode("utf-16", "surrogatepass").decode("utf-16", "replace")
