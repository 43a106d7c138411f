"""Text from a checkpoint in one process or several: a talk at the prompt, a file of prompts, or a plain continuation.

Under torchrun every process holds a part of the model and draws the same tokens; the first one reads and prints.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from thinkstack.checkpoint.model import load_chat, load_model
from thinkstack.checkpoint.shard import load_shard
from thinkstack.engine.engine import Engine, EngineConfig
from thinkstack.files import lines
from thinkstack.models.parallel import Ranks, broadcast_text
from thinkstack.models.precision import DTYPES, Precision, Stored
from thinkstack.stages.console import NEW, Say, say_answer
from thinkstack.stages.talk import LastToken, stream_text
from thinkstack.types import ConfigError, Message, RequestError, Sampling

MAX_BATCH = 64
"""Prompts of a file that are answered at once."""


class Generator:
    """A model, its chat format and an engine."""

    def __init__(
        self,
        source: str,
        sampling: Sampling,
        ranks: Ranks,
        precision: Precision,
        device: torch.device,
        weights: Stored = "plain",
    ):
        """source: whatever load_model takes. sampling: its stop_ids are those of the chat format. weights: how matrices
        are kept. Raises ConfigError where several processes would have to pack their parts.
        """
        if ranks.count > 1 and weights != "plain":
            raise ConfigError(f"weights={weights!r} packs a whole model; start one process, or use plain")
        self.ranks, self.chat = ranks, load_chat(source)
        dtype = DTYPES[precision]
        model = load_shard(source, ranks, dtype) if ranks.count > 1 else load_model(source, dtype)
        context = min(model.cfg.max_positions, 4096 + sampling.max_tokens)
        size = EngineConfig(max_batch=MAX_BATCH, max_context=context, dtype=precision, weights=weights)
        self.engine = Engine(model.to(device), size)
        self.sampling = replace(sampling, stop_ids=self.chat.stop_ids)
        self.last = LastToken(self.chat)

    def continue_text(self, prompt: str) -> Iterator[str]:
        """Stream the continuation of plain text: exactly one BOS where the model knows one, no template."""
        ids = self.chat.tokenizer.begin_ids + self.chat.tokenizer.encode(prompt)
        return stream_text(self._plain_text, self.last.of(self.engine.stream(ids, self._fitting(ids))))

    def _plain_text(self, drawn: Sequence[int]) -> str:
        return self.chat.tokenizer.decode([token for token in drawn if token not in self.chat.stop_ids])

    def respond(self, prompt: str, raw: bool = False) -> Iterator[str]:
        """Stream the answer to a prompt through the chat template, where the checkpoint has one and raw is not asked
        for; else the continuation of the text."""
        if raw or not self.chat.has_template:
            return self.continue_text(prompt)
        return self.answer([Message(role="user", content=prompt)])

    def answer(self, messages: Sequence[Message]) -> Iterator[str]:
        """Stream the next turn of the assistant, what the prompt has begun of it included."""
        ids = self.chat.prompt(messages)
        return stream_text(self.chat.text_of, self.last.of(self.engine.stream(ids, self._fitting(ids))))

    def answers(self, prompts: Sequence[str], raw: bool = False) -> list[str]:
        """One answer to each prompt, sampled together; prompt number i samples with seed + i."""
        text_of: Callable[[Sequence[int]], str] = self.chat.text_of
        if raw or not self.chat.has_template:
            begin, text_of = self.chat.tokenizer.begin_ids, self._plain_text
            asked = [begin + self.chat.tokenizer.encode(prompt) for prompt in prompts]
        else:
            asked = [self.chat.prompt([Message(role="user", content=prompt)]) for prompt in prompts]
        samplings = [replace(self._fitting(ids), seed=self.sampling.seed + place) for place, ids in enumerate(asked)]
        return [text_of(found[0].token_ids) for found in self.engine.generate(asked, samplings)]

    def _fitting(self, ids: Sequence[int]) -> Sampling:
        """The sampling with as many tokens as the context still takes."""
        room = self.engine.max_context - len(ids)
        if room < 1:
            raise RequestError(
                f"the prompt is {len(ids):,} tokens, the context {self.engine.max_context:,}; shorten it"
            )
        return replace(self.sampling, max_tokens=min(self.sampling.max_tokens, room))

    def talk(self, read: Callable[[], str | None], say: Say) -> None:
        """Answer what `read` gives on the first rank until it gives None; NEW begins a new conversation."""
        messages: list[Message] = []
        while True:
            asked = broadcast_text(read() if self.ranks.rank == 0 else None, self.ranks)
            if asked is None:
                return
            if asked == NEW:
                messages.clear()
                continue
            messages.append(Message(role="user", content=asked))
            whole = say_answer((("", piece) for piece in self.answer(messages)), self.last.text, say)
            messages.append(Message(role="assistant", content=whole))


def read_prompts(path: Path) -> list[str]:
    """The prompts of a UTF-8 text file, one a line, blank lines left out. Raises ConfigError if there are none."""
    prompts = [line.removesuffix("\n") for line in lines(path, "prompts") if line.strip()]
    if not prompts:
        raise ConfigError(f"{path} holds no prompts; write one a line")
    return prompts
