"""TOML, flags and --set to one checked `Config`, and back."""

import math
import tomllib
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args, get_origin

from pdvit.config.duration import parse_duration
from pdvit.config.schema import KEYS, SECTIONS, Config, Key
from pdvit.errors import UserError, closest
from pdvit.files import read_text, reading

RESTORE = "restore it from state.json of a checkpoint, which has its values under config"  # run.toml
SWEEP_SECTION = "sweep"  # a table of configuration files that pdvit.sweep reads
PLACES = ("run.out", "run.name", "launch.")  # run.toml leaves them out, so that the same recipe can run elsewhere
_TYPE_NAMES = {int: "a whole number", float: "a number", str: "a text", bool: "true or false", dict: "a table"}


def read_toml(path: Path, tip: str = "check --config; docs/settings.md has an example") -> dict[str, Any]:
    """Read a configuration file; raises UserError if it is missing or not TOML."""
    with reading(path, tip, "the configuration can't be read"):
        return tomllib.loads(read_text(path))


def parse_set(text: str, flag: str = "--set") -> dict[str, Any]:
    """Parse `section.key=value` of a flag; the value is TOML, else plain text."""
    name, separator, value = text.partition("=")
    section, dot, item = name.strip().partition(".")
    if not (separator and dot and section and item):
        raise UserError(f"'{text}' is not section.key=value", flag, f"for example {flag} optim.lr=1e-3")
    try:
        parsed = tomllib.loads(f"value = {value}")["value"]
    except (ValueError, RecursionError):
        parsed = value.strip()
    return {section: {item: parsed}}


def build(*layers: tuple[str, Mapping[str, Any]]) -> Config:
    """Merge layers of {section: {key: value}}, named for errors, into a checked `Config`; later layers override."""
    config = Config()
    for where, layer in layers:
        for section, values in layer.items():
            if section not in SECTIONS:
                tip = closest(section, [*SECTIONS, SWEEP_SECTION])
                if section == SWEEP_SECTION:
                    tip = "write it in the file that --config names (see docs/sweep.md)"
                elif names := [name for name in KEYS if name.endswith(f".{section}")]:
                    tip = f"'{section}' belongs to a section: write {names[0]}"
                raise UserError(f"there is no section '{section}'", where, tip)
            if not isinstance(values, Mapping):
                raise UserError(f"'{section}' is a section, not a key", where, f"write {section}.KEY = VALUE")
            changes = {}
            for name, value in values.items():
                key = KEYS.get(f"{section}.{name}")
                if key is None:
                    tip = closest(name, SECTIONS[section].__dataclass_fields__, folder=f"{section}.")
                    raise UserError(f"there is no key '{section}.{name}'", where, tip)
                changes[name] = _convert(value, key.type, key, f"{section}.{name} ({where})")
            config = replace(config, **{section: replace(getattr(config, section), **changes)})
    return config


def _convert(value: Any, hint: Any, key: Key, at: str) -> Any:
    """Return the value as the type `hint`, checked; whole numbers serve as floats and texts, numbers as durations."""
    origin = get_origin(hint) or hint
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if isinstance(value, str) and value in key.words:
        return key.words[value]
    if isinstance(value, int) and value.bit_length() > 64:
        raise UserError(f"a whole number of {value.bit_length()} bits is out of range", at, key.help)
    number: float | None = None
    if origin is tuple and isinstance(value, list | tuple) and len(value) == len(get_args(hint)):
        parts = tuple(_convert(part, type_, key, at) for part, type_ in zip(value, get_args(hint), strict=True))
        if len(parts) == 2 and parts[0] > parts[1]:
            raise UserError(f"the minimum, {parts[0]:g}, is above the maximum, {parts[1]:g}", at, "swap the two")
        return parts
    if key.unit and (is_number or isinstance(value, str)):
        value = str(value)
        number = parse_duration(value, key.unit, at, key.percent, key.clock).value
    elif (origin is float and is_number) or (origin is str and is_number and isinstance(value, int)):
        value = origin(value)
    elif origin is dict and isinstance(value, Mapping):
        return dict(value)
    elif not (origin in _TYPE_NAMES and isinstance(value, origin) and isinstance(value, bool) == (origin is bool)):
        name = f"a list of {len(get_args(hint))} numbers" if origin is tuple else _TYPE_NAMES[origin]
        raise UserError(f"{value!r} is not {name}", at, key.help)
    if key.choices and value not in key.choices:
        raise UserError(f"'{value}' is not a choice", at, closest(value, key.choices))
    if number is None and origin in (int, float):
        number = value
    if number is not None:
        too_low = (key.minimum is not None and number < key.minimum) or (key.above is not None and number <= key.above)
        if not math.isfinite(number) or too_low or (key.maximum is not None and number > key.maximum):
            raise UserError(f"{number} is out of range", at, f"it must be {key.describe_range() or 'finite'}")
    return value


def to_dict(config: Config) -> dict[str, dict[str, Any]]:
    """Return the set values by section, without run.out, run.name and [launch]."""
    table: dict[str, dict[str, Any]] = {section: {} for section in SECTIONS if section != "launch"}
    for name, key in KEYS.items():
        value = getattr(getattr(config, key.section), key.name)
        if value is not None and not name.startswith(PLACES):
            word = next((word for word, number in key.words.items() if number == value), None)
            table[key.section][key.name] = word or (list(value) if isinstance(value, tuple) else value)
    return table


def to_toml(config: Config, command: str) -> str:
    """Return the configuration as TOML that repeats the run, with `command` in a comment."""
    import tomli_w

    one_line = "".join(letter if letter.isprintable() else " " for letter in command)
    return f"# {one_line}\n# repeat this run: pdvit train --config run.toml\n\n{tomli_w.dumps(to_dict(config))}"
