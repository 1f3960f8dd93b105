"""Round an ONNX model to fp16 where the range of its values allows; scripts/convert/round_fp16.py measures and writes.

Every value has a type of its own, as TensorRT wants it under --stronglyTyped: float16 where the work and memory are,
float32 where a value comes near the largest of float16, and at the two ends where rounding would change codes. Inputs
and outputs stay float32, values keep their names.
"""

from collections.abc import Iterable, Mapping

import numpy as np
import onnx_ir
from onnx_ir import DataType, Graph, Model, Node, Value

# Products, whose sums hardware adds up in float32
PRODUCTS = {"MatMul", "Gemm", "Conv"}
HALF = {
    *PRODUCTS,
    "Add",
    "Div",
    "Gelu",
    "LayerNormalization",
    "Mul",
    "Pow",
    "ReduceMean",
    "Softmax",
    "Sqrt",
    "Sub",
}
# These compute nothing
MOVES = {
    "Reshape",
    "Transpose",
    "Split",
    "Concat",
    "Slice",
    "Gather",
    "Pad",
    "Expand",
    "Squeeze",
    "Unsqueeze",
    "Flatten",
}
FLOATS = (DataType.FLOAT, DataType.FLOAT16)
LARGEST = float(np.finfo(np.float16).max)  # 65504
LEAST = float(np.finfo(np.float16).smallest_subnormal)  # 6e-8
HEADROOM = 8  # other volumes than the measured ones may have larger values


def fp16(model: Model, largest: Mapping[str, float]) -> list[str]:
    """In place: weights and values become float16, and the names of nodes that could, but for their range, return.

    `largest`: of each float value that `measured` names, the largest absolute one. A node with a value of more than an
    eighth of 65504 computes in float32; so does what comes before the first product (the norm of pixels), the norm
    before the quantiser, and its similarities.

    SystemExit: a weight that float16 cannot hold, or a value that is not finite even in float32.
    """
    graph = model.graph
    exact = exact_nodes(graph)
    tell_types(graph)
    reach = {value: largest[value.name] for value in measured(graph) if value.name}
    typed: dict[tuple[Value, DataType], Value] = {}
    kept = []
    for node in list(graph):
        floats = [value for value in node.inputs if value is not None and value.dtype in FLOATS]
        if not floats:
            continue
        passing = [value for value in floats if value.const_value is None]
        made = [value for value in node.outputs if value.dtype in FLOATS]
        if node.op_type in MOVES:
            reach |= dict.fromkeys(made, max((reach[value] for value in passing), default=0.0))
        ranges = [reach[value] for value in (*passing, *made)]
        if not np.isfinite(ranges).all():
            raise SystemExit(
                f"{node.name} ({node.op_type}): its values are not finite, in float32; no fp16 is made of it"
            )
        near = max(ranges, default=0.0)
        kind = chosen(node, passing)
        if node in exact:
            kind = DataType.FLOAT
        elif node.op_type in HALF and near * HEADROOM > LARGEST:
            kind = DataType.FLOAT
            kept.append(f"{node.name} ({node.op_type}, up to {near:.3g})")
        for index, value in enumerate(node.inputs):
            if value is not None and value.dtype in FLOATS and value.dtype != kind:
                if (value, kind) not in typed:
                    typed[value, kind] = cast(model, node, value, kind)
                node.replace_input_with(index, typed[value, kind])
        for value in made:
            value.dtype = kind
    for index, value in enumerate(graph.outputs):
        if value.dtype == DataType.FLOAT16:
            graph.outputs[index] = back(model, value)
    for name, value in list(graph.initializers.items()):
        if not value.uses():
            del graph.initializers[name]
    model.metadata_props["precision"] = "fp16"
    return kept


def tell_types(graph: Graph) -> None:
    """In place: the exporter leaves the types of values inside the graph unsaid that it was asked to name."""
    for node in graph:
        for value in node.outputs:
            if value.dtype is None and node.op_type in MOVES and node.inputs[0] is not None and node.inputs[0].dtype:
                value.dtype = node.inputs[0].dtype


