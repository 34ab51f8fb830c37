"""Makers of random operators, one for each kind of rule."""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from plane.programs import Maker, Place, Source, Step
from torch import Tensor

MAKERS: dict[str, Maker] = {}


def maker(least: int, most: int = 6) -> Callable[[Maker], Maker]:
    """Register a maker for tensors of `least` to `most` dims."""

    def register(function: Maker) -> Maker:
        function.ndim = (least, most)  # type: ignore[attr-defined]
        MAKERS[function.__name__] = function
        return function

    return register


def plain(text: str, function: Callable[[Tensor], Any]) -> Step:
    return Step(text, lambda x, place: function(x))


def shuffled(s: Source, dims: int) -> list[int]:
    return s.some(range(dims), least=dims)


@maker(3, 5)
def convolution(s: Source, x: Tensor) -> Step:
    n = x.ndim - 2
    channels = x.shape[1]
    groups = s.divisor(channels)
    out = groups * s.integer(1, 2)
    kernel, stride = [s.integer(1, 5 if n < 3 else 3) for _ in range(n)], [s.integer(1, 3) for _ in range(n)]
    padding: Any = [s.integer(0, 4) for _ in range(n)]
    dilation = [s.integer(1, 3) for _ in range(n)]
    if s.rarely():
        stride, padding = [1] * n, "same"
    weight = s.numbers(out, channels // groups, *kernel) / math.sqrt(math.prod(kernel) * channels / groups)
    bias = s.numbers(out) if s.flag() else None
    convolve: Any = (F.conv1d, F.conv2d, F.conv3d)[n - 1]
    return plain(
        f"conv{n}d(weight={tuple(weight.shape)}, {bias is not None=}, {stride=}, {padding=}, {dilation=}, {groups=})",
        lambda x: convolve(x, weight, bias, stride, padding, dilation, groups),
    )


@maker(3, 5)
def transposed(s: Source, x: Tensor) -> Step:
    n, channels = x.ndim - 2, x.shape[1]
    groups = s.divisor(channels)
    each = s.integer(1, 2)
    kernel, stride = [s.integer(1, 5 if n < 3 else 3) for _ in range(n)], [s.integer(1, 3) for _ in range(n)]
    padding, dilation = [s.integer(0, 3) for _ in range(n)], [s.integer(1, 3) for _ in range(n)]
    extra = [s.integer(0, max(a, b) - 1) for a, b in zip(stride, dilation, strict=True)]
    weight = s.numbers(channels, each, *kernel) / math.sqrt(math.prod(kernel) * channels / groups)
    bias = s.numbers(each * groups) if s.flag() else None
    convolve: Any = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)[n - 1]
    return plain(
        f"conv_transpose{n}d(weight={tuple(weight.shape)}, {bias is not None=}, {stride=}, {padding=}, "
        f"output_padding={extra}, {groups=}, {dilation=})",
        lambda x: convolve(x, weight, bias, stride, padding, extra, groups, dilation),
    )


@maker(1)
def padding(s: Source, x: Tensor) -> Step:
    mode = s.one(["constant", "reflect", "replicate", "circular"])
    if mode == "constant" or x.ndim < 2:
        widths = [s.integer(-3, 4) for _ in range(2 * s.integer(1, x.ndim))]
        value = s.one([0.0, 1.5])
        return plain(f"pad({widths}, value={value})", lambda x: F.pad(x, widths, value=value))
    count = s.integer(max(1, x.ndim - 2), min(3, x.ndim - 1))
    widths = [s.integer(-1 if s.rarely() else 0, 4) for _ in range(2 * count)]
    return plain(f"pad({widths}, {mode!r})", lambda x: F.pad(x, widths, mode=mode))


@maker(3, 5)
def interpolation(s: Source, x: Tensor) -> Step:
    n = x.ndim - 2
    linear = ("linear", "bilinear", "trilinear")[n - 1]
    mode = s.one(["nearest", "nearest-exact", linear, *(["bicubic", "area"] if n == 2 else [])])
    options: dict[str, Any] = {"mode": mode}
    if s.flag():
        options["size"] = [s.integer(1, 17 if n < 3 else 8) for _ in range(n)]
    else:
        options["scale_factor"] = [s.one([2.0, 1.0, 0.5, 1.5, 1 / 3, 1.7, 3.0, 0.8]) for _ in range(n)]
        if s.rarely():
            options["recompute_scale_factor"] = True
    if mode in (linear, "bicubic"):
        options["align_corners"] = s.flag()
        if n == 2 and s.rarely():
            options["antialias"] = True
    return plain(f"interpolate({options})", lambda x: F.interpolate(x, **options))


