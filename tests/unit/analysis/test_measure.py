import copy
import gc
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import ClassVar
from unittest.mock import Mock

import numpy as np
import pandas as pd
import pytest
import timm
import torch
from scipy import stats
from sklearn.metrics.pairwise import cosine_similarity
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from pdvit.analysis import METRICS, cka_between, measure
from pdvit.analysis.measure import Moments
from pdvit.definitions import DEFAULT, GROUPS
from pdvit.engine.distributed import Ranks
from pdvit.errors import UserError
from tests.unit.models.support import make

build = partial(make, "vit_tiny_patch16_224", depth=3)
LAYERS = ["embed", "block 1", "block 2", "block 3", "norm"]


def analyze(*arguments, **options) -> pd.DataFrame:
    return measure(*arguments, **options).table


def pictures(count: int = 5, size: int = 32) -> Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(1))


def test_equals_tokens_of_timm_and_scikit_learn(device):
    model, images = build(reg_tokens=3).eval(), pictures()
    table = analyze(copy.deepcopy(model).to(device), images, ["similarity", "similarity_signed", "drift"])
    with torch.no_grad():
        embed, (last, blocks) = model._pos_embed(model.patch_embed(images)), model.forward_intermediates(images)
    tokens = [embed[:, 4:], *(block.flatten(2).mT for block in blocks), last[:, 4:]]
    rows, seen = table.set_index(["layer", "metric"]), dict(zip(LAYERS, tokens, strict=True))
    assert set(table["layer"]) == set(seen)
    assert set(table["tokens"]) == {16}
    for layer, tokens in seen.items():
        cosines = [cosine_similarity(image)[~np.eye(16, dtype=bool)] for image in tokens.double().numpy()]
        for metric, values in (("similarity", np.abs(cosines)), ("similarity_signed", np.array(cosines))):
            expected = (values.mean(1).mean(), values.mean(1).std(ddof=1))
            found = tuple(rows.loc[(layer, metric), ["mean", "std"]])
            assert found == pytest.approx(expected, abs={"cpu": 1e-6, "cuda": 1e-5}[device])
        if layer != "embed":  # drift is measured from block 1
            expected = torch.cosine_similarity(tokens, seen["block 1"], dim=-1).mean()
            assert rows.loc[(layer, "drift_cosine"), "mean"] == pytest.approx(float(expected), abs=1e-5)


@pytest.mark.gpu
def test_every_group_measures_on_a_gpu_what_it_does_on_a_cpu():
    """In float32 proper, whatever a training in this process chose."""
    model, images = build(), pictures(9)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    here, there = (measure(model.to(place), images.split(5), METRICS) for place in ("cpu", "cuda"))
    pd.testing.assert_frame_equal(here.table, there.table, rtol=1e-3, atol=1e-4)
    assert here.curves.keys() == there.curves.keys()


@pytest.mark.parametrize("values", [np.linspace(-1, 1, 9) ** 3, 1e6 + 1e-3 * np.arange(10)], ids=["cubes", "offset"])
@pytest.mark.parametrize("cuts", [[], [1], [3, 4, 7]], ids=str)
def test_spreads_are_those_of_scipy_however_the_images_are_cut(values, cuts):
    first, *rest = (Moments.of(torch.from_numpy(part)) for part in np.split(values, cuts))
    moments = sum(rest, first)
    assert moments.count == len(values)
    assert moments.mean.item() == pytest.approx(values.mean(), abs=1e-9)
    assert moments.std == pytest.approx(values.std(ddof=1), rel=1e-6)
    low, high = stats.t.interval(0.95, len(values) - 1, loc=0, scale=stats.sem(values))
    assert moments.ci95 == pytest.approx((high - low) / 2, rel=1e-6)


def test_the_table_is_tidy_and_has_the_metrics_that_are_chosen():
    table = analyze(build(), pictures(), name="mine")
    assert list(table.columns) == ["model", "layer", "depth", "metric", "mean", "std", "ci95", "images", "tokens"]
    one = table[table["metric"] == "similarity"]
    assert list(one["layer"]) == LAYERS
    assert list(one["depth"]) == [0, 1, 2, 3, 4]
    assert len(table) == 7 * len(one)
    assert (set(table["model"]), set(table["images"])) == ({"mine"}, {5})
    assert table.notna().all(axis=None)
    single = analyze(build(), pictures(1), DEFAULT)
    assert single[["std", "ci95"]].isna().all(axis=None)
    assert single["mean"].notna().all()
    both = analyze(build(), pictures(2), metrics=["rank, drift", "similarity_signed"])
    names = ["effective_rank", "participation_ratio", "drift_cosine", "drift_retrieval", "similarity_signed"]
    assert list(dict.fromkeys(both["metric"])) == names


