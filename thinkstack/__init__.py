"""thinkstack: build, train, measure and serve the DeepSeek family. torch is imported when a name below is first
used.
"""

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
"""How often a thread of OpenMP looks at a barrier before it sleeps. libgomp's own 300,000 are milliseconds of a core
that other programs could use, the thread it waits for among them. Measured by bench/shared_cores.py."""
SPIN_SET_TOO_LATE = False
"""torch was imported before, and OpenMP has read its settings."""

if not {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"} & os.environ.keys():
    os.environ["GOMP_SPINCOUNT"] = SPIN_COUNT
    SPIN_SET_TOO_LATE = "torch" in sys.modules
if not {"KMP_BLOCKTIME", "OMP_WAIT_POLICY"} & os.environ.keys():
    os.environ["KMP_BLOCKTIME"] = "1"  # milliseconds; LLVM's and Intel's OpenMP, by themselves 200

_HOMES = {
    "load_model": "thinkstack.checkpoint.model",
    "Engine": "thinkstack.engine.engine",
    "ChatFormat": "thinkstack.text.chat",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
