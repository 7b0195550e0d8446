"""Memory of the two large products: `python memory.py`.

Prints the most bytes of tensors that were alive at one moment beyond those before, by torch's own record of what it
allocates: for P of one image of 16,384 tokens of width 768, and for the mixing term of 32 images of 196 tokens of width
768 with 21,841 classes; each also as it is usually written.
"""

import argparse
import json
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch.nn import functional as F
from torch.profiler import profile

from pdvit import patch_similarity
from pdvit.losses.mixing import chunked_mixing_loss


def peak_mb(run: Callable[[], object]) -> float:
    """Return the most MB of tensors alive at one moment of `run`, beyond those alive before."""
    with profile(profile_memory=True) as record:
        run()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "trace.json")
        record.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    changes = [(event["ts"], event["args"]) for event in events if event.get("name") == "[memory]"]
    totals = [args["Total Allocated"] for _, args in sorted(changes, key=lambda change: change[0])]
    first = min(changes, key=lambda change: change[0])[1]
    return float(max(totals) - (first["Total Allocated"] - first["Bytes"])) / 1e6


def similarity(count: int, width: int) -> None:
    tokens = torch.randn(1, count, width, requires_grad=True)

    def usual() -> None:
        unit = F.normalize(tokens, dim=-1)
        ((unit @ unit.transpose(1, 2)).abs().sum() - count).backward()

    print(f"P of {count:,} tokens of width {width}:")
    print(f"  value               {peak_mb(lambda: patch_similarity(tokens.detach())):8.0f} MB")
    print(f"  value and gradient  {peak_mb(lambda: patch_similarity(tokens).sum().backward()):8.0f} MB")
    print(f"  as usually written  {peak_mb(usual):8.0f} MB")


def mixing(images: int, count: int, width: int, classes: int) -> None:
    head = torch.nn.Linear(width, classes)
    tokens = torch.randn(images, count, width, requires_grad=True)
    targets = torch.randint(classes, (images, count))
    own = 4e-6 * sum(weight.numel() for weight in head.parameters())

    def ours() -> None:
        chunked_mixing_loss(tokens, head.weight, head.bias, targets).backward()

    def usual() -> None:
        F.cross_entropy(head(tokens).flatten(0, 1), targets.flatten()).backward()

    print(
        f"mixing term of {images} x {count} tokens of width {width}, {classes:,} classes, beyond the head's gradient:"
    )
    print(f"  in parts            {peak_mb(ours) - own:8.0f} MB")
    head.zero_grad(set_to_none=True)
    tokens.grad = None
    print(f"  as usually written  {peak_mb(usual) - own:8.0f} MB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--classes", type=int, default=21841)
    args = parser.parse_args()
    similarity(args.tokens, 768)
    mixing(32, 196, 768, args.classes)


if __name__ == "__main__":
    main()
