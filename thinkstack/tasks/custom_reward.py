"""User-defined parts of a reward: functions in Python files that a recipe names.

The file must be as trusted as the recipe, since it is imported into this process.
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

from thinkstack.types import ConfigError, Problem, TrainingError

RewardFunction = Callable[[Problem, str], float]
"""(problem, text of the assistant's turn) -> a number, usually from 0 to 1."""


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
        inspect.signature(found).bind(None, "")
    except (TypeError, ValueError) as error:
        raise ConfigError(f"reward {name!r} must accept the arguments (problem, text): {error}") from error
    return found


def call_reward(name: str, problem: Problem, text: str) -> float:
    """Call the reward function `name`. Raises TrainingError if it fails or does not return a finite number."""
    try:
        value = load_reward(name)(problem, text)
    except Exception as error:
        line = traceback.extract_tb(error.__traceback__)[-1].lineno
        what = f"{type(error).__name__} in line {line}: {error}"
        raise TrainingError(f"reward {name!r} failed on {problem.question[:80]!r}: {what}") from error
    if isinstance(value, numbers.Real) and math.isfinite(value):
        return float(value)
    raise TrainingError(
        f"reward {name!r} returned {value!r} for {problem.question[:80]!r}; it must return a finite number"
    )
