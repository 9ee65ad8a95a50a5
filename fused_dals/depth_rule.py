"""What a user says of depths, and the depth of every parameter of an optimizer. SPEC, section "Depth"."""

from __future__ import annotations

import inspect
import pickle
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from numbers import Real
from typing import Any, TypeAlias

from torch import Tensor

from fused_dals.depth import Depths, depths_from_names, evenly_spaced

#: ``"auto"``, a depth for all, ``{name or regular expression: depth}``, or ``f(name, param) -> depth``.
DepthRule: TypeAlias = str | float | Mapping[str, float] | Callable[[str, Tensor], float]

#: What the compilation of a regular expression raises: "[", "a{99999999999}", a thousand brackets.
_BAD_EXPRESSION = (re.error, OverflowError, RecursionError)


def check_rule(rule: object, where: str) -> DepthRule:
    """``rule`` itself, or an error if it is none of the forms a depth rule has."""
    allowed = f"{where}: depth must be 'auto', a number in [0, 1], a dict of names to numbers, or f(name, parameter)"
    if isinstance(rule, str) and rule != "auto":
        raise ValueError(f"{allowed}, got {rule!r}")
    if isinstance(rule, Mapping):
        for key, depth in rule.items():
            if not isinstance(key.pattern if isinstance(key, re.Pattern) else key, str):
                raise TypeError(f"{where}: depth key {shown(key)} must be a parameter's name or a regular expression")
            check_depth(depth, f"{where}: depth of {key!r}")
    elif callable(rule):
        _check_takes_two(rule, where)
    elif isinstance(rule, Real):
        check_depth(rule, f"{where}: depth")
    elif not isinstance(rule, str):
        raise TypeError(f"{allowed}, got {shown(rule)}")
    return rule  # type: ignore[return-value]


def _check_takes_two(rule: Callable[..., Any], where: str) -> None:
    """Raise TypeError unless ``rule`` can be called as f(name, parameter), as far as it tells."""
    try:
        signature = inspect.signature(rule)
    except Exception:  # some builtins have none, and annotations may name what cannot be found
        return
    try:
        signature.bind("name", None)
    except TypeError:
        raise TypeError(f"{where}: a depth callable is f(name, parameter), got one that takes {signature}") from None


def check_live_depth(depth: object, where: str) -> float:
    """What ``group["depth"]`` holds while training, as a float: a number, or an error."""
    if isinstance(depth, str | Mapping) or callable(depth):
        raise TypeError(
            f"{where}: depth in param_groups must be a number in [0, 1], got {shown(depth)}; dicts and callables are "
            "taken when a group joins, by the constructor or add_param_group. Without the key, the constructor's depth "
            "holds"
        )
    return check_depth(depth, f"{where}: depth")


def check_depth(depth: object, what: str) -> float:
    """``depth`` as a float, or an error that says ``what`` is wrong."""
    if isinstance(depth, bool) or not isinstance(depth, Real):
        raise TypeError(f"{what} must be a number in [0, 1], got {shown(depth)}")
    if not 0.0 <= depth <= 1.0:  # type: ignore[operator]  # float(depth) may overflow
        raise ValueError(f"{what} must be in [0, 1], got {shown(depth)}")
    return float(depth)


def shown(value: object) -> str:
    """``repr(value)`` for an error message; the type where there is none, as for an integer of 5000 digits."""
    try:
        return repr(value)
    except Exception:
        return f"a value of type {type(value).__name__}"


def check_depth_keys(rule: DepthRule, names: Iterable[str], where: str) -> None:
    """Raise ValueError unless every key of a dict of depths names one of ``names``, or matches one as an expression.

    What infer_depths returned is that of a whole model, of which the names may be a part.
    """
    if not isinstance(rule, Mapping):
        return
    known = set(names)
    if isinstance(rule, Depths):
        unknown = sorted(known.difference(rule.of(known)))
        if unknown:
            raise ValueError(
                f"{where}: depth does not know parameter {unknown[0]!r}; infer_depths was given a model with names "
                f"like {', '.join(list(rule)[:3])}. Parameters need the names that they have there, as those of "
                'model.head.named_parameters(prefix="head")'
            )
        return
    for key in rule:
        if key in known:
            continue
        try:
            if any(re.fullmatch(key, name) for name in known):
                continue
        except _BAD_EXPRESSION as error:
            raise ValueError(
                f"{where}: depth key {key!r} is no parameter name and no regular expression: {error}"
            ) from None
        inside = [name for name in known if isinstance(key, str) and name.startswith(f"{key}.")]
        meant = rf" For all of {key!r} write r'{re.escape(key)}\..*'." if inside else ""
        examples = ", ".join(map(repr, sorted(known)[:3]))
        raise ValueError(
            f"{where}: depth key {key!r} matches no parameter. A key is the whole name of a parameter, or a regular "
            f"expression for whole names, and names here are like {examples}.{meant}"
        )


def repeated_name_warning(where: str, name: str) -> str:
    """What is said where parameters of two groups have one name, and depths go by names."""
    return (
        f"{where}: parameter name {name!r} is that of two parameters. Depths go by names, so these are taken for one, "
        "and depths are likely wrong. Give names of the whole model, such as "
        'model.head.named_parameters(prefix="head") has, and depth=infer_depths(model) with them.'
    )