@maker(1)
def slices(s: Source, x: Tensor) -> Step:
    kind = s.one(["getitem", "narrow", "select", "take"])
    dim = s.integer(-x.ndim, x.ndim - 1)
    size = x.shape[dim]
    if kind == "narrow":
        start = s.integer(0, size - 1)
        length = s.integer(1, size - start)
        return plain(f"narrow({dim}, {start}, {length})", lambda x: x.narrow(dim, start, length))
    if kind == "select":
        at = s.integer(-size, size - 1)
        return plain(f"select({dim}, {at})", lambda x: x.select(dim, at))
    if kind == "take":
        index = torch.tensor([s.integer(0, size - 1) for _ in range(s.integer(1, 5))])
        return plain(f"index_select({dim}, {index.tolist()})", lambda x: x.index_select(dim, index))
    picks: list[Any] = []
    for size in x.shape:
        if s.integer(0, 3) == 3:
            picks.append(s.integer(0, size - 1))
        else:
            ends = [None if s.flag() else s.integer(-size, size + more) for more in (0, 2)]
            picks.append(slice(ends[0], ends[1], s.one([None, 1, 2, 3])))
    if s.rarely():
        picks.insert(s.integer(0, len(picks)), None)
    if s.rarely():
        picks[s.integer(0, len(picks) - 1) :] = [...]
    return plain(f"getitem({picks})", lambda x: x[tuple(picks)])


@maker(1, 5)
def views(s: Source, x: Tensor) -> Step:
    kind = s.one(["permute", "flatten", "unflatten", "reshape", "view", "transpose", "squeeze", "unsqueeze", "expand"])
    first = s.integer(0, x.ndim - 1)
    last = s.integer(first, x.ndim - 1)
    if kind == "permute":
        order = shuffled(s, x.ndim)
        return plain(f"permute({order})", lambda x: x.permute(order))
    if kind == "flatten":
        return plain(f"flatten({first}, {last})", lambda x: x.flatten(first, last))
    if kind == "unflatten":
        sizes = s.factorization(x.shape[first])
        return plain(f"unflatten({first}, {sizes})", lambda x: x.unflatten(first, sizes))
    if kind in ("reshape", "view"):
        sizes = s.factorization(x.numel()) if s.flag() else [*x.shape[:first], -1, *x.shape[last + 1 :]]
        return plain(f"{kind}({sizes})", lambda x: getattr(x, kind)(sizes))
    if kind == "transpose":
        return plain(f"transpose({first}, {last - x.ndim})", lambda x: x.transpose(first, last - x.ndim))
    if kind == "squeeze":
        dims = sorted({first, last})
        return plain(f"squeeze({dims})", lambda x: x.squeeze(dims) if len(dims) > 1 else x.squeeze())
    if kind == "unsqueeze":
        return plain(f"unsqueeze({last - x.ndim})", lambda x: x.unsqueeze(last - x.ndim))
    sizes = [s.integer(1, 3) if n == 1 else s.one([-1, n]) for n in x.shape]
    lead = [s.integer(1, 2)] if s.flag() else []
    return plain(f"expand({lead + sizes})", lambda x: x.expand(lead + sizes))


@maker(3, 5)
def shuffles(s: Source, x: Tensor) -> Step:
    if s.flag():
        r = s.integer(1, 3)
        return plain(f"pixel_unshuffle({r})", lambda x: F.pixel_unshuffle(x, r))
    r = s.one([n for n in (1, 2, 3) if x.shape[-3] % n**2 == 0])
    if s.flag():
        return plain(f"pixel_shuffle({r})", lambda x: F.pixel_shuffle(x, r))
    r = s.integer(2, 3)
    return plain(
        f"repeat_channels_and_shuffle({r})",
        lambda x: F.pixel_shuffle(x.repeat_interleave(r * r, dim=x.ndim - 3), r),
    )


