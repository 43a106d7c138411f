"""The process beside each sandbox: it starts the command, measures its tree of processes, and ends all of it.

Run as a script with the standard library alone. Its standard input and output are those of the command. The first
argument is JSON: `command`, `env`, `uid` (0: keep ours), the limits of sandbox.py, and two file descriptors. When the
other end of `control` closes, the tree is killed; the last act is one JSON line to `status`. A subreaper inherits the
orphans of its tree, so a child that leaves its parent, group or session stays below this process.
"""

from __future__ import annotations

import ctypes
import json
import os
import resource
import select
import signal
import subprocess
import sys
import time
from typing import Any

PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_CHILD_SUBREAPER = 1, 4, 36
POLL_SECONDS = 0.01
"""Pause between two measurements of the tree; the kernel's limits per process hold in between."""
PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")
TICKS_PER_SECOND = os.sysconf("SC_CLK_TCK")
MAX_STARTS_OF_KILL = 10_000


def descendants(pid: int) -> list[int]:
    """Return the processes below `pid`, by the kernel's list of children or, without it, by all parents in /proc."""
    found, waiting = list[int](), [pid]
    table = None if os.path.exists(f"/proc/{pid}/task/{pid}/children") else _children_by_parent()
    while waiting:
        parent = waiting.pop()
        children = _children(parent) if table is None else table.get(parent, [])
        found += children
        waiting += children
    return found


def _children(pid: int) -> list[int]:
    found = []
    try:
        for thread in os.listdir(f"/proc/{pid}/task"):
            with open(f"/proc/{pid}/task/{thread}/children") as file:
                found += [int(child) for child in file.read().split()]
    except OSError:  # the process has ended
        pass
    return found


def _children_by_parent() -> dict[int, list[int]]:
    table: dict[int, list[int]] = {}
    for name in filter(str.isdigit, os.listdir("/proc")):
        fields = _stat(int(name))
        if fields:
            table.setdefault(int(fields[1]), []).append(int(name))
    return table


def _stat(pid: int) -> list[str]:
    """Return the fields of /proc/PID/stat from the state on; [] for a process that has ended."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()
    except OSError:
        return []


def measure(pids: list[int]) -> tuple[int, int, float]:
    """Return (live processes, their resident bytes, CPU seconds with those of ended children)."""
    count, pages, ticks = 0, 0, 0
    for pid in pids:
        fields = _stat(pid)
        if fields:
            count += fields[0] not in "ZX"
            pages += int(fields[21])
            ticks += sum(int(fields[place]) for place in (11, 12, 13, 14))
    return count, pages * PAGE_BYTES, ticks / TICKS_PER_SECOND


def limit_process(cfg: dict[str, Any]) -> None:
    """Set the kernel's limits of each process; called in the child before the command starts."""
    size = cfg["memory_bytes"] + cfg["address_space_bytes"]
    for kind, value in (
        (resource.RLIMIT_AS, size),
        (resource.RLIMIT_CPU, int(cfg["cpu_seconds"]) + 1),
        (resource.RLIMIT_FSIZE, cfg["file_bytes"]),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_NOFILE, 256),
    ):
        hard = resource.getrlimit(kind)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(kind, (value, value))


def start(cfg: dict[str, Any], libc: ctypes.CDLL) -> subprocess.Popen[bytes]:
    """Start the command in a session of its own; no descriptor but the standard ones is passed on."""

    def prepare() -> None:
        limit_process(cfg)
        libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)  # should this process be killed first

    user = {"user": cfg["uid"], "group": cfg["uid"], "extra_groups": []} if cfg["uid"] else {}
    child = subprocess.Popen(
        cfg["command"],
        stderr=subprocess.DEVNULL,
        cwd="/",
        env=cfg["env"],
        start_new_session=True,
        preexec_fn=prepare,
        **user,
    )
    empty = os.open(os.devnull, os.O_RDWR)
    os.dup2(empty, 0)  # so that the pipes close when the tree ends
    os.dup2(empty, 1)
    return child


def supervise(child: subprocess.Popen[bytes], cfg: dict[str, Any]) -> tuple[str, int]:
    """Wait until the command ends, exceeds a limit or is no longer wanted; return (reason, peak bytes)."""
    end, peak = time.monotonic() + cfg["wall_seconds"], 0
    while True:
        if select.select([cfg["control"]], [], [], POLL_SECONDS)[0]:
            return "closed", peak
        tree = descendants(os.getpid())
        count, resident_bytes, cpu_seconds = measure(tree)
        peak = max(peak, resident_bytes)
        reap(child)
        if child.returncode is not None:
            return "", peak
        for name, is_over in (
            ("memory", resident_bytes > cfg["memory_bytes"]),
            ("processes", count > cfg["max_processes"] + cfg["num_own_processes"]),
            ("cpu", cpu_seconds > cfg["cpu_seconds"]),
            ("deadline", time.monotonic() > end),
        ):
            if is_over:
                return name, peak


def reap(child: subprocess.Popen[bytes]) -> None:
    """Collect ended children: the command's and inherited orphans."""
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return
        if pid == 0:
            return
        if pid == child.pid:
            child.returncode = os.waitstatus_to_exitcode(status)


def kill_tree(child: subprocess.Popen[bytes], uid: int) -> None:
    """Kill all processes below this one, again until none is left.

    uid: of the tree, if it has one of its own; one call then reaches all its processes, faster than they can fork.
    """
    for _ in range(MAX_STARTS_OF_KILL):
        if uid and (killer := os.fork()) == 0:
            try:
                os.setresuid(uid, uid, uid)
                os.kill(-1, signal.SIGKILL)
            finally:
                os._exit(0)
        elif uid:
            os.waitpid(killer, 0)
        tree = descendants(os.getpid())
        for signal_number in (signal.SIGSTOP, signal.SIGKILL):
            for pid in tree:
                try:
                    os.kill(pid, signal_number)
                except OSError:  # it has ended, or is a program of another user
                    continue
        reap(child)
        if not descendants(os.getpid()):
            return
        time.sleep(0.001)


def main() -> None:
    cfg = json.loads(sys.argv[1])
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(PR_SET_DUMPABLE, 0, 0, 0, 0)  # no other process of our user may trace this one
    libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    for signal_number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(signal_number, signal.SIG_IGN)  # the end of the control pipe ends this process
    try:
        child = start(cfg, libc)
    except OSError as error:
        report: dict[str, Any] = {"reason": "start", "message": str(error)}
    else:
        reason, peak = supervise(child, cfg)
        kill_tree(child, cfg["tree_uid"])
        report = {"reason": reason, "exit_code": child.returncode, "peak_bytes": peak}
    os.write(cfg["status"], json.dumps(report).encode() + b"\n")


if __name__ == "__main__":
    main()
