"""Where the completions of an evaluation come from: an engine, an OpenAI-compatible endpoint, or a file of answers."""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import compress
from pathlib import Path
from typing import Any

from thinkstack.config import Count, CountOrZero, Seed, Share, Temperature
from thinkstack.evals.records import PromptRecord
from thinkstack.files import kind_of, read_rows
from thinkstack.tasks.puzzles.puzzle import digest
from thinkstack.tasks.table import make_tasks
from thinkstack.tasks.task import Task, TaskConfig, default_tasks, encode_prompt
from thinkstack.text.chat import ChatFormat, think_end_token_ids
from thinkstack.text.parse import ThinkingFormat, parse_response, parse_sampled
from thinkstack.types import Completion, ConfigError, Message, Problem, Response, SamplingParams

Generate = Callable[[Sequence[Sequence[int]], Sequence[SamplingParams]], list[list[Completion]]]
"""Interface of Engine.generate: (prompts, sampling parameters) -> n completions for each prompt."""


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """Problems and sampling parameters of an evaluation."""

    tasks: dict[str, TaskConfig] = field(default_factory=default_tasks)
    """Tasks to evaluate on, by name; the problems are those of the test split."""
    num_problems: CountOrZero = 200
    """Maximum number of held-out problems: of the generated tasks together, and of each data set; 0: all problems of a
    data set."""
    samples: Count = 16
    """Number of completions sampled per problem."""
    temperature: Temperature = 1.0
    """Sampling temperature; 0 is greedy decoding and requires samples=1."""
    top_p: Share = 1.0
    """Nucleus sampling: sample from the smallest set of tokens with at least this total probability; 1 is off."""
    max_tokens: Count = 128
    """Maximum number of tokens of a completion; completions that reach it count as truncated."""
    max_prompt_tokens: CountOrZero = 0
    """Maximum number of tokens of a prompt; a problem with a longer one is not sampled and counts as wrong and not
    scored. 0: no limit but the context."""
    max_model_len: CountOrZero = 0
    """Maximum tokens of prompt and completion together: a completion that reaches it is truncated, and a prompt of this
    length or more is too long. 0: every prompt has room for max_tokens."""
    thinking_budget: CountOrZero = 0
    """Thinking tokens of a completion after which thinking is closed by force; 0: no limit but max_tokens."""
    seed: Seed = 0
    """Seed of the problems and of sampling."""

    def __post_init__(self) -> None:
        make_tasks(self.tasks)
        if self.num_problems < 0 or self.samples < 1:
            raise ConfigError(
                f"num_problems={self.num_problems} must be at least 0 and samples={self.samples} at least 1"
            )
        if self.temperature == 0 and self.samples > 1:
            raise ConfigError(
                f"samples={self.samples} with temperature=0 gives the same completion every time; use samples=1"
            )


@dataclass(frozen=True, kw_only=True)
class SampledProblem:
    """A problem, its sampled responses, and the prompt."""

    problem: Problem
    responses: tuple[Response, ...]
    num_tokens: tuple[int, ...]
    """Sampled tokens of each response, including the end token."""
    prompt: PromptRecord
    refused: str = ""
    """Why the problem was not sampled; its responses are empty."""

    @staticmethod
    def not_sampled(problem: Problem, samples: int, prompt: PromptRecord, reason: str) -> "SampledProblem":
        """Return a problem with as many empty responses as it would have samples."""
        return SampledProblem(
            problem=problem,
            responses=(Response(text=""),) * samples,
            num_tokens=(0,) * samples,
            prompt=prompt,
            refused=reason,
        )


def sample_from_engine(
    generate: Generate,
    chat: ChatFormat,
    problems: Sequence[Problem],
    tasks: Mapping[str, Task],
    cfg: EvalConfig,
    thinking_format: ThinkingFormat,
) -> list[SampledProblem]:
    """Sample completions for each problem by `generate`. Raises ConfigError for a prompt with two BOS tokens."""
    prompts = [encode_prompt(chat, tasks[problem.task], problem) for problem in problems]
    samplings = [sampling_params_for(problem, tasks[problem.task], chat, cfg) for problem in problems]
    records = [prompt_record(prompt, chat, sampling.seed) for prompt, sampling in zip(prompts, samplings, strict=True)]
    samplings = [_within_context(*pair, cfg) for pair in zip(prompts, samplings, strict=True)]
    limit = longest_prompt(cfg)
    fits = [not limit or len(prompt) <= limit for prompt in prompts]
    completions = iter(generate(list(compress(prompts, fits)), list(compress(samplings, fits))))
    return [
        _parsed(problem, next(completions), record, chat, thinking_format)
        if fit
        else SampledProblem.not_sampled(
            problem,
            sampling.n,
            record,
            f"the prompt has {len(record.token_ids):,} tokens, above the limit of {limit:,}",
        )
        for problem, sampling, record, fit in zip(problems, samplings, records, fits, strict=True)
    ]


