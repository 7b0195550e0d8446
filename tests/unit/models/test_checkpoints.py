"""Checkpoints of other libraries: which weights and which model they give, and what is refused."""

import argparse
import io
import pathlib
import sys
import time
import zipfile
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from huggingface_hub.errors import EntryNotFoundError
from safetensors.torch import save_file
from timm.models import save_for_hf
from timm.utils import CheckpointSaver, ModelEmaV3

from pdvit.models import checkpoints
from pdvit.models.checkpoints import name_of, read_checkpoint
from pdvit.models.resolved_checkpoint import resolve_checkpoint
from tests.unit.data.batches import tar_without_end
from tests.unit.models.support import SWIN, TINY, VIT, Touch, equal, load, make, original_swin, refuse, under, write


def arguments(model=VIT, img_size=32, model_kwargs=TINY, **more):
    """The arguments of a run as timm's training script keeps them."""
    return argparse.Namespace(model=model, img_size=img_size, model_kwargs=model_kwargs, **more)


@pytest.fixture
def save(tmp_path):
    def save_file_of(content, name="checkpoint.pth"):
        torch.save(content, tmp_path / name)
        return tmp_path / name

    return save_file_of


@pytest.fixture(scope="module")
def state():
    return make().state_dict()


def test_a_file_of_timms_saver_has_weights_moving_average_and_model(tmp_path):
    model = make()
    average = ModelEmaV3(model)
    with torch.no_grad():
        for weight in average.module.parameters():
            weight.mul_(0.5)
    # The defaults of timm's train.py for unset arguments of model and images.
    unset = dict.fromkeys(("gp", "drop_path", "input_size", "mean", "std", "crop_pct"))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    args = arguments(interpolation="", **unset)
    CheckpointSaver(model, optimizer, args, average, checkpoint_dir=str(tmp_path)).save_checkpoint(0, 0.5)
    found = load(tmp_path / "last.pth.tar")
    assert found.selected.weights == "ema"
    assert equal(found.model, average.module)
    assert equal(load(tmp_path / "last.pth.tar", weights="raw").model, model)
    assert "several checkpoints: checkpoint-0.pth.tar, last.pth.tar" in refuse(tmp_path).what


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
    assert load(path).selected.weights == "ema"
    assert equal(load(path).model, teacher)
    assert equal(load(path, weights="raw").model, student)


def test_a_masked_autoencoder_without_its_decoder(save):
    model = make(num_classes=0)
    decoder = {"mask_token": torch.zeros(1, 1, 8), "decoder_pos_embed": torch.zeros(1, 17, 8)}
    decoder |= under("decoder_blocks.0.", {"norm1.weight": torch.ones(8)}) | {"decoder_embed.weight": torch.ones(8, 24)}
    error = refuse(save({"model": model.state_dict() | decoder, "args": arguments("mae_vit_tiny_patch8")}))
    assert "'mae_vit_tiny_patch8' is not timm's name" in error.what
    assert "2 blocks of width 24, patches of 8 pixels" in error.tip
    assert equal(load(save({"model": model.state_dict() | decoder, "args": arguments()})).model, model)


def test_swin_as_microsoft_publishes_it(save):
    options = {"depths": [1, 1, 1, 1], "embed_dim": 8, "num_heads": [1, 1, 2, 2], "window_size": 2}
    model = timm.create_model(SWIN, img_size=64, num_classes=3, **options)
    assert equal(load(save({"model": original_swin(model), "args": arguments(SWIN, 64, options)})).model, model)


def test_deit3_with_its_own_names_of_layer_scale(save):
    name = "deit3_small_patch16_224"
    renamed = {"ls1.gamma": "gamma_1", "ls2.gamma": "gamma_2"}
    model = make(name)
    theirs = {key[:-9] + renamed.get(key[-9:], key[-9:]): value for key, value in model.state_dict().items()}
    args = argparse.Namespace(model=name, input_size=32, lr=5e-4, model_kwargs=TINY)  # of DeiT's script
    assert equal(load(save({"model_ema": theirs, "args": args})).model, model)


def test_a_folder_of_timm(tmp_path, state):
    for safe in (True, False):
        save_for_hf(make(), str(tmp_path / str(safe)), safe_serialization=safe)
        assert equal(load(tmp_path / str(safe)).model, make())
    found = load(f"local-dir:{tmp_path / 'True'}")
    assert (found.name, equal(found.model, make())) == ("True", True)
    # Another file beside the configuration: of torch, or a checkpoint of a run of pdvit.
    torch.save(make(seed=1).state_dict(), tmp_path / "True" / "weights.pt")
    assert equal(load(tmp_path / "True" / "weights.pt").model, make(seed=1))
    module = under("model.", state) | {"patch_head.weight": torch.zeros(3, 24)}
    save_file(module, tmp_path / "True" / "module.safetensors")
    assert equal(load(tmp_path / "True" / "module.safetensors").model, make())