@maker(0)
def reductions(s: Source, x: Tensor) -> Step:
    name = s.one(
        ["sum", "mean", "amax", "amin", "var", "std", "norm", "norm1", "norminf", "any", "all", "var_mean", "logsumexp",
         "prod", "total"]
    )  # fmt: skip
    keep = s.flag()
    dims = s.some(range(-x.ndim, 0), least=min(1, x.ndim))
    text = f"{name}({dims}, keepdim={keep})"
    if name == "total":
        of = s.one(["sum", "mean", "max", "min", "std", "var", "norm", "prod"])
        return plain(f"{of}()", lambda x: getattr(x, of)())
    if name in ("norm", "norm1", "norminf"):
        order: Any = {"norm": 2, "norm1": 1, "norminf": math.inf}[name]
        return plain(text, lambda x: torch.linalg.vector_norm(x, order, dims, keep))
    if name in ("any", "all"):
        if not dims:
            return plain(f"{name}()", lambda x: getattr(x > -1, name)())
        return plain(text, lambda x: getattr(x > -1, name)(dims, keepdim=keep))
    if name in ("var", "std", "var_mean"):
        correction = s.integer(0, 2)
        found: Any = getattr(torch, name)
        return plain(f"{text}, {correction=}", lambda x: found(x, dims, correction=correction, keepdim=keep))
    if name == "prod" and dims:
        return plain(f"prod({dims[0]})", lambda x: x.prod(dims[0], keepdim=keep))
    if name == "prod":
        return plain("prod()", lambda x: x.prod())
    return plain(text, lambda x: getattr(x, name)(dims, keepdim=keep))


@maker(1)
def along(s: Source, x: Tensor) -> Step:
    dim = s.integer(-x.ndim, x.ndim - 1)
    name = s.one(["softmax", "log_softmax", "cumsum", "sort", "topk", "argmax", "max", "argmin", "logcumsumexp", "glu"])
    if name == "glu":
        return plain(f"glu({dim})", lambda x: F.glu(x, dim))
    if name == "topk":
        k = s.integer(1, x.shape[dim])
        return plain(f"topk({k}, {dim})", lambda x: x.topk(k, dim)[0])
    if name in ("sort", "max"):
        return plain(f"{name}({dim})", lambda x: next(iter(getattr(x, name)(dim))))
    if name in ("argmax", "argmin") and s.flag():
        return plain(f"{name}({dim}, keepdim)", lambda x: getattr(x, name)(dim, keepdim=True).to(x.dtype))
    return plain(f"{name}({dim})", lambda x: getattr(x, name)(dim).to(x.dtype))


@maker(1, 5)
def joins(s: Source, x: Tensor) -> Step:
    kind, dim = s.one(["cat", "stack", "split", "chunk", "unbind", "sizes"]), s.integer(-x.ndim, x.ndim - 1)
    if kind == "cat":
        length = s.integer(0, 5)
        shape = list(x.shape)
        shape[dim] = length
        other, layout = s.partitioned(*shape)
        first = s.flag()
        cut = s.integer(0, x.shape[dim])

        def cat(x: Tensor, place: Place) -> Tensor:
            pieces = [x, x.narrow(dim, 0, cut), place(other, layout)]
            return torch.cat(pieces[::-1] if first else pieces, dim)

        return Step(f"cat(x, x[:{cut}], {shape} in {layout}, dim={dim}, reverse={first})", cat)
    if kind == "stack":
        other, layout = s.partitioned(*x.shape)
        return Step(f"stack(x, {layout}, {dim})", lambda x, place: torch.stack([x, place(other, layout), x * 2], dim))
    size = s.integer(1, x.shape[dim])
    if kind == "sizes":
        sizes = [size, x.shape[dim] - size]
        return plain(f"split({sizes}, {dim})", lambda x: torch.cat([one * 2 for one in x.split(sizes, dim)][::-1], dim))
    if kind == "unbind":
        return plain(f"unbind({dim})", lambda x: torch.stack(x.unbind(dim)[::-1], dim))
    return plain(f"{kind}({size}, {dim})", lambda x: torch.cat(getattr(x, kind)(size, dim)[::-1], dim))


