"""Parts of a reward that a person writes: a function in a Python file of their own, named in a recipe.

The file is code of the person who runs the recipe, as the recipe itself: it is imported into this process.
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
"""(problem, text of the assistant's turn) to a number, usually from 0 to 1."""


@functools.cache
def load_reward(name: str) -> RewardFunction:
    """The function that `name` means: PATH.py:FUNCTION. Raises ConfigError where there is none, or its file fails."""
    path, separator, function = name.rpartition(":")
    if not separator or not path.endswith(".py") or not function.isidentifier():
        raise ConfigError(f"reward {name!r} is no function in a file; write it as PATH.py:FUNCTION")
    if not Path(path).is_file():
        raise ConfigError(f"reward {name!r}: there is no file {path}; paths count from the folder the command runs in")
    module_name = f"thinkstack_reward_{Path(path).stem}"
    spec = importlib.util.spec_from_file_location(module_name, path)
    assert spec is not None and spec.loader is not None, "a path that ends in .py has a loader"
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:  # whatever the file of a person raises is said in one line
        raise ConfigError(f"reward {name!r}: importing {path} failed ({type(error).__name__}: {error})") from error
    found = getattr(module, function, None)
    if not callable(found):
        known = ", ".join(key for key, value in vars(module).items() if callable(value) and not key.startswith("_"))
        raise ConfigError(f"reward {name!r}: {path} has no function {function}; it has {known or 'none'}")
    try:
        inspect.signature(found).bind(None, "")
    except (TypeError, ValueError) as error:
        raise ConfigError(f"reward {name!r} must take (problem, text): {error}") from error
    return found


def custom_part(name: str, problem: Problem, text: str) -> float:
    """The value that the function called `name` gives an answer. Raises TrainingError where it fails or gives no
    finite number."""
    try:
        value = load_reward(name)(problem, text)
    except Exception as error:
        line = traceback.extract_tb(error.__traceback__)[-1].lineno
        what = f"{type(error).__name__} in line {line}: {error}"
        raise TrainingError(f"reward {name!r} failed on {problem.question[:80]!r}: {what}") from error
    if isinstance(value, numbers.Real) and math.isfinite(value):
        return float(value)
    raise TrainingError(f"reward {name!r} gave {value!r} for {problem.question[:80]!r}; it must give a finite number")
