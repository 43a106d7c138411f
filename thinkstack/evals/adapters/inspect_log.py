"""Logs of inspect (`.eval`) from the records of our evaluations, and records from the logs of others.

A log has one task. Its samples are our problems, its epochs our completions of a problem. The thinking is a part of its
own; our prompt and its template are in the hash of its token ids alone, the question is the input. The scores have our
grader's name, verdict and reason. inspect's own metrics are computed by inspect from these scores; the figures of this
package, with both errors, stand beside them. Token ids of completions stay in samples.jsonl. Needs the extra `inspect`.
"""

import datetime
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import thinkstack
from thinkstack.evals.protocol import SamplerFacts, TaskProtocol
from thinkstack.evals.records import AnswerRecord, ProblemRecord, PromptRecord
from thinkstack.evals.results import EvalMetrics, compute_metrics
from thinkstack.tasks.puzzles.puzzle import digest
from thinkstack.text.tokenizer import THINK_CLOSE, THINK_OPEN
from thinkstack.types import ConfigError

try:
    import inspect_ai
    from inspect_ai import log as logs
    from inspect_ai.model import (
        ChatCompletionChoice,
        ChatMessageAssistant,
        ChatMessageUser,
        ContentReasoning,
        ContentText,
        GenerateConfig,
        ModelOutput,
        ModelUsage,
    )
    from inspect_ai.scorer import CORRECT, INCORRECT, NOANSWER, Score
except ModuleNotFoundError as error:
    if (error.name or "").partition(".")[0] != "inspect_ai":
        raise
    raise ConfigError("inspect is not installed; install it: pip install 'thinkstack[inspect]'") from error

FIGURES = "thinkstack"
"""Name under which the figures of this package stand beside inspect's metrics."""
METRICS = [{"name": "inspect_ai/accuracy"}, {"name": "inspect_ai/stderr", "options": {"cluster": "cluster"}}]
"""What inspect computes from the scores; the error is that over questions."""
OF_ANSWER = [each.name for each in fields(AnswerRecord) if each.name not in ("text", "token_ids")]
"""Fields of a completion's record in the metadata of its score."""
OF_PROBLEM = ("key", "task", "level", "language", "wording", "cluster", "grader", "date")
"""Fields of a problem's record in the metadata of its samples; `cluster` is that of the error over questions."""


def write_eval_log(
    records: Sequence[ProblemRecord],
    path: Path,
    created: str,
    protocol: TaskProtocol | None = None,
    sampler: SamplerFacts | None = None,
    facts: Mapping[str, Any] | None = None,
    seconds: float = 0.0,
) -> None:
    """Write the records of one task as a log that `inspect view` opens.

    path: ends in .eval or .json. created: time of the evaluation, ISO 8601. protocol: how the task was evaluated.
    sampler: what sampled the completions; None: as the records say. facts: further metadata, such as the provenance of
    the run. seconds: duration of the evaluation. Raises ConfigError for no records, records of several tasks, and a
    path that cannot be written.
    """
    tasks = sorted({record.task for record in records})
    if len(tasks) != 1:
        raise ConfigError(f"a log has the records of one task; these have {', '.join(tasks) or 'none'}")
    if path.suffix not in (".eval", ".json"):
        raise ConfigError(f"{path} is no name of a log; end it in .eval")
    sampler = sampler or records[0].sampler
    log = _eval_log(records, tasks[0], created, protocol, sampler, dict(facts or {}))
    ended = datetime.datetime.fromisoformat(created) + datetime.timedelta(seconds=seconds)
    log.stats.completed_at = ended.isoformat(timespec="seconds")
    logs.recompute_metrics(log)
    assert log.results is not None, "inspect has computed its metrics"
    log.results.scores.append(_figures(compute_metrics(records)))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        logs.write_eval_log(log, str(path))
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {error.strerror or error}; choose another --out") from error


