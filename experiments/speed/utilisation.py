"""How much of the machine a step of training uses: `python utilisation.py`.

Two take turns in one process: square matrix products in the step's number format, of a few sizes, of which the fastest
counts (2 n^3 operations each); and pdvit's own step with all three terms (forward pass, losses, backward pass, norm of
the gradient, AdamW, metrics) on batches that lie on the device. A step counts as three forward passes of the bare
model: what the terms and the patch head compute is no work done. Its operations per second, divided by those of the
products in the same round, are the utilisation. float32 is as pdvit trains in it: on a GPU with TF32, for both. Time is
that of the CPU's clock for the process, or of the GPU between synchronisations. One row per round is appended to
utilisation.csv. `--profile` writes where the time of a step goes, with all terms and without any.
"""

import argparse
import re
from collections.abc import Callable, Iterable
from functools import partial
from itertools import count, cycle, islice
from pathlib import Path
from statistics import median
from typing import Any

import torch
from operations import forward_operations
from rounds import append
from terms import seconds
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from pdvit.config import Config, build, resolve
from pdvit.data.sources.split import ArraySplit, Source
from pdvit.engine.device import choose_device, device_name, set_up
from pdvit.engine.distributed import SINGLE_PROCESS
from pdvit.engine.trainer import Trainer
from pdvit.models.build import FLAGS, model_arguments, sketch_model
from pdvit.tasks.classification import ClassificationTask
from pdvit.tracking.environment import describe_environment

# Kinds of operators and of GPU kernels by their names, case aside; the first that fits. A kernel that torch.compile
# made is named after all that it does, so it comes before the others: elementwise, unless it only casts and moves.
REST = "elementwise, norms, sums"
KINDS = (
    ("casts and copies", r"^(triton_poi|cpp)_fused__to_copy(_(t|view|transpose|permute|clone))*_\d+$"),
    (REST, r"^(triton_(?!tem)|cpp_fused)"),
    ("attention", r"flash|fmha|sdpa|attention"),
    ("matrix products", r"gemm|gemv|nvjet|cutlass|xmma|splitk|conv|linear|::(add|b|baddb)?mm\b|^triton_tem"),
    ("norm of the gradient, AdamW", r"adam|multi_tensor|foreach"),
    ("casts and copies", r"copy|memcpy|memset|fill|zero|::cat\b"),
)
SIZES = {"cpu": (512, 1024, 2048), "cuda": (4096, 8192, 16384)}
SIDES = {"paper": "all three terms", "none": "no terms"}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="deit_base_patch16_224")
    parser.add_argument("--model-kwargs", nargs="*", default=[], metavar="K=V", help="such as depth=8 embed_dim=48")
    parser.add_argument("--img-size", type=int, default=224)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--classes", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--sizes", type=int, nargs="*", help="of the products")
    parser.add_argument("--profile", type=Path, metavar="FILE", help="write there where the time goes")
    parser.add_argument("--csv", type=Path, default=Path(__file__).with_suffix(".csv"))
    args = parser.parse_args()
    if args.threads > 1 and choose_device(args.device).type == "cpu":
        parser.error("the CPU's clock of a process adds up its threads: on a CPU it has to be one")
    return args


def configure(args: argparse.Namespace, preset: str) -> Config:
    """Return pdvit's configuration of a run with a preset of the terms."""
    pairs = {key: int(value) for key, value in (pair.split("=") for pair in args.model_kwargs)}
    named = {FLAGS[key].removeprefix("--").replace("-", "_"): pairs.pop(key) for key in [*pairs] if key in FLAGS}
    model = {"name": args.model, **named} | ({"args": pairs} if pairs else {})
    data = {"img_size": args.img_size, "batch_size": args.batch_size}
    run = {"device": args.device, "precision": args.precision, "compile": args.compile}
    return resolve(build(("flags", {"data": data, "model": model, "diversity": {"preset": preset}, "run": run})))


def make_step(args: argparse.Namespace, preset: str) -> Callable[[], None]:
    """Return a step of pdvit's training with a preset of the terms, on four batches of noise, mixed as in training."""
    config, device = configure(args, preset), choose_device(args.device)
    set_up(device, config.run)
    torch.manual_seed(0)
    images = torch.randint(256, (2 * args.batch_size, 3, args.img_size, args.img_size), dtype=torch.uint8)
    split = ArraySplit(images, torch.randint(args.classes, (len(images),)))
    source = Source("noise", [str(number) for number in range(args.classes)], {"train": split, "val": split})
    trainer = Trainer(ClassificationTask(config, source, device), config, device, SINGLE_PROCESS)
    batches, numbers = cycle(list(islice(trainer.task.batches(0), 4))), count(1)
    return lambda: trainer.state.metrics.add(*trainer.updater(next(batches), next(numbers)))


def matrix_rate(size: int, args: argparse.Namespace) -> float:
    """Return operations per second of square matrix products."""
    device = choose_device(args.device)
    dtype = torch.bfloat16 if args.precision == "bf16" else torch.float32
    # Of noise: a GPU multiplies zeros faster than numbers.
    product = partial(torch.mm, *torch.randn(2, size, size, device=device, dtype=dtype))
    seconds(product, device, 2)
    return 2 * size**3 / seconds(product, device, times(device))


