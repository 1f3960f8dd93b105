"""Will Triton's Python backend find, import and start a model.py: read from its text, nothing is run."""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

from scripts.serve.releases import find_release

MODEL = "TritonPythonModel"
# What a Python model finds without requirements.txt: the image's packages, and the backend's own modules
PRESENT = {"numpy", "triton_python_backend_utils", "c_python_backend_utils", "tritonserver", "setuptools", "pip",
           "pkg_resources", "wheel", "google", "grpc"}  # fmt: skip
EXITS = {"exit", "quit", "sys.exit", "os._exit", "os.abort"}
Fault = tuple[Path, str, str, str]  # file, rule, expected, found
Function = ast.FunctionDef | ast.AsyncFunctionDef


class Module:
    """One parsed file of the version folder."""

    def __init__(self, file: Path, tree: ast.Module) -> None:
        self.file = file
        self.tree = tree

    def statements(self) -> Iterator[ast.stmt]:
        """What runs at import, the branches of if, try and with included."""
        waiting: list[ast.stmt] = list(self.tree.body)
        while waiting:
            node = waiting.pop(0)
            yield node
            if isinstance(node, (ast.If, ast.Try, ast.With, ast.For, ast.While)):
                waiting += [child for child in ast.walk(node) if isinstance(child, ast.stmt) and child is not node]

    def names(self) -> set[str] | None:
        """Names that the module defines; None where they cannot be known."""
        found: set[str] = set()
        for node in ast.walk(self.tree):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
                found.add(node.name)
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                found.add(node.id)
            elif isinstance(node, (ast.Import, ast.ImportFrom)):
                for alias in node.names:
                    found.add(alias.asname or alias.name.split(".")[0])
            elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("globals", "exec"):
                return None
        return None if "*" in found or "__getattr__" in found else found


def find_module(root: Path, name: str) -> Path | None:
    """The file of a module in the version folder or the model's folder, None where it is no file of theirs."""
    for folder in (root, root.parent):
        path = folder.joinpath(*name.split("."))
        for file in (path / "__init__.py", path.with_name(f"{path.name}.py")):
            if file.is_file():
                return file
    return None


def check_model(file: Path, packages: bool) -> list[Fault]:
    """Faults of a model.py and of what it imports; `packages`: it brings packages of its own, so any import may do."""
    root, faults, image = file.parent, list[Fault](), find_release()
    modules: dict[Path, Module] = {}
    waiting = [file]
    while waiting:
        path = waiting.pop(0)
        if path in modules:
            continue
        try:
            tree = ast.parse(path.read_bytes(), path.name, feature_version=image.grammar)
        except (SyntaxError, ValueError) as error:
            faults.append((path, f"Python {image.python}", "a file that parses", str(error)))
            continue
        modules[path] = module = Module(path, tree)
        for name, wanted in list_imports(module):
            found = find_module(root, name)
            if found:
                waiting.append(found)
                waiting += [inner for one in wanted if (inner := find_module(root, f"{name}.{one}"))]
            elif not packages and not is_known(root, name):
                faults.append((path, "Python backend", "imports that the image has", f"import {name}"))
        if stop := find_stop(tree.body):
            faults.append((path, "Python backend", "a file that can be imported", stop))
    if file not in modules:
        return faults
    for module in list(modules.values()):
        for name, wanted in list_imports(module):
            target = find_module(root, name)
            given = modules[target].names() if target in modules else None
            for one in wanted:
                if given is not None and one not in given and one != "*" and not find_module(root, f"{name}.{one}"):
                    faults.append((module.file, "Python backend", f"a name that {name} has", one))
    methods = find_methods(root, modules, modules[file], MODEL, 0)
    if methods is None:
        return faults
    if "execute" not in methods:
        return [*faults, (file, "Python backend", f"class {MODEL} with execute", "none")]
    for name, method in methods.items():
        if name not in ("execute", "initialize", "__init__") or not isinstance(method, Function):
            continue
        if name != "__init__" and not takes_one_argument(method):
            faults.append((file, "Python backend", f"{name}(self, one argument)", ast.unparse(method.args)))
        if stop := find_stop(method.body):
            faults.append((file, "Python backend", f"{name} that can end", stop))
    return faults


