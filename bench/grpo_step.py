"""A GRPO step against TRL: `python bench/grpo_step.py [--dtype fp32] [--steps 10] [--json FILE]`, with trl installed.

16 prompts x 8 answers x 64 new tokens, temperature 1, v3-tiny's shape without multi-token prediction, the same weights,
prompts, rewards (a hash of the text) and memory settings, no end token. Both sides draw, decode, score, compare within
groups, take log-probabilities, clip and step (AdamW); TRL's loss is its default one ("dapo": token mean, no KL term),
ours has the same reduction and also corrects for the engine's probabilities. TRL runs as it comes, without gradient
checkpointing (which would slow it down), and with the fastest of transformers' attention and expert implementations.
bf16: TRL's autocast over fp32 weights; ours trains in bf16 over fp32 weights and draws in fp32.
TRL drives: after each of its steps ours takes one, so that a machine that slows down slows both. The first pair does
not count.
"""

import contextlib
import hashlib
import io
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import tokenizers
import torch
from common import DEFAULT, Comparison, arguments, machine, print_comparisons, twins, write_json
from floor import peak_gflops

from thinkstack.engine.engine import Engine, EngineConfig
from thinkstack.machine import prepare_machine
from thinkstack.models.config import named
from thinkstack.models.counts import flops_per_token
from thinkstack.models.transformer import Transformer
from thinkstack.stages.groups import advantages_of, to_batch
from thinkstack.tasks.corpus import CorpusConfig, documents
from thinkstack.tasks.table import families
from thinkstack.text.tokenizer import EOS, Tokenizer, train_tokenizer
from thinkstack.train.loss import token_weights
from thinkstack.train.optim import OptimConfig
from thinkstack.train.policy_loss import PolicyLossConfig, policy_loss
from thinkstack.train.trainer import Trainer
from thinkstack.train.trainer_config import TrainerConfig
from thinkstack.types import Problem, Rollout, Sampling, Score

PROMPTS, GROUP, NEW_TOKENS, PROMPT_TOKENS = 16, 8, 64, 32
RATE = 1e-6
EXPERTS = ("eager", "grouped_mm")
"""transformers' batched_mm takes six times as long here."""
Times = dict[str, float]


def reward(text: str) -> float:
    """A number in 0..1 that depends on nothing but the text."""
    return hashlib.blake2b(text.encode(), digest_size=1).digest()[0] / 255


def our_step(model: Transformer, tokenizer: Tokenizer, prompts: list[list[int]], args: Any) -> Callable[[], Times]:
    """One step of ours; returns the seconds of its parts."""
    engine = Engine(model, EngineConfig(max_batch=PROMPTS * GROUP, max_context=PROMPT_TOKENS + NEW_TOKENS))
    tokens = PROMPTS * GROUP * (PROMPT_TOKENS + NEW_TOKENS)
    cfg = TrainerConfig(
        optim=OptimConfig(learning_rate=RATE, weight_decay=0.0),
        dtype=args.dtype,
        micro_tokens=tokens // args.threads,
        workers=args.threads,
        balance_weight=0.0,
        bias_speed=0.0,
    )
    trainer = Trainer(model, cfg, total_steps=1000)
    loss = PolicyLossConfig(reduction="token")
    nothing = Problem(question="", answer="", task="", language="en", level=0, key="", wording=0)

    def step() -> Times:
        start = time.perf_counter()
        samplings = [
            Sampling(max_tokens=NEW_TOKENS, n=GROUP, seed=1000 * trainer.step_count + place) for place in range(PROMPTS)
        ]
        groups = engine.generate(prompts, samplings)
        drawn = time.perf_counter()
        rollouts = [
            Rollout(
                problem=nothing,
                group_id=group,
                prompt_ids=tuple(prompt),
                completion=answer,
                score=Score(total=reward(tokenizer.decode(answer.token_ids))),
            )
            for group, (prompt, answers) in enumerate(zip(prompts, groups, strict=True))
            for answer in answers
        ]
        batch = to_batch(rollouts, advantages_of(rollouts, "standardised"), 2 * (PROMPT_TOKENS + NEW_TOKENS))
        batch = batch.with_weights(token_weights(batch, loss.reduction, NEW_TOKENS))
        trainer.step(batch, partial(policy_loss, cfg=loss), loss.temperature, with_entropy=True)
        engine.load_weights(trainer.weights(), version=trainer.step_count)
        done = time.perf_counter()
        lengths = {len(rollout.completion.token_ids) for rollout in rollouts}
        if lengths != {NEW_TOKENS}:
            raise RuntimeError(f"answers of {sorted(lengths)} tokens; both sides must draw {NEW_TOKENS}")
        return {"rollout": drawn - start, "update": done - drawn, "step": done - start}

    return step


def trl_config(folder: str, steps: int, dtype: str) -> Any:
    """TRL as it comes, with the shapes of this bench and without checkpointing of activations."""
    from trl import GRPOConfig

    return GRPOConfig(
        output_dir=folder,
        per_device_train_batch_size=PROMPTS * GROUP,
        num_generations=GROUP,
        max_completion_length=NEW_TOKENS,
        generation_kwargs={"min_new_tokens": NEW_TOKENS},
        max_steps=steps,
        learning_rate=RATE,
        lr_scheduler_type="constant",
        bf16=dtype == "bf16",
        gradient_checkpointing=False,
        use_cpu=True,
        shuffle_dataset=False,
        report_to="none",
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )


