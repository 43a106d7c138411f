"""thinkstack: build, train, measure and serve the DeepSeek family. torch is imported when a name below is first
used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from thinkstack.checkpoint.model import load_model
    from thinkstack.engine.engine import Engine
    from thinkstack.text.chat import ChatFormat

__version__ = "0.1.0"
__all__ = ["ChatFormat", "Engine", "__version__", "load_model"]

_HOMES = {
    "load_model": "thinkstack.checkpoint.model",
    "Engine": "thinkstack.engine.engine",
    "ChatFormat": "thinkstack.text.chat",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
