"""The look at the kernels before they become a device's default, here in the interpreter."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from fused_dals import self_check
from fused_dals.fused import FusedPass

pytest.importorskip("triton")

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")

#: Without what is remembered of this process.
why_kernels_fail = self_check.why_kernels_fail.__wrapped__


@pytest.fixture
def fresh_check() -> Iterator[None]:
    self_check.why_kernels_fail.cache_clear()
    yield
    self_check.why_kernels_fail.cache_clear()


def test_kernels_that_work_pass_the_check_and_leave_the_generator_alone(fresh_check: None) -> None:
    before = torch.get_rng_state()
    assert self_check.why_kernels_fail(DEVICE) == ""
    assert torch.equal(before, torch.get_rng_state())


def test_kernels_that_fail_are_told_once_and_left_alone(fresh_check: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(self: FusedPass, *arguments: Any) -> None:
        raise RuntimeError("Failed to find C compiler")

    monkeypatch.setattr(FusedPass, "run", broken)
    with pytest.warns(
        UserWarning, match=f"without its Triton kernels on {DEVICE}: RuntimeError: Failed to find C compiler"
    ):
        assert self_check.why_kernels_fail(DEVICE)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert self_check.why_kernels_fail(DEVICE)


def test_kernels_that_are_wrong_are_found_out(fresh_check: None, monkeypatch: pytest.MonkeyPatch) -> None:
    real = FusedPass.run

    def wrong(self: FusedPass, *arguments: Any) -> Any:
        measured = real(self, *arguments)
        self.launches[0].owners[1].mul_(1.001)
        return measured

    monkeypatch.setattr(FusedPass, "run", wrong)
    with pytest.warns(UserWarning, match="their result is off by"):
        assert self_check.why_kernels_fail(DEVICE)


def test_kernels_that_do_nothing_are_left_out_with_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FusedPass, "run", lambda *args: [])
    with pytest.warns(UserWarning, match="goes on without its Triton kernels"):
        assert "off by 1.0e+00 of the update" in why_kernels_fail(DEVICE)


def test_a_debug_mode_in_which_waiting_is_an_error_stays_out_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    modes: list[int] = [2]
    monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: modes[-1])
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)

    def fails() -> Any:
        with self_check._waiting_allowed(torch.device("cuda")):
            assert modes == [2, 0]
            raise KeyError

    with pytest.raises(KeyError):
        fails()
    assert modes == [2, 0, 2]
