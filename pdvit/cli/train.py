"""`pdvit train`."""

from typing import Any

from pdvit.cli.runs.kinds import TRAIN
from pdvit.cli.runs.options import AsJson, Assign, Change, File, Replay, Resume, begin
from pdvit.cli.settings import with_settings


@with_settings
def train(
    config: File = None,
    assign: Assign = None,
    resume: Resume = None,
    change: Change = None,
    replay: Replay = None,
    as_json: AsJson = False,
    **settings: Any,
) -> int:
    """Train a vision transformer with the diversity terms.

    Without arguments: a small one on scikit-learn's handwritten digits, with all three terms, in under two minutes.
    """
    return begin(TRAIN, config, assign, resume, change, replay, as_json, settings)
