import pytest
from tables import best_rates, spikes, told, write_table

from tests.files import read_csv


def test_a_spike_is_three_times_the_median_of_the_twenty_before():
    assert spikes([]) == spikes([5.0]) == spikes([1.0, 1.0, 3.0]) == 0  # three times is not above
    assert spikes([1.0, 1.0, 3.01]) == 1
    assert spikes([1.0, None, 1.0, None]) == 2
    assert spikes([None, 9.0, 28.0]) == 2  # what is not finite is no part of the median
    assert spikes([9.0] * 10 + [1.0] * 20 + [4.0]) == 1
    assert spikes([9.0] * 11 + [1.0] * 9 + [4.0]) == 0


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        *(("loss", 0.123456789, "0.12346"), ("loss", "1.23456789e-07", "1.2346e-07"), ("accuracy", None, "")),
        *(("steps", "1234567", "1234567"), ("optim.lr", "0.000123456789", "0.000123456789")),
        ("reason", "[Errno 2] no such file: '/home/me/a b/x.png'", "[Errno 2] no such file: 'a b/x.png'"),
        ("reason", "/srv/runs/x: broken, at 1/2 and a / b", "x: broken, at 1/2 and a / b"),
        ("data.source", "/srv/data/cifar100", "cifar100"),
    ],
)
def test_numbers_have_five_digits_and_texts_no_folders_of_the_machine(name, value, expected):
    assert told(name, value) == expected


def test_a_table_has_every_column_of_every_row(tmp_path):
    write_table(tmp_path / "x.csv", [{"cell": 1, "loss": 0.5}, {"cell": 2, "rank": 1.5}])
    rows = [{"cell": "1", "loss": "0.5", "rank": ""}, {"cell": "2", "loss": "", "rank": "1.5"}]
    assert read_csv(tmp_path / "x.csv") == rows


def cell(variant, lr, score, seed=0, status="finished", **more):
    row = {"variant": variant, "optim.lr": str(lr), "run.seed": str(seed), "status": status, **more}
    return row if score is None else row | {"accuracy_val": score}


def test_the_best_rate_is_that_of_the_highest_mean_and_the_lower_of_equals():
    rows = [cell("a", 0.004, 0.5), cell("a", 0.002, 0.5), cell("a", 0.001, 0.4)]
    rows += [cell("b", 0.001, 0.9, 0), cell("b", 0.001, 0.1, 1), cell("b", 0.002, 0.6, 0), cell("b", 0.002, 0.6, 1)]
    # A rate at which a seed failed is none.
    rows += [cell("c", 0.001, 0.4), cell("c", 0.002, 0.9, status="failed"), cell("c", 0.004, None)]
    assert best_rates(rows) == {"a": (0.002, 0.5, False), "b": (0.002, 0.6, True), "c": (0.001, 0.4, True)}
    # What else was crossed has a rate of its own.
    rows = [cell("a", 0.001 * depth, depth / 100, **{"model.depth": str(depth)}) for depth in (6, 12)]
    assert best_rates(rows) == {"a, model.depth=6": (0.006, 0.06, True), "a, model.depth=12": (0.012, 0.12, True)}
