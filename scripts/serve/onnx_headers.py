"""Read an ONNX file without its weights."""

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

SMALL = 1024  # bytes of a weight that is read

LARGEST_MESSAGE = 2 << 30  # of gRPC


def read_without_weights(file: Path) -> tuple[onnx.ModelProto, list[tuple[str, str]]]:
    """The model with each weight's raw data left out and the weight made an input, and what is wrong with the weights.

    Reads the headers alone: a file of 700 MB takes milliseconds. ValueError where it is not a whole ONNX file.
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
                        faults += weight_faults(file, weight, size)
                        if weight.data_type == onnx.TensorProto.INT64 and 0 <= size <= SMALL:
                            graph.initializer.add().ParseFromString(data[inside:last])  # it may be a shape
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
        if value.name not in given:  # ONNX Runtime takes the first of two of one name
            given.add(value.name)
            graph.input.append(value)
    model.graph.CopyFrom(graph)
    if not graph.node or not model.ir_version:
        raise ValueError("no graph in it")
    return model, faults


def read_weight(data: mmap.mmap, start: int, end: int) -> tuple[onnx.TensorProto, int]:
    """A tensor without its raw data, and how many bytes those are (-1: none)."""
    weight = onnx.TensorProto()
    size = -1
    for number, first, body, last in read_fields(data, start, end):
        if number == TENSOR_RAW_DATA:
            size = last - body
        else:
            weight.MergeFromString(data[first:last])
    return weight, size


def weight_faults(file: Path, weight: onnx.TensorProto, size: int) -> Iterator[tuple[str, str]]:
    """(expected, found) of what is wrong with a weight whose raw data are `size` bytes."""
    try:
        dtype = onnx.helper.tensor_dtype_to_np_dtype(weight.data_type)
    except (KeyError, ValueError):
        yield f"a data type for {weight.name}", str(weight.data_type)
        return
    if weight.data_location == onnx.TensorProto.EXTERNAL:
        # .onnx and .data beside each other: both must be in the version folder
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
    elif weight.data_type not in (onnx.TensorProto.INT4, onnx.TensorProto.UINT4):  # two to a byte
        expected = prod(weight.dims) * dtype.itemsize
        if size not in (-1, expected):
            yield f"{expected} bytes for {weight.name}", str(size)


def read_fields(data: mmap.mmap, position: int, end: int) -> Iterator[tuple[int, int, int, int]]:
    """A protobuf message's fields in turn: number, where the field, its content and the next field start."""
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
            raise ValueError(f"it ends {position - end} bytes too early")
        yield key >> 3, start, body, position


def read_varint(data: mmap.mmap, position: int, end: int) -> tuple[int, int]:
    """A protobuf integer and the position behind it."""
    value = shift = 0
    while position < end and shift < 64:
        byte = data[position]
        position += 1
        value |= (byte & 0x7F) << shift
        shift += 7
        if byte < 0x80:
            return value, position
    raise ValueError(
        f"it ends inside a number, at byte {position}" if position >= end else f"no protobuf at byte {position}"
    )