@maker(1, 5)
def orders(s: Source, x: Tensor) -> Step:
    kind = s.one(["flip", "roll", "repeat", "repeat_interleave", "rollall", "tile", "rot90"])
    dims = s.some(range(-x.ndim, 0), least=1, most=2)
    if kind == "flip":
        return plain(f"flip({dims})", lambda x: x.flip(dims))
    if kind == "roll":
        shifts = [s.integer(-14, 14) for _ in dims]
        return plain(f"roll({shifts}, {dims})", lambda x: x.roll(shifts, dims))
    if kind == "rollall":
        by = s.integer(-5, 5)
        return plain(f"roll({by})", lambda x: x.roll(by))
    if kind == "repeat":
        times = [s.integer(1, 2) for _ in range(x.ndim + (1 if s.rarely() else 0))]
        return plain(f"repeat({times})", lambda x: x.repeat(times))
    if kind == "tile":
        n = s.integer(1, 3)
        return plain(f"tile({n})", lambda x: x.tile((n,)))
    if kind == "rot90" and x.ndim >= 2:
        k = s.integer(1, 3)
        return plain(f"rot90({k})", lambda x: x.rot90(k, (-2, -1)))
    times_ = s.integer(1, 3)
    return plain(f"repeat_interleave({times_}, {dims[0]})", lambda x: x.repeat_interleave(times_, dims[0]))


@maker(1, 4)
def products(s: Source, x: Tensor) -> Step:
    kind = s.one(["right", "left", "self", "turned", "linear", "einsum", "addmm", "bmm", "cdist", "vector"])
    scale = 1 / math.sqrt(x.shape[-1])
    if kind == "linear" or x.ndim < 2:
        weight, bias = s.numbers(s.integer(1, 4), x.shape[-1]) * scale, s.flag()
        added = s.numbers(weight.shape[0]) if bias else None
        return plain(f"linear({tuple(weight.shape)}, {bias})", lambda x: F.linear(x, weight, added))
    rows, inner = x.shape[-2:]
    if kind == "vector":
        vector, layout = s.partitioned(inner)
        return Step(f"matmul(x, {layout})", lambda x, place: x @ place(vector, layout))
    if kind == "right":
        lead = s.broadcast(x.shape[:-2]) if s.flag() else ()
        other, layout = s.partitioned(*lead, inner, s.integer(1, 4))
        return Step(f"matmul(x, {tuple(other.shape)} {layout})", lambda x, place: x @ place(other, layout) * scale)
    if kind == "left":
        lead = s.broadcast(x.shape[:-2]) if s.flag() else ()
        other, layout = s.partitioned(*lead, s.integer(1, 4), rows)
        return Step(f"matmul({tuple(other.shape)} {layout}, x)", lambda x, place: place(other, layout) @ x * scale)
    if kind == "self":
        return plain("x @ x.mT", lambda x: x @ x.mT * scale)
    if kind == "turned":
        return plain("x.mT @ x", lambda x: x.mT @ x * scale)
    if kind == "cdist":
        other, layout = s.partitioned(*x.shape[:-2], s.integer(1, 5), inner)
        return Step(
            f"cdist({layout})",
            lambda x, place: torch.cdist(x, place(other, layout), compute_mode="donot_use_mm_for_euclid_dist"),
        )
    if kind in ("addmm", "bmm"):
        flat = x.flatten(0, -2) if kind == "addmm" else x.unsqueeze(0) if x.ndim == 2 else x.flatten(0, -3)
        lead, cols = tuple(flat.shape[:-2]), s.integer(1, 4)
        other, layout = s.partitioned(*lead, inner, cols)
        added_shape = s.broadcast((*flat.shape[:-1], cols))
        onto, places = s.partitioned(*added_shape)
        beta, alpha = s.one([1, 0, 0.5]), s.one([1, 2.5])
        function: Any = torch.addmm if kind == "addmm" else torch.baddbmm

        def add(x: Tensor, place: Place) -> Any:
            flat = x.flatten(0, -2) if kind == "addmm" else x.unsqueeze(0) if x.ndim == 2 else x.flatten(0, -3)
            return function(place(onto, places), flat, place(other, layout), beta=beta, alpha=alpha)

        return Step(f"{kind}({added_shape} {places}, x, {layout}, {beta=}, {alpha=})", add)
    letters = "abcd"[: x.ndim]
    shared = s.some(letters, least=1, most=2)
    theirs = "".join([*shared, "e"])
    other, layout = s.partitioned(*[x.shape[letters.index(one)] if one != "e" else s.integer(1, 3) for one in theirs])
    out = "".join(s.some(letters + "e", least=1))
    return Step(
        f"einsum({letters},{theirs}->{out}, {layout})",
        lambda x, place: torch.einsum(f"{letters},{theirs}->{out}", x, place(other, layout)) * scale,
    )


