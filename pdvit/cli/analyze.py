"""`pdvit analyze`: options, and the output in the terminal."""

import json
import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pdvit.cli.options import checkpoint_command, opening_arguments, results_folder
from pdvit.definitions import DEFAULT, DEFINITIONS, GROUPS, LIMIT
from pdvit.errors import UserError, command
from pdvit.tracking.environment import describe_environment
from pdvit.tracking.run_directory import check_path, newest, write_file, writing
from pdvit.workflows.console import log, make_console, process_group

if TYPE_CHECKING:
    import pandas as pd

    from pdvit.engine.terminal import RunConsole
    from pdvit.plots.style import Drawing, Theme
    from pdvit.workflows.analyze_run import Analyzer, CheckpointAnalysis

VERBOSE = "Print also definitions, conditions and files; or nothing. Unset: table and verdict."
METRIC_NAMES = f"Groups: {', '.join(GROUPS)}; unset: {', '.join(DEFAULT)}."


@partial(checkpoint_command, data_batch_size=32)
def analyze(
    checkpoints: Annotated[
        list[str] | None, typer.Argument(metavar="CKPT", help="Runs, timm folders, weight files, models.")
    ] = None,
    images: Annotated[
        list[str] | None,
        typer.Option(metavar="<path>", help="Folder, file or source; unset: the run's held-out images."),
    ] = None,
    metrics: Annotated[
        list[str] | None, typer.Option(metavar="<group>", autocompletion=lambda: GROUPS, help=METRIC_NAMES)
    ] = None,
    limit: Annotated[int, typer.Option(min=1, metavar="<int>", help="Maximum number of images.")] = LIMIT,
    out: Annotated[Path | None, typer.Option(help="Folder for the results of one checkpoint.")] = None,
    explore: Annotated[bool, typer.Option("--explore", help="Write explorer.html: similar patches per image.")] = False,
    report: Annotated[bool, typer.Option("--report", help="Write report.html, the whole analysis.")] = False,
    verbose: Annotated[
        bool | None, typer.Option("--verbose/--quiet", "-v/-q", show_default=False, help=VERBOSE)
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON and nothing else.")] = False,
    **opening: Any,
) -> int:
    """Measure how similar a model's patches are, layer by layer.

    Without arguments: the newest run.
    """
    with process_group():
        console = make_console(as_json, quiet=verbose is False)
        paths = [os.path.expanduser(path) for path in checkpoints or map(str, newest("model.safetensors")[:1])]
        if not paths:
            raise UserError("there is no finished run here", "runs/", "train one first: pdvit train")
        for path in paths:
            check_path(path)
        log(console, f"opening {', '.join(paths)} ...")  # imports and weights take seconds
        from pdvit.workflows.analyze_run import Analyzer

        analyzer = Analyzer(console, images or [], metrics or DEFAULT, limit, **opening_arguments(opening))
        folders = {path: results_folder(Path(path), out, "analysis") for path in paths}
        if len({*folders.values()}) < len(paths):
            where, tip = ", ".join(map(str, folders.values())), "leave out --out, or analyze them one by one"
            raise UserError("one folder can't hold several analyses", where, tip)
        for folder in folders.values() if out is None else ():
            if not (folder / "run.toml").is_file():  # perhaps beside the weights of others
                log(console, f"results go to {folder}; --out changes it", words=True)
        return _analyze(analyzer, folders, explore, report, bool(verbose), as_json)


def _analyze(
    analyzer: "Analyzer", folders: dict[str, Path], explore: bool, report: bool, verbose: bool, as_json: bool
) -> int:
    """Measure the checkpoints, write and print results and pages on rank 0, and return the exit status."""
    from pdvit.analysis import write_analysis, write_between
    from pdvit.analysis.explorer import bytes_per_model
    from pdvit.engine.terminal import EXIT_STOPPED, stop_on_signals
    from pdvit.workflows.analyze_run import write_explorer

    console, main, results = analyzer.console, analyzer.ranks.main, list["CheckpointAnalysis"]()
    bytes_per_model(len(folders) if explore else 1)  # an error if they are too many for a page
    with stop_on_signals(analyzer.ranks.stop):
        for path, folder in folders.items():
            result = None if analyzer.stopped() else analyzer.measure(path, folder, results[0] if results else None)
            if result is None:
                break
            results.append(result)
            if main:
                file = write_analysis(folder, result.analysis, result.facts)
                if tables := [(it.name, it.between) for it in results if it.between is not None]:
                    from pdvit.plots.style import unique  # imports matplotlib

                    names = unique([name for name, _ in tables])  # runs in different folders can have the same name
                    write_between(results[0].folder, dict(zip(names, (table for _, table in tables), strict=True)))
                print_analysis(result, console)
                if verbose:
                    print_conditions(result.analysis.table, result.facts, console)
                if verbose or not (folder / "run.toml").is_file():
                    log(console, f"written  {file}")
        stopped = analyzer.stopped()
    if main and explore and not stopped:
        write_explorer(results, analyzer)
    if main and report and not stopped:
        write_report(results, console)
    if main and as_json:
        printed = [_as_json(result) for result in results]
        print(json.dumps(printed[0] if len(folders) == len(printed) == 1 else printed, indent=2))
    if stopped:
        left = ", ".join(list(folders)[len(results) :]) or "none is left"
        log(console, f"stopped; not measured: {left}{'; no page was written' if explore or report else ''}")
        return EXIT_STOPPED
    if verbose and not as_json:
        figure = "similarity" if all(result.facts["verdict"] for result in results) else "metrics"
        log(console, f"next     {command('plot', figure, *folders.values())}", "accent", words=True)
    return 0


def _as_json(result: "CheckpointAnalysis") -> dict[str, Any]:
    """Return the facts, and one object per layer with its metrics; a missing spread is null."""
    layers: dict[str, dict[str, Any]] = {}
    for row in result.analysis.table.to_dict("records"):
        layer = layers.setdefault(row["layer"], {"layer": row["layer"], "depth": row["depth"]})
        numbers = {key: row[key] for key in ("mean", "std", "ci95")}
        layer[row["metric"]] = {key: None if value != value else value for key, value in numbers.items()}
    return result.facts | {"file": str(result.folder / "analysis.csv"), "layers_measured": list(layers.values())}


def print_analysis(result: "CheckpointAnalysis", console: "RunConsole") -> None:
    """Print the names of model and images, the tables with a bar per layer, the verdict, and notes."""
    from pdvit.analysis.tables import terminal_tables

    facts = result.facts
    log(console, f"\n{facts['model']} on {result.images.description}", "italic", words=True)
    for view in terminal_tables(result.analysis.table):
        console.print(view)
        console.print()
    if facts["verdict"]:
        log(console, facts["verdict"], "bold", words=True)
        log(console, facts["advice"], "accent")
    if facts["stopped"]:
        log(console, f"stopped: {facts['stopped']}", "yellow")
    for note in facts["notes"]:
        log(console, f"note: {note}", words=True)


def print_conditions(table: "pd.DataFrame", facts: dict[str, Any], console: "RunConsole") -> None:
    """Print definitions, and the conditions of the measurement."""
    for name, text in facts["metrics"].items():
        heading = DEFINITIONS[name].heading
        label = f"{name} ({heading})" if heading else name
        log(console, f"measured {label}: {text}", words=True)
    first, last = table["tokens"].iloc[0], table["tokens"].iloc[-1]
    patches = str(last) if first == last else f"{first} at {table['layer'].iloc[0]} to {last} at the end:"
    conditions = {
        "images": f"{facts['images_measured']} ({facts['images']})",
        "input": "; ".join(f"{', '.join(texts)} ({origin})" for origin, texts in facts["input"].items()),
        "tokens": f"{patches} patches per image; prefix tokens dropped: {facts['prefix_tokens_dropped']}",
        "layers": facts["layers"],
        "weights": f"{facts['weights']}; {facts['precision']} on {facts['device']}",
        "spread": facts["spread"],
    }
    for name, text in conditions.items():
        if text:
            log(console, f"{name:9} {text}", words=True)


def write_report(results: "Sequence[CheckpointAnalysis]", console: "RunConsole") -> None:
    """Write report.html, the whole analysis on one page, to the first checkpoint's folder; raises UserError."""
    from pdvit.analysis.pages import report_page
    from pdvit.plots.style import DARK, LIGHT, render

    light, dark = (_report_figures(results, theme) for theme in (LIGHT, DARK))
    figures = [(caption, render(light[caption], ".svg"), render(dark[caption], ".svg")) for caption in light]
    file = results[0].folder / "report.html"
    analyses = [(result.analysis.table, result.facts) for result in results]
    with writing("the page", file):
        write_file(file, report_page(analyses, figures, describe_environment(results[0].facts["device"])))
    log(console, f"written  {file}")


def _report_figures(results: "Sequence[CheckpointAnalysis]", theme: "Theme") -> "dict[str, Drawing]":
    """Return the figures of everything that was measured, by caption."""
    from pdvit.cli.plot import FIGURES, draw_figure
    from pdvit.plots.reading import AnalyzedRun
    from pdvit.plots.style import unique
    from pdvit.plots.training import plot_training, read_records

    analyses = zip(unique([result.name for result in results]), (result.analysis for result in results), strict=True)
    runs = [AnalyzedRun(name, analysis.table, analysis.curves) for name, analysis in analyses]
    two = sum(FIGURES["similarity"].fits(run) for run in runs) == 2
    drawings: dict[str, Drawing] = {}
    for name, figure in FIGURES.items():
        fitting = [run for run in runs if figure.fits(run)]
        if fitting and name != ("metrics" if two else "compare"):
            drawings[figure.help.removesuffix(".")] = draw_figure(name, fitting, theme)
    if trained := [Path(result.path) for result in results if (Path(result.path) / "metrics.jsonl").is_file()]:
        caption = "Training: loss by term, validation accuracy, and P by layer over the epochs"
        records = zip(unique([run.resolve().name for run in trained]), map(read_records, trained), strict=True)
        drawings[caption] = plot_training(dict(records), theme)
    return drawings
