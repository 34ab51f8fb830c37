"""Any function from latents to pictures, or the reverse, on a grid of ranks."""

from __future__ import annotations

import time
import warnings
from collections import Counter, OrderedDict
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
import torch.distributed as dist
from torch import Tensor, nn

from halovae.geometry import Grid, Shard, Span, split
from halovae.lines import world_size
from halovae.mesh import Mesh, Traffic, mesh_for
from halovae.plane.layout import Factor, Layout, extent, sole
from halovae.plane.plane import Plane
from halovae.plane.program import Program
from halovae.plane.tensor import PlaneTensor
from halovae.plane.trace import TraceError, trace, untouched

Gather = Literal["rank0", "all", "none"]
_PROGRAMS = 16  # that a function keeps: one for each shape, dtype and grid
_ALARMING = 0.05  # share of the received bytes of all computed ones from which fallbacks are warned of


@dataclass(frozen=True)
class ShardReport:
    """What a call took on this rank.

    Attributes:
        shape: of the whole result.
        grid: how the ranks shared the plane.
        eager: why the function was not recorded; empty if it was.
        chunked: the dim of the result along which chunks come one by one; None if it comes whole.
        recorded: seconds that recording took; 0 if the program was there already.
        seconds: of the call, without recording.
        waiting: seconds of these that it waited for other ranks' data.
        messages: sent by this rank, and their `bytes_sent`.
        fallbacks: operators that no rule covers, with their calls: they ran replicated on all ranks.
        gathered: the share of all computed bytes that these received.
        peak: bytes of live tensors at the highest point, weights and finished chunks apart, by the recorded graph; 0
            without one.
    """

    shape: tuple[int, ...]
    grid: Grid
    eager: str
    chunked: int | None
    recorded: float
    seconds: float
    waiting: float
    messages: int
    bytes_sent: int
    fallbacks: Mapping[str, int]
    gathered: float
    peak: int


class Chunks(Iterator["Tensor | None"]):
    """A result in chunks, in order. Nothing is computed before it is asked for.

    Args:
        chunks: one after the other; None on ranks that receive nothing.
        dim: along which they lie side by side; None if there is but one.
        extent: of all of them along it.
    """

    def __init__(self, chunks: Iterator[Tensor | None], dim: int | None = None, extent: int = 0) -> None:
        self._chunks, self.dim, self.extent = chunks, dim, extent

    def __next__(self) -> Tensor | None:
        return next(self._chunks)

    def close(self) -> None:
        """Compute no further."""
        if isinstance(self._chunks, Generator):
            self._chunks.close()

    def join(self) -> Tensor | None:
        """All of them as one tensor; None on ranks that receive nothing."""
        whole, start = None, 0
        for chunk in self:
            if self.dim is None or chunk is None:
                whole = chunk
                continue
            if whole is None:
                whole = chunk.new_empty([*chunk.shape[: self.dim], self.extent, *chunk.shape[self.dim + 1 :]])
            whole.narrow(self.dim, start, chunk.shape[self.dim]).copy_(chunk)
            start += chunk.shape[self.dim]
        return whole