@maker(2, 4)
def attention(s: Source, x: Tensor) -> Step:
    *lead, length, depth = x.shape
    other = s.integer(1, 6)
    causal = s.integer(0, 3) == 3
    self_attention = s.flag()
    keys = length if self_attention else other
    k, k_layout = s.partitioned(*lead, keys, depth)
    v, v_layout = s.partitioned(*lead, keys, s.integer(1, 5))
    mask, mask_layout = None, None
    if not causal and s.flag():
        mask, mask_layout = s.partitioned(*s.broadcast(lead), length if s.flag() else 1, keys)
        if s.flag():
            mask = mask > 0
            mask[..., 0] = True
    scale = 0.3 if s.flag() else None

    def attend(x: Tensor, place: Place) -> Tensor:
        placed = place(mask, mask_layout) if mask is not None and mask_layout is not None else None
        key = x.flip(-2) if self_attention else place(k, k_layout)
        return F.scaled_dot_product_attention(
            x, key, value=place(v, v_layout), attn_mask=placed, is_causal=causal, scale=scale
        )

    kind = "no mask" if mask is None else f"{mask.dtype} mask {tuple(mask.shape)} {mask_layout}"
    return Step(f"attention(k {k_layout}, v {v_layout}, {kind}, {causal=}, {self_attention=})", attend)


@maker(2, 5)
def norms(s: Source, x: Tensor) -> Step:
    kind = s.one(["group", "layer", "batch", "training", "instance", "rms", "normalize"])
    channels, flag = x.shape[1], s.flag()
    weight, bias = (s.numbers(channels), s.numbers(channels)) if flag else (None, None)
    if kind == "group":
        groups = s.divisor(channels)
        return plain(f"group_norm({groups}, {flag})", lambda x: F.group_norm(x, groups, weight, bias))
    if kind in ("layer", "rms"):
        over = list(x.shape[x.ndim - s.integer(1, 2) :])
        w, b = (s.numbers(*over), s.numbers(*over)) if flag else (None, None)
        if kind == "rms":
            return plain(f"rms_norm({over}, {flag})", lambda x: F.rms_norm(x, over, w, eps=1e-5))
        return plain(f"layer_norm({over}, {flag})", lambda x: F.layer_norm(x, over, w, b))
    if kind == "batch":
        mean, var = s.numbers(channels), s.numbers(channels).square() + 0.1
        return plain(f"batch_norm({flag})", lambda x: F.batch_norm(x, mean, var, weight, bias))
    if kind == "training":
        return plain(f"batch_norm(training, {flag})", lambda x: F.batch_norm(x, None, None, weight, bias, True))
    if kind == "instance" and x.ndim > 2:
        return plain(f"instance_norm({flag})", lambda x: F.instance_norm(x, weight=weight, bias=bias))
    dim = s.integer(-x.ndim, x.ndim - 1)
    return plain(f"normalize({dim})", lambda x: F.normalize(x, dim=dim))


UNARY: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu, "gelu": F.gelu, "relu": F.relu, "tanh": torch.tanh, "bell": lambda x: (-x * x).exp(),
    "clamp": lambda x: x.clamp(-1, 0.5), "where": lambda x: torch.where(x > 0, x, 2.0), "neg": lambda x: -x,
    "softplus": F.softplus, "sign": lambda x: (x > 0).to(x.dtype), "round": lambda x: x.round(decimals=3),
    "clone": torch.clone, "contiguous": lambda x: x.contiguous(), "nan": lambda x: x.nan_to_num(),
    "pow": lambda x: x**2,
    "zeros": lambda x: torch.zeros_like(x) + x, "item": lambda x: x * float(x.flatten()[0]), "int": lambda x: x * 2,
    "arange": lambda x: x + torch.arange(x.shape[-1]), "detach": lambda x: x.detach(),
    "dropout": lambda x: F.dropout(x, 0.5, False),
}  # fmt: skip


