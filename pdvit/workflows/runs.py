"""A run from its configuration to its summary. Imports torch, so commands print their first line before this."""

import gc
import json
import os
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from pdvit.config import build, parse_set, read_toml, resolve, to_dict, to_toml
from pdvit.config.load import RESTORE
from pdvit.config.recipes import IN_TERMS, recipe_defaults, terms_of, text_in_name
from pdvit.config.resolve import with_crop
from pdvit.config.schema import KEYS, Config
from pdvit.data.loader import resident
from pdvit.data.masks.folders import check_masks, open_masks
from pdvit.data.opening import open_source
from pdvit.data.sources import absolute_path, run_name
from pdvit.data.sources.split import ArraySplit, Source
from pdvit.data.unused import unused_settings
from pdvit.engine.device import choose_device, device_name, set_up
from pdvit.engine.distributed import SINGLE_PROCESS, Ranks, init_process_group
from pdvit.engine.recipe import FIXED, changed_keys, check_changes
from pdvit.engine.recovery import largest_batch
from pdvit.engine.recovery import replay as replay_step
from pdvit.engine.terminal import EXIT_STOPPED, RunConsole, Stopped, StopRequest, describe_rate
from pdvit.engine.trainer import Trainer
from pdvit.errors import UserError, adding, command
from pdvit.models.checkpoints import name_of
from pdvit.models.loading import apply_checkpoint_defaults, load_pretrained
from pdvit.models.resolved_checkpoint import resolve_checkpoint
from pdvit.models.segmentation.heads import with_norm
from pdvit.tasks import describe_summary
from pdvit.tasks.classification import ClassificationTask
from pdvit.tasks.segmentation import SegmentationTask
from pdvit.tracking.environment import command_line, describe_environment
from pdvit.tracking.run_directory import RunDirectory, check_path, newest
from pdvit.tracking.trackers import check_trackers
from pdvit.workflows.console import count, log

TaskType = type[ClassificationTask | SegmentationTask]
MAX_BROKEN_NAMES = 5
MAX_LABEL = 60  # letters of a run's default name after the source
# Settings that can stand in it, beside initial weights and terms.
NAMED = (
    *("model.", "augment.", "segment.", "optim."),
    *("data.batch_size", "data.img", "data.mean", "data.std", "run.seed", "run.precision"),
)
OF_DIVERSITY = tuple(key for key in KEYS if key.startswith("diversity.") and key.partition(".")[2] not in IN_TERMS)


@dataclass(frozen=True)
class Run:
    """A run that is ready to train; `changes` are the settings of a resumed run that change now, old and new."""

    trainer: Trainer
    directory: RunDirectory
    changes: Mapping[str, tuple[Any, Any]] | None = None

    @property
    def path(self) -> Path:
        """The run directory."""
        return self.directory.path

    @property
    def summary(self) -> dict[str, Any]:
        """The closing numbers; empty if the run was stopped."""
        return self.directory.read_json("summary.json", optional=True)


