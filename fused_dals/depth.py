"""The depth of a parameter: 0 at the input of the model, 1 at its output. SPEC, section "Depth".

A depth is read off names, because names carry the order in which modules were registered, and that order follows
the data through the model for nearly every published architecture.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from numbers import Real
from typing import Literal, TypeAlias

from torch import Tensor, nn

#: ``"auto"``, a depth for all, ``{name or regular expression: depth}``, or ``f(name, param) -> depth``.
DepthRule: TypeAlias = str | float | Mapping[str, float] | Callable[[str, Tensor], float]


def infer_depths(model: nn.Module, granularity: Literal["modules", "children"] = "modules") -> dict[str, float]:
    """Depth in [0, 1] of every parameter of ``model`` by its name, in registration order.

    Args:
        model: the whole model, so that depths are scaled over all of it.
        granularity: ``"modules"`` (default) ranks the modules that own a parameter themselves, in registration
            order; it is what ``depth="auto"`` does. ``"children"`` is the paper's rule, d = i / (C - 1) over the C
            direct children of the model; parameters of the model itself, which come before its children, get 0.

    A single module or child has depth 0.5. Tied parameters have one name, that of their first owner.

    Raises:
        TypeError: model is not a module. ValueError: unknown granularity.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"infer_depths: model must be a torch.nn.Module, got {type(model).__name__}")
    names = [name for name, _ in model.named_parameters()]
    if granularity == "modules":
        return depths_from_names(names)
    if granularity == "children":
        children = [name for name, _ in model.named_children()]
        depth_of_child = dict(zip(children, _evenly_spaced(len(children)), strict=True))
        depth_of_root = 0.0 if children else 0.5
        return {name: depth_of_child.get(name.split(".")[0], depth_of_root) for name in names}
    raise ValueError(f"infer_depths: granularity must be 'modules' or 'children', got {granularity!r}")


def depths_from_names(names: Iterable[str]) -> dict[str, float]:
    """Depth of every parameter name: the rank of its owning module, scaled to [0, 1].

    Names form a tree (``layers.0.attn.weight`` is owned by ``layers.0.attn``), walked in order of first appearance,
    a module before its children. For names in registration order that is the registration order itself; names that
    were split over groups, as with decay and no-decay groups, fall back into it, block by block.
    """
    owner_of = {name: name.rpartition(".")[0] for name in names}
    owners = set(owner_of.values())
    tree: dict[str, dict[str, None]] = {"": {}}
    for owner in owner_of.values():
        parts = owner.split(".") if owner else []
        for i in range(len(parts)):
            parent, child = ".".join(parts[:i]), ".".join(parts[: i + 1])
            tree[parent].setdefault(child)
            tree.setdefault(child, {})

    ordered, stack = [], [""]
    while stack:
        module = stack.pop()
        if module in owners:
            ordered.append(module)
        stack.extend(reversed(tree[module]))
    depth_of_owner = dict(zip(ordered, _evenly_spaced(len(ordered)), strict=True))
    return {name: depth_of_owner[owner] for name, owner in owner_of.items()}


def check_depth_keys(rule: DepthRule, names: Iterable[str]) -> None:
    """Raise ValueError unless every key of a dict of depths names one of ``names``, or matches one as an expression."""
    if not isinstance(rule, Mapping):
        return
    known = set(names)
    for key in rule:
        if key in known:
            continue
        try:
            if any(re.fullmatch(key, name) for name in known):
                continue
        except re.error as error:
            raise ValueError(f"depth: key {key!r} is no parameter name and no regular expression: {error}") from None
        examples = ", ".join(map(repr, sorted(known)[:3]))
        raise ValueError(
            f"depth: key {key!r} matches no parameter. A key is a parameter's name, or a regular expression that "
            f"matches whole names; names here are like {examples}."
        )


