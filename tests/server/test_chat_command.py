"""`thinkstack chat --url` as a process at a pseudo-terminal, against a server on a real socket."""

import json
import os
import pty
import re
import select
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import HANG_SECONDS
from tests.server.live import LiveServer, live
from tests.server.process import MAIN, ROOT
from tests.server.requests import ledger_rows, until

TERMINAL = f"import fcntl, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); {MAIN}"


class Terminal:
    """A process at a terminal of its own."""

    def __init__(self, *arguments: str, **environment: str):
        self._fd, inside = pty.openpty()
        self.process = subprocess.Popen(
            [sys.executable, "-c", TERMINAL, *arguments],
            stdin=inside,
            stdout=inside,
            stderr=inside,
            start_new_session=True,
            env=os.environ | {"PYTHONPATH": str(ROOT), "TERM": "dumb"} | environment,
        )
        os.close(inside)
        self.shown = ""

    def type(self, text: str) -> None:
        """Type keys."""
        os.write(self._fd, text.encode())

    def wait_for(self, text: str) -> str:
        """Read until a text is shown; returns what was shown before it."""
        while text not in self.shown:
            try:
                is_ready = select.select([self._fd], [], [], HANG_SECONDS)[0]
                new = os.read(self._fd, 65536).decode(errors="replace") if is_ready else ""
            except OSError:  # the process has ended
                new = ""
            assert new, f"{text!r} is not in {self.shown!r}"
            self.shown = re.sub(r"\x1b\[\d*m", "", self.shown + new.replace("\r\n", "\n"))
        before, _, self.shown = self.shown.partition(text)
        return before


def answer(prompt: str, index: int) -> str:
    """By the last question; the opening of the prompt says whether to think."""
    if "endless" in prompt:
        return "the tool says " * 2000
    content = "The king was there." if "explain why" in prompt else "The capital is Paris."
    return f"the sum</think>{content}" if prompt.endswith("<think>") else content


@pytest.fixture
def server(tmp_path: Path) -> Iterator[LiveServer]:
    with live(tmp_path / "data", answer, format="v3_1") as running:
        yield running


@pytest.fixture
def terminal(server: LiveServer) -> Iterator[Terminal]:
    found = Terminal("chat", "deepseek-chat", "--url", f"{server.url}/v1", OPENAI_API_KEY=server.key)
    yield found
    found.process.kill()
    found.process.wait()


def test_a_conversation_with_every_command(server, terminal, tmp_path):
    terminal.wait_for("deepseek-chat: type a question; /help lists the commands")
    terminal.type("What is the capital of France?\n")
    terminal.wait_for("The capital is Paris.")
    status = terminal.wait_for("cached)")
    usage = ledger_rows(server)[-1]
    assert f"({usage['completion_tokens']} tokens; " in status and "the sum" not in status
    terminal.type("/think\n")
    terminal.wait_for("thinking is on\n")
    terminal.type("Can you explain why?\n")
    assert "the sum" in terminal.wait_for("The king was there.")
    terminal.type("/model deepseek-reasonr\n")
    terminal.wait_for("did you mean deepseek-reasoner?")
    terminal.type("/model deepseek-reasoner\n/no-think\nCan you explain why?\n")
    terminal.wait_for("thinking is off\n")
    assert "the sum" not in terminal.wait_for("The king was there.")
    terminal.type(f"/save {tmp_path}/chat.json\n\n")
    terminal.wait_for("wrote 6 messages")
    assert terminal.process.wait() == 0
    saved = json.loads((tmp_path / "chat.json").read_text(encoding="utf-8"))
    assert saved["messages"][3] == {
        "role": "assistant",
        "reasoning_content": "the sum",
        "content": "The king was there.",
    }


def test_ctrl_c_stops_the_answer_on_the_server_and_the_conversation_goes_on(server, terminal):
    step = server.engine.step
    server.engine.step = lambda: (time.sleep(0.002), step())[1]  # as slow as a model
    service = server.server.models.members["default"].service
    terminal.type("endless\n")
    terminal.wait_for("the tool says the tool says")
    terminal.type("\x03")
    terminal.wait_for("(stopped)")
    until(lambda: not service.status.running)
    until(lambda: ledger_rows(server))
    assert ledger_rows(server)[-1]["completion_tokens"] < 8000
    terminal.type("What is the capital of France?\n")
    terminal.wait_for("cached)\n> ")
    terminal.type("\x04")
    assert terminal.process.wait() == 0


def test_an_error_of_the_server_is_shown_and_the_conversation_goes_on(terminal, tmp_path):
    messages = [{"role": "user", "content": "x " * 9000}, {"role": "assistant", "content": "yes"}]
    (tmp_path / "long.json").write_text(json.dumps({"messages": messages}), encoding="utf-8")
    terminal.type(f"/load {tmp_path}/long.json\nWhat is the capital of France?\n")
    assert "8,192" in terminal.wait_for("(status 400)")
    terminal.type("/new\nWhat is the capital of France?\n")
    terminal.wait_for("The capital is Paris.")


def test_a_wrong_key_is_an_error_in_one_line(server):
    terminal = Terminal("chat", "--url", server.url, "--api-key", "sk-wrong")
    assert "(status 401); give --api-key" in terminal.wait_for("set OPENAI_API_KEY") + "set OPENAI_API_KEY"
    assert terminal.process.wait() == 2
