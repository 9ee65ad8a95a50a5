"""Functions on two to four processes that form a gloo group on the CPU: what every sharded case is tested with."""

from __future__ import annotations

import io
import multiprocessing
import os
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection
from typing import Any

import torch

from fused_dals.host_walk import HOST_WALK

#: Seconds that a group of processes may take; the slowest test takes some twenty on two cores.
PATIENCE = 120

#: Processes of one machine need no name service, which a machine without a network lacks.
LOOPBACK = {"GLOO_SOCKET_IFNAME": "lo"} if os.path.exists("/sys/class/net/lo") else {}

#: The server that the processes are forked from imports torch once for all of them.
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["tests.sharded_runs"])


def on_ranks(world: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """What ``function(*arguments)`` returns on each of ``world`` ranks; an error on any rank is an error here.

    ``function`` is pickled by name.
    """
    with tempfile.TemporaryDirectory() as folder:
        store = os.path.join(folder, "store")
        pipes, processes = [], []
        for rank in range(world):
            ours, theirs = _context.Pipe(duplex=False)
            given = (rank, world, store, theirs, function, arguments)
            process = _context.Process(target=_rank, args=given, daemon=True)
            process.start()
            theirs.close()
            pipes.append(ours)
            processes.append(process)
        try:
            return _collect(pipes)
        finally:
            for process in processes:
                process.kill()
                process.join()


def _collect(pipes: list[Connection]) -> list[Any]:
    """Results by rank; the first failure ends it, as the other ranks would wait for the one that failed."""
    results: dict[int, Any] = {}
    end = time.monotonic() + PATIENCE
    while len(results) < len(pipes):
        waiting = {pipe: rank for rank, pipe in enumerate(pipes) if rank not in results}
        ready = multiprocessing.connection.wait(list(waiting), max(0.0, end - time.monotonic()))
        if not ready:
            raise TimeoutError(f"ranks {sorted(waiting.values())} have not answered in {PATIENCE} s")
        for pipe in ready:
            assert isinstance(pipe, Connection)
            try:
                failed, value = torch.load(io.BytesIO(pipe.recv_bytes()), weights_only=False)
            except EOFError:
                failed, value = True, "the process is gone"
            if failed:
                raise RuntimeError(f"rank {waiting[pipe]}: {value}")
            results[waiting[pipe]] = value
    return [results[rank] for rank in range(len(pipes))]


def _rank(
    rank: int, world: int, store: str, pipe: Connection, function: Callable[..., Any], arguments: tuple[Any, ...]
) -> None:
    torch.set_num_threads(1)
    os.environ |= {
        "RANK": str(rank),
        "WORLD_SIZE": str(world),
        "LOCAL_RANK": str(rank),
        "TRITON_INTERPRET": "1",
        **LOOPBACK,
    }
    if rank % 2 == 0:
        HOST_WALK.want(wait=True)  # whether a rank has it is its own affair
    try:
        torch.distributed.init_process_group(
            "gloo", init_method=f"file://{store}", rank=rank, world_size=world, timeout=timedelta(seconds=PATIENCE)
        )
        _send(pipe, (False, function(*arguments)))
        torch.distributed.destroy_process_group()
    except BaseException:
        _send(pipe, (True, traceback.format_exc()))


def _send(pipe: Connection, answer: Any) -> None:
    # As bytes: tensors in shared memory would be gone with the process.
    file = io.BytesIO()
    torch.save(answer, file)
    pipe.send_bytes(file.getvalue())
