"""What each kind of operator does to the axes of its arguments."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np

from edgekit.pruning.axes import PLAIN, Axes, Axis
from edgekit.pruning.trace import Call, Rule, Tracer

if TYPE_CHECKING:
    from torch import Tensor

_RULES: dict[str, Rule] = {}


def rule_for(operator: Any) -> Rule:
    """The rule of an ATen operator."""
    name = operator._schema.name
    return _by_name(name, _is_pointwise(operator))


@cache
def _by_name(name: str, pointwise: bool) -> Rule:
    short = name.rpartition("::")[2]
    found = _RULES.get(short) or _RULES.get(short.removesuffix("_"))
    if found is not None:
        return found
    return _pointwise if pointwise else _unknown


def _is_pointwise(operator: Any) -> bool:
    import torch

    return torch.Tag.pointwise in operator.tags


def _rule(*names: str) -> Callable[[Rule], Rule]:
    def register(function: Rule) -> Rule:
        _RULES.update(dict.fromkeys(names, function))
        return function

    return register


def _wrap(axis: int, dims: int) -> int:
    return axis + dims if axis < 0 else axis


def _axis_list(value: Any, dims: int) -> list[int]:
    """Axes given as one number, several, or none for all."""
    if value is None or value == []:
        return list(range(dims))
    if isinstance(value, int):
        value = [value]
    return [_wrap(axis, dims) for axis in value]


# ---------------------------------------------------------------- element by element


def _pointwise(tracer: Tracer, call: Call) -> Any:
    results = call.result if isinstance(call.result, (tuple, list)) else [call.result]
    axes = _broadcast(tracer, [t for t in call.tensors() if t.dim()], results[0].shape)
    return [axes] * len(results)


def _broadcast(tracer: Tracer, tensors: Sequence[Tensor], shape: Sequence[int]) -> Axes:
    known = [(tracer.axes(tensor), tensor.shape) for tensor in tensors]
    made = []
    for back in range(1, len(shape) + 1):
        meeting = [axes[-back] for axes, size in known if len(size) >= back and size[-back] == shape[-back]]
        made.append(tracer.meet(meeting, shape[-back]) if meeting else PLAIN)
    return tuple(reversed(made))


@_rule("copy", "masked_fill", "where", "dropout", "native_dropout", "bernoulli", "fill", "zero", "lerp")
@_rule("addcmul", "addcdiv", "lift_fresh", "clamp", "_to_copy", "clone", "detach", "alias", "contiguous")
@_rule("empty_like", "rand_like", "randn_like", "_prelu_kernel")
@_rule("hardswish", "gelu", "relu6", "mish", "threshold", "rrelu_with_noise", "floor_divide")
def _same(tracer: Tracer, call: Call) -> Any:
    return _pointwise(tracer, call)


@_rule("_softmax", "_log_softmax", "cumsum", "logcumsumexp", "_safe_softmax", "softmax")
def _along(tracer: Tracer, call: Call) -> Any:
    tensor = call.tensors()[0]
    axes = tracer.axes(tensor)
    axis = _wrap(int(call.arguments["dim"]), tensor.dim()) if tensor.dim() else 0
    if axes:
        tracer.splits.spoils(axes[axis])
        if call.name.endswith("sum"):
            tracer.pin(axes[axis], "sums run along it")
    return [axes]


@_rule("sum", "mean", "amax", "amin", "var", "var_mean", "std", "std_mean", "linalg_vector_norm", "norm")
@_rule("prod", "argmax", "argmin", "any", "all", "logsumexp", "max", "min", "median", "aminmax")
def _reduce(tracer: Tracer, call: Call) -> Any:
    tensors = call.tensors()
    if len(tensors) == 2:  # max and min of two tensors
        return _pointwise(tracer, call)
    tensor = tensors[0]
    gone = set(_axis_list(call.arguments.get("dim"), tensor.dim()))
    axes = list(tracer.axes(tensor))
    for axis in gone:
        tracer.splits.spoils(axes[axis])
        if "arg" in call.name or call.name in ("max", "min", "median"):
            tracer.pin(axes[axis], "its number is an answer")
    if call.arguments.get("keepdim"):
        kept = [PLAIN if i in gone else axis for i, axis in enumerate(axes)]
    else:
        kept = [axis for i, axis in enumerate(axes) if i not in gone]
    results = call.result if isinstance(call.result, (tuple, list)) else [call.result]
    return [tuple(kept)] * len(results)


# ---------------------------------------------------------------- products


@_rule("mm", "addmm", "_addmm_activation")
def _mm(tracer: Tracer, call: Call) -> Any:
    *bias, left, right = call.tensors()
    (rows, inner), (other, columns) = tracer.axes(left), tracer.axes(right)
    tracer.contract(inner, other, left.shape[1])
    tracer.product(columns)
    axes: Axes = (rows, columns)
    return [_with_bias(tracer, bias, axes, call.result.shape)]


@_rule("bmm", "baddbmm")
def _bmm(tracer: Tracer, call: Call) -> Any:
    *bias, left, right = call.tensors()
    (batch, rows, inner), (batch_too, other, columns) = tracer.axes(left), tracer.axes(right)
    tracer.contract(inner, other, left.shape[2])
    tracer.operand(columns)
    tracer.splits.suits(batch)
    tracer.splits.suits(batch_too)
    axes = (tracer.tie((batch, batch_too), left.shape[0]), rows, columns)
    return [_with_bias(tracer, bias, axes, call.result.shape)]


@_rule("mv", "addmv", "dot")
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


@_rule("convolution", "_convolution", "convolution_overrideable")
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
        into, out = first, _tiled(second, groups)
        if groups > 1 and into.labels is not None and weight.shape[1] > 1:
            _tie_rows(tracer, into, groups)
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
        _tie_rows(tracer, first, groups)
        _tie_rows(tracer, channels, groups)
        part = channels if channels.labels is None else Axis(channels.labels[: inputs // groups])
        tracer.contract(part, second, inputs // groups)
        tracer.operand(channels)
        out = first
    tracer.product(out)
    if bias is not None:
        out = tracer.tie((out, tracer.axes(bias)[0]), bias.shape[0])
    return [(known[0], out, *([PLAIN] * len(kernel)))]


def _tie_rows(tracer: Tracer, axis: Axis, groups: int) -> None:
    """A grouped convolution: all its groups lose the same positions."""
    if axis.labels is not None:
        rows = axis.labels.reshape(groups, -1)
        tracer.labels.tie(rows, rows[:1])


def _tiled(axis: Axis, times: int) -> Axis:
    return axis if axis.labels is None else Axis(np.tile(axis.labels, times))


# ---------------------------------------------------------------- normalization and pooling


@_rule("native_batch_norm", "_native_batch_norm_legit_no_training", "_native_batch_norm_legit")
@_rule("batch_norm", "cudnn_batch_norm", "_batch_norm_no_update", "_batch_norm_with_update")
def _batch_norm(tracer: Tracer, call: Call) -> Any:
    image, *statistics = call.tensors()
    axes = list(tracer.axes(image))
    tracer.sight(tuple(axes), image.shape)
    axes[1] = tracer.tie((axes[1], *(tracer.axes(t)[0] for t in statistics)), image.shape[1])
    return [tuple(axes)]


@_rule("native_layer_norm", "_fused_rms_norm")
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


@_rule("native_group_norm")
def _group_norm(tracer: Tracer, call: Call) -> Any:
    image, *affine = call.tensors()
    axes = list(tracer.axes(image))
    tracer.sight(tuple(axes), image.shape)
    axes[1] = tracer.tie((axes[1], *(tracer.axes(t)[0] for t in affine)), image.shape[1])
    groups = int(call.arguments["group"])
    if image.shape[1] > groups > 1:
        _tie_rows(tracer, axes[1], groups)
    return [tuple(axes)]


@_rule("max_pool2d_with_indices", "max_pool3d_with_indices", "avg_pool2d", "avg_pool1d", "avg_pool3d")
@_rule("_adaptive_avg_pool2d", "_adaptive_avg_pool3d", "adaptive_avg_pool1d", "adaptive_max_pool2d")
@_rule("upsample_nearest1d", "upsample_nearest2d", "upsample_nearest3d", "upsample_bilinear2d")
@_rule("upsample_bicubic2d", "upsample_linear1d", "upsample_trilinear3d", "_upsample_bilinear2d_aa")
@_rule("_upsample_nearest_exact2d", "_upsample_bicubic2d_aa", "max_pool2d", "mkldnn_max_pool2d")
@_rule("grid_sampler_2d", "grid_sampler")
def _spatial(tracer: Tracer, call: Call) -> Any:
    image = call.tensors()[0]
    axes = tracer.axes(image)
    extent = 1 if call.name.endswith("1d") else 3 if "3d" in call.name else 2
    for axis in axes[-extent:]:
        tracer.pin(axis, "it is resampled")
    kept = (*axes[:-extent], *([PLAIN] * extent))
    return [kept, kept]


@_rule("roi_align", "_roi_align")
def _regions(tracer: Tracer, call: Call) -> Any:
    return [(PLAIN, tracer.axes(call.tensors()[0])[1], PLAIN, PLAIN)]


# ---------------------------------------------------------------- shapes


@_rule("view", "_unsafe_view", "reshape", "_reshape_alias", "pixel_unshuffle", "view_copy")
def _view(tracer: Tracer, call: Call) -> Any:
    tensor = call.tensors()[0]
    return [tracer.reshape(tracer.axes(tensor), tensor.shape, call.result.shape)]


@_rule("as_strided")
def _as_strided(tracer: Tracer, call: Call) -> Any:
    """Only the memory's order may change."""
    tensor = call.tensors()[0]
    return [tracer.axes(tensor)] if tensor.shape == call.result.shape else _unknown(tracer, call)


