"""The ladder of containment: the commands that start Python in bubblewrap, in sandlock, or without a sandbox.

bubblewrap gives namespaces: no network, no process and no file but the interpreter's. sandlock needs none: Landlock and
seccomp refuse the same calls. Both hide the rest of the machine, and neither bounds memory, processes and output of a
tree; supervisor.py does, on every rung.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

Rung = Literal["bwrap", "sandlock", "unsafe"]
FOLDER = Path(__file__).parent
SYSTEM_FOLDERS = ("/usr", "/lib", "/lib64", "/bin", "/sbin")
"""Folders of the system that an interpreter loads libraries from."""
OTHER_UID = 65534
"""User of the candidate where a range of its own is not mapped."""
FIRST_UID, NUM_UIDS = 1_500_000_000, 400_000_000
"""Users that no system assigns; each run gets one, so the kernel counts its processes alone."""
TMP_BYTES = 32 << 20
"""Size of the file system in memory on which a candidate in bubblewrap may write."""
ENVIRONMENT = {
    "PATH": "/usr/bin:/bin",
    "HOME": "/tmp",
    "LANG": "C.UTF-8",
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
}
"""Environment of the candidate; nothing of ours passes."""

BOOTSTRAP = """
import sys, types
for name, text in {texts!r}.items():
    module = sys.modules[name] = types.ModuleType(name)
    exec(compile(text, name, "exec"), module.__dict__)
del name, text
module.main()
"""
CONFINE = """
import ctypes, json, os, sys
cfg = json.loads(sys.argv[1])
sys.path.insert(0, cfg["package"])
from sandlock import Sandbox
if cfg["uid"]:
    os.setgroups([])
    os.setresgid(*[cfg["uid"]] * 3)
    os.setresuid(*[cfg["uid"]] * 3)
    ctypes.CDLL(None).prctl(4, 1, 0, 0, 0)  # PR_SET_DUMPABLE: sandlock reads the memory of its child
sandbox = Sandbox(
    fs_readable=cfg["readable"], fs_writable=["/dev/null"], clean_env=True, env=cfg["env"], cwd="/",
    max_processes=cfg["max_processes"], no_coredump=True,
)
sys.exit(sandbox.run_interactive(cfg["command"]) & 255)
"""
"""Program of the process that starts sandlock; it has only the standard library and sandlock."""


@dataclass(frozen=True, kw_only=True)
class Interpreter:
    """A Python and the folders that it needs."""

    path: str
    folders: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Launch:
    """How a rung starts the program of candidate.py."""

    command: Sequence[str]
    uid: int
    """User that the supervisor changes to before the command starts; 0: it stays."""
    tree_uid: int
    """User of the tree alone; 0: others may have processes of the same user."""
    num_own_processes: int
    """Processes of the rung beside the candidate's."""


def new_uid() -> int:
    """Return the user id for one run: of nobody else where we are root, 0 where we cannot change it."""
    if os.geteuid() != 0:
        return 0
    mapped = [[int(part) for part in line.split()] for line in Path("/proc/self/uid_map").read_text().splitlines()]
    uid = FIRST_UID + int.from_bytes(os.urandom(4)) % NUM_UIDS
    return uid if any(first <= uid < first + count for first, _, count in mapped) else OTHER_UID


@cache
def own_interpreter() -> Interpreter:
    """Return the Python that runs this process, with its installed packages."""
    found = (sys.prefix, sys.base_prefix, str(Path(sys.executable).resolve().parents[1]))
    folders = tuple(sorted({folder for folder in found if not _is_of_the_system(folder)}))
    return Interpreter(path=sys.executable, folders=folders)


@cache
def public_interpreter() -> Interpreter | None:
    """Return a Python that another user may run: this one, or the system's; None if there is none."""
    own = own_interpreter()
    if all(map(_is_public, (*own.folders, str(Path(own.path).resolve())))):
        return own
    found = next((path for path in ("/usr/bin/python3", "/usr/local/bin/python3") if os.access(path, os.X_OK)), None)
    return Interpreter(path=found, folders=()) if found else None


def _is_of_the_system(path: str) -> bool:
    return any(Path(path).is_relative_to(folder) for folder in SYSTEM_FOLDERS)


def _is_public(path: str) -> bool:
    """Whether any user can reach a file or folder."""
    return all(part.exists() and part.stat().st_mode & 0o001 for part in (Path(path), *Path(path).parents))


