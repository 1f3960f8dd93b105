"""The Makefile names every project module that a step imports, and pins every package that shapes what it writes.

Rebuilding by content needs this: a change of a file that is no input of a step would not be noticed.
"""

import ast
import re
from collections.abc import Iterator, Set
from pathlib import Path

import pytest
from conftest import ROOT, Project

FAMILIES = {"vit", "head", "bpr"}
# Packages that write or compute what a step leaves, each in requirements.txt under this name
PACKAGES = {"torch": "torch", "numpy": "numpy", "onnx": "onnx", "onnxscript": "onnxscript", "onnx_ir": "onnx-ir",
            "onnxruntime": "onnxruntime-gpu", "scipy": "scipy", "tritonclient": "tritonclient"}  # fmt: skip


@pytest.fixture(scope="module")
def explained(built_by_stand_ins: Project) -> dict[str, tuple[str, set[str]]]:
    """Command and inputs of each artifact, as `make EXPLAIN=1` prints them, for both kinds of weights."""
    steps = {}
    a_gpu = ("FORMAT=both", "gpu=sm86", "tensorrt=10.1.0.27")  # as make calls itself once it has asked for the GPU
    for weights, more in (("synthetic", ()), ("yandex", ()), ("synthetic", a_gpu), ("synthetic", ("PRECISION=fp16",))):
        said = built_by_stand_ins.make(
            "EXPLAIN=1",
            "repository",
            "build/fidelity.json",
            f"build/checks/vit{'.fp16' if 'PRECISION=fp16' in more else ''}.rtx.json",
            "WITH=lipro",
            f"WEIGHTS={weights}",
            f"REPOSITORY={weights}",
            *more,
        )
        for line in said.splitlines():
            if match := re.fullmatch(r"(\S+)=[0-9a-f]* (.+) : (.*)", line):
                target, command, inputs = match.groups()
                steps[target] = (command, {word.rpartition("=")[0] for word in inputs.split()})
    return steps


def imports(script: str, families: Set[str]) -> tuple[set[str], set[str]]:
    """Return the project modules that a script imports, itself included, and the packages of others.

    Imports in functions count.  Modules of other families do not: the network is chosen by the entry's family.
    """
    ours, others, queue = set(), set(), [script]
    while queue:
        file = queue.pop()
        if file in ours or set(Path(file).parts[1:2]) & (FAMILIES - families):
            continue
        ours.add(file)
        for name in named(ROOT / file):
            if files := files_of(name):
                queue += files
            else:
                others.add(name.partition(".")[0])
    return ours, others


