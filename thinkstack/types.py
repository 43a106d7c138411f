"""Frozen data types that several subpackages use, and the error classes; torch is imported for annotations only."""

from __future__ import annotations

import numbers
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import torch
    from torch import Tensor


class ConfigError(ValueError):
    """A setting, file or checkpoint is invalid; the message names the value and a fix."""


class RequestError(ValueError):
    """A request to a model cannot be served; the message names the value and a fix, `field` the invalid field."""

    def __init__(self, message: str, field: str | None = None):
        super().__init__(message)
        self.field = field


class TrainingError(RuntimeError):
    """Training cannot continue; the message says why and what to try."""


class Interrupted(RuntimeError):
    """The user requested a stop; the stage has saved its state."""


Role = Literal["system", "user", "assistant", "tool"]
FinishReason = Literal["stop", "length", "abort", "error"]


@dataclass(frozen=True, kw_only=True)
class Tool:
    """A function that the model may call; part of the request."""

    name: str
    """Name used in a call."""
    description: str
    """Description for the model."""
    parameters: Mapping[str, Any] = field(default_factory=dict)
    """JSON schema of the arguments."""
    strict: bool = False
    """Whether the arguments of calls must follow the schema (text/grammar.py)."""


@dataclass(frozen=True, kw_only=True)
class ToolCall:
    """A tool call in an assistant message; created by text/parse.py."""

    name: str
    """Name of the function."""
    arguments: str
    """Arguments as JSON text, exactly as the model wrote them."""
    id: str | None = None
    """Id of the call, to which the result refers; None if the format has no ids."""


@dataclass(frozen=True, kw_only=True)
class Message:
    """One turn of a conversation."""

    role: Role
    """Author of the message; role="tool" is the result of a tool call."""
    content: str
    """Text of the message; role="assistant": the answer without thinking; role="tool": the result."""
    reasoning: str | None = None
    """Thinking of an assistant message, without tags; set by text/parse.py, removed from the history by
    text/chat.py."""
    tool_calls: tuple[ToolCall, ...] = ()
    """Tool calls of an assistant message, after `content`."""
    tool_call_id: str | None = None
    """For role="tool": id of the call that produced this result; None if the format has no ids."""
    name: str | None = None
    """For role="tool": name of the called function; None if the format does not include it."""
    is_trained: bool = True
    """For role="assistant": whether the message is trained on; False: context only. Set by stages/turns.py."""

    def __post_init__(self) -> None:
        if self.role != "assistant" and (self.tool_calls or self.reasoning is not None):
            raise RequestError(
                f"a message of role={self.role!r} has reasoning or tool_calls; only assistant messages may have them"
            )


