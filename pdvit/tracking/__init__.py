"""What a run leaves behind: its directory, its records, its surroundings."""

from pdvit.tracking.environment import command_line, describe_environment
from pdvit.tracking.files import sync, to_json, write_file
from pdvit.tracking.run_directory import RUNS, RunDirectory, Status, newest

__all__ = [
    "RUNS",
    "RunDirectory",
    "Status",
    "command_line",
    "describe_environment",
    "newest",
    "sync",
    "to_json",
    "write_file",
]
