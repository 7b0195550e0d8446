"""Images per second of pdvit's loader and of timm's, on the same files: `python loader.py FOLDER`.

Both decode with --workers processes, take a random resized crop with the same settings, flip, and hand out normalised
float32 batches: pdvit as `train` does, timm by `create_loader` with what `train.py` gives it. They take turns in one
process. A turn starts its workers, lets --warm-up batches pass, and times --batches more; the order rotates. Beside the
clock, the CPU time of workers and main process is taken from /proc. One row per round is added to loader.csv.
Linux only.
"""

import argparse
import multiprocessing
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median, quantiles

import torch
from PIL import Image
from rounds import append
from timm.data import ImageDataset, create_loader

from pdvit.config.schema import AugmentConfig
from pdvit.data.augment import Augmentation
from pdvit.data.loader import LoaderConfig, train_batches
from pdvit.data.mixing import Mixing
from pdvit.data.preprocessing import Preprocessing
from pdvit.data.sources.folder import list_images
from pdvit.data.sources.split import FileSplit
from pdvit.tracking.environment import describe_environment

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="image files, at any depth")
    parser.add_argument("--long-side", type=int, help="scale the files to this first, into a temporary folder")
    parser.add_argument("--name", help="of the images, for the table (default: the folder's)")
    parser.add_argument("--img-size", type=int, default=224)
    parser.add_argument("--interpolation", default="bicubic")
    parser.add_argument("--scale", type=float, nargs=2, default=(0.35, 1.0))
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--warm-up", type=int, default=4, help="batches before the clock starts (default 4)")
    parser.add_argument("--batches", type=int, default=20, help="in one turn (default 20)")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--csv", type=Path, default=Path(__file__).with_name("loader.csv"))
    return parser.parse_args()


def scaled(paths: list[Path], long_side: int, folder: Path) -> list[Path]:
    """Write the images with this long side as JPEG files of quality 90."""
    made = []
    for number, path in enumerate(paths):
        image = Image.open(path).convert("RGB")
        factor = long_side / max(image.size)
        made.append(folder / f"{number:05}.jpg")
        size = [round(side * factor) for side in image.size]
        image.resize(size, Image.Resampling.BICUBIC).save(made[-1], quality=90)
    return made


def ours(paths: list[Path], args: argparse.Namespace) -> Iterator[object]:
    size, interpolation = args.img_size, args.interpolation
    preprocessing = Preprocessing(size, 0.9, interpolation, MEAN, STD)
    how = LoaderConfig(args.batch_size, 0, args.workers, torch.device("cpu"), preprocessing)
    split = FileSplit(paths, torch.zeros(len(paths), dtype=torch.long))
    unmixed = Mixing(AugmentConfig(mixup_prob=0.0), patch_size=16, num_classes=1, labels=False)
    augmentation = Augmentation.for_split(split, AugmentConfig(scale=tuple(args.scale)), preprocessing, how.seed)
    return train_batches(split, how, augmentation, unmixed, 0)


class Timm:
    """timm's loader over files that lie in one folder; its epochs one after another."""

    def __init__(self, root: Path, args: argparse.Namespace) -> None:
        settings = {"scale": tuple(args.scale), "interpolation": args.interpolation, "color_jitter": 0.0}
        self.loader = create_loader(
            ImageDataset(str(root)),
            (3, args.img_size, args.img_size),
            args.batch_size,
            is_training=True,
            num_workers=args.workers,
            mean=MEAN,
            std=STD,
            device=torch.device("cpu"),
            persistent_workers=True,
            **settings,
        )

    def __iter__(self) -> Iterator[object]:
        while True:
            yield from self.loader


def cpu_seconds() -> float:
    """Return the CPU time so far of this process and its workers."""
    ticks = 0
    for pid in [os.getpid(), *(child.pid for child in multiprocessing.active_children())]:
        fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
        ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


def turn(start: Callable[[], Iterator[object]], args: argparse.Namespace) -> tuple[float, float]:
    """Return images per second, and CPU milliseconds per image."""
    batches = start()
    for _ in range(args.warm_up):
        next(batches)
    begun, cpu = time.perf_counter(), cpu_seconds()
    for _ in range(args.batches):
        next(batches)
    seconds, cpu = time.perf_counter() - begun, cpu_seconds() - cpu
    del batches
    images = args.batches * args.batch_size
    return images / seconds, 1000 * cpu / images


def measure(paths: list[Path], root: Path, args: argparse.Namespace) -> list[dict[str, float]]:
    """Return, for each round, the rates and CPU times of both."""
    sides = {"timm": lambda: iter(Timm(root, args)), "pdvit": lambda: ours(paths, args)}
    rows = []
    for number in range(args.rounds):
        row: dict[str, float] = {"round": number + 1}
        for name in [*sides][:: 1 if number % 2 else -1]:
            rate, cpu = turn(sides[name], args)
            row |= {name: float(f"{rate:.5g}"), f"{name}_cpu_ms": float(f"{cpu:.4g}")}
        print(row, flush=True)
        rows.append(row)
    return rows


def report(rows: list[dict[str, float]], args: argparse.Namespace) -> None:
    """Print the table, and append the rows to the CSV file."""
    print("\n| images | timm | pdvit | ratio | CPU ms: timm | pdvit | ratio per core |\n|" + " --- |" * 7)
    rates, costs = [], []
    for row in rows:
        rates.append(row["pdvit"] / row["timm"])
        costs.append(row["timm_cpu_ms"] / row["pdvit_cpu_ms"])
    cells = [args.name, *(f"{median(row[side] for row in rows):.4g}" for side in ("timm", "pdvit")), spread(rates)]
    cells += [f"{median(row[f'{side}_cpu_ms'] for row in rows):.3g}" for side in ("timm", "pdvit")]
    print(f"| {' | '.join([*cells, spread(costs)])} |")
    machine = describe_environment("cpu")
    facts = {name: value for name, value in vars(args).items() if name not in ("folder", "csv")}
    facts |= {"scale": " ".join(map(str, args.scale)), "hardware": machine["processor"], "cores": machine["cores"]}
    facts |= {"torch": machine["packages"]["torch"], "timm_version": machine["packages"]["timm"]}
    facts |= {"commit": machine["commit"]}
    append(args.csv, [*facts, *sorted(rows[0], key="round".__ne__)], (facts | row for row in rows))


def spread(ratios: list[float]) -> str:
    """Say median and middle half."""
    low, middle, high = quantiles(ratios, n=4, method="inclusive")
    return f"{middle:.2f} ({low:.2f} to {high:.2f})"


def main() -> None:
    import tempfile

    args = arguments()
    args.name = args.name or args.folder.name
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as made:
        paths, root = list_images(args.folder), args.folder
        if args.long_side:
            root = Path(made) / "images"
            root.mkdir()
            paths = scaled(paths, args.long_side, root)
        report(measure(paths, root, args), args)


if __name__ == "__main__":
    main()
