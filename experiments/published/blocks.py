"""What do the last blocks do? `python experiments/published/blocks.py [FOLDER]`, of the converted model.

Of 60 photographs of three breeds (data/pets3-224), 20 of each, at 224 pixels, it takes the tokens of each layer. The
mean square of tokens of length 1 is split into what all patches share, what those of a class, of an image and of a
place share beyond it, and the rest (as in ablation/shares.py). Beside it: the mean length of a token, P, and P of
tokens from which the mean of all patches of all images was subtracted. It writes blocks.csv. Without FOLDER it measures
nothing. It prints blocks.csv and a part of metrics.csv in Markdown.
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
LAYERS = ("block 5", "block 9", "block 11", "block 12", "norm")
METRICS = {  # of metrics.csv: heading, factor, digits
    "similarity": ("P", 1, 3),
    "similarity_random": ("P of random weights", 1, 3),
    "effective_rank": ("effective rank", 1, 1),
    "norm_mean": ("length of tokens", 1, 1),
    "drift_retrieval": ("patches found again, %", 100, 1),
}


def report(name: str, *place: str) -> str:
    """Return blocks.csv or a part of a table of metrics in Markdown, or P at one place, a run and a layer."""
    table = pd.read_csv(HERE / name)
    if place:
        run, layer = place
        rows = table[(table.iloc[:, 0] == run) & (table["layer"] == layer) & (table["metric"] == "similarity")]
        return f"{rows['mean'].item():.2f}"
    if name == "blocks.csv":
        return markdown([[*table], *([layer, *(f"{value:.2f}" for value in rest)] for layer, *rest in table.values)])
    by, lines = table.columns[0], [["", "images", *LAYERS]]
    for metric, (heading, factor, digits) in METRICS.items():
        rows = table[(table["metric"] == metric) & table["layer"].isin(LAYERS)]
        for number, (run, row) in enumerate(rows.groupby(by, sort=False)):
            found = row.set_index("layer").loc[list(LAYERS)]
            texts = [f"{factor * value:.{digits}f}" for value in found["mean"]]
            if metric == "similarity":
                texts = [f"{text} ± {half:.3f}" for text, half in zip(texts, found["ci95"], strict=True)]
            lines.append([heading if number == 0 else "", f"{run}, {found['images'].iloc[0]}", *texts])
    return markdown(lines)


def shared(folder: str) -> list[dict[str, str | float]]:
    """Return a row for each layer of the model in `folder`: length, P and the parts of the mean square."""
    listed = pd.read_csv(DATA / "pets.csv").groupby("label", sort=True).head(OF_CLASS)
    labels = torch.from_numpy(pd.factorize(listed["label"])[0])
    model = timm.create_model(f"local-dir:{folder}", pretrained=True, img_size=SIDE).eval()
    names = ("crop_pct", "interpolation", "mean", "std")
    prepare = create_transform(SIDE, **{name: model.pretrained_cfg[name] for name in names})
    images = torch.stack([prepare(Image.open(DATA / path).convert("RGB")) for path in listed["path"]])
    rows = []
    for layer, maps in pdvit.token_maps(model, images.split(4)).items():
        tokens = maps.flatten(1, 2)
        similar = [float(patch_similarity(part).mean()) for part in (tokens, tokens - tokens.mean((0, 1)))]
        row: dict[str, str | float] = {"layer": layer, "length": float(tokens.norm(dim=-1).mean())}
        rows.append(row | dict(zip(("P", "P_centred"), similar, strict=True)) | shares(tokens, labels))
    return rows


if __name__ == "__main__":
    for folder in sys.argv[1:]:
        write_table(HERE / "blocks.csv", shared(folder))
    print(report("blocks.csv"), report("metrics.csv"), sep="\n", end="")
