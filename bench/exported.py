"""A checkpoint opened elsewhere: `python bench/exported.py MODEL [--prompts 40] [--tokens 64] [--kinds F32 BF16 Q8_0]`.

MODEL is written as a Hugging Face folder and as GGUF of each kind; transformers and llama.cpp open what was written and
answer held-out puzzles greedily. Counted are the answers equal, token for token up to the end token, to those of our
engine on MODEL. llama.cpp runs in the Python that THINKSTACK_LLAMA_CPP names, or in this one.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from common import arguments, machine, print_table

from thinkstack.checkpoint.convert import convert
from thinkstack.checkpoint.model import load_chat, load_model
from thinkstack.engine.engine import Engine, EngineConfig
from thinkstack.evals.runner import held_out_problems
from thinkstack.evals.sampling import EvalConfig
from thinkstack.machine import prepare_machine
from thinkstack.types import SamplingParams

LLAMA_CPP = """
import json, sys
from llama_cpp import Llama
job = json.loads(sys.stdin.read())
model = Llama(job["path"], n_ctx=1024, n_threads=1, n_threads_batch=1, logits_all=True, verbose=False, flash_attn=False,
              type_k=0, type_v=0)
answers = []
for prompt in job["prompts"]:
    model.reset()
    model.eval(prompt)
    answer = []
    while len(answer) < job["tokens"] and not (answer and answer[-1] in job["stops"]):
        answer.append(int(model.scores[model.n_tokens - 1].argmax()))
        model.eval(answer[-1:])
    answers.append(answer)
print(json.dumps(answers))
"""


def by_llama_cpp(path: Path, prompts: list[list[int]], tokens: int, stops: tuple[int, ...]) -> list[list[int]]:
    """Greedy answers of a GGUF file."""
    job = {"path": str(path), "prompts": prompts, "tokens": tokens, "stops": stops}
    python = os.environ.get("THINKSTACK_LLAMA_CPP", sys.executable)
    run = subprocess.run(
        [python, "-c", LLAMA_CPP], input=json.dumps(job), capture_output=True, text=True, timeout=1800, check=False
    )
    if run.returncode:
        raise SystemExit(f"llama.cpp failed on {path.name}:\n{run.stderr[-2000:]}")
    found: list[list[int]] = json.loads(run.stdout.splitlines()[-1])
    return found


def by_transformers(folder: Path, prompts: list[list[int]], tokens: int, stops: tuple[int, ...]) -> list[list[int]]:
    """Greedy answers of a folder."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    found = []
    for prompt in prompts:
        settings = {"do_sample": False, "max_new_tokens": tokens, "eos_token_id": list(stops), "pad_token_id": 0}
        ids = torch.tensor([prompt])
        out = model.generate(ids, attention_mask=torch.ones_like(ids), **settings)  # or it takes token 0 for padding
        found.append(out[0, len(prompt) :].tolist())
    return found


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("model")
    parser.add_argument("--prompts", type=int, default=40)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--kinds", nargs="+", default=["F32", "BF16", "Q8_0"])
    args = parser.parse_args()
    prepare_machine(args.threads)
    model, chat = load_model(args.model), load_chat(args.model)
    test_problems = held_out_problems(EvalConfig(num_problems=args.prompts))
    prompts = [chat.prompt(problem.messages) for problem in test_problems]
    stops = tuple(chat.stop_token_ids)
    how = [SamplingParams(temperature=0.0, max_tokens=args.tokens, stop_token_ids=stops)] * len(prompts)
    ours = [list(group[0].token_ids) for group in Engine(model, EngineConfig(max_num_seqs=16)).generate(prompts, how)]
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder)
        convert(args.model, out / "hf", dtype="fp32")
        theirs = {"transformers, fp32": by_transformers(out / "hf", prompts, args.tokens, stops)}
        for kind in args.kinds:
            convert(args.model, out / f"{kind}.gguf", to="gguf", dtype=kind)
            theirs[f"llama.cpp, {kind}"] = by_llama_cpp(out / f"{kind}.gguf", prompts, args.tokens, stops)
    for name, answers in theirs.items():
        equal = sum(a == b for a, b in zip(ours, answers, strict=True))
        tokens = sum(x == y for a, b in zip(ours, answers, strict=True) for x, y in zip(a, b, strict=False))
        rows.append((name, f"{equal} of {len(ours)}", f"{tokens} of {sum(map(len, ours))}"))
    print_table(f"{args.model}: greedy answers equal to ours", ("", "answers", "tokens"), rows)
    print(machine())


if __name__ == "__main__":
    main()
