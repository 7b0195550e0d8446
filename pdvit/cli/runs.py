"""A run from its configuration to its summary: build the trainer, start or resume, train, print the result."""

import json
import os
import shlex
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from pdvit.cli.console import log, make_console
from pdvit.cli.options import make_layers, with_change_tips
from pdvit.config.load import build, read_toml
from pdvit.config.schema import Config
from pdvit.data.sources import absolute_path, list_source_types, unused_source_settings
from pdvit.errors import RunFailed, UserError
from pdvit.tasks.summary import describe_summary, usage

if TYPE_CHECKING:
    import torch

    from pdvit.data.sources.split import Source
    from pdvit.engine.distributed import Ranks
    from pdvit.engine.terminal import RunConsole, StopRequest
    from pdvit.engine.trainer import Trainer
    from pdvit.tracking.run_directory import RunDirectory

MAX_BROKEN_NAMES = 5


@dataclass(frozen=True)
class Run:
    """A run that is ready to train.

    Attributes:
        restart: of a run that began before, the settings that changed since, with their new values.
        changes: of a resumed run, the settings that this command changes, old and new.
    """

    command: str
    trainer: "Trainer"
    console: "RunConsole"
    as_json: bool
    directory: "RunDirectory"
    restart: Mapping[str, Any] | None = None
    changes: Mapping[str, tuple[Any, Any]] | None = None


def check_initial_weights(config: Config) -> None:
    """Raise UserError without a checkpoint to start from."""
    if config.model.init is None:
        from pdvit.tracking.run_directory import newest

        runs = newest("model.safetensors")
        tip = f"name a run, a weight file or a model of timm, for example pdvit finetune {runs[0] if runs else 'RUN'}"
        raise UserError("no checkpoint to start from", "CKPT", tip)


def build_trainer(config: Config, console: "RunConsole", resumed: bool = False) -> "Trainer":
    """Open the data, build task and trainer, and print what is trained; raises UserError.

    A resumed run loads its own checkpoint and no longer needs the file of `model.init`.
    """
    log(console, f"opening {config.data.source} ...")  # imports, many files and weights can take minutes
    from pdvit.config import resolve
    from pdvit.config.resolve import with_crop
    from pdvit.config.unused import unused_settings
    from pdvit.engine.device import choose_device, device_name, set_up
    from pdvit.engine.distributed import init_process_group
    from pdvit.engine.trainer import Trainer
    from pdvit.models.loading import apply_checkpoint_defaults, load_pretrained
    from pdvit.models.resolved_checkpoint import resolve_checkpoint
    from pdvit.tasks import task_class
    from pdvit.tracking.trackers import check_trackers

    checkpoint = None
    if config.model.init is not None and not resumed:
        log(console, f"reading {config.model.init} ...")
        checkpoint = resolve_checkpoint(config.model.init, config.model.name, config.model.weights)
        config = apply_checkpoint_defaults(with_crop(config), checkpoint)
    config = resolve(config) if config.data.batch_size else config
    ranks = init_process_group()
    device = choose_device(config.run.device, ranks.local_rank if ranks.world_size > 1 else None)
    set_up(device, config.run)
    if ranks.main and config.run.track:
        check_trackers(config.run.track)
    task_type = task_class(config)
    source = task_type.open_source(config, partial(log, console))
    if config.segment.head is not None and config.data.source != "scenes":
        source = _check_masks(source, config, ranks, console)
    if not config.data.batch_size:
        batch_size = _find_batch_size(config, source, device, ranks)
        config = resolve(replace(config, data=replace(config.data, batch_size=batch_size)))
    config = task_type.resolve(config, ranks.world_size, device)
    root = None if config.data.root is None else os.path.abspath(os.path.expanduser(config.data.root))
    # Absolute paths, so that the run can be resumed and analyzed from any folder.
    config = replace(config, data=replace(config.data, source=absolute_path(config.data.source), root=root))
    task = task_type(config, source, device, ranks)
    notes = [] if checkpoint is None else load_pretrained(task.module, checkpoint, source.classes)
    trainer = Trainer(task, config, device, ranks)
    processes = f" x {ranks.world_size} processes" if ranks.world_size > 1 else ""
    length = f"{trainer.steps.total} steps of {task.batch_size} images on {device_name(device)}{processes}"
    log(console, f"{source.describe()}\n{task.describe()}; {length}")
    unused = (*unused_settings(config), *unused_source_settings(config.data))
    for note in (*notes, *trainer.notes, *(f"note: {text}" for text in unused)):
        log(console, note)
    return trainer


