"""`pdvit analyze`."""

import json
import os
import shlex
from itertools import chain, count
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pdvit.cli.checkpoint import Device, Model, OnBadImage, Weights, results_folder
from pdvit.cli.console import log, make_console
from pdvit.cli.runs import process_group
from pdvit.errors import UserError

if TYPE_CHECKING:
    import pandas as pd

    from pdvit.cli.measured import Asked, Measured
    from pdvit.engine.display import RunConsole
    from pdvit.engine.distributed import Ranks
    from pdvit.engine.interrupts import StopRequest


def analyze(
    checkpoints: Annotated[
        list[str] | None, typer.Argument(help="Run directories, timm folders, files of weights, names of models.")
    ] = None,
    images: Annotated[
        list[str] | None,
        typer.Option("--images", help="Folder, image file or source; repeatable. Unset: the run's held-out images."),
    ] = None,
    metrics: Annotated[
        list[str] | None,
        typer.Option(
            "--metrics",
            help="similarity, similarity_signed, norms (the default), pairs, drift, rank, spectrum, attention, cka.",
        ),
    ] = None,
    limit: Annotated[int, typer.Option("--limit", min=1, help="At most this many images.")] = 256,
    model: Model = None,
    weights: Weights = None,
    out: Annotated[Path | None, typer.Option("--out", help="Folder for the results; for one checkpoint.")] = None,
    batch_size: Annotated[int, typer.Option("--batch-size", "-b", min=1, help="Images per forward pass.")] = 32,
    workers: Annotated[int, typer.Option("--workers", "-j", min=0, help="Processes that decode image files.")] = 2,
    device: Device = "auto",
    pairs: Annotated[
        str, typer.Option("--pairs", metavar="all|sampled", help="All pairs of patches, or 32 drawn for each patch.")
    ] = "all",
    on_bad_image: OnBadImage = None,
    with_explorer: Annotated[
        bool, typer.Option("--explore", help="Write a page that shows which patches are alike (explorer.html).")
    ] = False,
    with_report: Annotated[
        bool, typer.Option("--report", help="Write the whole analysis as one page (report.html).")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON and nothing else.")] = False,
) -> int:
    """Measure how alike a model's patches are, layer by layer.

    Without arguments: the newest run.
    """
    from pdvit.tracking import newest

    with process_group():
        console = make_console(as_json)
        names = [os.path.expanduser(name) for name in checkpoints or []] or newest("model.safetensors")[:1]
        paths = [str(name) for name in names]
        if not paths:
            raise UserError("there is no finished run here", "runs/", "train one first: pdvit train")
        log(console, f"opening {', '.join(paths)} ...")
        from pdvit.analysis import DEFAULT
        from pdvit.cli.measured import Asked

        asked = Asked(
            images=images or [],
            metrics=list(metrics or DEFAULT),
            limit=limit,
            model=model,
            weights=weights,
            batch_size=batch_size,
            workers=workers,
            device=device,
            pairs=pairs,
            on_bad_image=on_bad_image,
        )
        return _run(_folders(paths, out), asked, (with_explorer, with_report), console, as_json)


def _run(
    folders: dict[str, Path], asked: "Asked", pages: tuple[bool, bool], console: "RunConsole", as_json: bool
) -> int:
    """Measure all checkpoints, write the pages that are asked for (explorer, report), and return the exit status."""
    from pdvit.cli.pages import check_side_by_side, explore, report
    from pdvit.engine.distributed import init_process_group
    from pdvit.engine.interrupts import EXIT_STOPPED, stop_on_signals

    with_explorer, with_report = pages
    check_side_by_side(list(folders) if with_explorer else [])
    ranks = init_process_group()
    with stop_on_signals() as stop:
        done = _measure(folders, asked, console, ranks, stop)
        stopped = any(ranks.all_gather(bool(stop)))
    if ranks.main and not stopped:
        if with_explorer:
            explore(folders, done[0].pictures, asked, console)
        if with_report:
            report(done, folders, console)
    if ranks.main and as_json:
        results = [_as_json(measured, folders[measured.path]) for measured in done]
        print(json.dumps(results[0] if len(folders) == len(results) == 1 else results, indent=2))
    if stopped:
        left = folders.keys() - {measured.path for measured in done}
        names = ", ".join(path for path in folders if path in left) or "none is left"
        log(console, f"stopped; not measured: {names}{'; no page was written' if any(pages) else ''}")
        return EXIT_STOPPED
    if not as_json:
        kind = "similarity" if all(measured.facts["verdict"] for measured in done) else "metrics"
        log(console, f"next     pdvit plot {kind} {shlex.join(map(str, folders.values()))}")
    return 0


def _folders(paths: list[str], out: Path | None) -> dict[str, Path]:
    """Return where the results of each checkpoint go; UserError, before any work, where that can't be."""
    from pdvit.models.checkpoints import name_of

    if out is not None and len(paths) > 1:
        raise UserError("one folder can't hold several analyses", f"--out {out}", "analyze them one by one")
    folders: dict[str, Path] = {}
    for path in paths:
        folder = results_folder(Path(path), out, "analysis", name_of(Path(path)))
        if path in folders or folder in folders.values():
            raise UserError("two checkpoints of the same name", str(folder), "analyze them one by one, with --out")
        folders[path] = folder
    return folders


def _measure(
    folders: dict[str, Path], asked: "Asked", console: "RunConsole", ranks: "Ranks", stop: "StopRequest"
) -> "list[Measured]":
    """Measure, write and print one checkpoint after the other, until a signal stops it; return what was measured."""
    from pdvit.analysis import write_analysis, write_between
    from pdvit.cli.measured import measure_checkpoint
    from pdvit.cli.shown import show

    done: list[Measured] = []
    between: dict[str, pd.DataFrame] = {}
    for path, folder in folders.items():
        if any(ranks.all_gather(bool(stop))):
            break
        measured = measure_checkpoint(path, asked, done[0] if done else None, console, ranks, stop)
        if measured is None:  # stopped before its first image
            break
        done.append(measured)
        if ranks.main:
            file = write_analysis(folder, measured.analysis, measured.facts)
            if measured.between is not None:
                between[_new_name(measured.name, between)] = measured.between
                write_between(folders[done[0].path], between)
            show(measured.analysis.table, measured.facts, console)
            log(console, f"written  {file}")
    return done


def _as_json(measured: "Measured", folder: Path) -> dict[str, Any]:
    """Return what was measured, with a number for each layer and metric."""
    from pdvit.cli.shown import nested

    table = str(folder / "analysis.csv")
    return measured.facts | {"file": table, "layers_measured": nested(measured.analysis.table)}


def _new_name(name: str, taken: dict[str, Any]) -> str:
    """Return a name that is not taken: two runs in different folders can have the same."""
    numbers = (f"{name} ({number})" for number in count(2))
    return next(new for new in chain([name], numbers) if new not in taken)
