"""The nouns that cross folders, and the errors a person can cause.

All records are frozen; who fills a field is written at the field. torch is imported for annotations only, so that the
command line starts without it.
"""

from __future__ import annotations

import numbers
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import torch
    from torch import Tensor


class ConfigError(ValueError):
    """A setting, file or checkpoint cannot be used; the message names the value and the way out."""


class RequestError(ValueError):
    """A request to a model cannot be served; the message names the value and the way out."""


class TrainingError(RuntimeError):
    """Training cannot go on; the message says why and what to try."""


class Interrupted(RuntimeError):
    """A person asked to stop; the stage has saved its state."""


Role = Literal["system", "user", "assistant", "tool"]
FinishReason = Literal["stop", "length", "abort", "error"]


@dataclass(frozen=True, kw_only=True)
class Tool:
    """A function that the model may call; filled by whoever asks."""

    name: str
    """What a call names it by."""
    description: str
    """What it does, for the model to read."""
    parameters: Mapping[str, Any] = field(default_factory=dict)
    """JSON schema of its arguments."""


@dataclass(frozen=True, kw_only=True)
class ToolCall:
    """A call that the assistant makes; filled by text/parse.py."""

    name: str
    """Name of the function."""
    arguments: str
    """Its arguments as JSON text, spelt as the model wrote them."""
    id: str | None = None
    """What a result refers to it by, where the format has such a thing."""


@dataclass(frozen=True, kw_only=True)
class Message:
    """One turn of a conversation."""

    role: Role
    """Who speaks; "tool" gives the result of a call."""
    content: str
    """What is said; of an assistant the answer only, of a tool its result."""
    reasoning: str | None = None
    """The assistant's thinking, without tags; filled by text/parse.py, dropped from history by text/chat.py."""
    tool_calls: tuple[ToolCall, ...] = ()
    """What the assistant calls after saying `content`."""
    tool_call_id: str | None = None
    """Of a tool: the call that this is the result of, where the format has such a thing."""
    name: str | None = None
    """Of a tool: the function that was called, where the format writes it."""
    is_trained: bool = True
    """Of the assistant: whether training learns this turn, or reads it as context only; filled by stages/turns.py."""

    def __post_init__(self) -> None:
        if self.role != "assistant" and (self.tool_calls or self.reasoning is not None):
            raise RequestError(f"role={self.role!r} neither thinks nor calls tools; only an assistant's message does")