def times(device: torch.device) -> int:
    """Return how often something runs in one turn."""
    return 20 if device.type == "cuda" else 1


def row_of(images: float, forward: int, rates: dict[int, float]) -> dict[str, float]:
    """Return what a round found, of images per second, operations of a forward pass, and matrix rates by size."""
    size = max(rates, key=rates.__getitem__)
    step = 3 * forward * images
    found = {"images_s": images, "step_tflops": step / 1e12, "matrix_tflops": rates[size] / 1e12}
    found |= {"utilisation": step / rates[size]}
    return {name: float(f"{value:.5g}") for name, value in found.items()} | {"matrix_size": size}


def measure(args: argparse.Namespace) -> list[dict[str, float]]:
    """Return images and operations per second, matrix rate and utilisation of every round."""
    config, device = configure(args, "paper"), choose_device(args.device)
    assert config.model.name is not None
    sizes = args.sizes or SIZES[device.type]
    named = model_arguments(config.model, args.img_size) | {"num_classes": args.classes}
    forward = forward_operations(sketch_model(config.model.name, named), args.img_size)
    step = make_step(args, "paper")
    seconds(step, device, 4)
    rows = []
    for number in range(args.rounds):
        rates = {size: matrix_rate(size, args) for size in sizes}
        images = args.batch_size / seconds(step, device, times(device))
        rows.append({"round": number + 1, **row_of(images, forward, rates)})
    return rows


def kind_of(name: str) -> str:
    """Return the kind of an operator or kernel."""
    return next((kind for kind, pattern in KINDS if re.search(pattern, name, re.IGNORECASE)), REST)


def sum_by_kind(spent: Iterable[tuple[str, float]]) -> dict[str, float]:
    """Add up times of operators or kernels by kind."""
    sums = dict.fromkeys([*dict(KINDS), REST], 0.0)
    for name, time in spent:
        sums[kind_of(name)] += time
    return sums


def own_times(events: Iterable[Any], gpu: bool) -> list[tuple[str, float]]:
    """Return name and microseconds of a profile's operators; on a GPU of its kernels, each once."""
    if not gpu:
        return [(event.key, event.self_cpu_time_total) for event in events]
    # What launched a kernel has its time too, and so has a range around it.
    kernels = [event for event in events if event.device_type != DeviceType.CPU and not event.is_user_annotation]
    return [(event.key, event.self_device_time_total) for event in kernels]


def profiled(args: argparse.Namespace, preset: str, steps: int = 3) -> tuple[dict[str, float], str]:
    """Return milliseconds of a step by kind and by the clock, with no profiler running, and torch's table."""
    device, step = choose_device(args.device), make_step(args, preset)
    seconds(step, device, 4)
    clock = 1000 * seconds(step, device, times(device))
    gpu = device.type == "cuda"
    with profile(activities=[ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * gpu], acc_events=True) as recorded:
        seconds(step, device, steps)
    events = recorded.key_averages()
    sums = {kind: time / 1000 / steps for kind, time in sum_by_kind(own_times(events, gpu)).items()}
    table = events.table(
        sort_by=f"self_{'device' if gpu else 'cpu'}_time_total", row_limit=30, max_name_column_width=90
    )
    return sums | {"all of these": sum(sums.values()), "by the clock, unrecorded": clock}, table


def write_profile(args: argparse.Namespace, facts: str) -> None:
    """Write sums by kind of a step with and without the terms, and torch's table of the operators that take longest."""
    found = {side: profiled(args, side) for side in SIDES}
    (paper, table), (none, _) = found.values()
    lines = [facts, "", f"| ms per step | {' | '.join(SIDES.values())} | difference |", "|" + " --- |" * 4]
    lines += [f"| {kind} | {paper[kind]:.4g} | {none[kind]:.4g} | {paper[kind] - none[kind]:.3g} |" for kind in paper]
    args.profile.write_text("\n".join([*lines, "", f"Three steps with {SIDES['paper']}:", table]) + "\n")


def report(args: argparse.Namespace, rows: list[dict[str, float]]) -> str:
    """Print the table, append the rows to the CSV file, and return what was measured on what."""
    print("| | median (least to most) |\n| --- | --- |")
    for name in [name for name in rows[0] if name != "round"]:
        values = [row[name] for row in rows]
        print(f"| {name} | {median(values):.4g} ({min(values):.4g} to {max(values):.4g}) |")
    machine = describe_environment(device_name(choose_device(args.device)))
    facts: dict[str, Any] = {key: value for key, value in vars(args).items() if key not in ("sizes", "profile", "csv")}
    facts |= {"model_kwargs": " ".join(args.model_kwargs)}
    facts |= {"hardware": machine["processor"] if args.device == "cpu" else machine["device"]}
    facts |= {"torch": machine["packages"]["torch"], "timm": machine["packages"]["timm"], "commit": machine["commit"]}
    append(args.csv, [*facts, *rows[0]], (facts | row for row in rows))
    return ", ".join(f"{name} {value}" for name, value in facts.items() if value not in ("", False))


def main() -> None:
    args = arguments()
    torch.set_num_threads(args.threads)
    facts = report(args, measure(args))
    print("\n" + facts)
    if args.profile:
        write_profile(args, facts)


if __name__ == "__main__":
    main()
