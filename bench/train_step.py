"""A training step against transformers: `python bench/train_step.py [--dtype fp32] [--compiled] [--json FILE]`.

Measured on both sides, on the same weights and the same rows of tokens, each row one document, on the same cores:
forward pass, mean cross-entropy of all next tokens, backward pass, gradient norm, clipping, fused AdamW. Not in the
step: data, multi-token prediction, expert balance. Ours is Trainer.step with one worker a core; transformers uses all
cores for each product, once as it comes and once with the fastest of its attention and expert implementations. In bf16
ours keeps fp32 weights, gradients and moments and computes products in bf16. "autocast": transformers does the same,
the usual way. "bf16 weights": transformers runs wholly in bf16, weights and moments too, which is less work and loses
small updates. Both eager, or both compiled. With --dense the peer is our own dense model of equal active size.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import thinkstack  # noqa: F401  # before torch: it says how threads wait

# isort: split
import torch
from common import DEFAULT, Comparison, arguments, compare, fastest, print_comparisons, twins, write_json
from floor import peak_gflops

from thinkstack.machine import prepare_machine
from thinkstack.models.config import MLAConfig, ModelConfig, MoEConfig, named
from thinkstack.models.counts import count_active_parameters, flops_per_token
from thinkstack.models.transformer import Transformer
from thinkstack.train.loss import next_token_loss
from thinkstack.train.optim import OptimConfig
from thinkstack.train.trainer import Trainer
from thinkstack.train.trainer_config import TrainerConfig
from thinkstack.types import Batch

CLIP_NORM = 1.0
RATE = 1e-9
"""Learning rate: small, so that both sides stay on the same loss."""
EXPERTS = ("eager", "grouped_mm")
"""transformers' batched_mm copies an expert per token and choice: gigabytes at these batches."""


@dataclass(frozen=True)
class Shape:
    """A model and a batch."""

    cfg: ModelConfig
    rows: int
    tokens: int
    """Predictions per row."""


SHAPES_MEASURED = {
    "v3-tiny": Shape(named("v3-tiny", mtp_layers=0), 16, 256),
    "hidden 256, 8 layers, 32 experts top-4": Shape(
        ModelConfig(
            family="deepseek_v3",
            vocab_size=2048,
            hidden_size=256,
            num_layers=8,
            attention=MLAConfig(
                num_heads=8, q_lora_rank=128, kv_lora_rank=96, qk_nope_head_dim=32, qk_rope_head_dim=32, v_head_dim=32
            ),
            intermediate_size=768,
            moe=MoEConfig(
                num_experts=32,
                num_experts_per_tok=4,
                moe_intermediate_size=128,
                num_groups=8,
                top_groups=4,
                route_scale=1.0,
            ),
            max_positions=512,
            init_std=0.05,
        ),
        8,
        256,
    ),
}


def random_rows(shape: Shape) -> torch.Tensor:
    """Token ids (rows, tokens + 1)."""
    generator = torch.Generator().manual_seed(1)
    return torch.randint(shape.cfg.vocab_size, (shape.rows, shape.tokens + 1), generator=generator)


def our_step(
    model: Transformer, ids: torch.Tensor, dtype: Literal["fp32", "bf16"], workers: int, compiled: bool
) -> Callable[[], float]:
    """One step of our trainer; returns the loss."""
    rows, tokens = ids.shape[0], ids.shape[1] - 1
    batch = Batch(
        ids=ids[:, :-1].contiguous(),
        targets=ids[:, 1:].contiguous(),
        positions=torch.arange(tokens).repeat(rows, 1),
        document_ids=torch.arange(1, rows + 1).unsqueeze(1).repeat(1, tokens),
        loss_mask=torch.ones(rows, tokens),
    )
    cfg = TrainerConfig(
        optim=OptimConfig(learning_rate=RATE, clip_norm=CLIP_NORM),
        dtype=dtype,
        compile=compiled,
        micro_batch_tokens=-(-rows // workers) * tokens,
        workers=workers,
        balance_weight=0.0,
        bias_speed=0.0,
    )
    trainer = Trainer(model, cfg, total_steps=1)
    return lambda: trainer.step(batch, next_token_loss)["loss/next_token_nats"]


def their_step(model: Any, ids: torch.Tensor, autocast: bool, compiled: bool) -> Callable[[], float]:
    """One step of transformers; returns the loss."""
    forward = torch.compile(model) if compiled else model
    read, predicted = ids[:, :-1].contiguous(), ids[:, 1:].contiguous()
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, betas=(0.9, 0.95), weight_decay=0.1, fused=True)

    def step() -> float:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = forward(input_ids=read, labels=read, shift_labels=predicted, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP_NORM)
        optimizer.step()
        value = loss.item()
        model.zero_grad(set_to_none=True)
        return value

    return step


