"""One assistant turn: from a request of any dialect to a stream of events, with its charge."""

import asyncio
import random
import secrets
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass

from thinkstack.engine.grammar import StructuredOutputs
from thinkstack.engine.outputs import CompletionUpdate, joined
from thinkstack.engine.service import EngineService, EngineStopped, Generation
from thinkstack.server.billing import Billing, Charge
from thinkstack.server.keys import Principal
from thinkstack.server.ledger import Admission
from thinkstack.server.prices import FREE, Usage
from thinkstack.server.schema import TurnRequest
from thinkstack.server.served import Member, ServedModel
from thinkstack.text.chat import ChatFormat
from thinkstack.text.fim import fim_prompt
from thinkstack.text.grammar import CompiledGrammar, json_object, json_schema, tool_calls
from thinkstack.text.stream import TextStream, TokenKind, TurnStream
from thinkstack.text.stream_parser import StreamEvent
from thinkstack.types import Message, RequestError, SamplingParams, Tool

KEEP_ALIVE = (-1, StreamEvent("content"))
"""An event without content: the turn waits or thinks, and the engine is alive."""
TokenLogprob = tuple[int, float, tuple[tuple[int, float], ...]]
"""Token id, log-probability, and the most likely alternatives."""
PromptToken = tuple[int, float | None, tuple[tuple[int, float], ...]]
"""The same for a token of the prompt; None for the first token."""
LONG_PROMPT = 20_000
"""Number of characters from which a prompt is tokenized in a thread."""
_random = random.Random(secrets.randbits(256))
"""Of ids and seeds, which are no secrets."""


@dataclass(frozen=True)
class PreparedTurn:
    """A request as the engine has it."""

    prompt_token_ids: tuple[int, ...]
    sampling: SamplingParams
    opening: list[str]
    """The start of the turn that the prompt contains, as pieces of text and control tokens."""
    grammar: StructuredOutputs | None
    is_thinking: bool
    is_prompt_only: bool
    """Whether no token is delivered; the engine samples one."""
    ignored: tuple[str, ...]
    """Sampling fields of the request that have no effect with this model name."""


def prepare(model: ServedModel, request: TurnRequest) -> PreparedTurn:
    """Render the prompt, compile the grammar and resolve all settings; takes seconds for some schemas.

    Raises RequestError.
    """
    config, member = model.config, model.member
    wants_thinking = request.thinking if request.thinking is not None else config.thinking
    switch = wants_thinking if member.can_start(wants_thinking) else None
    if switch is None and request.thinking:
        raise RequestError(f"{model.name} cannot think; leave thinking out", "thinking")
    check_tool_results(request.messages)
    tools = request.tools if request.tool_choice != "none" else ()
    prompt, opening = _render(member.chat, request, tools, switch)
    state = TurnStream(member.chat, opening, member.thinking_format).state
    is_tagged = member.thinking_format == "think_answer_tags"
    may_think = state == "thinking" or ((state == "start" or is_tagged) and member.can_start(True))
    is_off = switch is False and state == "start"  # such as after the result of a tool: no tag opens, none has to close
    may_think = may_think and not is_off and request.prompt is None
    if request.max_tokens is not None and request.max_tokens > config.max_tokens:
        raise RequestError(
            f"max_tokens={request.max_tokens} is above {config.max_tokens}, the most of {model.name}", "max_tokens"
        )
    if request.prompt_logprobs is not None and not isinstance(member.service, EngineService):
        raise RequestError("logprobs of the prompt are not read from vLLM servers; leave out echo or logprobs", "echo")
    free = member.service.max_model_len - len(prompt)
    max_tokens = request.max_tokens if request.max_tokens is not None else min(config.default_max_tokens, free)
    ignored = tuple(name for name in request.sampling if config.fixed_sampling and name not in ("seed", "n"))
    given = {name: value for name, value in request.sampling.items() if name not in ignored}
    given.setdefault("seed", _random.getrandbits(62))
    budget = _thinking_budget(model, request, wants_thinking)
    sampling = SamplingParams(
        **{"temperature": config.temperature, "top_p": config.top_p} | given,
        max_tokens=max(max_tokens, 1),
        stop_token_ids=member.chat.stop_token_ids,
        top_logprobs=request.top_logprobs,
        prompt_logprobs=request.prompt_logprobs,
        raw_logprobs=request.logprobs,
        think_end_token_ids=member.think_end_token_ids if may_think else (),
        thinking_budget=budget if may_think and budget < max_tokens else None,
    )
    grammar = _grammar(member, request, tools)
    factory = None if grammar is None else grammar.factory(member.chat.tokenizer.encode_pieces(opening))
    is_prompt_only = request.max_tokens == 0
    return PreparedTurn(prompt, sampling, opening, factory, wants_thinking and may_think, is_prompt_only, ignored)


