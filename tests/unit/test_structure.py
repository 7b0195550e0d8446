import ast
import statistics
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

import pdvit

PACKAGE = Path(pdvit.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))

# The design's "Dependencies go one way": room -> what it may import of ours, as whole rooms or single modules.
MAY_IMPORT = {
    "errors": set(),
    "version": set(),
    "similarity": set(),
    "config": set(),
    "tracking": set(),
    "losses": {"similarity"},
    "models": {"config", "losses.mixing", "losses.objective"},
    "data": {"config"},
    "engine": {"tracking", "config"},
    "tasks": {
        *("models", "losses", "data", "similarity", "config"),
        *("engine.protocol", "engine.device", "engine.distributed"),
    },
    "analysis": {"models", "data", "similarity", "engine", "tracking"},
    "plots": set(),
    "sweep": {"config", "tracking", "tasks", "engine"},
    "cli": {
        *("config", "data", "models", "tasks", "engine", "tracking", "analysis", "plots", "similarity", "losses"),
        "sweep",
    },
    "__main__": {"cli"},
}
# What a room may use beside Python's own library; rooms that are not here are free.
LIBRARIES = {
    "errors": set(),
    "config": {"tomli_w"},
    "tracking": set(),
    "similarity": {"torch"},
    "losses": {"torch"},
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


def imports(node: ast.AST) -> Iterator[str]:
    """Yield the full names that an import statement brings in."""
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        assert node.level == 0, "imports are absolute, so that they can be read"
        yield from (f"{node.module}.{alias.name}" for alias in node.names)


def ours(name: str) -> str | None:
    """Return the part after `pdvit.` where the name is a module of ours or something in one."""
    inner = name.removeprefix("pdvit.")
    parts = inner.split(".")
    is_room = (PACKAGE / parts[0]).is_dir() or (PACKAGE / f"{parts[0]}.py").is_file()
    return inner if name.startswith("pdvit.") and is_room else None


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


def modules(node: ast.AST) -> Iterator[str]:
    """Yield the full names of the modules that an import statement loads or takes names from."""
    yield from ([node.module] if isinstance(node, ast.ImportFrom) and node.module else imports(node))


def test_every_room_has_its_rule():
    rooms = {room_of(file) for file in FILES} - {"__init__"}
    assert rooms == set(MAY_IMPORT)


@pytest.mark.parametrize("room", MAY_IMPORT)
def test_rooms_depend_on_one_another_one_way(room):
    allowed = MAY_IMPORT[room] | {room, "errors", "version"}
    for file in FILES:
        if room_of(file) != room:
            continue
        for node in ast.walk(tree(file)):
            for name in imports(node):
                inner = ours(name)
                if inner is None:
                    continue
                fits = any(inner == entry or inner.startswith(f"{entry}.") for entry in allowed)
                assert fits, f"{file.relative_to(PACKAGE)}:{node.lineno} imports pdvit.{inner}"


@pytest.mark.parametrize("room", LIBRARIES)
def test_rooms_use_only_their_libraries(room):
    allowed, optional = LIBRARIES[room] | sys.stdlib_module_names | {"pdvit"}, OPTIONAL.get(room, set())
    for file in FILES:
        if room_of(file) != room:
            continue
        module = tree(file)
        always = {name for node in at_import(module) for name in modules(node)}
        found = {name for node in ast.walk(module) for name in modules(node)} - (optional - always)
        assert {name.split(".")[0] for name in found} <= allowed, file


@pytest.mark.parametrize("room", ["cli", "config", "errors", "__main__", "__init__"])
def test_the_command_line_and_the_configuration_import_nothing_heavy(room):
    for file in FILES:
        if room_of(file) == room:
            found = {name.split(".")[0] for node in at_import(tree(file)) for name in imports(node)}
            assert found <= {"pdvit", "typer"} | sys.stdlib_module_names, file


def test_there_are_no_import_cycles():
    modules = {module_name(file): file for file in FILES}
    edges = {
        name: {
            target
            for node in at_import(tree(file), type_checking=True)
            for imported in imports(node)
            for target in (imported, imported.rpartition(".")[0])
            if target in modules and target != name
        }
        for name, file in modules.items()
    }
    done: set[str] = set()
    while ready := {name for name, targets in edges.items() if name not in done and targets <= done}:
        done |= ready
    assert set(edges) - done == set()


def module_name(file: Path) -> str:
    return ".".join(("pdvit", *file.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(".__init__")


def test_the_engine_uses_timms_optimizers_and_schedules_only():
    nodes = [node for file in FILES if room_of(file) == "engine" for node in ast.walk(tree(file))]
    found = {name for node in nodes for name in imports(node)}
    parts = ("timm.optim.", "timm.scheduler.", "timm.utils.")
    assert all(name.startswith(parts) for name in found if name.startswith("timm"))


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


def test_the_rules_can_fail():
    source = "from pdvit.losses import Objective\nif TYPE_CHECKING:\n    import torch\ndef late():\n    import timm\n"
    found = [name for node in at_import(ast.parse(source)) for name in imports(node)]
    assert found == ["pdvit.losses.Objective"]
    assert ours(found[0]) == "losses.Objective"
    assert ours("pdvit.__version__") is None
