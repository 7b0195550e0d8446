import ast
import statistics
import sys
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path

import pytest

import pdvit

PACKAGE = Path(pdvit.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))

# Room -> what it may import of ours, as whole rooms or single modules.
MAY_IMPORT = {
    **{room: set() for room in ("errors", "version", "files", "definitions", "similarity", "config", "tracking")},
    "plots": {"definitions"},
    "losses": {"similarity", "config.schema"},
    "models": {"config", "losses.mixing", "losses.objective"},
    "data": {"config", "models.layers"},
    "engine": {"tracking", "config"},
    "tasks": {
        *("models", "losses", "data", "similarity", "config"),
        *("engine.protocol", "engine.device", "engine.distributed"),
    },
    "analysis": {"models", "similarity", "engine", "tracking", "definitions", "plots"},
    "launch": {"config", "tracking", "engine", "workflows"},
    "sweep": {"config", "tracking", "engine"},
    "workflows": {
        *("config", "data", "models", "tasks", "engine", "tracking", "analysis", "plots", "sweep", "definitions"),
    },
    "cli": {
        *("config", "data", "models", "tasks", "engine", "tracking", "analysis", "plots", "similarity", "losses"),
        *("launch", "sweep", "definitions", "workflows"),
    },
    "__main__": {"cli"},
}
# What a room may use beside Python's own library; rooms that are not here are free.
LIBRARIES = {
    "errors": set(),
    "files": set(),
    "config": {"tomli_w"},
    "tracking": set(),
    "similarity": {"torch"},
    "losses": {"torch"},
    "launch": {"submitit"},
    "sweep": {"tomli_w"},
    "plots": {"pandas", "matplotlib", "numpy", "scipy", "PIL"},
    "engine": {"torch", "timm", "safetensors", "rich"},
}
# Optional packages, by the exact module: inside functions only, so that the room works without them.
OPTIONAL = {"tracking": {"torch.utils.tensorboard", "wandb", "trackio"}}


def room_of(file: Path) -> str:
    return file.relative_to(PACKAGE).parts[0].removesuffix(".py")


@cache
def tree(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"))


def imports(nodes: Iterable[ast.AST], whole: bool = True) -> set[str]:
    """Return the full names that import statements bring in; not `whole`: the modules that they take names from."""
    found: set[str] = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute, so that they can be read"
            found |= {f"{node.module}.{alias.name}" for alias in node.names} if whole else {node.module}
    return found


def at_import(module: ast.Module, type_checking: bool = False) -> Iterator[ast.AST]:
    """Yield what runs when a module is imported: no function bodies, and by default no imports for type checkers."""
    waiting: list[ast.AST] = list(module.body)
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if not type_checking and isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            waiting += node.orelse
            continue
        yield node
        waiting += ast.iter_child_nodes(node)


def packages(names: set[str]) -> set[str]:
    return {name.split(".")[0] for name in names}


@pytest.mark.parametrize("room", sorted({room_of(file) for file in FILES} - {"__init__"}))
def test_rooms_depend_on_one_another_one_way(room):
    allowed = tuple(f"pdvit.{name}." for name in MAY_IMPORT[room] | {room, "errors", "version", "files"})
    for file in FILES:
        if room_of(file) == room:
            found = {name for name in imports(ast.walk(tree(file))) if name.startswith("pdvit.")}
            ours = {name for name in found if name.split(".")[1] in MAY_IMPORT}
            assert [name for name in ours if not f"{name}.".startswith(allowed)] == [], file


@pytest.mark.parametrize("room", LIBRARIES)
def test_rooms_use_only_their_libraries(room):
    allowed, optional = LIBRARIES[room] | sys.stdlib_module_names | {"pdvit"}, OPTIONAL.get(room, set())
    for file in FILES:
        if room_of(file) == room:
            always = imports(at_import(tree(file)), whole=False)
            found = imports(ast.walk(tree(file)), whole=False)
            assert packages(found - (optional - always)) <= allowed, file


@pytest.mark.parametrize("room", ["cli", "config", "definitions", "errors", "files", "__main__", "__init__"])
def test_the_command_line_and_the_configuration_import_nothing_heavy(room):
    for file in FILES:
        if room_of(file) == room:
            found = packages(imports(at_import(tree(file))))
            assert found <= {"pdvit", "typer"} | sys.stdlib_module_names, file


def test_there_are_no_import_cycles():
    files = {module_name(file): file for file in FILES}
    edges = {
        module: {
            target
            for name in imports(at_import(tree(file), type_checking=True))
            for target in (name, name.rpartition(".")[0])
            if target in files and target != module
        }
        for module, file in files.items()
    }
    done: set[str] = set()
    while ready := {name for name, targets in edges.items() if name not in done and targets <= done}:
        done |= ready
    assert set(edges) - done == set()


def module_name(file: Path) -> str:
    return ".".join(("pdvit", *file.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(".__init__")


def test_the_engine_uses_timms_optimizers_and_schedules_only():
    found = {name for file in FILES if room_of(file) == "engine" for name in imports(ast.walk(tree(file)))}
    allowed = ("timm.optim.", "timm.scheduler.", "timm.utils.")
    assert all(name.startswith(allowed) for name in found if name.startswith("timm"))


def test_files_and_functions_stay_short():
    files = [len(file.read_text(encoding="utf-8").splitlines()) for file in FILES]
    assert max(files) <= 400
    assert statistics.mean(files) < 180
    functions = {
        f"{file.relative_to(PACKAGE)}:{node.name}": node.end_lineno - node.lineno + 1
        for file in FILES
        for node in ast.walk(tree(file))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    }
    assert [place for place, length in functions.items() if length > 80] == []
    assert statistics.median(functions.values()) <= 12


def test_functions_and_imports_for_type_checkers_are_not_run_at_import():
    source = "from pdvit.losses import Objective\nif TYPE_CHECKING:\n    import torch\ndef late():\n    import timm\n"
    assert imports(at_import(ast.parse(source))) == {"pdvit.losses.Objective"}
    assert imports(ast.walk(ast.parse(source)), whole=False) == {"pdvit.losses", "torch", "timm"}
