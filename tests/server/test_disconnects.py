"""Clients that leave over real sockets, streamed, whole and queued: their blocks are free within one step."""

import json
import random

import pytest

from tests.server.live import live
from tests.server.requests import connect, ledger_rows, until
from thinkstack.engine.service import Generation

ROWS, CLIENTS = 4, 10
"""Sequences that run at once; clients that come and leave together, so that some of them are queued."""


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    def endless(prompt: str, index: int) -> str:
        return "the sum " * 4000

    with live(tmp_path_factory.mktemp("data"), endless, max_num_seqs=ROWS) as running:
        yield running


@pytest.fixture
def aborted(server, monkeypatch):
    """Of each request that was ended: how many steps that took, whether it had started, whether blocks became free."""
    service, posted, found = server.server.models.members["default"].service, {}, []
    post, engine_abort = Generation.abort, server.engine.abort

    def abort(generation):
        posted.setdefault(generation.request, service.status.num_steps)
        post(generation)

    def free(request, *arguments):
        held, started = service.status.free_blocks, request.is_started
        engine_abort(request, *arguments)
        found.append((service.status.num_steps - posted[request], started, service.status.free_blocks > held))

    monkeypatch.setattr(Generation, "abort", abort)
    monkeypatch.setattr(server.engine, "abort", free)
    return found


def send(server, number):
    """An endless request on a connection of its own; every other one is a stream."""
    question = [{"role": "user", "content": f"{number} is endless"}]
    body = {"model": "deepseek-reasoner", "messages": question, "max_tokens": 6000, "stream": number % 2 == 0}
    content = json.dumps(body).encode()
    head = f"POST /chat/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {server.key}\r\n"
    connection = connect(server)
    connection.sendall(
        f"{head}Content-Type: application/json\r\nContent-Length: {len(content)}\r\n\r\n".encode() + content
    )
    return connection


def leave(server, aborted, num_rounds):
    """Let clients come and leave. Checks that nothing is left behind, and that each request ended within a step."""
    service, choose, before = (
        server.server.models.members["default"].service,
        random.Random(0),
        len(ledger_rows(server)),
    )
    for round_number in range(num_rounds):
        connections = [send(server, round_number * CLIENTS + index) for index in range(CLIENTS)]
        until(lambda: (service.status.running, service.status.waiting) == (ROWS, CLIENTS - ROWS))
        choose.shuffle(connections)
        for connection in connections:
            connection.close()
        until(lambda: not server.server.turns)
        until(lambda: service.status.running == service.status.waiting == 0)
        assert service.status.free_blocks == service.status.num_blocks
    assert max(steps for steps, *_ in aborted) <= 1 and len(aborted) == num_rounds * CLIENTS
    assert {(started, freed) for _, started, freed in aborted} == {(True, True), (False, False)}
    until(lambda: len(ledger_rows(server)) == before + num_rounds * CLIENTS)


def test_clients_that_leave_free_their_blocks_within_a_step(server, aborted):
    leave(server, aborted, 10)


@pytest.mark.slow
def test_a_thousand_clients_that_leave_free_their_blocks_within_a_step(server, aborted):
    leave(server, aborted, 100)