@maker(1)
def pointwise(s: Source, x: Tensor) -> Step:
    if s.flag():
        name = s.one(list(UNARY))
        return plain(name, UNARY[name])
    shape = s.broadcast(x.shape)
    other, layout = s.partitioned(*shape)
    name = s.one(["add", "mul", "alpha", "where", "masked_fill", "lerp", "addcmul", "rsub", "bigger", "turned", "mean"])
    dim = s.integer(0, x.ndim - 1)

    def apply(x: Tensor, place: Place) -> Any:
        o = place(other, layout)
        return {
            "add": lambda: x + o,
            "mul": lambda: o * x,
            "alpha": lambda: torch.add(o, x, alpha=3),
            "where": lambda: torch.where(o > 0, x, o),
            "masked_fill": lambda: x.masked_fill(o > 0, 1.5),
            "lerp": lambda: torch.lerp(x, o, 0.25),
            "addcmul": lambda: torch.addcmul(o, x, x.flip(dim), value=0.5),
            "rsub": lambda: 1 - x,
            "bigger": lambda: torch.maximum(x, x.roll(1, dim)),
            "turned": lambda: x.unsqueeze(-1) + x.unsqueeze(-2) if x.ndim < 5 else x,
            "mean": lambda: x - x.mean(dim, keepdim=True) * x.flip(dim),
        }[name]()

    return Step(f"{name}({shape} {layout}, {dim})", apply)


@maker(3, 5)
def pooling(s: Source, x: Tensor) -> Step:
    n = x.ndim - 2
    kind = s.one(["avg", "max", "adaptive"])
    function: Any = getattr(F, f"{'adaptive_avg' if kind == 'adaptive' else kind}_pool{n}d")
    if kind == "adaptive":
        size = [s.integer(1, 5) for _ in range(n)]
        return plain(f"adaptive_avg_pool({size})", lambda x: function(x, size))
    kernel, stride = [s.integer(1, 3) for _ in range(n)], [s.integer(1, 3) for _ in range(n)]
    pad = [s.integer(0, k // 2) if s.rarely() else 0 for k in kernel]
    ceil = s.rarely()
    return plain(
        f"{kind}_pool{n}d({kernel}, {stride}, {pad}, {ceil})",
        lambda x: function(x, kernel, stride, pad, ceil_mode=ceil),
    )


@maker(2, 5)
def writes(s: Source, x: Tensor) -> Step:
    """Writes to a tensor or through chains of slices and views of it."""
    start = s.one(["clone", "twice", "permuted", "zeros", "new_zeros", "joined"])
    order = shuffled(s, x.ndim)
    path, seen = list[Step](), x.clone()
    if start == "permuted":
        seen = seen.permute(order).clone()
    for _ in range(s.integer(0, 3)):
        step = s.one([slices, views])(s, seen)
        try:
            found = step.call(seen, lambda x, _: x)
        except (RuntimeError, ValueError, IndexError):
            continue
        if found.ndim == 0 or found.ndim > 5 or found.numel() == 0:
            continue
        seen = found
        path.append(step)
    shape = s.broadcast(seen.shape)
    other, layout = s.partitioned(*shape)
    name = s.one(["mul_", "add_", "copy_", "zero_", "setitem", "masked_fill_", "clamp_", "own", "fill_", "self"])

    def write(x: Tensor, place: Place) -> Any:
        made = {
            "clone": lambda: x.clone(),
            "twice": lambda: x * 2,
            "permuted": lambda: x.permute(order).clone(),
            "zeros": lambda: torch.zeros(x.shape, dtype=x.dtype) + 1.5,
            "new_zeros": lambda: x.new_zeros(x.shape),
            "joined": lambda: torch.cat([x, x], -1).narrow(-1, 0, x.shape[-1]),
        }[start]()
        view = made
        for step in path:
            view = step.call(view, place)
        o = place(other, layout)
        if name == "setitem":
            view[..., : max(1, view.shape[-1] // 2)] = o[..., :1]
        elif name == "own":
            view += view.mean(0, keepdim=True)
        elif name == "self":
            view.add_(made.flatten()[0].clone())
        elif name == "masked_fill_":
            view.masked_fill_(o > 0, 3.0)
        elif name in ("mul_", "add_", "copy_"):
            getattr(view, name)(o)
        elif name == "clamp_":
            view.clamp_(-0.5, 0.5)
        elif name == "fill_":
            view.fill_(2.5)
        else:
            view.zero_()
        return made, view.clone()

    text = "; ".join(step.text for step in path)
    return Step(f"write({start} {order}: {text}: {name} {shape} {layout})", write)
