import copy
import itertools
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import pdvit as library
import pdvit.config.schema
import pdvit.data.sources
from pdvit.analysis import DEFINITIONS
from pdvit.cli import analyze_run
from pdvit.cli import run as pdvit
from pdvit.cli.console import make_console
from pdvit.engine.distributed import Ranks
from pdvit.errors import UserError
from pdvit.models import memory

COLUMNS = ["model", "layer", "depth", "metric", "mean", "std", "ci95", "images", "tokens"]
LAYERS = ["embed", "block 1", "block 2", "norm"]


@pytest.fixture
def analyzed(capsys):
    """Return a function that analyzes with --json and returns what was printed."""

    def analyze(*arguments: object):
        capsys.readouterr()
        assert pdvit(["analyze", "--device", "cpu", "--workers", "0", *map(str, arguments), "--json"]) == 0
        return json.loads(capsys.readouterr().out)

    return analyze


def means(table: pd.DataFrame, metric: str) -> list[float]:
    return table[table["metric"] == metric].sort_values("depth")["mean"].tolist()


def json_means(result: dict, metric: str) -> list[float]:
    return [layer[metric]["mean"] for layer in result["layers_measured"]]


def timm_images(model, paths: list[Path]) -> torch.Tensor:
    """Preprocess with timm's own evaluation transform for the model's configuration."""
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model), is_training=False)
    return torch.stack([transform(Image.open(path).convert("RGB")) for path in paths])


def test_a_run_gets_its_table(run_copy, analyzed):
    analyzed(run_copy)
    table = pd.read_csv(run_copy / "analysis.csv")
    assert list(table.columns) == COLUMNS
    for metric in ("similarity", "similarity_signed"):
        rows = table[table["metric"] == metric]
        assert rows["layer"].tolist() == LAYERS
        assert rows["depth"].tolist() == [0, 1, 2, 3]
    assert len(table) == 32
    random = table["metric"] == "similarity_random"
    assert (table.loc[~random, "images"] == 256).all()
    assert (table.loc[random, "images"] == 32).all()
    assert (table["tokens"] == 16).all()
    facts = json.loads((run_copy / "analysis" / "analysis.json").read_text())
    assert (facts["images_measured"], facts["patch_tokens"], facts["prefix_tokens_dropped"]) == (256, 16, 1)


def test_the_numbers_are_those_of_the_library_on_the_same_images(run_copy, analyzed):
    source = library.data.sources.open_source(library.config.schema.DataConfig())
    held_out = source.splits["test"].images
    model = timm.create_model(f"local-dir:{run_copy}", pretrained=True)
    data = timm.data.resolve_model_data_config(model)
    mean, std = (torch.tensor(data[name])[:, None, None] for name in ("mean", "std"))
    expected = library.analyze(model, (held_out / 255 - mean) / std)
    result = analyzed(run_copy, "--limit", 1000)
    for metric in ("similarity", "similarity_signed"):
        assert json_means(result, metric) == pytest.approx(means(expected, metric), abs=1e-5)


def test_image_files_are_preprocessed_as_timm_does(run_copy, image_folder, analyzed, device):
    paths = sorted(image_folder.rglob("*.png"))
    model = timm.create_model(f"local-dir:{run_copy}", pretrained=True)
    expected = library.analyze(model, timm_images(model, paths))
    result = analyzed(run_copy, "--images", image_folder, "--device", device)
    assert result["images_measured"] == len(paths) == 30
    assert json_means(result, "similarity") == pytest.approx(means(expected, "similarity"), abs=1e-5)


def test_the_numbers_are_near_those_that_the_run_reported(run_copy, analyzed):
    summary = json.loads((run_copy / "summary.json").read_text())
    result = json_means(analyzed(run_copy), "similarity")
    # Other held-out digits than the probe, so alike but not equal.
    assert result[1] == pytest.approx(summary["similarity_first"], abs=0.05)
    assert result[-1] == pytest.approx(summary["similarity_last"], abs=0.05)


