"""`thinkstack serve` as a process: first start, second start, without keys, a port in use, SIGTERM."""

import contextlib
import json
import signal
import socket
import stat
import subprocess
import sys
import time

import httpx
import openai
import pytest

from tests import HANG_SECONDS
from tests.server.billing import PRICES
from tests.server.live import TOKENIZER
from tests.server.process import MAIN, ROOT, save_tiny, serve
from tests.server.requests import chunks_of
from thinkstack.server.accounts import Accounts
from thinkstack.server.database import Database, sqlite_url
from thinkstack.server.run import check_prices, first_key, is_loopback, listen, run_server
from thinkstack.server.served import config_of_model
from thinkstack.types import ConfigError

LONG = {
    "model": "deepseek-chat", "messages": [{"role": "user", "content": "the sum"}], "max_tokens": 3000, "stream": True,
    "stream_options": {"include_usage": True}, "logit_bias": {str(token): -100 for token in TOKENIZER.control_of_id},
}  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("model") / "tiny")


def settings_file(folder, model, drain_seconds):
    """Settings of a server with one model."""
    path = folder / "server.toml"
    path.write_text(f'[server]\ndrain_seconds = {drain_seconds}\n[members.default]\nmodel = "{model}"\n'
                    'cache_tokens = 8192\ndtype = "fp32"\n[models.deepseek-chat]\nthinking = false\n')  # fmt: skip
    return str(path)


def test_the_first_start_prints_a_key_and_the_second_does_not_and_sigterm_drains(tmp_path, model):
    arguments = ("--config", settings_file(tmp_path, model, 30), "--data", str(tmp_path / "data"), "--log-json")
    with serve(*arguments) as first:
        assert first.key.startswith("sk-") and first.url.startswith("http://127.0.0.1:")
        assert stat.S_IMODE((tmp_path / "data").stat().st_mode) == 0o700
        assert stat.S_IMODE((tmp_path / "data" / "accounts.sqlite3").stat().st_mode) == 0o600
        client = openai.OpenAI(base_url=first.url, api_key=first.key)
        assert client.models.list().data[0].id == "deepseek-chat"
        headers = {"Authorization": f"Bearer {first.key}"}
        with httpx.stream(
            "POST", f"{first.url}/chat/completions", json=LONG, headers=headers, timeout=HANG_SECONDS
        ) as response:
            pieces = response.iter_text()
            text = next(pieces)
            first.process.send_signal(signal.SIGTERM)
            text += "".join(pieces)
        assert first.wait() == 0
    usage = chunks_of(text)[-1]["usage"]
    assert usage["completion_tokens"] == 3000 and text.endswith("data: [DONE]\n\n")
    (row,) = Accounts(Database(sqlite_url(tmp_path / "data"))).usage("user")
    assert row.usage.completion_tokens == 3000
    lines = [json.loads(line) for line in first.log.splitlines()]
    assert any(line.get("completion_tokens") == 3000 for line in lines)
    words = " ".join(line["message"] for line in lines)
    for part in ("threads", "on cpu, fp32", "KV cache 8,192 tokens = ", "MiB", "engine in", "opened in", "ready after"):
        assert part in words, part
    with serve(*arguments) as second:
        assert second.key == ""
        reply = httpx.get(f"{second.url}/models", headers={"Authorization": f"Bearer {first.key}"})
        assert reply.status_code == 200


def test_sigterm_ends_what_takes_too_long_and_a_client_that_does_not_read_and_settles_both(tmp_path, model):
    with serve(
        "--config", settings_file(tmp_path, model, 0.2), "--data", str(tmp_path / "data"), "--no-keys"
    ) as server:
        assert server.key == ""
        body = json.dumps(LONG | {"max_tokens": 3900}).encode()
        head = f"POST /chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n"
        port = int(server.url.rpartition(":")[2])
        with socket.create_connection(("127.0.0.1", port)) as reads, socket.socket() as idle:
            idle.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            idle.connect(("127.0.0.1", port))
            for each in (reads, idle):
                each.sendall(head.encode() + b"Content-Type: application/json\r\n\r\n" + body)
            text = reads.recv(65536)
            began = time.monotonic()
            server.process.send_signal(signal.SIGTERM)
            while piece := reads.recv(65536):
                text += piece
            assert server.wait() == 0
        assert time.monotonic() - began < 30
    assert b"shutting down" in text or text.count(b"data: ") > 3900
    accounts = Accounts(Database(sqlite_url(tmp_path / "data")))
    (row,) = accounts.usage("user")
    assert row.requests == 2 and accounts.balance(1).reserved_pico == 0 and row.usage.completion_tokens > 0