@dataclass(frozen=True, kw_only=True)
class Problem:
    """One task instance with a verifiable answer; created by tasks/."""

    messages: tuple[Message, ...]
    """The conversation to answer; the last message is the user's."""
    answer: str
    """The reference answer in canonical form."""
    task: str
    """Name of the task; the key of its row in a recipe's `tasks`."""
    language: str
    """Language of the question: "en" or "zh"."""
    key: str
    """Hash of the problem; for puzzles of its operands, independent of wording and language."""
    metadata: Mapping[str, Any] = field(default_factory=dict, hash=False)
    """Further facts as JSON values, by name: level, wording, choices, tests, subject, ..."""

    @property
    def question(self) -> str:
        """Text of the last user message."""
        return next(message.content for message in reversed(self.messages) if message.role == "user")

    @property
    def level(self) -> int:
        """Difficulty level, defined by the task; 1 if the task has no levels."""
        return int(self.metadata.get("level", 1))

    @property
    def wording(self) -> int:
        """Index of the wording within the task and language; 0 if the task has a single wording."""
        return int(self.metadata.get("wording", 0))


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """Sampling parameters of one request."""

    temperature: float = 1.0
    """Divides the logits; 0 is greedy decoding."""
    top_p: float = 1.0
    """Nucleus sampling: sample from the smallest set of tokens with at least this total probability; 1 is off."""
    top_k: int = 0
    """Sample from this many most likely tokens; 0 is off."""
    min_p: float = 0.0
    """Minimum probability of a token relative to the most likely one; 0 is off."""
    presence_penalty: float = 0.0
    """Subtracted from the logit of every token that occurs in the completion, -2 to 2."""
    frequency_penalty: float = 0.0
    """Subtracted from the logit of a token once per occurrence in the completion, -2 to 2."""
    repetition_penalty: float = 1.0
    """Divides positive and multiplies negative logits of tokens in prompt or completion; 1 is off."""
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    """Added to the logits of these token ids."""
    allowed_token_ids: tuple[int, ...] = ()
    """The only tokens that may be sampled, end tokens included; empty: all."""
    min_tokens: int = 0
    """Minimum tokens before a stop token may be sampled."""
    max_tokens: int = 256
    """Maximum number of tokens of the completion, end token included."""
    stop_token_ids: tuple[int, ...] = ()
    """Tokens that end the completion; the stop token is its last token."""
    thinking_budget: int | None = None
    """Number of thinking tokens after which `think_end_token_ids` are injected if thinking has not ended; None: no
    limit."""
    think_end_token_ids: tuple[int, ...] = ()
    """Tokens that end thinking; injected tokens count like sampled tokens and have log-probability 0."""
    top_logprobs: int = 0
    """Number of most likely alternatives reported per token, under the distribution that the token was sampled from."""
    prompt_logprobs: int | None = None
    """Alternatives reported per prompt token, with its log-probability at temperature 1; None: no prompt is scored."""
    raw_logprobs: bool = False
    """Report log-probabilities of the model at temperature 1 instead of the sampling distribution."""
    seed: int = 0
    """Seed of this request; the result does not depend on the other requests of a batch (batch-invariant)."""
    n: int = 1
    """Number of completions sampled per prompt; the prompt is prefilled once."""

    def __post_init__(self) -> None:
        for name, (low, high, meaning) in SAMPLING_RANGES.items():
            value = getattr(self, name)
            kind = numbers.Integral if isinstance(low, int) else numbers.Real
            if value is None and name in ("thinking_budget", "prompt_logprobs"):
                continue
            if isinstance(value, bool) or not isinstance(value, kind):
                noun = "an integer" if kind is numbers.Integral else "a number"
                raise RequestError(f"{name}={value!r} is not {noun} ({meaning})", name)
            if not low <= float(value) <= high and not (name == "temperature" and value == 0):
                raise RequestError(f"{name}={value} must lie in [{low:g}, {high:g}] ({meaning})", name)
        for token, bias in self.logit_bias.items():
            if isinstance(bias, bool) or not isinstance(bias, numbers.Real) or not abs(float(bias)) <= LARGEST_BIAS:
                limits = f"it must be a number in [-{LARGEST_BIAS}, {LARGEST_BIAS}]"
                raise RequestError(f"logit_bias of token {token} is {bias!r}; {limits}", "logit_bias")
        if self.min_tokens > self.max_tokens:
            message = f"min_tokens={self.min_tokens} must lie between 0 and max_tokens={self.max_tokens}"
            raise RequestError(message, "min_tokens")
        if self.thinking_budget is not None and not self.think_end_token_ids:
            raise RequestError("thinking_budget needs think_end_token_ids, which close thinking", "thinking_budget")


LARGEST_BIAS = 100
"""Maximum absolute logit bias, as in OpenAI's API: enough to ban or to force a token."""
_MAX_INT = 2**31 - 1
SAMPLING_RANGES: dict[str, tuple[float, float, str]] = {
    "temperature": (1e-3, 100.0, "0 is greedy decoding"),
    "top_p": (1e-6, 1.0, "1 considers all tokens"),
    "min_p": (0.0, 1.0, "0 considers all tokens"),
    "presence_penalty": (-2.0, 2.0, "0 is off"),
    "frequency_penalty": (-2.0, 2.0, "0 is off"),
    "repetition_penalty": (0.01, 100.0, "1 is off"),
    "top_k": (0, _MAX_INT, "0 considers all tokens"),
    "top_logprobs": (0, _MAX_INT, "0 is off"),
    "prompt_logprobs": (0, _MAX_INT, "None is off"),
    "min_tokens": (0, _MAX_INT, "0 is off"),
    "max_tokens": (1, _MAX_INT, "a completion has at least one token"),
    "thinking_budget": (0, _MAX_INT, "None means no limit"),
    "n": (1, _MAX_INT, "1 samples one completion"),
    "seed": (-(2**64), 2**64, "equal seeds give equal completions"),
}
"""Minimum and maximum of each field of `SamplingParams`, inclusive, and the meaning of its neutral value. An int
minimum means that the field is an integer. Values outside the range exceed the precision of fp32 or have no meaning."""


