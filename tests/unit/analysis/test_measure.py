import copy
import gc
from contextlib import ExitStack
from typing import ClassVar

import numpy as np
import pandas as pd
import pytest
import timm
import torch
from sklearn.metrics.pairwise import cosine_similarity
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from pdvit.analysis import DEFAULT, METRICS, analyze, cka_between, measure
from pdvit.engine.distributed import Ranks
from pdvit.errors import UserError

SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 3, "num_heads": 2, "num_classes": 4}
COLUMNS = ["model", "layer", "depth", "metric", "mean", "std", "ci95", "images", "tokens"]


def build(name: str = "vit_tiny_patch16_224", **options) -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model(name, **{**SMALL, **options})


def pictures(count: int = 5, size: int = 32) -> Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(1))


def expected(model: nn.Module, images: Tensor, prefix: int, norm: bool = True) -> dict[tuple[str, str], list[float]]:
    """One value per image for every layer and metric: plain hooks, and scikit-learn's cosines without the diagonal."""
    seen: dict[str, Tensor] = {}
    places = {f"block {i}": block for i, block in enumerate(model.blocks, 1)}
    if norm:
        places["norm"] = model.norm
    with ExitStack() as hooks, torch.no_grad():

        def keep(name: str):
            return lambda module, inputs, output: seen.update({name: output})

        handles = [module.register_forward_hook(keep(name)) for name, module in places.items()]
        handles.append(model.blocks[0].register_forward_pre_hook(lambda _, inputs: seen.update(embed=inputs[0])))
        for handle in handles:
            hooks.callback(handle.remove)
        model.eval()(images)
    found: dict[tuple[str, str], list[float]] = {}
    for layer, tokens in seen.items():
        for image in tokens[:, prefix:].double().numpy():
            cosines = cosine_similarity(image)[~np.eye(len(image), dtype=bool)]
            found.setdefault((layer, "similarity"), []).append(np.abs(cosines).mean())
            found.setdefault((layer, "similarity_signed"), []).append(cosines.mean())
    return found


def check(table: pd.DataFrame, values: dict[tuple[str, str], list[float]], tolerance: float = 1e-6) -> None:
    rows = table.set_index(["layer", "metric"])
    assert set(rows.index) == set(values)
    assert len(rows) == len(values)
    for key, numbers in values.items():
        assert rows.loc[key, "mean"] == pytest.approx(np.mean(numbers), abs=tolerance)
        assert rows.loc[key, "std"] == pytest.approx(np.std(numbers, ddof=1), abs=tolerance)


@pytest.mark.parametrize(
    ("name", "options", "prefix", "norm"),
    [
        ("vit_tiny_patch16_224", {}, 1, True),
        ("vit_tiny_patch16_224", {"reg_tokens": 3}, 4, True),
        ("vit_tiny_patch16_224", {"class_token": False, "global_pool": "avg", "fc_norm": False}, 0, True),
        ("vit_tiny_patch16_224", {"class_token": False, "global_pool": "avg"}, 0, False),
        ("vit_tiny_patch16_224", {"global_pool": "avg"}, 1, False),
        ("deit_tiny_distilled_patch16_224", {}, 2, True),
    ],
    ids=["class token", "registers", "no prefix", "no prefix, no norm", "average, no norm", "distilled"],
)
def test_equals_plain_hooks_and_scikit_learn(name, options, prefix, norm, device):
    model, images = build(name, **options), pictures()
    table = analyze(copy.deepcopy(model).to(device), images, ["similarity", "similarity_signed"])
    assert ("norm" in set(table["layer"])) == norm
    assert set(table["tokens"]) == {16}
    check(table, expected(model, images, prefix, norm), {"cpu": 1e-6, "cuda": 1e-5}[device])


@pytest.mark.gpu
def test_every_group_measures_on_a_gpu_what_it_does_on_a_cpu():
    """In float32 proper, whatever a training in this process chose."""
    model, images = build(), pictures(9)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    here, there = (measure(model.to(place), images.split(5), METRICS) for place in ("cpu", "cuda"))
    pd.testing.assert_frame_equal(here.table, there.table, rtol=1e-3, atol=1e-4)
    assert here.curves.keys() == there.curves.keys()


