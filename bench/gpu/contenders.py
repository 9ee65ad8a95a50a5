"""Who competes in ``python -m bench gpu``: the paths of DALS with what it offers beside them, and torch.optim."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from bench.byte_table import Dtypes, item_sizes, least_bytes
from bench.compiled import CompileBudget, CompiledReference, even_blends, hyperparameters
from bench.contenders import (
    ADAMW,
    ADAMW_FOREACH,
    BF16_STATE,
    CLIPPED,
    COMPENSATED,
    COMPILED,
    FOREACH,
    FUSED,
    LR,
    SGD,
    Contender,
    Factory,
    NamedParameter,
    Step,
    dals,
    dals_contenders,
    torch_contenders,
)
from bench.gpu.driver import PassDriver, TensorSet
from fused_dals.gather import flat_zeros
from fused_dals.launch_plan import IN_USE
from fused_dals.reference import compute_dtype

PASS_ALONE = "DALS fused pass alone"


def contenders_for(dtypes: Dtypes) -> dict[str, Contender]:
    """Who competes on parameters of these dtypes; AdamW and SGD keep their state in the parameters' dtype."""
    p, g, state = item_sizes(dtypes)
    moves = least_bytes(p, g, state)
    theirs = torch_contenders(dtypes)
    if dtypes[2] != compute_dtype(dtypes[0]):
        # The pass driven directly, beside what the optimizer makes of it, without and with a compensation.
        narrow = {"fused": True, "state_dtype": dtypes[2]}
        return {
            PASS_ALONE: Contender(_pass_alone(dtypes[2]), moves, 2 * state),
            BF16_STATE: Contender(dals(**narrow), moves, 2 * state),
            COMPENSATED: Contender(dals(**narrow, compensated=True), moves + 4, 2 * state + 2),
            **{name: theirs[name] for name in (ADAMW, SGD)},
        }
    ours = dals_contenders(dtypes)
    return {
        FUSED: ours[FUSED],
        CLIPPED: Contender(dals(fused=True, max_grad_norm=1.0), moves + g, 2 * state),
        FOREACH: ours[FOREACH],
        **{name: theirs[name] for name in (ADAMW, SGD, ADAMW_FOREACH)},
    }


def beside_compiled(dtypes: Dtypes, budget: CompileBudget) -> dict[str, Contender]:
    """The reference under torch.compile, and the path that promises never to be slower."""
    return {FUSED: dals_contenders(dtypes)[FUSED], COMPILED: CompiledReference(dtypes, budget).contender()}


def _pass_alone(state_dtype: torch.dtype) -> Factory:
    def build(named: Sequence[NamedParameter]) -> Step:
        return PassDriver(tensor_set(named, state_dtype), IN_USE, hyperparameters(lr=LR)).step

    return build


def tensor_set(named: Sequence[NamedParameter], state_dtype: torch.dtype) -> TensorSet:
    """The parameters with their gradients, and state of zeros in flat buffers as the optimizer makes it."""
    params = [parameter.detach() for _, parameter in named]
    grads = [parameter.grad for _, parameter in named]
    assert all(grad is not None for grad in grads)
    state = [flat_zeros(params, state_dtype) for _ in range(2)]
    return TensorSet(params, [g for g in grads if g is not None], state[0], state[1], even_blends(len(params)))
