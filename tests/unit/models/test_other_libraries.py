"""Models of other libraries in memory, against the tokens that these libraries return themselves."""

import re
from functools import partial
from typing import Any

import pytest
import timm
import torch
import torchvision
from torch import Tensor, nn

import pdvit
from pdvit.errors import UserError
from pdvit.models.families import OTHER_LIBRARIES
from tests.unit.models.layouts.compare import perturbed, random_images, similarity_of
from tests.unit.models.support import SMALL

SIZES = {"image_size": 32, "patch_size": 8, "num_hidden_layers": 3, "num_attention_heads": 2}
SIZES |= {"hidden_size": 24, "intermediate_size": 48}
STAGES = {"image_size": 32, "patch_size": 4, "window_size": 4, "depths": [1, 2], "num_heads": [2, 2], "embed_dim": 8}
TORCHVISION = {"image_size": 32, "patch_size": 8, "num_layers": 3, "num_heads": 2, "hidden_dim": 24, "mlp_dim": 48}
SWIN = {"patch_size": [4, 4], "embed_dim": 8, "depths": [1, 2], "num_heads": [2, 2], "window_size": [4, 4]}
TOWER = {"image_size": 32, "patch_size": 8, "width": 24, "layers": 3, "heads": 2, "mlp_ratio": 2, "output_dim": 8}
# Class of transformers, number of prefix tokens, and settings.
PLAIN = [
    *(("ViT", 1, {}), ("DeiT", 2, {}), ("Beit", 1, {}), ("Beit", 1, {"use_mean_pooling": False})),
    *(("Data2VecVision", 1, {}), ("Dinov2", 1, {}), ("Dinov2WithRegisters", 5, {}), ("ViTMSN", 1, {})),
    *(("Dinov2Backbone", 1, {}), ("Dinov2WithRegistersBackbone", 5, {"out_features": ["stage1", "stage3"]})),
    ("DINOv3ViTBackbone", 5, {"num_register_tokens": 4}),
    *(("DINOv3ViT", 4, {"num_register_tokens": 3}), ("IJepa", 0, {}), ("SiglipVision", 0, {}), ("CLIPVision", 1, {})),
]
pictures = partial(random_images, 32)


def check(model: nn.Module, expected: dict[str, Tensor], **layout: Any) -> None:
    found = pdvit.analyze(model, pictures(), "similarity", **layout).table
    means = dict(zip(found["layer"], found["mean"], strict=True))
    assert set(expected) <= set(means)
    assert set(means) - set(expected) <= {f"block {i}" for i in range(1, 9)}
    assert len({round(value, 4) for value in means.values()}) == len(means)  # one layer is not read for another
    for layer, tokens in expected.items():
        assert means[layer] == pytest.approx(similarity_of(tokens), abs=1e-5), layer


def transformers_model(name: str, **settings: Any) -> nn.Module:
    transformers = pytest.importorskip("transformers", reason="needs transformers (extra hf)")
    config = re.sub("(For.*|Model|Backbone)$", "", name)
    torch.manual_seed(0)  # of some weights two layers have nearly the same P
    return getattr(transformers, name)(getattr(transformers, f"{config}Config")(**settings))


@pytest.mark.parametrize(("name", "prefix", "more"), PLAIN)
@torch.no_grad()
def test_tokens_of_transformers_are_its_hidden_states(name, prefix, more):
    model = perturbed(transformers_model(name if name.endswith("Backbone") else f"{name}Model", **SIZES, **more))
    output = model(pictures(), output_hidden_states=True)
    layers = ["embed", "block 1", "block 2", "block 3"]
    expected = {layer: tokens[:, prefix:] for layer, tokens in zip(layers, output.hidden_states, strict=True)}
    # A backbone norms some layers, or none.
    if not (name.endswith("Backbone") or torch.equal(output.last_hidden_state, output.hidden_states[-1])):
        expected["norm"] = output.last_hidden_state[:, prefix:]
    check(model, expected)


