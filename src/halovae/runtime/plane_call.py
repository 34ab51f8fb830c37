"""One call of a diffusers autoencoder on a partitioned plane: how ranks share it, and its result."""

from __future__ import annotations

import inspect
import math
import socket
import sys
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from halovae.device.captures import captures
from halovae.device.kinds import Device
from halovae.distributed.mesh import Mesh
from halovae.errors import MemoryBudgetError, RankOutOfMemoryError, UnplannableError
from halovae.grid import Grid
from halovae.kernels.native import EAGER, Kernels, compiled, explain, prepare, ready
from halovae.models.classes import FIELDS, sizes_of, spatial_ratio, whole
from halovae.models.registry import traits_of
from halovae.plane import Sharded, ShardReport
from halovae.plane.fingerprint import Unstable
from halovae.plane.keys import hooked, value_key
from halovae.plane.results import Chunks
from halovae.plane.stored import Identity
from halovae.planning.decision import MARGIN, Candidate
from halovae.planning.planner import calibration_of, is_unmeasured, usable
from halovae.planning.search import Search
from halovae.runtime.options import Call, Choice, Sharing

_CHOICES = 64  # that a call keeps: one for each shape and way to share it


class PlaneCall:
    """One of an autoencoder's two calls, sharded.

    Args:
        vae: the autoencoder.
        name: which call.
        mesh: all ranks of the world, for calls beside those of other threads: either they share the plane on its grid,
            or each computes all by itself. None for the meshes that all calls use.

    Attributes:
        sizes: the autoencoder's, where they are known; None for other classes.
    """

    def __init__(self, vae: nn.Module, name: Call, mesh: Mesh | None = None) -> None:
        self.vae, self.name, self._mesh = vae, name, mesh
        self._alone = None if mesh is None else Mesh(Grid(), mesh.device.torch_device)
        self._own: Callable[..., Any] = getattr(type(vae), name)
        self.signature = inspect.signature(self._own)
        identity = Identity(f"PlaneCall.{name}", self._kind_by_name, self._recall_kind)
        self._multiple = (spatial_ratio(vae) or 1) if name == "encode" else 1
        self.sizes = sizes_of(vae)
        self._sharded = Sharded(self._run, [vae], self._multiple, identity)
        if Device.default().kind == "cpu" and (weight := next(vae.parameters(), None)) is not None:
            prepare(weight.device)  # while there is something else to do
        # By what is asked, how it is shared, and whether kernels are eager.
        self._choices: OrderedDict[tuple[str, Sharing, bool], Choice] = OrderedDict()
        self.fell_back = ""  # what the last call gave up when memory ran out
        # Of the result: its class, the field that counts, and the class of a distribution in there.
        self.kind: tuple[type, str, type | None] = (Tensor, "", None)

    @property
    def report(self) -> ShardReport | None:
        """What the last call took."""
        return self._sharded.report

    def choose(self, x: Tensor, sharing: Sharing, options: Mapping[str, Any]) -> Choice:
        """Choose how ranks share a call. Collective.

        Args:
            x: the latents or pictures.
            sharing: what the caller asks for.
            options: further arguments of the module's own call.

        Raises:
            ValueError: an argument out of range.
            MemoryBudgetError: (a ValueError) no grid fits into the memory budget.
            TypeError: an argument of the wrong kind, or one that the module does not take.
        """
        try:
            sharing.check()
            shared = Grid(rows=sharing.world) if sharing.mode == "parallel" else Grid()
            grid = sharing.mesh.grid if sharing.mesh else sharing.grid or shared
            if self.sizes is not None and self.name == "decode" and isinstance(x, Tensor):
                self.sizes.check_latents(x.shape, x.dtype, grid)  # it says best what is expected
            self._check(x, options)
            if self.sizes is not None and self.name == "encode":
                self.sizes.check_pictures(x.shape, grid)
        except (ValueError, TypeError) as error:
            self.refuse(sharing, error)
        if self.name == "decode":
            _warn_unless_finite(x)
        if sharing.mesh is not None:
            return Choice(sharing.mesh.grid, x.shape[0])
        world, (height, width) = sharing.world, x.shape[-2:]
        kernels = None
        if self._mesh is not None and sharing.mode == "single":
            _, kernels = self._agreed(self._mesh, f"{list(x.shape)}, {x.dtype}, {sharing}")
        if sharing.grid is not None or sharing.mode == "single":
            return Choice(sharing.grid or Grid(), x.shape[0], kernels=kernels)
        alone = world == 1 and sharing.memory_budget is None
        if alone and (sharing.mode != "auto" or not self._is_short_of_memory(x, options)):
            return Choice(Grid(), x.shape[0], kernels=kernels)
        if sharing.mode == "auto" and x.numel() > 0:
            try:
                return self._planned(x, sharing, options)
            except UnplannableError:
                pass  # it runs eagerly
            except MemoryBudgetError as error:
                if not alone:
                    raise
                warnings.warn(f"memory may not suffice: {error}", RuntimeWarning, stacklevel=4)
                return Choice(Grid(), x.shape[0], kernels=kernels)
        if height >= world or sharing.mode == "parallel":
            return Choice(Grid(rows=world), x.shape[0])
        return Choice(Grid(cols=world) if width >= world else Grid(), x.shape[0])

    def _agreed(self, everyone: Mesh, asked: str, wait: bool = False) -> tuple[list[tuple[int, str]], Kernels]:
        """Each rank's free bytes and its host, and the kernels: compiled ones, if all ranks have them.

        Args:
            everyone: the ranks.
            asked: what each of them is about to do.
            wait: for the compiler.
        """
        offer = *everyone.device.memory()[:1], socket.gethostname(), ready(everyone.device.torch_device, wait)
        offers = everyone.agree(f"{self.name} {asked}", None, offer)
        explain(everyone.device.torch_device)
        return [(free, host) for free, host, _ in offers], compiled() if all(one for *_, one in offers) else EAGER

    def refuse(self, sharing: Sharing, error: Exception) -> None:
        """Raise an error, of which the other ranks learn. They are about to agree."""
        self.everyone(sharing).agree("", error, None)

    def everyone(self, sharing: Sharing) -> Mesh:
        """The mesh over which ranks agree."""
        return sharing.mesh or self._mesh or sharing.everyone(next(self.vae.parameters()).device)

    def _used(self, grid: Grid) -> Mesh | None:
        """The mesh of its own for a grid, if it has any."""
        return None if self._mesh is None else self._mesh if grid == self._mesh.grid else self._alone

    def _check(self, x: Any, options: Mapping[str, Any]) -> None:
        if not isinstance(x, Tensor) or x.ndim not in (4, 5) or not x.is_floating_point():
            described = f"{x.dtype} of shape {list(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
            raise TypeError(
                f"{type(self.vae).__name__}.{self.name} of {described}: expected floating [B, C, H, W] or "
                "[B, C, T, H, W]; audio and other autoencoders without a plane of rows and cols cannot be partitioned"
            )
        self._bound(x, options)

    def peak(self, x: Tensor, options: Mapping[str, Any]) -> tuple[int, int] | str:
        """See `Sharded.peak`."""
        tensors, static = self._bound(x, options)
        return self._sharded.peak(x, *tensors.values(), options={**static, "_names": ",".join(tensors)})

    def _is_short_of_memory(self, x: Tensor, options: Mapping[str, Any]) -> bool:
        """Whether a call on one rank would take more than the free memory, so that it has to be planned."""
        unknown = x.numel() == 0 or next(hooked(self.vae), None) is not None
        found = "" if unknown else self.peak(x, options)
        if isinstance(found, str):
            return False
        (peak, result), device = found, Device(x.device)
        is_short = peak * (1 + MARGIN) + result > usable([(device.available, "")], device.kind)
        return is_short and (not captures(x.device).release() or self._is_short_of_memory(x, options))

    def _planned(self, x: Tensor, sharing: Sharing, options: Mapping[str, Any]) -> Choice:
        """The grid that is predicted to be the fastest of those that fit; all ranks ask together, and decide alike."""
        tensors, static = self._bound(x, options)
        key = value_key(static)
        if key is None or next(hooked(self.vae), None) is not None:
            raise UnplannableError("an option is no plain value, or hooks move weights: it runs eagerly")
        batch, names = x.shape[0], ",".join(tensors)
        asked = f"{list(x.shape)}, {x.dtype}, {key}, {[list(one.shape) for one in tensors.values()]}, {sharing}"
        everyone, world = self.everyone(sharing), sharing.world
        # To measure this machine takes longer than the compiler. What fits into a budget is to fit the next time, too.
        wait = sharing.memory_budget is not None or is_unmeasured(everyone, x.dtype)
        offers, kernels = self._agreed(everyone, asked, wait)
        budget = sharing.memory_budget or usable(offers, everyone.device.kind)
        known = self._choices.get(this := (asked, sharing, kernels is EAGER))
        # Encodes are small beside decodes: without a budget of their own none is refused for what is free just now.
        limited = self.name == "decode" or sharing.memory_budget is not None
        decided = None if known is None else known.decision
        if known is not None and decided is not None and (not limited or decided.stands(budget - known.kept)):
            self._choices.move_to_end(this)
            return known

        def search(items: int) -> Search:
            rounds = batch // items

            def allowed(grid: Grid) -> bool:
                ranks = grid.size in (1, world) if self._mesh is None else grid in (Grid(), self._mesh.grid)
                return ranks and rounds % grid.batch == 0

            return Search(
                lambda z: self._run(z, *tensors.values(), _names=names, **static), self.vae, (items, *x.shape[1:]),
                x.dtype, calibration_of(everyone, x.dtype, kernels), rounds, budget,
                len({host for _, host in offers}) > 1, allowed, self._multiple,
                1 if sharing.gather == "rank0" else world, kernels is not EAGER,
            )  # fmt: skip

        # Noise is drawn for all items at once, and other tensors may belong to all of them.
        whole = batch == 1 or bool(tensors) or traits_of(type(self.vae)).batched
        found = search(batch if whole else 1)
        first = found.traced(Grid())
        if not whole and first.random:
            whole = True
            first = (found := search(batch)).traced(Grid())
        size = math.prod(first.pictures) * (sharing.dtype or x.dtype).itemsize * (1 if whole else batch)
        kept = 0 if sharing.gather == "none" else size
        if limited and kept >= budget:
            raise MemoryBudgetError(
                f"tensors of shape {list(x.shape)} do not fit into a memory budget of {budget / 2**20:,.1f} MiB: the "
                f"result of the {self.name} takes {kept / 2**20:,.1f} MiB"
            )
        found.budget = budget - kept if limited else None
        decision = found.decide(world)

        def choice_of(way: Candidate, leaner: Choice | None = None) -> Choice:
            items = batch if whole or sharing.gather == "none" else way.grid.batch
            return Choice(way.grid, items, decision, kept, leaner, kernels, way.strips)

        # Shards that ranks keep belong to one grid, which cannot change during a call. Ranks that compute all of
        # it on a mesh of their own do not learn where memory runs out.
        falls_back = sharing.gather != "none" and world > 1 and self._mesh is None
        leaner = choice_of(other) if falls_back and (other := decision.leaner()) else None
        choice = self._choices[this] = choice_of(decision.chosen, leaner)
        while len(self._choices) > _CHOICES:
            self._choices.popitem(last=False)
        return choice

    def arguments(self, x: Tensor, *args: Any, **kwargs: Any) -> tuple[dict[str, Any], bool]:
        """Arguments of the module's own call besides `x`, by name, and whether it is to return a tuple."""
        bound = dict(list(self.signature.bind(self.vae, x, *args, **kwargs).arguments.items())[2:])
        bound |= bound.pop("kwargs", {})
        return bound, not bound.pop("return_dict", True)

    def _bound(self, x: Tensor, options: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Further tensors, and other arguments, by name."""
        rest, _ = self.arguments(x, **options)
        tensors = {name: value for name, value in rest.items() if isinstance(value, Tensor)}
        return tensors, {name: value for name, value in rest.items() if name not in tensors}

    def stream(self, x: Tensor, choice: Choice, sharing: Sharing, options: Mapping[str, Any]) -> Chunks:
        """The result in chunks, as `Sharded.stream` has them; a result of several rounds is one chunk.

        Args:
            x: the latents or pictures.
            choice: how ranks share them.
            sharing: who receives the result, and its dtype.
            options: further arguments of the module's own call.
        """
        tensors, static = self._bound(x, options)
        static["_names"] = ",".join(tensors)
        self.fell_back = ""

        def started(choice: Choice) -> Chunks:
            if choice.items < x.shape[0]:
                return Chunks(self._rounds(x, choice, sharing, static))
            return self._sharded.stream(
                x, *tensors.values(), grid=choice.grid, mesh=sharing.mesh or self._used(choice.grid),
                group=sharing.group, gather=sharing.gather, options=static, capture=sharing.captures,
                convert=sharing.convert, leaner=choice.leaner is not None, kernels=choice.kernels, strips=choice.strips,
            )  # fmt: skip

        chunks = started(choice)
        if choice.leaner is None or choice.items < x.shape[0]:  # rounds fall back themselves
            return chunks
        return Chunks(self._or_leaner(chunks, choice, choice.leaner, started), chunks.dim, chunks.extent)

    def _or_leaner(
        self, chunks: Chunks, choice: Choice, leaner: Choice, started: Callable[[Choice], Chunks]
    ) -> Iterator[Tensor | None]:
        """Chunks, from where memory runs out on those of the leaner way."""
        count = done = 0
        try:
            for chunk in chunks:
                count += 1
                done += 0 if chunk is None or chunks.dim is None else chunk.shape[chunks.dim]
                yield chunk
                del chunk  # else it would be held while the next one is computed
            return
        except RankOutOfMemoryError as error:
            self.fell_back = str(error)
        others = started(leaner)
        if chunks.dim is None or others.dim is None:
            whole = others.join()
            yield whole if whole is None or not done else whole.narrow(chunks.dim or 0, done, chunks.extent - done)
            return
        for index, chunk in enumerate(others):
            if index >= count:  # it was not yielded before memory ran out
                yield chunk
            del chunk

    def _rounds(self, x: Tensor, choice: Choice, sharing: Sharing, options: dict[str, Any]) -> Iterator[Tensor | None]:
        """All items, a few at a time."""
        whole, taken, start = None, [], 0
        while start < x.shape[0]:
            some = x[start : start + choice.items]
            try:
                part = self._sharded(
                    some, grid=choice.grid, mesh=self._used(choice.grid), group=sharing.group, gather=sharing.gather,
                    options=options, convert=sharing.convert, leaner=choice.leaner is not None, kernels=choice.kernels,
                    strips=choice.strips, capture=sharing.captures,
                )  # fmt: skip
            except RankOutOfMemoryError as error:
                assert choice.leaner is not None
                self.fell_back, choice = str(error), choice.leaner
                start -= start % choice.items
                continue
            if part is not None:
                whole = part.new_empty((x.shape[0], *part.shape[1:])) if whole is None else whole
                whole[start : start + choice.items] = part
            assert self.report is not None
            taken.append(self.report)
            start += choice.items
        self._sharded.report = replace(
            taken[-1],
            shape=(x.shape[0], *taken[-1].shape[1:]),
            chunked=None,
            recorded=sum(one.recorded for one in taken),
            clocks=tuple(clock for one in taken for clock in one.clocks),
            waits=tuple(clock for one in taken for clock in one.waits),
            calls=sum(one.calls for one in taken),
            messages=sum(one.messages for one in taken),
            bytes_sent=sum(one.bytes_sent for one in taken),
        )
        yield whole

    def _run(self, x: Tensor, *tensors: Tensor, _names: str, **options: Any) -> Tensor:
        named = dict(zip(_names.split(","), tensors, strict=True)) if _names else {}
        with whole(self.vae):
            result = self._own(self.vae, x, **named, **options)
        if isinstance(result, Tensor):
            self.kind = Tensor, "", None
            return result
        field = next((name for name in FIELDS if getattr(result, name, None) is not None), None)
        if field is None:
            name, fields = f"{type(self.vae).__name__}.{self.name}", ", ".join(FIELDS)
            raise TypeError(f"{name} returned {type(result).__name__}: expected one of {fields} in it")
        value = getattr(result, field)
        distribution = None
        if not isinstance(value, Tensor):
            distribution, value = type(value), value.parameters
        self.kind = type(result), field, distribution
        tensor: Tensor = value
        return tensor

    def _kind_by_name(self) -> list[str | None]:
        """`kind`, for a process that reads the graph instead of calling the module."""
        kind, field, distribution = self.kind
        classes = (kind, distribution) if field else ()
        for one in classes:
            if one is not None and self._class(one.__name__) is not one:
                raise Unstable(f"{one.__name__} is not known where {type(self.vae).__name__} is defined")
        return [kind.__name__, field, None if distribution is None else distribution.__name__]

    def _recall_kind(self, notes: list[Any]) -> None:
        kind, field, distribution = notes
        found = (self._class(kind), field, distribution and self._class(distribution)) if field else (Tensor, "", None)
        self.kind = found

    def _class(self, name: str) -> type:
        """A class by its name in the files that define the module's class."""
        for cls in type(self.vae).__mro__:
            found = vars(sys.modules[cls.__module__]).get(name)
            if isinstance(found, type):
                return found
        raise Unstable(name)

    def result(self, value: Tensor, as_tuple: bool) -> Any:
        """What the module's own call returns."""
        cls, field, distribution = self.kind
        if not field:
            return value
        held = value if distribution is None else distribution(value)
        return (held,) if as_tuple else cls(**{field: held})

    def blank(self, x: Tensor) -> Tensor:
        """Black pictures of the result's shape, in the dtype of what was decoded: one number, seen from everywhere."""
        assert self.report is not None
        return x.new_full((), -1).expand(self.report.shape)


def _warn_unless_finite(latents: Tensor) -> None:
    bad = int((~torch.isfinite(latents)).sum())
    if bad:
        warnings.warn(
            f"latents hold {bad} NaN or infinite values among {latents.numel()}; what they touch will be broken",
            RuntimeWarning,
            stacklevel=5,
        )
