import json
import tomllib

from pdvit.cli import run as pdvit
from tests.files import read_records

# Everything that could draw at random: drop path, mixing and shifts.
FLAGS = ["--epochs", "6st", "--batch-size", "32", "--log-interval", "1st", "--drop-path", "0.3", "--shift", "2"]


def test_the_recipe_repeats_the_run_bit_for_bit(workplace, tiny):
    assert pdvit(["train", *tiny, *FLAGS, "--set", "run.seed=3", "--cosine", "0.5", "--out", "first"]) == 0
    first, again = workplace / "first", workplace / "again"
    assert pdvit(["train", "--config", "first/run.toml", "--out", "again"]) == 0
    for name in ("model.safetensors", "config.json"):
        assert (first / name).read_bytes() == (again / name).read_bytes()
    assert read_records(first) == read_records(again)
    recipes = [tomllib.loads((run / "run.toml").read_text()) for run in (first, again)]
    assert recipes[0] == recipes[1]
    summaries = [json.loads((run / "summary.json").read_text()) for run in (first, again)]
    for summary in summaries:
        del summary["seconds"], summary["images_per_second"], summary["seconds_by_phase"]
    assert summaries[0] == summaries[1]
