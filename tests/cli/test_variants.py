"""Presets, variants and schedules of the terms, through `pdvit train`."""

import json
import math
import tomllib
from pathlib import Path

import pytest
from safetensors.torch import load_file

from pdvit.cli import run as pdvit
from pdvit.config.schema import PRESETS, TERMS

SHORT = ["--epochs", "3st", "--batch-size", "16", "--img-size", "24", "--log-interval", "1st", "--mixup-prob", "1"]


@pytest.fixture
def train(workplace, tiny):
    """Return a function that trains three steps and returns the run directory."""

    def start(*flags: str, out: str = "run") -> Path:
        assert pdvit(["train", *tiny, *SHORT, *flags, "--out", out]) == 0
        return workplace / out

    return start


def recipe(run: Path) -> dict:
    return tomllib.loads((run / "run.toml").read_text())


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_trains_its_terms_with_its_weights(train, records, preset):
    run = train("--diversity", preset)
    wanted = {name: getattr(PRESETS[preset], name) for name in TERMS}
    for record in records(run, "train"):
        assert {name for name in TERMS if name in record} == {name for name in TERMS if wanted[name]}
        assert all(math.isfinite(record[name]) for name in ("loss", "class", "grad_norm"))
        if preset == "diverse-vit":  # 9 patches
            expected = (record["class"] + 9 * record["mixing"]) / 10 + 0.5 * (record["cosine"] + record["contrastive"])
        else:
            expected = record["class"] + sum(wanted[name] * record[name] for name in TERMS if wanted[name])
        assert record["loss"] == pytest.approx(expected, rel=1e-5)
    found = recipe(run)
    assert {name: found["diversity"][name] for name in TERMS} == wanted
    assert found["diversity"]["variant"] == PRESETS[preset].variant
    assert found["augment"]["cutmix"] == float(wanted["mixing"] > 0 or preset == "cutmix")
    assert json.loads((run / "summary.json").read_text())["steps"] == 3


@pytest.mark.slow
def test_the_variants_differ_in_their_terms_from_the_first_step(train, records):
    first = {}
    for variant in ("paper", "v1", "released", "diverse-vit"):
        run = train("--variant", variant, "--cosine", str(float(variant != "released")), out=variant)
        first[variant] = records(run, "train")[0]
    assert len({round(record["contrastive"], 7) for record in first.values()}) == 4
    assert first["paper"]["cosine"] > first["v1"]["cosine"]
    assert first["diverse-vit"]["cosine"] == pytest.approx((8 * first["v1"]["cosine"] + 1) / 9, rel=1e-4)
    assert first["released"]["mixing"] < first["paper"]["mixing"] == first["v1"]["mixing"]


@pytest.mark.slow
def test_a_recipe_repeats_a_variant_with_its_schedules(train):
    flags = ["--diversity", "released", "--mixing-schedule", "warmup:2st", "--contrastive-schedule", "decay:50%"]
    run = train(*flags)
    assert recipe(run)["diversity"]["mixing_schedule"] == "warmup:2st"
    assert pdvit(["train", "--config", "run/run.toml", "--out", "again"]) == 0
    ours, again = (load_file(Path(name) / "model.safetensors") for name in ("run", "again"))
    assert all((ours[name] == again[name]).all() for name in ours)


def test_a_schedule_weighs_the_loss_and_the_records_stay_as_they_are(train, records):
    run = train("--cosine-schedule", "warmup:2st", "--mixing-schedule", "until:1st", "--contrastive", "0")
    for step, record in enumerate(records(run, "train")):
        expected = record["class"] + min(1, step / 2) * record["cosine"] + (step < 1) * record["mixing"]
        assert record["loss"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("parts", [[], ["--micro-batch-size", "5"]], ids=["whole", "parts"])
def test_a_stopped_run_goes_on_with_the_factors_of_its_steps(train, tiny, workplace, records, parts):
    flags = ["--koleo", "0.2", "--koleo-schedule", "warmup:100%", "--cosine-schedule", "decay:2st", *parts]
    whole = train(*flags, out="whole")
    assert pdvit(["train", *tiny, *SHORT, *flags, "--time-limit", "0.001s", "--out", "run"]) == 75
    assert len(records(workplace / "run", "train")) < 3
    assert pdvit(["train", "--resume", "run", "--change", "run.time_limit=1h"]) == 0
    assert records(workplace / "run") == records(whole)
    assert (workplace / "run/model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")  # torch's own, of its compiler
def test_a_compiled_step_equals_an_eager_one(train):
    flags = ["--diversity", "released", "--koleo", "0.1", "--spectral", "0.1", "--mixing-schedule", "warmup:3st"]
    plain, compiled = train(*flags, out="plain"), train(*flags, "--compile", out="compiled")
    ours, theirs = (load_file(run / "model.safetensors") for run in (compiled, plain))
    assert all(ours[name].allclose(theirs[name], atol=1e-5) for name in theirs)


@pytest.mark.parametrize(
    ("flags", "what", "tip"),
    [
        (["--diversity", "relased"], "relased", "released"),
        (["--variant", "v2"], "v2", "v1"),
        (["--diversity", "released", "--cosine", "1"], "no cosine term", "--cosine 0"),
        (["--koleo", "-1"], "-1", "at least 0"),
        (["--spectral", "nan"], "nan", "at least 0"),
        (["--cosine-schedule", "warmpu:3ep"], "warmpu", "warmup"),
        (["--koleo-schedule", "until:10min"], "10min", "30ep"),
    ],
    ids=" ".join,
)
def test_bad_input_is_named_and_leaves_no_run(refusal, workplace, tiny, flags, what, tip):
    found = refusal("train", *tiny, *flags)
    assert what in found.what
    assert tip in found.tip
    assert not (workplace / "runs").exists()


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ([], "patch CutMix on 100% of batches"),
        (["--mixup", "0.8"], "patch CutMix on 50% of batches and Mixup on 50% of batches"),
        (["--mixup", "0.8", "--cutmix", "0"], "; Mixup on 100% of batches"),
        (["--diversity", "none"], "terms: none; no CutMix"),
        (["--diversity", "v1", "--cosine-schedule", "warmup:2st"], "mixing 1 (v1), cosine warmup:2st;"),
    ],
)
def test_what_is_trained_is_said(train, capsys, flags, said):
    train(*flags)
    assert said in capsys.readouterr().out
