"""Any function from latents to pictures, or the reverse, on a grid of ranks."""

from __future__ import annotations

import math
import time
import traceback
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any, get_args

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from typing_extensions import Unpack

from halovae.device.captures import captures
from halovae.device.kinds import Stopwatch
from halovae.distributed.mesh import Mesh, Traffic, mesh_for, mesh_over
from halovae.distributed.out_of_memory import is_out_of_memory
from halovae.distributed.transport import world_size
from halovae.errors import RankOutOfMemoryError, TraceError
from halovae.grid import Grid, Span, split
from halovae.kernels.native import EAGER, Kernels, compiled, explain, ready
from halovae.plane.agreement import agree, digests, messages
from halovae.plane.context import without_gradients
from halovae.plane.drain import drain_peers
from halovae.plane.hooks import untouched
from halovae.plane.keys import WeightsDigest, device_of, hooked, module_key, settings, value_key
from halovae.plane.layout import Layout, extent
from halovae.plane.passes import chosen
from halovae.plane.plane import Plane
from halovae.plane.program import Program, captures_for
from halovae.plane.results import Chunks, Gather, ShardOptions, ShardReport, check_result, gathered, warn_of_fallbacks
from halovae.plane.steps import begin_steps
from halovae.plane.stored import Identity, stored_or_traced
from halovae.plane.strip_program import InStrips, StripProgram, record_strips
from halovae.plane.strips import Strips
from halovae.plane.tensor import PlaneTensor
from halovae.plane.trace import trace

_PROGRAMS = 16  # that a function keeps: one for each shape, dtype and grid


