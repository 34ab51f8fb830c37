"""A rank's recorded graph, ready to be replayed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx

from halovae.device.captures import Captures, captures
from halovae.device.regions import region
from halovae.distributed.mesh import Mesh
from halovae.kernels.halves import convolution, has_units, multiplied
from halovae.kernels.native import EAGER, Kernels
from halovae.kernels.pool import BufferPool
from halovae.plane import context, operators, steps, windows
from halovae.plane.flops import CONVOLUTIONS, PRODUCTS, flops
from halovae.plane.layout import Factor, Layout, local_extent
from halovae.plane.live import is_operator, peak

if TYPE_CHECKING:
    from halovae.plane.plane import Plane

BETWEEN_SUBMODULES = "between submodules"  # the profiler region of operators that the function calls itself


class Program:
    """A rank's recorded graph. It runs without the module that it was recorded from.

    In a profile, the operators of each submodule form a profiler region named after the submodule's path.

    Attributes:
        graph: its operators, and calls of `bodies`. A node's `meta` has the `shape`, `dtype` and `bytes` of its result,
            the `module` that called it, and for operators between ranks the `messages` and bytes `sent`.
        bodies: graphs that it calls, by name: the work of a module on each chunk of a clip.
        chunked: the dim of the result along which chunks are handed out one by one; None if it comes at once.
        streams: whether `chunks` yields these chunks one by one, too.
        takes: the layout of the input.
        returns: the layout of the result.
        dtype: the dtype of the result.
        random: whether it draws random numbers.
        writes: whether it writes to its input.
        changes: how many changes each pass made, by its name.
        fallbacks: number of calls of each operator that no rule covers: they run replicated.
        gathered: bytes that each of these receives.
        received: bytes that all operators receive.
        computed: bytes of all results.
    """

    def __init__(
        self, graph: fx.Graph, bodies: dict[str, fx.Graph], chunked: int | None, attributes: dict[str, Tensor],
        plane: Plane, takes: Layout, returns: Layout, dtype: torch.dtype, random: bool, writes: bool,
        changes: dict[str, int],
    ) -> None:  # fmt: skip
        self.graph, self.bodies, self.chunked = graph, bodies, chunked
        self.streams = chunked is not None
        self.takes, self.returns, self.dtype = takes, returns, dtype
        self.random, self.writes, self.changes = random, writes, changes
        self.coordinates = plane.coordinates
        self.fallbacks, self.gathered = plane.fallbacks, plane.gathered
        self.received, self.computed = plane.received, plane.computed
        self._attributes = attributes

    @cached_property
    def _module(self) -> fx.GraphModule:
        """The graph as a callable module, made at the first run: plans only read the graph."""
        bodies = {name: fx.GraphModule(self._attributes, _lowered(body)) for name, body in self.bodies.items()}
        return fx.GraphModule({**self._attributes, **bodies}, _lowered(self.graph))

    def __call__(self, local: Tensor, mesh: Mesh, *extras: Tensor, kernels: Kernels = EAGER) -> Tensor:
        """Run the graph.

        Args:
            local: this rank's shard of the input, in the layout `takes`.
            mesh: the ranks. All of them run their programs.
            extras: values for the further arguments that it was recorded with.
            kernels: the kernels that operators use on the CPU.

        Returns:
            This rank's shard of the result, in the layout `returns`.
        """
        return self._whole(local, mesh, extras, kernels, None)

    def chunks(
        self, local: Tensor, mesh: Mesh, *extras: Tensor, kernels: Kernels = EAGER
    ) -> Iterator[tuple[int, Tensor]]:
        """Run the graph chunk by chunk. Each chunk is computed when it is requested.

        Args:
            local: this rank's shard of the input.
            mesh: the ranks.
            *extras: the further arguments.
            kernels: as for `__call__`.

        Yields:
            Where along `chunked` a chunk begins, and this rank's shard of it. One chunk, unless the program `streams`.
        """
        return self.captured(None, local, mesh, *extras, kernels=kernels)

    def captured(
        self, captures: Captures | None, local: Tensor, mesh: Mesh, *extras: Tensor, kernels: Kernels = EAGER
    ) -> Iterator[tuple[int, Tensor]]:
        """Run the graph as `chunks` does, with captured graphs of work that repeats."""
        if not self.streams:
            yield 0, self._whole(local, mesh, extras, kernels, captures)
        else:
            yield from self._emitted(local, mesh, extras, kernels, captures)

    def _whole(
        self, local: Tensor, mesh: Mesh, extras: Sequence[Tensor], kernels: Kernels, captures: Captures | None
    ) -> Tensor:
        if self.chunked is None:
            pool = BufferPool(local.device)
            run: Any = self._interpreter().run if _profiling() else self._module
            with self._running(mesh, pool, kernels):
                if captures is None or _profiling():
                    result: Tensor = run(local, *extras)
                else:
                    inputs = [local, *extras]
                    result = captures.run(self, self._places(), self.peak, lambda given: run(*given), inputs)
            return _unshared(result, pool)
        whole = local.new_empty([local_extent(dim, self.coordinates) for dim in self.returns], dtype=self.dtype)
        for start, chunk in self._emitted(local, mesh, extras, kernels, captures):
            whole.narrow(self.chunked, start, chunk.shape[self.chunked]).copy_(chunk)
        return whole

    def layout_of(self, chunk: Tensor) -> Layout:
        """The layout of a chunk of the result, of which `chunk` is this rank's shard."""
        layout = list(self.returns)
        if self.streams and self.chunked is not None:
            layout[self.chunked] = (Factor(chunk.shape[self.chunked]),)
        return tuple(layout)

    def _interpreter(self, captures: Captures | None = None) -> fx.Interpreter:
        if _profiling():
            return _Regions(self._module)
        if captures is None:
            return fx.Interpreter(self._module)
        places = self._places()
        return _Captured(
            self._module, lambda name, body, given: captures.run(self, (name, places), self.peak, body, given)
        )

    def _places(self) -> tuple[Any, ...]:
        """Return where weights lie, which a captured graph reads, and how the device multiplies fp32."""
        attributes = self._attributes.values()
        return (
            tuple(one.data_ptr() for one in attributes),
            torch.backends.cudnn.allow_tf32,
            torch.get_float32_matmul_precision(),
        )

    def _emitted(
        self, local: Tensor, mesh: Mesh, extras: Sequence[Tensor], kernels: Kernels, captures: Captures | None
    ) -> Iterator[tuple[int, Tensor]]:
        run = self._interpreter(captures)
        run.args_iter = iter((local, *extras))
        nodes = iter(self._module.graph.nodes)
        pool = BufferPool(local.device)
        while True:
            with self._running(mesh, pool, kernels):
                chunk = _until_chunk(run, nodes)
            if chunk is None:
                return
            pool.clear()  # before anything of the next chunk is allocated
            start, own = chunk[0], _unshared(chunk[1], pool)
            del chunk
            yield start, own
            del own  # else it would be held while the next one is computed

    @contextmanager
    def _running(self, mesh: Mesh, pool: BufferPool, kernels: Kernels) -> Iterator[None]:
        casting = torch._C._DisableAutocast()  # the graph has operators for casts
        with context.on(mesh, kernels, pool), torch.no_grad(), torch._C.DisableTorchFunction(), casting:
            yield

    def nodes(self) -> Iterator[fx.Node]:
        """The operators in the order in which they run; those of a body once for each of its calls."""
        for node in self.graph.nodes:
            if node.op == "call_module":
                yield from (one for one in self.bodies[node.target].nodes if is_operator(one))
            elif is_operator(node):
                yield node

    @property
    def starts(self) -> tuple[int, ...]:
        """Where along `chunked` each chunk begins; empty if the result comes at once."""
        found: list[Any] = [node.args[1] for node in self.graph.nodes if node.target is operators.emit]
        return tuple(found)

    @property
    def messages(self) -> int:
        """Number of messages that this rank sends."""
        return sum(node.meta.get("messages", 0) for node in self.nodes())

    @property
    def bytes_sent(self) -> int:
        """Bytes that this rank sends."""
        return sum(node.meta.get("sent", 0) for node in self.nodes())

    @property
    def flops(self) -> float:
        """Multiplications and additions of convolutions, matrix products and attention."""
        return sum(map(flops, self.nodes()))

    @property
    def steps(self) -> int:
        """Number of steps; see `steps.on_each_step`."""
        return sum(map(steps.is_step, self.nodes()))

    @cached_property
    def peak(self) -> int:
        """Peak bytes of live tensors: input, results, and copies that operators make.

        Weights and chunks of the result that were handed out do not count.
        """
        return peak(self.graph, self.bodies)


