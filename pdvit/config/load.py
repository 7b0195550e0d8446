"""TOML, flags and --set to one checked `Config`, and back to TOML."""

import math
import tomllib
import types
from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, Union, get_args, get_origin, get_type_hints

from pdvit.config.duration import parse_duration
from pdvit.config.keys import KeyInfo, info_of
from pdvit.config.schema import Config
from pdvit.errors import UserError, closest

# A section of files: pdvit.sweep takes it out before the rest is read here.
SWEEP_SECTION = "sweep"
# What run.toml leaves out, so that the same recipe can be run again somewhere else.
_PLACES = {("run", "out"), ("run", "name")}


def sections() -> dict[str, type]:
    """Return the section classes by TOML table name."""
    return get_type_hints(Config)


def read_toml(path: Path) -> dict[str, Any]:
    """Read a configuration file; UserError where it is missing or not TOML."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"the configuration can't be read: {error.strerror}", str(path), "check --config") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(
            f"the configuration is not TOML: {error}", str(path), "see docs/train.md for an example"
        ) from error


def parse_set(text: str, flag: str = "--set") -> dict[str, Any]:
    """Read one `section.key=value` that `flag` was given; the value is TOML, and plain text where it is not."""
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
    """Merge named layers of {section: {key: value}}, later ones first, into a checked `Config`.

    The name of a layer is where an error points to. Raises UserError for an unknown section or key, a wrong type and a
    value out of range.
    """
    config, known = Config(), sections()
    for where, layer in layers:
        for section, values in layer.items():
            if section not in known:
                raise UserError(f"there is no section '{section}'", where, _tip(section, [*known], values, known))
            if not isinstance(values, Mapping):
                raise UserError(f"'{section}' is a section, not a key", where, f"write {section}.KEY = VALUE")
            current = getattr(config, section)
            changes = {name: _check(section, name, value, where) for name, value in values.items()}
            config = replace(config, **{section: replace(current, **changes)})
    augment, segment = config.augment, config.segment
    ends = {"augment.scale": augment.scale, "augment.ratio": augment.ratio, "segment.jitter": segment.jitter}
    for name, (low, high) in ((name, pair) for name, pair in ends.items() if pair is not None):
        if low > high:
            raise UserError(f"the least, {low:g}, is above the most, {high:g}", name, "swap the two")
    return config


def _tip(section: str, names: list[str], value: Any, known: Mapping[str, type]) -> str:
    """Point from a key without its section (`lr = 1`) to the section that has it, and from [sweep] to its file."""
    if section == SWEEP_SECTION:
        return "write it in the file that --config names (see docs/sweep.md)"
    for name, cls in known.items():
        if not isinstance(value, Mapping) and section in get_type_hints(cls):
            return f"'{section}' belongs to a section: write {name}.{section}"
    return closest(section, [*names, SWEEP_SECTION])


def _check(section: str, name: str, value: Any, where: str) -> Any:
    cls = sections()[section]
    by_name = {item.name: item for item in fields(cls)}
    at = f"{section}.{name} ({where})"
    if name not in by_name:
        raise UserError(f"there is no key '{section}.{name}'", where, closest(name, by_name))
    info = info_of(by_name[name])
    if isinstance(value, str) and value in info.words:
        return info.words[value]
    value = _convert(value, get_type_hints(cls)[name], info, at)
    for number in value if isinstance(value, tuple) else (value,):
        _check_range(number, info, at)
    return value


def _convert(value: Any, kind: Any, info: KeyInfo, at: str) -> Any:
    """Return `value` as `kind`, or raise UserError; whole numbers serve as floats, numbers as durations."""
    options = get_args(kind) if get_origin(kind) in (Union, types.UnionType) else (kind,)
    kind = next(option for option in options if option is not type(None))
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if info.unit and (is_number or isinstance(value, str)):
        length = parse_duration(str(value), info.unit, at, info.percent, info.clock)
        _check_range(length.value, info, at)
        return str(value)
    if kind is float and is_number:
        return float(value)
    if info.number and isinstance(value, int) and is_number:
        return str(value)
    if get_origin(kind) is tuple and isinstance(value, list | tuple):
        parts = get_args(kind)
        if len(value) == len(parts):
            return tuple(_convert(v, part, info, at) for v, part in zip(value, parts, strict=True))
    if get_origin(kind) is dict and isinstance(value, Mapping):
        return dict(value)
    if kind in (int, str, bool) and isinstance(value, kind) and isinstance(value, bool) == (kind is bool):
        return value
    raise UserError(f"{value!r} is not {_describe(kind)}", at, info.help)


def _describe(kind: Any) -> str:
    names = {int: "a whole number", float: "a number", str: "a text", bool: "true or false"}
    if get_origin(kind) is tuple:
        return f"a list of {len(get_args(kind))} numbers"
    return names.get(kind, "a table")


def _check_range(value: Any, info: KeyInfo, at: str) -> None:
    if info.choices and value not in info.choices:
        raise UserError(f"'{value}' is not known here", at, closest(str(value), info.choices))
    if isinstance(value, bool) or not isinstance(value, int | float):
        return
    too_low = (info.minimum is not None and value < info.minimum) or (info.above is not None and value <= info.above)
    if not math.isfinite(value) or too_low or (info.maximum is not None and value > info.maximum):
        raise UserError(f"{value} is out of range", at, f"it must be {describe_range(info)}")


def describe_range(info: KeyInfo) -> str:
    """Say a key's range in words: `at least 0 and at most 1`."""
    low = f"above {info.above:g}" if info.above is not None else ""
    low = f"at least {info.minimum:g}" if info.minimum is not None else low
    high = f"at most {info.maximum:,}" if info.maximum is not None else ""
    return " and ".join(part for part in (low, high) if part) or "finite"


def to_dict(config: Config) -> dict[str, dict[str, Any]]:
    """Return the set values by section, without run.out and run.name."""
    table: dict[str, dict[str, Any]] = {}
    for section in sections():
        part = getattr(config, section)
        values = {item.name: getattr(part, item.name) for item in fields(part)}
        table[section] = {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in values.items()
            if value is not None and (section, name) not in _PLACES
        }
    return table


def to_toml(config: Config, command: str) -> str:
    """Write the resolved configuration as TOML that repeats the run; `command` stands in a comment."""
    import tomli_w

    one_line = "".join(letter if letter.isprintable() else " " for letter in command)
    head = f"# {one_line}\n# repeat this run: pdvit train --config run.toml\n\n"
    return head + tomli_w.dumps(to_dict(config))
