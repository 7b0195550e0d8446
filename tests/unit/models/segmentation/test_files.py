import json
from dataclasses import replace

import pytest
import timm
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch.nn import functional as F

from pdvit.config import Config
from pdvit.config.schema import DataConfig, DiversityConfig, ModelConfig, SegmentConfig
from pdvit.errors import UserError
from pdvit.models.checkpoints import HEADER_KEY, export
from pdvit.models.layers import places_of, watch
from pdvit.models.loading import apply_checkpoint_defaults as settle
from pdvit.models.loading import fingerprint
from pdvit.models.loading import load_pretrained as begin
from pdvit.models.resolved_checkpoint import resolve_checkpoint as describe
from pdvit.models.segmentation.files import export_segmenter
from pdvit.models.segmentation.segmenter import build_segmenter
from tests.unit.models.support import load, load_segmenter

CLASSES, PALETTE = ["ground", "cat", "dog"], [(0, 0, 0), (255, 0, 0), (0, 0, 255)]
NONE = DiversityConfig(preset="none", cosine=0.0, contrastive=0.0, mixing=0.0)
DATA = {"input_size": (3, 32, 32), "crop_pct": 1.0, "interpolation": "bicubic", "mean": (0.1,) * 3, "std": (0.4,) * 3}
SWIN = {"embed_dim": 8, "depths": [2, 1, 1, 2], "num_heads": [1, 2, 2, 4], "window_size": 4}
SMALL = {"depth": 4, "width": 16, "heads": 2, "patch_size": 8}


def config(name="vit_tiny_patch16_224", head="upernet", crop=32, **segment):
    model = {"args": SWIN} if "swin" in name else SMALL
    section = SegmentConfig(head=head, crop=crop, **{"width": 16} | segment)
    return Config(model=ModelConfig(name=name, drop_path=0.0, **model), diversity=NONE, segment=section)


def make(*arguments, seed=0, classes=3, **options):
    torch.manual_seed(seed)
    segmenter = build_segmenter(config(*arguments, **options), classes)
    with torch.no_grad():
        for weight in segmenter.state_dict().values():
            if weight.is_floating_point():
                weight.uniform_(0.1, 0.3)
    return segmenter.eval()


def write(folder, segmenter, classes=CLASSES, palette=PALETTE):
    folder.mkdir(exist_ok=True)
    for name, content in export_segmenter(segmenter, classes, palette, DATA, "ema").items():
        (folder / name).write_bytes(content)
    return folder


def images(size=(40, 50)):
    return torch.linspace(-1, 1, 3 * size[0] * size[1]).sin().view(1, 3, *size)


def uncoloured(told):
    return {name: value for name, value in told["pdvit"].items() if name != "palette"}


@pytest.fixture(scope="module")
def exported():
    """The files of one model."""
    return export_segmenter(make(seed=1), CLASSES, PALETTE, DATA, "ema")


