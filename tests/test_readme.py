"""What README.md says of arguments, and the code in it."""

from __future__ import annotations

import inspect
import re
import warnings
from typing import Any

import pytest
import torch
from torch import nn

from fused_dals import DALS, DALSAcc, DALSFast
from tests.helpers import mlp
from tests.processes import ROOT

README = (ROOT / "README.md").read_text()
BEGIN, END = "<!-- arguments, checked by tests/test_readme.py -->", "<!-- end of arguments -->"


def rows() -> list[list[str]]:
    """Argument and defaults of each row: DALS, DALSFast, DALSAcc."""
    table = README[README.index(BEGIN) : README.index(END)]
    return [
        [cell.strip(" `") for cell in line.split("|")[1:5]] for line in table.splitlines() if line.startswith("| `")
    ]


def defaults(cls: type[DALS]) -> dict[str, Any]:
    own = {key: p.default for key, p in inspect.signature(DALS).parameters.items() if key != "params"}
    if cls is DALS:
        return own
    assert issubclass(cls, DALSFast | DALSAcc)
    return {**own, "lr": inspect.signature(cls).parameters["lr"].default, **cls.PRESET}


def test_the_table_has_all_arguments_and_their_defaults() -> None:
    of_dals, of_fast, of_acc = (defaults(cls) for cls in (DALS, DALSFast, DALSAcc))
    shown = {name: str(value) if isinstance(value, torch.dtype) else repr(value) for name, value in of_dals.items()}
    assert {name: default for name, default, _, _ in rows()} == shown
    for name, _, fast, acc in rows():
        assert fast == ("" if of_fast[name] == of_dals[name] else repr(of_fast[name]))
        assert acc == ("" if of_acc[name] == of_dals[name] else repr(of_acc[name]))


@pytest.mark.parametrize("block", re.findall(r"```python\n(.*?)```", README, re.S))
def test_the_code_runs(block: str) -> None:
    x, y = torch.randn(4, 3), torch.randn(4, 2)
    names: dict[str, Any] = {"model": mlp(3, 4, 2), "loader": [(x, y)] * 3, "epochs": 1, "criterion": nn.MSELoss()}
    exec(block, names)
    optimizer = names["optimizer"]
    names["model"](x).sum().backward()
    if len(optimizer.param_groups) > 1:
        optimizer.step(loss=1.0)
        ratios = optimizer.trust_ratios()
        assert all((ratio == 1) == name.endswith("bias") for name, ratio in ratios.items())


@pytest.mark.parametrize("title", ["Plain loop", "Gradient accumulation"])
def test_recipes_run(title: str) -> None:
    page = (ROOT / "docs" / "integrations.md").read_text()
    block = page[page.index(f"## {title}\n") :].split("```")[1].removeprefix("python\n")
    loader = [(torch.randn(4, 3), torch.randn(4, 2))] * 8
    model = mlp(3, 4, 2)
    names: dict[str, Any] = {
        "DALS": DALS, "model": model, "loader": loader, "epochs": 1, "criterion": nn.MSELoss(), "optimizer": DALS(model)
    }  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        exec(block, names)
    assert names["optimizer"].state_dict()["param_groups"][0]["step"] == (2 if "accumulation" in title else 8)


def test_links_lead_somewhere() -> None:
    for page in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
        for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
            assert (page.parent / target).exists(), (page.name, target)
