"""Folders that transformers writes, against its own models and image processors."""

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.unit.models.layouts.compare import PHOTO, check, modules_named, perturbed, prepared, random_images
from tests.unit.models.support import load, refuse

VIT = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 32, "patch_size": 8}
MLP = VIT | {"intermediate_size": 64}
RATIO = VIT | {"mlp_ratio": 2}
SWIN = {"image_size": 32, "embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4, "num_labels": 3}
TEXT = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16, "vocab_size": 10}
BOTH = {"vision_config": MLP, "text_config": TEXT, "num_labels": 3}
STAGES = {"out_indices": [0, 1]}
# Class of transformers, its configuration, and the number of tokens in front of the patches.
MODELS: list[tuple[str, dict[str, Any], int]] = [
    ("ViTModel", MLP | {"hidden_act": "gelu_new", "qkv_bias": False}, 1),
    ("ViTForImageClassification", MLP | {"num_labels": 3, "layer_norm_eps": 1e-5}, 1),
    ("DeiTModel", MLP, 2),
    ("DeiTForImageClassification", MLP | {"num_labels": 3}, 2),
    ("DeiTForImageClassificationWithTeacher", MLP | {"num_labels": 3}, 2),
    ("BeitModel", MLP | STAGES | {"use_absolute_position_embeddings": True, "use_mean_pooling": False}, 1),
    ("BeitForImageClassification", MLP | STAGES | {"num_labels": 3, "use_relative_position_bias": True}, 1),
    ("Data2VecVisionModel", MLP | STAGES | {"use_shared_relative_position_bias": True}, 1),
    ("Data2VecVisionForImageClassification", MLP | STAGES | {"num_labels": 3, "layer_scale_init_value": 0.0}, 1),
    ("Dinov2Model", RATIO, 1),
    ("Dinov2ForImageClassification", RATIO | {"use_swiglu_ffn": True}, 1),
    ("Dinov2WithRegistersModel", RATIO, 5),
    ("Dinov2WithRegistersForImageClassification", RATIO | {"use_swiglu_ffn": True}, 5),
    ("DINOv3ViTModel", MLP | {"num_register_tokens": 2, "rope_theta": 50.0}, 3),
    (
        "DINOv3ViTModel",
        MLP | {"use_gated_mlp": True, "hidden_act": "silu", "query_bias": False, "value_bias": False},
        1,
    ),
    ("ViTMAEModel", MLP | {"mask_ratio": 0.0}, 1),
    ("ViTMAEForPreTraining", MLP | {"mask_ratio": 0.0}, 1),
    ("ViTMSNModel", MLP, 1),
    ("ViTMSNForImageClassification", MLP | {"num_labels": 3}, 1),
    ("IJepaModel", MLP, 0),
    ("IJepaForImageClassification", MLP | {"num_labels": 3}, 0),
    ("CLIPVisionModel", MLP, 1),
    ("CLIPVisionModelWithProjection", MLP | {"hidden_act": "gelu"}, 1),
    ("CLIPModel", BOTH, 1),
    ("CLIPForImageClassification", BOTH, 1),
    ("SiglipVisionModel", MLP, 0),
    ("SiglipModel", BOTH, 0),
    ("SiglipForImageClassification", BOTH, 0),
    ("SwinModel", SWIN, 0),
    ("SwinForImageClassification", SWIN, 0),
    ("Swinv2Model", SWIN, 0),
    ("Swinv2ForImageClassification", SWIN | {"pretrained_window_sizes": [2, 2]}, 0),
    ("Siglip2VisionModel", {key: MLP[key] for key in MLP if key != "image_size"} | {"num_patches": 16}, 0),
]
QUICK = ("ViTForImageClassification", "Dinov2WithRegistersModel", "CLIPModel", "SwinForImageClassification")
BLOCKS = r"(?!.*(text|decoder)).*(?:blocks|layers?)\.\d+"
# Image processor, its settings, and the model to put it beside.
PROCESSORS: list[tuple[str, dict[str, Any]]] = [
    ("ViTImageProcessorPil", {"size": {"height": 32, "width": 32}}),
    ("DeiTImageProcessorPil", {"size": {"height": 37, "width": 37}, "crop_size": {"height": 32, "width": 32}}),
    ("CLIPImageProcessorPil", {"size": {"shortest_edge": 36}, "crop_size": {"height": 32, "width": 32}}),
    ("BitImageProcessorPil", {"size": {"shortest_edge": 45}, "crop_size": {"height": 32, "width": 32}, "resample": 2}),
    ("SiglipImageProcessorPil", {"size": {"height": 32, "width": 32}, "do_rescale": True, "rescale_factor": 1 / 127.5}),
    ("ViTImageProcessorPil", {"size": {"height": 32, "width": 32}, "do_normalize": False}),
]


@pytest.fixture(scope="module")
def transformers():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip("transformers", reason="transformers is not installed: pip install 'pdvit[zoo]'")


def save(transformers: Any, name: str, settings: dict[str, Any], folder: Path) -> Any:
    cls = getattr(transformers, name)
    torch.manual_seed(0)
    model = perturbed(cls(cls.config_class(**settings)))
    model.save_pretrained(folder)
    return model


