"""`pdvit analyze`."""

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pdvit.cli.checkpoint import Model, Weights, config_of, results_folder
from pdvit.errors import UserError

if TYPE_CHECKING:
    import pandas as pd
    from rich.console import Console

    from pdvit.analysis import Analysis
    from pdvit.data.images import Preprocessing
    from pdvit.data.pictures import Pictures
    from pdvit.models.weights import Loaded


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
    device: Annotated[str, typer.Option("--device", help="auto, cpu, cuda or cuda:N.")] = "auto",
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
    from rich.console import Console

    from pdvit.analysis import DEFAULT, write_analysis
    from pdvit.cli.pages import check_side_by_side, explore, report
    from pdvit.tracking import newest

    console = Console(stderr=as_json)
    paths = [os.path.expanduser(name) for name in checkpoints or []] or newest("model.safetensors")[:1]
    if not paths:
        raise UserError("there is no finished run here", "runs/", "train one first: pdvit train")
    if out is not None and len(paths) > 1:
        raise UserError("one folder can't hold several analyses", f"--out {out}", "analyze them one by one")
    check_side_by_side(paths if with_explorer else [])
    results, folders, analyses = [], [], []
    for path in paths:
        options: dict[str, Any] = {"limit": limit, "batch_size": batch_size, "workers": workers, "device": device}
        options |= {"metrics": metrics or DEFAULT}
        analysis, facts = _analyze(str(path), images or [], (model, weights), options)
        folder = results_folder(Path(path), out, "analysis", facts["model"])
        if str(folder) in folders:
            raise UserError("two checkpoints of the same name", str(folder), "analyze them one by one, with --out")
        folders.append(str(folder))
        file = write_analysis(folder, analysis, facts)
        results.append(facts | {"file": str(file), "layers_measured": _nested(analysis.table)})
        analyses.append((analysis.table, facts))
        _show(analysis.table, facts, console)
        console.print(f"[dim]written[/dim]  {file}", highlight=False, soft_wrap=True)
    if with_explorer:
        explore(paths, folders, _pictures(Path(paths[0]), images or []), (model, weights), device, console)
    if with_report:
        report(analyses, [Path(path) for path in paths], Path(folders[0]), console)
    if as_json:
        print(json.dumps(results if len(results) > 1 else results[0], indent=2))
    else:
        console.print(f"[dim]next[/dim]     pdvit plot similarity {' '.join(folders)}", highlight=False, soft_wrap=True)
    return 0


def _analyze(
    path: str, images: list[str], which: tuple[str | None, str | None], options: dict[str, Any]
) -> tuple["Analysis", dict[str, Any]]:
    """Load, measure and describe one checkpoint; `which` is its model and its weights, where they are named."""
    from pdvit.analysis import measure, statement
    from pdvit.data.bad_images import BadImages
    from pdvit.data.images import Preprocessing
    from pdvit.data.loader import Loading, eval_batches
    from pdvit.engine.device import choose_device, device_name
    from pdvit.models.weights import load

    loaded = load(path, *which)
    pictures = _pictures(Path(path), images).first(options["limit"])
    device = choose_device(options["device"])
    preprocessing = Preprocessing.for_model(loaded.model)
    config = None if images else config_of(Path(path))
    bad = BadImages(skip=config is not None and config.data.on_bad_image == "skip")  # as the run did
    loading = Loading(options["batch_size"], 0, options["workers"], device, preprocessing, bad=bad)
    batches = (batch.images for batch in eval_batches(pictures.split, loading))
    analysis = measure(loaded.model.to(device), batches, options["metrics"], loaded.name)
    left_out = f"; {len(bad.found)} left out that do not decode" if bad.found else ""
    facts = statement(
        analysis,
        f"{pictures.description}; {_fitted(pictures, preprocessing)}{left_out}",
        _prefix(loaded),
        loaded.weights,
        path,
        device_name(device),
    )
    return analysis, facts


def _pictures(path: Path, images: list[str]) -> "Pictures":
    """Return what to look at: what the user names, the run's own held-out images, or two photographs."""
    from pdvit.data.pictures import held_out, named, sample_photographs

    if images:
        return named(images)
    config = config_of(path)
    return sample_photographs() if config is None else held_out(config.data)


def _fitted(pictures: "Pictures", preprocessing: "Preprocessing") -> str:
    from pdvit.data.sources import ArraySplit

    side = preprocessing.size
    squashed = isinstance(pictures.split, ArraySplit) or preprocessing.crop_mode == "squash"
    how = "RGB, resized" if squashed else "RGB, short side scaled, centre crop"
    return f"{how} to {side}x{side} px"


def _prefix(loaded: "Loaded") -> int:
    from pdvit.models.layers import places_of

    return max(place.prefix for place in places_of(loaded.model).values())


def _patches(table: "pd.DataFrame") -> str:
    """Say how many patches the layers have: from the first to the last, where it changes."""
    first, last = table["tokens"].iloc[0], table["tokens"].iloc[-1]
    return str(last) if first == last else f"{first} at {table['layer'].iloc[0]} to {last} at the end:"


def _nested(table: "pd.DataFrame") -> list[dict[str, Any]]:
    """Return the table for JSON: one object per layer, with a null where there is no spread."""
    rows: dict[str, dict[str, Any]] = {}
    for row in table.to_dict("records"):
        layer = rows.setdefault(row["layer"], {"layer": row["layer"], "depth": row["depth"]})
        numbers = {key: row[key] for key in ("mean", "std", "ci95")}
        layer[row["metric"]] = {key: None if value != value else value for key, value in numbers.items()}
    return list(rows.values())


def _show(table: "pd.DataFrame", facts: dict[str, Any], console: "Console") -> None:
    """Print the table with a bar per layer, and exactly what was measured."""
    from rich.markup import escape

    from pdvit.analysis.view import HEADINGS, tables

    console.print(f"\n[italic]{escape(facts['model'])}[/italic]", highlight=False)
    for view in tables(table, console.width):
        console.print(view)
        console.print()
    if facts["verdict"]:
        console.print(escape(facts["verdict"]), highlight=False)
    details = {
        "images": f"{facts['images_measured']} ({facts['images']})",
        "tokens": f"{_patches(table)} patches per image; prefix tokens dropped: {facts['prefix_tokens_dropped']}",
        "layers": facts["layers"],
        "weights": f"{facts['weights']}; {facts['precision']} on {facts['device']}",
        "spread": facts["spread"],
    }
    for name, text in facts["metrics"].items():
        label = f"{name} ({HEADINGS[name]})" if name in HEADINGS else name
        console.print(f"[dim]measured[/dim] {label}: {escape(text)}", highlight=False, soft_wrap=True)
    details |= {"note": "; ".join(facts["notes"])} if facts["notes"] else {}
    for name, text in details.items():
        console.print(f"[dim]{name:8}[/dim] {escape(text)}", highlight=False, soft_wrap=True)
