"""How much a newcomer reads: files and lines of the functions that run for one decoded token, one training step and one
RL step, after a warm-up: `python bench/read_along.py [--files]`; with THINKSTACK_KERNELS=0 on torch's operators alone.
"""

import argparse
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import thinkstack
from thinkstack.checkpoint.model import load_chat, load_model, save_model
from thinkstack.data import Example, PackedStream
from thinkstack.engine.engine import Engine, EngineConfig
from thinkstack.log import Run
from thinkstack.models.config import named
from thinkstack.models.transformer import Transformer
from thinkstack.rl.config import RLConfig
from thinkstack.rl.trainer import RLTrainer
from thinkstack.tasks.puzzles.generated import alternate
from thinkstack.tasks.table import make_tasks
from thinkstack.tasks.task import TaskConfig
from thinkstack.text.chat import chat_format
from thinkstack.text.tokenizer import train_tokenizer
from thinkstack.train.loss import next_token_loss
from thinkstack.train.trainer import Trainer
from thinkstack.train.trainer_config import TrainerConfig
from thinkstack.types import SamplingParams

import torch  # isort: skip  # after thinkstack, which sets up its threads

PACKAGE = Path(thinkstack.__file__).parent


def functions_of(work: Callable[[], Any]) -> set[CodeType]:
    """Code of the package's functions that run in `work`, in this thread."""
    found: set[CodeType] = set()

    def note(frame: FrameType, event: str, argument: Any) -> None:
        if event == "call" and Path(frame.f_code.co_filename).is_relative_to(PACKAGE):
            found.add(frame.f_code)

    sys.setprofile(note)
    try:
        work()
    finally:
        sys.setprofile(None)
    return found


def lines_of(functions: set[CodeType]) -> set[tuple[str, int]]:
    """(file, line) of all lines of these functions."""
    return {
        (code.co_filename, line)
        for code in functions
        for line in range(code.co_firstlineno, max(end or 0 for *_, end in code.co_lines()) + 1)
    }


def works(folder: Path) -> dict[str, Callable[[], Any]]:
    """The three pieces of work, each run once before."""
    torch.set_num_threads(1)
    tasks = make_tasks(dict.fromkeys(("chain", "cups"), TaskConfig()))
    questions = [problem.question for problem in alternate(list(tasks.values()), "train", 0).take(200)]
    tokenizer = train_tokenizer(questions, 300)
    chat = chat_format("r1_zero_short", tokenizer)
    model = Transformer(named("v3-tiny", vocab_size=tokenizer.vocab_size)).initialize(torch.Generator().manual_seed(0))
    save_model(folder / "model", model, tokenizer, chat)

    engine = Engine(model, EngineConfig())
    engine.submit(range(5, 40), SamplingParams(max_tokens=20))
    examples = [Example((1, *tokenizer.encode(text)), (0, *[1] * len(tokenizer.encode(text)))) for text in questions]
    stream, trainer = PackedStream(lambda index: examples[index % 200], 4, 64), Trainer(model, TrainerConfig(), 100)
    cfg = RLConfig(
        start=str(folder / "model"), steps=3, prompts_per_step=2, group_size=4, max_tokens=24, dynamic_sampling=False
    )
    rl = RLTrainer(cfg, Run(folder / "run"), load_model(cfg.start), load_chat(cfg.start))
    found = {
        "decoded token": engine.step,
        "training step": lambda: trainer.step(stream.take(), next_token_loss),
        "RL step": rl.step,
    }
    engine.step()
    for work in found.values():
        work()
    return found


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--files", action="store_true", help="list the files")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        for name, work in works(Path(folder)).items():
            functions = functions_of(work)
            files = sorted({str(Path(code.co_filename).relative_to(PACKAGE)) for code in functions})
            print(f"{name}: {len(files)} files, {len(lines_of(functions))} lines of functions")
            if args.files:
                print(*(f"  {file}" for file in files), sep="\n")


if __name__ == "__main__":
    main()
