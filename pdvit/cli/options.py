"""Options: a flag for each key of the configuration that has one, and those of the commands that open a checkpoint."""

import inspect
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, get_origin, get_type_hints

import typer

from pdvit.config.load import parse_set
from pdvit.config.recipes import Layer, NamedLayer, merge_layers
from pdvit.config.schema import KEYS, OF_CHECKPOINTS, SECTIONS, Config, Key
from pdvit.errors import UserError, command
from pdvit.tracking.run_directory import newest

NAMES, WIDTH = 30, 100  # letters of the help: the column of names, a line
ACCENTED = re.compile(r"^[^\s,]+|(?<= )--\S+")  # names of options, arguments and commands
KEYWORDS = {"model": "qk_norm=true", "launch": "qos=high"}  # examples of k=v by section


class _Help:  # sections without frames, one accent colour; typer's own panels need rich, which takes 0.1 s
    def collect_usage_pieces(self, ctx: typer.Context) -> list[str]:
        pieces: list[str] = super().collect_usage_pieces(ctx)  # type: ignore[misc]
        return [piece.replace("{", "").replace("}", "") for piece in pieces]

    def format_options(self, ctx: typer.Context, formatter: Any) -> None:
        sections: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):  # type: ignore[attr-defined]
            if parameter.param_type_name == "argument":
                sections.setdefault("Arguments", []).append((parameter.metavar, parameter.get_help_record(ctx)[1]))
            else:
                title = parameter.rich_help_panel or "Options"
                sections.setdefault(title, []).append(parameter.get_help_record(ctx))
        width = min(NAMES, max(len(name) for records in sections.values() for name, _ in records))
        sections = {title: [(f"{name:{width}}", text) for name, text in rows] for title, rows in sections.items()}
        if isinstance(self, Group):
            commands = [(name, self.commands[name].get_short_help_str(WIDTH)) for name in self.commands]
            sections = {"Commands": commands} | sections
        for title, records in sections.items():
            with formatter.section(title):
                formatter.write_dl([(ACCENTED.sub(_accent, name), text) for name, text in records])

    def format_epilog(self, ctx: typer.Context, formatter: Any) -> None:
        if self.epilog:  # type: ignore[attr-defined]
            with formatter.section("Examples"):
                formatter.write_text(f"\b\n{self.epilog}")  # type: ignore[attr-defined]


class Command(_Help, typer.core.TyperCommand):  # type: ignore[misc]
    """A command."""


class Group(_Help, typer.core.TyperGroup):  # type: ignore[misc]
    """A command with subcommands."""


def _accent(name: re.Match[str]) -> str:
    return name[0] if os.environ.get("NO_COLOR") else typer.style(name[0], fg="cyan")


def add_command(
    app: typer.Typer, *examples: str, name: str | None = None, help: str | None = None
) -> Callable[..., Any]:
    """Add a command whose help ends with examples."""
    return app.command(name, help=help, epilog="\n".join(examples), cls=Command)


def timm_models() -> list[str]:
    """Return the names of timm's models that pdvit can read, for completion; it imports timm, which takes seconds."""
    from pdvit.models.build import readable_models

    return readable_models()


def training_command(
    command: Callable[..., Any], launch: Callable[..., int], defaults: Layer | None = None
) -> Callable[..., Any]:
    """Replace `**values` of a command by the options of `launch` and a flag `section_key` for each key that has one."""
    of_run = [item for item in inspect.signature(launch).parameters.values() if item.kind is item.KEYWORD_ONLY]
    hints = get_type_hints(launch, include_extras=True)
    named = [item.replace(annotation=hints[item.name]) for item in of_run]
    return _with_options(command, *named, *(_option(key, defaults or {}) for key in KEYS.values() if key.flags))


# Settings of the commands that open a checkpoint: of the whole command, and those with which the model is opened.
OPENING = ("data.batch_size", "data.workers", "data.on_bad_image", *OF_CHECKPOINTS, "run.device")
WEIGHTS: dict[str, Any] = {
    "model": Annotated[
        str | None, typer.Option(autocompletion=timm_models, help="timm model name, if the file has none.")
    ],
    "weights": Annotated[str | None, typer.Option(help="raw or ema, if a file holds both; unset: ema.")],
}


