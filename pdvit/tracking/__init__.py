"""What a run leaves behind: its directory, its records, its surroundings."""

from pdvit.tracking.environment import command_line, describe_environment
from pdvit.tracking.files import hold, new_file, sync, to_json, write_file, writing
from pdvit.tracking.run_directory import RUNS, RunDirectory, Status, newest
from pdvit.tracking.sinks import Sink, Sinks, check_sinks, open_sinks, tracker_names

__all__ = [
    "RUNS",
    "RunDirectory",
    "Sink",
    "Sinks",
    "Status",
    "check_sinks",
    "command_line",
    "describe_environment",
    "hold",
    "new_file",
    "newest",
    "open_sinks",
    "sync",
    "to_json",
    "tracker_names",
    "write_file",
    "writing",
]
