"""The rules for the fields of a config.pbtxt: what Triton takes. One table (RULES), a row for each rule.

The file is longer than 300 lines, because a row and the function that it names are read together.

Sources of the rules: core = triton-inference-server/core r24.06, src/model_config_utils.cc and src/model_lifecycle.cc;
ort = onnxruntime_backend r24.06, src/onnxruntime.cc; python = python_backend r24.06, src/python_be.cc;
seen = verdicts of the real server in tests/serve/server_verdicts.json;
client = the client sends whole batches and waits for one answer.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from tritonclient.grpc import model_config_pb2 as schema  # type: ignore[import-untyped]

LONGEST_DELAY = 10_000_000  # microseconds; the longest wait for more requests to batch
SHORTEST_TIMEOUT = 10_000  # microseconds; the shortest time before a request may be rejected
INTEGER = r"\s*[+-]?\d+.*"  # std::stoi reads up to the first character that is no digit: "1.5" is 1
BOOLEAN = r"(?i:true|false|on|off|0|1)"


@dataclass(frozen=True)
class Model:
    """A config, and what the rules need to judge it. `gpu`: whether the server has a GPU."""

    config: Any
    backend: str
    folder: Path
    versions: Sequence[Path]
    gpu: bool

    @property
    def inputs(self) -> dict[str, Any]:
        return {tensor.name: tensor for tensor in self.config.input}

    @property
    def outputs(self) -> dict[str, Any]:
        return {tensor.name: tensor for tensor in self.config.output}


@dataclass(frozen=True)
class Rule:
    """`find_wrong` yields each value of `field` that is not `allowed`. A recommendation is our rule, not Triton's."""

    field: str
    allowed: str
    source: str
    find_wrong: Callable[[Model], Iterator[object]]
    backends: tuple[str, ...] = ("onnxruntime", "python", "tensorrt", "")
    recommendation: bool = False


def apply_rules(model: Model) -> Iterator[tuple[Rule, object]]:
    """Yield each rule that the model breaks, with the value found."""
    for rule in RULES:
        if model.backend in rule.backends:
            for found in rule.find_wrong(model):
                yield rule, found


# Parameters of the backends: what a value must be, in words and as a pattern for the whole value
PARAMETERS: dict[str, dict[str, tuple[str, str]]] = {
    "onnxruntime": {
        "intra_op_thread_count": ("a whole number", INTEGER),
        "inter_op_thread_count": ("a whole number", INTEGER),
        "execution_mode": ("0 or 1", r"\s*\+?0*[01](\D.*)?"),
        "enable_mem_arena": ("true or false", BOOLEAN),
        "enable_mem_pattern": ("true or false", BOOLEAN),
        "memory.enable_memory_arena_shrinkage": ("cpu:0 or gpu:0, several with ;", r"((cpu|gpu):\d+)(;(cpu|gpu):\d+)*"),
    },
    "python": {"FORCE_CPU_ONLY_INPUT_TENSORS": ("yes or no", "yes|no")},
}


def make_parameter_rule(backend: str, key: str, allowed: str, pattern: str) -> Rule:
    def find_wrong(model: Model) -> Iterator[object]:
        if key in model.config.parameters:
            value = model.config.parameters[key].string_value
            if not re.fullmatch(pattern, value, re.DOTALL):
                yield repr(value)

    return Rule(f"parameters {key!r}", allowed, "ort" if backend == "onnxruntime" else "python", find_wrong, (backend,))


def multiply_segments(dims: Sequence[int]) -> list[int]:
    """Return the products of the sizes between the variable sizes: [2, 3, -1, 4] -> [6, 4]."""
    parts: list[list[int]] = [[]]
    for size in dims:
        if size == -1:
            parts.append([])
        else:
            parts[-1].append(size)
    return [prod(part) for part in parts]


def find_bad_reshapes(model: Model) -> Iterator[object]:
    for tensor in (*model.config.input, *model.config.output):
        if not tensor.HasField("reshape"):
            continue
        dims, shape = list(tensor.dims), list(tensor.reshape.shape)
        empty = not shape and model.config.max_batch_size == 0
        if (
            empty
            or any(size < 1 and size != -1 for size in shape)
            or multiply_segments(dims) != multiply_segments(shape)
        ):
            yield f"{dims} as {shape} in {tensor.name!r}"


def find_bad_formats(model: Model) -> Iterator[object]:
    for tensor in model.config.input:
        if tensor.format != schema.ModelInput.FORMAT_NONE and len(tensor.dims) != 3:
            yield f"{list(tensor.dims)} of {tensor.name!r}"


def find_missing_labels(model: Model) -> Iterator[object]:
    for tensor in model.config.output:
        if tensor.label_filename and not (model.folder / tensor.label_filename).is_file():
            yield f"{tensor.label_filename} of {tensor.name!r}, which is not there"


def find_unknown_accelerators(model: Model) -> Iterator[object]:
    chosen = model.config.optimization.execution_accelerators
    yield from (one.name for one in chosen.cpu_execution_accelerator)
    if model.gpu:  # a server without a GPU ignores these
        yield from (one.name for one in chosen.gpu_execution_accelerator if one.name not in ("tensorrt", "cuda"))


