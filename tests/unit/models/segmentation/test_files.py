"""Files of segmentation models: read back, not trusted, and as the beginning of another run."""

import json
from dataclasses import replace

import pytest
import timm
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch.nn import functional as F

from pdvit.config.schema import DataConfig, ModelConfig
from pdvit.errors import UserError
from pdvit.models.checkpoints import HEADER_KEY, export
from pdvit.models.loading import apply_checkpoint_defaults, fingerprint, load_model, load_pretrained
from pdvit.models.resolved_checkpoint import resolve_checkpoint
from pdvit.models.segmentation.segmenter import build_segmenter, export_segmenter
from tests.unit.models.segmentation.models import SWIN, VIT, build, config, images
from tests.unit.models.support import DATA, load, tokens_of, write

CLASSES, PALETTE = ["ground", "cat", "dog"], [(0, 0, 0), (255, 0, 0), (0, 0, 255)]
VIT_SIZES = {"depth": 4, "embed_dim": 16, "num_heads": 2, "patch_size": 8, "img_size": 32}


def make(seed=0, **options):
    segmenter = build(classes=3, **options)
    torch.manual_seed(seed)
    with torch.no_grad():
        for weight in segmenter.state_dict().values():
            if weight.is_floating_point():
                weight.uniform_(0.1, 0.3)
    return segmenter.eval()


def saved(folder, segmenter):
    return write(folder, export_segmenter(segmenter, CLASSES, PALETTE, DATA, "ema"))


@pytest.fixture(scope="module")
def exported():
    """The files of one model."""
    return export_segmenter(make(seed=1), CLASSES, PALETTE, DATA, "ema")


@pytest.fixture
def run(exported, tmp_path):
    return write(tmp_path / "run", exported)


def change_file(folder, change):
    """Change header and tensors of a file of weights; return the file."""
    file = folder / "model.safetensors"
    with safe_open(file, framework="pt") as opened:
        header = json.loads(opened.metadata()[HEADER_KEY])
        tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    change(header, tensors)
    (folder / "config.json").unlink()
    save_file(tensors, file, metadata={HEADER_KEY: json.dumps(header)})
    return file


LINEAR = {"crop": 33, "head": "linear", "short_side": 48, "norm": "group", "mode": "slide", "stride": 21}


@pytest.mark.parametrize("options", [LINEAR, {"crop": 64, "head": "upernet", "name": SWIN, "aux": 0.0}])
@torch.no_grad()
def test_a_file_alone_gives_the_same_logits_and_settings(tmp_path, options):
    segmenter = make(**options)
    loaded = load(saved(tmp_path, segmenter) / "model.safetensors")
    assert torch.equal(loaded.model(images(1, 40, 50)).logits, segmenter(images(1, 40, 50)).logits)
    assert (loaded.classes, loaded.palette, loaded.selected.weights) == (CLASSES, PALETTE, "ema")
    preprocessing = loaded.model.inside.pretrained_cfg
    assert (tuple(preprocessing["mean"]), tuple(preprocessing["std"])) == ((0.1,) * 3, (0.4,) * 3)
    assert all(getattr(loaded.segment, key) == value for key, value in options.items() if key != "name")
    assert loaded.model.adapter == segmenter.adapter
    assert not loaded.model.training


def with_classes(classes):
    return lambda header, _: (header.update(label_names=classes), header["pdvit"].pop("palette"))