def forward_of(model: Any) -> Any:
    name = type(model).__name__
    if name == "Siglip2VisionModel":  # takes flattened patches

        def forward(images: torch.Tensor) -> Any:
            patches = images.unfold(2, 8, 8).unfold(3, 8, 8).permute(0, 2, 3, 4, 5, 1).flatten(3).flatten(1, 2)
            ones, shapes = torch.ones(2, 16, dtype=torch.long), torch.tensor([[4, 4]] * 2)
            return model(pixel_values=patches, pixel_attention_mask=ones, spatial_shapes=shapes)

        return forward
    if name.startswith("ViTMAE"):  # in the order of the image
        encoder = model if name == "ViTMAEModel" else model.vit
        return lambda images: encoder(images, noise=torch.arange(16.0).repeat(2, 1))
    return model.vision_model if name in ("CLIPModel", "SiglipModel") else model


@pytest.mark.parametrize(
    ("name", "settings", "prefix"),
    [pytest.param(*case, marks=() if case[0] in QUICK else pytest.mark.slow) for case in MODELS],
)
def test_p_and_logits_of_a_saved_model_are_those_of_transformers(transformers, tmp_path, name, settings, prefix):
    model = save(transformers, name, settings, tmp_path)
    blocks = modules_named(model, r".*\.blocks\.\d+" if "Swin" in name else BLOCKS)
    loaded = check(tmp_path, blocks, random_images(32), forward_of(model), prefix)
    assert loaded.model.num_classes == 3 * ("ForImage" in name and "Dinov2" not in name)  # whose head reads two tokens
    assert any("no preprocessor_config.json" in note for note in loaded.notes)
    # The names that the model has in memory in version 5 differ from those of its files.
    (tmp_path / "model.safetensors").unlink()
    torch.save({"state_dict": model.state_dict()}, tmp_path / "memory.ckpt")
    check(tmp_path / "memory.ckpt", blocks, random_images(32), forward_of(model), prefix)


@pytest.mark.parametrize(("name", "settings"), PROCESSORS)
def test_images_are_prepared_as_by_the_image_processor(transformers, tmp_path, name, settings):
    save(transformers, "ViTForImageClassification", MLP | {"num_labels": 2}, tmp_path)
    processor = getattr(transformers, name)(**settings)
    processor.save_pretrained(tmp_path)
    loaded = load(tmp_path)
    theirs = processor(PHOTO, return_tensors="pt")["pixel_values"][0]
    torch.testing.assert_close(prepared(loaded), theirs, rtol=0, atol=1e-5)
    assert loaded.notes == ()


def test_names_of_classes_and_an_epsilon_that_timm_lacks(transformers, tmp_path):
    labels = {"id2label": {0: "ant", 1: "bee"}, "label2id": {"ant": 0, "bee": 1}}
    save(transformers, "ViTForImageClassification", MLP | labels | {"layer_norm_eps": 1e-3}, tmp_path)
    loaded = load(tmp_path)
    assert loaded.classes == ["ant", "bee"]
    assert any("epsilon of its norms is 0.001, and that of timm's model 1e-05" in note for note in loaded.notes)


@pytest.mark.parametrize("name", ["Dinov2Model", "Dinov2WithRegistersModel"])
def test_positions_of_dinov2_are_resampled_to_the_size_of_the_image_processor(transformers, tmp_path, name):
    model = save(transformers, name, RATIO | {"image_size": 56}, tmp_path)
    sizes = {"size": {"shortest_edge": 36}, "crop_size": {"height": 32, "width": 32}}
    transformers.BitImageProcessorPil(**sizes).save_pretrained(tmp_path)
    check(tmp_path, modules_named(model, BLOCKS), random_images(32), model, 5 if "Registers" in name else 1)


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # peft calls it
def test_an_adapter_of_peft_is_refused_and_the_step_of_the_tip_merges_it(transformers, tmp_path, monkeypatch):
    peft = pytest.importorskip("peft", reason="peft is not installed: pip install 'pdvit[zoo]'")
    base = save(transformers, "ViTForImageClassification", MLP | {"num_labels": 3}, tmp_path / "base")
    adapter = perturbed(peft.get_peft_model(base, peft.LoraConfig(target_modules=["q_proj", "v_proj"], r=2)))
    adapter.save_pretrained(tmp_path / "ADAPTER")
    torch.save(adapter.state_dict(), tmp_path / "adapter.pth")
    assert "not merged" in refuse(tmp_path / "adapter.pth").what
    monkeypatch.chdir(tmp_path)
    names = {"PeftModel": peft.PeftModel, "ADAPTER": "ADAPTER", "model": adapter}
    names["base"] = transformers.ViTForImageClassification.from_pretrained("base")
    for path in ("ADAPTER", "adapter.pth"):
        exec(refuse(path).tip.partition("with peft: ")[2], names | {"FOLDER": f"merged-{path}"})
        merged = transformers.ViTForImageClassification.from_pretrained(f"merged-{path}").eval()
        check(tmp_path / f"merged-{path}", modules_named(merged, BLOCKS), random_images(32), merged, 1)
