import argparse
import json
import os
import pathlib
import pickle
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.models import save_for_hf
from timm.utils import CheckpointSaver, ModelEmaV3

from pdvit.errors import UserError
from pdvit.models import build as memory
from pdvit.models import checkpoints
from pdvit.models.checkpoints import name_of, read_checkpoint
from tests.unit.models.support import load

VIT, SWIN = "vit_tiny_patch16_224", "swin_tiny_patch4_window7_224"
# Model arguments as timm's training script keeps them.
KWARGS = {"depth": 2, "embed_dim": 24, "num_heads": 2, "patch_size": 8}
SMALL = KWARGS | {"img_size": 32, "num_classes": 3}


def make(name=VIT, seed=0, **more):
    torch.manual_seed(seed)
    model = timm.create_model(name, **(SMALL if name == VIT else {}) | more)
    with torch.no_grad():
        for weight in model.parameters():
            weight.normal_(std=0.2)
    return model.eval()


def logits(model, side=32):
    images = torch.linspace(-1, 1, 2 * 3 * side * side).view(2, 3, side, side)
    with torch.no_grad():
        return model.eval()(images)


def under(prefix, state):
    return {prefix + name: value for name, value in state.items()}


def arguments(**more):
    return argparse.Namespace(model=VIT, img_size=32, model_kwargs=KWARGS, **more)


@pytest.fixture
def save(tmp_path):
    def write(content, name="checkpoint.pth"):
        torch.save(content, tmp_path / name)
        return tmp_path / name

    return write


def same(model, path, **more):
    return torch.equal(logits(load(path, **more).model), logits(model))


def timm_saved(folder, model, average=None):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    saver = CheckpointSaver(model, optimizer, arguments(), average, checkpoint_dir=str(folder))
    saver.save_checkpoint(0, 0.5)
    return folder


def test_a_file_of_timms_saver_says_its_model_its_classes_and_its_size(tmp_path):
    model = make()
    folder = timm_saved(tmp_path, model)
    file = folder / "last.pth.tar"
    assert same(model, file)
    assert load(file).weights == "raw"


def test_what_timms_own_script_leaves_empty_is_not_said(tmp_path):
    # The defaults of timm's train.py for what its file could say of model and images.
    empty = {"gp": None, "drop_path": None, "input_size": None, "mean": None, "std": None, "crop_pct": None}
    args = arguments(interpolation="", **empty)
    model = make()
    saver = CheckpointSaver(model, torch.optim.SGD(model.parameters(), lr=0.1), args, checkpoint_dir=str(tmp_path))
    saver.save_checkpoint(0, 0.5)
    assert same(model, tmp_path / "last.pth.tar")


def test_with_a_moving_average_in_it_the_choice_is_by_name(tmp_path):
    model = make()
    average = ModelEmaV3(model)
    with torch.no_grad():
        for weight in average.module.parameters():
            weight.mul_(0.5)
    file = timm_saved(tmp_path, model, average) / "last.pth.tar"
    assert same(average.module, file, weights="ema")
    assert same(model, file, weights="raw")
    found = load(file)
    assert found.weights == "ema"
    assert torch.equal(logits(found.model), logits(average.module))


MORE = ["_orig_mod.", "_orig_mod.module.", "model.", "model.encoder."]
WRAPPED = ["module.", "module._orig_mod.", "backbone.", *(pytest.param(name, marks=pytest.mark.slow) for name in MORE)]


@pytest.mark.parametrize("prefix", WRAPPED)
@pytest.mark.parametrize("key", ["state_dict", "model", None])
def test_any_prefix_is_found_and_reported(save, prefix, key):
    state = under(prefix, make().state_dict())
    path = save({key: state, "args": arguments()} if key else state | {"args": arguments()})
    found = load(path)
    assert torch.equal(logits(found.model), logits(make()))


def test_deit(save):
    raw, average = make(), make(seed=1)
    args = argparse.Namespace(model=VIT, input_size=32, output_dir="out", lr=5e-4, model_kwargs=KWARGS)
    path = save({"model": raw.state_dict(), "model_ema": average.state_dict(), "epoch": 3, "args": args})
    assert same(average, path)
    assert same(raw, path, weights="raw")


