"""The registry of rules, dispatch to them, and the fallback for operators without a rule."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from halovae.plane.layout import partitioned
from halovae.plane.tensor import PlaneTensor, version

if TYPE_CHECKING:
    from halovae.plane.plane import Plane

Rule = Callable[["Plane", Any, tuple[Any, ...], dict[str, Any]], Any]
_RULES: dict[Any, Rule] = {}


def rule(*operators: Any) -> Callable[[Rule], Rule]:
    """Register a function as the rule of ATen operators, all overloads of each.

    A rule takes the plane, the operator, and its arguments, and returns the operator's result, or `NotImplemented` for
    a case that it does not cover.
    """

    def register(function: Rule) -> Rule:
        for operator in operators:
            _RULES[operator] = function
        return function

    return register


@cache
def rule_of(func: Any) -> Rule | None:
    """The rule of an operator: its own, or the common rule of pointwise operators; None if it has none."""
    from halovae.plane.rules.pointwise import pointwise

    found = _RULES.get(func) or _RULES.get(func.overloadpacket)
    return pointwise if found is None and torch.Tag.pointwise in func.tags else found


@cache
def is_composite(func: Any) -> bool:
    """Whether an operator decomposes into others. Some of these have kernels of their own, too."""
    return torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd")


@cache
def written(func: Any) -> tuple[int, ...]:
    """The positions of the arguments that an operator writes to."""
    return tuple(
        index
        for index, argument in enumerate(func._schema.arguments)
        if argument.alias_info is not None and argument.alias_info.is_write
    )


@cache
def unwriting(func: Any) -> Any:
    """Return the operator that makes a new tensor where another writes to its first argument; None if there is none."""
    name = func._schema.name.removeprefix("aten::")
    if written(func) != (0,) or torch.Tag.inplace_view in func.tags or not name.endswith("_"):
        return None
    found = getattr(getattr(torch.ops.aten, name[:-1], None), func._overloadname, None)
    if found is None or written(found) or returns_view(found):
        return None
    names = [[one.name for one in each._schema.arguments] for each in (found, func)]
    return found if names[0] == names[1] else None


@cache
def returns_view(func: Any) -> bool:
    """Whether an operator returns a view of its argument."""
    infos = [one.alias_info for one in func._schema.returns]
    return any(info is not None and not info.is_write for info in infos)


def plane_tensors(values: Iterable[Any]) -> Iterator[PlaneTensor]:
    """The plane tensors among arguments, including those in lists."""
    for value in values:
        if isinstance(value, PlaneTensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from plane_tensors(value)


def plain(x: Any) -> Any:
    """Return a replicated plane tensor, such as weights that were computed in the call, as a plain tensor."""
    return x.local if isinstance(x, PlaneTensor) and not any(True for _ in partitioned(x.partition)) else x


class Known(NamedTuple):
    """Properties of an operator, cached for each call.

    Attributes:
        func: the operator.
        rule: its rule.
        composite: whether it decomposes into others.
        targets: positions and names of the arguments whose values it changes.
        writes: whether it writes to any argument.
        direct: calls it, by the fastest way.
    """

    func: Any
    rule: Rule | None
    composite: bool
    targets: tuple[tuple[int, str], ...]
    writes: bool
    direct: Callable[..., Any]


_KNOWN: dict[int, Known] = {}  # by id: operators are never freed, and hash slowly


def known(func: Any) -> Known:
    """Return the cached properties of an operator."""
    found = _KNOWN.get(id(func))
    if found is None:
        # Some operators that write change a tensor's sizes, not its values.
        positions = () if torch.Tag.inplace_view in func.tags else written(func)
        targets = tuple((index, func._schema.arguments[index].name) for index in positions)
        direct = _DIRECT.get(func, func)
        found = Known(func, rule_of(func), is_composite(func), targets, bool(written(func)), direct)
        _KNOWN[id(func)] = found
    return found


aten = torch.ops.aten
# PyTorch's own bindings take these operators' arguments unchanged, in less than half of the time of a call by schema.
_DIRECT: dict[Any, Callable[..., Any]] = {
    aten.add.Tensor: torch.add,
    aten.sub.Tensor: torch.sub,
    aten.mul.Tensor: torch.mul,
    aten.div.Tensor: torch.div,
    aten.silu.default: torch._C._nn.silu,
    aten.sigmoid.default: torch.sigmoid,
    aten.tanh.default: torch.tanh,
    aten.clone.default: torch.clone,
    aten.cat.default: torch.cat,
    aten.mean.dim: torch.mean,
    aten.convolution.default: torch.convolution,
}


def dispatch(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Call an operator on plane tensors."""
    plane = None
    found: Iterable[PlaneTensor]
    for one in args:
        if isinstance(one, PlaneTensor):
            found = (one,)
        elif isinstance(one, (list, tuple)) and one and type(one[0]) is not int:  # a list of sizes has no tensors
            found = plane_tensors(one)
        else:
            continue
        for x in found:
            if plane is None:
                plane = x.plane
            elif x.plane is not plane:
                raise RuntimeError(f"{func}: its tensors are of two calls; one of them was kept from an earlier call")
            if x.source is not None:
                x.check_fresh()
    if plane is None:
        plane = next(plane_tensors(kwargs.values())).plane
    plane.inside += 1
    try:
        with torch._C.DisableTorchFunction():  # rules make plain tensors
            return _dispatched(plane, func, args, kwargs)
    finally:
        plane.inside -= 1