def find_bad_batch_sizes(model: Model) -> Iterator[object]:
    most = model.config.max_batch_size
    yield from (size for size in model.config.dynamic_batching.preferred_batch_size if not 1 <= size <= most)


def find_bad_priorities(model: Model) -> Iterator[object]:
    batching = model.config.dynamic_batching
    if batching.priority_levels and not 1 <= batching.default_priority_level <= batching.priority_levels:
        yield f"{batching.default_priority_level} of {batching.priority_levels}"


def find_bad_queue_levels(model: Model) -> Iterator[object]:
    batching = model.config.dynamic_batching
    if batching.priority_levels:
        yield from (key for key in batching.priority_queue_policy if not 1 <= key <= batching.priority_levels)


def find_short_timeouts(model: Model) -> Iterator[object]:
    batching = model.config.dynamic_batching
    for policy in (batching.default_queue_policy, *batching.priority_queue_policy.values()):
        timeout = policy.default_timeout_microseconds
        if policy.timeout_action == schema.ModelQueuePolicy.REJECT and 0 < timeout < SHORTEST_TIMEOUT:
            yield timeout


def find_long_delays(model: Model) -> Iterator[object]:
    delay = model.config.dynamic_batching.max_queue_delay_microseconds
    if delay > LONGEST_DELAY:
        yield delay


def find_bad_gpus(model: Model) -> Iterator[object]:
    for group in model.config.instance_group:
        kind = schema.ModelInstanceGroup.Kind.Name(group.kind)
        free = kind in ("KIND_GPU", "KIND_AUTO") and (model.gpu or kind == "KIND_GPU")
        if group.gpus and (not free or min(group.gpus) < 0):
            yield f"gpus: {list(group.gpus)} with {kind}"


def find_profiles(model: Model) -> Iterator[object]:
    yield from (f"profile: {list(group.profile)}" for group in model.config.instance_group if group.profile)


def find_passive_groups(model: Model) -> Iterator[object]:
    yield from ("passive: true" for group in model.config.instance_group if group.passive)


def find_negative_counts(model: Model) -> Iterator[object]:
    yield from (f"count: {group.count}" for group in model.config.instance_group if group.count < 0)


def find_missing_counts(model: Model) -> Iterator[object]:
    groups = model.config.instance_group
    if not groups or not all(group.count for group in groups):
        yield "no count" if groups else "no instance_group"


def find_unknown_runtimes(model: Model) -> Iterator[object]:
    runtime = model.config.runtime
    places = (*model.versions, model.folder)
    if runtime not in ("", f"libtriton_{model.backend}.so") and not any((p / runtime).is_file() for p in places):
        yield runtime


def find_missing_libraries(model: Model) -> Iterator[object]:
    for name in model.config.model_operations.op_library_filename:
        if not Path(name).is_absolute() or not Path(name).is_file():
            yield name


def find_agents(model: Model) -> Iterator[object]:
    yield from (agent.name for agent in model.config.model_repository_agents.agents)


def find_decoupled(model: Model) -> Iterator[object]:
    if model.config.model_transaction_policy.decoupled:
        yield "decoupled: true"


def find_schedulers(model: Model) -> Iterator[object]:
    if model.config.HasField("sequence_batching"):
        yield "sequence_batching"
    if model.config.HasField("ensemble_scheduling"):
        yield "ensemble_scheduling"


def find_unknown_batch_outputs(model: Model) -> Iterator[object]:
    for batch in model.config.batch_output:
        yield from (name for name in batch.target_name if name not in model.outputs)
        yield from (name for name in batch.source_input if name not in model.inputs)


def find_unknown_batch_inputs(model: Model) -> Iterator[object]:
    for batch in model.config.batch_input:
        yield from (name for name in batch.source_input if name not in model.inputs)


def make_flag_finder(flag: str, kinds: Sequence[str] = ("input", "output")) -> Callable[[Model], Iterator[object]]:
    def find_wrong(model: Model) -> Iterator[object]:
        for kind in kinds:
            yield from (
                f"{kind} {tensor.name!r}" for tensor in getattr(model.config, kind) if getattr(tensor, flag, False)
            )

    return find_wrong


def find_bad_warm_ups(model: Model) -> Iterator[object]:
    """Yield warm-up samples that the server cannot send to the model at its start."""
    most = max(model.config.max_batch_size, 1)
    for warm_up in model.config.model_warmup:
        if warm_up.batch_size > most:
            yield f"{warm_up.name!r}: batch_size {warm_up.batch_size}"
        needed = {name for name, tensor in model.inputs.items() if not tensor.optional}
        if not needed <= set(warm_up.inputs) <= set(model.inputs):
            yield f"{warm_up.name!r}: inputs {', '.join(sorted(warm_up.inputs)) or 'none'}"
        for name, sample in warm_up.inputs.items():
            source = sample.WhichOneof("input_data_type")
            if source is None:
                yield f"{warm_up.name!r}: no data for {name!r}"
            elif source == "input_data_file" and not (model.folder / "warmup" / sample.input_data_file).is_file():
                yield f"{warm_up.name!r}: warmup/{sample.input_data_file}, which is not there"
            tensor = model.inputs.get(name)
            if tensor is None:
                continue
            if sample.data_type != tensor.data_type:
                yield f"{warm_up.name!r}: another data_type for {name!r}"
            dims = list(sample.dims)
            if len(dims) != len(tensor.dims) or any(
                a < 1 or b not in (a, -1) for a, b in zip(dims, tensor.dims, strict=True)
            ):
                yield f"{warm_up.name!r}: dims {dims} for {name!r}"


