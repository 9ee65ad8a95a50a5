"""A small GPT on bytes, trained with FSDP2 and DALS: checkpoints, resuming, a progress bar, a learning curve.

    torchrun --nproc-per-node 2 examples/train_fsdp2.py --steps 200
    torchrun --nproc-per-node 4 examples/train_fsdp2.py --steps 400 --resume

runs on as many processes as there are GPUs, or on the CPU where there are none. The text is the source code of Python's
own standard library, so nothing is downloaded. A run may be resumed on another number of processes; on the same number
it goes on to the same bits.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import sysconfig
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.functional import cross_entropy, gelu, scaled_dot_product_attention

from fused_dals import DALS

CONTEXT = 128


class Block(nn.Module):
    """Attention and a perceptron, each added to what came in."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        # Attention does not depend on a bias of the keys: DALS would make whole steps of its rounding errors.
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            some.unflatten(-1, (self.heads, -1)).transpose(1, 2) for some in self.qkv(self.norm1(x)).chunk(3, dim=-1)
        )
        x = x + self.out(scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        out: Tensor = x + self.down(gelu(self.up(self.norm2(x))))
        return out


class GPT(nn.Module):
    """Logits [batch * length, 256] of the next byte from bytes [batch, length]."""

    def __init__(self, width: int, layers: int, heads: int) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(256, width), nn.Embedding(CONTEXT, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 256)

    def forward(self, x: Tensor) -> Tensor:
        h = self.tokens(x) + self.places(torch.arange(x.shape[1], device=x.device))
        for block in self.blocks:
            h = block(h)
        out: Tensor = self.head(self.norm(h).flatten(0, 1))
        return out


def text() -> Tensor:
    """Two million bytes of the standard library's modules, in alphabetical order."""
    parts, size = [], 0
    for file in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        parts.append(file.read_bytes())
        size += len(parts[-1])
        if size > 2_000_000:
            break
    return torch.frombuffer(bytearray(b"".join(parts)), dtype=torch.uint8)


def batch_of(data: Tensor, step: int, size: int) -> tuple[Tensor, Tensor]:
    """This rank's part of a step's batch: what it is depends on step and rank alone, so that a run can be resumed."""
    generator = torch.Generator().manual_seed(step * 100_003 + dist.get_rank())
    starts = torch.randint(len(data) - CONTEXT - 1, (size,), generator=generator)
    rows = torch.stack([data[start : start + CONTEXT + 1] for start in starts.tolist()]).long()
    return rows[:, :-1], rows[:, 1:].flatten()


def train(arguments: argparse.Namespace, device: torch.device) -> None:
    """The loop; everything that is printed or plotted comes from rank 0."""
    torch.manual_seed(0)
    model = GPT(arguments.width, arguments.layers, heads=4).to(device)
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = DALS(model, lr=arguments.lr, momentum=0.9, total_steps=arguments.steps)

    first_rank = dist.get_rank() == 0
    history_file = arguments.out / "history.json"
    history: dict[str, list[Any]] = {"loss": [], "phase": []}
    if arguments.resume and not history_file.exists():
        raise SystemExit(f"--resume: {history_file} is not there; run without --resume first")
    if not arguments.resume and first_rank:  # a run of its own: nothing of an older one is to be gone on from
        history_file.unlink(missing_ok=True)
        for old in arguments.out.glob("step-*"):
            shutil.rmtree(old)
    dist.barrier()
    if arguments.resume:
        history = json.loads(history_file.read_text())
        weights, state = get_state_dict(model, optimizer)
        load({"model": weights, "optimizer": state}, checkpoint_id=checkpoint(arguments, len(history["loss"])))
        set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=state)
        for group in optimizer.param_groups:
            group["total_steps"] = arguments.steps  # the checkpoint's would win
    first = len(history["loss"])

    from tqdm import tqdm

    data, began = text(), time.perf_counter()
    bar = tqdm(range(first, arguments.steps), disable=not first_rank, unit="step")
    for step in bar:
        x, y = (some.to(device) for some in batch_of(data, step, arguments.batch))
        loss = cross_entropy(model(x), y)
        optimizer.zero_grad()
        optimizer.observe_loss(loss)  # the mean over the ranks is on its way while backward runs
        loss.backward()
        optimizer.step()
        mean = loss.detach().clone()
        dist.all_reduce(mean)
        history["loss"].append(float(mean) / dist.get_world_size())
        history["phase"].append(optimizer.phases()[0])
        bar.set_postfix(loss=f"{history['loss'][-1]:.3f}", phase=history["phase"][-1], refresh=False)
        if (step + 1) % arguments.save_every == 0 or step + 1 == arguments.steps:
            weights, state = get_state_dict(model, optimizer)
            save({"model": weights, "optimizer": state}, checkpoint_id=checkpoint(arguments, step + 1))
            if first_rank:  # only now is it the one to go on from; the last two are kept
                unfinished = history_file.with_suffix(".part")
                unfinished.write_text(json.dumps(history))
                os.replace(unfinished, history_file)
                for old in sorted(arguments.out.glob("step-*"))[:-2]:
                    shutil.rmtree(old)
    if first_rank:
        report(model, history, first, time.perf_counter() - began, arguments, device)


def checkpoint(arguments: argparse.Namespace, step: int) -> Path:
    """The folder of the checkpoint after so many steps."""
    folder: Path = arguments.out / f"step-{step:06d}"
    return folder


def report(
    model: nn.Module, history: dict[str, list[Any]], first: int, seconds: float, arguments: Any, device: torch.device
) -> None:
    """A line, and the learning curve as a figure."""
    parameters = sum(p.numel() for p in model.parameters())
    steps, last = len(history["loss"]) - first, history["loss"][-20:]
    print(
        f"{dist.get_world_size()} processes ({device.type}), {parameters:,} parameters, steps {first + 1} to "
        f"{len(history['loss'])}: loss {history['loss'][0]:.3f} -> {sum(last) / max(1, len(last)):.3f} nats a byte "
        f"(uniform: {math.log(256):.3f}), {seconds / max(1, steps):.3f} s a step; curve: {arguments.out / 'loss.png'}"
    )
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4), constrained_layout=True)
    numbers = range(1, len(history["loss"]) + 1)
    axes.plot(numbers, history["loss"], color="#1f77b4", linewidth=1)
    for phase, (name, colour) in enumerate(
        (("exploration", "#d62728"), ("exploitation", "#7f7f7f"), ("refinement", "#2ca02c"))
    ):
        at = [step for step, seen in zip(numbers, history["phase"], strict=True) if seen == phase]
        axes.plot(at, [history["loss"][step - 1] for step in at], ".", markersize=4, color=colour, label=name)
    axes.set(xlabel="step", ylabel="loss, nats a byte", title="Small GPT, FSDP2 and DALS")
    axes.legend(title="phase", frameon=False)
    axes.grid(alpha=0.3)
    figure.savefig(arguments.out / "loss.png", dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200, help="of the whole run, those before --resume included")
    parser.add_argument("--batch", type=int, default=8, help="rows per process")
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--lr", type=float, default=0.03)
    parser.add_argument("--save-every", type=int, default=50)
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint in --out")
    parser.add_argument("--out", type=Path, default=Path("out/fsdp2"))
    arguments = parser.parse_args()
    missing = [name for name in ("matplotlib", "tqdm") if find_spec(name) is None]
    if missing:
        raise SystemExit(f"error: {', '.join(missing)} missing: pip install '.[demo]'")
    arguments.out.mkdir(parents=True, exist_ok=True)
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    else:
        device = torch.device("cpu")
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        train(arguments, device)
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
