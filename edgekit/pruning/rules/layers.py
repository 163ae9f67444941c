"""Products, convolutions, normalization, pooling and embeddings: what layers are made of."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from edgekit.pruning.axes import PLAIN, Axes, Axis
from edgekit.pruning.rules.registry import rule
from edgekit.pruning.trace import Call, Tracer

if TYPE_CHECKING:
    from torch import Tensor


@rule("mm", "addmm", "_addmm_activation")
def _mm(tracer: Tracer, call: Call) -> Any:
    *bias, left, right = call.tensors()
    (rows, inner), (other, columns) = tracer.axes(left), tracer.axes(right)
    tracer.contract(inner, other, left.shape[1])
    tracer.product(columns)
    axes: Axes = (rows, columns)
    return [_with_bias(tracer, bias, axes, call.result.shape)]


@rule("bmm", "baddbmm")
def _bmm(tracer: Tracer, call: Call) -> Any:
    *bias, left, right = call.tensors()
    (batch, rows, inner), (batch_too, other, columns) = tracer.axes(left), tracer.axes(right)
    tracer.contract(inner, other, left.shape[2])
    tracer.operand(columns)
    tracer.splits.suits(batch)
    tracer.splits.suits(batch_too)
    axes = (tracer.tie((batch, batch_too), left.shape[0]), rows, columns)
    return [_with_bias(tracer, bias, axes, call.result.shape)]


@rule("mv", "addmv", "dot")
def _mv(tracer: Tracer, call: Call) -> Any:
    *bias, left, right = call.tensors()
    axes = tracer.axes(left)
    tracer.contract(axes[-1], tracer.axes(right)[0], left.shape[-1])
    return [_with_bias(tracer, bias, axes[:-1], call.result.shape)]


def _with_bias(tracer: Tracer, bias: Sequence[Tensor], axes: Axes, shape: Sequence[int]) -> Axes:
    for tensor in bias:
        known, offset = tracer.axes(tensor), len(shape) - tensor.dim()
        axes = tuple(
            tracer.tie((axis, known[i - offset]), shape[i])
            if i >= offset and tensor.shape[i - offset] == shape[i]
            else axis
            for i, axis in enumerate(axes)
        )
    return axes


@rule("convolution", "_convolution", "convolution_overrideable")
def _convolution(tracer: Tracer, call: Call) -> Any:
    image, weight, bias = (call.arguments[name] for name in ("input", "weight", "bias"))
    groups, transposed = int(call.arguments["groups"]), bool(call.arguments["transposed"])
    first, second, *kernel = tracer.axes(weight)
    for axis in kernel:
        tracer.pin(axis, "it is the kernel's extent")
    known = tracer.axes(image)
    channels = known[1]
    inputs = image.shape[1]
    if transposed:
        into, out = first, tiled(second, groups)
        if groups > 1 and into.labels is not None and weight.shape[1] > 1:
            tie_rows(tracer, into, groups)
        tracer.contract(channels, into, inputs)
        if groups > 1 and weight.shape[1] == 1:  # depthwise
            out = channels if channels.labels is not None else into
    elif groups == 1:
        tracer.contract(channels, second, inputs)
        out = first
    elif weight.shape[1] == 1:  # depthwise, each input channel with a multiple of outputs
        out = first
        if first.labels is not None:
            if channels.labels is None:
                tracer.pin(first, "a depthwise convolution meets values that no layer makes")
            else:
                tracer.labels.tie(first.labels.reshape(groups, -1), channels.labels[:, None])
    else:
        tie_rows(tracer, first, groups)
        tie_rows(tracer, channels, groups)
        part = channels if channels.labels is None else Axis(channels.labels[: inputs // groups])
        tracer.contract(part, second, inputs // groups)
        tracer.operand(channels)
        out = first
    tracer.product(out)
    if bias is not None:
        out = tracer.tie((out, tracer.axes(bias)[0]), bias.shape[0])
    return [(known[0], out, *([PLAIN] * len(kernel)))]


def tie_rows(tracer: Tracer, axis: Axis, groups: int) -> None:
    """A grouped convolution: all its groups lose the same positions."""
    if axis.labels is not None:
        rows = axis.labels.reshape(groups, -1)
        tracer.labels.tie(rows, rows[:1])


def tiled(axis: Axis, times: int) -> Axis:
    """An axis repeated as a whole."""
    return axis if axis.labels is None else Axis(np.tile(axis.labels, times))


@rule("native_batch_norm", "_native_batch_norm_legit_no_training", "_native_batch_norm_legit")
@rule("batch_norm", "cudnn_batch_norm", "_batch_norm_no_update", "_batch_norm_with_update")
def _batch_norm(tracer: Tracer, call: Call) -> Any:
    image, *statistics = call.tensors()
    axes = list(tracer.axes(image))
    tracer.sight(tuple(axes), image.shape)
    axes[1] = tracer.tie((axes[1], *(tracer.axes(t)[0] for t in statistics)), image.shape[1])
    return [tuple(axes)]


@rule("native_layer_norm", "_fused_rms_norm")
def _layer_norm(tracer: Tracer, call: Call) -> Any:
    tensor, *affine = call.tensors()
    axes = list(tracer.axes(tensor))
    tracer.sight(tuple(axes), tensor.shape)
    for parameter in affine:
        known = tracer.axes(parameter)
        for back in range(1, parameter.dim() + 1):
            axes[-back] = tracer.tie((axes[-back], known[-back]), tensor.shape[-back])
    for back in range(1, len(call.arguments["normalized_shape"]) + 1):
        tracer.splits.spoils(axes[-back])
    return [tuple(axes)]


@rule("native_group_norm")
def _group_norm(tracer: Tracer, call: Call) -> Any:
    image, *affine = call.tensors()
    axes = list(tracer.axes(image))
    tracer.sight(tuple(axes), image.shape)
    axes[1] = tracer.tie((axes[1], *(tracer.axes(t)[0] for t in affine)), image.shape[1])
    groups = int(call.arguments["group"])
    if image.shape[1] > groups > 1:
        tie_rows(tracer, axes[1], groups)
    return [tuple(axes)]


@rule("max_pool2d_with_indices", "max_pool3d_with_indices", "avg_pool2d", "avg_pool1d", "avg_pool3d")
@rule("_adaptive_avg_pool2d", "_adaptive_avg_pool3d", "adaptive_avg_pool1d", "adaptive_max_pool2d")
@rule("upsample_nearest1d", "upsample_nearest2d", "upsample_nearest3d", "upsample_bilinear2d")
@rule("upsample_bicubic2d", "upsample_linear1d", "upsample_trilinear3d", "_upsample_bilinear2d_aa")
@rule("_upsample_nearest_exact2d", "_upsample_bicubic2d_aa", "max_pool2d", "mkldnn_max_pool2d")
@rule("grid_sampler_2d", "grid_sampler")
def _spatial(tracer: Tracer, call: Call) -> Any:
    image = call.tensors()[0]
    axes = tracer.axes(image)
    extent = 1 if call.name.endswith("1d") else 3 if "3d" in call.name else 2
    for axis in axes[-extent:]:
        tracer.pin(axis, "it is resampled")
    kept = (*axes[:-extent], *([PLAIN] * extent))
    return [kept, kept]


@rule("roi_align", "_roi_align")
def _regions(tracer: Tracer, call: Call) -> Any:
    return [(PLAIN, tracer.axes(call.tensors()[0])[1], PLAIN, PLAIN)]


@rule("embedding")
def _embedding(tracer: Tracer, call: Call) -> Any:
    rows, columns = tracer.axes(call.arguments["weight"])
    tracer.pin(rows, "its indices are looked up")
    tracer.product(columns)
    return [(*([PLAIN] * call.arguments["indices"].dim()), columns)]
