"""The configuration of a run: one schema for TOML, flags, help and docs."""

from pdvit.config.duration import Duration, parse_duration
from pdvit.config.load import build, parse_set, read_toml, to_dict, to_toml
from pdvit.config.resolve import resolve
from pdvit.config.schema import Config

__all__ = ["Config", "Duration", "build", "parse_duration", "parse_set", "read_toml", "resolve", "to_dict", "to_toml"]
