"""Benchmarks: problems built from rows, refused files, accepted answers."""

import gzip
import json
import os
from pathlib import Path

import pytest

from tests import HANG_SECONDS
from tests.problems import make_problem, scored, verify
from thinkstack.tasks import reward
from thinkstack.tasks.benchmarks.datasets import Gsm8k, Math, Shuffled
from thinkstack.tasks.table import make_task
from thinkstack.tasks.task import Problems, TaskConfig
from thinkstack.tasks.verify import latex
from thinkstack.tasks.verify.latex import has_math_verify, normalize_latex, unbox
from thinkstack.tasks.verify.pool import VerifierPool
from thinkstack.text.final_answer import boxes, last_boxed
from thinkstack.types import ConfigError, Response

DATA = Path(os.environ.get("THINKSTACK_DATA", "data"))
DUCKS = {"question": "How many eggs?", "answer": "She sells 16-3 = <<16-3=13>>13.\nIn all 13*100 = 1300.\n#### 1,300"}
CIRCLE = {
    "problem": "How far around?",
    "level": "Level 3",
    "type": "Geometry",
    "solution": "First \\boxed{no}, then $\\boxed{\\frac{3\\pi}{2}}$.",
}
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason="THINKSTACK_DATA is not a folder with gsm8k/ and math/")
needs_math_verify = pytest.mark.skipif(
    not has_math_verify(), reason="math-verify is not installed (pip install '.[math]')"
)


def written(path, rows):
    text = "\n".join(json.dumps(row) for row in rows)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


def math_problem(answer):
    return make_problem("?", answer, "math")


GSM8K, MATH = Gsm8k("gsm8k", TaskConfig(data="files")), Math("math", TaskConfig(data="files"))


@pytest.mark.parametrize("name", ["test.jsonl", "test.jsonl.gz"])
def test_a_gsm8k_row_becomes_a_problem(tmp_path, name):
    (problem,) = GSM8K.read(written(tmp_path / name, [DUCKS]))
    assert (problem.question, problem.answer, problem.level, problem.task) == ("How many eggs?", "1300", 2, "gsm8k")


def test_math_reference_is_the_last_box_of_the_solution(tmp_path):
    """A copy in circulation has a wrong answer column for one problem; the solution is right."""
    (problem,) = MATH.read(written(tmp_path / "test.jsonl", [CIRCLE | {"answer": "no"}]))
    assert (problem.answer, problem.level) == ("\\frac{3\\pi}{2}", 3)


def test_math_500_and_the_published_folder_are_read_too(tmp_path):
    row = {"problem": "1+1?", "answer": "2", "level": 1, "subject": "Prealgebra"}
    (problem,) = MATH.read(written(tmp_path / "math500.jsonl", [row]))
    assert (problem.answer, problem.level) == ("2", 1)
    (tmp_path / "train" / "geometry").mkdir(parents=True)
    (tmp_path / "train" / "geometry" / "7.json").write_text(json.dumps(CIRCLE), encoding="utf-8")
    (problem,) = MATH.read(tmp_path / "train")
    assert problem.question == "How far around?"


def test_math500_takes_its_own_file_of_a_folder_that_has_all_of_maths_test_set_too(tmp_path):
    rows = [CIRCLE | {"problem": f"{number}?"} for number in range(501)]
    written(tmp_path / "test.jsonl", rows)
    task = make_task("math500", TaskConfig(data=str(tmp_path)))
    with pytest.raises(ConfigError, match=r"has 501 problems; MATH-500 has 500; give math500\.jsonl"):
        task.problems("test", seed=0)
    written(tmp_path / "math500.jsonl", rows[:500])
    assert len({problem.key for problem in task.problems("test", seed=0).take(500)}) == 500


