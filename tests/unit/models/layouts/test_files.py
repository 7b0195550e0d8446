"""Files of open_clip, torchvision, JAX, research code and training engines, and files that are refused."""

import io
import json
import re
import warnings
import zipfile
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torch.distributed.checkpoint
from safetensors.torch import save_file
from timm.layers import QuickGELU
from torch import Tensor, nn
from torchvision.models import swin_transformer, vision_transformer

from pdvit.config.schema import ModelConfig
from pdvit.models.build import build_model
from pdvit.models.loading import load_model
from pdvit.models.resolved_checkpoint import resolve_checkpoint
from tests.unit.models.layouts.compare import PHOTO, check, modules_named, perturbed, prepared, random_images
from tests.unit.models.support import SMALL, VIT, Touch, equal, load, make, refuse, under

TOWER = {"image_size": 32, "layers": 2, "width": 64, "head_width": 16, "patch_size": 8}
TEXT = {"context_length": 8, "vocab_size": 20, "width": 16, "heads": 2, "layers": 1}
PREPROCESS = {"mean": (0.5, 0.4, 0.3), "std": (0.2, 0.3, 0.4), "interpolation": "bilinear", "resize_mode": "squash"}
OPENAI_MEAN = (0.48145466, 0.4578275, 0.40821073)
PLAIN = {"img_size": 32, "patch_size": 8, "depth": 2}


@pytest.fixture(scope="module")
def open_clip():
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip("open_clip", reason="open_clip is not installed: pip install 'pdvit[zoo]'")


@pytest.mark.parametrize(
    ("tower", "model"),
    [
        ({}, {"quick_gelu": True}),
        ({"ls_init_value": 0.1, "mlp_ratio": 3.0}, {}),
        ({"no_ln_pre": True, "act_kwargs": {"approximate": "tanh"}, "norm_kwargs": {"eps": 1e-6}}, {}),
        ({"pool_type": "avg", "final_ln_after_pool": True}, {}),
        ({"attentional_pool": True, "attn_pooler_heads": 2}, {}),
    ],
)
def test_a_folder_or_a_training_file_of_open_clip(open_clip, tmp_path, tower, model):
    config = {"embed_dim": 32, "vision_cfg": TOWER | tower, "text_cfg": TEXT, **model}
    clip = perturbed(open_clip.CLIP(**config))
    torch.save(clip.state_dict(), tmp_path / "open_clip_pytorch_model.bin")
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": PREPROCESS}))
    blocks, images = clip.visual.transformer.resblocks, random_images(32)
    loaded = check(tmp_path, blocks, images, clip.visual, 1)
    preprocess = open_clip.transform.image_transform(32, False, **PREPROCESS)
    torch.testing.assert_close(prepared(loaded), preprocess(PHOTO), rtol=0, atol=1e-5)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "clip"}))  # as the hub's folders have it too
    parallel = {f"module.{name}": value for name, value in clip.state_dict().items()}
    torch.save({"epoch": 3, "name": "run", "state_dict": parallel, "optimizer": {}}, tmp_path / "epoch_3.pt")
    check(tmp_path / "epoch_3.pt", blocks, images, clip.visual, 1)


def test_towers_of_open_clip_without_a_configuration_and_of_timm(open_clip, tmp_path):
    tower = perturbed(open_clip.model._build_vision_tower(32, TOWER | {"head_width": 64}, False))
    torch.save(tower.state_dict(), tmp_path / "tower.pt")
    loaded = check(tmp_path / "tower.pt", tower.transformer.resblocks, random_images(32), tower, 1)
    notes = "; ".join(loaded.notes)
    assert all(part in notes for part in ("QuickGELU", "number of heads", "no open_clip_config.json"))
    assert loaded.model.pretrained_cfg["mean"] == OPENAI_MEAN
    sizes, advised = ModelConfig(width=64, patch_size=8, heads=4), re.findall("--model ([^;]+)", notes)
    (chosen,) = (resolve_checkpoint(tmp_path / "tower.pt", name, settings=sizes) for name in advised)
    assert isinstance(chosen.model.blocks[0].mlp.act, QuickGELU)
    assert not re.search("QuickGELU|number of heads", "; ".join(chosen.notes))  # both are chosen
    vision = {"image_size": 160, "timm_model_name": VIT, "timm_pool": "token"}
    config = {"embed_dim": 32, "vision_cfg": vision, "text_cfg": TEXT}
    clip = perturbed(open_clip.CustomTextCLIP(**config))
    torch.save(clip.state_dict(), tmp_path / "clip.pt")
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": PREPROCESS}))
    trunk = clip.visual.trunk
    check(tmp_path / "clip.pt", trunk.blocks, random_images(160), clip.visual, trunk.num_prefix_tokens)


