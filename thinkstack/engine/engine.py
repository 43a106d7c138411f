"""The engine: token ids in, completions out. Rollouts, evaluation and chat all go through it.

`step` is the whole of it: admit prompts, prefill them, decode one token for everybody, hand out what is finished. In
fp32 on a CPU a request draws the same tokens alone or in a batch: rows of every product come in tiles, and draws depend
on the request.
"""

# Shapes in this file: B rows, T tokens of a prompt, V vocabulary size.

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy
import torch
from torch import Tensor

from thinkstack.engine.kv_cache import Decode, KVCache, Prefill
from thinkstack.engine.sampler import sample, uniforms
from thinkstack.engine.scheduler import MAX_STOP_IDS, Request, Scheduler, SlotTable
from thinkstack.models.config import ModelConfig
from thinkstack.models.moe import ROW_TILE, Routing
from thinkstack.models.precision import inference_copy, refresh
from thinkstack.models.transformer import Transformer
from thinkstack.types import Completion, ConfigError, RequestError, Sampling

SPAN_TILE = 32
"""The context read in one decoding step is rounded up to a multiple of this."""


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """Size and precision of an engine."""

    max_batch: int = 64
    """Sequences decoded at once."""
    max_context: int = 0
    """Tokens of prompt and answer together; 0 takes the model's max_positions."""
    max_prefill_tokens: int = 8192
    """Prompt tokens computed in one pass."""
    dtype: Literal["fp32", "bf16"] = "fp32"
    """Precision of weights and cache; fp32 is exact alone or in a batch."""
    return_experts: bool = False
    """Give the experts of every token back with each completion, for a trainer that uses them again."""

    def __post_init__(self) -> None:
        if self.max_batch < 1:
            raise ConfigError(f"max_batch={self.max_batch} decodes nothing; use at least 1")


