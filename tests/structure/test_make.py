"""make says what is missing before anything is installed, and .ci/run takes its command from the README."""

import shutil
import subprocess
from pathlib import Path

import pytest

from tests import HANG_SECONDS

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")

FAKE = """#!/bin/sh
case "$*" in
  *version_info*) exit {old} ;;
  *ensurepip*) exit {bare} ;;
  --version) echo "Python 3.9.2" ;;
  *) echo "unexpected: $*" >&2; exit 9 ;;
esac
"""


def make(folder, *arguments):
    """`make` in the repository, with `folder` first on the path and an environment that does not exist yet."""
    return subprocess.run(
        ["make", "-C", str(ROOT), f"VENV={folder / 'venv'}", *arguments],
        env={"PATH": f"{folder}:/usr/bin:/bin"},
        capture_output=True,
        text=True,
        timeout=HANG_SECONDS,
    )


def fake_python(folder, old, bare, name="python3"):
    path = folder / name
    path.write_text(FAKE.format(old=int(old), bare=int(bare)))
    path.chmod(0o755)
    return path


@pytest.mark.parametrize("target", ["demo", "test", "check"])
def test_an_old_python_is_named_with_the_way_out(tmp_path, target):
    fake_python(tmp_path, old=True, bare=False)
    done = make(tmp_path, target)
    assert done.returncode != 0
    assert "'python3' is Python 3.9.2; thinkstack needs Python 3.11 or newer: make PYTHON=python3.11" in done.stderr
    assert not (tmp_path / "venv").exists()


def test_a_python_without_venv_is_told_what_to_install(tmp_path):
    fake_python(tmp_path, old=False, bare=True)
    done = make(tmp_path, "demo")
    assert done.returncode != 0
    assert "apt install python3-venv" in done.stderr
    assert not (tmp_path / "venv").exists()


def test_a_missing_python_is_named(tmp_path):
    done = make(tmp_path, "demo", "PYTHON=no-such-python")
    assert done.returncode != 0
    assert "no 'no-such-python' found" in done.stderr


def test_another_python_can_be_named(tmp_path):
    fake_python(tmp_path, old=True, bare=False)
    other = fake_python(tmp_path, old=False, bare=True, name="other")
    assert f"'{other}' cannot make virtual environments" in make(tmp_path, "demo", f"PYTHON={other}").stderr


def test_the_demo_needs_no_test_dependencies(tmp_path):
    planned = make(tmp_path, "--dry-run", "demo").stdout
    assert "-c constraints.txt -e ." in planned
    assert "[test,dev]" not in planned
    assert "[test,dev]" in make(tmp_path, "--dry-run", "test").stdout


def checkout(folder, readme):
    (folder / ".ci").mkdir()
    shutil.copy(ROOT / ".ci" / "run", folder / ".ci" / "run")
    (folder / "README.md").write_text(readme)
    return subprocess.run([str(folder / ".ci" / "run")], cwd="/", capture_output=True, text=True, timeout=HANG_SECONDS)


def test_ci_runs_the_marked_command_of_the_readme_on_the_checkout(tmp_path):
    readme = "```sh\nfalse\n```\n<!-- command: test -->\n\n```sh\necho ran; pwd\n```\n\n```sh\nfalse\n```\n"
    done = checkout(tmp_path, readme)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["+ echo ran; pwd", "ran", str(tmp_path)]


def test_ci_fails_when_the_command_fails_or_is_missing(tmp_path):
    done = checkout(tmp_path, "<!-- command: test -->\n```sh\nfalse\necho went on\n```\n")
    assert done.returncode == 1
    assert "\nwent on" not in done.stdout
    (tmp_path / "bare").mkdir()
    assert "no code block" in checkout(tmp_path / "bare", "# thinkstack\n").stderr


def test_the_readme_has_a_test_command():
    assert "<!-- command: test -->" in (ROOT / "README.md").read_text(encoding="utf-8")
