"""`pdvit doctor`."""

import json
import math
import random
import warnings
from dataclasses import asdict
from importlib import import_module
from typing import TYPE_CHECKING, Annotated

import typer

from pdvit.errors import RunFailed

if TYPE_CHECKING:
    import torch
    from rich.table import Table

    from pdvit.engine.doctor import Finding, Findings

STYLES = {"ok": "green", "missing": "yellow", "failed": "red"}
SIDE, PATCH, CLASSES = 32, 8, 4


def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print the findings as JSON and nothing else.")] = False,
) -> int:
    """Say what this machine can do: versions, devices, number formats, compilers, disk, and a small training step."""
    from rich.console import Console

    _check_imports()
    with Console(stderr=True).status("trying what works here (torch.compile takes its time) ..."):
        findings = _examine()
    broken = [
        f"{topic} {name}"
        for topic, found in findings.items()
        for name, finding in found.items()
        if finding.needed and finding.mark != "ok"
    ]
    if as_json:
        plain = {topic: {name: asdict(item) for name, item in found.items()} for topic, found in findings.items()}
        print(json.dumps({"ready": not broken, "findings": plain}, indent=2))
    else:
        console = Console()
        console.print(_screen(findings))
        verdict = f"not ready: {', '.join(broken)}" if broken else "ready: pdvit train"
        console.print(f"\n{verdict}", highlight=False, markup=False)
    return 1 if broken else 0


def _check_imports() -> None:
    """Raise RunFailed where the packages that everything stands on can't even be imported."""
    for name in ("torch", "torchvision", "timm"):
        try:
            import_module(name)
        except Exception as error:  # a half-installed torch fails in many ways
            what = f"{name} can't be imported: {type(error).__name__}: {error}"
            raise RunFailed(what, "install pdvit again, in an environment of its own: pip install .") from error


def _examine() -> dict[str, "Findings"]:
    """Look everything up and try everything, topic by topic."""
    import torch

    from pdvit.engine import doctor as probes
    from pdvit.engine.device import choose_device
    from pdvit.tracking import RUNS

    with warnings.catch_warnings(action="ignore"):  # whatever matters is among the findings
        devices = {"cpu": probes.cpu(), **probes.gpus()}
        for name, found in devices.items():
            if all(finding.mark == "ok" for finding in found.values()):
                device = torch.device(name)
                found |= probes.precisions(device) | {"training step": _step(device)}
        return {
            "versions": probes.versions(),
            **devices,
            "compile": probes.compilation(choose_device("auto")),
            "distributed": probes.backends(),
            "extras": probes.extras(),
            "runs": probes.place(RUNS),
        }


def _step(device: "torch.device") -> "Finding":
    """Train a tiny model for one step with all three terms, by the parts that `pdvit train` uses."""
    import torch

    from pdvit.config.schema import OptimConfig
    from pdvit.data.cutmix import patch_cutmix
    from pdvit.engine.doctor import Finding, reason
    from pdvit.engine.update import make_optimizer
    from pdvit.losses import Objective
    from pdvit.models.build import build_model
    from pdvit.models.tokens import DiverseModel

    sizes = {"img_size": SIDE, "patch_size": PATCH, "embed_dim": 16, "depth": 2, "num_heads": 1}
    tip = "train on another --device" if device.type == "cuda" else "install torch and timm again"
    try:
        torch.manual_seed(0)
        module = DiverseModel(build_model("vit_tiny_patch16_224", sizes | {"num_classes": CLASSES})).to(device)
        images, targets = torch.rand(CLASSES, 3, SIDE, SIDE, device=device), torch.arange(CLASSES, device=device)
        batch = patch_cutmix(images, targets, PATCH, CLASSES, rng=random.Random(0))
        loss = Objective()(module(batch.images), batch.targets, batch.patch_targets).total
        loss.backward()
        make_optimizer(module, OptimConfig(lr=1e-3)).step()
        sound = math.isfinite(loss) and all(bool(weight.isfinite().all()) for weight in module.parameters())
    except Exception as error:  # a broken installation fails anywhere, with any kind of error
        return Finding("failed", reason(error), tip, needed=True)
    if not sound:
        return Finding("failed", f"loss {float(loss):.3g}, or weights that are no numbers", tip, needed=True)
    return Finding("ok", f"(loss {float(loss):.2f})", needed=True)


def _screen(findings: dict[str, "Findings"]) -> "Table":
    """Lay out the findings: one row per topic with what is fine, then one for each thing that isn't."""
    from rich.table import Table
    from rich.text import Text

    view = Table(box=None, show_header=False, pad_edge=False)
    view.add_column(no_wrap=True)
    view.add_column(no_wrap=True)
    view.add_column(overflow="fold")  # a long path shows whole
    for topic, found in findings.items():
        for mark, text in _rows(found):
            view.add_row(Text(topic, "bold"), Text(mark, STYLES[mark]), Text(text))
            topic = ""
    return view


def _rows(found: "Findings") -> list[tuple[str, str]]:
    """Return marks and texts; what is fine shares one row, and so do things of the same fate."""
    fine = ", ".join(f"{name} {finding.detail}".strip() for name, finding in found.items() if finding.mark == "ok")
    rest: dict[Finding, list[str]] = {}
    for name, finding in found.items():
        if finding.mark != "ok":
            rest.setdefault(finding, []).append(name)
    bad = [
        (finding.mark, f"{', '.join(names)}: {finding.detail}{f' ({finding.tip})' if finding.tip else ''}")
        for finding, names in rest.items()
    ]
    return ([("ok", fine)] if fine else []) + bad
