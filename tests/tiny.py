"""The smallest models, batches and tokenizers that still have every part; seeds are passed, never set."""

from dataclasses import replace
from functools import cache

import torch

from thinkstack.data import Example, collate, pack
from thinkstack.models.config import GQAConfig, MLAConfig, ModelConfig, MoEConfig, RopeConfig
from thinkstack.models.moe import MoE
from thinkstack.models.transformer import Transformer
from thinkstack.text.tokenizer import Tokenizer, train_tokenizer
from thinkstack.types import Batch

MLA_TINY = ModelConfig(
    family="deepseek_v3",
    vocab_size=48,
    hidden_size=32,
    num_layers=3,
    attention=MLAConfig(
        num_heads=2, q_lora_rank=12, kv_lora_rank=8, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=6
    ),
    intermediate_size=40,
    moe=MoEConfig(
        num_experts=8, num_experts_per_tok=2, moe_intermediate_size=12, num_groups=4, top_groups=2, route_scale=1.5
    ),
    mtp_layers=1,
    max_positions=96,
    init_std=0.2,
)
GQA_TINY = replace(
    MLA_TINY,
    family="llama",
    attention=GQAConfig(num_heads=4, num_kv_heads=2, head_dim=8),
    moe=None,
    mtp_layers=0,
    rope=RopeConfig(interleaved=False),
)


def tiny_model(cfg: ModelConfig = MLA_TINY, seed: int = 0, **changes: object) -> Transformer:
    """A model with sampled weights, norms that are not 1, and balance biases that are not 0."""
    generator = torch.Generator().manual_seed(seed)
    model = Transformer(replace(cfg, **changes)).initialize(generator)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
        for module in model.modules():
            if isinstance(module, MoE):
                module.bias.copy_(torch.randn(module.bias.shape, generator=generator) * 0.05)
    return model


def random_examples(lengths: list[int], vocab_size: int = 48, seed: int = 0, prompt: int = 1) -> list[Example]:
    """Documents of random tokens; the first `prompt` tokens of each are not learned."""
    generator = torch.Generator().manual_seed(seed)
    samples = []
    for length in lengths:
        ids = tuple(torch.randint(vocab_size, (length,), generator=generator).tolist())
        samples.append(Example(ids, (0,) * prompt + (1,) * (length - prompt)))
    return samples


def random_batch(lengths: list[int], row_tokens: int, vocab_size: int = 48, seed: int = 0, prompt: int = 1) -> Batch:
    """random_examples packed into rows."""
    samples = random_examples(lengths, vocab_size, seed, prompt)
    return collate(samples, pack(samples, row_tokens), row_tokens)


@cache
def tiny_tokenizer() -> Tokenizer:
    """A tokenizer of ours, trained on a few lines."""
    lines = [
        "User: what is the last digit of 12 + 34? Assistant: <think>\n2+4=6\n</think>\n<answer>6</answer>",
        "the ball is under cup 3. Swap 3-4. Where is the ball now? the cup and the ball and the answer is here.",
        "从左到右计算,每步只保留个位。",
    ] * 4
    return train_tokenizer(lines, 360, single_tokens=("<answer>", "</answer>"))
