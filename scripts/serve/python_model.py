"""Tell from the text of a model.py whether Triton's Python backend can import and start it. No code of it runs."""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

from scripts.serve.releases import find_release

MODEL = "TritonPythonModel"
# Modules that a Python model can import without requirements.txt: the image's packages, the backend's own modules
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

    def list_statements(self) -> Iterator[ast.stmt]:
        """Yield the statements that run at import, with the branches of if, try, with, for and while."""
        waiting: list[ast.stmt] = list(self.tree.body)
        while waiting:
            node = waiting.pop(0)
            yield node
            if isinstance(node, (ast.If, ast.Try, ast.With, ast.For, ast.While)):
                waiting += [child for child in ast.walk(node) if isinstance(child, ast.stmt) and child is not node]

    def list_names(self) -> set[str] | None:
        """Return the names that the module defines; None if its text does not tell them all."""
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
    """Return a module's file in the version folder `root` or in the model's folder; None if neither has it."""
    for folder in (root, root.parent):
        path = folder.joinpath(*name.split("."))
        for file in (path / "__init__.py", path.with_name(f"{path.name}.py")):
            if file.is_file():
                return file
    return None


def check_model(file: Path, packages: bool) -> list[Fault]:
    """Return the faults of a model.py and of the files that it imports.

    `packages`: the model brings its own packages, so no import counts as missing.
    """
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
            given = modules[target].list_names() if target in modules else None
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
    """Yield each module that must exist, and the names taken from it; imports in functions, try or if do not count."""
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
    """Tell whether a module is part of Python or of the image, or lies beside the model."""
    first = name.split(".")[0]
    beside = any((folder / first).is_dir() or list(folder.glob(f"{first}.*")) for folder in (root, root.parent))
    return first in PRESENT or first in sys.stdlib_module_names or beside


def find_stop(body: list[ast.stmt]) -> str:
    """Return the statement that certainly ends a body with an error, "" if there is none."""
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
    """Tell whether a method can be called with self and one argument."""
    if method.decorator_list:
        return True  # a decorator may change the arguments
    arguments = method.args
    places = len(arguments.posonlyargs) + len(arguments.args)
    needed = places - len(arguments.defaults)
    named = any(default is None for default in arguments.kw_defaults)
    return needed <= 2 and (places >= 2 or arguments.vararg is not None) and not named


def find_methods(
    root: Path, modules: dict[Path, Module], module: Module, name: str, depth: int
) -> dict[str, ast.stmt] | None:
    """Return a class's methods by name, inherited ones too; {} if there is no class, None if the text cannot tell."""
    if depth > 20:
        return None
    found: dict[str, ast.stmt] | None = {}
    for node in module.list_statements():
        if isinstance(node, ast.ClassDef) and node.name == name:
            found = {}
            for base in reversed(node.bases):
                if isinstance(base, ast.Name) and base.id == "object":
                    continue
                inherited = (
                    find_methods(root, modules, module, base.id, depth + 1) if isinstance(base, ast.Name) else None
                )
                if not inherited:  # the base is of another package, or computed
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
