"""Settings of an endpoint: address, limits, budgets, prices."""

import json
import re
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from annotated_types import Ge, Le

from thinkstack.config import Count, CountOrZero, Positive, SecondsOrZero, Unhashed
from thinkstack.endpoint.address import check_url
from thinkstack.types import ConfigError

Price = Annotated[float, Ge(0), Le(1e6)]
"""A price of a million tokens."""
ManyTokens = Annotated[int, Ge(0), Le(10**12)]
MADE_FIELDS = (
    {"model", "messages", "prompt", "tools", "temperature", "top_p", "max_tokens", "max_completion_tokens", "seed"}
    | {"stop", "stream", "stream_options", "n", "echo", "logprobs"}
)  # fmt: skip
"""Fields of a request that the client sets itself."""


@dataclass(frozen=True, kw_only=True)
class EndpointConfig:
    """An OpenAI-compatible endpoint, and how much may be asked of it."""

    url: str = ""
    """Address of the server, such as https://api.deepseek.com/v1 or http://127.0.0.1:8000/v1."""
    model: str = ""
    """Name of the model on the server; empty: the first one that the server lists."""
    api_key_env: Annotated[str, Unhashed()] = ""
    """Environment variable with the key; empty: DEEPSEEK_API_KEY for deepseek.com, OPENAI_API_KEY for other hosts."""
    concurrency: Annotated[Count, Unhashed()] = 8
    """Maximum number of running requests."""
    requests_per_minute: Annotated[CountOrZero, Unhashed()] = 0
    """Maximum number of requests that start per minute; 0: no limit."""
    tokens_per_minute: Annotated[CountOrZero, Unhashed()] = 0
    """Maximum number of tokens per minute; a request counts with its prompt and max_tokens when it starts, and with
    what it used when it ends; 0: no limit."""
    timeout_seconds: Annotated[Positive, Unhashed()] = 600.0
    """Maximum time without a byte of the reply; the longest pause of a stream, the whole reply of a server without
    streams."""
    max_request_seconds: Annotated[SecondsOrZero, Unhashed()] = 0.0
    """Maximum time of one attempt at a request; 0: no limit."""
    retries: Annotated[CountOrZero, Unhashed()] = 10
    """Number of further attempts at a request that failed by a limit, an error of the server or a broken connection."""
    max_backoff_seconds: Annotated[Positive, Unhashed()] = 60.0
    """Maximum time between two attempts, which doubles from half a second; a longer Retry-After counts."""
    thinking: bool | None = None
    """Whether the model thinks; None: the server's default."""
    opens_thinking: bool = False
    """Whether the server's prompt opens the think block, so that the content begins inside it: R1's template on a
    server without a parser for reasoning."""
    max_tokens_field: Literal["max_tokens", "max_completion_tokens"] = "max_tokens"
    """The name that the server has for the limit of a completion; OpenAI's reasoning models take
    max_completion_tokens."""
    extra_body: dict[str, Any] = field(default_factory=dict)
    """Further fields of each request, such as top_k or reasoning_effort."""
    prompt_price: Price = 0.0
    """Price of a million prompt tokens, in the currency of max_cost."""
    cached_prompt_price: Price | None = None
    """Price of a million prompt tokens that the server had in its cache; None: prompt_price."""
    completion_price: Price = 0.0
    """Price of a million completion tokens, thinking included."""
    max_tokens_total: Annotated[ManyTokens, Unhashed()] = 0
    """Budget of tokens, prompts included; 0: no limit."""
    max_seconds: Annotated[SecondsOrZero, Unhashed()] = 0.0
    """Time from the first request after which none starts; 0: no limit."""
    max_cost: Annotated[Annotated[float, Ge(0), Le(1e9)], Unhashed()] = 0.0
    """Budget of money, in the currency of the prices; 0: no limit."""
    cache: Annotated[str, Unhashed()] = ""
    """Folder of the completions by content, which several runs may share; empty: none."""

    def __post_init__(self) -> None:
        if self.url:
            check_url(self.url)
        if self.api_key_env and not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", self.api_key_env):
            raise ConfigError(
                "api_key_env is not the name of an environment variable; put the key into the environment and its name "
                "here, such as OPENAI_API_KEY"
            )
        if self.max_cost and not (self.prompt_price or self.completion_price):
            raise ConfigError(f"max_cost={self.max_cost:g} needs prices; set prompt_price and completion_price")
        if made := sorted(MADE_FIELDS & set(self.extra_body)):
            raise ConfigError(f"extra_body.{made[0]} is set by the client itself; remove it from extra_body")
        try:
            json.dumps(self.extra_body, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise ConfigError(
                f"extra_body cannot be sent as JSON ({error}); use text, numbers, lists and tables"
            ) from error
