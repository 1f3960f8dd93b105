"""Check on a CPU that NVIDIA's TensorRT for RTX accepts an ONNX file; it runs in .venv-rtx.

    python -m scripts.plans.build_rtx CARDS.yaml FLEET.yaml ONNX ENTRY.json OUT.json

Its parser reads the file, and its builder compiles an engine for those kinds of GPU in FLEET.yaml that it knows.
TensorRT for RTX is another product than the trtexec that builds the plans: it is always strongly typed, has another
optimiser, and Triton does not load its engines.  If it accepts a file, TensorRT probably does; this is no proof.
SystemExit: the parser or the builder refuses the file, or TensorRT no longer recognises attention as attention.
OUT says what was built and how much memory it needs; the builder's whole log is in build/logs/.
"""

import argparse
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import tensorrt_rtx as trt  # type: ignore[import-not-found]
import yaml

# The package's name of each compute capability.  It does not know 9.0 and 10.0; for 7.5 (Turing) its compiler lacks the
# float32 products that all our files have
KNOWN = {"8.0": "SM80", "8.6": "SM86", "8.9": "SM89", "12.0": "SM120", "12.1": "SM121"}
WHY = {"7.5": "it has no float32 products for compute capability 7.5"}
RECOGNISED = re.compile(r"Found (\S+) to be part of self-attention pattern")


class Log(trt.ILogger):  # type: ignore[misc]
    """Keeps TensorRT's messages: (severity, text)."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[tuple[str, str]] = []

    def log(self, severity: Any, text: str) -> None:
        self.lines.append((severity.name, text))

    def list_texts(self, *severities: str) -> list[str]:
        return [text for severity, text in self.lines if severity in severities]

    def find_bytes(self, what: str) -> int:
        """Return the largest number of bytes that the log gives for `what`, such as Total Activation Memory."""
        return max(int(found[1]) for _, text in self.lines if (found := re.match(rf"{what}: (\d+) bytes", text)))


def judge_kinds(cards: dict[str, Any], kinds: Iterable[str]) -> tuple[list[str], dict[str, str]]:
    """Return the compute capabilities of `kinds` that TensorRT for RTX builds for, and a reason for each other kind."""
    chosen, others = set(), {}
    for kind in kinds:
        capability = cards.get(kind, {}).get("capability", "")
        if capability in KNOWN:
            chosen.add(capability)
        elif capability:
            others[kind] = WHY.get(capability, f"it does not know compute capability {capability}")
        else:
            others[kind] = "scripts/plans/cards.yaml has no compute capability for it"
    return sorted(chosen, key=float), others


def find_attention(network: Any) -> tuple[set[str], set[str]]:
    """Return the names of the softmaxes and of the matrix products of two computed values; only attention has these."""
    computed = {network.get_input(index).name for index in range(network.num_inputs)}
    softmaxes, products = set(), set()
    for index in range(network.num_layers):
        layer = network.get_layer(index)
        inputs = [layer.get_input(number) for number in range(layer.num_inputs)]
        passing = [value for value in inputs if value is not None and value.name in computed]
        if passing:
            computed |= {layer.get_output(number).name for number in range(layer.num_outputs)}
        if layer.type == trt.LayerType.SOFTMAX:
            softmaxes.add(layer.name)
        if layer.type == trt.LayerType.MATRIX_MULTIPLY and len(passing) == 2:
            products.add(layer.name)
    return softmaxes, products


def describe_refusal(parser: Any) -> str:
    """Return the parser's message on each node that it refuses."""
    errors = [parser.get_error(index) for index in range(parser.num_errors)]
    return "\n".join(
        f"  {error.node_operator()}, node {error.node_name()}: {error.code().name}"
        + (f", {error.desc()}" if error.desc() not in ("", "false") else "")
        for error in errors
    )


