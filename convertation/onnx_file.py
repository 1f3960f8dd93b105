"""Write an ONNX file: the same model gives the same bytes; each weight is read only when it is written."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import onnx
import onnx_ir

IR_VERSION = 10  # read by the ONNX Runtime of every release in scripts/serve/releases.yaml


def write_model(model: onnx_ir.Model, out: Path, metadata: dict[str, str]) -> None:
    """Write a model with one output as ONNX, weight by weight; the weights are removed from `model`."""
    weights = {name: value.const_value for name, value in sorted(model.graph.initializers.items())}
    model.graph.initializers.clear()
    skeleton = strip_model(onnx_ir.to_proto(model), metadata)
    check_graph(skeleton, weights)
    with out.open("wb") as file:
        file.write(skeleton.SerializeToString(deterministic=True))
        for name, tensor in weights.items():
            append_initializer(file, name, tensor)


def strip_model(model: onnx.ModelProto, metadata: dict[str, str]) -> onnx.ModelProto:
    """Remove what the exporter says about itself and this machine, and all outputs but the first; set the metadata."""
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


def check_graph(skeleton: onnx.ModelProto, weights: dict[str, Any]) -> None:
    """Run onnx.checker on the graph with its weights declared as inputs, so that no weight is copied."""
    model = onnx.ModelProto()
    model.CopyFrom(skeleton)
    for name, tensor in weights.items():
        kind, shape = int(tensor.dtype), [int(size) for size in tensor.shape]
        model.graph.input.append(onnx.helper.make_tensor_value_info(name, kind, shape))
    onnx.checker.check_model(model, full_check=True)


def append_initializer(file: BinaryIO, name: str, tensor: Any) -> None:
    """Append `graph { initializer { … } }`: protobuf lets a message come in pieces, so no weight is copied."""
    header = onnx.TensorProto(name=name, dims=[int(size) for size in tensor.shape], data_type=int(tensor.dtype))
    data = np.ascontiguousarray(tensor.numpy())
    raw = encode_field_start(onnx.TensorProto.RAW_DATA_FIELD_NUMBER, data.nbytes)
    start = header.SerializeToString(deterministic=True) + raw
    initializer = encode_field_start(onnx.GraphProto.INITIALIZER_FIELD_NUMBER, len(start) + data.nbytes)
    file.write(encode_field_start(onnx.ModelProto.GRAPH_FIELD_NUMBER, len(initializer) + len(start) + data.nbytes))
    file.write(initializer + start)
    file.write(data.data)


def encode_field_start(number: int, size: int) -> bytes:
    """Return the key and the length that stand before a length-delimited protobuf field."""
    return bytes(encode_varint(number << 3 | 2)) + bytes(encode_varint(size))


def encode_varint(value: int) -> Iterator[int]:
    while value > 0x7F:
        yield value & 0x7F | 0x80
        value >>= 7
    yield value
