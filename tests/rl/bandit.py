"""A bandit: the smallest thing that GRPO can learn, driven through the real engine, trainer and stage."""

import random
from collections.abc import Callable, Sequence

from thinkstack.rl.config import RLConfig
from thinkstack.tasks.reward import Reward, RewardConfig
from thinkstack.tasks.task import Task, TaskConfig
from thinkstack.train.optim import OptimConfig
from thinkstack.train.policy_loss import PolicyLossConfig
from thinkstack.train.trainer_config import TrainerConfig
from thinkstack.types import Message, Problem, Response, Score, Tool

ARMS = 8
BOS, EOS = 0, 1


class ArmChat:
    """Token 2 + d writes the digit d; a completion is the digits sampled before the end token."""

    name, prefill, stop_token_ids = "arms", "", (EOS,)

    def prompt(self, messages: Sequence[Message], tools: Sequence[Tool] = ()) -> list[int]:
        return [BOS, 2 + int(messages[-1].content)]

    def text_of(self, token_ids: tuple[int, ...]) -> str:
        return "".join(str(token - 2) for token in token_ids if token >= 2)


class ArmStream:
    """Problem i asks arm i % ARMS, whose right answer is another arm."""

    def __init__(self, seed: int):
        self.position = 0
        self.right = random.Random(seed).sample(range(ARMS), ARMS)

    def take(self, count: int) -> list[Problem]:
        start, self.position = self.position, self.position + count
        return [self.problem(index % ARMS) for index in range(start, self.position)]

    def problem(self, arm: int) -> Problem:
        return Problem(
            messages=(Message(role="user", content=str(arm)),),
            answer=str(self.right[arm]),
            task="arm",
            language="en",
            key=str(arm),
        )

    def state(self) -> dict[str, int]:
        return {"position": self.position}

    def restore(self, state: dict[str, int]) -> None:
        self.position = state["position"]


def verify_arm(problem: Problem, response: Response) -> Score:
    """1 for exactly the right digit."""
    return Score(total=float(response.text == problem.answer))


class ArmTask(Task):
    """The task of the bandit; `verify` is the given function."""

    name, cfg, chance = "arm", TaskConfig(), None

    def __init__(self, verify: Callable[[Problem, Response], Score]):
        self.verify = verify  # type: ignore[method-assign]


def arm_reward(verify: Callable[[Problem, Response], Score] = verify_arm) -> Reward:
    """The accuracy as reward, from this verifier."""
    return Reward(RewardConfig(parts={"accuracy": 1.0}), {"arm": ArmTask(verify)})


def arm_config(**changes: object) -> RLConfig:
    settings: dict[str, object] = {
        "start": "",
        "steps": 200,
        "prompts_per_step": 8,
        "group_size": 16,
        "max_tokens": 2,
        "row_tokens": 16,
        "eval_steps": 0,
        "rollout_steps": 0,
        "trainer": TrainerConfig(
            optim=OptimConfig(learning_rate=5e-3, weight_decay=0.0), dtype="fp32", bias_speed=0.0, mtp_weight=0.0
        ),
        "loss": PolicyLossConfig(),
    }
    return RLConfig(**(settings | changes))  # type: ignore[arg-type]
