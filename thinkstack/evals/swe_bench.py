"""SWE-bench by files: predictions for the official harness, and its report as verdicts of our records.

A prediction's model_name_or_path ends in a digest of all predictions of its file, so the harness never takes a result
that it kept for other patches, and a report says by its file name which predictions it judges. Nothing is executed.
Formats: SWE-bench/SWE-bench at 7a21e05, swebench/harness: reporting.py (schema_version 2), grading.py,
run_evaluation.py.
"""

import hashlib
import json
import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from thinkstack.evals.records import AnswerRecord, ProblemRecord
from thinkstack.files import Row, kind_of, lines, parse_json, read_object
from thinkstack.tasks.benchmarks.swe_bench import GRADER, NO_PATCH, checked_instance_id, patch_of
from thinkstack.types import ConfigError

log = logging.getLogger(__name__)
SCHEMA = 2
DIGEST_CHARACTERS = 12
APPLY_FAILED = ">>>>> Patch Apply Failed"
"""What the harness writes into run_instance.log for a patch that it could not apply."""
NO_RESULT = (
    "the harness has no result: the patch did not apply, or container or time limit failed; its log says which (--logs)"
)
ID_LISTS = ("submitted", "completed", "resolved", "unresolved", "empty_patch", "error")
OTHER_LISTS = ("infra_failure",)
"""Lists of identifiers of a report, without the ending _ids; the others are missing in older reports."""


@dataclass(frozen=True, kw_only=True)
class Predictions:
    """The patches of one completion of each instance."""

    sample: int
    """Place of the completion among those of an instance, from 0."""
    patches: Mapping[str, str]
    """Patch by instance_id, in the order of the records; "": none."""

    @property
    def digest(self) -> str:
        """Hash of the patches and their place."""
        text = json.dumps([self.sample, sorted(self.patches.items())])
        return hashlib.sha256(text.encode()).hexdigest()[:DIGEST_CHARACTERS]

    def model_name(self, label: str) -> str:
        """Return model_name_or_path: the label as a part of a file name, and the digest."""
        return f"{re.sub(r'[^A-Za-z0-9_.-]+', '-', label).strip('-.')[:60] or 'model'}-{self.digest}"

    def rows(self, label: str) -> list[Row]:
        """Return the rows of predictions.jsonl."""
        name = self.model_name(label)
        return [
            {"instance_id": instance, "model_name_or_path": name, "model_patch": patch}
            for instance, patch in self.patches.items()
        ]


def predictions_of(records: Sequence[ProblemRecord]) -> list[Predictions]:
    """Return the predictions of each completion of the records of one task.

    Raises ConfigError for an instance that is there twice, and for a key that is no instance_id.
    """
    keys = [checked_instance_id(record.key, "samples.jsonl") for record in records]
    if len(set(keys)) < len(keys):
        raise ConfigError(f"{next(key for key in keys if keys.count(key) > 1)} is there twice; keep one of its records")
    most = max(len(record.answers) for record in records)
    return [
        Predictions(
            sample=sample,
            patches={
                record.key: patch_of(record.answers[sample].text) for record in records if len(record.answers) > sample
            },
        )
        for sample in range(most)
    ]


@dataclass(frozen=True, kw_only=True)
class HarnessReport:
    """The report of one run of the official harness."""

    path: Path
    sha256: str
    ids: Mapping[str, frozenset[str]]
    """The identifiers of each list of ID_LISTS and OTHER_LISTS."""
    reasons: Mapping[str, str]
    """Why an instance failed by its environment, if the harness says so."""


def read_report(path: Path) -> HarnessReport:
    """Return a report. Raises ConfigError for any other file, and for a report that contradicts itself."""
    text = "".join(lines(path, "report"))
    row = parse_json(text, str(path), "give the report of the harness, MODEL.RUN_ID.json")
    if not isinstance(row, dict) or row.get("schema_version") != SCHEMA:
        found = f"schema_version {row.get('schema_version')!r}" if isinstance(row, dict) else kind_of(row)
        raise ConfigError(
            f"{path} is {found}, not a report of schema_version {SCHEMA}; give MODEL.RUN_ID.json of the harness"
        )
    ids = {name: _ids(row, name, path) for name in ID_LISTS}
    ids |= {name: _ids(row, name, path) if f"{name}_ids" in row else frozenset() for name in OTHER_LISTS}
    parts = [ids[name] for name in ("resolved", "unresolved", "empty_patch", "error")]
    if len(frozenset[str]().union(*parts)) < sum(map(len, parts)):
        raise ConfigError(f"{path}: an instance is in two of the lists resolved, unresolved, empty_patch and error")
    for inside, whole in (
        (ids["resolved"] | ids["unresolved"], "completed"),
        (ids["completed"] | ids["error"] | ids["empty_patch"], "submitted"),
        (ids["infra_failure"] & ids["resolved"], "unresolved"),
    ):
        if wrong := sorted(inside - ids[whole]):
            raise ConfigError(f"{path}: {wrong[0]} has a verdict and is not in {whole}_ids; give the harness's file")
    if "infra_failure_ids" not in row:
        log.warning(
            "%s is of a harness before 5.0, which counts tests that a patch only prints as passed (SWE-bench issue "
            "601); judge with a later one",
            path,
        )
    reasons = row.get("failure_reasons") or {}
    return HarnessReport(
        path=path,
        sha256=hashlib.sha256(text.encode()).hexdigest(),
        ids=ids,
        reasons={str(name): str(reason) for name, reason in reasons.items()} if isinstance(reasons, dict) else {},
    )