def measure(name: str, shape: Shape, args: Any) -> list[Comparison]:
    """Ours against the twin that transformers builds by default, and against its fastest one."""
    model = Transformer(shape.cfg).initialize(torch.Generator().manual_seed(0))
    ids = random_rows(shape)
    peak = peak_gflops(torch.bfloat16 if args.dtype == "bf16" else torch.float32)
    operations = 3 * flops_per_token(shape.cfg, shape.tokens // 2) * shape.rows * shape.tokens
    ours = our_step(model, ids, args.dtype, args.threads, args.compiled)
    found = []
    for arrangement in ("autocast", "bf16 weights") if args.dtype == "bf16" else ("fp32",):
        candidates = twins(model, torch.bfloat16 if arrangement == "bf16 weights" else torch.float32, EXPERTS)
        peers = {
            kind: their_step(twin, ids, arrangement == "autocast", args.compiled) for kind, twin in candidates.items()
        }
        for label, kind in {"default": DEFAULT, "fastest": fastest(peers)}.items():
            losses = ours(), peers[kind]()
            if abs(losses[0] - losses[1]) > 0.02 * losses[1]:
                raise RuntimeError(f"the steps differ: loss {losses[0]:.4f} ours, {losses[1]:.4f} transformers")
            print(f"{name}: loss {losses[0]:.4f} ours, {losses[1]:.4f} {kind}; {operations / 1e9:.1f} GFLOP")
            full = f"{name}, peer {arrangement}, {label}"
            found.append(compare(full, ours, peers[kind], args.pairs, floor_seconds=operations / peak / 1e9))
    return found


def measure_dense(name: str, shape: Shape, args: Any) -> Comparison:
    """Ours with experts against our own dense model of as many active parameters; a ratio of 1 / 1.5 is 1.5 as slow."""
    moe = shape.cfg.moe
    assert moe is not None
    layers, first = shape.cfg.num_layers, moe.first_dense_layers
    width = moe.num_experts_per_tok * moe.moe_intermediate_size + moe.shared_size
    dense = replace(
        shape.cfg,
        moe=None,
        intermediate_size=round((first * shape.cfg.intermediate_size + (layers - first) * width) / layers),
    )
    ids = random_rows(shape)
    steps = [
        our_step(
            Transformer(cfg).initialize(torch.Generator().manual_seed(0)), ids, args.dtype, args.threads, args.compiled
        )
        for cfg in (shape.cfg, dense)
    ]
    active = [count_active_parameters(cfg) for cfg in (shape.cfg, dense)]
    print(f"{name}: {active[0]:,} active parameters with experts, {active[1]:,} dense")
    return compare(f"{name}, experts against dense", *steps, args.pairs)


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--pairs", type=int, default=9)
    parser.add_argument("--dtype", choices=("bf16", "fp32"), default="bf16")
    parser.add_argument("--compiled", action="store_true", help="torch.compile on both sides")
    parser.add_argument("--shapes", nargs="+", choices=SHAPES_MEASURED, default=list(SHAPES_MEASURED))
    parser.add_argument("--dense", action="store_true", help="against our own dense model instead")
    args = parser.parse_args()
    prepare_machine(args.threads)
    found = []
    for name in args.shapes:
        shape = SHAPES_MEASURED[name]
        found += [measure_dense(name, shape, args)] if args.dense else measure(name, shape, args)
    how = "torch.compile" if args.compiled else "eager"
    print_comparisons(f"training step, {args.dtype}, {how}; floor: its operations at the peak of floor.py", found)
    write_json(args.json, found)


if __name__ == "__main__":
    main()
