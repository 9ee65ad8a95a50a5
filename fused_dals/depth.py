"""The depth of a parameter: 0 at the input of the model, 1 at its output. SPEC, section "Depth".

A depth is read off names, because names carry the order in which modules were registered, and that order follows
the data through the model for nearly every published architecture.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from graphlib import CycleError, TopologicalSorter
from itertools import pairwise
from typing import Literal

from torch import nn

#: The names under which wrappers hold what they wrap: DistributedDataParallel and DataParallel, torch.compile.
WRAPPED = ("module", "_orig_mod")


class Depths(dict[str, float]):
    """Depths of all parameters of a model by name, of which an optimizer may hold a part, as pipeline stages do."""

    def of(self, names: Iterable[str]) -> dict[str, float]:
        """The depths of those ``names`` that it knows, be they of the model or of it or its modules in wrappers."""
        names = list(names)
        found = {name: self[name] for name in names if name in self}
        if len(found) < len(names):
            by_plain_name: dict[str, set[float]] = {}
            for name, depth in self.items():
                by_plain_name.setdefault(plain_name(name), set()).add(depth)
            for name in names:
                depths = by_plain_name.get(plain_name(name), ())
                if name not in found and len(depths) == 1:  # of several modules that only wrappers tell apart, none
                    found[name] = min(depths)
        return found


def plain_name(name: str) -> str:
    """A parameter's name without the parts that wrappers put in, at its beginning or inside."""
    return ".".join(part for part in name.split(".") if part not in WRAPPED)


def unwrapped(model: nn.Module) -> tuple[nn.Module, str]:
    """What wrappers around a model hold, and what they put before its names."""
    prefix = ""
    while True:
        children = dict(model.named_children())
        if len(children) != 1 or any(True for _ in model.parameters(recurse=False)):
            return model, prefix
        ((name, child),) = children.items()
        if name not in WRAPPED:
            return model, prefix
        model, prefix = child, f"{prefix}{name}."


def infer_depths(model: nn.Module, granularity: Literal["modules", "children"] = "modules") -> Depths:
    """Depth in [0, 1] of every parameter of ``model`` by its name, in registration order.

    Args:
        model: the whole model, so that depths are scaled over all of it.
        granularity: ``"modules"`` (default) ranks the modules that own a parameter themselves, in registration
            order; it is what ``depth="auto"`` does. ``"children"`` is the paper's rule, d = i / (C - 1) over the C
            direct children of the model; parameters of the model itself, which come before its children, get 0.

    For a pipeline stage or any other part of a model, give the whole model here (on the meta device, say), and the
    result to the optimizer of the part. A single module or child has depth 0.5. Tied parameters have one name, that of
    their first owner. Wrappers (DistributedDataParallel, DataParallel, torch.compile) change no depth, around
    this model or around the one whose names the optimizer is given.

    Raises:
        TypeError: model is not a module. ValueError: unknown granularity.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"infer_depths: model must be a torch.nn.Module, got {type(model).__name__}")
    names = [name for name, _ in model.named_parameters()]
    if granularity == "modules":
        return Depths(depths_from_names([names]))
    if granularity == "children":
        model, prefix = unwrapped(model)
        children = [name for name, _ in model.named_children()]
        depth_of_child = dict(zip(children, evenly_spaced(len(children)), strict=True))
        depth_of_root = 0.0 if children else 0.5
        return Depths(
            {name: depth_of_child.get(name.removeprefix(prefix).split(".")[0], depth_of_root) for name in names}
        )
    raise ValueError(f"infer_depths: granularity must be 'modules' or 'children', got {granularity!r}")


def depths_from_names(groups: Sequence[Iterable[str]]) -> dict[str, float]:
    """Depth of every parameter name: the rank of its owning module, scaled to [0, 1].

    Names form a tree (``layers.0.attn.weight`` is owned by ``layers.0.attn``), walked with a module before its children
    and the children of a module in the order of the names. For one list in registration order that is the registration
    order. Where the names come in several groups, as with decay and no-decay groups, each group's order holds, and
    what the groups leave open goes by the place within each group: exact where modules of one group frame those of
    another, a guess where nothing does (a head in a group of its own).
    """
    owner_of = {name: name.rpartition(".")[0] for group in groups for name in group}
    children: dict[str, list[list[str]]] = {}
    for group in groups:
        tree: dict[str, dict[str, None]] = {}
        for name in group:
            parts = owner_of[name].split(".") if owner_of[name] else []
            for i in range(len(parts)):
                tree.setdefault(".".join(parts[:i]), {}).setdefault(".".join(parts[: i + 1]))
        for parent, found in tree.items():
            children.setdefault(parent, []).append(list(found))

    owners, ordered, stack = set(owner_of.values()), [], [""]
    while stack:
        module = stack.pop()
        if module in owners:
            ordered.append(module)
        stack.extend(reversed(_merged(children.get(module, []))))
    depth_of_owner = dict(zip(ordered, evenly_spaced(len(ordered)), strict=True))
    return {name: depth_of_owner[owner] for name, owner in owner_of.items()}


def _merged(sequences: Sequence[Sequence[str]]) -> list[str]:
    """One order that keeps that of every sequence; what they leave open goes by the mean place within them."""
    places: dict[str, list[float]] = {}
    graph: TopologicalSorter[str] = TopologicalSorter()
    for sequence in sequences:
        for i, item in enumerate(sequence):
            places.setdefault(item, []).append((i + 0.5) / len(sequence))
            graph.add(item)
        for before, after in pairwise(sequence):
            graph.add(after, before)
    first_seen = list(places)
    try:
        graph.prepare()
    except CycleError:  # groups that contradict each other: nothing better than the order of appearance
        return first_seen
    rank = {item: (sum(places[item]) / len(places[item]), i) for i, item in enumerate(first_seen)}
    ordered: list[str] = []
    ready: list[str] = []
    while graph.is_active():
        ready = sorted([*ready, *graph.get_ready()], key=rank.__getitem__)
        if ready:
            ordered.append(ready.pop(0))
            graph.done(ordered[-1])
    return ordered


def evenly_spaced(count: int) -> list[float]:
    """``count`` depths from 0 to 1; 0.5 for a single one."""
    return [0.5] if count == 1 else [i / (count - 1) for i in range(count)]
