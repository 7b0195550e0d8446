"""The calls from Python, against the commands and against timm's own preprocessing."""

import html
import json
import re
import signal

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import timm
import torch
import torchvision
from PIL import Image
from torch.utils.data import DataLoader

import pdvit
from pdvit.cli import run as command
from pdvit.data import loader
from pdvit.errors import UserError
from pdvit.workflows.library import ExplorerPage
from tests.conftest import TINY
from tests.unit.data.batches import OnGpu
from tests.unit.models.support import make


@pytest.fixture(scope="module")
def model() -> torch.nn.Module:
    return make("vit_tiny_patch16_224")


def test_a_checkpoint_is_analyzed_as_the_command_does(run_copy, monkeypatch):
    monkeypatch.chdir(run_copy.parent)
    assert command(["analyze", str(run_copy), "--device", "cpu"]) == 0
    facts = json.loads((run_copy / "analysis" / "analysis.json").read_text())
    opened = pdvit.load(run_copy, device="cpu")
    for found in (pdvit.analyze(opened), pdvit.analyze(str(run_copy))):
        pd.testing.assert_frame_equal(found.table, pd.read_csv(run_copy / "analysis.csv"), rtol=1e-4, atol=1e-5)
        assert found.verdict == facts["verdict"]
        assert len(found.random) == len(found.layers)
    assert html.unescape(found._repr_html_().partition("</p><table")[0][3:]).split("<br>") == found.verdict.split("\n")
    assert (len(opened.images.split), opened.preprocessing.size) == (360, 32)
    assert pdvit.analyze(opened, torch.randn(2, 3, 32, 32)).random.empty


def test_the_policy_of_a_run_for_images_that_do_not_decode_is_that_of_the_command(run_copy, image_folder):
    recipe = (run_copy / "run.toml").read_text().replace('"digits"', f'"{image_folder}"')
    (run_copy / "run.toml").write_text(recipe.replace('on_bad_image = "error"', 'on_bad_image = "skip"'))
    (image_folder / "val" / "red" / "0.png").write_bytes(b"broken")
    assert command(["analyze", str(run_copy), "--device", "cpu", "--workers", "0"]) == 0
    opened = pdvit.load(run_copy, device="cpu")
    found = pdvit.analyze(opened)
    pd.testing.assert_frame_equal(found.table, pd.read_csv(run_copy / "analysis.csv"), rtol=1e-4, atol=1e-5)
    assert (set(found.table["images"]), found.notes) == ({5}, ["1 image left out that can't be decoded"])
    assert len(pdvit.token_maps(opened)["norm"]) == 5
    assert "red/0.png" not in pdvit.explore(opened).html
    with pytest.raises(UserError, match=r"(?s)does not decode.*on_bad_image='skip'"):  # as with --images
        pdvit.analyze(opened, str(image_folder))
    skipping = {"on_bad_image": "skip"}
    assert set(pdvit.analyze(opened.model, str(image_folder), **skipping).table["images"]) == {29}
    assert len(pdvit.token_maps(opened.model, str(image_folder), **skipping)["norm"]) == 29
    assert "0.png" in pdvit.explore(opened.model, str(image_folder), **skipping).html


def test_what_a_file_leaves_open_is_a_note_of_the_analysis(tmp_path):
    weights = timm.create_model("vit_small_patch16_224", num_classes=3).state_dict()
    torch.save(weights, tmp_path / "a.pth")
    opened = pdvit.load(tmp_path / "a.pth", model="vit_small_patch16_224", device="cpu")
    found = pdvit.analyze(opened, torch.randn(1, 3, 224, 224), "similarity")
    assert found.notes == [*opened.loaded.notes] != []
    assert f"note: {found.notes[0]}" in repr(found)
    assert f"note: {html.escape(found.notes[0])}" in found._repr_html_()


def test_images_are_prepared_as_timm_does(model, image_folder):
    files = sorted((image_folder / "val").rglob("*.png"))
    opened = [Image.open(file) for file in files]
    config = timm.data.resolve_model_data_config(model) | {"input_size": (3, 32, 32)}
    transform = timm.data.create_transform(**config, is_training=False)
    tensors = torch.stack([transform(image.convert("RGB")) for image in opened])
    expected = pdvit.analyze(model, tensors).table
    ways = [opened, files, str(image_folder / "val"), {"pixel_values": tensors}, tensors.double()]
    ways += [[{"pixel_values": part, "labels": 0} for part in tensors.split(2)], DataLoader(tensors, batch_size=4)]
    for images in ways:
        pd.testing.assert_frame_equal(pdvit.analyze(model, images).table, expected, rtol=1e-4, atol=1e-6)
    assert set(pdvit.analyze(model, opened[0]).table["images"]) == {1}
    assert set(pdvit.analyze(model).table["images"]) == {2}  # photographs


