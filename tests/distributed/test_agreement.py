"""Ranks that do not agree on the layout are stopped when they meet, instead of waiting for each other."""

import pytest

from nemo_qwen_hidden.errors import ConfigError
from tests.conftest import Start
from tests.support.ranks import of_two_minds


def test_ranks_of_different_layouts(start_ranks: Start) -> None:
    with pytest.raises(ConfigError, match="must be the same on every rank"):
        start_ranks(2, of_two_minds)
