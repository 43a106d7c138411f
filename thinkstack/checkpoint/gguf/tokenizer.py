"""Conversion of byte-level BPE tokenizers to and from the metadata tokenizer.ggml.*.

llama.cpp has a fixed set of pre-tokenizers, selected by name. If a tokenizer uses another one, the pre-tokenizer that
gives the same ids on sample texts is chosen: merges across the boundaries of our pre-tokenizer are left out, because
they are never used, and strings that our pre-tokenizer does not split (<answer>) become user-defined tokens, which are
found by spelling before pre-tokenization. The tokenizer.json is stored too, under GGUF's key for it, so that reading
restores the original tokenizer.
"""

import itertools
import json
import logging
from collections.abc import Sequence
from typing import Any, NamedTuple

import tokenizers

from thinkstack.checkpoint.gguf.config import BOS_KEY, token_id_of
from thinkstack.checkpoint.gguf.file import Metadata
from thinkstack.checkpoint.gguf.pre_tokenizers import ALIASES, PRE_TOKENIZERS, PreTokenizer, same_rules, sequence
from thinkstack.text.tokenizer import THINK_CLOSE, THINK_OPEN, Tokenizer
from thinkstack.types import ConfigError

NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5
"""Values of tokenizer.ggml.token_type. Control and user-defined tokens are found by spelling; user-defined tokens also
in message text."""
MODEL, PRE, ADD_BOS = "tokenizer.ggml.model", "tokenizer.ggml.pre", "tokenizer.ggml.add_bos_token"
TOKENS, TYPES, MERGES = (f"tokenizer.ggml.{name}" for name in ("tokens", "token_type", "merges"))
TOKENIZER_JSON = "tokenizer.huggingface.json"
PROBE_TEXTS = (
    "What is 12 + 30? It's 42, isn't it; 3*(7-4)/9=1.",
    "User: how many? Assistant: <think>\n2+4=6\n</think>\n<answer>6</answer>\n",
    "The first line.\nThe second one, e.g. \"this\" (or 'that'):\n\n- a list\n- of two items!\n",
    "从左到右计算,每步只保留个位。答案是什么？ 2 × 3 = 6。",
    "Straße, naïve, Ελλάδα, привет, かな, 한국어, 🙂👍🏽 €5 #tag @home x_1 <b>bold</b>",
)
"""Texts whose ids must be the same in llama.cpp as in our tokenizer."""
RARE_TEXTS = (
    "two  spaces",
    "tab\tand \n break",
    "def f(x):\n    return x\n",
    "   indented",
    "end  \n  begin",
    "a\r\nb",
    "2¾ ½x",
)
"""Texts for which a difference is only logged."""

MAX_SAMPLES = 20_000
"""Maximum number of tokens that are each tested inside a longer text."""

_log = logging.getLogger(__name__)


class _TokenizerFields(NamedTuple):
    """The metadata of a tokenizer that depend on the pre-tokenizer."""

    pre: str
    merges: list[list[str]]
    user_defined: dict[str, int]
    """Ordinary tokens that must be found before pre-tokenization: text -> id."""


def tokenizer_of(meta: Metadata) -> Tokenizer:
    """Return the tokenizer in a GGUF; control and user-defined tokens become added tokens.

    Raises ConfigError for a tokenizer other than byte-level BPE, an unknown pre-tokenizer, and inconsistent lists.
    """
    path, kind = meta.path, meta.get(MODEL, str)
    if kind != "gpt2":
        raise ConfigError(f"{path}: {MODEL}={kind!r} is not supported; only byte-level BPE ({MODEL}='gpt2') is")
    tokens, types = meta.get(TOKENS, list), meta.get(TYPES, list)
    if len(types) != len(tokens):
        raise ConfigError(f"{path} has {len(tokens)} tokens and {len(types)} token types; fetch another conversion")
    spec = meta.find(TOKENIZER_JSON, str) or _spec_of(meta, tokens, types)
    try:
        tokenizer = Tokenizer(spec)
    except Exception as error:  # tokenizers raises a plain Exception for invalid input
        raise ConfigError(f"{path} contains a damaged tokenizer ({error}); fetch another conversion") from error
    known = _vocabulary(tokenizer)
    for index, (token, type_) in enumerate(zip(tokens, types, strict=True)):
        if type_ in (NORMAL, CONTROL) and known.get(token) != index:
            raise ConfigError(
                f"{path}: token {index} is {token!r} in {TOKENS}, but not in the tokenizer; fetch another conversion"
            )
    return tokenizer


