from rounds import append


def test_rows_are_added_below_one_heading(tmp_path):
    file = tmp_path / "found.csv"
    append(file, ["round", "a"], [{"round": 0, "a": 1.5}])
    append(file, ["round", "a"], [{"round": 0}, {"round": 1, "a": 2}])
    assert file.read_text().split() == ["round,a", "0,1.5", "0,", "1,2"]


def test_a_table_of_other_columns_is_left_as_it_is_and_a_new_one_has_the_rows(tmp_path, capsys):
    file = tmp_path / "found.csv"
    file.write_text("a,round\n1,0\n")
    for number in (1, 2):
        append(file, ["round", "a"], [{"round": number, "a": 2}])
        assert "found-new.csv" in capsys.readouterr().out
    assert file.read_text() == "a,round\n1,0\n"
    assert (tmp_path / "found-new.csv").read_text().split() == ["round,a", "1,2", "2,2"]
