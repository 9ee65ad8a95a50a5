"""Fresh but reproducible randomness: every run draws a seed, prints it, and takes it back from FUSED_DALS_TEST_SEED."""

import os
import random
from collections.abc import Iterator
from contextlib import nullcontext

import pytest
import torch

from fused_dals.host_walk import HOST_WALK

# Without a GPU the real kernels run on CPU tensors; Triton reads this when a kernel is defined.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

# Kept for the processes that run tests side by side, so that all have one seed.
SEED = int(os.environ.get("FUSED_DALS_TEST_SEED", random.SystemRandom().randrange(2**31)))
os.environ["FUSED_DALS_TEST_SEED"] = str(SEED)

# One thread: the tensors of the tests are small, and test processes may share the cores.
torch.set_num_threads(1)


# Optimizers on a GPU build it in the background and use it once it is there; here it is there from the start.
HOST_WALK.want(wait=True)


def pytest_report_header() -> str:
    return f"FUSED_DALS_TEST_SEED={SEED}, compiled walk: {HOST_WALK.why_not or 'yes'}"


@pytest.fixture(params=["compiled walk", "walk in Python"])
def either_walk(request: pytest.FixtureRequest) -> Iterator[str]:
    """Both ways of asking what changed between two steps."""
    if request.param == "compiled walk" and HOST_WALK.compiled is None:
        pytest.skip(f"no compiled walk: {HOST_WALK.why_not}")
    with HOST_WALK.left_out() if request.param == "walk in Python" else nullcontext():
        yield request.param


@pytest.fixture
def seed() -> int:
    torch.manual_seed(SEED)
    return SEED
