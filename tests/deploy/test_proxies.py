"""nginx and Caddy with the files of deploy/ in front of a real server."""

import contextlib
import http.server
import itertools
import os
import re
import ssl
import subprocess
import threading
import time

import httpx
import pytest

from tests import HANG_SECONDS
from tests.deploy.processes import free_port, running_router
from tests.deploy.test_files import DEPLOY
from tests.deploy.tools import find_tool, run_tool
from tests.server.live import TOKENIZER, live, scripted
from thinkstack.engine.service import EngineService
from thinkstack.server.served import Member, MemberConfig
from thinkstack.text.chat import chat_format
from thinkstack.text.grammar import GrammarCompiler

NAME = "chat.example.org"
BODY = {"model": "deepseek-chat", "messages": [{"role": "user", "content": "the sum"}]}
STEP_SECONDS = 0.05
NUM_WORDS = 40
pytestmark = pytest.mark.deploy


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """A server whose answer takes two seconds."""
    chat = chat_format("v3_1_think", TOKENIZER)
    engine = scripted(chat, lambda prompt, index: " the" * NUM_WORDS)
    step = engine.step

    def slow_step():
        time.sleep(STEP_SECONDS)
        return step()

    engine.step = slow_step
    member = Member(MemberConfig(model="scripted"), EngineService(engine), chat, GrammarCompiler(chat))
    with live(tmp_path_factory.mktemp("server"), lambda prompt, index: "", member=member) as found:
        yield found


@contextlib.contextmanager
def running(command, log, port, **options):
    """Run a proxy until the block ends."""
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, **options)
    try:
        deadline = time.monotonic() + 30
        while True:
            with contextlib.suppress(httpx.HTTPError):
                httpx.get(f"http://127.0.0.1:{port}/")
                break
            assert process.poll() is None and time.monotonic() < deadline, log.read_text()
            time.sleep(0.02)
        yield
    finally:
        process.terminate()
        process.wait(30)


