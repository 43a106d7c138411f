"""A bandit: the smallest thing that GRPO can learn, driven through the real engine, trainer and stage."""

import random

from thinkstack.rl.config import RLConfig
from thinkstack.train.optim import OptimConfig
from thinkstack.train.policy_loss import PolicyLossConfig
from thinkstack.train.trainer_config import TrainerConfig
from thinkstack.types import Message, Problem, Score

ARMS = 8
BOS, EOS = 0, 1


class ArmChat:
    """Token 2 + d writes the digit d; a completion is the digits sampled before the end token."""

    name, prefill, stop_token_ids = "arms", "", (EOS,)

    def prompt(self, messages: list[Message]) -> list[int]:
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
            question=str(arm),
            answer=str(self.right[arm]),
            task="arm",
            language="en",
            level=1,
            key=str(arm),
            wording=0,
        )

    def state(self) -> dict[str, int]:
        return {"position": self.position}

    def restore(self, state: dict[str, int]) -> None:
        self.position = state["position"]


def arm_score(problem: Problem, text: str) -> Score:
    """1 for exactly the right digit."""
    right = float(text == problem.answer)
    return Score(total=right, parts={"accuracy": right, "format": float(len(text) == 1)})


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
