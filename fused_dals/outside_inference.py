"""State that outlives ``torch.inference_mode``: tensors made inside it cannot be written in place outside."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")


def outside_inference_mode(method: Callable[P, R]) -> Callable[P, R]:
    """Run outside of inference mode, where a loader or an evaluation that goes on to train calls it inside."""

    @functools.wraps(method)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        if not torch.is_inference_mode_enabled():
            return method(*args, **kwargs)
        with torch.inference_mode(False):
            return method(*args, **kwargs)

    return run