@contextlib.contextmanager
def nginx(folder, *servers, router=""):
    """nginx over TLS, in front of servers as host:port; yields a client and the address.

    router: host:port of vllm-router for the routes that docs/deployment.md gives it.
    """
    program, pem, key = find_tool("nginx"), folder / "cert.pem", folder / "cert.key"
    words = ["req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", f"/CN={NAME}"]
    run_tool("openssl", *words, "-addext", f"subjectAltName=DNS:{NAME}", "-keyout", key, "-out", pem)
    secure, plain = free_port(), free_port()
    lines = "".join(f"server {server} max_fails=1 fail_timeout=2s;" for server in servers)
    text = (DEPLOY / "nginx.conf").read_text()
    for old, new in {
        "server 127.0.0.1:8000 max_fails=1 fail_timeout=2s;": lines,
        "listen 443": f"listen 127.0.0.1:{secure}",
        "listen 80": f"listen 127.0.0.1:{plain}",
        f"/etc/ssl/certs/{NAME}.pem": str(pem),
        f"/etc/ssl/private/{NAME}.key": str(key),
    }.items():
        assert old in text
        text = text.replace(old, new)
    if router:
        page = (DEPLOY.parent / "docs" / "deployment.md").read_text()
        (line,) = re.findall(r"```nginx\n(.*)\n```", page)
        text = text.replace("    location / {", f"    {line.replace('127.0.0.1:30000', router)}\n    location / {{")
    (folder / "site.conf").write_text(text)
    temporary = "".join(
        f"{kind}_temp_path {folder}/{kind};" for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    (folder / "nginx.conf").write_text(
        f"daemon off; pid {folder}/pid; error_log stderr; events {{}} http {{ access_log off; {temporary}"
        f" include {folder}/site.conf; }}"
    )
    run_tool("nginx", "-t", "-c", folder / "nginx.conf")
    with running([program, "-c", str(folder / "nginx.conf")], folder / "log", plain):
        context = ssl.create_default_context(cafile=pem)
        with httpx.Client(verify=context, timeout=HANG_SECONDS) as client:
            yield client, f"https://127.0.0.1:{secure}"


@contextlib.contextmanager
def caddy(folder, server):
    """Caddy without TLS, whose certificate comes from outside; yields a client and the address."""
    port = free_port()
    environment = os.environ | {
        "THINKSTACK_DOMAIN": f"http://{NAME}:{port}", "THINKSTACK_SERVER": server, "HOME": str(folder),
        "XDG_DATA_HOME": str(folder), "XDG_CONFIG_HOME": str(folder),
    }  # fmt: skip
    path = folder / "Caddyfile"
    path.write_text("{\n\tadmin off\n}\n" + (DEPLOY / "Caddyfile").read_text())
    command = [find_tool("caddy"), "run", "--adapter", "caddyfile", "--config", str(path)]
    with running(command, folder / "log", port, env=environment), httpx.Client(timeout=HANG_SECONDS) as client:
        yield client, f"http://127.0.0.1:{port}"


@pytest.fixture(scope="module", params=[nginx, caddy], ids=["nginx", "caddy"])
def proxy(request, server, tmp_path_factory):
    """A request through a proxy, as a function (method, path, **options) -> context of a response."""
    folder = tmp_path_factory.mktemp("proxy")
    with request.param(folder, server.url.removeprefix("http://")) as (client, address):

        def send(method, path, headers=None, **options):
            headers = {"Host": NAME} | (headers or {})
            return client.stream(method, address + path, headers=headers, extensions={"sni_hostname": NAME}, **options)

        yield send


def test_a_stream_arrives_while_it_is_made(server, proxy):
    arrived, text = [], ""
    with proxy("POST", "/chat/completions", server.headers, json=BODY | {"stream": True}) as reply:
        assert reply.status_code == 200
        for piece in reply.iter_text():
            arrived.append(time.monotonic())
            text += piece
    assert text.endswith("data: [DONE]\n\n") and text.count('"content"') >= NUM_WORDS / 2
    seconds = arrived[-1] - arrived[0]
    assert len(arrived) > NUM_WORDS / 2 and seconds > 0.6 * NUM_WORDS * STEP_SECONDS
    gaps = sorted(late - early for early, late in itertools.pairwise(arrived))
    assert gaps[len(gaps) // 2] < 4 * STEP_SECONDS  # not in a few heaps


def test_keys_pass_and_requests_without_one_are_refused(server, proxy):
    with proxy("GET", "/user/balance", server.headers) as reply:
        assert reply.status_code == 200
    with proxy("GET", "/user/balance", {"x-api-key": server.key}) as reply:
        assert reply.status_code == 200
    with proxy("GET", "/user/balance") as reply:
        assert reply.status_code == 401


def test_a_body_that_is_too_big_is_refused(server, proxy):
    """Caddy counts while it sends: if the server refuses first and closes the connection, the reply is a 502."""
    big = b'{"model": "' + b"x" * (17 * 2**20) + b'"}'
    headers = server.headers | {"Content-Type": "application/json"}
    with proxy("POST", "/chat/completions", headers, content=big) as reply:
        assert reply.status_code in (413, 502)
        assert reply.status_code == 413 or reply.headers["Server"] == "Caddy"


@pytest.mark.parametrize("address", ["127.0.0.1", "::1"])
def test_metrics_are_not_passed_on_even_to_who_claims_to_be_local(proxy, address):
    for host in (NAME, "localhost"):
        headers = {"X-Forwarded-For": address, "Host": host}
        with proxy("GET", "/metrics", headers) as reply:
            reply.read()
            assert reply.status_code in (401, 404) or b"thinkstack_" not in reply.content


class Listing(http.server.BaseHTTPRequestHandler):
    """Replies with the headers of the request."""

    def do_GET(self):
        body = "".join(f"{name.lower()}: {value}\n" for name, value in self.headers.items()).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format, *args):
        """Silence."""


@pytest.mark.parametrize("start", [nginx, caddy])
def test_the_server_learns_host_and_address_of_the_client(tmp_path, start):
    """What a client writes into X-Forwarded-For is replaced; metrics without a key depend on it."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Listing) as listing:
        threading.Thread(target=listing.serve_forever, daemon=True).start()
        with start(tmp_path, f"127.0.0.1:{listing.server_address[1]}") as (client, address):
            headers = {
                "Host": NAME,
                "X-Forwarded-For": "203.0.113.7",
                "Authorization": "Bearer sk-1",
                "x-api-key": "sk-2",
            }
            seen = client.get(f"{address}/models", headers=headers, extensions={"sni_hostname": NAME}).text.splitlines()
        listing.shutdown()
    assert "x-forwarded-for: 127.0.0.1" in seen and "authorization: Bearer sk-1" in seen and "x-api-key: sk-2" in seen
    assert any(re.fullmatch(rf"host: {NAME}(:\d+)?", line) for line in seen)


def test_chats_go_through_vllm_router_and_all_other_routes_do_not(tmp_path, server):
    """The router drops the key on other routes, and everybody's metrics would be open through it."""
    with (
        running_router(find_tool("vllm-router"), [server.url], tmp_path / "router.log") as router,
        nginx(tmp_path, server.url.removeprefix("http://"), router=router.removeprefix("http://")) as (client, address),
    ):
        options = {"headers": server.headers | {"Host": NAME}, "extensions": {"sni_hostname": NAME}}
        reply = client.post(f"{address}/v1/chat/completions", json=BODY, **options)
        assert reply.status_code == 200 and "skip_special_tokens" in reply.headers["X-Ignored-Fields"]
        assert reply.json()["id"] != reply.headers["X-Request-Id"]  # the router's own
        for path in ("/chat/completions", "/beta/chat/completions", "/api/chat"):
            reply = client.post(address + path, json=BODY | {"stream": False}, **options)
            assert reply.status_code == 200 and "X-Ignored-Fields" not in reply.headers
        assert client.get(f"{address}/v1/user/balance", **options).status_code == 200
        assert client.get(f"{address}/metrics", **options).status_code == 404
        with httpx.Client() as bare:
            assert bare.get(f"{router}/user/balance", headers=server.headers).status_code == 401
            assert "thinkstack_" in bare.get(f"{router}/metrics").text
