import itertools
import json
import os
import shutil
import signal
import subprocess
from contextlib import nullcontext, suppress
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file

import pdvit as library
from pdvit.cli import run as pdvit
from pdvit.config.schema import DataConfig
from pdvit.data.opening import open_source
from pdvit.definitions import DEFINITIONS
from pdvit.engine.terminal import Stopped
from pdvit.workflows import analyze_run
from tests.cli.conftest import CPU
from tests.files import rewrite
from tests.processes import TORCHRUN

LAYERS = ["embed", "block 1", "block 2", "norm"]


def means(table: pd.DataFrame, metric: str) -> list[float]:
    return table[table["metric"] == metric].sort_values("depth")["mean"].tolist()


def json_means(result: dict, metric: str) -> list[float]:
    return [layer[metric]["mean"] for layer in result["layers_measured"]]


def normalised(run: Path, images: torch.Tensor) -> torch.Tensor:
    data = timm.data.resolve_model_data_config(timm.create_model(f"local-dir:{run}", pretrained=True))
    mean, std = (torch.tensor(data[name])[:, None, None] for name in ("mean", "std"))
    return (images / 255 - mean) / std


def test_a_run_gets_its_table_and_facts_with_the_numbers_of_the_library(run_copy, analyzed):
    result = analyzed(run_copy, "--limit", 1000)
    table = pd.read_csv(run_copy / "analysis.csv")
    assert table.groupby("images").size().to_dict() == {360: 28, 32: 4}  # random weights on 32
    facts = json.loads((run_copy / "analysis" / "analysis.json").read_text())
    assert (facts["images_measured"], facts["patch_tokens"], facts["prefix_tokens_dropped"]) == (360, 16, 1)
    assert "the final norm" in facts["layers"]
    assert facts["metrics"]["norm_mean"] == DEFINITIONS["norm_mean"].text
    assert result == facts | {"file": str(run_copy / "analysis.csv"), "layers_measured": result["layers_measured"]}
    images = normalised(run_copy, open_source(DataConfig()).splits["test"].images)
    expected = library.analyze(timm.create_model(f"local-dir:{run_copy}", pretrained=True), images).table
    for metric in ("similarity", "similarity_signed"):
        rows = table[table["metric"] == metric]
        assert (rows["layer"].tolist(), rows["depth"].tolist()) == (LAYERS, [0, 1, 2, 3])
        assert json_means(result, metric) == pytest.approx(means(expected, metric), abs=1e-5)
    # Other held-out digits than the probe, so similar but not equal.
    summary, p = json.loads((run_copy / "summary.json").read_text()), json_means(result, "similarity")
    assert (p[1], p[-1]) == pytest.approx((summary["similarity_first"], summary["similarity_last"]), abs=0.05)
    config = json.loads((run_copy / "config.json").read_text())
    torch.manual_seed(0)
    random = timm.create_model(config["architecture"], **config["model_args"])
    expected = library.analyze(random, images[torch.linspace(0, 359, 32).round().long()], "similarity").table
    assert json_means(result, "similarity_random") == pytest.approx(expected["mean"].tolist(), abs=1e-5)
    assert f"(random weights: {expected['mean'].iloc[-1]:.3f}, " in result["verdict"]


def test_image_files_and_folders_are_measured_as_by_the_library(run_copy, image_folder, analyzed, device):
    result = analyzed(run_copy, "--images", image_folder, "--device", device)
    assert result["images_measured"] == 30
    expected = library.analyze(run_copy, image_folder).table  # as timm prepares images: tests/unit/workflows
    assert json_means(result, "similarity") == pytest.approx(means(expected, "similarity"), abs=1e-5)
    few = analyzed(run_copy, "--images", image_folder / "val/red/0.png", "--images", image_folder / "train/blue")
    assert few["images_measured"] == 9
    assert str(image_folder / "train/blue") in few["images"]
    assert "RGB, short side scaled, centre crop to 32x32 px" in few["images"]
    single = analyzed(run_copy, "--images", image_folder / "val/red/0.png")
    assert {layer["similarity"]["std"] for layer in single["layers_measured"]} == {None}