def test_a_model_that_views_its_convolution_is_analyzed_on_a_gpu(model, image_folder, monkeypatch):
    """A view of a convolution of channels last is an error."""
    monkeypatch.setattr(loader, "copy_to", lambda _, images, labels: (images.as_subclass(OnGpu), labels))
    handle = model.patch_embed.proj.register_forward_hook(lambda *args: args[2].view(len(args[2]), -1).view_as(args[2]))
    expected = pdvit.analyze(model, torch.zeros(1, 3, 32, 32)).layers
    assert pdvit.analyze(model, str(image_folder)).layers == expected
    handle.remove()


def test_token_maps_have_the_tokens_of_a_layer_on_its_grid(model):
    images, seen = torch.randn(3, 3, 32, 32), []
    handle = model.blocks[0].register_forward_hook(lambda _, __, output: seen.append(output))
    maps = pdvit.token_maps(model, images.split(2))
    handle.remove()
    assert list(maps) == ["embed", "block 1", "block 2", "norm"]
    assert torch.equal(maps["block 1"], torch.cat(seen)[:, 1:].reshape(3, 4, 4, 24))


def test_the_explorer_is_a_page_in_a_frame(model):
    for images, names in ((None, ["china.jpg", "flower.jpg"]), (torch.randn(2, 3, 32, 32), ["image 0", "image 1"])):
        page = pdvit.explore(model, images)
        (frame,) = re.findall(r'srcdoc="([^"]*)"', page._repr_html_())
        assert html.unescape(frame) == page.html
        assert all(name in page.html for name in names)


def test_several_models_are_in_one_explorer_on_the_images_of_the_first(model, run_copy):
    def models_of(page: ExplorerPage) -> list[dict]:
        return json.loads(re.search(r'type="application/json">(.*?)</script>', page.html, re.DOTALL)[1])["models"]

    run, *others = models_of(pdvit.explore([run_copy, model, model]))
    assert [run["name"], *(it["name"] for it in others)] == ["copied", "model 2", "model 3"]
    assert [len(values) for values in run["random"]] == [len(values) for values in run["similarity"]]
    assert others[0]["random"] == []
    pair = models_of(pdvit.explore([model, model], iter(torch.randn(3, 1, 3, 32, 32)), name=["a", "b"]))
    assert [(it["name"], it["pictures"]) for it in pair] == [("a", [0, 1, 2]), ("b", [0, 1, 2])]
    for models, name, what in (([model], ["a", "b"], "2 names for 1"), (5 * [model], "", "5 checkpoints do not fit")):
        with pytest.raises(UserError, match=what):
            pdvit.explore(models, name=name)


def test_plots_return_axes_with_the_numbers(model):
    found = pdvit.analyze(model, torch.randn(3, 3, 32, 32), "similarity")
    _, axes = plt.subplots()
    assert found.plot(ax=axes) is axes
    both = pdvit.plots.similarity(found, found.table.assign(model="<b>"))
    for line in (axes.lines[0], *both.lines):
        np.testing.assert_array_equal(line.get_ydata(), found.table["mean"])
    assert [text.get_text() for text in both.get_legend().get_texts()] == ["model", "<b>"]
    plt.close("all")


def test_training_is_that_of_the_command(tmp_path, digits_run):
    settings = {"depth": 2, "width": 16, "heads": 1, "patch_size": 8, "device": "cpu"}
    assert [f"--{name.replace('_', '-')}" for name in settings] == TINY[::2]
    run = pdvit.train({"optim": {"epochs": "1"}}, **settings, tf32=False, epochs=2, batch_size=128, out=tmp_path / "a")
    for name in ("model.safetensors", "run.toml"):
        assert (run.path / name).read_text("latin") == (digits_run / name).read_text("latin")
    assert run.summary["split"] == "test"


def test_an_interrupt_before_training_is_a_keyboard_interrupt(monkeypatch, tmp_path):
    interrupt = lambda *_, **__: signal.raise_signal(signal.SIGINT)  # noqa: E731
    monkeypatch.setattr("pdvit.workflows.runs.open_source", interrupt)
    with pytest.raises(KeyboardInterrupt, match="no file was written"):
        pdvit.train(out=tmp_path / "a", device="cpu", depth=2, width=16, heads=1)
    assert not (tmp_path / "a").exists()


def test_errors_are_three_lines(model):
    calls = {
        "did you mean 'epochs'": lambda: pdvit.train(epoch=3),
        "optim.lr": lambda: pdvit.train(lr="high"),
        "trains in this process": lambda: pdvit.train(launcher="local"),
        "no such checkpoint": lambda: pdvit.load("x.safetensors"),
        "no such image": lambda: pdvit.analyze(model, "x.png"),
        "there are no images": lambda: pdvit.token_maps(model, torch.zeros(0, 3, 32, 32)),
        "has no P": lambda: pdvit.analyze(model, metrics="rank").plot(),
        "a int is not the name": lambda: pdvit.load(3),
        "a list is no model": lambda: pdvit.analyze([model, model]),
        "does not say how": lambda: pdvit.analyze(torchvision.models.vit_b_32(), Image.new("RGB", (50, 50))),
    }
    for text, call in calls.items():
        with pytest.raises(UserError, match=text) as error:
            call()
        assert error.value._render_traceback_() == str(error.value).split("\n")
        assert len(error.value._render_traceback_()) == 3