def build_trainer(
    config: Config, console: RunConsole, stop: StopRequest | None = None, resumed: bool = False, load: bool = True
) -> Trainer:
    """Open the data, build task and trainer, and `load` a resident set; raises UserError, and Stopped on all ranks."""
    asked, checkpoint, default = config, None, config.optim.head_lr is None
    if config.model.init is not None and not resumed:  # a resumed run loads its own checkpoint
        log(console, f"reading {config.model.init} ...")
        checkpoint = resolve_checkpoint(config.model.init, config.model.name, config.model.weights)
        config = apply_checkpoint_defaults(with_crop(config), checkpoint)
    saved = asked.model.init_hash is not None  # a configuration that has the settings of its checkpoint already
    inherited = ("data.crop_pct", "data.crop_mode") if saved else changed_keys(to_dict(asked), to_dict(config))
    config = resolve(config) if config.data.batch_size else config
    ranks = init_process_group(stop)
    device = choose_device(config.run.device, ranks.local_rank)
    config = replace(config, run=set_up(device, config.run))
    if ranks.main and config.run.track:
        check_trackers(config.run.track)
    to_log = partial(log, console, words=True)
    segments = config.segment.head is not None
    task_type: TaskType = SegmentationTask if segments else ClassificationTask
    with ranks.interruptible():
        source = open_masks(config.data, config.segment, to_log) if segments else open_source(config.data)
    if segments and config.data.source != "scenes":
        every = config.segment.check_masks
        to_log(f"checking {'all masks' if every else 'the masks that are held out'} ...")
        with ranks.interruptible():
            notes = check_masks(source, every, config.data.workers, to_log) if ranks.main else []
        source = source.noting(*ranks.all_gather(notes)[0])
    if not config.data.batch_size:
        batch_size = _find_batch_size(config, task_type, source, device, ranks)
        gc.collect()  # the model of the trials is in cycles
        torch.cuda.empty_cache()
        config = resolve(replace(config, data=replace(config.data, batch_size=batch_size)))
    config = with_norm(config, ranks.world_size, device) if segments else config
    root = None if config.data.root is None else os.path.abspath(os.path.expanduser(config.data.root))
    # Absolute paths, so that the run can be resumed and analyzed from any folder.
    config = replace(config, data=replace(config.data, source=absolute_path(config.data.source), root=root))
    if default and checkpoint is not None and checkpoint.keeps_classifier(source.classes):  # it is not fresh
        config = replace(config, optim=replace(config.optim, head_lr=None))
    task = task_type(config, source, device, ranks)
    notes = [] if checkpoint is None else load_pretrained(task.module, checkpoint, source.classes)
    if task.anchor is not None:
        task.anchor = task.module.make_anchor()
    trainer = Trainer(task, config, device, ranks)
    processes = f" x {ranks.world_size} processes" if ranks.world_size > 1 else ""
    length = f"steps: {trainer.steps.total}, batch size: {task.batch_size}, peak rate: {config.optim.lr:.3g}"
    heads = f" ({rate:.3g} for heads)" if (rate := config.optim.head_lr) else ""
    length += f"{heads} on {device_name(device)}{processes}"
    to_log(f"{source.describe()}\n{task.describe()}\n{length}")
    in_memory = isinstance(source.splits["train"], ArraySplit)
    unused = (f"note: {text}" for text in unused_settings(config, in_memory, inherited))
    for note in (*notes, *trainer.notes, *unused):
        to_log(note)
    with ranks.interruptible():
        if load and isinstance(task, ClassificationTask):
            task.source = resident(source, task.loader, task.augmentation, config.data.resident, to_log)
    return trainer


def start(config: Config, console: RunConsole, stop: StopRequest) -> Run:
    """Prepare a new run; UserError and Stopped, if possible before it has a folder."""
    if config.model.init is not None:
        check_path(config.model.init)
    asked, trainer = config, build_trainer(config, console, stop)
    ranks, config, path = trainer.ranks, trainer.config, None
    with ranks.raise_on_all_ranks():
        if ranks.main:
            out, name = config.run.out, config.run.name
            name = default_name(asked) if name is None and out is None else name or ""
            directory = RunDirectory.create(out, name, to_toml(config, command_line()))
            environment = describe_environment(device_name(trainer.device)) | {"threads": torch.get_num_threads()}
            directory.write("environment.json", environment)
            path = directory.path
    return Run(trainer, RunDirectory(ranks.all_gather(path)[0], ranks.main))


def default_name(config: Config) -> str:
    """Return source, initial weights, terms, and settings other than the defaults, as many as fit."""
    init, terms = config.model.init, terms_of(config.diversity)
    parts = [terms] if init is None or terms != "none" else []
    if init is not None:
        parts.insert(0, f"from-{name_of(Path(init)) if os.path.exists(init) else init.rpartition('/')[2]}")
    same = {"data": {"source": config.data.source}, "diversity": {"preset": config.diversity.preset}}
    same |= {"run": {"precision": "fp32"}} if config.run.precision == "fp32" else {}  # `auto` of a CPU, in its run.toml
    names = (*OF_DIVERSITY, "model." if init is None else "model.freeze", *NAMED[1:])  # a checkpoint has a model
    found = []
    for defaults in ({}, recipe_defaults(config)):  # `train` can have those of another command, by flags or a file
        base = resolve(build(("defaults", defaults), ("the same", same)))
        changes = changed_keys(to_dict(base), to_dict(config)).items()
        found.append([(key, new) for key, (_, new) in changes if key.startswith(names) and new is not None])
    for key, value in min(found, key=len):
        name = "" if key == "model.name" else f"{key.partition('.')[2]}="
        parts.append(name + text_in_name(value))
    while len("-".join(parts)) > MAX_LABEL and len(parts) > 1:
        parts.pop()
    return run_name(config.data.source, "-".join(parts))


