"""Modules that hide their channels, replaced by ones that compute the same from plain layers.

``nn.MultiheadAttention`` keeps queries, keys and values in one matrix and insists on their width; a weight
that is normalized at every call has no channels of its own. Both are rewritten before anything is followed or
cut, and again before a pruned model's tensors are loaded.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize


def rewrite(model: nn.Module) -> nn.Module:
    """Rewrite in place what needs it; a model without such modules is left as it is."""
    for module in list(model.modules()):
        _fold(module)
        for name, child in list(module.named_children()):
            if type(child) is nn.MultiheadAttention and _plain(child):
                setattr(module, name, SplitAttention(child))
    return model


def _fold(module: nn.Module) -> None:
    """Store the weights that parametrizations and weight norms compute."""
    if parametrize.is_parametrized(module):
        for name in list(module.parametrizations):  # type: ignore[arg-type]
            parametrize.remove_parametrizations(module, name)
    for hook in list(module._forward_pre_hooks.values()):
        if isinstance(hook, torch.nn.utils.weight_norm.WeightNorm):  # type: ignore[attr-defined]
            torch.nn.utils.remove_weight_norm(module, hook.name)


def _plain(attention: nn.MultiheadAttention) -> bool:
    """Whether it has no more than projections: no learnt extra keys."""
    return attention.bias_k is None and not attention.add_zero_attn


class SplitAttention(nn.Module):
    """``nn.MultiheadAttention`` with a layer for each projection, so that it can have any number of heads."""

    # What nn.TransformerEncoderLayer asks of it, before it decides against its fused path.
    _qkv_same_embed_dim = False
    in_proj_bias = None
    in_proj_weight = None

    def __init__(self, source: nn.MultiheadAttention) -> None:
        super().__init__()
        self.num_heads = source.num_heads
        self.head_dim = source.head_dim
        self.batch_first = source.batch_first
        self.dropout = source.dropout
        width = source.embed_dim
        if source._qkv_same_embed_dim:
            weights = list(source.in_proj_weight.chunk(3))
        else:
            weights = [source.q_proj_weight, source.k_proj_weight, source.v_proj_weight]
        biases = [None] * 3 if source.in_proj_bias is None else list(source.in_proj_bias.chunk(3))
        layers = []
        for weight, bias in zip(weights, biases, strict=True):
            layer = nn.Linear(weight.shape[1], width, bias=bias is not None)
            layer.weight = nn.Parameter(weight.detach().clone())
            if bias is not None:
                layer.bias = nn.Parameter(bias.detach().clone())
            layers.append(layer)
        self.q_proj, self.k_proj, self.v_proj = layers
        self.out_proj = nn.Linear(width, width, bias=source.out_proj.bias is not None)
        self.out_proj.load_state_dict(source.out_proj.state_dict())
        self.train(source.training)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """As ``nn.MultiheadAttention``; ``is_causal`` is only a hint there too: ``attn_mask`` decides."""
        if not self.batch_first:
            query, key, value = (x.transpose(0, 1) for x in (query, key, value))
        q, k, v = (
            self._heads(self.q_proj(query)),
            self._heads(self.k_proj(key)),
            self._heads(self.v_proj(value)),
        )
        scores = q @ k.transpose(-2, -1) * self.head_dim**-0.5
        if attn_mask is not None:
            if attn_mask.dim() == 3:
                attn_mask = attn_mask.reshape(q.shape[0], -1, *attn_mask.shape[1:])
            scores = scores + _additive(attn_mask, scores)
        if key_padding_mask is not None:
            scores = scores + _additive(key_padding_mask[:, None, None], scores)
        weights = nn.functional.dropout(scores.softmax(-1), self.dropout, self.training)
        mixed = self.out_proj((weights @ v).transpose(1, 2).flatten(2))
        if not self.batch_first:
            mixed = mixed.transpose(0, 1)
        if not need_weights:
            return mixed, None
        return mixed, weights.mean(1) if average_attn_weights else weights

    def _heads(self, x: Tensor) -> Tensor:
        """[batch, length, heads x width] to [batch, heads, length, width]."""
        return x.reshape(x.shape[0], x.shape[1], -1, self.head_dim).transpose(1, 2)


def _additive(mask: Tensor, scores: Tensor) -> Tensor:
    """A mask of what to leave out, as numbers to be added to scores."""
    if mask.dtype is not torch.bool:
        return mask
    return torch.zeros_like(mask, dtype=scores.dtype).masked_fill(mask, float("-inf"))
