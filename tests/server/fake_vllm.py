"""A fake vLLM server on a real socket. Completions are texts by a function; grammars, salts and failures are checked.

The protocol is that of tests/golden/vllm.json and of vLLM's scale_out/token_in_token_out/protocol.py.
"""

import atexit
import functools
import json
import shutil
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import llguidance
from llguidance import LLMatcher

from tests import HANG_SECONDS
from tests.server.live import TOKENIZER, written
from tests.tiny import GQA_TINY, tiny_model
from thinkstack.checkpoint.model import load_chat, save_model
from thinkstack.server.served import Member, MemberConfig, attach_member
from thinkstack.text.grammar import _ll_tokenizer
from thinkstack.text.tokenizer import EOS

Continue = Callable[[str], str]
"""Function text of the prompt -> text of its continuation, both with control tokens."""
BLOCK = 4
END = TOKENIZER.control_id(EOS)
MATCHER_TOKENIZER = _ll_tokenizer(TOKENIZER, (END,))


class FakeVllm(ThreadingHTTPServer):
    """One server, which answers while the block runs."""

    daemon_threads = True
    block_on_close = False

    def __init__(self, answer: Continue, context: int = 8192):
        super().__init__(("127.0.0.1", 0), Handler)
        self.answer, self.context = answer, context
        self.tokenizer = TOKENIZER
        self.model, self.weights, self.is_raw, self.has_priority = "policy", "default", True, True
        self.paths: list[str] = []
        self.bodies: list[dict[str, Any]] = []
        """Bodies of generate requests, without the probes."""
        self.aborted: list[str] = []
        """Ids of requests whose stream was closed by the client."""
        self.refuses_generate = ""
        """How generate requests fail: "", "status" (500), "drop" (the connection closes)."""
        self.is_down = False
        """Whether connections close at once."""
        self.dies_after: int | None = None
        """Number of tokens after which the connection of a stream breaks."""
        self.holds_after: int | None = None
        """Number of tokens after which streams wait for `go`."""
        self.go = threading.Event()
        self.cached: set[tuple[str, tuple[int, ...]]] = set()
        """(salt, prefix of full blocks) in the prefix cache."""

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def __enter__(self) -> "FakeVllm":
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self.go.set()
        self.shutdown()
        self.server_close()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients that leave are no errors."""

    def find_cached(self, cache_salt: str, prompt: tuple[int, ...]) -> int:
        """Tokens of the prompt in the cache, before they are added to it."""
        sizes = range(BLOCK, len(prompt), BLOCK)
        found = [size for size in sizes if (cache_salt, prompt[:size]) in self.cached]
        self.cached |= {(cache_salt, prompt[:size]) for size in sizes}
        return max(found, default=0)


class Handler(BaseHTTPRequestHandler):
    """One connection."""

    server: FakeVllm
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        """Silence."""

    def reply(self, body: dict[str, Any], status: int = 200) -> None:
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def do_GET(self) -> None:
        server, path = self.server, self.path
        server.paths.append(path)
        if server.is_down:
            self.close_connection = True
        elif path == "/v1/models":
            self.reply({"data": [{"id": server.model, "max_model_len": server.context}]})
        else:
            self.reply({"weight_version": server.weights} if path == "/weight_info" else {})

    def do_POST(self) -> None:
        server, path = self.server, self.path
        server.paths.append(path)
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if server.is_down:
            self.close_connection = True
        elif path == "/tokenize":
            tokens = server.tokenizer.encode_pieces(server.tokenizer.split_controls(body["prompt"]))
            self.reply({"count": len(tokens), "max_model_len": server.context, "tokens": tokens})
        elif path != "/inference/v1/generate":
            self.reply({})
        elif body.get("priority") and not server.has_priority:
            self.reply({"error": {"message": "priority scheduling is not enabled", "code": 400}}, 400)
        elif not body.get("stream"):
            self.reply({"choices": [self.choice(body, [5], True)]})
        elif server.refuses_generate == "status":
            self.reply({"error": {"message": "it broke"}}, 500)
        elif server.refuses_generate == "drop":
            self.close_connection = True
        else:
            server.bodies.append(body)
            try:
                self.stream(body)
            except ConnectionError:  # the client left while tokens were written
                server.aborted.append(body["request_id"])
                self.close_connection = True

    def choice(self, body: dict[str, Any], tokens: list[int], is_last: bool, reason: str = "length") -> dict[str, Any]:
        count = body["sampling_params"]["logprobs"]
        value = -0.5 if self.server.is_raw else 0.0
        content = [
            {
                "token_id": token, "logprob": value, "rank": 1,
                "top_logprobs": [{"token_id": token + i, "logprob": value - i, "rank": i + 1} for i in range(count)],
            }
            for token in tokens
        ]  # fmt: skip
        spans = [{"version": self.server.weights, "start": 0, "end": len(tokens)}] if is_last else None
        return {
            "index": 0, "finish_reason": reason if is_last else None, "token_ids": tokens, "weight_versions": spans,
            "logprobs": {"content": content},
        }  # fmt: skip

    def stream(self, body: dict[str, Any]) -> None:
        server, prompt, params = self.server, tuple(body["token_ids"]), body["sampling_params"]
        cached = server.find_cached(body["cache_salt"], prompt)
        tokens = [*written(server.answer(TOKENIZER.decode(prompt))), END]
        stop = next((i for i, token in enumerate(tokens) if token in params["stop_token_ids"]), len(tokens))
        tokens = tokens[: stop + 1][: params["max_tokens"]]
        reason = "stop" if tokens[-1] in params["stop_token_ids"] else "length"
        self.send_response(200)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        error = grammar_error(params.get("structured_outputs"), tokens)
        if error:
            self.event({"error": {"message": error, "code": 400}})
        for number, token in enumerate([] if error else tokens):
            if number == server.dies_after:
                self.close_connection = True
                return  # without the end of the chunks
            if number == server.holds_after and not self.wait(body):
                return
            self.event({"usage": None, "choices": [self.choice(body, [token], number + 1 == len(tokens), reason)]})
        usage = {"prompt_tokens": len(prompt), "prompt_tokens_details": {"cached_tokens": cached}}
        self.event({"choices": [], "usage": usage})
        self.wfile.write(b"e\r\ndata: [DONE]\n\n\r\n0\r\n\r\n")

    def event(self, event: dict[str, Any]) -> None:
        data = f"data: {json.dumps(event)}\n\n".encode()
        self.wfile.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")

    def wait(self, body: dict[str, Any]) -> bool:
        """Wait for `go`. Returns whether the client is still there."""
        self.connection.setblocking(False)
        deadline = time.monotonic() + HANG_SECONDS
        while not self.server.go.wait(0.005) and time.monotonic() < deadline:
            try:
                is_gone = self.connection.recv(1) == b""
            except BlockingIOError:
                is_gone = False
            if is_gone:
                self.server.aborted.append(body["request_id"])
                self.close_connection = True
                return False
        self.connection.setblocking(True)
        return True


def answer(prompt: str) -> str:
    """Thinking, if the prompt does not end it, and an answer."""
    return "It is Paris." if prompt.endswith("</think>") else "Paris, I think.</think>It is Paris."


@functools.cache
def checkpoint() -> Path:
    """A checkpoint folder without its weights."""
    folder = Path(tempfile.mkdtemp(prefix="thinkstack-"))
    atexit.register(shutil.rmtree, folder)
    save_model(folder, tiny_model(replace(GQA_TINY, vocab_size=TOKENIZER.vocab_size)), TOKENIZER, "v3_1_think")
    (folder / "model.safetensors").unlink()
    return folder


def attach(*servers: FakeVllm, **settings: Any) -> Member:
    """A member on these servers, which are checked often. settings: fields of MemberConfig."""
    addresses = tuple(server.address for server in servers)
    config = MemberConfig(model=str(checkpoint()), servers=addresses, **settings)
    return attach_member("default", config, load_chat(config.model), check_seconds=0.05)


def grammar_error(params: dict[str, Any] | None, tokens: list[int]) -> str:
    """Why vLLM's guidance backend would refuse these structured outputs, or not sample these tokens with them."""
    if params is None:
        return ""
    if "json" in params:
        grammar = LLMatcher.grammar_from_json_schema(params["json"], defaults={"whitespace_flexible": True})
    else:
        grammar = llguidance.grammar_from("grammar", params["grammar"])
    if error := LLMatcher.validate_grammar(grammar, None):
        return f"Grammar error: {error}"
    matcher, text = LLMatcher(MATCHER_TOKENIZER, grammar), [token for token in tokens if token != END]
    is_allowed = matcher.try_consume_tokens(text) == len(text) and matcher.is_accepting()
    return "" if is_allowed else "the grammar does not allow the script"
