import pandas as pd
from grid import changes_of, table_of
from scipy import stats

MINUS, NOTHING = "\u2212", "\u2013"


def runs() -> pd.DataFrame:
    """Two depths, two rates, three variants, three seeds: at 24 blocks and the higher rate `none` goes wrong."""
    rows = [
        {"variant": variant, "run.seed": seed, "model.depth": depth, "optim.lr": rate, "status": "finished"}
        | {"accuracy": 0.6 + 0.1 * place + 0.01 * seed**2, "similarity_norm": 0.5 - 0.1 * place, "loss": 0.5}
        | {"loss_spikes": 0}
        for depth in (6, 24)
        for rate in (0.001, 0.002)
        for place, variant in enumerate(("none", "cutmix", "paper"))
        for seed in (1, 2, 3)
    ]
    table = pd.DataFrame(rows)
    bad = (table["model.depth"] == 24) & (table["optim.lr"] == 0.002) & (table["variant"] == "none")
    table.loc[bad & (table["run.seed"] == 1), ["accuracy", "loss_spikes"]] = [0.49, 4]
    table.loc[bad & (table["run.seed"] == 2), ["status", "accuracy", "loss"]] = ["failed", None, None]
    table.loc[bad & (table["run.seed"] == 3), ["accuracy", "loss"]] = [0.1, None]
    return table


def test_runs_that_stalled_are_lost_or_had_spikes_are_counted():
    head, *body = table_of(runs())
    assert head[:6] == ["depth", "rate", "none, %", "cutmix, %", "paper, %", f"paper {MINUS} none"]
    assert [line[:2] for line in body] == [[d, r] for d in ("6", "24") for r in ("0.001", "0.002")]
    assert [line[-4:] for line in body[:3]] == [["3, 3, 3", *["0, 0, 0"] * 3]] * 3
    assert body[3][-4:] == ["2, 3, 3", "1, 0, 0", "2, 0, 0", "1, 0, 0"]


def test_the_change_from_the_least_size_to_the_greatest_is_that_of_the_best_rates():
    table = runs()
    table["accuracy_val"] = 0.5 + 0.1 * ((table["optim.lr"] == 0.001) == (table["model.depth"] == 24))
    table["rank_norm"] = 10.0 - (table["variant"] == "none") * (table["model.depth"] == 24) * table["run.seed"]
    table.loc[(table["model.depth"] == 24) & (table["optim.lr"] == 0.001), "accuracy"] += 0.1
    table.loc[(table["model.depth"] == 24) & (table["variant"] == "paper"), "accuracy"] += 0.02 * table["run.seed"]
    head, *body = changes_of(table)
    assert head == [f"depth 24 {MINUS} 6", "n", "accuracy, points", "P after the norm", "effective rank, %"]
    low, high = stats.ttest_1samp([-10, -20, -30], 0).confidence_interval(0.95)
    rank = f"{MINUS}20 [{MINUS}{-low:.0f}, +{high:.0f}]"
    assert body[0] == ["none", "3", "+10.0 [+10.0, +10.0]", "+0.00 [+0.00, +0.00]", rank]
    low, high = stats.ttest_1samp([2, 4, 6], 0).confidence_interval(0.95)
    gain = f"[{low:+.1f}, {high:+.1f}]".replace("-", MINUS)
    change = f"[{10 + low:+.1f}, {10 + high:+.1f}]"
    assert body[2] == ["paper", "3", f"+14.0 {change}", "+0.00 [+0.00, +0.00]", "+0 [+0, +0]"]
    assert body[3] == [f"paper {MINUS} none", "3", f"+4.0 {gain}", NOTHING, NOTHING]
