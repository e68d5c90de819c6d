"""Layer norm inside recurrent networks: LSTM and GRU, normalized at every step."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from renorm.errors import BackendError, ShapeError
from renorm.kernels import extension, recurrent, select
from renorm.kernels.recurrent import Recurrence
from renorm.pattern import partition

__all__ = ["LayerNormGRU", "LayerNormLSTM"]

States = tuple[Tensor, ...]  # h, and c where there is one
Sequences = TypeVar("Sequences", Tensor, PackedSequence)


class _LayerNormRecurrence(nn.RNNBase):
    """What the two have in common; their tensors in a recurrence are all that differs."""

    def __init__(
        self, mode: str, sizes: tuple[int, int], *arguments: Any, eps: float, backend: str, **keywords: Any
    ) -> None:
        super().__init__(mode, *sizes, *arguments, **keywords)
        select.resolve(backend)
        self.eps = eps
        self.backend = backend
        for names in self._all_weights:
            end = names[0].removeprefix("weight_ih_")
            for part, size in self._norms(names[0]):
                for kind, value in (("weight", 1.0), ("bias", 0.0)):
                    names.append(f"norm_{kind}_{part}_{end}")
                    like = getattr(self, names[0])
                    full = torch.full((size,), value, dtype=like.dtype, device=like.device)
                    self.register_parameter(names[-1], nn.Parameter(full))

    def _norms(self, weight: str) -> list[tuple[str, int]]:
        """Which norms a layer has, and their sizes."""
        gates = getattr(self, weight).shape[0]
        return [("ih", gates), ("hh", gates)]

    def reset_parameters(self) -> None:
        """Weights and biases as torch does; norms to weight 1 and bias 0."""
        bound = self.hidden_size**-0.5
        for name, parameter in self.named_parameters():
            if name.startswith("norm_"):
                nn.init.constant_(parameter, float("weight" in name))
            else:
                nn.init.uniform_(parameter, -bound, bound)

    def flatten_parameters(self) -> None:
        """Nothing: cuDNN, for which torch's layers lay their weights in one block, has no such cells."""

    def extra_repr(self) -> str:
        """Torch's, then eps and the backend where they are not the default."""
        said: str = super().extra_repr()
        said += "" if self.eps == 1e-5 else f", eps={self.eps}"
        return said if self.backend == "auto" else f"{said}, backend={self.backend!r}"

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        norms = {name: p for name, p in self.named_parameters(recurse=False) if name.startswith("norm_")}
        if f"{prefix}weight_ih_l0" in state_dict and not any(prefix + name in state_dict for name in norms):
            with torch.no_grad():
                for name, parameter in norms.items():
                    parameter.fill_(float("weight" in name))
        super()._load_from_state_dict(state_dict, prefix, *rest)

    # ---- forward

    def _run(self, input: Sequences, hx: States | None) -> tuple[Sequences, States]:
        if isinstance(input, PackedSequence):
            x, batch_sizes, order, back = input
            self._check_features(x)
            sizes = batch_sizes.tolist()
            states = self._states(x, sizes[0], hx)
            states = states if order is None else tuple(s.index_select(1, order) for s in states)
            y, states = self._layers(x, sizes, states)
            states = states if back is None else tuple(s.index_select(1, back) for s in states)
            return PackedSequence(y, batch_sizes, order, back), states
        if input.dim() not in (2, 3):
            raise ShapeError(
                f"{type(self).__name__}: the input is (steps, batch, features), batch first where batch_first=True, or "
                f"(steps, features); got {input.dim()}D of shape {tuple(input.shape)}"
            )
        batched = input.dim() == 3
        x = input if batched else input.unsqueeze(1)
        x = x.transpose(0, 1) if batched and self.batch_first else x
        self._check_features(x)
        if x.shape[0] == 0:
            raise ShapeError(
                f"a sequence has one step or more; got an input of shape {tuple(input.shape)} with "
                f"batch_first={self.batch_first}"
            )
        if hx is not None and not batched:
            self._check_rank(hx, 2, "(layers * directions, size) for an unbatched 2D input")
            hx = tuple(s.unsqueeze(1) for s in hx)
        y, states = self._layers(x, None, self._states(x, x.shape[1], hx))
        if not batched:
            return y.squeeze(1), tuple(s.squeeze(1) for s in states)
        return y.transpose(0, 1) if self.batch_first else y, states

    def _states(self, x: Tensor, rows: int, hx: States | None) -> States:
        """The initial states, checked; zeros where none are given."""
        layers = self.num_layers * (2 if self.bidirectional else 1)
        shapes = [(layers, rows, self.proj_size or self.hidden_size)]
        if self.mode == "LSTM":
            shapes.append((layers, rows, self.hidden_size))
        if hx is None:
            return tuple(torch.zeros(shape, dtype=x.dtype, device=x.device) for shape in shapes)
        self._check_rank(hx, 3, "(layers * directions, batch, size)")
        for name, state, shape in zip("hc", hx, shapes, strict=False):  # a GRU has no c
            if state.shape != shape:
                raise ShapeError(
                    f"the initial {name} must be (layers * directions, batch, size) = {shape} for this input; got "
                    f"{tuple(state.shape)}"
                )
        return hx

    def _check_features(self, x: Tensor) -> None:
        if x.shape[-1] != self.input_size:
            raise ShapeError(f"the input has input_size={self.input_size} features; got shape {tuple(x.shape)}")
        if x.dtype != self.weight_ih_l0.dtype and not torch.is_autocast_enabled(x.device.type):
            raise ShapeError(
                f"the input must have the parameters' dtype, {self.weight_ih_l0.dtype}; got {x.dtype}: write "
                f"layer.to({x.dtype}) or input.to({self.weight_ih_l0.dtype})"
            )

    def _check_rank(self, hx: States, rank: int, shape: str) -> None:
        for state in hx:
            if state.dim() != rank:
                raise ShapeError(f"initial states are {shape}; got {state.dim()}D of shape {tuple(state.shape)}")

    def _layers(self, x: Tensor, sizes: list[int] | None, states: States) -> tuple[Tensor, States]:
        directions = 2 if self.bidirectional else 1
        found: list[States] = []
        for layer in range(self.num_layers):
            outs = []
            for direction in range(directions):
                number = layer * directions + direction
                end = f"l{layer}_reverse" if direction else f"l{layer}"
                y, *last = self._direction(x, sizes, end, tuple(s[number] for s in states))
                outs.append(y)
                found.append(tuple(last))
            x = outs[0] if directions == 1 else torch.cat(outs, -1)
            if layer < self.num_layers - 1:
                x = F.dropout(x, self.dropout, self.training)
        return x, tuple(torch.stack(which) for which in zip(*found, strict=True))

    def _direction(self, x: Tensor, sizes: list[int] | None, end: str, states: States) -> list[Tensor]:
        """One layer in one direction: the gates' input part of all steps at once, then the recurrence."""
        kernel = self.kernel(x)
        a = (recurrent.linear if kernel == "native" else F.linear)(x, getattr(self, f"weight_ih_{end}"))
        # Half precision is widened once, before what is done at every step.
        wide = torch.float64 if a.dtype == torch.float64 else torch.float32

        def named(name: str) -> Tensor:
            parameter: Tensor = getattr(self, f"{name}_{end}")
            return parameter.to(wide)

        biases = [named("norm_bias_ih"), named("norm_bias_hh")]
        if self.bias:
            biases += [named("bias_ih"), named("bias_hh")]
        of = self._recurrence(kernel, a.to(wide), biases, named, tuple(s.to(wide) for s in states))
        obstacle = "" if kernel == "reference" or x.numel() == 0 else recurrent.why_not(of)
        if obstacle and self.backend == "native":
            raise _cannot(obstacle)
        run = recurrent.natively if obstacle is None else recurrent.by_loop
        y, *last = run(of, sizes, end.endswith("reverse"), self.eps)
        return [t if t.dtype == a.dtype else t.to(a.dtype) for t in (y, *last) if t is not None]

    @abstractmethod
    def _recurrence(
        self, kernel: str, a: Tensor, biases: list[Tensor], named: Callable[[str], Tensor], states: States
    ) -> Recurrence:
        """The tensors of a layer, of which `a` is W_ih x and `named` finds parameters."""

    def kernel(self, input: Tensor | PackedSequence) -> str:
        """The name of the kernel that runs the steps for this input: ``"native"`` or ``"reference"``."""
        backend = select.resolve(self.backend)
        if backend in ("torch", "triton"):
            raise BackendError(
                f"backend={backend!r} cannot run here: it has no kernel for recurrence with layer norm; write "
                "backend='auto' or 'reference'"
            )
        reason = extension.why_not(input.data if isinstance(input, PackedSequence) else input)
        if reason is not None and backend == "native":
            raise _cannot(reason)
        return "native" if reason is None and backend != "reference" else "reference"

    def _norm(self, kernel: str, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        """Layer norm over the last axis of the gates' input part."""
        if kernel == "reference" or x.numel() == 0:
            return F.layer_norm(x, [x.shape[-1]], weight, bias, self.eps)
        part = partition("... [c]", x.dim(), {}, ("c",))
        chosen = select.choose(x, part, "layer_norm", weight, bias, backend=self.backend)
        y, _ = select.normalize(x, part, chosen, weight, bias, self.eps)
        return y


def _cannot(reason: str) -> BackendError:
    return BackendError(f"backend='native' cannot run here: {reason}; write backend='auto' or 'reference'")


class LayerNormLSTM(_LayerNormRecurrence):
    r"""LSTM with layer norm on the gates' two pre-activations and on the cell, at every step.

    $$\begin{aligned}
    (i, f, g, o) &= \text{LN}(W_{hh} h_{t-1}) + \text{LN}(W_{ih} x_t) + b_{ih} + b_{hh} \\
    c_t &= \sigma(f) \odot c_{t-1} + \sigma(i) \odot \tanh(g) \\
    h_t &= \sigma(o) \odot \tanh(\text{LN}(c_t))
    \end{aligned}$$

    with biased variances; the two norms of pre-activations are each over all 4 `hidden_size` entries of a step and a
    sequence together, that of the cell is over its `hidden_size`, and what is handed on as $c_t$ is not normalized.
    With `proj_size` h is then multiplied by $W_{hr}$. Arguments, initial weights, input, initial states and results
    are those of `torch.nn.LSTM` (also PackedSequence, 2D input and an empty batch); then `eps`, and `backend`:
    ``"auto"``, ``"native"`` or ``"reference"``.

    Parameters have nn.LSTM's names and gate order i, f, g, o, and for each layer and direction there are
    `norm_weight_ih_l0`, `norm_bias_ih_l0`, `norm_weight_hh_l0`, `norm_bias_hh_l0` (4 hidden_size) and
    `norm_weight_c_l0`, `norm_bias_c_l0` (hidden_size), first 1 and 0. ``bias=False`` leaves out $b_{ih}$ and $b_{hh}$
    only: the norms' biases do the same. The state of an nn.LSTM loads with ``strict=False``: the norms, which
    `load_state_dict` returns as missing keys, are set to weight 1 and bias 0. The layer is not the LSTM then: what is
    normalized has another scale.

    Half precision, also under autocast, is computed in float32 after $W_{ih} x$. On a CPU all steps run in one call,
    each as one product and one fused loop; elsewhere, in a traced graph (which has T steps of its own) and for a
    second derivative plain torch does the same.

    Raises ShapeError for an input or states of other shapes and for a sequence without steps, BackendError where
    `backend` cannot run. Ba, Kiros & Hinton 2016, arXiv:1607.06450, equations 20 to 22.

    >>> y, (h, c) = LayerNormLSTM(3, 5, num_layers=2, bidirectional=True)(torch.zeros(7, 2, 3))
    >>> y.shape, h.shape, c.shape
    (torch.Size([7, 2, 10]), torch.Size([4, 2, 5]), torch.Size([4, 2, 5]))
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        proj_size: int = 0,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
        *,
        eps: float = 1e-5,
        backend: str = "auto",
    ) -> None:
        super().__init__(
            "LSTM",
            (input_size, hidden_size),
            num_layers,
            bias,
            batch_first,
            dropout,
            bidirectional,
            proj_size,
            device,
            dtype,
            eps=eps,
            backend=backend,
        )

    def _norms(self, weight: str) -> list[tuple[str, int]]:
        return [*super()._norms(weight), ("c", self.hidden_size)]

    def forward(
        self, input: Sequences, hx: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Sequences, tuple[Tensor, Tensor]]:
        """The states h of all steps, and the last h and c."""
        if hx is not None and (not isinstance(hx, Sequence) or len(hx) != 2):
            raise ShapeError("the initial states are a tuple (h, c); write hx=(h, c)")
        y, (h, c) = self._run(input, hx)
        return y, (h, c)

    def _recurrence(
        self, kernel: str, a: Tensor, biases: list[Tensor], named: Callable[[str], Tensor], states: States
    ) -> Recurrence:
        return Recurrence(
            x=self._norm(kernel, a, named("norm_weight_ih"), torch.stack(biases).sum(0)),
            candidate_x=None,
            h=states[0],
            c=states[1],
            weight=named("weight_hh"),
            norm_weight=named("norm_weight_hh"),
            norm_bias=None,
            cell_weight=named("norm_weight_c"),
            cell_bias=named("norm_bias_c"),
            projection=named("weight_hr") if self.proj_size else None,
        )


class LayerNormGRU(_LayerNormRecurrence):
    r"""GRU with layer norm on the two pre-activations of its gates and of its candidate, at every step.

    $$\begin{aligned}
    (r, z) &= \text{LN}(W_{hh}^{rz} h_{t-1}) + \text{LN}(W_{ih}^{rz} x_t) + b_{ih}^{rz} + b_{hh}^{rz} \\
    n &= \tanh\bigl(\text{LN}(W_{ih}^n x_t) + b_{ih}^n + \sigma(r) \odot
    (\text{LN}(W_{hh}^n h_{t-1}) + b_{hh}^n)\bigr) \\
    h_t &= (1 - \sigma(z)) \odot n + \sigma(z) \odot h_{t-1}
    \end{aligned}$$

    with biased variances; the norms of the gates are over the 2 `hidden_size` entries of r and z together, those of
    the candidate over its `hidden_size`, so that r multiplies what has been normalized and, as in `torch.nn.GRU`, the
    bias $b_{hh}^n$; z keeps the old state, as in torch. Arguments, initial weights, input, initial state and results
    are those of `torch.nn.GRU` (also PackedSequence, 2D input and an empty batch); then `eps`, and `backend`:
    ``"auto"``, ``"native"`` or ``"reference"``.

    Parameters have nn.GRU's names and gate order r, z, n, and for each layer and direction there are
    `norm_weight_ih_l0`, `norm_bias_ih_l0`, `norm_weight_hh_l0` and `norm_bias_hh_l0` (3 hidden_size: of r and z, then
    of n), first 1 and 0. ``bias=False`` leaves out $b_{ih}$ and $b_{hh}$ only: the norms' biases do the same. The state
    of an nn.GRU loads with ``strict=False``: the norms, which `load_state_dict` returns as missing keys, are set to
    weight 1 and bias 0. The layer is not the GRU then: what is normalized has another scale.

    Half precision, kernels and errors are as in `LayerNormLSTM`. Ba, Kiros & Hinton 2016, arXiv:1607.06450, the
    supplement's equations of the GRU, in the gates' order and with the z of torch (and of the authors' own code).

    >>> y, h = LayerNormGRU(3, 5, batch_first=True)(torch.zeros(2, 7, 3))
    >>> y.shape, h.shape
    (torch.Size([2, 7, 5]), torch.Size([1, 2, 5]))
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
        *,
        eps: float = 1e-5,
        backend: str = "auto",
    ) -> None:
        super().__init__(
            "GRU",
            (input_size, hidden_size),
            num_layers,
            bias,
            batch_first,
            dropout,
            bidirectional,
            device=device,
            dtype=dtype,
            eps=eps,
            backend=backend,
        )

    def forward(self, input: Sequences, hx: Tensor | None = None) -> tuple[Sequences, Tensor]:
        """The states h of all steps, and the last."""
        y, (h,) = self._run(input, None if hx is None else (hx,))
        return y, h

    def _recurrence(
        self, kernel: str, a: Tensor, biases: list[Tensor], named: Callable[[str], Tensor], states: States
    ) -> Recurrence:
        hidden = self.hidden_size
        # What is added to the gates is one sum; the candidate's recurrent biases stay behind the reset gate.
        of_x, of_h = torch.stack(biases[::2]).sum(0), torch.stack(biases[1::2]).sum(0)
        gate_bias = of_x[: 2 * hidden] + of_h[: 2 * hidden]
        weight = named("norm_weight_ih")
        gates, candidate = torch.split_with_sizes(a, [2 * hidden, hidden], -1)
        return Recurrence(
            x=self._norm(kernel, gates, weight[: 2 * hidden], gate_bias),
            candidate_x=self._norm(kernel, candidate, weight[2 * hidden :], of_x[2 * hidden :]),
            h=states[0],
            c=None,
            weight=named("weight_hh"),
            norm_weight=named("norm_weight_hh"),
            norm_bias=of_h[2 * hidden :],
            cell_weight=None,
            cell_bias=None,
            projection=None,
        )
