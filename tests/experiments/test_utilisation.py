"""experiments/speed/utilisation.py, against operations counted by hand and names of real kernels."""

import csv
import sys
from types import SimpleNamespace

import pytest
import torch
import utilisation
from operations import forward_operations
from torch import nn
from torch.autograd import DeviceType
from utilisation import REST, configure, kind_of, own_times, row_of, sum_by_kind

TINY = ["--model", "vit_tiny_patch16_224", "--img-size", "32", "--batch-size", "4", "--classes", "10"]
TINY += ["--model-kwargs", "depth=1", "embed_dim=24", "num_heads=3", "patch_size=8", "--sizes", "32", "64"]
UPDATE = "norm of the gradient, AdamW"


def test_operations_of_a_convolution_and_a_linear_layer():
    with torch.device("meta"):
        model = nn.Sequential(nn.Conv2d(3, 5, 4, stride=4), nn.Flatten(2), nn.Linear(16, 7))
    convolution, linear = 5 * 16 * (3 * 4 * 4), 5 * 16 * 7  # multiplications of a 4x4 grid of patches
    assert forward_operations(model, 16) == 2 * (convolution + linear)


def test_a_round_counts_three_forward_passes_against_the_fastest_product():
    row = row_of(100.0, 10**10, {512: 4e12, 1024: 6e12, 2048: 5e12})
    assert row == {
        "images_s": 100.0,
        "step_tflops": 3.0,
        "matrix_tflops": 6.0,
        "utilisation": 0.5,
        "matrix_size": 1024,
    }


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("aten::mm", "matrix products"),
        ("aten::addmm", "matrix products"),
        ("aten::convolution_backward", "matrix products"),
        ("nvjet_hsh_256x128_64x4_1x2_h_bz_coopA_NTT", "matrix products"),
        ("sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64_execute", "matrix products"),
        ("void cutlass::Kernel2<cutlass_80_tensorop_bf16_s16816gemm_relu_bf16_256x128>", "matrix products"),
        ("triton_tem_fused_mm_3", "matrix products"),
        ("void pytorch_flash::flash_fwd_kernel<Flash_fwd_kernel_traits<64, 128, cutlass::bfloat16_t>>", "attention"),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_bprop_wgmma_f16_knob_3", "attention"),
        ("aten::_scaled_dot_product_flash_attention_for_cpu_backward", "attention"),
        ("aten::_fused_adamw_", UPDATE),
        ("void at::native::(anonymous namespace)::multi_tensor_apply_kernel<LpNormFunctor>", UPDATE),
        ("aten::copy_", "casts and copies"),
        ("Memcpy HtoD (Pinned -> Device)", "casts and copies"),
        ("void at::native::unrolled_elementwise_kernel<at::native::direct_copy_kernel_cuda>", "casts and copies"),
        ("triton_poi_fused__to_copy_t_12", "casts and copies"),
        ("triton_poi_fused__to_copy_gelu_12", REST),
        ("triton_per_fused__scaled_dot_product_flash_attention_addmm_native_layer_norm_4", REST),
        ("void at::native::(anonymous namespace)::vectorized_layer_norm_kernel<float>", REST),
        ("aten::gelu_backward", REST),
    ],
)
def test_kinds_of_operators_and_kernels(name, kind):
    assert kind_of(name) == kind


def test_times_add_up_by_kind():
    sums = sum_by_kind([("aten::mm", 3.0), ("aten::gelu", 1.0), ("aten::bmm", 4.0), ("aten::add", 0.5)])
    assert {kind: time for kind, time in sums.items() if time} == {"matrix products": 7.0, REST: 1.5}
    assert len(sums) == 5


def test_a_kernel_counts_once():
    def event(name, device, microseconds, annotation=False):
        times = {"self_cpu_time_total": 1.0, "self_device_time_total": microseconds}
        return SimpleNamespace(key=name, device_type=device, is_user_annotation=annotation, **times)

    events = [
        event("aten::mm", DeviceType.CPU, 70.0),  # has the time of the kernel that it launched
        event("nvjet_hsh_256x128", DeviceType.CUDA, 70.0),
        event("Optimizer.step#AdamW.step", DeviceType.CUDA, 90.0, annotation=True),
        event("Memcpy DtoD (Device -> Device)", DeviceType.CUDA, 5.0),
    ]
    assert own_times(events, gpu=True) == [("nvjet_hsh_256x128", 70.0), ("Memcpy DtoD (Device -> Device)", 5.0)]
    assert own_times(events[:1], gpu=False) == [("aten::mm", 1.0)]


def test_the_sides_are_pdvits_presets(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["utilisation.py", *TINY])
    args = utilisation.arguments()
    paper, none = (configure(args, side).diversity for side in utilisation.SIDES)
    assert (paper.cosine, paper.contrastive, paper.mixing) == (1.0, 1.0, 1.0)
    assert (none.cosine, none.contrastive, none.mixing) == (0.0, 0.0, 0.0)


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("threads")
def test_runs_append_their_rounds_and_write_a_profile(monkeypatch, tmp_path):
    places = ["--csv", str(tmp_path / "found.csv"), "--profile", str(tmp_path / "profile.txt")]
    for count, more in ((2, places[:2]), (1, places)):
        monkeypatch.setattr(sys, "argv", ["utilisation.py", *TINY, "--rounds", str(count), *more])
        utilisation.main()
    check_rows(tmp_path / "found.csv")
    check_profile((tmp_path / "profile.txt").read_text())


def check_rows(file):
    with file.open(newline="") as table:
        rows = list(csv.DictReader(table))
    assert [row["round"] for row in rows] == ["1", "2", "1"]
    tokens, width = 17, 24  # multiplications: patches, one block (its four linear layers, its attention), classifier
    block = tokens * 12 * width**2 + 2 * tokens**2 * width
    forward = 2 * (16 * 3 * 8 * 8 * width + block + 10 * width)
    for row in rows:
        step, products = float(row["step_tflops"]), float(row["matrix_tflops"])
        assert step * 1e12 == pytest.approx(3 * forward * float(row["images_s"]), rel=1e-3)
        assert float(row["utilisation"]) == pytest.approx(step / products, rel=1e-3)
        assert row["matrix_size"] in ("32", "64")
        assert row["model_kwargs"] == "depth=1 embed_dim=24 num_heads=3 patch_size=8"


def check_profile(text):
    lines = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")]
    sums = {name: list(map(float, values)) for name, *values in lines[2:]}
    kinds = [values for name, values in sums.items() if name in {*dict(utilisation.KINDS), REST}]
    assert len(kinds) == 5
    for side in (0, 1):
        assert sum(values[side] for values in kinds) == pytest.approx(sums["all of these"][side], rel=1e-2)
    assert sums["matrix products"][0] > 0
    assert "aten::addmm" in text
