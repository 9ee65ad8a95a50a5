"""Training a small transformer in every parallel layout: what tests/ranks.py runs on every rank."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, loss_parallel, parallelize_module
from torch.nn.functional import cross_entropy, scaled_dot_product_attention
from torch.nn.parallel import DistributedDataParallel

from fused_dals import DALS
from fused_dals import sharding as dals_sharding

VOCABULARY, WIDTH, HEADS, LENGTH, BATCH = 11, 12, 2, 6, 8


class Block(nn.Module):
    """One layer of a transformer, whose head count is read off the weights, so that tensor parallelism may split it."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.q, self.v, self.out = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        # Attention does not depend on a bias of k: its gradient would be rounding errors, made steps of by r.
        self.k = nn.Linear(WIDTH, WIDTH, bias=False)
        self.up, self.down = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(3 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        heads = [some.unflatten(-1, (-1, WIDTH // HEADS)).transpose(1, 2) for some in (self.q(y), self.k(y), self.v(y))]
        x = x + self.out(scaled_dot_product_attention(*heads, is_causal=True).transpose(1, 2).flatten(2))
        out: Tensor = x + self.down(torch.relu(self.up(x)))
        return out


class TinyGPT(nn.Module):
    """Sizes that leave shards uneven on four ranks, and a parameter that leaves some of them empty."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.gain = nn.Parameter(torch.ones(3, 1))
        self.blocks = nn.ModuleList(Block() for _ in range(layers))
        self.head = nn.Linear(WIDTH, VOCABULARY)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens) * self.gain.sum()
        for block in self.blocks:
            x = block(x)
        out: Tensor = self.head(x.flatten(0, 1))
        return out


def model(seed: int = 0, layers: int = 1) -> TinyGPT:
    torch.manual_seed(seed)
    return TinyGPT(layers)


def batches(steps: int, seed: int = 1) -> Iterator[tuple[Tensor, Tensor]]:
    """The same for all ranks: tokens whose successor follows a rule, so that there is something to learn."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        start = torch.randint(VOCABULARY, (BATCH, 1), generator=generator)
        noise = torch.randint(2, (BATCH, LENGTH + 1), generator=generator)
        tokens = (start + (2 + noise).cumsum(1)) % VOCABULARY
        yield tokens[:, :-1], tokens[:, 1:]


def loss_of(net: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return cross_entropy(net(x), y.flatten())


# -- layouts ------------------------------------------------------------------------------------------------------


def shard_by_layer(net: TinyGPT, mesh: DeviceMesh) -> None:
    for block in net.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(net, mesh=mesh)


def split_by_tensor(net: TinyGPT, mesh: DeviceMesh) -> None:
    plan = {name: ColwiseParallel() for name in ("q", "k", "v", "up")} | {n: RowwiseParallel() for n in ("out", "down")}
    for block in net.blocks:
        parallelize_module(block, mesh, plan)


def mesh_of(*shape: int) -> DeviceMesh:
    return init_device_mesh("cpu", shape, mesh_dim_names=("outer", "inner")[: len(shape)])


def fsdp(net: TinyGPT) -> None:
    shard_by_layer(net, mesh_of(dist.get_world_size()))


def hsdp(net: TinyGPT) -> None:
    shard_by_layer(net, mesh_of(2, dist.get_world_size() // 2))


def tp(net: TinyGPT) -> None:
    split_by_tensor(net, mesh_of(dist.get_world_size()))


def tp_fsdp(net: TinyGPT) -> None:
    mesh = mesh_of(dist.get_world_size() // 2, 2)
    split_by_tensor(net, mesh["inner"])
    shard_by_layer(net, mesh["outer"])


def no_layout(net: TinyGPT) -> None:
    """One process, or replicas that average their gradients by hand as DistributedDataParallel does."""


#: Layout -> (how to make it, how many parts the batch has among n ranks, where this rank's is)
LAYOUTS: dict[str, tuple[Callable[[TinyGPT], None], Callable[[int], int], Callable[[int], int]]] = {
    "fsdp": (fsdp, lambda n: n, lambda rank: rank),
    "hsdp": (hsdp, lambda n: n, lambda rank: rank),
    "tp": (tp, lambda n: 1, lambda rank: 0),
    "tp_fsdp": (tp_fsdp, lambda n: n // 2, lambda rank: rank // 2),
    "ddp": (no_layout, lambda n: n, lambda rank: rank),
    "single": (no_layout, lambda n: 1, lambda rank: 0),
}


def part(layout: str, x: Tensor) -> Tensor:
    """This rank's part of a batch."""
    _, parts, place = LAYOUTS[layout]
    world, rank = (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)
    return x.chunk(parts(world))[place(rank)]


def reduce_replicas(layout: str, net: nn.Module) -> None:
    if layout == "ddp":
        for p in net.parameters():
            if p.grad is not None:
                dist.all_reduce(p.grad)
                p.grad /= dist.get_world_size()


# -- training -----------------------------------------------------------------------------------------------------

#: Steps of a run, and the one before which it is saved.
STEPS, SAVED = 4, 2

PLAIN: dict[str, Any] = {"lr": 0.1, "momentum": 0.8, "weight_decay": 1e-2, "trust_clip": (0.01, 100.0)}

#: Every path, with what needs more of other ranks than norms; ALL where no more processes than cores are at work.
ALL: dict[str, dict[str, Any]] = {
    "reference": {"foreach": False},
    "foreach": {"foreach": True},
    "fused": {"fused": True},
    "clipped": {"foreach": True, "max_grad_norm": 0.3},
    "clipped_fused": {"fused": True, "max_grad_norm": 0.3, "skip_nonfinite": True},
    "acc": {"foreach": True, "restart_steps": 4, "ema_decay": (0.55, 0.7, 0.8)},
    "bfloat16 state": {"foreach": True, "state_dtype": torch.bfloat16},
}
SOME = {name: ALL[name] for name in ("foreach", "clipped_fused")}


class Outcome:
    """What a run left: whole weights and state by name, and what the ranks must agree on."""

    def __init__(self, net: nn.Module, optimizer: DALS) -> None:
        self.weights = {name: whole(p) for name, p in net.named_parameters()}
        self.state = {
            f"{name}.{key}": whole(value)
            for name, p in net.named_parameters()
            for key, value in optimizer.state[p].items()
        }
        group = optimizer.state_dict()["param_groups"][0]
        self.run_state = {key: group[key] for key in ("step", "loss_ema", "loss_drop", "skipped_steps")}
        self.ratios = optimizer.trust_ratios()
        self.depths = optimizer.depths()
        self.preparations = [fused.preparations for fused in optimizer._runtime.fused.values()]
        steady = optimizer._runtime.steady
        self.resumes_by = None if steady is None else type(steady.fingerprint)
        self.phases: list[int] = []
        self.counts: list[dict[str, int]] = []


def whole(tensor: Tensor) -> Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def train(layout: str, options: dict[str, Any], steps: int = STEPS) -> Outcome:
    """Some steps from the same start on the same data."""
    net = model()
    LAYOUTS[layout][0](net)
    optimizer = DALS(net, **{**PLAIN, **options})
    wrapped = DistributedDataParallel(net) if layout == "ddp" else net
    phases, counts = [], []
    for x, y in batches(steps):
        loss = loss_of(wrapped, part(layout, x), part(layout, y))
        optimizer.zero_grad()
        loss.backward()
        with CommDebugMode() as communication:
            optimizer.step(loss=loss)
        counts.append({str(key): count for key, count in communication.get_comm_counts().items() if count})
        phases.append(optimizer.phases()[0])
    outcome = Outcome(net, optimizer)
    outcome.phases, outcome.counts = phases, counts
    return outcome


def train_variants(layout: str, variants: dict[str, dict[str, Any]], steps: int = STEPS) -> dict[str, Outcome]:
    return {name: train(layout, options, steps) for name, options in variants.items()}


@contextmanager
def local_norms() -> Iterator[None]:
    """The mistake that every plain LARS makes on shards: norms of what lies here."""
    real = dals_sharding.RowsOverRanks.sum_over_ranks
    dals_sharding.RowsOverRanks.sum_over_ranks = lambda self: None  # type: ignore[method-assign]
    try:
        yield
    finally:
        dals_sharding.RowsOverRanks.sum_over_ranks = real  # type: ignore[method-assign]


def train_with_local_norms(layout: str) -> Outcome:
    with local_norms():
        return train(layout, {"foreach": True})


def error(a: Outcome, b: Outcome) -> float:
    """Largest relative difference of any weight or state tensor, and of the loss's mean."""
    pairs = [(a.weights[name], b.weights[name]) for name in b.weights] + [(a.state[n], b.state[n]) for n in b.state]
    tensors = max(float((x - y).norm() / y.norm().clamp(min=1e-12)) for x, y in pairs)
    emas = a.run_state["loss_ema"], b.run_state["loss_ema"]
    return max(tensors, abs(emas[0] - emas[1]) / abs(emas[1]) if math.isfinite(emas[1]) else 0.0)


# -- what else may happen to a sharded optimizer ------------------------------------------------------------------


def loss_parallel_run() -> tuple[list[float], list[float]]:
    """Running means of losses that are DTensors, as loss_parallel has them, and of the same losses as plain tensors."""
    found: tuple[list[float], list[float]] = ([], [])
    for whole, means in zip((False, True), found, strict=True):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(4, 6))
        layout = ColwiseParallel(output_layouts=Shard(-1), use_local_output=False)
        parallelize_module(net, mesh_of(dist.get_world_size()), {"0": layout})
        optimizer = DALS(net)
        x, y = torch.randn(5, 4), torch.randint(6, (5,))
        for _ in range(3):
            optimizer.zero_grad()
            with loss_parallel():
                loss = cross_entropy(net(x), y)
                loss.backward()
            assert isinstance(loss, DTensor)
            optimizer.step(loss=loss.full_tensor() if whole else loss)
            means.append(optimizer.state_dict()["param_groups"][0]["loss_ema"])
    return found


def losses_of_some(counts: list[int]) -> list[float]:
    """Rank 0 alone has losses, so many before each step: weights of zero for the others. Returns E after each."""
    net = model()
    optimizer = DALS(net, **PLAIN)
    seen = []
    for step, count in enumerate(counts):
        for p in net.parameters():
            p.grad = torch.ones_like(p)
        for i in range(count if not dist.is_initialized() or dist.get_rank() == 0 else 0):
            optimizer.observe_loss(1.0 + step + 10 * i)
        optimizer.step()
        seen.append(optimizer.state_dict()["param_groups"][0]["loss_ema"])
    return seen


def overlap() -> list[Any]:
    """The kind of every event: a loss observed, a sum begun, a backward pass, a step."""
    net = model()
    optimizer = DALS(net, **PLAIN)
    events: list[str] = []
    real = dist.all_reduce

    def all_reduce(*arguments: Any, **keywords: Any) -> Any:
        events.append("begin" if keywords.get("async_op") else "sum")
        return real(*arguments, **keywords)

    dist.all_reduce = all_reduce
    try:
        for x, y in batches(4):
            loss = loss_of(net, x, y)
            optimizer.zero_grad()
            optimizer.observe_loss(loss)
            events.append("backward")
            loss.backward()
            events.append("step")
            optimizer.step()
    finally:
        dist.all_reduce = real
    return events


def without_some_gradients(layout: str, options: dict[str, Any], zeros: bool = False) -> Outcome:
    """Some gradients are missing everywhere, some on all ranks but one; ``zeros``: zeros stand for the latter."""
    net = model()
    LAYOUTS[layout][0](net)
    optimizer = DALS(net, **{**PLAIN, **options})
    rank = dist.get_rank() if dist.is_initialized() else 0
    for step, (x, y) in enumerate(batches(4)):
        loss = loss_of(net, part(layout, x), part(layout, y))
        optimizer.zero_grad()
        loss.backward()
        if step == 2:
            net.blocks[0].up.weight.grad = None
        if step != 1 and rank != 0:
            net.head.weight.grad = None
        if step != 1 and zeros:  # the first of four shards of three rows each, as far as eleven rows go
            assert net.head.weight.grad is not None
            net.head.weight.grad[3:] = 0
        optimizer.step(loss=loss)
    return Outcome(net, optimizer)


def gradients_that_are_sums(options: dict[str, Any]) -> tuple[list[Tensor], list[Tensor], list[str]]:
    """Replicated weights whose gradients are Partial: the weights after two steps, those of a plain run, placements."""
    from torch.distributed.tensor import Partial, Replicate, Shard, distribute_tensor

    mesh = mesh_of(dist.get_world_size())
    torch.manual_seed(3)
    values, grads = ([torch.randn(5, 4), torch.randn(7)] for _ in range(2))
    params = [
        nn.Parameter(distribute_tensor(v, mesh, [s])) for v, s in zip(values, (Replicate(), Shard(0)), strict=True)
    ]
    plain = [nn.Parameter(v.clone()) for v in values]
    optimizers = [DALS([(f"w{i}", p) for i, p in enumerate(ps)], **{**PLAIN, **options}) for ps in (params, plain)]
    for _ in range(2):
        for p, q, g in zip(params, plain, grads, strict=True):
            share = g * (2.0 if dist.get_rank() == 0 else -1.0 / (dist.get_world_size() - 1))
            p.grad = DTensor.from_local(share, mesh, [Partial()])
            q.grad = g.clone()
        for optimizer in optimizers:
            optimizer.step(loss=1.0)
    return [whole(p) for p in params], [whole(p) for p in plain], [str(p.grad.placements) for p in params]


def swapped(depth: Any) -> Outcome:
    """The optimizer is built before fully_shard, and its groups get the sharded parameters, as Accelerate does it."""
    net = model()
    rule = depth(net) if depth else "auto"
    optimizer = DALS([{"params": list(net.named_parameters())}], depth=rule, foreach=True, **PLAIN)
    names = {id(p): name for name, p in net.named_parameters()}
    fsdp(net)
    now = dict(net.named_parameters())
    for group in optimizer.param_groups:
        group["params"] = [now[names[id(p)]] for p in group["params"]]
    for x, y in batches(STEPS):
        loss = loss_of(net, part("fsdp", x), part("fsdp", y))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step(loss=loss)
    return Outcome(net, optimizer)


def scaled(layout: str, options: dict[str, Any]) -> tuple[Outcome, int]:
    """Unscaling and dropping inside the step; an overflow on one rank's shard alone drops the step on all."""
    net = model()
    LAYOUTS[layout][0](net)
    optimizer = DALS(net, amp_fused=True, **{**PLAIN, **options})
    scaler = torch.amp.GradScaler("cpu", init_scale=16.0, growth_interval=100, backoff_factor=0.5)
    for step, (x, y) in enumerate(batches(4)):
        loss = loss_of(net, part(layout, x), part(layout, y))
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        if step == 2 and (not dist.is_initialized() or dist.get_rank() == 0):
            grad = net.head.weight.grad
            local = grad.to_local() if isinstance(grad, DTensor) else grad
            assert local is not None
            local[0, 0] = math.inf
        scaler.step(optimizer, loss=loss)
        scaler.update()
    return Outcome(net, optimizer), optimizer.skipped_steps


def stages(options: dict[str, Any]) -> Any:
    """A pipeline of two stages by hand; each steps its own half of the model, and only the second has a loss."""
    whole_model = model(layers=2)
    options = {**PLAIN, **options}
    if not dist.is_initialized():
        optimizer = DALS(whole_model, **options)
        for x, y in batches(STEPS):
            loss = loss_of(whole_model, x, y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step(loss=loss)
        outcome = Outcome(whole_model, optimizer)
        outcome.phases = optimizer.phases()
        return outcome
    from fused_dals import infer_depths

    rank = dist.get_rank()
    depths = infer_depths(whole_model)
    net = whole_model
    first: list[tuple[str, nn.Parameter]] = []
    second: list[tuple[str, nn.Parameter]] = []
    for name, p in net.named_parameters():
        (second if name.startswith(("blocks.1.", "head.")) else first).append((name, p))
    optimizer = DALS((first, second)[rank], depth=depths, partition_group=dist.group.WORLD, **options)
    for x, y in batches(STEPS):
        optimizer.zero_grad()
        last: Tensor | None = None
        if rank == 0:
            hidden = net.blocks[0](net.embed(x) * net.gain.sum())
            dist.send(hidden.detach(), 1)
            back = torch.empty_like(hidden)
            dist.recv(back, 1)
            hidden.backward(back)
        else:
            received = torch.empty(BATCH, LENGTH, WIDTH)
            dist.recv(received, 0)
            received.requires_grad_()
            last = cross_entropy(net.head(net.blocks[1](received).flatten(0, 1)), y.flatten())
            last.backward()
            dist.send(received.grad, 0)
        optimizer.step(loss=last)
    return {name: p.detach().clone() for name, p in (first, second)[rank]}, optimizer.depths(), optimizer.phases()


def replicas_apart(how: str) -> str:
    """What the look at the replicas says after a mistake."""
    from fused_dals import check_replicas_every

    net = model(dist.get_rank() if how == "start" else 0)
    rank_local: Any = {"loss_group": False} if how == "loss" else {}
    optimizer = DALS(net, phase_thresholds=(0.01, 0.0), ema_decay=(0.1, 0.5, 0.9), **PLAIN, **rank_local)
    handle = check_replicas_every(optimizer, 2)
    try:
        for step, (x, y) in enumerate(batches(8)):
            loss = loss_of(net, part("ddp", x), part("ddp", y))
            optimizer.zero_grad()
            loss.backward()
            reduce_replicas("ddp", net)
            if how == "bit" and step == 3 and dist.get_rank() == 1:
                bias: Any = net.blocks[0].down.bias
                bias.data[3] += 1e-4
            optimizer.step(loss=loss)
    except RuntimeError as error:
        return f"step {step}: {error}"
    handle.remove()
    return ""


def replicas_of_hsdp() -> str:
    """The same for replicated shards: those of one replica are changed."""
    from fused_dals.replicas import check_replicas

    net = model()
    hsdp(net)
    optimizer = DALS(net, **PLAIN)
    check_replicas(optimizer)
    if dist.get_rank() in (2, 3):
        net.head.weight.to_local().detach().view(-1)[0] += 1  # type: ignore[attr-defined]
    try:
        check_replicas(optimizer)
    except RuntimeError as error:
        return str(error)
    return ""


def zero(options: dict[str, Any], resume: bool = False) -> tuple[dict[str, Tensor], Any]:
    """ZeroDALS over hand-made DDP; ``resume``: by way of a checkpoint, into a fresh one."""
    from fused_dals.zero import ZeroDALS

    net = model()
    optimizer = ZeroDALS(net, **{**PLAIN, **options})
    for step, (x, y) in enumerate(batches(STEPS)):
        if resume and step == SAVED:
            optimizer.consolidate_state_dict(to=0)
            box = [optimizer.state_dict() if dist.get_rank() == 0 else None]
            dist.broadcast_object_list(box)
            optimizer = ZeroDALS(net, **{**PLAIN, **options})
            optimizer.param_groups[0]["depth"] = 0.5  # which the checkpoint does not have
            optimizer.load_state_dict(box[0])
        loss = loss_of(net, part("ddp", x), part("ddp", y))
        optimizer.zero_grad()
        loss.backward()
        reduce_replicas("ddp", net)
        optimizer.step(loss=loss)
    optimizer.consolidate_state_dict(to=0)
    packed = optimizer.state_dict() if dist.get_rank() == 0 else None
    return {name: p.detach().clone() for name, p in net.named_parameters()}, packed


def zero_looked_into() -> dict[str, Any]:
    """What ZeroDALS says of itself after steps of which one was dropped."""
    from fused_dals.zero import ZeroDALS

    net = model()
    named = list(net.named_parameters())
    groups = [{"params": named[:3]}, {"params": named[3:], "lr": 0.02}]
    optimizer = ZeroDALS(groups, lr=0.1, skip_nonfinite=True)
    for bad in (False, True, False):
        for _, p in named:
            p.grad = torch.full_like(p, math.inf if bad else 1.0)
        optimizer.step(loss=1.0)
    return {
        "depths": optimizer.depths(),
        "phases": optimizer.phases(),
        "current_lr": optimizer.current_lr(),
        "skipped_steps": optimizer.skipped_steps,
        "trust_ratios": optimizer.trust_ratios(),
    }


def zero_with_repeated_names() -> list[str]:
    """What it warns of, where two groups have a name in common."""
    from fused_dals.zero import ZeroDALS

    halves = [torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        ZeroDALS([{"params": half.named_parameters()} for half in halves])
    return [str(one.message) for one in caught]


def refused_wrappers() -> dict[str, str]:
    """What is said of FSDP1, of ZeroRedundancyOptimizer around DALS, and of shards without a group."""
    from torch.distributed.fsdp import FullyShardedDataParallel
    from torch.distributed.optim import ZeroRedundancyOptimizer

    said = {}
    for original in (False, True):
        net = FullyShardedDataParallel(model(), device_id=torch.device("cpu"), use_orig_params=original)
        optimizer = DALS(net, **PLAIN)
        x, y = next(batches(1))
        loss_of(net, x, y).backward()
        before = [p.detach().clone() for p in net.parameters()]
        try:
            optimizer.step(loss=1.0)
        except RuntimeError as error:
            said[f"FSDP1 {original}"] = str(error)
        assert all(torch.equal(a, b) for a, b in zip(before, net.parameters(), strict=True)) and not optimizer.state
    try:
        ZeroRedundancyOptimizer(model().parameters(), DALS, lr=0.1)
    except TypeError as error:
        said["ZeRO"] = str(error)
    return said


# -- where ranks might part ways ----------------------------------------------------------------------------------


def loading_under_way() -> list[float]:
    """Rank 0 alone has losses, and a sum is on its way when the state is loaded. E after every step."""
    net = model()
    optimizer = DALS(net, foreach=True, **PLAIN)
    seen = []
    for step in range(6):
        for p in net.parameters():
            p.grad = torch.ones_like(p)
        if dist.get_rank() == 0:
            optimizer.observe_loss(1.0 + step)
        if step == 3:
            optimizer.load_state_dict(optimizer.state_dict())
        optimizer.step()
        seen.append(optimizer.state_dict()["param_groups"][0]["loss_ema"])
    return seen


def after_the_end() -> list[float]:
    """torch.distributed is ended with a sum on its way: the loss is not lost, and the run goes on by itself."""
    net = model()
    optimizer = DALS(net, foreach=True, **PLAIN)
    seen = []
    for step in range(5):
        for p in net.parameters():
            p.grad = torch.ones_like(p)
        optimizer.observe_loss(1.0 + step)
        if step == 3:
            dist.barrier()
            dist.destroy_process_group()
        optimizer.step()
        seen.append(optimizer.state_dict()["param_groups"][0]["loss_ema"])
    return seen


def first_step_at_rest(options: dict[str, Any]) -> list[int]:
    """lr 0 in the first step, as a warm-up has it; the gradients of one rank are zeros, the other has the loss."""
    groups = {key: dist.group.WORLD for key in options}
    p, q = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    optimizer = DALS([("w", p)], lr=0.0, depth=0.5, **groups)
    for step in range(2):
        p.grad = torch.zeros(3) if dist.get_rank() == 0 and step == 0 else torch.ones(3)
        optimizer.step(loss=1.0 if dist.get_rank() == 1 else None)
        optimizer.param_groups[0]["lr"] = 0.1
    idle = DALS([("w", q)], lr=0.0, depth=0.5, **groups)
    q.grad = torch.zeros(3)
    idle.step()
    return [some.state_dict()["param_groups"][0]["step"] for some in (optimizer, idle)]


def unfreezing(options: dict[str, Any]) -> list[Tensor]:
    """A shard is unfrozen, and one rank alone has a gradient for it."""
    from torch.distributed.tensor import Shard, distribute_tensor

    mesh = mesh_of(dist.get_world_size())
    a, b = (nn.Parameter(distribute_tensor(torch.ones(8, 4), mesh, [Shard(0)])) for _ in range(2))
    b.requires_grad_(False)
    optimizer = DALS([("a", a), ("b", b)], depth=0.5, **options)
    for step in range(4):
        a.grad = distribute_tensor(torch.ones(8, 4), mesh, [Shard(0)])
        if step == 2:
            b.requires_grad_(True)
            b.grad = distribute_tensor(torch.ones(8, 4), mesh, [Shard(0)])
            b.grad = b.grad if dist.get_rank() == 0 else None
        optimizer.step(loss=1.0)
    return [whole(a), whole(b)]


def gradient_elsewhere() -> str:
    """A gradient on another mesh, whose shard has the same shape."""
    from torch.distributed.tensor import Partial, Replicate, distribute_tensor

    mesh, other = mesh_of(dist.get_world_size()), mesh_of(dist.get_world_size(), 1)
    p = nn.Parameter(distribute_tensor(torch.ones(4), mesh, [Replicate()]))
    optimizer = DALS([("p", p)], depth=0.5)
    try:
        p.grad = DTensor.from_local(torch.ones(4) * (1 + dist.get_rank()), other, [Partial(), Replicate()])
        optimizer.step(loss=1.0)
    except RuntimeError as error:
        return str(error)
    return ""


def dropped(layout: str, options: dict[str, Any]) -> tuple[int, dict[str, float], dict[str, float]]:
    """A NaN on one rank alone: steps dropped, and the ratios before and after."""
    net = model()
    LAYOUTS[layout][0](net)
    groups = {"partition_group": dist.group.WORLD} if layout == "ddp" else {}
    optimizer = DALS(net, skip_nonfinite=True, **{**PLAIN, **options}, **groups)
    for step, (x, y) in enumerate(batches(2)):
        before = optimizer.trust_ratios()
        loss = loss_of(net, part(layout, x), part(layout, y))
        optimizer.zero_grad()
        loss.backward()
        if step == 1 and dist.get_rank() == 0:
            grad: Any = net.head.weight.grad
            (grad.to_local() if isinstance(grad, DTensor) else grad)[0, 0] = math.nan
        optimizer.step(loss=loss)
    return optimizer.skipped_steps, before, optimizer.trust_ratios()


# -- checkpoints --------------------------------------------------------------------------------------------------

#: How the optimizer's state is saved: as shards, as whole tensors, with one flat dict of names.
FORMS: dict[str, dict[str, Any]] = {
    "sharded": {},
    "full": {"full_state_dict": True, "cpu_offload": True},
    "flattened": {"flatten_optimizer_state_dict": True},
}


def run_and_save(layout: str, options: dict[str, Any], folder: str, forms: list[str]) -> Outcome:
    """A run that is saved on its way in several forms."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict

    net = model()
    LAYOUTS[layout][0](net)
    optimizer = DALS(net, **{**PLAIN, **options})
    for step, (x, y) in enumerate(batches(STEPS)):
        if step == SAVED:
            for form in forms:
                weights, state = get_state_dict(net, optimizer, options=StateDictOptions(**FORMS[form]))
                if form != "full":
                    dcp.state_dict_saver.save({"model": weights, "optimizer": state}, checkpoint_id=f"{folder}/{form}")
                elif dist.get_rank() == 0:
                    torch.save({"model": weights, "optimizer": state}, f"{folder}/full.pt")
        loss = loss_of(net, part(layout, x), part(layout, y))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step(loss=loss)
    return Outcome(net, optimizer)


def resume(layout: str, options: dict[str, Any], folder: str, form: str) -> Outcome:
    """The rest of it, from the checkpoint, in a fresh model and optimizer."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import (
        StateDictOptions,
        get_state_dict,
        set_model_state_dict,
        set_optimizer_state_dict,
    )

    net = model(5)
    LAYOUTS[layout][0](net)
    optimizer = DALS(net, **{**PLAIN, "lr": 0.5, **options})
    if form == "full":
        # Weights are spread from the first rank, the optimizer's state is read by all: both ways are in use.
        saved = torch.load(f"{folder}/full.pt", weights_only=False)
        how = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    else:
        how = StateDictOptions(**FORMS[form])
        weights, state = get_state_dict(net, optimizer, options=how)
        saved = {"model": weights, "optimizer": state}
        dcp.state_dict_loader.load(saved, checkpoint_id=f"{folder}/{form}")
    set_model_state_dict(net, saved["model"] if form != "full" or dist.get_rank() == 0 else {}, options=how)
    if form == "full":
        how = StateDictOptions(full_state_dict=True)
    set_optimizer_state_dict(net, optimizer, saved["optimizer"], options=how)
    for step, (x, y) in enumerate(batches(STEPS)):
        if step < SAVED:
            continue
        loss = loss_of(net, part(layout, x), part(layout, y))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step(loss=loss)
    return Outcome(net, optimizer)