def test_a_lone_file_gives_the_numbers_of_its_run_and_its_place_is_printed(run_copy, workplace, analyzed, capsys):
    shutil.copy(run_copy / "model.safetensors", "alone.safetensors")
    assert pdvit(["analyze", "alone.safetensors", *CPU]) == 0
    shown = capsys.readouterr().out
    assert "\nwritten  runs/analysis-alone/analysis.csv\n" in shown
    assert "\nresults go to runs/analysis-alone; --out changes it\n" in shown.partition("layer  ")[0]  # before they do
    assert "\nonly 2 images were measured" in shown
    assert "alone on sample photographs of scikit-learn, 2 of 2" in shown
    assert pdvit(["analyze", str(run_copy), *CPU]) == 0
    shown = capsys.readouterr().out  # it is in the run
    assert not any(text in shown for text in ("written", "results go to", "only"))
    alone = analyzed("alone.safetensors", "--images", "digits", "--batch-size", 7)
    for mine, theirs in zip(alone["layers_measured"], analyzed(run_copy)["layers_measured"], strict=True):
        assert mine["similarity"]["mean"] == pytest.approx(theirs["similarity"]["mean"], abs=1e-6)
    assert alone["file"] == "runs/analysis-alone/analysis.csv"
    assert (workplace / "runs" / "analysis-alone" / "analysis.csv").is_file()
    photographs = analyzed("alone.safetensors", "--out", "elsewhere")
    assert photographs["images_measured"] == 2
    assert "photographs" in photographs["images"]
    assert (workplace / "elsewhere" / "analysis" / "analysis.json").is_file()


def test_a_name_that_is_almost_right_is_that_of_a_path_nearby_or_of_a_model_that_can_be_read(refusal, workplace):
    assert "fastvit" not in refusal("analyze", "hfvitt").tip
    (workplace / "crop.jpg").touch()
    refusal("analyze", "crop.jpg", what="format '.jpg' is not supported", tip="--images")
    refusal("analyze", "crop.jpg", "--metrics", "ranks", what="'ranks'", where="--metrics", tip="'rank'")
    (workplace / "hfvit").mkdir()
    for name in ("hfvitt", "./hfvitt", workplace / "hfvitt/"):
        assert "hfvit'?" in refusal("analyze", name).tip


def test_options_come_before_the_settings_of_the_file(workplace, image_folder, analyzed):
    """Another size, normalisation and type: P of timm's own model, which resamples its positions, by the library."""
    torch.manual_seed(0)
    model = timm.create_model("test_vit", num_classes=3, img_size=64)
    torch.nn.init.normal_(model.pos_embed)
    timm.models.save_for_hf(model, "saved", model_args={"img_size": 64}, safe_serialization=True)
    flags = ["--img-size", "96", "--mean", "0.1", "0.2", "0.3", "--std", "0.5", "0.6", "0.7", "--heads", "2"]
    flags += ["--model-kwargs", "act_layer=gelu_tanh"]
    result = analyzed("saved", "--images", image_folder, *flags)
    at_96 = timm.create_model("test_vit", num_classes=3, img_size=96, act_layer="gelu_tanh")
    at_96.load_state_dict(timm.models.vision_transformer.checkpoint_filter_fn(model.state_dict(), at_96))
    at_96.pretrained_cfg |= {"mean": (0.1, 0.2, 0.3), "std": (0.5, 0.6, 0.7), "input_size": (3, 96, 96)}
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(at_96))
    files = sorted(path for path in Path(image_folder).rglob("*") if path.suffix in (".png", ".jpg"))
    images = torch.stack([transform(Image.open(file).convert("RGB")) for file in files])
    expected = means(library.analyze(at_96, images).table, "similarity")
    assert json_means(result, "similarity") == pytest.approx(expected, abs=1e-5)
    assert result["input"]["the options"] == ["96 px", "mean 0.1 0.2 0.3", "std 0.5 0.6 0.7", "heads 2", "GELUTanh"]
    assert "norm epsilon 1e-06" in result["input"]["timm's default for test_vit"]
    assert result["notes"] == ["resampled: 1 (pos_embed), for the image size"]
    assert " ".join(["saved", *flags[:12]]) in result["advice"]
    half = analyzed("saved", "--images", image_folder, *flags, "--precision", "bf16")
    assert half["precision"] == "bfloat16"
    assert json_means(half, "similarity") == pytest.approx(expected, abs=1e-2)


def test_without_arguments_the_newest_run_is_taken(digits_run, workplace, analyzed, refusal):
    assert "pdvit train" in refusal("analyze").tip
    for name, age in (("old", 300), ("newest", 100), ("middle", 200)):
        shutil.copytree(digits_run, workplace / "runs" / name)
        os.utime(workplace / "runs" / name / "model.safetensors", (1e9 - age, 1e9 - age))
    (workplace / "runs" / "unfinished").mkdir()
    assert analyzed("--limit", 4)["checkpoint"] == "runs/newest"