def captures_for(program: Program, mesh: Mesh) -> Captures | None:
    """Return the device's captured graphs if a program may use them: one rank, nothing random, nobody who counts."""
    if mesh.grid.size > 1 or mesh.transport.shared_device or program.random or program.writes or steps.is_heard():
        return None
    found = captures(mesh.device.torch_device)
    return found if found.allowed else None


def _lowered(graph: fx.Graph) -> fx.Graph:
    """Replace operators that are slow in PyTorch: half precision, 3-D convolutions, padding, joining. Count steps."""
    lowered = fx.Graph()
    lowered.output(lowered.graph_copy(graph, {}))
    steps.count(lowered)
    for node in lowered.nodes:
        if _is_slow(node):
            node.args, node.target = (node.target, *node.args), multiplied
        elif node.target is torch.ops.aten.convolution.default and not node.kwargs:
            node.target = convolution
        elif node.target is torch.ops.aten.constant_pad_nd.default and not node.kwargs:
            node.target = windows.padded
        elif node.target is torch.ops.aten.cat.default and not node.kwargs:
            node.target = windows.joined
    return lowered


def _is_slow(node: fx.Node) -> bool:
    products = (*CONVOLUTIONS, *PRODUCTS)
    return node.target in products and not node.kwargs and not has_units(node.meta["dtype"])