def resume(path: Path, change: list[str], console: RunConsole, stop: StopRequest, cpus: int | None = None) -> Run | int:
    """Prepare a run to resume with `cpus`; or return the exit status if nothing is to do."""
    directory, where = RunDirectory(path), f"--resume {path}"
    status = directory.read_json("status.json", optional=True).get("status")
    if status == "finished" and (path / "summary.json").is_file():
        if change:
            raise UserError("the run is finished, so nothing can change", where, "start a new run")
        log(console, f"{path} is finished")
        with directory.reading("summary.json"):
            print_summary(path, directory.read_json("summary.json"), console)
        return 0
    saved, config = saved_config(path, []), saved_config(path, change)
    config = replace(config, launch=replace(config.launch, cpus=cpus))  # run.toml has no settings of jobs
    if config.run.out is not None or config.run.name is not None:
        raise UserError("a run keeps its folder", f"{where} --change run.out, run.name", "move the folder instead")
    check_changes(changed_keys(to_dict(saved), to_dict(config)), f"{where} --change")
    try:
        trainer = build_trainer(config, console, stop, resumed=(path / "checkpoints" / "last").is_file())
    except UserError as error:
        raise _with_change(error, path) from None
    changes = changed_keys(to_dict(resolve(saved)), to_dict(trainer.config))
    return Run(trainer, RunDirectory(path, trainer.ranks.main), changes)


def saved_config(run: Path, changes: list[str]) -> Config:
    """Return the configuration in run.toml with changes; raises UserError."""
    file = run / "run.toml"
    saved = read_toml(file, RESTORE)
    if not saved:
        raise UserError("run.toml is empty", str(file), RESTORE)
    assigned = [(f"--change {text}", parse_set(text, "--change")) for text in changes]
    return build((str(file), saved), *assigned)


def _with_change(error: UserError, run: Path) -> UserError:
    """Return the error of a resumed run with a tip that names --change, since a resumed run takes no flags."""
    key = error.where.partition(" ")[0]
    if key not in KEYS:
        return error
    tip = f"{error.tip}; change it with --change {key}=VALUE"
    if key == "data.source":
        tip = "restore it, or give its new place: --change data.source=PATH (the same images)"
    elif key in FIXED:
        new = command("train", "--config", run / "run.toml")
        tip = f"this can't change within a run: restore what it needs, or start a new run: {new}"
    return UserError(error.what, f"{key} of {run}", tip)


def train_to_end(prepare: Callable[..., Run | int], console: RunConsole, stop: StopRequest) -> int:
    """Prepare (a replay is done then) and train a run; return the exit status; raises UserError and RunFailed."""
    try:
        run = prepare(console, stop)
    except Stopped:
        log(console, "stopped before training began; no file was written or changed")
        return EXIT_STOPPED
    if isinstance(run, int):
        return run
    trainer, directory = run.trainer, run.directory
    with directory.locked():
        if run.changes is not None:
            changed = {change["key"]: change["to"] for change in directory.changes()}
            changed |= {key: new for key, (_, new) in run.changes.items()}
            for note in trainer.restore(directory, changed):
                log(console, note, words=True)
            step = trainer.state.progress.step
            log(console, f"resuming after step {step}" if step else "no checkpoint yet: starting from step 0")
            if run.changes:
                directory.record_changes(step, dict(run.changes), to_toml(trainer.config, command_line()))
        log(console, f"run directory: {directory.path}")
        again = command("train", "--resume", directory.path)
        with adding(tip=f"; resume with: {again}"):
            summary = trainer.run(directory, console)
        if summary is None:
            log(console, f"stopped; resume with: {again}", words=True)
            return EXIT_STOPPED
        if trainer.ranks.main:
            print_summary(directory.path, summary, console)
    return 0