def test_a_lone_file_is_as_good_as_its_run(run_copy, workplace, analyzed):
    shutil.copy(run_copy / "model.safetensors", "alone.safetensors")
    alone = analyzed("alone.safetensors", "--images", "digits")
    assert alone["layers_measured"] == analyzed(run_copy)["layers_measured"]
    assert (workplace / "runs" / "analysis-alone" / "analysis.csv").is_file()
    assert alone["file"] == "runs/analysis-alone/analysis.csv"


def test_a_lone_file_is_shown_photographs_unless_told_otherwise(run_copy, workplace, analyzed):
    shutil.copy(run_copy / "model.safetensors", "alone.safetensors")
    result = analyzed("alone.safetensors")
    assert result["images_measured"] == 2
    assert "photographs" in result["images"]


def test_foreign_weights_need_the_name_of_their_model(workplace, analyzed, refusal):
    torch.manual_seed(0)
    model = timm.create_model("test_vit", pretrained=False)
    save_file(model.state_dict(), "foreign.safetensors")
    assert "--model" in refusal("analyze", "foreign.safetensors").tip
    result = analyzed("foreign.safetensors", "--model", "test_vit", "--images", "digits", "--limit", 3)
    assert result["weights"] == "unknown"
    assert len(result["layers_measured"]) == len(model.blocks) + 2
    refusal("analyze", "foreign.safetensors", "--model", "test_vit2")
    refusal("analyze", "foreign.safetensors", "--model", "vit_tiny_patch16_224")


def test_every_prefix_token_is_dropped(workplace, analyzed):
    shape = ["--model", "deit_tiny_distilled_patch16_224", "--depth", "1", "--width", "24", "--heads", "1"]
    assert pdvit(["train", *shape, "--img-size", "48", "--epochs", "1st", "--out", "run"]) == 0
    result = analyzed("run", "--limit", 4)
    assert (result["prefix_tokens_dropped"], result["patch_tokens"]) == (2, 9)


def test_several_checkpoints_each_get_their_table(run_copy, tmp_path, analyzed, workplace):
    other = shutil.copytree(run_copy, tmp_path / "other")
    results = analyzed(run_copy, other, "--limit", 8)
    assert [result["model"] for result in results] == ["copied", "other"]
    for folder in (run_copy, other):
        assert pd.read_csv(folder / "analysis.csv")["model"].unique().tolist() == [folder.name]


def test_without_arguments_the_newest_run_is_taken(digits_run, workplace, analyzed):
    for name, age in (("old", 300), ("newest", 100), ("middle", 200)):
        shutil.copytree(digits_run, workplace / "runs" / name)
        os.utime(workplace / "runs" / name / "model.safetensors", (1e9 - age, 1e9 - age))
    (workplace / "runs" / "unfinished").mkdir()
    assert analyzed("--limit", 4)["checkpoint"] == "runs/newest"


def test_without_any_run_it_says_what_to_do(workplace, refusal):
    assert "pdvit train" in refusal("analyze").tip


@pytest.mark.parametrize(
    ("images", "count"), [(["train/red"], 8), (["val/red/0.png"], 1), (["val/red/0.png", "train/blue"], 9)]
)
def test_images_come_from_files_and_folders(run_copy, image_folder, analyzed, images, count):
    named = [item for name in images for item in ("--images", image_folder / name)]
    result = analyzed(run_copy, *named)
    assert result["images_measured"] == count
    assert all(str(image_folder / name) in result["images"] for name in images)


def test_a_single_image_has_no_spread(run_copy, image_folder, analyzed):
    result = analyzed(run_copy, "--images", image_folder / "val" / "red" / "0.png")
    for layer in result["layers_measured"]:
        assert layer["similarity"]["std"] is None
        assert layer["similarity"]["ci95"] is None
    table = pd.read_csv(run_copy / "analysis.csv")
    assert table["std"].isna().all()
    assert table["mean"].notna().all()


