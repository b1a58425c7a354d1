"""The values that options take are those of the library, which help and mistakes are not to import."""

from __future__ import annotations

from typing import Any, get_args

import pytest

from speculative_eft import command_options
from speculative_eft.decoding import config
from speculative_eft.kernels import AcceptanceRule


@pytest.mark.parametrize(
    ("ours", "of_the_library"),
    [
        (command_options.Acceptance, AcceptanceRule),
        (command_options.Draft, config.DraftKind),
        (command_options.DraftWeights, config.DraftWeights),
    ],
    ids=["acceptance", "draft", "draft_weights"],
)
def test_options_take_what_the_library_takes(ours: Any, of_the_library: Any) -> None:
    assert get_args(ours) == get_args(of_the_library)
