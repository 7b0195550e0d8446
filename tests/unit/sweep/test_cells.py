import tomllib
from itertools import product

import pytest

from pdvit.errors import UserError
from pdvit.sweep import make_cells, numbers, split

BASE = {"data": {"batch_size": 16}, "model": {"depth": 2}}


def cells_of(text: str):
    base, table = split(tomllib.loads(text), "a.toml")
    return make_cells(base or BASE, table, "a.toml")


def test_lists_are_crossed():
    cells = cells_of('[sweep]\n"optim.lr" = [1e-3, 1]\n"model.width" = [16, 32]\n')
    assert [(cell.config.optim.lr, cell.config.model.width) for cell in cells] == [*product((0.001, 1.0), (16, 32))]
    assert [cell.name for cell in cells] == ["lr=0.001-width=16", "lr=0.001-width=32", "lr=1-width=16", "lr=1-width=32"]
    assert cells[1].values == {"optim.lr": 0.001, "model.width": 32}
    assert all(cell.config.data.batch_size == 16 and cell.variant == "" for cell in cells)


def test_variants_are_bundles_and_seeds_the_outermost_loop():
    cells = cells_of(
        '[sweep]\n"optim.lr" = [1e-3]\n"run.seed" = [0, 1]\n'
        '[[sweep.variant]]\nname = "baseline"\n"diversity.preset" = "none"\n"optim.opt" = "sgd"\n'
        '[[sweep.variant]]\nname = "paper"\n'
    )
    assert [(cell.config.run.seed, cell.variant) for cell in cells] == [*product((0, 1), ("baseline", "paper"))]
    assert cells[0].name == "baseline-lr=0.001-seed=0"
    assert (cells[0].config.diversity.preset, cells[0].config.optim.opt) == ("none", "sgd")
    assert (cells[1].config.diversity.preset, cells[1].config.optim.opt) == ("paper", "adamw")
    assert list(cells[0].values) == ["optim.lr", "run.seed"]


def test_a_value_may_name_what_the_cell_has():
    cells = cells_of("""
        [model]
        init = "runs/{variant}-seed={run.seed}/{optim.lr}{other}"
        [data]
        source = "wds/x-{000..100}.tar"
        [sweep]
        "run.seed" = [1, 2]
        [[sweep.variant]]
        name = "a"
        [[sweep.variant]]
        name = "b"
        "data.train_split" = "{variant}"
    """)
    ends = ["a-seed=1", "b-seed=1", "a-seed=2", "b-seed=2"]
    assert [cell.config.model.init for cell in cells] == [f"runs/{end}/{{optim.lr}}{{other}}" for end in ends]
    assert {cell.config.data.source for cell in cells} == {"wds/x-{000..100}.tar"}
    assert [cell.config.data.train_split for cell in cells] == [None, "b", None, "b"]


def test_seeds_that_are_added_come_last():
    text = '[sweep]\n"model.width" = [16, 32]\n"run.seed" = [0{}]\n'
    before, after = cells_of(text.format("")), cells_of(text.format(", 1"))
    assert after[: len(before)] == before


def test_names_can_be_read_are_folders_and_have_the_section_if_two_keys_are_alike():
    values = {"run.tf32": "true", "data.source": '"~/some where/x.tar"', "optim.warmup": '"5%"'}
    values |= {"augment.scale": "[0.5, 1]"}
    cells = [cells_of(f'[sweep]\n"{key}" = [{value}]\n') for key, value in values.items()]
    names = ["tf32=true", "source=some_where_x.tar", "warmup=5%", "scale=0.5_1"]
    assert [cell.name for (cell,) in cells] == names
    (cell,) = cells_of('[sweep]\n"model.width" = [16]\n"segment.width" = [32]\n"optim.lr" = [1]\n')
    assert cell.name == "model.width=16-segment.width=32-lr=1"


@pytest.mark.parametrize(
    ("text", "what", "where", "tip"),
    [
        ('[sweep]\n"optim.lrr" = [1]', "no key 'optim.lrr'", "cell 1 (lrr=1) of [sweep] of a.toml", "'lr'"),
        ('[sweep]\n"optim.lr" = [1, -1]', "-1.0 is out of range", "cell 2 (lr=-1)", "above 0"),
        ('[sweep]\n"optim.min_lr" = [0, 1]', "is above the peak", "cell 2 (min_lr=1)", "lower it"),
        ('[sweep]\n"optim.lr" = 1', "needs a list", "[sweep] of a.toml", "for example"),
        ('[sweep]\n"optim.lr" = [0.1, 0.10]', "0.1 twice", "a.toml", "once"),
        ("[sweep]\noptim.lr = [0.1]", "'optim' is a section", "a.toml", '"optim.lr" = ...'),
        ("[sweep]\nlr = [0.1]", "'lr' is not section.key", "a.toml", "for example"),
        ("[sweep.variant]\nname = 'a'", "'variant' is no key", "a.toml", "[[sweep.variant]]"),
        ('[[sweep.variant]]\n"optim.lr" = 1', "variant 1 has no name", "a.toml", "name ="),
        ('[[sweep.variant]]\nname = "a/b"', "'a/b' is no name", "a.toml", "letters"),
        ('[[sweep.variant]]\nname = "a"\n[[sweep.variant]]\nname = "a"', "two variants", "a.toml", "rename"),
        ('[sweep]\n"run.out" = ["a", "b"]', "'run.out' can't be swept", "a.toml", "outside of [sweep]"),
        ('[sweep]\n"launch.time" = ["1h"]', "'launch.time' can't be swept", "a.toml", "outside of [sweep]"),
        ('[sweep]\n"optim.lr" = [1]\n[[sweep.variant]]\nname = "a"\n"optim.lr" = 1', "sets it too", "a.toml", "one of"),
        ('[sweep]\n"data.source" = ["a/b", "a b"]', "two cells would be named 'source=a_b'", "a.toml", "variant"),
        ("[sweep]\nvariant = []", "a cell would have no name", "a.toml", "run.seed"),
        ('[[sweep.variant]]\nname = "jobs"', "'jobs', as a file of the sweep", "a.toml", "otherwise"),
        (f'[sweep]\n"data.source" = ["{"a" * 300}"]', "too long", "a.toml", "variant"),
    ],
)
def test_a_sweep_that_can_not_be_run_is_refused_as_a_whole(text, what, where, tip):
    with pytest.raises(UserError) as caught:
        cells_of(text)
    assert what in caught.value.what
    assert where in caught.value.where
    assert tip in caught.value.tip


def test_the_table_is_no_part_of_the_configuration():
    assert split({"optim": {"lr": 1}, "sweep": {"run.seed": [1]}}, "f") == ({"optim": {"lr": 1}}, {"run.seed": [1]})
    assert split({"optim": {}}, "f") == ({"optim": {}}, None)
    for table in ({}, 3):
        with pytest.raises(UserError, match="is empty"):
            split({"sweep": table}, "f")


def test_cells_are_chosen_by_number_and_those_that_are_not_there_are_refused():
    found = {"3": {3}, "3-5": {3, 4, 5}, "1, 4,6-": {1, 4, 6, 7}, "2 - 3": {2, 3}, "7-": {7}}
    assert {text: numbers(text, 7) for text in found} == found
    for text in ("8", "0-3", "5-3", "6-9", "", "a", "3-4-5", "-3", "1,,2"):
        with pytest.raises(UserError, match="where: --cells"):
            numbers(text, 7)