def missing_reason(rung: Rung) -> str | None:
    """Return why a rung cannot be tried at all; None if it can."""
    if rung == "bwrap":
        return None if shutil.which("bwrap") else "bubblewrap is not installed"
    if rung == "sandlock" and importlib.util.find_spec("sandlock") is None:
        return "sandlock is not installed"
    if os.geteuid() == 0 and public_interpreter() is None:
        return f"no other user may run {sys.executable}, and there is no /usr/bin/python3"
    return None


def launch(rung: Rung, script_bytes: int, max_processes: int) -> Launch:
    """Return how to start candidate.py on a rung.

    script_bytes: size of the script at the start of its input; 0: it answers calls. max_processes: of the candidate;
    counted by the kernel where its user is its own, by sandlock on its rung, and by the supervisor on every rung.
    """
    uid = new_uid()
    tree_uid = uid if uid >= FIRST_UID else 0
    by_kernel = rung == "bwrap" or (rung == "unsafe" and tree_uid)
    settings = {
        "uid": uid if rung == "bwrap" else 0,
        "max_processes": max_processes if by_kernel else 0,
        "script_bytes": script_bytes,
    }
    program = ["-I", "-B", "-c", candidate_source(), json.dumps(settings)]
    if rung == "bwrap":
        interpreter = own_interpreter()
        own_user = ("--cap-add", "CAP_SETUID", "--cap-add", "CAP_SETGID") if uid else ("--unshare-user",)
        command = [shutil.which("bwrap") or "bwrap", *own_user, *_namespaces(interpreter), interpreter.path, *program]
        return Launch(command=command, uid=0, tree_uid=tree_uid, num_own_processes=2)
    found = public_interpreter() if uid else own_interpreter()
    assert found is not None, "missing_reason has said so"
    command = [found.path, *program]
    if rung == "unsafe":
        return Launch(command=command, uid=uid, tree_uid=tree_uid, num_own_processes=0)
    command = [sys.executable, "-I", "-S", "-c", CONFINE, _sandlock_settings(found, command, max_processes, uid)]
    return Launch(command=command, uid=0, tree_uid=tree_uid, num_own_processes=1)


@cache
def candidate_source() -> str:
    """Return the program of the sandboxed process: values.py and candidate.py in one text."""
    names = ("values", "candidate")
    texts = {f"thinkstack.tasks.verify.{name}": (FOLDER / f"{name}.py").read_text(encoding="utf-8") for name in names}
    return BOOTSTRAP.format(texts=texts)


def _namespaces(interpreter: Interpreter) -> list[str]:
    """Return bubblewrap's options: namespaces of its own, and the interpreter's files, which nobody can write."""
    options = ["--unshare-pid", "--unshare-net", "--unshare-ipc", "--unshare-uts", "--unshare-cgroup-try"]
    options += ["--die-with-parent", "--new-session"]
    options += ["--size", str(TMP_BYTES), "--perms", "1777", "--tmpfs", "/tmp"]  # the interpreter may be below
    parents = {str(parent) for folder in interpreter.folders for parent in Path(folder).parents} - {"/", "/tmp"}
    for parent in sorted(parents):
        options += ["--perms", "0755", "--dir", parent]
    for folder in SYSTEM_FOLDERS:
        if os.path.islink(folder):
            options += ["--symlink", os.readlink(folder), folder]
        elif os.path.isdir(folder):
            options += ["--ro-bind", folder, folder]
    for folder in interpreter.folders:
        options += ["--ro-bind", folder, folder]
    options += [
        "--ro-bind-try",
        "/etc/ld.so.cache",
        "/etc/ld.so.cache",
        "--proc",
        "/proc",
        "--dev",
        "/dev",
        "--remount-ro",
        "/dev",
    ]
    return [*options, "--chdir", "/tmp"]


def _sandlock_settings(interpreter: Interpreter, command: list[str], max_processes: int, uid: int) -> str:
    spec = importlib.util.find_spec("sandlock")
    assert spec is not None and spec.origin is not None, "missing_reason has said so"
    readable = [*SYSTEM_FOLDERS, "/etc/ld.so.cache", "/dev/null", "/dev/urandom", "/dev/zero", *interpreter.folders]
    return json.dumps(
        {
            "package": str(Path(spec.origin).parents[1]),
            "uid": uid,
            "readable": [path for path in readable if os.path.exists(path)],
            "env": ENVIRONMENT,
            "max_processes": max_processes,
            "command": command,
        }
    )
