"""Every pdvit command in the docs is parsed as typer parses it; nothing is run."""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer

from pdvit.cli import app
from pdvit.cli.options import make_layers
from pdvit.config import build
from tests.docs.pages import PAGES, blocks, page_id, read

COMMAND = typer.main.get_command(app)
# Arguments of the commands that train, beside the settings of the configuration.
OWN = {"checkpoint", "file", "assign", "cells", "resume", "change", "replay", "follow", "as_json"}


def commands(text: str) -> Iterator[list[str]]:
    """Yield the arguments of every pdvit command in the sh blocks of a page."""
    lines = [line for block in blocks(text, "sh") for line in block.replace("\\\n", " ").splitlines()]
    for line in lines:
        lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
        lexer.whitespace_split = True
        parts: list[list[str]] = [[]]
        for word in lexer:
            if word in {"&&", "||", ";", "|", "&"}:
                parts.append([])
            else:
                parts[-1].append(word)
        for words in parts:
            if words and Path(words[0]).name == "pdvit":
                yield words[1:]
            elif "-m" in words and words[words.index("-m") + 1] == "pdvit":
                yield words[words.index("-m") + 2 :]


def parse(arguments: list[str]) -> None:
    """Parse as typer does, and check the settings of the commands that train."""
    command, name, parent = COMMAND, "pdvit", None
    while True:
        try:
            context = command.make_context(name, list(arguments), parent=parent)
        except typer.Exit:  # --help and --version
            return
        if not hasattr(command, "resolve_command"):
            break
        name, command, arguments = command.resolve_command(context, [*context._protected_args, *context.args])
        parent = context
    if name in ("train", "finetune", "segment") and context.params["file"] is None:
        # Typer leaves a repeatable option that was not given as an empty tuple until it calls the command.
        settings = {key: value for key, value in context.params.items() if key not in OWN and value != ()}
        build(*make_layers(settings, list(context.params["assign"] or [])))


DOCUMENTED = [(page, arguments) for page in PAGES for arguments in commands(read(page))]


@pytest.mark.parametrize(
    "arguments", [pytest.param(words, id=f"{page_id(page)}: {shlex.join(words)}") for page, words in DOCUMENTED]
)
def test_a_documented_command_is_one_that_pdvit_takes(arguments):
    parse(arguments)


def test_every_command_is_documented_and_every_documented_flag_exists():
    groups = {name: getattr(command, "commands", None) for name, command in COMMAND.commands.items()}
    names = [[name, *inner] for name, group in groups.items() for inner in ([[]] if group is None else zip(group))]
    for name in names:
        assert any(arguments[: len(name)] == name for _, arguments in DOCUMENTED), name
    known = {"--help", "--requeue", "--array"}  # the last two are sbatch's
    known.update(*([*option.opts, *option.secondary_opts] for command in walk(COMMAND) for option in command.params))
    for page in PAGES:
        assert set(re.findall(r"`(--[a-z][a-z0-9-]*)", read(page))) <= known, page


def test_every_help_has_examples_that_pdvit_takes():
    for command in walk(COMMAND):
        examples = (command.epilog or "").splitlines()
        assert examples or hasattr(command, "commands"), command.name
        for example in examples:
            parse(shlex.split(example)[1:])


def walk(command) -> Iterator[typer.core.TyperCommand]:
    yield command
    for inner in getattr(command, "commands", {}).values():
        yield from walk(inner)