def test_a_lone_file_takes_the_model_that_is_named(save):
    model = timm.create_model(VIT, num_classes=7, img_size=64)
    file = save(model.state_dict())
    found = load(file, VIT)
    assert (found.selected.weights, found.model.num_classes) == ("unknown whether raw or ema", 7)
    assert equal(found.model, model)
    assert "--model" in refuse(file).tip
    assert f"'{VIT}'" in refuse(file, "test_vi").tip
    with torch.device("meta"):
        small = timm.create_model("vit_small_patch16_224", num_classes=0, depth=1)
    small = {name: torch.zeros(value.shape) for name, value in small.state_dict().items()}
    tip = refuse(save(small)).tip
    assert "like vit_small_patch16_224, of which timm has weights with mean 0.485, ...: --model vit_small_p" in tip
    (_, note) = resolve_checkpoint(save(small), "vit_small_patch16_224").notes  # weights of timm have several means
    assert "0.485, ...: --model vit_small_patch16_224.dino, or mean 0.5" in note
    assert resolve_checkpoint(save(small), "vit_small_patch16_224.dino").notes[1:] == ()


@pytest.mark.parametrize(
    ("name", "shape", "size"),
    [("patch_embed.proj.weight", (24, 3, 4, 4), 32), ("pos_embed", (1, 65, 24), 32), ("pos_embed", (1, 1, 24), None)],
)
def test_weights_of_other_sizes_than_the_file_says_are_refused_and_not_resampled(save, state, name, shape, size):
    path = save({"model": state | {name: torch.ones(shape)}, "args": arguments(img_size=size)})
    assert f"another shape: 1 ({name})" in refuse(path).what if size else "0 patches, which are no" in refuse(path).what


@pytest.mark.parametrize(
    "arguments",
    [
        {"depth": 2, "img_size": 96},
        {"reg_tokens": 3},
        {"reg_tokens": 3, "no_embed_class": True},
        {"global_pool": "avg"},
        {"global_pool": "avg", "class_token": True, "depth": 3, "reg_tokens": 1},
    ],
)
def test_the_tensors_tell_depth_registers_pooling_and_size(tmp_path, arguments):
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", num_classes=3, **{"depth": 4, **arguments}).eval()
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=0.1)
    torch.save(model.state_dict(), tmp_path / "weights.pth")
    images = torch.randn(2, 3, *model.patch_embed.img_size)
    loaded = load(tmp_path / "weights.pth", "vit_tiny_patch16_224")
    depth = f"by its tensors, other than vit_tiny_patch16_224: depth {len(model.blocks)}"
    assert any(note.startswith(depth) for note in loaded.notes)
    torch.testing.assert_close(loaded.model(images), model(images))


@pytest.mark.parametrize("suffix", [".pth", ".pkl", "", ".safetensors"])
@pytest.mark.parametrize("wrap", [lambda code: {"args": code}, lambda code: argparse.Namespace(model=code)])
def test_a_file_that_would_run_code_is_refused_and_runs_nothing(tmp_path, save, state, suffix, wrap):
    marker = tmp_path / "marker"
    path = save({"model": state, "args": wrap(Touch(marker))}, f"checkpoint{suffix}")
    error = refuse(path)
    assert suffix != ".pth" or ("could run code" in error.what and "mkdir" in error.what)
    assert not marker.exists()
    torch.load(io.BytesIO(path.read_bytes()), weights_only=False)  # it would have run it
    assert marker.exists()


@dataclass
class Configured:
    """A configuration, whose code would make a folder."""

    marker: pathlib.Path

    def __setstate__(self, state):
        state["marker"].mkdir()

    def __reduce__(self):
        return Configured, (self.marker,), vars(self)


class Table(dict):
    """A table of settings, such as yacs' CfgNode."""


class Steps(list):
    """A list of steps."""


