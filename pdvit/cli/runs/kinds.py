"""The kinds of tasks. Which one a run is stands in its configuration, so every command that trains has all of them."""

from pdvit.cli.runs.classification import CLASSIFICATION
from pdvit.cli.runs.command import Kind
from pdvit.cli.runs.segmentation import SEGMENTATION
from pdvit.config.schema import Config


def kind_of(config: Config) -> Kind:
    """Return what a configuration asks for: with a head for every pixel segmentation, else classification."""
    return CLASSIFICATION if config.segment.head is None else SEGMENTATION
