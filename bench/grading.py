"""Do our rules judge as they should? `python bench/grading.py [DATA]`, half a minute; math-verify for the comparison.

DATA (default ../shared/data) holds gsm8k/ and math/ with their train and test files, and r1_traces/ with recorded
answers of R1-family models. Compared are: every reference with itself; the recorded answers, judged by us and by
math-verify, each disagreement listed; references of different problems, and references that lack a character, with each
other, every pair that counts as equal listed.
"""

import argparse
import gzip
import json
import random
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

from thinkstack.tasks.benchmarks.datasets import Math, question_problem
from thinkstack.tasks.reward import verify
from thinkstack.tasks.table import make_task
from thinkstack.tasks.task import TaskConfig
from thinkstack.tasks.verify.graders import GRADERS
from thinkstack.tasks.verify.latex import has_math_verify, normalize_latex, same_spelling
from thinkstack.tasks.verify.pool import VerifierPool
from thinkstack.text.parse import parse_turn
from thinkstack.types import Problem, Response

NUM_PAIRS = 5000
MATH = Math("math", TaskConfig(data="unused"))
FILES = ("gsm8k/train", "gsm8k/test", "math/train", "math/test")


def rows(path: Path) -> list[dict]:
    """The rows of a .jsonl.gz."""
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def as_problem(row: dict, reference: str) -> Problem:
    return question_problem("math", str(row.get("prompt") or row.get("problem")), reference, {"level": 1})


def recorded_answers(data: Path) -> Iterator[tuple[str, Problem, Response]]:
    """(file, problem, response) of each recorded answer: the answer alone, or as it was written."""
    for path in sorted((data / "r1_traces").glob("cs336_*.jsonl.gz")):
        for row in rows(path):
            yield "cs336", as_problem(row, row["ground_truth"]), Response(text=row["response"], answer=row["response"])
    for path in sorted((data / "r1_traces").glob("rasbt_*.jsonl.gz")):
        for row in rows(path):
            turn = f"<think>\n{row['message_thinking'] or '.'}\n</think>\n\n{row['message_content']}"
            yield "rasbt", as_problem(row, row["gtruth_answer"]), parse_turn(turn, "think_then_answer")


def report_agreement(data: Path) -> None:
    """Our verdicts on recorded answers, through the pool as in RL and evaluation, beside math-verify's."""
    import math_verify

    recorded = list(recorded_answers(data))
    pairs = [(problem, response) for _, problem, response in recorded]
    started = time.perf_counter()
    with VerifierPool() as pool:
        verdicts = verify(pairs, {"math": MATH}, pool)
    seconds = time.perf_counter() - started
    in_pool = sum(MATH.may_hang(*pair) for pair in pairs)
    counts: dict[str, list[int]] = defaultdict(lambda: [0, 0, 0, 0])
    differences: dict[tuple[str, str, str], int] = defaultdict(int)
    for (file, problem, response), verdict in zip(recorded, verdicts, strict=True):
        text = response.text if "\\boxed" in response.text or "$" in response.text else f"${response.text}$"
        theirs = bool(math_verify.verify(math_verify.parse(f"${problem.answer}$"), math_verify.parse(text)))
        ours = verdict.total == 1.0
        found = (1, ours == theirs and not verdict.unscorable, ours, verdict.unscorable is not None)
        counts[file] = [a + b for a, b in zip(counts[file], found, strict=True)]
        if ours != theirs or verdict.unscorable:
            verdict_text = verdict.unscorable or ("right" if ours else "wrong")
            differences[problem.answer, response.text, verdict_text] += 1
    for file, (total, equal, right, unscorable) in counts.items():
        print(
            f"{file}: {equal} of {total} verdicts equal math-verify's; {right} right, {unscorable} unscorable by ours"
        )
    print(f"{in_pool} of {len(pairs)} answers went to math-verify in the pool; {seconds:.1f} s")
    for (reference, answer, ours), count in sorted(differences.items()):
        print(f"  {count} x reference {reference!r}, answer {answer!r}: {ours} by ours")


def report_references(data: Path) -> list[str]:
    """Every reference against itself. Returns the distinct ones of MATH."""
    found: list[str] = []
    for file in FILES:
        name = file.partition("/")[0]
        task = make_task(name, TaskConfig(data=str(data / name)))
        problems = task.read(data / f"{file}.jsonl.gz")
        equal = sum(GRADERS[task.grader_name].accepts(problem, problem.answer) for problem in problems)
        print(f"{file}: {equal} of {len(problems)} references equal themselves")
        found += [problem.answer for problem in problems if name == "math"]
    return sorted(set(found))


def report_pairs(references: list[str]) -> None:
    """Distinct references that count as equal: of random pairs, of pairs that one edit separates, and of all pairs."""
    rng = random.Random(0)
    near = [(text, text[:place] + text[place + 1 :]) for text in references for place in [rng.randrange(len(text))]]
    pairs = {"random": [tuple(rng.sample(references, 2)) for _ in range(NUM_PAIRS)], "a character less": near}
    for name, listed in pairs.items():
        equal = [pair for pair in listed if same_spelling(*pair)]
        print(f"{name}: {len(equal)} of {len(listed)} pairs equal")
        for pair in equal:
            print(f"  {pair[0]!r} and {pair[1]!r}")
    groups = defaultdict(list)
    for reference in references:
        groups[normalize_latex(reference)].append(reference)
    several = [group for group in groups.values() if len(group) > 1]
    print(f"all pairs of {len(references)} distinct references: {len(several)} groups share a spelling")
    for group in several:
        print(f"  {group}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", nargs="?", type=Path, default=Path("../shared/data"))
    data = parser.parse_args().data
    missing = [file for file in (*(f"{file}.jsonl.gz" for file in FILES), "r1_traces") if not (data / file).exists()]
    if missing:
        sys.exit(f"{data} has no {', '.join(missing)}; give the folder that holds gsm8k/, math/ and r1_traces/")
    references = report_references(data)
    if has_math_verify():
        report_agreement(data)
    else:
        print("not compared: math-verify is not installed; pip install 'thinkstack[math]'")
    report_pairs(references)


if __name__ == "__main__":
    main()
