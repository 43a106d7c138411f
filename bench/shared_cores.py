"""Our work beside other work: `python bench/shared_cores.py [--works rollout] [--spins ours 0 1000 default]`.

Each work runs in a process of its own per spin count (GOMP_SPINCOUNT: how often a thread of OpenMP looks at a barrier
before it sleeps; "ours": what thinkstack sets; "default": libgomp's own 300,000; "one": one thread): alone,
then beside one and two processes that burn a core each, in turn, every round all of them. Printed per work and spin
count: the least seconds alone, the same over those of the first count, and the share that is left beside the others of
the first count's speed alone, by least and by median times. A repetition during which anything else ran is taken again.
With --quota 0.5 also under a CPU quota of so many cores (as of a container; where control groups can be made): the
speed over the quota's share of the speed alone, which is quota / threads alone.

Works: v3-tiny's shape, fp32. step: a training step of 16 x 256 tokens, all threads in one pass. workers: the same step,
a worker a thread. rollout: 128 sequences of 64 tokens from prompts of 32. user: one sequence, four times. rl: a step of
grpo_step.py.
"""

import argparse
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

WORKS = ("step", "workers", "rollout", "user", "rl")
BURN = "while True: pass"
DISTURBED = 20
"""Times that a disturbed repetition is taken again."""
ROOT = Path(__file__).parents[1]


def make_work(name: str, threads: int) -> Callable[[], Any]:
    """One repetition of a work, some tenths of a second on two cores."""
    import grpo_step
    import rollout
    import torch
    import train_step

    from thinkstack.models.config import named
    from thinkstack.models.transformer import Transformer

    model = Transformer(named("v3-tiny", mtp_layers=0)).initialize(torch.Generator().manual_seed(0))
    if name in ("step", "workers"):
        ids = train_step.random_rows(train_step.SHAPES_MEASURED["v3-tiny"])
        return train_step.our_step(model, ids, "fp32", threads if name == "workers" else 1, compiled=False)
    if name == "rl":
        args = argparse.Namespace(model="v3-tiny", dtype="fp32", threads=threads)
        model, tokenizer, prompts = grpo_step.setting("v3-tiny")
        return grpo_step.our_step(model, tokenizer, [tokenizer.encode(text) for text in prompts], args)
    sequences, repetitions = (128, 1) if name == "rollout" else (1, 4)
    prompts = torch.randint(8, model.cfg.vocab_size, (sequences, rollout.PROMPT_TOKENS))
    run = rollout.our_rollout(model, prompts, 64)
    return lambda: [run() for _ in range(repetitions)]


def work_on_demand(name: str, threads: int) -> None:
    """The child: a line in, one repetition, its seconds out. threads: 0 as prepare_machine decides."""
    import torch

    from thinkstack.machine import prepare_machine

    prepare_machine(threads)
    work = make_work(name, torch.get_num_threads())
    for _ in range(2):
        work()
    print(f"ready {torch.get_num_threads()}", flush=True)
    for _ in sys.stdin:
        start = time.perf_counter()
        work()
        print(time.perf_counter() - start, flush=True)