def test_table_is_tidy():
    table = analyze(build(), pictures(), name="mine")
    assert list(table.columns) == COLUMNS
    one = table[table["metric"] == "similarity"]
    assert list(one["layer"]) == ["embed", "block 1", "block 2", "block 3", "norm"]
    assert list(one["depth"]) == [0, 1, 2, 3, 4]
    assert len(table) == 7 * len(one)
    assert set(table["model"]) == {"mine"}
    assert set(table["images"]) == {5}
    assert table.notna().all(axis=None)


def test_ways_to_pass_images_agree():
    model, images = build(depth=1), pictures(37)
    labels = torch.arange(37)
    whole = analyze(model, images)
    assert set(whole["images"]) == {37}
    ways = {
        "batches": list(images.split(8)),
        "generator": (batch for batch in images.split(10)),
        "tuples": list(zip(images.split(8), labels.split(8), strict=True)),
        "loader": DataLoader(TensorDataset(images, labels), batch_size=16),
        "empty batch": [images[:20], images[:0], images[20:]],
    }
    for way, batches in ways.items():
        pd.testing.assert_frame_equal(analyze(model, batches), whole, rtol=1e-5, obj=way)


def test_other_sizes_give_other_token_counts():
    model = build(img_size=None, dynamic_img_size=True)
    assert set(analyze(model, pictures(2, size=48))["tokens"]) == {36}


def test_metrics_can_be_chosen():
    table = analyze(build(), pictures(2), metrics=["similarity_signed"])
    assert set(table["metric"]) == {"similarity_signed"}
    both = analyze(build(), pictures(2), metrics=["rank, drift", "similarity_signed"])
    names = ["effective_rank", "participation_ratio", "drift_cosine", "drift_retrieval", "similarity_signed"]
    assert list(dict.fromkeys(both["metric"])) == names
    pd.testing.assert_frame_equal(analyze(build(), pictures(2)), analyze(build(), pictures(2), metrics=DEFAULT))


def test_a_model_in_training_is_measured_without_dropout_and_keeps_its_modes():
    model = build(proj_drop_rate=0.5, pos_drop_rate=0.5)
    expected_table = analyze(model.eval(), pictures())
    model.train()
    model.blocks[0].eval()
    before = {name: module.training for name, module in model.named_modules()}
    pd.testing.assert_frame_equal(analyze(model, pictures()), expected_table)
    with pytest.raises(UserError):
        analyze(model, pictures() * float("nan"))
    assert {name: module.training for name, module in model.named_modules()} == before


def test_nothing_stays_behind_on_the_model():
    model = build()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    analyze(model, pictures(2))
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_an_unknown_metric_names_the_closest():
    with pytest.raises(UserError, match="did you mean 'similarity'"):
        analyze(build(), pictures(), metrics=["similarty"])


@pytest.mark.parametrize("images", [pictures(0), [], [pictures(0)]], ids=["empty tensor", "no batch", "empty batch"])
def test_no_images_are_refused(images):
    with pytest.raises(UserError, match="no images"):
        analyze(build(), images)


def test_a_single_patch_is_refused():
    with pytest.raises(UserError, match="there is one patch"):
        analyze(build(patch_size=32), pictures())


def test_a_single_image_has_no_spread():
    table = analyze(build(), pictures(1))
    assert table[["std", "ci95"]].isna().all(axis=None)
    assert table["mean"].notna().all()
    assert set(table["images"]) == {1}


def test_a_model_whose_patches_are_one_is_seen_as_collapsed():
    model = build()
    nn.init.zeros_(model.pos_embed)
    table = analyze(model, torch.ones(2, 3, 32, 32)).set_index("metric")
    assert table.loc["similarity", "mean"].tolist() == pytest.approx([1] * 5, abs=1e-5)
    assert table.loc["similarity_signed", "mean"].tolist() == pytest.approx([1] * 5, abs=1e-5)


def test_a_single_image_without_a_batch_is_refused():
    with pytest.raises(UserError, match="four axes"):
        analyze(timm.create_model("test_vit"), torch.zeros(3, 160, 160))


def tokens_of(model: nn.Module, images: Tensor) -> dict[str, Tensor]:
    """Patch tokens of a small ViT with a class token, by plain calls of its parts."""
    with torch.no_grad():
        tokens = model.norm_pre(model.patch_drop(model._pos_embed(model.patch_embed(images))))
        found = {"embed": tokens}
        for number, block in enumerate(model.blocks, 1):
            tokens = found[f"block {number}"] = block(tokens)
        found["norm"] = model.norm(tokens)
    return {name: value[:, 1:] for name, value in found.items()}


