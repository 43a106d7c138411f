"""Downloads by hub name from a fake hub on loopback: fetched files, resumed downloads, and errors."""

import hashlib
import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from tests import HANG_SECONDS
from tests.tiny import MLA_TINY, tiny_model, tiny_tokenizer
from thinkstack.checkpoint.hf.files import WEIGHTS
from thinkstack.checkpoint.hf.hub import is_hub_name
from thinkstack.checkpoint.model import load_chat, load_model, locate, save_model

COMMIT = "c0ffee" + "0" * 34
CUT = 30_000
"""Bytes of the weights that a connection sends before it breaks."""


class Hub(ThreadingHTTPServer):
    """The subset of the hub's protocol that a download needs."""

    def __init__(self, folder: Path):
        super().__init__(("127.0.0.1", 0), Answer)
        self.folder = folder
        self.asked: list[str] = []
        """Last part of the path of every GET."""
        self.breaks = 0
        """Number of further connections that break while they send the weights."""

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Answer(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        if self.command == "GET":
            self.server.asked.append(path.rpartition("/")[2])
        if "/gated/" in path:
            self.reply(403, b"{}", {"X-Error-Code": "GatedRepo", "X-Error-Message": "ask first"})
        elif "/lab/tiny" not in path:
            self.reply(404, b"{}", {"X-Error-Code": "RepoNotFound"})
        elif path.startswith("/api/") and "/tree/" in path:
            files = sorted(path for path in self.server.folder.rglob("*") if path.is_file())
            entries = [
                {"type": "file", "path": str(file.relative_to(self.server.folder)), "size": file.stat().st_size,
                 "oid": hashlib.sha1(file.read_bytes()).hexdigest()}
                for file in files
            ]  # fmt: skip
            self.reply(200, json.dumps(entries).encode())
        elif path.startswith("/api/"):
            self.reply(200, json.dumps({"id": "lab/tiny", "sha": COMMIT, "siblings": []}).encode())
        else:
            self.send_file(self.server.folder / path.partition(f"/resolve/{COMMIT}/")[2])

    def send_file(self, file: Path) -> None:
        if not file.is_file():
            self.reply(404, b"", {"X-Error-Code": "EntryNotFound"})
            return
        content = file.read_bytes()
        headers = {"ETag": f'"{hashlib.sha1(content).hexdigest()}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        start = int(self.headers["Range"].removeprefix("bytes=").partition("-")[0]) if "Range" in self.headers else 0
        if start:
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        is_cut = self.command == "GET" and file.name == WEIGHTS and self.server.breaks > 0
        self.server.breaks -= is_cut
        self.reply(206 if start else 200, content[start:], headers, is_cut)

    def reply(self, code: int, body: bytes, headers: dict[str, str] | None = None, cut: bool = False) -> None:
        self.send_response(code)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body[:CUT] if cut else body)
        if cut:
            self.wfile.flush()
            self.connection.shutdown(socket.SHUT_RDWR)
            self.close_connection = True


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    save_model(tmp_path / "published", tiny_model(MLA_TINY, vocab_size=384), tiny_tokenizer(), "v3")
    (tmp_path / "published" / "pytorch_model.bin").write_bytes(b"\x80\x04never fetched")
    (tmp_path / "published" / "original").mkdir()
    (tmp_path / "published" / "original" / "consolidated.safetensors").write_bytes(b"never fetched")
    server = Hub(tmp_path / "published")
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def ask(name: str, cache: Path, address: str, **settings: str) -> subprocess.CompletedProcess[str]:
    """Fetch in a separate process, which prints the folder: the library reads its settings when it is imported. It
    retries without delay."""
    code = (
        "import sys, time; time.sleep = lambda seconds: None\n"
        "from thinkstack.checkpoint.hf.hub import fetch\n"
        "from thinkstack.types import ConfigError\n"
        "try: print(fetch(sys.argv[1]))\n"
        "except ConfigError as error: sys.exit(str(error))"
    )
    kept = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    settings = {"HF_ENDPOINT": address, "HF_HOME": str(cache), "HF_HUB_DISABLE_XET": "1"} | settings
    return subprocess.run(
        [sys.executable, "-c", code, name], env=kept | settings, capture_output=True, text=True, timeout=HANG_SECONDS
    )


def test_a_name_is_fetched_once_without_pickles_or_other_folders(hub: Hub, tmp_path: Path):
    found = ask("lab/tiny", tmp_path / "cache", hub.address)
    folder = found.stdout.strip()
    assert load_model(folder).cfg.num_layers == 3 and load_chat(folder).name == "v3", found.stderr
    assert {WEIGHTS, "config.json", "tokenizer.json", "tokenizer_config.json"} <= set(hub.asked)
    assert not {"pytorch_model.bin", "consolidated.safetensors"} & set(hub.asked)
    offline = ask("lab/tiny", tmp_path / "cache", hub.address, HF_HUB_OFFLINE="1")
    assert offline.stdout == found.stdout, offline.stderr


def test_a_broken_connection_is_taken_up_again(hub: Hub, tmp_path: Path):
    hub.breaks = 1
    found = ask("lab/tiny", tmp_path / "cache", hub.address)
    assert load_model(found.stdout.strip()).cfg.num_layers == 3, found.stderr
    assert hub.asked.count(WEIGHTS) == 2


def test_an_interrupted_download_continues_with_the_missing_files(hub: Hub, tmp_path: Path):
    hub.breaks = 100
    broken = ask("lab/tiny", tmp_path / "cache", hub.address)
    assert broken.returncode == 1 and "run the same command again to fetch the missing files" in broken.stderr
    hub.breaks, hub.asked = 0, []
    found = ask("lab/tiny", tmp_path / "cache", hub.address)
    assert load_model(found.stdout.strip()).cfg.num_layers == 3, found.stderr
    assert WEIGHTS in hub.asked and not {"config.json", "tokenizer.json"} & set(hub.asked)


@pytest.mark.parametrize(
    ("name", "settings", "words"),
    [
        ("lab/unknown", {}, "neither a local folder nor a model of the hub"),
        ("gated/model", {}, "requires an agreement"),
        ("lab/tiny", {"HF_HUB_OFFLINE": "1"}, "the hub cannot be reached"),
        ("lab/tiny", {"HF_ENDPOINT": "http://127.0.0.1:9"}, "the hub cannot be reached"),
    ],
)
def test_hub_errors_are_reported_in_one_line(name: str, settings: dict[str, str], words: str, hub: Hub, tmp_path: Path):
    found = ask(name, tmp_path / "cache", hub.address, **settings)
    assert found.returncode == 1 and words in found.stderr.strip().splitlines()[-1]


def test_a_local_folder_takes_precedence_over_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "lab" / "tiny").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("thinkstack.checkpoint.model.fetch", lambda name: Path("cache") / name)
    assert locate("lab/tiny") == Path("lab/tiny") and locate("lab/other") == Path("cache/lab/other")


def test_only_two_plain_words_are_a_name_of_the_hub():
    assert is_hub_name("deepseek-ai/DeepSeek-V3") and is_hub_name("Qwen/Qwen2.5-0.5B")
    assert not any(map(is_hub_name, ("model", "a/b/c", "../model", "./model", "/model/x", "a/", "a/..")))
