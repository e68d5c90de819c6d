"""Recurrences with layer norm inside: a sequence through one layer in one direction, step by step.

`by_loop` is the definition in plain torch; `natively` does all steps in one call of the extension.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from renorm.kernels import extension, native

__all__ = ["Recurrence", "by_loop", "linear", "natively", "why_not"]


class Recurrence(NamedTuple):
    """The tensors of one layer in one direction, all of one dtype; None where a cell has no such part."""

    x: Tensor  # the input's part of the gates, normalized, with its biases: (steps, rows, gates) or (packed, gates)
    candidate_x: Tensor | None  # GRU: of the candidate, where `x` has r and z only
    h: Tensor  # (rows, size of h)
    c: Tensor | None  # LSTM: (rows, hidden)
    weight: Tensor  # (gates, size of h)
    norm_weight: Tensor  # (gates)
    norm_bias: Tensor | None  # GRU: of the candidate, (hidden); all other biases are in `x`
    cell_weight: Tensor | None  # LSTM: (hidden)
    cell_bias: Tensor | None
    projection: Tensor | None  # LSTM: (size of h, hidden)


Out = tuple[Tensor, Tensor, Tensor | None]  # h of all steps, as `x` lies; the last h and c


# ---- the definition


def by_loop(of: Recurrence, sizes: Sequence[int] | None, reverse: bool, eps: float) -> Out:
    """Any device, differentiable as often as wanted, traced by all.

    `sizes` are the rows of each step where x is packed, None where all steps have as many.
    """
    chunks = _steps(of.x, sizes)
    candidates = None if of.candidate_x is None else _steps(of.candidate_x, sizes)
    order = list(range(len(chunks)))
    if reverse:
        order.reverse()
    rows = slice(None if sizes is None else sizes[order[0]])
    h, c = of.h[rows], None if of.c is None else of.c[rows]
    outs: list[Tensor] = []
    ended: list[tuple[Tensor, Tensor | None]] = []
    for t in order:
        if sizes is not None and len(h) > sizes[t]:  # sequences that end before this step
            ended.append((h[sizes[t] :], None if c is None else c[sizes[t] :]))
            h, c = h[: sizes[t]], None if c is None else c[: sizes[t]]
        elif sizes is not None and len(h) < sizes[t]:  # that begin with it
            begin = slice(len(h), sizes[t])
            h = torch.cat([h, of.h[begin]])
            c = None if c is None or of.c is None else torch.cat([c, of.c[begin]])
        h, c = _step(of, chunks[t], None if candidates is None else candidates[t], h, c, eps)
        outs.append(h)
    if reverse:
        outs.reverse()
    for more_h, more_c in reversed(ended):
        h = torch.cat([h, more_h])
        c = None if c is None or more_c is None else torch.cat([c, more_c])
    return torch.stack(outs) if sizes is None else torch.cat(outs), h, c


def _steps(x: Tensor, sizes: Sequence[int] | None) -> Sequence[Tensor]:
    return x.unbind(0) if sizes is None else torch.split_with_sizes(x, list(sizes))


def _step(
    of: Recurrence, x: Tensor, candidate_x: Tensor | None, h: Tensor, c: Tensor | None, eps: float
) -> tuple[Tensor, Tensor | None]:
    pre = F.linear(h, of.weight)
    if c is None:  # GRU
        assert candidate_x is not None
        hidden = candidate_x.shape[-1]
        gates, candidate = torch.split_with_sizes(pre, [2 * hidden, hidden], -1)
        gain, candidate_gain = torch.split_with_sizes(of.norm_weight, [2 * hidden, hidden])
        r, z = (F.layer_norm(gates, [2 * hidden], gain, None, eps) + x).sigmoid().chunk(2, -1)
        inner = F.layer_norm(candidate, [hidden], candidate_gain, of.norm_bias, eps)
        n = torch.tanh(candidate_x + r * inner)
        return n + z * (h - n), None
    i, f, g, o = (F.layer_norm(pre, [pre.shape[-1]], of.norm_weight, None, eps) + x).chunk(4, -1)
    c = f.sigmoid() * c + i.sigmoid() * g.tanh()
    h = o.sigmoid() * torch.tanh(F.layer_norm(c, [c.shape[-1]], of.cell_weight, of.cell_bias, eps))
    return h if of.projection is None else F.linear(h, of.projection), c


# ---- products over all steps

# On an AMD EPYC with AVX-512 torch.mm (MKL) takes twice the time of oneDNN, which torch asks for in float32 only here.
_HERE = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
_ONEDNN = getattr(torch.ops.mkldnn, "_linear_pointwise", None) if _HERE else None


def _product(a: Tensor, b: Tensor) -> Tensor:
    """A b^T, neither of which needs a gradient."""
    if _ONEDNN is None or a.dtype != torch.float32:
        return torch.mm(a, b.t())
    y: Tensor = _ONEDNN(a, b, None, "none", [], "")
    return y


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """`F.linear` without a bias, for tensors that the extension can run."""
    if torch.is_autocast_enabled("cpu") or x.numel() == 0 or any(map(extension.why_not, (x, weight))):
        return F.linear(x, weight)
    y: Tensor = native.run(_Linear, x.reshape(-1, x.shape[-1]), weight)
    return y.view(*x.shape[:-1], len(weight))


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _product(x, weight)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        wants_x, wants_weight = ctx.needs_input_grad
        if native.needs_a_graph(dy):
            return dy @ weight if wants_x else None, dy.t() @ x if wants_weight else None
        return _product(dy, weight.t()) if wants_x else None, _product(x.t(), dy.t()).t() if wants_weight else None


# ---- the extension


def why_not(of: Recurrence) -> str | None:
    """The reason why the extension cannot run this."""
    for tensor in of:
        if tensor is None:
            continue
        reason = extension.why_not(tensor)
        if reason is not None:
            return reason
        if tensor.dtype != of.x.dtype:
            return "its tensors differ in dtype"
    return "the input has no entries" if of.x.numel() == 0 else None


def natively(of: Recurrence, sizes: Sequence[int] | None, reverse: bool, eps: float) -> Out:
    """`by_loop` in one call, and one more for the gradients; where nothing is in the way, see `why_not`."""
    layout = _layout(tuple(sizes) if sizes is not None else (of.x.shape[1],) * len(of.x), reverse)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in of):
        out, h, c = native.run(_Sequence, layout, sizes, eps, *of)
        return out, h, c
    return _forward(of, layout, eps)[0]


@dataclass(frozen=True, eq=False)
class _Layout:
    """Where states lie in a buffer that holds the initial ones, too, so that the states before a step are one block.

    Forward in time it begins with the initial states, and the states of each step follow. In reverse each step's
    states lie where forward the states before it do, and the other way round.
    """

    reverse: bool
    rows: int  # sequences
    packed: int  # rows of all steps
    table: Tensor  # of each step in the order of the walk: rows, and where they lie packed, before and after
    shifted: Tensor | slice  # rows of the buffer: those of one step later
    ends: Tensor | slice  # of each sequence's first or last state, whichever does not begin the buffer

    def start(self, initial: Tensor) -> Tensor:
        """A buffer with the initial states in it."""
        states = initial.new_empty((self.rows + self.packed, initial.shape[1]))
        states[self.ends if self.reverse else slice(0, self.rows)] = initial
        return states

    def results(self, states: Tensor) -> Tensor:
        """The states after each step, packed."""
        return states[self.shifted] if self.reverse else states[self.rows :]

    def before(self, states: Tensor) -> Tensor:
        """The states before each step, packed."""
        return states[self.rows :] if self.reverse else states[self.shifted]

    def final(self, states: Tensor) -> Tensor:
        """The last state of each sequence."""
        return states[: self.rows].clone() if self.reverse else states[self.ends].clone()


@lru_cache(maxsize=256)
def _layout(sizes: tuple[int, ...], reverse: bool) -> _Layout:
    rows = sizes[0]
    size = torch.tensor(sizes, device="cpu")
    offset = size.cumsum(0) - size
    later = offset + rows  # where a step's rows lie in the buffer, forward
    earlier = torch.cat([size.new_zeros(1), later[:-1]])
    before, after = (later, earlier) if reverse else (earlier, later)
    table = torch.stack([size, offset, before, after], 1)
    packed = int(size.sum())
    shifted: Tensor | slice = slice(0, packed)
    ends: Tensor | slice = slice(packed, packed + rows)
    if sizes[-1] != rows:
        shifted = torch.cat(
            [torch.arange(at, at + n, device="cpu") for at, n in zip(earlier.tolist(), sizes, strict=True)]
        )
        lengths = (size[:, None] > torch.arange(rows, device="cpu")).sum(0)
        ends = later[lengths - 1] + torch.arange(rows, device="cpu")
    return _Layout(reverse, rows, packed, (table.flip(0) if reverse else table).contiguous(), shifted, ends)


class _Kept(NamedTuple):
    states: Tensor  # as _Layout has them
    cells: Tensor | None
    pre: Tensor | None  # weight times h, packed
    norms: Tensor | None  # mean, what its rounding lost, 1 / deviation; for two norms
    raw: Tensor | None  # h before the projection


def _forward(of: Recurrence, layout: _Layout, eps: float, *, keeps: bool = False) -> tuple[Out, _Kept]:
    of = Recurrence(*(None if t is None else t.detach().contiguous() for t in of))  # type: ignore[arg-type]
    packed, hidden = layout.packed, _hidden(of)
    kept = _Kept(
        layout.start(of.h),
        None if of.c is None else layout.start(of.c),
        of.x.new_empty((packed, len(of.weight))) if keeps else None,
        of.x.new_empty((packed, 6)) if keeps else None,
        of.x.new_empty((packed, hidden)) if keeps and of.projection is not None else None,
    )
    _call(of, layout, eps, kept, torch.get_num_threads(), (None,) * 7, None)
    out = layout.results(kept.states)
    out = out.view(*of.x.shape[:-1], out.shape[-1])
    return (out, layout.final(kept.states), None if kept.cells is None else layout.final(kept.cells)), kept


def _hidden(of: Recurrence) -> int:
    return len(of.weight) // (3 if of.c is None else 4)


def _call(
    of: Recurrence,
    layout: _Layout,
    eps: float,
    kept: _Kept,
    threads: int,
    gradients: Sequence[Tensor | None],
    sums: Tensor | None,
) -> None:
    address = native.address
    extension.module().recurrent(
        extension.DTYPES[of.x.dtype],
        threads,
        of.c is None,
        len(layout.table),
        layout.rows,
        _hidden(of),
        of.weight.shape[1],
        layout.table.data_ptr(),
        eps,
        of.x.data_ptr(),
        address(of.candidate_x),
        of.weight.data_ptr(),
        of.norm_weight.data_ptr(),
        address(of.norm_bias),
        address(of.cell_weight),
        address(of.cell_bias),
        address(of.projection),
        *map(address, kept),
        *map(address, gradients),
        address(sums),
    )


class _Sequence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, layout: _Layout, sizes: Sequence[int] | None, eps: float, *tensors: Tensor | None) -> Any:
        of = Recurrence(*tensors)  # type: ignore[arg-type]
        found, kept = _forward(of, layout, eps, keeps=True)
        ctx.save_for_backward(*tensors, *kept)
        ctx.rest = layout, sizes, eps
        return found

    @staticmethod
    def backward(ctx: Any, dy: Tensor, dh: Tensor, dc: Tensor | None) -> Any:
        saved = ctx.saved_tensors
        of, kept = Recurrence(*saved[: len(Recurrence._fields)]), _Kept(*saved[len(Recurrence._fields) :])
        layout, sizes, eps = ctx.rest
        needs = ctx.needs_input_grad[3:]
        if any(d is not None and native.needs_a_graph(d) for d in (dy, dh, dc)):
            return None, None, None, *_by_torch(of, sizes, layout.reverse, eps, (dy, dh, dc), needs)
        return None, None, None, *_backward(of, layout, eps, kept, dy, dh, dc, needs)


def _by_torch(
    of: Recurrence,
    sizes: Sequence[int] | None,
    reverse: bool,
    eps: float,
    gradients: Sequence[Tensor | None],
    needs: Sequence[bool],
) -> list[Tensor | None]:
    """The gradients, with a graph of their own where one is asked for."""
    with torch.enable_grad():
        of = Recurrence(*native.aliases(*of))
        found = by_loop(of, sizes, reverse, eps)
    ys, ds = zip(*((y, d) for y, d in zip(found, gradients, strict=True) if y is not None), strict=True)
    wanted = [t for t, need in zip(of, needs, strict=True) if need and t is not None]
    by = iter(torch.autograd.grad(ys, wanted, ds, create_graph=torch.is_grad_enabled(), allow_unused=True))
    return [next(by) if need else None for need in needs]


def _backward(
    of: Recurrence,
    layout: _Layout,
    eps: float,
    kept: _Kept,
    dy: Tensor,
    dh: Tensor,
    dc: Tensor | None,
    needs: Sequence[bool],
) -> Recurrence:
    laid = Recurrence(*(None if t is None else t.detach().contiguous() for t in of))  # type: ignore[arg-type]
    packed, hidden, state = layout.packed, _hidden(of), of.weight.shape[1]
    threads = torch.get_num_threads()
    lstm = of.c is not None
    dx = torch.empty_like(laid.x)
    dcandidate = None if laid.candidate_x is None else torch.empty_like(laid.candidate_x)
    dpre = dx.new_empty((packed, len(of.weight)))
    dstates = dx.new_empty((packed, state)) if of.projection is not None else None
    # The kernel goes from the gradients of the last states to those of the first, in place.
    dh, dc = (None if d is None else d.clone(memory_format=torch.contiguous_format) for d in (dh, dc))  # type: ignore[assignment]
    sums = torch.zeros((threads, len(of.weight) + (2 if lstm else 1) * hidden), dtype=torch.float64, device="cpu")
    _call(laid, layout, eps, kept, threads, (dy.contiguous(), dh, dc, dx, dcandidate, dpre, dstates), sums)
    parts = [len(of.weight)] + [hidden] * (2 if lstm else 1)
    gate, *others = torch.split_with_sizes(sums.sum(0).to(dx.dtype), parts)
    wanted = dict(zip(Recurrence._fields, needs, strict=True))
    return Recurrence(
        dx,
        dcandidate,
        dh,
        dc,
        _product(layout.before(kept.states).t(), dpre.t()).t() if wanted["weight"] else None,  # type: ignore[arg-type]
        gate,
        None if lstm else others[0],
        others[0] if lstm else None,
        others[1] if lstm else None,
        None if dstates is None or kept.raw is None else _product(kept.raw.t(), dstates.t()).t(),
    )
