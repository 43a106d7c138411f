"""SWE-bench (arXiv:2310.06770): issues of repositories that a patch resolves. An adapter: nothing is executed here.

A completion's patch is written as a prediction for the official harness, whose report is read back as the verdict
(evals/swe_bench.py). Until then a patch has no verdict.
"""

import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from thinkstack.files import Row, kind_of
from thinkstack.tasks.benchmarks.code_task import text_of
from thinkstack.tasks.benchmarks.datasets import DatasetTask, load_rows
from thinkstack.tasks.benchmarks.prompts import fill_prompt
from thinkstack.tasks.benchmarks.swe_bench_prompts import PREMISE, SWE_BENCH_PROMPTS
from thinkstack.tasks.verify.code_blocks import visible_text
from thinkstack.types import ConfigError, Message, Problem, Response, Score, Tool

log = logging.getLogger(__name__)
GRADER = "official harness"
NO_VERDICT = "the official harness has not judged the patch (thinkstack eval swe-bench)"
NO_PATCH = "no patch"
FIELDS = ("instance_id", "repo", "base_commit", "problem_statement", "patch")
DIFFICULTIES = ("<15 min fix", "15 min - 1 hour", "1-4 hours", ">4 hours")
"""Levels 1 to 4 of SWE-bench Verified."""
_INSTANCE_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")
_OPENING = re.compile(r"<([\w-]+)>")
_CLOSING = re.compile(r"</([\w-]+)>")
_FENCED = re.compile(r"```(\w+)?\n(.*?)```", re.DOTALL)
_DATE = re.compile(r"\d{4}-\d\d-\d\d")


class SweBench(DatasetTask):
    """Fields: instance_id, repo, base_commit, problem_statement, patch (the reference). Optional: text, a whole prompt
    with the code base; or readmes and file_contents, objects from path to text, from which the prompt is built;
    difficulty, created_at.

    Instances of one repository are one cluster of the question error. The key of a problem is its instance_id.
    """

    SOURCE = (
        "test.jsonl or test.parquet with instance_id, repo, base_commit, problem_statement and patch, from "
        "SWE-bench/SWE-bench_Verified or, with text, princeton-nlp/SWE-bench_oracle (github.com/SWE-bench/SWE-bench, "
        "MIT)"
    )
    FILE_NAMES = ("test-00000-of-00001", "SWE-bench_Verified")
    PROMPTS = SWE_BENCH_PROMPTS
    SHOTS_SPLIT = ""

    @property
    def grader(self) -> str:
        return GRADER

    def read(self, path: str | Path) -> list[Problem]:
        found: dict[str, Problem] = {}
        for where, row in load_rows(path, FIELDS, self.SOURCE):
            problem = self._problem(row, where)
            if problem.key in found:
                raise ConfigError(f"{where}: instance_id={problem.key!r} occurs twice; keep one of the rows")
            found[problem.key] = problem
        blind = sum(not problem.metadata["has_code"] for problem in found.values())
        if blind:
            log.warning(
                "%s: %d of %d instances have neither text nor file_contents: their prompts show the issue without code",
                *(path, blind, len(found)),
            )
        return list(found.values())

    def _problem(self, row: Row, where: str) -> Problem:
        texts = {name: text_of(row, name, where) for name in FIELDS}
        key = checked_instance_id(texts["instance_id"], where)
        text = None if row.get("text") is None else text_of(row, "text", where)
        readmes, files = (_files(row, name, where) for name in ("readmes", "file_contents"))
        if text is not None and not files and "{code}" in self.template.text:
            raise ConfigError(
                f"{where}: has text, a whole prompt, and no file_contents, so prompt={self.cfg.prompt!r} would show no "
                "code; leave out the prompt"
            )
        difficulty = row.get("difficulty")
        problem = Problem(
            messages=(Message(role="user", content=texts["problem_statement"]),),
            answer=texts["patch"].removeprefix("<patch>\n").removesuffix("\n</patch>"),
            task=self.name,
            language="en",
            key=key,
            metadata={
                "id": key,
                "cluster": texts["repo"],
                "base_commit": texts["base_commit"],
                "code": f"{numbered(readmes)}\n{numbered(files)}",
                "has_code": text is not None or bool(files),
                "date": created[0] if (created := _DATE.match(str(row.get("created_at", "")))) else "",
            }
            | ({"level": 1 + DIFFICULTIES.index(difficulty)} if difficulty in DIFFICULTIES else {}),
        )
        if text is None:
            text = fill_prompt(SWE_BENCH_PROMPTS["style-3"], problem).removesuffix("\n\n")
        return replace(problem, metadata={**problem.metadata, "text": text})

    def prompt(self, problem: Problem) -> tuple[Sequence[Message], Sequence[Tool]]:
        """Return the messages: the first line of a published prompt is the system message."""
        (message,), tools = super().prompt(problem)
        if not message.content.startswith(f"{PREMISE}\n"):
            return (message,), tools
        rest = message.content.removeprefix(f"{PREMISE}\n")
        return (Message(role="system", content=PREMISE), replace(message, content=rest)), tools

    def read_answer(self, problem: Problem, response: Response) -> str | None:
        """Return the patch; None if it is empty."""
        return patch_of(response.text) or None

    def verify(self, problem: Problem, response: Response) -> Score:
        """A completion without a patch is wrong; a patch has no verdict before the official harness judges it."""
        is_empty = self.read_answer(problem, response) is None
        return Score(total=0.0, detail=NO_PATCH) if is_empty else Score(total=0.0, unscorable=NO_VERDICT)

    def may_hang(self, problem: Problem, response: Response) -> bool:
        return False


