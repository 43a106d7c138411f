"""Tokenizers: train or load a byte-level BPE; text to ids and back.

Vocabularies trained here have one token per digit, so that numbers are read and written digit by digit. Control tokens
are outside the BPE, so `encode` never returns one, whatever the text.
"""

import itertools
import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, trainers

from thinkstack.files import read_text
from thinkstack.types import ConfigError

BOS, EOS, PAD = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜▁pad▁｜>"
USER, ASSISTANT = "<｜User｜>", "<｜Assistant｜>"
THINK_OPEN, THINK_CLOSE = "<think>", "</think>"
CONTROL = (BOS, EOS, PAD, USER, ASSISTANT, THINK_OPEN, THINK_CLOSE)
"""Control tokens of our vocabularies, in the order of their ids from 0 (names and first three ids as in V3)."""
FIM_BEGIN, FIM_HOLE, FIM_END = "<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>"
FIM = (FIM_HOLE, FIM_BEGIN, FIM_END)
"""Control tokens of text/fim.py, in V3's order; our vocabularies have them, after CONTROL, if fim is used."""
CALLS_BEGIN, CALLS_END = "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"
CALL_BEGIN, CALL_END, CALL_SEP = "<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>", "<｜tool▁sep｜>"
OUTPUTS_BEGIN, OUTPUTS_END = "<｜tool▁outputs▁begin｜>", "<｜tool▁outputs▁end｜>"
OUTPUT_BEGIN, OUTPUT_END = "<｜tool▁output▁begin｜>", "<｜tool▁output▁end｜>"
TOOLS = (
    *(CALLS_BEGIN, CALLS_END, CALL_BEGIN, CALL_END),
    *(OUTPUTS_BEGIN, OUTPUTS_END, OUTPUT_BEGIN, OUTPUT_END, CALL_SEP),
)
"""Control tokens of tool calls and results, in V3's order; our vocabularies have them if tools are used."""

FILE = "tokenizer.json"
_PRINTED = [*range(33, 127), *range(161, 173), *range(174, 256)]
_BYTES = {chr(byte): byte for byte in _PRINTED} | {
    chr(256 + place): byte for place, byte in enumerate(byte for byte in range(256) if byte not in _PRINTED)
}
"""The byte of each character in the tokens of a byte-level BPE (GPT-2)."""
_FALLBACK_BYTE = re.compile("<0x[0-9A-Fa-f]{2}>")


class Control(str):
    """A control token written by a format; the same spelling in a plain str is text."""


