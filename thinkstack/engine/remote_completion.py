"""One completion on a vLLM server, as a chain of streams.

A server cannot close the thinking of a running request, nor begin a grammar after the thinking. There the stream is
closed, and the prompt is sent again with the output so far, which the server has in its prefix cache.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

from thinkstack.engine.grammar import StructuredOutputs
from thinkstack.engine.sequence_table import Request
from thinkstack.engine.vllm import request_body, server_seed
from thinkstack.types import LARGEST_BIAS, FinishReason, RequestError, SamplingParams


class RemoteCompletion:
    """The output of a completion so far, and the next stream of it."""

    def __init__(self, request: Request, index: int, grammar: StructuredOutputs | None):
        """Raises RequestError for a grammar that servers cannot begin."""
        self.request, self.index, self._grammar = request, index, grammar
        self.token_ids: list[int] = []
        self.must_restart = False
        """Whether the output goes on in another stream."""
        self._num_streams, self._max_tokens = 0, 0
        self._content: Literal["free", "grammar"] = "grammar" if grammar and grammar.trigger is None else "free"
        self._phase: Literal["start", "thinking", "free", "grammar"] = self._content
        if grammar is None:
            self._phase = "thinking" if request.sampling.think_end_token_ids else "free"
        elif (phase := grammar.phase) == "grammar":
            raise RequestError(
                "vLLM servers cannot continue a content that a grammar applies to; remove the prefix, or the schema "
                "and tool_choice",
                "messages",
            )
        elif request.sampling.think_end_token_ids and (
            phase == "thinking" or (phase == "start" and grammar.think_open)
        ):
            self._phase = phase

    @property
    def num_left(self) -> int:
        """Number of tokens that may still be sampled."""
        return self.request.sampling.max_tokens - len(self.token_ids)

    def finish_reason(self, reason: FinishReason | None) -> FinishReason | None:
        """Why the completion ends if its stream ends for this reason; None if it goes on in another stream."""
        is_cut_by_budget = reason == "length" and len(self.token_ids) == self._max_tokens and self.num_left > 0
        return None if self.must_restart or is_cut_by_budget else reason

    def close_thinking(self) -> tuple[int, ...]:
        """The tokens that close the thinking now, because its budget is used up; they belong to the output."""
        if not self._is_over_budget:
            return ()
        think_end = self.request.sampling.think_end_token_ids
        begun = max(size for size in range(len(think_end)) if self._ends_with(think_end[:size]))
        injected = think_end[begun:][: self.num_left]
        self.token_ids += injected
        self._phase = self._content
        return injected

    def next_body(self, model: str, cache_salt: str, request_id: str) -> tuple[dict[str, Any], SamplingParams]:
        """The request for the next stream, and its parameters. Raises RequestError for unsupported ones."""
        sampling, stop, bias = self.request.sampling, self.request.sampling.stop_token_ids, {}
        max_tokens = self.num_left
        if self._phase == "thinking" and sampling.thinking_budget is not None:
            max_tokens = min(max_tokens, sampling.thinking_budget - len(self.token_ids))
        if self._phase == "thinking" and self._content == "grammar":
            think_end = sampling.think_end_token_ids
            bias = dict.fromkeys(stop, -LARGEST_BIAS)  # the thinking cannot end the turn
            stop += think_end if len(think_end) == 1 else ()
        if self._phase == "free" and self._grammar is not None and self._grammar.trigger is not None:
            stop += (self._grammar.trigger,)
        sampling = replace(
            sampling,
            n=1,
            seed=server_seed(sampling.seed) ^ (self.index << 8) ^ self._num_streams,
            max_tokens=max_tokens,
            min_tokens=min(max(sampling.min_tokens - len(self.token_ids), 0), max_tokens),
            stop_token_ids=stop,
            logit_bias={**sampling.logit_bias, **bias},
            thinking_budget=None,
            think_end_token_ids=(),
        )
        prompt = (*self.request.prompt_token_ids, *self.token_ids)
        body = request_body(prompt, sampling, model, cache_salt, request_id)
        if self._phase == "grammar" and self._grammar is not None:
            body["sampling_params"]["structured_outputs"] = dict(self._grammar.params)
            body["reasoning_ended"] = True  # the grammar applies at once, whatever reasoning parser the server has
        self._num_streams += 1
        self._max_tokens = len(self.token_ids) + max_tokens
        self.must_restart = False
        return body, sampling

    def take(self, token_ids: Sequence[int]) -> int:
        """Append the first of these tokens, up to a change of the stream (`must_restart`). Returns their number."""
        for count, token in enumerate(token_ids):
            if self._is_over_budget or not self._is_accepted(token):
                self.must_restart = True
                return count
            self.token_ids.append(token)
            if self._phase == "thinking" and self._ends_with(self.request.sampling.think_end_token_ids):
                self._phase = self._content
                if self._content == "grammar":
                    self.must_restart = True
                    return count + 1
        return len(token_ids)

    def _is_accepted(self, token: int) -> bool:
        """Whether a token belongs to the output; a token with which a grammar begins is sampled again, with it."""
        if self._grammar is not None and self._phase == "start":
            self._phase = "thinking" if token == self._grammar.think_open else self._content
            if self._phase == "grammar":
                return False
        if self._grammar is not None and self._phase == "free" and token == self._grammar.trigger:
            self._phase = "grammar"
            return False
        return True

    @property
    def _is_over_budget(self) -> bool:
        budget = self.request.sampling.thinking_budget
        return self._phase == "thinking" and budget is not None and len(self.token_ids) >= budget

    def _ends_with(self, token_ids: Sequence[int]) -> bool:
        return self.token_ids[len(self.token_ids) - len(token_ids) :] == list(token_ids)