def longest_prompt(cfg: EvalConfig) -> int:
    """Return the maximum tokens of a prompt by max_prompt_tokens and max_model_len; 0: no limit."""
    limits = [cfg.max_prompt_tokens] if cfg.max_prompt_tokens else []
    return min([*limits, cfg.max_model_len - 1] if cfg.max_model_len else limits, default=0)


def _within_context(prompt: Sequence[int], sampling: SamplingParams, cfg: EvalConfig) -> SamplingParams:
    """The parameters with max_tokens within max_model_len, for a prompt that is not too long."""
    room = cfg.max_model_len - len(prompt) if cfg.max_model_len else sampling.max_tokens
    return sampling if room >= sampling.max_tokens else replace(sampling, max_tokens=max(room, 1))


def _parsed(
    problem: Problem,
    completions: Sequence[Completion],
    prompt: PromptRecord,
    chat: ChatFormat,
    thinking_format: ThinkingFormat,
) -> SampledProblem:
    return SampledProblem(
        problem=problem,
        responses=tuple(parse_response(chat, completion, thinking_format) for completion in completions),
        num_tokens=tuple(len(completion.token_ids) for completion in completions),
        prompt=prompt,
    )


def sampling_params_for(problem: Problem, task: Task, chat: ChatFormat, cfg: EvalConfig) -> SamplingParams:
    """Return the sampling parameters for `problem`; the seed depends on the problem, not on its list position."""
    max_tokens = max_tokens_of(task, cfg)
    has_budget = 0 < cfg.thinking_budget < max_tokens
    return SamplingParams(
        temperature=temperature_of(task, cfg),
        top_p=cfg.top_p,
        max_tokens=max_tokens,
        stop_token_ids=chat.stop_token_ids,
        thinking_budget=cfg.thinking_budget if has_budget else None,
        think_end_token_ids=think_end_token_ids(chat) if has_budget else (),
        seed=problem_seed(problem, cfg),
        n=num_samples(task, cfg),
    )


def problem_seed(problem: Problem, cfg: EvalConfig) -> int:
    """Return the seed of the completions of a problem."""
    return digest("evaluation", cfg.seed, problem.key, problem.language, problem.wording)


def num_samples(task: Task, cfg: EvalConfig) -> int:
    """Return the number of completions per problem: 1 if the task is greedy, else that of its row or of the
    evaluation."""
    return 1 if temperature_of(task, cfg) == 0 else task.num_samples or cfg.samples


def temperature_of(task: Task, cfg: EvalConfig) -> float:
    """Return the temperature of a task: that of its row, unless the whole evaluation is greedy."""
    row = task.cfg.temperature
    return cfg.temperature if row is None or cfg.temperature == 0 else row


def max_tokens_of(task: Task, cfg: EvalConfig) -> int:
    """Return the maximum tokens of a completion of a task: that of its row, or less."""
    return min(task.cfg.max_tokens or cfg.max_tokens, cfg.max_tokens)


def prompt_record(token_ids: Sequence[int], chat: ChatFormat, seed: int) -> PromptRecord:
    """Return the record of a prompt. Raises ConfigError for a prompt with two BOS tokens."""
    begin = chat.tokenizer.begin_ids
    num_bos = None
    if begin:
        num_bos = next((place for place, token in enumerate(token_ids) if token != begin[0]), len(token_ids))
        if num_bos > len(begin):
            raise ConfigError(
                f"the prompt begins with {num_bos} BOS tokens; correct the chat template of the checkpoint, which adds "
                "one to that of the tokenizer"
            )
    text = ",".join(map(str, token_ids))
    return PromptRecord(
        sha256=hashlib.sha256(text.encode()).hexdigest(),
        token_ids=tuple(token_ids),
        num_tokens=len(token_ids),
        num_bos=num_bos,
        seed=seed,
    )


