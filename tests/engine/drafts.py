"""Draft tokens that are known to be right or wrong."""

import numpy
import pytest
import torch

from thinkstack.engine.speculative import Speculator


class Oracle:
    """Drafts the given completions, except for some wrong tokens, in place of the module."""

    def __init__(self, expected: dict[tuple[int, ...], tuple[int, ...]], wrong: float):
        self.expected, self.wrong, self.random = expected, wrong, numpy.random.default_rng(0)

    def __call__(self, speculator: Speculator, rows: numpy.ndarray, states: torch.Tensor) -> None:
        table = speculator.table
        for row in rows.tolist():
            num_tokens, prompt_end = int(table.num_tokens[row]), int(table.num_prompt_tokens[row])
            completion = self.expected.get(tuple(table.ids[row, :prompt_end].tolist()), (0,) * 200)
            left = int(table.max_num_tokens[row]) - num_tokens
            if table.num_computed_tokens[row] != num_tokens - 1:
                continue
            drafts = list(completion[num_tokens - prompt_end :][: min(speculator.num_speculative_tokens, left - 1)])
            for place in range(len(drafts)):
                if self.random.random() < self.wrong:
                    drafts[place] = (drafts[place] + 1) % 48
            table.ids[row, num_tokens : num_tokens + len(drafts)] = drafts
            table.num_draft_tokens[row] = len(drafts)


def draft_from(monkeypatch: pytest.MonkeyPatch, expected: dict[tuple[int, ...], tuple[int, ...]], wrong: float) -> None:
    oracle = Oracle(expected, wrong)
    monkeypatch.setattr(Speculator, "_draft", lambda self, rows, states: oracle(self, rows, states))