@dataclass(frozen=True, kw_only=True)
class Completion:
    """One completion sampled by the engine."""

    token_ids: tuple[int, ...]
    """The sampled tokens, the end token included if one was sampled."""
    logprobs: tuple[float, ...]
    """Natural log-probability of each token under the distribution that it was sampled from; one per token id."""
    finish_reason: FinishReason
    """"stop": ended by a stop token; "length": truncated at max_tokens or the maximum context length; "abort":
    cancelled; "error": failed, with the reason in the request."""
    weights_version: int
    """Version of the weights that sampled the completion, as passed to Engine.load_weights."""
    top_logprobs: tuple[tuple[tuple[int, float], ...], ...] | None = None
    """For each token the most likely alternatives as (id, log-probability), best first; None without
    SamplingParams.top_logprobs."""
    experts: Tensor | None = field(default=None, compare=False, repr=False)
    """(P + N - 1, L, K) uint8, or int16 for more than 256 experts: the K experts of each input token in each of L
    layers. The input tokens are the P prompt tokens and all N sampled tokens but the last. None without
    EngineConfig.return_routed_experts."""

    def __post_init__(self) -> None:
        assert len(self.token_ids) == len(self.logprobs), "one log-probability per token"


@dataclass(frozen=True, kw_only=True)
class Response:
    """A parsed assistant turn; created by text/parse.py."""

    text: str
    """The complete turn: prefill and completion, without the end token."""
    thinking: str = ""
    """Content of the think block; empty if there is none."""
    answer: str | None = None
    """The final answer after the thinking; None if there is none."""
    is_well_formed: bool = False
    """Whether the turn has the expected format."""
    rule: str | None = None
    """The rule in text/final_answer.py that found the answer, with thinking_format="flexible_extract"."""
    tool_calls: tuple[ToolCall, ...] = ()
    """The tool calls of the turn."""
    completion: Completion | None = None
    """The completion that was parsed; None for text that no engine sampled."""
    is_truncated: bool = False
    """Whether the completion reached the length limit without a stop token."""


@dataclass(frozen=True, kw_only=True)
class Score:
    """The result of a verifier or of the reward function for one response; created by tasks/."""

    total: float
    """The reward, or the accuracy from a verifier; meaningless if `unscorable` is set."""
    parts: dict[str, float] = field(default_factory=dict)
    """Values of the parts of the reward by name, before their weights; with `accuracy` and `format`."""
    unscorable: str | None = None
    """Reason why there is no score, such as a verifier that failed or timed out; None if the response is scored."""
    grader: str = ""
    """The grader that decided and, for code, the sandbox, as in "calls, bwrap"; empty if the task has one grader."""
    detail: str = ""
    """Why the answer is wrong, if the grader says so: "wrong result of call 2 of 7"."""