@pytest.mark.parametrize("name", ["SwinModel", "Swinv2Model", "Swinv2Backbone"])
@torch.no_grad()
def test_tokens_of_stages_of_transformers(name):
    model = perturbed(transformers_model(name, **STAGES))
    output = model(pictures(), output_hidden_states=True)
    embed, last = output.hidden_states[0], output.hidden_states[-1]
    norm = {"norm": output.last_hidden_state} if "Model" in name else {}
    check(model, {"embed": embed, "block 3": last} | norm)


@torch.no_grad()
def test_tokens_of_torchvision():
    model = perturbed(torchvision.models.VisionTransformer(**TORCHVISION))
    tokens = torch.cat([model.class_token.expand(2, -1, -1), model._process_input(pictures())], 1)
    tokens = tokens + model.encoder.pos_embedding
    expected = {"embed": tokens[:, 1:]}
    for number, block in enumerate(model.encoder.layers, 1):
        expected[f"block {number}"] = (tokens := block(tokens))[:, 1:]
    check(model, expected | {"norm": model.encoder.ln(tokens)[:, 1:]})
    model = perturbed(torchvision.models.SwinTransformer(**SWIN))
    embed = model.features[0](pictures())
    first = model.features[1](embed)
    second = model.features[3][0](model.features[2](first))
    last = model.features[3][1](second)
    maps = {"embed": embed, "block 1": first, "block 2": second, "block 3": last, "norm": model.norm(last)}
    check(model, {layer: it.flatten(1, 2) for layer, it in maps.items()})


@pytest.mark.parametrize("options", [{}, {"final_ln_after_pool": True}, {"attentional_pool": True}], ids=str)
@torch.no_grad()
def test_tokens_of_open_clip_are_its_intermediates(options):
    transformer = pytest.importorskip("open_clip", reason="needs open_clip_torch (extra zoo)").transformer
    model = perturbed(transformer.VisionTransformer(**TOWER, **options))
    found = model.forward_intermediates(pictures(), output_fmt="NLC")["image_intermediates"]
    expected = {f"block {number}": tokens for number, tokens in enumerate(found, 1)}
    if not options:
        normed = model.forward_intermediates(pictures(), output_fmt="NLC", normalize_intermediates=True)
        expected["norm"] = normed["image_intermediates"][-1]
    check(model, expected | {"embed": model._embeds(pictures())[:, 1:]})


class Research(nn.Module):
    """A model as its author writes it: two registers, and blocks that return a tuple and take named arguments."""

    class Block(nn.Module):
        def __init__(self, batch_first: bool = True) -> None:
            super().__init__()
            self.mix = nn.TransformerEncoderLayer(24, 2, 48, batch_first=batch_first, dropout=0)

        def forward(self, *, scale: Tensor, tokens: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
            return scale, {"tokens": self.mix(tokens)}

    def __init__(self, batch_first: bool = True) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 24, 8, 8)
        self.registers = nn.Parameter(torch.zeros(1, 2, 24))
        self.encoder = nn.ModuleDict({"layers": nn.ModuleList([self.Block(batch_first) for _ in range(3)])})
        self.ln, self.head = nn.LayerNorm(24), nn.Linear(24, 4)
        self.batch_first, self.image_size = batch_first, 32

    def forward(self, images: Tensor, kept: list[Tensor] | None = None) -> Tensor:
        tokens = self.stem(images).flatten(2).mT
        tokens = torch.cat([self.registers.expand(len(tokens), -1, -1), tokens], 1)
        tokens = tokens if self.batch_first else tokens.transpose(0, 1)
        kept = [] if kept is None else kept
        kept.append(tokens)
        for block in self.encoder["layers"]:
            tokens = block(scale=tokens.new_ones(1), tokens=tokens)[1]["tokens"]
            kept.append(tokens)
        kept.append(self.ln(tokens))
        return self.head(kept[-1].mean(1))