def checked_instance_id(name: str, where: str) -> str:
    """Return an identifier. Raises ConfigError for one that is no file name: the harness makes folders of them."""
    if not _INSTANCE_ID.fullmatch(name):
        raise ConfigError(
            f"{where}: instance_id={name!r:.80} must have letters, digits, _, . and - alone and start with a letter or "
            "digit, since the harness names folders by it; correct it"
        )
    return name


def _files(row: Row, field: str, where: str) -> dict[str, str]:
    found = row.get(field) or {}
    if not isinstance(found, dict) or not all(isinstance(text, str) for text in found.values()):
        raise ConfigError(f"{where}: {field} is {kind_of(row[field])}; it must be an object from path to text")
    return found


def numbered(files: Mapping[str, str]) -> str:
    """Return files with numbered lines, by path, as the published prompts show them."""
    shown = []
    for name, text in sorted(files.items()):
        lines = "\n".join(f"{number} {line}" for number, line in enumerate(text.split("\n"), start=1))
        shown.append(f"[start of {name}]\n{lines}\n[end of {name}]")
    return "\n".join(shown)


def patch_of(turn: str) -> str:
    """Return the patch of a turn, "" if there is none: thinking has none, nor has what follows an unclosed tag."""
    return extract_patch(visible_text(Response(text=turn)))


def extract_patch(text: str) -> str:
    """Return the first element <diff> or <patch>, else the first fenced block of one of these languages, else the first
    other element or fenced block, else the text up to </s>; without any stripping.

    Source: extract_diff of SWE-bench/SWE-bench at 7a21e05, swebench/inference/make_datasets/utils.py; here in linear
    time.
    """
    found = [*_elements(text), *_FENCED.findall(text)]
    patches = [content for name, content in found if name in ("diff", "patch")]
    if patches or found:
        return patches[0] if patches else found[0][1]
    return text.partition("</s>")[0]


def _elements(text: str) -> list[tuple[str, str]]:
    """Return name and content of the elements <NAME>...</NAME>; what is inside an element is not searched."""
    ends = {found[1]: found.start() for found in _CLOSING.finditer(text)}  # the last of each name
    found, start = [], 0
    while opening := _OPENING.search(text, start):
        name, start = opening[1], opening.end()
        if ends.get(name, -1) >= start:
            end = text.index(f"</{name}>", start)
            found.append((name, text[start:end]))
            start = end + len(name) + 3
    return found