def test_ways_to_pass_images_agree():
    model, images = build(depth=1), pictures(37)
    whole = analyze(model, images)
    ways = {
        "generator": (batch for batch in images.split(10)),
        "tuples": list(zip(images.split(8), torch.arange(37).split(8), strict=True)),
        "loader": DataLoader(TensorDataset(images), batch_size=16),
        "empty batch": [images[:20], images[:0], images[20:]],
    }
    for way, batches in ways.items():
        pd.testing.assert_frame_equal(analyze(model, batches), whole, rtol=1e-5, obj=way)
    sizes = build(img_size=None, dynamic_img_size=True)
    assert set(analyze(sizes, pictures(2, size=48))["tokens"]) == {36}


def test_a_model_in_training_is_measured_without_dropout_and_stays_as_it_was():
    model = build(proj_drop_rate=0.5, pos_drop_rate=0.5)
    expected_table = analyze(model.eval(), pictures())
    model.train()
    model.blocks[0].eval()
    modes, state = [module.training for module in model.modules()], copy.deepcopy(model.state_dict())
    pd.testing.assert_frame_equal(analyze(model, pictures()), expected_table)
    with pytest.raises(UserError):
        analyze(model, pictures() * float("nan"))
    assert [module.training for module in model.modules()] == modes
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


ODD_TYPES = (pictures().byte(), {"x": pictures()}, Path("a.png"), 3, pictures().numpy())
ODD_SHAPES = (pictures(size=40), pictures()[:, :1])


def test_an_error_of_ours_is_not_blamed_on_the_images(monkeypatch):
    model = build()
    monkeypatch.setattr(model, "forward", Mock(side_effect=RuntimeError("a fault")))
    with pytest.raises(RuntimeError, match="a fault"):
        analyze(model, pictures())


def test_images_that_can_not_be_measured():
    cases = [(images, "no images") for images in (pictures(0), [], [pictures(0)])]
    cases += [(pictures()[0], r"not torch.float32 \(3, "), *((odd, "floating-point tensors") for odd in ODD_TYPES)]
    cases += [(odd, r"can't take images of the shape \(5, ") for odd in ODD_SHAPES]
    for images, error in cases:
        with pytest.raises(UserError, match=error):
            analyze(build(), images)
    with pytest.raises(UserError, match="at least two patches, not 1"):
        analyze(timm.create_model("vit_tiny_patch16_224", depth=1, img_size=32, patch_size=32), pictures())


def test_the_tip_for_arrays_of_numpy_works():
    array, expected = pictures().double().numpy(), analyze(build(), pictures())
    for images in (array, list(array)):
        with pytest.raises(UserError) as caught:
            analyze(build(), images)
        converted = eval(caught.value.tip.partition("pass ")[2], {"torch": torch, "np": np, "images": images})
        pd.testing.assert_frame_equal(analyze(build(), converted), expected)


def test_a_block_that_is_called_twice_is_an_error_and_no_mean():
    model = build()
    model.blocks = nn.Sequential(model.blocks[0], nn.Sequential(model.blocks[0]), model.blocks[2])
    with pytest.raises(UserError, match="calls embed several times"):
        measure(model, pictures())


def test_every_group_measures_every_layer_it_can():
    found = measure(build(), pictures(9).split(5), METRICS)
    rows = {name: part["layer"].tolist() for name, part in found.table.groupby("metric")}
    for group, content in GROUPS.items():
        for name in set(content["columns"]) - {"similarity_random"}:  # of the command only
            layers = {"drift": LAYERS[1:], "attention": LAYERS[1:4]}.get(group, LAYERS)
            assert rows.pop(name) == (LAYERS[2:4] if name == "attention_similarity" else layers)
    assert rows == {}
    assert found.table["mean"].notna().all()
    for group, arrays in found.curves.items():
        assert {name.split("/")[0] for name in arrays} == set(GROUPS[group]["curves"])


