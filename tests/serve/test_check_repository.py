"""Try each rule of the offline check on a small good repository, and on the same one broken.

The file is longer than 300 lines, because its tables of good and broken repositories are read together.
"""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import onnx
import pytest
from onnx import TensorProto, helper

from scripts.serve.check_repository import STAND_IN_PLAN, check_repository, find_faults
from scripts.serve.model_config import read_config
from scripts.serve.onnx_headers import read_without_weights
from tests.triton_models import BPR, CONFIG, bpr, head, linear

ROOT = Path(__file__).parents[2]
PLAN = CONFIG.replace('backend: "onnxruntime"', 'platform: "tensorrt_plan"')
Damage = Callable[[Path], object]


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """A good repository: an ONNX model, a Python model and a plan. The client knows none of their names."""
    root = tmp_path / "repository"
    head(root, "head_onnx")
    folder = bpr(root)
    folder.rename(root / "tagger")
    (root / "tagger/config.pbtxt").write_text((root / "tagger/config.pbtxt").read_text().replace("bpr_model", "tagger"))
    (root / "head_trt/1").mkdir(parents=True)
    (root / "head_trt/config.pbtxt").write_text(PLAN.replace("binary_onnx", "head_trt"))
    (root / "head_trt/1/model.plan").write_bytes(b"ftrt" + bytes(100))
    return root


def edit(old: str, new: str, model: str = "head_onnx") -> Damage:
    def damage(root: Path) -> None:
        config = root / model / "config.pbtxt"
        assert old in config.read_text()
        config.write_text(config.read_text().replace(old, new))

    return damage


def replace(model: onnx.ModelProto) -> Damage:
    return lambda root: onnx.save(model, root / "head_onnx/1/model.onnx")


def write(file: str, content: bytes | str) -> Damage:
    data = content if isinstance(content, bytes) else content.encode()
    return lambda root: (root / file).write_bytes(data)


def both(*damages: Damage) -> Damage:
    return lambda root: [damage(root) for damage in damages]


def truncate(size: int) -> Damage:
    return lambda root: os.truncate(root / "head_onnx/1/model.onnx", size)


def two_outputs() -> onnx.ModelProto:
    """Return a model with a second output that the config does not name; Triton allows that."""
    model = linear()
    model.graph.node.append(helper.make_node("Relu", ["output"], ["relu"]))
    model.graph.output.append(helper.make_tensor_value_info("relu", TensorProto.FLOAT, ["N", 3]))
    return model


def in_subgraph() -> onnx.ModelProto:
    """Return a model with org.example.Gelu in the branches of an If."""
    model = linear()
    node = helper.make_node("Gelu", ["input"], ["then"], domain="org.example")
    branch = helper.make_graph([node], "branch", [], [helper.make_tensor_value_info("then", TensorProto.FLOAT, None)])
    model.graph.initializer.append(helper.make_tensor("yes", TensorProto.BOOL, [], [True]))
    model.graph.node.append(helper.make_node("If", ["yes"], ["unused"], then_branch=branch, else_branch=branch))
    model.opset_import.append(helper.make_opsetid("org.example", 1))
    return model


def short_weight() -> onnx.ModelProto:
    model = linear()
    model.graph.initializer[0].raw_data = model.graph.initializer[0].raw_data[:-4]
    return model


def external() -> onnx.ModelProto:
    model = linear()
    weight = model.graph.initializer[0]
    weight.ClearField("raw_data")
    weight.data_location = TensorProto.EXTERNAL
    weight.external_data.add(key="location", value="weights.data")
    return model


def loose_end() -> onnx.ModelProto:
    model = linear()
    model.graph.node[0].input[0] = "nobody"
    return model


def variable_output() -> onnx.ModelProto:
    """Return a model whose output has two sizes by name, which no operator tells."""
    model = linear(features="F", classes="F")
    del model.graph.initializer[:]
    model.graph.node[0].CopyFrom(helper.make_node("Relu", ["input"], ["output"]))
    return model


def unsorted_nodes() -> onnx.ModelProto:
    model = linear()
    model.graph.name = ""
    model.graph.node[0].output[0] = "h"
    model.graph.node.insert(0, helper.make_node("Relu", ["h"], ["output"]))
    return model


def unimported() -> onnx.ModelProto:
    model = linear(operator="FusedMatMul", domain="com.microsoft")
    del model.opset_import[1]
    return model


def local_function() -> onnx.ModelProto:
    model = linear(operator="Multiply", domain="org.example")
    body = [helper.make_node("MatMul", ["a", "b"], ["c"])]
    opsets = [helper.make_opsetid("", 20)]
    model.functions.append(helper.make_function("org.example", "Multiply", ["a", "b"], ["c"], body, opsets))
    return model


