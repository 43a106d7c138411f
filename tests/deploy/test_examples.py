"""The examples run on Ray Serve and BentoML, in environments of their own that also have the package.

THINKSTACK_RAY and THINKSTACK_BENTOML name the programs `ray` and `bentoml` of these environments.
"""

import contextlib
import os
import subprocess
import time
from pathlib import Path

import httpx
import pytest

from tests.deploy.processes import ROOT, free_port
from tests.deploy.tools import find_tool
from tests.server.process import save_tiny
from thinkstack.server.accounts import Accounts
from thinkstack.server.database import Database, sqlite_url

BODY = {"model": "deepseek-chat", "messages": [{"role": "user", "content": "the sum"}], "max_tokens": 5}
RAY = """
import sys, ray
from ray import serve
ray.init(num_cpus=4, include_dashboard=False, object_store_memory=100 * 2**20)
serve.start(http_options={"host": "127.0.0.1", "port": int(sys.argv[1])})
from examples.ray_serve import deployment
serve.run(deployment)
sys.stdin.readline()
serve.shutdown()
"""
pytestmark = [pytest.mark.slow, pytest.mark.deploy]


def ray_command(port):
    python = Path(find_tool("ray")).parent / "python"
    return [str(python), "-c", RAY, str(port)]


def bentoml_command(port):
    return [find_tool("bentoml"), "serve", "examples.bentoml_service:Thinkstack", "--host=127.0.0.1", f"--port={port}"]


@contextlib.contextmanager
def running(command, folder, port, database):
    """Run an example until the block ends."""
    environment = os.environ | {
        "MODEL": str(save_tiny(folder / "tiny")), "DATABASE": database, "PYTHONPATH": str(ROOT),
        "RAY_USAGE_STATS_ENABLED": "0", "RAY_AUTH_MODE": "disabled", "BENTOML_DO_NOT_TRACK": "true",
    }  # fmt: skip
    log = folder / "log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdin=subprocess.PIPE, stdout=output, stderr=output
        )
    try:
        deadline = time.monotonic() + 180
        while True:
            with contextlib.suppress(httpx.HTTPError):
                if httpx.get(f"http://127.0.0.1:{port}/ready").status_code == 200:
                    break
            assert process.poll() is None and time.monotonic() < deadline, log.read_text()
            time.sleep(0.2)
        yield
    finally:
        process.stdin.close()
        if command[1] != "-c":
            process.terminate()
        process.wait(120)


@pytest.mark.parametrize("make", [ray_command, bentoml_command])
def test_an_example_answers_with_keys_streams_and_a_ledger(tmp_path, make):
    port, database = free_port(), sqlite_url(tmp_path)
    command = make(port)
    accounts = Accounts(Database(database))
    key = accounts.add_key(accounts.add_user("admin", is_admin=True))
    headers, url = {"Authorization": f"Bearer {key}"}, f"http://127.0.0.1:{port}/chat/completions"
    with running(command, tmp_path, port, database):
        assert httpx.post(url, json=BODY).status_code == 401
        for _ in range(4):
            text = httpx.post(url, json=BODY | {"stream": True}, headers=headers, timeout=60).text
            assert text.endswith("data: [DONE]\n\n")
    (row,) = accounts.usage("user")
    assert row.requests == 4 and 4 <= row.usage.completion_tokens <= 20
