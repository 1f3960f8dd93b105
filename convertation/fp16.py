"""Round an ONNX file to fp16 where that is safe: python -m convertation.fp16 MODEL.onnx OUT.onnx

Every value of OUT has a type of its own, as TensorRT wants it under --stronglyTyped: float16 where most of the work and
memory is, float32 where it would overflow or change codes. Inputs and outputs stay float32, values keep their names.
"""

import argparse
from pathlib import Path

import numpy as np
import onnx_ir
from onnx_ir import DataType, Model, Node, Value

from convertation.onnx_file import write

# Products, which hardware adds up in float32, and what follows them element by element
HALF = {"MatMul", "Gemm", "Conv", "Gelu"}
# Float32 if one side is: so the sum that runs through all layers stays float32
EITHER = {"Add", "Mul"}
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


def fp16(model: Model) -> Model:
    """In place: weights and values become float16, but for what any other operator takes, such as LayerNormalization,
    Softmax, reductions and divisions, and but for the product that an ArgMax is taken of, the quantiser's similarities.

    SystemExit: a weight that float16 cannot hold.
    """
    graph = model.graph
    exact = {node.inputs[0].producer() for node in graph if node.op_type == "ArgMax" and node.inputs[0]}
    typed: dict[tuple[Value, DataType], Value] = {}
    for node in list(graph):
        floats = [value for value in node.inputs if value is not None and value.dtype in FLOATS]
        if not floats:
            continue
        kind = DataType.FLOAT if node in exact else chosen(node, floats)
        for index, value in enumerate(node.inputs):
            if value is not None and value.dtype in FLOATS and value.dtype != kind:
                if (value, kind) not in typed:
                    typed[value, kind] = cast(model, node, value, kind)
                node.replace_input_with(index, typed[value, kind])
        for output in node.outputs:
            if output.dtype in FLOATS:
                output.dtype = kind
    for index, value in enumerate(graph.outputs):
        if value.dtype == DataType.FLOAT16:
            graph.outputs[index] = back(model, value)
    for name, value in list(graph.initializers.items()):
        if not value.uses():
            del graph.initializers[name]
    model.metadata_props["precision"] = "fp16"
    return model


def chosen(node: Node, floats: list[Value]) -> DataType:
    """The type that a node computes in, given its inputs so far."""
    passing = [value for value in floats if value.const_value is None]
    if node.op_type in HALF or (node.op_type in MOVES and not passing):
        return DataType.FLOAT16
    if node.op_type in MOVES | EITHER and all(value.dtype == DataType.FLOAT16 for value in passing):
        return DataType.FLOAT16
    return DataType.FLOAT


def cast(model: Model, user: Node, value: Value, kind: DataType) -> Value:
    """`value` as `kind`: another initializer, or the output of a Cast before `user`."""
    name = f"{value.name}_{'fp16' if kind == DataType.FLOAT16 else 'fp32'}"
    if value.const_value is not None:
        with np.errstate(over="ignore"):
            array = value.const_value.numpy().astype(kind.numpy())
        if not np.isfinite(array).all():
            raise SystemExit(f"{value.name}: weights beyond 65504, the largest of fp16; keep this model in fp32")
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


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model", type=Path)
    parser.add_argument("out", type=Path)
    given = parser.parse_args()
    model = onnx_ir.load(given.model)
    metadata = dict(model.metadata_props)
    write(fp16(model), given.out, metadata | {"precision": "fp16"})


if __name__ == "__main__":
    main()
