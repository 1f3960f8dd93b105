"""Emulate on a CPU how a GPU computes an fp16 file: each operator's result is rounded to fp16, its sums are not.

    with emulated_file(Path("build/onnx/vit.fp16.onnx")) as float32: …

ONNX Runtime on a CPU has few fp16 kernels: it computes chains of operators in float32 and rounds at their end. A GPU's
kernels add in float32, too, but each rounds what it writes. If ONNX Runtime on a GPU fuses operators into one kernel,
it rounds less often than this emulation.
"""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import onnx_ir
from onnx_ir import DataType, Model, Node, Value

from convertation.fp16 import MOVES
from convertation.onnx_file import write_model


def emulate_fp16(model: Model) -> Model:
    """Make every value float32, in place. Values that were float16 are still rounded to fp16. Names stay."""
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
    """Put Casts to fp16 and back after `node`. Every reader of `value` then reads the output of the last Cast."""
    name, uses = str(value.name), list(value.uses())
    value.name, end = f"{name}/exact", value
    value.dtype = DataType.FLOAT
    if node.op_type == "Cast":  # it already casts float32 to fp16, so only the second Cast is added
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
    """Yield a temporary float32 file that computes what the fp16 file `rounded` computes on a GPU."""
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch, rounded.name)
        write_model(emulate_fp16(onnx_ir.load(rounded)), file, {})
        yield file
