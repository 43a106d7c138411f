"""A checkpoint as the model of a chat."""

from collections.abc import Generator, Sequence
from dataclasses import replace

from thinkstack.checkpoint.model import load_chat, load_model, open_source, pick_precision
from thinkstack.engine.engine import Engine, EngineConfig
from thinkstack.kernels.precision import DTYPES, RequestedPrecision
from thinkstack.models.precision import Quantization
from thinkstack.stages.chat import TurnSummary
from thinkstack.text.chat import ChatFormat, ZeroFormat, thinking_format, thinking_modes
from thinkstack.text.stream import LastToken, stream_turn
from thinkstack.text.stream_parser import StreamEvent
from thinkstack.types import ConfigError, Message, RequestError, SamplingParams

_QUESTION = [Message(role="user", content="1")]


class LocalModel:
    """The model of a checkpoint, its engine and its chat format."""

    def __init__(
        self,
        source: str,
        sampling: SamplingParams,
        precision: RequestedPrecision = "fp32",
        quantization: Quantization = "none",
    ):
        """source: a checkpoint folder, a GGUF file, OWNER/NAME of the hub or pip:NAME. sampling: sampling parameters;
        the stop tokens of the chat format replace its stop_token_ids. quantization: quantization of the weights.

        Raises ConfigError for an unusable checkpoint and for a base model.
        """
        self.summary = TurnSummary()
        self._sampling, self._precision, self._quantization = sampling, precision, quantization
        self._load(source, open_chat(source))

    def stream(self, messages: Sequence[Message], thinking: bool | None) -> Generator[StreamEvent]:
        """Stream the next assistant turn. Raises RequestError for a conversation that is too long."""
        if isinstance(self.chat, ZeroFormat):
            messages = messages[-1:]  # R1-Zero is trained on single questions; earlier turns lower its accuracy
        prompt = self.chat.prompt(messages, (), thinking)
        free_tokens = self.engine.max_model_len - len(prompt)
        if free_tokens < 1:
            limit = f"the maximum context length is {self.engine.max_model_len:,}"
            raise RequestError(f"the conversation has {len(prompt):,} tokens, {limit}; /new starts a new one")
        sampling = replace(
            self._sampling,
            max_tokens=min(self._sampling.max_tokens, free_tokens),
            stop_token_ids=self.chat.stop_token_ids,
        )
        tokens = self._last.track(self.engine.stream(prompt, sampling))
        for event in stream_turn(self.chat, tokens, self.chat.opening(messages, thinking), self._thinking_format):
            if event.kind == "finish":
                self.summary = TurnSummary(
                    finish_reason=event.finish_reason or "stop",
                    completion_tokens=self._last.count,
                    prompt_tokens=len(prompt),
                )
            yield event

    def explain_empty(self) -> str:
        """The reason why the last answer is empty."""
        return self._last.explain_empty()

    @property
    def thinking_modes(self) -> frozenset[bool]:
        """The values that `thinking` may have with this chat format; empty if it has no switch and does not tell."""
        return thinking_modes(self.chat)

    def list_names(self) -> list[str]:
        """Checkpoints are not listed."""
        return []

    def change(self, name: str) -> None:
        """Load another checkpoint in place of the current one, which is loaded again if that fails."""
        chat, before = open_chat(name), (self.name, self.chat)
        del self.engine  # so that memory never holds both
        try:
            self._load(name, chat)
        except (ConfigError, KeyboardInterrupt):
            self._load(*before)
            raise

    def _load(self, source: str, chat: ChatFormat) -> None:
        precision = pick_precision(source, self._precision, self._quantization)
        size = EngineConfig(max_num_seqs=1, dtype=precision, quantization=self._quantization)
        self.engine = Engine(load_model(source, DTYPES[precision]), size)
        self.name, self.chat, self._last = source, chat, LastToken(chat)
        self._thinking_format = thinking_format(chat)


def open_chat(source: str) -> ChatFormat:
    """The chat format of a checkpoint that can be read. Raises ConfigError, also for a base model."""
    open_source(source)
    chat = load_chat(source)
    if not chat.has_template:
        chat.prompt(_QUESTION)
    return chat
