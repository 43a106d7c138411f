"""Tiny random checkpoints of every family as one tool writes them; bench/fixtures.py runs it in that environment.

python bench/peer_checkpoints.py TOOL OUT makes folders OUT/NAME, each with EXPECTED beside the tool's files: what the
tool itself says of the checkpoint (ids of a text and of a conversation, logits, greedy tokens). Nothing of this package
is imported. Weights take few values, so that a folder shrinks to some kilobytes.
"""

import argparse
import json
import runpy
import shutil
import sys
import zlib
from pathlib import Path

import torch

EXPECTED = "expected.json"
TEXT, QUESTION = "Once upon a time, 12 + 30 = 42.", "What is 12 + 30?"
CONTROL = ["<|begin|>", "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>"]
TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LATENT = dict(q_lora_rank=8, kv_lora_rank=8, qk_rope_head_dim=4, v_head_dim=4, qk_nope_head_dim=4)
EXPERTS = dict(n_routed_experts=4, moe_intermediate_size=8, num_experts_per_tok=2, first_k_dense_replace=1)
YARN = dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=64)
LLAMA3 = dict(YARN, rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0)
MODELS: dict[str, tuple[str, dict]] = {
    "deepseek_v3": ("DeepseekV3", LATENT | EXPERTS | dict(n_group=2, topk_group=1, n_shared_experts=1)),
    "deepseek_v3_none_shared": ("DeepseekV3", LATENT | EXPERTS | dict(n_group=1, topk_group=1, n_shared_experts=0)),
    "deepseek_v2": ("DeepseekV2", LATENT | EXPERTS | dict(n_group=1, topk_group=1, n_shared_experts=2)),
    "deepseek_v2_none_shared": (
        "DeepseekV2",
        LATENT | EXPERTS | dict(n_group=1, topk_group=1, n_shared_experts=0, q_lora_rank=None),
    ),
    "llama": ("Llama", dict(rope_scaling=LLAMA3)),
    "llama_tied": ("Llama", dict(tie_word_embeddings=True, attention_bias=True, rope_theta=5e5)),
    "qwen2": ("Qwen2", dict(use_sliding_window=False, sliding_window=32)),
    "qwen2_yarn": (
        "Qwen2",
        dict(tie_word_embeddings=True, rope_scaling=dict(YARN, attention_factor=1.138629436111989)),
    ),
    "qwen3": ("Qwen3", dict(head_dim=8)),
    "qwen3_moe": (
        "Qwen3Moe",
        dict(head_dim=8, num_experts=4, moe_intermediate_size=8, num_experts_per_tok=2, norm_topk_prob=True),
    ),
}
"""Class in transformers and settings beside COMMON, by name of the checkpoint."""
COMMON = dict(
    vocab_size=272,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=2,
    max_position_embeddings=256,
)


def tokenizer(**tokens: object):
    """A byte-level tokenizer without merges, of transformers' plain class."""
    import tokenizers as t
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(t.pre_tokenizers.ByteLevel.alphabet())
    made = t.Tokenizer(t.models.BPE(vocab={sign: place for place, sign in enumerate(alphabet)}, merges=[]))
    cut = t.pre_tokenizers.Split(t.Regex(QWEN2), "isolated")
    level = t.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.pre_tokenizer, made.decoder = t.pre_tokenizers.Sequence([cut, level]), t.decoders.ByteLevel()
    made.add_special_tokens([t.AddedToken(token, special=True, normalized=False) for token in CONTROL[:4]])
    made.add_tokens([t.AddedToken(token, special=False, normalized=False) for token in CONTROL[4:]])
    return PreTrainedTokenizerFast(tokenizer_object=made, **tokens)


def model(name: str, **changes: object):
    """A model of MODELS, norms about 1, biases of routers not 0. Its weights are multiples of 1/8 that depend on their
    names alone, so that models repeat each other and pack well.
    """
    import transformers

    kind, settings = MODELS[name]
    config = getattr(transformers, f"{kind}Config")(
        **COMMON | settings | dict(bos_token_id=256, eos_token_id=259) | changes
    )
    made = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    with torch.no_grad():
        for key, value in [*made.named_parameters(), *made.named_buffers()]:
            if not key.endswith(("weight", "bias", "proj", "gate_up_proj")):
                continue
            value.copy_(
                _weights(key, value.shape) / 4 + 1 if "norm" in key and value.dim() == 1 else _weights(key, value.shape)
            )
    return made