class Engine:
    """Continuous batching over one model."""

    def __init__(self, model: Transformer, cfg: EngineConfig = EngineConfig(), version: int = 0):
        self.cfg = cfg
        self.max_context = min(cfg.max_context or model.cfg.max_positions, model.cfg.max_positions)
        self.dtype = torch.float32 if cfg.dtype == "fp32" else torch.bfloat16
        num_slots = -(-cfg.max_batch // ROW_TILE) * ROW_TILE
        self.device = next(model.parameters()).device
        """Where the model lies; only drawn tokens and chosen experts come back from there."""
        span = -(-self.max_context // SPAN_TILE) * SPAN_TILE
        self.cache = KVCache(model.cfg, num_slots, span, self.dtype, self.device)
        self.table = SlotTable(num_slots, self.max_context, _kept_experts(model.cfg) if cfg.return_experts else None)
        self.scheduler = Scheduler(cfg.max_batch)
        self.next_id = 0
        self._source, self._model = model, inference_copy(model, self.dtype)
        self.version = version
        """Version of the weights in use; every completion carries it."""

    def load_weights(self, model: Transformer, version: int) -> None:
        """Take over the weights of `model` (shared where the precision is the same and nothing is adapted; adapters
        are merged into a copy). No request may be running."""
        if self.table.count or self.scheduler.waiting:
            raise RequestError("weights cannot change while answers are being drawn; finish or abort them first")
        if model is self._source:
            refresh(self._model, model)
        else:
            self._source, self._model = model, inference_copy(model, self.dtype)
        self.version = version

    def submit(self, prompt_ids: Sequence[int], sampling: Sampling) -> Request:
        """Queue a prompt. Raises RequestError if it can never be served."""
        total = len(prompt_ids) + sampling.max_tokens
        if not prompt_ids:
            raise RequestError("the prompt is empty; it needs at least a BOS token")
        if total > self.max_context:
            raise RequestError(
                f"prompt is {len(prompt_ids):,} tokens; this model takes {self.max_context:,} including "
                f"max_tokens={sampling.max_tokens:,}; shorten the prompt or max_tokens by {total - self.max_context:,}"
            )
        self._model.check(torch.tensor([list(prompt_ids)]))  # here, not in step, where it would end everybody's answers
        if sampling.n > self.cfg.max_batch:
            raise RequestError(f"n={sampling.n} answers exceed the engine's max_batch={self.cfg.max_batch}")
        if len(sampling.stop_ids) > MAX_STOP_IDS:
            raise RequestError(f"{len(sampling.stop_ids)} stop_ids given; at most {MAX_STOP_IDS} are supported")
        request = Request(self.next_id, tuple(prompt_ids), sampling, [None] * sampling.n, self.version)
        self.next_id += 1
        self.scheduler.waiting.append(request)
        return request

    @torch.no_grad()
    def step(self) -> None:
        """Admit, prefill, decode one token for every running sequence, settle."""
        admitted = self.scheduler.admit(self.table.count, self.cfg.max_prefill_tokens)
        first_new = self.table.count
        if admitted:
            self._draw(self._prefill(admitted), slice(first_new, self.table.count))
            self._settle()
        if self.table.count:
            self._draw(self._decode(), slice(0, self.table.count))
            self._settle()

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        samplings: Sequence[Sampling],
        on_progress: Callable[[int], None] | None = None,
    ) -> list[list[Completion]]:
        """Answer all prompts: sampling.n completions for each. on_progress is told how many prompts just finished."""
        requests: list[Request] = []
        finished = 0
        try:
            for prompt, sampling in zip(prompts, samplings, strict=True):
                requests.append(self.submit(prompt, sampling))
            while finished < len(requests):
                self.step()
                before, finished = finished, sum(request.is_finished for request in requests)
                if on_progress is not None and finished > before:
                    on_progress(finished - before)
        finally:
            for request in requests:
                if not request.is_finished:
                    self.abort(request)  # only after an exception: nobody will ask for these answers
        return [[c for c in request.completions if c is not None] for request in requests]

    def stream(self, prompt_ids: Sequence[int], sampling: Sampling) -> Iterator[int]:
        """Draw one answer and yield its tokens as they come; leaving the loop early aborts it."""
        if sampling.n != 1:
            raise RequestError(f"a stream carries one answer, not n={sampling.n}")
        request = self.submit(prompt_ids, sampling)
        seen = 0
        try:
            while not request.is_finished:
                self.step()
                tokens = self._tokens_of(request)
                yield from tokens[seen:]
                seen = len(tokens)
        finally:
            if not request.is_finished:
                self.abort(request)

    def abort(self, request: Request) -> None:
        """Stop drawing for `request`; its unfinished answers end with reason "abort"."""
        if request in self.scheduler.waiting:
            self.scheduler.waiting.remove(request)
            empty = Completion(token_ids=(), log_probs=(), finish_reason="abort", weights_version=self.version)
            request.completions = [empty] * request.sampling.n
        for row in reversed(range(self.table.count)):
            if self.table.owner[row][0] is request:
                self._close(row, "abort")

    def _tokens_of(self, request: Request) -> tuple[int, ...]:
        done = request.completions[0]
        if done is not None:
            return done.token_ids
        row = next((row for row, (owner, _) in enumerate(self.table.owner) if owner is request), None)
        return () if row is None else tuple(self.table.tokens[row, : self.table.drawn[row]].tolist())

    def _prefill(self, requests: list[Request]) -> Tensor:
        """Compute each prompt once, open a row per answer; returns the logits of the new rows, (rows, V) fp32."""
        longest = max(len(r.prompt_ids) for r in requests)
        width = min(-(-longest // ROW_TILE) * ROW_TILE, self._model.cfg.max_positions)
        ids = torch.zeros(len(requests), width, dtype=torch.int64)
        rows = []
        for index, request in enumerate(requests):
            ids[index, : len(request.prompt_ids)] = torch.tensor(request.prompt_ids)
            request.weights_version = self.version
            rows.append([self.table.open(request, answer) for answer in range(request.sampling.n)])
        view = Prefill(self.cache, torch.tensor([own[0] for own in rows], device=self.device))
        hidden, routing, _ = self._model.trunk(ids.to(self.device), cache=view)
        for request, own in zip(requests, rows, strict=True):
            self.cache.copy(own[0], own[1:], len(request.prompt_ids))
        if self.table.experts is not None:
            chosen = _experts_of(routing)
            for index, own in enumerate(rows):
                length = len(requests[index].prompt_ids)
                self.table.experts[own, :length] = chosen[index, :length]
        last = torch.tensor([len(r.prompt_ids) - 1 for r in requests], device=self.device)
        logits = self._head(hidden[torch.arange(len(requests), device=self.device), last])
        return logits.repeat_interleave(torch.tensor([len(own) for own in rows], device=self.device), 0)

    def _decode(self) -> Tensor:
        """One forward pass over the last token of every running row; returns logits (rows, V) fp32."""
        count = self.table.count
        padded = -(-count // ROW_TILE) * ROW_TILE
        length = torch.zeros(padded, dtype=torch.int64)
        length[:count] = torch.from_numpy(self.table.length[:count])
        ids = torch.zeros(padded, 1, dtype=torch.int64)
        last = self.table.tokens[range(count), self.table.drawn[:count] - 1]
        ids[:count, 0] = torch.from_numpy(last)
        span = -(-(int(length.max()) + 1) // SPAN_TILE) * SPAN_TILE
        length = length.to(self.device)
        view = Decode(self.cache, length, span)
        hidden, routing, _ = self._model.trunk(ids.to(self.device), positions=length.unsqueeze(1), cache=view)
        if self.table.experts is not None:
            self.table.experts[range(count), self.table.length[:count]] = _experts_of(routing)[:count, 0]
        self.table.length[:count] += 1
        return self._head(hidden.squeeze(1))[:count]

    def _head(self, hidden: Tensor) -> Tensor:
        """Logits (B, V) fp32 of hidden states (B, D), computed on whole row tiles."""
        count = hidden.shape[0]
        padded = torch.nn.functional.pad(hidden, (0, 0, 0, -count % ROW_TILE))
        return self._model.head(padded)[:count].float()

    def _draw(self, logits: Tensor, rows: slice) -> None:
        """Draw the next token of each row in `rows`."""
        table = self.table
        uniform = uniforms(table.seed[rows], table.drawn[rows].astype("uint64"))
        tokens, log_probs = sample(
            logits,
            *(torch.from_numpy(x).to(self.device) for x in (table.temperature[rows], table.top_p[rows], uniform)),
        )
        table.append(rows, tokens.cpu().numpy(), log_probs.cpu().numpy())

    def _settle(self) -> None:
        """Close finished rows, from the last one down so that rows still to be closed do not move."""
        for row, reason in reversed(self.table.finished().items()):
            self._close(row, reason)

    def _close(self, row: int, reason: Literal["stop", "length", "abort"]) -> None:
        moved = self.table.close(row, reason)
        if moved != row:
            self.cache.copy(moved, [row], int(self.table.length[row]))


def _kept_experts(cfg: ModelConfig) -> tuple[int, int, str]:
    """How SlotTable keeps the choices of a model: layers with experts, experts per token, integer type."""
    if cfg.moe is None:
        raise ConfigError(
            "router_replay (return_experts of an engine) is asked for, but the model has no experts; leave it out"
        )
    layers = sum(map(cfg.is_moe_layer, range(cfg.num_layers)))
    return layers, cfg.moe.top_k, "uint8" if cfg.moe.num_experts <= 256 else "int16"


def _experts_of(routing: list[Routing]) -> numpy.ndarray:
    """Chosen experts of all layers, (B, T, L, K)."""
    return torch.stack([layer.experts for layer in routing], 2).cpu().numpy()