def find_missing_environments(model: Model) -> Iterator[object]:
    if "EXECUTION_ENV_PATH" in model.config.parameters:
        path = model.config.parameters["EXECUTION_ENV_PATH"].string_value
        if not Path(path.replace("$$TRITON_MODEL_DIRECTORY", str(model.folder))).exists():
            yield path or "''"


def find_single_batch(model: Model) -> Iterator[object]:
    if model.config.max_batch_size == 1:
        yield 1


def find_fp16_inputs(model: Model) -> Iterator[object]:
    yield from (f"TYPE_FP16 for {t.name!r}" for t in model.config.input if t.data_type == schema.TYPE_FP16)


ONNX, PYTHON = ("onnxruntime",), ("python",)
NOT_TENSORRT = ("onnxruntime", "python", "")
RULES: tuple[Rule, ...] = (
    Rule("reshape", "as many elements as dims, between the same variable sizes", "core, ValidateIOShape",
         find_bad_reshapes),
    Rule("format", "three dims for FORMAT_NCHW and FORMAT_NHWC", "core, ValidateModelInput", find_bad_formats),
    Rule("is_shape_tensor", "shape tensors in a plan only", "core", make_flag_finder("is_shape_tensor"), NOT_TENSORRT),
    Rule("optional", "inputs that are not optional", "ort", make_flag_finder("optional", ["input"]), ONNX),
    Rule("allow_ragged_batch", "inputs that are not ragged", "ort",
         make_flag_finder("allow_ragged_batch", ["input"]), ONNX),
    Rule("label_filename", "a file in the model's folder", "core, model.cc", find_missing_labels),
    Rule("batch_input", "names of inputs", "core, ValidateBatchIO", find_unknown_batch_inputs),
    Rule("batch_output", "names of outputs and inputs", "core, ValidateBatchIO", find_unknown_batch_outputs),
    Rule("execution_accelerators", "tensorrt or cuda for a GPU, none for a CPU", "ort",
         find_unknown_accelerators, ONNX),
    *(
        make_parameter_rule(backend, key, allowed, pattern)
        for backend, keys in PARAMETERS.items()
        for key, (allowed, pattern) in keys.items()
    ),
    Rule("parameters 'EXECUTION_ENV_PATH'", "an existing file or folder", "python", find_missing_environments, PYTHON),
    Rule("preferred_batch_size", "1 … max_batch_size", "core, ValidateModelConfig", find_bad_batch_sizes),
    Rule("default_priority_level", "1 … priority_levels", "core, ValidateModelConfig", find_bad_priorities),
    Rule("priority_queue_policy", "keys 1 … priority_levels", "core, ValidateModelConfig", find_bad_queue_levels),
    Rule("default_timeout_microseconds", f"0 or at least {SHORTEST_TIMEOUT} with REJECT", "seen, client",
         find_short_timeouts),
    Rule("max_queue_delay_microseconds", f"at most {LONGEST_DELAY}", "seen, client", find_long_delays),
    Rule("scheduling", "no sequences (the client sends no correlation ID), no ensemble", "client",
         find_schedulers),
    Rule("model_transaction_policy", "one answer for each request", "client", find_decoupled),
    Rule("instance_group", "gpus for KIND_GPU, or for KIND_AUTO where there is a GPU", "core", find_bad_gpus),
    Rule("instance_group", "a profile for a TensorRT plan only", "core", find_profiles, NOT_TENSORRT),
    Rule("instance_group", "an instance that answers", "seen", find_passive_groups),
    Rule("instance_group", "a count of 1 or more", "core", find_negative_counts),
    Rule("runtime", "libtriton_<backend>.so, or a file in the model's folder", "core, backend_model.cc",
         find_unknown_runtimes,
         ("onnxruntime", "tensorrt")),
    Rule("model_operations", "libraries by their whole path", "ort", find_missing_libraries, ONNX),
    Rule("model_repository_agents", "none", "seen", find_agents),
    Rule("model_warmup", "data for each input, of its type and dims, batch_size ≤ max_batch_size", "core",
         find_bad_warm_ups),
    # Stricter than the server. Without a count an ONNX model gets two instances on a CPU: the weights twice in memory.
    Rule("instance_group", "an explicit count: 1", "core", find_missing_counts, ONNX, recommendation=True),
    Rule("max_batch_size", "more than 1, or 0: the client sends several samples", "client", find_single_batch, ONNX,
         recommendation=True),
    Rule("data_type", "TYPE_FP32: the client sends it, and JSON cannot carry FP16", "seen", find_fp16_inputs,
         recommendation=True),
)  # fmt: skip
