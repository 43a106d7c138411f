"""Two processes over one PostgreSQL, behind vllm-router or nginx: one is killed, both are replaced, limits hold.

The engine is scripted; processes, balancers, database, accounts and clients are real.
"""

import asyncio
import collections
import contextlib
import os
import shutil
import signal
import subprocess
import time

import httpx
import pytest
from sqlalchemy import func, select

from tests.deploy.processes import ScriptedServer, ask, free_port, load, running_router
from tests.deploy.test_proxies import nginx
from tests.deploy.tools import find_tool
from tests.server.billing import PRICES
from tests.server.fake_vllm import FakeVllm, answer, checkpoint
from tests.server.live import live
from tests.server.requests import post
from thinkstack.checkpoint.model import load_chat
from thinkstack.server.accounts import Accounts
from thinkstack.server.database import Database, ledger, reservations
from thinkstack.server.limits import UNLIMITED, Limits
from thinkstack.server.served import MemberConfig, attach_member

NUM_TOKENS = 60
BODY = {
    "model": "deepseek-chat", "messages": [{"role": "user", "content": "the sum"}], "stream": True, "logprobs": True,
    "max_tokens": 200, "stream_options": {"include_usage": True},
}  # fmt: skip
DEPOSIT = 10**15
pytestmark = pytest.mark.deploy


class Pool:
    """Two servers over one database."""

    def __init__(self, database, folder, **settings):
        self.database, self.folder, self.settings = database, folder, settings
        self.accounts = Accounts(Database(database), PRICES, lapse_seconds=0.0)
        self.ports = [free_port(), free_port()]
        self.servers = [self.start(index) for index in range(2)]
        _ = [server.wait_ready() for server in self.servers]

    def start(self, index):
        """Start a server, without waiting for it."""
        return ScriptedServer(self.database, self.ports[index], self.folder / f"server{index}.log", **self.settings)

    def replace(self, index, number=signal.SIGTERM):
        """End a server by a signal, and start it again on its port. Returns the exit status."""
        status = self.servers[index].end(number)
        self.servers[index] = self.start(index).wait_ready()
        return status

    def add_key(self, name, limits=UNLIMITED, deposit=DEPOSIT):
        """A key of a new user."""
        user_id = self.accounts.add_user(name)
        self.accounts.deposit(user_id, deposit)
        self.accounts.change_user(user_id, **vars(limits))
        return self.accounts.add_key(user_id)

    def rows(self):
        """The rows of the ledger by request, after reservations of dead processes are settled."""
        self.accounts.sweep()
        with self.accounts.database.read() as connection:
            assert connection.scalar(select(func.count()).select_from(reservations)) == 0
            return {row.request_id: row for row in connection.execute(select(ledger))}


@pytest.fixture
def pool(postgres, tmp_path):
    """Start two servers."""
    pools = []

    def start(**settings):
        pools.append(Pool(postgres(), tmp_path, **{"tokens": NUM_TOKENS} | settings))
        return pools[0]

    yield start
    for each in pools:
        _ = [server.end(signal.SIGKILL) for server in each.servers]
        each.accounts.database.close()


@contextlib.contextmanager
def vllm_router(folder, *servers):
    """The router, which takes turns. Yields its address."""
    urls = [f"http://{server}" for server in servers]
    with running_router(find_tool("vllm-router"), urls, folder / "router.log", "--policy=round_robin") as url:
        yield url


@contextlib.contextmanager
def nginx_balancer(folder, *servers):
    """nginx, which chooses by the key. Yields its address."""
    with nginx(folder, *servers) as (_, url):
        yield url


BALANCERS = pytest.mark.parametrize("balancer", [vllm_router, nginx_balancer], ids=["vllm-router", "nginx"])


async def loaded(url, keys, event):
    """Send load until `event`, a function that runs in a thread, has returned. Returns the outcomes."""
    stop = asyncio.Event()
    task = asyncio.create_task(load(url, keys, BODY, stop))
    await asyncio.to_thread(event)
    stop.set()
    return await task


def serves(server):
    """Wait until requests arrive at a server."""
    began = server.count_chats()
    deadline = time.monotonic() + 120
    while server.count_chats() < began + 5:
        assert time.monotonic() < deadline, "no requests arrive"
        time.sleep(0.1)


@BALANCERS
def test_a_killed_process_fails_its_own_streams_alone_and_the_ledger_keeps_its_promise(pool, tmp_path, balancer):
    find_tool(balancer.__name__.split("_balancer")[0].replace("_", "-"))
    servers = pool(step_seconds=0.02)
    keys = [servers.add_key(f"user{number}") for number in range(16)]
    killed = 0.0

    def kill():
        nonlocal killed
        _ = [serves(server) for server in servers.servers]
        time.sleep(1.5)  # so that streams have been noted
        killed = time.monotonic()
        servers.servers[0].end(signal.SIGKILL)
        serves(servers.servers[1])
        servers.servers[0] = servers.start(0).wait_ready()
        serves(servers.servers[0])

    with balancer(tmp_path, *(f"127.0.0.1:{port}" for port in servers.ports)) as url:
        outcomes = asyncio.run(loaded(url, keys, kill))
    failed = [outcome for outcome in outcomes if not outcome.is_whole]
    crossing = [each for each in outcomes if each.arrived and each.arrived[0] < killed < each.ended and each.is_whole]
    print(f"{len(outcomes)} requests, {len(failed)} failed, {len(crossing)} others ran at the kill and are whole")
    assert failed and len(failed) < len(keys) and crossing
    assert all(each.status == 200 and each.error and each.ended - killed < 2 for each in failed), failed
    rows = servers.rows()
    lapsed = {id for id, row in rows.items() if row.status == "lapsed"}
    assert {each.id for each in failed} <= lapsed
    assert all(rows[id].completion_tokens == 0 for id in lapsed.difference(each.id for each in failed))  # sent again
    for each in outcomes:
        charged = rows[each.id].completion_tokens
        assert charged == each.num_tokens + 1 == NUM_TOKENS + 1 if each.is_whole else charged <= each.num_tokens
    paid = collections.Counter()
    for row in rows.values():
        paid[row.user_id] += row.cost_pico
    for user_id, cost in paid.items():
        balance = servers.accounts.balance(user_id)
        assert (balance.total_pico, balance.reserved_pico) == (DEPOSIT - cost, 0)


