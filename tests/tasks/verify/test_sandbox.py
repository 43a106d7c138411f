"""The sandbox holds against programs that try to leave it, for each user and rung, and leaves nothing behind."""

import json
import os
import select
import shutil
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests import HANG_SECONDS
from tests.tasks.verify import hostile
from thinkstack.tasks.verify import rungs, sandbox
from thinkstack.tasks.verify.sandbox import SandboxLimits, choose_rung, probe, run_script
from thinkstack.types import ConfigError

ROOT = Path(__file__).parents[3]
MODULES = ("types", *(f"tasks/verify/{name}" for name in ("values", "candidate", "supervisor", "rungs", "sandbox")))
OUR_BYTES = 300 << 20
SYSTEM_PYTHON = "/usr/bin/python3"
LIMITS = SandboxLimits(wall_seconds=HANG_SECONDS)


def needs(rung):
    reason = probe(rung)
    return pytest.mark.skipif(reason is not None, reason=f"{rung}: {reason}")


@pytest.fixture(params=[pytest.param(rung, marks=needs(rung)) for rung in sandbox.CONTAINED])
def rung(request):
    return request.param


def without_bwrap(folder):
    """A PATH on which bubblewrap is there and fails, as where user namespaces are off."""
    program = folder / "bwrap"
    program.write_text("#!/bin/sh\nexit 1\n")
    program.chmod(0o755)
    return f"{folder}:{os.environ['PATH']}"


def public_copy(folder):
    """Copy the modules of the sandbox and sandlock to where any user reads them; return the path for imports."""
    package = folder / "copy" / "thinkstack"
    for name in ("__init__", *MODULES):
        (package / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / "thinkstack" / f"{name}.py", package / f"{name}.py")
    found = find_spec("sandlock")
    if found is not None and found.origin is not None:
        shutil.copytree(Path(found.origin).parent, folder / "copy" / "sandlock")
    subprocess.run(["chmod", "-R", "a+rX", str(folder / "copy")], check=True)
    return str(folder / "copy")


@pytest.fixture
def public_folder():
    with tempfile.TemporaryDirectory() as name:
        os.chmod(name, 0o755)
        data = Path(name) / "data"
        data.mkdir(mode=0o777)
        data.chmod(0o777)
        (data / "secret").write_text("secret")
        yield Path(name)


