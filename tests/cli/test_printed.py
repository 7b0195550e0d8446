"""Every command that pdvit prints works as it stands, also if names have spaces."""

import re
import shlex
import shutil

import pytest
import typer

from pdvit.cli import app
from pdvit.cli import run as pdvit

COMMAND = re.compile(rf"\bpdvit (?:{'|'.join(typer.main.get_command(app).commands)})\b.*$", re.MULTILINE)
SHORT = ["--epochs", "2st", "--workers", "0", "--device", "cpu"]
MEASURED = ("norms", "similarity", "maps", "pairs", "spectrum", "attention", "cka")
# Commands by exit status. Those that are refused name one that works in their tip.
STEPS = [
    (2, "analyze"),
    (2, "plot similarity"),
    (2, "finetune"),
    (0, "train TINY --diversity released --name 'a b'"),
    (0, "segment TINY --data 'my shapes' --crop 32 --batch-size 4 --head-width 8 --name 'of pixels'"),
    (75, "train TINY --stop-after 1st --name 'not done'"),
    (1, "train TINY --epochs 9st --lr 1e38 --diversity none --log-interval 1st --name 'not finite'"),
    (2, "train --out 'runs/a b'"),
    (2, "finetune"),
    (0, "finetune 'runs/of pixels' --name tuned"),
    (0, "analyze 'runs/a b' --metrics rank --verbose"),
    *((2, f"plot {figure} 'runs/a b'") for figure in MEASURED),
    (2, "plot confusion"),
    (2, "plot confusion 'runs/of pixels'"),
    (0, "analyze 'runs/a b' --verbose"),
    (0, "analyze 'runs/of pixels' --verbose"),
    (0, "analyze runs/tuned --metrics norms,similarity -v"),
    (0, "analyze 'of images.safetensors' --images digits --limit 8 -v"),
    (0, "analyze 'a map.safetensors' --images digits --limit 8 -v"),
    (0, "eval 'runs/a b'"),
    (0, "eval 'runs/of pixels'"),
    (2, "plot segmentation 'runs/a b'"),
    (2, "plot pairs 'runs/analysis-a map'"),
]


@pytest.mark.slow
def test_every_printed_command_works(workplace, tiny, shapes, capsys):
    def start(text: str) -> tuple[int, str]:
        words = [part for word in shlex.split(text) for part in (tiny if word == "TINY" else [word])]
        trains = words[0] in ("train", "segment", "finetune") and not {"--resume", "--replay", "--epochs"} & {*words}
        status, shown = pdvit(words + (SHORT if trains else [])), capsys.readouterr()
        return status, shown.out + shown.err

    shutil.copytree(shapes, "my shapes")
    seen: set[str] = set()
    for expected, text in STEPS:
        if text.startswith("analyze 'of images"):
            shutil.copy("runs/a b/model.safetensors", "of images.safetensors")
            shutil.copy("runs/of pixels/model.safetensors", "a map.safetensors")
        status, shown = start(text)
        assert status == expected, (text, shown)
        for line in {*COMMAND.findall(shown)} - seen:
            data = "'my shapes' --batch-size 4" if " segment " in line else "digits"
            assert start(line.replace("FOLDER", data).removeprefix("pdvit "))[0] == 0, (text, line)
            seen.add(line)
        if text in [f"plot {figure} 'runs/a b'" for figure in MEASURED]:  # what was refused works now
            assert start(text)[0] == 0, text
    assert len(seen) > 30