def exact_nodes(graph: Graph) -> set[Node]:
    """What stays float32 whatever its range: nodes before the first product, the quantiser's product, and the
    LayerNormalization that it takes its tokens from.
    """
    inputs, found = set(graph.inputs), set[Node]()
    for node in graph:
        passing = [value for value in node.inputs if value is not None and value.const_value is None]
        ahead = all(value in inputs or value.producer() in found for value in passing)
        if passing and ahead and node.op_type not in PRODUCTS:
            found.add(node)
    for node in graph:
        if node.op_type == "ArgMax":
            found |= set(tokens_from(node))
    return found


def tokens_from(quantiser: Node) -> Iterable[Node]:
    """The product that an ArgMax is taken of; with what moves its tokens, the norm that they come from."""
    product, *_ = before(quantiser)
    yield product
    moves = []
    for node in before(product):
        moves.append(node)
        if node.op_type == "LayerNormalization":
            yield from moves
        if node.op_type not in MOVES:
            return


def before(node: Node) -> Iterable[Node]:
    """The node that made the first input, then the one before that, and so on."""
    while node.inputs and node.inputs[0] is not None and (made_by := node.inputs[0].producer()) is not None:
        yield made_by
        node = made_by


def measured(graph: Graph) -> Iterable[Value]:
    """The float values whose range counts: the graph's inputs and what nodes compute; moving changes no range."""
    yield from (value for value in graph.inputs if value.dtype in FLOATS)
    for node in graph:
        if node.op_type not in MOVES:
            yield from (value for value in node.outputs if value.dtype in FLOATS)


def chosen(node: Node, passing: list[Value]) -> DataType:
    """The type that a node computes in where nothing speaks against it; what moves values keeps theirs."""
    if node.op_type in HALF:
        return DataType.FLOAT16
    if node.op_type in MOVES and all(value.dtype == DataType.FLOAT16 for value in passing):
        return DataType.FLOAT16
    return DataType.FLOAT


def cast(model: Model, user: Node, value: Value, kind: DataType) -> Value:
    """`value` as `kind`: another initializer, or the output of a Cast before `user`.

    A weight of which nothing would be left, such as the 1e-24 that keeps a divisor from 0, becomes the least of fp16.
    """
    name = f"{value.name}_{'fp16' if kind == DataType.FLOAT16 else 'fp32'}"
    if value.const_value is not None:
        exact = value.const_value.numpy()
        with np.errstate(over="ignore", under="ignore"):
            array = exact.astype(kind.numpy())
        if not np.isfinite(array).all():
            raise SystemExit(
                f"{user.name} ({user.op_type}): its weight {value.name} goes up to {np.abs(exact).max():.3g}, the "
                f"largest of fp16 is {LARGEST:.0f}; keep this model in fp32"
            )
        if exact.any() and not array.any():
            array = (np.sign(exact) * LEAST).astype(kind.numpy())
        tensor = onnx_ir.tensor(array, name=name)
        made = Value(name=name, shape=value.shape, type=onnx_ir.TensorType(kind), const_value=tensor)
        model.graph.register_initializer(made)
        return made
    node = Node("", "Cast", [value], [onnx_ir.AttrInt64("to", kind)], name=f"{name}_cast")
    made = node.outputs[0]
    made.name, made.shape, made.type = name, value.shape, onnx_ir.TensorType(kind)
    model.graph.insert_before(user, node)
    return made


def back(model: Model, value: Value) -> Value:
    """A float32 output of the same name in place of `value`."""
    node = Node("", "Cast", [value], [onnx_ir.AttrInt64("to", DataType.FLOAT)], name=f"{value.name}_cast")
    made = node.outputs[0]
    made.name, value.name = value.name, f"{value.name}_fp16"
    made.shape, made.type = value.shape, onnx_ir.TensorType(DataType.FLOAT)
    model.graph.append(node)
    return made