def write_end(file: str, content: bytes) -> Damage:
    return lambda root: (root / file).write_bytes((root / file).read_bytes() + content)


def parameter(key: str, value: str) -> str:
    return f'parameters {{ key: "{key}" value: {{ string_value: "{value}" }} }} '


# Text that is added to a good config, and the finding
RULED: list[tuple[str, str]] = [
    (parameter("intra_op_thread_count", "abc"),
     "parameters 'intra_op_thread_count'; expected a whole number, found 'abc'"),
    (parameter("execution_mode", "2"), "parameters 'execution_mode'; expected 0 or 1, found '2'"),
    (parameter("enable_mem_arena", "x"), "parameters 'enable_mem_arena'; expected true or false, found 'x'"),
    ('runtime: "libx.so"', "runtime; expected libtriton_<backend>.so, … found libx.so"),
    ("model_transaction_policy { decoupled: true }", "model_transaction_policy; … found decoupled: true"),
    ('model_operations { op_library_filename: "x.so" }', "model_operations; … found x.so"),
    ('model_repository_agents { agents { name: "a" } }', "model_repository_agents; expected none, found a"),
    ('optimization { execution_accelerators { cpu_execution_accelerator { name: "openvino" } } }',
     "execution_accelerators; … found openvino"),
    ('batch_input { kind: BATCH_ELEMENT_COUNT target_name: "b" source_input: "x" }', "batch_input; … found x"),
    ('batch_output { target_name: "y" source_input: "input" }', "batch_output; … found y"),
    ('model_warmup { name: "w" batch_size: 9 inputs { key: "input" value: { data_type: TYPE_FP32 dims: 8 '
     "zero_data: true } } }", "model_warmup; … found 'w': batch_size 9"),
]  # fmt: skip
BATCHING: list[tuple[str, str]] = [
    ("preferred_batch_size: 9", "preferred_batch_size; expected 1 … max_batch_size, found 9"),
    ("priority_levels: 2", "default_priority_level; … found 0 of 2"),
    ("priority_levels: 2 default_priority_level: 1 priority_queue_policy { key: 3 value: {} }",
     "priority_queue_policy; … found 3"),
    ("max_queue_delay_microseconds: 99000000", "max_queue_delay_microseconds; … found 99000000"),
    ("default_queue_policy { timeout_action: REJECT default_timeout_microseconds: 1 }",
     "default_timeout_microseconds; … found 1"),
]  # fmt: skip

ONNX = "repository/head_onnx/1/model.onnx"
CONF = "repository/head_onnx/config.pbtxt"

