import pytest
import timm
import torch

from pdvit.models.layers import measure_layers, watch_layers

SMALL = {"depth": 2, "embed_dim": 24, "num_heads": 2, "img_size": 32, "patch_size": 8, "num_classes": 3}


def make():
    return timm.create_model("vit_tiny_patch16_224", **SMALL).eval()


def pictures():
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def hooks_of(model):
    return [hook for part in model.modules() for hook in (*part._forward_hooks, *part._forward_pre_hooks)]


def test_no_hook_outlives_an_exception():
    model = make()

    during = []

    def visit(layer, tokens):
        during.extend(hooks_of(model))
        raise ArithmeticError(layer.name)

    with pytest.raises(ArithmeticError, match="embed"), watch_layers(model, visit):
        model(pictures())
    assert len(during) == 4
    assert not hooks_of(model)


def test_no_hook_outlives_a_measurement():
    model = make()
    assert measure_layers(model, pictures(), lambda tokens: float(tokens.sum()))
    assert not hooks_of(model)