def test_objects_beside_the_weights_are_skipped_and_nothing_of_theirs_runs(tmp_path, save, state, monkeypatch):
    marker = tmp_path / "marker"
    objects = {"path": marker, "best": np.float64(3), "steps": range(3), "config": Configured(marker)}
    objects |= {"table": Table(a=1, b=Table(c=2)), "default": defaultdict(dict, a={"w": torch.ones(1)})}
    path = save({"model": state, "hyper_parameters": objects, "args": arguments(lr=np.float64(3), out=marker)})
    torch.load(path, weights_only=False)
    marker.rmdir()  # it ran
    monkeypatch.delitem(sys.modules, __name__)
    monkeypatch.setattr(sys, "path", [])  # nothing can be imported
    found = load(path)
    assert equal(found.model, make())
    types = ("numpy.dtype", ".scalar", "PosixPath", f"{__name__}.Configured", f"{__name__}.Table")
    assert all(
        part in found.notes[0] for part in ("types of objects skipped: 7 (builtins.dict, builtins.range, ", *types)
    )
    assert "hyper_parameters.default.a.w" in read_checkpoint(path)[1].tensors
    assert (marker.exists(), __name__ in sys.modules) == (False, False)


@pytest.mark.parametrize(
    ("extra", "zipped", "reason"),
    [
        ({"x": np.float64(3)}, False, "numpy"),  # of torch's first format, whose names can't be read alone
        ({"x": Steps([1])}, True, "test_checkpoints.Steps"),
        ({"model": torch.nn.Linear(2, 3)}, True, "torch.nn.modules.linear.Linear"),
        ({"w": np.zeros(3)}, True, "no tensors; types of objects skipped: 3"),
        (np.array(["w"]), True, "no table of weights; types of objects skipped: 3"),
    ],
)
def test_objects_that_can_not_be_skipped_are_refused_and_the_line_of_the_tip_saves_the_weights(
    tmp_path, save, monkeypatch, extra, zipped, reason
):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "old.pth"
    content = extra if "w" in extra else {"model": {"weight": torch.ones(2)}} | extra
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    error = refuse(path, VIT)
    assert reason in error.what
    if "w" not in extra:
        exec(error.tip.partition("alone: ")[2], {"torch": torch})
        assert "model.weight" in read_checkpoint("weights.pt")[1].tensors


def torch_file(content, zipped=True):
    file = io.BytesIO()
    torch.save(content, file, _use_new_zipfile_serialization=zipped)
    return file.getvalue()


