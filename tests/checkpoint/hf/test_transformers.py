"""Comparison with transformers: every family, folders in both directions, greedy text, prompts of a saved folder."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.tiny import MLA_TINY, tiny_model, tiny_tokenizer
from thinkstack.checkpoint.hf.files import WEIGHTS
from thinkstack.checkpoint.model import load_chat, load_model, save_model
from thinkstack.engine.engine import Engine
from thinkstack.models.config import named
from thinkstack.models.precision import cast_copy
from thinkstack.text.tokenizer import BOS
from thinkstack.types import Message, SamplingParams

transformers = pytest.importorskip("transformers")
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()
from bench.parity import FAMILIES, family_error, logit_error, random_model  # noqa: E402

CONVERSATION = [
    ("system", "Be brief."),
    ("user", "what is the last digit of 12 + 34?"),
    ("assistant", "6"),
    ("user", "Where is the ball now?\n从左到右"),
]


def opened(folder: Path) -> transformers.PreTrainedModel:
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def random_ids(vocab_size: int, rows: int = 2, tokens: int = 40) -> torch.Tensor:
    return torch.randint(vocab_size, (rows, tokens), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", FAMILIES)
def test_logits_and_gradients_equal_transformers(name: str, tmp_path: Path):
    error = family_error(FAMILIES[name], tmp_path / "model")
    assert error.is_within_bounds, error


@torch.no_grad()
def test_the_bounds_detect_a_lost_balance_bias_and_a_lost_yarn(tmp_path: Path):
    cfg = FAMILIES["v3, yarn with mscale, MTP"]
    model, ids = random_model(cfg), random_ids(cfg.vocab_size)
    save_model(tmp_path / "model", model)
    theirs = opened(tmp_path / "model")(ids).logits
    assert logit_error(model(ids), theirs).is_within_bounds
    plain = random_model(replace(cfg, rope=replace(cfg.rope, yarn=None)))
    assert not logit_error(plain(ids), theirs).is_within_bounds
    for block in model.layers[1:]:
        block.ffn.bias.zero_()
    assert not logit_error(model(ids), theirs).is_within_bounds


LATENT = dict(q_lora_rank=8, kv_lora_rank=8, qk_rope_head_dim=4, v_head_dim=6, qk_nope_head_dim=4)
EXPERTS = dict(n_routed_experts=4, moe_intermediate_size=16, n_group=2, topk_group=1, num_experts_per_tok=2)
THEIRS: dict[str, dict[str, object]] = {
    "DeepseekV3": LATENT | EXPERTS | dict(first_k_dense_replace=1),
    "DeepseekV2": LATENT | EXPERTS | dict(first_k_dense_replace=1, topk_method="group_limited_greedy"),
    "Llama": dict(attention_bias=True),
    "Qwen2": dict(tie_word_embeddings=True, use_sliding_window=False, sliding_window=16),
    "Qwen3": dict(head_dim=12, attention_bias=True),
    "Qwen3Moe": dict(head_dim=12, num_experts=4, moe_intermediate_size=16, num_experts_per_tok=2, mlp_only_layers=[0]),
}


@pytest.mark.parametrize("family", THEIRS)
@torch.no_grad()
def test_a_folder_written_by_transformers_round_trips_byte_for_byte(family: str, tmp_path: Path):
    """transformers writes a config.json with an MTP layer, but not its weights; it is left out with a warning."""
    common = dict(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2)
    tokens = dict(num_key_value_heads=2, max_position_embeddings=64, bos_token_id=0, eos_token_id=1)
    config = getattr(transformers, f"{family}Config")(**common, **tokens, **THEIRS[family])
    torch.manual_seed(0)
    theirs = getattr(transformers, f"{family}ForCausalLM")(config)
    for name, parameter in theirs.named_parameters():
        if name.endswith("bias"):
            parameter.normal_()
    theirs.save_pretrained(tmp_path / "theirs")
    model, ids = load_model(tmp_path / "theirs"), random_ids(64)
    assert model.cfg.mtp_layers == 0
    assert logit_error(model(ids), theirs(ids).logits).is_within_bounds
    save_model(tmp_path / "ours", model)
    assert (tmp_path / "ours" / WEIGHTS).read_bytes() == (tmp_path / "theirs" / WEIGHTS).read_bytes()


@torch.no_grad()
def test_v3_tiny_generates_the_same_text_in_transformers(tmp_path: Path):
    model = tiny_model(named("v3-tiny"), init_std=0.1)
    save_model(tmp_path / "model", model, tiny_tokenizer(), "v3")
    theirs, ids = opened(tmp_path / "model"), random_ids(640, rows=1, tokens=12)
    assert logit_error(model(ids), theirs(ids).logits).is_within_bounds
    out = theirs.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=24, eos_token_id=1)
    sampling = SamplingParams(temperature=0, max_tokens=24, stop_token_ids=(1,))
    answer = Engine(load_model(tmp_path / "model")).generate([ids[0].tolist()], [sampling])[0][0]
    assert list(answer.token_ids) == out[0, 12:].tolist()
    assert len(set(answer.token_ids)) > 5


@pytest.mark.parametrize("name", ["v2, greedy, yarn", "llama 3", "qwen 2", "qwen 3", "qwen 3, experts"])
@torch.no_grad()
def test_every_family_generates_the_same_text_in_transformers(name: str, tmp_path: Path):
    """The engine's cache must contain biased, normalized and rotated keys."""
    cfg = FAMILIES[name]
    save_model(tmp_path / "model", random_model(cfg))
    ids = random_ids(cfg.vocab_size, rows=1, tokens=9)
    theirs = opened(tmp_path / "model")
    theirs.generation_config.eos_token_id = None
    out = theirs.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=20, pad_token_id=0)
    answer = Engine(load_model(tmp_path / "model")).generate(
        [ids[0].tolist()], [SamplingParams(temperature=0, max_tokens=20)]
    )
    assert list(answer[0][0].token_ids) == out[0, 9:].tolist()
    assert len(set(answer[0][0].token_ids)) > 3