@dataclass(frozen=True, kw_only=True)
class Problem:
    """One task instance with a checkable answer; filled by tasks/."""

    question: str
    """What the user asks."""
    answer: str
    """The reference answer in canonical form."""
    task: str
    """Name of the family in tasks/table.py."""
    language: str
    """Language of the wording: "en" or "zh"."""
    level: int
    """Difficulty; what it counts is said by the family."""
    key: str
    """Hash of the canonical problem: operands only, neither wording nor language."""
    wording: int
    """Index of the wording within the family and language."""


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How one request draws tokens; filled by the caller of the engine."""

    temperature: float = 1.0
    """Divides the logits; 0 takes the most likely token."""
    top_p: float = 1.0
    """Keeps the smallest set of tokens with at least this probability; 1 keeps all."""
    top_k: int = 0
    """Keeps this many most likely tokens; 0 keeps all."""
    min_p: float = 0.0
    """Keeps tokens with at least this share of the most likely one's probability; 0 keeps all."""
    presence_penalty: float = 0.0
    """Taken off the logit of every token that the answer has, -2 to 2."""
    frequency_penalty: float = 0.0
    """Taken off the logit of a token once for each time the answer has it, -2 to 2."""
    repetition_penalty: float = 1.0
    """Divides positive logits of tokens that prompt or answer have, and multiplies negative ones; 1 leaves them."""
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    """Added to the logits of these tokens."""
    min_tokens: int = 0
    """Tokens an answer has before a stop token may be drawn."""
    max_tokens: int = 256
    """Most tokens an answer may have, its end token included."""
    stop_token_ids: tuple[int, ...] = ()
    """Tokens that end an answer; the one that did is kept as its last token."""
    thinking_budget: int | None = None
    """Tokens after which thinking is closed by `think_end_token_ids`, unless it was before; None sets no limit."""
    think_end_token_ids: tuple[int, ...] = ()
    """What closes thinking; injected tokens count like drawn ones, and their log-probability is 0."""
    top_logprobs: int = 0
    """TopLogprobs reported for each token: the most likely ones under the distribution it was drawn from."""
    raw_logprobs: bool = False
    """Report log-probabilities of the model itself, at temperature 1, instead of those that were drawn from."""
    seed: int = 0
    """Fixes the draws of this request, alone or in a batch."""
    n: int = 1
    """Answers to draw from one prompt, which is prefilled once."""

    def __post_init__(self) -> None:
        for name, (low, high, meaning) in SAMPLING_RANGES.items():
            value = getattr(self, name)
            kind = numbers.Integral if isinstance(low, int) else numbers.Real
            if value is None and name == "thinking_budget":
                continue
            if isinstance(value, bool) or not isinstance(value, kind):
                whole = " whole" if kind is numbers.Integral else ""
                raise RequestError(f"{name}={value!r} is not a{whole} number; {meaning}")
            if not low <= float(value) <= high and not (name == "temperature" and value == 0):
                raise RequestError(f"{name}={value} must lie in [{low:g}, {high:g}]; {meaning}")
        for token, bias in self.logit_bias.items():
            if isinstance(bias, bool) or not isinstance(bias, numbers.Real) or not abs(float(bias)) <= LARGEST_BIAS:
                raise RequestError(
                    f"logit_bias={bias!r} of token {token} must be a number in [-{LARGEST_BIAS}, {LARGEST_BIAS}]"
                )
        if self.min_tokens > self.max_tokens:
            raise RequestError(f"min_tokens={self.min_tokens} must lie between 0 and max_tokens={self.max_tokens}")
        if self.thinking_budget is not None and not self.think_end_token_ids:
            raise RequestError(
                f"thinking_budget={self.thinking_budget} needs think_end_token_ids, the tokens that close thinking"
            )


LARGEST_BIAS = 100
"""Of a logit, either way, as in OpenAI's interface: enough to ban or to force a token."""
_MOST = 2**31 - 1
SAMPLING_RANGES: dict[str, tuple[float, float, str]] = {
    "temperature": (1e-3, 100.0, "0 takes the most likely token"),
    "top_p": (1e-6, 1.0, "1 keeps every token"),
    "min_p": (0.0, 1.0, "0 keeps every token"),
    "presence_penalty": (-2.0, 2.0, "0 is off"),
    "frequency_penalty": (-2.0, 2.0, "0 is off"),
    "repetition_penalty": (0.01, 100.0, "1 is off"),
    "top_k": (0, _MOST, "0 keeps every token"),
    "top_logprobs": (0, _MOST, "0 is off"),
    "min_tokens": (0, _MOST, "0 lets an answer end at once"),
    "max_tokens": (1, _MOST, "an answer has at least one token"),
    "thinking_budget": (0, _MOST, "None sets no limit"),
    "n": (1, _MOST, "1 asks for one answer"),
    "seed": (-(2**64), 2**64, "equal seeds give equal answers"),
}
"""Least and largest value of each field of `SamplingParams`, inclusive, and what its neutral value means; whole numbers
where the least one is written as such. Beyond them fp32 has no digits left, or the value says nothing."""