def swin(**versions: Any) -> nn.Module:
    sizes = {"patch_size": [4, 4], "embed_dim": 16, "depths": [1, 1, 2, 1], "num_heads": [1, 2, 2, 4]}
    return swin_transformer.SwinTransformer(**sizes, window_size=[2, 2], num_classes=3, **versions)


SECOND = {"block": swin_transformer.SwinTransformerBlockV2, "downsample_layer": swin_transformer.PatchMergingV2}


@pytest.mark.parametrize(
    ("build", "blocks", "side", "prefix", "crop"),
    [
        (lambda: vision_transformer.VisionTransformer(32, 8, 2, 2, 128, 64, num_classes=3), "encoder_layer", 32, 1, 1),
        (lambda: vision_transformer.VisionTransformer(224, 56, 2, 2, 128, 64), "encoder_layer", 224, 1, 224 / 256),
        (swin, "features", 64, 0, 1),
        (lambda: swin(**SECOND), "features", 64, 0, 1),
    ],
)
def test_state_dicts_of_torchvision(tmp_path, build, blocks, side, prefix, crop):
    torch.manual_seed(0)
    model = perturbed(build())
    torch.save(model.state_dict(), tmp_path / "weights.pth")
    pattern = r"features\.[1357]\.\d+" if blocks == "features" else r".*encoder_layer_\d+"
    loaded = check(tmp_path / "weights.pth", modules_named(model, pattern), random_images(side), model, prefix)
    config = loaded.model.pretrained_cfg
    assert loaded.model.num_classes == (1000 if side == 224 else 3)
    assert (config["crop_pct"], config["mean"]) == (crop, (0.485, 0.456, 0.406))
    assert any("does not contain its preprocessing" in note for note in loaded.notes)


def test_the_users_number_of_heads_leaves_the_width_of_the_file(tmp_path):
    model = perturbed(vision_transformer.VisionTransformer(32, 8, 2, 4, 64, 128))
    torch.save(model.state_dict(), tmp_path / "weights.pth")
    found = resolve_checkpoint(tmp_path / "weights.pth", settings=ModelConfig(heads=4))
    images = random_images(32)
    torch.testing.assert_close(load_model(found).model(images), model(images), rtol=0, atol=1e-4)