def test_ifeval_is_read_under_its_published_name(tmp_path):
    row = {"key": 1, "prompt": "No commas.", "instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}]}
    written(tmp_path / "input_data.jsonl.gz", [row])
    (problem,) = make_task("ifeval", TaskConfig(data=str(tmp_path))).problems("test", seed=0).take(1)
    assert problem.question == "No commas."


def test_parquet_is_read_where_pyarrow_is(tmp_path):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.Table.from_pylist([DUCKS]), tmp_path / "x.parquet")
    assert GSM8K.read(tmp_path / "x.parquet")[0].answer == "1300"
    (tmp_path / "y.parquet").write_bytes(b"not parquet")
    with pytest.raises(ConfigError, match="is not a parquet file"):
        GSM8K.read(tmp_path / "y.parquet")


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (
            [CIRCLE],
            r"line 1 has no question, answer \(it has problem, level, type, solution\); give the path of train",
        ),
        ([DUCKS, {"question": "?", "answer": "13"}], "line 2 does not end in '#### number' as GSM8K does"),
        ([{"question": "?", "answer": "#### many"}], "does not end in '#### number'"),
        ([], "has no rows"),
        (["text"], "line 1 is text, not an object"),
    ],
)
def test_a_foreign_file_is_refused_with_the_line_and_the_way_out(tmp_path, rows, message):
    with pytest.raises(ConfigError, match=message):
        GSM8K.read(written(tmp_path / "x.jsonl", rows))


def test_a_missing_file_and_one_that_is_no_text_are_refused(tmp_path):
    with pytest.raises(
        ConfigError, match=r"nothing\.jsonl does not exist; give the path of train\.jsonl and test\.jsonl"
    ):
        GSM8K.read(tmp_path / "nothing.jsonl")
    (tmp_path / "x.jsonl").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "y.jsonl.gz").write_bytes(b"plain\n")
    (tmp_path / "z.jsonl").write_text("{not json")
    for name, message in (("x.jsonl", "UTF-16"), ("y.jsonl.gz", "known: JSON lines"), ("z.jsonl", "is not JSON")):
        with pytest.raises(ConfigError, match=message):
            GSM8K.read(tmp_path / name)


def test_few_rows_without_an_answer_are_skipped_with_a_warning_and_many_are_refused(tmp_path, caplog):
    blank = {"problem": "?", "level": "Level ?", "answer": ""}
    path = written(tmp_path / "x.jsonl", [CIRCLE] * 100 + [blank])
    assert len(MATH.read(path)) == 100
    assert "line 101" in caplog.text
    with pytest.raises(ConfigError, match="neither an answer nor"):
        MATH.read(written(tmp_path / "x.jsonl", [CIRCLE, blank]))


@needs_data
@pytest.mark.parametrize(("file", "count"), [("gsm8k/test", 1319), ("gsm8k/train", 7473), ("math/test", 5000)])
def test_published_files_are_read_completely_and_their_answers_accepted(file, count):
    found = make_task(file.split("/")[0], TaskConfig(data="files")).read(DATA / f"{file}.jsonl.gz")
    assert len(found) == count == len({problem.key for problem in found})
    assert all(verify(problem, problem.answer) for problem in found)
    assert not any(verify(problem, problem.question) for problem in found[:200])


@pytest.mark.parametrize(
    "answer", ["1300", "1,300", "$1300", "\\boxed{1300}", "#### 1300", "1300.0", "$1300$", "1300 eggs"]
)
def test_a_gsm8k_answer_is_a_number_in_any_notation(tmp_path, answer):
    (problem,) = GSM8K.read(written(tmp_path / "x.jsonl", [DUCKS]))
    assert verify(problem, answer)
    assert scored(problem, f"<think>.</think><answer>{answer}</answer>").total == 1.0


@pytest.mark.parametrize("answer", ["1300 or 1301", "13*100", "1300%", "\\boxed{1300}\\boxed{1}", "", "1.3e3"])
def test_answers_that_are_not_exactly_the_number_are_refused(tmp_path, answer):
    (problem,) = GSM8K.read(written(tmp_path / "x.jsonl", [DUCKS]))
    assert not verify(problem, answer)


@pytest.mark.parametrize(
    ("reference", "answer"),
    [
        ("\\frac12", "\\dfrac{1}{2}"),
        ("\\frac{1}{2}", "0.5"),
        ("\\frac{1}{2}", "1/2"),
        ("-\\frac{1}{2}", "-\\frac12"),
        ("10,\\!000", "10000"),
        ("\\$32.48", "32.48"),
        ("90^\\circ", "90"),
        ("180\\text{ miles}", "180"),
        ("\\left( 3, \\frac{\\pi}{2} \\right)", "(3,\\frac{\\pi}{2})"),
        ("\\text{Evelyn}", "evelyn"),
        ("x=5", "5"),
        ("\\sqrt3", "\\sqrt{3}"),
        (".5", "0.5"),
    ],
)
def test_latex_is_compared_up_to_spelling(reference, answer):
    assert verify(math_problem(reference), answer)
    assert verify(math_problem(reference), f"$\\boxed{{{answer}}}$")


