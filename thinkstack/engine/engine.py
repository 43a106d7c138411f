"""The engine: token ids in, completions out; used by rollouts, evaluation, chat and serving.

A step schedules tokens, runs the model over them, samples, and updates the sequence table. In fp32 on a CPU the engine
is batch-invariant: a request gets the same tokens alone or in a batch, with or without cached prefixes, chunked prefill
or preemption, because model outputs depend only on the sequence and random numbers only on the request.
"""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy
import torch
from torch import Tensor

from thinkstack.engine.block_pool import BLOCK_SIZE, BlockPool
from thinkstack.engine.grammar import GrammarFactory, GrammarState
from thinkstack.engine.interface import Health, OnFinish, WhileRunning, check_request
from thinkstack.engine.outputs import NO_OUTPUT, StepOutput
from thinkstack.engine.prompt_logprobs import PromptLogprobs, score_prompts
from thinkstack.engine.runner import Runner
from thinkstack.engine.sampler import NO_TOKENS, SampledTokens, append_sampled, sample_rows
from thinkstack.engine.scheduler import RowsToSample, Scheduler
from thinkstack.engine.sequence_table import Request, SequenceTable
from thinkstack.engine.speculative import Speculator
from thinkstack.kernels.precision import RequestedPrecision
from thinkstack.machine import SharedCores
from thinkstack.models.precision import QUANT_SCHEMES, Quantization
from thinkstack.models.transformer import Transformer
from thinkstack.types import Completion, ConfigError, FinishReason, RequestError, SamplingParams


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """Size and precision of an engine."""

    max_num_seqs: int = 64
    """Maximum number of sequences that run at once."""
    max_model_len: int = 0
    """Maximum number of tokens of prompt and completion together; 0: the model's max_positions."""
    max_prefill_tokens: int = 2048
    """Maximum number of prompt tokens computed in one step, in addition to one token of every decoding sequence."""
    cache_tokens: int = 0
    """Size of the KV cache in tokens, in blocks of 64; 0: enough for max_num_seqs sequences of max_model_len."""
    enable_prefix_caching: bool = True
    """Cache blocks of finished completions, for prompts with the same prefix, until the memory is needed."""
    max_waiting: int = 0
    """Maximum number of queued requests; 0: no limit."""
    dtype: RequestedPrecision = "fp32"
    """Precision of weights and cache. "fp32" is batch-invariant on a CPU; "auto" is bf16 if it is faster. Small bf16
    models compute in fp32 if that is faster."""
    quantization: Quantization = "none"
    """Quantization of the matrices of blocks and head: "none", 8 bits ("int8", "fp8") or 4 bits ("nf4"). Matmuls run in
    `dtype`."""
    return_routed_experts: bool = False
    """Return the routed experts of every token with each completion, for router replay in training."""
    num_speculative_tokens: int = 0
    """Number of draft tokens per step from the model's MTP module; 0: no speculative decoding. Slower for small
    models."""
    graphs: bool = True
    """On a CUDA device, run decoding steps as CUDA graphs."""

    def __post_init__(self) -> None:
        if self.max_num_seqs < 1:
            raise ConfigError(f"max_num_seqs={self.max_num_seqs} is too small; use at least 1")
        if self.max_prefill_tokens < 1:
            raise ConfigError(f"max_prefill_tokens={self.max_prefill_tokens} is too small; use at least 1")
        if self.num_speculative_tokens < 0:
            raise ConfigError(f"num_speculative_tokens={self.num_speculative_tokens} is negative; use 0 for no drafts")
        if self.quantization != "none" and self.quantization not in QUANT_SCHEMES:
            raise ConfigError(
                f"quantization={self.quantization!r} is not supported; use one of none, {', '.join(QUANT_SCHEMES)}"
            )