@_rule("unsqueeze", "squeeze")
def _ones(tracer: Tracer, call: Call) -> Any:
    """Only axes of size 1 come or go: the others keep their order."""
    tensor = call.tensors()[0]
    kept = iter([axis for axis, size in zip(tracer.axes(tensor), tensor.shape, strict=True) if size != 1])
    return [tuple(PLAIN if size == 1 else next(kept) for size in call.result.shape)]


@_rule("permute")
def _permute(tracer: Tracer, call: Call) -> Any:
    tensor = call.tensors()[0]
    axes = tracer.axes(tensor)
    return [tuple(axes[axis] for axis in call.arguments["dims"])]


@_rule("t")
def _t(tracer: Tracer, call: Call) -> Any:
    return [tuple(reversed(tracer.axes(call.tensors()[0])))]


@_rule("transpose")
def _transpose(tracer: Tracer, call: Call) -> Any:
    axes = list(tracer.axes(call.tensors()[0]))
    one, two = (_wrap(int(call.arguments[name]), len(axes)) for name in ("dim0", "dim1"))
    axes[one], axes[two] = axes[two], axes[one]
    return [tuple(axes)]


@_rule("expand")
def _expand(tracer: Tracer, call: Call) -> Any:
    return [_broadcast(tracer, call.tensors(), call.result.shape)]


