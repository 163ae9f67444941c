"""A causal transformer that predicts the next character of NumPy's and scikit-learn's documentation."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from accuracy import judging, training
from accuracy.case import CALIBRATION_ROWS, Array, Case, Data

_CONTEXT = 64
_WIDTH, _HEADS, _LAYERS = 96, 4, 3
_SYMBOLS = 96  # printable ASCII, and one for all else
_TRAIN_ROWS, _TEST_ROWS = 12000, 400
_HELD_OUT_FRACTION = 0.2


class _Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first_norm, self.second_norm = nn.LayerNorm(_WIDTH), nn.LayerNorm(_WIDTH)
        self.query, self.key, self.value, self.out = (nn.Linear(_WIDTH, _WIDTH) for _ in range(4))
        self.wide, self.narrow = nn.Linear(_WIDTH, 4 * _WIDTH), nn.Linear(4 * _WIDTH, _WIDTH)

    def forward(self, x: Tensor, hidden: Tensor) -> Tensor:
        read = self.first_norm(x)
        query, key, value = (_split(layer(read)) for layer in (self.query, self.key, self.value))
        scores = query @ key.transpose(-1, -2) / (_WIDTH // _HEADS) ** 0.5
        mixed = torch.softmax(scores + hidden, dim=-1) @ value
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        answer: Tensor = x + self.narrow(F.gelu(self.wide(self.second_norm(x))))
        return answer


def _split(x: Tensor) -> Tensor:
    """[batch, length, width] to [batch, heads, length, width / heads]."""
    heads: Tensor = x.view(*x.shape[:-1], _HEADS, _WIDTH // _HEADS)
    return heads.transpose(1, 2)


class Language(nn.Module):
    """Embeddings, three pre-norm blocks, a linear head."""

    def __init__(self) -> None:
        super().__init__()
        self.symbols = nn.Embedding(_SYMBOLS, _WIDTH)
        self.places = nn.Parameter(torch.randn(_CONTEXT, _WIDTH) * 0.02)
        self.blocks = nn.ModuleList(_Block() for _ in range(_LAYERS))
        self.norm = nn.LayerNorm(_WIDTH)
        self.head = nn.Linear(_WIDTH, _SYMBOLS)
        future = torch.full((_CONTEXT, _CONTEXT), -1e4).triu(1)
        self.register_buffer("future", future, persistent=False)

    def forward(self, text: Tensor) -> Tensor:
        """Symbols int64 [batch, 64] to logits of the next ones [batch, 64, 96]."""
        x = self.symbols(text) + self.places
        for block in self.blocks:
            x = block(x, self.future)
        logits: Tensor = self.head(self.norm(x))
        return logits


def _loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    text, following = batch
    return F.cross_entropy(model(text).flatten(0, 1), following.flatten())


def _export(path: Path) -> None:
    arrays = _windows(_TRAIN_ROWS, test=False)
    model = training.train(Language, arrays, _loss, epochs=3, batch=32, learning_rate=3e-3)
    training.export(model, {"text": torch.zeros(2, _CONTEXT, dtype=torch.int64)}, ["logits"], path)


def _data() -> Data:
    calibration, _ = _windows(CALIBRATION_ROWS, test=False)
    text, following = _windows(_TEST_ROWS, test=True)
    rows = [{"text": row[None]} for row in calibration]
    return Data(rows, [{"text": text[i : i + 20]} for i in range(0, len(text), 20)], following)


def _windows(count: int, *, test: bool) -> tuple[Array, Array]:
    """Random windows, and the same one symbol later; the last part of each document is held out."""
    parts = []
    for document in _documents():
        symbols = np.frombuffer(document.encode("ascii", "replace"), np.uint8).astype(np.int64) - 31
        symbols = np.where((symbols >= 0) & (symbols < _SYMBOLS), symbols, 0)
        cut = int(len(symbols) * (1 - _HELD_OUT_FRACTION))
        parts.append(symbols[cut:] if test else symbols[:cut])
    text = np.concatenate(parts)
    starts = np.random.default_rng(test).integers(0, len(text) - _CONTEXT - 1, count)
    windows = text[starts[:, None] + np.arange(_CONTEXT + 1)]
    return np.ascontiguousarray(windows[:, :-1]), np.ascontiguousarray(windows[:, 1:])


def _documents() -> list[str]:
    descriptions = sorted(files("sklearn.datasets.descr").iterdir(), key=lambda path: path.name)
    texts = [path.read_text(encoding="utf-8") for path in descriptions if path.name.endswith(".rst")]
    return texts + [getattr(np, name).__doc__ or "" for name in sorted(np.__all__)]


CASE = Case(
    name="language",
    summary="a causal transformer, characters of English documentation",
    metric="log2_likelihood",
    quality=judging.likelihood,
    distance_name="divergence_millibits",
    distance=judging.divergence(axis=-1),
    transformer=True,
    export=_export,
    data=_data,
    sources=(Path(__file__),),
)
