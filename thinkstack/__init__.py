"""thinkstack: build, train, evaluate and serve DeepSeek-style models. torch is imported on first use of a name."""

import os
import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from thinkstack.checkpoint.model import load_model
    from thinkstack.engine.engine import Engine
    from thinkstack.text.chat import ChatFormat

__version__ = "0.1.0"
__all__ = ["ChatFormat", "Engine", "__version__", "load_model"]

SPIN_COUNT = "3000"
"""How often an OpenMP thread spins at a barrier before it sleeps. libgomp's default of 300,000 blocks a core for
milliseconds that other threads, also the awaited one, could use. Measured by bench/shared_cores.py."""
SPIN_SET_TOO_LATE = False
"""Whether torch was imported before, so that OpenMP has already read its settings."""

if not {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"} & os.environ.keys():
    os.environ["GOMP_SPINCOUNT"] = SPIN_COUNT
    SPIN_SET_TOO_LATE = "torch" in sys.modules
if not {"KMP_BLOCKTIME", "OMP_WAIT_POLICY"} & os.environ.keys():
    os.environ["KMP_BLOCKTIME"] = "1"  # milliseconds, for LLVM's and Intel's OpenMP; their default is 200

_MODULES = {
    "load_model": "thinkstack.checkpoint.model",
    "Engine": "thinkstack.engine.engine",
    "ChatFormat": "thinkstack.text.chat",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_MODULES[name]), name)
