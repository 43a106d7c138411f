"""Budgets of the design, and what no file may hold."""

import ast
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE, BENCH, TESTS = ROOT / "thinkstack", ROOT / "bench", ROOT / "tests"
FILE_LINES, FUNCTION_LINES = 400, 60
KINDS = ("py", "cpp", "h", "js", "css")
SOURCES = sorted(path for kind in KINDS for folder in (PACKAGE, BENCH, TESTS) for path in folder.rglob(f"*.{kind}"))
PYTHON = sorted((*PACKAGE.rglob("*.py"), *BENCH.rglob("*.py")))
UNPICKLERS = {"pickle", "_pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
# Letters in brackets keep this file from matching itself.
MACHINE = re.compile(
    r"/(wor[k]|far[m]|roo[t]|hom[e]|opt/wheel[s])/|bash_job[s]|\.librar[y]|p[y]pi\.o[r]g|python[h]osted|registry\.n[p]m|deb\.d[e]b"
)


def name_of(path):
    return str(path.relative_to(ROOT))


def tracked():
    """Text files of the repository, or of the folder where it came without git."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    names = listed.stdout.split("\0") if listed.returncode == 0 else []
    paths = [ROOT / name for name in names if name] or [*SOURCES, *TESTS.rglob("*.py"), *ROOT.glob("*.*")]
    return [path for path in paths if path.is_file() and b"\0" not in path.read_bytes()[:4096]]


def long_functions(source):
    """(name, lines) of functions over the budget."""
    functions = (n for n in ast.walk(ast.parse(source)) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef))
    sizes = ((node.name, (node.end_lineno or node.lineno) - node.lineno + 1) for node in functions)
    return [(name, size) for name, size in sizes if size > FUNCTION_LINES]


def lines_of(path, name):
    """Lines of a method, given as Class.method, from its `def` on."""
    kind, method = name.split(".")
    tree = ast.parse(path.read_text(encoding="utf-8"))
    (body,) = [node.body for node in tree.body if isinstance(node, ast.ClassDef) and node.name == kind]
    (found,) = [node for node in body if isinstance(node, ast.FunctionDef) and node.name == method]
    return (found.end_lineno or found.lineno) - found.lineno + 1


def unpickling(source):
    """Names in `source` that run what a file says."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names if alias.name.split(".")[0] in UNPICKLERS]
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in UNPICKLERS:
            found.append(node.module)
        elif isinstance(node, ast.ImportFrom) and node.module == "torch":
            found += [f"torch.{alias.name}" for alias in node.names if alias.name in ("load", "save")]
        elif isinstance(node, ast.Attribute) and ast.unparse(node) in ("torch.load", "torch.save"):
            found.append(ast.unparse(node))
        elif isinstance(node, ast.keyword) and node.arg == "allow_pickle":
            found.append("allow_pickle")
    return found


SCREENS = {"RLTrainer.step": ("rl/trainer.py", 20)}
"""Functions that read as a table of contents: file, and lines of the body without the docstring."""


@pytest.mark.parametrize("name", SCREENS)
def test_a_main_loop_reads_on_one_screen(name):
    file, budget = SCREENS[name]
    body = ast.parse((PACKAGE / file).read_text(encoding="utf-8")).body
    for part in name.split("."):
        node = next(node for node in body if isinstance(node, ast.ClassDef | ast.FunctionDef) and node.name == part)
        body = node.body
    assert body[-1].end_lineno - body[1].lineno + 1 <= budget


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_a_source_file_fits_its_budget(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= FILE_LINES


@pytest.mark.parametrize("path", PYTHON, ids=name_of)
def test_functions_fit_their_budget(path):
    assert long_functions(path.read_text(encoding="utf-8")) == []


def test_a_step_of_the_engine_reads_on_one_screen():
    assert lines_of(PACKAGE / "engine" / "engine.py", "Engine.step") <= 15


@pytest.mark.parametrize("path", PYTHON, ids=name_of)
def test_nothing_is_unpickled(path):
    assert unpickling(path.read_text(encoding="utf-8")) == []


def test_no_file_names_the_machine_it_was_written_on():
    found = [
        f"{name_of(path)}:{number}: {line.strip()[:80]}"
        for path in tracked()
        for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), start=1)
        if MACHINE.search(line)
    ]
    assert found == []


def test_these_tests_notice_what_they_forbid():
    assert long_functions("def f():\n" + "    pass\n" * FUNCTION_LINES) == [("f", FUNCTION_LINES + 1)]
    assert unpickling("import torch\nstate = torch.load(path)\nfrom pickle import loads") == ["pickle", "torch.load"]
    assert unpickling("numpy.load(path, allow_pickle=True)") == ["allow_pickle"]
    assert unpickling("# pickle is never used; weights are read by safetensors.torch.load_file(path)") == []
    assert MACHINE.search("/wor" + "k/main/thinkstack")
    assert not MACHINE.search("a network of workers at home")
