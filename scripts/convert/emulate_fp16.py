"""What a device makes of an fp16 file, on a CPU: each operator's result is rounded to fp16, its sums are not.

    with emulating(Path("build/onnx/vit.fp16.onnx")) as float32: …

ONNX Runtime on a CPU has few kernels of fp16: it computes chains of operators in float32 and rounds where they end. A
GPU's kernels add in float32, too, and round what each of them writes. Where ONNX Runtime on a GPU fuses several into
one kernel, it rounds less often than this.
"""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import onnx_ir
from onnx_ir import DataType, Model, Node, Value

from convertation.fp16 import MOVES
from convertation.onnx_file import write


def emulate_fp16(model: Model) -> Model:
    """In place: every value float32, and those that were float16 rounded to its numbers; names stay."""
    graph = model.graph
    for value in graph.initializers.values():
        if value.dtype == DataType.FLOAT16 and value.const_value is not None:
            value.const_value = onnx_ir.tensor(value.const_value.numpy().astype("float32"), name=value.name)
            value.dtype = DataType.FLOAT
    for node in list(graph):
        for value in [value for value in node.outputs if value.dtype == DataType.FLOAT16]:
            if node.op_type in MOVES:
                value.dtype = DataType.FLOAT
            else:
                round_value(model, node, value)
        if node.op_type == "Cast" and node.outputs[0].dtype == DataType.FLOAT:
            node.attributes["to"] = onnx_ir.AttrInt64("to", DataType.FLOAT)
    return model


def round_value(model: Model, node: Node, value: Value) -> None:
    """Put two Casts after `node`, of which whoever takes `value` gets the last one's output."""
    name, uses = str(value.name), list(value.uses())
    value.name, end = f"{name}/exact", value
    value.dtype = DataType.FLOAT
    if node.op_type == "Cast":  # from float32: it is the first of the two
        node.attributes["to"], value.dtype = onnx_ir.AttrInt64("to", DataType.FLOAT16), DataType.FLOAT16
    kinds = [DataType.FLOAT] if node.op_type == "Cast" else [DataType.FLOAT16, DataType.FLOAT]
    for kind in kinds:
        step = Node("", "Cast", [end], [onnx_ir.AttrInt64("to", kind)], name=f"{name}/{kind.name}")
        model.graph.insert_after(node, step)
        node, end = step, step.outputs[0]
        end.shape, end.type = value.shape, onnx_ir.TensorType(kind)
        end.name = name if kind == DataType.FLOAT else f"{name}/rounded"
    for user, place in uses:
        user.replace_input_with(place, end)


@contextmanager
def emulated_file(rounded: Path) -> Iterator[Path]:
    """Yield a float32 file that computes what the fp16 file `rounded` does, for as long as it is needed."""
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch, rounded.name)
        write(emulate_fp16(onnx_ir.load(rounded)), file, {})
        yield file