def _dispatched(plane: Plane, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    found = known(func)
    for index, name in found.targets:
        target = args[index] if index < len(args) else kwargs.get(name)
        if isinstance(target, PlaneTensor):
            if target.frozen:
                raise RuntimeError(f"{func}: cannot write in place to a view of a partitioned tensor: {target.frozen}")
            increment_version(target.local)  # PyTorch counts above dispatch only
    if found.rule is not None:
        result = found.rule(plane, func, args, kwargs)
        if result is not NotImplemented:
            if isinstance(result, PlaneTensor):
                plane.computed += result.local.nbytes
            else:
                for one in plane_tensors((result,)):
                    plane.computed += one.local.nbytes
            return result
    elif found.composite:
        result = func.decompose(*args, **kwargs)
        if result is not NotImplemented:
            return result
    return fallback(plane, func, args, kwargs)


def fallback(plane: Plane, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Call an operator that no rule covers on the full data, replicated on all ranks."""
    if torch.Tag.inplace_view in func.tags:
        raise RuntimeError(f"{func}: cannot change the sizes of a partitioned tensor in place")
    if func.overloadpacket is torch.ops.aten.as_strided:
        raise RuntimeError(f"{func}: a partitioned tensor has no strides of its own that could be changed")
    before = plane.received
    # Contiguous on all ranks, so that all of them get the same bits.
    full_args, full_kwargs = torch.utils._pytree.tree_map(
        lambda one: plane.full(one).contiguous() if isinstance(one, PlaneTensor) else one, (args, kwargs)
    )
    if any(True for one in plane_tensors((*args, *kwargs.values())) for _ in partitioned(one.partition)):
        plane.fallbacks[str(func)] += 1
        plane.gathered[str(func)] += plane.received - before
    result = func(*full_args, **full_kwargs)
    targets = {}
    for index in written(func):
        name = func._schema.arguments[index].name
        target, value = (args[index], full_args[index]) if index < len(args) else (kwargs[name], full_kwargs[name])
        if isinstance(target, PlaneTensor):
            targets[id(value)] = target
            target.local.copy_(plane.to_layout(plane.lift(value), target.partition).local)
    frozen = "it was made of other ranks' data" if returns_view(func) else ""
    first = next(plane_tensors((*args, *kwargs.values())))

    def back(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        if id(value) in targets:
            return targets[id(value)]
        lifted = plane.lift(value)
        lifted.frozen = frozen
        if frozen:
            lifted.source = version(first.local)
        return lifted

    return torch.utils._pytree.tree_map(back, result)
