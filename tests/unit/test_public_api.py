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


@pytest.mark.parametrize("name", NAMES)
def test_public_names_are_functions_and_classes_with_a_docstring(name):
    assert sorted(pdvit.__all__) == NAMES
    found = getattr(pdvit, name)
    assert callable(found)
    assert found.__name__ == name
    assert found.__doc__
    assert name in dir(pdvit)


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="cosine_los'"):
        _ = pdvit.cosine_los


def test_importing_pdvit_imports_nothing_heavy():
    code = (
        "import sys, pdvit, pdvit.cli, pdvit.config; "
        "print({'torch', 'timm', 'pandas', 'matplotlib', 'numpy', 'sklearn'} & set(sys.modules)); "
        "pdvit.patch_similarity; print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout.splitlines() == ["set()", "True"]
