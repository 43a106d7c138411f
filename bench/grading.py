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
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

from thinkstack.tasks.benchmarks.datasets import benchmark_problem
from thinkstack.tasks.reward import accuracy_reward
from thinkstack.tasks.table import BENCHMARKS, verify
from thinkstack.tasks.verify.latex import has_math_verify, normalize_latex
from thinkstack.types import Problem

NUM_PAIRS = 5000
FILES = ("gsm8k/train", "gsm8k/test", "math/train", "math/test")


def rows(path: Path) -> list[dict]:
    """The rows of a .jsonl.gz."""
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def as_problem(row: dict, reference: str) -> Problem:
    return benchmark_problem("math", str(row.get("prompt") or row.get("problem")), reference, level=1)


def graded_answers(data: Path) -> Iterator[tuple[str, str, str, bool]]:
    """(file, reference, answer, our verdict) of each recorded answer: the answer alone, or as it was written."""
    for path in sorted((data / "r1_traces").glob("cs336_*.jsonl.gz")):
        for row in rows(path):
            yield (
                "cs336",
                row["ground_truth"],
                row["response"],
                verify(as_problem(row, row["ground_truth"]), row["response"]),
            )
    for path in sorted((data / "r1_traces").glob("rasbt_*.jsonl.gz")):
        for row in rows(path):
            turn = f"<think>\n{row['message_thinking'] or '.'}\n</think>\n\n{row['message_content']}"
            verdict = accuracy_reward(as_problem(row, row["gtruth_answer"]), turn, "think_then_answer") == 1.0
            yield "rasbt", row["gtruth_answer"], row["message_content"], verdict


def report_agreement(data: Path) -> None:
    """Our verdicts on recorded answers beside math-verify's."""
    from math_verify import parse, verify

    counts: dict[str, list[int]] = defaultdict(lambda: [0, 0, 0])
    differences: dict[tuple[str, str, bool], int] = defaultdict(int)
    for file, reference, answer, ours in graded_answers(data):
        text = answer if "\\boxed" in answer or "$" in answer else f"${answer}$"
        theirs = bool(verify(parse(f"${reference}$"), parse(text)))
        counts[file] = [a + b for a, b in zip(counts[file], (1, ours == theirs, ours), strict=True)]
        if ours != theirs:
            differences[reference, answer, ours] += 1
    for file, (total, equal, right) in counts.items():
        print(f"{file}: {equal} of {total} verdicts equal math-verify's; {right} right by ours")
    for (reference, answer, ours), count in sorted(differences.items()):
        print(f"  {count} x reference {reference!r}, answer {answer!r}: {'right' if ours else 'wrong'} by ours")


def report_references(data: Path) -> list[str]:
    """Every reference against itself. Returns the distinct ones of MATH."""
    found: list[str] = []
    for file in FILES:
        name = file.partition("/")[0]
        problems = BENCHMARKS[name].load(data / f"{file}.jsonl.gz")
        print(f"{file}: {sum(verify(p, p.answer) for p in problems)} of {len(problems)} references equal themselves")
        found += [problem.answer for problem in problems if name == "math"]
    return sorted(set(found))


def report_pairs(references: list[str]) -> None:
    """Distinct references that count as equal: of random pairs, of pairs that one edit separates, and of all pairs."""
    rng = random.Random(0)
    near = [(text, text[:place] + text[place + 1 :]) for text in references for place in [rng.randrange(len(text))]]
    pairs = {"random": [tuple(rng.sample(references, 2)) for _ in range(NUM_PAIRS)], "a character less": near}
    for name, listed in pairs.items():
        equal = [pair for pair in listed if verify(benchmark_problem("math", "?", pair[0], 1), pair[1])]
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