def test_the_limit_and_the_batch_size_do_not_change_what_is_measured(run_copy, analyzed):
    one = analyzed(run_copy, "--limit", 20, "--batch-size", 7)
    two = analyzed(run_copy, "--limit", 20, "--batch-size", 20)
    assert one["images_measured"] == two["images_measured"] == 20
    assert json_means(one, "similarity") == pytest.approx(json_means(two, "similarity"), abs=1e-6)


def test_out_is_where_the_files_go(run_copy, workplace, analyzed):
    result = analyzed(run_copy, "--limit", 4, "--out", "elsewhere")
    assert result["file"] == "elsewhere/analysis.csv"
    assert (workplace / "elsewhere" / "analysis" / "analysis.json").is_file()
    assert not (run_copy / "analysis.csv").exists()


def test_the_output_says_exactly_what_was_measured(run_copy, capsys):
    assert pdvit(["analyze", str(run_copy), "--limit", "12", "--device", "cpu"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    for text in (
        *LAYERS,
        "12 (digits, test split, 12 of 360",
        "16 patches per image; prefix tokens dropped: 1",
        "before the final norm",
        "raw; float32 on cpu",
        "mean of |cos|",
        str(run_copy / "analysis.csv"),
        f"pdvit plot similarity {run_copy}",
    ):
        assert text in shown
    assert "collapse" in shown


def test_the_next_command_can_be_pasted(run_copy, workplace, capsys):
    shutil.copytree(run_copy, workplace / "my run")
    assert pdvit(["analyze", "my run", "--limit", "2", "--metrics", "similarity_signed", "--device", "cpu"]) == 0
    assert "pdvit plot metrics 'my run'" in capsys.readouterr().out


def test_the_bars_grow_with_p(run_copy, capsys):
    assert pdvit(["analyze", str(run_copy), "--limit", "12", "--device", "cpu"]) == 0
    lines = capsys.readouterr().out.splitlines()
    rows = [line for line in lines if line.startswith(("embed", "block", "norm"))]
    (width,) = [line.split()[-1].count("·") + 2 for line in lines if line.startswith("layer  ")]
    assert max(map(len, rows)) <= 80
    table = pd.read_csv(run_copy / "analysis.csv")
    assert [row.count("█") for row in rows] == [round(width * value) for value in means(table, "similarity")]


def test_json_is_all_that_is_printed(run_copy, analyzed):
    result = analyzed(run_copy, "--limit", 4)
    assert [layer["layer"] for layer in result["layers_measured"]] == LAYERS


class TestRefused:
    def test_what_is_not_there(self, refusal, workplace):
        assert "absent" in refusal("analyze", "absent").where
        assert "absent" in refusal("analyze", "absent.safetensors").where

    def test_a_folder_that_is_no_run(self, refusal, tmp_path):
        assert "model.safetensors" in refusal("analyze", tmp_path).what

    def test_a_run_that_is_not_finished(self, refusal, run_copy):
        (run_copy / "model.safetensors").unlink()
        assert "resume" in refusal("analyze", run_copy).tip

    @pytest.mark.parametrize("keep", [0, 4, 40, 5000])
    def test_a_truncated_file(self, refusal, run_copy, keep):
        file = run_copy / "model.safetensors"
        file.write_bytes(file.read_bytes()[:keep])
        assert "safetensors" in refusal("analyze", run_copy).what
        assert not (run_copy / "analysis.csv").exists()

    def test_a_header_that_claims_to_be_endless(self, refusal, workplace):
        Path("huge.safetensors").write_bytes((2**62).to_bytes(8, "little") + b"{}")
        assert "safetensors" in refusal("analyze", "huge.safetensors").what

    @pytest.mark.parametrize("name", ["evil.safetensors", "evil.pth", "evil.bin", "evil.pt", "evil"])
    def test_a_pickle_is_never_opened(self, refusal, workplace, name):
        class Evil:
            def __reduce__(self):
                return os.mkdir, (str(workplace / "owned"),)

        Path(name).write_bytes(pickle.dumps({"model": Evil()}))
        refusal("analyze", name)
        assert not (workplace / "owned").exists()
        pickle.loads(Path(name).read_bytes())  # the trap works
        assert (workplace / "owned").exists()

    @pytest.mark.parametrize(
        "config",
        [
            "no json",
            "[" * 100_000,
            "[1]",
            '{"architecture": 3}',
            '{"architecture": "os.system"}',
            '{"architecture": "hf-hub:somebody/model"}',
            '{"architecture": "local-dir:."}',
            '{"architecture": "test_vit", "model_args": 3}',
            '{"architecture": "test_vit", "model_args": {"pretrained": true}}',
            '{"architecture": "test_vit", "model_args": {"checkpoint_path": "evil.pth"}}',
            '{"architecture": "test_vit", "model_args": {"pretrained_cfg": {"file": "evil.pth"}}}',
            '{"architecture": "test_vit", "model_args": {"depth": 1000000000}}',
            '{"architecture": "test_vit", "model_args": {"embed_dim": 64000000}}',
            '{"architecture": "test_vit", "model_args": {"embed_dim": -64}}',
            '{"architecture": "test_vit", "model_args": {"embed_dim": "wide"}}',
            '{"architecture": "test_vit", "model_args": {"patch_size": 0}}',
            '{"architecture": "test_vit", "model_args": {"num_heads": 0}}',
            '{"architecture": "test_vit", "model_args": {"norm_layer": "os.system"}}',
            '{"architecture": "resnet18"}',
        ],
        ids=lambda config: config[:90],
    )
    def test_a_hostile_header(self, refusal, workplace, config):
        tensors = timm.create_model("test_vit", pretrained=False).state_dict()
        save_file(tensors, "hostile.safetensors", metadata={"config.json": config})
        assert "hostile.safetensors" in refusal("analyze", "hostile.safetensors").where

    def test_weights_of_another_model(self, refusal, run_copy):
        tensors = load_file(run_copy / "model.safetensors")
        config = (run_copy / "config.json").read_text()
        for changed in (
            {name: value for name, value in tensors.items() if name != "cls_token"},
            tensors | {"surplus": torch.zeros(1)},
            tensors | {"cls_token": torch.zeros(1, 1, 99)},
        ):
            save_file(changed, run_copy / "model.safetensors", metadata={"config.json": config})
            refusal("analyze", run_copy)

    def test_weights_that_are_no_numbers(self, refusal, run_copy):
        tensors = load_file(run_copy / "model.safetensors")
        tensors["blocks.1.norm1.weight"].fill_(float("nan"))
        config = (run_copy / "config.json").read_text()
        save_file(tensors, run_copy / "model.safetensors", metadata={"config.json": config})
        assert "block 2" in refusal("analyze", run_copy, "--limit", 4).what

    def test_images_that_are_not_there(self, refusal, run_copy, tmp_path):
        assert "absent" in refusal("analyze", run_copy, "--images", "absent").where
        assert "digits" in refusal("analyze", run_copy, "--images", "digts").tip
        (tmp_path / "empty").mkdir()
        assert "no images" in refusal("analyze", run_copy, "--images", tmp_path / "empty").what

    def test_images_that_do_not_decode(self, refusal, run_copy, image_folder):
        for name in ("bad-one.png", "bad-two.png"):
            (image_folder / name).write_text("not an image")
        found = refusal("analyze", run_copy, "--images", image_folder)
        assert "2 images" in found.what
        assert "bad-one.png" in found.where
        assert "bad-two.png" in found.where

    def test_one_folder_for_several_analyses(self, refusal, run_copy, tmp_path):
        assert "--out" in refusal("analyze", run_copy, run_copy, "--out", tmp_path / "both").where

    def test_a_place_below_a_file(self, refusal, run_copy, tmp_path):
        (tmp_path / "file").touch()
        refusal("analyze", run_copy, "--limit", 4, "--out", tmp_path / "file" / "folder")

    @pytest.mark.parametrize(
        "arguments", [["--limit", "0"], ["--batch-size", "0"], ["--device", "gpu"], ["--limt", "3"]], ids=" ".join
    )
    def test_bad_options(self, refusal, run_copy, arguments):
        refusal("analyze", run_copy, *arguments)


def test_metrics_are_chosen_by_name(run_copy, analyzed):
    result = analyzed(run_copy, "--limit", 6, "--metrics", "rank,pairs", "--metrics", "cka")
    names = {"effective_rank", "participation_ratio", "cka_last"}
    names |= {f"pairs_p{at}" for at in ("05", "25", "50", "75", "95")}
    assert set(result["metrics"]) == names
    assert result["verdict"] is result["advice"] is None
    assert "no verdict, which needs P: --metrics similarity" in result["notes"]
    assert [layer["layer"] for layer in result["layers_measured"]] == LAYERS
    assert all(set(layer) == names | {"layer", "depth"} for layer in result["layers_measured"])
    assert result["layers_measured"][-1]["cka_last"] == {"mean": pytest.approx(1), "std": None, "ci95": None}
    with np.load(run_copy / "analysis" / "pairs.npz") as curves:
        assert curves["histogram/block 1"].sum() == pytest.approx(1)
    with np.load(run_copy / "analysis" / "cka.npz") as curves:
        assert curves["layers"].tolist() == LAYERS
        assert curves["matrix"].shape == (4, 4)
    analyzed(run_copy, "--limit", 6)  # what the next analysis did not measure goes away
    assert [file.name for file in (run_copy / "analysis").iterdir()] == ["analysis.json"]


def test_the_command_prints_each_definition(run_copy, capsys):
    assert pdvit(["analyze", str(run_copy), "--limit", "4", "--device", "cpu", "--metrics", "similarity,drift"]) == 0
    lines = capsys.readouterr().out.splitlines()
    for name, heading in {"similarity": "P", "drift_cosine": "own", "drift_retrieval": "found"}.items():
        assert f"measured {name} ({heading}): {DEFINITIONS[name].text}" in lines
    assert any(line.startswith("note     drift is measured from block 1") for line in lines)


def test_without_p_the_next_figure_is_of_what_was_measured(run_copy, tmp_path, capsys):
    run = run_copy.rename(tmp_path / "my run")
    assert pdvit(["analyze", str(run), "--limit", "4", "--device", "cpu", "--metrics", "norms"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == f"next     pdvit plot metrics '{run}'"


def test_an_unknown_metric_names_the_closest(run_copy, refusal):
    assert "did you mean 'spectrum'" in refusal("analyze", run_copy, "--metrics", "spectrm").tip
    assert "at least 4 images" in refusal("analyze", run_copy, "--metrics", "cka", "--limit", 2).tip


def test_random_weights_of_the_same_model_are_measured_on_the_spot(run_copy, analyzed):
    result = analyzed(run_copy, "--limit", 100)
    config = json.loads((run_copy / "config.json").read_text())
    torch.manual_seed(0)
    random = timm.create_model(config["architecture"], **config["model_args"])
    held_out = library.data.sources.open_source(library.config.schema.DataConfig()).splits["test"].images
    chosen = torch.linspace(0, 359, 100).round().long()[torch.linspace(0, 99, 32).round().long()]
    data = timm.data.resolve_model_data_config(timm.create_model(f"local-dir:{run_copy}", pretrained=True))
    mean, std = (torch.tensor(data[name])[:, None, None] for name in ("mean", "std"))
    expected = library.analyze(random, (held_out[chosen] / 255 - mean) / std, "similarity")
    assert json_means(result, "similarity_random") == pytest.approx(expected["mean"].tolist(), abs=1e-5)
    assert f"(random weights on the same images: {expected['mean'].iloc[-1]:.3f})" in result["verdict"]
    assert str(run_copy) in result["advice"] or "nothing" in result["advice"]


def test_random_weights_that_find_no_memory_do_not_cost_the_analysis(run_copy, analyzed, monkeypatch):
    def full(loaded, seed=0):
        raise UserError("the model is too big for memory", "here", "take a smaller one")

    monkeypatch.setattr(analyze_run.Loaded, "with_random_weights", full)
    result = analyzed(run_copy, "--limit", 6)
    assert "random weights were not measured: the model is too big for memory" in result["notes"]
    assert result["verdict"]
    assert "random weights on" not in result["verdict"]


@pytest.fixture
def interrupt(monkeypatch):
    """Return a function that lets so many Ctrl-C come after so many batches, of the `nth` time that images are read."""

    def prepare(after: int, times: int = 1, nth: int = 1) -> None:
        original, calls = analyze_run.shared_batches, itertools.count(1)

        def batches(*arguments):
            here = next(calls) == nth
            for number, batch in enumerate(original(*arguments)):
                if here and number == after:
                    for _ in range(times):
                        os.kill(os.getpid(), signal.SIGINT)
                yield batch

        monkeypatch.setattr(analyze_run, "shared_batches", batches)

    return prepare


def test_an_interrupt_leaves_what_is_there_so_far_and_says_so(run_copy, tmp_path, interrupt, capsys):
    other = shutil.copytree(run_copy, tmp_path / "other")
    interrupt(after=3)
    capsys.readouterr()
    status = pdvit(["analyze", str(run_copy), str(other), "--limit", "40", "-b", "5", "-j", "0", "--device", "cpu"])
    shown = " ".join(capsys.readouterr().out.split())
    assert status == 75
    assert "stopped: on request, after 15 of 40 images" in shown
    assert f"stopped; not measured: {other}" in shown
    assert "images 15 (" in shown
    table = pd.read_csv(run_copy / "analysis.csv")
    assert (table["images"] == 15).all()
    assert "similarity_random" not in set(table["metric"])
    facts = json.loads((run_copy / "analysis" / "analysis.json").read_text())
    assert facts["stopped"] == "on request, after 15 of 40 images"
    assert facts["images_measured"] == 15
    assert not (other / "analysis.csv").exists()


def test_an_interrupt_while_random_weights_are_measured_keeps_the_rest(run_copy, interrupt, capsys):
    interrupt(after=1, nth=2)
    assert pdvit(["analyze", str(run_copy), "--limit", "40", "-b", "5", "-j", "0", "--device", "cpu"]) == 75
    table = pd.read_csv(run_copy / "analysis.csv")
    assert (table["images"] == 40).all()
    facts = json.loads((run_copy / "analysis" / "analysis.json").read_text())
    assert "stopped before random weights were measured" in facts["notes"]


def test_an_interrupt_before_the_first_image_writes_nothing(run_copy, interrupt, capsys):
    interrupt(after=0)
    assert pdvit(["analyze", str(run_copy), "--limit", "40", "-j", "0", "--device", "cpu"]) == 75
    assert f"stopped; not measured: {run_copy}" in capsys.readouterr().out
    assert not (run_copy / "analysis.csv").exists()


def test_a_second_interrupt_ends_at_once(run_copy, interrupt):
    interrupt(after=3, times=2)
    assert pdvit(["analyze", str(run_copy), "--limit", "40", "-b", "5", "-j", "0", "--device", "cpu"]) == 130
    assert not (run_copy / "analysis.csv").exists()


@pytest.mark.slow
def test_several_processes_measure_what_one_does(run_copy, tmp_path):
    options = ["--limit", "50", "-b", "8", "-j", "0", "--device", "cpu", "--metrics", "similarity,rank,pairs,cka"]
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
    shown = {}
    for count in (1, 3):
        out = ["--out", str(tmp_path / str(count))]
        done = subprocess.run(
            [*start, str(count), "-m", "pdvit", "analyze", str(run_copy), *options, *out],
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        shown[count] = done.stdout
    one, several = (pd.read_csv(tmp_path / count / "analysis.csv") for count in ("1", "3"))
    pd.testing.assert_frame_equal(several, one, rtol=2e-6)
    assert (one["images"].unique() == [50, 32]).all()
    assert shown[3].count("written") == 1
    with np.load(tmp_path / "1" / "analysis" / "cka.npz") as whole, np.load(tmp_path / "3/analysis/cka.npz") as parts:
        np.testing.assert_allclose(parts["matrix"], whole["matrix"], atol=1e-9)


def test_a_place_that_can_not_be_written_is_refused_before_any_work(refusal, tmp_path):
    (tmp_path / "file").touch()
    assert str(tmp_path / "file") in refusal("analyze", "absent", "--out", tmp_path / "file" / "folder").where


def test_broken_images_are_left_out_where_that_is_asked_for_and_counted(run_copy, image_folder, analyzed, refusal):
    (image_folder / "bad.png").write_text("not an image")
    assert "--on-bad-image skip" in refusal("analyze", run_copy, "--images", image_folder).tip
    result = analyzed(run_copy, "--images", image_folder, "--on-bad-image", "skip")
    assert result["images_measured"] == 30
    assert "1 left out that do not decode" in result["images"]
    only = refusal("analyze", run_copy, "--images", image_folder / "bad.png", "--on-bad-image", "skip")
    assert "no images to measure" in only.what
    assert "skip" in refusal("analyze", run_copy, "--on-bad-image", "ignore").tip


def test_an_image_that_several_processes_meet_is_counted_once(run_copy, image_folder):
    class Twice(Ranks):
        def all_gather(self, value):
            return [value, copy.deepcopy(value)]

    (image_folder / "bad.png").write_text("not an image")
    images, metrics = [str(image_folder)], ["similarity"]
    options = analyze_run.AnalyzeOptions(images, metrics, workers=0, device="cpu", on_bad_image="skip")
    analyzer = analyze_run.Analyzer(options, make_console(True))
    analyzer.ranks = Twice()
    found = analyzer.measure(str(run_copy), None)
    assert "; 1 left out that do not decode" in found.facts["images"]


def test_constant_images_leave_no_gap_in_the_table(run_copy, tmp_path, analyzed):
    for number, colour in enumerate(("black", "white", "grey", "red")):
        Image.new("RGB", (40, 40), colour).save(tmp_path / f"{number}.png")
    groups = "similarity,similarity_signed,norms,pairs,drift,rank,spectrum,attention,cka"
    result = analyzed(run_copy, *[f"--images={tmp_path / f'{number}.png'}" for number in range(4)], "--metrics", groups)
    table = pd.read_csv(run_copy / "analysis.csv")
    assert table["mean"].notna().all()
    assert np.isfinite(table["mean"]).all()
    assert result["images_measured"] == 4


def test_a_model_of_a_single_patch_is_refused(workplace, refusal):
    torch.save(timm.create_model("test_vit", img_size=16).state_dict(), "one.pth")
    assert "single patch" in refusal("analyze", "one.pth", "--model", "test_vit").what


def test_a_model_of_other_channels_is_refused(workplace, refusal):
    torch.save(timm.create_model("test_vit", in_chans=1).state_dict(), "grey.pth")
    assert "patch_embed.proj.weight" in refusal("analyze", "grey.pth", "--model", "test_vit").what


def test_a_model_that_is_too_big_for_memory_is_refused_before_it_is_built(run_copy, refusal, monkeypatch):
    size = (run_copy / "model.safetensors").stat().st_size
    for left, where in ((size - 1, "model.safetensors"), (size // 2, "model.safetensors")):
        monkeypatch.setattr(memory, "available", lambda left=left: left)
        found = refusal("analyze", run_copy)
        assert "too big for memory" in found.what
        assert where in found.where


def test_grey_images_of_any_shape_are_fitted_to_the_model_and_that_is_said(run_copy, tmp_path, analyzed):
    levels = np.random.default_rng(0).integers(0, 255, (50, 37), dtype=np.uint8)
    Image.fromarray(levels).save(tmp_path / "grey.png")
    Image.fromarray(levels).convert("RGB").save(tmp_path / "colour.png")
    grey, colour = (analyzed(run_copy, "--images", tmp_path / name) for name in ("grey.png", "colour.png"))
    assert "RGB, short side scaled, centre crop to 32x32 px" in grey["images"]
    assert json_means(grey, "similarity") == json_means(colour, "similarity")


@pytest.mark.slow
def test_checkpoints_of_every_form_are_measured_at_once(workplace, analyzed):
    torch.manual_seed(0)
    state = timm.create_model("test_vit", num_classes=0).state_dict()
    forms = {
        "plain.pth": state,
        "deit.pth": {"model": state, "epoch": 3},
        "dino.pth": {"teacher": {f"backbone.{name}": value for name, value in state.items()}},
        "timm.pth.tar": {"state_dict": state, "arch": "test_vit"},
    }
    for name, content in forms.items():
        torch.save(content, name)
    save_file(state, "alone.safetensors")
    Path("folder").mkdir()
    shutil.copy("alone.safetensors", "folder/model.safetensors")
    Path("folder/config.json").write_text('{"architecture": "test_vit", "num_classes": 0}')
    results = analyzed(*forms, "alone.safetensors", "local-dir:folder", "--model", "test_vit", "--limit", 2)
    assert len(results) == 6
    assert len({json.dumps(result["layers_measured"]) for result in results}) == 1
    assert [result["model"] for result in results] == ["plain", "deit", "dino", "timm.pth", "alone", "folder"]


def test_cka_between_checkpoints_goes_into_the_first_one(run_copy, tmp_path, analyzed):
    others = [Path(shutil.copytree(run_copy, tmp_path / place / "other")) for place in ("one", "two")]
    state = load_file(others[1] / "model.safetensors")
    save_file(
        {name: -value for name, value in state.items()},
        others[1] / "model.safetensors",
        metadata={"config.json": (run_copy / "config.json").read_text()},
    )
    results = analyzed(run_copy, *others, "--metrics", "cka", "--limit", 40, "--batch-size", 10)
    assert "is in analysis/cka_between.npz of copied" in results[1]["notes"][0]
    with np.load(run_copy / "analysis" / "cka_between.npz") as found, np.load(run_copy / "analysis" / "cka.npz") as own:
        assert set(found) == {"layers", "layers/other", "layers/other (2)", "matrix/other", "matrix/other (2)"}
        assert found["layers"].tolist() == found["layers/other"].tolist() == LAYERS
        np.testing.assert_allclose(found["matrix/other"], own["matrix"], atol=1e-9)
        assert not np.allclose(found["matrix/other (2)"], own["matrix"], atol=1e-4)


def test_cka_between_checkpoints_on_different_images_is_left_out_with_the_reason(run_copy, tmp_path, analyzed):
    other = Path(shutil.copytree(run_copy, tmp_path / "other"))
    recipe = (other / "run.toml").read_text()
    (other / "run.toml").write_text(recipe.replace('source = "digits"', 'source = "digits:0-4"'))
    results = analyzed(run_copy, other, "--metrics", "cka", "--limit", 12)
    assert "they were measured on different images" in results[1]["notes"][-2]
    assert not (run_copy / "analysis" / "cka_between.npz").exists()