RESEARCH = {"blocks": "encoder.layers", "prefix_tokens": 2, "norm": "ln"}
ALMOST, NO_NORM = ("encoder.layer", "encoder.layers.0"), ("norm", "encoder.ln", "encoder.layers")


@torch.no_grad()
def test_any_module_with_a_path_or_a_list_of_its_blocks():
    model, kept = perturbed(Research()), []
    model(pictures(), kept)
    layers = ["embed", "block 1", "block 2", "block 3", "norm"]
    expected = {layer: tokens[:, 2:] for layer, tokens in zip(layers, kept, strict=True)}
    check(model, expected, **RESEARCH)
    check(nn.DataParallel(pdvit.DiverseModel(model, patch_head=False, **RESEARCH)), expected)
    model.again, model.last = model.encoder["layers"], model.ln
    check(model, expected, blocks="again", prefix_tokens=2, norm="last")
    del expected["norm"]
    check(nn.DataParallel(model), expected, blocks=list(model.encoder["layers"]), prefix_tokens=2)
    check(torch.compile(model), expected, blocks="encoder.layers", prefix_tokens=2)


def test_prefix_tokens_among_the_patches_are_a_note():
    (note,) = pdvit.analyze(Research(), pictures(), "similarity", blocks="encoder.layers").notes
    assert re.fullmatch("18 patches fill no square; .* prefix_tokens=2", note)
    assert not pdvit.analyze(Research(), pictures(), "similarity", **RESEARCH).notes


def test_errors_of_an_own_model_name_the_call_and_prefix_tokens():
    model = Research()
    wrong = pdvit.DiverseModel(model, nn.Linear(24, 4), **RESEARCH | {"prefix_tokens": 3})
    with pytest.raises(UserError, match=r"\(2, 15, 4\)\n.*\n.*check prefix_tokens"):
        wrong(pictures(), torch.zeros(2, 16, dtype=torch.long))
    model.image_size, model.stem = None, nn.Conv2d(3, 24, 300)  # by default 224 pixels
    with pytest.raises(UserError, match=r"where: DiverseModel\(model\), with its image size"):
        pdvit.DiverseModel(model, False, **RESEARCH)


def adapted() -> nn.Module:
    peft = pytest.importorskip("peft", reason="needs peft (extra zoo)")
    model = transformers_model("ViTForImageClassification", **SIZES)
    return peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj", "query"]))


def whole_open_clip() -> nn.Module:
    open_clip = pytest.importorskip("open_clip", reason="needs open_clip_torch (extra zoo)")
    text = {"context_length": 8, "vocab_size": 16, "width": 16, "heads": 1, "layers": 1}
    return open_clip.CLIP(8, {"image_size": 32, "patch_size": 8, "width": 24, "layers": 3, "head_width": 12}, text)


NO_SIZE = {name: value for name, value in SIZES.items() if name != "image_size"}
TEXT = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1}
wrapped = partial(timm.create_model, "vit_tiny_patch16_224", **SMALL | {"depth": 3})
INSIDE = {
    "model": lambda: pdvit.DiverseModel(wrapped()),
    "module": lambda: torch.optim.swa_utils.AveragedModel(nn.DataParallel(wrapped())),
    "_orig_mod": lambda: torch.compile(wrapped(), backend="eager"),
    "vision_model": lambda: transformers_model("CLIPModel", text_config=TEXT, vision_config=SIZES),
    "base_model": adapted,
    "visual": whole_open_clip,
}


@pytest.mark.parametrize("attribute", INSIDE)
@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # of peft
def test_wrappers_heads_and_towers_are_removed(attribute):
    outer = perturbed(INSIDE[attribute]())
    found, expected = (pdvit.analyze(model, pictures()).table for model in (outer, getattr(outer, attribute)))
    assert found.equals(expected)
    assert len(found) == 7 * found["layer"].nunique()


