"""Names are the field's terms: no identifier, file name, TOML key or flag holds a word that was replaced."""

import re
import tokenize
import tomllib
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

import pytest

ROOT = Path(__file__).parents[2]
WORDS = {
    "draw draws drawn drew drawing drawings": "sample, plot or generate",
    "learnt": "loss_mask, trained",
    "lesson lessons": "SftDataset",
    "sight": "kv_range",
    "company": "batch",
    "widen widens widened": "dequantize",
    "blocked": "prepacked",
    "payoff": "DraftPolicy",
    "asking": "RolloutConfig",
    "talk talks": "chat",
    "judging": "verifier",
    "adopt adopted": "import_checkpoint",
}
"""Words that no identifier has among its parts, and what stands for them."""
NAMES = {
    "Sampling": "SamplingParams",
    "stop_ids": "stop_token_ids",
    "close_ids": "think_end_token_ids",
    "prompt_ids": "prompt_token_ids",
    "log_probs": "logprobs",
    "salt": "cache_salt",
    "max_batch": "max_num_seqs",
    "max_context": "max_model_len",
    "max_drafts": "num_speculative_tokens",
    "micro_tokens": "micro_batch_tokens",
    "dense_size": "intermediate_size",
    "expert_size": "moe_intermediate_size",
    "holders": "ref_count",
    "SPARE": "NULL_BLOCK",
    "Content": "BlockTokens",
    "Plan": "SchedulerOutput, or what is planned",
    "Form": "ThinkingFormat, OutputFormat",
    "Stored": "Quantization",
    "Storage": "QuantScheme",
    "codes": "qweight",
    "Source": "TensorSource, DocumentSource",
    "Step": "StageRun",
    "Fork": "SharedPromptGroup",
    "lay_out": "collate",
    "Heads": "KVLayout",
    "Piece": "StreamEvent",
    "Round": "RolloutStep",
    "Zero": "RLTrainer",
    "look": "evaluate",
    "penalties": "kl_penalties",
    "GrpoConfig": "RLConfig",
    "lam": "gae_lambda",
    "Family": "PuzzleTask",
    "families": "tasks",
    "join_ranks": "init_ranks",
    "WholeModel": "FusedPass",
}
"""Names that nothing has any more, and what stands for them."""
ENGINE = {"known": "num_tokens", "computed": "num_computed_tokens", "owner": "seq_index", "tables": "block_tables"} | {
    word: "draft tokens" for word in ("guess", "guesses", "guessing")
}
"""The same for the engine alone."""
BRITISH = re.compile(
    r"(normal|quant|initial|summar|orthogonal|standard|optim|serial|recogn|minim|maxim|organ|util)is(e|ed|es|er|ation)$"
    r"|colour|behaviour|neighbour|centred|artefact"
)
PARTS = re.compile(r"[A-Z]+(?=[A-Z][a-z])|[A-Z]?[a-z0-9]+|[A-Z]+")
BANNED = {word: instead for words, instead in WORDS.items() for word in words.split()}
SOURCES = sorted(path for folder in ("thinkstack", "tests", "bench") for path in (ROOT / folder).rglob("*.py"))
RECIPES = sorted((ROOT / "thinkstack").rglob("*.toml"))


def fault(name: str, more: Mapping[str, str] = MappingProxyType({})) -> str | None:
    """What is wrong with a name, or None. more: names beside NAMES."""
    if instead := NAMES.get(name) or more.get(name):
        return f"{name}: say {instead}"
    parts = [part.lower() for part in PARTS.findall(name)]
    found = next((part for part in parts if part in BANNED), None)
    if found is not None:
        return f"{name}: not {found} but {BANNED[found]}"
    british = next((part for part in parts if BRITISH.search(part)), None)
    return None if british is None else f"{name}: {british} is spelt the American way"


def identifiers(path: Path) -> set[str]:
    with path.open("rb") as file:
        found = {token.string for token in tokenize.tokenize(file.readline) if token.type == tokenize.NAME}
    return found - {"draw"} if "hypothesis" in found else found  # hypothesis draws its examples


def faults(names: set[str], more: Mapping[str, str] = MappingProxyType({})) -> list[str]:
    return sorted(filter(None, (fault(name, more) for name in names)))


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_identifiers_and_file_names_are_the_fields_terms(path):
    place = path.relative_to(ROOT)
    more = ENGINE if place.parts[:2] == ("thinkstack", "engine") else {}
    assert faults(identifiers(path) | {path.stem, *place.parent.parts}, more) == []


def keys(table: object) -> set[str]:
    if isinstance(table, dict):
        return set(table) | set().union(*map(keys, table.values()))
    return set().union(*map(keys, table)) if isinstance(table, list) else set()


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: str(path.relative_to(ROOT)))
def test_keys_of_recipes_are_the_fields_terms(path):
    assert faults(keys(tomllib.loads(path.read_text(encoding="utf-8"))) | {path.stem}) == []


def test_other_files_are_named_in_the_fields_terms():
    paths = [path for folder in ("thinkstack", "docs", "bench") for path in (ROOT / folder).rglob("*.*")]
    assert faults({path.stem for path in paths if "__pycache__" not in path.parts}) == []


def test_this_test_notices_replaced_words():
    assert fault("drawn_tokens") and fault("DrawnTokens") and fault("stop_ids") and fault("normalise")
    assert fault("known", ENGINE) and fault("known") is None
    assert fault("withdraw") is None and fault("stop_token_ids") is None and fault("drawer_size") is None
