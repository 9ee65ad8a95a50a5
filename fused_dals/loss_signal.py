"""The losses that a training loop hands over, until a step takes them; the hook of ``watch_loss``."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from numbers import Complex, Real
from typing import Any

import torch
from torch import Tensor, nn
from torch._C import _functorch as functorch
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils.hooks import RemovableHandle

from fused_dals import host
from fused_dals.capture import is_capturing
from fused_dals.launcher import ALIGNMENT
from fused_dals.loss_average import LossAverage, OnItsWay
from fused_dals.sharding import is_distributed_tensor

NO_LOSS_WARNING = (
    "{optimizer} has not been given a loss since it was made, loaded or copied: its phase stays as it is, 1 if there "
    "never was a loss. Pass the loss in one of four ways: "
    "optimizer.step(loss=loss), optimizer.observe_loss(loss) before step(), optimizer.step(closure), or once "
    "optimizer.watch_loss(model_or_criterion)."
)


#: What the kernels read as a loss.
_READABLE = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


@dataclass
class StepLoss:
    """What a step takes: ``total`` is the sum of ``count`` losses, 0-dim; or [sum, count], and ``count`` None.

    It is in double precision (single where the device has no double), but for a single loss that is read where it is.
    """

    total: Tensor | None = None
    count: int | None = 0

    def on(self, device: torch.device) -> StepLoss:
        if self.total is None or self.total.device == device:
            return self
        return StepLoss(host.scalars_on(device, self.total), self.count)

    def mean(self) -> Tensor | None:
        """NaN where [sum, count] counts nothing: no finite mean moves the phase, and none is waited for."""
        if self.total is None or self.count is None:
            return None if self.total is None else self.total[0] / self.total[1]
        return self.total.to(host.widest(self.total.device)) / self.count


class LossSignal:
    """The losses observed since the last step; their sum is a 0-dim tensor where they come from, never waited for.

    With several ranks the sum over all of them begins with what seems the last loss before a step, where as many were
    observed before each of the last two. Should more come all the same, they are counted in the next step: every rank
    adds up once a step, whatever it observes.
    """

    def __init__(self, average: LossAverage | None = None) -> None:
        self.average = LossAverage() if average is None else average
        self._home: torch.device | None = None  # where the last step wanted it
        self._flight: OnItsWay | None = None
        self.forget()

    def forget(self) -> None:
        """As if no loss had been observed, ever; but other ranks count on a sum that is on its way."""
        self.observed = False  # since this process made, loaded or copied it
        self.pending: Tensor | None = None  # their sum
        self.seen_outside_capture = False  # whether one of them was observed while no graph was being captured
        self._count = 0
        self._calls = 0  # of observe, since the last step
        self._earlier_calls: list[int] = []  # before the last two steps

    def __getstate__(self) -> dict[str, Any]:
        # A copy is not what watch_loss watches for: it says so once, if nobody hands it losses.
        return {**self.__dict__, "observed": False, "_flight": None}

    def observe(self, loss: Tensor | float, *, read_on: torch.device | None = None) -> None:
        """Add one loss to those of the coming step.

        It is copied, because it may be written in place afterwards, and detached, because its graph must not be kept.
        A copy on a GPU is a launch more: with ``read_on``, a lone loss on that device is read where it is. That is for
        a step that is under way, whose kernels are the next to run there, and not for one that may be captured: all its
        steps are to need the same kernels, compiled before capture.
        """
        value = as_scalar(loss)
        alone = self.pending is None and not self.average.active()
        if not (alone and value.device == read_on and _is_readable(value)):
            value = value.to(host.widest(value.device), copy=True)
        if self.pending is None:
            self.pending = value
        else:
            self.pending = self.pending + host.scalars_on(self.pending.device, value)
        self._count += 1
        self.observed = True
        # A compiled module's hook is traced once, whatever the stream does when it runs.
        if not torch.compiler.is_compiling() and not is_capturing(self.pending.device):
            self.seen_outside_capture = True
        self._calls += 1
        if self._is_last() and self._flight is None and self._home is not None and self.average.is_open():
            self._start(self._home)

    def take(self, device: torch.device) -> StepLoss:
        """Hand over the losses of this step, on ``device``, those of all ranks where there are several."""
        self._take_back()
        if self.pending is not None:  # observed inside torch.func.grad, whose tensors have no address
            self.pending = functorch.unwrap_if_dead(self.pending)
        if self.average.active():
            self.average.open()
            if self._flight is None:
                self._start(device)
            assert self._flight is not None
            taken, self._flight = StepLoss(self._flight.wait(), None).on(device), None
        else:
            taken = StepLoss(self.pending, self._count).on(device)
            self.pending, self._count = None, 0
        self._earlier_calls = [*self._earlier_calls[-1:], self._calls]
        self._home, self._calls = device, 0
        self.seen_outside_capture = self.pending is not None
        return taken

    def _take_back(self) -> None:
        """Take losses out of a sum whose ranks are gone: torch.distributed was ended, or begun anew."""
        flight = self._flight
        if flight is None or self.average.is_of_this_world(flight.world):
            return
        if flight.total is not None:
            others = 0.0 if self.pending is None else host.scalars_on(flight.total.device, self.pending)
            self.pending = flight.total + others
            self._count += flight.count
        self._flight = None

    def _is_last(self) -> bool:
        """Whether no other loss is to be expected before the step: there were as many before the last two steps."""
        return self._earlier_calls == [self._calls] * 2

    def _start(self, device: torch.device) -> None:
        self._flight = self.average.start(self.pending, self._count, device)
        self.pending, self._count = None, 0


class WatchLoss:
    """The forward hook of ``watch_loss``: observes the loss that a module returns.

    It holds the signal weakly, and a copy or pickle of the watched module carries a hook that watches nothing: an
    averaged copy of a model must not feed the optimizer of the original.
    """

    def __init__(self, signal: LossSignal | None) -> None:
        self._signal = (lambda: None) if signal is None else weakref.ref(signal)

    def __reduce__(self) -> tuple[type[WatchLoss], tuple[None]]:
        return WatchLoss, (None,)

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        signal = self._signal()
        if signal is None or not module.training or not torch.is_grad_enabled() or _is_being_traced():
            return
        loss = output
        if not isinstance(output, Tensor):
            loss = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", output)
        if loss is None:  # a model called without labels
            return
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            what = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
            instead = "watch the criterion instead, or call observe_loss(loss) in the training loop"
            if getattr(module, "reduction", None) == "none":
                instead = "give it reduction='mean', or call observe_loss(loss.mean()) in the training loop"
            raise TypeError(
                f"watch_loss: {type(module).__name__} returned {what}, neither a scalar loss nor an output with a "
                f"scalar .loss; {instead}"
            )
        if why_no_number(loss):  # a tracer's, or one for each sample
            return
        signal.observe(loss)


def _is_being_traced() -> bool:
    """Whether a forward pass is only looked at, and trains nothing."""
    return torch.compiler.is_exporting() or torch._C._get_tracing_state() is not None


def watch(module: nn.Module, signal: LossSignal) -> RemovableHandle:
    """Register the hook; the handle's ``remove()`` takes it off again."""
    if not isinstance(module, nn.Module):
        raise TypeError(f"watch_loss: expected a torch.nn.Module, got {type(module).__name__}")
    return module.register_forward_hook(WatchLoss(signal))


