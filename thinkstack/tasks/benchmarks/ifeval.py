"""IFEval: prompts with instructions that a program can check (arXiv:2311.07911)."""

from collections.abc import Mapping
from pathlib import Path

from thinkstack.tasks.benchmarks.datasets import DatasetTask, load_rows
from thinkstack.tasks.puzzles.puzzle import digest
from thinkstack.tasks.verify.ifeval import count_followed, read_instructions, visible_content
from thinkstack.types import ConfigError, Message, Problem, Response, Score

FLAWED = frozenset((30, 337, 2078))
"""Keys of rows whose instructions contradict their prompt (google-research pull request 3361): 30 lists one instruction
twice and lacks lower case, 337 has 336 words for 400, 2078 asks for exactly one bullet point and for a few. Verdicts
follow the published file; the metadata has is_flawed."""


class IFEval(DatasetTask):
    """The accuracy is prompt-level strict, the figure that DeepSeek reports; `measures` has the other three.

    Fields: key, prompt, instruction_id_list, kwargs. Instructions may have the prefix en:, and arguments that do not
    belong to their instruction are ignored. Only the content is checked, without thinking.
    """

    SOURCE = "input_data.jsonl of github.com/google-research/google-research (instruction_following_eval, Apache-2.0)"
    FIELDS = ("key", "prompt", "instruction_id_list", "kwargs")
    FILE_NAMES = ("input_data",)
    SHOTS_SPLIT = ""

    def read(self, path: str | Path) -> list[Problem]:
        found = []
        for where, row in load_rows(path, self.FIELDS, self.SOURCE):
            question, key = row["prompt"], row["key"]
            if not isinstance(question, str) or not question.strip():
                raise ConfigError(f"{where}: prompt is not text, or empty; use {self.SOURCE}")
            read_instructions(row, where)
            metadata = {name: row[name] for name in ("key", "instruction_id_list", "kwargs")}
            found.append(
                Problem(
                    messages=(Message(role="user", content=question),),
                    answer="",
                    task=self.name,
                    language="en",
                    key=f"{digest(self.name, key, question):016x}",
                    metadata=metadata | {"is_flawed": key in FLAWED},
                )
            )
        return found

    def read_answer(self, problem: Problem, response: Response) -> str | None:
        """The content of the turn; None if it is empty."""
        return visible_content(response.text) or None

    def verify(self, problem: Problem, response: Response) -> Score:
        return Score(total=self.measures(problem, response)["prompt_strict"])

    def may_hang(self, problem: Problem, response: Response) -> bool:
        return False

    def measures(self, problem: Problem, response: Response) -> Mapping[str, float]:
        """Verdicts by name; verify/ifeval.py explains them."""
        instructions = read_instructions(problem.metadata, f"problem {problem.key}")
        return count_followed(instructions, visible_content(response.text))