# Name, damage, and the finding (`…` stands for any text)
BROKEN: list[tuple[str, Damage, str]] = [
    ("no_models", lambda root: [shutil.rmtree(path) for path in root.iterdir()],
     "repository: models; expected at least one model folder, found none"),
    ("hidden_folder", lambda root: (root / ".staging").mkdir(),
     "repository/.staging: hidden folder: Triton takes it for a model; expected model folders only, found .staging"),
    ("link_to_nothing", lambda root: (root / "old").symlink_to("gone"),
     "repository/old: link; expected an existing file, found a link to gone, which is not there"),
    ("link_to_nothing_in_a_model", lambda root: (root / "tagger/1/tag.py").symlink_to("gone.py"),
     "repository/tagger/1/tag.py: link; expected an existing file, found a link to gone.py, which is not there"),
    ("link_to_a_folder_counts_as_a_model", lambda root: (root / "docs").symlink_to(root.parent),
     "repository/docs/config.pbtxt: config; expected a file, found nothing"),
    ("stray_folder", lambda root: (root / "lost+found/1").mkdir(parents=True),
     "repository/lost+found/config.pbtxt: config; expected a file, found nothing"),
    ("no_config", lambda root: (root / "head_onnx/config.pbtxt").unlink(),
     f"{CONF}: config; expected a file, found nothing"),
    ("no_version", lambda root: shutil.rmtree(root / "head_onnx/1"),
     "repository/head_onnx: version folder; expected at least one, such as 1, found none"),
    ("no_model_file", lambda root: (root / "head_onnx/1/model.onnx").unlink(),
     f"{ONNX}: file of backend onnxruntime; expected a file, found nothing"),
    ("empty_model_file", write("head_onnx/1/model.onnx", b""),
     f"{ONNX}: file of backend onnxruntime; expected a file, found an empty file"),
    ("second_version_is_checked_too", lambda root: (root / "head_onnx/2").mkdir(),
     "repository/head_onnx/2/model.onnx: file of backend onnxruntime; expected a file, found nothing"),
    ("other_file_name", edit("max_batch", 'default_model_filename: "vit.onnx" max_batch'),
     "repository/head_onnx/1/vit.onnx: file of backend onnxruntime; expected a file, found nothing"),
    ("cc_model_filename", edit("max_batch", 'cc_model_filenames { key: "8.6" value: "86.plan" } max_batch', "head_trt"),
     "repository/head_trt/1/86.plan: file of backend tensorrt; expected a file, found nothing"),
    ("unknown_field", edit("max_batch_size", "max_batch"),
     f"{CONF}: config schema of Triton 2.47; expected model_config.proto's text format, found 3:1 : …"),
    ("field_of_a_newer_triton", edit("count: 1", "count: 1 gpu_affinity: 1"),
     f"{CONF}: config schema of Triton 2.47; expected model_config.proto's text format, found …"),
    ("not_text", write("head_onnx/config.pbtxt", b"\xff\xfe"),
     f"{CONF}: config schema of Triton 2.47; expected model_config.proto's text format, found …"),
    ("other_name", edit('name: "head_onnx"', 'name: "vit_onnx"'),
     f'{CONF}: name; expected "head_onnx" like the folder, found "vit_onnx"'),
    ("unknown_backend", edit('"onnxruntime"', '"onnx"'),
     f'{CONF}: backend; expected backend: "onnxruntime", … found backend: "onnx"'),
    ("backend_against_platform", edit('"tensorrt_plan"', '"tensorrt_plan" backend: "python"', "head_trt"),
     'repository/head_trt/config.pbtxt: backend; expected … found backend: "python", platform: "tensorrt_plan"'),
    ("negative_batch", edit("size: 8", "size: -1"),
     f"{CONF}: max_batch_size; expected 0 or more, found -1"),
    ("no_inputs", edit('input [{ name: "input" data_type: TYPE_FP32 dims: [8] }]', ""),
     f"{CONF}: inputs; expected at least one input, found none"),
    ("no_outputs", edit('output [{ name: "output" data_type: TYPE_FP32 dims: [3] }]', ""),
     f"{CONF}: outputs; expected at least one output, found none"),
    ("no_name", edit('name: "input"', ""),
     f"{CONF}: input name; expected a name of its own, found ''"),
    ("no_data_type", edit('name: "input" data_type: TYPE_FP32', 'name: "input"'),
     f"{CONF}: data_type of input 'input'; expected one of TYPE_BOOL, TYPE_INT16, TYPE_FP32, …"),
    ("no_dims", edit("dims: [3]", ""),
     f"{CONF}: dims of output 'output'; expected at least one dimension, found none"),
    ("dim_zero", edit("dims: [8]", "dims: [0]"),
     f"{CONF}: dims of input 'input'; expected each at least 1, or -1, found [0]"),
    ("dim_minus_two", edit("dims: [8]", "dims: [-2]"),
     f"{CONF}: dims of input 'input'; expected each at least 1, or -1, found [-2]"),
    ("gpu_kind_without_gpu", edit("KIND_AUTO", "KIND_GPU"),
     f"{CONF}: instance_group; expected KIND_AUTO, because this machine has no GPU, found KIND_GPU"),
    ("plan_on_a_cpu", edit("KIND_AUTO", "KIND_CPU", "head_trt"),
     "repository/head_trt/config.pbtxt: instance_group; expected KIND_AUTO or KIND_GPU … plan, found KIND_CPU"),
    ("gpus_for_a_cpu", edit("KIND_AUTO", "KIND_CPU gpus: [0]"),
     f"{CONF}: instance_group; expected gpus for KIND_GPU, … GPU, found gpus: [0] with KIND_CPU"),
    ("negative_instance_count", edit("count: 1", "count: -1", "tagger"),
     "repository/tagger/config.pbtxt: instance_group; expected a count of 1 or more, found count: -1"),
    # the ONNX file against the release
    ("no_onnx", write("head_onnx/1/model.onnx", "<html>404</html>"),
     f"{ONNX}: ONNX; expected a whole ONNX file, found …"),
    ("truncated_in_a_weight", truncate(100),
     f"{ONNX}: ONNX; expected a whole ONNX file, found an end …"),
    ("only_a_header", write("head_onnx/1/model.onnx", onnx.ModelProto(ir_version=10).SerializeToString()),
     f"{ONNX}: ONNX; expected a whole ONNX file, found no graph in it"),
    ("short_weight", replace(short_weight()),
     f"{ONNX}: ONNX weights; expected 96 bytes for weight, found 92"),
    ("external_data_left_behind", replace(external()),
     f"{ONNX}: ONNX weights; expected the file with weight beside the model, found weights.data"),
    ("ir_version", replace(linear(ir=11)), f"{ONNX}: IR version; expected at most 10, found 11"),
    ("opset", replace(linear(opset=22)), f"{ONNX}: opset; expected at most 21, found 22"),
    ("foreign_operator", replace(linear(operator="FusedMatMul", domain="org.example")),
     f"{ONNX}: operators; expected those of ONNX Runtime 1.18.0, found org.example.FusedMatMul"),
    ("foreign_operator_in_a_subgraph", replace(in_subgraph()),
     f"{ONNX}: operators; expected those of ONNX Runtime 1.18.0, found org.example.Gelu"),
    ("unknown_operator", replace(linear(operator="MatMull")),
     f"{ONNX}: onnx.checker; expected a valid graph, found No Op registered for MatMull …"),
    ("operator_newer_than_opset", replace(linear(operator="BitwiseAnd", opset=17)),
     f"{ONNX}: onnx.checker; expected a valid graph, found No Op registered for BitwiseAnd …"),
    ("loose_end", replace(loose_end()), f"{ONNX}: onnx.checker; expected a valid graph, found Nodes in a graph …"),
    # the config against the ONNX file
    ("input_name", replace(linear(names=("x", "output"))), f"{CONF}: inputs of model.onnx; expected x, found input"),
    ("input_missing_in_config", replace(linear(extra=True)),
     f"{CONF}: inputs of model.onnx; expected extra, input, found input"),
    ("output_name", replace(linear(names=("input", "y"))), f"{CONF}: outputs of model.onnx; expected y, found output"),
    ("data_type", replace(linear(kind=TensorProto.FLOAT16)),
     f"{CONF}: data_type of input 'input' of model.onnx; expected TYPE_FP16, found TYPE_FP32"),
    ("type_without_a_name_in_triton", replace(linear(kind=TensorProto.BFLOAT16)),
     f"{ONNX}: input 'input'; expected a tensor of a type that Triton has, found another"),
    ("fixed_batch", replace(linear(rows=8)),
     f"{CONF}: max_batch_size with input 'input' of model.onnx; expected a variable …, found FP32 [8, 8]"),
    ("input_size", edit("dims: [8]", "dims: [9]"),
     f"{CONF}: dims of input 'input' of model.onnx; expected FP32 [-1, 8], found FP32 [-1, 9]"),
    ("variable_input_for_a_fixed_one", edit("dims: [8]", "dims: [-1]"),
     f"{CONF}: dims of input 'input' of model.onnx; expected FP32 [-1, 8], found FP32 [-1, -1]"),
    ("input_rank", edit("dims: [8]", "dims: [8, 1]"),
     f"{CONF}: dims of input 'input' of model.onnx; expected FP32 [-1, 8], found FP32 [-1, 8, 1]"),
    ("output_size", edit("dims: [3]", "dims: [2]"),
     f"{CONF}: dims of output 'output' of model.onnx; expected FP32 [-1, 3], found FP32 [-1, 2]"),
    ("variable_output_for_a_fixed_one", edit("dims: [3]", "dims: [-1]"),
     f"{CONF}: dims of output 'output' of model.onnx; expected FP32 [-1, 3], found FP32 [-1, -1]"),
    ("batch_dimension_said_twice", edit("size: 8", "size: 0"),
     f"{CONF}: dims of input 'input' of model.onnx; expected FP32 [-1, 8], found FP32 [8]"),
    ("variable_output_that_the_operators_know", both(replace(linear(classes="C")), edit("dims: [3]", "dims: [-1]")),
     f"{CONF}: dims of output 'output' of model.onnx; expected FP32 [-1, 3], found FP32 [-1, -1]"),
    ("second_version_hides_the_first", lambda root: shutil.copytree(root / "head_onnx/1", root / "head_onnx/12"),
     "repository/head_onnx: client's contract; expected version 1, found 12"),
    ("huge_version", lambda root: (root / f"head_onnx/{2**63}").mkdir(),
     f"repository/head_onnx/{2**63}: version folder; expected a number within 0 … found {2**63}"),
    ("short_external_data", both(replace(external()), write("head_onnx/1/weights.data", bytes(95))),
     f"{ONNX}: ONNX weights; expected 96 bytes in weights.data for weight, found 95"),
    ("no_break_space", edit("max_batch_size: 8", "max_batch_size:\xa08"),
     f"{CONF}: config schema of Triton 2.47; expected … found line 3: the character …"),
    # rules of scripts/serve/config_rules.py
    *[(f"rule_{index}", edit("max_batch", f"{text} max_batch"), f"{CONF}: {finding}")
      for index, (text, finding) in enumerate(RULED)],
    *[(f"batching_rule_{index}", edit("max_queue_delay_microseconds: 0", text), f"{CONF}: {finding}")
      for index, (text, finding) in enumerate(BATCHING)],
    ("missing_import", write("tagger/1/model.py", "import absent\n" + BPR),
     "repository/tagger/1/model.py: Python backend; expected imports that the image has, found import absent"),
    ("missing_name", write("tagger/1/helper.py", "OTHER = 1\n"),
     "repository/tagger/1/model.py: Python backend; expected a name that helper has, found TAG"),
    ("model_that_does_not_start", write(
        "tagger/1/model.py", BPR + "\n    def initialize(self, args):\n        raise RuntimeError('no')\n"),
     "repository/tagger/1/model.py: Python backend; expected initialize that can end, found raise RuntimeError('no')"),
    # Python models and plans
    ("no_model_py", lambda root: (root / "tagger/1/model.py").unlink(),
     "repository/tagger/1/model.py: file of backend python; expected a file, found nothing"),
    ("model_py_does_not_parse", write("tagger/1/model.py", BPR + "return ("),
     "repository/tagger/1/model.py: Python 3.10; expected a file that parses, found …"),
    ("module_beside_model_py_does_not_parse", write("tagger/1/helper.py", "TAG ="),
     "repository/tagger/1/helper.py: Python 3.10; expected a file that parses, found …"),
    ("syntax_newer_than_the_image", write("tagger/1/helper.py", "try:\n    TAG = ''\nexcept* OSError:\n    pass\n"),
     "repository/tagger/1/helper.py: Python 3.10; expected a file that parses, found …"),
    ("no_execute", write("tagger/1/model.py", BPR.replace("execute", "run")),
     "repository/tagger/1/model.py: Python backend; expected class TritonPythonModel with execute, found none"),
    ("no_plan", lambda root: (root / "head_trt/1/model.plan").unlink(),
     "repository/head_trt/1/model.plan: file of backend tensorrt; expected a file, found nothing"),
    ("stand_in_plan", write("head_trt/1/model.plan", b"ftrt\0" + STAND_IN_PLAN),
     "repository/head_trt/1/model.plan: plan; expected a TensorRT engine, found a stand-in's file, which is no engine"),
    ("text_plan", write("head_trt/1/model.plan", "version https://git-lfs.github.com/spec/v1\n" * 3),
     "repository/head_trt/1/model.plan: plan; expected a TensorRT engine, found a text"),
]  # fmt: skip

