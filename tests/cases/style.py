"""Style norms and conditional norms, with the styles and conditions that the checks do not pass."""

import torch
from checks import Case, moments
from torch import nn

import renorm as rn
from cases.plain import IMAGE, SEQUENCE, VECTOR, VOLUME, grouped, standardize
from renorm.norms.condition import SPADE, ConditionalNorm, FiLM
from renorm.norms.style import AdaIN, CrossNorm, SelfNorm


def waves(x, *shape):
    """Numbers of x's batch size that differ from each other, whatever x holds."""
    size = torch.Size(shape).numel()
    angles = torch.arange(x.shape[0] * size, device=x.device, dtype=torch.float64)
    return torch.cos(0.7 * angles**1.1).reshape(x.shape[0], *shape)


class Given(nn.Module):
    """A layer of two inputs with its second one."""

    solve = rn.Norm.solve

    def __init__(self, layer, second):
        super().__init__()
        self.layer, self.second = layer, second

    @property
    def running_mean(self):
        return getattr(getattr(self.layer, "norm", None), "running_mean", None)

    def forward(self, x, mask=None):
        return self.layer(x, self.second(x), mask)


def style(x, axis=1):
    """Another size than x's: 7 positions, or 3 x 5."""
    made = 2 + waves(x, x.shape[axis], *((3, 5) if x.dim() > 3 else (7,)))
    return made.movedim(1, axis).to(x.dtype)


def style_last(x):
    return style(x, -1)


def one_style(x):
    return style(x)[:1]


def pair(x):
    values = waves(x, 2, x.shape[1]).to(x.dtype)
    return values[:, 0], 1.5 + values[:, 1]


def classes(x):
    return (torch.arange(x.shape[0], device=x.device) * 2) % 4


def vectors(x):
    """Small enough for a gain of about 1, by which errors are multiplied."""
    return 0.4 * waves(x, 3).to(x.dtype)


def label_map(x):
    """Twice as large as x, or so."""
    sizes = [2 * size - 1 for size in x.shape[2:]]
    return 0.4 * waves(x, 3, *sizes).to(x.dtype)


# ---- formulas


def inner(x, axis):
    channels = axis % x.dim()
    return tuple(d for d in range(1, x.dim()) if d != channels)


def stats(x, dims, mask=None, eps=1e-5):
    """Mean and sqrt(var + eps); of a vector, each entry is its own mean."""
    mean, var = moments(x, dims, mask) if dims else (x, torch.zeros_like(x))
    return mean, (var + eps).sqrt()


def along(values, x, axis):
    """(N, C) -> channels on `axis`, sample by sample."""
    return torch.stack([v.reshape([-1 if d == axis % x.dim() else 1 for d in range(1, x.dim())]) for v in values])


def adapted(second, axis=1):
    """AdaIN's equation 8 (arXiv:1703.06868), channel by channel."""

    def formula(layer, x, mask):
        mean, std = stats(x, inner(x, axis), mask)
        given = second(x)
        if isinstance(given, torch.Tensor):
            given = given.double().movedim(axis, 1)
            mean_s = given.mean(tuple(range(2, given.dim())))
            std_s = (given.var(tuple(range(2, given.dim())), unbiased=False) + 1e-5).sqrt()
        else:
            mean_s, std_s = given
        return along(std_s.double(), x, axis) * (x - mean) / std + along(mean_s.double(), x, axis)

    return formula


def filmed(second, normalize=None, axis=1):
    """gamma(z) * x_hat + beta(z), with gamma = 1 + the first half of the projection (arXiv:1709.07871, section 7.2)."""

    def formula(layer, x, mask):
        layer = layer.layer
        project, z = getattr(layer, "film", layer).project, second(x)
        if z.is_floating_point():
            rows = z.double() @ project.weight.double().T + project.bias.double()
        else:
            rows = project.weight.double()[z]
        half = rows.shape[1] // 2
        x_hat = x if normalize is None else normalize(layer.norm, x, mask)
        return x_hat * along(1 + rows[:, :half], x, axis) + along(rows[:, half:], x, axis)

    return formula