def start(command: str, config: Config, as_json: bool, stop: "StopRequest") -> Run | int:
    """Prepare a new run, or the one that this command began before torchrun restarted its processes.

    Raises UserError, if possible before the run has a directory. Returns an exit status if there is nothing to train:
    the source `help` prints the sources.
    """
    if config.data.source == "help":
        print(list_source_types())
        return 0
    console = make_console(as_json)
    trainer = build_trainer(config, console)
    trainer.task.load(partial(log, console))
    from pdvit.engine.distributed import launch_file
    from pdvit.engine.terminal import EXIT_STOPPED
    from pdvit.tracking.run_directory import RunDirectory

    ranks = trainer.ranks
    if any(ranks.all_gather(bool(stop))):
        log(console, "stopped before the first step; nothing was written")
        return EXIT_STOPPED
    file = launch_file()
    restarted = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"
    found = Path(file.read_text()) if ranks.main and restarted and file and file.is_file() else None
    begun: Path | None = ranks.broadcast(found)
    if begun is None:
        path: Path | None = None
        with ranks.raise_on_all_ranks():
            if ranks.main:
                path = create_directory(trainer.config, trainer.device).path
                if file:
                    file.write_text(str(path.resolve()))
        return Run(command, trainer, console, as_json, RunDirectory(ranks.broadcast(path), ranks.main))
    directory = RunDirectory(begun, ranks.main)
    if (begun / "status.json").is_file() and directory.read_json("status.json").get("status") == "stopped":
        return EXIT_STOPPED  # a restart by torchrun does not resume what was stopped on purpose
    return Run(command, trainer, console, as_json, directory, restart=directory.changes())


def create_directory(config: Config, device: "torch.device") -> "RunDirectory":
    """Create the run directory with the files that are known before the first step."""
    import torch

    from pdvit.config import to_toml
    from pdvit.data.sources import as_file_name, source_label
    from pdvit.engine.device import device_name
    from pdvit.models.checkpoints import name_of
    from pdvit.tracking.environment import command_line, describe_environment
    from pdvit.tracking.run_directory import RunDirectory

    name, init = config.run.name, config.model.init
    if name is None:
        label = config.diversity.preset
        if init is not None:
            label = f"from-{as_file_name(name_of(Path(init)) if os.path.exists(init) else init.rpartition('/')[2])}"
        name = f"{source_label(config.data)}-{label}"
    text = to_toml(config, command_line())
    directory = RunDirectory.create(config.run.out, name)
    directory.write("run.toml", text)
    environment = describe_environment(device_name(device)) | {"threads": torch.get_num_threads()}
    directory.write_json("environment.json", environment)
    return directory


def saved_config(run: Path, changes: list[str]) -> Config:
    """Return the configuration in run.toml with changes; raises UserError."""
    file = run / "run.toml"
    if not read_toml(file):
        tip = "restore it from state.json of a checkpoint, which has its values under config"
        raise UserError("run.toml is empty", str(file), tip)
    return build(*make_layers(file, changes, {}, "--change"))


