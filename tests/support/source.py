"""What the source code says about itself: its imports, its sizes, and the private names of other packages that it uses."""

import ast
import importlib
import re
from functools import cache
from pathlib import Path

import cud_trainer

ROOT = Path(__file__).parents[2]
PACKAGES = ("cud_trainer", "evaluation")
# What `from cud_trainer import X` loads, wherever it is written.
EXPORTS = {name: f"cud_trainer{module}" for name, module in cud_trainer._EXPORTS.items()}
PRIVATE = re.compile(r"_(?!_)\w")
# Private by their look only: documented names of the standard library.
DOCUMENTED = {"_asdict", "_exit", "_fields", "_make", "_replace"}


def files(*folders: str) -> list[Path]:
    """The Python files of packages, or of folders of them."""
    return sorted(path for folder in folders or PACKAGES for path in (ROOT / folder).rglob("*.py"))


def name_of(path: Path) -> str:
    """`cud_trainer/data/prepare.py` -> `cud_trainer.data.prepare`; a package is named without its `__init__`."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


@cache
def modules() -> dict[str, Path]:
    return {name_of(path): path for path in files()}


def imports(path: Path, text: str | None = None):
    """Everything a file imports, also inside functions and by name; relative imports and lazy exports resolved."""
    package = path.relative_to(ROOT).with_suffix("").parts
    for node in ast.walk(tree_of(path) if text is None else ast.parse(text)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level] if node.level else ()
            module = ".".join([*base, *([node.module] if node.module else [])])
            yield module
            for alias in node.names:
                if module == "cud_trainer" and alias.name in EXPORTS:  # loaded on first use
                    yield EXPORTS[alias.name]
                elif f"{module}.{alias.name}" in modules():
                    yield f"{module}.{alias.name}"
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", getattr(node.func, "id", "")) in {
            "import_module",
            "__import__",
        }:
            yield from (argument.value for argument in node.args if isinstance(argument, ast.Constant))


def circles() -> list[set[str]]:
    """Modules that import each other, directly or through others, at whatever time they do.

    A package and the modules in it do not count as a circle: whoever imports a module of it imports the package first.
    """
    graph = {
        name: {
            other
            for other in imports(path)
            if other in modules() and other != name and not f"{name}.".startswith(f"{other}.")
        }
        for name, path in modules().items()
    }

    def reach(start: str) -> set[str]:
        seen, todo = set(), [start]
        while todo:
            new = graph[todo.pop()] - seen
            seen |= new
            todo += new
        return seen

    reached = {name: reach(name) for name in graph}
    found = {frozenset({name, *(o for o in reached[name] if name in reached[o])}) for name in graph}
    return [set(circle) for circle in found if len(circle) > 1]


def lines(path: Path) -> int:
    return len(path.read_text(encoding="utf-8").splitlines())


def functions(path: Path) -> dict[str, int]:
    """Lines of every function of a file, with its docstring; a method is named by its class."""
    found: dict[str, int] = {}

    def visit(node: ast.AST, prefix: str) -> None:
        for child in ast.iter_child_nodes(node):
            named = isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef))
            name = f"{prefix}{child.name}" if named else ""
            if named and not isinstance(child, ast.ClassDef):
                found[name] = child.end_lineno - child.lineno + 1
            visit(child, f"{name}." if named else prefix)

    visit(tree_of(path), "")
    return found


def private(name: str) -> bool:
    return bool(PRIVATE.match(name)) and name not in DOCUMENTED


def in_self(node: ast.Attribute) -> bool:
    return isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")


@cache
def own_names() -> set[str]:
    """The private names that this code gives to something: to functions, modules, attributes and what it imports."""
    found: set[str] = set()
    for path in files():
        for node in ast.walk(tree_of(path)):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
                found.add(node.name)
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                found.add(node.id)
            elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and in_self(node):
                found.add(node.attr)
    return {name for name in found if private(name)} | {path.stem for path in files() if private(path.stem)}


@cache
def inherited_names() -> set[str]:
    """Private names of the classes of other packages that our classes, wherever they are made, build on."""
    import torch
    import transformers
    import trl

    bases: set[type] = {torch.nn.Module, transformers.Trainer, trl.SFTTrainer, transformers.TrainerCallback}
    for name in modules():
        if not name.endswith("__main__"):
            for thing in vars(importlib.import_module(name)).values():
                if isinstance(thing, type) and thing.__module__ == name:
                    bases |= set(thing.__mro__)
    others = {base for base in bases if base.__module__.split(".")[0] not in {*PACKAGES, "builtins"}}
    return {name for base in others for name in vars(base) if private(name)}


def borrowed(path: Path) -> set[str]:
    """Private names of other packages that a file uses: imported, read, set, asked for by name, or overridden."""
    found: set[str] = set()
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Import):
            found |= {part for alias in node.names for part in alias.name.split(".") if private(part)}
        elif isinstance(node, ast.ImportFrom) and not node.level and node.module.split(".")[0] not in PACKAGES:
            parts = [*node.module.split("."), *(alias.name for alias in node.names)]
            found |= {part for part in parts if private(part)}
        elif isinstance(node, ast.Attribute) and private(node.attr) and node.attr not in own_names():
            found.add(node.attr)
        elif isinstance(node, ast.Call) and getattr(node.func, "id", "") in {
            "getattr",
            "setattr",
            "hasattr",
            "delattr",
        }:
            names = [a.value for a in node.args[1:2] if isinstance(a, ast.Constant) and isinstance(a.value, str)]
            found |= {name for name in names if private(name) and name not in own_names()}
        elif isinstance(node, ast.ClassDef) and node.bases:
            defined = {child.name for child in node.body if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef))}
            for child in node.body:
                targets = child.targets if isinstance(child, ast.Assign) else [getattr(child, "target", None)]
                defined |= {target.id for target in targets if isinstance(target, ast.Name)}
            found |= {name for name in defined if private(name) and name in inherited_names()}
    return found
