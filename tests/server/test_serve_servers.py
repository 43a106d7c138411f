"""`thinkstack serve MODEL --servers URL[,URL]`, and a server that another program runs."""

import asyncio

import httpx
import pytest

from tests import HANG_SECONDS
from tests.server.fake_vllm import FakeVllm, answer, checkpoint
from tests.server.process import save_tiny, serve
from thinkstack.cli.serving import serve as serve_command
from thinkstack.server.app import create_app
from thinkstack.server.run import build_server
from thinkstack.server.served import config_of_model
from thinkstack.types import ConfigError

BODY = {"model": "deepseek-chat", "messages": [{"role": "user", "content": "What is the capital of France?"}]}


def test_a_process_without_weights_answers_from_a_pool(tmp_path):
    with FakeVllm(answer) as first, FakeVllm(answer) as second:
        servers = f"{first.address},{second.address}"
        with serve(str(checkpoint()), "--servers", servers, "--data", str(tmp_path)) as server:
            headers = {"Authorization": f"Bearer {server.key}"}
            reply = httpx.post(f"{server.url}/chat/completions", json=BODY, headers=headers, timeout=HANG_SECONDS)
            assert reply.json()["choices"][0]["message"]["content"] == "It is Paris."
            assert httpx.get(f"{server.url}/ready").status_code == 200
        assert len(first.bodies) + len(second.bodies) == 1
        assert first.address in server.log and second.address in server.log


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"dtype": "fp32"}, "dtype and servers are both set; dtype is an option of the servers"),
        ({"quantization": "int8"}, "quantization and servers are both set"),
        ({"max_num_seqs": 8}, "max_num_seqs and servers are both set"),
        ({"cache_tokens": 8192}, "cache_tokens and servers are both set"),
        ({"servers": "http://a:1,http://a:1"}, "contains an address twice"),
        ({"servers": "http://a:1,"}, "'' is not the address of a server"),
        ({"servers": "10.0.0.1:8000"}, "'10.0.0.1:8000' is not the address of a server; write it as http://host:port"),
        ({"servers": "http://a:1/v1"}, "without /v1"),
    ],
)
def test_options_that_do_not_go_with_servers_are_refused(values, words):
    with pytest.raises(ConfigError, match=words):
        serve_command("model", **{"servers": "http://a:1"} | values)


def test_servers_with_a_file_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="--servers and --config are both given; set servers of a member in"):
        serve_command(config=tmp_path / "server.toml", servers="http://a:1")
    with pytest.raises(ConfigError, match="give either a MODEL or --config"):
        serve_command(servers="http://a:1")


def test_a_pool_that_does_not_answer_stops_the_start(tmp_path):
    with FakeVllm(answer) as pool:
        pool.is_down = True
        with pytest.raises(ConfigError, match=f"no vLLM server is available.*{pool.address}"):
            serve_command(str(checkpoint()), servers=pool.address, data=tmp_path, port=0)


def test_a_built_server_answers_in_any_asgi_program(tmp_path, capsys):
    """Ray Serve, BentoML and others run the application; what they need is its lifespan."""
    config = config_of_model(str(save_tiny(tmp_path / "tiny")), dtype="fp32", cache_tokens=8192)
    server = build_server(config, data=tmp_path)
    app, headers = create_app(server), {"Authorization": f"Bearer {capsys.readouterr().out.split()[-1]}"}

    async def main():
        transport = httpx.ASGITransport(app)
        async with (
            app.router.lifespan_context(app),
            httpx.AsyncClient(transport=transport, base_url="http://any") as client,
        ):
            refused = await client.post("/chat/completions", json=BODY)
            return refused, await client.post("/chat/completions", json=BODY | {"max_tokens": 3}, headers=headers)

    refused, reply = asyncio.run(main())
    assert refused.status_code == 401 and reply.json()["usage"]["completion_tokens"] == 3
    assert server.accounts.usage("user")[0].usage.completion_tokens == 3