@dataclass(frozen=True)
class GivenTokens:
    """Tokens of a rollout that the model did not sample, such as the result of a tool call: context, never trained."""

    token_ids: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Rollout:
    """What the model wrote for one problem: sampled segments, and given ones between them (rl/rollout.py)."""

    problem: Problem
    group_id: int
    """Equal for all rollouts of a group; taken from a counter, never derived from the text of the prompt."""
    prompt_token_ids: tuple[int, ...]
    segments: tuple[Completion | GivenTokens, ...]
    """The tokens after the prompt, in order; the last segment is sampled. A single turn has one segment."""
    score: Score | None = None
    """None until scored."""
    is_trainable: bool = True
    """Whether to train on the rollout; False in a zero-variance group that dynamic sampling replaced."""

    @property
    def completion(self) -> Completion:
        """The last sampled segment; its `experts`, if any, are those of all tokens of the rollout."""
        last = self.segments[-1]
        assert isinstance(last, Completion), "a rollout ends with a sampled segment"
        return last

    @property
    def token_ids(self) -> tuple[int, ...]:
        """All tokens after the prompt."""
        return tuple(token for segment in self.segments for token in segment.token_ids)

    @property
    def loss_mask(self) -> tuple[int, ...]:
        """1 for each sampled and 0 for each given token of `token_ids`."""
        return tuple(int(isinstance(part, Completion)) for part in self.segments for _ in part.token_ids)

    @property
    def logprobs(self) -> tuple[float, ...]:
        """The engine's log-probability of each token of `token_ids`, 0 for given tokens."""
        parts = (
            part.logprobs if isinstance(part, Completion) else (0.0,) * len(part.token_ids) for part in self.segments
        )
        return tuple(value for part in parts for value in part)

    @property
    def num_sampled_tokens(self) -> int:
        return sum(self.loss_mask)

    @property
    def is_truncated(self) -> bool:
        """Whether the last completion reached the length limit without a stop token."""
        return self.completion.finish_reason == "length"

    @property
    def reward(self) -> float | None:
        """The reward; None if the rollout is unscorable."""
        assert self.score is not None, "rollouts are scored before advantages are computed"
        return None if self.score.unscorable else self.score.total


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Packed sequences for one optimizer step. All tensors but `experts` are (R, T): R rows of T positions.

    All values at position t belong to the prediction of targets[t] from ids[..t]; no later code shifts them.
    """

    ids: Tensor
    """int64 input tokens; padding has the pad token and document id 0."""
    positions: Tensor
    """int64, from 0 within each document."""
    document_ids: Tensor
    """int64, 1, 2, ... across the entire batch; 0 marks padding. Attention stays within a document."""
    targets: Tensor
    """int64 next token; meaningless where loss_mask is 0."""
    loss_mask: Tensor
    """fp32, 1 = this target is trained."""
    weights: Tensor | None = None
    """fp32 weight of each target in the loss of the step, 0 where masked; set by train/loss.token_weights."""
    rollout_ids: Tensor | None = None
    """int64 index of the rollout of each sampled token among those of the step, -1 elsewhere (rl/batches.py)."""
    advantages: Tensor | None = None
    """fp32 advantage of each trained token; set by rl/advantages.py."""
    rollout_logprobs: Tensor | None = None
    """fp32 log-probabilities of the targets that the engine returned; set by rl/batches.py."""
    old_logprobs: Tensor | None = None
    """fp32 log-probabilities under the policy before the step; None: the current log-probabilities, detached."""
    reference_logprobs: Tensor | None = None
    """fp32 log-probabilities under the reference model; None without a KL term in the loss."""
    kl: Tensor | None = None
    """fp32 KL estimate against the reference model; None unless it is part of the reward."""
    values: Tensor | None = None
    """fp32 returns that the critic predicted before the step; None without a critic."""
    returns: Tensor | None = None
    """fp32 training targets of the critic; None without a critic."""
    experts: Tensor | None = None
    """int16 (R, T, L, K): the experts to use for each token in each layer with experts, -1 in padding; None: the
    router of the model chooses them. Set by rl/batches.py."""
    branches: Tensor | None = None
    """int64: 0 for the shared prompt of a document, 1, 2, ... for its continuations. A continuation attends to the
    shared prompt and to itself. None if no document has branches. Set by data.collate."""

    @property
    def sequence_ids(self) -> Tensor:
        """int64 (R, T), equal for the tokens of one sequence, ascending in reading order. A sequence is a document
        without branches, one branch of a document, or the shared prompt of the branches."""
        if self.branches is None:
            return self.document_ids
        return self.document_ids * (int(self.branches.max()) + 1) + self.branches

    def with_weights(self, weights: Tensor) -> Batch:
        """A copy with these weights."""
        return replace(self, weights=weights)

    def to(self, device: torch.device) -> Batch:
        """A copy on `device`."""
        return replace(self, **{name: value.to(device) for name, value in vars(self).items() if value is not None})

    def rows(self, index: Sequence[int] | slice) -> Batch:
        """A copy with only the rows in `index`."""
        return replace(self, **{name: value[index] for name, value in vars(self).items() if value is not None})