def replay(run: Path, console: RunConsole, stop: StopRequest) -> int:
    """Repeat the step at which a run broke down, and print what is not finite; raises UserError if there is none."""
    config = saved_config(run, [])
    config = replace(config, run=replace(config.run, distribute="ddp", track=None))  # in this process alone
    trainer = build_trainer(config, console, stop, resumed=True)
    step, found, broken = replay_step(run, trainer.state, trainer.updater)
    metrics = {name: value if abs(value) < float("inf") else None for name, value in found.items()}
    if console.stderr:
        print(json.dumps({"step": step, "metrics": metrics, "broken": broken}, indent=2))
        return 0
    log(console, f"step {step} again:")
    for name, value in metrics.items():
        log(console, f"  {name:12} {'not finite' if value is None else f'{value:.6g}'}")
    names, more = broken[:MAX_BROKEN_NAMES], len(broken) - MAX_BROKEN_NAMES
    log(console, f"non-finite gradients: {', '.join(names) or 'none'}{f' and {more} more' if more > 0 else ''}")
    return 0


def print_summary(run: Path, summary: Mapping[str, Any], console: RunConsole) -> None:
    """Print the closing metrics, the files, and the next command: it compares runs of one model on the same data."""
    if console.stderr:
        print(json.dumps(summary, indent=2))
        return

    def task(path: Path) -> object:
        with suppress(Exception):  # another run may be damaged
            config = saved_config(path, [])
            data, model = config.data, config.model
            shape = model.name, model.depth, model.width, model.heads, model.patch_size, model.args, data.img_size
            return config.segment.head is None, data.source, data.val_split, data.split_seed, shape
        return None

    others = [path for path in newest("summary.json") if path.resolve() != run.resolve()]
    alike = [path for path in others if task(path) == task(run)]
    use = f"timm.create_model({f'local-dir:{run}'!r}, pretrained=True)"
    use = command("plot", "segmentation", run) if summary.get("task") == "segmentation" else use
    log(console, f"\n{describe_summary(summary)}", "bold", words=True)
    whole = summary["epochs"] % 1 == 0
    length = count(int(summary["epochs"]), "epoch") if whole else count(summary["steps"], "step")
    log(console, f"{length} in {summary['seconds']:.0f} s, {describe_rate(summary['images_per_second'])}")
    log(console, f"records   {run}/metrics.jsonl, summary.json")
    log(console, f"weights   {run}/model.safetensors")
    log(console, f"use       {use}")
    log(console, f"repeat    {command('train', '--config', run / 'run.toml')}", words=True)
    log(console, f"next      {command('analyze', *alike[:1], run)}", "accent", words=True)


def trial_config(config: Config) -> Config:
    """Return the resolved configuration for finding the batch size that fits: batches of one image."""
    trial = replace(
        config,
        data=replace(config.data, batch_size=1, micro_batch=None),
        optim=replace(config.optim, lr=config.optim.lr or 1e-3),  # the default follows the batch size
        run=replace(config.run, distribute="ddp"),
        segment=replace(config.segment, norm="group"),  # a batch norm can't learn from one image
    )
    return resolve(trial)


def _find_batch_size(config: Config, task_type: TaskType, source: Source, device: torch.device, ranks: Ranks) -> int:
    """Return the largest total batch that fits, a power of two or all images; raises UserError if none does."""
    where = "data.batch_size (--batch-size)"
    if device.type == "cpu":
        raise UserError("auto needs a GPU: out of memory on a CPU can't be caught", where, "give a number, such as 64")
    trial = trial_config(config)
    # Each process by itself: trials that exchange gradients would wait for each other.
    task = task_type(trial, source, device, SINGLE_PROCESS)
    images = len(source.splits["train"]) // ranks.world_size
    size = largest_batch(Trainer(task, trial, device, SINGLE_PROCESS).updater, task.batches(0), images)
    size = int(min(ranks.all_gather(size))) * ranks.world_size
    if not size:
        raise UserError("not even one image fits", where, "use a smaller model or image")
    return size
