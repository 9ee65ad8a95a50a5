"""What sharding adds to a step, by arithmetic: collectives, bytes and time by parallel layout. Nothing is measured."""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from bench.table import format_table

#: float64 sums of squares of p and u, and the number of ranks with a gradient.
BYTES_PER_TENSOR = 24
#: Sum and count of the losses.
BYTES_OF_LOSS = 16
#: The pass reads and writes this much per float32 parameter where stage B finds nothing in the cache.
BYTES_PER_PARAMETER = 36


@dataclass(frozen=True)
class Links:
    """Assumptions, of which every reader has others."""

    node: int = 8  # GPUs that reach each other by the faster link
    node_latency: float = 3e-6  # seconds a hop
    node_bandwidth: float = 300e9  # bytes a second and GPU
    net_latency: float = 8e-6
    net_bandwidth: float = 40e9
    memory_bandwidth: float = 4e12


@dataclass(frozen=True)
class Ranks:
    """A process group: nodes that it spans, and ranks of it in each."""

    nodes: int
    each: int

    @property
    def count(self) -> int:
        return self.nodes * self.each

    def bandwidth(self, links: Links) -> float:
        """That of the slowest link on its way."""
        return links.node_bandwidth if self.nodes == 1 else links.net_bandwidth

    def all_reduce_seconds(self, size: float, links: Links) -> float:
        """2 log2(P) hops up and down a tree, and 2 (P - 1) / P of the bytes through the slowest link."""
        latency = 2 * math.ceil(math.log2(self.each)) * links.node_latency
        latency += 2 * math.ceil(math.log2(self.nodes)) * links.net_latency
        return latency + 2 * (self.count - 1) / self.count * size / self.bandwidth(links)


def all_of(gpus: int, links: Links) -> Ranks:
    """All GPUs, in full nodes."""
    return Ranks(max(1, gpus // links.node), min(gpus, links.node))


def layouts(gpus: int, links: Links) -> Iterator[tuple[str, tuple[Ranks, ...]]]:
    """Name, and the groups that a tensor is split over, FSDP's first: replicas a node, or tensor parallelism in one."""
    everybody = all_of(gpus, links)
    nodes, each = everybody.nodes, everybody.each
    yield "DDP", ()
    yield "FSDP2", (everybody,)
    if nodes > 1:
        yield f"HSDP ({each} shards)", (Ranks(1, each),)
        yield f"TP {each} + FSDP2", (Ranks(nodes, 1), Ranks(1, each))


def rows_of(gpus: int, parameters: float, tensors: int, links: Links) -> Iterator[list[str]]:
    """A row per layout: collectives and bytes of norms, their time, that of the loss, the pass, and FSDP2's own."""
    for name, splits in layouts(gpus, links):
        share = parameters / math.prod(group.count for group in splits)
        norms = sum(group.all_reduce_seconds(BYTES_PER_TENSOR * tensors, links) for group in splits)
        loss = all_of(gpus, links).all_reduce_seconds(BYTES_OF_LOSS, links)
        update = share * BYTES_PER_PARAMETER / links.memory_bandwidth
        # Two all-gathers in bfloat16 and a reduce-scatter in float32 of what FSDP's group holds together.
        moved = [(group.count - 1) * share * (2 * 2 + 4) / group.bandwidth(links) for group in splits[:1]]
        yield [
            str(gpus),
            name,
            str(len(splits)),
            f"{BYTES_PER_TENSOR * tensors * len(splits) / 1024:.1f}",
            f"{norms * 1e6:.0f}",
            f"{loss * 1e6:.0f}",
            f"{update * 1e6:.0f}",
            *([f"{seconds * 1e3:.0f}" for seconds in moved] or ["-"]),
        ]


HEADERS = ["GPUs", "layout", "sums of norms", "KiB", "us", "us of the loss", "us of the pass", "ms of FSDP2 itself"]


def report(gpus: list[int], parameters: float, tensors: int, links: Links) -> str:
    """The table for a model, float32 weights and state."""
    rows = [row for count in gpus for row in rows_of(count, parameters, tensors, links)]
    return format_table(HEADERS, rows)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench sharding", description=__doc__)
    parser.add_argument("--parameters", type=float, default=6.7e9, help="of the whole model (Llama-7B)")
    parser.add_argument("--tensors", type=int, default=291)
    parser.add_argument("--gpus", type=int, nargs="+", default=[8, 64, 1024])
    for name, value in Links().__dict__.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(value), default=value)
    arguments = parser.parse_args(argv)
    node = arguments.node
    wrong = [count for count in arguments.gpus if count < 1 or (count > node and count % node)]
    if node < 1 or wrong:
        parser.error(f"--gpus: {wrong or arguments.gpus} do not fill nodes of {node}")
    links = Links(**{name: getattr(arguments, name) for name in Links().__dict__})
    print("Predicted, from the assumed links; nothing here is measured.\n")
    print(report(arguments.gpus, arguments.parameters, arguments.tensors, links))
    return 0
