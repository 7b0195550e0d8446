import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from pdvit.cli import run as pdvit
from pdvit.cli.analyze_pages import write_explorer, write_report
from pdvit.cli.console import make_console
from pdvit.data.pictures import named
from pdvit.errors import UserError

HOSTILE = "<img src=x onerror=alert(1)>"
ASKED = SimpleNamespace(model=None, weights=None, device="cpu")
LAYERS = ["embed", "block 1", "block 2", "norm"]


def data_of(page: Path) -> dict:
    (text,) = re.findall(r'<script id="data"[^>]*>(.*?)</script>', page.read_text(encoding="utf-8"), re.DOTALL)
    return json.loads(text)


def analyze(*arguments: object) -> int:
    return pdvit(["analyze", *map(str, arguments), "--device", "cpu", "--workers", "0"])


def test_two_runs_get_one_explorer_and_one_report(digits_run, tmp_path, capsys):
    first, second = (Path(shutil.copytree(digits_run, tmp_path / name)) for name in ("first", HOSTILE))
    assert analyze(first, second, "--limit", 20, "--explore", "--report") == 0
    said = capsys.readouterr().out
    page = (first / "explorer.html").read_text(encoding="utf-8")
    assert str(first / "explorer.html") in said
    assert re.search(r"images: 8 of 20, spread evenly \(digits, test split, 20 of 360\)", said)
    assert HOSTILE not in page
    data = data_of(first / "explorer.html")
    assert [model["name"] for model in data["models"]] == ["first", HOSTILE]
    assert len(data["names"]) == 8
    assert data["models"][0]["layers"] == LAYERS
    report = (first / "report.html").read_text(encoding="utf-8")
    assert HOSTILE not in report
    assert report.count('src="data:image/svg+xml') == 4  # P by layer, both beside one another, norms, how the runs went
    assert report.count("prefers-color-scheme: dark)") >= 4
    assert "<dt>command</dt>" in report
    assert not (second / "explorer.html").exists()
    for folder in (first, second):
        with np.load(folder / "analysis" / "maps.npz", allow_pickle=False) as maps:
            assert maps["layers"].tolist() == LAYERS
            assert maps["cos/7/norm"].shape == (16, 16)
            assert maps["image/7"].shape == (32, 32, 3)


def test_images_that_do_not_decode_are_left_out_and_counted(run_copy, image_folder, capsys):
    broken = image_folder / "train" / "blue" / "a broken one.png"
    broken.write_bytes(b"no image")
    files = [str(broken.with_name(name)) for name in ("0.png", broken.name, "1.png")]
    (run_copy / "analysis").mkdir()
    write_explorer({str(run_copy): run_copy}, named(files), ASKED, make_console(False))
    assert "1 left out that do not decode" in capsys.readouterr().out.replace("\n", " ")
    assert data_of(run_copy / "explorer.html")["names"] == ["0.png", "1.png"]


def test_five_checkpoints_are_too_many_before_any_work(refusal):
    assert "side by side" in refusal("analyze", *"abcde", "--explore").what


def test_pages_that_can_not_be_written_are_errors(run_copy, image_folder, analysis_table):
    (run_copy / "analysis").mkdir()
    for page in ("explorer.html", "report.html"):
        (run_copy / page).mkdir()
    with pytest.raises(UserError, match="can't be written"):
        write_explorer({str(run_copy): run_copy}, named([str(image_folder)]), ASKED, make_console(False))
    names = ("model", "checkpoint", "weights", "images", "images_measured", "layers", "prefix_tokens_dropped")
    facts = dict.fromkeys((*names, "spread", "precision", "device", "notes", "verdict", "advice", "published"), "")
    analysis = SimpleNamespace(table=analysis_table([0.5, 0.3, 0.2]), curves={})
    measured = SimpleNamespace(path="a file", name="a file", analysis=analysis, facts=facts)
    with pytest.raises(UserError, match="can't be written") as error:
        write_report([measured], {"a file": run_copy}, make_console(False))
    assert error.value.where == str(run_copy / "report.html")