@pytest.fixture
def run(exported, tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    for name, content in exported.items():
        (folder / name).write_bytes(content)
    return folder


def spoil(folder, change):
    """Write the weights again with another header; return their file."""
    file = folder / "model.safetensors"
    with safe_open(file, framework="pt") as opened:
        told = json.loads(opened.metadata()[HEADER_KEY])
        tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    change(told, tensors)
    (folder / "config.json").unlink()
    save_file(tensors, file, metadata={HEADER_KEY: json.dumps(told)})
    return file


@pytest.mark.parametrize(
    ("options", "crop"),
    [
        ({"name": "vit_tiny_patch16_224", "head": "upernet", "norm": "group", "mode": "slide", "stride": 21}, 32),
        ({"name": "vit_tiny_patch16_224", "head": "linear", "short_side": 48}, 33),
        ({"name": "swin_tiny_patch4_window7_224", "head": "upernet", "aux": 0.0}, 64),
    ],
)
@torch.no_grad()
def test_a_file_alone_gives_the_same_logits(tmp_path, options, crop):
    segmenter = make(crop=crop, **options)
    loaded = load_segmenter(write(tmp_path / "run", segmenter) / "model.safetensors")
    assert torch.equal(loaded.model(images()).logits, segmenter(images()).logits)
    assert (loaded.classes, loaded.palette, loaded.weights) == (CLASSES, PALETTE, "ema")
    told = loaded.model.inside.pretrained_cfg
    assert (tuple(told["mean"]), tuple(told["std"])) == ((0.1,) * 3, (0.4,) * 3)
    told = {name: getattr(loaded.segment, name) for name in options if name != "name"}
    assert told == {name: value for name, value in options.items() if name != "name"}
    assert loaded.segment.crop == crop
    assert loaded.model.adapter == segmenter.adapter
    assert not loaded.model.training


def test_the_names_in_the_file_are_of_backbone_and_head(run):
    with safe_open(run / "model.safetensors", framework="pt") as opened:
        names = list(opened.keys())
    assert {name.partition(".")[0] for name in names} == {"backbone", "head"}
    assert {name.split(".")[1] for name in names if name.startswith("head")} == {"neck", "decoder", "classifier", "aux"}
    config = json.loads((run / "config.json").read_text())
    assert config["architecture"] == "vit_tiny_patch16_224"
    assert config["label_names"] == CLASSES


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (lambda told, _: told["pdvit"]["segment"].update(head="mask2former"), "mask2former"),
        (lambda told, _: told["pdvit"]["segment"].update(width=32), "have another shape of 'head"),
        (lambda told, _: told["pdvit"]["segment"].update(width="wide"), "not a whole number"),
        (lambda told, _: told["pdvit"]["segment"].update(wings=2), "no key 'segment.wings'"),
        (lambda told, _: told["pdvit"]["segment"].pop("crop"), "no head or no crop"),
        (lambda told, _: told["pdvit"].update(segment="yes"), "is a section"),
        (lambda told, _: told["pdvit"].pop("segment"), "not a segmentation model"),
        (lambda told, _: told["pdvit"].update(palette=[[0, 0, 300]] * 3), "palette"),
        (lambda told, _: told["pdvit"].update(palette=[[0, 0, 0]]), "palette"),
        (
            lambda told, _: (told.update(label_names=["a", "b"]), told["pdvit"].pop("palette")),
            "another shape of 'head.aux",
        ),
        (lambda told, _: (told.pop("label_names"), told["pdvit"].pop("palette")), "does not name its classes"),
        (lambda told, _: told.update(architecture="os.system"), "no model named"),
        (lambda told, _: told["model_args"].update(pretrained=True), "can't be an argument"),
        (lambda _, tensors: tensors.pop("head.classifier.bias"), "lack 'head.classifier.bias'"),
        (lambda _, tensors: tensors.pop("backbone.cls_token"), "lack 'cls_token'"),
        (lambda _, tensors: tensors.update({"head.more": torch.zeros(2)}), "unknown 'head.more'"),
    ],
)
def test_a_header_is_not_trusted(run, change, what):
    file = spoil(run, change)
    with pytest.raises(UserError, match=what):
        load_segmenter(file)


def test_a_classifier_is_no_segmentation_model(tmp_path):
    model = timm.create_model("vit_tiny_patch16_224", depth=1, embed_dim=16, num_heads=2, num_classes=3)
    (tmp_path / "model.safetensors").write_bytes(
        export(model, CLASSES, DATA | {"input_size": (3, 224, 224)}, "raw")["model.safetensors"]
    )
    with pytest.raises(UserError, match=r"(?s)not a segmentation model.*pdvit segment"):
        load_segmenter(tmp_path)


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "swin_tiny_patch4_window7_224"])
@torch.no_grad()
def test_a_reader_of_classifiers_gets_the_backbone(tmp_path, name):
    segmenter = make(name, crop=64)
    loaded = load(write(tmp_path / "run", segmenter))
    assert not any(key.startswith("head") for key in loaded.model.state_dict())
    for key, value in segmenter.backbone.state_dict().items():
        assert torch.equal(loaded.model.state_dict()[key], value)
    layers = []
    with watch(places_of(loaded.model), lambda layer, tokens: layers.append((layer.name, tokens.isfinite().all()))):
        loaded.model(images((64, 64)))
    assert all(finite for _, finite in layers)
    assert layers[-1][0] == f"block {4 if 'vit' in name else 6}"


def weights_of(module):
    return {name: value.clone() for name, value in module.state_dict().items()}


@torch.no_grad()
def test_the_head_is_taken_where_classes_and_kind_are_the_same(run):
    segmenter = build_segmenter(config(crop=48), 3)
    notes = begin(segmenter, describe(run), CLASSES)
    theirs = make(seed=1).head.state_dict()
    assert notes[-1].startswith("head: ")
    assert "from the file" in notes[-1]
    assert all(torch.equal(value, theirs[name]) for name, value in segmenter.head.state_dict().items())
    assert segmenter.backbone.pos_embed.shape[1] == 37  # 6x6 patches and the class token: resampled


