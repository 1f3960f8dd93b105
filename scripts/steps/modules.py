"""Find the files of this project that each script is made of, by reading its imports. Standard library only.

.make/modules.mk has a variable for each script: scripts.convert.compare is that file and all that it imports from
scripts/ and convertation/, with the data files that these open beside themselves.  Imports of a family's folder
(convertation/vit and so on) count only inside that folder: the rule in the Makefile says which family a script reads.
"""

import ast
import os
from collections.abc import Iterator

FAMILIES = ("vit", "head", "bpr")


def list_modules() -> str:
    """Return the text of .make/modules.mk: a line for each module, sorted by name."""
    files = {
        path
        for top in ("scripts", "convertation")
        for folder, _, names in os.walk(top)
        for name in names
        if name.endswith(".py") and os.path.exists(path := f"{folder}/{name}")
    }
    near = {path: sorted(read_imports(path, files)) for path in sorted(files)}
    lines = []
    for path in sorted(files):
        name = path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
        lines.append(f"{name} := {' '.join(list_reached(path, near))}")
    return "\n".join([*lines, ""])


def list_reached(path: str, near: dict[str, list[str]]) -> list[str]:
    """Return `path`, then every file that it imports, directly or not, sorted by name."""
    reached, queue = {path}, [path]
    while queue:
        here = queue.pop()
        for name in near.get(here, []):
            if name not in reached and (not find_family(name) or find_family(name) == find_family(here)):
                reached.add(name)
                queue.append(name)
    return [path, *sorted(reached - {path})]


def find_family(path: str) -> str:
    """Return vit, head or bpr for a file of that family's folder, "" for any other."""
    words = path.split("/")
    return words[1] if words[0] == "convertation" and words[1] in FAMILIES else ""


def read_imports(path: str, files: set[str]) -> Iterator[str]:
    """Yield the project's files that the module at `path` imports, and the data files that it opens beside itself."""
    with open(path, encoding="utf-8") as source:
        tree = ast.parse(source.read(), path)
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            node.body.clear()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield from find_files(alias.name, files)
        elif isinstance(node, ast.ImportFrom):
            above = path.split("/")[: -node.level] if node.level else []
            module = ".".join([*above, *([node.module] if node.module else [])])
            yield from find_files(module, files)
            for alias in node.names:
                yield from find_files(f"{module}.{alias.name}", files)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(".with_name"):
            name = node.args[0]
            text = name.value if isinstance(name, ast.Constant) else ""
            if isinstance(text, str) and os.path.isfile(beside := f"{os.path.dirname(path)}/{text}"):
                yield beside


def find_files(name: str, files: set[str]) -> Iterator[str]:
    """Yield the files that importing `name` runs: the module, and the packages above it that hold code."""
    parts = name.split(".")
    for end in range(1, len(parts) + 1):
        for path in ("/".join(parts[:end]) + ".py", "/".join(parts[:end]) + "/__init__.py"):
            if path in files and not (path.endswith("__init__.py") and holds_docstring_only(path)):
                yield path


def holds_docstring_only(path: str) -> bool:
    """Tell whether a package holds only a docstring, which changes nothing that a step writes."""
    with open(path, encoding="utf-8") as source:
        return len(ast.parse(source.read()).body) <= 1
