"""Engines with quantized weights: completions of the dequantized weights, also after a change of weights."""

import copy
from dataclasses import replace

import pytest
import torch

from tests.tiny import GQA_TINY, MLA_TINY, tiny_model
from thinkstack.engine.engine import Engine, EngineConfig
from thinkstack.models.precision import QUANT_SCHEMES
from thinkstack.models.quantized import dequantize_model, quantizable_matrices, quantize_model
from thinkstack.models.transformer import Transformer
from thinkstack.types import ConfigError, SamplingParams

LONG = {"max_positions": 300}
KINDS = {
    "latent, experts": replace(MLA_TINY, **LONG),
    "grouped": replace(GQA_TINY, **LONG),
    "tied": replace(GQA_TINY, tie_embeddings=True, **LONG),
}
INT8 = EngineConfig(max_num_seqs=16, quantization="int8")


def dequantized_model(model: Transformer, weights: str = "int8") -> Transformer:
    """A plain model with the dequantized weights."""
    copied = copy.deepcopy(model)
    with torch.no_grad():
        quantize_model(copied, QUANT_SCHEMES[weights], [*quantizable_matrices(copied), "head.weight"])
        return dequantize_model(copied)


def prompts(count: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(48, (5 + 37 * index,), generator=generator).tolist() for index in range(count)]


def completions(engine: Engine, prompt_token_ids: list[list[int]]) -> list[tuple[int, ...]]:
    how = [SamplingParams(max_tokens=20, seed=seed, temperature=seed % 2) for seed in range(len(prompt_token_ids))]
    return [group[0].token_ids for group in engine.generate(prompt_token_ids, how)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("weights", QUANT_SCHEMES)
def test_completions_are_those_of_the_dequantized_weights(kind, weights, path):
    model, prompt_token_ids = tiny_model(KINDS[kind]), prompts(4)
    found = completions(Engine(model, replace(INT8, quantization=weights)), prompt_token_ids)
    assert found == completions(
        Engine(dequantized_model(model, weights), EngineConfig(max_num_seqs=16)), prompt_token_ids
    )


def test_completions_on_quantized_weights_are_batch_invariant(path):
    model, prompt_token_ids = tiny_model(**LONG), prompts(3)
    how = [SamplingParams(max_tokens=20, seed=seed) for seed in range(3)]
    together = Engine(model, INT8).generate(prompt_token_ids, how)
    for prompt, sampling, found in zip(prompt_token_ids, how, together, strict=True):
        assert Engine(model, INT8).generate([prompt], [sampling])[0][0].token_ids == found[0].token_ids


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_new_weights_are_quantized_and_the_prefix_cache_is_reset(dtype):
    """Both for another model and for the same one after training; neither is changed."""
    model, other = tiny_model(**LONG), tiny_model(seed=1, **LONG)
    prompt_token_ids, cfg = prompts(5)[-1:], replace(INT8, dtype=dtype)
    engine = Engine(model, cfg)
    first, expected = completions(engine, prompt_token_ids), completions(Engine(other, cfg), prompt_token_ids)
    assert first != expected
    engine.load_weights(other, version=1)
    assert completions(engine, prompt_token_ids) == expected
    engine.load_weights(model, version=2)
    assert completions(engine, prompt_token_ids) == first
    model.load_state_dict(other.state_dict())
    engine.load_weights(model, version=3)
    request = engine.submit(prompt_token_ids[0], SamplingParams(max_tokens=1))
    engine.step()
    assert request.num_cached_tokens == 0 and request.is_finished
    assert completions(engine, prompt_token_ids) == expected
    same = zip(model.state_dict().items(), tiny_model(seed=1, **LONG).state_dict().items(), strict=True)
    assert all(name == known and torch.equal(value, wanted) for (name, value), (known, wanted) in same)


def test_an_unknown_quantization_is_refused_by_name():
    with pytest.raises(ConfigError, match="quantization='int4' is not supported; use one of none, int8, fp8, nf4"):
        EngineConfig(quantization="int4")  # type: ignore[arg-type]
