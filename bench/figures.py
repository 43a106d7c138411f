"""The figures of docs/algorithms/mla.md, moe.md and mtp.md: `python bench/figures.py [--base FOLDER] [--zero FOLDER]`
(1 minute).

cache.png    bytes an engine keeps per token: V3's latents against keys and values of the same heads, by arithmetic;
             v3-tiny's from the memory its cache takes
experts.png  which experts of the base read which kind of document, in two languages, on held-out documents
drafts.png   how often the second token that the MTP module drafts is the one the model then takes, on answers to
             held-out problems: greedy (equal tokens) and sampled (the probability that speculative sampling accepts)
"""

import argparse
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from studies import panel, table

from thinkstack.checkpoint.model import load_chat, load_model
from thinkstack.data import Example, collate, pack
from thinkstack.engine.block_pool import BLOCK_SIZE
from thinkstack.engine.engine import Engine, EngineConfig
from thinkstack.engine.kv_cache import KVCache
from thinkstack.evals.plots import COLORS
from thinkstack.evals.runner import held_out_problems
from thinkstack.evals.sampling import EvalConfig
from thinkstack.machine import describe_machine, prepare_machine
from thinkstack.models.config import named
from thinkstack.models.counts import cache_bytes_per_token
from thinkstack.models.transformer import Transformer
from thinkstack.tasks.puzzles.puzzle import digest
from thinkstack.text.chat import ChatFormat
from thinkstack.train.balance import expert_counts
from thinkstack.types import Batch, SamplingParams

ROW_TOKENS = 256
IMAGES = Path("docs/images")


@dataclass(frozen=True)
class Answered:
    """Answers to problems of one kind."""

    family: str
    language: str
    samples: list[Example]
    """Prompt and answer; the answer's tokens are marked as learnt."""


def answers(model: Transformer, chat: ChatFormat, temperature: float, problems: int) -> list[Answered]:
    """What the model says to held-out problems, by family and language."""
    test_problems = held_out_problems(EvalConfig(num_problems=problems))
    prompts = [chat.prompt(problem.messages) for problem in test_problems]
    samplings = [
        SamplingParams(
            temperature=temperature,
            max_tokens=96,
            stop_token_ids=chat.stop_token_ids,
            seed=digest("figures", i) % 2**63,
        )
        for i in range(len(test_problems))
    ]
    engine = Engine(model, EngineConfig(max_num_seqs=64))
    sampled = [group[0].token_ids for group in engine.generate(prompts, samplings)]
    kinds: dict[tuple[str, str], list[Example]] = {}
    for problem, prompt, ids in zip(test_problems, prompts, sampled, strict=True):
        sample = Example((*prompt, *ids), (0,) * len(prompt) + (1,) * len(ids))
        kinds.setdefault((problem.task, problem.language), []).append(sample)
    return [Answered(*kind, samples) for kind, samples in sorted(kinds.items())]


def by_task(found: list[Answered]) -> dict[str, list[Example]]:
    """Samples of each family in both languages, and of all together."""
    names = sorted({kind.family for kind in found})
    parts = {name: [s for kind in found if kind.family == name for s in kind.samples] for name in names}
    return parts | {"all": [s for kind in found for s in kind.samples]}


def batch_of(samples: list[Example]) -> Batch:
    return collate(samples, pack(samples, ROW_TOKENS), ROW_TOKENS)


@torch.no_grad()
def expert_use(model: Transformer, found: list[Answered]) -> torch.Tensor:
    """Tokens sent to each expert relative to even use: (kinds, layers with experts, experts)."""
    rows = []
    for kind in found:
        batch = batch_of(kind.samples)
        routings = model.trunk(batch.ids, batch.positions, batch.document_ids).routing
        counts = torch.stack([expert_counts(routing, batch.document_ids > 0) for routing in routings])
        rows.append(counts / counts.mean(-1, keepdim=True))
    return torch.stack(rows)


@torch.no_grad()
def acceptance(model: Transformer, samples: list[Example]) -> tuple[float, float, int]:
    """Of the tokens drafted by the first MTP module for answers: (equal greedy choices, expected acceptance of
    speculative sampling at temperature 1: sum of min(draft, model)), and how many."""
    batch = batch_of(samples)
    trunk = model.trunk(batch.ids, batch.positions, batch.document_ids)
    (ahead, *_), _ = model.mtp_hidden_states(trunk, batch.ids)
    drafts = model.head(ahead[:, :-1]).float()  # at i: of token i + 2, where the model decides at i + 1
    takes = model.head(trunk.hidden[:, 1:]).float()
    counted = (batch.loss_mask[:, 1:] > 0) & (batch.document_ids[:, 1:] == batch.document_ids[:, :-1])
    same = (drafts.argmax(-1) == takes.argmax(-1))[counted].float().mean()
    shared = torch.minimum(F.softmax(drafts, -1), F.softmax(takes, -1)).sum(-1)[counted].mean()
    return float(same), float(shared), int(counted.sum())


