"""Exports of pdvit: what timm and pdvit read in them, and what hostile or damaged copies of them are refused for."""

import json
import math
import tempfile

import pytest
import timm
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save, save_file

from pdvit.models.checkpoints import export
from pdvit.models.layers import image_size_of
from tests.unit.models.support import CLASSES, DATA, SMALL_SWIN, VIT, Touch, equal, load, logits, make, refuse, write

SLOW = pytest.mark.slow


@pytest.fixture(scope="module")
def files():
    return export(make(), CLASSES, DATA, "raw")


@pytest.fixture(scope="module")
def config(files):
    return json.loads(files["config.json"])


def with_header(folder, text, tensors=None):
    """Write weights whose header holds a text for config.json, or a table; return the file."""
    file = folder / "model.safetensors"
    text = text if isinstance(text, str) else json.dumps(text)
    save_file(tensors or make().state_dict(), file, metadata={"config.json": text})
    return file


PVT = {"embed_dims": (8, 8, 16, 16), "num_heads": (1, 1, 2, 2), "depths": (1,) * 4, "img_size": 64, "num_classes": 3}


@pytest.mark.parametrize(
    ("name", "more", "sides"),
    [
        (VIT, {"reg_tokens": 2, "qk_norm": True, "drop_path_rate": 0.3}, (32, 32)),
        (VIT, {"class_token": False, "global_pool": "avg", "act_layer": "gelu_tanh"}, (32, 32)),
        (VIT, {"img_size": (16, 32)}, (16, 32)),
        ("deit_tiny_distilled_patch16_224", {}, (32, 32)),
        ("pvt_v2_b0", PVT, (64, 64)),
        pytest.param("swin_tiny_patch4_window7_224", SMALL_SWIN | {"num_classes": 3}, (64, 64), marks=SLOW),
        *(
            pytest.param(name, {}, (32, 32), marks=SLOW)
            for name in ("vit_small_patch16_dinov3", "eva02_tiny_patch14_224")
        ),
    ],
)
def test_timm_and_pdvit_load_an_export_bit_for_bit(tmp_path, name, more, sides):
    model = make(name, **more)
    folder = write(tmp_path, export(model, CLASSES, DATA | {"input_size": (3, *sides)}, "raw"))
    theirs, ours = timm.create_model(f"local-dir:{folder}", pretrained=True), load(folder).model
    assert torch.equal(logits(theirs, *sides), logits(model, *sides))
    assert torch.equal(logits(ours, *sides), logits(model, *sides))
    assert (type(theirs), image_size_of(ours)) == (type(model), sides)
    assert load_file(folder / "model.safetensors").keys() == model.state_dict().keys()


def test_the_configuration_is_timms_and_lies_in_the_header_too(tmp_path, files, config):
    folder = write(tmp_path, files)
    theirs = timm.create_model(f"local-dir:{folder}", pretrained=True)
    data = timm.data.resolve_model_data_config(theirs)
    assert {name: tuple(data[name]) if isinstance(data[name], list) else data[name] for name in DATA} == DATA
    assert config["label_names"] == CLASSES
    assert not {"tag", "license", "file", "url", "hf_hub_id"} & set(config["pretrained_cfg"])  # of published weights
    with safe_open(folder / "model.safetensors", framework="pt") as opened:
        header = opened.metadata()
    assert header["config.json"] == files["config.json"].decode()
    assert set(header) <= {"format", "config.json"}


def test_an_export_depends_on_neither_place_nor_process_and_leaves_the_model(tmp_path, monkeypatch, files):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    model = make().train()
    assert all(export(model, CLASSES, DATA, "raw") == files for _ in range(6))
    assert model.training
    assert equal(model, make())


def test_the_lone_file_is_enough_or_a_bare_one_beside_the_configuration(tmp_path, files, config):
    alone = write(tmp_path, {"best.safetensors": files["model.safetensors"]}) / "best.safetensors"
    found = load(alone)
    assert (found.name, found.selected.weights, found.classes) == ("best", "raw", config["label_names"])
    assert equal(found.model, make())
    assert not found.model.training
    bare = save(make().state_dict())  # without a header
    folder = write(tmp_path / "bare", {"model.safetensors": bare, "config.json": files["config.json"]})
    for path in (folder, folder / "model.safetensors"):
        assert equal(load(path).model, make())
    write(folder, {"config.json": b"\xff{"})
    assert "config.json" in refuse(folder).where


def test_the_weights_of_an_export_are_raw_or_ema_as_declared_or_unknown(tmp_path, config):
    for weights, other in (("raw", "ema"), ("ema", "raw")):
        folder = write(tmp_path / weights, export(make(), CLASSES, DATA, weights))
        assert load(folder).selected.weights == weights
        assert f"are {weights}, and none that are {other}" in refuse(folder, weights=other).what
    for metadata in (None, {"weights": "foo"}, {"weights": ["ema"]}):
        assert (
            load(with_header(tmp_path, config | {"pdvit": metadata})).selected.weights == "unknown whether raw or ema"
        )


