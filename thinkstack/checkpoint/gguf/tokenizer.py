"""Byte-level BPE tokenizers to and from tokenizer.ggml.*.

llama.cpp cuts text by rules that it knows by name, not by the file's. Where ours are none of them, one is taken that
gives the same ids on sample texts: merges across our cuts are left out, because no text of ours would use them, and
strings that our rules keep whole (<answer>) become user-defined tokens, which are found by spelling before any rule.
The tokenizer.json goes in too, under the key that GGUF has for it, so that we read back what was written.
"""

import itertools
import json
import logging
from collections.abc import Sequence
from typing import Any, NamedTuple

import tokenizers

from thinkstack.checkpoint.gguf.config import BOS, token_of
from thinkstack.checkpoint.gguf.file import Metadata
from thinkstack.checkpoint.gguf.pre_tokenizers import ALIASES, PRE_TOKENIZERS, Pre, same_cut, sequence
from thinkstack.text.tokenizer import THINK_CLOSE, THINK_OPEN, Tokenizer
from thinkstack.types import ConfigError

NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5
"""tokenizer.ggml.token_type. Control and user-defined tokens are found by spelling; the latter in people's text too."""
MODEL, PRE, ADD_BOS = "tokenizer.ggml.model", "tokenizer.ggml.pre", "tokenizer.ggml.add_bos_token"
TOKENS, TYPES, MERGES = (f"tokenizer.ggml.{name}" for name in ("tokens", "token_type", "merges"))
WHOLE_JSON = "tokenizer.huggingface.json"
PROBES = (
    "What is 12 + 30? It's 42, isn't it; 3*(7-4)/9=1.",
    "User: how many? Assistant: <think>\n2+4=6\n</think>\n<answer>6</answer>\n",
    "The first line.\nThe second one, e.g. \"this\" (or 'that'):\n\n- a list\n- of two items!\n",
    "从左到右计算,每步只保留个位。答案是什么？ 2 × 3 = 6。",
    "Straße, naïve, Ελλάδα, привет, かな, 한국어, 🙂👍🏽 €5 #tag @home x_1 <b>bold</b>",
)
"""Texts on which ids must be equal."""
RARE = (
    "two  spaces",
    "tab\tand \n break",
    "def f(x):\n    return x\n",
    "   indented",
    "end  \n  begin",
    "a\r\nb",
    "2¾ ½x",
)
"""Texts on which a difference is reported."""

MAX_SAMPLES = 20_000
"""Tokens that are looked at between others."""

_log = logging.getLogger(__name__)


class _Cut(NamedTuple):
    """A tokenizer in llama.cpp's terms."""

    pre: str
    merges: list[list[str]]
    whole: dict[str, int]
    """Ordinary tokens that must be cut out before any rule, by text."""


def tokenizer_of(meta: Metadata) -> Tokenizer:
    """The tokenizer in a GGUF; control and user-defined tokens become added tokens. Raises ConfigError for another kind
    than byte-level BPE, unknown rules, and lists that contradict each other.
    """
    path, kind = meta.path, meta.get(MODEL, str)
    if kind != "gpt2":
        raise ConfigError(f"{path}: {MODEL}={kind!r} is not supported; only byte-level BPE ('gpt2') is")
    tokens, types = meta.get(TOKENS, list), meta.get(TYPES, list)
    if len(types) != len(tokens):
        raise ConfigError(f"{path} has {len(tokens)} tokens and {len(types)} token types; fetch another conversion")
    spec = meta.find(WHOLE_JSON, str) or _spec_of(meta, tokens, types)
    try:
        tokenizer = Tokenizer(spec)
    except Exception as error:  # tokenizers raises plain Exception for what it cannot use
        raise ConfigError(f"{path} holds a damaged tokenizer ({error}); fetch another conversion") from error
    known = _vocabulary(tokenizer)
    for index, (token, type_) in enumerate(zip(tokens, types, strict=True)):
        if type_ in (NORMAL, CONTROL) and known.get(token) != index:
            raise ConfigError(f"{path}: token {index} is {token!r} in {TOKENS} only; fetch another conversion")
    return tokenizer


