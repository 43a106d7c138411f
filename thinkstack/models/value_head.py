"""The value model (critic) of PPO: a transformer with a scalar head."""

# Shapes in this file: B rows, T tokens, D hidden size.

from dataclasses import replace

import torch
from torch import Tensor, nn

from thinkstack.models.attention import LayerCache
from thinkstack.models.config import ModelConfig
from thinkstack.models.transformer import Transformer


class ValueModel(Transformer):
    """A transformer that predicts the remaining return at each position instead of the next token."""

    def __init__(self, cfg: ModelConfig):
        """cfg: configuration of the policy; the critic has no MTP modules and no language-model head."""
        super().__init__(replace(cfg, mtp_layers=0, tie_embeddings=False))
        del self.head
        # vectors stay fp32 in a bf16 copy (bf16 rounds a return near 1 to 3 digits) and have no weight decay
        self.value_weight = nn.Parameter(torch.zeros(cfg.hidden_size))
        self.value_bias = nn.Parameter(torch.zeros(1))

    @classmethod
    def from_policy(cls, policy: Transformer) -> "ValueModel":
        """A critic that is initialized with the trunk of the policy and predicts 0 everywhere."""
        critic = cls(policy.cfg)
        trunk = {k: v for k, v in policy.state_dict().items() if not k.startswith(("head.", "mtp."))}
        missing, unexpected = critic.load_state_dict(trunk, strict=False)
        assert set(missing) == {"value_weight", "value_bias"} and not unexpected
        return critic

    def values(self, hidden: Tensor) -> Tensor:
        """Predicted returns (...) fp32 from hidden states (..., D)."""
        return hidden.float() @ self.value_weight + self.value_bias

    def forward(
        self,
        ids: Tensor,
        positions: Tensor | None = None,
        document_ids: Tensor | None = None,
        cache: LayerCache | None = None,
    ) -> Tensor:
        """Predicted returns (B, T) fp32 for token ids (B, T); arguments as in `trunk`."""
        return self.values(self.trunk(ids, positions, document_ids, cache).hidden)
