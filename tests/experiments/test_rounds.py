from rounds import append


def test_rows_are_added_below_one_heading_and_those_of_other_columns_go_into_a_new_table(tmp_path):
    file = tmp_path / "found.csv"
    append(file, ["round", "a"], [{"round": 0, "a": 1.5}])
    append(file, ["round", "a"], [{"round": 0}, {"round": 1, "a": 2}])
    assert file.read_text().split() == ["round,a", "0,1.5", "0,", "1,2"]
    file.write_text("a,round\n1,0\n")
    for number in (1, 2):
        append(file, ["round", "a"], [{"round": number, "a": 2}])
    assert file.read_text() == "a,round\n1,0\n"
    assert (tmp_path / "found-new.csv").read_text().split() == ["round,a", "1,2", "2,2"]
