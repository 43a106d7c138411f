"""User-defined parts of a reward: functions in Python files that a recipe names.

The file must be as trusted as the recipe: it is imported into this process, which checks the function, and into the
processes of the VerifierPool, which call it.
"""

import functools
import importlib.util
import inspect
import math
import numbers
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

from thinkstack.tasks.verify.pool import unscorable
from thinkstack.types import ConfigError, Problem, Response, Score

RewardFunction = Callable[[Problem, Response], float]
"""(problem, response) -> a number, usually from 0 to 1."""


@functools.cache
def load_reward(name: str) -> RewardFunction:
    """Return the function `name`, given as PATH.py:FUNCTION. Raises ConfigError if it is missing or its file fails."""
    path, separator, function = name.rpartition(":")
    if not separator or not path.endswith(".py") or not function.isidentifier():
        raise ConfigError(f"reward {name!r} does not name a function in a file; write it as PATH.py:FUNCTION")
    if not Path(path).is_file():
        raise ConfigError(f"reward {name!r}: there is no file {path}; paths are relative to the working directory")
    module_name = f"thinkstack_reward_{Path(path).stem}"
    spec = importlib.util.spec_from_file_location(module_name, path)
    assert spec is not None and spec.loader is not None, "a path that ends in .py has a loader"
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:  # the user's file may raise anything; report it in one line
        raise ConfigError(f"reward {name!r}: importing {path} failed ({type(error).__name__}: {error})") from error
    found = getattr(module, function, None)
    if not callable(found):
        known = ", ".join(key for key, value in vars(module).items() if callable(value) and not key.startswith("_"))
        raise ConfigError(f"reward {name!r}: {path} has no function {function}; it has {known or 'none'}")
    try:
        inspect.signature(found).bind(None, None)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"reward {name!r} must accept the arguments (problem, response): {error}") from error
    return found


def call_reward(name: str, problem: Problem, response: Response) -> Score:
    """Call the reward function `name`; unscorable if it fails or does not return a finite number."""
    try:
        value = load_reward(name)(problem, response)
    except Exception as error:  # the boundary: whatever the user's function raises becomes the reason
        line = traceback.extract_tb(error.__traceback__)[-1].lineno
        return unscorable(f"{type(error).__name__} in line {line}: {error}")
    if isinstance(value, numbers.Real) and math.isfinite(value):
        return Score(total=float(value))
    return unscorable(f"returned {value!r}, not a finite number")
