"""Attention: queries stay on their ranks, keys and values are gathered."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from halovae.plane import operators
from halovae.plane.rules.pointwise import aligned, common
from halovae.plane.rules.registry import plane_tensors, rule
from halovae.plane.tensor import PlaneTensor

if TYPE_CHECKING:
    from halovae.plane.plane import Plane

aten = torch.ops.aten


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> PlaneTensor:
    """`scaled_dot_product_attention`, in which any argument may be partitioned.

    Args:
        query: `[*, L, D]`.
        key: `[*, S, D]`.
        value: `[*, S, Dv]`.
        attn_mask: as for PyTorch.
        dropout_p: must be 0.
        is_causal: whether the mask is causal; then the queries are gathered, too.
        scale: scale of the scores.
        enable_gqa: whether several heads of queries share a head of keys.
    """
    plane = next(plane_tensors([query, key, value, attn_mask])).plane
    if dropout_p > 0:
        raise RuntimeError(f"dropout_p={dropout_p}: ranks would drop other weights than one device; expected 0")
    with plane.working():
        return _attention(plane, query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)


def _attention(
    plane: Plane, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, dropout_p: float,
    is_causal: bool, scale: float | None, enable_gqa: bool,
) -> PlaneTensor:  # fmt: skip
    q, k, v = (plane.lift(one) for one in (query, key, value))
    q = plane.replicate(q, [q.ndim - 1, *([q.ndim - 2] if is_causal else [])])
    k, v = (plane.replicate(one, [one.ndim - 2, one.ndim - 1]) for one in (k, v))
    if enable_gqa:
        q, k, v = (plane.replicate(one, [one.ndim - 3]) for one in (q, k, v))
    batch = common([(*one.partition[:-2], (), ()) for one in (q, k, v)])
    used = {factor.mesh_dim for dim in batch for factor in dim}
    if used & {factor.mesh_dim for factor in q.partition[-2] if factor.mesh_dim is not None}:
        q = plane.replicate(q, [q.ndim - 2])
    locals_ = [
        aligned(plane, one, (*batch[:-2], *one.partition[-2:])) if not enable_gqa else one.local for one in (q, k, v)
    ]
    layout = (*(q.partition[:-2] if enable_gqa else batch[:-2]), q.partition[-2], v.partition[-1])
    mask: Tensor | None = None
    if attn_mask is not None:
        lifted = plane.replicate(plane.lift(attn_mask), [attn_mask.ndim - 1])
        mask = aligned(plane, lifted, (*layout[:-1], lifted.partition[-1]))
    result = plane.run(operators.attention, *locals_, mask, dropout_p, is_causal, scale, enable_gqa)
    return plane.wrap(result, layout)


@rule(aten.scaled_dot_product_attention)
def undecomposed(plane: Plane, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Attention as it arrives in inference mode."""
    return attention(*args, **kwargs)