class Child:
    """A process that repeats a work when asked; between questions it sleeps."""

    def __init__(self, work: str, spin: str, group: Path | None = None):
        """spin: as of --spins. group: a control group that the process enters before it starts."""
        environment = {k: v for k, v in os.environ.items() if k not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
        environment["PYTHONPATH"] = os.pathsep.join((str(ROOT), environment.get("PYTHONPATH", "")))
        code = f"import thinkstack, shared_cores; shared_cores.work_on_demand({work!r}, {int(spin == 'one')})"
        if spin not in ("ours", "one"):
            environment["GOMP_SPINCOUNT"] = "300000" if spin == "default" else spin
        command = [sys.executable, "-c", code]
        if group is not None:
            command = ["sh", "-c", f'echo $$ > "{group}/cgroup.procs" && exec "$0" "$@"', *command]
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(
            command, env=environment, cwd=Path(__file__).parent, stdin=pipe, stdout=pipe, text=True
        )
        words = self._line().split()
        if words[:1] != ["ready"]:
            raise RuntimeError(f"the process of {work} ended; its messages are above")
        self.threads = int(words[1])

    def seconds(self, others: Sequence[int]) -> float:
        """Wall time of one repetition in which no process but this one and `others` (ids) used more than 5% of a core;
        one that was disturbed is taken again, DISTURBED times."""
        assert self.process.stdin is not None
        for _ in range(DISTURBED):
            before = foreign_seconds((self.process.pid, *others))
            self.process.stdin.write("go\n")
            self.process.stdin.flush()
            taken = float(self._line())
            if foreign_seconds((self.process.pid, *others)) - before < 0.02 + 0.05 * taken:
                return taken
            time.sleep(0.5)
        print("no quiet moment; the figures are of a machine with other work", file=sys.stderr)
        return taken

    def _line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline()

    def __enter__(self) -> "Child":
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()


def foreign_seconds(known: Sequence[int]) -> float:
    """CPU time so far of everything but the processes `num_tokens` (ids); 0 where the system does not tell."""
    try:
        user, nice, system, _, _, irq, softirq = map(int, Path("/proc/stat").read_text().split()[1:8])
        fields = [Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split() for process in known]
    except OSError:
        return 0.0
    own = sum(int(each[11]) + int(each[12]) for each in fields)  # utime, stime; man 5 proc
    return (user + nice + system + irq + softirq - own) / os.sysconf("SC_CLK_TCK")


@contextmanager
def busy(processes: int) -> Iterator[list[int]]:
    """Processes that burn a core each; their ids."""
    burning = [subprocess.Popen([sys.executable, "-c", BURN]) for _ in range(processes)]
    try:
        if burning:
            time.sleep(0.1)  # they start
        yield [process.pid for process in burning]
    finally:
        for process in burning:
            process.kill()
            process.wait()


@contextmanager
def quota_group(cores: float) -> Iterator[Path | None]:
    """A control group with a CPU quota of so many cores; None where none can be made."""
    period = 100_000
    for parent, name, text in (
        ("/sys/fs/cgroup/cpu", "cpu.cfs_quota_us", f"{int(cores * period)}"),
        ("/sys/fs/cgroup", "cpu.max", f"{int(cores * period)} {period}"),
    ):
        group = Path(parent) / f"thinkstack-{os.getpid()}"
        try:
            group.mkdir()
        except OSError:
            continue
        try:
            (group / name).write_text(text)
        except OSError:
            group.rmdir()
            continue
        try:
            yield group
        finally:
            group.rmdir()
        return
    yield None


def measure(work: str, args: argparse.Namespace) -> None:
    """Print the rows of one work."""
    times: dict[tuple[str, int], list[float]] = {}
    with ExitStack() as stack:
        group = stack.enter_context(quota_group(args.quota)) if args.quota else None
        if args.quota and group is None:
            print("no quota: control groups cannot be made here")
        children = {spin: stack.enter_context(Child(work, spin)) for spin in args.spins}
        limited = {"quota": stack.enter_context(Child(work, "ours", group))} if group else {}
        for _ in range(args.rounds):
            for processes in args.busy:
                with busy(processes) as others:
                    for name, child in (children if processes else children | limited).items():
                        taken = [child.seconds(others) for _ in range(args.repeats)]
                        times.setdefault((name, processes), []).extend(taken)
    print_work(work, times, args)
    for name, child in limited.items():
        own = min(min(times[spin, 0]) for spin in args.spins)
        share = own / statistics.median(times[name, 0]) / (args.quota / max(c.threads for c in children.values()))
        print(f"{work}: {share:.2f} of the share of a quota of {args.quota} cores, {child.threads} threads")


def print_work(work: str, times: dict[tuple[str, int], list[float]], args: argparse.Namespace) -> None:
    """A row per spin count; shares are of the speed that the first has alone."""
    from common import print_table

    rows = []
    first = times[args.spins[0], 0]
    for spin in args.spins:
        unloaded = times[spin, 0]
        cells = [f"{min(unloaded):.3f}", f"{min(unloaded) / min(first):.2f}"]
        for beside in (times[spin, processes] for processes in args.busy if processes):
            cells += [f"{min(first) / min(beside):.2f}", f"{min(first) / statistics.median(beside):.2f}"]
        rows.append((f"{work}, {spin}", *cells, str(len(unloaded))))
    heads = ["", "alone [s]", "of first"]
    for processes in filter(None, args.busy):
        heads += [f"beside {processes}", "median"]
    print_table("speed beside busy processes, of the first row's speed alone", (*heads, "n"), rows)
    sys.stdout.flush()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--works", nargs="+", choices=WORKS, default=list(WORKS))
    parser.add_argument("--spins", nargs="+", default=["default", "ours", "one"], help="counts, or names")
    parser.add_argument("--busy", nargs="+", type=int, default=[0, 1, 2], help="processes beside; 0 must be among them")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=3, help="repetitions of a work in a row")
    parser.add_argument("--quota", type=float, default=0.0, help="cores; 0: not measured")
    args = parser.parse_args()
    for work in args.works:
        measure(work, args)


if __name__ == "__main__":
    main()