def check_tool_results(messages: Sequence[Message]) -> None:
    """Raise RequestError for a result of a tool that does not follow its call."""
    is_expected = False
    for place, message in enumerate(messages):
        if message.role != "tool":
            is_expected = message.role == "assistant" and bool(message.tool_calls)
        elif not is_expected:
            raise RequestError(
                f"message {place} has the role 'tool', but no assistant message with tool_calls comes before it; add "
                "the message with the call",
                "messages",
            )


def _render(
    chat: ChatFormat, request: TurnRequest, tools: Sequence[Tool], switch: bool | None
) -> tuple[tuple[int, ...], list[str]]:
    """Prompt token ids, and the start of the turn that they contain."""
    try:
        if request.prompt_token_ids is not None:
            return request.prompt_token_ids, []
        if request.prompt is not None:
            return tuple(fim_prompt(chat.tokenizer, request.prompt, request.suffix)), []
        if request.is_prefix:
            prompt = chat.continue_final_message(request.messages, tools)
            return tuple(prompt), chat.opening_pieces(request.messages)
        return tuple(chat.prompt(request.messages, tools, switch)), chat.opening_pieces(request.messages, switch)
    except RequestError as error:
        field = error.field or ("messages" if request.prompt is None else "suffix")
        raise RequestError(str(error), field) from error


def _grammar(member: Member, request: TurnRequest, tools: Sequence[Tool]) -> CompiledGrammar | None:
    source = None
    if request.schema is not None:
        source = json_schema(request.schema) if request.schema else json_object()
    elif tools:
        source = tool_calls(member.chat, tools, request.tool_choice)
    return None if source is None else member.grammars.compile(source)


def _thinking_budget(model: ServedModel, request: TurnRequest, wants_thinking: bool) -> int:
    efforts = model.config.efforts
    if not wants_thinking:
        return 0  # of a model that always thinks: closed at once
    if request.effort is None:
        return max(efforts.values())
    if request.effort not in efforts:
        raise RequestError(
            f"reasoning_effort={request.effort!r} is unknown to {model.name}; use {', '.join(efforts)}",
            "reasoning_effort",
        )
    return efforts[request.effort]


def _stream(member: Member, prepared: PreparedTurn, request: TurnRequest) -> TurnStream | TextStream:
    if request.prompt is not None:
        return TextStream(member.chat, request.stop)
    stream = TurnStream(member.chat, prepared.opening, member.thinking_format, request.stop)
    if request.is_prefix:
        stream.skip_opening()
    return stream


