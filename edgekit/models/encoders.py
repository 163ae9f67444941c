"""Hugging Face encoders as modules with plain tensors in, one tensor out."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

# What of a model's answer is its output, in this order.
_ANSWERS = ("logits", "image_embeds", "text_embeds", "last_hidden_state")


class ImageEncoder(nn.Module):
    """``pixel_values`` float [batch, channels, height, width] to the model's logits, embeddings or states."""

    input_names = ("pixel_values",)

    def __init__(self, encoder: Any) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Answer a batch of images."""
        return _only(self.named(pixel_values))

    def named(self, pixel_values: Tensor) -> dict[str, Tensor]:
        """As ``forward``, with the output's name."""
        return _answer(self.encoder(pixel_values=pixel_values, return_dict=True))


class TextEncoder(nn.Module):
    """Token ids and mask int64 [batch, length] to logits, or to states [batch, length, width]."""

    def __init__(self, encoder: Any, takes_types: bool) -> None:
        super().__init__()
        self.encoder = _without_unused(encoder)
        self.input_names = ("input_ids", "attention_mask", *(("token_type_ids",) if takes_types else ()))

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None = None
    ) -> Tensor:
        """Answer a batch of texts; where ``attention_mask`` is 0 there is padding."""
        return _only(self.named(input_ids, attention_mask, token_type_ids))

    def named(
        self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None = None
    ) -> dict[str, Tensor]:
        """As ``forward``, with the output's name."""
        return _answer(self._encode(input_ids, attention_mask, token_type_ids))

    def _encode(self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None) -> Any:
        types = {} if token_type_ids is None else {"token_type_ids": token_type_ids}
        return self.encoder(input_ids=input_ids, attention_mask=attention_mask, return_dict=True, **types)


class SentenceEncoder(TextEncoder):
    """Token ids and mask int64 [batch, length] to one vector a text [batch, width].

    The pooling is sentence-transformers': mean over the tokens that the mask keeps, the first token, or
    the maximum over those tokens; then, if asked, scaled to length 1.
    """

    def __init__(self, encoder: Any, takes_types: bool, pooling: str, normalize: bool) -> None:
        super().__init__(encoder, takes_types)
        self.pooling = pooling
        self.normalize = normalize

    def named(
        self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Embed a batch of texts; padding has no influence."""
        states: Tensor = self._encode(input_ids, attention_mask, token_type_ids).last_hidden_state
        vectors = _pool(states, attention_mask, self.pooling)
        return {"sentence_embedding": nn.functional.normalize(vectors, dim=-1) if self.normalize else vectors}


def _pool(states: Tensor, attention_mask: Tensor, pooling: str) -> Tensor:
    if pooling == "cls":
        return states[:, 0]
    mask = attention_mask.unsqueeze(-1).to(states.dtype)
    if pooling == "max":
        return (states * mask + (mask - 1) * 1e9).amax(dim=1)
    return (states * mask).sum(dim=1) / mask.sum(dim=1).clamp(min=1e-9)


def _answer(outputs: Any) -> dict[str, Tensor]:
    for name in _ANSWERS:
        value = outputs.get(name)
        if isinstance(value, torch.Tensor):
            return {name: value}
    raise TypeError(f"a {type(outputs).__name__} has none of {', '.join(_ANSWERS)}")


def _only(named: dict[str, Tensor]) -> Tensor:
    (value,) = named.values()
    return value


def _without_unused(encoder: Any) -> Any:
    """Drop what no output of a text encoder uses: the key cache, and a bare encoder's pooler."""
    encoder.config.use_cache = False
    if getattr(encoder, "pooler", None) is not None:
        encoder.pooler = None
    return encoder
