"""Speculative decoding with the model's multi-token-prediction (MTP) module: a step verifies several draft tokens.

A draft token is sampled from the MTP module's distribution with the random number that the model will use at that
position, and is accepted only if the model samples the same token. Completions are therefore identical, token for
token, with and without draft tokens, at every temperature; the acceptance rate is at most the overlap of the two
distributions. Source: DeepSeek-V3 report, arXiv:2412.19437, sections 2.2 and 5.4.3; further draft tokens apply one
module to its own hidden states.
"""

# Shapes in this file: N tokens, R rows, K draft tokens of a row.

import numpy
import torch
from torch import Tensor

from thinkstack.engine.block_pool import BLOCK_SIZE
from thinkstack.engine.runner import Runner
from thinkstack.engine.sampler import sample_plain_rows
from thinkstack.engine.scheduler import SchedulerOutput
from thinkstack.engine.sequence_table import SequenceTable


class Speculator:
    """Proposes draft tokens for the rows of an engine and counts accepted draft tokens."""

    def __init__(self, runner: Runner, table: SequenceTable, num_speculative_tokens: int):
        """num_speculative_tokens: K, number of draft tokens per row and step."""
        self.runner, self.table, self.num_speculative_tokens = runner, table, num_speculative_tokens
        self.num_drafted, self.num_accepted = numpy.zeros((2, num_speculative_tokens), dtype=numpy.int64)
        """Number of draft tokens so far by distance ahead, and number of accepted draft tokens, (K,) each."""

    def accept(self, rows: numpy.ndarray, offsets: numpy.ndarray, tokens: numpy.ndarray) -> numpy.ndarray:
        """Which sampled tokens are accepted, (N,) bool: the first of each row, and those after accepted draft tokens.

        rows: (N,), the tokens of a row are adjacent. offsets: (N,), ascending from 0 in each row. Tokens after a stop
        token are not accepted."""
        table = self.table
        is_right = (
            tokens == table.ids[rows, table.num_tokens[rows] + offsets]
        )  # meaningless for the last token of each row
        stops = table.is_stop(rows, tokens)
        accepted = numpy.ones(len(rows), dtype=bool)
        for place in numpy.flatnonzero(offsets).tolist():  # in order
            is_accepted = bool(accepted[place - 1] and is_right[place - 1])
            accepted[place] = is_accepted and not stops[place - 1]
            ahead, (request, _) = int(offsets[place]) - 1, table.request_at(int(rows[place]))
            self.num_drafted[ahead] += 1
            self.num_accepted[ahead] += is_accepted
            request.num_draft_tokens += 1
            request.num_accepted_tokens += is_accepted
        return accepted

    def follow(self, scheduled: SchedulerOutput, hidden: Tensor) -> None:
        """Run the MTP module on the hidden states (N, D) of a step, then propose draft tokens for rows that sampled."""
        table, ends = self.table, scheduled.counts.cumsum()
        valid = numpy.minimum(scheduled.counts, table.num_tokens[scheduled.rows] - 1 - scheduled.starts)
        is_open = numpy.array(
            [table.requests[row] is not None for row in scheduled.rows.tolist()]
        )  # finished rows are free
        shown = numpy.flatnonzero(is_open & (valid > 0))
        if not len(shown):
            return
        rows, starts, counts = scheduled.rows[shown], scheduled.starts[shown], valid[shown]
        index = numpy.concatenate([numpy.arange(count) for count in counts]) + (ends - scheduled.counts)[shown].repeat(
            counts
        )
        states = self.runner.draft(table, rows, starts, counts, hidden[torch.from_numpy(index).to(hidden.device)])
        self._draft(rows, states)
        self.runner.copy_blocks(scheduled)  # again, for the entries of the module

    def _draft(self, rows: numpy.ndarray, states: Tensor) -> None:
        """Write draft tokens after num_tokens for rows that have computed all tokens but the last."""
        table = self.table
        for ahead in range(self.num_speculative_tokens):
            left = table.max_num_tokens[rows] - table.num_tokens[rows]
            goes_on = (table.num_computed_tokens[rows] == table.num_tokens[rows] - 1) & (ahead + 1 < left)
            if ahead:
                held = numpy.array([len(table.blocks[row]) for row in rows.tolist()]) * BLOCK_SIZE
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
