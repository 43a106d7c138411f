"""What a server's replies say without their text: errors, whether to try again and when, names of models."""

import datetime
import email.utils
import json
import logging
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import httpx2

from thinkstack.endpoint.address import check_key, check_url, find_api_key
from thinkstack.types import ConfigError, RequestError

CONNECT_SECONDS = 10.0
"""Timeout of a connection and of the list of models."""
RETRIED = {408, 409, 425, 429}
"""Client errors after which the same request may succeed; so may it after every status from 500 on."""
OUT_OF_CREDIT = {"insufficient_quota", "billing_hard_limit_reached", "billing_not_active"}
"""Codes of OpenAI that come with status 429 and do not pass."""
MAX_MESSAGE = 500
"""Characters of a server's error message that are shown."""
LOST = (httpx2.ConnectError, httpx2.ConnectTimeout, httpx2.PoolTimeout)
"""Errors before the server has the request."""


class AttemptFailed(RequestError):
    """One attempt at a request failed."""

    def __init__(self, message: str, status: int = 0, can_retry: bool = False, retry_after_seconds: float = 0.0):
        """status: the HTTP status; 0: none. can_retry: whether the same request may succeed later.
        retry_after_seconds: when, if the server said so."""
        super().__init__(message)
        self.status, self.can_retry, self.retry_after_seconds = status, can_retry, retry_after_seconds
        self.is_unreachable = self.is_timeout = False
        """Whether the server never got the request, and whether a time-out ended it."""


class OpenAIServer:
    """The address of a server, its key, and the meaning of its errors. Messages never contain the key."""

    def __init__(self, url: str, api_key: str = "", api_key_env: str = "", key_hint: str = "set OPENAI_API_KEY"):
        """api_key: default that of `find_api_key`. key_hint: how to give a key, for messages. Raises ConfigError."""
        host = check_url(url)
        self.url, self._key_hint = url.rstrip("/"), key_hint
        self._key = check_key(api_key, "the API key") or find_api_key(host, api_key_env)
        logging.getLogger("httpx2").setLevel(logging.WARNING)  # it logs every request

    @property
    def headers(self) -> dict[str, str]:
        """The headers of a request."""
        return {"Authorization": f"Bearer {self._key}"} if self._key else {}

    def redact(self, text: str) -> str:
        """A text of the server without the key, in one line of at most MAX_MESSAGE characters."""
        text = text.replace(self._key, "[key]") if self._key else text
        return " ".join(text.split())[:MAX_MESSAGE]

    def names_of(self, reply: httpx2.Response) -> list[str]:
        """The models in a reply of /models, which was read; empty if the server has no such list."""
        if reply.status_code == 404:
            return []
        if not reply.is_success:
            raise self.failure_of(reply)
        return [str(entry["id"]) for entry in reply.json()["data"]]

    def failure_of(self, reply: httpx2.Response) -> AttemptFailed:
        """The error that a reply with an error status means. The reply was read."""
        status = reply.status_code
        try:
            body = reply.json()
            message, error_codes = error_message(body), _error_codes(body)
        except (ValueError, RecursionError):
            message, error_codes = reply.text, set()
        hints = {
            401: f"; {self._key_hint}",
            402: "; add credit to the account",
            403: "; the key may lack the right to this model",
            404: "; the address of most servers ends in /v1",
        }
        if reply.is_redirect:
            hints[status] = "; give the address that it redirects to"
        if error_codes & OUT_OF_CREDIT:
            hints[status] = hints[402]
        message = self.redact(message) or reply.reason_phrase
        can_retry = (status in RETRIED or status >= 500) and not error_codes & OUT_OF_CREDIT
        text = f"{self.url}: {message} (status {status}){hints.get(status, '')}"
        return AttemptFailed(text, status, can_retry, retry_after(reply.headers) if can_retry else 0.0)

    def failure_in_stream(self, chunk: Mapping[str, Any]) -> AttemptFailed:
        """The error that a chunk of a stream, or a reply with status 200, contains."""
        error = chunk.get("error")
        code = error.get("code") if isinstance(error, dict) else None
        status = int(code) if isinstance(code, int | str) and str(code).isdecimal() and len(str(code)) == 3 else 0
        can_retry = not 400 <= status < 500 or status in RETRIED
        message = f"the server ended the answer: {self.redact(error_message(dict(chunk)))}"
        return AttemptFailed(message, status, can_retry and not _error_codes(chunk) & OUT_OF_CREDIT)

    @contextmanager
    def as_failure(self) -> Iterator[None]:
        """Convert errors of the transport and of the protocol to AttemptFailed."""
        try:
            yield
        except (RequestError, ConfigError):
            raise
        except httpx2.HTTPError as error:
            what = self.redact(str(error)) or type(error).__name__
            message = f"cannot reach {self.url}: {what}; check that the server runs"
            if isinstance(error, httpx2.TimeoutException):
                message = f"{self.url} did not answer in time ({type(error).__name__}); ask again"
            failure = AttemptFailed(message, can_retry=True)
            failure.is_unreachable = isinstance(error, LOST)
            failure.is_timeout = isinstance(error, httpx2.TimeoutException)
            raise failure from error
        except (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError) as error:
            what = self.redact(repr(error))
            raise AttemptFailed(
                f"{self.url} does not answer as OpenAI's API does ({what}); check the address", can_retry=True
            ) from error


def retry_after(headers: Mapping[str, str]) -> float:
    """The seconds that the headers of a reply ask to wait: Retry-After in seconds or as a date, or OpenAI's
    retry-after-ms; 0 without."""
    for name, unit in (("retry-after-ms", 1000.0), ("retry-after", 1.0)):
        text = headers.get(name, "").strip()
        try:
            seconds = float(text) / unit
        except ValueError:
            continue
        return max(seconds, 0.0) if math.isfinite(seconds) else 0.0
    try:
        date = email.utils.parsedate_to_datetime(headers.get("retry-after", ""))
    except (TypeError, ValueError):
        return 0.0
    date = date if date.tzinfo else date.replace(tzinfo=datetime.UTC)
    return max((date - datetime.datetime.now(datetime.UTC)).total_seconds(), 0.0)


def error_message(body: Any) -> str:
    """The message of an error: {"error": {"message": ...}}, {"error": ...}, {"message": ...} or {"detail": ...}."""
    found = body
    for name in ("error", "message", "detail"):
        if isinstance(found, dict) and found.get(name):
            found = found[name]
    return found if isinstance(found, str) else json.dumps(found, ensure_ascii=False)


def _error_codes(body: Any) -> set[str]:
    """The code and type of an error."""
    error = body.get("error") if isinstance(body, dict) else None
    found = (error.get("code"), error.get("type")) if isinstance(error, dict) else ()
    return {value for value in found if isinstance(value, str)}
