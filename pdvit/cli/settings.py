"""Flags from the configuration's schema: every key with a flag becomes an option of the command."""

import inspect
import types
from collections.abc import Callable, Mapping
from dataclasses import Field, fields
from pathlib import Path
from typing import Annotated, Any, Union, get_args, get_origin, get_type_hints

import typer

from pdvit.config.keys import KeyInfo, info_of
from pdvit.config.load import build, parse_set, read_toml, sections
from pdvit.config.schema import Config
from pdvit.errors import UserError

# Values by section and key.
Layer = Mapping[str, Mapping[str, Any]]


def with_settings(command: Callable[..., Any], defaults: Layer | None = None) -> Callable[..., Any]:
    """Replace the command's `**settings` by one keyword option for each key that has a flag.

    `defaults` are the command's own, by section and key; the options only say them.
    """
    signature = inspect.signature(command)
    own = [item for item in signature.parameters.values() if item.kind is not item.VAR_KEYWORD]
    added = [
        _option(section, item, (defaults or {}).get(section, {}))
        for section, cls in sections().items()
        for item in fields(cls)
        if info_of(item).flags
    ]
    hints = get_type_hints(command, include_extras=True)
    own = [item.replace(kind=item.KEYWORD_ONLY, annotation=hints[item.name]) for item in own]
    command.__signature__ = signature.replace(parameters=own + added)  # type: ignore[attr-defined]
    command.__annotations__ = {item.name: item.annotation for item in own + added}
    return command


def make_config(
    file: Path | None, assignments: list[str], settings: Mapping[str, Any], assigned_by: str = "--set"
) -> Config:
    """Merge file, flags and assignments (of the flag `assigned_by`) over the defaults, in this order.

    Raises UserError.
    """
    return build(*make_layers(file, assignments, settings, assigned_by))


def make_layers(
    file: Path | None,
    assignments: list[str],
    settings: Mapping[str, Any],
    assigned_by: str = "--set",
    defaults: Layer | None = None,
) -> list[tuple[str, Mapping[str, Any]]]:
    """Return what `build` merges, each with its name; `defaults` are those of the command, over everybody's."""
    layers: list[tuple[str, Mapping[str, Any]]] = [("the command's defaults", defaults or {})]
    if file is not None:
        layers.append((str(file), read_toml(file)))
    layers.append(("the command line", _from_flags(settings)))
    layers += [(f"{assigned_by} {text}", parse_set(text, assigned_by)) for text in assignments]
    return layers


def given_flags(settings: Mapping[str, Any]) -> list[str]:
    """Return the flags that were given."""
    return [
        info_of(item).flags[0]
        for section, keys in _from_flags(settings).items()
        for item in fields(sections()[section])
        if item.name in keys
    ]


def describe_default(default: Any) -> str:
    """Say a key's default, where it has one of its own."""
    if default is None:
        return ""
    values = default if isinstance(default, tuple) else (default,)
    return f" (default: {' '.join(str(value) for value in values)})"


def _option(section: str, item: "Field[Any]", defaults: Mapping[str, Any]) -> inspect.Parameter:
    info, cls = info_of(item), sections()[section]
    hint = get_type_hints(cls)[item.name]
    options = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    kind = next(option for option in options if option is not type(None))
    if get_origin(kind) is dict:
        kind = list[str]
    if info.words:
        kind = str
    option = typer.Option(
        *info.flags,
        help=info.help + describe_default(defaults.get(item.name, item.default)),
        show_default=False,  # the option's own default is None: not given
        rich_help_panel=(cls.__doc__ or section).rstrip("."),
        metavar="|".join(info.choices) or None,
    )
    annotation: Any = Annotated[kind | None, option]
    return inspect.Parameter(
        f"{section}_{item.name}", inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation
    )


def _from_flags(settings: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the given flags by section; flags that were not given are None (or an empty list)."""
    layer: dict[str, dict[str, Any]] = {}
    for name, value in settings.items():
        if value is None or value == []:
            continue
        section, _, item = name.partition("_")
        if isinstance(value, str) and value.isdecimal() and _info(section, item).words:
            value = int(value)  # the flag takes texts too
        layer.setdefault(section, {})[item] = _pairs(value) if isinstance(value, list) else value
    return layer


def _info(section: str, item: str) -> KeyInfo:
    return info_of(next(field for field in fields(sections()[section]) if field.name == item))


def _pairs(texts: list[str]) -> dict[str, Any]:
    """Read repeated k=v flags; values are TOML where they can be."""
    pairs: dict[str, Any] = {}
    for text in texts:
        if "=" not in text:
            raise UserError(f"'{text}' is not k=v", "--model-kwargs", "for example --model-kwargs qk_norm=true")
        pairs |= parse_set(f"model.{text}")["model"]
    return pairs