def test_every_group_measures_every_layer():
    model, images = build(), pictures(9)
    found = measure(model, images.split(5), METRICS)
    layers = ["embed", "block 1", "block 2", "block 3", "norm"]
    rows = {name: part["layer"].tolist() for name, part in found.table.groupby("metric")}
    for group, spec in METRICS.items():
        for name in set(spec.columns) - {"similarity_random"}:  # of the command only
            measured = {"drift": layers[1:], "attention": layers[1:4]}.get(group, layers)
            assert rows.pop(name) == (layers[2:4] if name == "attention_similarity" else measured)
    assert rows == {}
    assert found.table["mean"].notna().all()
    assert set(found.curves) == {"pairs", "spectrum", "attention", "cka"}
    for group, arrays in found.curves.items():
        assert {name.split("/")[0] for name in arrays} == set(METRICS[group].curves)
        assert all(np.isfinite(array).all() for array in arrays.values() if array.dtype.kind == "f")


def test_drift_is_measured_from_the_first_block():
    model, images = build(), pictures()
    table = analyze(model, images, "drift")
    seen = tokens_of(model.eval(), images)
    rows = table[table["metric"] == "drift_cosine"].set_index("layer")["mean"]
    for layer in ("block 1", "block 3", "norm"):
        expected = torch.cosine_similarity(seen[layer], seen["block 1"], dim=-1).mean()
        assert rows[layer] == pytest.approx(float(expected), abs=1e-6)


def test_drift_in_stages_begins_where_the_last_grid_does():
    torch.manual_seed(0)
    sizes = {"img_size": 32, "patch_size": 4, "window_size": 4, "depths": (1, 2), "num_heads": (1, 2), "embed_dim": 8}
    found = measure(timm.create_model("swin_tiny_patch4_window7_224", **sizes), pictures(2), ["drift", "spectrum"])
    rows = found.table[found.table["metric"] == "drift_cosine"]
    assert rows["layer"].tolist() == ["block 2", "block 3", "norm"]
    assert rows["mean"].iloc[0] == pytest.approx(1, abs=1e-6)
    assert "block 2" in found.notes[0]
    assert {array.shape for name, array in found.curves["spectrum"].items() if "by" in name} == {(5,), (3,)}


def test_curves_are_means_over_images_however_they_are_cut():
    model, images = build(), pictures(9)
    whole = measure(model, images, ["pairs", "spectrum", "attention"]).curves
    parts = measure(model, images.split(4), ["pairs", "spectrum", "attention"]).curves
    for group, arrays in whole.items():
        for name, array in arrays.items():
            np.testing.assert_allclose(parts[group][name], array, atol=1e-5, err_msg=name)


def test_cka_leaves_out_a_batch_that_is_too_small_and_says_so():
    model, images = build(), pictures(10)
    found = measure(model, images.split(8), "cka")
    assert set(found.table["images"]) == {8}
    assert "2 images" in found.notes[-1]
    whole = measure(model, images[:8], "cka")
    np.testing.assert_array_equal(found.curves["cka"]["matrix"], whole.curves["cka"]["matrix"])
    matrix = whole.curves["cka"]["matrix"]
    assert whole.table["mean"].tolist() == matrix[:, -1].tolist()
    np.testing.assert_allclose(matrix.diagonal(), 1)
    assert whole.table["std"].isna().all()
    with pytest.raises(UserError, match="at least 4 images"):
        measure(model, images[:3], "cka")
    first = measure(model, [images[8:], images[:8]], "cka")  # nor need the first be large enough
    np.testing.assert_array_equal(first.curves["cka"]["matrix"], matrix)


def test_cka_between_a_model_and_itself_is_that_within():
    model, images = build(), pictures(8)
    both = cka_between(model, build(), images.split(6))
    np.testing.assert_allclose(both, measure(model, images[:6], "cka").curves["cka"]["matrix"], atol=1e-9)
    assert list(both.index) == list(both.columns) == ["embed", "block 1", "block 2", "block 3", "norm"]
    other = build("deit_tiny_distilled_patch16_224", depth=1, embed_dim=16)
    assert cka_between(model, other, images).shape == (5, 3)
    with pytest.raises(UserError, match="no images"):
        cka_between(model, other, [])