# What Triton takes and the check advises against
ADVISED: list[tuple[str, Damage, str]] = [
    ("version_with_suffix", lambda root: shutil.copytree(root / "head_onnx/1", root / "head_onnx/1.bak"),
     "repository/head_onnx/1.bak: version folder; expected a whole number without a leading zero, found 1.bak"),
    ("version_with_leading_zero", lambda root: shutil.copytree(root / "head_onnx/1", root / "head_onnx/02"),
     "repository/head_onnx/02: version folder; expected a whole number without a leading zero, found 02"),
    ("hidden_version", lambda root: (root / "head_onnx/.1").mkdir(),
     "repository/head_onnx/.1: version folder; expected a whole number without a leading zero, found .1"),
    ("message_beyond_2_gib", both(
        edit("[8]", "[240, 480, 480]", "head_trt"), edit("size: 8", "size: 10", "head_trt")
    ),
     "repository/head_trt/config.pbtxt: max_batch_size; expected at most 9, … found 10 of 221184000 bytes each"),
    ("no_instance_group", edit("instance_group [{ count: 1 kind: KIND_AUTO }]", ""),
     f"{CONF}: instance_group; expected an explicit count: 1, found no instance_group"),
    ("no_instance_count", edit("count: 1", ""),
     f"{CONF}: instance_group; expected an explicit count: 1, found no count"),
]  # fmt: skip

