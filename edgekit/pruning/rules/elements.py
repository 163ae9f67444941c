"""Operators that work element by element, along an axis, or make a tensor of nothing."""

from __future__ import annotations

from typing import Any

from edgekit.pruning.axes import PLAIN, Axis
from edgekit.pruning.rules.registry import axis_list, pointwise, rule, wrap
from edgekit.pruning.trace import Call, Tracer

rule(
    "copy", "masked_fill", "where", "dropout", "native_dropout", "bernoulli", "fill", "zero", "lerp",
    "addcmul", "addcdiv", "lift_fresh", "clamp", "_to_copy", "clone", "detach", "alias", "contiguous",
    "empty_like", "rand_like", "randn_like", "_prelu_kernel", "hardswish", "gelu", "relu6", "mish",
    "threshold", "hardtanh", "rrelu_with_noise", "floor_divide",
)(pointwise)  # fmt: skip


@rule("_softmax", "_log_softmax", "cumsum", "logcumsumexp", "_safe_softmax", "softmax")
def _along(tracer: Tracer, call: Call) -> Any:
    tensor = call.tensors()[0]
    axes = tracer.axes(tensor)
    axis = wrap(int(call.arguments["dim"]), tensor.dim()) if tensor.dim() else 0
    if axes:
        tracer.splits.spoils(axes[axis])
        if call.name.endswith("sum"):
            tracer.pin(axes[axis], "sums run along it")
    return [axes]


@rule("sum", "mean", "amax", "amin", "var", "var_mean", "std", "std_mean", "linalg_vector_norm", "norm")
@rule("prod", "argmax", "argmin", "any", "all", "logsumexp", "max", "min", "median", "aminmax")
def _reduce(tracer: Tracer, call: Call) -> Any:
    tensors = call.tensors()
    if len(tensors) == 2:  # max and min of two tensors
        return pointwise(tracer, call)
    tensor = tensors[0]
    gone = set(axis_list(call.arguments.get("dim"), tensor.dim()))
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


@rule("zeros", "ones", "full", "new_zeros", "new_ones", "new_full", "zeros_like", "ones_like", "full_like")
def _blank(tracer: Tracer, call: Call) -> Any:
    """Zeros fit any channels, but only as many at a time: all that meet them are tied."""
    return [tuple(Axis(tracer.labels.fresh(size)) if size > 1 else PLAIN for size in call.result.shape)]


@rule("arange", "empty", "scalar_tensor", "rand", "randn", "eye", "linspace")
@rule("new_empty", "empty_strided", "new_empty_strided", "randint")
@rule("_local_scalar_dense", "equal", "is_nonzero", "_assert_async", "_assert_tensor_metadata", "item")
@rule("set", "resize", "randperm", "lift", "sym_size", "_assert_scalar")
def _nothing(tracer: Tracer, call: Call) -> Any:
    return None
