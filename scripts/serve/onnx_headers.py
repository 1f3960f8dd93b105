"""Read an ONNX file without its weights, and check that its weights are whole."""

import mmap
from collections.abc import Iterator
from math import prod
from pathlib import Path

import onnx
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

# Field numbers of onnx.proto
MODEL_GRAPH = 7
GRAPH_INITIALIZER = 5
TENSOR_RAW_DATA = 9
WEIGHT = "a weight whose data was left out"
SMALL = 1024  # bytes; smaller INT64 weights are read, because they may be shapes
LARGEST_MESSAGE = 2 << 30  # bytes of a protobuf message, and so of a gRPC request


def read_without_weights(file: Path) -> tuple[onnx.ModelProto, list[tuple[str, str]]]:
    """Return the model without its weights' data, and (expected, found) for each fault of a weight.

    Each weight becomes an input of the graph. Only headers are read: a file of 700 MB takes milliseconds.
    ValueError if the file is not a whole ONNX file.
    """
    faults: list[tuple[str, str]] = []
    with file.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
        if len(data) > LARGEST_MESSAGE:
            raise ValueError(f"{len(data)} bytes, more than protobuf's 2 GiB")
        model = onnx.ModelProto()
        graph = onnx.GraphProto()
        try:
            for number, start, body, end in read_fields(data, 0, len(data)):
                if number != MODEL_GRAPH:
                    model.MergeFromString(data[start:end])
                    continue
                for inner, first, inside, last in read_fields(data, body, end):
                    if inner == GRAPH_INITIALIZER:
                        weight, size = read_weight(data, inside, last)
                        faults += find_weight_faults(file, weight, size)
                        if weight.data_type == onnx.TensorProto.INT64 and 0 <= size <= SMALL:
                            graph.initializer.add().ParseFromString(data[inside:last])  # perhaps a shape
                            continue
                        shape = onnx.helper.make_tensor_type_proto(weight.data_type, list(weight.dims))
                        entry = onnx.helper.make_value_info(weight.name, shape, doc_string=WEIGHT)
                        graph.value_info.append(entry)
                    else:
                        graph.MergeFromString(data[first:last])
        except DecodeError as error:
            raise ValueError(str(error)) from error
    given = {value.name for value in graph.input}
    weights = [value for value in graph.value_info if value.doc_string == WEIGHT]
    for value in weights:
        if value.name not in given:  # of two weights with one name ONNX Runtime takes the first
            given.add(value.name)
            graph.input.append(value)
    model.graph.CopyFrom(graph)
    if not graph.node or not model.ir_version:
        raise ValueError("no graph in it")
    return model, faults


def read_weight(data: mmap.mmap, start: int, end: int) -> tuple[onnx.TensorProto, int]:
    """Return a tensor without its raw data, and the number of bytes of those (-1: no raw data)."""
    weight = onnx.TensorProto()
    size = -1
    for number, first, body, last in read_fields(data, start, end):
        if number == TENSOR_RAW_DATA:
            size = last - body
        else:
            weight.MergeFromString(data[first:last])
    return weight, size


def find_weight_faults(file: Path, weight: onnx.TensorProto, size: int) -> Iterator[tuple[str, str]]:
    """Yield (expected, found) for each fault of a weight whose raw data have `size` bytes."""
    try:
        dtype = onnx.helper.tensor_dtype_to_np_dtype(weight.data_type)
    except (KeyError, ValueError):
        yield f"a data type for {weight.name}", str(weight.data_type)
        return
    if weight.data_location == onnx.TensorProto.EXTERNAL:
        # The weights are in a .data file, which must lie beside the .onnx file
        keys = {item.key: item.value for item in weight.external_data}
        location = keys.get("location", "")
        path = file.parent / location
        if not location or Path(location).is_absolute() or not path.is_file():
            yield f"the file with {weight.name} beside the model", location or "no location"
            return
        expected = prod(weight.dims) * dtype.itemsize
        if weight.data_type in (onnx.TensorProto.INT4, onnx.TensorProto.UINT4):
            expected = (prod(weight.dims) + 1) // 2
        offset, length = (keys.get(key, "0") for key in ("offset", "length"))
        if not offset.isdigit() or not length.isdigit():
            yield f"numbers for offset and length of {weight.name}", f"{offset}, {length}"
        elif int(length) not in (0, expected):
            yield f"{expected} bytes for {weight.name}", length
        elif int(offset) + expected > path.stat().st_size:
            yield f"{int(offset) + expected} bytes in {location} for {weight.name}", str(path.stat().st_size)
    elif weight.data_type not in (onnx.TensorProto.INT4, onnx.TensorProto.UINT4):  # two elements share a byte
        expected = prod(weight.dims) * dtype.itemsize
        if size not in (-1, expected):
            yield f"{expected} bytes for {weight.name}", str(size)


def read_fields(data: mmap.mmap, position: int, end: int) -> Iterator[tuple[int, int, int, int]]:
    """Yield each field of a protobuf message: its number, and where it, its content and the next field start."""
    while position < end:
        start = position
        key, position = read_varint(data, position, end)
        kind = key & 7
        length = 0
        if kind == 0:
            body = position
            _, position = read_varint(data, position, end)
        elif kind == 2:
            length, body = read_varint(data, position, end)
            position = body + length
        elif kind in (1, 5):
            body = position
            position += 8 if kind == 1 else 4
        else:
            raise ValueError(f"no protobuf message at byte {start}")
        if position > end:
            raise ValueError(f"an end {position - end} bytes too early")
        yield key >> 3, start, body, position


def read_varint(data: mmap.mmap, position: int, end: int) -> tuple[int, int]:
    """Return a protobuf integer and the position behind it."""
    value = shift = 0
    while position < end and shift < 64:
        byte = data[position]
        position += 1
        value |= (byte & 0x7F) << shift
        shift += 7
        if byte < 0x80:
            return value, position
    raise ValueError(
        f"an end inside a number, at byte {position}" if position >= end else f"no protobuf at byte {position}"
    )