@dataclass(frozen=True, kw_only=True)
class Completion:
    """One answer as the engine drew it."""

    token_ids: tuple[int, ...]
    """The drawn tokens, the end token included when one was drawn."""
    logprobs: tuple[float, ...]
    """Natural log-probability of each token under the distribution it was drawn from; as long as token_ids."""
    finish_reason: FinishReason
    """"stop": ended by a stop token; "length": cut off at max_tokens or the context; "abort": cancelled; "error": its
    request says why."""
    weights_version: int
    """The version of the weights that drew it, as given to Engine.load_weights."""
    top_logprobs: tuple[tuple[tuple[int, float], ...], ...] | None = None
    """For each token its most likely alternatives, (id, log-probability), best first; where Sampling asks for them."""
    experts: Tensor | None = field(default=None, compare=False, repr=False)
    """(P + N - 1, L, K) uint8, or int16 for more than 256 experts: the experts of each token that was read, P of the
    prompt and all N drawn but the last, in each of L layers. Only where EngineConfig.return_routed_experts asks for
    them."""

    def __post_init__(self) -> None:
        assert len(self.token_ids) == len(self.logprobs), "every token carries the log-probability it was drawn with"


@dataclass(frozen=True, kw_only=True)
class Score:
    """What a reward function says of one answer; filled by tasks/reward.py."""

    total: float
    """The number the policy is trained on; meaningless when unscorable."""
    parts: dict[str, float] = field(default_factory=dict)
    """Its named parts, before they are combined."""
    unscorable: str | None = None
    """Why no score exists (a checker that failed or ran out of time); None when scored."""


@dataclass(frozen=True, kw_only=True)
class Rollout:
    """One answer to one problem, with its place in a group; filled by rl/trainer.py."""

    problem: Problem
    group_id: int
    """Answers to be compared with each other share it; it is drawn from a counter, never from the prompt's text."""
    prompt_token_ids: tuple[int, ...]
    completion: Completion
    score: Score | None = None
    """None until scored."""


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Packed sequences for one optimizer step. All tensors but `experts` are (R, T): R rows of T positions.

    Position t holds everything about predicting targets[t] from ids[..t]; nothing is shifted later on.
    """

    ids: Tensor
    """int64 input tokens; padding holds the pad token and document 0."""
    positions: Tensor
    """int64, counted from 0 within each document."""
    document_ids: Tensor
    """int64, 1, 2, ... across the whole batch; 0 marks padding. Attention stays within a document."""
    targets: Tensor
    """int64 next token; meaningless where loss_mask is 0."""
    loss_mask: Tensor
    """fp32, 1 = this target is trained."""
    weights: Tensor | None = None
    """fp32 share of each target in the loss of the step, 0 where masked; made by train/loss.token_weights."""
    advantages: Tensor | None = None
    """fp32 advantage of each trained token; filled by rl/trainer.py."""
    rollout_logprobs: Tensor | None = None
    """fp32 log-probabilities as the engine drew the targets; filled by rl/trainer.py."""
    old_logprobs: Tensor | None = None
    """fp32 log-probabilities under the policy before the step; None means the current ones, detached."""
    reference_logprobs: Tensor | None = None
    """fp32 log-probabilities under the reference model; None when no KL term asks for them."""
    experts: Tensor | None = None
    """int16 (R, T, L, K): the experts to use for each token in each layer with experts, -1 in padding; None lets the
    model choose. Filled by rl/groups.py."""
    branches: Tensor | None = None
    """int64: 0 for the tokens that all continuations of a document share, 1, 2, ... for the continuations, which see
    the shared tokens and themselves; None where no document branches. Filled by data.collate."""

    @property
    def sequence_ids(self) -> Tensor:
        """int64 (R, T), equal for the tokens of one sequence and rising in reading order: a document, or one of its
        branches; what branches share counts as a sequence of its own."""
        if self.branches is None:
            return self.document_ids
        return self.document_ids * (int(self.branches.max()) + 1) + self.branches

    def with_weights(self, weights: Tensor) -> Batch:
        """The same batch with these weights."""
        return replace(self, weights=weights)

    def to(self, device: torch.device) -> Batch:
        """The same batch on `device`."""
        return replace(self, **{name: value.to(device) for name, value in vars(self).items() if value is not None})

    def rows(self, index: Sequence[int] | slice) -> Batch:
        """The same batch with only the rows in `index`."""
        cut = {name: value[index] for name, value in vars(self).items() if value is not None}
        return replace(self, **cut)