def run_hostile(folder, path, user=None):
    """Run all hostile programs in a process of its own, as another user if one is given."""
    python, imports = (sys.executable, str(ROOT)) if user is None else (SYSTEM_PYTHON, public_copy(folder))
    done = subprocess.run(
        [python, str(shutil.copy(hostile.__file__, folder)), str(folder / "data")],
        env={"PATH": path, "PYTHONPATH": imports},
        user=user,
        cwd="/",
        capture_output=True,
        text=True,
        timeout=HANG_SECONDS,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


CASES = [(rung, user) for rung in ("bwrap", "sandlock") for user in (None, "nobody")]


@pytest.mark.parametrize(("rung", "user"), CASES)
def test_nothing_gets_out_and_nothing_stays(rung, user, public_folder):
    if probe(rung) is not None:
        pytest.skip(f"{rung}: {probe(rung)}")
    if user and (os.geteuid() != 0 or not os.access(SYSTEM_PYTHON, os.X_OK)):
        pytest.skip(f"becoming {user} needs root and {SYSTEM_PYTHON}")
    path = os.environ["PATH"] if rung == "bwrap" else without_bwrap(public_folder)
    report = run_hostile(public_folder, path, user)
    results = report["results"]
    assert report["rung"] == rung and bool(report["uid"]) == bool(user or os.geteuid())
    assert set(results) == set(hostile.PROGRAMS)
    assert {name: found["output"] for name, found in results.items() if "ESCAPED" in found["output"]} == {}
    assert {name: found["left_over"] for name, found in results.items() if found["left_over"]} == {}
    assert report["received"] == "" and report["outside_lives"]
    written = [
        public_folder / "data" / "written",
        *(Path(f"/{name}/written_by_hostile") for name in ("tmp", "var/tmp")),
    ]
    assert not any(path.exists() for path in (*written, Path("/dev/shm/written")))
    for name, reasons in hostile.ENDS.items():
        assert results[name]["reason"] in reasons, (name, results[name])
    assert results["sleeping_grandchildren"]["output"] == "ended\n"
    assert max(report["our_bytes"], report["their_bytes"]) < OUR_BYTES
    print(rung, user, {name: report[name] >> 20 for name in ("our_bytes", "their_bytes")}, "MiB")


def test_a_script_reads_its_input_and_its_output_is_returned(rung):
    found = run_script("import sys\nprint(input(), len(sys.stdin.read()))", b"first\n" + b"x" * 300_000, rung, LIMITS)
    assert (found.output, found.exit_code, found.reason) == (b"first 300000\n", 0, "")
    assert found.peak_bytes > 0


def test_a_script_that_fails_has_its_exit_code(rung):
    assert run_script("raise SystemExit(3)", b"", rung, LIMITS).exit_code == 3
    assert run_script("1 / 0", b"", rung, LIMITS).exit_code == 1
    assert run_script("import os\nos.abort()", b"", rung, LIMITS).exit_code != 0


def test_a_script_that_does_not_read_its_input_ends(rung):
    assert run_script("print(1)", b"x" * (4 << 20), rung, LIMITS).output == b"1\n"


def test_another_user_runs_the_code_where_we_are_root(rung):
    found = int(run_script("import os\nprint(os.getuid())", b"", rung, LIMITS).output)
    assert found != 0
    assert os.geteuid() != 0 or found != os.geteuid()


def test_the_environment_and_the_arguments_hold_nothing_of_ours(rung, monkeypatch):
    monkeypatch.setenv("SECRET_OF_THE_TEST", "1")
    output = run_script("import os, sys\nprint(sorted(os.environ), sys.argv)", b"", rung, LIMITS).output.decode()
    assert "SECRET_OF_THE_TEST" not in output and "solution.py" in output


WAITS = """
import sys
import time
from thinkstack.tasks.verify.sandbox import SandboxedProcess, SandboxLimits
process = SandboxedProcess(sys.argv[1], SandboxLimits(), script_bytes=1)
process.exchange(b"", time.monotonic() + 1000, until=b"\\n")
print(process._supervisor.pid, flush=True)
sys.stdin.read()
"""
"""A judge that starts a program and waits."""


def test_the_program_ends_when_the_judge_is_killed(rung):
    """The VerifierPool kills a judge that takes too long; a supervisor ends only after all its processes."""
    command = [sys.executable, "-c", WAITS, rung]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment) as judge:
        supervisor = os.pidfd_open(int(judge.stdout.readline()))
        judge.kill()
        assert select.select([supervisor], [], [], HANG_SECONDS)[0]
        os.close(supervisor)


@pytest.fixture
def no_sandbox(monkeypatch, tmp_path):
    """A machine without bubblewrap and sandlock."""
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(rungs.importlib.util, "find_spec", lambda name: None)
    probe.cache_clear()
    yield
    probe.cache_clear()


def test_code_is_refused_without_a_sandbox_and_the_message_says_what_to_do(no_sandbox):
    with pytest.raises(ConfigError, match=r"bubblewrap is not installed; sandlock: sandlock is not installed") as error:
        choose_rung()
    for words in ("apt install bubblewrap", "pip install sandlock", "--unsafe-code"):
        assert words in str(error.value)


def test_unsafe_code_is_the_last_rung_and_is_supervised_too(no_sandbox):
    if (reason := rungs.missing_reason("unsafe")) is not None:
        pytest.skip(reason)
    assert choose_rung(unsafe_code=True) == "unsafe"
    limits = SandboxLimits(wall_seconds=HANG_SECONDS, memory_bytes=200 << 20, output_bytes=1 << 20)
    assert run_script("print(6 * 7)", b"", "unsafe", limits).output == b"42\n"
    assert run_script("while True: print('x' * 9999)", b"", "unsafe", limits).reason == "output"
    assert run_script("x = b'x' * (400 << 20)\nwhile True: pass", b"", "unsafe", limits).reason == "memory"


@needs("bwrap")
def test_an_interpreter_below_tmp_starts():
    """Regression: an empty /tmp hid it, so a checkout there had no sandbox, and its tests were skipped."""
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
        program = "from thinkstack.tasks.verify.sandbox import probe; print(probe('bwrap'))"
        command = [f"{folder}/bin/python", "-c", program]
        done = subprocess.run(command, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert done.stdout == "None\n", done.stderr


def test_unsafe_code_changes_nothing_where_a_sandbox_holds():
    if probe("bwrap") is not None:
        pytest.skip(f"bwrap: {probe('bwrap')}")
    assert choose_rung(unsafe_code=True) == choose_rung() == "bwrap"