def test_dino_teacher_and_student_without_the_head(save):
    student, teacher = make(num_classes=0), make(seed=1, num_classes=0)
    head = {"mlp.0.weight": torch.zeros(4, 24), "last_layer.weight_g": torch.zeros(4, 1)}
    content = {
        "student": under("module.backbone.", student.state_dict()) | under("module.head.", head),
        "teacher": under("backbone.", teacher.state_dict()) | under("head.", head),
        "args": arguments(arch="vit_small"),
        "dino_loss": {"center": torch.zeros(1, 4)},
    }
    path = save(content)
    assert same(teacher, path)
    assert load(path).weights == "ema"
    assert same(student, path, weights="raw")


def test_a_masked_autoencoder_without_its_decoder(save):
    model = make(num_classes=0)
    decoder = {"mask_token": torch.zeros(1, 1, 8), "decoder_pos_embed": torch.zeros(1, 17, 8)}
    decoder |= under("decoder_blocks.0.", {"norm1.weight": torch.ones(8)}) | {"decoder_embed.weight": torch.ones(8, 24)}
    path = save({"model": model.state_dict() | decoder, "args": argparse.Namespace(model="mae_vit_tiny_patch8")})
    with pytest.raises(UserError) as caught:
        load(path)
    assert "'mae_vit_tiny_patch8' is not timm's name" in caught.value.what
    assert "2 blocks of width 24, patches of 8 pixels" in caught.value.tip
    path = save({"model": model.state_dict() | decoder, "args": arguments()})
    assert same(model, path)


def test_swin_as_microsoft_publishes_it(save):
    model = make(SWIN, img_size=64, window_size=2, num_classes=3)
    state = model.state_dict()
    theirs = {}
    for name, value in state.items():  # downsampling stood at the end of a stage, and the head had no name of its own
        parts = name.split(".")
        if parts[:1] == ["layers"] and parts[2] == "downsample":
            parts[1] = str(int(parts[1]) - 1)
        theirs[".".join(parts).replace("head.fc.", "head.")] = value
    theirs["layers.0.blocks.0.attn.relative_position_index"] = torch.zeros(4, 4, dtype=torch.long)
    theirs["layers.0.blocks.1.attn_mask"] = torch.zeros(4, 4, 4)
    kwargs = {"window_size": 2}
    args = argparse.Namespace(model=SWIN, img_size=64, model_kwargs=kwargs)
    found = load(save({"model": theirs, "args": args}))
    assert torch.equal(logits(found.model, 64), logits(model, 64))


def test_deit3_with_its_own_names_of_layer_scale(save):
    name = "deit3_small_patch16_224"
    model = make(name, **SMALL)
    renamed = {"ls1.gamma": "gamma_1", "ls2.gamma": "gamma_2"}
    state = {key[:-9] + renamed.get(key[-9:], key[-9:]): value for key, value in model.state_dict().items()}
    args = argparse.Namespace(model=name, img_size=32, model_kwargs=KWARGS)
    assert same(model, save({"model": state, "args": args}))


def test_a_folder_of_timm(tmp_path):
    model = make()
    for safe in (True, False):
        folder = tmp_path / str(safe)
        save_for_hf(model, str(folder), safe_serialization=safe)
        assert same(model, folder)
        assert same(model, f"local-dir:{folder}")
    assert load(f"local-dir:{folder}").name == "False"


def test_a_folder_with_several_files_asks_for_one(tmp_path):
    folder = timm_saved(tmp_path, make())
    with pytest.raises(UserError, match=r"several checkpoints: checkpoint-0\.pth\.tar, last\.pth\.tar"):
        load(folder)


def test_a_lone_file_without_words_takes_the_model_that_is_named(save):
    model = timm.create_model(VIT, num_classes=7, img_size=64)
    found = load(save(model.state_dict()), VIT)
    assert found.weights == "unknown"
    assert found.model.num_classes == 7
    assert torch.equal(logits(found.model, 64), logits(model, 64))


def test_without_a_name_the_tensors_suggest_one(save):
    model = timm.create_model("vit_small_patch16_224", num_classes=0, depth=1)
    with pytest.raises(UserError) as caught:
        load(save(model.state_dict()))
    assert "like vit_small_patch16_224" in caught.value.tip


