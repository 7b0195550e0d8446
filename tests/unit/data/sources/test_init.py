import pytest

from pdvit.config.schema import DataConfig
from pdvit.data.sources import open_source, source_label
from pdvit.errors import UserError


@pytest.mark.parametrize("source", ["no/such/folder", "no-such-source", "", "x" * 400])
def test_a_source_that_is_not_there_is_refused(source):
    with pytest.raises(UserError) as caught:
        open_source(DataConfig(source=source))
    assert "--data" in caught.value.where


def test_a_file_of_no_known_kind_is_no_source(tmp_path):
    file = tmp_path / "images.rar"
    file.touch()
    with pytest.raises(UserError, match="no source, folder or table"):
        open_source(DataConfig(source=str(file)))


@pytest.mark.parametrize(("source", "label"), [("digits", "digits"), ("some/place/my set!", "my-set-")])
def test_a_label_is_fit_for_a_file_name(source, label):
    assert source_label(DataConfig(source=source)) == label
