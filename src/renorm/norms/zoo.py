"""The zoo: each norm is a pattern. Where torch.nn has the layer, ours is a subclass of it.

Constructor, defaults, attributes, `state_dict` and shape checks are torch's own then, `isinstance` holds (weight
decay groups, `swa_utils.update_bn`, freezing loops), and a checkpoint loads unchanged; only the forward is ours.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm as TorchBatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm as TorchInstanceNorm

from renorm.errors import ShapeError
from renorm.kernels.moments import Affine, Moments
from renorm.norms.channels import by_first_entries
from renorm.norms.norm import Norm
from renorm.norms.running import OneValue
from renorm.norms.solve import mix
from renorm.pattern import Partition

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = [
    "BatchNorm",
    "BatchNorm1d",
    "BatchNorm2d",
    "BatchNorm3d",
    "GroupNorm",
    "InstanceNorm1d",
    "InstanceNorm2d",
    "InstanceNorm3d",
    "LayerNorm",
    "RMSNorm",
    "SwitchNorm",
    "SwitchNorm1d",
    "SwitchNorm2d",
    "SwitchNorm3d",
]

Device = torch.device | str | None


class _Batch(Norm, TorchBatchNorm):
    """Batch norm of any rank, channels second: ``[n] c [...]``."""

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device: Device = None,
        dtype: torch.dtype | None = None,
        *,
        bias: bool = True,
        unbiased: bool = True,
        one_value: OneValue = "raise",
        activation: str | None = None,
        process_group: ProcessGroup | None = None,
        backend: str = "auto",
    ) -> None:
        super(Norm, self).__init__(num_features, eps, momentum, affine, track_running_stats, device=device, dtype=dtype)
        if not bias:  # an argument of torch's from 2.13 on
            self.register_parameter("bias", None)
        self._define(
            self._pattern(),
            {"c": num_features},
            running=("c",),
            unbiased=unbiased,
            one_value=one_value,
            activation=activation,
            process_group=process_group,
            backend=backend,
        )

    def _pattern(self) -> str:
        return "[n] c [...]"

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Normalize `x`; see `Norm`."""
        self._check_input_dim(x)  # type: ignore[no-untyped-call]
        return super().forward(x, mask)


class BatchNorm1d(_Batch, nn.BatchNorm1d):
    """Batch norm of vectors (N, C) or sequences (N, C, L): ``[n] c [...]``.

    $$y = \\frac{x - \\text{E}[x]}{\\sqrt{\\text{Var}[x] + \\text{eps}}} \\cdot \\text{weight} + \\text{bias}$$

    over everything but the channels; running statistics in evaluation. Arguments as `torch.nn.BatchNorm1d`, then
    `unbiased`, `one_value`, `activation`, `process_group` and `backend` as `Norm`. Ioffe & Szegedy 2015,
    arXiv:1502.03167.

    >>> BatchNorm1d(2, affine=False)(torch.tensor([[0.0, 1.0], [2.0, 3.0]]))
    tensor([[-1.0000, -1.0000],
            [ 1.0000,  1.0000]])
    """


class BatchNorm2d(_Batch, nn.BatchNorm2d):
    """Batch norm of images (N, C, H, W): ``[n] c [...]``. See `BatchNorm1d`."""


class BatchNorm3d(_Batch, nn.BatchNorm3d):
    """Batch norm of volumes (N, C, D, H, W): ``[n] c [...]``. See `BatchNorm1d`."""


class BatchNorm(_Batch):
    """Batch norm with the channels on any axis, for any rank from 2 on: ``[n] c [...]``, or ``[...] c`` for axis -1.

    Arguments as `BatchNorm1d`, with `axis`, the dimension of the channels (pytorch#21856). See `BatchNorm1d`.

    >>> BatchNorm(3, axis=-1).pattern
    '[...] c'
    """

    axis: int

    def __init__(self, num_features: int, *args: Any, axis: int = 1, **options: Any) -> None:
        # Plain attributes have to wait for Module.__init__, and _pattern is asked before it returns.
        self.__dict__["axis"] = axis
        super().__init__(num_features, *args, **options)

    def _pattern(self) -> str:
        if self.axis == 1:
            return "[n] c [...]"
        before = " ".join(f"n{i}" for i in range(self.axis)) if self.axis >= 0 else "..."
        after = "..." if self.axis >= 0 else " ".join(f"d{i}" for i in range(-self.axis - 1))
        return " ".join(part for part in (f"[{before}]" * bool(before), "c", f"[{after}]" * bool(after)) if part)

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() < 2:
            raise ShapeError(f"expected at least 2D input (got {input.dim()}D input)")


