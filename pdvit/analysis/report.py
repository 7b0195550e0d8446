"""What was measured, exactly: the facts that a number needs beside it, and the files of an analysis."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from pdvit.analysis.measure import METRICS
from pdvit.analysis.verdict import verdict
from pdvit.errors import UserError
from pdvit.tracking import to_json, write_file

if TYPE_CHECKING:
    import pandas as pd


def statement(
    table: "pd.DataFrame", images: str, prefix: int, weights: str, checkpoint: str, device: str
) -> dict[str, Any]:
    """Return what was measured, for people and for analysis.json."""
    layers = list(dict.fromkeys(table["layer"]))
    norm = "the final norm" if layers[-1] == "norm" else "the last block (the model has no final norm over patches)"
    changes = "; grid and width change between stages" if table["tokens"].nunique() > 1 else ""
    return {
        "model": str(table["model"].iloc[0]),
        "checkpoint": checkpoint,
        "weights": weights,
        "images": images,
        "images_measured": int(table["images"].iloc[0]),
        "patch_tokens": int(table["tokens"].iloc[-1]),
        "prefix_tokens_dropped": prefix,
        "layers": f"embed is what enters block 1 (with position); blocks are read before the final norm; the last row "
        f"is {norm}{changes}",
        "metrics": {name: METRICS[name].definition for name in dict.fromkeys(table["metric"])},
        "spread": "std and ci95 (half-width, Student's t) over images",
        "precision": "float32",
        "device": device,
        "verdict": verdict(table),
    }


def write_analysis(folder: Path, table: "pd.DataFrame", facts: dict[str, Any]) -> Path:
    """Write analysis.csv and analysis/analysis.json; UserError where the place can't be written."""
    file = folder / "analysis.csv"
    try:
        (folder / "analysis").mkdir(parents=True, exist_ok=True)
        write_file(folder / "analysis" / "analysis.json", to_json(facts) + "\n")
        write_file(file, table.to_csv(index=False, float_format="%.6g"))
    except OSError as error:
        raise UserError(
            f"the analysis can't be written: {error.strerror}", str(folder), "choose another --out"
        ) from error
    return file
