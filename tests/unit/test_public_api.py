import pytest

import pdvit

NAMES = {
    *("DiverseModel", "Objective", "analyze", "patch_cutmix", "patch_similarity"),
    *("explore", "load", "token_maps", "train"),
    *("contrastive_loss", "cosine_loss", "gram_loss", "koleo_loss", "mixing_loss", "spectral_loss"),
}


def test_public_names_are_functions_and_classes_with_a_docstring():
    assert set(pdvit.__all__) == NAMES <= set(dir(pdvit))
    for name in NAMES:
        found = getattr(pdvit, name)
        assert callable(found)
        assert found.__name__ == name
        assert found.__doc__
    with pytest.raises(AttributeError, match="cosine_los'"):
        _ = pdvit.cosine_los
