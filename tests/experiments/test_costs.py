"""What the paper's rows cost, against the multiplications that the models' own repositories state."""

import pandas as pd
import pytest
from costs import HERE, MEASURED, cost_of, operations_of, rates

from pdvit.config import build, read_toml, resolve

# Thousand millions of multiplications of a forward pass: README_deit.md of DeiT, README of Swin, for one image.
PUBLISHED = {"deit-s12-224": 4.6, "swin-t-224": 4.5}
LARGE = {"swin-s-224": 8.7, "swin-b-224": 15.4, "swin-l-384": 103.9}
SLOW = [pytest.param(*row, marks=pytest.mark.slow) for row in LARGE.items()]


@pytest.mark.parametrize(("recipe", "published"), [*PUBLISHED.items(), *SLOW])
def test_a_forward_pass_takes_what_is_published(recipe, published):
    config = resolve(build(("recipe", read_toml(HERE / "recipes" / f"{recipe}.toml"))))
    assert operations_of(config, 1000) / 2e9 == pytest.approx(published, abs=0.06)


def test_a_row_has_the_images_of_all_its_epochs_and_the_table_is_of_this_code():
    row = cost_of(HERE / "recipes" / "deit-b12-224.toml")
    assert row is not None
    assert row["images"] == 400 * (1_281_167 // 576) * 576
    assert row["operations"] == 3 * row["forward"] * row["images"]
    table = pd.read_csv(HERE / "costs.csv", index_col="recipe")
    assert row["operations"] == int(table.loc["deit-b12-224", "operations"])


def test_the_hours_are_those_of_the_measured_steps():
    table = pd.read_csv(HERE / "costs.csv", index_col="recipe").astype({"operations": float})
    for name, rate in rates(HERE / "speed" / "train_step.csv").items():
        assert (table[name] * rate * 3600).tolist() == pytest.approx(table["operations"].tolist(), rel=1e-3)


def test_each_hardware_counts_by_its_fastest_setting(tmp_path):
    usual = {"model": MEASURED, "model_kwargs": "", "img_size": 224, "classes": 1000, "device": "cpu", "threads": 1}
    usual |= {"precision": "fp32", "compile": False, "batch_size": 8, "hardware": "small", "commit": "a"}
    gpu = {"device": "cuda", "hardware": "large", "batch_size": 256}
    compiled = gpu | {"precision": "bf16", "compile": True}
    rounds = [
        *({"paper": images} for images in (1.0, 2.0, 30.0)),  # the median counts
        {"paper": 1.5, "batch_size": 32},
        *(gpu | {"paper": images, "precision": "bf16"} for images in (2000.0, 9000.0, 2500.0)),
        *(compiled | {"paper": images, "threads": threads} for images, threads in ((3000.0, 1), (5000.0, 4))),
        # Nothing of these counts: another model, size or number of classes, and several cores.
        *(compiled | {"paper": 1e6} | other for other in ({"img_size": 512}, {"classes": 10}, {"model": "test_vit"})),
        {"paper": 1e6, "threads": 2},
    ]
    pd.DataFrame([usual | row for row in rounds]).to_csv(tmp_path / "steps.csv", index=False)
    # README_deit.md of DeiT: 4.6 thousand million multiplications of a forward pass; a step is three.
    step = 3 * 2 * 4.6e9
    assert rates(tmp_path / "steps.csv") == {
        "core-hours, small (fp32, batch 8)": pytest.approx(2 * step, rel=0.01),
        "GPU-hours, large (bf16, compiled, batch 256)": pytest.approx(4000 * step, rel=0.01),
    }
