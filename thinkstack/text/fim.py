"""Fill in the middle: documents rearranged as prefix, suffix, middle (arXiv:2207.14255).

The order is PSM (prefix, suffix, middle) as in DeepSeek-V3 (report, arXiv:2412.19437, section 4.1).
"""

import random

from thinkstack.text.tokenizer import EOS, FIM_BEGIN, FIM_END, FIM_HOLE, Control, Tokenizer
from thinkstack.types import ConfigError, RequestError


def check_fim(tokenizer: Tokenizer) -> None:
    """Raise ConfigError for a tokenizer without the control tokens of this format."""
    missing = [token for token in (FIM_BEGIN, FIM_HOLE, FIM_END, EOS) if token not in tokenizer.control]
    if missing:
        raise ConfigError(
            f"fim_rate is above 0, but this tokenizer has no control token {', '.join(missing)}; set fim_rate=0, or "
            "train a new model, whose tokenizer will have them"
        )


def fim_prompt(tokenizer: Tokenizer, prefix: str, suffix: str | None = None) -> list[int]:
    """Return the prompt ids whose completion is the text between prefix and suffix: BOS, begin, prefix, hole, suffix,
    end. Without a suffix, the completion continues the prefix.

    Raises RequestError if there is a suffix and the vocabulary lacks one of the control tokens.
    """
    if suffix is None:
        return [*tokenizer.begin_ids, *tokenizer.encode(prefix)]
    missing = [token for token in (FIM_BEGIN, FIM_HOLE, FIM_END) if token not in tokenizer.control]
    if missing:
        raise RequestError(
            f"suffix is not supported: this model's tokenizer has no control token {', '.join(missing)}; remove suffix",
            "suffix",
        )
    pieces = [Control(FIM_BEGIN), prefix, Control(FIM_HOLE), suffix, Control(FIM_END)]
    return [*tokenizer.begin_ids, *tokenizer.encode_pieces(pieces)]


def fill_in_middle(text: str, tokenizer: Tokenizer, rng: random.Random) -> list[int]:
    """Return the ids of `text` with a hole: begin, prefix, hole, suffix, end, middle, EOS; without BOS.

    Two independent, uniform cuts between characters make the three parts; each may be empty. Text is never encoded as
    a control token, so prefix + middle + suffix equals `text`.
    """
    first, second = sorted(rng.randrange(len(text) + 1) for _ in range(2))
    control, encode = tokenizer.control_id, tokenizer.encode
    return [
        control(FIM_BEGIN),
        *encode(text[:first]),
        control(FIM_HOLE),
        *encode(text[second:]),
        control(FIM_END),
        *encode(text[first:second]),
        control(EOS),
    ]
