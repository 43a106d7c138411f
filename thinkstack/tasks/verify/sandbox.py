"""Runs a program that a model wrote, contained: sandbox `bwrap`, else `sandlock`, else only if unsafe code is allowed.

On every rung the same supervisor (supervisor.py) bounds memory and processes of the whole tree, CPU and wall time, and
kills the tree at the end; this process reads a bounded number of bytes from the program's pipe and buffers no more.
Where we are root, the program runs as a user of its own.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import select
import subprocess
import sys
import time
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from thinkstack.tasks.verify.rungs import ENVIRONMENT, Rung, launch, missing_reason
from thinkstack.types import ConfigError

log = logging.getLogger(__name__)
FOLDER = Path(__file__).parent
START_SECONDS = 30.0
"""Longest time that a sandbox takes to start; generous, for machines are slow at times."""
END_SECONDS = 30.0
"""A supervisor that has not ended its tree after this time is killed itself."""
READ_BYTES = 1 << 16
ADDRESS_SPACE_BYTES = 1 << 30
"""Address space of each process beyond the memory of the tree: libraries reserve more than they use."""
CONTAINED: tuple[Rung, ...] = ("bwrap", "sandlock")
"""The rungs that contain, in order."""
PROBE = """
import os, socket
held = 6 * int(input())
try:
    open({outside!r}).close()
    held = "it reads files of the machine"
except OSError:
    pass
try:
    socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b"x", ("127.0.0.1", 9))
    if os.listdir("/sys/class/net") != ["lo"]:
        held = "it reaches the network"
except OSError:
    pass
print(held)
"""
"""Script that prints 42 in a sandbox, and what it could do outside one."""
WAY_OUT = (
    "install one: `apt install bubblewrap`, or `pip install sandlock` where user namespaces are off; or pass "
    "--unsafe-code on a machine that you can lose"
)


@dataclass(frozen=True, kw_only=True)
class SandboxLimits:
    """What a program and all its child processes may use together."""

    wall_seconds: float = 60.0
    """Wall time of the program; the start of its process is not counted."""
    cpu_seconds: float = 60.0
    """CPU time of the tree."""
    memory_bytes: int = 1 << 30
    """Resident memory of the tree, measured every 10 ms; address space of each process: this and 1 GiB."""
    max_processes: int = 16
    """Processes of the tree, the program itself included."""
    output_bytes: int = 16 << 20
    """Bytes of one reply, or of all that a script writes."""
    file_bytes: int = 16 << 20
    """Size of a file that the program writes; only bubblewrap gives it a place to write."""


PROBE_LIMITS = SandboxLimits(wall_seconds=20.0, cpu_seconds=10.0, output_bytes=1 << 12)


class SandboxError(Exception):
    """The program ended, or was ended; `reason` names the cause: memory, processes, cpu, deadline, output, ended."""

    def __init__(self, reason: str):
        super().__init__(reason)
        self.reason = reason


class SandboxedProcess:
    """A running program with pipes; `close` leaves no process of it, and nothing else does."""

    def __init__(self, rung: Rung, limits: SandboxLimits, script_bytes: int = 0):
        """script_bytes: size of a script that is sent first; 0: the program of candidate.py that answers calls."""
        self.rung, self.limits = rung, limits
        self.report: dict[str, Any] = {}
        """The supervisor's last word: reason ("" if the program ended by itself), exit_code, peak_bytes."""
        self._buffer, self._num_read = bytearray(), 0
        their_input, self._input = os.pipe()
        self._output, their_output = os.pipe()
        their_control, self._control = os.pipe()
        self._status, their_status = os.pipe()
        os.set_blocking(self._input, False)
        theirs = (their_input, their_output, their_control, their_status)
        try:
            cfg = _settings(rung, limits, script_bytes) | {"control": their_control, "status": their_status}
            self._supervisor = subprocess.Popen(
                [sys.executable, "-I", "-S", str(FOLDER / "supervisor.py"), json.dumps(cfg)],
                stdin=their_input,
                stdout=their_output,
                stderr=subprocess.DEVNULL,
                pass_fds=(their_control, their_status),
                start_new_session=True,
                cwd="/",
            )
        finally:
            for descriptor in theirs:
                os.close(descriptor)

    def __enter__(self) -> SandboxedProcess:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def exchange(self, data: bytes, end: float, until: bytes | None) -> bytes:
        """Write `data` and read up to the byte string `until`, or to the end of the output with None.

        end: monotonic second after which SandboxError("deadline") is raised. It is raised too where the program ends
        before `until` and where it writes more than limits.output_bytes. With until=None the input is closed after
        `data`.
        """
        view, place = memoryview(data), 0
        self._num_read = len(self._buffer)
        while True:
            if until is not None and (found := self._buffer.find(until)) >= 0:
                line = bytes(self._buffer[:found])
                del self._buffer[: found + len(until)]
                return line
            if until is None and place == len(view):
                self._close_input()
            writable = [self._input] if place < len(view) and self._input >= 0 else []
            ready, can_write, _ = select.select([self._output], writable, [], max(end - time.monotonic(), 0))
            if not ready and not can_write:
                raise SandboxError("deadline")
            if can_write:
                try:
                    place += os.write(self._input, view[place : place + READ_BYTES])
                except BrokenPipeError:  # it ended, or reads no more
                    place = len(view)
            if ready and not self._read():
                if until is None:
                    return bytes(self._buffer)
                raise SandboxError("ended")

    def _read(self) -> int:
        """Read what has arrived; return the number of bytes, 0 at the end of the output."""
        part = os.read(self._output, READ_BYTES)
        self._num_read += len(part)
        if self._num_read > self.limits.output_bytes:
            raise SandboxError("output")
        self._buffer += part
        return len(part)

    def _close_input(self) -> None:
        if self._input >= 0:
            os.close(self._input)
            self._input = -1

    def close(self) -> None:
        """Kill what still runs and set `report`."""
        if self._control < 0:
            return
        os.close(self._control)
        self._control = -1
        if not select.select([self._status], [], [], END_SECONDS)[0]:
            log.error("a supervisor did not end its processes within %g s and is killed", END_SECONDS)
            self._supervisor.kill()
        self._supervisor.wait()
        with contextlib.suppress(ValueError):
            self.report = json.loads(os.read(self._status, READ_BYTES))
        self._close_input()
        for descriptor in (self._output, self._status):
            os.close(descriptor)

    def wait(self, end: float) -> None:
        """Wait for the end of the program, at most until `end`, then close."""
        select.select([self._status], [], [], max(end - time.monotonic(), 0))
        self.close()