@BALANCERS
def test_a_rolling_restart_loses_no_request(pool, tmp_path, balancer):
    find_tool(balancer.__name__.split("_balancer")[0].replace("_", "-"))
    servers = pool(step_seconds=0.01)
    keys = [servers.add_key(f"user{number}") for number in range(16)]
    statuses = []

    def restart():
        for index in (0, 1):
            _ = [serves(server) for server in servers.servers]
            statuses.append(servers.replace(index))
        _ = [serves(server) for server in servers.servers]

    with balancer(tmp_path, *(f"127.0.0.1:{port}" for port in servers.ports)) as url:
        outcomes = asyncio.run(loaded(url, keys, restart))
    lost = [outcome for outcome in outcomes if not outcome.is_whole]
    print(f"{len(outcomes)} requests during a rolling restart, {len(lost)} lost")
    assert statuses == [0, 0]
    assert lost == [] and len(outcomes) > 100
    assert collections.Counter(row.status for row in servers.rows().values()) == {"stop": len(outcomes)}


def test_limits_and_balances_hold_across_processes(pool, tmp_path):
    find_tool("vllm-router")
    servers = pool(tokens=20)
    thinker = servers.add_key("thinker", Limits(requests_per_minute=0, tokens_per_minute=0, concurrency=0))
    cost = 6 * 10**9
    payer = servers.add_key("payer", deposit=cost)

    async def send(url, key, number, **values):
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(timeout=600, limits=limits) as client:
            return await asyncio.gather(*(ask(client, url, key, BODY | values) for _ in range(number)))

    with vllm_router(tmp_path, *(f"127.0.0.1:{port}" for port in servers.ports)) as url:
        thought = asyncio.run(send(url, thinker, 60, thinking={"type": "enabled"}))
        paid = asyncio.run(send(url, payer, 60, max_tokens=1000))
        assert all(server.count_chats() > 20 for server in servers.servers)
    assert collections.Counter(each.status for each in thought) == {200: 50, 429: 10}
    assert all("deep_think_per_day" in each.text for each in thought if each.status == 429)
    assert {each.status for each in paid} == {200, 402}
    rows = [row for row in servers.rows().values() if row.user_id == servers.accounts.user_id("payer")]
    assert len(rows) == sum(each.status == 200 for each in paid)
    balance = servers.accounts.balance(servers.accounts.user_id("payer"))
    assert balance.total_pico == cost - sum(row.cost_pico for row in rows) >= 0 and balance.reserved_pico == 0


def test_two_processes_give_half_again_as_many_requests_a_second_as_one(pool, tmp_path, capsys):
    """On fewer than four cores the figures are printed alone: servers, router, database and client share them."""
    find_tool("vllm-router")
    if shutil.which("curl") is None:
        pytest.skip("curl is not here: apt-get install curl")
    servers, number, rates = pool(tokens=8), 1000, []
    key = servers.add_key("user")
    words = ["curl", "-sS", "--no-progress-meter", "-Z", "--parallel-immediate", "--parallel-max", "64"]
    words += ["-H", f"Authorization: Bearer {key}", "-H", "Content-Type: application/json", "-d"]
    body = '{"model": "deepseek-chat", "messages": [{"role": "user", "content": "the sum"}]}'
    for count in (1, 2):
        with vllm_router(tmp_path, *(f"127.0.0.1:{port}" for port in servers.ports[:count])) as url:
            for requests in (100, number):  # the first ones warm up
                path = f"{url}/v1/chat/completions?[1-{requests}]"
                began = time.monotonic()
                text = subprocess.run([*words, body, path], check=True, capture_output=True, text=True).stdout
                seconds = time.monotonic() - began
                assert text.count('"finish_reason":"stop"') == requests
        rates.append(number / seconds)
    ratio, cores = rates[1] / rates[0], len(os.sched_getaffinity(0))
    with capsys.disabled():
        print(f"\n{rates[0]:.0f} requests/s with one process, {rates[1]:.0f} with two: {ratio:.2f}x on {cores} cores")
    assert cores < 4 or ratio >= 1.5


def test_a_pool_of_vllm_behind_vllm_router_is_one_address(tmp_path):
    """The router's /health is a sentence, which was not a reply of vLLM."""
    program, model = find_tool("vllm-router"), str(checkpoint())
    with FakeVllm(answer) as first, FakeVllm(answer) as second:
        addresses = [first.address, second.address]
        with running_router(program, addresses, tmp_path / "router.log", "--policy=round_robin") as url:
            member = attach_member("default", MemberConfig(model=model, servers=(url,)), load_chat(model))
            with live(tmp_path, lambda prompt, index: "", member=member) as server:
                replies = [post(server).json() for _ in range(4)]
        assert [reply["choices"][0]["message"]["content"] for reply in replies] == ["It is Paris."] * 4
        assert (len(first.bodies), len(second.bodies)) == (2, 2)
