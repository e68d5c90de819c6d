"""Normalization of weights, as parametrizations of any module.

The functions register a parametrization of `torch.nn.utils.parametrize`: ``module.weight`` is computed from what is
learnt whenever it is read. Do so before the optimizer is made, since there are new parameters. Such a module
deep-copies, and its state_dict saves and loads; torch refuses to pickle it as a whole.
``parametrize.remove_parametrizations(module, "weight")`` leaves a plain module with the weight as it is.
"""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from renorm.errors import ShapeError
from renorm.norms import running

__all__ = [
    "initialize_weight_norm",
    "spectral_norm",
    "weight_norm",
    "weight_standardization",
]

M = TypeVar("M", bound=nn.Module)
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def weight_norm(module: M, name: str = "weight", dim: int | None = 0) -> M:
    r"""Learn a weight's length and direction apart.

    $$w = g \, \frac{v}{\|v\|}$$

    with a length g for each index of `dim`, or one for the whole tensor where dim is None. The gradients are
    $\nabla_g = \nabla_w \cdot v / \|v\|$ and $\nabla_v = g \nabla_w / \|v\| - g \nabla_g \, v / \|v\|^2$.

    Shapes: v has that of the weight, g the same with 1 on all dimensions but `dim`, or none. They are called
    ``parametrizations.weight.original1`` and ``original0``, as torch has it; a state_dict with ``weight_v`` and
    ``weight_g`` loads, too. Outputs of a transposed convolution are on dimension 1: pass ``dim=1``.

    Unlike in `torch.nn.utils.parametrizations.weight_norm` (2.13), second derivatives are right and finite weights
    stay finite; those of length 0 get the direction of ones, so that g can leave 0.

    Raises ShapeError for a dim the weight does not have and where there is no such weight.
    Salimans & Kingma 2016, "Weight Normalization" (arXiv:1602.07868).

    >>> layer = nn.Linear(2, 1, bias=False)
    >>> layer.weight.data = torch.tensor([[3.0, 4.0]])
    >>> weight_norm(layer).parametrizations.weight.original0.data
    tensor([[5.]])
    """
    weight = _weight_of(module, name)
    # torch reads -1 as None.
    if dim is not None and (weight.dim() < 2 or not 0 <= dim < weight.dim()):
        raise ShapeError(
            f"dim must be None, for one length, or a dimension from 0 on of a weight that has two or more; got "
            f"dim={dim} for {name!r} of shape {tuple(weight.shape)}"
        )
    parametrize.register_parametrization(module, name, WeightNorm(dim))
    module.register_load_state_dict_pre_hook(partial(_read_older_names, name))  # type: ignore[no-untyped-call]
    return module


