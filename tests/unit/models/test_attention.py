import pytest
import timm
import torch
from torch import Tensor, nn

from pdvit.errors import UserError
from pdvit.models.attention import attentions_of, watch_attention
from pdvit.models.layers import measure_layers

SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2, "num_classes": 4}


def build(name: str = "vit_tiny_patch16_224", **options) -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model(name, **{**SMALL, **options}).eval()


def watched(model: nn.Module, images: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    found: dict[str, Tensor] = {}
    with torch.no_grad(), watch_attention(model, lambda layer, maps: found.update({layer.name: maps})):
        return found, model(images)


def pictures() -> Tensor:
    return torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def test_equals_the_softmax_of_queries_and_keys():
    model = build(reg_tokens=2)
    entering: dict[int, Tensor] = {}
    handles = [
        block.attn.register_forward_pre_hook(lambda _, inputs, i=i: entering.update({i: inputs[0]}))
        for i, block in enumerate(model.blocks, 1)
    ]
    found, _ = watched(model, pictures())
    for handle in handles:
        handle.remove()
    assert list(found) == ["block 1", "block 2"]
    for index, tokens in entering.items():
        attn = model.blocks[index - 1].attn
        query, key, _ = attn.qkv(tokens).chunk(3, -1)
        for head in range(2):
            q, k = (part[..., 12 * head : 12 * head + 12] for part in (query, key))
            expected = (q @ k.transpose(1, 2) / 12**0.5).softmax(-1)
            torch.testing.assert_close(found[f"block {index}"][:, head], expected, atol=1e-6, rtol=1e-5)


PLAIN = ["vit_tiny_patch16_224", "vit_relpos_small_patch16_224", "beit_base_patch16_224", "eva02_tiny_patch14_224"]
PLAIN += ["deit_tiny_distilled_patch16_224", "vit_small_patch14_reg4_dinov2", "vit_small_patch16_dinov3"]


@pytest.mark.parametrize("name", PLAIN)
def test_plain_models_give_probabilities_between_all_tokens(name):
    model = build(name)
    images = pictures()
    expected = model(images)
    found, logits = watched(model, images)
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-4)
    patches = next(iter(measure_layers(model, images, lambda tokens: tokens.shape[1]).values()))
    for maps in found.values():
        assert maps.shape[1] == 2
        assert maps.shape[2] == maps.shape[3] >= patches
        torch.testing.assert_close(maps.sum(-1), torch.ones(maps.shape[:3]))


def test_fused_attention_comes_back_also_after_an_error():
    model = build()
    model.blocks[1].attn.fused_attn = False

    def fused() -> list[bool]:
        return [block.attn.fused_attn for block in model.blocks]

    before = fused()

    def fail(layer, maps) -> None:
        assert fused() == [False, False]
        raise RuntimeError(layer.name)

    with pytest.raises(RuntimeError, match="block 1"), watch_attention(model, fail):
        model(pictures())
    assert fused() == before
    assert not any(module._forward_pre_hooks for module in model.modules())


SWIN = {"img_size": 32, "window_size": 4, "embed_dim": 8, "depths": (1, 1), "num_heads": (1, 2)}
OTHERS = {
    "swin_tiny_patch4_window7_224": SWIN,
    "xcit_nano_12_p16_224": SMALL,
    "cait_xxs24_224": SMALL,
    "mixer_s16_224": {"img_size": 32},
    "vit_small_patch16_18x2_224": SMALL,  # several attentions side by side in a block
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_attention_is_refused_with_the_reason(name):
    with pytest.raises(UserError, match=r"block 1.* works in windows"):
        attentions_of(timm.create_model(name, **OTHERS[name]))