@torch.no_grad()
def test_a_bf16_working_copy_keeps_its_biases_in_fp32():
    """Vectors stay fp32 with matrices in bf16; a plain linear layer does not support that pair."""
    model, ids = random_model(FAMILIES["qwen 2"]), random_ids(96)
    twin = cast_copy(model, torch.bfloat16)
    assert twin.layers[0].attention.wq.bias.dtype == torch.float32
    assert logit_error(twin(ids).float(), model(ids)).relative < 0.05


@pytest.mark.parametrize("name", ["r1_zero_short", "v3", "r1"])
def test_transformers_renders_our_prompt_with_one_bos(name: str, tmp_path: Path):
    save_model(tmp_path / "model", tiny_model(named("v3-tiny")), tiny_tokenizer(), name)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "model")
    for length in (2, 4):
        turns = CONVERSATION[:length]
        rendered = theirs.apply_chat_template(
            [{"role": role, "content": content} for role, content in turns],
            add_generation_prompt=True,
            return_dict=False,
        )
        chat = load_chat(tmp_path / "model")
        assert rendered == chat.prompt([Message(role=role, content=content) for role, content in turns])
        assert rendered.count(chat.tokenizer.control_id(BOS)) == 1
    assert theirs.bos_token_id == 0 and theirs.eos_token_id == 1 and theirs.pad_token_id == 2


def test_transformers_refuses_what_our_format_refuses(tmp_path: Path):
    save_model(tmp_path / "model", tiny_model(named("v3-tiny")), tiny_tokenizer(), "r1")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "model")
    with pytest.raises(Exception, match="the last message must come from the user"):
        theirs.apply_chat_template([{"role": "assistant", "content": "6"}], add_generation_prompt=True)


@torch.no_grad()
def test_mtp_modules_equal_those_of_transformers(tmp_path: Path, monkeypatch):
    """transformers has MTP layers for speculation only; here two of them run in a chain over complete rows."""
    layers = pytest.importorskip("transformers.modeling_layers")
    if not hasattr(layers, "MtpModel"):
        pytest.skip("this version of transformers has no MTP layers")
    cfg = replace(FAMILIES["v3, yarn with mscale, MTP"], mtp_layers=2)
    model, ids, length = random_model(cfg), random_ids(cfg.vocab_size), 40
    save_model(tmp_path / "model", model)
    # the class knows the MTP layer of the released model only, number 61
    monkeypatch.setattr(
        transformers.DeepseekV3ForCausalLM, "_keys_to_ignore_on_load_unexpected", [r"model\.layers\.[34].*"]
    )
    main = opened(tmp_path / "model")
    theirs = layers.MtpModel.from_pretrained(main)
    states, _ = model.mtp_hidden_states(model.trunk(ids), ids)
    hidden, positions = main.model(ids).last_hidden_state, torch.arange(length).unsqueeze(0)
    mask = torch.full((1, 1, length, length), -torch.inf).triu(1)
    for depth, layer in enumerate(theirs.layers):
        following = torch.nn.functional.pad(ids[:, depth + 1 :], (0, depth + 1))
        hidden = layer(
            theirs.embed_tokens(following),
            hidden,
            position_embeddings=theirs.rotary_emb(hidden, position_ids=positions),
            attention_mask=mask,
            position_ids=positions,
            past_key_values=None,
        )
        assert logit_error(model.head(states[depth]), theirs.shared_head(hidden)).is_within_bounds


@pytest.mark.parametrize("layers", [2, 3])
@pytest.mark.parametrize("groups", [1, 4])
def test_a_model_without_shared_experts_round_trips_through_transformers(layers: int, groups: int, tmp_path: Path):
    """Regression: transformers stores empty tensors for them, which were refused when our own export was read back."""
    moe = replace(MLA_TINY.moe, num_shared_experts=0, num_groups=groups, top_groups=min(groups, 2))
    model = tiny_model(replace(MLA_TINY, vocab_size=360, mtp_layers=0, num_layers=layers, moe=moe))
    save_model(tmp_path / "ours", model, tiny_tokenizer(), "r1_zero_short")
    opened(tmp_path / "ours").save_pretrained(tmp_path / "theirs")
    ids = random_ids(360)
    assert torch.equal(load_model(tmp_path / "theirs")(ids), model(ids))
