"""How far the relations of patches moved: `python experiments/prevention/relations.py runs/prevention-camvid`.

Each finished run of a sweep is compared with the model that it began from, on the probe of the run (64 validation
images). `cka` is the linear CKA of the last layer's tokens with those of the start, `gram` the gram loss between
both, which compares the patches of an image alone. One row for each run is written to relations-NAME.csv beside this
script.
"""

import copy
import sys
from pathlib import Path

import torch
from torch import nn

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))
from tables import Row, cells_of, write_table  # noqa: E402

from pdvit import gram_loss  # noqa: E402
from pdvit.analysis import cka_between  # noqa: E402
from pdvit.config import build, read_toml  # noqa: E402
from pdvit.models.loading import load_model  # noqa: E402
from pdvit.models.resolved_checkpoint import resolve_checkpoint  # noqa: E402
from pdvit.workflows.console import make_console  # noqa: E402
from pdvit.workflows.runs import build_trainer  # noqa: E402


def relations_of(run: Path) -> Row:
    """Return CKA and gram loss between a run's backbone at the end and at the start."""
    task = build_trainer(build(("run.toml", read_toml(run / "run.toml"))), make_console(as_json=True)).task
    module, start = task.module.eval(), copy.deepcopy(task.module.inside).eval()
    trained: nn.Module = load_model(resolve_checkpoint(run), backbone=True).model
    cka = cka_between(start, trained, [task.probe])
    with torch.no_grad():
        before = module.last_tokens(task.probe)
        module.inside.load_state_dict(trained.state_dict())
        gram = float(gram_loss(module.last_tokens(task.probe), before))
    return {"cka": float(cka.iloc[-1, -1]), "gram": gram}


def main(sweep: Path) -> None:
    rows = [cell for cell in cells_of(sweep) if cell["status"] == "finished"]
    names = ("variant", "run.seed")
    found = [{name: cell[name] for name in names} | relations_of(sweep / cell["name"]) for cell in rows]
    write_table(HERE / f"relations-{sweep.name.removeprefix('prevention-')}.csv", found)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