class WeightNorm(nn.Module):
    """The parametrization behind `weight_norm`."""

    def __init__(self, dim: int | None) -> None:
        super().__init__()
        self.dim = dim

    def forward(self, g: Tensor, v: Tensor) -> Tensor:
        """The weight of length `g` along `v`."""
        return (g * to_unit(v, self._others(v))).to(v.dtype)

    def right_inverse(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Length and direction of a weight."""
        scaled, power = to_range(weight, self._others(weight))
        norm = scaled.square().sum(self._others(weight), keepdim=True).sqrt() / power
        g = (norm if self.dim is not None else norm.reshape(())).to(weight.dtype)
        return g, torch.where(norm == 0, 1, weight)

    def _others(self, v: Tensor) -> tuple[int, ...]:
        return tuple(i for i in range(v.dim()) if i != self.dim)

    def extra_repr(self) -> str:
        """The dimension."""
        return f"dim={self.dim}"


def _read_older_names(
    name: str, module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: object
) -> None:  # of torch.nn.utils.weight_norm
    if parametrize.is_parametrized(module, name):
        for old, new in (("g", "original0"), ("v", "original1")):
            if f"{prefix}{name}_{old}" in state_dict:
                state_dict[f"{prefix}parametrizations.{name}.{new}"] = state_dict.pop(f"{prefix}{name}_{old}")


@torch.no_grad()
def initialize_weight_norm(model: nn.Module, *inputs: Any) -> None:
    r"""Run `model` once, and set the lengths and biases of its weight-normed layers by what comes out of each.

    $$g \leftarrow \frac{g}{\sigma}, \qquad \text{bias} \leftarrow \frac{\text{bias} - \mu}{\sigma}$$

    with mean $\mu$ and deviation $\sigma$ of each output of a layer over this batch, so that in it they become 0
    and 1; later layers see what the earlier ones then give. Without a bias only the deviation becomes 1. An output
    that does not vary keeps its length.

    Linear layers and convolutions are set, at their first use. Raises ShapeError for one whose lengths do not run
    along its outputs. Salimans & Kingma 2016, section 3 (arXiv:1602.07868).

    >>> layer = weight_norm(nn.Linear(4, 3))
    >>> x = torch.randn(50, 4)
    >>> initialize_weight_norm(layer, x)
    >>> torch.allclose(layer(x).std(0, correction=0), torch.ones(3))
    True
    """
    handles = []

    def initialize(layer: nn.Module, _: Any, y: Tensor) -> Tensor | None:
        if layer in done:
            return None
        done.add(layer)
        kernel = getattr(layer, "kernel_size", ())
        axis = y.dim() - 1 - len(kernel)
        others = [i for i in range(y.dim()) if i != axis]
        wide = y.to(torch.promote_types(y.dtype, torch.float32))
        var, mean = torch.var_mean(wide, others, correction=0, keepdim=True)
        scale = torch.where(var > 0, var, 1).rsqrt()
        g = layer.parametrizations.weight.original0  # type: ignore[union-attr]
        assert isinstance(g, Tensor)
        g.mul_(scale.reshape(g.shape))
        bias = layer.bias
        if not isinstance(bias, Tensor):
            return (wide * scale).to(y.dtype)
        bias.copy_((bias - mean.flatten()) * scale.flatten())
        return ((wide - mean) * scale).to(y.dtype)

    done: set[nn.Module] = set()
    for name, layer in model.named_modules():
        if not isinstance(layer, (nn.Linear, *_CONVOLUTIONS, *_TRANSPOSED)):
            continue
        if not parametrize.is_parametrized(layer, "weight"):
            continue
        norm = layer.parametrizations.weight[0]  # type: ignore[index, union-attr]
        if isinstance(norm, WeightNorm):
            outputs = 1 if isinstance(layer, _TRANSPOSED) else 0
            if norm.dim != outputs or (outputs and layer.groups != 1):
                raise ShapeError(
                    f"the lengths of a layer that is initialized must run along its outputs; got dim={norm.dim} for "
                    f"{name or 'the model'}, a {type(layer).__name__}: write weight_norm(layer, dim={outputs})"
                    + (", and not in groups" if outputs and layer.groups != 1 else "")
                )
            handles.append(layer.register_forward_hook(initialize))
    try:
        model(*inputs)
    finally:
        for handle in handles:
            handle.remove()


def spectral_norm(
    module: M, name: str = "weight", n_power_iterations: int = 1, eps: float = 1e-12, dim: int | None = None
) -> M:
    r"""Divide a weight by its largest singular value, as a matrix of outputs by all else.

    $$w_{SN} = \frac{w}{\sigma}, \qquad \sigma = u^\top w \, v$$

    where u and v are the singular vectors, which every forward in training improves by `n_power_iterations` of
    ``u = w v / |w v|``, ``v = w' u / |w' u|``. They are constants to the gradient.

    Args:
        module: a layer with a weight of any rank; a vector is divided by its length.
        name: of the weight.
        n_power_iterations: of each forward in training.
        eps: a weight whose largest singular value is not above it is left as it is.
        dim: of the outputs; by default 1 for transposed convolutions and 0 for others.

    Arguments and state_dict are those of `torch.nn.utils.parametrizations.spectral_norm`. Unlike there, the
    singular vectors are found (by Lanczos iteration) when the weight is registered or assigned, and when a state_dict
    without them is loaded, so that evaluation may come first (pytorch#51800); activation checkpointing counts a forward
    once; the vectors survive a weight of 0; and half precision is computed in float32.

    Raises ShapeError where there is no such weight or dim, or n_power_iterations is less than 1.
    Miyato et al. 2018, "Spectral Normalization for Generative Adversarial Networks" (arXiv:1802.05957).

    >>> layer = spectral_norm(nn.Linear(20, 40)).eval()
    >>> torch.allclose(torch.linalg.svdvals(layer.weight)[0], torch.tensor(1.0))
    True
    """
    weight = _weight_of(module, name)
    if dim is None:
        dim = 1 if isinstance(module, _TRANSPOSED) else 0
    if not -weight.dim() <= dim < weight.dim():
        raise ShapeError(f"dim must be a dimension of {name!r}, of shape {tuple(weight.shape)}; got dim={dim}")
    if n_power_iterations < 1:
        raise ShapeError(f"n_power_iterations must be 1 or more; got {n_power_iterations}")
    parametrize.register_parametrization(module, name, SpectralNorm(weight, n_power_iterations, eps, dim))
    module.parametrizations[name].register_load_state_dict_post_hook(_settle)  # type: ignore[index, union-attr]
    return module


class SpectralNorm(nn.Module):
    """The parametrization behind `spectral_norm`."""

    _u: Tensor
    _v: Tensor

    def __init__(self, weight: Tensor, n_power_iterations: int, eps: float, dim: int) -> None:
        super().__init__()
        self.n_power_iterations = n_power_iterations
        self.eps = eps
        self.dim = dim
        self._settled = weight.dim() < 2  # whether the vectors belong to a weight
        if weight.dim() > 1:
            rows, columns = weight.detach().movedim(dim, 0).flatten(1).shape
            self.register_buffer("_u", weight.new_zeros(rows))
            self.register_buffer("_v", weight.new_zeros(columns))

    def forward(self, weight: Tensor) -> Tensor:
        """The weight, divided by its largest singular value."""
        if weight.dim() < 2:
            return to_unit(weight, (0,)).to(weight.dtype)
        matrix = self._matrix(weight)
        with _without_autocast(weight):
            if not self._settled:
                self._settle(matrix)
            elif self.training and not running.recomputing():
                self._iterate(matrix)
            # New tensors: the next forward changes the buffers in place.
            u, v = (to_unit(vector.to(matrix.dtype), (0,)) for vector in (self._u, self._v))
            sigma = torch.dot(u, matrix @ v).abs()
        return weight / torch.where(sigma > self.eps, sigma, 1)

    def right_inverse(self, weight: Tensor) -> Tensor:
        """The weight itself, to which the vectors are fitted."""
        if weight.dim() > 1:
            self._settle(self._matrix(weight))
        return weight

    def _matrix(self, weight: Tensor) -> Tensor:
        wide = torch.promote_types(weight.dtype, torch.float32)
        return weight.movedim(self.dim, 0).flatten(1).to(wide)

    @torch.no_grad()
    def _iterate(self, matrix: Tensor) -> None:
        u, v = self._u.to(matrix.dtype), self._v.to(matrix.dtype)
        for _ in range(self.n_power_iterations):
            u = _direction(matrix @ v, u)
            v = _direction(matrix.mT @ u, v)
        self._u.copy_(u)
        self._v.copy_(v)

    @torch.no_grad()
    def _settle(self, matrix: Tensor) -> None:
        if not matrix.is_meta:
            u, v = _singular_vectors(matrix)
            self._u.copy_(u)
            self._v.copy_(v)
            self._settled = True

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)
        self._settled = not self._buffers or {f"{prefix}_u", f"{prefix}_v"} <= state_dict.keys()

    def extra_repr(self) -> str:
        """The dimension, and the iterations of a forward."""
        return f"dim={self.dim}, n_power_iterations={self.n_power_iterations}"


@torch.no_grad()
def _settle(parametrizations: nn.Module, _: object) -> None:
    """After loading: a forward fits vectors that were not loaded, before a compiler meets them."""
    if not all(getattr(each, "_settled", True) for each in parametrizations.children()):
        parametrizations()


def _without_autocast(x: Tensor) -> AbstractContextManager[object]:
    kind = x.device.type
    return nullcontext() if kind == "meta" else torch.autocast(kind, enabled=False)


def _direction(vector: Tensor, otherwise: Tensor) -> Tensor:
    unit = to_unit(vector, (0,))
    return torch.where(unit.square().sum() > 0, unit, otherwise)


def _singular_vectors(matrix: Tensor, steps: int = 32) -> tuple[Tensor, Tensor]:
    """Those of the largest singular value, by Lanczos iteration on matrix' matrix.

    32 steps find sigma to 2e-4 where hundreds of power iterations are needed (random matrices up to 2048 x 2048). It
    starts from fixed numbers: the same in all processes, and no random state is used up.
    """
    rows, columns = matrix.shape
    start = torch.randn(rows, generator=torch.Generator().manual_seed(0), dtype=matrix.dtype)
    v = to_unit(matrix.mT @ start.to(matrix.device), (0,))
    basis = [v]
    for _ in range(min(steps, rows, columns) - 1):
        v = to_unit(matrix.mT @ to_unit(matrix @ v, (0,)), (0,))
        known = torch.stack(basis)
        for _ in range(2):  # once leaves rounding errors of the size of what is left
            v = v - known.mT @ (known @ v)
        # Only rounding errors are left where the basis spans all there is.
        v = torch.where(v.norm() > 1e3 * torch.finfo(v.dtype).eps, to_unit(v, (0,)), 0)
        basis.append(v)
    known = torch.stack(basis)
    power = to_range(matrix, (0, 1))[1]
    u, _, w = torch.linalg.svd((matrix * power) @ known.mT, full_matrices=False)
    return u[:, 0], known.mT @ w[0]


def weight_standardization(module: M, name: str = "weight", eps: float = 1e-10, gain: bool = False) -> M:
    r"""Standardize the weights of each output channel.

    $$\hat{w}_{ij} = \frac{w_{ij} - \text{mean}_i}{\sqrt{\text{var}_i + \text{eps}}}$$

    with mean and biased variance over the n weights of output i. With `gain` it is scaled weight standardization,
    $\text{gain}_i \, \hat{w}_{ij} / \sqrt{n}$, whose gains are learnt, from 1 on: add them to the optimizer.

    The variance of weights is about 1 / n: an eps of 1e-5, as norms of activations have it, would make weights of 512
    channels 6 % smaller, and a network without norms lose its signal (to 15 % over 30 layers). The authors add 1e-5 to
    the unbiased deviation, which is hardly more than eps here.

    Shapes: the weight (outputs, ...), or (inputs, outputs of a group, ...) in transposed convolutions, keeps its
    own; gain (outputs,). Equal weights become 0.

    Raises ShapeError for a weight of less than two dimensions and where there is none of that name. Qiao et al. 2019,
    "Micro-Batch Training with Batch-Channel Normalization and Weight Standardization" (arXiv:1903.10520); gain: Brock
    et al. 2021, "Characterizing Signal Propagation" (arXiv:2101.08692).

    >>> conv = weight_standardization(nn.Conv2d(3, 4, 5))
    >>> conv.weight.mean((1, 2, 3)).abs().max() < 1e-6
    tensor(True)
    >>> type(parametrize.remove_parametrizations(conv, "weight")).__name__
    'Conv2d'
    """
    weight = _weight_of(module, name)
    if weight.dim() < 2:
        raise ShapeError(
            f"a weight that is standardized has outputs and inputs, two dimensions or more; got {name!r} of shape "
            f"{tuple(weight.shape)}"
        )
    groups = module.groups if isinstance(module, _TRANSPOSED) else None
    parametrize.register_parametrization(module, name, WeightStandardization(weight, eps, gain, groups))
    return module


class WeightStandardization(nn.Module):
    """The parametrization behind `weight_standardization`."""

    gain: Tensor | None

    def __init__(self, weight: Tensor, eps: float, gain: bool, groups: int | None) -> None:
        super().__init__()
        self.eps = eps
        # (inputs, outputs of a group, ...) -> (groups, inputs of a group, outputs of a group, ...)
        first = (len(weight),) if groups is None else (groups, len(weight) // groups)
        self._split = (*first, *weight.shape[1:])
        kept = (0,) if groups is None else (0, 2)
        self._dims = tuple(i for i in range(len(self._split)) if i not in kept)
        self._fan_in = math.prod(self._split[i] for i in self._dims)
        self.gain = nn.Parameter(weight.new_ones(math.prod(self._split[i] for i in kept))) if gain else None

    def forward(self, weight: Tensor) -> Tensor:
        """The weight, each output's of mean 0 and variance 1."""
        x = weight.reshape(self._split).to(torch.promote_types(weight.dtype, torch.float32))
        x = x - x.mean(self._dims, keepdim=True)
        x = x - x.mean(self._dims, keepdim=True)  # what the rounding of a large mean left
        scale = rsqrt(x.square().mean(self._dims, keepdim=True) + self.eps)
        if self.gain is not None:
            scale = scale * self.gain.view(scale.shape) / math.sqrt(self._fan_in)
        return (x * scale).reshape(weight.shape).to(weight.dtype)

    def extra_repr(self) -> str:
        """The eps, and whether there are gains."""
        return f"eps={self.eps}, gain={self.gain is not None}"


def _weight_of(module: nn.Module, name: str) -> Tensor:
    weight = getattr(module, name, None)
    if not isinstance(weight, Tensor):
        names = ", ".join(key for key, _ in module.named_parameters(recurse=False)) or "none"
        raise ShapeError(
            f"name must be that of a parameter of the module; {type(module).__name__} has {names}; got {name!r}"
        )
    return weight


def to_range(x: Tensor, dims: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """`x` in float32 at least, times a power of two for each set along `dims`, and that power.

    It takes the largest entry to between 2^8 and 2^9, so that squares neither overflow nor vanish: float16 then
    has room for sums over 2^13 such entries, and full precision for those that are 2^22 times smaller. What is
    computed does not depend on the power, so that gradients need not pass through it.
    """
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    peak = torch.linalg.vector_norm(x.detach(), math.inf, dims, keepdim=True)
    power = torch.exp2(8 - peak.clamp(min=1e-30).log2().floor())
    power = torch.where(peak.isfinite(), power, 1)  # what is not finite stays where it is
    return x * power, power


def to_unit(x: Tensor, dims: tuple[int, ...]) -> Tensor:
    """`x` of length 1 along `dims`, or 0, in float32 at least."""
    scaled, _ = to_range(x, dims)
    return scaled * rsqrt(scaled.square().sum(dims, keepdim=True))


def rsqrt(squares: Tensor) -> Tensor:
    """``1 / sqrt(squares)``, and 0 with a gradient of 0 where that is infinite."""
    zero = squares == 0
    return torch.where(zero, 0, torch.where(zero, 1, squares).rsqrt())
