"""TOML, flags and --set to one checked `Config`, and back. `python -m pdvit.config.load` prints the docs' table."""

import math
import tomllib
import types
from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, Union, get_args, get_origin, get_type_hints

from pdvit.config.duration import parse_duration
from pdvit.config.schema import Config, KeyInfo, info_of
from pdvit.errors import UserError, closest

# A table of configuration files that pdvit.sweep reads.
SWEEP_SECTION = "sweep"
# run.toml leaves them out, so that the same recipe can run elsewhere.
_PLACES = {("run", "out"), ("run", "name")}
_TYPE_NAMES = {int: "a whole number", float: "a number", str: "a text", bool: "true or false", dict: "a table"}


def sections() -> dict[str, type]:
    """Return the section classes by TOML table name."""
    return get_type_hints(Config)


def read_toml(path: Path) -> dict[str, Any]:
    """Read a configuration file; raises UserError if it is missing or not TOML."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"the configuration can't be read: {error.strerror}", str(path), "check --config") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        tip = "see docs/train.md for an example"
        raise UserError(f"the configuration is not TOML: {error}", str(path), tip) from error


def parse_set(text: str, flag: str = "--set") -> dict[str, Any]:
    """Parse `section.key=value` of a flag; the value is TOML, else plain text."""
    name, separator, value = text.partition("=")
    section, dot, item = name.strip().partition(".")
    if not (separator and dot and section and item):
        raise UserError(f"'{text}' is not section.key=value", flag, f"for example {flag} optim.lr=1e-3")
    try:
        parsed = tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        parsed = value.strip()
    return {section: {item: parsed}}


def build(*layers: tuple[str, Mapping[str, Any]]) -> Config:
    """Merge layers of {section: {key: value}}, later ones first, into a checked `Config`.

    Each layer has a name for errors. Raises UserError for unknown sections and keys, wrong types and values out of
    range.
    """
    config, known = Config(), sections()
    for where, layer in layers:
        for section, values in layer.items():
            if section not in known:
                raise UserError(f"there is no section '{section}'", where, _section_tip(section, values, known))
            if not isinstance(values, Mapping):
                raise UserError(f"'{section}' is a section, not a key", where, f"write {section}.KEY = VALUE")
            changes = {name: _check(section, known[section], name, value, where) for name, value in values.items()}
            config = replace(config, **{section: replace(getattr(config, section), **changes)})
    ranges = {"augment.scale": config.augment.scale, "augment.ratio": config.augment.ratio}
    for name, bounds in (ranges | {"segment.jitter": config.segment.jitter}).items():
        if bounds is not None and bounds[0] > bounds[1]:
            raise UserError(f"the minimum, {bounds[0]:g}, is above the maximum, {bounds[1]:g}", name, "swap the two")
    return config


def _section_tip(section: str, value: Any, known: Mapping[str, type]) -> str:
    """Return a tip for an unknown section, which may be a key without its section (`lr = 1`)."""
    if section == SWEEP_SECTION:
        return "write it in the file that --config names (see docs/sweep.md)"
    for name, cls in known.items():
        if not isinstance(value, Mapping) and section in get_type_hints(cls):
            return f"'{section}' belongs to a section: write {name}.{section}"
    return closest(section, [*known, SWEEP_SECTION])


def _check(section: str, cls: Any, name: str, value: Any, where: str) -> Any:
    """Return the value of a key with the key's type, checked."""
    items, at = cls.__dataclass_fields__, f"{section}.{name} ({where})"
    if name not in items:
        raise UserError(f"there is no key '{section}.{name}'", where, closest(name, items))
    info = info_of(items[name])
    if isinstance(value, str) and value in info.words:
        return info.words[value]
    value = _convert(value, get_type_hints(cls)[name], info, at)
    for number in value if isinstance(value, tuple) else (value,):
        _check_range(number, info, at)
    return value


def _convert(value: Any, hint: Any, info: KeyInfo, at: str) -> Any:
    """Return the value as the type `hint`; whole numbers serve as floats and texts, numbers as durations."""
    options = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    hint = next(option for option in options if option is not type(None))
    origin = get_origin(hint) or hint
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if info.unit and (is_number or isinstance(value, str)):
        length = parse_duration(str(value), info.unit, at, info.percent, info.clock)
        _check_range(length.value, info, at)
        return str(value)
    if origin is float and is_number:
        return float(value)
    if origin is str and is_number and isinstance(value, int):
        return str(value)
    if origin is tuple and isinstance(value, list | tuple) and len(value) == len(get_args(hint)):
        return tuple(_convert(part, kind, info, at) for part, kind in zip(value, get_args(hint), strict=True))
    if origin is dict and isinstance(value, Mapping):
        return dict(value)
    if origin in (int, str, bool) and isinstance(value, origin) and isinstance(value, bool) == (origin is bool):
        return value
    name = f"a list of {len(get_args(hint))} numbers" if origin is tuple else _TYPE_NAMES[origin]
    raise UserError(f"{value!r} is not {name}", at, info.help)


def _check_range(value: Any, info: KeyInfo, at: str) -> None:
    if info.choices and value not in info.choices:
        raise UserError(f"'{value}' is not a choice", at, closest(str(value), info.choices))
    if isinstance(value, bool) or not isinstance(value, int | float):
        return
    too_low = (info.minimum is not None and value < info.minimum) or (info.above is not None and value <= info.above)
    if not math.isfinite(value) or too_low or (info.maximum is not None and value > info.maximum):
        raise UserError(f"{value} is out of range", at, f"it must be {_describe_range(info) or 'finite'}")


def _describe_range(info: KeyInfo) -> str:
    low = f"above {info.above:g}" if info.above is not None else ""
    low = f"at least {info.minimum:g}" if info.minimum is not None else low
    high = f"at most {info.maximum:,}" if info.maximum is not None else ""
    return " and ".join(part for part in (low, high) if part)


def to_dict(config: Config) -> dict[str, dict[str, Any]]:
    """Return the set values by section, without run.out and run.name."""
    table: dict[str, dict[str, Any]] = {}
    for section, cls in sections().items():
        values = {item.name: getattr(getattr(config, section), item.name) for item in fields(cls)}
        table[section] = {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in values.items()
            if value is not None and (section, name) not in _PLACES
        }
    return table


def to_toml(config: Config, command: str) -> str:
    """Return the configuration as TOML that repeats the run, with `command` in a comment."""
    import tomli_w

    one_line = "".join(letter if letter.isprintable() else " " for letter in command)
    return f"# {one_line}\n# repeat this run: pdvit train --config run.toml\n\n{tomli_w.dumps(to_dict(config))}"


def markdown_table() -> str:
    """Return every key with its flag, default, range and help, as Markdown."""
    lines = ["| key | flag | default | allowed | |", "| --- | --- | --- | --- | --- |"]
    for section, cls in sections().items():
        for item in fields(cls):
            info, value = info_of(item), item.default
            flags = ", ".join(f"`{flag}`" for flag in info.flags)
            default = "" if value is None else f"`{list(value) if isinstance(value, tuple) else value}`"
            allowed = ", ".join(info.choices) or _describe_range(info)
            lines.append(f"| `{section}.{item.name}` | {flags} | {default} | {allowed} | {info.help} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(markdown_table())