# What Triton takes, too
FINE: list[tuple[str, Damage]] = [
    ("nothing", lambda root: None),
    ("plain_files_beside_the_models", write("README.md", "text")),
    ("files_as_links", lambda root: [
        (root / "head_onnx/1/model.onnx").rename(root.parent / "model.onnx"),
        (root / "head_onnx/1/model.onnx").symlink_to(root.parent / "model.onnx"),
    ]),
    ("no_name", edit('name: "head_onnx"', "")),
    ("second_version", both(
        edit("max_batch", "version_policy { all {} } max_batch"),
        lambda root: shutil.copytree(root / "head_onnx/1", root / "head_onnx/12"),
    )),
    ("broken_version_that_the_policy_excludes", both(
        edit("max_batch", "version_policy { specific { versions: [1] } } max_batch"),
        lambda root: (root / "head_onnx/12").mkdir(),
    )),
    ("folders_that_triton_ignores", lambda root: (root / "head_onnx/configs").mkdir()),
    ("backend_told_by_the_file", edit('backend: "onnxruntime"', "")),
    ("platform_alone", edit('backend: "onnxruntime"', 'platform: "onnxruntime_onnx"')),
    ("cp1251_comment", write_end("head_onnx/config.pbtxt", "# модель".encode("cp1251"))),
    ("microsofts_operator", replace(linear(operator="FusedMatMul", domain="com.microsoft"))),
    ("number_that_the_operators_give", replace(linear(classes="C"))),
    ("nodes_in_any_order_and_no_name", replace(unsorted_nodes())),
    ("domain_that_is_not_imported", replace(unimported())),
    ("model_local_function", replace(local_function())),
    ("inherited_model", write("tagger/1/model.py", BPR.replace("TritonPythonModel", "Base")
                              + "\n\nclass TritonPythonModel(Base):\n    pass\n")),
    ("guarded_import", write("tagger/1/model.py",
        "try:\n    import absent\nexcept ImportError:\n    absent = None\n" + BPR)),
    ("parameters_that_parse", edit("max_batch", parameter("intra_op_thread_count", "2") + "max_batch")),
    ("good_reshape", edit("dims: [8]", "dims: [2, 4] reshape { shape: [8] }")),
    ("platform_beside_the_backend", edit('"onnxruntime"', '"onnxruntime" platform: "onnxruntime_onnx"')),
    ("backend_beside_the_platform", edit('"tensorrt_plan"', '"tensorrt_plan" backend: "tensorrt"', "head_trt")),
    ("other_file_name", both(
        edit("max_batch", 'default_model_filename: "head.onnx" max_batch'),
        lambda root: (root / "head_onnx/1/model.onnx").rename(root / "head_onnx/1/head.onnx"),
    )),
    ("cc_model_filename", both(
        edit("max_batch", 'cc_model_filenames { key: "8.6" value: "86.plan" } max_batch', "head_trt"),
        write("head_trt/1/86.plan", b"ftrt" + bytes(100)),
    )),
    ("one_output_of_two", replace(two_outputs())),
    ("narrower_input", replace(linear(features="F"))),
    ("whole_shapes_without_batching", both(edit("size: 8", "size: 0"), edit("[8]", "[-1, 8]"), edit("[3]", "[-1, 3]"))),
    ("fixed_batch_without_batching", both(
        replace(linear(rows=4)), edit("size: 8", "size: 0"), edit("[8]", "[4, 8]"), edit("[3]", "[4, 3]")
    )),
    ("variable_output_for_a_variable_one", both(replace(variable_output()), edit("dims: [3]", "dims: [-1]"))),
    ("two_instances", edit("count: 1", "count: 2")),
    ("cpu_only", edit("KIND_AUTO", "KIND_CPU")),
    ("python_without_instance_group", edit("instance_group [{ count: 1 kind: KIND_AUTO }]", "", "tagger")),
    ("largest_message", both(
        edit("[8]", "[240, 480, 480]", "head_trt"), edit("size: 8", "size: 9", "head_trt")
    )),
    ("last_ir_and_opset", replace(linear(opset=21, ir=10))),
    ("old_ir_and_opset", replace(linear(opset=13, ir=7))),
    ("external_data_beside_the_model", both(replace(external()), write("head_onnx/1/weights.data", bytes(96)))),
]  # fmt: skip