# What must not come in


class Touch:
    """Unpickling it makes a file."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


@pytest.mark.parametrize("place", [lambda x: x, lambda x: {"args": x}, lambda x: argparse.Namespace(model=x)])
def test_a_file_that_would_run_code_is_refused_and_runs_nothing(tmp_path, save, place):
    marker = tmp_path / "marker"
    path = save({"model": make().state_dict(), "args": place(Touch(marker))})
    with pytest.raises(UserError) as caught:
        load(path)
    assert "could run code" in caught.value.what
    assert "mkdir" in caught.value.what
    assert not marker.exists()
    torch.load(path, weights_only=False)  # which shows that it would have
    assert marker.exists()


OBJECTS = [pathlib.PurePosixPath("out"), np.float64(3), torch.nn.Linear(1, 1), range(3)]


@pytest.mark.parametrize("value", OBJECTS, ids=lambda value: type(value).__name__)
def test_objects_beside_the_weights_are_refused_by_name(save, value):
    with pytest.raises(UserError, match="more than tensors and plain values"):
        load(save({"model": make().state_dict(), "args": value}))


@pytest.mark.parametrize("cut", [0, 3, 100, 0.5, 0.99])
def test_a_truncated_file_is_refused(save, cut):
    path = save(make().state_dict())
    content = path.read_bytes()
    path.write_bytes(content[: int(cut if cut > 1 or cut == 0 else cut * len(content))])
    with pytest.raises(UserError):
        load(path, VIT)


@pytest.mark.parametrize("content", [b"<html>not found</html>", b"\0" * 4096, pickle.dumps([1, 2]), b"PK\3\4 nothing"])
def test_a_file_that_is_not_torchs_is_refused(tmp_path, content):
    path = tmp_path / "model.pth"
    path.write_bytes(content)
    with pytest.raises(UserError):
        load(path, VIT)


@pytest.mark.parametrize("content", [3, [1], {}, {"model": 3}, {"model": {"weight": "text"}}, {3: torch.zeros(2)}])
def test_a_file_without_weights_is_refused(save, content):
    with pytest.raises(UserError):
        load(save(content), VIT)


def test_a_file_that_holds_itself_is_read_to_some_depth(save):
    content = {"model": make().state_dict(), "args": arguments()}
    content["again"] = content
    assert len(read_checkpoint(save(content)).tensors) < 1000


def test_a_file_that_nests_without_end_is_refused(save, monkeypatch):
    monkeypatch.setattr(checkpoints, "MAX_VALUES", 1000)
    inner = {str(number): 0 for number in range(100)}
    with pytest.raises(UserError, match="more values"):
        load(save({str(number): inner for number in range(100)}), VIT)


def test_a_shape_without_numbers_takes_no_memory(save):
    state = make().state_dict() | {"head.weight": torch.zeros(1, 1).expand(10**9, 24)}
    found = read_checkpoint(save(state))
    assert "head.weight" not in found.tensors


def test_jax_arrays_are_refused_with_a_reason(tmp_path):
    np.savez(tmp_path / "x.npz", a=np.zeros(3))
    with pytest.raises(UserError, match=r"'.npz' is not supported"):
        load(tmp_path / "x.npz", VIT)


def test_weights_that_are_not_there_are_not_replaced_by_others(save):
    state = make().state_dict()
    for content, asked in (({"state_dict": state}, "ema"), ({"state_dict_ema": state}, "raw"), (state, "raw")):
        with pytest.raises(UserError) as caught:
            load(save(content | {"args": arguments()}), weights=asked)
        assert f"not {asked}" in caught.value.what


def test_several_sets_of_one_kind_are_not_chosen_from(save):
    state = make().state_dict()
    with pytest.raises(UserError, match="several weights"):
        load(save({"online": state, "target": state, "args": arguments()}))


# Names


def test_published_weights_come_with_their_configuration(monkeypatch):
    name = "vit_tiny_patch16_224.augreg_in21k_ft_in1k"
    model = timm.create_model(name)
    create = timm.create_model

    def fetched(called, pretrained=False, **more):
        return model if pretrained else create(called, **more)

    monkeypatch.setattr(timm, "create_model", fetched)
    found = load(name)
    assert found.name == name
    assert found.model.pretrained_cfg["mean"] == (0.5, 0.5, 0.5)
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in found.model.state_dict().items())


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "hf-hub:timm/vit_tiny.augreg_in21k", "HF_HUB:a/b"])
def test_without_a_network_the_error_says_so(monkeypatch, tmp_path, name):
    import huggingface_hub

    def offline(*args, **more):
        raise ConnectionError("no way out\nof here")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", offline)
    monkeypatch.setattr("timm.models._hub.hf_hub_download", offline)
    with pytest.raises(UserError) as caught:
        load(name)
    assert caught.value.what == "the weights can't be downloaded: no way out"
    assert "network" in caught.value.tip


def test_a_folder_of_the_hub_is_read_like_any_other(monkeypatch, tmp_path):
    import huggingface_hub
    from huggingface_hub.errors import EntryNotFoundError

    model = make()
    save_for_hf(model, str(tmp_path), safe_serialization=False)
    asked = []

    def fetch(repository, name, revision=None):
        asked.append((repository, name, revision))
        if not (tmp_path / name).is_file():
            raise EntryNotFoundError("none")
        return str(tmp_path / name)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fetch)
    found = load("hf-hub:somebody/model@main")
    assert found.name == "model"
    assert torch.equal(logits(found.model), logits(model))
    names = ["config.json", "model.safetensors", "pytorch_model.bin"]
    assert asked == [("somebody/model", name, "main") for name in names]


@pytest.mark.parametrize("name", ["resnet18", "vit_tiny_patch16_224.no_such_tag", "vit_base_patch16_plus_240"])
def test_names_without_weights_are_refused_before_anything_is_fetched(name):
    with pytest.raises(UserError):
        load(name)


def test_a_name_that_is_nearly_one_is_mended():
    with pytest.raises(UserError) as caught:
        load("vit_tiny_patch16_22")
    assert "vit_tiny_patch16_224" in caught.value.tip


def test_a_checkpoint_beside_its_configuration(tmp_path, save):
    model = make()
    save_for_hf(model, str(tmp_path / "hub"), safe_serialization=True)
    path = save(model.state_dict(), "weights.pt")
    (tmp_path / "config.json").write_bytes((tmp_path / "hub" / "config.json").read_bytes())
    assert same(model, path)


def test_what_a_run_saves_to_go_on_is_read_too(tmp_path):
    model = make()
    state = under("model.", model.state_dict()) | {"patch_head.weight": torch.zeros(3, 24)}
    save_for_hf(model, str(tmp_path), safe_serialization=True)
    (tmp_path / "model.safetensors").unlink()
    save_file(state, tmp_path / "module.safetensors")
    found = load(tmp_path / "module.safetensors")
    assert torch.equal(logits(found.model), logits(model))
    assert json.loads((tmp_path / "config.json").read_text())["num_classes"] == 3


def test_a_file_larger_than_memory_is_not_read(tmp_path, monkeypatch):
    save_file({"weight": torch.zeros(1000)}, tmp_path / "large.safetensors")
    monkeypatch.setattr(memory, "available_memory", lambda: 4000)
    with pytest.raises(UserError, match="too big for memory"):
        read_checkpoint(tmp_path / "large.safetensors")


@pytest.mark.parametrize(
    ("given", "name"),
    [
        ("hf-hub:timm/vit_small_patch16_224.augreg_in1k", "vit_small_patch16_224.augreg_in1k"),
        ("hf-hub:somebody/net@v1.2", "net"),
        ("deit_small_patch16_224.fb_in1k", "deit_small_patch16_224.fb_in1k"),
        ("local-dir:folder", "folder"),
        ("folder", "folder"),
        ("folder/model.safetensors", "folder"),
        ("folder/other.pth", "other"),
        ("absent/other.pth", "other"),
    ],
)
def test_what_a_checkpoint_is_called(tmp_path, monkeypatch, given, name):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    for file in ("model.safetensors", "other.pth"):
        (tmp_path / "folder" / file).touch()
    assert name_of(Path(given)) == name
