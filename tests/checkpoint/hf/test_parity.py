"""Fifty random models of all families: logits and gradients against transformers, and the sensitivity of the bounds."""

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from thinkstack.models.config import GQAConfig, MLAConfig, ModelConfig
from thinkstack.models.transformer import Transformer

transformers = pytest.importorskip("transformers")
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()
from bench.parity import NUM_RANDOM, case_error, logit_error, opened, random_model, random_model_error  # noqa: E402
from bench.random_models import FAMILIES, PADDINGS, random_case  # noqa: E402

CASES = [random_case(number) for number in range(NUM_RANDOM)]


@pytest.mark.parametrize("number", range(NUM_RANDOM), ids=lambda number: f"{number}-{random_case(number).cfg.family}")
def test_logits_and_gradients_of_a_random_model_equal_transformers(number: int, tmp_path: Path):
    error = random_model_error(number, tmp_path / "model")
    assert error.is_within_bounds, (error, random_case(number))


def kinds(cfg: ModelConfig) -> set[str]:
    """Return the unusual features of a model."""
    a, rope = cfg.attention, cfg.rope
    found = {
        "odd heads": a.num_heads % 2 == 1 and a.num_heads > 1,
        "one head": a.num_heads == 1,
        "odd width": cfg.hidden_size % 2 == 1,
        "tied": cfg.tie_embeddings,
        "yarn": rope.yarn is not None,
        "llama3": rope.llama3 is not None,
        "linear": rope.linear_factor != 1,
        "mtp": cfg.mtp_layers > 0,
    }
    if isinstance(a, MLAConfig):
        found |= {
            "no q-lora": a.q_lora_rank == 0,
            "q-lora": a.q_lora_rank > 0,
            "unequal heads": a.v_head_dim != a.qk_head_dim,
            "half rotation": not rope.interleaved,
            "odd latent": a.kv_lora_rank % 2 == 1,
        }
    else:
        found |= {
            "grouped": a.num_heads > a.num_kv_heads,
            "heads apart from width": a.num_heads * a.head_dim != cfg.hidden_size,
            "biases": a.qkv_bias,
            "biases everywhere": a.qkv_bias and a.out_bias,
            "head norms": a.qk_norm,
        }
    if cfg.moe is not None:
        found |= {
            "groups": cfg.moe.top_groups < cfg.moe.num_groups,
            "several shared": cfg.moe.num_shared_experts > 1,
            "raw weights": not cfg.moe.norm_topk_prob,
            "dense below": cfg.moe.first_dense_layers > 0,
        }
    return {name for name, is_so in found.items() if is_so} | {cfg.family}


def test_the_random_models_have_every_feature_at_least_twice():
    seen = Counter(kind for case in CASES for kind in kinds(case.cfg) | {f"padding {case.padding}"})
    all_kinds = 8 + 5 + 5 + 4 + len(set(FAMILIES)) + len(PADDINGS)
    assert len(seen) == all_kinds and min(seen.values()) >= 2, seen


def case_with(kind: str) -> int:
    return next(number for number, case in enumerate(CASES) if kind in kinds(case.cfg))


def without(cfg: ModelConfig, kind: str) -> ModelConfig:
    """Return a model that misreads one setting."""
    if kind == "llama3":
        return replace(cfg, rope=replace(cfg.rope, llama3=None))
    if kind == "linear":
        return replace(cfg, rope=replace(cfg.rope, linear_factor=1.0))
    if kind == "raw weights":
        return replace(cfg, moe=replace(cfg.moe, norm_topk_prob=True))
    assert isinstance(cfg.attention, GQAConfig)
    change = {"biases": dict(qkv_bias=False), "head norms": dict(qk_norm=False)}[kind]
    return replace(cfg, attention=replace(cfg.attention, **change))


@pytest.mark.parametrize("kind", ["llama3", "linear", "raw weights", "biases", "head norms"])
@torch.no_grad()
def test_the_bounds_detect_misread_settings(kind: str):
    case = CASES[case_with(kind)]
    model = random_model(case.cfg)
    blind = Transformer(without(case.cfg, kind))
    blind.load_state_dict(model.state_dict(), strict=False)
    error = logit_error(blind(case.ids), model(case.ids))
    assert not error.is_within_bounds and error.relative > 1e-3


def spoilt(scale: float) -> Callable[[torch.nn.Module, object, torch.Tensor], torch.Tensor]:
    """A hook that keeps a layer's output and scales the gradient that flows back through it."""
    return lambda module, args, out: out * scale + (out * (1 - scale)).detach()


def test_the_bounds_detect_a_gradient_that_is_off_by_a_thousandth(tmp_path: Path):
    number = FAMILIES.index("llama")
    case = CASES[number]
    model = random_model(case.cfg, number)
    theirs = opened(model, tmp_path / "model")
    model.layers[-1].ffn.register_forward_hook(spoilt(1.001))
    error = case_error(case, model, theirs)
    assert error.logits.is_within_bounds and not error.is_within_bounds
    assert error.gradient == pytest.approx(1e-3, rel=0.1)


def test_a_case_depends_on_its_number_alone():
    again = random_case(7)
    assert again.cfg == CASES[7].cfg and torch.equal(again.ids, CASES[7].ids) and torch.equal(again.mask, CASES[7].mask)
    assert random_case(8).cfg != again.cfg
