"""Damaged and foreign files: whatever they hold, the outcome is success or a UserError, in bounded time and memory."""

import io
import json
import random
import resource
import time
import tomllib
from collections import Counter

import numpy as np
import pytest
import tomli_w
import torch
from safetensors.torch import load, save

from pdvit.cli import run as pdvit
from pdvit.config import build, read_toml, resolve
from pdvit.engine.checkpoint import METADATA, _checksum
from pdvit.errors import UserError
from pdvit.models.loading import apply_checkpoint_defaults, load_model
from pdvit.models.resolved_checkpoint import resolve_checkpoint
from pdvit.plots.reading import read_run
from pdvit.sweep import Folder
from pdvit.tracking.run_directory import RunDirectory
from pdvit.workflows.console import make_console
from pdvit.workflows.runs import build_trainer, saved_config
from tests.unit.models.support import CLASSES, TINY, VIT, make

SECONDS, MIB = 20, 1500  # at most: for a case, and for all of them beyond the memory before the first
ODD = [-1, 0, 1e300, 10**400, "x", "\x1b[31m", "a" * 5000, [], [[]], {}, {"a": {}}, True, [0] * 300]
CONFIG = {"architecture": VIT, "model_args": TINY | {"img_size": 32}, "label_names": CLASSES}


def damage(content: bytes, rng: random.Random) -> bytes:
    """Cut, flip, splice or repeat some bytes."""
    at, end = sorted(rng.randrange(len(content) + 1) for _ in range(2))
    length, other, flipped = rng.choice((1, 2, 8, 100)), rng.randrange(len(content)), bytearray(content)
    for place in rng.choices(range(len(content)), k=length):
        flipped[place] ^= 1 << rng.randrange(8)
    spliced = content[:at] + content[other : other + length] + content[at + length * rng.randrange(2) :]
    return rng.choice((content[:at], bytes(flipped), spliced, content[:end] + content[at:]))


def distort(table, rng: random.Random):
    """Replace or remove a value somewhere in a table."""
    key, parent = rng.choice(list(table)), table
    while isinstance(parent[key], dict | list) and parent[key] and rng.random() < 0.8:
        parent = parent[key]
        key = rng.choice(list(parent) if isinstance(parent, dict) else range(len(parent)))
    if rng.random() < 0.2:
        del parent[key]
    else:
        parent[key] = rng.choice(ODD)
    return table


def distort_file(content: bytes, rng: random.Random, suffix: str) -> bytes:
    """Distort what a sound file holds."""
    file = io.BytesIO()
    if suffix == ".toml":
        return tomli_w.dumps(distort(tomllib.loads(content.decode()), rng)).encode()
    if suffix == ".safetensors":
        return save(load(content), {"config.json": json.dumps(distort(json.loads(json.dumps(CONFIG)), rng))})
    if suffix == ".json":
        table = distort(json.loads(content), rng)
        if isinstance(sums := table.pop("checksums", None), dict):
            table |= {"checksums": sums | {METADATA: _checksum(table)}}
        return json.dumps(table).encode()
    if suffix == ".npz":
        arrays = distort(dict(np.load(io.BytesIO(content))), rng)
        np.savez(file, **{name: np.asarray(value) for name, value in arrays.items()})
    else:
        table = distort(torch.load(io.BytesIO(content)), rng)
        torch.save(table, file, _use_new_zipfile_serialization=content.startswith(b"PK"))
    return file.getvalue()


@pytest.mark.slow
def test_a_file_of_any_content_is_read_or_refused(run_copy, analysis_folder, tmp_path, capsys):
    rng, failures, counts, longest = random.Random(0), [], Counter(), 0.0
    run, step = RunDirectory(run_copy), run_copy / "checkpoints" / (run_copy / "checkpoints" / "last").read_text()
    trainer = build_trainer(saved_config(run_copy, []), make_console(as_json=True), resumed=True)
    figures = analysis_folder(tmp_path / "figures")
    state, args = make().state_dict(), {"model": VIT, "lr": [0], "img_size": 32, "model_kwargs": TINY}
    (tmp_path / "x.safetensors").write_bytes(save(state, {"config.json": json.dumps(CONFIG)}))
    for name in ("zip.pth", "legacy.pth"):
        torch.save({"model": state, "args": args}, tmp_path / name, _use_new_zipfile_serialization=name == "zip.pth")

    def begin(path):
        load_model(checkpoint := resolve_checkpoint(path))
        apply_checkpoint_defaults(build(("here", {"model": {"init": str(path)}})), checkpoint)

    def command(*arguments):
        assert pdvit([str(argument) for argument in arguments]) in (0, 2)

    targets = [
        *((tmp_path / name, 700, begin) for name in ("x.safetensors", "zip.pth", "legacy.pth")),
        (run_copy / "run.toml", 700, lambda file: resolve(build(("here", read_toml(file))))),
        (run_copy / "summary.json", 200, lambda _: command("train", "--resume", run_copy)),
        (run_copy / "status.json", 200, lambda _: Folder(tmp_path).written(run_copy.name)),
        (step / METADATA, 400, lambda _: trainer.restore(run, {})),
        (figures / "analysis/pairs.npz", 300, lambda _: read_run(figures, "made", "pairs")),
        (figures / "analysis/pairs.npz", 40, lambda _: command("plot", "pairs", figures, "--out", tmp_path / "x.png")),
        (figures / "analysis/maps.npz", 40, lambda _: command("plot", "maps", figures, "--out", tmp_path / "x.png")),
    ]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for file, cases, read in targets:
        sound = file.read_bytes()
        for case in range(cases):
            file.write_bytes(damage(sound, rng) if case % 2 else distort_file(sound, rng, file.suffix))
            begun, outcome = time.monotonic(), "read"
            try:
                read(file)
            except Exception as error:
                outcome = "refused"
                unreadable = len(str(error)) > 7000 or not str(error).replace("\n", "").isprintable()
                if unreadable or not isinstance(error, UserError):
                    failures.append(f"{file.name}, case {case}: {error!r}"[:300])
            counts[file.name, outcome] += 1
            longest = max(longest, time.monotonic() - begun)
        file.write_bytes(sound)
    with capsys.disabled():
        print(f"\n{sum(counts.values())} files: {dict(counts)}; longest {longest:.1f} s; failures {len(failures)}")
    assert failures == []
    assert longest < SECONDS
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < MIB * 1024