def matches(line: str, pattern: str) -> bool:
    """`…` in a pattern stands for any text."""
    parts = pattern.split("…")
    if not line.startswith(parts[0]) or (parts[-1] and not line.endswith(parts[-1])):
        return False
    position = 0
    for part in parts:
        position = line.find(part, position)
        if position < 0:
            return False
        position += len(part)
    return len(parts) > 1 or line == pattern


@pytest.mark.parametrize(("damage", "finding"), [case[1:] for case in BROKEN], ids=[case[0] for case in BROKEN])
def test_a_broken_repository_is_found(repository: Path, damage: Damage, finding: str) -> None:
    assert check_repository(repository, gpu=False) == []
    damage(repository)
    found = check_repository(repository, gpu=False)
    assert any(matches(line, finding) for line in found), found


@pytest.mark.parametrize("damage", [case[1] for case in FINE], ids=[case[0] for case in FINE])
def test_what_triton_takes_is_no_finding(repository: Path, damage: Damage) -> None:
    damage(repository)
    assert check_repository(repository, gpu=False) == []


@pytest.mark.parametrize(("damage", "line"), [case[1:] for case in ADVISED], ids=[case[0] for case in ADVISED])
def test_a_recommendation_is_no_fault(repository: Path, damage: Damage, line: str) -> None:
    damage(repository)
    found = find_faults(repository, gpu=False)
    assert found.faults == []
    assert any(matches(one, line) for one in found.recommendations), found


