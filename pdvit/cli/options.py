"""Options of the commands that train: those of a run, and one for each key of the configuration that has a flag."""

import inspect
import types
from collections.abc import Callable, Mapping
from dataclasses import Field, dataclass, fields
from pathlib import Path
from typing import Annotated, Any, Union, get_args, get_origin, get_type_hints

import typer

from pdvit.config.load import build, parse_set, read_toml, sections
from pdvit.config.schema import Config, info_of
from pdvit.errors import UserError

# Values by section and key.
Layer = Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True)
class RunOptions:
    """The options of a run beside its settings."""

    config: Annotated[Path | None, typer.Option("--config", "-c", help="TOML file with any settings.")] = None
    assign: Annotated[
        list[str] | None,
        typer.Option("--set", help="section.key=value; overrides files and flags; repeatable."),
    ] = None
    cells: Annotated[
        str | None,
        typer.Option("--cells", help="Of a sweep, run only these cells: 3-7 or 1,4,9-; failed; list prints all."),
    ] = None
    resume: Annotated[
        str | None,
        typer.Option("--resume", help="Resume this run with its saved configuration; auto: the newest run."),
    ] = None
    change: Annotated[
        list[str] | None,
        typer.Option("--change", help="With --resume: section.key=value, resume with another setting; repeatable."),
    ] = None
    replay: Annotated[
        Path | None,
        typer.Option("--replay", help="Run the non-finite step of this run again and print where it broke."),
    ] = None
    as_json: Annotated[bool, typer.Option("--json", help="Print only the summary, as JSON.")] = False


def training_command(command: Callable[..., Any], defaults: Layer | None = None) -> Callable[..., Any]:
    """Replace the `**values` of a command by the fields of `RunOptions` and the flags of the configuration.

    A flag of the configuration arrives as `section_key`. The help shows `defaults`, which are the command's own.
    """
    hints = get_type_hints(command, include_extras=True) | get_type_hints(RunOptions, include_extras=True)
    own = [item for item in inspect.signature(command).parameters.values() if item.kind is not item.VAR_KEYWORD]
    of_run = inspect.signature(RunOptions).parameters.values()
    named = [item.replace(kind=item.KEYWORD_ONLY, annotation=hints[item.name]) for item in (*own, *of_run)]
    of_config = [
        _option(section, item, (defaults or {}).get(section, {}))
        for section, cls in sections().items()
        for item in fields(cls)
        if info_of(item).flags
    ]
    parameters = [*named, *of_config]
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {item.name: item.annotation for item in parameters}
    return command


def make_config(file: Path | None, assignments: list[str], assigned_by: str = "--set") -> Config:
    """Return a file with assignments (of the flag `assigned_by`) over the defaults; raises UserError."""
    return build(*make_layers(file, assignments, {}, assigned_by))


def make_layers(
    file: Path | None,
    assignments: list[str],
    settings: Mapping[str, Any],
    assigned_by: str = "--set",
    defaults: Layer | None = None,
) -> list[tuple[str, Mapping[str, Any]]]:
    """Return the named layers that `build` merges: the command's defaults, the file, the flags, the assignments."""
    layers: list[tuple[str, Mapping[str, Any]]] = [("the command's defaults", defaults or {})]
    if file is not None:
        layers.append((str(file), read_toml(file)))
    layers.append(("the command line", settings_by_section(settings)))
    layers += [(f"{assigned_by} {text}", parse_set(text, assigned_by)) for text in assignments]
    return layers


def merge_layers(layers: list[Layer]) -> dict[str, dict[str, Any]]:
    """Return the layers as one; later layers override earlier ones."""
    merged: dict[str, dict[str, Any]] = {}
    for layer in layers:
        for section, values in layer.items():
            merged[section] = merged.get(section, {}) | dict(values)
    return merged


def settings_by_section(settings: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the given flags by section; flags that were not given are None or an empty list."""
    layer: dict[str, dict[str, Any]] = {}
    for name, value in settings.items():
        if value is None or value == []:
            continue
        section, _, item = name.partition("_")
        info = info_of(sections()[section].__dataclass_fields__[item])  # type: ignore[attr-defined]
        if isinstance(value, str) and value.isdecimal() and info.words:
            value = int(value)  # the flag takes numbers and words
        layer.setdefault(section, {})[item] = _parse_pairs(value) if isinstance(value, list) else value
    return layer


def describe_default(default: Any) -> str:
    """Return the default of a key for its help; empty without one."""
    if default is None:
        return ""
    values = default if isinstance(default, tuple) else (default,)
    return f" (default: {' '.join(str(value) for value in values)})"


def _option(section: str, item: "Field[Any]", defaults: Mapping[str, Any]) -> inspect.Parameter:
    info, cls = info_of(item), sections()[section]
    hint = get_type_hints(cls)[item.name]
    types_of_key = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    option_type = next(option for option in types_of_key if option is not type(None))
    if get_origin(option_type) is dict:
        option_type = list[str]
    if info.words:
        option_type = str
    option = typer.Option(
        *info.flags,
        help=info.help + describe_default(defaults.get(item.name, item.default)),
        show_default=False,  # the option's own default is None: not given
        rich_help_panel=(cls.__doc__ or section).rstrip("."),
        metavar="|".join(info.choices) or None,
    )
    annotation: Any = Annotated[option_type | None, option]
    return inspect.Parameter(
        f"{section}_{item.name}", inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation
    )


def _parse_pairs(texts: list[str]) -> dict[str, Any]:
    """Read repeated k=v flags; values are TOML where possible, else text."""
    pairs: dict[str, Any] = {}
    for text in texts:
        if "=" not in text:
            raise UserError(f"'{text}' is not k=v", "--model-kwargs", "for example --model-kwargs qk_norm=true")
        pairs |= parse_set(f"model.{text}")["model"]
    return pairs