def with_segment(**settings):
    return lambda header, _: header["pdvit"]["segment"].update(settings)


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (with_segment(head="mask2former"), "mask2former"),
        (with_segment(width=32), r"of another shape: \d+ \(head"),
        (with_segment(width="wide"), "not a whole number"),
        (with_segment(wings=2), "no key 'segment.wings'"),
        (lambda header, _: header["pdvit"]["segment"].pop("crop"), "no head or no crop"),
        (lambda header, _: header["pdvit"].update(segment="yes"), "is a section"),
        (lambda header, _: header["pdvit"].update(palette=[[0, 0, 300]] * 3), "palette"),
        (lambda header, _: header["pdvit"].update(palette=[[0, 0, 0]]), "palette"),
        (with_classes(["a", "b"]), r"of another shape: \d+ \(head.aux"),
        (with_classes(None), "does not name its classes"),
        (lambda header, _: header["model_args"].update(pretrained=True), "can't be an argument"),
        (lambda _, tensors: tensors.pop("head.classifier.bias"), r"missing: 1 \(head.classifier.bias"),
        (lambda _, tensors: tensors.pop("backbone.cls_token"), r"missing: 1 \(cls_token"),
        (lambda _, tensors: tensors.update({"head.more": torch.zeros(2)}), r"unexpected: 1 \(head.more"),
    ],
)
def test_a_header_is_not_trusted(run, change, what):
    with pytest.raises(UserError, match=what):
        load(change_file(run, change))


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    """A classifier and the folder of its files."""
    torch.manual_seed(3)
    model = timm.create_model(VIT, **VIT_SIZES, num_classes=7)
    return model, write(tmp_path_factory.mktemp("classifier"), export(model, list("abcdefg"), DATA, "raw"))


@pytest.mark.parametrize("name", [VIT, SWIN])
@torch.no_grad()
def test_loaded_as_a_classifier_it_is_the_backbone(tmp_path, name):
    segmenter = make(name=name, crop=64)
    loaded = load_model(resolve_checkpoint(saved(tmp_path, segmenter)), backbone=True)
    model, expected = loaded.model, segmenter.backbone.state_dict()
    assert model.state_dict().keys() == loaded.with_random_weights().state_dict().keys() == expected.keys()
    assert all(torch.equal(value, expected[key]) for key, value in model.state_dict().items())
    layers = tokens_of(model, images(1, 64, 64))
    assert all(tokens.isfinite().all() for tokens in layers.values())
    assert list(layers)[-1] == f"block {4 if name == VIT else 6}"


@pytest.mark.parametrize(
    ("classes", "options", "note"),
    [
        (CLASSES, {"crop": 48}, "from the file"),
        (["ground", "cat", "cow"], {}, "head: fresh, because the file has other classes"),
        (CLASSES, {"head": "linear"}, "head: fresh, because the file has another upernet head"),
    ],
)
@torch.no_grad()
def test_the_head_is_kept_if_head_and_classes_are_the_same(run, classes, options, note):
    segmenter = build(classes=3, **options)
    source = make(seed=1) if note == "from the file" else segmenter
    expected = {name: value.clone() for name, value in source.head.state_dict().items()}
    notes = load_pretrained(segmenter, resolve_checkpoint(run), classes)
    assert note in notes[-1]
    assert all(torch.equal(value, expected[name]) for name, value in segmenter.head.state_dict().items())
    if "crop" in options:
        assert segmenter.backbone.pos_embed.shape[1] == 37  # 6x6 patches and the class token: resampled


@pytest.mark.parametrize("head", ["upernet", "linear"])
@torch.no_grad()
def test_a_classifier_gives_its_backbone_with_positions_resampled(classifier, head):
    model, folder = classifier
    found = resolve_checkpoint(folder)
    # as in a run: the checkpoint fills the configuration, the crop stays
    unset = replace(config(head=head, crop=64), model=ModelConfig(init=str(folder)), data=DataConfig())
    segmenter = build_segmenter(apply_checkpoint_defaults(unset, found), 3)
    notes = load_pretrained(segmenter, found, CLASSES)
    assert notes[-1] == "head: fresh"
    assert any(note.startswith("resampled: 1 (pos_embed)") for note in notes)
    for name in ("blocks.3.mlp.fc2.weight", "patch_embed.proj.weight", "cls_token"):
        assert torch.equal(segmenter.backbone.state_dict()[name], model.state_dict()[name])
    grid = model.pos_embed[:, 1:].view(1, 4, 4, 16).permute(0, 3, 1, 2)
    expected = F.interpolate(grid, (8, 8), mode="bicubic", antialias=True).flatten(2).transpose(1, 2)
    torch.testing.assert_close(segmenter.backbone.pos_embed[:, 1:], expected)
    assert ("norm.weight" in segmenter.backbone.state_dict()) == (head == "linear")


def test_the_hash_of_initial_weights_covers_the_head(run):
    before = fingerprint(resolve_checkpoint(run))
    change_file(run, lambda _, tensors: tensors["head.classifier.bias"].add_(1))
    assert fingerprint(resolve_checkpoint(run)) != before