def test_gpu_instances_are_fine_where_there_is_a_gpu(repository: Path) -> None:
    edit("KIND_AUTO", "KIND_GPU")(repository)
    assert check_repository(repository, gpu=True) == []


# --- The client's contract ----------------------------------------------------

CONTRACT: list[tuple[str, str, str, str, str]] = [
    ("input_type", "bpr_model", "TYPE_INT16", "TYPE_FP32",
     "client's contract, input 'input'; expected INT16 [1, -1, -1, -1], found FP32 [1, -1, -1, -1]"),
    ("fixed_depth", "bpr_model", "[1, -1, -1, -1]", "[1, 300, -1, -1]",
     "client's contract, input 'input'; expected INT16 [1, -1, -1, -1], found INT16 [1, 300, -1, -1]"),
    ("input_name", "bpr_model", '"metadata"', '"spacing"',
     "client's contract, input; expected metadata FP32 [1, 3], found input, spacing"),
    ("extra_input", "bpr_model", "dims: [1, 3] }", 'dims: [1, 3] }, { name: "age" data_type: TYPE_FP32 dims: [1] }',
     "client's contract, inputs; expected input, metadata, found also age"),
    ("output_rank", "bpr_model", "dims: [-1]", "dims: [-1, 1]",
     "client's contract, output 'output'; expected STRING [1], found STRING [-1, 1]"),
    ("output_name", "bpr_model", '"output"', '"tag"',
     "client's contract, output; expected output STRING [1], found tag"),
    ("batching", "bpr_model", "max_batch_size: 0", "max_batch_size: 1",
     "client's contract, output 'output'; expected STRING [1], found STRING [-1, -1]"),
    ("classes", "binary_onnx", "dims: [3]", "dims: [3]",
     "client's contract, output 'output'; expected FP32 [-1, 2], found FP32 [-1, 3]"),
    ("features", "multilabel_onnx", "dims: [8]", "dims: [8]",
     "client's contract, input 'input'; expected FP32 [-1, 512], found FP32 [-1, 8]"),
    ("volume", "vit_onnx", "dims: [8]", "dims: [8]",
     "client's contract, input 'input'; expected FP32 [-1, 1, 240, 480, 480], found FP32 [-1, 8]"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("model", "old", "new", "finding"), [case[1:] for case in CONTRACT], ids=[c[0] for c in CONTRACT]
)
def test_the_four_known_models_keep_the_clients_contract(
    tmp_path: Path, model: str, old: str, new: str, finding: str
) -> None:
    root = tmp_path / "repository"
    bpr(root) if model == "bpr_model" else head(root, model)
    edit(old, new, model)(root)
    assert f"repository/{model}/config.pbtxt: {finding}" in check_repository(root)


def test_a_good_bpr_model_keeps_the_contract(tmp_path: Path) -> None:
    bpr(tmp_path / "repository")
    assert check_repository(tmp_path / "repository") == []


def test_the_client_asks_for_version_1(tmp_path: Path) -> None:
    (bpr(tmp_path / "repository") / "1").rename(tmp_path / "repository/bpr_model/2")
    line = "repository/bpr_model: client's contract; expected version 1, found 2"
    assert check_repository(tmp_path / "repository") == [line]


def test_shapes_and_batch_limit_come_from_the_models_entries(tmp_path: Path) -> None:
    root, models = tmp_path / "repository", tmp_path / "models"
    head(root)
    models.mkdir()
    entry = {"family": "head", "input": [8], "output": [3], "batch": [1, 4, 8]}
    (models / "binary.json").write_text(json.dumps(entry))
    assert check_repository(root, models) == []
    (models / "binary.json").write_text(json.dumps(entry | {"output": [4], "batch": [1, 2, 4]}))
    config = "repository/binary_onnx/config.pbtxt"
    assert check_repository(root, models) == [
        f"{config}: client's contract, output 'output'; expected FP32 [-1, 4], found FP32 [-1, 3]",
    ]
    assert find_faults(root, models).recommendations == [
        f"{config}: max_batch_size; expected at most 4, the model's largest batch, found 8",
    ]


def test_our_own_configs_keep_the_contract_and_the_entries_limits(tmp_path: Path) -> None:
    models = {"vit": "vit/config.pbtxt", "binary": "head/binary.pbtxt", "multilabel": "head/multilabel.pbtxt"}
    for name, config in (models | {"lipro": "head/lipro.pbtxt"}).items():
        folder = tmp_path / "repository" / f"{name}_onnx"
        (folder / "1").mkdir(parents=True)
        shutil.copy(ROOT / "convertation" / config, folder / "config.pbtxt")
        shape = ["N", 1, 240, 480, 480] if name == "vit" else ["N", 512]
        classes = {"vit": 512, "binary": 2, "multilabel": 20, "lipro": 18}[name]
        inputs = [helper.make_tensor_value_info("input", TensorProto.FLOAT, shape)]
        outputs = [helper.make_tensor_value_info("output", TensorProto.FLOAT, ["N", classes])]
        size = helper.make_tensor("size", TensorProto.INT64, [2], [-1, classes])
        node = helper.make_node("Reshape", ["input", "size"], ["output"])
        graph = helper.make_graph([node], "g", inputs, outputs, [size])
        onnx.save(
            helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10),
            folder / "1/model.onnx",
        )
    assert check_repository(tmp_path / "repository") == []