def resume(command: str, name: str, change: list[str], as_json: bool) -> Run | int:
    """Prepare the run `name`, or the newest for `auto`, to resume; raises UserError if it can't be resumed.

    Returns an exit status if the run is finished.
    """
    from pdvit.config import resolve, to_dict
    from pdvit.engine.recipe import FIXED, changed_keys, check_changes
    from pdvit.tracking.run_directory import RunDirectory, newest

    runs = newest("run.toml") if name == "auto" else [Path(os.path.expanduser(name))]
    if not runs:
        raise UserError("there is no run to resume", "--resume auto", "name its folder, or start one")
    path, console = runs[0], make_console(as_json)
    directory = RunDirectory.open(path)
    written = all((path / file).is_file() for file in ("status.json", "summary.json"))
    if written and directory.read_json("status.json").get("status") == "finished":
        if change:
            raise UserError("the run is finished, so nothing can change", f"--resume {path}", "start a new run")
        log(console, f"{path} is finished")
        print_summary(path, directory.read_json("summary.json"), console, as_json)
        return 0
    for text in change:
        if text.partition("=")[0].strip() in ("run.out", "run.name"):
            raise UserError("a run keeps its folder", f"--change {text}", "move the folder instead")
    saved, config = saved_config(path, []), saved_config(path, change)
    check_changes(changed_keys(to_dict(saved), to_dict(config)), f"--resume {path} --change")
    try:
        trainer = build_trainer(config, console, resumed=(path / "checkpoints" / "last").is_file())
        trainer.task.load(partial(log, console))
    except UserError as error:
        again = f"pdvit {command} --resume {shlex.quote(str(path))}"
        raise with_change_tips(error, path, again, FIXED) from error
    directory = RunDirectory.open(path, trainer.ranks.main)
    changes = changed_keys(to_dict(resolve(saved)), to_dict(trainer.config))
    restart = directory.changes() | {key: new for key, (_, new) in changes.items()}
    return Run(command, trainer, console, as_json, directory, restart, changes)


def train_to_end(run: Run, stop: "StopRequest") -> int:
    """Train, print the summary, and return the exit status; raises UserError and RunFailed."""
    from pdvit.config import to_toml
    from pdvit.engine.terminal import EXIT_STOPPED
    from pdvit.tracking.environment import command_line

    console, trainer, directory = run.console, run.trainer, run.directory
    again = f"pdvit {run.command} --resume {shlex.quote(str(directory.path))}"
    with directory.locked():
        if run.restart is not None:
            for note in trainer.restore(directory, run.restart):
                log(console, note)
        if run.changes is not None:
            step = trainer.state.progress.step
            log(console, f"resuming after step {step}" if step else "no checkpoint yet: starting from step 0")
            if run.changes:
                directory.record_changes(step, dict(run.changes), to_toml(trainer.config, command_line()))
        log(console, f"run directory: {directory.path}")
        try:
            summary = trainer.run(directory, console, stop)
        except UserError as error:
            raise UserError(error.what, error.where, f"{error.tip}; resume with: {again}") from error
        if summary is None:
            log(console, f"stopped; resume with: {again}")
            return EXIT_STOPPED
        if trainer.ranks.main:
            print_summary(directory.path, summary, console, run.as_json)
    return 0


def replay(path: Path, as_json: bool) -> int:
    """Repeat the step at which a run broke down, and print what is not finite; raises UserError if there is none."""
    from pdvit.tracking.run_directory import RunDirectory

    config = saved_config(RunDirectory.open(path).path, [])
    config = replace(config, run=replace(config.run, distribute="ddp", track=None))  # in this process alone
    console = make_console(as_json)
    trainer = build_trainer(config, console, resumed=True)
    trainer.task.load(partial(log, console))
    from pdvit.engine.recovery import replay as replay_step

    step, found, broken = replay_step(path, trainer.state, trainer.updater)
    metrics = {name: value if abs(value) < float("inf") else None for name, value in found.items()}
    if as_json:
        print(json.dumps({"step": step, "metrics": metrics, "broken": broken}, indent=2))
        return 0
    log(console, f"step {step} again:")
    for name, value in metrics.items():
        log(console, f"  {name:12} {'not finite' if value is None else f'{value:.6g}'}")
    names, more = broken[:MAX_BROKEN_NAMES], len(broken) - MAX_BROKEN_NAMES
    log(console, f"non-finite gradients: {', '.join(names) or 'none'}{f' and {more} more' if more > 0 else ''}")
    return 0