@pytest.mark.parametrize(
    ("build", "layout", "what"),
    [
        (partial(transformers_model, "ViTMAEModel", **NO_SIZE), {}, "shuffles patches"),
        (partial(transformers_model, "Siglip2VisionModel", **NO_SIZE), {}, "packed patches"),
        (Research, {}, "can't read the patches of a Research.*blocks='.*prefix_tokens=1, norm="),
        (Research, {"prefix_tokens": 1}, "belong to the blocks"),
        *((Research, {"blocks": path}, f"'{path}.*did you mean 'encoder.layers'") for path in ALMOST),
        (Research, RESEARCH | {"prefix_tokens": -2}, "prefix_tokens is -2"),
        *((Research, RESEARCH | {"norm": path}, f"no norm at '{path}'.*from: stem, ln, head$") for path in NO_NORM),
        (Research, {"blocks": "stem"}, "no list of modules at 'stem'.*choose from: encoder.layers$"),
        (Research, {"blocks": []}, "no blocks"),
        (Research, {"blocks": 3}, "blocks is a int.*encoder.layers"),
        (Research, {"blocks": nn.Linear(2, 2)}, "blocks is a Linear"),
        (Research, {"blocks": 2 * [nn.Linear(2, 2)]}, "in the list twice"),
        (Research, RESEARCH | {"norm": 3}, "norm is a int"),
        (partial(Research, batch_first=False), RESEARCH, "first axis.*batch_first"),
        (torchvision.models.resnet18, {"blocks": "layer1"}, "has no input of the shape"),
    ],
)
def test_models_that_can_not_be_read_are_refused_with_the_reason(build, layout, what):
    with pytest.raises(UserError, match=f"(?s){what}"):
        pdvit.analyze(build(), pictures(), **layout)


@pytest.mark.parametrize(
    ("build", "layout"),
    [
        (partial(transformers_model, "ViTForImageClassification", **SIZES, num_labels=4), {}),
        (partial(torchvision.models.VisionTransformer, **TORCHVISION, num_classes=4), {}),
        (Research, RESEARCH | {"patch_head": nn.Linear(24, 4)}),
    ],
    ids=["transformers", "torchvision", "research"],
)
def test_all_terms_train_every_parameter(build, layout):
    torch.manual_seed(0)
    model = pdvit.DiverseModel(build(), **layout).train()
    images, targets, patch_targets = pdvit.patch_cutmix(pictures(count=4), torch.arange(4), 8, 4)
    objective = pdvit.Objective(cosine=1, contrastive=1, mixing=1, koleo=1, spectral=1)
    output = model(images, patch_targets)
    objective(output, targets, patch_targets).total.backward()
    assert output.first.shape == output.last.shape == (4, 16, 24)
    unused = "pooler"  # of transformers, beside a classifier
    assert not [name for name, it in model.named_parameters() if it.grad is None and unused not in name]


def test_a_model_that_takes_text_too_is_refused_and_the_classifier_of_the_tip_trains():
    settings = {"text_config": TEXT, "vision_config": SIZES}
    with pytest.raises(UserError, match=r"(?s)CLIPModel does not take images alone.*CLIPForImageClassification"):
        pdvit.DiverseModel(transformers_model("CLIPModel", **settings), patch_head=False)
    model = pdvit.DiverseModel(transformers_model("CLIPForImageClassification", **settings, num_labels=4))
    assert model(pictures()).patch_logits.shape == (2, 16, 4)


def test_every_row_of_the_table_is_tested():
    names = {name if name.endswith("Backbone") else f"{name}Model" for name, *_ in PLAIN}
    names |= {"SwinModel", "Swinv2Model", "Swinv2Backbone"}
    assert {name.partition(".")[2] for name in OTHER_LIBRARIES} == names | {"VisionTransformer", "SwinTransformer"}
