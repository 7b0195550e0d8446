"""`pdvit train`."""

from typing import Any

from pdvit.cli.runs.command import Command
from pdvit.cli.runs.kinds import kind_of
from pdvit.cli.runs.options import AsJson, Assign, Cells, Change, File, Replay, Resume, begin
from pdvit.cli.settings import with_settings


@with_settings
def train(
    config: File = None,
    assign: Assign = None,
    cells: Cells = None,
    resume: Resume = None,
    change: Change = None,
    replay: Replay = None,
    as_json: AsJson = False,
    **settings: Any,
) -> int:
    """Train a vision transformer with the diversity terms.

    Without arguments: a small one on scikit-learn's handwritten digits, with all three terms, in under two minutes.
    """
    return begin(TRAIN, config, assign, cells, resume, change, replay, as_json, settings)


TRAIN = Command("train", kind_of)