def in_groups(groups):
    """Group norm's statistics without its parameters."""

    def formula(_, x, mask):
        size = x.shape[1] // groups
        every = range(groups)
        parts = [x[:, i * size : (i + 1) * size] for i in every]
        masks = [None if mask is None else mask[:, i * size : (i + 1) * size] for i in every]
        whole = standardize(tuple(range(1, x.dim())))
        return torch.cat([whole(None, part, m) for part, m in zip(parts, masks, strict=True)], 1)

    return formula


def nearest(m, sizes):
    """Position i of n takes that at floor(i * size / n)."""
    for dim, size in enumerate(sizes, 2):
        m = m.index_select(dim, torch.arange(size) * m.shape[dim] // size)
    return m


def spatial(normalize):
    """SPADE's equation 1 (arXiv:1903.07291) with the 1 + gamma of its network, the convolutions as sums of shifts."""

    def conv(layer, m):
        w, reach = layer.weight.double(), layer.kernel_size[0] // 2
        total = layer.bias.double().reshape([1, -1] + [1] * (m.dim() - 2))
        padded = torch.nn.functional.pad(m, [reach] * (2 * (m.dim() - 2)))
        for offset in torch.cartesian_prod(*[torch.arange(2 * reach + 1)] * (m.dim() - 2)).reshape(-1, m.dim() - 2):
            window, tap = padded, w
            for dim, start in enumerate(offset.tolist(), 2):
                window, tap = window.narrow(dim, start, m.shape[dim]), tap.select(2, start)
            total = total + torch.einsum("nk...,ck->nc...", window, tap)
        return total

    def formula(layer, x, mask):
        layer = layer.layer
        m = conv(layer.shared, nearest(label_map(x).double(), x.shape[2:])).clamp(min=0)
        return normalize(layer.norm, x, mask) * (1 + conv(layer.gamma, m)) + conv(layer.beta, m)

    return formula


def crossed(content=None, lent=None, mode=0, axis=1):
    """CrossNorm's equation (arXiv:2102.02811), statistics and styling in the boxes of `Fixed`."""

    def formula(layer, x, mask):
        real = torch.ones_like(x, dtype=torch.bool) if mask is None else mask
        boxes = [torch.ones_like(real) for _ in range(2)]
        for box, wanted in zip(boxes, (content, lent), strict=True):
            if wanted is not None:
                box[:] = False
                box[(slice(None), slice(None), *wanted)] = True
        dims = inner(x, axis)
        mean, std = stats(x, dims, real & boxes[0])
        mean_b, std_b = stats(x, dims, real & boxes[1])
        seen = (real & boxes[1]).sum(dims, keepdim=True) > 0 if dims else real
        where = 0 if mode == 0 else axis
        mean_b, std_b, seen = (t.roll(1, where) for t in (mean_b, std_b, seen))
        y = torch.where(seen, (x - mean) / std * std_b + mean_b, x)
        return torch.where(boxes[0], y, x)

    return formula


class Fixed(CrossNorm):
    """CrossNorm that always swaps, with the sample before, and with given boxes: for checks that compare two calls."""

    def __init__(self, *boxes, **options):
        super().__init__(p=1.0, **options)
        self.boxes, self.next = boxes, 0

    def _order(self, x):
        size = x.shape[0] if self.mode == "2-instance" else x.shape[self.axis]
        return (torch.arange(size, device=x.device) - 1) % max(size, 1)

    def _box(self, x):
        box = torch.zeros(x.shape[2:], dtype=torch.bool, device=x.device)
        box[self.boxes[self.next % len(self.boxes)]] = True
        self.next = (self.next + 1) % len(self.boxes)
        return box.expand(1, 1, *box.shape)


def attended(axis=1):
    """SelfNorm's equation (arXiv:2102.02811), the batch norm of its attention in training written out."""

    def share(attention, mean, std, real):
        z = mean * attention.weight[:, 0].double() + std * attention.weight[:, 1].double()
        if attention.norm is None:
            return (z + attention.bias.double()).sigmoid()
        center, var = moments(z, (0,), real)
        norm = attention.norm
        return ((z - center) / (var + norm.eps).sqrt() * norm.weight.double() + norm.bias.double()).sigmoid()

    def formula(layer, x, mask):
        dims = inner(x, axis)
        mean, std = stats(x, dims, mask)
        real = None if mask is None else (mask.sum(dims) > 0 if dims else mask)
        flat = [t.reshape(x.shape[0], -1) for t in (mean, std)]
        f, g = (along(share(a, *flat, real), x, axis) for a in (layer.f, layer.g))
        return (x - mean) / std * (g * std) + f * mean

    return formula


BOX, OTHER = (slice(1, 3), slice(0, 5)), (slice(0, 4), slice(2, 6))
BY_PLACE = {"evaluation": "what is passed differs with the place in the batch; test_style.py passes it with the sample"}
AS_LARGE = {"magnitudes": "the output is as large as the input: relative errors in test_style.py"}
IN_TRAINING = {"mask_in_evaluation": "evaluation computes something else: test_style.py"}
MAPPED = BY_PLACE | {
    "compile_dynamic": "torch's convolution has one graph below a batch of 16 and another above: test_style.py",
    "large_mean": "the norm's error is multiplied by 1 + gamma: test_style.py",
}
RANDOM = AS_LARGE | IN_TRAINING | {"vmap": "random numbers, for which vmap wants to be asked: test_style.py"}

CASES = [
    Case("AdaIN", lambda: Given(AdaIN(), style), IMAGE, adapted(style), exempt=BY_PLACE),
    Case("AdaIN-NCL", lambda: Given(AdaIN(), style), SEQUENCE, adapted(style), exempt=BY_PLACE),
    Case("AdaIN-NC", lambda: Given(AdaIN(), style), VECTOR, adapted(style), exempt=BY_PLACE),
    Case("AdaIN-3d", lambda: Given(AdaIN(), style), VOLUME, adapted(style), exempt=BY_PLACE),
    Case("AdaIN-last", lambda: Given(AdaIN(axis=-1), style_last), IMAGE, adapted(style_last, -1), exempt=BY_PLACE),
    Case("AdaIN-pair", lambda: Given(AdaIN(), pair), IMAGE, adapted(pair), exempt=BY_PLACE),
    Case(
        "AdaIN-one-style",
        lambda: Given(AdaIN(), one_style),
        IMAGE,
        adapted(lambda x: one_style(x).expand(len(x), -1, -1, -1)),
        exempt={"empty": "its style is the first of the batch's"},
    ),
    Case("FiLM", lambda: Given(FiLM(6, 3), vectors), IMAGE, filmed(vectors), exempt=BY_PLACE | AS_LARGE),
    Case(
        "FiLM-classes",
        lambda: Given(FiLM(6, 4, embedding=True), classes),
        SEQUENCE,
        filmed(classes),
        exempt=BY_PLACE | AS_LARGE,
    ),
    Case("FiLM-NC", lambda: Given(FiLM(6, 3), vectors), VECTOR, filmed(vectors), exempt=BY_PLACE | AS_LARGE),
    Case(
        "FiLM-last",
        lambda: Given(FiLM(7, 3, axis=-1), vectors),
        IMAGE,
        filmed(vectors, axis=-1),
        exempt=BY_PLACE | AS_LARGE,
    ),
    Case(
        "ConditionalNorm-batch",
        lambda: Given(ConditionalNorm("batch", 6, 4, embedding=True), classes),
        IMAGE,
        filmed(classes, standardize((0, 2, 3))),
        None,
        True,
        BY_PLACE,
    ),
    Case(
        "ConditionalNorm-batch-NC",
        lambda: Given(ConditionalNorm("batch", 6, 3), vectors),
        VECTOR,
        filmed(vectors, standardize((0,))),
        None,
        True,
        BY_PLACE,
    ),
    Case(
        "ConditionalNorm-instance",
        lambda: Given(ConditionalNorm("instance", 6, 4, embedding=True), classes),
        IMAGE,
        filmed(classes, standardize((2, 3))),
        exempt=BY_PLACE,
    ),
    Case(
        "ConditionalNorm-layer",
        lambda: Given(ConditionalNorm("layer", 9, 3, axis=-1), vectors),
        SEQUENCE,
        filmed(vectors, standardize((2,)), axis=-1),
        exempt=BY_PLACE,
    ),
    Case(
        "ConditionalNorm-group",
        lambda: Given(ConditionalNorm(rn.GroupNorm(3, 6), 6, 3), vectors),
        VOLUME,
        filmed(vectors, grouped(3)),
        exempt=BY_PLACE,
    ),
    Case(
        "SPADE-batch",
        lambda: Given(SPADE("batch", 6, 3, hidden=4), label_map),
        IMAGE,
        spatial(standardize((0, 2, 3))),
        None,
        True,
        MAPPED,
    ),
    Case(
        "SPADE-instance",
        lambda: Given(SPADE("instance", 6, 3, hidden=4), label_map),
        IMAGE,
        spatial(standardize((2, 3))),
        exempt=MAPPED,
    ),
    Case(
        "SPADE-1d",
        lambda: Given(SPADE("layer", 6, 3, hidden=4, dims=1), label_map),
        SEQUENCE,
        spatial(standardize((1, 2))),
        exempt=MAPPED,
    ),
    Case(
        "SPADE-3d",
        lambda: Given(SPADE("group(2)", 6, 3, hidden=4, kernel_size=1, dims=3), label_map),
        VOLUME,
        spatial(in_groups(2)),
        exempt=MAPPED,
    ),
    Case("CrossNorm", Fixed, IMAGE, crossed(), None, True, RANDOM),
    Case("CrossNorm-NC", Fixed, VECTOR, crossed(), None, True, RANDOM),
    Case("CrossNorm-last", lambda: Fixed(axis=-1), SEQUENCE, crossed(axis=-1), None, True, RANDOM),
    Case(
        "CrossNorm-channels",
        lambda: Fixed(mode="1-instance"),
        VOLUME,
        crossed(mode=1),
        exempt=RANDOM,
    ),
    Case(
        "CrossNorm-content",
        lambda: Fixed(BOX, crop="content"),
        IMAGE,
        crossed(BOX),
        None,
        True,
        RANDOM,
    ),
    Case(
        "CrossNorm-style",
        lambda: Fixed(OTHER, crop="style"),
        IMAGE,
        crossed(None, OTHER),
        None,
        True,
        RANDOM,
    ),
    Case(
        "CrossNorm-both",
        lambda: Fixed(BOX, OTHER, crop="both"),
        IMAGE,
        crossed(BOX, OTHER),
        None,
        True,
        RANDOM,
    ),
    Case("SelfNorm", lambda: SelfNorm(6), IMAGE, attended(), None, True, AS_LARGE | IN_TRAINING),
    Case("SelfNorm-NCL", lambda: SelfNorm(6), SEQUENCE, attended(), None, True, AS_LARGE | IN_TRAINING),
    Case("SelfNorm-plain", lambda: SelfNorm(6, batch_norm=False), IMAGE, attended(), exempt=AS_LARGE),
    Case("SelfNorm-last", lambda: SelfNorm(7, batch_norm=False, axis=-1), IMAGE, attended(-1), exempt=AS_LARGE),
    Case("SelfNorm-NC", lambda: SelfNorm(6, batch_norm=False), VECTOR, attended(), exempt=AS_LARGE),
]