def print_summary(run: Path, summary: Mapping[str, Any], console: "RunConsole", as_json: bool) -> None:
    """Print the closing metrics, the files, and the next command, which compares runs on the same data."""
    if as_json:
        print(json.dumps(summary, indent=2))
        return
    from pdvit.tracking.run_directory import newest

    def source(path: Path) -> object:
        with suppress(UserError):  # another run may be damaged
            return read_toml(path / "run.toml").get("data", {}).get("source")
        return None

    others = [path for path in newest("summary.json") if path.resolve() != run.resolve()]
    others = [path for path in others if source(path) == source(run)]
    log(
        console,
        f"\n{describe_summary(summary)}\n"
        f"{summary['epochs']:g} epochs in {summary['seconds']:.0f} s, "
        f"{summary['images_per_second']:,.0f} images per second\n"
        f"weights   {run}/model.safetensors ({usage(summary, run)})\n"
        f"records   {run}/metrics.jsonl, summary.json; repeat with --config {run}/run.toml\n"
        f"next      pdvit analyze {' '.join(str(path) for path in [*others[:1], run])}",
    )


@contextmanager
def process_group() -> Iterator[None]:
    """Leave the process group at the end. Rank 0 prints its errors; those of other ranks are in torchrun's summary."""
    try:
        yield
    except (UserError, RunFailed) as error:
        if "TORCHELASTIC_RUN_ID" not in os.environ or os.environ.get("RANK") == "0":
            raise
        from torch.distributed.elastic.multiprocessing.errors import get_error_handler

        get_error_handler().record_exception(error)
        raise typer.Exit(2 if isinstance(error, UserError) else 1) from error
    finally:
        distributed = sys.modules.get("torch.distributed")
        if distributed is not None and distributed.is_initialized():
            distributed.destroy_process_group()


def trial_config(config: Config) -> Config:
    """Return the resolved configuration for finding the batch size that fits: batches of one image."""
    from pdvit.config import resolve

    trial = replace(
        config,
        data=replace(config.data, batch_size=1, micro_batch=None),
        optim=replace(config.optim, lr=config.optim.lr or 1e-3),  # the default follows the batch size
        run=replace(config.run, distribute="ddp"),
        segment=replace(config.segment, norm="group"),  # a batch norm can't learn from one image
    )
    return resolve(trial)


def _find_batch_size(config: Config, source: "Source", device: "torch.device", ranks: "Ranks") -> int:
    """Return the largest total batch that fits, a power of two or all images; raises UserError if none does."""
    from pdvit.engine.distributed import SINGLE_PROCESS
    from pdvit.engine.recovery import largest_batch
    from pdvit.engine.trainer import Trainer
    from pdvit.tasks import task_class

    where = "data.batch_size (--batch-size)"
    if device.type == "cpu":
        raise UserError("auto needs a GPU: out of memory on a CPU can't be caught", where, "give a number, such as 64")
    trial = trial_config(config)
    # Each process by itself: trials that exchange gradients would wait for each other.
    task = task_class(trial)(trial, source, device, SINGLE_PROCESS)
    images = len(source.splits["train"]) // ranks.world_size
    size = largest_batch(Trainer(task, trial, device, SINGLE_PROCESS).updater, task.batches(0), images)
    size = int(min(ranks.all_gather(size))) * ranks.world_size
    if not size:
        raise UserError("not even one image fits", where, "use a smaller model or image")
    return size


def _check_masks(source: "Source", config: Config, ranks: "Ranks", console: "RunConsole") -> "Source":
    """Read the held-out masks, or all with `check_masks`; each process reads its part. Raises UserError."""
    from pdvit.data.masks.split import check_masks

    every = config.segment.check_masks
    log(console, "checking all masks ..." if every else "checking the masks that are held out ...")
    part = (ranks.rank, ranks.world_size)
    return check_masks(source, every, config.data.workers, partial(log, console), part, ranks.all_gather)