def test_the_terminal_shows_table_and_verdict_or_all_or_nothing(run_copy, tmp_path, capsys):
    run = run_copy.rename(tmp_path / "my run")
    printed = {}
    for flags in ([], ["--verbose"], ["--quiet"], ["--quiet", "--json"]):
        assert pdvit(["analyze", str(run), *CPU, "--limit", "12", "--metrics", "similarity,drift", *flags]) == 0
        printed[" ".join(flags)] = capsys.readouterr()
    assert (*printed["--quiet"], printed["--quiet --json"].err) == ("", "", "")
    facts = json.loads(printed["--quiet --json"].out)
    short, lines = (printed[flags].out.splitlines() for flags in ("", "--verbose"))
    assert short == lines[: len(short)]
    assert short[2] == "my run on digits, test split, 12 of 360"
    end = [*facts["verdict"].splitlines(), *facts["advice"].splitlines(), f"note: {facts['notes'][0]}"]
    assert short[-len(end) :] == end
    assert f"measured similarity (P): {DEFINITIONS['similarity'].text}" in lines[len(short) :]
    assert lines[-1] == f"next     pdvit plot similarity '{run}'"
    rows = [line.split() for line in lines if line.startswith(tuple(LAYERS))]
    p = means(pd.read_csv(run / "analysis.csv"), "similarity")
    assert [row[-1].count("█") for row in rows][: len(LAYERS)] == [round(12 * value) for value in p]


def test_metrics_are_chosen_by_name(run_copy, analyzed, refusal):
    result = analyzed(run_copy, "--limit", 6, "--metrics", "rank,pairs", "--metrics", "cka")
    names = {"effective_rank", "participation_ratio", "cka_last"}
    names |= {f"pairs_p{at}" for at in ("05", "25", "50", "75", "95")}
    assert set(result["metrics"]) == names
    assert result["verdict"] is result["advice"] is None
    assert "no verdict, which needs P: --metrics similarity" in result["notes"]
    assert all(set(layer) == names | {"layer", "depth"} for layer in result["layers_measured"])
    assert result["layers_measured"][-1]["cka_last"] == {"mean": pytest.approx(1), "std": None, "ci95": None}
    with np.load(run_copy / "analysis" / "pairs.npz") as curves:
        assert curves["histogram/block 1"].sum() == pytest.approx(1)
    assert "did you mean 'spectrum'" in refusal("analyze", run_copy, "--metrics", "spectrm").tip
    assert "at least 4 images" in refusal("analyze", run_copy, "--metrics", "cka", "--limit", 2).tip


def test_bad_images_are_an_error_or_left_out_and_counted(run_copy, image_folder, analyzed, refusal):
    (image_folder / "bad.png").write_text("not an image")
    refusal("analyze", run_copy, "--images", image_folder, where="bad.png", tip="--on-bad-image skip")
    result = analyzed(run_copy, "--images", image_folder, "--on-bad-image", "skip")
    assert result["images_measured"] == 30
    assert result["images"].startswith(f"{image_folder}, 31 of 31;")
    assert result["notes"][0] == "1 image left out that can't be decoded"
    assert result["arguments"] == [str(run_copy), "--images", str(image_folder), "--on-bad-image", "skip"]
    only = refusal("analyze", run_copy, "--images", image_folder / "bad.png", "--on-bad-image", "skip")
    assert "no images to measure" in only.what


def test_places_that_are_missing_or_can_not_be_written(refusal, run_copy, tmp_path, workplace):
    assert "absent" in refusal("analyze", "absent").where
    assert "model.safetensors" in refusal("analyze", tmp_path).what
    assert "digits" in refusal("analyze", run_copy, "--images", "digts").tip
    for both in ([run_copy, "other", "--out", tmp_path / "both"], [run_copy, run_copy]):
        assert "--out" in refusal("analyze", *both).tip
    assert "side by side" in refusal("analyze", *"abcde", "--explore").what
    (tmp_path / "file").touch()  # an error before any work
    assert str(tmp_path / "file") in refusal("analyze", "absent", "--out", tmp_path / "file" / "folder").where
    (run_copy / "model.safetensors").unlink()
    assert "resume" in refusal("analyze", run_copy).tip


@pytest.fixture
def interrupt(monkeypatch):
    """Return a function that sends Ctrl-C so many times after so many batches."""

    def prepare(after: int, times: int = 1) -> None:
        original, numbers = analyze_run.eval_batches, itertools.count()

        def batches(*arguments, **options):
            for batch in original(*arguments, **options):
                if next(numbers) == after:
                    for left in reversed(range(times)):
                        with suppress(Stopped) if left else nullcontext():
                            os.kill(os.getpid(), signal.SIGINT)
                yield batch

        monkeypatch.setattr(analyze_run, "eval_batches", batches)

    return prepare


