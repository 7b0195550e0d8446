"""Every command that pdvit prints works as it stands, also if names have spaces."""

import re
import shlex
import shutil

import typer

from pdvit.cli import app
from pdvit.cli import run as pdvit

COMMAND = re.compile(rf"\bpdvit (?:{'|'.join(typer.main.get_command(app).commands)})\b.*$", re.MULTILINE)
SHORT = ["--epochs", "2st", "--workers", "0", "--device", "cpu"]
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
    (2, "plot cka 'runs/a b'"),
    (2, "plot maps 'runs/a b'"),
    (2, "plot confusion"),
    (2, "plot confusion 'runs/of pixels'"),
    (0, "analyze 'runs/a b'"),
    (0, "analyze 'runs/of pixels'"),
    (0, "analyze runs/tuned --metrics norms,similarity"),
    (0, "analyze 'of images.safetensors' --images digits --limit 8"),
    (0, "analyze 'a map.safetensors' --images digits --limit 8"),
    (0, "eval 'runs/a b'"),
    (0, "eval 'runs/of pixels'"),
    (2, "plot segmentation 'runs/a b'"),
    (2, "plot pairs 'runs/analysis-a map'"),
]


def test_every_printed_command_works(workplace, tiny, shapes, capsys):
    shutil.copytree(shapes, "my shapes")
    printed: dict[str, None] = {}
    for status, text in STEPS:
        if text.startswith("analyze 'of images"):
            shutil.copy("runs/a b/model.safetensors", "of images.safetensors")
            shutil.copy("runs/of pixels/model.safetensors", "a map.safetensors")
        words = [part for word in shlex.split(text) for part in (tiny if word == "TINY" else [word])]
        trains = words[0] in ("train", "segment", "finetune") and "--epochs" not in words
        assert pdvit(words + (SHORT if trains else [])) == status, (text, capsys.readouterr().err)
        shown = capsys.readouterr()
        printed |= dict.fromkeys(COMMAND.findall(shown.out + shown.err))
    assert len(printed) > 20
    for line in printed:
        data = "'my shapes' --batch-size 4" if " segment " in line else "digits"
        words = shlex.split(line.replace("FOLDER", data))[1:]
        trains = words[0] in ("train", "segment", "finetune") and not {"--resume", "--replay"} & {*words}
        assert pdvit(words + (SHORT if trains else [])) == 0, (line, capsys.readouterr().err)