def _ids(row: Row, name: str, path: Path) -> frozenset[str]:
    found = row.get(f"{name}_ids")
    if not isinstance(found, list) or not all(isinstance(one, str) for one in found):
        raise ConfigError(f"{path}: {name}_ids is {kind_of(found)}; it must be a list of text")
    count = row.get(f"{name}_instances", len(found))
    if len(set(found)) != len(found) or count != len(found):
        raise ConfigError(f"{path}: {name}_ids has {len(set(found))} instances and {name}_instances={count!r}")
    return frozenset(found)


def match(report: HarnessReport, predictions: Sequence[Predictions]) -> Predictions:
    """Return the predictions that a report judges.

    Raises ConfigError if its file name has none of their digests, or if its instances or empty patches are not theirs.
    """
    found = next((one for one in predictions if f"-{one.digest}." in report.path.name), None)
    if found is None:
        names = " or ".join(f"*-{one.digest}.*.json" for one in predictions[:3])
        raise ConfigError(
            f"{report.path.name} is not a report of the predictions of this run, which the harness calls {names}; "
            "write the predictions again and judge them, or give the report by its own name"
        )
    submitted, instances = report.ids["submitted"], set(found.patches)
    if submitted != instances:
        missing, unknown = sorted(instances - submitted), sorted(submitted - instances)
        raise ConfigError(
            f"{report.path.name} is a report of other instances: {len(missing)} of the run are missing "
            f"({', '.join(missing[:3]) or 'none'}) and {len(unknown)} are unknown ({', '.join(unknown[:3]) or 'none'})"
        )
    for instance, patch in found.patches.items():
        if (instance in report.ids["empty_patch"]) if patch else (instance in report.ids["completed"]):
            kind = "a patch in this run and none" if patch else "no patch in this run and one"
            raise ConfigError(f"{report.path.name}: {instance} has {kind} in the report; judge these predictions")
    return found


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """The verdict on one patch."""

    correct: bool | None
    """None: there is no verdict, and `reason` says why."""
    reason: str = ""


def verdicts(report: HarnessReport, predictions: Predictions, logs: Path | None = None) -> dict[str, Verdict]:
    """Return the verdict on each instance.

    logs: logs/run_evaluation/RUN_ID of the harness, whose files for each instance say more than the report. Raises
    ConfigError if they contradict the report or are of other patches.
    """
    folder = None
    if logs is not None:
        found = sorted(logs.glob(f"*-{predictions.digest}"))
        if len(found) != 1:
            raise ConfigError(
                f"{logs} has {len(found)} folders *-{predictions.digest} of these predictions; give the folder "
                "logs/run_evaluation/RUN_ID of the harness"
            )
        folder = found[0]
    return {
        instance: _verdict(report, instance, patch, folder / instance if folder else None)
        for instance, patch in predictions.patches.items()
    }


def _verdict(report: HarnessReport, instance: str, patch: str, folder: Path | None) -> Verdict:
    ids = report.ids
    if not patch:
        return Verdict(correct=False, reason=NO_PATCH)
    if folder is not None:
        _check_patch(folder / "patch.diff", patch)
    detail = _detail(folder / "report.json", instance, instance in ids["resolved"]) if folder else ""
    if instance in ids["infra_failure"]:
        cause = report.reasons.get(instance, "no reason given")
        return Verdict(correct=None, reason=f"the harness says that its environment failed: {cause}")
    if instance in ids["resolved"]:
        return Verdict(correct=True)
    if instance in ids["unresolved"]:
        return Verdict(correct=False, reason=detail or "not resolved")
    if folder is not None and _has_failed_to_apply(folder / "run_instance.log"):
        return Verdict(correct=False, reason="the patch could not be applied")
    if instance in ids["error"]:
        return Verdict(correct=None, reason=NO_RESULT)
    return Verdict(correct=None, reason="the harness did not run this instance")


def _check_patch(path: Path, patch: str) -> None:
    if path.is_file() and path.read_bytes() != patch.encode():
        raise ConfigError(f"{path} is another patch than that of the run; judge these predictions")


def _detail(path: Path, instance: str, is_resolved: bool) -> str:
    """Return what the harness says of an unresolved instance; "" without its file."""
    if not path.is_file():
        return ""
    row = read_object(path).get(instance)
    if not isinstance(row, dict) or row.get("resolved") is not is_resolved:
        raise ConfigError(f"{path} and the report disagree on {instance}; give files of one run of the harness")
    if not row.get("patch_successfully_applied"):
        return "the patch or the tests did not run to their end"
    status = row.get("tests_status")
    return ", ".join(_passed(status, name) for name in ("FAIL_TO_PASS", "PASS_TO_PASS")) if status else ""


def _passed(status: Any, name: str) -> str:
    try:
        passed, failed = (len(status[name][kind]) for kind in ("success", "failure"))
    except (KeyError, TypeError):
        return f"{name}: unknown"
    return f"{name}: {passed} of {passed + failed} pass"


def _has_failed_to_apply(path: Path) -> bool:
    return path.is_file() and APPLY_FAILED.encode() in path.read_bytes()


def with_verdicts(
    records: Sequence[ProblemRecord], judged: Mapping[int, Mapping[str, Verdict]], task: str
) -> list[ProblemRecord]:
    """Return the records with the verdicts on their completions. judged: place of the completion -> instance ->
    verdict; completions without one, and records of other tasks, stay as they are."""
    return [
        replace(
            record,
            answers=tuple(
                _judged(answer, judged[sample][record.key]) if sample in judged else answer
                for sample, answer in enumerate(record.answers)
            ),
        )
        if record.task == task
        else record
        for record in records
    ]


def _judged(answer: AnswerRecord, verdict: Verdict) -> AnswerRecord:
    has_verdict = verdict.correct is not None
    return replace(
        answer,
        correct=verdict.correct,
        unscorable=None if has_verdict else verdict.reason,
        grader=GRADER,
        detail=verdict.reason if has_verdict else "",
    )