def test_on_a_gpu_every_onnx_model_computes_in_float32_but_that_of_tf32() -> None:
    configs = [path for path in (ROOT / "convertation").glob("*/*.pbtxt") if path.parent.name in ("vit", "head")]
    assert len(configs) >= 5
    for path in configs:
        config = read_config(path)
        (cuda,) = config.optimization.execution_accelerators.gpu_execution_accelerator
        tf32 = "1" if path.name == "config.tf32.pbtxt" else "0"
        assert (cuda.name, dict(cuda.parameters)) == ("cuda", {"use_tf32": tf32}), path
        assert config.parameters["cudnn_conv_algo_search"].string_value == "1", path


# --- All findings at once, the command, and the cost --------------------------


def test_all_findings_are_said_at_once(repository: Path) -> None:
    both(edit("size: 8", "size: -1"), edit("KIND_AUTO", "KIND_GPU", "tagger"))(repository)
    (repository / "head_trt/1/model.plan").unlink()
    found = check_repository(repository, gpu=False)
    assert [line.split(":")[0] for line in found] == [
        "repository/head_onnx/config.pbtxt",
        "repository/head_onnx/config.pbtxt",
        "repository/head_onnx/config.pbtxt",
        "repository/head_trt/1/model.plan",
        "repository/tagger/config.pbtxt",
    ]


def test_the_command_prints_findings_and_exits_1(repository: Path) -> None:
    command = [sys.executable, "-m", "scripts.serve.check_repository", str(repository)]
    good = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (good.returncode, good.stdout, good.stderr) == (0, f"{repository}: no findings\n", "")
    (repository / "head_onnx/1/model.onnx").unlink()
    bad = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    line = f"{ONNX}: file of backend onnxruntime; expected a file, found nothing\n"
    assert (bad.returncode, bad.stdout, bad.stderr) == (1, line, "")


def test_a_repository_that_is_not_there_is_a_finding(tmp_path: Path) -> None:
    assert check_repository(tmp_path / "none") == ["none: repository; expected a folder of models, found nothing"]
    (tmp_path / "file").touch()
    assert check_repository(tmp_path / "file") == ["file: repository; expected a folder of models, found a file"]


def test_weights_are_not_read(tmp_path: Path) -> None:
    """Only the header is read of a sparse file of 1 GB with one weight."""
    model = linear()
    weight = model.graph.initializer[0]
    dims, size = (1 << 14, 1 << 14), 1 << 30
    del weight.dims[:]
    weight.dims.extend(dims)
    weight.ClearField("raw_data")
    rest = model.graph.__class__.FromString(model.graph.SerializeToString())
    del rest.initializer[:]
    head_of_weight = weight.SerializeToString() + b"\x4a" + varint(size)
    body = rest.SerializeToString() + b"\x2a" + varint(len(head_of_weight) + size) + head_of_weight
    model.ClearField("graph")
    path = tmp_path / "model.onnx"
    start = model.SerializeToString() + b"\x3a" + varint(len(body) + size) + body
    path.write_bytes(start)
    os.truncate(path, len(start) + size)
    read, faults = read_without_weights(path)
    assert faults == []
    assert [value.name for value in read.graph.input] == ["input", "weight"]
    assert read.ByteSize() < 1000


def varint(value: int) -> bytes:
    result = bytearray()
    while value > 0x7F:
        result.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes(result + bytes([value]))