def test_arrays_of_jax_as_timm_reads_them_and_no_pickles(tmp_path):
    head, mlp = "MultiHeadDotProductAttention_1", "MlpBlock_3/Dense_"
    kernels = {f"{head}/{name}": (24, 2, 12) for name in ("query", "key", "value")}
    kernels |= {f"{head}/out": (2, 12, 24), f"{mlp}0": (24, 48), f"{mlp}1": (48, 24)}
    shapes = {f"{name}/kernel": shape for name, shape in kernels.items()}
    shapes |= {f"{name}/bias": shape[1:] for name, shape in kernels.items()} | {f"{head}/out/bias": (24,)}
    shapes |= {f"LayerNorm_{norm}/{name}": (24,) for norm in (0, 2) for name in ("scale", "bias")}
    shapes = {f"Transformer/encoderblock_{block}/{name}": shape for block in (0, 1) for name, shape in shapes.items()}
    shapes |= {"Transformer/encoder_norm/scale": (24,), "Transformer/encoder_norm/bias": (24,), "head/bias": (3,)}
    shapes |= {"Transformer/posembed_input/pos_embedding": (1, 17, 24), "cls": (1, 1, 24), "head/kernel": (24, 3)}
    shapes |= {"embedding/kernel": (8, 8, 3, 24), "embedding/bias": (24,)}
    generator = np.random.default_rng(0)
    arrays = {name: generator.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    np.savez(tmp_path / "weights.npz", **arrays)
    model: Any = timm.create_model("vit_base_patch16_224", **SMALL, mlp_ratio=2)
    model.load_pretrained(tmp_path / "weights.npz")
    loaded = load(tmp_path / "weights.npz")
    assert equal(loaded.model, model)
    assert loaded.model.blocks[0].attn.num_heads == 2
    assert loaded.model.pretrained_cfg["mean"] == (0.5, 0.5, 0.5)
    hidden = {"pre_logits/bias": np.zeros(24), "pre_logits/kernel": np.zeros((24, 24))}
    np.savez(tmp_path / "hidden.npz", **arrays | hidden)
    without = load(tmp_path / "hidden.npz")
    assert (without.model.num_classes, "no counterpart" in without.notes[-1]) == (0, True)
    marker = tmp_path / "marker"
    np.savez(tmp_path / "pickles.npz", **arrays | {"cls": np.array([Touch(marker)], dtype=object)})
    assert "allow_pickle=False" in refuse(tmp_path / "pickles.npz").what
    assert not marker.exists()


def chunked(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights of a plain model as DINOv2's: blocks in chunks, and a position of the class token."""
    state = {
        re.sub(r"blocks\.(\d)\.", lambda match: f"blocks.{int(match[1]) // 2}.{match[1]}.", key): value
        for key, value in state.items()
    }
    state["mask_token"] = torch.zeros(1, 384)
    if "reg_token" in state:
        state["register_tokens"], place = state.pop("reg_token"), torch.randn(1, 1, 384)
        state["cls_token"] = state["cls_token"] - place
        state["pos_embed"] = torch.cat([place, state["pos_embed"]], 1)
    return state


def of_moco(raw: dict[str, Tensor], average: dict[str, Tensor]) -> dict[str, Any]:
    head = {"head.0.weight": torch.zeros(4, 384), "head.1.running_mean": torch.zeros(4)}
    state = under("module.base_encoder.", raw | head) | under("module.momentum_encoder.", average | head)
    return {"arch": "vit_small", "state_dict": state | {"module.predictor.0.weight": torch.zeros(3, 3)}}


def of_jepa(raw: dict[str, Tensor], average: dict[str, Tensor]) -> dict[str, Any]:
    predictor = {"module.predictor_blocks.0.norm1.weight": torch.zeros(2), "module.mask_token": torch.zeros(1, 1, 4)}
    return {"encoder": under("module.", raw), "target_encoder": under("module.", average), "predictor": predictor}


def of_dinov2(raw: dict[str, Tensor], average: dict[str, Tensor]) -> dict[str, Any]:
    state = under("student.backbone.", chunked(raw)) | under("teacher.backbone.", chunked(average))
    return {"model": state | {"teacher.dino_head.mlp.0.weight": torch.zeros(4, 384)}, "iteration": 7}


@pytest.mark.parametrize(
    ("write", "name", "arguments"),
    [
        (of_moco, "vit_small_patch16_224", {"num_heads": 12}),
        (of_jepa, "vit_small_patch16_224", {"class_token": False, "global_pool": "avg", "fc_norm": False}),
        (of_dinov2, "vit_small_patch14_dinov2", {"depth": 4}),
        (of_dinov2, "vit_small_patch14_reg4_dinov2", {"depth": 4}),
    ],
)
def test_research_code_gives_the_average_or_the_raw_weights(tmp_path, write, name, arguments):
    models = [perturbed(build_model(name, PLAIN | arguments | {"num_classes": 0}), seed) for seed in (0, 1)]
    torch.save(write(*(model.state_dict() for model in models)), tmp_path / "weights.pth")
    for weights, model in (("raw", models[0]), ("ema", models[1])):
        path, prefix = tmp_path / "weights.pth", model.num_prefix_tokens
        loaded = check(path, model.blocks, random_images(32), model, prefix, weights)
        assert loaded.model.pretrained_cfg["mean"] == (0.485, 0.456, 0.406)
    assert load(tmp_path / "weights.pth").selected.weights == "ema"


@pytest.fixture
def config(tmp_path):
    table = {"architecture": VIT, "num_classes": 3, "model_args": {key: SMALL[key] for key in SMALL}}
    (tmp_path / "config.json").write_text(json.dumps(table))
    return tmp_path


def test_training_engines(config):
    model = make()
    state, optimizer = model.state_dict(), torch.optim.AdamW(model.parameters())
    compiled = {re.sub(r"blocks\.(\d)\.", r"blocks.\1._orig_mod.", name): value for name, value in state.items()}
    torch.save(under("module.", compiled), config / "pytorch_model.bin")  # also as DeepSpeed's zero_to_fp32.py writes
    assert equal(load(config).model, model)
    (config / "pytorch_model.bin").unlink()
    model(torch.randn(2, 3, 32, 32)).sum().backward()
    optimizer.step()
    content = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": 3}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a process group that is not there
        torch.distributed.checkpoint.save(content, checkpoint_id=config)
    assert equal(load(config).model, model)
    (config / ".metadata").write_bytes(b"cposix\nsystem\n(S'touch marker'\ntR.")
    assert "posix.system, which could run code" in refuse(config).what


def test_shards_with_an_index(config, monkeypatch):
    model, index = make(), config / "model.safetensors.index.json"
    state = model.state_dict()
    files = {name: f"model-{number % 2}.safetensors" for number, name in enumerate(state)}
    for file in set(files.values()):
        save_file({name: state[name] for name in state if files[name] == file}, config / file)
    index.write_text(json.dumps({"metadata": {}, "weight_map": files}))
    assert equal(load(config).model, model)
    assert equal(load(index).model, model)
    with monkeypatch.context() as patch:
        patch.setattr("pdvit.models.build.available_memory", lambda: (config / "model-0.safetensors").stat().st_size)
        assert "too big for memory" in refuse(config).what
    index.write_text(json.dumps({"weight_map": {"norm.weight": "../elsewhere.safetensors"}}))
    assert "not in its folder: ../elsewhere.safetensors" in refuse(config).what


def zipped(*names: str) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name in names:
            archive.writestr(name, "text")
    return file.getvalue()


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "a pointer of git-lfs"),
        (b"\n<!DOCTYPE html><title>Sign in</title>", "a web page"),
        (b"GGUF\3\0\0\0", "a GGUF file"),
        (b"\x08\x08\x12\x07pytorch", "an ONNX model"),
        (zipped("model/data.pkl", "model/constants.pkl", "model/code/x.py"), "a model of TorchScript"),
        (zipped("model/archive_format", "model/models/model.json"), "a program of torch.export"),
        (zipped("folder/config.json", "folder/model.safetensors"), "a zipped folder"),
    ],
)
@pytest.mark.parametrize("name", ["weights.pth", "weights.safetensors", "weights.other"])
def test_containers_are_named_by_their_content(tmp_path, content, what, name):
    (tmp_path / name).write_bytes(content)
    assert what in refuse(tmp_path / name).what