@pytest.mark.parametrize(
    ("reference", "answer"),
    [
        ("4", "2+2"),
        ("18", "18:30"),
        ("(1,2)", "\\{1,2\\}"),
        ("(1,2)", "[1,2]"),
        ("72", "\\boxed{80}\\boxed{72}"),
        ("12", "3\\cdot4"),
        ("\\frac{1}{3}", "0.3333"),
        ("5", "-5"),
        ("2", "\\frac{2}{1}1"),
        ("x", "X"),
    ],
)
def test_answers_are_not_evaluated_and_types_are_not_inferred(reference, answer):
    """Verifiers in other projects accept each of these pairs."""
    assert not verify(math_problem(reference), answer)


def test_boxes_are_found_with_their_nested_braces():
    text = "\\boxed{\\frac{1}{2}} and \\fbox{3} and \\boxed 7."
    assert boxes(text) == ["\\frac{1}{2}", "3", "7"]
    assert last_boxed(text) == "7"
    assert last_boxed("none") is None and last_boxed("\\boxed{unclosed") is None
    assert boxes("\\boxed{\\{1\\}}") == ["\\{1\\}"]
    assert unbox("\\boxed{\\boxed{3}}") == "\\boxed{3}"
    assert normalize_latex("\\dfrac{2}{4}") == "1/2"


def verify_formulas(pairs, pool):
    """Verify (reference, answer) pairs as MATH answers are verified in RL and evaluation."""
    pairs = [(math_problem(reference), Response(text="", answer=answer)) for reference, answer in pairs]
    return reward.verify(pairs, {"math": MATH}, pool)


@needs_math_verify
def test_equivalent_formulas_are_equal_and_a_hanging_comparison_is_killed():
    tower = "9^{9^{9^{9^9}}}\\pi"
    pairs = [
        ("1+\\sqrt{2}", "\\sqrt{2}+1", 1.0),
        ("10\\sqrt{3}", "\\sqrt{300}", 1.0),
        ("2\\pi", "3\\pi", 0.0),
        ("(1,\\pi)", "\\{1,\\pi\\}", 0.0),
        ("4", "2+2", 0.0),
        ("4", "4", 1.0),
        ("52_8", "52_9", 0.0),  # math-verify drops the base
        ("\\frac{1}{2^{99}}", "\\frac{1}{2^{98}}", 0.0),  # and rounds
    ]
    with VerifierPool(num_workers=1, timeout_seconds=HANG_SECONDS) as pool:
        scores = verify_formulas([pair[:2] for pair in pairs], pool)
    assert [found.total for found in scores] == [expected for *_, expected in pairs]
    assert [found.unscorable for found in scores] == [None] * len(pairs)
    with VerifierPool(num_workers=1, timeout_seconds=1.0) as pool:
        (hanging,) = verify_formulas([("2\\pi", tower)], pool)
    assert hanging.total == 0.0 and "ran longer than" in (hanging.unscorable or "")


def test_without_math_verify_formulas_are_compared_by_spelling_with_one_warning(monkeypatch, caplog):
    monkeypatch.setattr(latex.importlib.util, "find_spec", lambda name: None)
    latex.has_math_verify.cache_clear()
    pool = VerifierPool()
    found = verify_formulas([("1+x", "x+1"), ("1+x", "1 + x"), ("1+x", "2+x")], pool)
    assert [score.total for score in found] == [0.0, 1.0, 0.0] and pool._workers == []
    assert caplog.text.count("pip install 'thinkstack[math]'") == 1
    latex.has_math_verify.cache_clear()


def test_a_stream_returns_every_problem_once_per_epoch_and_resumes():
    listed = [math_problem(str(number)) for number in range(7)]
    stream, again, other = (Problems(Shuffled(listed, seed).problem_at) for seed in (3, 3, 4))
    first, second = stream.take(7), stream.take(7)
    assert sorted(p.answer for p in first) == sorted(p.answer for p in second) == [p.answer for p in listed]
    assert first != second
    again.restore({"position": 5})
    assert again.take(4) == (first + second)[5:9]
    assert other.take(7) != first


def test_levels_without_a_problem_are_refused(tmp_path):
    written(tmp_path / "test.jsonl", [DUCKS])
    task = Gsm8k("gsm8k", TaskConfig(data=str(tmp_path), levels=(7,)))
    with pytest.raises(ConfigError, match=r"tasks.gsm8k has no test problems of levels=\[7\]"):
        task.problems("test", seed=0)
