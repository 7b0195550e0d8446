"""Weights of the terms that change over the steps: they travel with the batches."""

from collections.abc import Generator, Sequence
from contextlib import closing
from dataclasses import replace
from itertools import count

import torch

from pdvit.config.duration import parse_duration
from pdvit.config.schema import Config
from pdvit.config.weights import weight_schedule
from pdvit.data.batch import Batch
from pdvit.losses import TERMS, WeightSchedule


def weight_schedules(config: Config, steps_per_epoch: int, batch_size: int) -> list[WeightSchedule]:
    """Return the schedule of each of `TERMS`, in steps; UserError where one can't be read."""
    total = parse_duration(config.optim.epochs, "ep", "optim.epochs").steps(steps_per_epoch, batch_size)
    schedules = []
    for term in TERMS:
        lengths = weight_schedule(config.diversity, term)
        steps = {name: length.steps(steps_per_epoch, batch_size, total) for name, length in lengths.items()}
        schedules.append(WeightSchedule(total, **steps))
    return schedules


def with_weights(
    batches: Generator[Batch, None, None], schedules: Sequence[WeightSchedule], start: int
) -> Generator[Batch, None, None]:
    """Give the batches of steps start, start + 1, ... the factors of their step.

    As a tensor: a number would be compiled into the step. It is filled on the device, so that nothing waits for a copy.
    """
    with closing(batches):
        for step, batch in zip(count(start), batches, strict=False):
            images, device = len(batch), batch.images.device
            columns = [torch.full((images,), schedule(step), device=device) for schedule in schedules]
            yield replace(batch, weights=torch.stack(columns, 1))
