"""What a server serves: members, each a model with its engine, and the model names of the API."""

import asyncio
import functools
import logging
import threading
import time
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from importlib import resources
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import urlsplit

from annotated_types import Ge, Gt, Le

from thinkstack.checkpoint.model import load_chat, load_model, open_source
from thinkstack.config import Count, CountOrZero, Tree, build, did_you_mean
from thinkstack.engine.block_pool import BLOCK_SIZE
from thinkstack.engine.engine import Engine, EngineConfig
from thinkstack.engine.interface import AnyService, Overloaded, WhileRunning
from thinkstack.engine.remote import RETRY_SECONDS
from thinkstack.engine.remote_service import RemoteService
from thinkstack.engine.service import EngineService
from thinkstack.files import read_text
from thinkstack.kernels.precision import DTYPES, Precision, RequestedPrecision, resolve_precision
from thinkstack.machine import pick_device
from thinkstack.models.config import ModelConfig
from thinkstack.models.precision import Quantization
from thinkstack.models.transformer import Transformer
from thinkstack.server.metrics import Latencies
from thinkstack.server.settings import ServerSettings
from thinkstack.text.chat import ChatFormat, think_end_token_ids, thinking_format, thinking_modes
from thinkstack.text.grammar import GrammarCompiler, json_object
from thinkstack.text.parse import ThinkingFormat
from thinkstack.types import ConfigError, RequestError

log = logging.getLogger(__name__)
TOKENIZER_SAMPLE = "The tokens of this text, 12,345.6 + x_i != naïve 你好 🙂\n\n\tare compared."
"""A text that different tokenizers split differently."""


@dataclass(frozen=True, kw_only=True)
class MemberConfig:
    """One model, in memory or on vLLM servers. The memory of its cache is fixed at the start."""

    model: str
    """A checkpoint folder, a .gguf file, OWNER/NAME of the hub, or pip:NAME."""
    servers: tuple[str, ...] = ()
    """vLLM servers that have the model, as http://host:port; only its tokenizer and chat template are read here."""
    dtype: RequestedPrecision = "auto"
    """Precision of weights and cache; "fp32" gives equal results in every batch."""
    quantization: Quantization = "none"
    """Quantization of the matrices."""
    max_num_seqs: Count = 64
    """Maximum number of sequences that run at once."""
    max_model_len: CountOrZero = 0
    """Maximum number of tokens of prompt and completion together; 0: the model's context."""
    cache_tokens: CountOrZero = 65_536
    """Size of the KV cache in tokens; 0: enough for max_num_seqs sequences of the whole context."""
    max_waiting: CountOrZero = 256
    """Maximum number of waiting requests; more are refused."""

    def __post_init__(self) -> None:
        if self.servers:
            for name in ("dtype", "quantization", "max_num_seqs", "cache_tokens"):
                if getattr(self, name) != MemberConfig.__dataclass_fields__[name].default:
                    raise ConfigError(f"{name} and servers are both set; {name} is an option of the servers, remove it")
            for address in self.servers:
                parts = urlsplit(address)
                if (
                    parts.scheme not in ("http", "https")
                    or not parts.hostname
                    or parts.path.rstrip("/").endswith("/v1")
                ):
                    words = f"servers: {address!r} is not the address of a server"
                    raise ConfigError(f"{words}; write it as http://host:port, without /v1")
            if len(set(self.servers)) < len(self.servers):
                raise ConfigError(f"servers={list(self.servers)} contains an address twice; list each address once")


@dataclass(frozen=True, kw_only=True)
class NameConfig:
    """What a model name of the API means."""

    member: str = "default"
    """Name of the member that answers."""
    thinking: bool = True
    """Whether the model thinks, if the request does not say so."""
    max_tokens: Count = 8192
    """Largest max_tokens of a request, with the thinking."""
    default_max_tokens: Count = 4096
    """max_tokens of a request that gives none."""
    efforts: Mapping[str, int] = field(default_factory=lambda: {"low": 1024, "high": 8192, "max": 32_768})
    """Largest number of thinking tokens by reasoning effort; the largest one applies without an effort."""
    temperature: Annotated[float, Ge(0), Le(2)] = 1.0
    """Default of temperature."""
    top_p: Annotated[float, Gt(0), Le(1)] = 1.0
    """Default of top_p."""
    fixed_sampling: bool = False
    """Whether all sampling fields of a request but seed and n are ignored, as DeepSeek's reasoner does."""
    on_page: bool = True
    """Whether the chat page offers this name."""
    price: str = ""
    """Name in the table of prices; empty: the name of the model."""


