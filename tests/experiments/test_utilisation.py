"""experiments/speed/utilisation.py, against operations counted by hand."""

import sys

import pytest
import torch
import utilisation
from utilisation import REST, row_of

from tests.files import read_csv

TINY = ["--model", "vit_tiny_patch16_224", "--img-size", "32", "--batch-size", "4", "--classes", "10"]
TINY += ["--model-kwargs", "depth=1", "embed_dim=24", "num_heads=3", "patch_size=8", "--sizes", "32", "64"]


def test_rounds_count_operations_are_appended_and_have_a_profile(monkeypatch, tmp_path):
    rates = {"images_s": 100.0, "step_tflops": 3.0, "matrix_tflops": 6.0, "utilisation": 0.5, "matrix_size": 1024}
    assert row_of(100.0, 10**10, {512: 4e12, 1024: 6e12, 2048: 5e12}) == rates  # three passes, the fastest product
    monkeypatch.setattr(torch, "set_num_threads", lambda _: None)
    places = ["--csv", str(tmp_path / "found.csv"), "--profile", str(tmp_path / "profile.txt")]
    for count, more in ((2, places[:2]), (1, places)):
        monkeypatch.setattr(sys, "argv", ["utilisation.py", *TINY, "--rounds", str(count), *more])
        utilisation.main()
    rows = read_csv(tmp_path / "found.csv")
    assert [row["round"] for row in rows] == ["1", "2", "1"]
    tokens, width = 17, 24  # multiplications: patches, one block (its four linear layers, its attention), classifier
    block = tokens * 12 * width**2 + 2 * tokens**2 * width
    forward = 2 * (16 * 3 * 8 * 8 * width + block + 10 * width)
    for row in rows:
        step, products = float(row["step_tflops"]), float(row["matrix_tflops"])
        assert step * 1e12 == pytest.approx(3 * forward * float(row["images_s"]), rel=1e-3)
        assert float(row["utilisation"]) == pytest.approx(step / products, rel=1e-3)
    text = (tmp_path / "profile.txt").read_text().splitlines()
    lines = [line.strip("| ").split(" | ") for line in text if line.startswith("| ")]
    sums = {name: [*map(float, values)] for name, *values in lines[2:]}
    parts = [values for name, values in sums.items() if name in {*dict(utilisation.KINDS), REST}]
    total = sums["all of these"]  # numbers have four digits, and a small difference of large ones loses some
    assert [sum(side) for side in zip(*parts, strict=True)] == pytest.approx(total, rel=1e-2, abs=1e-3 * max(total))