def trl_steps(
    model: Any, tokenizer: Tokenizer, prompts: Sequence[str], steps: int, dtype: str, after: Callable[[], None]
) -> list[Times]:
    """Seconds of TRL's steps; `after` is called after each."""
    from datasets import Dataset
    from transformers import PreTrainedTokenizerFast, TrainerCallback
    from trl import GRPOTrainer

    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer.from_str(tokenizer.spec), pad_token=EOS, eos_token=EOS
    )
    taken: list[Times] = []

    class Timed(GRPOTrainer):
        """The trainer with a clock around its generation."""

        def _generate(self, prompts: list) -> Any:
            start = time.perf_counter()
            found = super()._generate(prompts)
            taken[-1]["rollout"] = time.perf_counter() - start
            return found

    class Clock(TrainerCallback):
        """Times whole steps and lets the other side take its turn."""

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            taken[-1]["begin"] = taken[-1].get("begin", time.perf_counter())

        def on_step_end(self, *_: Any, **__: Any) -> None:
            last = taken[-1]
            last["step"] = time.perf_counter() - last.pop("begin")
            last["update"] = last["step"] - last["rollout"]
            after()
            taken.append({"begin": time.perf_counter()})

    with tempfile.TemporaryDirectory() as folder:
        trainer = Timed(
            model=model,
            reward_funcs=lambda completions, **_: [reward(text) for text in completions],
            args=trl_config(folder, steps, dtype),
            train_dataset=Dataset.from_dict({"prompt": list(prompts)}),
            processing_class=wrapped,
            callbacks=[Clock()],
        )
        taken.append({"begin": time.perf_counter()})
        with contextlib.redirect_stdout(io.StringIO()):  # its table of metrics
            trainer.train()
    return [times for times in taken if "step" in times]


def setting() -> tuple[Transformer, Tokenizer, list[str]]:
    """Weights, a tokenizer of their vocabulary, and prompts of exactly PROMPT_TOKENS tokens."""
    cfg = named("v3-tiny", mtp_layers=0)
    corpus = documents(families(("chain", "kinship")), CorpusConfig(), 0)
    texts = [f"{doc.question}\n{doc.text}" for doc, _ in zip(corpus, range(500), strict=False)]
    tokenizer = train_tokenizer(texts, cfg.vocab_size, ())
    model = Transformer(cfg).initialise(torch.Generator().manual_seed(0))
    long = [tokenizer.decode(tokenizer.encode(text * 4)[:PROMPT_TOKENS]) for text in texts]
    exact = [text for text in long if len(tokenizer.encode(text)) == PROMPT_TOKENS]
    return model, tokenizer, exact[:PROMPTS]


def measure(args: Any) -> list[Comparison]:
    """Ours against TRL with the twin that transformers builds by default, and with its fastest one."""
    model, tokenizer, prompts = setting()
    assert len(prompts) == PROMPTS
    candidates = twins(model, torch.float32, EXPERTS)
    ours = our_step(model, tokenizer, [tokenizer.encode(text) for text in prompts], args)
    tried = {
        kind: min(times["step"] for times in trl_steps(twin, tokenizer, prompts, 2, args.dtype, lambda: None))
        for kind, twin in candidates.items()
    }
    print("TRL's step, least of two [s]:", {kind: round(best, 2) for kind, best in tried.items()})
    whole = PROMPTS * GROUP * (PROMPT_TOKENS + NEW_TOKENS) * flops_per_token(model.cfg, PROMPT_TOKENS)
    floors = {
        "rollout": whole / peak_gflops(torch.float32) / 1e9,
        "update": 3 * whole / peak_gflops(torch.bfloat16 if args.dtype == "bf16" else torch.float32) / 1e9,
    }
    floors["step"] = sum(floors.values())
    found = []
    for label, kind in {"default": DEFAULT, "fastest": min(tried, key=tried.__getitem__)}.items():
        mine: list[Times] = []

        def turn(mine: list[Times] = mine) -> None:
            mine.append(ours())

        theirs = trl_steps(candidates[kind], tokenizer, prompts, args.steps, args.dtype, turn)
        for part, floor in floors.items():
            a, b = ([times[part] for times in side[1:]] for side in (mine, theirs))
            ratios = [y / x for x, y in zip(a, b, strict=True)]
            found.append(
                Comparison(
                    name=f"{args.dtype} {part}, TRL {label}",
                    ours=statistics.median(a),
                    peer=statistics.median(b),
                    floor=floor,
                    ratio=statistics.median(ratios),
                    ratio_low=min(ratios),
                    n=len(a),
                    machine=machine(),
                    spread=f"ours {min(a):.3f} .. {max(a):.3f}, peer {min(b):.3f} .. {max(b):.3f}",
                )
            )
    return found


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--steps", type=int, default=10, help="pairs, the first of which does not count")
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32")
    args = parser.parse_args()
    prepare_machine(args.threads)
    found = measure(args)
    print_comparisons(f"GRPO step {PROMPTS} x {GROUP} x {NEW_TOKENS}, v3-tiny, {args.dtype}", found)
    write_json(args.json, found)


if __name__ == "__main__":
    main()