def _matches(expression: str, name: str) -> bool:
    try:
        return re.fullmatch(expression, name) is not None
    except _BAD_EXPRESSION:  # a mistake that check_depth_keys reports
        return False


class DepthMap:
    """The depth of every parameter of an optimizer, as groups come and parameters are swapped.

    Nothing is kept per tensor: wrappers replace parameters after an optimizer is built, names and positions stay. A
    group has the ``number`` by which it joined, wherever it is now (Runtime.number_of).
    """

    version = 0  # goes up when something new was learned

    def __init__(self, rule: DepthRule, where: str, names: Sequence[str] = ()) -> None:
        """``rule`` serves groups without one of their own; ``names`` are those of the full model, where known."""
        self.rule = check_rule(rule, where)
        self._explicit: dict[tuple[int, str], float] = {}
        #: The same for names of which all is said that was said of any, wherever the groups have gone since.
        self._by_name: dict[str, float] = {}
        self._groups_of_names: list[Sequence[str]] = [names]
        self._auto = depths_from_names(self._groups_of_names)

    def __getstate__(self) -> dict[str, Any]:
        # A lambda cannot be pickled; what it said of the parameters is kept, and groups added later go by "auto".
        rule = self.rule
        if callable(rule):
            try:
                pickle.dumps(rule)
            except (pickle.PicklingError, AttributeError, TypeError):
                rule = "auto"
        return {**self.__dict__, "rule": rule}

    @property
    def names(self) -> Iterable[str]:
        """Every parameter name met so far."""
        return self._auto.keys()

    def learn_names(self, names: Sequence[str]) -> None:
        """Scale anew over all names known when a new one appears."""
        if any(name not in self._auto for name in names):
            self._groups_of_names.append(names)
            self._auto = depths_from_names(self._groups_of_names)
            self.version += 1

    def learn_rule(
        self,
        rule: DepthRule,
        number: int,
        labelled: Sequence[tuple[str, Tensor]],
        keys: Sequence[str],
        where: str,
    ) -> None:
        """Keep what a dict or a callable says of a group's (label, parameter) pairs; a callable's word under ``keys``,
        which are the labels where these are names, as a dict needs them.

        A dict need not cover all of them. An exact name wins over a regular expression, an earlier one over a later;
        a key that is some parameter's name is never taken for an expression.
        """
        if isinstance(rule, Depths):
            found = {(number, label): d for label, d in rule.of([label for label, _ in labelled]).items()}
        elif isinstance(rule, Mapping):
            labels = [label for label, _ in labelled]
            literal = {*self.names, *labels}
            found = {}
            for label in labels:
                fitting = [label] if label in rule else [k for k in rule if k not in literal and _matches(k, label)]
                if fitting:
                    found[number, label] = float(rule[fitting[0]])
        elif callable(rule):
            found = {
                (number, key): check_depth(rule(label, param), f"{where}: depth of {label!r}")
                for (label, param), key in zip(labelled, keys, strict=True)
            }
        else:
            return
        self._learn(found)

    def goes_by_name(self, number: int, name: str, rule: DepthRule) -> bool:
        """Whether the depth under ``rule`` is that of any other parameter with this name; numbers are no rule here."""
        if rule is self.rule and isinstance(rule, Mapping):
            return True
        return (number, name) not in self._explicit

    def relabel(self, number: int, before: Iterable[str], after: Iterable[str]) -> None:
        """Keep what was said of a group's parameters when a checkpoint gave them names."""
        known = self._explicit
        self._learn(
            {
                (number, new): known[number, old]
                for old, new in zip(before, after, strict=True)
                if (number, old) in known
            }
        )

    def _learn(self, explicit: dict[tuple[int, str], float]) -> None:
        now = self._explicit | explicit
        if now == self._explicit:
            return
        self.version += 1
        self._explicit = now
        said: dict[str, set[float]] = {}
        for (_, label), depth in now.items():
            said.setdefault(label, set()).add(depth)
        self._by_name = {label: depths.pop() for label, depths in said.items() if len(depths) == 1}

    def ranks_positions(self, number: int, keys: Iterable[str], fixed: float | None) -> bool:
        """Whether some parameter of an unnamed group gets its depth from its place in the group alone."""
        return fixed is None and any((number, key) not in self._explicit for key in keys)

    def of_group(
        self, number: int, keys: Sequence[str], names: Sequence[str] | None, fixed: float | None
    ) -> list[float]:
        """Depths of a group's parameters: ``group["depth"]``, checked, else the rule's word, else the module's rank.

        ``keys`` has one entry per parameter; ``names`` is None where parameters have no names.
        """
        if fixed is not None:
            return [fixed] * len(keys)
        if names is None:
            auto = evenly_spaced(len(keys))
        else:
            self.learn_names(names)
            auto = [self._auto[name] for name in names]
        if not self._explicit:
            return auto
        by_name = {} if names is None else self._by_name  # other keys are places, which go to other parameters
        return [self._explicit.get((number, key), by_name.get(key, d)) for key, d in zip(keys, auto, strict=True)]