@dataclass(frozen=True, kw_only=True)
class ServeConfig:
    """The members and names of a server, from a TOML file."""

    members: Mapping[str, MemberConfig]
    """Models in memory by name."""
    models: Mapping[str, NameConfig]
    """Model names of the API."""
    server: ServerSettings = ServerSettings()
    """Limits of the server itself."""

    def __post_init__(self) -> None:
        for name, model in self.models.items():
            if model.member not in self.members:
                hint = did_you_mean(model.member, self.members)
                raise ConfigError(f"models.{name}.member={model.member!r} is not in members{hint}")


@dataclass(eq=False)
class Member:
    """A model and what runs it: a thread of this process, or vLLM servers."""

    config: MemberConfig
    service: AnyService
    chat: ChatFormat
    grammars: GrammarCompiler
    model_config: ModelConfig | None = None
    """None for an engine without weights, such as a scripted one."""
    latencies: Latencies = field(default_factory=Latencies)
    source: str = ""
    """Where the weights are from, if not config.model."""
    weights_version: int = 0
    """How often the weights have changed."""
    _loading: asyncio.Lock = field(default_factory=asyncio.Lock)

    def __post_init__(self) -> None:
        self.source = self.source or self.config.model

    @property
    def think_end_token_ids(self) -> tuple[int, ...]:
        """Tokens that close thinking."""
        return think_end_token_ids(self.chat)

    @property
    def is_full(self) -> bool:
        """Whether the queue takes no request."""
        return 0 < self.config.max_waiting <= self.service.status.waiting

    def check_queue(self) -> None:
        """Raise Overloaded if the queue is full, before a request costs anything; the engine checks again."""
        if self.is_full:
            raise Overloaded(f"{self.service.status.waiting:,} requests are waiting; retry later")

    async def load_weights(self, source: str, running: WhileRunning = "drain") -> None:
        """Use the weights of another checkpoint with the same configuration and tokenizer. running: see WhileRunning.

        Both models are in memory for a moment. Raises RequestError with the field "model" for a checkpoint that does
        not fit or cannot be read; the weights are unchanged then. Raises RequestError for a member on vLLM servers.
        """
        if not isinstance(self.service, EngineService):
            raise RequestError(
                f"the weights of this member are those of its vLLM servers, {', '.join(self.config.servers)}; change "
                "them there",
                "member",
            )
        async with self._loading:
            try:
                model = await asyncio.to_thread(self._read_weights, source)
            except ConfigError as error:
                raise RequestError(str(error), "model") from error
            await self.service.load_weights(model, self.weights_version + 1, running)
            self.source, self.weights_version = source, self.weights_version + 1

    def _read_weights(self, source: str) -> Transformer:
        opened, current = open_source(source), self.model_config
        if current is None:
            raise ConfigError("this member has no weights")
        names = [each.name for each in fields(current) if getattr(opened.cfg, each.name) != getattr(current, each.name)]
        if names:
            name, other, own = names[0], getattr(opened.cfg, names[0]), getattr(current, names[0])
            raise ConfigError(
                f"{source} has {name}={other} and the model of this member {own}; start another server for it"
            )
        if load_chat(source).tokenizer.spec != self.chat.tokenizer.spec:
            raise ConfigError(f"{source} has another tokenizer than this member; start another server for it")
        return _read_model(source, resolve_precision(self.config.dtype, pick_device("auto")))

    def can_start(self, thinking: bool) -> bool:
        """Whether the chat format can start a turn that thinks, or one that does not."""
        return thinking in self._starts

    @functools.cached_property
    def _starts(self) -> frozenset[bool]:
        return thinking_modes(self.chat)

    @functools.cached_property
    def thinking_format(self) -> ThinkingFormat:
        """The format of turns."""
        return thinking_format(self.chat)


@dataclass(frozen=True)
class ServedModel:
    """A model name of the API."""

    name: str
    config: NameConfig
    member: Member

    @property
    def price_name(self) -> str:
        """Name in the table of prices."""
        return self.config.price or self.name