def _spec_of(meta: Metadata, tokens: list[str], types: list[int]) -> str:
    """A tokenizer.json made of the lists."""
    name = meta.find(PRE, str) or "gpt-2"
    pre = PRE_TOKENIZERS.get(ALIASES.get(name, name))
    if pre is None:
        known = ", ".join(sorted({*PRE_TOKENIZERS, *ALIASES}))
        raise ConfigError(f"{meta.path}: {PRE}={name!r} is not supported; known: {known}")
    used = {token: index for index, token in enumerate(tokens) if types[index] != UNUSED}
    added = [
        added_token(index, token, types[index] == CONTROL)
        for token, index in used.items()
        if types[index] in (CONTROL, USER_DEFINED)
    ]
    is_joined = any(types[index] == NORMAL and len(token) > 1 for token, index in used.items())
    merges = [merge.split(" ", 1) for merge in (meta.get(MERGES, list) if is_joined else meta.find(MERGES, list) or [])]
    spec = bpe_spec(used, merges, added, pre)
    adds_bos, bos = meta.find(ADD_BOS, bool), token_of(meta, BOS)
    if bos is not None and (pre.adds_bos if adds_bos is None else adds_bos):
        if not 0 <= bos < len(tokens) or tokens[bos] not in used:
            raise ConfigError(f"{meta.path}: texts begin with token {bos}, which it lacks; fetch another conversion")
        spec["post_processor"] = _begin_with(tokens[bos], bos)
    return json.dumps(spec, ensure_ascii=False)


def added_token(index: int, content: str, special: bool) -> dict[str, Any]:
    """A token that is found by its spelling."""
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return {"id": index, "content": content, **plain, "special": special}


def bpe_spec(
    vocabulary: dict[str, int], merges: list[list[str]], added: list[dict[str, Any]], pre: Pre
) -> dict[str, Any]:
    """A tokenizer.json."""
    model = {
        "type": "BPE",
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": False,
        "byte_fallback": False,
        "ignore_merges": pre.ignore_merges,
        "vocab": vocabulary,
        "merges": merges,
    }
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": pre.normalizer,
        "pre_tokenizer": sequence(pre.steps),
        "post_processor": None,
        "decoder": PRE_TOKENIZERS["gpt-2"].steps[0],
        "model": model,
    }


