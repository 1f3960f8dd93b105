"""Writing an ONNX file: the same model, the same bytes, each weight read when it is written and never held twice."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import onnx
import onnx_ir

IR_VERSION = 10  # read by the ONNX Runtime of every release in scripts/serve/releases.yaml


def write(model: onnx_ir.Model, out: Path, metadata: dict[str, str]) -> None:
    """Write a model of one output as ONNX, weight by weight; takes the weights out of `model`."""
    weights = {name: value.const_value for name, value in sorted(model.graph.initializers.items())}
    model.graph.initializers.clear()
    skeleton = _skeleton(onnx_ir.to_proto(model), metadata)
    _check(skeleton, weights)
    with out.open("wb") as file:
        file.write(skeleton.SerializeToString(deterministic=True))
        for name, tensor in weights.items():
            _append_initializer(file, name, tensor)


def _skeleton(model: onnx.ModelProto, metadata: dict[str, str]) -> onnx.ModelProto:
    """The model without its weights and without what the exporter says about itself and this machine."""
    model.ir_version = IR_VERSION
    model.producer_version = ""
    del model.metadata_props[:]
    onnx.helper.set_model_props(model, dict(sorted(metadata.items())))
    graph = model.graph
    graph.name = "main"
    del graph.output[1:], graph.metadata_props[:], graph.initializer[:]
    for item in [*graph.node, *graph.value_info, *graph.input, *graph.output]:
        del item.metadata_props[:]
        item.doc_string = ""
    return model


def _check(skeleton: onnx.ModelProto, weights: dict[str, Any]) -> None:
    """onnx.checker on the graph with its weights declared as inputs, which holds no weight a second time."""
    model = onnx.ModelProto()
    model.CopyFrom(skeleton)
    for name, tensor in weights.items():
        kind, shape = int(tensor.dtype), [int(size) for size in tensor.shape]
        model.graph.input.append(onnx.helper.make_tensor_value_info(name, kind, shape))
    onnx.checker.check_model(model, full_check=True)


def _append_initializer(file: BinaryIO, name: str, tensor: Any) -> None:
    """Append `graph { initializer { … } }`: a message may come in pieces, so weights are never copied."""
    header = onnx.TensorProto(name=name, dims=[int(size) for size in tensor.shape], data_type=int(tensor.dtype))
    data = np.ascontiguousarray(tensor.numpy())
    raw = _field(onnx.TensorProto.RAW_DATA_FIELD_NUMBER, data.nbytes)
    start = header.SerializeToString(deterministic=True) + raw
    initializer = _field(onnx.GraphProto.INITIALIZER_FIELD_NUMBER, len(start) + data.nbytes)
    file.write(_field(onnx.ModelProto.GRAPH_FIELD_NUMBER, len(initializer) + len(start) + data.nbytes))
    file.write(initializer + start)
    file.write(data.data)


def _field(number: int, size: int) -> bytes:
    """The key and length before a length-delimited protobuf field."""
    return bytes(_varint(number << 3 | 2)) + bytes(_varint(size))


def _varint(value: int) -> Iterator[int]:
    while value > 0x7F:
        yield value & 0x7F | 0x80
        value >>= 7
    yield value
