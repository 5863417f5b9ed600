"""Every name in the __all__ of a package with lazy imports can be imported."""

from __future__ import annotations

import pytest

import toolkit.config


@pytest.mark.parametrize("name", toolkit.config.__all__)
def test_names_of_the_config_package(name: str) -> None:
    assert getattr(toolkit.config, name) is not None


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        _ = toolkit.config.Nothing
