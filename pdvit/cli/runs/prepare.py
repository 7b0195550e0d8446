"""Preparing a run: the data, the task, the trainer; everything that can fail before there is a directory."""

import os
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

from pdvit.cli.runs.command import Command, Kind
from pdvit.cli.runs.report import make_console, say
from pdvit.config.schema import Config
from pdvit.data.kinds import refuse_idle, whole_path
from pdvit.errors import UserError

if TYPE_CHECKING:
    import torch

    from pdvit.data.sources import Source
    from pdvit.engine.display import RunConsole
    from pdvit.engine.distributed import Ranks
    from pdvit.engine.trainer import Trainer


@dataclass(frozen=True)
class Prepared:
    """Everything that a run needs, before it has a directory."""

    command: Command
    kind: Kind
    config: Config
    ranks: "Ranks"
    device: str
    trainer: "Trainer"
    console: "RunConsole"
    as_json: bool

    def load(self) -> None:
        """Bring the data where the steps find them, and say where that is; raises UserError."""
        self.trainer.task.load(partial(say, self.console))


def prepare(command: Command, config: Config, as_json: bool, begun: bool = False) -> Prepared:
    """Open the data, build task and trainer, and say what is trained; raises UserError.

    A run that has `begun` takes its weights from its own checkpoint, and needs the file of `model.init` no more.
    """
    console, initial = make_console(as_json), None
    say(console, f"opening {config.data.source} ...")  # what comes now can take minutes: imports, many files, weights
    from pdvit.config import resolve
    from pdvit.config.idle import idle_settings
    from pdvit.config.resolve import with_crop
    from pdvit.engine.device import choose_device, device_name, set_up
    from pdvit.engine.distributed import init_process_group
    from pdvit.engine.trainer import Trainer
    from pdvit.models.description import describe
    from pdvit.models.initial import begin, settle
    from pdvit.tracking import check_sinks, tracker_names

    if config.model.init is not None and not begun:
        say(console, f"reading {config.model.init} ...")
        initial = describe(config.model.init, config.model.name, config.model.weights)
        config = settle(with_crop(config), initial)
    config = resolve(config) if config.data.batch_size else config
    ranks = init_process_group()
    device = choose_device(config.run.device, ranks.local_rank if ranks.world_size > 1 else None)
    set_up(device, config.run)
    if ranks.main:
        check_sinks(tracker_names(config.run.track))
    kind = command.kind_of(config)
    source = kind.open_source(config, lambda text: say(console, text))
    if not begun:
        refuse_idle(config.data)
    source = _checked(source, config, ranks, console)
    if not config.data.batch_size:
        size = _batch_that_fits(kind, config, source, device, ranks)
        config = resolve(replace(config, data=replace(config.data, batch_size=size)))
    config = _from_anywhere(kind.settle(config, ranks.world_size, device))
    task = kind.make_task(config, source, device, ranks)
    begun_from = [] if initial is None else begin(task.module, initial, source.classes)
    trainer = Trainer(task, config, device, ranks)
    processes = f" x {ranks.world_size} processes" if ranks.world_size > 1 else ""
    length = f"{trainer.plan.steps} steps of {task.batch_size} images on {device_name(device)}{processes}"
    say(console, f"{source.describe()}\n{kind.describe(config, task)}; {length}")
    idle = [f"note: {setting}" for setting in idle_settings(config)]
    for note in [*begun_from, *trainer.notes(), *idle]:
        say(console, note)
    return Prepared(command, kind, config, ranks, device_name(device), trainer, console, as_json)


def _from_anywhere(config: Config) -> Config:
    """Return the configuration with whole paths, so that the run can be resumed and analyzed from anywhere."""
    data = config.data
    source = whole_path(data.source)
    root = None if data.root is None else os.path.abspath(os.path.expanduser(data.root))
    return replace(config, data=replace(data, source=source, root=root))


def _checked(source: "Source", config: Config, ranks: "Ranks", console: "RunConsole") -> "Source":
    """Read images and masks: all where that is asked for, always the masks held out; every process its share.

    Raises UserError where images do not decode and are not to be skipped, and for masks that can't be used.
    """
    from pdvit.data.check import check_images
    from pdvit.data.masks.check import check_masks

    skip, workers, share = config.data.on_bad_image == "skip", config.data.workers, (ranks.rank, ranks.world_size)
    if config.data.check_images:
        say(console, "checking all images ...")
        source = check_images(source, skip, workers, lambda text: say(console, text), share, ranks.all_gather)
    if config.segment.head is not None and config.data.source != "scenes":
        every = config.segment.check_masks
        say(console, "checking all masks ..." if every else "checking the masks that are held out ...")
        source = check_masks(source, every, workers, lambda text: say(console, text), share, ranks.all_gather)
    return source


def _batch_that_fits(kind: Kind, config: Config, source: "Source", device: "torch.device", ranks: "Ranks") -> int:
    """Find the largest total batch, a power of two or all images, that the GPUs hold; raises UserError without one."""
    from pdvit.engine.distributed import SINGLE_PROCESS
    from pdvit.engine.memory import largest_batch
    from pdvit.engine.trainer import Trainer

    if device.type == "cpu":
        what = "auto needs a GPU: a CPU that runs out of memory gives no error that can be caught"
        raise UserError(what, "data.batch_size (--batch-size)", "give a number, for example 64")
    trial = trial_of(config)
    # Each process by itself: trials that exchange gradients would wait for one another.
    task = kind.make_task(trial, source, device, SINGLE_PROCESS)
    images = len(source.splits["train"]) // ranks.world_size
    size = largest_batch(Trainer(task, trial, device, SINGLE_PROCESS).updater, task.batches(0), images)
    size = int(min(ranks.all_gather(size))) * ranks.world_size
    if not size:
        raise UserError("not even one image fits", "data.batch_size (--batch-size)", "use a smaller model or image")
    return size


def trial_of(config: Config) -> Config:
    """Return the configuration by which it is tried how many images a GPU holds, resolved: it begins with one."""
    from pdvit.config import resolve

    trial = replace(
        config,
        data=replace(config.data, batch_size=1, micro_batch=None),
        optim=replace(config.optim, lr=config.optim.lr or 1e-3),  # else it would follow the batch of one
        run=replace(config.run, distribute="ddp"),
        segment=replace(config.segment, norm="group"),  # a batch norm can not learn from one image
    )
    return resolve(trial)