class Tokenizer:
    """A `tokenizers` tokenizer that separates control tokens from text."""

    def __init__(self, spec: str):
        """spec: the contents of a tokenizer.json. Its truncation and padding settings, left over from training, are
        dropped: they would truncate and pad prompts.
        """
        data = json.loads(spec)
        if data.get("truncation") or data.get("padding"):
            data |= {"truncation": None, "padding": None}
            spec = json.dumps(data, ensure_ascii=False)
        self.spec = spec
        self._full = tokenizers.Tokenizer.from_str(spec)
        self._added = {t["content"]: t for t in data["added_tokens"] if not t["content"].isspace()}
        self.control = {content: token["id"] for content, token in self._added.items()}
        self.control_of_id = {token: Control(content) for content, token in self.control.items()}
        """The control tokens by id."""
        longest_first = sorted(self.control, key=len, reverse=True)
        self._spellings = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")
        data["added_tokens"] = [token for token in data["added_tokens"] if token["content"].isspace()]
        data["post_processor"] = None
        self.is_byte_level = (data.get("decoder") or {}).get("type") == "ByteLevel"
        """Whether every token is a sequence of bytes, see `bytes_of`."""
        self._bytes: dict[int, bytes] = {}
        """Results of `bytes_of`."""
        self._text = tokenizers.Tokenizer.from_str(json.dumps(data))

    @property
    def vocab_size(self) -> int:
        """Number of tokens, control tokens included."""
        return self._full.get_vocab_size(with_added_tokens=True)

    @property
    def begin_ids(self) -> list[int]:
        """Ids that are prepended to every text: our BOS if the vocabulary has it, else the special tokens that the
        tokenizer prepends. Tokens that it appends (EOS, SEP) are not included; they would end a prompt.
        """
        if BOS in self.control:
            return [self.control[BOS]]
        probe = self._full.encode("a", add_special_tokens=True)
        return list(itertools.compress(probe.ids, itertools.takewhile(bool, probe.special_tokens_mask)))

    def encode(self, text: str) -> list[int]:
        """Return the ids of plain text. Control token spellings in it become ordinary characters."""
        return self._text.encode(text, add_special_tokens=False).ids if text else []

    def encode_pieces(self, pieces: Iterable[str]) -> list[int]:
        """Return the ids of a sequence of texts and control tokens.

        Adjacent texts are joined before encoding, because tokens may span them. Raises ConfigError for a control token
        that the vocabulary lacks.
        """
        ids: list[int] = []
        for is_control, group in itertools.groupby(pieces, lambda piece: isinstance(piece, Control)):
            parts = list(group)
            ids += map(self.control_id, parts) if is_control else self.encode("".join(parts))
        return ids

    def split_controls(self, text: str) -> list[str]:
        """Split text into pieces in which every control token spelling is a Control.

        A control token strips adjacent blanks if its lstrip or rstrip is set. The longest spelling wins.
        """
        pieces: list[str] = []
        start = 0
        for found in self._spellings.finditer(text):
            before, start = text[start : found.start()], found.end()
            if self._added[found[0]].get("rstrip"):
                start += len(text[start:]) - len(text[start:].lstrip())
            pieces += [before.rstrip() if self._added[found[0]].get("lstrip") else before, Control(found[0])]
        return [piece for piece in (*pieces, text[start:]) if piece]

    def control_id(self, token: str) -> int:
        """Return the id of a control token. Raises ConfigError if the vocabulary lacks it."""
        if token not in self.control:
            raise ConfigError(f"this tokenizer has no control token {token!r}; it has {', '.join(self.control)}")
        return self.control[token]

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of ids, including control tokens; bytes that are not UTF-8 become U+FFFD."""
        return self._full.decode(list(ids), skip_special_tokens=False)

    def bytes_of(self, token_id: int) -> bytes:
        """Return the bytes of a token of a byte-level tokenizer; `decode` joins them. Empty for an unknown id."""
        found = self._bytes.get(token_id)
        if found is None:
            token = self._full.id_to_token(token_id) or ""
            is_text = all(character in _BYTES for character in token)  # else a control token
            found = bytes(_BYTES[character] for character in token) if is_text else token.encode()
            self._bytes[token_id] = found
        return found

    def has_text(self, token_id: int) -> bool:
        """Whether `decode` does not skip this id."""
        return self._full.id_to_token(token_id) is not None

    def is_fallback_byte(self, token_id: int) -> bool:
        """Whether a token of a tokenizer that is not byte-level stands for one byte."""
        return _FALLBACK_BYTE.fullmatch(self._full.id_to_token(token_id) or "") is not None

    def save(self, folder: Path) -> None:
        """Write tokenizer.json into `folder`."""
        (folder / FILE).write_text(self.spec, encoding="utf-8")

    @classmethod
    def load(cls, folder: Path) -> "Tokenizer":
        """Read tokenizer.json from `folder`."""
        path = folder / FILE
        if not path.is_file():
            raise ConfigError(f"{folder} has no {FILE}; give the folder of a complete checkpoint")
        return cls(read_text(path))


def train_tokenizer(
    texts: Iterable[str],
    vocab_size: int,
    single_tokens: Sequence[str] = (),
    control: Sequence[str] = CONTROL,
    join_breaks: bool = False,
) -> Tokenizer:
    """Train a byte-level BPE with one token per digit.

    texts: the corpus, plain text. vocab_size: number of tokens, including control tokens and the 256 bytes.
    single_tokens: strings that are split off before merging, so that each becomes one ordinary token ("<answer>").
    control: tokens outside the BPE, in the order of their ids. join_breaks: allow merges of a punctuation mark with the
    line breaks after it, as in V3.
    Raises ConfigError if vocab_size is too small for the bytes, control tokens and single_tokens.
    """
    floor = 256 + len(control) + len(single_tokens)
    if vocab_size < floor:
        raise ConfigError(
            f"vocab_size={vocab_size} is below {floor}, the number of bytes (256) plus control tokens and single_tokens"
        )
    model = tokenizers.Tokenizer(models.BPE())
    joined = [r"[^\s\p{L}\p{N}][\r\n]+"] if join_breaks else []
    pieces = [*map(re.escape, single_tokens), r"\p{N}", r" ?\p{L}+", r"\s+", *joined, r"[^\s\p{L}\p{N}]"]
    model.pre_tokenizer = pre_tokenizers.Sequence(  # type: ignore[assignment]
        [
            pre_tokenizers.Split(Regex("|".join(pieces)), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    model.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[AddedToken(token, special=token in (BOS, EOS, PAD), normalized=False) for token in control],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    model.train_from_iterator(texts, trainer)
    return Tokenizer(model.to_str())
