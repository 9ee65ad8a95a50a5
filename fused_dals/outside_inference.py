"""State that outlives ``torch.inference_mode``: tensors made inside it cannot be written in place outside."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")


@contextmanager
def outside_inference() -> Iterator[None]:
    """Neither in inference mode nor, as leaving it would mean, with gradients on."""
    with torch.inference_mode(False), torch.no_grad():
        yield


def outside_inference_mode(method: Callable[P, R]) -> Callable[P, R]:
    """Run outside of inference mode, where a loader or an evaluation that goes on to train calls it inside."""

    @functools.wraps(method)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        if not torch.is_inference_mode_enabled():
            return method(*args, **kwargs)
        with outside_inference():
            return method(*args, **kwargs)

    return run
