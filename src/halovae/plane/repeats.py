"""Outlining: a submodule that is called once per chunk is recorded once, as a graph that the main graph calls."""

from __future__ import annotations

import operator
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx, nn
from torch.utils._python_dispatch import _disable_current_modes

from halovae.plane.operators import BETWEEN_RANKS, emit, pack, take
from halovae.plane.state import Snapshot, State, Unclear, check_made
from halovae.plane.tensor import PlaneTensor, made

if TYPE_CHECKING:
    from halovae.plane.trace import Recorder


def _begin(*inputs: Any) -> None:
    """Marks the start of a call's operators."""


def _end(*outputs: Any) -> None:
    """Marks their end, and uses the tensors that the call leaves."""


def _repeated(*inputs: Any) -> None:
    """Stands for a call that equals an earlier one."""


_MARKS = (_begin, _end, _repeated)


@dataclass
class _Block:
    """A recorded call.

    Attributes:
        state: the tensors and holders before the call; afterwards also those that it made.
        before: what its holders held before the call.
        after: what they held after it.
        returned: a description of what it returned.
        begin: the mark before its nodes.
        end: the mark after them.
        counters: what it added to the plane's counters.
        repeats: the calls that equal it.
    """

    state: State
    before: Snapshot
    after: Snapshot
    returned: Any
    begin: fx.Node
    end: fx.Node
    counters: tuple[Counter[str], Counter[str], int, int]
    repeats: list[fx.Node] = field(default_factory=list)

    @property
    def inputs(self) -> int:
        """Number of tensors before the call."""
        return len(self.begin.args)

    def nodes(self) -> list[fx.Node]:
        """The nodes between its marks."""
        found, node = [], self.begin.next
        while node is not self.end:
            found.append(node)
            node = node.next
        return found


class LeakError(RuntimeError):
    """A tensor of a repeated call is used outside of it, though the call neither returned nor kept it."""


