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
from pdvit.errors import UserError
from pdvit.tracking import to_json, write_file

if TYPE_CHECKING:
    import pandas as pd

BETWEEN = "cka_between.npz"
UNKNOWN = "no verdict, which needs P: --metrics similarity"


def with_random(analysis: Analysis, random: Analysis) -> Analysis:
    """Return an analysis with P of the same model with random weights beside it, as the metric `similarity_random`."""
    import pandas as pd

    rows = random.table[random.table["metric"] == "similarity"]
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
    """Write analysis/cka_between.npz: `matrix/NAME` and `layers/NAME` of each other model, and the own `layers`."""
    arrays: dict[str, np.ndarray] = {f"matrix/{name}": table.to_numpy() for name, table in tables.items()}
    arrays |= {f"layers/{name}": table.columns.to_numpy(dtype=str) for name, table in tables.items()}
    own = next(iter(tables.values())).index.to_numpy(dtype=str)
    _write_arrays(folder / "analysis" / BETWEEN, arrays | {"layers": own})


def write_analysis(folder: Path, analysis: Analysis, facts: dict[str, Any]) -> Path:
    """Write analysis.csv, analysis/analysis.json and the curves, one .npz for each group of metrics that has some.

    Curves of an earlier analysis go away. UserError where the place can't be written.
    """
    file = folder / "analysis.csv"
    try:
        (folder / "analysis").mkdir(parents=True, exist_ok=True)
        write_file(folder / "analysis" / "analysis.json", to_json(facts) + "\n")
        for group in METRICS:
            curves = folder / "analysis" / f"{group}.npz"
            if group in analysis.curves:
                _write_arrays(curves, analysis.curves[group])
            else:
                curves.unlink(missing_ok=True)
        (folder / "analysis" / BETWEEN).unlink(missing_ok=True)
        write_file(file, analysis.table.to_csv(index=False, float_format="%.6g"))
    except OSError as error:
        raise UserError(
            f"the analysis can't be written: {error.strerror}", str(folder), "choose another --out"
        ) from error
    return file


def _write_arrays(file: Path, arrays: Mapping[str, np.ndarray]) -> None:
    packed = BytesIO()
    np.savez_compressed(packed, **arrays)  # type: ignore[arg-type]
    write_file(file, packed.getvalue())