def _eval_log(
    records: Sequence[ProblemRecord],
    task: str,
    created: str,
    protocol: TaskProtocol | None,
    sampler: SamplerFacts | None,
    facts: dict[str, Any],
) -> logs.EvalLog:
    grader = next((record.grader for record in records if record.grader), task)
    model = f"{FIGURES}/{sampler.model if sampler else 'unknown'}"
    name = f"{digest('eval log', task, created, model):016x}"
    samples = [_sample(record, epoch, grader, model) for record in records for epoch in range(len(record.answers))]
    settings = GenerateConfig()
    if protocol is not None and protocol.method == "sampled":
        settings = GenerateConfig(
            temperature=protocol.temperature,
            top_p=protocol.top_p,
            max_tokens=protocol.max_tokens,
            reasoning_tokens=protocol.thinking_budget,
            seed=protocol.seed,
        )
    usage = {model: _usage(sum(answer.num_tokens for record in records for answer in record.answers))}
    return logs.EvalLog(
        status="success",
        eval=logs.EvalSpec(
            eval_id=name, run_id=name, task_id=f"{digest('task', task):016x}",
            created=created,
            task=task,
            task_args={} if protocol is None else {key: getattr(protocol, key) for key in ("prompt", "num_shots")},
            dataset=logs.EvalDataset(
                name=task, samples=len(records), sample_ids=[_address(record) for record in records], shuffled=False
            ),
            model=model,
            model_generate_config=settings,
            model_args={} if sampler is None else {key: value for key, value in vars(sampler).items() if value},
            config=logs.EvalConfig(epochs=max(len(record.answers) for record in records), epochs_reducer=["mean"]),
            scorers=[{"name": grader, "metrics": METRICS}],  # type: ignore[list-item] # their classes are private
            packages={"thinkstack": thinkstack.__version__, "inspect_ai": inspect_ai.__version__},
            metadata=facts | {"protocol": None if protocol is None else vars(protocol)},
        ),
        stats=logs.EvalStats(started_at=created, model_usage=usage),
        samples=samples,
    )  # fmt: skip


def _address(record: ProblemRecord) -> str:
    return f"{record.key}-{record.language}-{record.wording}"


def _usage(num_tokens: int, num_prompt_tokens: int = 0) -> ModelUsage:
    total = num_prompt_tokens + num_tokens
    return ModelUsage(input_tokens=num_prompt_tokens, output_tokens=num_tokens, total_tokens=total)


def _sample(record: ProblemRecord, epoch: int, grader: str, model: str) -> logs.EvalSample:
    """One completion. epoch: its index, from 0."""
    answer, address = record.answers[epoch], _address(record)
    name = f"{digest('sample', record.task, address, epoch):016x}"
    question = ChatMessageUser(content=record.question, id=f"{name}-question")
    message = _message(answer, model, f"{name}-answer")
    usage = _usage(answer.num_tokens, record.prompt.num_tokens if record.prompt else 0)
    metadata = {key: getattr(record, key) for key in OF_PROBLEM} | {"cluster": record.cluster or record.key}
    if record.prompt is not None:
        metadata["prompt"] = {name: value for name, value in vars(record.prompt).items() if name != "token_ids"}
    return logs.EvalSample(
        id=address,
        epoch=epoch + 1,
        uuid=name,
        input=record.question,
        target=record.reference,
        messages=[question, message],
        output=ModelOutput(
            model=model,
            choices=[ChatCompletionChoice(message=message, stop_reason="max_tokens" if answer.truncated else "stop")],
            usage=usage,
        ),
        scores={grader: _score(answer, grader)},
        metadata=metadata,
        model_usage={model: usage},
    )


def _message(answer: AnswerRecord, model: str, id: str) -> ChatMessageAssistant:
    """A turn with its leading think block as a part of its own. `_text` gives the text again; metadata help it."""
    text = answer.text
    head = text.lstrip()
    if not head.startswith(THINK_OPEN):
        return ChatMessageAssistant(content=text, id=id, model=model, source="generate")
    thinking, closing, rest = head.removeprefix(THINK_OPEN).partition(THINK_CLOSE)
    blanks, is_closed = text[: len(text) - len(head)], bool(closing)
    is_clear = not blanks and is_closed and (rest or not answer.truncated)
    return ChatMessageAssistant(
        content=[ContentReasoning(reasoning=thinking), ContentText(text=rest)],
        id=id,
        model=model,
        source="generate",
        metadata=None if is_clear else {"before_thinking": blanks, "is_thinking_closed": is_closed},
    )