def _weights(name: str, shape: torch.Size) -> torch.Tensor:
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    return torch.randint(-2, 3, shape, generator=generator) / 8


@torch.no_grad()
def said_by(peer, tok=None) -> dict:
    """What a tool says of its own checkpoint, in fp32."""
    ids = [*TEXT.encode()][:20]
    logits = peer(torch.tensor([ids])).logits[0, -1]
    greedy = list(ids)
    for _ in range(6):
        greedy.append(int(peer(torch.tensor([greedy])).logits[0, -1].argmax()))
    said = {
        "prompt_ids": ids,
        "logits": [round(x, 6) for x in logits.tolist()[::16]],
        "greedy": greedy[len(ids) :],
    }
    if tok is not None:
        said["text_ids"] = tok(TEXT, add_special_tokens=False)["input_ids"]
        if tok.chat_template:
            messages = [{"role": "user", "content": QUESTION}]
            said["chat_ids"] = list(tok.apply_chat_template(messages, add_generation_prompt=True, return_dict=False))
    return said


def save_peer(folder: Path, peer, tok=None, dtype: torch.dtype = torch.float32, **save: object) -> Path:
    """Write a checkpoint as save_pretrained does, and what is said of it; the weights are exact in every type."""
    said = said_by(peer, tok)
    peer.to(dtype).save_pretrained(folder, **save)
    if tok is not None:
        tok.save_pretrained(folder)
    note(folder, said)
    return folder


def note(folder: Path, said: dict) -> None:
    (folder / EXPECTED).write_text(json.dumps(said))


def transformers_folders(out: Path) -> None:
    """save_pretrained of every model: with and without a template, BOS, EOS, in three types and in shards."""
    named = dict(eos_token="<|im_end|>", pad_token="<|endoftext|>", chat_template=TEMPLATE)
    with_bos = named | dict(bos_token="<|begin|>")
    for name in MODELS:
        save_peer(out / name, model(name), tokenizer(**(named if name.startswith("qwen") else with_bos)))
    save_peer(out / "no_bos", model("qwen2", bos_token_id=None), tokenizer(**named))
    save_peer(out / "no_bos_no_eos", model("qwen3", bos_token_id=None, eos_token_id=None), tokenizer())
    save_peer(out / "eos_list", model("llama", eos_token_id=[257, 259]), tokenizer(**with_bos))
    save_peer(out / "base", model("llama"), tokenizer(bos_token="<|begin|>", eos_token="<|endoftext|>"))
    save_peer(out / "bf16_shards", model("qwen3"), tokenizer(**named), torch.bfloat16, max_shard_size="8KB")
    save_peer(out / "fp16", model("llama_tied"), tokenizer(**with_bos), torch.float16)
    limited = tokenizer(**named)
    limited.backend_tokenizer.enable_truncation(max_length=8)
    limited.backend_tokenizer.enable_padding(length=8, pad_id=257, pad_token="<|endoftext|>")
    save_peer(out / "truncating", model("qwen2"), limited)
    save_peer(out / "weights_only", model("qwen3"))


