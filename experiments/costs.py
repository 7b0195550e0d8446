"""What the paper's rows would cost: `python experiments/costs.py` writes costs.csv and prints it as Markdown.

Counted are the images of a recipe's training and the operations of all forward and backward passes, on the meta device:
a multiplication and an addition are two, a backward pass is two forward passes, recomputed activations are one more.
Evaluation is not in it. What the operations take is the rate that speed/train_step.csv has of DeiT-S with all terms on
each kind of hardware: of a CPU one core, of a GPU the card; in the fastest setting (precision, compiled or not, batch)
that was measured there, which the column names. A model that uses the hardware better or worse than DeiT-S costs
accordingly less or more.
"""

from pathlib import Path

import pandas as pd
import torch
from effects import markdown
from speed.operations import forward_operations
from tables import write_table

from pdvit.config import Config, build, read_toml, resolve
from pdvit.config.duration import parse_duration
from pdvit.models.build import model_arguments, sketch_model
from pdvit.models.segmentation.segmenter import build_segmenter

HERE = Path(__file__).parent
# Images to train on, and classes.
SETS = {"imagenet": (1_281_167, 1000), "ade20k": (20_210, 150), "cityscapes": (2_975, 19)}
# Where a second command goes on, as the recipe says: the end of that.
WHOLE = {"deit-b12-224": "400ep", "deit-b24-224": "400ep", "ade20k-swin-l": "200000st"}
MEASURED = "deit_small_patch16_224"


def operations_of(config: Config, classes: int) -> int:
    """Return the operations of one image's forward pass, at the size of the training images."""
    assert config.model.name is not None
    if config.segment.head is not None:
        with torch.device("meta"):
            model: torch.nn.Module = build_segmenter(config, classes)
        size = config.segment.crop
    else:
        arguments = model_arguments(config.model, config.data.img_size) | {"num_classes": classes}
        model = sketch_model(config.model.name, arguments)
        size = config.data.img_size or model.pretrained_cfg["input_size"][-1]
    assert size is not None
    return forward_operations(model, size)


def cost_of(recipe: Path) -> dict[str, object] | None:
    """Return the row of a recipe, or None where its data are none of the paper's."""
    config = resolve(build((str(recipe), read_toml(recipe))))
    known = SETS.get(Path(config.data.source).name)
    if known is None:
        return None
    count, classes = known
    batch = config.data.batch_size
    length = parse_duration(WHOLE.get(recipe.stem, config.optim.epochs), "ep", "optim.epochs")
    images = length.steps(count // batch, batch) * batch
    forward = operations_of(config, classes)
    passes = 4 if config.model.grad_checkpointing else 3
    return {"recipe": recipe.stem, "images": images, "forward": forward, "operations": passes * forward * images}


def rates(file: Path) -> dict[str, float]:
    """Return operations per second of the step by hardware: the fastest of its settings, each a median over the rounds.

    Rounds of another commit are another setting: the code differs, and what else the machine did.
    """
    table = pd.read_csv(file)
    table = table[(table["model"] == MEASURED) & (table["img_size"] == 224) & (table["classes"] == 1000)]
    table = table[table["model_kwargs"].isna() & ((table["device"] != "cpu") | (table["threads"] == 1))]
    table = table.assign(unit=table["device"].map(lambda device: "core" if device == "cpu" else "GPU"))
    settings = table.groupby(["unit", "hardware", "precision", "compile", "batch_size", "commit"])["paper"].median()
    step = 3 * operations_of(resolve(build(("deit", {"model": {"name": MEASURED}}))), 1000)
    found = {}
    for unit, hardware, precision, compiled, batch, commit in settings.groupby(["unit", "hardware"]).idxmax():
        images = settings[unit, hardware, precision, compiled, batch, commit]
        name = f"{unit}-hours, {hardware} ({precision}{', compiled' * bool(compiled)}, batch {batch})"
        found[name] = step * float(images)
    return found


def main() -> None:
    rows = [row for recipe in sorted((HERE / "recipes").glob("*.toml")) if (row := cost_of(recipe))]
    table = pd.DataFrame(rows)
    for name, rate in rates(HERE / "speed" / "train_step.csv").items():
        table[name] = table["operations"] / rate / 3600
    write_table(HERE / "costs.csv", table.to_dict("records"))
    print(report("costs.csv"), end="")


def report(name: str) -> str:
    """Return the table in Markdown."""
    table = pd.read_csv(HERE / name)
    shown = [["recipe", "images, M", "forward pass, 10^9 operations", "whole training, 10^18", *table.columns[4:]]]
    for recipe, images, forward, operations, *hours in table.values.tolist():
        numbers = [f"{images / 1e6:,.1f}", f"{forward / 1e9:,.1f}", f"{float(operations) / 1e18:,.1f}"]
        shown.append([recipe, *numbers, *(f"{number:,.0f}" for number in hours)])
    return markdown(shown)


if __name__ == "__main__":
    main()