def _unshared(result: Tensor, pool: BufferPool) -> Tensor:
    """Return a result in memory of its own: a view would keep a larger map alive, and a buffer the whole pool."""
    whole = result.untyped_storage().nbytes() == result.nbytes
    return result if whole and not pool.holds(result) else result.clone()


def _profiling() -> bool:
    return torch._C._autograd._profiler_enabled()


class _Regions(fx.Interpreter):
    def run_node(self, n: fx.Node) -> Any:
        with region(n.meta.get("module") or BETWEEN_SUBMODULES) if is_operator(n) else nullcontext():
            return super().run_node(n)

    def call_module(self, target: Any, args: Any, kwargs: Any) -> Any:
        return _Regions(self.fetch_attr(target)).run(*args, **kwargs)


class _Captured(fx.Interpreter):
    """Calls the graphs of a program by a function of their name, themselves, and their inputs in a box."""

    def __init__(self, module: fx.GraphModule, call: Callable[[str, Any, list[Tensor]], Any]) -> None:
        super().__init__(module)
        self._call = call

    def call_module(self, target: Any, args: Any, kwargs: Any) -> Any:
        return self._call(target, self.fetch_attr(target), *args)


def _until_chunk(run: fx.Interpreter, nodes: Iterator[fx.Node]) -> tuple[int, Tensor] | None:
    """Run nodes up to the next chunk that is handed out; None at the end."""
    for node in nodes:
        found = None
        if node.target is operators.emit:
            start: Any = node.args[1]
            found = start, run.env[node.all_input_nodes[0]]
        else:
            run.env[node] = run.run_node(node)
        for gone in run.user_to_last_uses.get(node, []):
            del run.env[gone]
        if found is not None:
            return found
    return None