def named(path: Path) -> Iterator[str]:
    """Yield the dotted names that a module imports: for `from a import b` a and a.b, for import_module its texts."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            node.body.clear()
    package = list(path.relative_to(ROOT).parts[:-1])
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*above, *([node.module] if node.module else [])])
            yield module
            yield from (f"{module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Constant) and re.fullmatch(r"convertation(\.\w+)+", str(node.value)):
            yield str(node.value)


def files_of(name: str) -> list[str]:
    """Return the files of the project that importing `name` runs: the module, and the packages above it."""
    parts = name.split(".")
    if not (ROOT / parts[0]).is_dir():
        return []
    files = ["/".join(parts[:end]) + "/__init__.py" for end in range(1, len(parts) + 1)] + ["/".join(parts) + ".py"]
    return [file for file in files if (ROOT / file).exists() and not only_says(file)] or [
        "/".join(parts[:-1]) + ".py"
    ] * (ROOT / ("/".join(parts[:-1]) + ".py")).exists()


def only_says(file: str) -> bool:
    """Tell whether a package holds only a docstring, which changes nothing that a step writes."""
    return file.endswith("__init__.py") and len(ast.parse((ROOT / file).read_text()).body) == 1


def families_of(target: str) -> set[str]:
    if target == "build/fidelity.json":
        return {"vit", "head"}
    for family, names in {"vit": ("vit", "VIT"), "bpr": ("bpr",), "head": ("",)}.items():
        if any(name in target for name in names):
            return {family}
    raise AssertionError(target)


def module_of(command: str) -> str | None:
    """Return the script that a command runs with -m."""
    match = re.search(r"python\S* -m (\S+)", command)
    return match[1].replace(".", "/") + ".py" if match else None


def test_every_kind_of_step_is_explained(explained: dict[str, tuple[str, set[str]]]) -> None:
    assert {module_of(command) for command, _ in explained.values()} >= {
        "scripts/convert/model_entry.py",
        "scripts/convert/synthesize.py",
        "scripts/archives/unpack.py",
        "scripts/convert/compare.py",
        "scripts/convert/round_fp16.py",
        "scripts/convert/compare_fp16.py",
        "scripts/serve/verdict.py",
        "scripts/plans/plan_request.py",
        "scripts/plans/compare_plan.py",
        "scripts/plans/plan_config.py",
        "scripts/plans/build_rtx.py",
        "scripts/show/fidelity.py",
        "convertation/vit/torch2onnx.py",
        "convertation/head/torch2onnx.py",
        "convertation/bpr/torch2onnx.py",
    }


def test_every_module_that_a_step_imports_is_its_input(explained: dict[str, tuple[str, set[str]]]) -> None:
    lacking = {}
    for target, (command, inputs) in explained.items():
        if script := module_of(command):
            needed, _ = imports(script, families_of(target))
            if missing := needed - inputs:
                lacking[target] = sorted(missing)
    assert lacking == {}


def test_scripts_of_the_shell_are_inputs_too(explained: dict[str, tuple[str, set[str]]]) -> None:
    for target, (command, inputs) in explained.items():
        if command.startswith("scripts/"):
            assert command.split()[0] in inputs, target


def test_every_file_that_a_command_names_is_an_input(explained: dict[str, tuple[str, set[str]]]) -> None:
    for target, (command, inputs) in explained.items():
        words = {word.rpartition("=")[2] for word in command.split() if "{}" not in word}  # a pattern for several
        files = {word for word in words if re.match(r"((build|training|convertation|scripts)/|require).*\.\w+$", word)}
        if target.endswith(".plan"):  # of the ONNX file only the graph counts, whose digest is in the request
            files -= {target, f"build/onnx/{Path(target).stem}.onnx"}
        assert files - inputs - {"training/weights.zip"} == set(), target


def test_every_package_that_shapes_an_artifact_is_pinned_in_its_record(
    explained: dict[str, tuple[str, set[str]]],
) -> None:
    lacking = {}
    for target, (command, _) in explained.items():
        script = module_of(command)
        if script and script not in ("scripts/convert/model_entry.py", "scripts/archives/unpack.py"):
            _, packages = imports(script, families_of(target))
            needed = {PACKAGES[package] for package in packages if package in PACKAGES}
            if missing := {package for package in needed if f" {package}==" not in command}:
                lacking[target] = sorted(missing)
    assert lacking == {}


def test_an_import_that_is_forgotten_would_be_found() -> None:
    ours, others = imports("scripts/convert/compare.py", {"bpr"})
    assert {"scripts/convert/sample.py", "scripts/convert/compare_bpr.py", "convertation/bpr/vgg.py",
            "convertation/checkpoint.py",
            "convertation/bpr/bpreg/__init__.py", "convertation/bpr/bpreg/preprocess.py"} <= ours  # fmt: skip
    assert not [file for file in ours if "/vit/" in file or "/head/" in file]
    assert {"torch", "onnxruntime", "numpy"} <= others


def test_the_makefile_starts_scripts_that_are_there() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for script in re.findall(r"scripts/[a-z_/]+\.(?:py|sh)", makefile):
        assert (ROOT / script).is_file(), script
    for module in re.findall(r"-m ((?:scripts|convertation)\.[a-z_.0-9]+[a-z_0-9])", makefile):
        path = ROOT / module.replace(".", "/")
        assert path.with_suffix(".py").is_file() or (path / "__main__.py").is_file(), module