class Sharded:
    """A function whose input's plane is partitioned over ranks; every rank calls it with the same arguments.

    Args:
        function: takes a tensor `[..., H, W]`, and returns one `[..., H', W']` of which H' and W' are multiples or
            divisors of H and W. It runs unmodified.
        modules: whose weights it uses. They are shared, and stay as they are.
        multiple: of which the ranks' bounds are to be multiples: an encoder's compression ratio saves messages.

    Attributes:
        report: what the last call took; None before the first.
    """

    def __init__(self, function: Callable[..., Tensor], modules: Sequence[nn.Module], multiple: int = 1) -> None:
        self._function, self._modules, self._multiple = function, tuple(modules), multiple
        self._programs: OrderedDict[Any, Program | TraceError] = OrderedDict()
        self._digests: dict[Any, str] = {}
        self._agreed: set[Any] = set()
        self.report: ShardReport | None = None

    def __call__(
        self,
        x: Tensor,
        *extras: Tensor,
        grid: Grid | None = None,
        mesh: Mesh | None = None,
        gather: Gather = "all",
        options: Mapping[str, Any] | None = None,
    ) -> Tensor | None:
        """Call the function on all ranks. Collective.

        Args:
            x: `[B, ..., H, W]`, the same on all ranks.
            extras: further tensors for the function, which every rank has all of.
            grid: how ranks share the plane, and the batch; None to share the rows of all ranks. On 1x1 each rank
                computes all of it by itself, or rank 0 alone with gather="rank0".
            mesh: a mesh to use instead of the one that all calls with this grid share.
            gather: who receives the result: "all" ranks, "rank0", or "none": each rank keeps its own part.
            options: keyword arguments for the function; no tensors.

        Returns:
            The result, None on the ranks that receive nothing. With gather="none", this rank's part.

        Raises:
            ValueError: a grid that does not match the world or has more ranks than there are rows, cols or items; a
                result without the input's plane; an unknown `gather`; weights on several devices, or in need of
                gradients.
            TypeError: the input is not a floating tensor `[..., H, W]`, or the result is no tensor.
            RuntimeError: another rank refused, or has other arguments or weights.
        """
        return self.stream(x, *extras, grid=grid, mesh=mesh, gather=gather, options=options).join()

    def stream(
        self,
        x: Tensor,
        *extras: Tensor,
        grid: Grid | None = None,
        mesh: Mesh | None = None,
        gather: Gather = "all",
        options: Mapping[str, Any] | None = None,
    ) -> Chunks:
        """Call the function, and get its result in chunks, where it puts it together of chunks that it computes one by
        one, as video autoencoders do. Nothing is computed before it is asked for. All ranks ask for all chunks.

        Args:
            x: as for a call; likewise all others.
            extras: further tensors.
            grid: how ranks share the plane.
            mesh: instead of the one that all calls with this grid share.
            gather: who receives chunks.
            options: keyword arguments for the function.

        Yields:
            Chunks along the dim in which the function concatenates them, frames mostly; None on the ranks that receive
            nothing. The whole result at once if the function does not work in chunks.

        Raises:
            ValueError: as for a call; likewise the others.
            TypeError: the input or the result is no such tensor.
            RuntimeError: another rank refused, or has other arguments or weights.
        """
        options = dict(options or {})
        everyone = mesh or mesh_for(Grid(rows=world_size()), _device(self._modules, x))
        used, key, asked = everyone, None, ""
        error: Exception | None = None
        try:
            used = mesh or mesh_for(grid or Grid(rows=world_size()), _device(self._modules, x))
            self._check(x, used.grid, gather)
            key = self._key(used, x, extras, options)
            shapes = [(list(one.shape), str(one.dtype)) for one in (x, *extras)]
            asked = f"{shapes}, grid {grid}, gather {gather}, options {value_key(options)}, weights {self._digest(key)}"
        except (ValueError, TypeError) as refused:
            error = refused
        everyone.agree(asked, error, None)
        with _without_gradients():
            # Tensors of inference mode cannot be written to outside of it, and modules may write to their input.
            x, *rest = (one.clone() if one.is_inference() else one.detach() for one in (x, *extras))
        items = split(x.shape[0], used.grid.batch)
        mine = x
        if used.grid.batch > 1:
            span = items[used.item].slice
            rest = [one[span] if one.ndim and one.shape[0] == x.shape[0] else one for one in rest]
            mine = x[span]
        begin = time.perf_counter()
        with _without_gradients():
            program = self._settled(self._program(mine, rest, used, options, key), used, key)
        recorded = time.perf_counter() - begin
        if isinstance(program, Program) and program.random and used.grid.batch > 1:
            raise ValueError(
                f"grid {used.grid}: the function draws random numbers, and ranks that share a batch would draw other "
                "ones than one device; expected a grid of rows and cols"
            )
        plane = Plane(used)
        # On one rank others would compute what nobody asks them for. Noise they draw, to stay in step.
        alone = gather == "rank0" and used.grid.size == 1 and everyone.rank > 0
        if alone and isinstance(program, Program) and not program.random:
            steps: Iterator[tuple[Tensor, Layout] | None] = iter([None] * max(1, len(program.starts)))
        else:
            steps = self._steps(program, plane, mine, rest, options)
        chunks = self._chunks(program, steps, plane, x, items, "nobody" if alone else gather, recorded)
        if not isinstance(program, Program) or not program.streams:
            return Chunks(chunks)
        assert program.chunked is not None
        return Chunks(chunks, program.chunked, extent(program.returns[program.chunked]))

    def _settled(self, program: Program | TraceError, mesh: Mesh, key: Any) -> Program | TraceError:
        """The program, after all ranks of its mesh know that theirs come in the same chunks, or not in chunks.

        What a rank records depends on its part of the plane: the last rank alone crops the last row.
        """
        if mesh.grid.size > 1 and key not in self._agreed:
            mine = (program.chunked, program.starts) if isinstance(program, Program) else str(program)
            everyone = mesh.lines.all_values(mine)
            if refusals := [one for one in everyone if isinstance(one, str)]:
                program = self._programs[key] = TraceError(refusals[0])
            elif isinstance(program, Program):
                program.streams = program.streams and len(set(everyone)) == 1
            self._agreed.add(key)
        return program

    def _digest(self, key: Any) -> str:
        """Tells the weights of ranks apart; computed once."""
        if key not in self._digests:
            self._digests = {key: _digest(self._modules)}
        return self._digests[key]

    def _chunks(
        self, program: Program | TraceError, steps: Iterator[tuple[Tensor, Layout] | None], plane: Plane, x: Tensor,
        items: Sequence[Span], gather: Gather | Literal["nobody"], recorded: float,
    ) -> Iterator[Tensor | None]:  # fmt: skip
        mesh = plane.mesh
        traffic, seconds = Traffic(mesh.platform), 0.0
        layout: Layout = ()
        done = object()
        step: Any = None
        while step is not done:
            begin = time.perf_counter()
            full = None
            with _without_gradients(), mesh.in_use(traffic):
                step = next(steps, done)
                if isinstance(step, tuple):
                    own, layout = step
                    _check_result(x, layout)
                    full = None if gather == "nobody" else _gathered(own, layout, plane, items, gather)
                    del own
            mesh.platform.synchronize()
            seconds += time.perf_counter() - begin
            if step is not done:
                step = None
                yield full
        told: Plane | Program = plane
        chunked, eager, peak = None, "", 0
        if isinstance(program, Program):
            told, layout, peak = program, program.returns, program.peak
            chunked = program.chunked if program.streams else None
        else:
            eager = str(program)
        sizes = tuple(map(extent, layout))
        self.report = ShardReport(
            (sizes[0] // items[mesh.item].size * x.shape[0], *sizes[1:]),
            mesh.grid,
            eager,
            chunked,
            recorded if recorded > 1e-3 else 0.0,
            seconds,
            traffic.waiting.seconds(),
            traffic.messages,
            traffic.bytes,
            dict(told.fallbacks),
            sum(told.gathered.values()) / max(1, told.computed),
            peak,
        )
        _warn(told.fallbacks, told.gathered, told.computed)

    def _steps(
        self, program: Program | TraceError, plane: Plane, x: Tensor, extras: Sequence[Tensor], options: dict[str, Any]
    ) -> Iterator[tuple[Tensor, Layout]]:
        """This rank's part of each chunk of the result, and its layout."""
        if not isinstance(program, Program):
            with plane.active():
                result = self._call_eagerly(plane, x, extras, options)
            yield result.local, result.partition
            return
        local = plane.scatter(x, self._multiple).local
        local = local.clone() if program.writes else local  # the caller's tensor stays
        begin = 0
        for start, chunk in program.chunks(local, plane.mesh, *extras):
            layout = list(program.returns)
            if program.streams and program.chunked is not None:
                assert start == begin
                begin += chunk.shape[program.chunked]
                layout[program.chunked] = (Factor(chunk.shape[program.chunked]),)
            yield chunk, tuple(layout)

    def _call_eagerly(self, plane: Plane, x: Tensor, extras: Sequence[Tensor], options: dict[str, Any]) -> PlaneTensor:
        with ExitStack() as stack:
            for module in self._modules:
                stack.enter_context(untouched(module))
            result = self._function(plane.scatter(x, self._multiple), *extras, **options)
        if not isinstance(result, Tensor):
            raise TypeError(f"expected a function that returns a tensor, but it returned {type(result).__name__}")
        return plane.lift(result)

    def _program(
        self, x: Tensor, extras: Sequence[Tensor], mesh: Mesh, options: dict[str, Any], key: Any
    ) -> Program | TraceError:
        """The recorded program of this rank, or why there is none."""
        found = self._programs.get(key)
        moving = next((name for module in self._modules for name in hooked(module)), None)
        if moving is not None or value_key(options) is None:
            return TraceError(
                f"hooks of {moving!r} move or cast weights while it is called" if moving is not None
                else "an option is no plain value"
            )  # fmt: skip
        if found is None:
            try:
                found = trace(
                    lambda z, *rest: self._function(z, *rest, **options), self._modules, mesh, x.shape, x.dtype,
                    x.device, self._multiple, [(one.shape, one.dtype) for one in extras],
                )  # fmt: skip
            except TraceError as error:
                found = TraceError(str(error))  # its traceback holds all that the call computed
            self._programs[key] = found
            while len(self._programs) > _PROGRAMS:
                self._agreed.discard(self._programs.popitem(last=False)[0])
        self._programs.move_to_end(key)
        return found

    def _key(self, mesh: Mesh, x: Tensor, extras: Sequence[Tensor], options: Mapping[str, Any]) -> Any:
        """What a recorded graph depends on. Weights are read when it runs; other ones, or other flags, make another."""
        weights = hash(
            tuple((id(one), one.dtype, one.device) for module in self._modules for one in module.parameters())
        )
        shapes = tuple((tuple(one.shape), one.dtype) for one in (x, *extras))
        state = tuple(_state(one) for module in self._modules for one in module.modules())
        kind = x.device.type
        casting = torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind)
        return (
            mesh.grid, mesh.rank, shapes, x.device, hash(state), weights, value_key(options), casting,
            torch.get_default_dtype(),
        )  # fmt: skip

    def _check(self, x: Tensor, grid: Grid, gather: Gather) -> None:
        if not isinstance(x, Tensor) or x.ndim < 3 or not x.is_floating_point():
            described = f"{x.dtype} of shape {list(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
            raise TypeError(f"input: expected a floating tensor [B, ..., H, W], got {described}")
        if min(x.shape) < 1:
            raise ValueError(f"input of shape {list(x.shape)} is empty: expected [B, ..., H, W], each at least 1")
        if gather not in get_args(Gather):
            raise ValueError(f"gather={gather!r}: expected one of {', '.join(get_args(Gather))}")
        if torch.is_grad_enabled() and x.requires_grad:
            raise ValueError(
                "input requires gradients, but halovae is for inference only: call it under torch.no_grad()"
            )
        grid.shards(x.shape[0], x.shape[-2], x.shape[-1])


