"""Conditions that are known beforehand: the branch that runs takes the place of its If."""

from __future__ import annotations

from collections.abc import Iterator

from onnx import GraphProto, ModelProto, NodeProto, TensorProto, helper

from calibration.graph import Names, array, attribute, rename_reads, replace_nodes


def unfold_known_branches(model: ModelProto) -> bool:
    """Replace every If of the main graph whose condition is a constant by the branch that runs, in place.

    What is inside the branch can then be quantized like anything else.

    Returns:
        Whether there was one.
    """
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    names = Names(model)
    nodes: list[NodeProto] = []
    found = False
    for node in model.graph.node:
        branch = _known_branch(node, constants)
        if branch is None:
            nodes.append(node)
        else:
            nodes.extend(_unfold(model, node, branch, names))
            found = True
    replace_nodes(model.graph, nodes)
    return found


def _known_branch(node: NodeProto, constants: dict[str, TensorProto]) -> GraphProto | None:
    if node.op_type != "If" or node.domain not in ("", "ai.onnx") or node.input[0] not in constants:
        return None
    taken = bool(array(constants[node.input[0]]).reshape(-1)[0])
    branch = attribute(node, "then_branch" if taken else "else_branch")
    return branch if isinstance(branch, GraphProto) else None


def _unfold(model: ModelProto, node: NodeProto, branch: GraphProto, names: Names) -> Iterator[NodeProto]:
    """The branch's nodes under names of their own: those of the other branch may be the same."""
    body = GraphProto()
    body.CopyFrom(branch)
    renamed = {name: names.fresh(f"{node.name}/{name}") for name in _made(body)}
    for old, new in renamed.items():
        rename_reads(body.node, old, new)
    for tensor in body.initializer:
        tensor.name = renamed[tensor.name]
        model.graph.initializer.append(tensor)
    for inner in body.node:
        inner.name = names.fresh(f"{node.name}/{inner.name or inner.op_type}")
        inner.output[:] = [renamed.get(name, name) for name in inner.output]
        yield inner
    for value, output in zip(body.output, node.output, strict=True):
        if output:
            source = renamed.get(value.name, value.name)
            yield helper.make_node("Identity", [source], [output], name=names.fresh(f"{output}_taken"))


def _made(body: GraphProto) -> list[str]:
    made = [tensor.name for tensor in body.initializer]
    made += [name for node in body.node for name in node.output if name]
    return made