def test_an_interrupt_prints_and_writes_what_was_measured(run_copy, tmp_path, interrupt, capsys):
    other = shutil.copytree(run_copy, tmp_path / "other")
    interrupt(after=3)
    capsys.readouterr()
    assert pdvit(["analyze", str(run_copy), str(other), "--limit", "40", "-b", "5", *CPU]) == 75
    shown = " ".join(capsys.readouterr().out.split())
    for text in ("stopped: on request, after 15 of 40 images", f"stopped; not measured: {other}"):
        assert text in shown
    table = pd.read_csv(run_copy / "analysis.csv")
    assert (table["images"] == 15).all()
    assert "similarity_random" not in set(table["metric"])
    facts = json.loads((run_copy / "analysis" / "analysis.json").read_text())
    assert (facts["stopped"], facts["images_measured"]) == ("on request, after 15 of 40 images", 15)
    assert not (other / "analysis.csv").exists()


@pytest.mark.parametrize(
    ("after", "times", "status", "written"),
    [(0, 1, 75, False), (3, 2, 130, False), (9, 1, 75, True)],  # the images of the run are 8 batches
    ids=["before the first image", "twice", "during random weights"],
)
def test_an_interrupt_keeps_what_is_complete(run_copy, interrupt, after, times, status, written):
    interrupt(after, times)
    assert pdvit(["analyze", str(run_copy), "--limit", "40", "-b", "5", *CPU]) == status
    assert (run_copy / "analysis.csv").exists() == written
    if written:
        facts = json.loads((run_copy / "analysis" / "analysis.json").read_text())
        assert facts["images_measured"] == 40
        assert "random weights were not measured: it was stopped before" in facts["notes"]


@pytest.mark.slow
def test_several_processes_measure_what_one_does(run_copy, tmp_path):
    options = ["--limit", "50", "-b", "8", *CPU, "--metrics", "similarity,rank,pairs,cka"]
    shown = {}
    for count in (1, 3):
        command = [*TORCHRUN, str(count), "-m", "pdvit", "analyze", run_copy, *options, "--out", tmp_path / str(count)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-3000:]
        shown[count] = done.stdout
    one, several = (pd.read_csv(tmp_path / count / "analysis.csv") for count in ("1", "3"))
    pd.testing.assert_frame_equal(several, one, rtol=2e-6)
    assert (one["images"].unique() == [50, 32]).all()
    assert shown[3].count("to try: ") == 1
    with np.load(tmp_path / "1" / "analysis" / "cka.npz") as whole, np.load(tmp_path / "3/analysis/cka.npz") as parts:
        np.testing.assert_allclose(parts["matrix"], whole["matrix"], atol=1e-9)


def test_cka_between_checkpoints_goes_into_the_first_one(run_copy, tmp_path, analyzed):
    others = [Path(shutil.copytree(run_copy, tmp_path / place / "other")) for place in ("one", "two")]
    rewrite(others[1], {name: -value for name, value in load_file(others[1] / "model.safetensors").items()})
    results = analyzed(run_copy, *others, "--metrics", "cka", "--limit", 40, "--batch-size", 10)
    assert [result["model"] for result in results] == ["copied", "other", "other"]
    assert "is in analysis/cka_between.npz of copied" in results[1]["notes"][0]
    assert pd.read_csv(others[1] / "analysis.csv")["model"].unique().tolist() == ["other"]
    with np.load(run_copy / "analysis" / "cka_between.npz") as found, np.load(run_copy / "analysis" / "cka.npz") as own:
        assert set(found) == {"layers", "layers/other", "layers/other (2)", "matrix/other", "matrix/other (2)"}
        assert found["layers"].tolist() == found["layers/other"].tolist() == LAYERS
        np.testing.assert_allclose(found["matrix/other"], own["matrix"], atol=1e-9)
        assert not np.allclose(found["matrix/other (2)"], own["matrix"], atol=1e-4)
    recipe = (others[0] / "run.toml").read_text()
    (others[0] / "run.toml").write_text(recipe.replace('source = "digits"', 'source = "digits:0-4"'))
    results = analyzed(run_copy, others[0], "--metrics", "cka", "--limit", 12)
    assert "they were measured on different images" in results[1]["notes"][0]
    assert not (run_copy / "analysis" / "cka_between.npz").exists()
