"""A training step against transformers: `python bench/train_step.py [--compiled] [--pairs 9] [--json FILE]`.

Measured on both sides, on the same weights and the same rows of tokens, each row one document, in bf16 with the same
number of threads: forward pass, mean cross-entropy of all next tokens, backward pass, gradient norm and clipping.
Not in the step: the optimizer, data, multi-token prediction, the balance loss. Ours keeps norms and routers in fp32 and
moves all gradients to fp32 before the norm, as the trainer does; transformers runs wholly in bf16, with the fastest of
its attention and expert implementations for the shape. Both eager, or with --compiled both through torch.compile.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from common import Comparison, arguments, compare, fastest, print_comparisons, twins, write_json
from floor import peak_gflops

from thinkstack.models.config import MLAConfig, ModelConfig, MoEConfig, named
from thinkstack.models.counts import flops_per_token
from thinkstack.models.precision import working_copy
from thinkstack.models.transformer import Transformer
from thinkstack.train.loss import next_token_loss, token_weights
from thinkstack.train.trainer import add_gradients, trained_tokens
from thinkstack.types import Batch

CLIP_NORM = 1.0
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
    "v3-tiny": Shape(named("v3-tiny", mtp_layers=0), 16, 128),
    "hidden 256, 8 layers, 32 experts top-4": Shape(
        ModelConfig(
            family="deepseek_v3",
            vocab_size=2048,
            hidden_size=256,
            num_layers=8,
            attention=MLAConfig(
                num_heads=8, q_lora_rank=128, kv_lora_rank=96, qk_nope_head_dim=32, qk_rope_head_dim=32, v_head_dim=32
            ),
            dense_size=768,
            moe=MoEConfig(num_experts=32, top_k=4, expert_size=128, num_groups=8, top_groups=4, route_scale=1.0),
            max_positions=512,
            init_std=0.05,
        ),
        8,
        256,
    ),
}


def drawn_rows(shape: Shape) -> torch.Tensor:
    """Token ids (rows, tokens + 1)."""
    generator = torch.Generator().manual_seed(1)
    return torch.randint(shape.cfg.vocab_size, (shape.rows, shape.tokens + 1), generator=generator)


def our_step(model: Transformer, ids: torch.Tensor, compiled: bool) -> Callable[[], float]:
    """One step of ours; returns the loss."""
    rows, tokens = ids.shape[0], ids.shape[1] - 1
    batch = Batch(
        ids=ids[:, :-1].contiguous(),
        targets=ids[:, 1:].contiguous(),
        positions=torch.arange(tokens).repeat(rows, 1),
        document_ids=torch.arange(1, rows + 1).unsqueeze(1).repeat(1, tokens),
        loss_mask=torch.ones(rows, tokens),
    )
    batch = batch.with_weights(token_weights(batch, "token"))
    trunk: Callable[..., Any] = torch.compile(model.trunk) if compiled else model.trunk

    def step() -> float:
        hidden = trunk(batch.ids, batch.positions, batch.document_ids).hidden
        loss, _ = next_token_loss(trained_tokens(model, hidden, batch, 1 / batch.ids.numel(), 1.0))
        loss.backward()
        gradients = [g for g in add_gradients(None, model) if g is not None]
        norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)))
        if norm > CLIP_NORM:
            torch._foreach_mul_(gradients, CLIP_NORM / norm)
        return loss.item()

    return step


def their_step(model: Any, ids: torch.Tensor, compiled: bool) -> Callable[[], float]:
    """One step of transformers; returns the loss."""
    forward = torch.compile(model) if compiled else model
    read, predicted = ids[:, :-1].contiguous(), ids[:, 1:].contiguous()

    def step() -> float:
        loss = forward(input_ids=read, labels=read, shift_labels=predicted, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP_NORM)
        value = loss.item()
        model.zero_grad(set_to_none=True)
        return value

    return step


def measure(name: str, shape: Shape, pairs: int, compiled: bool) -> Comparison:
    """Ours against the fastest twin."""
    model = Transformer(shape.cfg).initialise(torch.Generator().manual_seed(0))
    ids = drawn_rows(shape)
    ours = our_step(working_copy(model, torch.bfloat16, always=True), ids, compiled)
    peers = {kind: their_step(twin, ids, compiled) for kind, twin in twins(model, torch.bfloat16, EXPERTS).items()}
    kind = fastest(peers)
    losses = ours(), peers[kind]()
    if abs(losses[0] - losses[1]) > 0.02 * losses[1]:
        raise RuntimeError(f"the steps differ: loss {losses[0]:.4f} of ours, {losses[1]:.4f} of transformers")
    peak = peak_gflops(torch.bfloat16)
    operations = 3 * flops_per_token(shape.cfg, shape.tokens // 2) * shape.rows * shape.tokens
    print(f"{name}: loss {losses[0]:.4f} ours, {losses[1]:.4f} transformers ({kind}); {operations / 1e9:.1f} GFLOP")
    return compare(name, ours, peers[kind], pairs, floor_seconds=operations / peak / 1e9)


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--pairs", type=int, default=9)
    parser.add_argument("--compiled", action="store_true", help="torch.compile on both sides")
    parser.add_argument("--shapes", nargs="+", choices=SHAPES_MEASURED, default=list(SHAPES_MEASURED))
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    found = [
        measure(name, shape, args.pairs, args.compiled)
        for name, shape in SHAPES_MEASURED.items()
        if name in args.shapes
    ]
    how = "torch.compile" if args.compiled else "eager"
    print_comparisons(f"training step, bf16, {how}; floor: its operations at the bf16 peak of floor.py", found)
    write_json(args.json, found)


if __name__ == "__main__":
    main()
