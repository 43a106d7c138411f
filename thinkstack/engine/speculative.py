"""Multi-token prediction as a source of guesses: the model reads several tokens a step and keeps those it agrees with.

A guess is drawn from the module's distribution with the very number that the model will draw with at that place, and
counts only if the model draws the same token. So answers are those without guesses, token for token, at every
temperature; how often the guess is right is at most what the two distributions share.
Source: DeepSeek-V3 report, arXiv:2412.19437, sections 2.2 and 5.4.3; one module is applied to its own states.
"""

# Shapes in this file: N tokens, R rows, K guesses of a row.

import numpy
import torch
from torch import Tensor

from thinkstack.engine.block_pool import BLOCK
from thinkstack.engine.row_sampler import sample_plain_rows
from thinkstack.engine.runner import Runner
from thinkstack.engine.scheduler import SchedulerOutput
from thinkstack.engine.sequence_table import SequenceTable


class Speculator:
    """Guesses for the rows of an engine, and what became of them."""

    def __init__(self, runner: Runner, table: SequenceTable, num_speculative_tokens: int):
        """num_speculative_tokens: K, tokens guessed ahead."""
        self.runner, self.table, self.num_speculative_tokens = runner, table, num_speculative_tokens
        self.drafted, self.accepted = numpy.zeros((2, num_speculative_tokens), dtype=numpy.int64)
        """Guesses so far by how far ahead they were, and those the model drew too."""

    def counts(self, rows: numpy.ndarray, offsets: numpy.ndarray, tokens: numpy.ndarray) -> numpy.ndarray:
        """Which of the tokens drawn behind guesses count, (N,) bool: a row's first, and each behind a right guess.

        rows: (N,), a row's tokens together; offsets: (N,) from 0 up in each. Nothing counts behind a stop token.
        """
        table = self.table
        is_right = tokens == table.ids[rows, table.num_tokens[rows] + offsets]  # meaningless for the last of each row
        stops = table.is_stop(rows, tokens)
        counts = numpy.ones(len(rows), dtype=bool)
        for place in numpy.flatnonzero(offsets).tolist():  # in order
            accepted = bool(counts[place - 1] and is_right[place - 1])
            counts[place] = accepted and not stops[place - 1]
            ahead, (request, _) = int(offsets[place]) - 1, table.request_at(int(rows[place]))
            self.drafted[ahead] += 1
            self.accepted[ahead] += accepted
            request.num_draft_tokens += 1
            request.num_accepted_tokens += accepted
        return counts

    def follow(self, scheduled: SchedulerOutput, hidden: Tensor) -> None:
        """Show the module what the rows of a step computed, hidden (N, D), and guess on for those that draw."""
        table, ends = self.table, scheduled.counts.cumsum()
        valid = numpy.minimum(scheduled.counts, table.num_tokens[scheduled.rows] - 1 - scheduled.starts)
        is_open = numpy.array(
            [table.requests[row] is not None for row in scheduled.rows.tolist()]
        )  # the step ended others
        shown = numpy.flatnonzero(is_open & (valid > 0))
        if not len(shown):
            return
        rows, starts, counts = scheduled.rows[shown], scheduled.starts[shown], valid[shown]
        index = numpy.concatenate([numpy.arange(count) for count in counts]) + (ends - scheduled.counts)[shown].repeat(
            counts
        )
        states = self.runner.draft(table, rows, starts, counts, hidden[torch.from_numpy(index).to(hidden.device)])
        self._guess(rows, states)

    def _guess(self, rows: numpy.ndarray, states: Tensor) -> None:
        """Write guesses behind the known tokens of those rows whose known tokens but the last are all computed."""
        table = self.table
        for ahead in range(self.num_speculative_tokens):
            left = table.max_num_tokens[rows] - table.num_tokens[rows]
            goes_on = (table.num_computed_tokens[rows] == table.num_tokens[rows] - 1) & (ahead + 1 < left)
            if ahead:
                held = numpy.array([len(table.blocks[row]) for row in rows.tolist()]) * BLOCK
                goes_on &= table.num_tokens[rows] + ahead - 2 < held
            if not goes_on.any():
                return
            rows, states = rows[goes_on], states[torch.from_numpy(goes_on).to(states.device)]
            if ahead:
                ones = numpy.ones(len(rows), dtype=numpy.int64)
                states = self.runner.draft(table, rows, table.num_tokens[rows] + ahead - 2, ones, states)
            offsets = numpy.full(len(rows), ahead)
            tokens, _ = sample_plain_rows(table, rows, offsets, self.runner.logits(states))
            table.ids[rows, table.num_tokens[rows] + ahead] = tokens
            table.num_draft_tokens[rows] = ahead + 1