@_rule("repeat")
def _repeat(tracer: Tracer, call: Call) -> Any:
    tensor, counts = call.tensors()[0], call.arguments["repeats"]
    new = len(counts) - tensor.dim()
    axes = [_tiled(axis, n) for axis, n in zip(tracer.axes(tensor), counts[new:], strict=True)]
    return [(*([PLAIN] * new), *axes)]


@_rule("cat", "concat")
def _cat(tracer: Tracer, call: Call) -> Any:
    tensors = [tensor for tensor in call.tensors() if tensor.dim() == call.result.dim()]
    along = _wrap(int(call.arguments["dim"]), call.result.dim())
    made = []
    for i in range(call.result.dim()):
        axes = [tracer.axes(tensor)[i] for tensor in tensors]
        if i != along:
            made.append(tracer.tie(axes, call.result.shape[i]))
            continue
        for axis in axes:
            tracer.splits.spoils(axis)
        if all(axis.labels is None for axis in axes):
            made.append(PLAIN)
            continue
        parts = [
            np.zeros(tensor.shape[i], np.int64) if axis.labels is None else axis.labels
            for axis, tensor in zip(axes, tensors, strict=True)
        ]
        made.append(Axis(np.concatenate(parts)))
    return [tuple(made)]


@_rule("stack")
def _stack(tracer: Tracer, call: Call) -> Any:
    tensors = call.tensors()
    along = _wrap(int(call.arguments["dim"]), call.result.dim())
    axes = list(_broadcast(tracer, tensors, tensors[0].shape))
    return [(*axes[:along], PLAIN, *axes[along:])]


@_rule("split", "split_with_sizes", "split_copy")
def _split(tracer: Tracer, call: Call) -> Any:
    tensor = call.tensors()[0]
    axes = tracer.axes(tensor)
    along = _wrap(int(call.arguments["dim"]), tensor.dim())
    axis = axes[along]
    sizes = [part.shape[along] for part in call.result]
    tracer.splits.spoils(axis)
    if axis.labels is not None and len(sizes) > 1:
        tracer.sight((axis,), (tensor.shape[along],))
        if len(set(sizes)) == 1:
            rows = axis.labels.reshape(len(sizes), -1)
            tracer.labels.tie(rows, rows[:1])
            tracer.sight((Axis(rows[0]),), (sizes[0],))
        else:
            tracer.pin(axis, "it is split into unequal parts")
    made, start = [], 0
    for size in sizes:
        part = axis if axis.labels is None else Axis(axis.labels[start : start + size])
        made.append((*axes[:along], part, *axes[along + 1 :]))
        start += size
    return made


