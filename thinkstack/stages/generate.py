"""Generate text with a checkpoint in one or several processes: chat, a file of prompts, or continuation of raw text.

Under torchrun the model is sharded across ranks; every rank samples the same tokens, rank 0 reads and prints.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from thinkstack.checkpoint.model import load_chat, load_model
from thinkstack.engine.engine import Engine, EngineConfig
from thinkstack.files import lines
from thinkstack.kernels.precision import DTYPES, Precision
from thinkstack.models.precision import Quantization
from thinkstack.parallel.inference import Ranks, broadcast_text
from thinkstack.parallel.load import load_shard
from thinkstack.stages.console import NEW, Write, write_answer
from thinkstack.text.stream import LastToken, stream_text
from thinkstack.types import ConfigError, Message, RequestError, SamplingParams

MAX_NUM_SEQS = 64
"""Number of prompts of a file that are sampled at once."""


class Generator:
    """A model, its chat format and an engine."""

    def __init__(
        self,
        source: str,
        sampling: SamplingParams,
        ranks: Ranks,
        precision: Precision,
        device: torch.device,
        quantization: Quantization = "none",
    ):
        """source: as for load_model. sampling: the stop tokens of the chat format replace its stop_token_ids. weights:
        quantization of the weights. Raises ConfigError for quantization in several processes.
        """
        if ranks.count > 1 and quantization != "none":
            raise ConfigError(
                f"quantization={quantization!r} does not work in several processes; start one process, or use "
                "quantization='none'"
            )
        self.ranks, self.chat = ranks, load_chat(source)
        dtype = DTYPES[precision]
        model = load_shard(source, ranks, dtype) if ranks.count > 1 else load_model(source, dtype)
        context = min(model.cfg.max_positions, 4096 + sampling.max_tokens)
        size = EngineConfig(
            max_num_seqs=MAX_NUM_SEQS, max_model_len=context, dtype=precision, quantization=quantization
        )
        self.engine = Engine(model.to(device), size)
        self.sampling = replace(sampling, stop_token_ids=self.chat.stop_token_ids)
        self.last = LastToken(self.chat)

    def respond(self, prompt: str, raw: bool = False) -> Iterator[str]:
        """Stream the completion of a prompt. The prompt is formatted by the chat template; with raw, or without a
        template, BOS is prepended to the text if the model has BOS, and the text is continued."""
        return self._stream(*self._encode(prompt, raw))

    def answer(self, messages: Sequence[Message]) -> Iterator[str]:
        """Stream the next assistant message, including the prefill that the prompt ends with."""
        return self._stream(self.chat.prompt(messages), self.chat.opening(messages))

    def answers(self, prompts: Sequence[str], raw: bool = False) -> list[str]:
        """The text of `respond` for each prompt, sampled as one batch; prompt i is sampled with seed + i."""
        encoded = [self._encode(prompt, raw) for prompt in prompts]
        params = [replace(self._fitting(ids), seed=self.sampling.seed + n) for n, (ids, _) in enumerate(encoded)]
        groups = self.engine.generate([ids for ids, _ in encoded], params)
        return [
            self.chat.text_of(group[0].token_ids, opening) for (_, opening), group in zip(encoded, groups, strict=True)
        ]

    def _encode(self, prompt: str, raw: bool) -> tuple[list[int], str]:
        """The prompt token ids, and the start of the answer that they contain."""
        if raw or not self.chat.has_template:
            return self.chat.tokenizer.begin_ids + self.chat.tokenizer.encode(prompt), ""
        messages = [Message(role="user", content=prompt)]
        return self.chat.prompt(messages), self.chat.opening(messages)

    def _stream(self, ids: list[int], opening: str) -> Iterator[str]:
        return stream_text(self.chat, self.last.track(self.engine.stream(ids, self._fitting(ids))), opening)

    def _fitting(self, ids: Sequence[int]) -> SamplingParams:
        """The sampling parameters, with max_tokens limited to the context length minus the prompt."""
        free_tokens = self.engine.max_model_len - len(ids)
        if free_tokens < 1:
            raise RequestError(
                f"the prompt has {len(ids):,} tokens, the maximum context length is {self.engine.max_model_len:,}; "
                "shorten the prompt"
            )
        return replace(self.sampling, max_tokens=min(self.sampling.max_tokens, free_tokens))

    def converse(self, read: Callable[[], str | None], write: Write) -> None:
        """Answer the questions that `read` returns on rank 0, until `read` returns None; NEW starts a new conversation.

        Ctrl-C stops an answer; with several processes it ends the processes.
        """
        messages: list[Message] = []
        while True:
            question = broadcast_text(read() if self.ranks.rank == 0 else None, self.ranks)
            if question is None:
                return
            if question == NEW:
                messages.clear()
                continue
            messages.append(Message(role="user", content=question))
            try:
                answer = write_answer((("", text) for text in self.answer(messages)), self.last.explain_empty, write)
            except RequestError as error:
                messages.clear()
                write(f"{error}; starting a new conversation\n", "warning")
                continue
            except KeyboardInterrupt:
                if self.ranks.count > 1:
                    raise
                messages.pop()
                write(" (stopped)\n", "warning")
                continue
            messages.append(Message(role="assistant", content=answer))


def read_prompts(path: Path) -> list[str]:
    """The prompts of a UTF-8 text file, one per line, without blank lines. Raises ConfigError if there are none."""
    prompts = [line.removesuffix("\n") for line in lines(path, "prompts") if line.strip()]
    if not prompts:
        raise ConfigError(f"{path} has no prompts; write one per line")
    return prompts