def _spec_of(meta: Metadata, tokens: list[str], types: list[int]) -> str:
    """Build a tokenizer.json from the lists."""
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
    adds_bos, bos = meta.find(ADD_BOS, bool), token_id_of(meta, BOS_KEY)
    if bos is not None and (pre.adds_bos if adds_bos is None else adds_bos):
        if not 0 <= bos < len(tokens) or tokens[bos] not in used:
            raise ConfigError(f"{meta.path}: {BOS_KEY}={bos} is not a token of the file; fetch another conversion")
        spec["post_processor"] = _bos_post_processor(tokens[bos], bos)
    return json.dumps(spec, ensure_ascii=False)


def added_token(index: int, content: str, special: bool) -> dict[str, Any]:
    """Return the tokenizer.json entry of a token that is found by its spelling."""
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return {"id": index, "content": content, **plain, "special": special}


def bpe_spec(
    vocabulary: dict[str, int], merges: list[list[str]], added: list[dict[str, Any]], pre: PreTokenizer
) -> dict[str, Any]:
    """Return the contents of a tokenizer.json."""
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


def _bos_post_processor(token: str, index: int) -> dict[str, Any]:
    first, text = {"SpecialToken": {"id": token, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}
    pair = [first, text, {"Sequence": {"id": "B", "type_id": 1}}]
    known = {token: {"id": token, "ids": [index], "tokens": [token]}}
    return {"type": "TemplateProcessing", "single": [first, text], "pair": pair, "special_tokens": known}


def _vocabulary(tokenizer: Tokenizer) -> dict[str, int]:
    return tokenizers.Tokenizer.from_str(tokenizer.spec).get_vocab(with_added_tokens=True)


def tokenizer_values(tokenizer: Tokenizer, rows: int) -> dict[str, Any]:
    """Return the metadata tokenizer.ggml.* of a tokenizer, without the BOS token.

    rows: vocabulary size of the model; if the tokenizer has fewer tokens, the list is padded with unused tokens.
    Raises ConfigError for a tokenizer other than byte-level BPE, and if no pre-tokenizer of llama.cpp matches.
    """
    spec = json.loads(tokenizer.spec)
    _check_kind(spec)
    name = _rules_of(spec)
    fields = _TokenizerFields(name, _merges(spec), {}) if name else _closest_rules(tokenizer, spec)
    tokens = [f"[PAD{index}]" for index in range(rows)]
    types = [UNUSED] * rows
    for content, index in _vocabulary(tokenizer).items():
        tokens[index], types[index] = content, NORMAL
    for token in spec["added_tokens"]:
        tokens[token["id"]], types[token["id"]] = token["content"], CONTROL if _is_hidden(token) else USER_DEFINED
    for content, index in fields.user_defined.items():
        tokens[index], types[index] = content, USER_DEFINED
    values: dict[str, Any] = {
        MODEL: "gpt2",
        PRE: fields.pre,
        TOKENS: tokens,
        TYPES: types,
        MERGES: [" ".join(merge) for merge in fields.merges],
        ADD_BOS: bool(tokenizer.begin_ids),
    }
    return values if name else values | {TOKENIZER_JSON: tokenizer.spec}


def _check_kind(spec: dict[str, Any]) -> None:
    model, decoder = spec["model"], spec.get("decoder") or {}
    if model.get("type") != "BPE" or decoder.get("type") != "ByteLevel" or model.get("byte_fallback"):
        raise ConfigError(
            f"a {model.get('type')} tokenizer with a {decoder.get('type')} decoder is not supported in a GGUF, only "
            "byte-level BPE; write the hf format instead"
        )
    normalizer = spec.get("normalizer")
    if normalizer and normalizer != {"type": "NFC"} and normalizer.get("normalizers") != []:
        raise ConfigError(f"llama.cpp does not normalize text by {normalizer.get('type')}; write the hf format instead")


def _is_hidden(token: dict[str, Any]) -> bool:
    """Whether llama.cpp hides an added token in its output; think tags are not hidden."""
    content = token["content"]
    looks = content.startswith(("<|", "<｜")) and content.endswith(("|>", "｜>"))  # the rule of llama.cpp's converter
    return (token["special"] or looks) and content not in (THINK_OPEN, THINK_CLOSE)


def _merges(spec: dict[str, Any]) -> list[list[str]]:
    """Return the merges as pairs; old files store each merge as one string."""
    return [merge.split(" ", 1) if isinstance(merge, str) else merge for merge in spec["model"]["merges"]]


def _rules_of(spec: dict[str, Any]) -> str | None:
    ignore = bool(spec["model"].get("ignore_merges"))
    for name, pre in PRE_TOKENIZERS.items():
        if pre.ignore_merges == ignore and same_rules(spec["pre_tokenizer"], pre.steps):
            return name
    return None


def _closest_rules(tokenizer: Tokenizer, spec: dict[str, Any]) -> _TokenizerFields:
    """Find the pre-tokenizer of llama.cpp that gives the ids of `tokenizer` with the fewest user-defined tokens.

    Raises ConfigError with an example text if there is none.
    """
    texts = _token_texts(tokenizer)
    pre_tokenizer = tokenizers.Tokenizer.from_str(tokenizer.spec).pre_tokenizer
    crossing = {token for token, text in texts.items() if len(pre_tokenizer.pre_tokenize_str(text)) > 1}
    merges = [merge for merge in _merges(spec) if "".join(merge) not in crossing]
    candidates = {
        text: spec["model"]["vocab"][token] for token, text in texts.items() if token not in crossing and text[1:]
    }
    samples = [f"x{text}{text}1" for text in [*texts.values()][:MAX_SAMPLES] if not _has_blank_run(text)]
    found: list[tuple[_TokenizerFields, list[str]]] = []
    wrong = ""
    for name, pre in PRE_TOKENIZERS.items():
        bare = _trial(spec, merges, {}, pre)
        user_defined = {
            text: index for text, index in candidates.items() if tokenizer.encode(text) == [index] != bare.encode(text)
        }
        trial = tokenizers.Tokenizer.from_str(_trial(spec, merges, user_defined, pre).spec)

        def differing(texts: Sequence[str], trial: tokenizers.Tokenizer = trial) -> list[str]:
            return [text for text in texts if trial.encode(text).ids != tokenizer.encode(text)]

        if first := differing([*PROBE_TEXTS, *samples]):
            wrong = wrong or first[0]
        else:
            found.append((_TokenizerFields(name, merges, user_defined), differing(RARE_TEXTS)))
    if not found:
        raise ConfigError(
            f"no pre-tokenizer of llama.cpp splits text like this tokenizer, for example {wrong!r}; write the hf "
            "format instead"
        )
    fields, rare = min(found, key=lambda pair: (len(pair[0].user_defined), len(pair[1])))
    if rare:
        _log.warning(
            "llama.cpp will tokenize texts such as %s differently from this tokenizer; common texts get equal ids",
            ", ".join(map(repr, rare)),
        )
    return fields


def _has_blank_run(text: str) -> bool:
    """Whether the text is blank or has adjacent blanks, as the rare texts have."""
    return text.isspace() or any(a.isspace() and b.isspace() for a, b in itertools.pairwise(text))


def _trial(spec: dict[str, Any], merges: list[list[str]], user_defined: dict[str, int], pre: PreTokenizer) -> Tokenizer:
    """Return a tokenizer that behaves like llama.cpp on message text, without control tokens."""
    added = [added_token(index, text, False) for text, index in user_defined.items()]
    return Tokenizer(json.dumps(bpe_spec(spec["model"]["vocab"], merges, added, pre._replace(normalizer=None))))


def _token_texts(tokenizer: Tokenizer) -> dict[str, str]:
    """Return the text of every ordinary token that consists of complete characters."""
    vocabulary = {token: index for token, index in _vocabulary(tokenizer).items() if token not in tokenizer.control}
    texts = {token: tokenizer.decode([index]) for token, index in vocabulary.items()}
    return {token: text for token, text in texts.items() if "\ufffd" not in text}
