"""A context made longer from a checkpoint: positions change, weights are trained on, transformers agrees."""

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.tiny import GQA_TINY, random_batch, tiny_model, tiny_tokenizer
from thinkstack.checkpoint.model import load_model, save_model
from thinkstack.config import build, merge
from thinkstack.log import Run
from thinkstack.models.attention_config import YarnConfig
from thinkstack.stages import pretrain as stage
from thinkstack.stages.pretrain import loss_by_position, open_model, pretrain
from thinkstack.stages.pretrain_config import PretrainConfig
from thinkstack.types import ConfigError

ATTENTION = {
    "num_heads": 2,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 16,
    "v_head_dim": 8,
}
MODEL = {
    "hidden_size": 32,
    "num_layers": 2,
    "vocab_size": 360,
    "intermediate_size": 48,
    "max_positions": 32,
    "attention": ATTENTION,
    "moe": {"moe_intermediate_size": 16},
    "init_std": 0.1,
    "embed_init_std": 0.3,
}
YARN = {"max_positions": 128, "rope": {"yarn": {"factor": 4.0, "original_max_positions": 32}}}
OPTIM = {"learning_rate": 8e-3, "warmup_steps": 20}
COMMON = {
    "text_share": 1.0,
    "save_steps": 0,
    "position_edges": (12, 32),
    "trainer": {"optim": OPTIM, "micro_batch_tokens": 1024, "dtype": "fp32", "mtp_weight": 0.0},
}


