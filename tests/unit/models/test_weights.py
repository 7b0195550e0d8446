import json
import os
import pickle
import struct
import tempfile

import pytest
import timm
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save, save_file

from pdvit.errors import UserError
from pdvit.models import build as memory
from pdvit.models.build import build_model
from pdvit.models.checkpoints import export
from pdvit.models.layers import image_size_of
from tests.unit.models.support import load

VIT = "vit_tiny_patch16_224"
SMALL = {"depth": 1, "embed_dim": 24, "num_heads": 2, "img_size": 32, "patch_size": 8, "num_classes": 3}
CLASSES = ["ant", "bee", "cat"]
DATA = {"input_size": (3, 32, 32), "crop_pct": 1.0, "interpolation": "bicubic", "mean": (0.5,) * 3, "std": (0.5,) * 3}


def make(name=VIT, **more):
    torch.manual_seed(0)
    model = timm.create_model(name, **SMALL | more)
    with torch.no_grad():
        for weight in model.parameters():
            weight.normal_(std=0.2)
    return model.eval()


def write(folder, files):
    folder.mkdir(exist_ok=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder


def logits(model, images=None):
    images = torch.linspace(-1, 1, 2 * 3 * 32 * 32).view(2, 3, 32, 32) if images is None else images
    with torch.no_grad():
        return model.eval()(images)


@pytest.fixture
def files():
    return export(make(), CLASSES, DATA, "raw")


@pytest.mark.parametrize(
    ("name", "more"),
    [
        (VIT, {}),
        (VIT, {"depth": 3, "global_pool": "avg"}),
        (VIT, {"reg_tokens": 2, "qk_norm": True, "drop_path_rate": 0.3}),
        (VIT, {"class_token": False, "global_pool": "avg", "act_layer": "gelu_tanh"}),
        ("deit_tiny_distilled_patch16_224", {}),
        ("vit_small_patch16_dinov3", {}),
        ("eva02_tiny_patch14_224", {}),
        ("vit_relpos_small_patch16_224", {}),
    ],
)
def test_timm_and_pdvit_load_an_export_bit_for_bit(tmp_path, name, more):
    model = make(name, **more)
    folder = write(tmp_path / "run", export(model, CLASSES, DATA, "raw"))
    theirs = timm.create_model(f"local-dir:{folder}", pretrained=True)
    assert torch.equal(logits(theirs), logits(model))
    assert torch.equal(logits(load(folder).model), logits(model))
    assert type(theirs) is type(model)


def test_images_that_are_not_square_survive(tmp_path):
    model, images = make(img_size=(16, 32)), torch.randn(2, 3, 16, 32)
    folder = write(tmp_path / "run", export(model, CLASSES, DATA | {"input_size": (3, 16, 32)}, "raw"))
    theirs = timm.create_model(f"local-dir:{folder}", pretrained=True)
    assert torch.equal(logits(theirs, images), logits(model, images))
    assert torch.equal(logits(load(folder).model, images), logits(model, images))


def test_timm_learns_the_preprocessing_and_the_classes(tmp_path, files):
    folder = write(tmp_path / "run", files)
    theirs = timm.create_model(f"local-dir:{folder}", pretrained=True)
    data = timm.data.resolve_model_data_config(theirs)
    assert {name: tuple(data[name]) if isinstance(data[name], list) else data[name] for name in DATA} == DATA
    assert json.loads(files["config.json"])["label_names"] == CLASSES


def test_the_header_carries_the_text_of_the_configuration(tmp_path, files):
    folder = write(tmp_path / "run", files)
    with safe_open(folder / "model.safetensors", framework="pt") as opened:
        header = opened.metadata()
    assert header["config.json"] == files["config.json"].decode()
    assert set(header) <= {"format", "config.json"}


def test_tensors_have_the_keys_of_the_bare_model(tmp_path, files):
    folder = write(tmp_path / "run", files)
    stored, expected = load_file(folder / "model.safetensors"), make().state_dict()
    assert stored.keys() == expected.keys()
    assert all(torch.equal(stored[name], expected[name]) for name in expected)


def test_an_export_depends_on_neither_place_nor_process(tmp_path, monkeypatch, files):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert all(export(make(), CLASSES, DATA, "raw") == files for _ in range(6))


def test_an_export_leaves_the_model_as_it_is():
    model = make().train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    export(model, CLASSES, DATA, "raw")
    assert model.training
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_the_configuration_does_not_pose_as_published_weights(files):
    text = files["config.json"].decode()
    config = json.loads(text)
    assert not {"tag", "license", "file", "url", "hf_hub_id"} & set(config["pretrained_cfg"])
    assert "augreg" not in text


def test_the_lone_file_is_enough(tmp_path, files):
    file = write(tmp_path / "run", files) / "model.safetensors"
    alone = tmp_path / "best.safetensors"
    alone.write_bytes(file.read_bytes())
    found = load(alone)
    assert (found.name, found.weights) == ("best", "raw")
    assert found.config == json.loads(files["config.json"])
    assert torch.equal(logits(found.model), logits(make()))
    assert not found.model.training


def test_a_file_without_a_header_takes_the_configuration_beside_it(tmp_path, files):
    bare = save(make().state_dict())
    folder = write(tmp_path / "timm", {"model.safetensors": bare, "config.json": files["config.json"]})
    for path in (folder, folder / "model.safetensors"):
        assert torch.equal(logits(load(path).model), logits(make()))


def test_a_file_without_any_configuration_takes_the_model_that_is_named(tmp_path):
    model = timm.create_model(VIT, num_classes=1000)
    save_file(model.state_dict(), tmp_path / "foreign.safetensors")
    found = load(tmp_path / "foreign.safetensors", model_name=VIT)
    assert found.weights == "unknown"
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in found.model.state_dict().items())