class Turn:
    """A running request. Use `start`, then iterate over `events` once."""

    def __init__(self, id: str, model: ServedModel, prepared: PreparedTurn, request: TurnRequest, billing: Billing):
        self.id, self.model, self.prepared, self.request = id, model, prepared, request
        self.principal: Principal | None = None
        self._billing = billing
        self._charge: Charge | None = None
        self._generation: Generation | None = None
        self.min_seconds = 0.0
        """Shortest time between two readings of new tokens."""
        self.status = "refused"
        """How the turn ended: a finish reason, "refused", or "abort" while it runs."""
        self.first_token_seconds: float | None = None
        """Seconds from the admission to the first token."""
        self._started = self._last_event = self._last_update = time.monotonic()
        self._streams = [_stream(model.member, prepared, request) for _ in range(prepared.sampling.n)]
        self._tokens: list[list[TokenLogprob]] = [[] for _ in self._streams]
        """Sampled tokens of each choice whose log-probabilities were not taken."""
        self._num_delivered = 0
        """Tokens of all choices."""
        self._is_delivering = False
        """Whether the engine has computed the prompt, so that it is charged."""
        self._num_taken = [0] * len(self._streams)

    @property
    def usage(self) -> Usage:
        """What was delivered so far."""
        if not self._is_delivering or self._generation is None or self._generation.request is None:
            return Usage()
        cached = self._generation.request.num_cached_tokens
        return Usage(
            prompt_cache_hit_tokens=cached,
            prompt_cache_miss_tokens=len(self.prepared.prompt_token_ids) - cached,
            completion_tokens=self._num_delivered,
            reasoning_tokens=sum(stream.num_reasoning_tokens for stream in self._streams),
        )

    @property
    def cost_pico(self) -> int | None:
        """What the usage costs, in pico units; None where requests cost nothing."""
        return None if self._charge is None or self._charge.price is FREE else self._charge.price.cost_pico(self.usage)

    @property
    def num_draft_tokens(self) -> int:
        """Draft tokens that were proposed."""
        return (
            0 if self._generation is None or not self._generation.request else self._generation.request.num_draft_tokens
        )

    @property
    def num_accepted_tokens(self) -> int:
        """Draft tokens that the model accepted."""
        return (
            0
            if self._generation is None or not self._generation.request
            else self._generation.request.num_accepted_tokens
        )

    def stop_string(self, index: int) -> str | None:
        """The stop string that ended the content of a choice."""
        stream = self._streams[index]
        return stream.stop_string if isinstance(stream, TurnStream) else None

    async def start(self, principal: Principal, max_wait: float) -> None:
        """Admit the request and queue it; after an error nothing is left behind. max_wait: seconds in the queue.

        Raises RequestError, RateLimited, InsufficientBalance, Overloaded.
        """
        self.principal, sampling = principal, self.prepared.sampling
        admission = Admission(
            request_id=self.id,
            model=self.model.price_name,
            prompt_tokens=len(self.prepared.prompt_token_ids),
            max_completion_tokens=0 if self.prepared.is_prompt_only else sampling.max_tokens * sampling.n,
            deep_think=self.prepared.is_thinking,
        )
        self._charge = await self._billing.admit(principal, admission, lambda: self.usage, self.abort)
        try:
            self._generation = await self.model.member.service.submit(
                self.prepared.prompt_token_ids,
                sampling,
                tenant=str(principal.user_id),
                cache_salt=f"{principal.user_id}/{self.request.user_id}",
                grammar=self.prepared.grammar,
                max_wait=max_wait,
            )
        except BaseException:
            self.close()
            raise
        self._generation.min_seconds = self.min_seconds
        self.status = "abort"

    def keep_alive(self, silence: float, max_step: float) -> None:
        """Send KEEP_ALIVE after `silence` seconds without an event, or end the turn if the engine's current step takes
        more than `max_step` seconds."""
        if self._generation is None or time.monotonic() - self._last_event < silence:
            return
        if self.model.member.service.status.seconds_since_heartbeat < max_step:
            self._generation.tick()
        else:
            self._generation.receive(EngineStopped("the engine does not respond"))

    def abort(self) -> None:
        """End the turn early; `events` ends then too."""
        if self._generation is not None:
            self._generation.abort()

    def close(self) -> None:
        """End the turn, if it runs, and charge what was delivered: for a `finally`, also if `events` never began."""
        self.abort()
        if self._charge is not None:
            self._billing.settle_soon(self._charge, self.status)

    async def end_thinking(self) -> None:
        """Close the thinking now."""
        if self._generation is not None:
            await self._generation.end_thinking()

    async def events(self) -> AsyncIterator[tuple[int, StreamEvent]]:
        """The events of all choices, each with the index of its choice; KEEP_ALIVE in silence. However the iteration
        ends, the engine's memory is freed and what was delivered is charged.

        Raises Overloaded if the request waited too long or the engine stopped.
        """
        assert self._generation is not None and self._charge is not None
        running = set(range(len(self._streams)))
        try:
            async for updates in self._generation:
                if not updates:
                    yield KEEP_ALIVE
                self._last_event = time.monotonic()
                self._observe(updates, len(running))
                for update in updates if self.request.stop else joined(updates):
                    if update.index not in running:
                        continue  # tokens after a stop string
                    self._is_delivering |= bool(update.token_ids)
                    if self.prepared.is_prompt_only:
                        update = _without_tokens(update)
                    stream, reason = self._streams[update.index], update.finish_reason
                    if self.request.logprobs:
                        likely = update.top_logprobs or ((),) * len(update.token_ids)
                        self._tokens[update.index] += zip(update.token_ids, update.logprobs, likely, strict=True)
                    self._num_delivered += len(update.token_ids)
                    for event in stream.feed(update.token_ids):
                        yield update.index, event
                    if stream.is_stopped and reason is None:
                        self._generation.end(update.index)
                        reason = "stop"
                    if reason is not None:
                        running.discard(update.index)
                        for event in stream.finish(reason):
                            yield update.index, event
                        self.status = reason
            await self._billing.settle(self._charge, self.status)
        finally:
            self.close()

    def prompt_logprobs(self) -> list[PromptToken]:
        """The tokens of the prompt, as soon as there is an event of a choice. The first has no log-probability."""
        found = None if self._generation is None or not self._generation.request else self._generation.request
        scored = None if found is None else found.prompt_logprobs
        assert found is not None and scored is not None and scored.is_complete, "the request asks for them"
        values = scored.logprobs.tolist()
        rows = [
            (token, value, scored.pairs(place))
            for place, (token, value) in enumerate(zip(found.prompt_token_ids, values, strict=True))
        ]
        return [(rows[0][0], None, ()), *rows[1:]]

    def take_logprobs(self, index: int) -> dict[TokenKind, list[TokenLogprob]]:
        """The tokens of a choice since the last call, as far as it is known which part of the turn they belong to."""
        kinds, tokens = self._streams[index].token_kinds[self._num_taken[index] :], self._tokens[index]
        found: dict[TokenKind, list[TokenLogprob]] = defaultdict(list)
        for kind, token in zip(kinds, tokens, strict=False):
            found[kind].append(token)
        self._num_taken[index] += len(kinds)
        del tokens[: len(kinds)]
        return found

    def _observe(self, updates: Sequence[CompletionUpdate], num_running: int) -> None:
        """Measure the latency of new tokens, in one step for all of them."""
        num_tokens = sum([len(update.token_ids) for update in updates])
        if not num_tokens:
            return
        latencies, now = self.model.member.latencies, self._last_event
        if self.first_token_seconds is None:
            self.first_token_seconds = now - self._started
            latencies.first_token.observe(self.first_token_seconds)
            if num_tokens > num_running:
                latencies.between_tokens.observe(0.0, num_tokens - num_running)  # they came together
        else:
            latencies.between_tokens.observe((now - self._last_update) * num_running / num_tokens, num_tokens)
        self._last_update = now


def _without_tokens(update: CompletionUpdate) -> CompletionUpdate:
    """The update of a completion that delivers no token: it ends at its length."""
    reason = "length" if update.finish_reason == "stop" else update.finish_reason
    return CompletionUpdate(update.request, update.index, (), (), (), reason)


async def make_turn(model: ServedModel, request: TurnRequest, billing: Billing, id_prefix: str = "chatcmpl-") -> Turn:
    """Prepare a request, in a thread if it may take long. id_prefix: start of its id. Raises RequestError, and
    Overloaded before anything else is done."""
    model.member.check_queue()
    length = (
        sum(len(message.content) for message in request.messages)
        + len(request.prompt or "")
        + len(request.suffix or "")
    )
    is_short = length < LONG_PROMPT
    if is_short and request.schema is None and not request.tools:
        prepared = prepare(model, request)
    else:
        prepared = await asyncio.to_thread(prepare, model, request)
    return Turn(f"{id_prefix}{_random.getrandbits(96):024x}", model, prepared, request, billing)