def test_a_killed_server_charges_at_most_what_arrived_and_leaves_no_reservation(tmp_path, model):
    (tmp_path / "prices.toml").write_text('currency = "USD"\n[[models.deepseek-chat]]\ninput_hit = 0.07\n'
                                          'input_miss = 0.27\noutput = 1.10\n')  # fmt: skip
    database = sqlite_url(tmp_path / "data")
    arguments = ("--config", settings_file(tmp_path, model, 30), "--data", str(tmp_path / "data"))
    with serve(*arguments, "--prices", str(tmp_path / "prices.toml")) as server:
        Accounts(Database(database)).deposit(1, 10**15)
        headers, body = {"Authorization": f"Bearer {server.key}"}, LONG | {"logprobs": True, "max_tokens": 3900}
        text, began = "", time.monotonic()
        with (
            contextlib.suppress(httpx.HTTPError),
            httpx.stream("POST", f"{server.url}/chat/completions", json=body, headers=headers) as response,
        ):
            for piece in response.iter_text():
                text += piece
                if time.monotonic() > began + 1.3:
                    server.process.kill()
    accounts = Accounts(Database(database), lapse_seconds=0.0)
    accounts.sweep()
    (row,) = accounts.usage("user")
    chunks = chunks_of(text[: text.rindex("\n\n")])
    arrived = sum(len((choice["logprobs"] or {}).get("content", ())) for each in chunks for choice in each["choices"])
    assert 0 < row.usage.completion_tokens <= arrived
    balance = accounts.balance(1)
    assert (balance.reserved_pico, balance.total_pico) == (0, 10**15 - row.cost_pico)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1", "example.com"])
def test_no_keys_is_for_this_machine_alone(host):
    with pytest.raises(ConfigError, match=r"--no-keys with --host .* would answer everybody"):
        run_server(config_of_model("x"), host, 0, no_keys=True)
    assert not is_loopback(host)


def test_a_port_in_use_is_an_error_with_a_way_out():
    with listen("127.0.0.1", 0) as listener:
        port = listener.getsockname()[1]
        with pytest.raises(ConfigError, match=rf"port {port} of 127.0.0.1 is in use; .* --port 0"):
            listen("127.0.0.1", port)
        command = [sys.executable, "-c", MAIN, "serve", "nothing", "--port", str(port)]
        found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=HANG_SECONDS)
    assert found.returncode == 2 and f"port {port} of 127.0.0.1 is in use" in found.stderr
    for host, number in (("no.such.host.invalid", 0), ("127.0.0.1", 99_999)):
        with pytest.raises(ConfigError, match="cannot listen"):
            listen(host, number)


def test_a_first_start_on_accounts_with_users_makes_no_key(tmp_path, capsys):
    accounts = Accounts(Database(sqlite_url(tmp_path)))
    accounts.add_user("ann")
    assert first_key(accounts, no_keys=False) is None and capsys.readouterr().out == ""
    principal = first_key(accounts, no_keys=True)
    assert principal is not None and principal.user_name == "admin" and capsys.readouterr().out == ""


def test_starts_without_keys_share_one_row_until_it_is_revoked(tmp_path):
    """Each start added a key that nobody knows."""
    accounts = Accounts(Database(sqlite_url(tmp_path)))
    first = first_key(accounts, no_keys=True)
    assert first_key(accounts, no_keys=True) == first
    accounts.revoke_key(first.key_prefix)
    assert first_key(accounts, no_keys=True).key_id != first.key_id
    assert [row["name"] for row in accounts.list_keys()] == ["no-keys", "no-keys"]


def test_a_model_without_a_price_stops_the_start(tmp_path):
    accounts = Accounts(Database(sqlite_url(tmp_path)), PRICES)
    with pytest.raises(ConfigError, match="no price for the model"):
        check_prices(accounts, config_of_model("x"))