def runs_of_digits(path: Path) -> str:
    """Ten random digits, repeated for 130 characters, then ten others: the next digit stands ten positions back."""
    rng = random.Random(0)
    path.write_text("".join("".join(rng.choice("0123456789") for _ in range(10)) * 13 for _ in range(200)))
    return str(path)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model trained to look ten places back, in rows of 32."""
    folder = tmp_path_factory.mktemp("context")
    table = {"model": MODEL, "steps": 200, "rows": 16, "row_tokens": 32}
    cfg = build(PretrainConfig, merge(COMMON, table | {"text_files": (runs_of_digits(folder / "digits.txt"),)}))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stage, "TOKENIZER_DOCUMENTS", 200)
        pretrain(cfg, Run(folder / "base"))
    return folder


def extension(base: Path, **changes: Any) -> PretrainConfig:
    table = {"start": str(base / "base" / "model"), "text_files": (str(base / "digits.txt"),), "model": YARN}
    return build(PretrainConfig, merge(COMMON, table | {"steps": 100, "rows": 4, "row_tokens": 128} | changes))


def nats(row: dict[str, Any]) -> dict[int, float]:
    return {table["from"]: table["nats"] for table in row["loss_by_position"]}


@pytest.fixture(scope="module")
def extended(base: Path) -> Run:
    pretrain(extension(base), Run(base / "extended"))
    return Run(base / "extended")


def test_training_on_longer_rows_brings_the_loss_beyond_the_first_length_down(base: Path, extended: Run):
    """Guessing a digit costs ln 10 = 2.30 nats. Before, the model knows what comes within its 32 positions only."""
    loss_mask = nats(Run(base / "base").rows("curve.jsonl")[-1])
    before, after = (nats(row) for row in extended.rows("curve.jsonl"))
    assert loss_mask[12] < 1.0 and before[32] > 2.0
    assert after[32] < 1.0 and after[12] < before[12] - 1.0
    cfg = extension(base, model={"max_positions": 128})
    untouched = loss_by_position(open_model(cfg)[0], held_out(base), (12, 32), 1024)
    assert untouched[2]["nats"] > 1.5 * after[32], "without the extension long rows are not read either"


def held_out(base: Path) -> Any:
    cfg = extension(base)
    stream = stage.PackedStream(
        stage.make_source(cfg, [], open_model(cfg)[1]), cfg.rows, cfg.row_tokens, isolated=cfg.document_mask
    )
    stream.restore({"position": stage.HELD_OUT, "waiting": []})
    return stream.take()


def test_the_saved_model_says_its_new_context(base: Path, extended: Run):
    cfg = load_model(extended.folder / "model").cfg
    assert cfg.max_positions == 128
    assert cfg.rope.yarn == YarnConfig(factor=4.0, original_max_positions=32)
    known = load_model(base / "base" / "model").cfg
    assert replace(cfg, rope=known.rope, max_positions=32) == known


def test_a_later_phase_inherits_the_context(base: Path, extended: Run):
    """V3 keeps one YaRN for both of its phases; the second names longer rows only."""
    cfg = extension(base, start=str(extended.folder / "model"), model={})
    model, _ = open_model(cfg)
    assert model.cfg == load_model(extended.folder / "model").cfg


def test_the_extension_changes_no_weight_before_it_trains(base: Path):
    model, _ = open_model(extension(base))
    stored = load_file(base / "base" / "model" / "model.safetensors")
    plain = load_model(base / "base" / "model")
    assert model.cfg != plain.cfg and stored
    for name, value in plain.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name


def test_transformers_computes_the_same_logits(extended: Run):
    """In fp64: in fp32 its own error at one token was five times ours, on one processor more than the bound."""
    transformers = pytest.importorskip("transformers")
    from bench.parity import logit_error

    model = load_model(extended.folder / "model")
    settings = dict(dtype=torch.float32, experts_implementation="eager")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(extended.folder / "model", **settings).double()
    ids = torch.randint(300, (2, 128), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        ours, exact = model(ids), theirs(ids).logits
    assert logit_error(ours / exact.std(), exact / exact.std()).is_within_bounds


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": {"hidden_size": 64}}, r"model\.hidden_size cannot change with start"),
        ({"model": {}}, r"row_tokens=128 exceeds the model's max_positions=32; set model\.max_positions"),
        ({"model": {"max_positions": 128, "rope": {"yarn": {"factr": 4}}}}, "did you mean model.rope.yarn.factor"),
        ({"model": {"max_positions": 128, "rope": {"yarn": {"factor": 0.5}}}}, "shrinks the context"),
    ],
)
def test_an_extension_that_cannot_be_is_refused(base: Path, changes: dict[str, Any], message: str):
    with pytest.raises(ConfigError, match=message):
        open_model(extension(base, **changes))


def test_an_extension_that_cannot_be_saved_is_refused_before_it_is_trained(tmp_path: Path):
    """YaRN scales the softmax in DeepSeek models only; the files of the others cannot say it."""
    save_model(tmp_path / "model", tiny_model(GQA_TINY, vocab_size=360), tiny_tokenizer(), "v3")
    yarn = {"factor": 4.0, "original_max_positions": 96}
    table = {"start": str(tmp_path / "model"), "row_tokens": 128, "model": {"max_positions": 384}}
    with pytest.raises(ConfigError, match=r"mscale_all_dim=1\.0 scales the softmax in DeepSeek models only"):
        open_model(build(PretrainConfig, merge(table, {"model": {"rope": {"yarn": yarn}}})))
    plain = {"model": {"rope": {"yarn": yarn | {"mscale_all_dim": 0.0}}}}
    assert open_model(build(PretrainConfig, merge(table, plain)))[0].cfg.max_positions == 384


def test_losses_by_position_are_means_of_the_tokens_between_the_edges():
    """One row of 15 positions, its 3 first tokens not trained on; the whole row's mean is that of the parts."""
    model, batch = tiny_model(), random_batch([16], 15, prompt=4)
    parts = loss_by_position(model, batch, (5, 10), 64)
    logits = model(batch.ids)
    losses = torch.nn.functional.cross_entropy(logits[0], batch.targets[0], reduction="none").detach()
    assert [(part["from"], part["to"], part["tokens"]) for part in parts] == [(0, 5, 2), (5, 10, 5), (10, 15, 5)]
    for part, low in zip(parts, (3, 5, 10), strict=True):
        assert part["nats"] == pytest.approx(float(losses[low : part["to"]].mean()), rel=1e-4)
