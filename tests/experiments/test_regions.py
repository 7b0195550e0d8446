import pandas as pd
import pytest
import torch
from effects import HERE


def test_pairs_in_the_same_half_and_across_are_told_apart(load):
    right, up, both = [1.0, 0.0], [0.0, 2.0], [-3.0, -3.0]
    tokens = torch.tensor([[right, both, up, up]])
    same, across = load(HERE / "ablation" / "regions.py").parts(tokens, torch.tensor([True, True, False, False]))
    assert same == pytest.approx((0.5**0.5 + 1) / 2)
    assert across == pytest.approx((0 + 0 + 0.5**0.5 + 0.5**0.5) / 4)


def test_the_page_has_the_numbers():
    table, page = pd.read_csv(HERE / "ablation" / "regions.csv"), (HERE / "ablation" / "README.md").read_text("utf-8")
    for variant, rows in table.groupby("variant"):
        cells = [f"{rows[name].mean():.2f} ± {rows[name].std():.2f}" for name in table.columns[2:]]
        assert f"| {variant} | {' | '.join(cells)} |" in page