class ServedModels:
    """All names of a server."""

    def __init__(self, members: Mapping[str, Member], models: Mapping[str, NameConfig]):
        self.members = members
        self._models = {name: ServedModel(name, config, members[config.member]) for name, config in models.items()}

    def __iter__(self) -> Any:
        return iter(self._models.values())

    def get(self, name: str) -> ServedModel:
        """The model with this name. Raises RequestError with the field "model"."""
        if name not in self._models:
            hint = did_you_mean(name, self._models) or f"; known: {', '.join(self._models)}"
            raise RequestError(f"unknown model {name!r}{hint}", "model")
        return self._models[name]


def read_config(path: Path) -> ServeConfig:
    """The configuration in a TOML file. Raises ConfigError."""
    try:
        tree = tomllib.loads(read_text(path, "settings of a server"))
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path} is not TOML: {error}") from error
    return build(ServeConfig, tree)


def config_of_model(model: str, **settings: Any) -> ServeConfig:
    """One model under DeepSeek's names, those of models.toml, and its own name. settings: fields of MemberConfig."""
    text = resources.files("thinkstack.server").joinpath("models.toml").read_text(encoding="utf-8")
    names: Tree = {Path(model).name or model: {}} | tomllib.loads(text)["models"]
    return build(ServeConfig, {"members": {"default": {"model": model} | settings}, "models": names})


def load_member(name: str, config: MemberConfig) -> Member:
    """Load a model and start its engine, or attach to its servers; logs how long it took. Raises ConfigError."""
    began, dtype = time.monotonic(), resolve_precision(config.dtype, pick_device("auto"))
    chat = load_chat(config.model)
    if not chat.has_template:
        raise ConfigError(f"{config.model} has no chat template, so it cannot answer messages; serve a chat model")
    if config.servers:
        return attach_member(name, config, chat)
    model = _read_model(config.model, dtype)
    loaded = time.monotonic()
    engine = Engine(
        model,
        EngineConfig(
            max_num_seqs=config.max_num_seqs,
            max_model_len=config.max_model_len,
            cache_tokens=config.cache_tokens,
            max_waiting=config.max_waiting,
            dtype=dtype,
            quantization=config.quantization,
        ),
    )
    cache, tokens = engine.runner.cache, engine.scheduler.pool.num_blocks * BLOCK_SIZE
    log.info(
        "%s: %s on %s, %s, quantization %s, context %s, KV cache %s tokens = %.0f MiB; "
        "read in %.1f s, engine in %.1f s",
        name, config.model, engine.runner.device, dtype, config.quantization, f"{engine.max_model_len:,}",
        f"{tokens:,}", cache.data.nbytes / 2**20, loaded - began, time.monotonic() - loaded,
    )  # fmt: skip
    return Member(config, EngineService(engine), chat, _grammars(chat), model.cfg)


def attach_member(name: str, config: MemberConfig, chat: ChatFormat, check_seconds: float = RETRY_SECONDS) -> Member:
    """A member on vLLM servers. check_seconds: time between two checks of a server. Raises ConfigError."""
    tokenizer = chat.tokenizer
    control = sorted(tokenizer.control, key=tokenizer.control.__getitem__)
    texts = {
        TOKENIZER_SAMPLE: tokenizer.encode(TOKENIZER_SAMPLE),
        "".join(control): [tokenizer.control[token] for token in control],
    }
    service = RemoteService(config.servers, tokenizer.vocab_size, texts, config.max_model_len, check_seconds)
    log.info(
        "%s: %s on %s, context %s, weights %s",
        name, config.model, ", ".join(config.servers), f"{service.max_model_len:,}", ", ".join(service.status.weights),
    )  # fmt: skip
    return Member(config, service, chat, _grammars(chat))


def _grammars(chat: ChatFormat) -> GrammarCompiler:
    grammars = GrammarCompiler(chat)
    threading.Thread(target=grammars.compile, args=(json_object(),), daemon=True).start()  # the first takes seconds
    return grammars


def _read_model(source: str, dtype: Precision) -> Transformer:
    return load_model(source, DTYPES[dtype]).to(pick_device("auto"))