def plot_cache() -> None:
    """Bytes per token in bf16."""
    v3 = named("v3-671b")
    heads, width, layers = 128, 128, v3.num_layers
    kinds = {
        "MHA, 128 heads": 2 * 2 * heads * width * layers,
        "GQA, 8 key/value heads": 2 * 2 * 8 * width * layers,
        "MLA": cache_bytes_per_token(v3),
    }
    tiny = named("v3-tiny")
    cache = KVCache(tiny, 64, torch.bfloat16)
    measured = cache.data.numel() * cache.data.element_size() / (64 * BLOCK_SIZE)
    assert measured == cache_bytes_per_token(tiny)
    rows = [{"V3's layers with": kind, "bytes per token": f"{value:,}"} for kind, value in kinds.items()]
    print(table([*rows, {"V3's layers with": "(v3-tiny, MLA, measured)", "bytes per token": f"{measured:,.0f}"}]))
    canvas = Figure(figsize=(7.2, 2.2), dpi=144, layout="constrained")
    axes = canvas.subplots()
    panel(canvas, axes, "What 61 layers keep of a token, bf16", "KB", "")
    bars = axes.barh(list(kinds), [value / 1000 for value in kinds.values()], color=COLORS[:3])
    axes.bar_label(bars, [f"{value / 1000:,.0f} KB" for value in kinds.values()], padding=4)
    axes.set_xlim(right=4_800)
    canvas.savefig(IMAGES / "cache.png")


def plot_experts(use: torch.Tensor, found: list[Answered]) -> None:
    """One map per layer."""
    layers = use.shape[1]
    canvas = Figure(figsize=(2.6 * layers + 1.4, 3.4), dpi=144, layout="constrained")
    canvas.patch.set_facecolor("white")
    for layer, axes in enumerate(canvas.subplots(1, layers, sharey=True)):
        image = axes.imshow(use[:, layer], cmap="RdBu_r", vmin=0, vmax=2, aspect="auto")
        axes.set_title(f"MoE layer {layer + 1}", fontsize=10)
        axes.set_xlabel("expert")
        axes.set_xticks(range(use.shape[2]))
        axes.set_yticks(range(len(found)), [f"{kind.family}, {kind.language}" for kind in found])
    canvas.colorbar(image, ax=canvas.axes, label="use relative to even")
    canvas.savefig(IMAGES / "experts.png")


def plot_drafts(rows: dict[str, dict[str, tuple[float, float, int]]]) -> None:
    """Acceptance by family, of each model."""
    canvas = Figure(figsize=(7.2, 3.2), dpi=144, layout="constrained")
    axes = canvas.subplots()
    panel(canvas, axes, "Second tokens that would be accepted", "", "share")
    series = [(name, index, how) for name in rows for index, how in ((0, "greedy"), (1, "sampled"))]
    for place, (name, index, how) in enumerate(series):
        tasks = rows[name]
        x = [i + (place - 1.5) * 0.2 for i in range(len(tasks))]
        accepted = [value[index] for value in tasks.values()]
        axes.plot(x, accepted, "o", markersize=8, color=COLORS[place], label=f"{name}, {how}")
    axes.set_xticks(range(len(tasks)), list(tasks))
    axes.set_ylim(0.8, 1)
    axes.axhspan(0.85, 0.90, color="#9aa0a8", alpha=0.3, linewidth=0, label="published for V3")
    axes.legend(frameon=True, ncols=3, loc="lower right", fontsize=8)
    canvas.savefig(IMAGES / "drafts.png")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, default=Path("runs/bench/seed1/base/model"))
    parser.add_argument("--zero", type=Path, default=Path("runs/bench/seed1/zero/model"))
    parser.add_argument("--problems", type=int, default=400)
    args = parser.parse_args()
    prepare_machine()
    plot_cache()
    drafts = {}
    for name, folder in {"base": args.base, "zero": args.zero}.items():
        model, chat = load_model(folder), load_chat(folder)
        greedy, sampled = (answers(model, chat, temperature, args.problems) for temperature in (0.0, 1.0))
        if name == "base":
            plot_experts(expert_use(model, sampled), sampled)
        chosen, sampled = by_task(greedy), by_task(sampled)
        drafts[name] = {
            family: (acceptance(model, chosen[family])[0], *acceptance(model, sampled[family])[1:])
            for family in sampled
        }
    plot_drafts(drafts)
    print(
        table(
            [
                {"model": name, "answers to": family, "greedy": f"{a:.3f}", "sampled": f"{b:.3f}", "tokens": n}
                for name, tasks in drafts.items()
                for family, (a, b, n) in tasks.items()
            ]
        )
    )
    print(describe_machine())


if __name__ == "__main__":
    main()
