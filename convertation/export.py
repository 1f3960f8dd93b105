"""Write a network as one reproducible ONNX file; every conversion uses this."""

import argparse
import gc
import hashlib
import json
import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir
import onnxscript.optimizer
import torch
from numpy.typing import NDArray
from onnx_ir.passes.common import NameFixPass
from onnx_ir.tensor_adapters import TorchTensor
from torch import Tensor, nn

from convertation.checkpoint import read_guesses
from convertation.onnx_file import write_model

ANY_SIZE = 2**40  # bytes; so constants of any size are folded
BEGINNING = 64  # numbers; weights are compared only if these first ones are equal
SCOPES = "pkg.torch.onnx.name_scopes"  # the exporter lists here the modules around a node, outermost first


def export_network(
    network: nn.Module,
    sample_input: Tensor,
    out: Path,
    *,
    opset: int,
    batch_max: int,
    metadata: dict[str, str],
    inner: tuple[str, ...] = (),
    alike: Sequence[str] = (),
) -> None:
    """Write `network` as the ONNX file `out`: `input` (batch, …) -> `output` (batch, …), batch 1 … `batch_max`.

    `sample_input` gives shape and type; its batch must be 2 or more, its values do not matter. With `inner`, the
    network returns (output, *inner), and the graph in the file has values of these names.
    `alike` names each ModuleList whose modules are called one after another, each with one float tensor in and one out,
    and differ only in their weights: tracing takes seconds, so only the first is traced, and its nodes are copied.
    The same network gives the same bytes: no path, time or version is written.
    """
    print("  tracing the network", flush=True)
    chains = {name: network.get_submodule(name) for name in alike if is_independent(network, f"{name}.0.")}
    for name, chain in chains.items():
        network.set_submodule(name, nn.ModuleList(islice(chain.children(), 1)))
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # else it prints that torchvision is not installed
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch warns about its own code
        program = torch.onnx.export(
            network,
            (sample_input,),
            dynamo=True,
            opset_version=opset,
            input_names=["input"],
            output_names=["output", *inner],
            dynamic_shapes=({0: torch.export.Dim("batch", min=1, max=max(2, batch_max))},),
            optimize=False,
            verbose=False,
        )
    assert program is not None
    model = program.model
    for name, chain in chains.items():
        network.set_submodule(name, chain)
        copy_nodes(model.graph, name, list(chain.children()))
    NameFixPass()(model)
    print("  folding what depends on weights alone", flush=True)
    onnxscript.optimizer.optimize(model, num_iterations=1, input_size_limit=ANY_SIZE, output_size_limit=ANY_SIZE)
    share_equal_weights(model)
    print("  writing", flush=True)
    guessed = read_guesses(network)
    write_model(model, out, metadata | ({"checkpoint_read_as": guessed} if guessed else {}))


def is_independent(network: nn.Module, prefix: str) -> bool:
    """Tell whether no tensor below `prefix` is also used elsewhere: the exporter might take its other name."""
    places: dict[bool, set[int]] = {True: set(), False: set()}
    for name, tensor in list_tensors(network):
        if tensor.numel():
            places[name.startswith(prefix)].add(tensor.data_ptr())
    return not places[True] & places[False]


def list_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from module.named_parameters(remove_duplicate=False)
    yield from module.named_buffers(remove_duplicate=False)


def copy_nodes(graph: onnx_ir.Graph, name: str, modules: list[nn.Module]) -> None:
    """Copy the nodes of the first module behind it, with the weights of the second module, the third and so on."""
    body = [node for node in graph if f"'{name}.0'" in node.metadata_props[SCOPES]]
    inside = {value for node in body for value in node.outputs}
    read = dict.fromkeys(value for node in body for value in node.inputs if value and value not in inside)
    uses = [(value, node, place) for value in inside for node, place in value.uses() if node not in body]
    (enters,) = (value for value in read if value.producer() and value.dtype == onnx_ir.DataType.FLOAT)
    (leaves,) = {value for value, _, _ in uses if value.dtype == onnx_ir.DataType.FLOAT}
    layer = onnx_ir.GraphView(list(read), [leaves], nodes=body)
    last, result = body[-1], leaves
    for index, module in enumerate(modules[1:], 1):
        weights = dict(list_tensors(module))
        copy = layer.clone()
        for value, parameter in zip(read, list(copy.inputs), strict=True):
            path = str(value.name).removeprefix(f"{name}.0.")
            if path != value.name:
                theirs = TorchTensor(weights[path], f"{name}.{index}.{path}")
                value = onnx_ir.Value(name=theirs.name, type=value.type, shape=value.shape, const_value=theirs)
                graph.register_initializer(value)
            parameter.replace_all_uses_with(result if value is enters else value)
        nodes, result = list(copy), copy.outputs[0]
        copy.outputs.clear()
        copy.remove(nodes)
        graph.insert_after(last, nodes)
        last = nodes[-1]
    for value, node, place in uses:
        if value is leaves:
            node.replace_input_with(place, result)


def share_equal_weights(model: onnx_ir.Model) -> None:
    """Keep one of several equal initializers: folding makes a copy for each use of a transposed weight."""
    kept: dict[tuple[object, ...], list[onnx_ir.Value]] = {}
    for name, value in sorted(model.graph.initializers.items()):
        array = read_array(value)
        # To read a whole weight takes as long as to write it, so only those with the same beginning are compared
        alike = kept.setdefault((value.dtype, array.shape, array.flat[:BEGINNING].tobytes()), [])
        if first := next((other for other in alike if np.array_equal(read_array(other), array)), None):
            onnx_ir.convenience.replace_all_uses_with(value, first)
            del model.graph.initializers[name]
        else:
            alike.append(value)


def read_array(value: onnx_ir.Value) -> NDArray[Any]:
    assert value.const_value is not None
    return value.const_value.numpy()


def main(convert: Callable[..., None], targets: Sequence[str] = ()) -> None:
    """Run the command line of a torch2onnx: `convert(checkpoint, entry, out, opset=…, metadata=…)`.

    With `targets`, the option --for chooses one of them (default: the first), and `convert` gets it as `target`.
    """
    parser = argparse.ArgumentParser()
    parser.add_argument("--opset", type=int, default=20)
    parser.add_argument("--weights", choices=["synthetic", "real"], required=True, help="what the checkpoint holds")
    if targets:
        parser.add_argument(
            "--for", dest="target", choices=targets, default=targets[0], help="the device that it is made for"
        )
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("entry", type=Path, help="the model's entry, JSON")
    parser.add_argument("out", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(1)  # sums in float64 must not depend on the number of cores
    gc.disable()  # tracing makes very many objects, and this process ends soon
    entry = json.loads(given.entry.read_text())
    options = {"target": given.target} if targets else {}
    metadata = describe_model(given.checkpoint, given.weights)
    try:
        convert(given.checkpoint, entry, given.out, opset=given.opset, metadata=metadata, **options)
    except OSError as error:
        raise SystemExit(
            f"{error.filename or given.out}: {error.strerror}; make room or access, then run make again"
        ) from None


def describe_model(checkpoint: Path, weights: str) -> dict[str, str]:
    """Return the metadata of a model file: the kind of weights, the model's name, the sha256 of its checkpoint."""
    if not checkpoint.is_file():
        raise SystemExit(f"{checkpoint}: no such file; put it there, or run make with WEIGHTS=synthetic")
    with checkpoint.open("rb") as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 20):
            digest.update(block)
    return {"weights": weights, "model": checkpoint.stem, "checkpoint_sha256": digest.hexdigest()}