@_rule("glu")
def _glu(tracer: Tracer, call: Call) -> Any:
    """One half gates the other."""
    tensor = call.tensors()[0]
    axes = list(tracer.axes(tensor))
    along = _wrap(int(call.arguments["dim"]), tensor.dim())
    labels = axes[along].labels
    if labels is not None:
        halves = labels.reshape(2, -1)
        tracer.labels.tie(halves[0], halves[1])
        axes[along] = Axis(halves[0])
    return [tuple(axes)]


@_rule("slice", "narrow")
def _slice(tracer: Tracer, call: Call) -> Any:
    tensor = call.tensors()[0]
    axes = list(tracer.axes(tensor))
    along = _wrap(int(call.arguments["dim"]), tensor.dim())
    size, length = tensor.shape[along], call.result.shape[along]
    start, labels = int(call.arguments.get("start") or 0), axes[along].labels
    if length == size:
        return [tuple(axes)]
    tracer.splits.spoils(axes[along])
    parts = length and size % length == 0 and start % length == 0 and call.arguments.get("step", 1) == 1
    if labels is not None and parts:  # a half, a third...
        rows = labels.reshape(-1, length)
        tracer.labels.tie(rows, rows[:1])
        axes[along] = Axis(rows[start // length])
    else:
        tracer.pin(axes[along], "the code takes a part of it")
        axes[along] = PLAIN
    return [tuple(axes)]


@_rule("select", "unbind")
def _select(tracer: Tracer, call: Call) -> Any:
    tensor = call.tensors()[0]
    axes = list(tracer.axes(tensor))
    along = _wrap(int(call.arguments["dim"]), tensor.dim())
    tracer.pin(axes[along], "the code picks from it by number")
    kept = tuple(axes[:along] + axes[along + 1 :])
    return [kept] * (len(call.result) if isinstance(call.result, (list, tuple)) else 1)


@_rule("constant_pad_nd", "reflection_pad1d", "reflection_pad2d", "replication_pad2d", "replication_pad1d")
@_rule("flip", "roll", "index_add", "index_copy", "unfold", "cumprod", "tril", "triu", "replication_pad3d")
def _unmoved(tracer: Tracer, call: Call) -> Any:
    """Axes that keep their size, and are not among those that the operator works along, pass through."""
    tensor = call.tensors()[0]
    axes = tracer.axes(tensor)
    moved = _moved(call, tensor.dim())
    made = [PLAIN] * call.result.dim()
    for i, axis in enumerate(axes):
        if i in moved or call.result.shape[i] != tensor.shape[i]:
            tracer.pin(axis, f"{call.name} works along it")
        else:
            made[i] = axis
    if call.name.startswith("index"):
        added = tracer.axes(call.arguments["source"])
        made = [
            PLAIN if i in moved else tracer.tie((axis, other), size)
            for i, (axis, other, size) in enumerate(zip(made, added, tensor.shape, strict=True))
        ]
    return [tuple(made)]


def _moved(call: Call, dims: int) -> list[int]:
    if call.name in ("flip", "roll"):
        return _axis_list(call.arguments["dims"], dims)
    if call.name in ("tril", "triu"):
        return [dims - 2, dims - 1]
    along = call.arguments.get("dim", call.arguments.get("dimension"))
    return [] if along is None else [_wrap(int(along), dims)]


# ---------------------------------------------------------------- lookups


@_rule("embedding")
def _embedding(tracer: Tracer, call: Call) -> Any:
    rows, columns = tracer.axes(call.arguments["weight"])
    tracer.pin(rows, "its indices are looked up")
    tracer.product(columns)
    return [(*([PLAIN] * call.arguments["indices"].dim()), columns)]


@_rule("index_select")
def _index_select(tracer: Tracer, call: Call) -> Any:
    tensor = call.tensors()[0]
    axes = list(tracer.axes(tensor))
    along = _wrap(int(call.arguments["dim"]), tensor.dim())
    index = call.arguments["index"]
    if (
        axes[along].labels is not None
        and call.name == "index_select"
        and _repeats(index, tensor.shape[along])
    ):
        axes[along] = Axis(axes[along].labels[index.numpy()])  # type: ignore[index]
    else:
        tracer.pin(axes[along], "its indices are looked up")
        axes[along] = PLAIN
    return [tuple(axes)]


def _repeats(index: Tensor, size: int) -> bool:
    """Whether an index repeats every entry of an axis equally often, in order (``repeat_interleave``)."""
    times = len(index) // size
    return len(index) == size * times and bool((index.numpy() == np.repeat(np.arange(size), times)).all())


@_rule("gather", "take_along_dim", "topk", "sort", "scatter", "scatter_add")
def _gather(tracer: Tracer, call: Call) -> Any:
    tensor = call.tensors()[0]
    axes = tracer.axes(tensor)
    results = call.result if isinstance(call.result, (tuple, list)) else [call.result]
    along = _wrap(int(call.arguments["dim"]), tensor.dim())
    made = []
    for i, axis in enumerate(axes):
        if i == along or results[0].shape[i] != tensor.shape[i]:
            tracer.pin(axis, "its indices are looked up")
            made.append(PLAIN)
        else:
            made.append(axis)
    if call.name.startswith("scatter") and isinstance(call.arguments.get("src"), type(tensor)):
        for axis in tracer.axes(call.arguments["src"]):
            tracer.pin(axis, "it is scattered")
    return [tuple(made)] * len(results)


@_rule("index", "index_put", "_unsafe_index", "_index_put_impl", "_unsafe_index_put")
def _index(tracer: Tracer, call: Call) -> Any:
    tensor = call.arguments["self"]
    axes = tracer.axes(tensor)
    indices = list(call.arguments["indices"])
    indices += [None] * (tensor.dim() - len(indices))
    if any(
        index is not None
        and index.dtype.is_floating_point is False
        and index.dim() != 1
        and str(index.dtype) == "torch.bool"
        for index in indices
    ):  # a mask over several axes
        return _masked(tracer, call, axes)
    for axis, index in zip(axes, indices, strict=False):
        if index is not None:
            tracer.pin(axis, "its indices are looked up")
    kept = [axis for axis, index in zip(axes, indices, strict=True) if index is None]
    places = [i for i, index in enumerate(indices) if index is not None]
    width = max(index.dim() for index in indices if index is not None)
    adjacent = places == list(range(places[0], places[-1] + 1))
    start = places[0] if adjacent else 0
    picked = (*kept[:start], *([PLAIN] * width), *kept[start:])
    if "put" not in call.name:
        return [picked if len(picked) == call.result.dim() else [PLAIN] * call.result.dim()]
    values = call.arguments["values"]
    if values.dim() and len(picked) >= values.dim():
        for back in range(1, values.dim() + 1):
            if values.shape[-back] != 1:
                tracer.tie((picked[-back], tracer.axes(values)[-back]), values.shape[-back])
    return [axes]


def _masked(tracer: Tracer, call: Call, axes: Axes) -> Any:
    mask = next(index for index in call.arguments["indices"] if index is not None)
    for axis in axes[: mask.dim()]:
        tracer.pin(axis, "a mask picks from it")
    if "put" in call.name:
        for axis in axes:
            tracer.pin(axis, "a mask picks from it")
        return [axes]
    return [(PLAIN, *axes[mask.dim() :])]


# ---------------------------------------------------------------- the rest


@_rule("zeros", "ones", "full", "new_zeros", "new_ones", "new_full", "zeros_like", "ones_like", "full_like")
def _blank(tracer: Tracer, call: Call) -> Any:
    """Zeros fit any channels, but only as many at a time: all that meet them are tied."""
    return [tuple(Axis(tracer.labels.fresh(size)) if size > 1 else PLAIN for size in call.result.shape)]


@_rule("arange", "empty", "scalar_tensor", "rand", "randn", "eye", "linspace")
@_rule("new_empty", "empty_strided", "new_empty_strided", "randint")
@_rule("_local_scalar_dense", "equal", "is_nonzero", "_assert_async", "_assert_tensor_metadata", "item")
@_rule("set", "resize", "randperm", "lift", "sym_size", "_assert_scalar")
def _nothing(tracer: Tracer, call: Call) -> Any:
    return None


def _unknown(tracer: Tracer, call: Call) -> Any:
    """No rule: whatever reaches this operator must stay as it is."""
    for tensor in call.tensors():
        for axis in tracer.axes(tensor):
            tracer.pin(axis, f"no rule for the operator {call.name}")
    return None
