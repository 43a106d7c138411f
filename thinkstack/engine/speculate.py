"""Multi-token prediction as a source of guesses: the model reads several tokens a step and keeps those it agrees with.

A guess is drawn from the module's distribution with the very number that the model will draw with at that place, and
counts only if the model draws the same token. So answers are those without guesses, token for token, at every
temperature; how often the guess is right is at most what the two distributions share.
Source: DeepSeek-V3 report, arXiv:2412.19437, sections 2.2 and 5.4.3; one module is applied to its own states.
"""

# Shapes in this file: N tokens, R rows, K guesses of a row.

import time
from dataclasses import dataclass, field

import numpy
import torch
from torch import Tensor

from thinkstack.engine.blocks import BLOCK
from thinkstack.engine.drawing import draw_plainly
from thinkstack.engine.runner import Runner
from thinkstack.engine.scheduler import Plan
from thinkstack.engine.table import SequenceTable

PROBE = 16
"""Every so many steps one is made without guesses, to know what it costs."""
SAMPLES = 4
"""Steps of each kind that are timed before a verdict."""
RETRY = 4096
"""Steps after which a verdict against drafting is forgotten."""


@dataclass
class Payoff:
    """Whether drafting pays at a number of rows, by the clock: seconds per token with it and without."""

    plain: dict[int, list[float]] = field(default_factory=dict)
    """By bucket: steps timed and their running mean of seconds a token."""
    drafted: dict[int, list[float]] = field(default_factory=dict)
    rejected_at: dict[int, int] = field(default_factory=dict)
    steps: int = 0

    def note(self, rows: int, is_drafted: bool, seconds: float, tokens: int) -> None:
        """A step over this many rows, which gave so many tokens."""
        known = (self.drafted if is_drafted else self.plain).setdefault(rows.bit_length(), [0, 0.0])
        known[0] += 1
        known[1] += (seconds / tokens - known[1]) / min(known[0], 20)

    def guesses(self, rows: int) -> bool:
        """Whether the next step over so many rows has guesses: not while the other kind is too little known."""
        known = self.plain.get(rows.bit_length(), [0, 0.0])[0]
        return self.steps % (PROBE if known >= SAMPLES else 2) != 0

    def pays(self, rows: int) -> bool:
        """What is known of this many rows; drafting is tried until it is known not to pay."""
        bucket = rows.bit_length()
        if bucket in self.rejected_at:
            if self.steps - self.rejected_at[bucket] < RETRY:
                return False
            for known in (self.plain, self.drafted, self.rejected_at):
                known.pop(bucket)
        plain, drafted = self.plain.get(bucket, [0, 0.0]), self.drafted.get(bucket, [0, 0.0])
        if min(plain[0], drafted[0]) >= SAMPLES and drafted[1] > plain[1]:
            self.rejected_at[bucket] = self.steps
            return False
        return True


class Speculator:
    """Guesses for the rows of an engine, and what became of them."""

    def __init__(self, runner: Runner, table: SequenceTable, max_drafts: int, always: bool = False):
        """max_drafts: K, tokens guessed ahead. always: draft even where it does not pay."""
        self.runner, self.table, self.max_drafts, self.always = runner, table, max_drafts, always
        self.payoff = Payoff()
        self.drafted, self.accepted = numpy.zeros((2, max_drafts), dtype=numpy.int64)
        """Guesses so far by how far ahead they were, and those the model drew too."""

    def begins(self, running: int) -> bool:
        """Whether a step over so many rows drafts; where not, rows in flight are followed no longer."""
        self.payoff.steps += 1
        on = self.always or self.payoff.pays(max(running, 1))
        if not on:
            self.table.is_drafting[:] = False
            self.table.drafts[:] = 0
        return on

    def counts(self, rows: numpy.ndarray, offsets: numpy.ndarray, tokens: numpy.ndarray) -> numpy.ndarray:
        """Which of the tokens drawn behind guesses count, (N,) bool: a row's first, and each behind a right guess.

        rows: (N,), a row's tokens together; offsets: (N,) from 0 up in each. Nothing counts behind a stop token.
        """
        table = self.table
        is_right = tokens == table.ids[rows, table.known[rows] + offsets]  # meaningless for the last of each row
        stops = table.is_stop(rows, tokens)
        counts = numpy.ones(len(rows), dtype=bool)
        for place in numpy.flatnonzero(offsets).tolist():  # in order
            accepted = bool(counts[place - 1] and is_right[place - 1])
            counts[place] = accepted and not stops[place - 1]
            ahead, (request, _) = int(offsets[place]) - 1, table.held(int(rows[place]))
            self.drafted[ahead] += 1
            self.accepted[ahead] += accepted
            request.drafted += 1
            request.accepted += accepted
        return counts

    def follow(self, plan: Plan, hidden: Tensor, drafted: bool, given: int, began: float) -> None:
        """Show the module what the rows of a step computed, hidden (N, D), guess on for those that draw, and time it.

        drafted: whether the step had guesses. given: tokens that answers got in it. began: when, in seconds.
        """
        rows, middle = len(plan.rows), time.perf_counter()
        self._show(plan, hidden, self.always or self.payoff.guesses(rows))
        if (plan.counts <= 1 + self.max_drafts).all() and given >= rows:  # no prompts
            ended = time.perf_counter() if drafted else middle
            self.payoff.note(rows, drafted, ended - began, given)

    def _show(self, plan: Plan, hidden: Tensor, guess: bool) -> None:
        """`follow` without the clock."""
        table, ends = self.table, plan.counts.cumsum()
        valid = numpy.minimum(plan.counts, table.known[plan.rows] - 1 - plan.starts)
        shown = numpy.flatnonzero(table.is_drafting[plan.rows] & (valid > 0))
        if not len(shown):
            return
        rows, starts, counts = plan.rows[shown], plan.starts[shown], valid[shown]
        index = numpy.concatenate([numpy.arange(count) for count in counts]) + (ends - plan.counts)[shown].repeat(
            counts
        )
        states = self.runner.draft(table, rows, starts, counts, hidden[torch.from_numpy(index).to(hidden.device)])
        if guess:
            self._guess(rows, states)

    def _guess(self, rows: numpy.ndarray, states: Tensor) -> None:
        """Write guesses behind the known tokens of those rows whose known tokens but the last are all computed."""
        table = self.table
        for ahead in range(self.max_drafts):
            left = table.limit[rows] - table.known[rows]
            goes_on = (table.computed[rows] == table.known[rows] - 1) & (ahead + 1 < left)
            if ahead:
                held = numpy.array([len(table.blocks[row]) for row in rows.tolist()]) * BLOCK
                goes_on &= table.known[rows] + ahead - 2 < held
            if not goes_on.any():
                return
            rows, states = rows[goes_on], states[torch.from_numpy(goes_on).to(states.device)]
            if ahead:
                ones = numpy.ones(len(rows), dtype=numpy.int64)
                states = self.runner.draft(table, rows, table.known[rows] + ahead - 2, ones, states)
            offsets = numpy.full(len(rows), ahead)
            tokens, _ = draw_plainly(table, rows, offsets, self.runner.logits(states))
            table.ids[rows, table.known[rows] + ahead] = tokens
            table.drafts[rows] = ahead + 1
