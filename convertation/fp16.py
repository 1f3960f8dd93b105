"""Round an ONNX model to fp16 where the range of its values allows; scripts/convert/round_fp16.py measures and writes.

Each value gets its own type, as TensorRT expects with --stronglyTyped: float16 for the nodes that need most time and
memory; float32 for values near the largest of float16, and at both ends of the network, where rounding would change
codes. Inputs and outputs stay float32, and values keep their names.
"""

from collections.abc import Iterable, Mapping

import numpy as np
import onnx_ir
from onnx_ir import DataType, Graph, Model, Node, Value

# Products; hardware adds up their sums in float32
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
# Operators that move values and compute nothing
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
HEADROOM = 8  # other volumes may give larger values than the measured ones


def round_model(model: Model, largest: Mapping[str, float]) -> list[str]:
    """In place: make weights and values float16; return the nodes that stay float32 because of their range.

    `largest` has for each value of `list_measured` its largest absolute number. A node with a value above an eighth of
    65504 computes in float32. So do the nodes before the first product (the norm of the pixels), the norm before the
    quantiser, and the quantiser's product.
    SystemExit: float16 cannot hold a weight, or a value is not finite even in float32.
    """
    graph = model.graph
    exact = find_exact_nodes(graph)
    fill_types(graph)
    reach = {value: largest[value.name] for value in list_measured(graph) if value.name}
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
        kind = choose_type(node, passing)
        if node in exact:
            kind = DataType.FLOAT
        elif node.op_type in HALF and near * HEADROOM > LARGEST:
            kind = DataType.FLOAT
            kept.append(f"{node.name} ({node.op_type}, up to {near:.3g})")
        for index, value in enumerate(node.inputs):
            if value is not None and value.dtype in FLOATS and value.dtype != kind:
                if (value, kind) not in typed:
                    typed[value, kind] = cast_value(model, node, value, kind)
                node.replace_input_with(index, typed[value, kind])
        for value in made:
            value.dtype = kind
    for index, value in enumerate(graph.outputs):
        if value.dtype == DataType.FLOAT16:
            graph.outputs[index] = cast_output_back(model, value)
    for name, value in list(graph.initializers.items()):
        if not value.uses():
            del graph.initializers[name]
    model.metadata_props["precision"] = "fp16"
    return kept


def fill_types(graph: Graph) -> None:
    """In place: fill in types; the exporter leaves them out for the values inside the graph that it must name."""
    for node in graph:
        for value in node.outputs:
            if value.dtype is None and node.op_type in MOVES and node.inputs[0] is not None and node.inputs[0].dtype:
                value.dtype = node.inputs[0].dtype


def find_exact_nodes(graph: Graph) -> set[Node]:
    """Return the nodes that stay float32 whatever their range: those before the first product, the quantiser's
    product, and the LayerNormalization that its tokens come from.
    """
    inputs, found = set(graph.inputs), set[Node]()
    for node in graph:
        passing = [value for value in node.inputs if value is not None and value.const_value is None]
        ahead = all(value in inputs or value.producer() in found for value in passing)
        if passing and ahead and node.op_type not in PRODUCTS:
            found.add(node)
    for node in graph:
        if node.op_type == "ArgMax":
            found |= set(walk_to_norm(node))
    return found


def walk_to_norm(quantiser: Node) -> Iterable[Node]:
    """Yield the product before an ArgMax; then the norm that its tokens come from, with the nodes that move them."""
    product, *_ = walk_back(quantiser)
    yield product
    moves = []
    for node in walk_back(product):
        moves.append(node)
        if node.op_type == "LayerNormalization":
            yield from moves
        if node.op_type not in MOVES:
            return


def walk_back(node: Node) -> Iterable[Node]:
    """Yield the node that made the first input, then the node before that one, and so on."""
    while node.inputs and node.inputs[0] is not None and (made_by := node.inputs[0].producer()) is not None:
        yield made_by
        node = made_by


def list_measured(graph: Graph) -> Iterable[Value]:
    """Yield the float values that are measured: inputs and computed values; a moved value keeps its range."""
    yield from (value for value in graph.inputs if value.dtype in FLOATS)
    for node in graph:
        if node.op_type not in MOVES:
            yield from (value for value in node.outputs if value.dtype in FLOATS)


def choose_type(node: Node, passing: list[Value]) -> DataType:
    """Return the type that a node computes in if its range allows; a node that moves values keeps their type."""
    if node.op_type in HALF:
        return DataType.FLOAT16
    if node.op_type in MOVES and all(value.dtype == DataType.FLOAT16 for value in passing):
        return DataType.FLOAT16
    return DataType.FLOAT


def cast_value(model: Model, user: Node, value: Value, kind: DataType) -> Value:
    """Return `value` as `kind`: another initializer, or the output of a Cast before `user`.

    A weight that would become 0, such as the 1e-24 that keeps a divisor from 0, becomes the smallest number of fp16.
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


def cast_output_back(model: Model, value: Value) -> Value:
    """Return a float32 output that takes the name of `value`."""
    node = Node("", "Cast", [value], [onnx_ir.AttrInt64("to", DataType.FLOAT)], name=f"{value.name}_cast")
    made = node.outputs[0]
    made.name, value.name = value.name, f"{value.name}_fp16"
    made.shape, made.type = value.shape, onnx_ir.TensorType(DataType.FLOAT)
    model.graph.append(node)
    return made
