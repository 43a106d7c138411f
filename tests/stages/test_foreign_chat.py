"""Stages on somebody else's checkpoint: what it says of its conversations must come out of them again."""

from pathlib import Path

from tests.tiny import tiny_model, tiny_tokenizer
from thinkstack.checkpoint.model import load_chat, load_model, save_model
from thinkstack.checkpoint.state import MODEL
from thinkstack.log import Run
from thinkstack.rl.config import RLConfig
from thinkstack.stages.rl import train_rl
from thinkstack.text.chat import TemplateFormat
from thinkstack.text.tokenizer import BOS, EOS
from thinkstack.train.trainer_config import TrainerConfig
from thinkstack.types import Message

SHIPPED = "{{ bos_token }}{% for m in messages %}{{ '<｜User｜>' + m['content'] }}{% endfor %}{{ '<｜Assistant｜>' }}"


def test_a_shipped_template_survives_reinforcement_learning(tmp_path: Path):
    """Its name was saved as one of our formats: the run ended in an error after its last step."""
    tokenizer = tiny_tokenizer()
    model = tiny_model(vocab_size=tokenizer.vocab_size, max_positions=256)
    save_model(tmp_path / "base", model, tokenizer, TemplateFormat(tokenizer, SHIPPED, BOS, EOS))
    cfg = RLConfig(
        start=str(tmp_path / "base"),
        steps=1,
        prompts_per_step=2,
        group_size=2,
        max_tokens=4,
        dynamic_sampling=False,
        eval_steps=0,
        save_steps=0,
        trainer=TrainerConfig(bias_speed=0.0),
    )
    train_rl(cfg, Run(tmp_path / "run"))
    asked = [Message(role="user", content="3+4")]
    assert isinstance(load_chat(tmp_path / "run" / MODEL), TemplateFormat)
    assert load_chat(tmp_path / "run" / MODEL).prompt(asked) == load_chat(tmp_path / "base").prompt(asked)
    assert load_model(tmp_path / "run" / MODEL).cfg == model.cfg
