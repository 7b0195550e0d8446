import json
import os
import shutil
from pathlib import Path
from typing import Any

# One thread, here and in the processes that tests start: tiny models only lose time to more, and none depends on it.
os.environ["OMP_NUM_THREADS"] = "1"
# torch looks at it once, at the first product on a GPU; a run with --deterministic may come after another.
os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"

import pytest

from pdvit.cli import run as pdvit
from pdvit.errors import UserError
from tests.errors import check

TINY = ["--depth", "2", "--width", "16", "--heads", "1", "--patch-size", "8", "--device", "cpu"]
COLOURS = {"blue": (40, 60, 200), "green": (30, 160, 60), "red": (200, 40, 30)}


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item) -> None:
    """Skip what is marked `gpu` where there is none."""
    if item.get_closest_marker("gpu"):
        import torch

        if not torch.cuda.is_available():
            pytest.skip("needs a CUDA device, and torch sees none")


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request) -> str:
    """The name of a device: the test runs on a CPU, and with -m gpu on a GPU.

    There in float32 proper, whatever an earlier run in this process chose; a run of the test's own chooses anew.
    """
    if request.param == "cuda":
        import torch

        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
        torch.use_deterministic_algorithms(False)
    return str(request.param)


@pytest.fixture(scope="session")
def tiny() -> list[str]:
    """Flags of a model that trains in a blink."""
    return TINY


@pytest.fixture(scope="session")
def digits_run(tmp_path_factory) -> Path:
    """A finished run, trained once; never write into it, use `run_copy`. Without TF32, also where a GPU measures it."""
    out = tmp_path_factory.mktemp("trained") / "tiny-digits"
    assert pdvit(["train", *TINY, "--no-tf32", "--epochs", "2", "--batch-size", "128", "--out", str(out)]) == 0
    return out


@pytest.fixture
def run_copy(digits_run, tmp_path) -> Path:
    return Path(shutil.copytree(digits_run, tmp_path / "copied"))


@pytest.fixture
def image_folder(tmp_path) -> Path:
    """Three classes, 8 training and 2 validation images each, of different sizes."""
    return write_images(tmp_path / "pictures")


def write_images(root: Path) -> Path:
    import numpy as np
    from PIL import Image

    rng = np.random.default_rng(0)
    for split, count in (("train", 8), ("val", 2)):
        for name, colour in COLOURS.items():
            folder = root / split / name
            folder.mkdir(parents=True)
            for number in range(count):
                noise = rng.integers(-30, 30, (40 + number, 36, 3))
                Image.fromarray((np.array(colour) + noise).clip(0, 255).astype("uint8")).save(folder / f"{number}.png")
    return root


@pytest.fixture(scope="session")
def shapes(tmp_path_factory) -> Path:
    """Images with masks: 8 training and 3 validation images, portrait, odd, some small; never write into it."""
    return write_masks(tmp_path_factory.mktemp("data") / "shapes")


@pytest.fixture
def mask_folder(shapes, tmp_path) -> Path:
    return Path(shutil.copytree(shapes, tmp_path / "shapes"))