class Sharded:
    """A function whose input's plane is partitioned over ranks; every rank calls it with the same arguments.

    Args:
        function: takes a tensor `[..., H, W]` and returns one `[..., H', W']`, where H' and W' are multiples or
            divisors of H and W. It runs unmodified.
        modules: the modules whose weights it uses. They are shared and not changed.
        multiple: divides the ranks' bounds, where it can: an encoder's compression ratio saves messages.
        identity: identifies a function that is neither a module nor a method of one. Without it, graphs of such a
            function are not kept on disk.

    Attributes:
        report: measurements of the last call; None before the first.
    """

    def __init__(
        self, function: Callable[..., Tensor], modules: Sequence[nn.Module], multiple: int = 1,
        identity: Identity | None = None,
    ) -> None:  # fmt: skip
        self._function, self._modules, self._multiple = function, tuple(modules), multiple
        self._identity = identity
        self._programs: OrderedDict[Any, Program | TraceError] = OrderedDict()
        self._digest = WeightsDigest(self._modules)
        self._agreed: set[Any] = set()
        self._recorded: tuple[Any, float] = None, 0.0  # the last program, and the seconds that no call reported yet
        self.report: ShardReport | None = None

    def __call__(self, x: Tensor, *extras: Tensor, **how: Unpack[ShardOptions]) -> Tensor | None:
        """Call the function on all ranks, and join the chunks of its result. Collective.

        Args:
            x: as for `stream`, which takes the same arguments and raises the same errors.
            extras: further tensors.
            how: keyword arguments of `stream`.

        Returns:
            The result; None on the ranks that receive nothing. With gather="none", this rank's shard.
        """
        return self.stream(x, *extras, **how).join()

    def peak(self, x: Tensor, *extras: Tensor, options: Mapping[str, Any]) -> tuple[int, int] | str:
        """Return bytes of live tensors at the peak of a call on one rank, and of its result; or why it runs eagerly.

        Args:
            x: as for `stream`.
            extras: further tensors.
            options: keyword arguments for the function.
        """
        mesh = mesh_for(Grid(), device_of(self._modules, x)[0])
        with without_gradients():
            program = self._program(x, extras, mesh, dict(options), (*self._key(mesh, x, extras, options), None))
        if not isinstance(program, Program):
            return str(program)
        return program.peak, math.prod(map(extent, program.returns)) * program.dtype.itemsize

    def stream(
        self,
        x: Tensor,
        *extras: Tensor,
        grid: Grid | None = None,
        mesh: Mesh | DeviceMesh | None = None,
        group: dist.ProcessGroup | None = None,
        gather: Gather = "all",
        options: Mapping[str, Any] | None = None,
        convert: Callable[[Tensor], Tensor] | None = None,
        leaner: bool = False,
        kernels: Kernels | None = None,
        strips: InStrips | None = None,
        capture: bool = True,
    ) -> Chunks:
        """Call the function on all ranks, and yield its result in chunks. Collective: all ranks take all chunks.

        A function that concatenates pieces, as video autoencoders do, yields each piece once it is computed.

        Args:
            x: `[B, ..., H, W]`, the same on all ranks.
            extras: further tensors for the function, which are replicated.
            grid: extents of the mesh over batch, rows, cols; None to partition rows over all ranks. On 1x1 each rank
                computes everything, or only rank 0 does with gather="rank0".
            mesh: the ranks and their grid, instead of the mesh that all calls with this grid share; see `mesh_over`.
            group: the ranks; None for all of the world.
            gather: who receives the result: "all" ranks, "rank0", or "none": each rank keeps its own shard.
            options: keyword arguments for the function; no tensors.
            convert: a pointwise function that is applied to each rank's shard of the result before it is sent.
            leaner: whether the caller has a leaner plan. Then all ranks stop together when one runs out of memory, if
                the function was recorded and draws no random numbers.
            kernels: the kernels for the CPU; None for compiled ones if all ranks have them by now, else eager ones.
            strips: a rank that has all rows and cols computes them in strips; the result is then one chunk.
            capture: whether captured graphs, which keep memory, may queue the work of one rank.

        Yields:
            Chunks along the dim of the concatenation, mostly frames; None on the ranks that receive nothing. One chunk
            if the function does not concatenate pieces.

        Raises:
            ValueError: a grid that does not match the world or has more ranks than rows, cols or items; a result
                without the input's plane; an unknown `gather`; weights on several devices; an input with gradients.
            TypeError: the input is not a floating tensor `[..., H, W]`, or the result is no tensor.
            RuntimeError: another rank refused, or has other arguments or weights.
            RankOutOfMemoryError: a rank ran out of memory, and there is a leaner plan.

        Warns:
            RuntimeWarning: kernels cannot be compiled here (no C++ compiler?); calls run in eager PyTorch.
        """
        options = dict(options or {})
        device, error = device_of(self._modules, x)
        world = Grid(rows=world_size(group))
        mesh = mesh_over(mesh, device)
        everyone = mesh or mesh_for(world, device, group)
        used, key, asked = everyone, None, ""
        try:
            used = mesh or mesh_for(grid or world, device, group)
            self._check(x, used.grid, gather)
            key = *self._key(used, x, extras, options), strips
            shapes = [(list(one.shape), str(one.dtype)) for one in (x, *extras)]
            asked = (
                f"{shapes}, grid {grid}, gather {gather}, options {value_key(options)}, passes {chosen()}, "
                f"weights {self._digest()}"
            )
        except (ValueError, TypeError) as refused:
            error = error or refused
        # Calls of other threads may have settled the program on some ranks, and not yet on others.
        offer = kernels is None and ready(everyone.device.torch_device), key in self._agreed
        have_kernels, have_settled = zip(*everyone.agree(asked, error, offer), strict=True)
        if kernels is None:
            explain(everyone.device.torch_device)
            kernels = compiled() if all(have_kernels) else EAGER
        with without_gradients():
            # Tensors of inference mode cannot be written to outside of it, and modules may write to their input.
            x, *rest = (one.clone() if one.is_inference() else one.detach() for one in (x, *extras))
        items = split(x.shape[0], used.grid.batch)
        mine = x
        if used.grid.batch > 1:
            span = items[used.item].slice
            rest = [one[span] if one.ndim and one.shape[0] == x.shape[0] else one for one in rest]
            mine = x[span]
        with without_gradients():
            program = self._program(mine, rest, used, options, key, strips=strips)
            if used.grid.size > 1 and not all(have_settled):
                settled = self._settled(program, used, key)
                if settled is None:  # graphs differ between ranks, and passes changed their messages
                    settled = self._settled(self._program(mine, rest, used, options, key, ()), used, key)
                assert settled is not None
                program = settled
        recorded = self._recorded[1] if self._recorded[0] == key else 0.0
        self._recorded = None, 0.0
        if isinstance(program, Program) and program.random and used.grid.batch > 1:
            raise ValueError(
                f"grid {used.grid}: the function draws random numbers, and ranks that share a batch would draw other "
                "ones than one device; expected a grid of rows and cols"
            )
        plane = Plane(used)
        # On grid 1x1 rank 0 computes for all. If noise is drawn, others compute, too: generators stay in step.
        idle = gather == "rank0" and used.grid.size == 1 and everyone.rank > 0
        if idle and isinstance(program, Program) and not program.random:
            steps: Iterator[tuple[Tensor, Layout] | None] = iter([None] * max(1, len(program.starts)))
        else:
            steps = self._steps(program, plane, mine, rest, options, kernels, convert, capture)
        late = None if isinstance(program, StripProgram) else convert

        def send(own: Tensor, layout: Layout, at: Plane) -> Tensor | None:
            return gathered(own if late is None else late(own), layout, at, items, gather)

        leaner = leaner and isinstance(program, Program) and not program.random
        is_compiled = kernels is not EAGER and isinstance(program, Program)
        chunks = self._chunks(
            program, steps, plane, x, items, None if idle else send, recorded, everyone if leaner else None, is_compiled
        )
        if not isinstance(program, Program) or not program.streams:
            return Chunks(chunks)
        assert program.chunked is not None
        return Chunks(chunks, program.chunked, extent(program.returns[program.chunked]))

    def _settled(self, program: Program | TraceError, mesh: Mesh, key: Any) -> Program | TraceError | None:
        """Return the program once all ranks of the mesh agree to record, on messages, and on the result's chunks.

        Graphs differ between ranks: only the last rank crops the last row. Collective. None if ranks would wait for
        messages that others do not send.
        """
        mine: Any = str(program)
        if isinstance(program, Program):
            mine = (program.chunked, program.starts), digests(messages(program, mesh))
        everyone = mesh.transport.all_values(mine)
        if refusals := [one for one in everyone if isinstance(one, str)]:
            program = TraceError(refusals[0])
        elif isinstance(program, Program):
            if not agree([exchanged for _, exchanged in everyone]):
                return None
            program.streams = program.streams and len({chunks for chunks, _ in everyone}) == 1
        if key in self._programs:
            self._programs[key] = program
            self._agreed.add(key)
        return program

    def _chunks(
        self, program: Program | TraceError, steps: Iterator[tuple[Tensor, Layout] | None], plane: Plane, x: Tensor,
        items: Sequence[Span], send: Callable[[Tensor, Layout, Plane], Tensor | None] | None, recorded: float,
        everyone: Mesh | None, is_compiled: bool,
    ) -> Iterator[Tensor | None]:  # fmt: skip
        mesh = plane.mesh
        traffic, clock = Traffic(mesh.device), Stopwatch(mesh.device)
        layout: Layout = ()
        done = object()
        step: Any = None
        count, total = 0, len(program.starts) if isinstance(program, Program) and program.streams else 1
        while step is not done:
            full, failed = None, False
            with clock.running():
                try:
                    with without_gradients(), mesh.in_use(traffic), mesh.device.repeatable():
                        step = next(steps, done)
                        if isinstance(step, tuple):
                            own, layout = step
                            check_result(x, layout)
                            full = None if send is None else send(own, layout, plane)
                            del own
                except (MemoryError, RuntimeError) as error:
                    if is_out_of_memory(error):
                        captures(mesh.device.torch_device).clear()
                    if everyone is None or count == total or not is_out_of_memory(error):
                        raise
                    traceback.clear_frames(error.__traceback__)  # frees the tensors of its frames
                    step, own, full, failed = None, None, None, True
                if everyone is not None and step is not done:
                    count += 1
                    if failed and isinstance(program, Program):
                        with mesh.in_use(Traffic(mesh.device)):
                            drain_peers(program, mesh, send, count, traffic.calls)
                    if everyone.transport.anyone(failed):
                        raise RankOutOfMemoryError(f"memory ran out on a rank of grid {mesh.grid}")
            if step is not done:
                step = None
                yield full
        source: Plane | Program = plane
        chunked, eager, peak, passes = None, "", 0, dict[str, int]()
        if isinstance(program, Program):
            source, layout, peak, passes = program, program.returns, program.peak, program.changes
            chunked = program.chunked if program.streams else None
        else:
            eager = str(program)
        sizes = tuple(map(extent, layout))
        self.report = ShardReport(
            (sizes[0] // items[mesh.item].size * x.shape[0], *sizes[1:]), mesh.grid, eager, chunked, recorded,
            (clock,), (traffic.waiting,), traffic.calls, traffic.messages, traffic.bytes, dict(source.fallbacks),
            sum(source.gathered.values()) / max(1, source.computed), peak, passes, is_compiled,
        )  # fmt: skip
        warn_of_fallbacks(source.fallbacks, source.gathered, source.computed)

    def _steps(
        self, program: Program | TraceError, plane: Plane, x: Tensor, extras: Sequence[Tensor], options: dict[str, Any],
        kernels: Kernels, convert: Callable[[Tensor], Tensor] | None, capture: bool,
    ) -> Iterator[tuple[Tensor, Layout]]:  # fmt: skip
        """Yield this rank's shard of each chunk of the result, and its layout."""
        if not isinstance(program, Program):
            with plane.active():
                result = self._call_eagerly(plane, x, extras, options)
            yield result.local, result.partition
            return
        local = plane.scatter(x, self._multiple).local
        local = local.clone() if program.writes else local  # the caller's tensor stays unchanged
        begin, how = 0, {"convert": convert} if isinstance(program, StripProgram) else {}
        found, chunks = captures_for(program, plane.mesh) if capture and not how else None, program.chunks
        if found is not None:
            chunks = partial(program.captured, found)
        begin_steps(program.steps)
        for start, chunk in chunks(local, plane.mesh, *extras, kernels=kernels, **how):
            if program.streams and program.chunked is not None:
                assert start == begin
                begin += chunk.shape[program.chunked]
            layout = program.layout_of(chunk)
            yield chunk, layout
            del chunk  # else it would be held while the next one is computed

    def _call_eagerly(self, plane: Plane, x: Tensor, extras: Sequence[Tensor], options: dict[str, Any]) -> PlaneTensor:
        with ExitStack() as stack:
            for module in self._modules:
                stack.enter_context(untouched(module))
            result = self._function(plane.scatter(x, self._multiple), *extras, **options)
        if not isinstance(result, Tensor):
            raise TypeError(f"expected a function that returns a tensor, but it returned {type(result).__name__}")
        return plane.lift(result)

    def _program(
        self, x: Tensor, extras: Sequence[Tensor], mesh: Mesh, options: dict[str, Any], key: Any,
        passes: Sequence[str] | None = None, strips: InStrips | None = None,
    ) -> Program | TraceError:  # fmt: skip
        """Return this rank's recorded program, from memory, disk or a trace, or the reason why there is none.

        With `passes`, it is made by these, even if there is one already.

        Raises:
            NarrowStripError: (a ValueError) there are too few rows or cols for so many strips.
        """
        found, begin = self._programs.get(key) if passes is None else None, time.perf_counter()
        moving = next((name for module in self._modules for name in hooked(module)), None)
        if moving is not None or value_key(options) is None:
            return TraceError(
                f"hooks of {moving!r} move or cast weights while it is called" if moving is not None
                else "an option is no plain value"
            )  # fmt: skip
        if found is None:

            def recorded(mesh: Mesh, layout: Strips | None, passes: Sequence[str] | None) -> Program:
                def record() -> Program:
                    return trace(
                        lambda z, *rest: self._function(z, *rest, **options), self._modules, mesh, x.shape, x.dtype,
                        x.device, self._multiple, [(one.shape, one.dtype) for one in extras], passes, layout,
                    )  # fmt: skip

                about = self._multiple, settings(mesh, x, extras, options), passes, layout
                return stored_or_traced(
                    record, self._function, self._modules, self._identity, mesh, x.device, about
                )  # fmt: skip

            try:
                if strips is None:
                    found = recorded(mesh, None, passes)
                else:
                    found = record_strips(recorded, x.device, x.shape[strips.dim], strips)
            except TraceError as error:
                if strips is not None:
                    raise  # at once it would take more memory than there is
                found = TraceError(str(error))  # its traceback would keep the call's tensors alive
            self._programs[key], self._recorded = found, (key, time.perf_counter() - begin)
            while len(self._programs) > _PROGRAMS:
                self._agreed.discard(self._programs.popitem(last=False)[0])
        self._programs.move_to_end(key)
        return found

    def _key(self, mesh: Mesh, x: Tensor, extras: Sequence[Tensor], options: Mapping[str, Any]) -> Any:
        """Return what a recorded graph depends on. It reads weights when it runs; other tensors need another graph."""
        weights = hash(
            tuple((id(one), one.dtype, one.device) for module in self._modules for one in module.parameters())
        )
        state = tuple(module_key(one) for module in self._modules for one in module.modules())
        return settings(mesh, x, extras, options), x.device, hash(state), weights

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
