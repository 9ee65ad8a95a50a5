"""Options of ``pytest bench --benchmark-only``."""

from __future__ import annotations

import pytest

from bench.byte_table import STEP_DTYPES
from bench.compiled import CompileBudget, CompiledReference
from bench.find import find_machine
from bench.machine import Machine
from bench.micro import contenders_of, default_shapes
from bench.shapes import SHAPES


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--shapes", nargs="+", choices=SHAPES, help="parameter lists; default as in python -m bench micro")
    parser.addoption("--dtypes", nargs="+", choices=STEP_DTYPES, default=list(STEP_DTYPES))


def pytest_configure(config: pytest.Config) -> None:
    config.stash[MACHINE] = find_machine()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    machine = metafunc.config.stash[MACHINE]
    metafunc.parametrize("model", metafunc.config.getoption("shapes") or default_shapes(machine))
    metafunc.parametrize("dtypes_name", metafunc.config.getoption("dtypes"))
    dtypes = STEP_DTYPES["fp32"]
    everybody = contenders_of(dtypes, machine, CompiledReference(dtypes, CompileBudget(0, 0)))
    metafunc.parametrize("contender", list(everybody))


MACHINE = pytest.StashKey[Machine]()


@pytest.fixture
def machine(request: pytest.FixtureRequest) -> Machine:
    return request.config.stash[MACHINE]