def _score(answer: AnswerRecord, grader: str) -> Score:
    """The verdict. A completion that could not be scored counts as wrong, as in our figures, and says so."""
    value, word, reason = INCORRECT, "wrong", None if answer.answer is not None else "invalid_response_format"
    if answer.correct:
        value, word = CORRECT, "correct"
    elif answer.correct is None:
        value, word, reason = NOANSWER, "not scored, so it counts as wrong", "scoring_failed"
    parts = [f"{answer.grader or grader}: {word}", answer.unscorable, answer.detail]
    if answer.rule:
        parts.append(f"the answer was found by the rule {answer.rule}")
    if answer.truncated:
        parts.append("truncated")
    return Score(
        value=value,
        answer=None if answer.answer is None else str(answer.answer),
        explanation="; ".join(part for part in parts if part),
        reason=reason,
        metadata={name: getattr(answer, name) for name in OF_ANSWER},
    )


def _figures(found: EvalMetrics) -> logs.EvalScore:
    """The figures of an evaluation, with the errors over questions and over re-runs apart."""
    values: dict[str, float | None] = {
        "pass_at_1": found.pass_at_1,
        "pass_at_1_if_unscored_were_correct": found.pass_at_1_bound,
        "question_error": found.question_error,
        "rerun_error": found.rerun_error,
    }
    if found.over_questions is not None:
        values |= {"question_low": found.over_questions.low, "question_high": found.over_questions.high}
    values |= {f"pass_at_{k}": value for k, value in found.pass_at_k.items() if k > 1}
    values |= {f"cons_at_{k}": value for k, value in found.cons_at_k.items()}
    names = ("truncation_rate", "answer_rate", "format_rate", "mean_tokens", "tokens_per_solution", "unscorable")
    values |= {name: getattr(found, name) for name in names}
    metrics = {name: logs.EvalMetric(name=name, value=value) for name, value in values.items() if value is not None}
    return logs.EvalScore(name=FIGURES, scorer=FIGURES, metrics=metrics)


def read_eval_log(path: Path, task: str = "", scorer: str = "", language: str = "en") -> list[ProblemRecord]:
    """Return the records of a log, of ours or of others.

    task: name of the task; default that of the log. scorer: the scores to take; default those of the first scorer.
    language: of the questions, if the log does not say. Partial credit is not scored: it is neither right nor wrong.
    Raises ConfigError for a file that is no log, a log without samples, and an unknown scorer.
    """
    if not path.is_file():
        raise ConfigError(f"{path} does not exist; give a log of inspect, such as logs/NAME.eval")
    try:
        log = logs.read_eval_log(str(path), resolve_attachments=True)
    except Exception as error:  # inspect raises many kinds for a damaged file
        raise ConfigError(f"{path} is no log of inspect: {' '.join(str(error).split())[:300]}") from error
    if not log.samples:
        raise ConfigError(f"{path} has no samples (status {log.status}); give the log of an evaluation that finished")
    name, facts = scorer or _first_scorer(log), log.eval.model_args
    is_ours = {"kind", "model", "engine"} <= facts.keys() <= {each.name for each in fields(SamplerFacts)}
    sampler = SamplerFacts(**facts) if is_ours else None
    groups: dict[str, list[logs.EvalSample]] = {str(each): [] for each in log.eval.dataset.sample_ids or ()}
    for sample in log.samples:
        if scorer and sample.scores and scorer not in sample.scores:
            raise ConfigError(f"{path} has no scores of {scorer!r}; it has {', '.join(sample.scores)}")
        groups.setdefault(str(sample.id), []).append(sample)
    ordered = (sorted(some, key=lambda sample: sample.epoch) for some in groups.values() if some)
    records = [_record(some, task or log.eval.task, name, language) for some in ordered]
    return [replace(record, sampler=sampler) for record in records]


