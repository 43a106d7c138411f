"""Sample the completions of an evaluation from an OpenAI-compatible endpoint."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from thinkstack.endpoint.requests import REFUSED, EndpointCompletion, EndpointRequest
from thinkstack.evals.sampling import (
    EvalConfig,
    SampledProblem,
    max_tokens_of,
    message_record,
    num_samples,
    problem_seed,
    temperature_of,
)
from thinkstack.tasks.task import Task
from thinkstack.text.parse import ThinkingFormat, parse_sampled
from thinkstack.text.tokenizer import THINK_CLOSE, THINK_OPEN
from thinkstack.types import ConfigError, Problem


def sample_from_endpoint(
    complete: Callable[[Sequence[EndpointRequest]], list[EndpointCompletion]],
    problems: Sequence[Problem],
    tasks: Mapping[str, Task],
    cfg: EvalConfig,
    thinking_format: ThinkingFormat,
) -> list[SampledProblem]:
    """Sample completions for each problem by `complete` (Endpoint.complete), one request for each.

    Sample i of a problem has its seed plus i; a problem whose prompt the endpoint refuses is not sampled. Requests are
    sent in the order of their seeds, so that tasks mix and the estimates of time and cost hold for all.
    Raises ConfigError for a task whose prompt is no conversation.
    """
    for name in ("thinking_budget", "max_prompt_tokens", "max_model_len"):
        if getattr(cfg, name):
            raise ConfigError(f"{name} needs the tokens of a checkpoint; leave it out")
    requests: list[tuple[int, EndpointRequest]] = []
    for place, problem in enumerate(problems):
        task = tasks[problem.task]
        if type(task).encode is not Task.encode:
            raise ConfigError(f"{problem.task} needs the tokens of a checkpoint; an endpoint cannot be evaluated on it")
        messages, tools = task.prompt(problem)
        seed = problem_seed(problem, cfg)
        for index in range(num_samples(task, cfg)):
            request = EndpointRequest(
                messages=tuple(messages),
                tools=tuple(tools),
                temperature=temperature_of(task, cfg),
                top_p=cfg.top_p,
                max_tokens=max_tokens_of(task, cfg),
                seed=(seed + index) % 2**63,
                index=index,
            )
            requests.append((place, request))
    order = sorted(range(len(requests)), key=lambda number: requests[number][1].seed or 0)
    completions = complete([requests[number][1] for number in order])
    by_request = dict(zip(order, completions, strict=True))
    found: list[list[EndpointCompletion]] = [[] for _ in problems]
    for number, (place, _) in enumerate(requests):
        found[place].append(by_request[number])
    return [
        _sampled(problem, tasks[problem.task], own, cfg, thinking_format)
        for problem, own in zip(problems, found, strict=True)
    ]


def _sampled(
    problem: Problem,
    task: Task,
    completions: Sequence[EndpointCompletion],
    cfg: EvalConfig,
    thinking_format: ThinkingFormat,
) -> SampledProblem:
    record = message_record(task.prompt(problem)[0], problem_seed(problem, cfg))
    refusals = [one.content for one in completions if one.finish_reason == REFUSED]
    if refusals:
        return SampledProblem.not_sampled(problem, len(completions), record, refusals[0])
    return SampledProblem(
        problem=problem,
        responses=tuple(parse_sampled(turn_text(one), thinking_format, one.is_truncated) for one in completions),
        num_tokens=tuple(one.completion_tokens for one in completions),
        prompt=replace(record, num_tokens=completions[0].prompt_tokens),
    )


def turn_text(completion: EndpointCompletion) -> str:
    """Return the turn as the model wrote it: thinking in its tags, unclosed if the answer was cut off within it."""
    if not completion.reasoning:
        return completion.content
    if not completion.content and completion.is_truncated:
        return f"{THINK_OPEN}\n{completion.reasoning}"
    return f"{THINK_OPEN}\n{completion.reasoning}\n{THINK_CLOSE}\n{completion.content}"
