"""A process that tries grammars out, so that one that never compiles can be killed. It imports llguidance alone.

Reads {"grammars": [[field, grammar], ...], "limits": {...}} from stdin. Writes a line with the number of each grammar
before it compiles it, and then, if it is refused, a line with the reason; both are JSON.
"""

import json
import random
import resource
import sys
import time

from llguidance import LLMatcher, LLParserLimits, LLTokenizer, TokenizerWrapper

MEMORY_BYTES = 4 << 30
"""Maximum address space of this process."""
NUM_WALKS, NUM_STEPS = 3, 100
"""Random walks through each grammar, and bytes per walk: limits are also reached while text is sampled."""
STEP_SECONDS = 0.1
"""Maximum CPU time of a step; a grammar that takes longer per token would hold up an engine."""
STOP = 256


class Bytes:
    """A vocabulary of the 256 bytes and an end token."""

    eos_token_id, bos_token_id = STOP, None
    tokens = (*(bytes([byte]) for byte in range(256)), b"<stop>")
    special_token_ids = (STOP,)

    def __call__(self, text: bytes) -> list[int]:
        return list(text)


def reason(tokenizer: LLTokenizer, grammar: str, limits: LLParserLimits) -> str:
    """Why a grammar cannot be used; "" if it can."""
    compiled = LLMatcher(tokenizer, grammar, log_level=0, limits=limits)
    for seed in range(NUM_WALKS):
        matcher, rng = compiled.deep_copy(), random.Random(seed)
        for _ in range(NUM_STEPS):
            start = time.process_time()
            bitmask = b"" if matcher.is_error() else matcher.compute_bitmask()
            if matcher.is_error():
                found = matcher.get_error().partition("\n<state>")[0]
                return "no text satisfies it" if found.startswith("NoExtension") else found
            if time.process_time() - start > STEP_SECONDS:
                return f"a token takes over {STEP_SECONDS} s"
            allowed = [byte for byte in range(STOP) if bitmask[byte // 8] >> byte % 8 & 1]
            if not allowed:
                break
            matcher.consume_token(rng.choice(allowed))
    return ""


def main() -> None:
    """Try the grammars in order, up to the first that is refused."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    work = json.load(sys.stdin)
    tokenizer, limits = LLTokenizer(TokenizerWrapper(Bytes())), LLParserLimits(**work["limits"])
    for number, grammar in enumerate(work["grammars"]):
        print(number, flush=True)
        if refused := reason(tokenizer, grammar, limits):
            print(json.dumps(refused), flush=True)
            return


if __name__ == "__main__":
    main()