def _first_scorer(log: logs.EvalLog) -> str:
    scored = [score.scorer for score in (log.results.scores if log.results else ())]
    names = [name for sample in log.samples or () for name in sample.scores or {}]
    return next((name for name in scored if name in names), names[0] if names else "")


def _record(samples: Sequence[logs.EvalSample], task: str, scorer: str, language: str) -> ProblemRecord:
    first = samples[0]
    target = first.target if isinstance(first.target, str) else " or ".join(first.target)
    record = ProblemRecord(
        key=str(first.id),
        task=task,
        level=1,
        language=language,
        wording=0,
        question=first.input if isinstance(first.input, str) else _question(first.input),
        reference=target,
        answers=tuple(_answer(sample, scorer) for sample in samples),
        cluster=str(first.metadata.get("cluster", "")),
        grader=scorer,
    )
    if not first.metadata.keys() >= set(OF_PROBLEM):
        return record
    own = {name: first.metadata[name] for name in OF_PROBLEM}  # of a log that write_eval_log has written
    own |= {"task": task, "cluster": "" if own["cluster"] == own["key"] else own["cluster"]}
    prompt = first.metadata.get("prompt")
    return replace(record, **own, prompt=PromptRecord(**prompt) if prompt else None)


def _question(messages: Sequence[Any]) -> str:
    """The text of the last message of the user."""
    return next((message.text for message in reversed(messages) if message.role == "user"), "")


def _answer(sample: logs.EvalSample, scorer: str) -> AnswerRecord:
    choice = None if sample.output.empty else sample.output.choices[0]
    truncated = choice is not None and choice.stop_reason in ("max_tokens", "model_length")
    text = "" if choice is None else _text(choice.message, truncated)
    score = (sample.scores or {}).get(scorer)
    own = dict(score.metadata or {}) if score is not None else {}
    if own.keys() >= set(OF_ANSWER):
        return AnswerRecord(text=text, **{name: own[name] for name in OF_ANSWER})
    correct, unscorable = _verdict(sample, score, scorer)
    return AnswerRecord(
        text=text,
        answer=None if score is None else score.answer,
        correct=correct,
        unscorable=unscorable,
        well_formed=score is not None and score.answer is not None,
        truncated=truncated,
        num_tokens=sample.output.usage.output_tokens if sample.output.usage else 0,
        detail=(score.explanation or "") if score is not None and not correct else "",
    )


def _text(message: ChatMessageAssistant, truncated: bool) -> str:
    """The complete turn, with its thinking between tags."""
    if isinstance(message.content, str):
        return message.content
    thinking = [part for part in message.content if isinstance(part, ContentReasoning)]
    rest = "".join(part.text for part in message.content if isinstance(part, ContentText))
    if not thinking:
        return rest
    facts = message.metadata or {}
    if "is_thinking_closed" in facts:
        closing = THINK_CLOSE if facts["is_thinking_closed"] else ""
        return f"{facts['before_thinking']}{THINK_OPEN}{thinking[0].reasoning}{closing}{rest}"
    visible = "".join((part.summary or "") if part.redacted else part.reasoning for part in thinking)
    if truncated and not rest:
        return f"{THINK_OPEN}{visible}"
    return f"{THINK_OPEN}{visible}{THINK_CLOSE}{rest}"


def _verdict(sample: logs.EvalSample, score: Score | None, scorer: str) -> tuple[bool | None, str | None]:
    """(correct, reason why it is not scored)."""
    if sample.error is not None:
        return None, f"the sample failed: {sample.error.message}"
    if score is None:
        return None, f"the sample has no score of {scorer!r}" if scorer else "the log has no scores"
    if isinstance(score.value, bool) or score.value in (CORRECT, INCORRECT, NOANSWER, 0, 1):
        return score.value in (CORRECT, 1, True), None
    reason = score.reason or score.explanation or ""
    return None, f"the score is {score.value!r}, neither right nor wrong{f': {reason}' if reason else ''}"
