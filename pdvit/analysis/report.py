"""What was measured, exactly: the facts that a number needs beside it, and the files of an analysis."""

from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np

from pdvit.analysis.measure import Analysis
from pdvit.analysis.metrics import DEFINITIONS, METRICS
from pdvit.analysis.verdict import verdict
from pdvit.errors import UserError
from pdvit.tracking import to_json, write_file


def statement(
    analysis: Analysis, images: str, prefix: int, weights: str, checkpoint: str, device: str
) -> dict[str, Any]:
    """Return what was measured, for people and for analysis.json."""
    table = analysis.table
    has_norm = analysis.layers[-1] == "norm"
    norm = "the final norm" if has_norm else "the last block (the model has no final norm over patches)"
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
        "notes": analysis.notes,
        "spread": "std and ci95 (half-width, Student's t) over images",
        "precision": "float32",
        "device": device,
        "verdict": verdict(table) if (table["metric"] == "similarity").any() else None,
    }


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
                packed = BytesIO()
                np.savez_compressed(packed, **analysis.curves[group])  # type: ignore[arg-type]
                write_file(curves, packed.getvalue())
            else:
                curves.unlink(missing_ok=True)
        write_file(file, analysis.table.to_csv(index=False, float_format="%.6g"))
    except OSError as error:
        raise UserError(
            f"the analysis can't be written: {error.strerror}", str(folder), "choose another --out"
        ) from error
    return file
