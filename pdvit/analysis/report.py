"""What was measured, exactly: the facts that a number needs beside it, and the files of an analysis."""

from collections.abc import Mapping
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pdvit.analysis.measure import Analysis
from pdvit.analysis.metrics import DEFINITIONS, METRICS
from pdvit.analysis.verdict import advice, verdict
from pdvit.tracking import to_json, write_file, writing

if TYPE_CHECKING:
    import pandas as pd

BETWEEN, MAPS = "cka_between.npz", "maps.npz"
THE_ANALYSIS = "the analysis"
UNKNOWN = "no verdict, which needs P: --metrics similarity"


def with_random(analysis: Analysis, random: Analysis) -> Analysis:
    """Return an analysis with P of the same model with random weights beside it, as the metric `similarity_random`.

    Of the layers of the analysis alone: the backbone of a segmentation may lack the final norm.
    """
    import pandas as pd

    rows = random.table[(random.table["metric"] == "similarity") & random.table["layer"].isin(analysis.layers)]
    rows = rows.assign(metric="similarity_random", model=analysis.table["model"].iloc[0])
    return replace(analysis, table=pd.concat([analysis.table, rows], ignore_index=True))


def statement(
    analysis: Analysis,
    images: str,
    prefix: int,
    weights: str,
    checkpoint: str,
    device: str,
    *,
    stopped: str | None = None,
    published: str | None = None,
) -> dict[str, Any]:
    """Return what was measured, for people and for analysis.json.

    Args:
        analysis: the measurement.
        images: which, in words.
        prefix: how many prefix tokens were dropped.
        weights: raw, ema or unknown.
        checkpoint: how the user names it.
        device: what the hardware calls itself.
        stopped: why it ended before the last image; None where it did not.
        published: what others measured of this model.
    """
    table = analysis.table
    has_norm = analysis.layers[-1] == "norm"
    norm = "the final norm" if has_norm else "the last block (the model has no final norm over patches)"
    known = bool((table["metric"] == "similarity").any())
    changes = "; grid and width change between stages" if table["tokens"].nunique() > 1 else ""
    return {
        "model": str(table["model"].iloc[0]),
        "checkpoint": checkpoint,
        "weights": weights,
        "images": images,
        "images_measured": analysis.images,
        "patch_tokens": int(table["tokens"].iloc[-1]),
        "prefix_tokens_dropped": prefix,
        "layers": f"embed is what enters block 1 (with position); blocks are read before the final norm; the last row "
        f"is {norm}{changes}",
        "metrics": {name: DEFINITIONS[name].text for name in dict.fromkeys(table["metric"])},
        "notes": analysis.notes if known else [*analysis.notes, UNKNOWN],
        "stopped": stopped,
        "spread": "std and ci95 (half-width, Student's t) over images",
        "precision": "float32",
        "device": device,
        "verdict": verdict(table) if known else None,
        "advice": advice(table, checkpoint) if known else None,
        "published": published,
        "sampling_errors": analysis.sampling,
    }


def write_between(folder: Path, tables: "Mapping[str, pd.DataFrame]") -> None:
    """Write analysis/cka_between.npz: `matrix/NAME` and `layers/NAME` of each other model, and the own `layers`.

    UserError where the place can't be written.
    """
    arrays: dict[str, np.ndarray] = {f"matrix/{name}": table.to_numpy() for name, table in tables.items()}
    arrays |= {f"layers/{name}": table.columns.to_numpy(dtype=str) for name, table in tables.items()}
    own = next(iter(tables.values())).index.to_numpy(dtype=str)
    with writing(THE_ANALYSIS, folder):
        write_arrays(folder / "analysis" / BETWEEN, arrays | {"layers": own})


def write_analysis(folder: Path, analysis: Analysis, facts: dict[str, Any]) -> Path:
    """Write analysis.csv, analysis/analysis.json and the curves, one .npz for each group of metrics that has some.

    Arrays of an earlier analysis go away, of other images perhaps. UserError where the place can't be written.
    """
    table, arrays = folder / "analysis.csv", folder / "analysis"
    with writing(THE_ANALYSIS, folder):
        arrays.mkdir(parents=True, exist_ok=True)
        for name in (*METRICS, BETWEEN, MAPS):
            (arrays / name).with_suffix(".npz").unlink(missing_ok=True)
        write_file(arrays / "analysis.json", to_json(facts) + "\n")
        for group, curves in analysis.curves.items():
            write_arrays(arrays / f"{group}.npz", curves)
        write_file(table, analysis.table.to_csv(index=False, float_format="%.6g"))
    return table


def write_arrays(file: Path, arrays: Mapping[str, Any]) -> None:
    """Write numpy arrays by name as a compressed .npz, whole or not at all. Raises OSError."""
    packed = BytesIO()
    np.savez_compressed(packed, **arrays)
    write_file(file, packed.getvalue())
