import re
import subprocess
import sys

import pytest

import pdvit

NAMES = [
    "DiverseModel",
    "Objective",
    "analyze",
    "contrastive_loss",
    "cosine_loss",
    "koleo_loss",
    "mixing_loss",
    "patch_cutmix",
    "patch_similarity",
    "spectral_loss",
]


def test_the_public_names_are_those_of_the_design():
    assert sorted(pdvit.__all__) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_a_public_name_is_there_and_says_what_it_is(name):
    found = getattr(pdvit, name)
    assert callable(found)
    assert found.__name__ == name
    assert found.__doc__
    assert name in dir(pdvit)


def test_a_star_import_brings_them_all():
    space: dict[str, object] = {}
    exec("from pdvit import *", space)
    assert set(NAMES) <= set(space)


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="cosine_los'"):
        _ = pdvit.cosine_los


def test_the_version_is_a_release_number():
    assert re.fullmatch(r"\d+\.\d+\.\d+", pdvit.__version__)


def test_importing_pdvit_imports_nothing_heavy():
    code = (
        "import sys, pdvit, pdvit.cli, pdvit.config; "
        "print({'torch', 'timm', 'pandas', 'matplotlib', 'numpy', 'sklearn'} & set(sys.modules)); "
        "pdvit.patch_similarity; print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout.splitlines() == ["set()", "True"]
