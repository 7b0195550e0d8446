"""The files of runs: directory, environment, trackers."""

from pdvit.tracking.environment import command_line, describe_environment
from pdvit.tracking.run_directory import (
    RUNS,
    RunDirectory,
    Status,
    hold,
    new_file,
    newest,
    sync,
    to_json,
    write_file,
    writing,
)
from pdvit.tracking.trackers import Trackers, tracker_names

__all__ = [
    "RUNS",
    "RunDirectory",
    "Status",
    "Trackers",
    "command_line",
    "describe_environment",
    "hold",
    "new_file",
    "newest",
    "sync",
    "to_json",
    "tracker_names",
    "write_file",
    "writing",
]
