"""What an evaluation would do, without sampling: problems, prompts, the most tokens that it can take, and its cost."""

import math

from thinkstack.checkpoint.model import load_chat
from thinkstack.evals.report import markdown_table
from thinkstack.evals.runner import held_out_problems
from thinkstack.evals.sampling import max_tokens_of, num_samples, prompt_record
from thinkstack.stages.evaluate import EvaluateConfig
from thinkstack.tasks.table import make_tasks
from thinkstack.tasks.task import encode_prompt
from thinkstack.text.chat import ChatFormat
from thinkstack.text.tokenizer import Tokenizer

CHARACTERS_PER_TOKEN = 4
"""Estimate for prompts whose tokenizer is unknown."""
HEAD = ("task", "problems", "samples", "prompt tokens", "longest prompt", "BOS", "most sampled tokens")


def print_plan(cfg: EvaluateConfig, with_ids: bool) -> None:
    """Print a row per task and the totals.

    with_ids: also the first prompt of each task, one token per line. Raises ConfigError for prompts with two BOS
    tokens and for settings that the evaluation refuses.
    """
    tasks, problems = make_tasks(cfg.tasks), held_out_problems(cfg)
    chat = load_chat(cfg.start) if cfg.start else None
    rows, most, cost = [], 0, 0.0
    prompts: dict[str, tuple[int, ...]] = {}
    for name, task in tasks.items():
        own = [problem for problem in problems if problem.task == name]
        if chat is not None:
            encoded = [encode_prompt(chat, task, problem) for problem in own]
            bos = {prompt_record(ids, chat, 0).num_bos for ids in encoded}
            prompts[name] = encoded[0]
            sizes = [len(ids) for ids in encoded]
            shown = ", ".join("none" if one is None else str(one) for one in sorted(bos, key=str))
        else:
            texts = ["".join(message.content for message in task.prompt(problem)[0]) for problem in own]
            sizes, shown = [math.ceil(len(text) / CHARACTERS_PER_TOKEN) for text in texts], "unknown"
        samples = num_samples(task, cfg) if task.cfg.method == "sampled" else 0
        sampled = len(own) * samples * max_tokens_of(task, cfg)
        most += sampled
        if cfg.endpoint.url:
            prompt_tokens = sum(sizes) * samples
            cost += (prompt_tokens * cfg.endpoint.prompt_price + sampled * cfg.endpoint.completion_price) / 1e6
        cells = [str(len(own)), str(samples), f"{sum(sizes):,}", f"{max(sizes):,}", shown, f"{sampled:,}"]
        rows.append((name, cells))
    print("\n".join(markdown_table(HEAD, rows)))
    if chat is None:
        print(f"\nprompt tokens are estimated at {CHARACTERS_PER_TOKEN} characters each")
    print(f"\nat most {most:,} sampled tokens" + (f", {cost:,.2f} at the given prices" if cost else ""))
    if with_ids and chat is not None:
        for name, ids in prompts.items():
            _print_ids(name, ids, chat)


def _print_ids(task: str, ids: tuple[int, ...], chat: ChatFormat) -> None:
    sha256 = prompt_record(ids, chat, 0).sha256
    print(f"\n{task}: {len(ids)} tokens, template {chat.name}, SHA-256 {sha256}")
    print("\n".join(f"{token:>8}  {_spelling(chat.tokenizer, token)}" for token in ids))


def _spelling(tokenizer: Tokenizer, token: int) -> str:
    """A token as Python writes the text; a control token by its name."""
    names = {number: name for name, number in tokenizer.control.items()}
    return names.get(token) or repr(tokenizer.decode([token]))