def test_programs_of_torch_are_named_and_the_tip_works(tmp_path, monkeypatch):
    model = make().requires_grad_(False)
    monkeypatch.chdir(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch calls its own TorchScript deprecated
        torch.jit.trace(model, torch.zeros(1, 3, 32, 32)).save("script.pt")
        torch.export.save(torch.export.export(model, (torch.zeros(1, 3, 32, 32),)), "program.pt2")
        for name in ("script.pt", "program.pt2"):
            exec(refuse(name).tip.partition(": ")[2], {"torch": torch})
            state = torch.load("weights.pt")
            assert all(torch.equal(state[key], value) for key, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("extra", "what"),
    [
        ({"base_model.model.blocks.0.attn.qkv.lora_A.weight": torch.zeros(4, 24)}, "not merged"),
        ({"blocks.0.attn.qkv.base_layer.weight": torch.zeros(72, 24)}, "not merged"),
        ({"blocks.0.attn.qkv.SCB": torch.zeros(72)}, "quantised"),
        ({"norm.bias": torch.zeros(24).to(torch.float8_e4m3fn)}, "float8_e4m3fn"),
    ],
)
def test_adapters_and_quantised_weights_are_refused(config, extra, what):
    save_file(make().state_dict() | extra, config / "model.safetensors")
    assert what in refuse(config).what


@pytest.mark.filterwarnings("ignore")  # torch.ao is deprecated
def test_weights_that_torch_quantised_are_refused(tmp_path):
    torch.save(torch.ao.quantization.quantize_dynamic(make(), {nn.Linear}).state_dict(), tmp_path / "weights.pth")
    assert "quantised: blocks.0.attn" in refuse(tmp_path / "weights.pth", VIT).what


@pytest.mark.parametrize(
    ("table", "names", "what"),
    [
        ({"model_type": "segformer"}, ["segformer.encoder.patch_embeddings.0.proj.weight"], "a 'segformer'"),
        ({"model_type": "vit"}, ["vit.embeddings.patch_embeddings.projection.weight"], "KeyError"),
        ({}, ["vit.embeddings.patch_embeddings.projection.weight"], "config.json is not beside it"),
        ({}, ["visual.layer1.0.conv1.weight"], "a ResNet"),
    ],
)
def test_models_without_a_counterpart_are_refused_by_name(tmp_path, table, names, what):
    save_file({name: torch.zeros(4, 3, 2, 2) for name in names}, tmp_path / "model.safetensors")
    if table:
        (tmp_path / "config.json").write_text(json.dumps(table))
    assert what in refuse(tmp_path).what


def test_a_timm_wrapper_of_transformers(tmp_path):
    model = timm.create_model(VIT)
    save_file(under("timm_model.", model.state_dict()), tmp_path / "model.safetensors")
    table = {"architecture": VIT, "model_args": None, "model_type": "timm_wrapper", "num_classes": 1000}
    (tmp_path / "config.json").write_text(json.dumps(table))
    assert equal(load(tmp_path).model, model)