def write_masks(root: Path) -> Path:
    """Write images with a disc and a square, and their masks; value 7 is unlabelled."""
    import numpy as np
    from PIL import Image

    rng, lines = np.random.default_rng(0), ["id\tname\tcolour", "0\tground\t#000000", "1\tdisc\t#ff0000"]
    for split, count in (("train", 8), ("val", 3)):
        for number in range(count):
            height, width = 40 + 3 * number, 25 + 5 * number
            mask = np.zeros((height, width), np.uint8)
            rows, columns = np.mgrid[:height, :width]
            mask[(rows - 12) ** 2 + (columns - 10) ** 2 < 60] = 1
            mask[25:35, 8:20] = 2
            mask[:2] = 7
            pixels = np.array([(90, 90, 90), (220, 60, 50), (40, 180, 60)] + [(0, 0, 0)] * 5)[mask]
            pixels = (pixels + rng.integers(-20, 20, pixels.shape)).clip(0, 255).astype(np.uint8)
            for kind, array in (("images", pixels), ("masks", mask)):
                folder = root / kind / split
                folder.mkdir(parents=True, exist_ok=True)
                Image.fromarray(array).save(folder / f"{number}.png")
    lines += ["2\tsquare\t#00ff00", "7\tUnlabelled\t#ffffff", ""]
    (root / "classes.tsv").write_text("\n".join(lines))
    return root


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder that holds the unpacked packs of real images."""
    folder = os.environ.get("PDVIT_TEST_DATA")
    if folder is None:
        pytest.skip("PDVIT_TEST_DATA names no folder with real images")
    return Path(folder)


@pytest.fixture
def workplace(tmp_path, monkeypatch) -> Path:
    """An empty working directory."""
    place = tmp_path / "workplace"
    place.mkdir()
    monkeypatch.chdir(place)
    return place


@pytest.fixture
def refusal(capsys):
    """Return a function that runs a command, wants status 2 and three lines with these texts, and returns the lines."""

    def refuse(*arguments: object, **texts: str) -> UserError:
        capsys.readouterr()
        assert pdvit([str(argument) for argument in arguments]) == 2
        shown = capsys.readouterr().err
        lines = shown.splitlines()
        assert len(lines) == 3, shown
        for line, start in zip(lines, ("error: ", "  where: ", "  tip:   "), strict=True):
            assert line.startswith(start)
            assert line.removeprefix(start).strip()
        error = UserError(*(line.split(":", 1)[1].strip() for line in lines))
        check(error, **texts)
        return error

    return refuse


@pytest.fixture
def started(monkeypatch):
    """Return a function that runs a command up to the start of training and returns its configuration."""

    def start(*arguments: str) -> Any:
        found: list[Any] = []
        monkeypatch.setattr("pdvit.workflows.runs.start", lambda config, *_: found.append(config) or 0)
        assert pdvit(arguments) == 0
        return found[0]

    return start


@pytest.fixture(scope="session")
def analysis_table():
    """Return a function that makes the table of an analysis: one P per layer, embed first and norm last.

    For a single image pass `std=nan`, which is what an empty field of analysis.csv is read as.
    """

    def make(similarity: list[float], std: float = 0.02, images: int = 8) -> Any:
        import pandas as pd

        layers = ["embed", *(f"block {i}" for i in range(1, len(similarity) - 1)), "norm"]
        rows = [
            {"model": "made", "layer": layer, "depth": depth, "metric": metric, "mean": sign * value, "std": std}
            | {"ci95": std, "images": images, "tokens": 16}
            for depth, (layer, value) in enumerate(zip(layers, similarity, strict=True))
            for metric, sign in (("similarity", 1), ("similarity_signed", 0.5))
        ]
        return pd.DataFrame(rows)

    return make


@pytest.fixture(scope="session")
def analysis_folder():
    """Return a function that makes the folder of an analysis with every file that figures read; numbers are made up."""

    def make(folder: Path, depth: int = 3, tokens: tuple[int, ...] = (), seed: int = 0) -> Path:
        import numpy as np
        import pandas as pd

        rng = np.random.default_rng(seed)
        layers = ["embed", *(f"block {i}" for i in range(1, depth + 1)), "norm"]
        counts = list(tokens) or [16] * len(layers)
        names = ("similarity", "similarity_random", "similarity_signed", "dc_share", "cka_last")
        names += ("norm_mean", "norm_std", "norm_peak", "norm_outliers", "attention_entropy", "new_metric")
        rows = [
            {"model": "made", "layer": layer, "depth": at, "metric": name, "std": 0.1, "ci95": 0.05}
            | {"mean": (name == "norm_peak") + rng.uniform(), "images": 8, "tokens": counts[at]}
            for name in names
            for at, layer in enumerate(layers)
            if not name.startswith("attention") or layer.startswith("block")
        ]
        (folder / "analysis").mkdir(parents=True)
        pd.DataFrame(rows).to_csv(folder / "analysis.csv", index=False)
        arrays: dict[str, dict[str, Any]] = {group: {} for group in ("pairs", "attention", "spectrum", "cka", "maps")}
        arrays["cka"] = {"matrix": rng.uniform(size=(len(layers),) * 2), "layers": np.array(layers)}
        arrays["maps"] = {"names": np.array(["cat.png", "dog.png"]), "layers": np.array(layers)}
        arrays["maps"] |= {f"image/{k}": rng.integers(0, 255, (32, 32, 3)).astype("uint8") for k in range(2)}
        for layer, count in zip(layers, counts, strict=True):
            shares = rng.uniform(size=20)
            arrays["pairs"] |= {f"histogram/{layer}": shares / shares.sum(), f"edges/{layer}": np.linspace(-1, 1, 21)}
            curve = {f"by_frequency/{layer}": -rng.uniform(size=3), f"frequency/{layer}": np.array([0, 0.5, 1])}
            arrays["spectrum"] |= curve
            if layer.startswith("block"):
                arrays["attention"] |= {f"{name}/{layer}": rng.uniform(size=2) for name in ("entropy", "distance")}
            arrays["maps"][f"grid/{layer}"] = np.array([round(count**0.5)] * 2)
            for k in range(2):
                arrays["maps"][f"cos/{k}/{layer}"] = rng.integers(-127, 128, (count, count)).astype("int8")
        for group, content in arrays.items():
            np.savez_compressed(folder / "analysis" / f"{group}.npz", **content)
        (folder / "analysis" / "analysis.json").write_text(
            json.dumps({"arguments": [f"{folder}.safetensors", "--images", "a b"], "groups": ["cka"]})
        )
        return folder

    return make
