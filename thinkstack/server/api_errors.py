"""Errors as HTTP: which status, type, field and wait each exception has; the dialects have their own shapes."""

import logging
import re
import secrets
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from thinkstack.engine.interface import Overloaded
from thinkstack.server.errors import (
    AuthenticationError,
    DatabaseUnavailable,
    InsufficientBalance,
    PermissionDenied,
    RateLimited,
)
from thinkstack.types import RequestError

log = logging.getLogger(__name__)
RETRY_SECONDS = 2
"""When to try again after an overload."""

ANTHROPIC_TYPES = {402: "billing_error", 404: "not_found_error", 413: "request_too_large", 500: "api_error"}
"""Types of errors by status that Anthropic has and DeepSeek has not."""

PAGE_CODES = {
    401: "signed_out", 402: "balance", 403: "forbidden", 404: "not_found", 408: "too_slow", 413: "too_large",
    429: "rate_limited", 500: "server_error", 503: "overloaded",
}  # fmt: skip
"""By status: the code by which the page finds its words; the others are "invalid"."""

SCHEMA = "response_format.json_schema"
ANTHROPIC_FIELDS = {
    "prompt": "messages",
    "function.parameters": "input_schema",
    "reasoning_effort": "output_config.effort",
    SCHEMA: "output_config.format.schema",
}
FIELDS: Mapping[str, Mapping[str, str]] = {
    "/chat/completions": {"prompt": "messages"},
    "/responses": {
        "prompt": "input",
        "messages": "input",
        "max_tokens": "max_output_tokens",
        "function.parameters": "parameters",
        "reasoning_effort": "reasoning.effort",
        SCHEMA: "text.format.schema",
    },
    "/messages": ANTHROPIC_FIELDS,
    "/count_tokens": ANTHROPIC_FIELDS,
    "/api/chat": {
        "prompt": "messages",
        "max_tokens": "options.num_predict",
        "thinking": "think",
        "reasoning_effort": "think",
        SCHEMA: "format",
    },
}
"""By the end of the path: the names that a dialect has for the fields of the engine and of the chat API."""


@dataclass(frozen=True)
class ApiError:
    """What a reply says about an error."""

    status: int
    message: str
    type: str
    param: str | None = None
    """The field of the request."""
    retry_after: int | None = None
    """Seconds."""

    @property
    def headers(self) -> dict[str, str]:
        """The headers of the reply."""
        return {} if self.retry_after is None else {"Retry-After": str(self.retry_after)}

    def body(self, path: str) -> dict[str, object]:
        """The body in the shape of the dialect that a path belongs to, with its names of fields."""
        found = self if self.param is None else self._with_fields_of(path)
        if path.startswith("/anthropic/"):
            return found.anthropic()
        if path.startswith("/page/"):
            return found.page()
        return found.ollama() if path.startswith("/api/") else found.openai()

    def _with_fields_of(self, path: str) -> "ApiError":
        names = next((names for end, names in FIELDS.items() if path.endswith(end)), {})
        identifiers = [name for name in names if "_" in name or "." in name]  # others are words of a message
        message, param = _rename(self.message, names, identifiers), _rename(self.param or "", names, names)
        return replace(self, message=message, param=param)

    def openai(self) -> dict[str, object]:
        """The body in OpenAI's and DeepSeek's shape."""
        return {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.code}}

    def anthropic(self) -> dict[str, object]:
        """The body in Anthropic's shape."""
        error = {"type": ANTHROPIC_TYPES.get(self.status, self.type), "message": self.message}
        return {"type": "error", "error": error, "request_id": f"req_{secrets.token_hex(12)}"}

    def ollama(self) -> dict[str, object]:
        """The body in Ollama's shape."""
        return {"error": self.message}

    def page(self) -> dict[str, object]:
        """The body in the shape of the chat page."""
        found: dict[str, object] = {"code": PAGE_CODES.get(self.status, "invalid"), "message": self.message}
        return {"error": found | ({} if self.retry_after is None else {"retry_after": self.retry_after})}

    @property
    def code(self) -> str:
        """DeepSeek's code: one for all errors of the request."""
        return "invalid_request_error" if self.status < 500 else self.type


def _rename(text: str, names: Mapping[str, str], which: Iterable[str]) -> str:
    pattern = "|".join(rf"\b{re.escape(name)}\b" for name in which)
    return re.sub(pattern, lambda match: names[match[0]], text) if pattern else text


def api_error(error: BaseException) -> ApiError:
    """How the API reports an exception; an unexpected one is a 500 without details."""
    message = str(error)
    match error:
        case RequestError():
            return ApiError(400, message, "invalid_request_error", error.field)
        case AuthenticationError():
            return ApiError(401, message, "authentication_error")
        case InsufficientBalance():
            return ApiError(402, message, "insufficient_balance_error")
        case PermissionDenied():
            return ApiError(403, message, "permission_error")
        case RateLimited():
            return ApiError(429, message, "rate_limit_error", None, error.retry_after_seconds)
        case DatabaseUnavailable():
            log.warning("%s", error)
            return ApiError(
                503, "the accounts are out of reach; try again later", "overloaded_error", None, RETRY_SECONDS
            )
        case Overloaded():
            return ApiError(503, message, "overloaded_error", None, RETRY_SECONDS)
    return ApiError(500, "the server failed; its log says why", "server_error")


def found_error(error: Exception, words: str) -> ApiError:
    """How the API reports an exception; an unexpected one is logged with `words`."""
    found = api_error(error)
    if found.status == 500:
        log.error(words, exc_info=error)
    return found