def _settings(rung: Rung, limits: SandboxLimits, script_bytes: int) -> dict[str, Any]:
    """Return the supervisor's settings."""
    return {
        **vars(launch(rung, script_bytes, limits.max_processes)),
        **vars(limits),
        "wall_seconds": limits.wall_seconds + START_SECONDS,
        "env": ENVIRONMENT,
        "address_space_bytes": ADDRESS_SPACE_BYTES,
    }


@dataclass(frozen=True, kw_only=True)
class ScriptResult:
    """What a script did with one input."""

    output: bytes
    """All that it wrote to standard output, at most limits.output_bytes."""
    exit_code: int | None
    """0 if it ended by itself without an exception; None if it was killed."""
    reason: str
    """"" if it ended by itself; otherwise the exceeded limit, as in SandboxError."""
    peak_bytes: int
    """Largest measured resident memory of the tree."""


def run_script(code: str, standard_input: bytes, rung: Rung, limits: SandboxLimits) -> ScriptResult:
    """Run a script with an input in a sandbox of its own and return what it wrote."""
    program, output, reason = code.encode("utf-8", "surrogatepass"), b"", ""
    with SandboxedProcess(rung, limits, script_bytes=len(program)) as process:
        try:
            process.exchange(b"", time.monotonic() + START_SECONDS, until=b"\n")  # it has started
            end = time.monotonic() + limits.wall_seconds
            output = process.exchange(program + standard_input, end, until=None)
            process.wait(end)
        except SandboxError as error:
            reason = error.reason
    report = process.report
    found = report.get("reason", "lost")
    if found == "closed":  # by us, after an error of ours or at the end of the time
        found = reason or "deadline"
    reason = found or reason
    return ScriptResult(
        output=output,
        exit_code=None if reason else report.get("exit_code"),
        reason=reason,
        peak_bytes=report.get("peak_bytes", 0),
    )


def choose_rung(unsafe_code: bool = False) -> Rung:
    """Return the first rung of the ladder that holds here.

    unsafe_code: run without containment where there is none. Raises ConfigError if there is none and it is not allowed.
    """
    found = {rung: probe(rung) for rung in CONTAINED}
    for rung, reason in found.items():
        if reason is None:
            return rung
    if unsafe_code and (reason := missing_reason("unsafe")) is None:
        return "unsafe"
    reasons = "; ".join(f"{rung}: {reason}" for rung, reason in found.items())
    raise ConfigError(f"there is no sandbox for code that a model wrote ({reasons}); {WAY_OUT}")


@cache
def probe(rung: Rung) -> str | None:
    """Return why a rung does not hold on this machine, found by running a script in it; None if it holds."""
    reason = missing_reason(rung)
    if reason is not None:
        return reason
    outside = str(FOLDER / "sandbox.py")
    found = run_script(PROBE.format(outside=outside), b"7\n", rung, PROBE_LIMITS)
    if found.reason or found.exit_code:
        return f"it does not start ({found.reason or f'exit code {found.exit_code}'})"
    return None if found.output == b"42\n" else f"it does not contain: {found.output[:200].decode(errors='replace')}"
