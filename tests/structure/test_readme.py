"""What the README says is so: its code map, its commands, its files."""

import os
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests import HANG_SECONDS

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "thinkstack"
README = (ROOT / "README.md").read_text(encoding="utf-8")
MAIN = "import sys; sys.argv[0] = 'thinkstack'; from thinkstack.cli import main; sys.exit(main())"
HEAVY = {"torch", "numpy", "matplotlib", "pydantic", "tokenizers", "safetensors", "jinja2", "httpx2", "huggingface_hub"}
HELP_SECONDS = 0.5


def blocks(text, mark):
    """Contents of the code blocks that follow the comment `mark`."""
    return re.findall(rf"<!-- {re.escape(mark)} -->\s*```\w*\n(.*?)```", text, re.DOTALL)


def code_map():
    """Paths under thinkstack/ that the code map lists, as written: folders end in a slash."""
    (block,) = blocks(README, "code map")
    return re.findall(r"^ *([a-z_]+(?:\.py|/))", block, re.MULTILINE)


def smoke_commands():
    """Command lines of the README that are run here, without comments."""
    lines = "".join(blocks(README, "command: smoke")).splitlines()
    return [line.split(" #")[0].strip() for line in lines if line.split("#")[0].strip()]


def on_one_core():
    """Threads that wait for each other by spinning take minutes instead of seconds where cores are shared."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})


def thinkstack(arguments, folder, stdin="", program=MAIN):
    return subprocess.run(
        [sys.executable, "-c", program, *arguments],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        input=stdin,
        capture_output=True,
        text=True,
        timeout=HANG_SECONDS,
        preexec_fn=on_one_core,
    )


def in_words(command, demo_folder):
    """Arguments of one command line of the README, at smoke scale and with its run in `demo_folder`."""
    words = shlex.split(command.replace("runs/demo", str(demo_folder)))
    if words[:2] == ["make", "demo"]:
        return ["demo", "--scale", "smoke", "--out", str(demo_folder)]
    assert Path(words[0]).name == "thinkstack", f"the README shows a command this test cannot run: {command}"
    return words[1:]


@pytest.fixture(scope="module")
def demo_folder(tmp_path_factory):
    """A finished demo at smoke scale."""
    folder = tmp_path_factory.mktemp("runs") / "demo"
    done = thinkstack(["demo", "--scale", "smoke", "--out", str(folder)], folder.parent)
    assert done.returncode == 0, done.stderr[-2000:]
    return folder


def test_every_place_in_the_code_map_exists():
    assert code_map()
    assert [place for place in code_map() if not (PACKAGE / place).exists()] == []


def test_every_module_and_folder_is_in_the_code_map():
    modules = {path.name for path in PACKAGE.glob("*.py") if not path.name.startswith("__")}
    folders = {f"{path.name}/" for path in PACKAGE.iterdir() if path.is_dir() and path.name != "__pycache__"}
    assert sorted((modules | folders) - set(code_map())) == []


def test_the_makefile_runs_the_demo_that_is_tested_here():
    assert "$(BIN)/thinkstack demo --out $(OUT)" in (ROOT / "Makefile").read_text(encoding="utf-8")


@pytest.mark.parametrize("command", smoke_commands())
def test_a_command_of_the_readme_runs(command, demo_folder):
    arguments = in_words(command, demo_folder)
    if arguments[0] == "demo":
        return  # the fixture ran it
    done = thinkstack(arguments, demo_folder.parent, stdin="What is the last digit of 6+4*7, from left to right?\n")
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip()


def test_the_python_of_the_readme_runs(demo_folder):
    (code,) = [block for block in re.findall(r"```python\n(.*?)```", README, re.DOTALL) if "ChatSession(" in block]
    done = thinkstack([], ROOT, program=code.replace("runs/demo", str(demo_folder)))
    assert done.returncode == 0, done.stderr[-2000:]


def test_the_demo_leaves_a_report(demo_folder):
    for name in ("report.md", "report.html", "report.json"):
        assert (demo_folder / "report" / name).stat().st_size > 0


def test_help_imports_nothing_heavy():
    """torch alone takes seconds."""
    listed = "import atexit, sys; atexit.register(lambda: print('imported:', *sys.modules)); "
    done = thinkstack(["--help"], ROOT, program=listed + MAIN)
    assert done.returncode == 0, done.stderr
    text, _, imported = done.stdout.rpartition("imported:")
    assert "usage: thinkstack" in text and "thinkstack.cli" in imported.split()
    assert HEAVY & set(imported.split()) == set()


@pytest.mark.slow
def test_help_answers_in_under_half_a_second():
    seconds = []
    for _ in range(3):
        started = time.perf_counter()
        done = thinkstack(["--help"], ROOT)
        seconds.append(time.perf_counter() - started)
        assert done.returncode == 0, done.stderr
    assert min(seconds) < HELP_SECONDS
