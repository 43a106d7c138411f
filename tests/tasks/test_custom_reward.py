"""User-defined parts of the reward in a Python file that a recipe names."""

import re
from pathlib import Path

import pytest

from tests.problems import make_problem, scored
from thinkstack.config import build
from thinkstack.pipeline.graph import plan_stages
from thinkstack.pipeline.recipe import read_recipe
from thinkstack.tasks.custom_reward import load_reward
from thinkstack.tasks.reward import RewardConfig
from thinkstack.types import ConfigError

RIGHT = "<think>\n1+2=3\n</think>\n<answer>3</answer>"
README = Path(__file__).parents[2] / "README.md"


SUM = make_problem("1+2?", "3", "sums")


def written(tmp_path: Path, code: str) -> str:
    path = tmp_path / "mine.py"
    path.write_text(code, encoding="utf-8")
    load_reward.cache_clear()
    return f"{path}:part"


def test_a_user_part_is_added_with_its_weight_and_reported_by_name(tmp_path):
    name = written(tmp_path, "def part(problem, response):\n    return len(problem.answer) / 4\n")
    found = scored(SUM, RIGHT, parts={"accuracy_if_formatted": 1.0, name: 0.5})
    assert found.total == 1.125 and found.parts[name] == 0.25


def test_the_reward_of_the_readme_can_be_named_in_a_recipe(tmp_path):
    (code,) = re.findall(r"```python\n(# my_rewards.py.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    path = tmp_path / "my_rewards.py"
    path.write_text(code)
    load_reward.cache_clear()
    steps = plan_stages(read_recipe("demo", "smoke", (f"stages.zero.reward={path}:short",)), tmp_path)
    zero = next(step for step in steps if step.name == "zero")
    assert zero.config.reward.parts == {"accuracy_if_formatted": 1.0, f"{path}:short": 1.0}
    assert scored(SUM, RIGHT, parts=zero.config.reward.parts).parts[f"{path}:short"] == 1.0
    path.write_text(code + "\n# changed\n")
    again = plan_stages(read_recipe("demo", "smoke", (f"stages.zero.reward={path}:short",)), tmp_path)
    assert next(step for step in again if step.name == "zero").fingerprint != zero.fingerprint


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("def other(problem, response):\n    return 1\n", "has no function part; it has other"),
        ("import nothing_of_that_name\n", "importing .* failed .ModuleNotFoundError"),
        ("def part(:\n", "importing .* failed .SyntaxError"),
        ("part = 3\n", "has no function part"),
        ("raise SystemExit\n", "importing .* failed .SystemExit"),
    ],
)
def test_a_file_without_the_function_is_refused_before_anything_runs(tmp_path, code, message):
    with pytest.raises(ConfigError, match=message):
        build(RewardConfig, {"parts": {written(tmp_path, code): 1.0}})


@pytest.mark.parametrize("name", ["mine.py", "mine:part", "mine.py:", "none.py:part", "mine.py:a-b"])
def test_a_name_that_is_not_a_function_in_a_file_is_refused(name):
    with pytest.raises(ConfigError, match=re.escape(repr(name))):
        RewardConfig(parts={name: 1.0})


@pytest.mark.parametrize("value", ["None", "'1'", "float('nan')", "float('inf')", "1 / 0", "[1]"])
def test_a_response_without_a_number_is_unscorable_with_the_name_of_the_part(tmp_path, value):
    name = written(tmp_path, f"def part(problem, response):\n    return {value}\n")
    reason = scored(SUM, RIGHT, parts={name: 1.0}).unscorable or ""
    assert reason.startswith(f"{name}: ") and (
        "not a finite number" in reason or "ZeroDivisionError in line 2" in reason
    )