def test_random_weights_are_those_of_timm_and_leave_the_generator_alone(tmp_path, files):
    loaded = load(write(tmp_path, files))
    before = torch.get_rng_state()
    random = loaded.with_random_weights()
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(0)
    assert equal(random, timm.create_model(VIT, **loaded.arguments))
    assert not random.training


@pytest.mark.parametrize("key", ["checkpoint_path", "pretrained_cfg"])
def test_a_pickle_that_a_header_points_to_is_never_opened(tmp_path, config, key):
    evil, marker = tmp_path / "evil.pth", tmp_path / "marker"
    torch.save({"weights": Touch(marker)}, evil)
    value = str(evil) if key == "checkpoint_path" else {"file": str(evil)}
    refuse(with_header(tmp_path, config | {"model_args": config["model_args"] | {key: value}}))
    assert not marker.exists()


def test_a_damaged_file_is_refused(tmp_path, files):
    content = files["model.safetensors"]
    header = 8 + int.from_bytes(content[:8], "little")
    cut = [content[:end] for end in (0, header // 2, header, -1)]  # one without tensors
    for damaged in (*cut, content + b"\0", (2**62).to_bytes(8, "little") + content[8:]):
        error = refuse(write(tmp_path, {"model.safetensors": damaged}) / "model.safetensors")
        assert "the safetensors file is damaged" in error.what
        assert error.where == str(tmp_path / "model.safetensors")


@pytest.mark.parametrize(
    "header",
    [
        *("", "{", "3", "null", "[" * 100_000, '{"a":' * 100_000, "{}"),
        *('{"architecture": 3}', '{"architecture": "../../model"}', '{"architecture": "local-dir:."}'),
        '{"architecture": "hf-hub:timm/vit_tiny_patch16_224.augreg_in21k"}',
        *(f'{{"architecture": "test_vit", "model_args": {value}}}' for value in ("[]", '"depth=1"')),
        *({"pretrained_cfg": {"input_size": size}} for size in (5, ["a"], [3, -4, -4], [3, True, 32])),
        *({"pretrained_cfg": {"mean": [value, 0.5, 0.5]}} for value in (math.nan, math.inf, True, "a")),
        *({"pretrained_cfg": {"crop_pct": True}}, {"label_names": ["ant", 2, "cat"]}),
        '{"architecture": "pvt_v2_b0", "model_args": {"img_size": [32]}}',  # which takes images of any size
        # Arguments of the model.
        *({"depth": depth} for depth in (10**9, -1, "1", 1e9)),
        *({"img_size": size} for size in ([], 10**9, {"a": 1}, ["a"], [32], -4, "32", True, 32.0)),
        *({"num_classes": classes} for classes in (10**9, "3")),
        *({"embed_dim": 10**7}, {"embed_dim": 0}, {"num_heads": [1]}, {"patch_size": 0}, {"reg_tokens": 10**9}),
        *({"norm_layer": "os.system"}, {"mlp_ratio": 1e30}, {"features_only": True}, {"patch_drop_rate": 0.5}),
    ],
    ids=lambda header: str(header)[:60] or "empty",
)
@pytest.mark.filterwarnings("ignore:Initializing zero-element")
def test_a_header_that_describes_no_model_is_refused(tmp_path, config, header):
    if not isinstance(header, str):
        of_images = header.keys() <= {"pretrained_cfg", "label_names"}
        header = config | (header if of_images else {"model_args": config["model_args"] | header})
    assert str(tmp_path) in refuse(with_header(tmp_path, header)).where


def test_a_model_is_refused_before_it_takes_memory_that_is_missing(tmp_path, monkeypatch, files):
    folder, size = write(tmp_path, files), sum(value.numel() * 4 for value in make().state_dict().values())
    create, device = timm.create_model, torch.get_default_device  # a model with weights is not built
    monkeypatch.setattr(timm, "create_model", lambda *args, **more: device().type == "meta" and create(*args, **more))
    for available in ([1000], [2**40, size - 1]):  # for the file; for the model
        sizes = iter(available)
        monkeypatch.setattr("pdvit.models.build.available_memory", lambda sizes=sizes: next(sizes))
        assert "too big for memory" in refuse(folder).what


def test_missing_extra_and_misshapen_tensors_are_refused(tmp_path, files):
    text, whole = files["config.json"].decode(), make().state_dict()
    missing = {name: value for name, value in whole.items() if not name.startswith("head.")}
    cases = {
        "missing: 2 (head.bias, head.weight)": missing,
        "unexpected: 1 (patch_head.weight)": whole | {"patch_head.weight": torch.zeros(2)},
        "of another shape: 1 (head.bias)": whole | {"head.bias": torch.zeros(4)},
    }
    for what, tensors in cases.items():
        assert what in refuse(with_header(tmp_path, text, tensors)).what
