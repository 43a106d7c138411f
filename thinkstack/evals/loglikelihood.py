"""Log-likelihoods of given text: of a continuation, of the choices of a question, and of a file in bits per byte.

The conventions are those of lm-evaluation-harness, so that figures can be compared: one BOS, a context and its
continuation tokenized together, and blanks at the end of the context moved to the continuation.

Shapes in this file: B rows of a batch, T positions, D hidden size, N scored positions.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.nn.utils.rnn import pad_sequence

from thinkstack.engine.prompt_logprobs import token_logprobs
from thinkstack.files import read_text
from thinkstack.models.transformer import Transformer
from thinkstack.tasks.benchmarks.prompts import CHOICE_PROMPTS, LETTERS, Prompt, fill_prompt
from thinkstack.text.tokenizer import Tokenizer
from thinkstack.types import ConfigError, Problem, RequestError


@dataclass(frozen=True, kw_only=True)
class Loglikelihood:
    """How likely a continuation is."""

    logprob: float
    """Natural log-probability of the continuation: the sum over its tokens."""
    is_greedy: bool
    """Whether every token is the most likely one, so that greedy decoding would produce the continuation."""
    num_tokens: int
    """Tokens of the continuation."""


def split_pair(tokenizer: Tokenizer, context: str, continuation: str) -> tuple[list[int], list[int]]:
    """Return the ids of a context, with BOS, and of its continuation.

    Both are tokenized together, so the continuation has the tokens it has in running text. Raises RequestError for an
    empty continuation and for an empty context without BOS.
    """
    blanks = len(context) - len(context.rstrip())
    if blanks:
        context, continuation = context[:-blanks], context[-blanks:] + continuation
    ids = tokenizer.encode(context)
    following = tokenizer.encode(context + continuation)[len(ids) :]
    if not following:
        raise RequestError(f"the continuation {continuation!r:.40} has no tokens; give text")
    if not ids and not tokenizer.begin_ids:
        raise RequestError("the context is empty and this tokenizer has no BOS; give a context")
    return [*tokenizer.begin_ids, *ids], following


def loglikelihood(model: Transformer, tokenizer: Tokenizer, context: str, continuation: str) -> Loglikelihood:
    """Return the log-likelihood of `continuation` after `context`. Raises RequestError like `split_pair`."""
    return loglikelihoods(model, [split_pair(tokenizer, context, continuation)])[0]


@torch.no_grad()
def loglikelihoods(
    model: Transformer, pairs: Sequence[tuple[Sequence[int], Sequence[int]]], batch_size: int = 32
) -> list[Loglikelihood]:
    """Return the log-likelihood of each pair (context ids, continuation ids), both not empty.

    Pairs of similar lengths are computed together, padded on the right, where causal attention does not look; pairs
    that differ in the last token alone, such as the letters of a question, are one row. In fp32 the batch changes a
    result by rounding alone (below 1e-5). Raises RequestError for a pair that is longer than the model's context.
    """
    places: dict[tuple[int, ...], list[int]] = {}
    """Places in `pairs` by the tokens that the model reads."""
    for place, (context, continuation) in enumerate(pairs):
        row = (*context, *continuation[:-1])
        if len(row) > model.cfg.max_positions:
            raise RequestError(
                f"context and continuation have {len(row):,} tokens without the last; this model takes "
                f"{model.cfg.max_positions:,}; shorten the context"
            )
        places.setdefault(row, []).append(place)
    order = sorted(places, key=len, reverse=True)
    found: dict[int, Loglikelihood] = {}
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        continuations = [[pairs[place][1] for place in places[row]] for row in rows]
        found |= zip(
            (place for row in rows for place in places[row]), _score_batch(model, rows, continuations), strict=True
        )
    return [found[place] for place in range(len(pairs))]


def _score_batch(
    model: Transformer, rows: Sequence[Sequence[int]], continuations: Sequence[Sequence[Sequence[int]]]
) -> list[Loglikelihood]:
    """Log-likelihoods of one batch, in order. continuations: those of each row; all their tokens but the last are the
    end of the row."""
    device = next(model.parameters()).device
    ids = pad_sequence([torch.tensor(row) for row in rows], batch_first=True).to(device)  # (B, T)
    hidden = model.trunk(ids).hidden  # (B, T, D)
    scored = torch.cat(
        [
            hidden[place, len(row) - len(one) : len(row)]
            for place, (row, some) in enumerate(zip(rows, continuations, strict=True))
            for one in some
        ]
    )  # (N, D)
    chosen = [one for some in continuations for one in some]
    targets = torch.tensor([token for one in chosen for token in one]).to(device)  # (N,)
    found = token_logprobs(model.head, scored, targets, num_top=1)
    hits = found.top_token_ids.squeeze(-1) == targets
    sizes = [len(one) for one in chosen]
    return [
        Loglikelihood(logprob=float(values.sum()), is_greedy=bool(best.all()), num_tokens=len(values))
        for values, best in zip(found.logprobs.double().split(sizes), hits.split(sizes), strict=True)
    ]


@dataclass(frozen=True, kw_only=True)
class ChoiceResult:
    """The choice of a model by log-likelihood."""

    key: str
    """Key of the problem."""
    logprobs: tuple[float, ...]
    """Log-probability of each choice."""
    correct: int
    """Place of the correct choice, from 0."""
    chosen: int
    """Place of the choice with the highest log-probability; of several, the first."""
    chosen_normalized: int
    """The same after division by the UTF-8 bytes of each choice. lm-eval divides by characters, which is the same for
    ASCII."""

    @property
    def is_correct(self) -> bool:
        """Whether the choice is correct (acc)."""
        return self.chosen == self.correct

    @property
    def is_correct_normalized(self) -> bool:
        """Whether the choice after division is correct (acc_norm)."""
        return self.chosen_normalized == self.correct


def choose_by_loglikelihood(
    model: Transformer,
    tokenizer: Tokenizer,
    problems: Sequence[Problem],
    by_text: bool = False,
    shots: Callable[[Problem], Sequence[Problem]] = lambda problem: (),
    batch_size: int = 32,
    prompt: Prompt | None = None,
) -> list[ChoiceResult]:
    """Answer problems with `choices` by the log-likelihood of each choice.

    by_text: False: the prompt lists the choices and the continuations are their letters (MMLU in lm-eval); True: the
    prompt has the question alone and the continuations are the texts (cloze). shots: the solved problems before a
    question, as in 5-shot evaluation. prompt: None is lm-eval's for the method. Raises ConfigError for a problem
    without choices.
    """
    pairs, sizes = [], []
    for problem in problems:
        context, texts = choice_prompt(problem, by_text, shots(problem), prompt), _continuations(problem, by_text)
        pairs += [split_pair(tokenizer, context, text) for text in texts]
        sizes.append(len(texts))
    found = iter(loglikelihoods(model, pairs, batch_size))
    return [
        _choose(problem, [next(found).logprob for _ in range(size)], by_text)
        for problem, size in zip(problems, sizes, strict=True)
    ]


def choice_prompt(problem: Problem, by_text: bool, shots: Sequence[Problem] = (), prompt: Prompt | None = None) -> str:
    """Return the context of the choices: solved problems, then the question. prompt: None is lm-eval's for the method.

    Raises ConfigError without choices.
    """
    for one in (problem, *shots):
        if not one.metadata.get("choices"):
            raise ConfigError(f"{one.task} has no choices; choose a task for multiple choice, such as mmlu")
    prompt = prompt or CHOICE_PROMPTS["lm-eval-cloze" if by_text else "lm-eval"]
    questions = [fill_prompt(prompt, one, with_description=not place) for place, one in enumerate((*shots, problem))]
    answers = [_continuations(one, by_text)[LETTERS.index(one.answer)] for one in shots]
    return "\n\n".join(question + answer for question, answer in zip(questions, (*answers, ""), strict=True))


def _continuations(problem: Problem, by_text: bool) -> list[str]:
    choices = problem.metadata["choices"]
    return [f" {choice}" for choice in (choices if by_text else LETTERS[: len(choices)])]


def _choose(problem: Problem, logprobs: Sequence[float], by_text: bool) -> ChoiceResult:
    sizes = [max(len(text[1:].encode()), 1) for text in _continuations(problem, by_text)]
    by_byte = [logprob / size for logprob, size in zip(logprobs, sizes, strict=True)]
    return ChoiceResult(
        key=problem.key,
        logprobs=tuple(logprobs),
        correct=LETTERS.index(problem.answer),
        chosen=max(range(len(logprobs)), key=lambda place: logprobs[place]),
        chosen_normalized=max(range(len(by_byte)), key=lambda place: by_byte[place]),
    )


@dataclass(frozen=True, kw_only=True)
class BitsPerByte:
    """How well a model predicts a text."""

    bits_per_byte: float
    """Mean bits per UTF-8 byte of the text; comparable between tokenizers."""
    num_tokens: int
    num_bytes: int


def bits_per_byte(
    model: Transformer,
    tokenizer: Tokenizer,
    text: str,
    max_length: int = 0,
    first_token_id: int | None = None,
    batch_size: int = 4,
) -> BitsPerByte:
    """Return the bits per byte of a text, in disjoint windows of `max_length` tokens, each after one known token.

    max_length: 0 is the model's context. first_token_id: the token before the text; None is BOS. Raises RequestError
    for an empty text, and for a tokenizer without BOS if there is no first_token_id.
    """
    if not text:
        raise RequestError("the text is empty; give a text of at least one character")
    if first_token_id is None and not tokenizer.begin_ids:
        raise RequestError(
            "this tokenizer has no BOS, after which the first token is scored; give first_token_id, such as the token "
            "that ends a document",
            "first_token_id",
        )
    first = tokenizer.begin_ids[-1] if first_token_id is None else first_token_id
    ids = [first, *tokenizer.encode(text)]
    length = min(max_length or model.cfg.max_positions, model.cfg.max_positions)
    found = loglikelihoods(model, list(_windows(ids, length)), batch_size)
    nats, num_bytes = -sum(one.logprob for one in found), len(text.encode())
    return BitsPerByte(bits_per_byte=nats / math.log(2) / num_bytes, num_tokens=len(ids) - 1, num_bytes=num_bytes)


def _windows(ids: Sequence[int], length: int) -> Iterator[tuple[Sequence[int], Sequence[int]]]:
    for start in range(0, len(ids) - 1, length):
        yield ids[start : start + 1], ids[start + 1 : start + 1 + length]


def bits_per_byte_of_file(
    model: Transformer,
    tokenizer: Tokenizer,
    path: str | Path,
    max_length: int = 0,
    first_token_id: int | None = None,
) -> BitsPerByte:
    """Return the bits per byte of a text file, which may be compressed by gzip. Raises ConfigError like read_text."""
    return bits_per_byte(model, tokenizer, read_text(Path(path)), max_length, first_token_id)
