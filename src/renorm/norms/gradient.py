"""Normalization of gradients: hooks that change them just before an optimizer's step uses them.

Each function registers one and returns its handle, whose ``remove()`` takes it away. Hooks run in the order in which
they were registered; a closure's gradients are changed after each of its calls (LBFGS calls it several times in a
step). A scale that `torch.amp.GradScaler` left in the gradients is allowed for. Weight decay is added by the
optimizer behind the hooks. A copied or unpickled optimizer has no hooks, as torch has it: register them again.

A *unit* is what makes one output: a row of a linear layer, the kernel of one output channel of a convolution, all
of a bias or any other parameter of less than two dimensions. Outputs are on dimension 0 of a weight; those of
transposed convolutions are on dimension 1, which a hook knows if it is given their `model`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from renorm.errors import ShapeError

__all__ = ["centralize_gradients", "clip_gradients_adaptively", "normalize_gradients"]

Excluded = Iterable["nn.Parameter | nn.Module"]
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def centralize_gradients(
    optimizer: Optimizer, *, conv_only: bool = False, exclude: Excluded = (), model: nn.Module | None = None
) -> RemovableHandle:
    r"""Subtract from each unit's gradient its mean, for all weights of two dimensions or more.

    $$g_i \leftarrow g_i - \frac{1}{m} \sum_{j=1}^{m} g_{ij}$$

    where g_i is the gradient of the m weights of unit i: of all but the output dimension. Weight decay, which comes
    behind it, moves the mean of the weights; the authors' SGD subtracts the mean of the sum of both.

    Args:
        optimizer: any of torch.optim, or a subclass of `torch.optim.Optimizer`.
        conv_only: leave the weights of linear layers alone: those of two dimensions.
        exclude: parameters, or modules with all of theirs, to leave alone.
        model: where transposed convolutions are looked for, see the module.

    The step raises ShapeError for a sparse gradient. Yong et al. 2020, "Gradient Centralization" (arXiv:2004.01461).

    >>> weight = nn.Parameter(torch.zeros(1, 2))
    >>> optimizer = torch.optim.SGD([weight], lr=1.0)
    >>> handle = centralize_gradients(optimizer)
    >>> weight.grad = torch.tensor([[1.0, 5.0]])
    >>> optimizer.step()
    >>> weight.data
    tensor([[ 2., -2.]])
    """

    def change(units: list[_Units], _: Optimizer) -> None:
        chosen = [unit for unit in units if unit.rank > (2 if conv_only else 1)]
        grads = [unit.grad for unit in chosen]
        means = [unit.grad.mean(unit.dims, keepdim=True, dtype=_wide(unit.grad)) for unit in chosen]
        if grads:
            torch._foreach_sub_(grads, means)

    return _before_step(optimizer, change, exclude, model)


def normalize_gradients(
    optimizer: Optimizer,
    by: Literal["unit", "tensor", "group"] = "unit",
    eps: float = 1e-12,
    *,
    exclude: Excluded = (),
    model: nn.Module | None = None,
) -> RemovableHandle:
    r"""Divide each gradient by its norm, so that only its direction is left.

    $$g_b \leftarrow \frac{g_b}{\max(\|g_b\|, \text{eps})}$$

    Args:
        optimizer: any of torch.optim, or a subclass of `torch.optim.Optimizer`.
        by: what a block b is: a ``"unit"``, a ``"tensor"``, or a ``"group"`` of the optimizer. The paper's blocks are
            layers: a parameter group for each. All parameters in one group make the normalized gradient method.
        eps: smallest norm that is divided by; a gradient of 0 stays 0.
        exclude: parameters, or modules with all of theirs, to leave alone.
        model: where transposed convolutions are looked for, see the module.

    Norms are computed in float32 at least.

    Raises ShapeError for another `by` and for an eps that is not positive; the step does for a sparse gradient.
    Yu et al. 2017, "Block-Normalized Gradient Method" (arXiv:1707.04822).

    >>> weight = nn.Parameter(torch.zeros(2, 2))
    >>> optimizer = torch.optim.SGD([weight], lr=1.0)
    >>> handle = normalize_gradients(optimizer)
    >>> weight.grad = torch.tensor([[3.0, 4.0], [0.0, -0.1]])
    >>> optimizer.step()
    >>> weight.data
    tensor([[-0.6000, -0.8000],
            [ 0.0000,  1.0000]])
    """
    if by not in ("unit", "tensor", "group"):
        raise ShapeError(f"gradients are normalized by 'unit', 'tensor' or 'group'; got by={by!r}")
    _check_positive("eps", eps)

    def change(units: list[_Units], optimizer: Optimizer) -> None:
        grads = [unit.grad for unit in units]
        norms = [_norm(unit.grad, unit.dims if by == "unit" else None) for unit in units]
        if by == "group":
            device = norms[0].device
            total = torch.linalg.vector_norm(torch.stack([norm.to(device) for norm in norms]))
            norms = [total.to(norm.device, copy=True) for norm in norms]
        _allow_for_scale(norms, optimizer)
        torch._foreach_clamp_min_(norms, eps)
        torch._foreach_div_(grads, norms)

    return _before_step(optimizer, change, exclude, model)


def clip_gradients_adaptively(
    optimizer: Optimizer,
    clip: float = 0.01,
    eps: float = 1e-3,
    *,
    exclude: Excluded = (),
    model: nn.Module | None = None,
) -> RemovableHandle:
    r"""Clip each unit's gradient where its norm is more than `clip` times that of its weights (AGC).

    $$g_i \leftarrow \text{clip} \cdot \frac{\max(\|w_i\|, \text{eps})}{\|g_i\|} \, g_i \quad \text{where} \quad
    \frac{\|g_i\|}{\max(\|w_i\|, \text{eps})} > \text{clip}$$

    Args:
        optimizer: any of torch.optim, or a subclass of `torch.optim.Optimizer`.
        clip: the largest ratio of norms that is let pass.
        eps: smallest norm of weights that is reckoned with, so that those that start at 0 can leave it.
        exclude: parameters, or modules with all of theirs, to leave alone. The paper leaves out the last linear
            layer: ``exclude=[model.fc]``.
        model: where transposed convolutions are looked for, see the module.

    Norms are computed in float32 at least. A bias is one unit, as in the authors' code.

    Raises ShapeError for a clip or eps that is not positive; the step does for a sparse gradient.
    Brock et al. 2021, "High-Performance Large-Scale Image Recognition Without Normalization" (arXiv:2102.06171).

    >>> weight = nn.Parameter(torch.tensor([[3.0, 4.0], [3.0, 4.0]]))
    >>> optimizer = torch.optim.SGD([weight], lr=1.0)
    >>> handle = clip_gradients_adaptively(optimizer, clip=0.1)
    >>> weight.grad = torch.tensor([[0.0, 100.0], [0.0, 0.3]])
    >>> optimizer.step()
    >>> weight.data
    tensor([[3.0000, 3.5000],
            [3.0000, 3.7000]])
    """
    _check_positive("clip", clip)
    _check_positive("eps", eps)

    def change(units: list[_Units], optimizer: Optimizer) -> None:
        norms = [_norm(unit.grad, unit.dims) for unit in units]
        _allow_for_scale(norms, optimizer)
        factors = [_norm(unit.weight, unit.dims) for unit in units]
        torch._foreach_clamp_min_(factors, eps)
        torch._foreach_mul_(factors, clip)
        torch._foreach_div_(factors, norms)  # infinite where the gradient is 0
        torch._foreach_clamp_max_(factors, 1.0)
        torch._foreach_mul_([unit.grad for unit in units], factors)

    return _before_step(optimizer, change, exclude, model)


@dataclass(frozen=True)
class _Units:
    """A parameter and its gradient, viewed so that those of a unit lie along `dims`."""

    weight: Tensor
    grad: Tensor
    dims: tuple[int, ...] | None  # None for all of them: the tensor is one unit
    rank: int  # of the parameter itself


def _before_step(
    optimizer: Optimizer,
    change: Callable[[list[_Units], Optimizer], None],
    exclude: Excluded,
    model: nn.Module | None,
) -> RemovableHandle:
    """Register a hook that hands the units of each parameter group to `change`."""
    left_out: set[Tensor] = set()
    for item in exclude:
        left_out.update(item.parameters() if isinstance(item, nn.Module) else [item])
    transposed = _transposed(model)

    @torch.no_grad()
    def run(optimizer: Optimizer) -> None:
        for group in optimizer.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None and p not in left_out]
            units = [_units(p, transposed.get(p)) for p in parameters]
            if units:
                change(units, optimizer)

    def hook(
        optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        closure = kwargs["closure"] if "closure" in kwargs else args[1] if len(args) > 1 else None
        if closure is None:
            run(optimizer)
            return None

        def changed() -> Any:
            loss = closure()
            run(optimizer)
            return loss

        if "closure" in kwargs:
            return args, {**kwargs, "closure": changed}
        return (args[0], changed, *args[2:]), kwargs

    return optimizer.register_step_pre_hook(hook)


def _transposed(model: nn.Module | None) -> dict[Tensor, int]:
    """Weights whose outputs are on dimension 1, also under parametrizations: how many groups they have."""
    found: dict[Tensor, int] = {}
    for layer in model.modules() if model is not None else ():
        if isinstance(layer, _TRANSPOSED):
            rank = len(layer.kernel_size) + 2
            weights = [p for p in layer.parameters() if p.dim() == rank and p.shape[0] == layer.in_channels]
            found.update(dict.fromkeys(weights, layer.groups))
    return found


def _units(p: Tensor, groups: int | None) -> _Units:
    grad = p.grad
    assert grad is not None
    if grad.layout != torch.strided:
        raise ShapeError(
            f"gradients that are normalized must be dense; got {grad.layout} for a parameter of shape "
            f"{tuple(p.shape)}: write sparse=False in its layer, or exclude=[layer]"
        )
    if p.dim() < 2:
        return _Units(p, grad, None, p.dim())
    if groups is None:
        return _Units(p, grad, tuple(range(1, p.dim())), p.dim())
    # (inputs, outputs of a group, ...) -> (groups, inputs of a group, outputs of a group, ...)
    split = (groups, p.shape[0] // groups, *p.shape[1:])
    return _Units(p.view(split), grad.view(split), (1, *range(3, p.dim() + 1)), p.dim())


def _wide(x: Tensor) -> torch.dtype | None:
    return torch.float32 if x.dtype in (torch.float16, torch.bfloat16) else None


def _norm(x: Tensor, dims: tuple[int, ...] | None) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(x, dim=dims, keepdim=dims is not None, dtype=_wide(x))
    return norm


def _allow_for_scale(norms: list[Tensor], optimizer: Optimizer) -> None:
    """A fused optimizer takes the scale of a GradScaler out of the gradients later than the hooks run."""
    scale: Tensor | None = getattr(optimizer, "grad_scale", None)
    if scale is not None:
        torch._foreach_div_(norms, [scale.to(norm.device) for norm in norms])


def _check_positive(name: str, value: float) -> None:
    if not value > 0:
        raise ShapeError(f"{name} must be positive; got {value!r}")
