"""What do the last blocks do? `python experiments/published/blocks.py FOLDER` with the converted model.

Of 60 photographs of three breeds (data/pets3-224), 20 of each, at 224 pixels, it takes the tokens of each layer. The
mean square of tokens of length 1 is split into what all patches share, what those of a class, of an image and of a
place share beyond it, and the rest (as in ablation/shares.py). Beside it: the mean length of a token, P, and P of
tokens from which the mean of all patches of all images was subtracted. It writes blocks.csv and prints it in Markdown.
"""

import sys
from pathlib import Path

import pandas as pd
import timm
import torch
from PIL import Image
from timm.data import create_transform

import pdvit
from pdvit.similarity import patch_similarity

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent), str(HERE.parent / "ablation")]
from effects import markdown  # noqa: E402
from shares import shares  # noqa: E402
from tables import write_table  # noqa: E402

DATA, OF_CLASS, SIDE = Path("data/pets3-224"), 20, 224


def main(folder: str) -> None:
    """Measure, write the table and print it."""
    listed = pd.read_csv(DATA / "pets.csv").groupby("label", sort=True).head(OF_CLASS)
    labels = torch.from_numpy(pd.factorize(listed["label"])[0])
    model = timm.create_model(f"local-dir:{folder}", pretrained=True, img_size=SIDE).eval()
    given = ("crop_pct", "interpolation", "mean", "std")
    prepare = create_transform(SIDE, **{name: model.pretrained_cfg[name] for name in given})
    images = torch.stack([prepare(Image.open(DATA / path).convert("RGB")) for path in listed["path"]])
    maps = pdvit.token_maps(model, images.split(4))
    rows = []
    for layer, tokens in ((layer, tokens.flatten(1, 2)) for layer, tokens in maps.items()):
        centred = tokens - tokens.mean((0, 1))
        rows.append(
            {"layer": layer, "length": float(tokens.norm(dim=-1).mean()), "P": float(patch_similarity(tokens).mean())}
            | {"P_centred": float(patch_similarity(centred).mean())}
            | shares(tokens, labels)
        )
    write_table(HERE / "blocks.csv", rows)
    print(
        markdown(
            [[*rows[0]], *([f"{cell:.2f}" if cell != row["layer"] else cell for cell in row.values()] for row in rows)]
        )
    )


if __name__ == "__main__":
    main(sys.argv[1])