def trl_folders(out: Path) -> None:
    """SFTTrainer's save_model after a step, training_args.bin (a pickle) included; at rate 0, to pack well."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    named = dict(eos_token="<|im_end|>", pad_token="<|endoftext|>", chat_template=TEMPLATE)
    conversation = [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": "42"}]
    for name in ("qwen2", "qwen3", "llama"):
        cfg = SFTConfig(out / f"{name}_run", max_steps=1, learning_rate=0.0, report_to=[], use_cpu=True, bf16=False)
        rows = Dataset.from_list([{"messages": conversation}] * 2)
        trainer = SFTTrainer(model(name), cfg, train_dataset=rows, processing_class=tokenizer(**named))
        trainer.train()
        trainer.save_model(out / name)
        note(out / name, said_by(trainer.model.eval(), trainer.processing_class))
        shutil.rmtree(out / f"{name}_run")


def peft_folders(out: Path) -> None:
    """Bases, adapters on them (expected: what the adapted model says), and a merged model."""
    from peft import LoraConfig, get_peft_model

    for name in ("llama", "qwen3", "deepseek_v3"):
        base, tok = model(name), tokenizer(eos_token="<|im_end|>")
        save_peer(out / f"{name}_base", base, tok)
        cfg = LoraConfig(r=2, lora_alpha=4, target_modules=["o_proj", "down_proj"], task_type="CAUSAL_LM")
        adapted = get_peft_model(base, cfg)
        for key, value in adapted.named_parameters():
            if "lora_" in key:
                value.data = _weights(key, value.shape)
        adapted.peft_config["default"].base_model_name_or_path = f"{name}_base"
        adapted.save_pretrained(out / f"{name}_adapter")
        (out / f"{name}_adapter" / "README.md").unlink()
        note(out / f"{name}_adapter", said_by(adapted.eval()))
    save_peer(out / "deepseek_v3_merged", adapted.merge_and_unload(), tok)
    _like_unsloth(out)


def _like_unsloth(out: Path) -> None:
    """What Unsloth adds to the files, by hand: it needs a GPU. An adapter names the 4-bit base it was trained on."""
    left = tokenizer(eos_token="<|im_end|>", padding_side="left")
    merged = save_peer(out / "unsloth_merged", model("qwen3"), left, torch.bfloat16)
    config = json.loads((merged / "config.json").read_text())
    config |= {
        "unsloth_fixed": True,
        "unsloth_version": "2025.10.9",
        "pad_token_id": 257,
        "_name_or_path": "unsloth/qwen3",
    }
    (merged / "config.json").write_text(json.dumps(config))
    adapter = shutil.copytree(out / "qwen3_adapter", out / "unsloth_adapter")
    config = json.loads((adapter / "adapter_config.json").read_text())
    config |= {
        "base_model_name_or_path": "unsloth/Qwen3-0.6B-unsloth-bnb-4bit",
        "auto_mapping": {"unsloth_fixed": True},
    }
    (adapter / "adapter_config.json").write_text(json.dumps(config))


def llama_cpp_files(out: Path, converter: Path, folders: Path) -> None:
    """convert_hf_to_gguf.py on the folders that transformers wrote. The rules by which text is cut are told it: it
    knows tokenizers by a hash of published ones.
    """
    sys.path[:0] = [str(converter.parent), str(converter.parent / "gguf-py")]
    from conversion.base import TextModel

    TextModel.get_vocab_base_pre = lambda self, tok: "qwen2"
    for folder in sorted(folders.iterdir()):
        for kind in ("f32", "q8_0") if folder.name == "qwen3" else ("f32",):
            target = out / f"{folder.name}_{kind}"
            target.mkdir(parents=True)
            sys.argv = [str(converter), str(folder), "--outfile", str(target / "model.gguf"), "--outtype", kind]
            try:
                runpy.run_path(str(converter), run_name="__main__")
            except SystemExit as stop:
                if stop.code:
                    shutil.rmtree(target)
                    continue
            except Exception as error:  # what it does not convert is no fixture
                print(f"{folder.name}: {error!r:.200}", file=sys.stderr)
                shutil.rmtree(target)
                continue
            shutil.copy(folder / EXPECTED, target / EXPECTED)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("tool", choices=("transformers", "trl", "peft", "llama_cpp"))
    parser.add_argument("out", type=Path)
    parser.add_argument("--converter", type=Path, help="llama.cpp's convert_hf_to_gguf.py")
    parser.add_argument("--folders", type=Path, help="what the converter is given")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.tool == "llama_cpp":
        llama_cpp_files(args.out, args.converter, args.folders)
    else:
        {"transformers": transformers_folders, "trl": trl_folders, "peft": peft_folders}[args.tool](args.out)


if __name__ == "__main__":
    main()