def _is_readable(scalar: Tensor) -> bool:
    """Whether the kernels may read this loss where it is; they ask for the alignment that all memory of torch has."""
    plain = type(scalar) is Tensor and not scalar.is_neg() and not scalar._is_zerotensor()
    return plain and scalar.dtype in _READABLE and scalar.data_ptr() % ALIGNMENT == 0


def why_no_number(loss: Tensor) -> str:
    """What a tensor stands for that has no number to observe; empty where it has one."""
    if torch.compiler.is_compiling():  # what is compiled has numbers when it runs
        return ""
    if type(loss) is Tensor and not functorch.is_functorch_wrapped_tensor(loss):  # as a rule
        return ""
    if isinstance(loss, FakeTensor):
        return "of a tracer, without a value"
    while functorch.is_gradtrackingtensor(loss):
        loss = functorch.get_unwrapped(loss)
    if functorch.is_batchedtensor(loss):
        return "one for each sample, inside torch.func.vmap; observe their mean, outside"
    return ""


def as_scalar(loss: Tensor | float) -> Tensor:
    """``loss`` detached and 0-dim, in its own memory if it is a tensor; of a DTensor, the whole of it."""
    if not isinstance(loss, Tensor):
        if not hasattr(loss, "__float__") or (isinstance(loss, Complex) and not isinstance(loss, Real)):
            raise TypeError(f"loss must be a number or a scalar tensor, got {type(loss).__name__}")
        try:
            return torch.tensor(float(loss), dtype=torch.float64, device="cpu")
        except (TypeError, OverflowError) as error:
            raise TypeError(f"loss must be a number or a scalar tensor: {error}") from None
    if loss.is_nested or loss.layout != torch.strided or loss.device.type == "meta":
        what = "a nested tensor" if loss.is_nested else str(loss.layout)
        raise TypeError(f"loss must be a dense tensor with a value, got {what} on {loss.device}")
    if why := why_no_number(loss):
        raise TypeError(f"loss must be a number, and this one is {why}")
    if is_distributed_tensor(loss):  # as torch.distributed.tensor.parallel.loss_parallel has it
        whole: Tensor = loss.detach().full_tensor()  # type: ignore[attr-defined]
        loss = whole
    if loss.numel() != 1:
        raise ValueError(f"loss must be a scalar, got shape {tuple(loss.shape)}; pass its mean, loss.mean()")
    if loss.is_complex():
        raise TypeError(f"loss must be real, got {loss.dtype}")
    return loss.detach() if loss.dim() == 0 else loss.detach().reshape(())