def _begin_with(token: str, index: int) -> dict[str, Any]:
    first, text = {"SpecialToken": {"id": token, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}
    pair = [first, text, {"Sequence": {"id": "B", "type_id": 1}}]
    known = {token: {"id": token, "ids": [index], "tokens": [token]}}
    return {"type": "TemplateProcessing", "single": [first, text], "pair": pair, "special_tokens": known}


def _vocabulary(tokenizer: Tokenizer) -> dict[str, int]:
    return tokenizers.Tokenizer.from_str(tokenizer.spec).get_vocab(with_added_tokens=True)


def tokenizer_values(tokenizer: Tokenizer, rows: int) -> dict[str, Any]:
    """tokenizer.ggml.* of a tokenizer, BOS aside. rows: tokens of the model, filled up with unused ones.

    Raises ConfigError for another kind than byte-level BPE, and for rules that llama.cpp has nothing like.
    """
    spec = json.loads(tokenizer.spec)
    _check_kind(spec)
    name = _known_pre(spec)
    cut = _Cut(name, _merges(spec), {}) if name else _like(tokenizer, spec)
    tokens = [f"[PAD{index}]" for index in range(rows)]
    types = [UNUSED] * rows
    for content, index in _vocabulary(tokenizer).items():
        tokens[index], types[index] = content, NORMAL
    for token in spec["added_tokens"]:
        tokens[token["id"]], types[token["id"]] = token["content"], CONTROL if _is_hidden(token) else USER_DEFINED
    for content, index in cut.whole.items():
        tokens[index], types[index] = content, USER_DEFINED
    values: dict[str, Any] = {
        MODEL: "gpt2",
        PRE: cut.pre,
        TOKENS: tokens,
        TYPES: types,
        MERGES: [" ".join(merge) for merge in cut.merges],
        ADD_BOS: bool(tokenizer.begin_ids),
    }
    return values if name else values | {WHOLE_JSON: tokenizer.spec}


def _check_kind(spec: dict[str, Any]) -> None:
    model, decoder = spec["model"], spec.get("decoder") or {}
    if model.get("type") != "BPE" or decoder.get("type") != "ByteLevel" or model.get("byte_fallback"):
        raise ConfigError(
            f"a {model.get('type')} tokenizer with a {decoder.get('type')} decoder does not go into a GGUF; only "
            "byte-level BPE does: write the hf format instead"
        )
    normalizer = spec.get("normalizer")
    if normalizer and normalizer != {"type": "NFC"} and normalizer.get("normalizers") != []:
        raise ConfigError(f"llama.cpp does not normalize text by {normalizer.get('type')}; write the hf format instead")


def _is_hidden(token: dict[str, Any]) -> bool:
    """Whether llama.cpp leaves an added token out of the text it shows; think tags are there for people to read."""
    content = token["content"]
    looks = content.startswith(("<|", "<｜")) and content.endswith(("|>", "｜>"))  # as llama.cpp's converter has it
    return (token["special"] or looks) and content not in (THINK_OPEN, THINK_CLOSE)


def _merges(spec: dict[str, Any]) -> list[list[str]]:
    """Old files have each merge in one string."""
    return [merge.split(" ", 1) if isinstance(merge, str) else merge for merge in spec["model"]["merges"]]


def _known_pre(spec: dict[str, Any]) -> str | None:
    ignore = bool(spec["model"].get("ignore_merges"))
    for name, pre in PRE_TOKENIZERS.items():
        if pre.ignore_merges == ignore and same_cut(spec["pre_tokenizer"], pre.steps):
            return name
    return None


def _like(tokenizer: Tokenizer, spec: dict[str, Any]) -> _Cut:
    """The rules of llama.cpp that give the ids of `tokenizer` with the fewest strings cut out first.

    Raises ConfigError, naming a text, if none does.
    """
    texts = _texts(tokenizer)
    cutter = tokenizers.Tokenizer.from_str(tokenizer.spec).pre_tokenizer
    torn = {token for token, text in texts.items() if len(cutter.pre_tokenize_str(text)) > 1}
    merges = [merge for merge in _merges(spec) if "".join(merge) not in torn]
    kept = {text: spec["model"]["vocab"][token] for token, text in texts.items() if token not in torn and text[1:]}
    samples = [f"x{text}{text}1" for text in [*texts.values()][:MAX_SAMPLES] if not _has_gap(text)]
    found: list[tuple[_Cut, list[str]]] = []
    wrong = ""
    for name, pre in PRE_TOKENIZERS.items():
        bare = _trial(spec, merges, {}, pre)
        whole = {text: index for text, index in kept.items() if tokenizer.encode(text) == [index] != bare.encode(text)}
        trial = tokenizers.Tokenizer.from_str(_trial(spec, merges, whole, pre).spec)

        def differing(texts: Sequence[str], trial: tokenizers.Tokenizer = trial) -> list[str]:
            return [text for text in texts if trial.encode(text).ids != tokenizer.encode(text)]

        if first := differing([*PROBES, *samples]):
            wrong = wrong or first[0]
        else:
            found.append((_Cut(name, merges, whole), differing(RARE)))
    if not found:
        raise ConfigError(
            f"llama.cpp has no rules that cut text as this tokenizer does, for example {wrong!r}; write the hf format "
            "instead"
        )
    cut, rare = min(found, key=lambda pair: (len(pair[0].whole), len(pair[1])))
    if rare:
        _log.warning(
            "llama.cpp will cut texts such as %s into other tokens than this tokenizer; common ones into the same",
            ", ".join(map(repr, rare)),
        )
    return cut


def _has_gap(text: str) -> bool:
    """Whether it is blank, or has blanks side by side, as the rare texts have."""
    return text.isspace() or any(a.isspace() and b.isspace() for a, b in itertools.pairwise(text))


def _trial(spec: dict[str, Any], merges: list[list[str]], whole: dict[str, int], pre: Pre) -> Tokenizer:
    """What llama.cpp makes of people's text: control tokens are left out."""
    added = [added_token(index, text, False) for text, index in whole.items()]
    return Tokenizer(json.dumps(bpe_spec(spec["model"]["vocab"], merges, added, pre._replace(normalizer=None))))


def _texts(tokenizer: Tokenizer) -> dict[str, str]:
    """The text of every ordinary token that is whole characters."""
    vocabulary = {token: index for token, index in _vocabulary(tokenizer).items() if token not in tokenizer.control}
    texts = {token: tokenizer.decode([index]) for token, index in vocabulary.items()}
    return {token: text for token, text in texts.items() if "\ufffd" not in text}
