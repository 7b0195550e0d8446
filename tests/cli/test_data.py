import json
import shutil
import subprocess
import sys
import tarfile

import pytest
from rich.console import Console
from rich.table import Table

from pdvit.cli import run as pdvit
from pdvit.cli.checkpoint import cell

SHORT = ["--epochs", "2", "--batch-size", "6", "--workers", "0", "--img-size", "16", "--log-interval", "1st"]


@pytest.fixture
def torn(image_folder):
    """The folder of images with one of train and one of val that do not decode."""
    for name in ("train/green/3.png", "val/red/1.png"):
        (image_folder / name).write_bytes(b"torn")
    return image_folder


@pytest.mark.parametrize("name", ["[red]x", "\\\\[b]", ":car:", "猫"])
def test_a_cell_shows_a_name_as_it_is(name, capsys):
    table = Table(box=None)
    table.add_row(cell(name))
    Console().print(table)
    assert capsys.readouterr().out.strip() == name
    assert cell("\x1b[2J\n").plain == r"\x1b[2J\n"


def test_help_lists_the_kinds_of_sources_at_once():
    code = "import sys; from pdvit.cli import run; s = run(sys.argv[1:]); sys.exit(s + ('torch' in sys.modules))"
    done = subprocess.run([sys.executable, "-c", code, "train", "--data", "help"], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    for kind in ("digits", "FOLDER", "FILE.tar", "FILE.csv", "torch/", "hfds/"):
        assert sum(kind in line for line in done.stdout.splitlines()) == 1


def test_errors_of_sources_come_before_there_is_a_run(refusal, workplace):
    assert "no file" in refusal("train", "--data", "absent.tar").what
    assert "--data help" in refusal("train", "--data", "absent").tip
    (workplace / "half.tar").write_bytes(b"half of it")
    assert "can't be read" in refusal("train", "--data", "half.tar").what
    (workplace / "set.csv").write_text("file,class\n")
    assert "no column 'path'" in refusal("train", "--data", "set.csv").what
    assert "--data-dir" in refusal("train", "--data", "torch/cifar100").tip
    assert not (workplace / "runs").exists()


@pytest.mark.slow
def test_a_run_skips_bad_images_counts_them_and_goes_on_the_same(workplace, torn, tiny, records, capsys):
    flags = [*tiny, *SHORT, "--data", str(torn), "--on-bad-image", "skip", "--save-every", "1st"]
    assert pdvit(["train", *flags, "--out", "whole"]) == 0
    shown = capsys.readouterr().out
    assert shown.count("green/3.png (not an image)") == 1
    assert shown.count("red/1.png (not an image)") == 1
    assert sum(record["bad_images"] for record in records(workplace / "whole", "train")) == pytest.approx(2)
    assert [record["bad_images"] for record in records(workplace / "whole", "eval")] == [1, 1]
    summary = json.loads((workplace / "whole/summary.json").read_text())
    assert summary["bad_images"] == 1
    assert summary["accuracy"] * 5 == pytest.approx(round(summary["accuracy"] * 5))  # of the five that decode
    assert pdvit(["train", *flags, "--time-limit", "1e-9min", "--out", "parts"]) == 75
    while pdvit(["train", "--resume", "parts", "--change", "run.time_limit=60min"]) != 0:
        pass
    assert (workplace / "parts/model.safetensors").read_bytes() == (workplace / "whole/model.safetensors").read_bytes()
    assert records(workplace / "parts") == records(workplace / "whole")


@pytest.mark.slow
def test_a_run_that_met_a_bad_image_goes_on_without_it(workplace, torn, tiny, refusal):
    found = refusal("train", *tiny, *SHORT, "--data", torn, "--out", "run", "--save-every", "1st")
    assert "on_bad_image=skip" in found.tip
    assert pdvit(["train", "--resume", "run", "--change", "data.on_bad_image=skip"]) == 0


@pytest.mark.slow
def test_a_run_on_an_archive_is_the_run_on_its_folder_and_may_move_there(workplace, image_folder, tiny):
    with tarfile.open("set.tar", "w") as packed:
        packed.add(image_folder, "pictures")
    for data, out in ((image_folder, "folder"), ("set.tar", "archive")):
        assert pdvit(["train", *tiny, *SHORT, "--data", str(data), "--workers", "2", "--out", out]) == 0
    weights = [(workplace / out / "model.safetensors").read_bytes() for out in ("folder", "archive")]
    assert weights[0] == weights[1]
    assert (
        pdvit(["train", *tiny, *SHORT, "--data", str(image_folder), "--time-limit", "1e-9min", "--out", "moved"]) == 75
    )
    shutil.rmtree(image_folder)
    change = ["--change", f"data.source={workplace / 'set.tar'}", "--change", "run.time_limit=60min"]
    assert pdvit(["train", "--resume", "moved", *change]) == 0
    assert (workplace / "moved/model.safetensors").read_bytes() == weights[0]
    assert pdvit(["analyze", "moved", "--device", "cpu", "--workers", "0"]) == 0
