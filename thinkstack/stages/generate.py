"""Text from a checkpoint in one process or several: a talk at the prompt, a file of prompts, or a plain continuation.

Under torchrun every process holds a part of the model and draws the same tokens; the first one reads and prints.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from thinkstack.checkpoint.model import load_chat, load_model
from thinkstack.engine.engine import Engine, EngineConfig
from thinkstack.files import lines
from thinkstack.models.precision import DTYPES, Precision, Quantization
from thinkstack.parallel.inference import Ranks, broadcast_text
from thinkstack.parallel.load import load_shard
from thinkstack.stages.console import NEW, Say, say_answer
from thinkstack.text.stream import LastToken, stream_text
from thinkstack.types import ConfigError, Message, RequestError, SamplingParams

TextOf = Callable[[Sequence[int]], str]
MAX_NUM_SEQS = 64
"""Prompts of a file that are answered at once."""


class Generator:
    """A model, its chat format and an engine."""

    def __init__(
        self,
        source: str,
        sampling: SamplingParams,
        ranks: Ranks,
        precision: Precision,
        device: torch.device,
        weights: Quantization = "plain",
    ):
        """source: whatever load_model takes. sampling: its stop_token_ids are those of the chat format. weights: how
        matrices are kept. Raises ConfigError where several processes would have to pack their parts.
        """
        if ranks.count > 1 and weights != "plain":
            raise ConfigError(f"weights={weights!r} packs a whole model; start one process, or use plain")
        self.ranks, self.chat = ranks, load_chat(source)
        dtype = DTYPES[precision]
        model = load_shard(source, ranks, dtype) if ranks.count > 1 else load_model(source, dtype)
        context = min(model.cfg.max_positions, 4096 + sampling.max_tokens)
        size = EngineConfig(max_num_seqs=MAX_NUM_SEQS, max_model_len=context, dtype=precision, weights=weights)
        self.engine = Engine(model.to(device), size)
        self.sampling = replace(sampling, stop_token_ids=self.chat.stop_token_ids)
        self.last = LastToken(self.chat)

    def respond(self, prompt: str, raw: bool = False) -> Iterator[str]:
        """Stream the answer to a prompt through the chat template, where the checkpoint has one and raw is not asked
        for; else the continuation of the text, behind exactly one BOS where the model knows one."""
        return self._stream(*self._ask(prompt, raw))

    def answer(self, messages: Sequence[Message]) -> Iterator[str]:
        """Stream the next turn of the assistant, what the prompt has begun of it included."""
        return self._stream(self.chat.prompt(messages), self.chat.text_of)

    def answers(self, prompts: Sequence[str], raw: bool = False) -> list[str]:
        """What `respond` gives for each prompt, sampled together; prompt number i samples with seed + i."""
        asked = [self._ask(prompt, raw) for prompt in prompts]
        samplings = [replace(self._fitting(ids), seed=self.sampling.seed + n) for n, (ids, _) in enumerate(asked)]
        found = self.engine.generate([ids for ids, _ in asked], samplings)
        return [text_of(group[0].token_ids) for (_, text_of), group in zip(asked, found, strict=True)]

    def _ask(self, prompt: str, raw: bool) -> tuple[list[int], TextOf]:
        """Ids that ask for an answer, or for a continuation, and how its ids become text."""
        if raw or not self.chat.has_template:
            return self.chat.tokenizer.begin_ids + self.chat.tokenizer.encode(prompt), self._continuation
        return self.chat.prompt([Message(role="user", content=prompt)]), self.chat.text_of

    def _continuation(self, token_ids: Sequence[int]) -> str:
        return self.chat.tokenizer.decode([token for token in token_ids if token not in self.chat.stop_token_ids])

    def _stream(self, ids: list[int], text_of: TextOf) -> Iterator[str]:
        return stream_text(text_of, self.last.of(self.engine.stream(ids, self._fitting(ids))))

    def _fitting(self, ids: Sequence[int]) -> SamplingParams:
        """The sampling with as many tokens as the context still takes."""
        room = self.engine.max_model_len - len(ids)
        if room < 1:
            raise RequestError(
                f"the prompt is {len(ids):,} tokens, the context {self.engine.max_model_len:,}; shorten it"
            )
        return replace(self.sampling, max_tokens=min(self.sampling.max_tokens, room))

    def converse(self, read: Callable[[], str | None], say: Say) -> None:
        """Answer what `read` gives on the first rank until it gives None; NEW begins a new conversation. Ctrl-C stops
        an answer, but for several processes, which it ends."""
        messages: list[Message] = []
        while True:
            asked = broadcast_text(read() if self.ranks.rank == 0 else None, self.ranks)
            if asked is None:
                return
            if asked == NEW:
                messages.clear()
                continue
            messages.append(Message(role="user", content=asked))
            try:
                whole = say_answer((("", piece) for piece in self.answer(messages)), self.last.text, say)
            except RequestError as error:
                messages.clear()
                say(f"{error}; a new conversation begins\n", "warning")
                continue
            except KeyboardInterrupt:
                if self.ranks.count > 1:
                    raise
                messages.pop()
                say(" (stopped)\n", "warning")
                continue
            messages.append(Message(role="assistant", content=whole))


def read_prompts(path: Path) -> list[str]:
    """The prompts of a UTF-8 text file, one a line, blank lines left out. Raises ConfigError if there are none."""
    prompts = [line.removesuffix("\n") for line in lines(path, "prompts") if line.strip()]
    if not prompts:
        raise ConfigError(f"{path} holds no prompts; write one a line")
    return prompts
