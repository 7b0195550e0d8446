import re
import shlex
from pathlib import Path

import pytest
import typer

from pdvit.cli import app
from pdvit.cli.options import make_layers
from pdvit.config import build
from pdvit.errors import UserError

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
PAGES += sorted((ROOT / "experiments").rglob("*.md"))
SEPARATORS = {"&&", "||", ";", "|", "&"}


def commands(text: str) -> list[list[str]]:
    """Return the arguments of every pdvit command in the sh blocks of a page."""
    found = []
    for block in re.findall(r"^```sh\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            for words in simple_commands(line):
                arguments = pdvit_arguments(words)
                if arguments is not None:
                    found.append(arguments)
    return found


def simple_commands(line: str) -> list[list[str]]:
    lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
    lexer.whitespace_split = True
    parts: list[list[str]] = [[]]
    for word in lexer:
        if word in SEPARATORS:
            parts.append([])
        else:
            parts[-1].append(word)
    return parts


def pdvit_arguments(words: list[str]) -> list[str] | None:
    """Return what follows `pdvit`, `.venv/bin/pdvit` or `-m pdvit`; None for another program."""
    if words and Path(words[0]).name == "pdvit":
        return words[1:]
    if "-m" in words and words[words.index("-m") + 1] == "pdvit":
        return words[words.index("-m") + 2 :]
    return None


def parse(arguments: list[str]) -> None:
    """Parse as typer does, and check the settings of `train`; nothing is run."""
    command, name, parent = typer.main.get_command(app), "pdvit", None
    while True:
        try:
            context = command.make_context(name, list(arguments), parent=parent)
        except typer.Exit:  # --help and --version
            return
        if not hasattr(command, "resolve_command"):
            break
        rest = [*context._protected_args, *context.args]
        name, command, arguments = command.resolve_command(context, rest)
        parent = context
    if name in ("train", "finetune", "segment") and context.params["config"] is None:
        own = {"checkpoint", "config", "assign", "cells", "resume", "change", "replay", "as_json"}
        # Typer leaves a repeatable option that was not given as an empty tuple until it calls the command.
        settings = {key: value for key, value in context.params.items() if key not in own and value != ()}
        build(*make_layers(None, list(context.params["assign"] or []), settings))


def documented() -> list:
    return [
        pytest.param(arguments, id=f"{page.relative_to(ROOT)}: {shlex.join(arguments)}")
        for page in PAGES
        for arguments in commands(page.read_text(encoding="utf-8"))
    ]


@pytest.mark.parametrize("arguments", documented())
def test_a_documented_command_is_one_that_pdvit_takes(arguments):
    parse(arguments)


@pytest.mark.parametrize(
    "line",
    [
        "pdvit train --epohs 3",
        "pdvit trian",
        "pdvit plot similarit",
        "pdvit plot training --metric x",
        "pdvit train --lr fast",
        "pdvit train --diversity papr",
        "pdvit train --set optim.lrr=1",
        "pip install . && .venv/bin/pdvit analyse",
        "python -m pdvit train surplus",
    ],
)
def test_a_command_that_pdvit_does_not_take_is_found(line):
    (arguments,) = commands(f"```sh\n{line}  # a comment\n```\n")
    with pytest.raises((typer.TyperException, UserError)):
        parse(arguments)


@pytest.mark.parametrize(
    "command",
    [
        *(["train"], ["finetune"], ["analyze"], ["eval"], ["predict"], ["doctor"]),
        *(["plot", kind] for kind in typer.main.get_command(app).commands["plot"].commands),
    ],
)
def test_every_command_is_documented(command):
    written = [item for page in PAGES for item in commands(page.read_text(encoding="utf-8"))]
    assert any(arguments[: len(command)] == command for arguments in written)


def test_every_flag_that_the_docs_name_exists():
    known = {option for command in walk(typer.main.get_command(app)) for option in options(command)}
    known |= {"--max-restarts"}  # of torchrun
    for page in PAGES:
        for option in re.findall(r"`(--[a-z][a-z0-9-]*)", page.read_text(encoding="utf-8")):
            assert option in known, page


def walk(command):
    yield command
    for inner in getattr(command, "commands", {}).values():
        yield from walk(inner)


def options(command) -> list[str]:
    names = [[*parameter.opts, *parameter.secondary_opts] for parameter in command.params]
    return ["--help", *(option for both in names for option in both)]