def checkpoint_command(command: Callable[..., Any], more: Sequence[str] = (), **defaults: Any) -> Callable[..., Any]:
    """Replace `**opening` of a command by WEIGHTS and a flag `section_key` for each setting in OPENING and `more`.

    Unset, without a default, they are those of the checkpoint's run.
    """
    kind, defaults = inspect.Parameter.KEYWORD_ONLY, {"run_device": "auto"} | defaults
    options = [inspect.Parameter(name, kind, default=None, annotation=WEIGHTS[name]) for name in WEIGHTS]
    for key in map(KEYS.__getitem__, (*OPENING, *more)):
        default = defaults.get(f"{key.section}_{key.name}")
        text = re.sub("; unset: .*", "; unset: the run's.", key.help)
        text = "Images per pass." if key.name == "batch_size" else text
        option = _option(replace(key, default=default, help=text, words={}), {})  # here a batch can't be auto
        options.append(option.replace(default=default))
    return _with_options(command, *options)


def opening_arguments(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values of `checkpoint_command` as arguments of `open_checkpoint`; raises UserError."""
    weights = {name: values[name] for name in WEIGHTS}
    ((_, layer),) = make_layers({name: value for name, value in values.items() if name not in WEIGHTS})
    return weights | {"given": layer}


def _with_options(command: Callable[..., Any], *options: inspect.Parameter) -> Callable[..., Any]:
    hints = get_type_hints(command, include_extras=True)
    own = [item for item in inspect.signature(command).parameters.values() if item.kind is not item.VAR_KEYWORD]
    named = [item.replace(kind=item.KEYWORD_ONLY, annotation=hints[item.name]) for item in own]
    parameters = [*named, *options]
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {item.name: item.annotation for item in parameters}
    return command


def _option(key: Key, defaults: Layer) -> inspect.Parameter:
    default = defaults.get(key.section, {}).get(key.name, key.default)
    values, name = default if isinstance(default, tuple) else (default,), f"{key.section}_{key.name}"
    shown = " ".join(f"{value:g}" if isinstance(value, float) else str(value) for value in values)
    words = get_origin(key.type) is dict
    shape = "k=v" if words else " ".join(["<float>"] * str(key.type).count("float"))
    option = typer.Option(
        *key.flags,
        help=key.help if default is None or default is False or not shown else f"{key.help} (default: {shown})",
        show_default=False,  # the option's own default, None, means that the flag is not given
        rich_help_panel=SECTIONS[key.section].__doc__.rstrip("."),
        metavar="|".join(key.choices) or shape or None,
        autocompletion=timm_models if name == "model_name" else lambda: key.choices or key.examples,
    )
    option_type: Any = str if key.words else list[str] if words else key.type
    annotation = Annotated[option_type | None, option]
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)


def make_layers(values: Mapping[str, Any], assignments: Sequence[str] = ()) -> list[NamedLayer]:
    """Return the layers of the command line for `build`: flags (`section_key`; None or [] if not given), and --set."""
    flags: dict[str, dict[str, Any]] = {}
    for name, value in values.items():
        if value is None or value == []:
            continue
        section, _, item = name.partition("_")
        if isinstance(value, list):
            for text in value:
                if "=" not in text:
                    flag = KEYS[f"{section}.{item}"].flags[0]
                    raise UserError(f"'{text}' is not k=v", flag, f"for example {flag} {KEYWORDS[section]}")
            value = merge_layers(parse_set(f"{section}.{text}") for text in value)[section]
        elif isinstance(value, str) and value.isdecimal() and name == "data_batch_size":
            value = int(value)  # the flag takes numbers and words
        flags.setdefault(section, {})[item] = value
    return [("the command line", flags), *((f"--set {text}", parse_set(text)) for text in assignments)]


def check_initial_weights(config: Config) -> None:
    """Raise UserError without a checkpoint to start from."""
    if config.model.init is None:
        runs = newest("model.safetensors")
        example = f"for example {command('finetune', runs[0])}" if runs else f"or train one first: {command('train')}"
        raise UserError("no checkpoint to start from", "CKPT", f"name a run, a file or a model of timm, {example}")


def results_folder(path: Path, out: Path | None, prefix: str) -> Path:
    """Return the folder for results: `out`, the checkpoint's own, or runs/PREFIX-NAME; UserError if not writable."""
    from pdvit.models.checkpoints import name_of

    folder = out or (path if path.is_dir() else Path("runs") / f"{prefix}-{name_of(path)}")
    there = next(place for place in (folder.absolute(), *folder.absolute().parents) if os.path.lexists(place))
    if not (os.path.isdir(there) and os.access(there, os.W_OK | os.X_OK)):
        what = f"the results can't be written: {there} is not a folder, or not writable"
        raise UserError(what, str(folder), "choose another --out")
    return folder
