"""Pre-tokenizers of llama.cpp: the names in tokenizer.ggml.pre, and the equivalent settings of tokenizer.json.

Source: llama.cpp, src/llama-vocab.cpp, and the tokenizer.json of the models that each is named after.
"""

import json
from typing import Any, NamedTuple

_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LATIN = (
    "A-Za-z\xb5\xc0-\xd6\xd8-\xf6\xf8-\u01ba\u01bc-\u01bf\u01c4-\u0293\u0295-\u02af\u0370-\u0373\u0376\u0377\u037b-"
    "\u037d\u037f\u0386\u0388-\u038a\u038c\u038e-\u03a1\u03a3-\u03f5\u03f7-\u0481\u048a-\u052f\u0531-\u0556\u10a0-"
    "\u10c5\u13a0-\u13f5\u13f8-\u13fd\u1c90-\u1cba\u1cbd-\u1cbf\u1d00-\u1d2b\u1d6b-\u1d77\u1d79-\u1d9a\u1e00-\u1f15"
    "\u1f18-\u1f1d\u1f20-\u1f45\u1f48-\u1f4d\u1f50-\u1f57\u1f59\u1f5b\u1f5d\u1f5f-\u1f7d\u1f80-\u1fb4\u1fb6-\u1fbc"
    "\u1fbe\u1fc2-\u1fc4\u1fc6-\u1fcc\u1fd0-\u1fd3\u1fd6-\u1fdb\u1fe0-\u1fec\u1ff2-\u1ff4\u1ff6-\u1ffc\u2102\u2107"
    "\u210a-\u2113\u2115\u2119-\u211d\u2124\u2126\u2128\u212a-\u212d\u212f-\u2134\u2139\u213c-\u213f\u2145-\u2149"
    "\u214e\u2183\u2184\u2c00-\u2c7b\u2c7e-\u2ce4\u2ceb-\u2cee\u2cf2\u2cf3\ua640-\ua66d\ua680-\ua69b\ua722-\ua76f"
    "\ua771-\ua787\ua78b-\ua78e\uab70-\uabbf\ufb00-\ufb06\ufb13-\ufb17\uff21-\uff3a\uff41-\uff5a\U00010400-\U0001044f"
    "\U000104b0-\U000104d3\U000104d8-\U000104fb\U00010c80-\U00010cb2\U00010cc0-\U00010cf2\U000118a0-\U000118df"
    "\U0001e900-\U0001e943"
)
"""Cased letters, as DeepSeek-LLM defines them."""
_EAST_ASIAN = "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+"
_ASCII_MARKS = r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~]"


def _split(pattern: str) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


def _bytes(use_regex: bool) -> dict[str, Any]:
    return {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": use_regex}


class PreTokenizer(NamedTuple):
    """A pre-tokenizer of llama.cpp."""

    steps: tuple[dict[str, Any], ...]
    """Pre-tokenizers of tokenizer.json, applied in order."""
    ignore_merges: bool = False
    """Whether a piece that is itself a token skips merging."""
    adds_bos: bool = False
    """Whether BOS is prepended if the file does not specify it."""
    normalizer: dict[str, Any] | None = None
    """Normalizer of the models that use this pre-tokenizer; llama.cpp does not apply it."""


PRE_TOKENIZERS = {
    "gpt-2": PreTokenizer((_bytes(True),)),
    "smollm": PreTokenizer(({"type": "Digits", "individual_digits": True}, _bytes(True))),
    "qwen2": PreTokenizer(
        (_split(rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}|{_REST}"), _bytes(False)),
        normalizer={"type": "NFC"},
    ),
    "llama-bpe": PreTokenizer(
        (_split(rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}|{_REST}"), _bytes(False)),
        ignore_merges=True,
        adds_bos=True,
    ),
    "deepseek-v3": PreTokenizer(
        (
            _split(r"\p{N}{1,3}"),
            _split("[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+"),
            _split(
                _ASCII_MARKS + r"[A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|"
                r"\s+(?!\S)|\s+"
            ),
            _bytes(False),
        )
    ),
    "deepseek-llm": PreTokenizer(
        (
            _split(r"[\r\n]"),
            _split(rf"\s?[{_LATIN}]+"),
            _split("\\s?[!-/:-~\uff01-\uff0f\uff1a-\uff5e\u2018-\u201f\u3000-\u3002]+"),
            _split(r"\s+$"),
            _split(_EAST_ASIAN),
            {"type": "Digits", "individual_digits": True},
            _bytes(False),
        )
    ),
    "deepseek-coder": PreTokenizer(
        (
            _split(r"[\r\n]"),
            _split(r"\s?\p{L}+"),
            _split(r"\s?\p{P}+"),
            _split(_EAST_ASIAN),
            {"type": "Digits", "individual_digits": True},
            _bytes(False),
        )
    ),
}
"""Pre-tokenizers by name in tokenizer.ggml.pre, in the order in which they are tried."""
ALIASES = {
    "codeshell": "smollm",
    "command-r": "smollm",
    "deepseek-r1-qwen": "qwen2",
    "llama-v3": "llama-bpe",
    "llama3": "llama-bpe",
    "megrez": "qwen2",
    "mpt": "gpt-2",
    "olmo": "gpt-2",
    "phi-2": "gpt-2",
    "refact": "smollm",
    "starcoder": "smollm",
}
"""Other names of the same pre-tokenizers."""
_IGNORED_SETTINGS = ("trim_offsets", "add_prefix_space")
"""Settings of ByteLevel that only change offsets, or that no supported tokenizer sets."""


def sequence(steps: tuple[dict[str, Any], ...]) -> dict[str, Any]:
    """Return the pre_tokenizer entry of a tokenizer.json."""
    return steps[0] if len(steps) == 1 else {"type": "Sequence", "pretokenizers": list(steps)}


def same_rules(pre_tokenizer: dict[str, Any] | None, steps: tuple[dict[str, Any], ...]) -> bool:
    """Whether the pre_tokenizer of a tokenizer.json is equivalent to `steps`."""
    pre_tokenizer = pre_tokenizer or {}
    theirs = pre_tokenizer.get("pretokenizers", [pre_tokenizer])
    return [_canonical(step) for step in theirs] == [_canonical(step) for step in steps]


def _canonical(step: dict[str, Any]) -> str:
    settings = {
        key: value
        for key, value in step.items()
        if key not in _IGNORED_SETTINGS or (key == "add_prefix_space" and value)
    }
    return json.dumps(settings, sort_keys=True)
