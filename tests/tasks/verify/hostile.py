"""Programs that try to leave the sandbox, and a script that runs them all and prints what happened as JSON.

Run as: hostile.py FOLDER, where FOLDER has a file `secret` that all may read. With the modules of the sandbox alone it
needs no package, so another user can run it with another Python.
"""

import ctypes
import json
import os
import resource
import socket
import subprocess
import sys
import time
from dataclasses import replace

from thinkstack.tasks.verify.sandbox import SandboxLimits, choose_rung, run_script
from thinkstack.tasks.verify.supervisor import PR_SET_CHILD_SUBREAPER, descendants

LIMITS = SandboxLimits(wall_seconds=20.0, cpu_seconds=15.0, memory_bytes=512 << 20, output_bytes=1 << 20)
PROGRAMS = {
    "fork_bomb": """
import os
while True:
    try:
        os.fork()
    except OSError:
        pass
""",
    "reads_files": """
import os
for path in ({folder!r} + "/secret", "/etc/shadow", "/etc/passwd", "/proc/{outside}/environ", {module!r}):
    try:
        open(path).read()
        print("ESCAPED reads", path)
    except OSError:
        pass
""",
    "writes_files": """
for path in ({folder!r} + "/written", "/tmp/written_by_hostile", "/var/tmp/written_by_hostile", "/dev/shm/written"):
    try:
        open(path, "w").write("x")
        print("wrote", path)
    except OSError:
        pass
""",
    "tcp": """
import socket
try:
    socket.create_connection(("127.0.0.1", {port}), 2)
    print("ESCAPED by TCP")
except OSError:
    pass
""",
    "udp": """
import socket
try:
    socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b"ESCAPED", ("127.0.0.1", {port}))
except OSError:
    pass
""",
    "endless_output": """
import sys
for _ in range(1024):
    sys.stdout.buffer.write(b"x" * (1 << 20))
print("ESCAPED with 1 GB")
""",
    "large_children": """
import os, time
children = []
for _ in range(10):
    child = os.fork()
    if child == 0:
        data = bytearray(os.urandom(1 << 20) * 200)
        time.sleep(15)
        os._exit(0)
    children.append(child)
print("ESCAPED with", [os.waitpid(child, 0)[1] for child in children].count(0), "children")
""",
    "sleeping_grandchildren": """
import os, time
for _ in range(3):
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            try:
                os.execv("/usr/bin/sleep", ["sleep", "1000"])
            except OSError:
                time.sleep(1000)
        os._exit(0)
print("ended")
""",
    "kills": """
import os, signal
for pid in ({outside}, os.getppid(), -1):
    try:
        os.kill(pid, signal.SIGKILL)
        print("killed", pid, flush=True)
    except OSError:
        pass
""",
    "ptrace": """
import ctypes, os
libc = ctypes.CDLL(None, use_errno=True)
for pid in ({outside}, os.getppid()):
    if pid == 1:
        continue  # the first process of a namespace of its own is in the sandbox
    if libc.ptrace(16, pid, 0, 0) == 0:
        print("ESCAPED by ptrace", pid)
    try:
        open("/proc/%d/mem" % pid, "rb").close()
        print("ESCAPED by memory of", pid)
    except OSError:
        pass
""",
    "spins": "while True: pass",
    "spins_in_children": """
import os
for _ in range(3):
    os.fork()
while True: pass
""",
    "sleeps": "import time; time.sleep(1000)",
    "closes_output": "import os, time; os.close(1); time.sleep(1000)",
}
ENDS = {
    "fork_bomb": ("processes", "cpu", "deadline", "memory"),
    "endless_output": ("output",),
    "large_children": ("memory",),
    "spins": ("cpu", "deadline"),
    "spins_in_children": ("cpu",),
    "sleeps": ("deadline",),
    "closes_output": ("deadline",),
}
"""The limits that may end each program; the others end by themselves or kill themselves."""
SHORT = {"sleeps": 1.0, "closes_output": 1.0, "fork_bomb": 2.0}
"""Wall time of programs that last as long as they may."""


def peak_bytes() -> int:
    """Peak memory of this process; that of getrusage counts the process that started this one too."""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmHWM"))


def left_over(known: set[int]) -> list[int]:
    """Processes below this one, which inherits orphans, without the known ones."""
    return [pid for pid in descendants(os.getpid()) if pid not in known]


def main() -> None:
    folder, rung = sys.argv[1], choose_rung()
    tcp, udp = socket.socket(), socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    tcp.bind(("127.0.0.1", 0))
    tcp.listen()
    port = tcp.getsockname()[1]
    udp.bind(("127.0.0.1", port))
    udp.setblocking(False)
    outside = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1000)"])
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    module = sys.modules["thinkstack.tasks.verify.sandbox"].__file__
    results, places = {}, {"folder": folder, "module": module, "port": port, "outside": outside.pid}
    for name, program in PROGRAMS.items():
        start = time.monotonic()
        limits = replace(LIMITS, wall_seconds=SHORT.get(name, LIMITS.wall_seconds))
        limits = replace(limits, cpu_seconds=1.0) if name.startswith("spins") else limits
        found = run_script(program.format(**places), b"", rung, limits)
        results[name] = {
            "output": found.output[:300].decode(errors="replace"),
            "reason": found.reason,
            "exit_code": found.exit_code,
            "peak_bytes": found.peak_bytes,
            "seconds": round(time.monotonic() - start, 2),
            "left_over": left_over({outside.pid}),
        }
    try:
        received = udp.recv(100).decode()
    except BlockingIOError:
        received = ""
    report = {
        "rung": rung,
        "uid": os.geteuid(),
        "results": results,
        "received": received,
        "outside_lives": outside.poll() is None,
        "our_bytes": peak_bytes(),
        "their_bytes": resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024,
    }
    outside.kill()
    outside.wait()
    print(json.dumps(report))


if __name__ == "__main__":
    main()