class Repeats:
    """Recognizes calls of modules' children whose state is equal except for tensor values.

    The state includes feature caches, in lists and dicts that are passed or on modules. A call is recorded in full if
    its state cannot be tracked, if it writes to its inputs, or if it uses tensors from elsewhere. Changes to globals
    and class attributes are not seen.

    Args:
        recorder: records the calls.
        modules: the modules whose children are watched.
    """

    def __init__(self, recorder: Recorder, modules: Sequence[nn.Module]) -> None:
        self._recorder, self._modules = recorder, modules
        self._blocks: dict[Any, _Block | None] = {}
        self._busy = False
        self._thread = threading.get_ident()

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Watch calls of the children."""
        children = {id(child): child for module in self._modules for child in module.children()}
        watched = [child for child in children.values() if "forward" not in vars(child)]
        try:
            for child in watched:
                child.forward = self._watching(child)
            yield
        finally:
            for child in watched:
                vars(child).pop("forward", None)

    def _watching(self, child: nn.Module) -> Callable[..., Any]:
        original = child.forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            if self._busy or threading.get_ident() != self._thread:
                return original(*args, **kwargs)
            self._busy = True
            try:
                return self._call(child, original, args, kwargs)
            finally:
                self._busy = False

        return forward

    def _call(self, child: nn.Module, original: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> Any:
        if any(len(one._forward_hooks) > 1 or len(one._forward_pre_hooks) > 1 for one in child.modules()):
            return original(*args, **kwargs)  # hooks other than the recorder's may keep anything
        state = State([*args, kwargs], child)
        try:
            before = state.snapshot()
            signatures = tuple(self._signature(one, state.tensors) for one in state.tensors)
        except Unclear:
            return original(*args, **kwargs)
        kind = self._recorder.device.type
        casting = torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind)
        key = id(child), len(args), before, signatures, casting, torch.get_default_dtype()
        if key not in self._blocks:
            self._blocks[key] = None
            result, self._blocks[key] = self._record(original, args, kwargs, state, before)
            return result
        block = self._blocks[key]
        return original(*args, **kwargs) if block is None else self._repeat(block, state)

    def _signature(self, x: PlaneTensor, everyone: Sequence[PlaneTensor]) -> Any:
        """Return what a call depends on of a tensor, besides its values."""
        if not hasattr(x.local, "halovae_node") or self._recorder.memory(x.local).constant:
            raise Unclear("a constant")  # the graph holds its values
        x.check_fresh()
        storage = x.local.untyped_storage()
        alias = next(at for at, one in enumerate(everyone) if one.local.untyped_storage() is storage or one is x)
        return x.partition, x.local.shape, x.local.stride(), x.stride(), x.dtype, x.frozen, alias

    def _record(
        self, original: Callable[..., Any], args: Any, kwargs: dict[str, Any], state: State, before: Snapshot
    ) -> tuple[Any, _Block | None]:
        recorder, plane = self._recorder, self._recorder.plane
        assert plane is not None
        count = len(state.tensors)
        begin = recorder.graph.call_function(_begin, tuple(recorder.node(one.local) for one in state.tensors))
        fallbacks, gathered = Counter(plane.fallbacks), Counter(plane.gathered)
        received, computed = plane.received, plane.computed
        writes = len(recorder.written)
        result = original(*args, **kwargs)
        try:
            returned, after = state.describe(result), state.snapshot()
            check_made(after, before)
            made = state.tensors[count:]
            if any(one.source is not None or one.plane is not plane for one in made):
                raise Unclear("a copy that stands for a view")
            nodes = tuple(recorder.node(one.local) for one in made)
        except Unclear:
            return result, None
        end = recorder.graph.call_function(_end, nodes)
        counters = (
            plane.fallbacks - fallbacks, plane.gathered - gathered, plane.received - received,
            plane.computed - computed,
        )  # fmt: skip
        block = _Block(state, before, after, returned, begin, end, counters)
        inside = set(block.nodes())
        known = {*inside, *begin.all_input_nodes}
        for node in (*inside, end):
            if any(one not in known and one.op != "get_attr" for one in node.all_input_nodes):
                return result, None  # it uses a tensor that is neither passed to it nor kept on it
        if any(memory.nodes[0] not in inside for memory in recorder.written[writes:]):
            return result, None
        return result, block

    def _repeat(self, block: _Block, state: State) -> Any:
        recorder, plane = self._recorder, self._recorder.plane
        assert plane is not None
        graph = recorder.graph
        call = graph.call_function(_repeated, tuple(recorder.node(one.local) for one in state.tensors))
        call.meta["module"] = recorder.module
        block.repeats.append(call)
        samples, results = block.state.tensors, []
        bases: dict[int, Tensor] = {}
        for sample, one in zip(samples[: block.inputs], state.tensors, strict=True):
            bases.setdefault(id(sample.local.untyped_storage()), one.local)
        for index, sample in enumerate(samples[block.inputs :]):
            item = graph.call_function(operator.getitem, (call, index))
            like = sample.local
            storage = like.untyped_storage()
            with _disable_current_modes(), torch._C.DisableTorchFunction():
                if id(storage) not in bases:
                    bases[id(storage)] = torch.empty(storage.nbytes(), dtype=torch.uint8, device="meta")
                # Tensors that share memory in the recorded call share memory here; offsets do not matter.
                local = torch.empty(0, dtype=like.dtype, device="meta")
                local.set_(bases[id(storage)].untyped_storage(), 0, like.shape, like.stride())
            memory, original = recorder.noted(local, item, False), recorder.memory(like)
            if memory is not original:
                memory.originals.append(original)
            results.append(made(local, sample.partition, plane, sample.frozen, tuple(sample.stride())))
        fallbacks, gathered, received, computed = block.counters
        plane.fallbacks.update(fallbacks)
        plane.gathered.update(gathered)
        plane.received += received
        plane.computed += computed
        return state.replay(block.state, results, block.before, block.after, block.returned)

    def outline(self, graph: fx.Graph) -> dict[str, fx.Graph]:
        """Make graphs of the repeated calls of children.

        Args:
            graph: the main graph; it calls them afterwards.

        Returns:
            The graphs by the names under which they are called. A block may have several, which differ in the results
            that are used: unused results are not computed.

        Raises:
            LeakError: a tensor of such a call is used outside of it, but was neither returned nor kept.
        """
        repeating = {key[0] for key, block in self._blocks.items() if block is not None and block.repeats}
        blocks: dict[fx.Node, _Block] = {}
        gone = {node for node in graph.nodes if node.target in (_begin, _end)}
        for key, block in self._blocks.items():
            if block is not None and key[0] in repeating:  # including the first chunk, which equals no other
                gone.update(block.nodes())
                blocks.update(dict.fromkeys((_called(graph, block), *block.repeats), block))
        bodies: dict[str, fx.Graph] = {}
        names: dict[tuple[int, frozenset[int]], tuple[str, list[int]]] = {}
        calls = [node for node in graph.nodes if node in blocks]
        for call in reversed(calls):  # users come before what they use
            items = {int(item.args[1]): item for item in call.users if any(user not in gone for user in item.users)}
            used = sorted(items)
            key = id(blocks[call]), frozenset(used)
            if key not in names:
                name = f"_halovae_body_{len(names)}"
                bodies[name], inputs = _body(blocks[call], used)
                names[key] = name, inputs
            name, inputs = names[key]
            with graph.inserting_before(call):
                box = graph.call_function(pack, tuple(call.args[index] for index in inputs))
                made = graph.create_node("call_module", name, (box,))
            made.meta["module"] = call.meta.get("module", "")
            for place, index in enumerate(used):
                items[index].args = made, place
            call.args = ()
            gone.update((call, *call.users))
        for node in reversed(graph.nodes):
            if node not in gone or (node.op == "get_attr" and node.users):
                continue
            if node.users:
                source = f"{node.target} of {node.meta.get('module')}"
                raise LeakError(f"the result of {source} is used outside of a call that did not return it")
            graph.erase_node(node)
        return bodies


def _called(graph: fx.Graph, block: _Block) -> fx.Node:
    """Insert a call before a block's nodes, and replace the block's results by the call's outside of the block."""
    inside = block.nodes()
    within = {*inside, block.end}
    with graph.inserting_before(block.begin):
        call = graph.call_function(_repeated, block.begin.args)
        call.meta["module"] = next((one.meta["module"] for one in inside if one.meta.get("module")), "")
        for index, output in enumerate(block.end.args):
            assert isinstance(output, fx.Node)
            item = graph.call_function(operator.getitem, (call, index))
            item.meta = {**output.meta, "constant": False}
            if output in within:
                output.replace_all_uses_with(item, lambda user: user not in within)
    for node in inside:
        if node.op == "get_attr" and any(user not in within for user in node.users):
            block.begin.prepend(node)
    return call


