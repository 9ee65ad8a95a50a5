"""``python -m fused_dals``: what it says, with and without the compiled part."""

from __future__ import annotations

import runpy

import pytest

from fused_dals.host_walk import HOST_WALK
from tests.helpers import needs_walk


@needs_walk
def test_it_says_what_was_built(capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_module("fused_dals", run_name="__main__")
    printed = capsys.readouterr().out
    assert "a piece of C++" in printed and printed.endswith("It is built, and optimizers on a GPU will use it.\n")


def test_without_it_the_reason_is_given_and_that_nothing_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(HOST_WALK, "compiled", None)
    monkeypatch.setattr(HOST_WALK, "why_not", "Triton is not installed")
    with pytest.raises(SystemExit) as caught:
        runpy.run_module("fused_dals", run_name="__main__")
    said = str(caught.value)
    assert "same results" in said and "It could not be built here: Triton is not installed." in said