def pickled(code):
    """Return a torch file whose pickle has this code."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name, content in (("data.pkl", b"\x80\x02" + code), ("version", b"3\n"), ("byteorder", b"little")):
            archive.writestr(f"archive/{name}", content)
    return file.getvalue()


def test_objects_of_very_many_classes_are_not_skipped(tmp_path):
    classes = b"".join(b"cx\nY%d\n" % number for number in range(101))
    (tmp_path / "x.pth").write_bytes(pickled(b"}X\1\0\0\0a](" + classes + b"es."))  # {"a": classes}
    assert "could run code" in refuse(tmp_path / "x.pth").what  # torch would look all up for each object


SHARED = ["x"]  # 2^60 texts in few bytes
for _ in range(60):
    SHARED = [SHARED, SHARED]


@pytest.mark.parametrize(
    "content",
    [
        *(b"", b"<html>not found</html>", b"\0" * 4096, b"PK\3\4 nothing"),
        *(torch_file({"weight": torch.zeros(9)})[:end] for end in (100, -9)),
        *map(torch_file, (3, [1], {}, {"model": {"weight": "text"}}, {3: torch.zeros(2)})),
        *(torch_file({"weight": torch.zeros(9)}, False)[:end] for end in (1, 3, 40, -9)),
        *(torch_file(table) for table in ({"a." * 9999: torch.zeros(1)}, {"args": {"img_size": 1, "mean": SHARED}})),
        tar_without_end("storages"),
        pickled(b"cbuiltins\nbytearray\n\x8a\x05" + (2**36).to_bytes(5, "little") + b"\x85R."),
    ],
)
def test_a_damaged_file_or_one_without_weights_is_refused(tmp_path, content):
    (tmp_path / "model.pth").write_bytes(content)
    assert str(tmp_path / "model.pth") in refuse(tmp_path / "model.pth", VIT).where


def test_tables_without_end_and_shapes_without_numbers_take_no_memory(save, state, monkeypatch):
    content = {"model": state | {"head.weight": torch.zeros(1, 1).expand(10**9, 24)}, "args": arguments()}
    content["again"] = content
    tensors = read_checkpoint(save(content))[1].tensors
    assert len(tensors) < 1000
    assert not any(name.endswith("head.weight") for name in tensors)
    monkeypatch.setattr(checkpoints, "MAX_VALUES", 1000)
    inner = {str(number): 0 for number in range(100)}
    assert "more values" in refuse(save({str(number): inner for number in range(100)}), VIT).what


@pytest.mark.parametrize("dtype", [torch.int8, torch.bool, torch.complex64])
def test_weights_of_other_numbers_are_refused(save, state, dtype):
    changed = state | {"norm.bias": state["norm.bias"].to(dtype)}
    assert f" is {dtype}" in refuse(save({"model": changed, "args": arguments()})).what


def test_weights_that_are_missing_are_not_replaced_by_others(save, state):
    for content, weights in (({"state_dict": state}, "ema"), ({"state_dict_ema": state}, "raw"), (state, "raw")):
        assert f"none that are {weights}" in refuse(save(content | {"args": arguments()}), weights=weights).what
    assert "several weights" in refuse(save({"online": state, "target": state, "args": arguments()})).what


def test_places_without_weights_are_refused(tmp_path):
    assert "no such checkpoint" in refuse(tmp_path / "none.safetensors").what
    assert "no model.safetensors" in refuse(tmp_path).what
    (tmp_path / "run.toml").touch()
    assert "resume" in refuse(tmp_path).tip
    np.savez(tmp_path / "x.npz", a=np.zeros(3))  # of JAX
    assert "no plain vision transformer of Google's" in refuse(tmp_path / "x.npz", VIT).what


def test_published_weights_come_with_their_configuration(monkeypatch):
    name, create = f"{VIT}.r160_in1k", timm.create_model
    model, names = timm.create_model(name), [str(number) for number in range(1000)]
    model.pretrained_cfg = model.pretrained_cfg | {"label_names": tuple(names)}
    monkeypatch.setattr(
        timm, "create_model", lambda called, pretrained=False, **more: model if pretrained else create(called, **more)
    )
    found = load(name)
    assert (found.name, found.model.pretrained_cfg["mean"], found.classes) == (name, (0.5, 0.5, 0.5), names)
    assert equal(found.model, model)


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "HF_HUB:a/b"])
def test_without_a_network_the_error_is_about_the_network_and_comes_at_once(monkeypatch, tmp_path, name):
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    begun = time.monotonic()
    error = refuse(name)
    assert time.monotonic() - begun < 10  # the hub's functions alone take 48 s
    assert error.what.startswith("the weights can't be downloaded: [Errno 111] Connection refused")
    assert "network" in error.tip


def test_a_folder_of_the_hub_is_read_like_any_other(monkeypatch, tmp_path):
    save_for_hf(make(), str(tmp_path), safe_serialization=False)
    requests = []

    def fetch(repository, name, revision=None):
        requests.append((repository, name, revision))
        if not (tmp_path / name).is_file():
            raise EntryNotFoundError("none")
        return str(tmp_path / name)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", fetch)
    found = load("hf-hub:somebody/model@main")
    assert (found.name, equal(found.model, make())) == ("model", True)
    names = ["config.json", "open_clip_config.json", "preprocessor_config.json", "processor_config.json"]
    names += ["model.safetensors", "pytorch_model.bin"]
    assert requests == [("somebody/model", name, "main") for name in names]


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        *((name, "no such checkpoint") for name in ("resnet18.pth", "vit_tiny_patch16_224.safetensors")),
        *(("resnet18", "can't read the patches"), ("test_vit.no_such_tag", "no_such_tag")),
        ("vit_base_patch16_plus_240", "publishes no weights"),
        *(("vit_tiny_patch16_22", "did you mean 'vit_tiny_patch16_224'"), ("nosuch", "name a run directory")),
    ],
)
def test_names_without_weights_are_refused_before_a_download(monkeypatch, name, reason):
    monkeypatch.setattr("timm.models._hub.hf_hub_download", lambda *_, **__: pytest.fail("a download"))
    assert reason in str(refuse(name))


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("hf-hub:timm/vit_small_patch16_224.augreg_in1k", "vit_small_patch16_224.augreg_in1k"),
        *(("hf-hub:somebody/net@v1.2", "net"), ("deit_small_patch16_224.fb_in1k", "deit_small_patch16_224.fb_in1k")),
        *(("local-dir:folder", "folder"), ("folder", "folder"), ("folder/model.safetensors", "folder")),
        *(("folder/other.pth", "other"), ("absent/other.pth", "other"), ("folder/.", "folder")),
    ],
)
def test_the_name_of_a_checkpoint(tmp_path, monkeypatch, source, name):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "folder", {"model.safetensors": b"", "other.pth": b""})
    assert name_of(Path(source)) == name