def _body(block: _Block, used: Sequence[int]) -> tuple[fx.Graph, list[int]]:
    """Return the graph of a block that returns the results `used`, and the indices of the inputs that it takes."""
    found = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    box = found.placeholder("box")
    taken = []
    for at, node in enumerate(block.begin.args):
        assert isinstance(node, fx.Node)
        copies[node] = found.call_function(take, (box, at))
        copies[node].meta = {**node.meta, "constant": False}
        taken.append(copies[node])
    for node in block.nodes():
        for source in node.all_input_nodes:
            if source not in copies:  # an attribute
                copies[source] = found.node_copy(source)
        copies[node] = found.node_copy(node, copies.__getitem__)
    outputs = block.end.args
    for node in block.end.all_input_nodes:
        if node not in copies:
            copies[node] = found.node_copy(node)
    found.output(tuple(copies[outputs[index]] for index in used))  # type: ignore[index]
    clean(found)
    inputs = [at for at, one in enumerate(taken) if not one._erased]
    for place, at in enumerate(inputs):
        taken[at].args = box, place
    return found, inputs


def clean(graph: fx.Graph) -> None:
    """Remove unused nodes, except those that other ranks wait for."""
    kept = (*BETWEEN_RANKS, *_MARKS, emit)
    graph.eliminate_dead_code(lambda node: node.op == "call_module" or node.target in kept or node.is_impure())