@pytest.mark.parametrize(
    ("classes", "options", "why"),
    [
        (["ground", "cat", "cow"], {}, "other classes"),
        (["one", "two"], {}, "other classes"),
        (CLASSES, {"head": "linear"}, "another upernet head"),
        (CLASSES, {"width": 32}, "another upernet head"),
    ],
)
def test_another_head_stays_fresh_and_that_is_said(run, classes, options, why):
    segmenter = build_segmenter(config(**options), len(classes))
    before = weights_of(segmenter.head)
    notes = begin(segmenter, describe(run), classes)
    assert notes[-1] == f"head: fresh, because the file has {why}"
    assert all(torch.equal(before[name], value) for name, value in segmenter.head.state_dict().items())


@pytest.mark.parametrize("head", ["upernet", "linear"])
@torch.no_grad()
def test_a_classifier_gives_its_backbone_with_positions_resampled(tmp_path, head):
    torch.manual_seed(3)
    model = timm.create_model(
        "vit_tiny_patch16_224", depth=4, embed_dim=16, num_heads=2, patch_size=8, img_size=32, num_classes=7
    )
    names = [str(number) for number in range(7)]
    for name, content in export(model, names, DATA, "raw").items():
        (tmp_path / name).write_bytes(content)
    found = describe(tmp_path)
    # what a run does: the checkpoint's facts go into the configuration, the crop stays
    settled = settle(replace(config(crop=64), model=ModelConfig(init=str(tmp_path)), data=DataConfig()), found)
    segmenter = build_segmenter(replace(settled, segment=replace(settled.segment, head=head)), 3)
    notes = begin(segmenter, found, CLASSES)
    assert notes[-1] == "head: fresh"
    assert any(note.startswith("resampled: 1 (pos_embed)") for note in notes)
    for name in ("blocks.3.mlp.fc2.weight", "patch_embed.proj.weight", "cls_token"):
        assert torch.equal(segmenter.backbone.state_dict()[name], model.state_dict()[name])
    grid = model.pos_embed[:, 1:].view(1, 4, 4, 16).permute(0, 3, 1, 2)
    expected = F.interpolate(grid, (8, 8), mode="bicubic", antialias=True).flatten(2).transpose(1, 2)
    torch.testing.assert_close(segmenter.backbone.pos_embed[:, 1:], expected)
    assert ("norm.weight" in segmenter.backbone.state_dict()) == (head == "linear")


@pytest.mark.slow
def test_files_of_the_original_swin_and_deit_begin_a_segmentation(tmp_path):
    swin = timm.create_model("swin_tiny_patch4_window7_224", img_size=64, num_classes=5, **SWIN)
    # the published layout: a stage merges patches at its end, and masks are saved
    published = {}
    for name, value in swin.state_dict().items():
        parts = name.split(".")
        if parts[2:3] == ["downsample"]:
            parts[1] = str(int(parts[1]) - 1)
        published[".".join(parts).replace("head.fc.", "head.")] = value
    torch.save({"model": published}, tmp_path / "swin_tiny_patch4_window7_224.pth")
    segmenter = build_segmenter(config("swin_tiny_patch4_window7_224", crop=96), 3)
    args = config("swin_tiny_patch4_window7_224").model
    torch.save({"model": published, "args": None}, tmp_path / "x.pth")
    found = describe(tmp_path / "x.pth", "swin_tiny_patch4_window7_224")
    wider = build_segmenter(replace(config(crop=64), model=replace(args, args=SWIN | {"embed_dim": 16})), 3)
    with pytest.raises(UserError, match=r"of the backbone's"):  # another size: not what it claims to be
        begin(wider, found, CLASSES)
    begin(segmenter, found, CLASSES)
    for name in ("layers.1.downsample.reduction.weight", "layers.3.blocks.1.attn.qkv.weight"):
        assert torch.equal(segmenter.backbone.state_dict()[name], swin.state_dict()[name])
    deit = timm.create_model(
        "deit_tiny_distilled_patch16_224", depth=4, embed_dim=16, num_heads=2, patch_size=8, img_size=32
    )
    torch.save({"model": deit.state_dict()}, tmp_path / "deit.pth")
    segmenter = build_segmenter(config("deit_tiny_distilled_patch16_224", crop=64), 3)
    begin(segmenter, describe(tmp_path / "deit.pth", "deit_tiny_distilled_patch16_224"), CLASSES)
    assert torch.equal(segmenter.backbone.blocks[3].attn.qkv.weight, deit.blocks[3].attn.qkv.weight)
    assert segmenter.backbone.pos_embed.shape[1] == 66


def test_the_hash_of_initial_weights_knows_the_head(run):
    one = fingerprint(describe(run))
    spoil(run, lambda _, tensors: tensors["head.classifier.bias"].add_(1))
    assert fingerprint(describe(run)) != one
