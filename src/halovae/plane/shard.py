"""The public way to share any function."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor, nn

from halovae.plane.sharded import Sharded


def shard(
    function: Callable[..., Tensor] | nn.Module, modules: nn.Module | Sequence[nn.Module] = (), *, multiple: int = 1
) -> Sharded:
    """Run any function from latents to pictures on a grid of ranks, unmodified and exactly.

    Args:
        function: a module, a module's method such as `vae.decoder.forward`, or a function that closes over modules.
        modules: the modules whose weights it uses, if it is neither a module nor a module's method.
        multiple: divides the ranks' bounds, where it can; see `Sharded`.

    Returns:
        A function of the same tensors, which every rank calls: `halovae.shard(vae.decoder)(latents, grid=Grid(2, 2))`.

    Raises:
        TypeError: the function cannot be called.
        ValueError: it is a plain function, and no modules are given.
    """
    if not callable(function):
        raise TypeError(f"function: expected a module or a function, got {type(function).__name__}")
    given = [modules] if isinstance(modules, nn.Module) else list(modules)
    owner = function if isinstance(function, nn.Module) else getattr(function, "__self__", None)
    if isinstance(owner, nn.Module):
        given = [owner, *(one for one in given if one is not owner)]
    if not given:
        raise ValueError("modules: name the modules whose weights the function uses, modules=()  if there are none")
    return Sharded(function, given, multiple)