def build_engine(onnx: Path, entry: dict[str, Any], capabilities: list[str], log: Log) -> tuple[Any, dict[str, Any]]:
    """Return the engine and OUT's part about it. SystemExit if TensorRT refuses the file, or misses an attention."""
    builder = trt.Builder(log)
    network = builder.create_network(0)
    parser = trt.OnnxParser(network, log)
    if not parser.parse_from_file(str(onnx)):
        raise SystemExit(
            f"{onnx}: TensorRT's parser refuses these nodes; expected nodes that it knows:\n{describe_refusal(parser)}"
        )
    softmaxes, products = find_attention(network)
    layers = sum(number for name, number in entry["network"].items() if name.endswith("_depth"))
    if len(softmaxes) < layers or len(products) < 2 * layers:
        raise SystemExit(
            f"{onnx}: {len(softmaxes)} softmaxes and {len(products)} products of attention; expected at least "
            f"{layers} and {2 * layers},\none and two for each layer of the network: has its export changed?"
        )
    config = builder.create_builder_config()
    config.num_compute_capabilities = len(capabilities)
    for index, capability in enumerate(capabilities):
        config.set_compute_capability(getattr(trt.ComputeCapability, KNOWN[capability]), index)
    profile = builder.create_optimization_profile()
    profile.set_shape("input", *((size, *entry["input"]) for size in entry["batch"]))
    config.add_optimization_profile(profile)
    engine = builder.build_serialized_network(network, config)
    if engine is None:
        raise SystemExit(
            f"{onnx}: TensorRT's builder refuses it:\n" + "\n".join(log.list_texts("ERROR", "INTERNAL_ERROR"))
        )
    recognised = {found[1] for text in log.list_texts("VERBOSE") if (found := RECOGNISED.match(text))}
    if lost := sorted((softmaxes | products) - recognised):
        raise SystemExit(
            f"{onnx}: TensorRT accepts it but does not recognise {len(lost)} of {len(softmaxes | products)}\n"
            f"nodes as attention, and would run them one by one: {' '.join(lost[:6])}{' …' if lost[6:] else ''}\n"
            "expected product, softmax, product with nothing but a scale between them: has its export changed?"
        )
    about = {
        "layers": network.num_layers,
        "attention_nodes": len(recognised),
        "engine_bytes": engine.nbytes,
        "weights_bytes": log.find_bytes("Total Weights Memory"),
        "activation_bytes": log.find_bytes("Total Activation Memory"),
        "warnings": log.list_texts("WARNING"),
    }
    return engine, about


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in "cards", "fleet", "onnx", "entry", "out":
        parser.add_argument(name, type=Path)
    given = parser.parse_args()
    cards, fleet = (yaml.safe_load(file.read_text()) for file in (given.cards, given.fleet))
    entry = json.loads(given.entry.read_text())
    capabilities, others = judge_kinds(cards, sorted(set(fleet) - {"common"}))
    if not capabilities:
        reasons = "".join(f"\n  {kind}: {reason}" for kind, reason in others.items())
        raise SystemExit(f"{given.fleet}: TensorRT for RTX builds for none of its kinds of GPU{reasons}")
    log = Log()
    try:
        _, found = build_engine(given.onnx, entry, capabilities, log)
    finally:
        file = Path("build/logs", f"rtx-{given.out.name.removesuffix('.rtx.json')}.log")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("".join(f"{severity} {text}\n" for severity, text in log.lines))
    profile = {"input": entry["input"], "batch": entry["batch"]}
    judge = {"judge": f"TensorRT for RTX {trt.__version__}", "built_for": capabilities, "not_built_for": others}
    given.out.write_text(json.dumps({**judge, "profile": profile, **found}, indent=1) + "\n")
    print(
        f"  {given.onnx}: accepted by TensorRT for RTX {trt.__version__} for {', '.join(capabilities)}: "
        f"{found['layers']} layers, {found['attention_nodes']} nodes of attention"
    )


if __name__ == "__main__":
    main()
