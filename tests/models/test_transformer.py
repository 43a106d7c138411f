"""The model: packing, causality, both forms of MLA, multi-token prediction, errors."""

from dataclasses import replace

import pytest
import torch

from tests.tiny import GQA_TINY, MLA_TINY, random_examples, tiny_model
from thinkstack.data import collate, pack
from thinkstack.engine.block_pool import BLOCK_SIZE
from thinkstack.engine.kv_cache import KVCache, KVCacheView
from thinkstack.kernels.masks import additive_mask, kv_range_of
from thinkstack.kernels.paging import Pages
from thinkstack.models.config import MLAConfig, YarnConfig, named
from thinkstack.models.precision import cast_copy, update_copy
from thinkstack.models.transformer import Transformer
from thinkstack.types import ConfigError, RequestError

BOTH = pytest.mark.parametrize("cfg", [MLA_TINY, GQA_TINY], ids=["mla", "gqa"])


def random_ids(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(48, shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("q_lora_rank", [12, 0], ids=["query latent", "direct query"])
def test_mla_absorbed_equals_expanded(q_lora_rank):
    attention = replace(MLA_TINY.attention, q_lora_rank=q_lora_rank)
    yarn = replace(MLA_TINY.rope, yarn=YarnConfig(original_max_positions=16))
    model, ids = tiny_model(attention=attention, rope=yarn), random_ids(2, 20)
    cache, places = KVCache(model.cfg, 3, torch.float32), torch.arange(20).repeat(2)
    seq_index = torch.arange(2).repeat_interleave(20)
    pages = Pages(cache.data[0], torch.tensor([[1], [2]], dtype=torch.int32), seq_index.int())
    view = KVCacheView(cache, pages, (seq_index + 1) * BLOCK_SIZE + places)
    with torch.no_grad():
        absorbed = model(ids.view(40, 1), places.view(40, 1), cache=view).view(2, 20, -1)
    torch.testing.assert_close(absorbed, model(ids), rtol=1e-5, atol=2e-5)


@BOTH
def test_packed_documents_give_the_logits_of_separate_ones(cfg):
    """Attention across documents, or positions that do not restart, would change the logits."""
    model, samples = tiny_model(cfg), random_examples([9, 5, 12, 3])
    batch = collate(samples, pack(samples, 16), 16)
    packed = model(batch.ids, batch.positions, batch.document_ids)
    for index, sample in enumerate(samples):
        alone = model(torch.tensor([sample.ids[:-1]]))[0]
        torch.testing.assert_close(packed[batch.document_ids == index + 1], alone, rtol=1e-5, atol=2e-5)


@BOTH
def test_no_token_depends_on_a_later_one(cfg):
    model, ids = tiny_model(cfg), random_ids(1, 12)
    changed = ids.clone()
    changed[0, 7:] = (changed[0, 7:] + 1) % 48
    torch.testing.assert_close(model(ids)[:, :7], model(changed)[:, :7])
    assert not torch.allclose(model(ids)[:, 7], model(changed)[:, 7])


def test_a_row_beside_padding_equals_the_row_alone():
    """Padding must not shift positions or be attended to."""
    model, ids = tiny_model(), random_ids(1, 10)
    padded = torch.cat((ids, torch.zeros(1, 6, dtype=torch.int64)), 1)
    documents = torch.tensor([[1] * 10 + [0] * 6])
    torch.testing.assert_close(model(padded, None, documents)[:, :10], model(ids), rtol=1e-5, atol=2e-5)


def test_the_mask_of_two_documents():
    kv_range = kv_range_of(torch.tensor([[1, 1, 2]]))
    assert kv_range[..., 0].tolist() == [[0, 0, 2]]
    mask = additive_mask(kv_range, torch.float32)
    shut = -torch.inf
    assert mask[0, 0].tolist() == [[0, shut, shut], [0, 0, shut], [shut, shut, 0]]


def test_branches_attend_to_the_shared_tokens_and_themselves():
    documents, branches = torch.tensor([[1, 1, 1, 1, 1, 2]]), torch.tensor([[0, 0, 1, 2, 2, 0]])
    seen = additive_mask(kv_range_of(documents, branches), torch.float32)[0, 0] == 0
    assert [row.nonzero().flatten().tolist() for row in seen] == [[0], [0, 1], [0, 1, 2], [0, 1, 3], [0, 1, 3, 4], [5]]


def test_training_and_inference_mode_agree():
    """There is no dropout and no router noise, which would make rollout and trainer disagree."""
    model, ids = tiny_model(), random_ids(2, 8)
    assert torch.equal(model.train()(ids), model.eval()(ids))


def test_the_mtp_module_combines_the_hidden_state_with_the_next_token():
    """V3 report, equations 21-23: h' = Block(M [norm(Emb(t_{i+1})); norm(h_i)]), embedding first."""
    model, ids = tiny_model(), random_ids(1, 6)
    trunk = model.trunk(ids)
    states, routing = model.mtp_hidden_states(trunk, ids)
    module = model.mtp[0]
    following = model.embed(torch.tensor([[*ids[0, 1:].tolist(), 0]]))
    merged = torch.cat((module.embedding_norm(following), module.hidden_norm(trunk.hidden)), -1)
    expected = module.norm(module.block(merged @ module.merge.weight.T, trunk.context)[0])
    torch.testing.assert_close(states[0], expected)
    assert len(routing) == 1


def test_the_mtp_state_depends_on_the_next_token_and_no_later_one():
    model, ids = tiny_model(), random_ids(1, 8)
    changed = ids.clone()
    changed[0, 5] = (changed[0, 5] + 1) % 48
    before, after = (model.mtp_hidden_states(model.trunk(x), x)[0][0] for x in (ids, changed))
    torch.testing.assert_close(before[:, :4], after[:, :4])
    assert not torch.allclose(before[:, 4], after[:, 4])


def test_a_second_mtp_module_predicts_one_token_further():
    model, ids = tiny_model(mtp_layers=2), random_ids(1, 8)
    changed = ids.clone()
    changed[0, 6] = (changed[0, 6] + 1) % 48
    before, after = (model.mtp_hidden_states(model.trunk(x), x)[0][1] for x in (ids, changed))
    torch.testing.assert_close(before[:, :4], after[:, :4])
    assert not torch.allclose(before[:, 4], after[:, 4])


@pytest.mark.parametrize("detached", [False, True])
def test_detached_mtp_sends_no_gradient_to_the_trunk(detached):
    model, ids = tiny_model(), random_ids(1, 6)
    states, _ = model.mtp_hidden_states(model.trunk(ids), ids, detached)
    states[0].square().sum().backward()
    touched = {name.split(".")[0] for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    assert touched == ({"mtp"} if detached else {"mtp", "embed", "layers", "norm"})


def test_tied_embeddings_are_one_parameter():
    model = tiny_model(GQA_TINY, tie_embeddings=True)
    assert model.head.weight is model.embed.weight
    assert sum(p is model.embed.weight for p in model.parameters()) == 1


def test_initial_weights_depend_on_the_seed_only():
    first, second, third = (tiny_model(seed=seed).state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first["head.weight"], third["head.weight"])


def test_initial_matrices_have_the_stated_spread():
    model = Transformer(replace(named("v3-tiny"))).initialize(torch.Generator().manual_seed(0))
    assert float(model.layers[2].ffn.w_in.detach().std()) == pytest.approx(0.1, rel=0.02)
    assert float(model.embed.weight.detach().std()) == pytest.approx(0.3, rel=0.02)
    assert torch.equal(model.norm.weight, torch.ones(128))


def test_a_bf16_copy_has_norms_routers_and_biases_in_fp32():
    """Near 1, bf16 would round a bias step of 1e-3 away, and router scores would tie."""
    copied = cast_copy(tiny_model(), torch.bfloat16)
    block = copied.layers[1]
    assert block.ffn.bias.dtype == block.ffn.router.dtype == block.ffn_norm.weight.dtype == torch.float32
    assert block.ffn.w_in.dtype == copied.head.weight.dtype == torch.bfloat16


def test_refreshing_a_copy_brings_weights_and_biases():
    model = tiny_model()
    copied = cast_copy(model, torch.float32, always=True)
    with torch.no_grad():
        model.head.weight.add_(1.0)
        model.layers[1].ffn.bias.add_(1.0)
    update_copy(copied, model)
    assert torch.equal(copied.head.weight, model.head.weight)
    assert torch.equal(copied.layers[1].ffn.bias, model.layers[1].ffn.bias)


@pytest.mark.parametrize(
    ("ids", "part"),
    [
        (torch.tensor([[48]]), "token id 48 is outside the vocabulary, 0..47"),
        (torch.tensor([[-1]]), "token id -1"),
        (torch.zeros(1, 0, dtype=torch.int64), "at least one token"),
        (torch.zeros(1, 97, dtype=torch.int64), "97 tokens exceed this model's maximum context length of 96 tokens"),
    ],
)
def test_invalid_ids_are_refused(ids, part):
    with pytest.raises(RequestError, match=part):
        tiny_model()(ids)


def test_v3_has_the_published_shape():
    """V3 report, section 4.2."""
    cfg = named("v3-671b")
    assert isinstance(cfg.attention, MLAConfig)
    assert (cfg.num_layers, cfg.hidden_size, cfg.attention.cache_width) == (61, 7168, 576)
    assert [cfg.is_moe_layer(layer) for layer in (2, 3, 61)] == [False, True, True]


def test_an_unknown_size_names_the_known_ones():
    with pytest.raises(ConfigError, match="v3-tiny"):
        named("v3-teeny")


def test_impossible_shapes_are_refused():
    with pytest.raises(ConfigError, match="odd"):
        replace(MLA_TINY, attention=replace(MLA_TINY.attention, qk_rope_head_dim=3))
    with pytest.raises(ConfigError, match="multiple"):
        replace(GQA_TINY.attention, num_kv_heads=3)
    with pytest.raises(ConfigError, match="first_dense_layers"):
        replace(MLA_TINY, num_layers=1, moe=replace(MLA_TINY.moe, first_dense_layers=2))
    with pytest.raises(ConfigError, match="shrinks"):
        YarnConfig(factor=0.5)