def message_record(messages: Sequence[Message], seed: int) -> PromptRecord:
    """Return the record of a prompt whose token ids are unknown."""
    text = json.dumps([[message.role, message.content] for message in messages], ensure_ascii=False)
    return PromptRecord(sha256=hashlib.sha256(text.encode()).hexdigest(), seed=seed)


def read_answers(
    path: str | Path,
    problems: Sequence[Problem],
    tasks: Mapping[str, Task],
    cfg: EvalConfig,
    thinking_format: ThinkingFormat,
) -> list[SampledProblem]:
    """Return the problems that a file of answers has, with their stored completions.

    A row has key (as in samples.jsonl) or question (the text of the task), completions (a list of texts, thinking
    included, or of objects with text and optionally truncated and num_tokens), and optionally task. A line of
    samples.jsonl is such a row. Raises ConfigError for a row that matches no problem or several, for a problem that
    occurs twice, and if a problem has fewer completions than samples.
    """
    by_name: dict[str, list[Problem]] = {}
    for problem in problems:
        for name in {problem.key, " ".join(problem.question.split())}:
            by_name.setdefault(name, []).append(problem)
    found: dict[int, SampledProblem] = {}
    for where, row in read_rows(Path(path)):
        problem = _match(row, by_name, where)
        responses, tokens = _stored(row, where, thinking_format)
        count = num_samples(tasks[problem.task], cfg)
        if len(responses) < count:
            raise ConfigError(
                f"{where} has {len(responses)} completions, fewer than samples={count}; evaluate with "
                f"samples={len(responses)}, or add the missing ones"
            )
        if id(problem) in found:
            raise ConfigError(f"{where}: the problem {problem.key} occurs twice; put its completions into one row")
        record = message_record(problem.messages, problem_seed(problem, cfg))
        found[id(problem)] = SampledProblem(
            problem=problem, responses=responses[:count], num_tokens=tokens[:count], prompt=record
        )
    if not found:
        raise ConfigError(f"{path} has no rows; write one per problem, with key or question, and completions")
    return [found[id(problem)] for problem in problems if id(problem) in found]


def _match(row: Mapping[str, Any], by_name: Mapping[str, Sequence[Problem]], where: str) -> Problem:
    name = row.get("key") or row.get("question")
    if not isinstance(name, str):
        raise ConfigError(f"{where} has {', '.join(row)}; it needs key or question, and completions")
    matching = [
        problem
        for problem in by_name.get(name, by_name.get(" ".join(name.split()), ()))
        if row.get("task") in (None, problem.task) and row.get("language") in (None, problem.language)
        and row.get("wording") in (None, problem.wording)
    ]  # fmt: skip
    if len(matching) != 1:
        raise ConfigError(
            f"{where}: {name[:60]!r} is {len(matching) or 'none'} of the {len(by_name)} keys and questions that are "
            "evaluated; give the same task, data and limit as for the answers" + (", or a key" if matching else "")
        )
    return matching[0]


def _stored(
    row: Mapping[str, Any], where: str, thinking_format: ThinkingFormat
) -> tuple[tuple[Response, ...], tuple[int, ...]]:
    values = row.get("completions", row.get("answers"))
    if not isinstance(values, list) or not values:
        raise ConfigError(f"{where}: completions is {kind_of(values)}; it must be a list of texts, not empty")
    responses, tokens = [], []
    for value in values:
        one = {"text": value} if isinstance(value, str) else value
        if not isinstance(one, dict) or not isinstance(one.get("text"), str):
            raise ConfigError(f"{where}: a completion is {kind_of(value)}; it must be text, or an object with text")
        truncated, count = one.get("truncated", False), one.get("num_tokens", 0)
        if not isinstance(truncated, bool) or isinstance(count, bool) or not isinstance(count, int) or count < 0:
            raise ConfigError(f"{where}: truncated={truncated!r} must be true or false, num_tokens={count!r} a count")
        responses.append(parse_sampled(one["text"], thinking_format, truncated))
        tokens.append(count)
    return tuple(responses), tuple(tokens)
