"""The groups' hyperparameters in device memory, where the prologue reads them: groups add no launches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fused_dals import host
from fused_dals.capture import is_capturing
from fused_dals.host import table_on
from fused_dals.kernels import layout
from fused_dals.live_groups import GroupsVersion
from fused_dals.schedule import warmup_length

_NO_MAX_GRAD_NORM = -1.0


class GroupTable:
    """One row of float64 per group, its learning rate, and the address of one that is a tensor on the device.

    The tables keep their memory while the number of groups does, because captured graphs read them.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._version: GroupsVersion | None = None
        self._cells: dict[int, Tensor] = {}  # copies of learning rates that the kernel cannot read where they are
        # As they are on the device.
        self._lrs = host.doubles(())
        self._rows: list[tuple[float, ...]] = []
        self._addresses: list[int] = []
        self._lr_tensors: list[Tensor] = []  # there

    def refresh(self, groups: Sequence[Mapping[str, Any]], version: GroupsVersion) -> None:
        """Write what changed; while ``version`` is the same that can only be a tensor learning rate or where it lies.

        Raises RuntimeError while a step is being captured: the copy from the host would not survive its replays.
        """
        if version == self._version and not any(self._addresses):
            return
        lrs, addresses, lr_tensors = version.plain_lrs, [0] * len(groups), []
        if lrs is None:
            given = [group["lr"] for group in groups]
            addresses = [self._lr_address(index, lr) for index, lr in enumerate(given)]
            lr_tensors = [lr for lr, address in zip(given, addresses, strict=True) if address]
            lrs = host.doubles(0.0 if address else float(lr) for lr, address in zip(given, addresses, strict=True))
        if version == self._version and addresses == self._addresses:
            return
        rows = self._rows
        only_lrs = self._version is not None and version.tables == self._version.tables
        if not only_lrs or any(addresses) or any(self._addresses):
            rows = [self._row(group, address) for group, address in zip(groups, addresses, strict=True)]
        new_rows, new_lrs, new_addresses = (
            rows is not self._rows and rows != self._rows,
            not torch.equal(lrs, self._lrs),
            addresses != self._addresses,
        )
        if is_capturing(self.device) and (new_rows or new_lrs or new_addresses):
            raise RuntimeError(
                "this step is being captured into a graph, and hyperparameters changed since the last one: take one "
                "more step, or call refresh_hyperparameters(), before capture"
            )
        self._version = None  # what could not be written is written later
        if len(rows) != len(self._rows):
            count = len(rows)
            self._rows, self._lrs, self._addresses = [], host.doubles(()), []  # of the new memory nothing is known
            self.rows = torch.empty(count, len(layout.GROUP_COLUMNS), dtype=torch.float64, device=self.device)
            self.lrs = torch.empty(count, dtype=torch.float64, device=self.device)
            self.addresses = torch.empty(count, dtype=torch.int64, device=self.device)
            self.scalars = torch.empty(count, len(layout.SCALAR_COLUMNS), dtype=torch.float32, device=self.device)
            new_rows = new_lrs = new_addresses = True
        if new_rows:
            self.rows.copy_(table_on(self.device, torch.tensor(rows, dtype=torch.float64, device="cpu")))
            self._rows = rows
        if new_lrs:
            self.lrs.copy_(table_on(self.device, lrs))
            self._lrs = lrs.clone()
        if new_addresses:
            self.addresses.copy_(table_on(self.device, torch.tensor(addresses, dtype=torch.int64, device="cpu")))
            self._addresses, self._lr_tensors = addresses, lr_tensors
        self._version = version

    def tables(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """What the prologue is given: rows, learning rates, addresses of those that are tensors, and what it writes."""
        return self.rows, self.lrs, self.addresses, self.scalars

    def memory(self) -> list[Tensor]:
        """What kernels are given addresses of, or find addresses of there."""
        return [self.rows, self.lrs, self.addresses, *self._lr_tensors, *self._cells.values(), self.scalars]

    def _row(self, group: Mapping[str, Any], lr_address: int) -> tuple[float, ...]:
        lr, source = group["lr"], 0
        if lr_address:
            source = 1 if lr.dtype == torch.float32 and lr.device == self.device else 2
        total_steps = group["total_steps"] or 0
        max_grad_norm = group["max_grad_norm"]
        return (
            float(source),
            group["momentum"],
            group["weight_decay"],
            group["trust_coefficient"],
            *group["trust_clip"],
            *group["ema_decay"],
            *group["phase_thresholds"],
            total_steps,
            warmup_length(total_steps, group["warmup_fraction"]),
            group["restart_steps"] or 0,
            group["restart_mult"],
            -1.0 if group["maximize"] else 1.0,
            _NO_MAX_GRAD_NORM if max_grad_norm is None else max_grad_norm,
        )

    def _lr_address(self, index: int, lr: Any) -> int:
        """Where the prologue reads a learning rate itself; 0 where the host hands it over."""
        if not isinstance(lr, Tensor) or (host.knows(lr) and lr.device != self.device):
            return 0
        if lr.device == self.device and lr.dtype in (torch.float32, torch.float64):
            return lr.data_ptr()
        if index not in self._cells:
            self._cells[index] = torch.empty(1, dtype=torch.float64, device=self.device)
        return self._cells[index].copy_(lr.detach().reshape(1), non_blocking=True).data_ptr()