class Engine:
    """Continuous batching over one model."""

    def __init__(self, model: Transformer, cfg: EngineConfig = EngineConfig(), version: int = 0):
        self.cfg = cfg
        self.max_model_len = min(cfg.max_model_len or model.cfg.max_positions, model.cfg.max_positions)
        self.vocab_size = model.cfg.vocab_size
        whole = cfg.max_num_seqs * -(-self.max_model_len // BLOCK_SIZE)
        num_blocks = cfg.cache_tokens // BLOCK_SIZE if cfg.cache_tokens else whole
        self.table = SequenceTable(cfg.max_num_seqs, self.max_model_len, self.vocab_size)
        self.scheduler = Scheduler(
            self.table, BlockPool(num_blocks, cfg.enable_prefix_caching), cfg.max_prefill_tokens, cfg.max_waiting
        )
        self.runner = self.make_runner(model, num_blocks)
        self.speculator: Speculator | None = None
        if cfg.num_speculative_tokens:
            self.speculator = Speculator(self.runner, self.table, cfg.num_speculative_tokens)
        self.next_id = 0
        self.version = version
        self.num_failed = 0
        self.last_error: str | None = None
        """Message of the last error of a completion."""
        self.cores = SharedCores()

    def make_runner(self, model: Transformer, num_blocks: int) -> Runner:
        """The runner that computes the tokens."""
        cfg = self.cfg
        drafts, max_graph_rows = bool(cfg.num_speculative_tokens), cfg.max_num_seqs if cfg.graphs else 0
        experts = cfg.return_routed_experts
        return Runner(model, num_blocks, cfg.dtype, experts, drafts, cfg.quantization, max_graph_rows)

    @property
    def version(self) -> int:
        """Version of the weights in use; a completion carries the version of its first token."""
        return self.scheduler.version

    @version.setter
    def version(self, version: int) -> None:
        self.scheduler.version = version

    def load_weights(self, model: Transformer, version: int, running: WhileRunning = "refuse") -> None:
        """Use the weights of `model`. They are shared if the precision is the same and nothing is adapted or quantized;
        otherwise they are copied, with adapters merged. Resets the prefix cache. running: see WhileRunning.

        Raises RequestError if running="refuse" and requests are running or queued.
        """
        if running == "refuse" and (self.scheduler.running or self.scheduler.num_waiting):
            raise RequestError("weights cannot change while requests are running; finish or abort them first")
        self.pause(running)
        self.scheduler.pool.reset_prefix_cache()
        self.runner.load(model)
        self.version = version

    def pause(self, running: WhileRunning = "keep") -> None:
        """Stop all running sequences; queued requests stay queued."""
        if running == "drain":
            self.scheduler.is_draining = True
            try:
                while self.scheduler.running:
                    self.step()
            finally:
                self.scheduler.is_draining = False
        elif running == "abort":
            for row in list(self.scheduler.running):
                if self.table.requests[row] is not None:
                    self.abort(self.table.request_at(row)[0])
        else:
            self.scheduler.preempt_all()

    def health(self) -> Health:
        """The state of the engine; a failed completion does not affect other requests."""
        return Health(
            alive=True,
            running=len(self.scheduler.running),
            waiting=self.scheduler.num_waiting,
            failed=self.num_failed,
            last_error=self.last_error,
            version=self.version,
        )

    def sleep(self) -> None:
        """Free the cache's memory; running sequences are recomputed when they resume."""
        self.pause("keep")
        self.scheduler.pool.reset_prefix_cache()
        self.runner.free_cache()

    def submit(
        self,
        prompt_token_ids: Sequence[int],
        sampling: SamplingParams,
        priority: int = 0,
        cache_salt: str = "",
        grammar: GrammarFactory | None = None,
        tenant: str = "",
    ) -> Request:
        """Queue a prompt. priority: lower values first; tenants take turns. cache_salt: only requests with the same
        salt share prefixes. grammar: returns the grammar that restricts the tokens of a completion, in its first state.

        Raises RequestError if the request can never be served, Overloaded if the queue is full.
        """
        # checked here and not in step, where an error would fail all requests
        prompt_token_ids = check_request(prompt_token_ids, sampling, self.max_model_len, self.vocab_size)
        request = Request(
            self.next_id,
            prompt_token_ids,
            sampling,
            completions=[None] * sampling.n,
            priority=priority,
            cache_salt=cache_salt,
            tenant=tenant,
            grammars=tuple(GrammarState(grammar()) for _ in range(sampling.n)) if grammar is not None else (),
            weights_version=self.version,
        )
        if sampling.prompt_logprobs is not None:
            num_top = min(sampling.prompt_logprobs, self.vocab_size)
            request.prompt_logprobs = PromptLogprobs(len(prompt_token_ids), num_top)
        self.scheduler.add(request)
        self.next_id += 1
        return request

    @torch.no_grad()
    def step(self) -> StepOutput:
        """Run one step: at least one token of every running sequence, and prompt tokens within the limits. Uses fewer
        threads while other processes use cores, if results do not depend on the number of threads."""
        with self._consistent(), self.cores if self.runner.ignores_threads else contextlib.nullcontext():
            scheduled = self.scheduler.schedule()
            if not len(scheduled.rows):
                return NO_OUTPUT
            hidden = self.runner.run(scheduled, self.table)
            if self.table.scores_prompt.any():
                score_prompts(self.table, scheduled, hidden, self.runner.logits)
            sampled = self._sample(scheduled.sampled, hidden)
            output = self._settle(scheduled.sampled, sampled)
            if self.speculator is not None:
                self.speculator.follow(scheduled, hidden)
            return output

    @contextlib.contextmanager
    def _consistent(self) -> Iterator[None]:
        """Requeue all sequences if a step fails: blocks were registered in the prefix cache, but not computed."""
        try:
            yield
        except BaseException:
            self.scheduler.preempt_all()
            self.scheduler.pool.reset_prefix_cache()
            raise

    def _sample(self, to_sample: RowsToSample, hidden: Tensor) -> SampledTokens:
        """Sample a token for each entry."""
        if not len(to_sample.rows):
            return NO_TOKENS
        if to_sample.sources is not None:
            hidden = hidden.index_select(0, torch.from_numpy(to_sample.sources).to(hidden.device))
        return sample_rows(self.table, to_sample, self.runner.logits(hidden))

    def _settle(self, to_sample: RowsToSample, sampled: SampledTokens) -> StepOutput:
        """Append the accepted tokens to the table, and finish completions."""
        table, accepted = self.table, None
        if to_sample.offsets.any():
            assert self.speculator is not None, "only the speculator writes draft tokens"
            accepted = self.speculator.accept(to_sample.rows, to_sample.offsets, sampled.token_ids)
        rows, token_ids, logprobs, top_logprobs, errors = append_sampled(table, to_sample, sampled, accepted)
        completions = [table.request_at(row) for row in rows.tolist()]
        if accepted is not None:
            rows = numpy.unique(rows)
            self.scheduler.discard_draft_tokens(rows)
        ends: dict[int, FinishReason] = dict(table.finished(rows)) | dict.fromkeys(errors, "error")
        finished = [(table.request_at(row), reason) for row, reason in ends.items()]
        for row, reason in ends.items():
            self._finish(row, reason, errors.get(row))
        return StepOutput(completions, token_ids, logprobs, top_logprobs, finished)

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        samplings: Sequence[SamplingParams],
        on_finish: OnFinish | None = None,
    ) -> list[list[Completion]]:
        """Generate sampling.n completions for each prompt. on_finish is called for each prompt when it is finished.

        Raises RequestError like `submit`, and for failed completions.
        """
        requests: list[Request] = []
        try:
            for prompt, sampling in zip(prompts, samplings, strict=True):
                requests.append(self.submit(prompt, sampling))
            running = list(enumerate(requests))
            while running:
                output = self.step()
                if len(output.completions) and not output.finished:
                    continue
                finished = [pair for pair in running if pair[1].is_finished]
                running = [pair for pair in running if not pair[1].is_finished]
                for place, request in finished:
                    if on_finish is not None and request.error is None:
                        on_finish(place, request.finished)
        finally:
            for request in requests:
                if not request.is_finished:
                    self.abort(request)  # only after an exception
        for request in requests:
            if request.error is not None:
                raise RequestError(request.error)
        return [request.finished for request in requests]

    def stream(self, prompt_token_ids: Sequence[int], sampling: SamplingParams) -> Iterator[int]:
        """Yield the tokens of one completion as they are sampled; leaving the loop early aborts it."""
        if sampling.n != 1:
            raise RequestError(f"n={sampling.n}: streaming supports one completion; use n=1")
        request = self.submit(prompt_token_ids, sampling)
        seen, is_finished = 0, False
        try:
            while not is_finished:
                self.step()
                is_finished = request.is_finished  # maybe in a step of another stream
                tokens = self.output_token_ids(request, start=seen)
                yield from tokens
                seen += len(tokens)
            if request.error is not None:
                raise RequestError(request.error)
        finally:
            if not request.is_finished:
                self.abort(request)

    def abort(self, request: Request, reason: FinishReason = "abort") -> None:
        """End the unfinished completions of `request` with this reason; their blocks are freed at once."""
        for row in list(request.rows.values()):
            self._finish(row, reason)
        for waiting in self.scheduler.forget_waiting(request):
            for index in waiting.indices:
                request.completions[index] = request.completion(waiting.output, reason)

    def end(self, request: Request, index: int) -> None:
        """End one completion of `request` with finish_reason="stop", for example because a stop string occurred."""
        leaders = [row for row in request.rows.values() if self.table.sibling_rows[row]]
        for leader in leaders:  # others wait for its prompt, so all of them return to the queue
            self.scheduler.preempt(leader)
        if (row := request.rows.get(index)) is not None:
            self._finish(row, "stop")
        elif request.completions[index] is None:
            request.completions[index] = request.completion(self.scheduler.forget_completion(request, index), "stop")

    def end_thinking(self, request: Request) -> None:
        """Close the thinking of unfinished completions now, by a thinking budget of 0. Raises RequestError without
        think_end_token_ids."""
        request.sampling = replace(request.sampling, thinking_budget=0)
        for row in request.rows.values():
            self.table.assign_options(row)

    def output_token_ids(self, request: Request, index: int = 0, start: int = 0) -> tuple[int, ...]:
        """Tokens sampled so far for completion `index`, from number `start`."""
        done, row = request.completions[index], request.rows.get(index)
        if done is not None:
            return done.token_ids[start:]
        if row is not None:
            return tuple(self.table.output_ids(row)[start:].tolist())
        waiting = (entry.output.token_ids for entry in request.queue_entries if index in entry.indices)
        return next(waiting, ())[start:]

    def _finish(self, row: int, reason: FinishReason, error: str | None = None) -> None:
        """Store the completion of a row, and free the row; other completions continue after an error."""
        table, (request, index) = self.table, self.table.request_at(row)
        experts = self.runner.cache.routed_experts_of(table.blocks[row], int(table.num_computed_tokens[row]))
        request.completions[index] = request.completion(table.output_of(row), reason, experts)
        if error is not None:
            request.error = self.last_error = error
            self.num_failed += 1
        self.scheduler.close(row)
