"""An engine without a model: completions are given by a script; all other parts are the real engine.

Used in tests of code that needs an engine (servers, chats, recipes), and to measure the cost of scheduling.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from thinkstack.engine.engine import Engine, EngineConfig
from thinkstack.engine.runner import Runner
from thinkstack.engine.scheduler import SchedulerOutput
from thinkstack.engine.sequence_table import SequenceTable
from thinkstack.models.config import GQAConfig, ModelConfig
from thinkstack.models.transformer import Transformer

Script = Callable[[tuple[int, ...], int], Sequence[int]]
"""Function (prompt token ids, index of the completion) -> token ids of the completion."""
CERTAIN = 1e4
"""Logit of the scripted token; other tokens have logit 0."""


class ScriptedRunner(Runner):
    """Runs no model: the scripted token has probability 1; after the end of the script, the end token has."""

    script: Script
    end_id: int

    def run(self, scheduled: SchedulerOutput, table: SequenceTable) -> Tensor:
        """The token after each scheduled token, (N, 1) int64."""
        found: list[int] = []
        for row, start, count in zip(
            scheduled.rows.tolist(), scheduled.starts.tolist(), scheduled.counts.tolist(), strict=True
        ):
            request, index = table.request_at(row)
            text, first = self.script(request.prompt_token_ids, index), start + 1 - len(request.prompt_token_ids)
            found += [text[at] if 0 <= at < len(text) else self.end_id for at in range(first, first + count)]
        return torch.tensor(found).unsqueeze(1)

    def logits(self, hidden: Tensor) -> Tensor:
        """(B, V) fp32 from tokens (B, 1)."""
        return torch.zeros(len(hidden), self._model.cfg.vocab_size).scatter_(1, hidden, CERTAIN)


class ScriptedEngine(Engine):
    """An `Engine` that follows a script. All completions of a request (n > 1) start with the first token of the first
    completion, because they share the logits of the prompt."""

    def __init__(self, script: Script, vocab_size: int, end_id: int, max_model_len: int = 4096, **settings: object):
        """max_model_len: maximum tokens of prompt and completion together. settings: fields of EngineConfig."""
        cfg = ModelConfig(
            family="llama",
            vocab_size=vocab_size,
            hidden_size=16,
            num_layers=1,
            attention=GQAConfig(num_heads=1, num_kv_heads=1, head_dim=16),
            intermediate_size=16,
            max_positions=max_model_len,
        )
        self._script, self._end_id = script, end_id
        super().__init__(Transformer(cfg).initialize(torch.Generator().manual_seed(0)), EngineConfig(**settings))  # type: ignore[arg-type]

    def make_runner(self, model: Transformer, num_blocks: int) -> Runner:
        """A runner that follows the script."""
        runner = ScriptedRunner(model, num_blocks, self.cfg.dtype)
        runner.script, runner.end_id = self._script, self._end_id
        return runner
