"""Problems and verdicts for tests."""

from collections.abc import Iterable

from thinkstack.tasks.benchmarks.datasets import DatasetTask
from thinkstack.tasks.puzzles.generated import alternate
from thinkstack.tasks.reward import Reward, RewardConfig, score
from thinkstack.tasks.table import PUZZLES, make_task, make_tasks
from thinkstack.tasks.task import Task, TaskConfig
from thinkstack.tasks.verify.graders import GRADERS
from thinkstack.tasks.verify.pool import VerifierPool
from thinkstack.text.parse import parse_turn
from thinkstack.types import Message, Problem, Response, Score


def make_problem(
    question: str = "2+2?",
    answer: str = "4",
    task: str = "chain",
    language: str = "en",
    key: str = "0" * 16,
    **metadata: object,
) -> Problem:
    messages = (Message(role="user", content=question),)
    return Problem(messages=messages, answer=answer, task=task, language=language, key=key, metadata=metadata)


def rows(*names: str, **settings: object) -> dict[str, TaskConfig]:
    """Rows of a recipe's `tasks`, all with the same settings."""
    return dict.fromkeys(names, TaskConfig(**settings))  # type: ignore[arg-type]


def sample_problems(names: Iterable[str], split: str, seed: int, count: int, **settings: object) -> list[Problem]:
    """The first problems of generated tasks in turn, all with the same settings."""
    return alternate(list(make_tasks(rows(*names, **settings)).values()), split, seed).take(count)


def task_of(problem: Problem) -> Task:
    """The problem's task; a name outside the tables is a task of one's own, compared as text."""
    is_generated = problem.task in PUZZLES or problem.task.startswith("gym/")
    return make_task(problem.task, TaskConfig(data="" if is_generated else "files"))


def verify(problem: Problem, answer: str | None) -> bool:
    """Whether the verifier of the problem's task accepts `answer`, without math-verify."""
    task = task_of(problem)
    if answer is not None and isinstance(task, DatasetTask):
        return GRADERS[task.grader_name].accepts(problem, answer)
    return task.verify(problem, Response(text="", answer=answer)).total == 1.0


def scored(problem: Problem, text: str, **settings: object) -> Score:
    """The score of one turn by these settings of a reward."""
    cfg = RewardConfig(**settings)  # type: ignore[arg-type]
    with VerifierPool(num_workers=1) as pool:
        (found,) = score(
            [(problem, parse_turn(text, cfg.thinking_format))], Reward(cfg, {problem.task: task_of(problem)}), pool
        )
    return found