def test_constant_images_and_zero_weights_leave_no_gap():
    model = build()
    for weights in (model.pos_embed, model.cls_token, *model.patch_embed.parameters()):
        nn.init.zeros_(weights)
    found = measure(model, torch.zeros(4, 3, 32, 32), METRICS)
    assert found.table["mean"].notna().all()
    found = measure(build(), torch.ones(1, 3, 32, 32), [name for name in METRICS if name != "cka"])
    assert found.table["mean"].notna().all()


@pytest.mark.parametrize("metric", METRICS)
def test_no_metric_hides_weights_that_are_not_numbers(metric):
    model = build()
    nn.init.constant_(model.blocks[1].attn.qkv.weight, float("nan"))
    with pytest.raises(UserError, match="block 2"):
        analyze(model, pictures(), metric)


class SequentialRanks(Ranks):
    """One of several processes that run one after the other: it gathers the values of those before it, and its own."""

    gathered: ClassVar[dict[int, list]] = {}

    def all_gather(self, value):
        own = self.gathered.setdefault(self.rank, [])
        own.append(copy.deepcopy(value))
        return [values[len(own) - 1] for values in self.gathered.values()]


def test_processes_that_share_the_images_find_what_one_finds():
    model, images = build(), pictures(23)
    batches = list(images.split(5))
    alone = measure(model, batches, METRICS)
    SequentialRanks.gathered = {}
    for rank in range(2):
        measure(model, batches[rank::3], METRICS, ranks=SequentialRanks(rank, 4))
    measure(model, [], METRICS, ranks=SequentialRanks(2, 4))  # a process without an image
    found = measure(model, batches[2::3], METRICS, ranks=SequentialRanks(3, 4))
    pd.testing.assert_frame_equal(found.table, alone.table, rtol=1e-9, atol=1e-12)
    assert found.images == 23
    assert found.notes == alone.notes
    for group, arrays in alone.curves.items():
        for name, array in arrays.items():
            if array.dtype.kind == "f":
                np.testing.assert_allclose(found.curves[group][name], array, rtol=1e-9, atol=1e-12)
    other, half = build("deit_tiny_distilled_patch16_224"), images.split(5)
    whole = cka_between(model, other, half)
    SequentialRanks.gathered = {}
    cka_between(model, other, half[1::2], half[1::2], SequentialRanks(0, 2))
    pd.testing.assert_frame_equal(cka_between(model, other, half[::2], ranks=SequentialRanks(1, 2)), whole)


def test_an_error_of_one_process_is_that_of_all():
    SequentialRanks.gathered = {}
    with pytest.raises(UserError, match="infinite"):
        measure(build(), pictures() * float("nan"), ranks=SequentialRanks(0, 2))
    with pytest.raises(UserError, match="infinite"):
        measure(build(), pictures(), ranks=SequentialRanks(1, 2))


def test_no_memory_for_a_batch_is_said_with_what_helps(monkeypatch):
    model = build()

    def full(images):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(model, "forward", full)
    with pytest.raises(UserError, match="no memory for 5 images at a time") as found:
        analyze(model, pictures(), "similarity")
    assert "--batch-size" in found.value.tip
    with pytest.raises(UserError, match="no memory for a single image"):
        analyze(model, pictures(1), "similarity")
    with pytest.raises(UserError, match="no memory"):
        cka_between(model, build(), pictures())


def test_attention_is_refused_for_windows_and_fused_attention_stays_on_otherwise():
    model = build()
    seen = []
    model.blocks[0].attn.attn_drop.register_forward_pre_hook(lambda *_: seen.append(1))
    analyze(model, pictures(2), [name for name in METRICS if name not in ("attention", "cka")])
    assert not seen
    analyze(model, pictures(2), "attention")
    assert seen
    assert all(block.attn.fused_attn for block in model.blocks)
    swin = timm.create_model("swin_tiny_patch4_window7_224", depths=(1, 1), num_heads=(1, 2), embed_dim=8)
    with pytest.raises(UserError, match="attention of a SwinTransformer"):
        analyze(swin, pictures(), "attention")


def test_memory_does_not_grow_with_the_images():
    held = []
    gc.collect()

    def batches():
        for _ in range(6):
            yield pictures(4)
            held.append(sum(found.nbytes for found in gc.get_objects() if type(found) is Tensor))

    measure(build(), batches(), METRICS)
    assert len(set(held[1:])) == 1