def list_imports(module: Module) -> Iterator[tuple[str, list[str]]]:
    """Modules that must be there at import, each with the names taken from it; what a try guards is left out."""
    guarded = {
        id(child)
        for node in ast.walk(module.tree)
        if isinstance(node, (ast.Try, ast.If, ast.FunctionDef, ast.AsyncFunctionDef))
        for child in ast.walk(node)
    }
    for node in ast.walk(module.tree):
        if id(node) in guarded:
            continue
        if isinstance(node, ast.Import):
            yield from ((alias.name, []) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and (node.module or not node.level):
            yield node.module or "", [alias.name for alias in node.names]


def is_known(root: Path, name: str) -> bool:
    """Whether a module is part of Python or of the image, or a folder beside the model."""
    first = name.split(".")[0]
    beside = any((folder / first).is_dir() or list(folder.glob(f"{first}.*")) for folder in (root, root.parent))
    return first in PRESENT or first in sys.stdlib_module_names or beside


def find_stop(body: list[ast.stmt]) -> str:
    """The statement that surely ends a body with an error, "" where there is none."""
    for node in body:
        if isinstance(node, ast.Raise):
            return ast.unparse(node)
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call) and ast.unparse(node.value.func) in EXITS:
            return ast.unparse(node)
        if isinstance(node, ast.Assert) and isinstance(node.test, ast.Constant) and not node.test.value:
            return ast.unparse(node)
        if isinstance(node, ast.Return):
            return ""
    return ""


def takes_one_argument(method: Function) -> bool:
    """Whether a method can be called with self and one argument."""
    if method.decorator_list:
        return True  # a decorator may change what it takes
    arguments = method.args
    places = len(arguments.posonlyargs) + len(arguments.args)
    needed = places - len(arguments.defaults)
    named = any(default is None for default in arguments.kw_defaults)
    return needed <= 2 and (places >= 2 or arguments.vararg is not None) and not named


def find_methods(
    root: Path, modules: dict[Path, Module], module: Module, name: str, depth: int
) -> dict[str, ast.stmt] | None:
    """Methods of a class, those inherited included; {} where there is none, None where the text alone cannot tell."""
    if depth > 20:
        return None
    found: dict[str, ast.stmt] | None = {}
    for node in module.statements():
        if isinstance(node, ast.ClassDef) and node.name == name:
            found = {}
            for base in reversed(node.bases):
                if isinstance(base, ast.Name) and base.id == "object":
                    continue
                inherited = (
                    find_methods(root, modules, module, base.id, depth + 1) if isinstance(base, ast.Name) else None
                )
                if not inherited:  # of another package, or computed
                    return None
                found |= inherited
            if node.decorator_list or node.keywords:
                return None
            for item in node.body:
                if isinstance(item, (ast.FunctionDef, ast.AsyncFunctionDef)):
                    found[item.name] = item
                elif isinstance(item, ast.Assign):
                    found |= {target.id: item for target in item.targets if isinstance(target, ast.Name)}
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            if any(isinstance(target, ast.Name) and target.id == name for target in targets):
                if not isinstance(node.value, ast.Name) or node.value.id == name:
                    return None
                found = find_methods(root, modules, module, node.value.id, depth + 1)
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                if alias.name == "*" or (alias.asname or alias.name) == name:
                    target = find_module(root, node.module or "")
                    if target not in modules:
                        if alias.name == "*":
                            continue
                        return None
                    inner = name if alias.name == "*" else alias.name
                    there = find_methods(root, modules, modules[target], inner, depth + 1)
                    found = there if there or alias.name != "*" else found
        elif isinstance(node, ast.Import) and any((alias.asname or alias.name) == name for alias in node.names):
            return None
    return found
