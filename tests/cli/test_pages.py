import json
import re
import shutil
from pathlib import Path

import numpy as np
import pandas as pd

from pdvit.cli import run as pdvit
from tests.cli.conftest import CPU

HOSTILE = "<img src=x onerror=alert(1)>"
LAYERS = ["embed", "block 1", "block 2", "norm"]


def analyze(*arguments: object) -> int:
    return pdvit(["analyze", *map(str, arguments), *CPU])


def test_two_runs_get_one_explorer_and_one_report(digits_run, tmp_path, capsys):
    first, second = (Path(shutil.copytree(digits_run, tmp_path / name)) for name in ("first", HOSTILE))
    assert analyze(first, second, "--limit", 20, "--explore", "--report") == 0
    printed = capsys.readouterr().out
    page = (first / "explorer.html").read_text(encoding="utf-8")
    assert re.search(r"images: 8 of 20, spread evenly \(digits, test split, 20 of 360\)", printed)
    assert HOSTILE not in page
    data = json.loads(re.findall(r'<script id="data"[^>]*>(.*?)</script>', page, re.DOTALL)[0])
    assert [model["name"] for model in data["models"]] == ["first", HOSTILE]
    assert len(data["names"]) == 8
    assert data["models"][0]["layers"] == LAYERS
    assert analyze(first, "--limit", 1, "--out", tmp_path / "of-one") == 0  # the first of the images
    table = pd.read_csv(tmp_path / "of-one" / "analysis.csv").query("metric == 'similarity_random'")
    np.testing.assert_allclose(data["models"][0]["random"][0], table["mean"], atol=1e-5)
    report = (first / "report.html").read_text(encoding="utf-8")
    assert HOSTILE not in report
    assert report.count('src="data:image/svg+xml') == 4  # P by layer, both beside one another, norms, how the runs went
    assert not (second / "explorer.html").exists()
    for folder in (first, second):
        with np.load(folder / "analysis" / "maps.npz", allow_pickle=False) as maps:
            assert maps["layers"].tolist() == LAYERS
            assert maps["cos/7/norm"].shape == (16, 16)
            assert (maps["cos/7/norm"].dtype, maps["image/7"].dtype) == (np.int8, np.uint8)
            assert (maps["image/7"].shape, maps["grid/norm"].tolist()) == ((32, 32, 3), [4, 4])


def test_pages_leave_bad_images_out_and_report_a_failed_write(run_copy, image_folder, capsys, refusal):
    blue = image_folder / "train" / "blue"
    (blue / "a broken one.png").write_bytes(b"no image")
    files = [f"--images={blue / name}" for name in ("0.png", "a broken one.png", "1.png")]
    assert analyze(run_copy, *files, "--on-bad-image", "skip", "--explore") == 0
    assert re.search(r"explorer images: .*1 left out that do not decode", capsys.readouterr().out)
    options = [run_copy, *files[:1], "--metrics", "similarity_signed", "--device", "cpu"]
    for page, flag in (("explorer.html", "--explore"), ("report.html", "--report")):
        (run_copy / page).unlink(missing_ok=True)
        (run_copy / page).mkdir()
        assert refusal("analyze", *options, flag).where == str(run_copy / page)