def explicit_depths(
    rule: Mapping[str, float] | Callable[[str, Tensor], float], labelled: Iterable[tuple[str, Tensor]]
) -> dict[str, float]:
    """What a dict or a callable says of the (label, parameter) pairs; one that a dict does not cover is left out.

    In a dict an exact name wins over a regular expression (``re.fullmatch``), and an earlier one over a later.
    """
    if not isinstance(rule, Mapping):
        return {label: check_depth(rule(label, param), label) for label, param in labelled}
    found = {}
    for label, _ in labelled:
        keys = [label] if label in rule else [key for key in rule if _matches(key, label)]
        if keys:
            found[label] = check_depth(rule[keys[0]], label)
    return found


def _matches(expression: str, name: str) -> bool:
    try:
        return re.fullmatch(expression, name) is not None
    except re.error:  # another parameter's literal name, or a mistake that check_depth_keys reports
        return False


def check_depth(depth: object, label: str) -> float:
    """``depth`` as a float, or an error that names whose it is."""
    if isinstance(depth, bool) or not isinstance(depth, Real):
        raise TypeError(f"depth of {label!r} must be a number in [0, 1], got {depth!r}")
    if not 0.0 <= float(depth) <= 1.0:
        raise ValueError(f"depth of {label!r} must be in [0, 1], got {depth!r}")
    return float(depth)


def _evenly_spaced(count: int) -> list[float]:
    return [0.5] if count == 1 else [i / (count - 1) for i in range(count)]


class DepthMap:
    """The depth of every parameter of an optimizer, by its label, as groups come and parameters are swapped.

    Nothing is kept per tensor: wrappers replace parameters after an optimizer is built, names and positions stay.
    """

    def __init__(self, rule: DepthRule = "auto", names: Iterable[str] = ()) -> None:
        """``rule`` serves groups without one of their own; ``names`` are those of the full model, where known."""
        self.rule = check_rule(rule)
        self._explicit: dict[str, float] = {}
        self._auto = depths_from_names(names)

    @property
    def names(self) -> Iterable[str]:
        """Every parameter name met so far, in order."""
        return self._auto.keys()

    def learn_names(self, names: Iterable[str]) -> None:
        """Scale anew over all names known when a new one appears."""
        if any(name not in self._auto for name in names):
            self._auto = depths_from_names([*self._auto, *names])

    def learn_rule(self, rule: DepthRule, labelled: Iterable[tuple[str, Tensor]]) -> None:
        """Keep what a dict or a callable says of these parameters."""
        if isinstance(rule, Mapping) or callable(rule):
            self._explicit |= explicit_depths(rule, labelled)

    def ranks_positions(self, labelled: Iterable[tuple[str, Tensor]], fixed: float | None) -> bool:
        """Whether some parameter of an unnamed group gets its depth from its place in the group alone."""
        return fixed is None and any(label not in self._explicit for label, _ in labelled)

    def of_group(self, labels: Sequence[str], names: Sequence[str] | None, fixed: float | None) -> list[float]:
        """Depths of a group's parameters: ``group["depth"]``, else the rule's word, else the rank of the module.

        ``labels`` has one entry per parameter; ``names`` is None where parameters have no names.
        """
        if fixed is not None:
            return [float(fixed)] * len(labels)
        if names is None:
            auto = _evenly_spaced(len(labels))
        else:
            self.learn_names(names)
            auto = [self._auto[name] for name in names]
        if not self._explicit:
            return auto
        return [self._explicit.get(label, d) for label, d in zip(labels, auto, strict=True)]


def check_rule(rule: object) -> DepthRule:
    """``rule`` itself, or an error if it is none of the forms a depth rule has."""
    if isinstance(rule, str) and rule != "auto":
        raise ValueError(f"depth must be 'auto', a number, a dict or a callable, got {rule!r}")
    if isinstance(rule, Mapping):
        for key, depth in rule.items():
            check_depth(depth, str(key))
    elif not isinstance(rule, str) and not callable(rule):
        check_depth(rule, "depth")
    return rule  # type: ignore[return-value]