class _Instance(Norm, TorchInstanceNorm):
    """Instance norm: ``n c [...]``, or ``c [...]`` for one sample without its batch dimension."""

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float = 0.1,
        affine: bool = False,
        track_running_stats: bool = False,
        device: Device = None,
        dtype: torch.dtype | None = None,
        *,
        bias: bool = True,
        one_value: OneValue = "raise",
        activation: str | None = None,
        backend: str = "auto",
    ) -> None:
        super(Norm, self).__init__(num_features, eps, momentum, affine, track_running_stats, device=device, dtype=dtype)
        if not bias:  # an argument of torch's from 2.13 on
            self.register_parameter("bias", None)
        rank: int = self._get_no_batch_dim()  # type: ignore[no-untyped-call]
        known = affine or track_running_stats
        self._define(
            {rank: "c [...]", rank + 1: "n c [...]"},
            {"c": num_features} if known else {},
            weight=("c",) if affine else (),
            running=("c",) if track_running_stats else (),
            one_value=one_value,
            activation=activation,
            backend=backend,
        )

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Normalize `x`; see `Norm`."""
        self._check_input_dim(x)  # type: ignore[no-untyped-call]
        channels = x.shape[-self._get_no_batch_dim()]  # type: ignore[no-untyped-call]
        if channels != self.num_features and not self.sizes:
            warnings.warn(
                f"the input has {channels} channels and the layer {self.num_features}; nothing depends on it while "
                "there are neither parameters nor running statistics",
                stacklevel=2,
            )
        return super().forward(x, mask)


class InstanceNorm1d(_Instance, nn.InstanceNorm1d):
    """Instance norm of sequences (N, C, L) or (C, L): ``n c [...]``.

    $$y = \\frac{x - \\text{E}[x]}{\\sqrt{\\text{Var}[x] + \\text{eps}}}$$

    over the positions of one channel of one sample. Arguments as `torch.nn.InstanceNorm1d` (no weight and bias and
    no running statistics unless asked for), then `one_value`, `activation` and `backend` as `Norm`. Not for vectors:
    one value has no variance. Ulyanov et al. 2016, arXiv:1607.08022.

    >>> InstanceNorm1d(1)(torch.tensor([[[0.0, 2.0]]]))
    tensor([[[-1.0000,  1.0000]]])
    """


class InstanceNorm2d(_Instance, nn.InstanceNorm2d):
    """Instance norm of images (N, C, H, W) or (C, H, W): ``n c [...]``. See `InstanceNorm1d`."""


class InstanceNorm3d(_Instance, nn.InstanceNorm3d):
    """Instance norm of volumes (N, C, D, H, W) or (C, D, H, W): ``n c [...]``. See `InstanceNorm1d`."""


class LayerNorm(Norm, nn.LayerNorm):
    """Layer norm over the last dimensions: ``... [c]``, or as many axes as `normalized_shape` has.

    $$y = \\frac{x - \\text{E}[x]}{\\sqrt{\\text{Var}[x] + \\text{eps}}} \\cdot \\text{weight} + \\text{bias}$$

    Arguments as `torch.nn.LayerNorm`, then `activation` and `backend` as `Norm`. On images (N, C, H, W) torch's
    argument ``LayerNorm((C, H, W))`` learns a weight for each entry; ``GroupNorm(1, C)`` has the same statistics and
    one for each channel. Ba et al. 2016, arXiv:1607.06450.

    >>> LayerNorm(2, elementwise_affine=False)(torch.tensor([[1.0, 3.0]]))
    tensor([[-1.0000,  1.0000]])
    """

    def __init__(
        self,
        normalized_shape: int | Sequence[int],
        eps: float = 1e-5,
        elementwise_affine: bool = True,
        bias: bool = True,
        device: Device = None,
        dtype: torch.dtype | None = None,
        *,
        activation: str | None = None,
        backend: str = "auto",
    ) -> None:
        super(Norm, self).__init__(normalized_shape, eps, elementwise_affine, bias, device=device, dtype=dtype)
        _define_trailing(self, elementwise_affine, center=True, activation=activation, backend=backend)


class RMSNorm(Norm, nn.RMSNorm):
    r"""Root-mean-square norm over the last dimensions: ``... [c]`` about zero.

    $$y = \frac{x}{\sqrt{\text{E}[x^2] + \text{eps}}} \cdot \text{weight}$$

    Arguments as `torch.nn.RMSNorm` (eps None: the computing dtype's), then `activation` and `backend` as `Norm`, and:

    - `offset`: True keeps the weight about zero and applies 1 + weight, as Gemma's state has it; zero at first.
    - `partial`: the mean square is that of the first ``ceil(partial * C)`` entries, for one normalized dimension
      (pRMSNorm; the paper has 0.0625). Where none of them is real under the mask it counts as 1.

    Raises ShapeError for a `partial` that is not in (0, 1]. Zhang & Sennrich 2019, arXiv:1910.07467.

    >>> RMSNorm(2, elementwise_affine=False)(torch.tensor([[1.0, 7.0]]))
    tensor([[0.2000, 1.4000]])
    >>> RMSNorm(2, elementwise_affine=False, partial=0.5)(torch.tensor([[2.0, 7.0]]))
    tensor([[1.0000, 3.5000]])
    """

    offset: bool = False
    partial: float = 1.0

    def __init__(
        self,
        normalized_shape: int | Sequence[int],
        eps: float | None = None,
        elementwise_affine: bool = True,
        device: Device = None,
        dtype: torch.dtype | None = None,
        *,
        offset: bool = False,
        partial: float = 1.0,
        activation: str | None = None,
        backend: str = "auto",
    ) -> None:
        super(Norm, self).__init__(normalized_shape, eps, elementwise_affine, device=device, dtype=dtype)
        if not 0 < partial <= 1 or (partial < 1 and len(self.normalized_shape) > 1):
            raise ShapeError(
                "partial is the part of one normalized dimension that is measured, more than 0 and at most 1; got "
                f"partial={partial} over {len(self.normalized_shape)} dimensions"
            )
        self.register_parameter("bias", None)
        if offset:
            self.offset = self._applies_other = offset
            self.reset_parameters()
        if partial < 1:
            self.partial = partial
        _define_trailing(self, elementwise_affine, center=False, activation=activation, backend=backend)

    def reset_parameters(self) -> None:
        """The weight that changes nothing."""
        if self.elementwise_affine:
            nn.init.constant_(self.weight, 0.0 if self.offset else 1.0)

    def _applied(self) -> tuple[Any, None]:
        weight = self.weight
        if weight is None or not self.offset:
            return weight, None
        # Half precision could not tell 1 + weight from 1 where a weight is small.
        return 1 + (weight.float() if weight.dtype in (torch.float16, torch.bfloat16) else weight), None

    @property
    def _own_solve(self) -> bool:
        return self.partial < 1

    def _solved(self, x: Tensor, part: Partition, kernel: str, mask: Tensor | None, *context: Any) -> Tensor:
        return by_first_entries(x, part, kernel, self._applied()[0], self._eps(x), self.partial, mask)

    def extra_repr(self) -> str:
        """That of `Norm`, and which variant it is."""
        variant = ", offset=True" * self.offset + f", partial={self.partial}" * (self.partial < 1)
        return super().extra_repr() + variant


def _define_trailing(layer: LayerNorm | RMSNorm, affine: bool, *, center: bool, **options: Any) -> None:
    names = ("c",) if len(layer.normalized_shape) == 1 else tuple(f"c{i}" for i in range(len(layer.normalized_shape)))
    layer._define(
        f"... [{' '.join(names)}]",
        dict(zip(names, layer.normalized_shape, strict=True)),
        weight=names if affine else (),
        center=center,
        **options,
    )


class GroupNorm(Norm, nn.GroupNorm):
    """Group norm, channels second: ``n (g [c]) [...]``.

    $$y = \\frac{x - \\text{E}[x]}{\\sqrt{\\text{Var}[x] + \\text{eps}}} \\cdot \\text{weight} + \\text{bias}$$

    over the channels of a group and all positions of one sample. One group is layer norm over (C, H, W), as many
    groups as channels is instance norm. Arguments as `torch.nn.GroupNorm`, then `activation` and `backend` as `Norm`.
    Wu & He 2018, arXiv:1803.08494.

    >>> GroupNorm(1, 2, affine=False)(torch.tensor([[1.0, 3.0], [2.0, 6.0]]))
    tensor([[-1.0000,  1.0000],
            [-1.0000,  1.0000]])
    """

    def __init__(
        self,
        num_groups: int,
        num_channels: int,
        eps: float = 1e-5,
        affine: bool = True,
        device: Device = None,
        dtype: torch.dtype | None = None,
        *,
        bias: bool = True,
        activation: str | None = None,
        backend: str = "auto",
    ) -> None:
        super(Norm, self).__init__(num_groups, num_channels, eps, affine, device=device, dtype=dtype)
        if not bias:  # an argument of torch's from 2.13 on
            self.register_parameter("bias", None)
        self._define(
            "n (g [c]) [...]",
            {"g": num_groups, "c": num_channels // num_groups},
            weight=("g", "c") if affine else (),
            activation=activation,
            backend=backend,
        )

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Normalize `x`; see `Norm`."""
        if x.numel() == self.num_groups:  # torch refuses one value a group where there is one sample only
            raise ShapeError(f"Expected more than 1 value per channel when training, got input size {tuple(x.shape)}")
        return super().forward(x, mask)


class SwitchNorm(Norm):
    r"""Switchable norm: standardize by a learnt mixture of instance, layer and batch statistics.

    $$y = \frac{x - \sum_k w_k \text{mean}_k}{\sqrt{\sum_k w'_k \text{var}_k + \text{eps}}} \cdot \text{weight}
    + \text{bias}, \qquad w = \text{softmax}(\text{mean\_weight}),\; w' = \text{softmax}(\text{var\_weight})$$

    over the `partitions`, in their order: instance ``n c [...]``, layer ``n [c ...]`` and batch ``[n] c [...]``.
    All variances are biased, those kept for evaluation too (in the authors' code unbiased). In evaluation the batch
    statistics are the running ones. `momentum` is torch's, the weight of the new batch, or None for the average over
    all batches; `axis` is the dimension of the channels, 1 or -1. Luo et al. 2018, arXiv:1806.10779.

    >>> SwitchNorm(3)(torch.randn(2, 3, 4, 4)).shape
    torch.Size([2, 3, 4, 4])
    """

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device: Device = None,
        dtype: torch.dtype | None = None,
        *,
        axis: int = 1,
        partitions: Sequence[str] = ("instance", "layer", "batch"),
        process_group: ProcessGroup | None = None,
        backend: str = "auto",
    ) -> None:
        patterns = {1: "n c [...]", -1: "n [...] c"}
        if axis not in patterns:
            raise ShapeError(f"the channels of a switchable norm are on axis 1 or -1; got axis={axis}")
        unknown = set(partitions) - {"instance", "layer", "batch"}
        if unknown or not partitions:
            raise ShapeError(f"partitions are some of instance, layer and batch; got {tuple(partitions)}")
        super().__init__(
            patterns[axis],
            eps=eps,
            weight="c" if affine else None,
            running="c" if track_running_stats else None,
            momentum=momentum,
            unbiased=False,
            one_value="allow",
            backend=backend,
            device=device,
            dtype=dtype,
            c=num_features,
        )
        self.num_features = num_features
        self.affine = affine
        self.partitions = tuple(partitions)
        self.process_group = process_group
        self.mean_weight = nn.Parameter(torch.ones(len(partitions), device=device, dtype=dtype))
        self.var_weight = nn.Parameter(torch.ones(len(partitions), device=device, dtype=dtype))

    @property
    def couples_batch(self) -> bool:
        """Whether batch statistics are among the mixed ones."""
        return "batch" in self.partitions

    def mixture(self) -> dict[str, tuple[float, float]]:
        """How much of the mean and of the variance comes from each partition: two columns that sum to 1.

        >>> SwitchNorm(3, partitions=("layer", "batch")).mixture()
        {'layer': (0.5, 0.5), 'batch': (0.5, 0.5)}
        """
        shares = [weight.detach().float().softmax(0).tolist() for weight in (self.mean_weight, self.var_weight)]
        return dict(zip(self.partitions, zip(*shares, strict=True), strict=True))

    def solve(self, moments: Moments) -> Affine:
        """Mix the moments of the partitions; all of them come from the one pass that measured the instances."""
        made = {
            "instance": lambda: moments,
            "layer": lambda: moments.merge("c"),
            "batch": lambda: self.batch_moments(moments.merge("n")),
        }
        chosen = [made[name]() for name in self.partitions]
        return mix(chosen, self.mean_weight, self.var_weight, self._eps(moments.mean))

    def values_per_set(self, shape: tuple[int, ...]) -> int:
        """How many entries the smallest of the mixed statistics comes from."""
        instance = super().values_per_set(shape)
        entries = {"instance": instance, "layer": instance * self.num_features, "batch": instance * shape[0]}
        return min(entries[name] for name in self.partitions)


class SwitchNorm1d(SwitchNorm):
    """Switchable norm of vectors (N, C) or sequences (N, C, L). See `SwitchNorm`.

    From layer and batch statistics only, as its authors have it: an instance of a vector is one value.
    """

    def __init__(self, num_features: int, *args: Any, partitions: Sequence[str] = ("layer", "batch"), **options: Any):
        super().__init__(num_features, *args, partitions=partitions, **options)


class SwitchNorm2d(SwitchNorm):
    """Switchable norm of images (N, C, H, W). See `SwitchNorm`."""


class SwitchNorm3d(SwitchNorm):
    """Switchable norm of volumes (N, C, D, H, W). See `SwitchNorm`."""