def test_drift_in_stages_begins_where_the_last_grid_does():
    sizes = {"img_size": 32, "patch_size": 4, "window_size": 4, "depths": (1, 2), "num_heads": (1, 2), "embed_dim": 8}
    found = measure(timm.create_model("swin_tiny_patch4_window7_224", **sizes), pictures(2), ["drift", "spectrum"])
    rows = found.table[found.table["metric"] == "drift_cosine"]
    assert rows["layer"].tolist() == ["block 2", "block 3", "norm"]
    assert rows["mean"].iloc[0] == pytest.approx(1, abs=1e-6)
    assert "block 2" in found.notes[0]
    assert {array.shape for name, array in found.curves["spectrum"].items() if "by" in name} == {(5,), (3,)}


def test_cka_leaves_out_a_batch_that_is_too_small_with_a_note():
    model, images = build(), pictures(10)
    matrix = measure(model, images[:8], "cka").curves["cka"]["matrix"]
    for batches in (images.split(8), [images[8:], images[:8]]):  # the small one may come first
        found = measure(model, batches, "cka")
        assert set(found.table["images"]) == {8}
        assert "2 images" in found.notes[-1]
        np.testing.assert_array_equal(found.curves["cka"]["matrix"], matrix)
    assert found.table["mean"].tolist() == matrix[:, -1].tolist()
    np.testing.assert_allclose(matrix.diagonal(), 1)
    assert found.table["std"].isna().all()
    with pytest.raises(UserError, match="at least 4 images"):
        measure(model, images[:3], "cka")


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
    other, half = make("deit_tiny_distilled_patch16_224", depth=1), images.split(5)
    whole = cka_between(model, other, half)
    assert (list(whole.index), list(whole.columns)) == (LAYERS, ["embed", "block 1", "norm"])
    with pytest.raises(UserError, match="no images"):
        cka_between(model, other, [])
    SequentialRanks.gathered = {}
    cka_between(model, other, half[1::2], half[1::2], SequentialRanks(0, 2))
    pd.testing.assert_frame_equal(cka_between(model, other, half[::2], ranks=SequentialRanks(1, 2)), whole)


def test_an_error_of_one_process_is_raised_on_all():
    SequentialRanks.gathered = {}
    for rank, images in enumerate((pictures() * float("nan"), pictures())):
        with pytest.raises(UserError, match="infinite"):
            measure(build(), images, ranks=SequentialRanks(rank, 2))


def test_no_memory_for_a_batch_is_an_error_with_advice(monkeypatch):
    model, error = build(), torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
    monkeypatch.setattr(model, "forward", Mock(side_effect=error))
    with pytest.raises(UserError, match="no memory for a batch of 5") as found:
        analyze(model, pictures(), "similarity")
    assert "--batch-size" in found.value.tip
    with pytest.raises(UserError, match="no memory"):
        cka_between(model, build(), pictures())


def test_fused_attention_is_off_for_the_metrics_of_attention_only():
    model, seen = build(), []
    model.blocks[0].attn.attn_drop.register_forward_pre_hook(lambda *_: seen.append(1))
    analyze(model, pictures(2), [name for name in METRICS if name not in ("attention", "cka")])
    assert not seen
    analyze(model, pictures(2), "attention")
    assert seen
    assert all(block.attn.fused_attn for block in model.blocks)


def test_memory_does_not_grow_with_the_images():
    held = []
    gc.collect()

    def batches():
        for _ in range(6):
            yield pictures(4)
            held.append(sum(found.nbytes for found in gc.get_objects() if type(found) is Tensor))

    measure(build(), batches(), METRICS)
    assert len(set(held[1:])) == 1


@pytest.mark.parametrize("group", METRICS)
def test_a_batch_is_read_from_the_device_once(monkeypatch, group):
    """A meta tensor has no values, so whatever reads one fails: that is first done when the forward pass is over."""
    monkeypatch.setattr(torch, "autocast", lambda *arguments, **options: nullcontext())  # meta has none
    with pytest.raises(NotImplementedError, match="out of meta") as found:
        analyze(build().to("meta"), pictures().to("meta"), group)
    assert [entry.name for entry in found.traceback if entry.path.name == "measure.py"][-1] == "_read"