def shard(
    function: Callable[..., Tensor] | nn.Module, modules: nn.Module | Sequence[nn.Module] = (), *, multiple: int = 1
) -> Sharded:
    """Run any function from latents to pictures on a grid of ranks, unmodified and exactly.

    Args:
        function: a module, a module's method such as `vae.decoder.forward`, or a function that closes over modules.
        modules: whose weights it uses, where it is neither a module nor a module's method.
        multiple: of which the ranks' bounds are to be multiples; see `Sharded`.

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


@contextmanager
def _without_gradients() -> Iterator[None]:
    with torch.inference_mode(False), torch.no_grad():
        yield


def _device(modules: Sequence[nn.Module], x: Any) -> torch.device:
    devices = {one.device for module in modules for one in module.parameters() if one.device.type != "meta"}
    if len(devices) > 1:
        names = ", ".join(sorted(map(str, devices)))
        raise ValueError(f"the module's weights are on several devices ({names}): expected all of them on one")
    return devices.pop() if devices else x.device if isinstance(x, Tensor) else torch.device("cpu")


_SIMPLE = (bool, int, float, str, type(None), torch.dtype, torch.device)


def _state(module: nn.Module) -> Any:
    """What a recorded graph depends on of one module, its weights apart."""
    values = tuple(
        (name, (id(value), value._version) if isinstance(value, Tensor) and not value.is_inference() else value)
        for name, value in vars(module).items()
        if isinstance(value, (Tensor, *_SIMPLE))
    )
    hooks = tuple(module._forward_hooks), tuple(module._forward_pre_hooks)
    return id(module), type(module), values, hooks, tuple(map(id, module._buffers.values()))


def value_key(value: Any) -> Any:
    """Options as a key; None if they hold something that cannot be compared by value. A generator is told by its kind:
    a graph cannot draw from one."""
    if isinstance(value, _SIMPLE):
        return repr(value)
    if isinstance(value, torch.Generator):
        return "generator"
    if isinstance(value, Mapping):
        found: Any = [(str(name), value_key(one)) for name, one in value.items()]
        return None if any(one is None for _, one in found) else tuple(found)
    if isinstance(value, (list, tuple)):
        found = [value_key(one) for one in value]
        return None if None in found else tuple(found)
    return None


def hooked(module: nn.Module) -> Iterator[str]:
    """Submodules whose hooks move or cast weights, as those of offloading and of layerwise casting do."""
    for name, one in module.named_modules():
        if hasattr(one, "_diffusers_hook") or (name and hasattr(one, "_hf_hook")):
            yield name or type(one).__name__


def _digest(modules: Sequence[nn.Module]) -> str:
    """Tells weights of ranks apart: their names, shapes and sums."""
    if not (dist.is_initialized() and dist.get_world_size() > 1):
        return ""
    sums = [one.detach().double().sum() for module in modules for one in module.parameters() if not one.is_meta]
    shapes = hash(tuple(tuple(one.shape) for module in modules for one in module.parameters()))
    total = float(torch.stack(sums).mul(torch.arange(1, len(sums) + 1, device=sums[0].device)).sum()) if sums else 0.0
    return f"{shapes:x}/{total!r}"


def _check_result(x: Tensor, layout: Layout) -> None:
    sizes = [extent(dim) for dim in layout]
    if len(sizes) < 3 or any(now % then and then % now for now, then in zip(sizes[-2:], x.shape[-2:], strict=True)):
        raise ValueError(
            f"the function made a result of shape {sizes} of an input of shape {list(x.shape)}: expected "
            f"[..., H', W'] with multiples or divisors of {x.shape[-2]} and {x.shape[-1]}"
        )


def _gathered(own: Tensor, layout: Layout, plane: Plane, items: Sequence[Span], gather: Gather) -> Tensor | None:
    """The whole result where it is wanted."""
    mesh = plane.mesh
    if gather == "none":
        return own
    rows, cols = (sole(dim) for dim in layout[-2:])
    plain = all(sole(dim) is not None or all(f.mesh_dim is None for f in dim) for dim in layout[-2:])
    if not plain or any(factor.mesh_dim for dim in layout[:-2] for factor in dim):
        own, rows, cols = plane.full(plane.wrap(own, layout)), None, None
    if mesh.grid.size == 1:
        return own
    height, width = (extent(dim) for dim in layout[-2:])
    middle = own.shape[1:-2]
    ratio = extent(layout[0]) // items[mesh.item].size  # frames may be in the batch
    shards = []
    for rank in range(mesh.grid.size):
        item, row, col = mesh.grid.coordinates(rank)
        whole = (rows is None and row > 0) or (cols is None and col > 0)  # what every rank has, only one gives
        part_rows = Span(rows.bounds[row], rows.bounds[row + 1]) if rows else Span(0, 0 if whole else height)
        part_cols = Span(cols.bounds[col], cols.bounds[col + 1]) if cols else Span(0, 0 if whole else width)
        shards.append(Shard(items[item].scaled(ratio), part_rows, part_cols))
    given = shards[mesh.rank]
    own = own[..., : given.rows.size, : given.cols.size].contiguous()
    total = items[-1].stop * ratio
    wanted = gather == "all" or mesh.rank == 0
    # A message may not be empty, a part of a collective call may.
    everyone = gather == "all" or any(0 in (one.rows.size, one.cols.size) for one in shards)
    count = middle.numel()
    out = own.new_empty((total, count, 1, height, width)) if wanted else None
    flat = own.reshape(given.batch.size, count, 1, given.rows.size, given.cols.size)
    mesh.gather_frames(flat, shards, out, everyone)
    return None if out is None else out.view(total, *middle, height, width)


def _warn(fallbacks: Counter[str], gathered: Counter[str], computed: int) -> None:
    share = sum(gathered.values()) / max(1, computed)
    if share > _ALARMING:
        names = ", ".join(
            f"{name}: {calls} calls, {gathered[name] / max(1, computed):.1%} of bytes"
            for name, calls in fallbacks.items()
        )
        warnings.warn(
            f"these operators have no rule and run replicated on all ranks: {names}", RuntimeWarning, stacklevel=4
        )
