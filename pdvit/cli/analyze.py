"""`pdvit analyze`: options, and the output in the terminal."""

import json
import os
import shlex
from itertools import chain, count
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pdvit.cli.checkpoint import Device, Model, OnBadImage, Weights, results_folder
from pdvit.cli.console import log, make_console, process_group
from pdvit.errors import UserError

if TYPE_CHECKING:
    import pandas as pd

    from pdvit.cli.analyze_run import Analyzer, CheckpointAnalysis
    from pdvit.engine.terminal import RunConsole


def analyze(
    checkpoints: Annotated[
        list[str] | None, typer.Argument(help="Run directories, timm folders, weight files, names of models.")
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
    limit: Annotated[int, typer.Option("--limit", min=1, help="Maximum number of images.")] = 256,
    model: Model = None,
    weights: Weights = None,
    out: Annotated[Path | None, typer.Option("--out", help="Folder for the results of one checkpoint.")] = None,
    batch_size: Annotated[int, typer.Option("--batch-size", "-b", min=1, help="Images per forward pass.")] = 32,
    workers: Annotated[int, typer.Option("--workers", "-j", min=0, help="Processes that decode image files.")] = 2,
    device: Device = "auto",
    on_bad_image: OnBadImage = None,
    explore: Annotated[
        bool, typer.Option("--explore", help="Write explorer.html, which shows similar patches in each image.")
    ] = False,
    report: Annotated[
        bool, typer.Option("--report", help="Write report.html, the whole analysis as one page.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON and nothing else.")] = False,
) -> int:
    """Measure how similar a model's patches are, layer by layer.

    Without arguments: the newest run.
    """
    from pdvit.tracking.run_directory import newest

    with process_group():
        console = make_console(as_json)
        paths = [os.path.expanduser(path) for path in checkpoints or map(str, newest("model.safetensors")[:1])]
        if not paths:
            raise UserError("there is no finished run here", "runs/", "train one first: pdvit train")
        log(console, f"opening {', '.join(paths)} ...")  # imports and weights take seconds
        from pdvit.analysis import DEFAULT
        from pdvit.cli.analyze_run import Analyzer

        loading = (limit, model, weights, batch_size, workers, device, on_bad_image)
        analyzer = Analyzer(console, images or [], list(metrics or DEFAULT), *loading)
        return _analyze(analyzer, _result_folders(paths, out), explore, report, as_json)


def _analyze(analyzer: "Analyzer", folders: dict[str, Path], explore: bool, report: bool, as_json: bool) -> int:
    """Measure the checkpoints, write and print results and pages on rank 0, and return the exit status."""
    from pdvit.analysis import write_analysis, write_between
    from pdvit.analysis.explorer import bytes_per_model
    from pdvit.engine.terminal import EXIT_STOPPED, stop_on_signals

    console, main = analyzer.console, analyzer.ranks.main
    bytes_per_model(len(folders) if explore else 1)  # an error if they are too many for a page
    results: list[CheckpointAnalysis] = []
    between: dict[str, pd.DataFrame] = {}
    with stop_on_signals() as analyzer.stop:
        for path, folder in folders.items():
            first = results[0] if results else None
            result = None if analyzer.stopped() else analyzer.measure(path, first)
            if result is None:
                break
            results.append(result)
            if main:
                file = write_analysis(folder, result.analysis, result.facts)
                if result.between is not None:
                    # runs in different folders can have the same name
                    names = chain([result.name], (f"{result.name} ({number})" for number in count(2)))
                    between[next(name for name in names if name not in between)] = result.between
                    write_between(folders[results[0].path], between)
                print_analysis(result.analysis.table, result.facts, console)
                log(console, f"written  {file}")
        stopped = analyzer.stopped()
    if main and (explore or report) and not stopped:
        from pdvit.cli.analyze_pages import write_explorer, write_report

        if explore:
            write_explorer(folders, results[0].images, analyzer)
        if report:
            write_report(results, folders, console)
    if main and as_json:
        printed = [_as_json(result, folders[result.path]) for result in results]
        print(json.dumps(printed[0] if len(folders) == len(printed) == 1 else printed, indent=2))
    if stopped:
        measured = {result.path for result in results}
        left = ", ".join(path for path in folders if path not in measured) or "none is left"
        log(console, f"stopped; not measured: {left}{'; no page was written' if explore or report else ''}")
        return EXIT_STOPPED
    if not as_json:
        figure = "similarity" if all(result.facts["verdict"] for result in results) else "metrics"
        log(console, f"next     pdvit plot {figure} {shlex.join(map(str, folders.values()))}")
    return 0


def _result_folders(paths: list[str], out: Path | None) -> dict[str, Path]:
    """Return the folder for the results of each checkpoint; UserError, before any work, if two are the same."""
    if out is not None and len(paths) > 1:
        raise UserError("one folder can't hold several analyses", f"--out {out}", "analyze them one by one")
    folders: dict[str, Path] = {}
    for path in paths:
        folder = results_folder(Path(path), out, "analysis")
        if path in folders or folder in folders.values():
            raise UserError("two checkpoints of the same name", str(folder), "analyze them one by one, with --out")
        folders[path] = folder
    return folders


def _as_json(result: "CheckpointAnalysis", folder: Path) -> dict[str, Any]:
    """Return the facts, and one object per layer with its metrics; a missing spread is null."""
    layers: dict[str, dict[str, Any]] = {}
    for row in result.analysis.table.to_dict("records"):
        layer = layers.setdefault(row["layer"], {"layer": row["layer"], "depth": row["depth"]})
        numbers = {key: row[key] for key in ("mean", "std", "ci95")}
        layer[row["metric"]] = {key: None if value != value else value for key, value in numbers.items()}
    return result.facts | {"file": str(folder / "analysis.csv"), "layers_measured": list(layers.values())}


def print_analysis(table: "pd.DataFrame", facts: dict[str, Any], console: "RunConsole") -> None:
    """Print the tables with a bar per layer, the verdict, definitions, and the conditions of the measurement."""
    from rich.markup import escape

    from pdvit.analysis import DEFINITIONS
    from pdvit.analysis.tables import terminal_tables

    console.print(f"\n[italic]{escape(facts['model'])}[/italic]", highlight=False)
    for view in terminal_tables(table):
        console.print(view)
        console.print()
    for name in ("stopped", "verdict", "advice", "published"):
        if facts[name]:
            log(console, f"{name}: {facts[name]}" if name in ("stopped", "published") else facts[name])
    for name, text in facts["metrics"].items():
        heading = DEFINITIONS[name].heading
        label = f"{name} ({heading})" if heading else name
        console.print(f"[dim]measured[/dim] {label}: {escape(text)}", highlight=False, soft_wrap=True)
    first, last = table["tokens"].iloc[0], table["tokens"].iloc[-1]
    patches = str(last) if first == last else f"{first} at {table['layer'].iloc[0]} to {last} at the end:"
    conditions = {
        "images": f"{facts['images_measured']} ({facts['images']})",
        "tokens": f"{patches} patches per image; prefix tokens dropped: {facts['prefix_tokens_dropped']}",
        "layers": facts["layers"],
        "weights": f"{facts['weights']}; {facts['precision']} on {facts['device']}",
        "spread": facts["spread"],
        "note": "; ".join(facts["notes"]),
    }
    for name, text in conditions.items():
        if text:
            console.print(f"[dim]{name:8}[/dim] {escape(text)}", highlight=False, soft_wrap=True)