def test_a_folder_has_the_name_of_the_run(tmp_path, monkeypatch, files):
    folder = write(tmp_path / "digits-paper", files)
    monkeypatch.chdir(folder)
    assert load(folder.relative_to(folder)).name == "digits-paper"


def refuse(path, **more):
    with pytest.raises(UserError) as caught:
        load(path, **more)
    return caught.value


def test_nothing_there_is_refused(tmp_path):
    assert "no such checkpoint" in refuse(tmp_path / "none.safetensors").what


def test_a_folder_without_weights_is_refused(tmp_path):
    assert "no model.safetensors" in refuse(tmp_path).what


def test_an_unfinished_run_says_so(tmp_path):
    (tmp_path / "run.toml").touch()
    assert "resume" in refuse(tmp_path).tip


class Touch:
    """Unpickling it makes a file."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


@pytest.mark.parametrize("suffix", [".pth", ".pt", ".bin", ".ckpt", ".pkl", "", ".safetensors"])
def test_a_pickle_is_refused_and_never_opened(tmp_path, suffix):
    marker, file = tmp_path / "marker", tmp_path / f"model{suffix}"
    torch.save({"weights": Touch(marker)}, file)
    refuse(file)
    file.write_bytes(pickle.dumps(Touch(marker)))
    refuse(file)
    assert not marker.exists()
    pickle.loads(file.read_bytes())
    assert marker.exists()


def damaged(content):
    header = struct.unpack("<Q", content[:8])[0]
    return {
        "empty": b"",
        "a few bytes": content[:5],
        "half a header": content[: 8 + header // 2],
        "no tensors": content[: 8 + header],
        "one byte short": content[:-1],
        "one byte more": content + b"\0",
        "huge header": struct.pack("<Q", 2**62) + content[8:],
        "noise": bytes(range(256)) * 64,
        "zeros": b"\0" * 4096,
        "text": b"<html>not found</html>",
    }


@pytest.mark.parametrize("damage", list(damaged(b"\0" * 100)))
def test_a_damaged_file_is_refused(tmp_path, files, damage):
    file = tmp_path / "model.safetensors"
    file.write_bytes(damaged(files["model.safetensors"])[damage])
    error = refuse(file)
    assert "the safetensors file is damaged" in error.what
    assert error.where == str(file)


def with_header(tmp_path, text, tensors=None):
    file = tmp_path / "model.safetensors"
    save_file(tensors or make().state_dict(), file, metadata={"config.json": text})
    return file


def described(files, **changes):
    """Return the text of a configuration with other model arguments."""
    config = json.loads(files["config.json"])
    config["model_args"] |= changes
    return json.dumps(config)


@pytest.mark.parametrize(
    "changes",
    [
        {"checkpoint_path": "evil.pth"},
        {"pretrained": True},
        {"pretrained_cfg": {"file": "evil.pth"}},
        {"pretrained_cfg_overlay": {"file": "evil.pth"}},
        {"cache_dir": "there"},
        {"scriptable": True},
        {"depth": 10**9},
        {"depth": "1"},
        {"depth": -1},
        {"depth": 0},
        {"depth": 1e9},
        {"embed_dim": 10**7},
        {"embed_dim": 0},
        {"num_heads": 0},
        {"num_heads": [1]},
        {"patch_size": 0},
        {"patch_size": []},
        {"img_size": []},
        {"img_size": [32]},
        {"img_size": 10**9},
        {"img_size": {"a": 1}},
        {"reg_tokens": 10**9},
        {"num_classes": 10**9},
        {"num_classes": "3"},
        {"norm_layer": "os.system"},
        {"act_layer": "os.system"},
        {"block_fn": "os.system"},
        {"mlp_ratio": 1e30},
        {"features_only": True},
        {"patch_drop_rate": 0.5},
        {"no such": 1},
    ],
    ids=lambda changes: ",".join(f"{name}={value}" for name, value in changes.items()),
)
@pytest.mark.filterwarnings("ignore:Initializing zero-element")
def test_hostile_model_arguments_are_refused(tmp_path, files, changes):
    assert str(tmp_path) in refuse(with_header(tmp_path, described(files, **changes))).where


@pytest.mark.parametrize("key", ["checkpoint_path", "pretrained_cfg"])
def test_a_pickle_that_a_header_points_to_is_never_opened(tmp_path, files, key):
    evil, marker = tmp_path / "evil.pth", tmp_path / "marker"
    torch.save({"weights": Touch(marker)}, evil)
    value = str(evil) if key == "checkpoint_path" else {"file": str(evil)}
    refuse(with_header(tmp_path, described(files, **{key: value})))
    assert not marker.exists()


def test_arguments_of_a_family_that_is_refused_are_never_built(tmp_path, monkeypatch):
    # A billion layers would take for ever even on the meta device, and only known families have their depth checked.
    built = []
    create = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda name, **more: built.append(more) or create(name, **more))
    text = json.dumps({"architecture": "resnet18", "model_args": {"layers": [1, 1, 1, 1]}})
    assert "can't read the patches" in refuse(with_header(tmp_path, text)).what
    assert not any("layers" in arguments for arguments in built)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "3",
        "null",
        '"text"',
        "[" * 100_000,
        '{"a":' * 100_000,
        "{}",
        '{"architecture": 3}',
        '{"architecture": null}',
        '{"architecture": "no_such_model"}',
        '{"architecture": "hf-hub:timm/vit_tiny_patch16_224.augreg_in21k"}',
        '{"architecture": "hf_hub:timm/vit_tiny_patch16_224.augreg_in21k"}',
        '{"architecture": "local-dir:."}',
        '{"architecture": "../../model"}',
        '{"architecture": "resnet18"}',
        '{"architecture": "vit_tiny_patch16_224", "model_args": []}',
        '{"architecture": "vit_tiny_patch16_224", "model_args": "depth=1"}',
        '{"architecture": "vit_tiny_patch16_224", "model_args": null}',
    ],
    ids=lambda text: text[:60] or "empty",
)
def test_a_header_that_describes_no_model_is_refused(tmp_path, text):
    refuse(with_header(tmp_path, text))


@pytest.mark.parametrize("weights", ["raw", "ema"])
def test_the_weights_of_an_export_can_be_asked_for_by_what_they_are(tmp_path, weights):
    folder = write(tmp_path / "run", export(make(), CLASSES, DATA, weights))
    assert load(folder, weights=weights).weights == load(folder).weights == weights
    other = {"raw": "ema", "ema": "raw"}[weights]
    assert f"it holds {weights}, not {other}" in refuse(folder, weights=other).what


@pytest.mark.parametrize("facts", [3, [], "raw", None, {}, {"weights": "foo"}, {"weights": ["ema"]}])
def test_a_header_with_odd_facts_has_unknown_weights(tmp_path, files, facts):
    config = json.loads(files["config.json"]) | {"pdvit": facts}
    assert load(with_header(tmp_path, json.dumps(config))).weights == "unknown"


def test_a_broken_configuration_beside_the_file_is_refused(tmp_path):
    folder = write(tmp_path / "timm", {"model.safetensors": save(make().state_dict()), "config.json": b"\xff{"})
    assert "config.json" in refuse(folder).where


def test_a_foreign_file_without_configuration_asks_for_the_model(tmp_path):
    save_file({"weight": torch.zeros(3)}, tmp_path / "foreign.safetensors")
    error = refuse(tmp_path / "foreign.safetensors")
    assert "architecture" in error.what
    assert "--model" in error.tip


def test_a_name_that_timm_does_not_have_is_refused(tmp_path):
    save_file({"weight": torch.zeros(3)}, tmp_path / "foreign.safetensors")
    assert "vit_tiny_patch16_224" in refuse(tmp_path / "foreign.safetensors", model_name="vit_tiny_patch16_22").tip


def test_missing_extra_and_misshapen_tensors_are_refused(tmp_path, files):
    text, whole = files["config.json"].decode(), make().state_dict()
    missing = {name: value for name, value in whole.items() if name != "head.bias"}
    cases = {
        "lack 'head.bias'": missing,
        "hold an unknown 'patch_head.weight'": whole | {"patch_head.weight": torch.zeros(2)},
        "have another shape of 'head.bias'": whole | {"head.bias": torch.zeros(4)},
    }
    for what, tensors in cases.items():
        assert what in refuse(with_header(tmp_path, text, tensors)).what
    assert (
        "and 1 more" in refuse(with_header(tmp_path, text, missing | {"head.bias2": missing.pop("head.weight")})).what
    )


@pytest.mark.parametrize("name", ["pvt_v2_b0", pytest.param("swin_tiny_patch4_window7_224", marks=pytest.mark.slow)])
def test_a_hierarchical_model_comes_back_with_its_image_size(tmp_path, name):
    arguments = {"img_size": 64, "num_classes": 3} | ({"window_size": 2} if name.startswith("swin") else {})
    torch.manual_seed(0)
    model = build_model(name, arguments).eval()
    folder = write(tmp_path / "run", export(model, CLASSES, DATA | {"input_size": (3, 64, 64)}, "raw"))
    images = torch.randn(1, 3, 64, 64)
    for path in (folder, folder / "model.safetensors"):
        loaded = load(path).model
        assert image_size_of(loaded) == (64, 64)
        assert torch.equal(logits(loaded, images), logits(model, images))
    assert torch.equal(logits(timm.create_model(f"local-dir:{folder}", pretrained=True), images), logits(model, images))


@pytest.mark.parametrize("name", [VIT, "eva02_tiny_patch14_224", "cait_xxs24_224"])
def test_random_weights_are_those_of_timm_and_leave_the_generator_alone(tmp_path, name):
    model = make(name)
    loaded = load(write(tmp_path / "run", export(model, CLASSES, DATA, "raw")))
    before = torch.get_rng_state()
    random = loaded.with_random_weights(seed=5)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(5)
    expected = timm.create_model(name, **SMALL).state_dict()
    assert expected.keys() == random.state_dict().keys()
    assert all(torch.equal(value, expected[key]) for key, value in random.state_dict().items())
    assert not random.training


def test_a_model_is_refused_before_it_takes_memory_that_is_not_there(tmp_path, monkeypatch, files):
    folder, size = write(tmp_path / "run", files), sum(value.numel() * 4 for value in make().state_dict().values())
    sizes = iter([2**40, size - 1])  # enough for the file, and nearly for the model
    monkeypatch.setattr(memory, "available_memory", lambda: next(sizes))
    monkeypatch.setattr("pdvit.models.loading.create_model", lambda *_: pytest.fail("it was built"))
    with pytest.raises(UserError, match="too big for memory"):
        load(folder)
