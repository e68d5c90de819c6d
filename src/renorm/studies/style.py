"""Instance norm as a norm of style: what it removes, when it is of advantage, and how AdaIN moves style."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.datasets import load_sample_image
from torch import Tensor, nn

from renorm.norms import named
from renorm.norms.style import AdaIN
from renorm.studies.picture import Plot, draw, points
from renorm.studies.replication import Claim, Plan, Published, Replication, Table
from renorm.studies.rows import Condition, Interval, Rows, Value, interval

_INPUTS = {"original": "as they are", "contrast": "contrast normalized", "style": "style normalized"}
_RATES = (3e-3, 1e-2)
_SIZE, _BATCH, _WIDTH = 24, 8, 16  # pixels of a crop's side, crops of a batch, channels
_LAST = 40  # steps whose mean loss is the loss of a training
_STYLE_WEIGHT = 10.0
_CONTRASTS = (0.25, 0.5, 1.0, 2.0, 4.0)
_ALPHAS = (0.0, 0.25, 0.5, 0.75, 1.0)


class _Encoder(nn.Module):
    """Random features: three convolutions that are never trained."""

    def __init__(self) -> None:
        super().__init__()
        channels, strides = (3, 16, 32, 32), (1, 2, 2)
        self.convs = nn.ModuleList(
            nn.Conv2d(a, b, 3, stride=s, padding=1, bias=False)
            for a, b, s in zip(channels, channels[1:], strides, strict=False)
        )
        for conv in self.convs:
            nn.init.kaiming_normal_(conv.weight)  # type: ignore[arg-type]
        self.requires_grad_(False)

    def forward(self, x: Tensor) -> list[Tensor]:
        """The features after each convolution."""
        return self.then(x, 0)

    def then(self, x: Tensor, first: int) -> list[Tensor]:
        """The features of the convolutions from `first` on."""
        found = []
        for conv in list(self.convs)[first:]:
            x = conv(x).relu()
            found.append(x)
        return found


Statistics = list[tuple[Tensor, Tensor]]


def _statistics(features: Sequence[Tensor]) -> Statistics:
    """Mean and deviation of each channel of each sample, by layer."""
    # 1e-8: a channel that is zero everywhere has a deviation with no gradient
    return [(x.mean((2, 3)), (x.var((2, 3), correction=0) + 1e-8).sqrt()) for x in features]


def _style_loss(found: Statistics, wanted: Statistics) -> Tensor:
    """The squared distance of means and deviations, over that of the wanted ones from 0; the mean over layers."""
    losses = []
    for pair, goal in zip(found, wanted, strict=True):
        apart = torch.stack([(a - b).square().mean() for a, b in zip(pair, goal, strict=True)])
        losses.append(apart.sum() / torch.stack([b.square().mean() for b in goal]).sum())
    return torch.stack(losses).mean()


@functools.lru_cache(maxsize=1)
def _photographs() -> tuple[Tensor, Tensor]:
    """china.jpg and flower.jpg at half their size, (3, 213, 320), from -1 to 1."""
    found = [torch.from_numpy(load_sample_image(name).copy()) for name in ("china.jpg", "flower.jpg")]
    halves = [F.avg_pool2d(one.permute(2, 0, 1).float()[None] / 127.5 - 1, 2)[0] for one in found]
    return halves[0], halves[1]


def _styles() -> tuple[Tensor, Tensor]:
    """The petals, whose style is to be learnt, and the leaves behind them: (1, 3, 64, 64)."""
    flower = _photographs()[1]
    return flower[None, :, 75:139, 130:194], flower[None, :, :64, :64]


def _crops(number: int, held_out: bool, random: torch.Generator) -> Tensor:
    """Pieces of china.jpg: of its right quarter where they are held out, else of the rest."""
    image = _photographs()[0]
    part = image[:, :, 240:] if held_out else image[:, :, :240]
    rows = torch.randint(part.shape[1] - _SIZE, (number,), generator=random).tolist()
    columns = torch.randint(part.shape[2] - _SIZE, (number,), generator=random).tolist()
    return torch.stack([part[:, r : r + _SIZE, c : c + _SIZE] for r, c in zip(rows, columns, strict=True)])


def equalized(x: Tensor) -> Tensor:
    """Images (N, 3, H, W) whose luminances are spread evenly over -1 to 1; what a pixel has beyond it stays."""
    luminance = torch.einsum("c,nchw->nhw", torch.tensor([0.299, 0.587, 0.114]), x)
    ranks = luminance.flatten(1).argsort(dim=1, stable=True).argsort(dim=1).float()
    even = (2 * (ranks + 0.5) / ranks.shape[1] - 1).view_as(luminance)
    return x + (even - luminance)[:, None]


def _network(norm: str) -> nn.Module:
    layers: list[nn.Module] = []
    for inputs in (3, _WIDTH, _WIDTH):
        layers += [nn.Conv2d(inputs, _WIDTH, 3, padding=1), named.build(norm, _WIDTH), nn.ReLU()]
    return nn.Sequential(*layers, nn.Conv2d(_WIDTH, 3, 3, padding=1))


def measure(condition: Condition, seed: int) -> Mapping[str, Value]:
    """Of trainings, the losses; of the part "features", what a norm of them removes and moves."""
    encoder, random = _Encoder(), torch.Generator().manual_seed(seed)
    if condition["part"] == "features":
        return _removed(_crops(64, False, random)) | {"moved": _moved(encoder, _crops(64, False, random))}
    steps, rate = int(condition["steps"]), float(condition["lr"])
    petals, leaves = _styles()
    change = _prepared(str(condition["input"]), encoder, leaves, steps, random)
    network = _network(str(condition["norm"]))
    losses = _train(network, encoder, petals, change, steps, rate, random)
    network.eval()
    with torch.no_grad():
        x = change(_crops(128, True, random))
        held_out = _style_loss(_statistics(encoder(network(x))), _statistics(encoder(petals)))
    width = max(1, steps // 20)
    curve = [sum(part) / len(part) for part in (losses[i : i + width] for i in range(0, steps, width))]
    last = losses[-_LAST:]
    return {"loss": sum(last) / len(last), "held_out": float(held_out), "curve": curve}


def _prepared(name: str, encoder: _Encoder, style: Tensor, steps: int, random: torch.Generator) -> nn.Module:
    """What is done to every crop before it is given to the network."""
    if name == "style":  # a network of its own gives all crops one style, which is not the one to be learnt
        before = _network("instance")
        _train(before, encoder, style, nn.Identity(), steps, _RATES[-1], random)
        return before.eval().requires_grad_(False)
    return _Equalize() if name == "contrast" else nn.Identity()


class _Equalize(nn.Module):
    """The contrast normalization as a layer."""

    def forward(self, x: Tensor) -> Tensor:
        """(N, 3, H, W) -> the same shape."""
        return equalized(x)


def _train(
    network: nn.Module, encoder: _Encoder, style: Tensor, change: nn.Module, steps: int, rate: float,
    random: torch.Generator,
) -> list[float]:  # fmt: skip
    """Style losses, one a step."""
    goal = _statistics(encoder(style))
    optimizer = torch.optim.Adam(network.parameters(), lr=rate)
    losses = []
    for _ in range(steps):
        x = change(_crops(_BATCH, False, random))
        found, content = encoder(network(x)), encoder(x)[-1]
        loss = _style_loss(_statistics(found), goal)
        losses.append(loss.item())
        kept = (found[-1] - content).square().mean() / content.square().mean()
        optimizer.zero_grad()
        (_STYLE_WEIGHT * loss + kept).backward()
        optimizer.step()
    return losses


@torch.no_grad()
def _removed(x: Tensor) -> dict[str, Value]:
    """How much the output for one image changes as its contrast is multiplied, relative to its size."""
    which = int(x.flatten(1).std(1).argmax())  # in a flat one eps would count
    middle = x[which].mean((1, 2), keepdim=True)
    conv = nn.Conv2d(3, _WIDTH, 3, bias=False)
    found: dict[str, Value] = {}
    for norm in ("batch", "instance"):
        network = nn.Sequential(conv, named.build(norm, _WIDTH), nn.ReLU())
        before = network(x)[which]
        changes = []
        for contrast in _CONTRASTS:
            changed = x.clone()
            changed[which] = middle + contrast * (x[which] - middle)
            changes.append(float((network(changed)[which] - before).norm() / before.norm()))
        found[f"contrast_{norm}"] = changes
    return found


@torch.no_grad()
def _moved(encoder: _Encoder, x: Tensor) -> list[float]:
    """Style distance of the last layer as AdaIN moves the one before, as a share of the distance without it."""
    style = encoder(_styles()[0])
    goal = _statistics(style[2:])
    content = encoder(x)[1]
    moved = [AdaIN()(content, style[1], alpha=alpha) for alpha in _ALPHAS]
    distances = [float(_style_loss(_statistics(encoder.then(one, 2)), goal)) for one in moved]
    return [one / distances[0] for one in distances]


def judge(rows: Rows) -> tuple[Claim, ...]:
    """What must hold of the features, and of the trainings."""
    far = {n: rows.values(f"contrast_{n}", part="features")[:, [0, -1]] for n in ("batch", "instance")}
    moved = rows.curve("moved", part="features")[-1]
    ratios = [_ratio(rows, name) for name in _INPUTS]
    falls = [_fall(rows, *pair) for pair in (("original", "contrast"), ("contrast", "style"))]
    return (
        Claim(
            "Fourfold or a quarter of the contrast of one image changes what follows an instance norm by at most 2%, "
            "and what follows a batch norm by at least 20%",
            f"at most {far['instance'].max():.1%}, at least {far['batch'].min():.1%}",
            bool(far["instance"].max() <= 0.02 and far["batch"].min() >= 0.2),
        ),
        Claim(
            "AdaIN of one layer takes the next one, which it does not touch, at least half of the way to the style",
            f"{1 - moved.mean:.0%} of the way",
            moved.high <= 0.5,
        ),
        Claim(
            "Batch norm's style loss over instance norm's falls from original to contrast normalized to style "
            "normalized inputs, each at its best learning rate",
            ", ".join(one.text(2) for one in ratios),
            all(one.low > 1 for one in falls),
        ),
        Claim(
            "With contrast normalized it is still above 1.2",
            ratios[1].text(2),
            ratios[1].mean > 1.2 and ratios[1].low > 1,
        ),
    )


def _best(rows: Rows, name: str, norm: str) -> dict[str, object]:
    return rows.best("loss", part="training", input=name, norm=norm)


def _ratio(rows: Rows, name: str) -> Interval:
    return rows.ratio("loss", _best(rows, name, "batch"), _best(rows, name, "instance"))


def _fall(rows: Rows, first: str, second: str) -> Interval:
    """The ratio of the first input over that of the second, seed by seed."""
    logs = []
    for name in (first, second):
        batch, instance = (rows.values("loss", **_best(rows, name, norm)) for norm in ("batch", "instance"))
        logs.append(np.log(batch / instance))
    found = interval(logs[0] - logs[1])
    return Interval(math.exp(found.mean), math.exp(found.low), math.exp(found.high), found.num)


def tables(rows: Rows) -> tuple[Table, ...]:
    """Losses of the trainings; what a changed contrast does; what AdaIN does."""
    losses = []
    for name, title in _INPUTS.items():
        batch, instance = (_best(rows, name, norm) for norm in ("batch", "instance"))
        shown = [rows.mean("loss", **one).text(4) for one in (batch, instance)]
        held_out = rows.ratio("held_out", batch, instance).text(2)
        losses.append((title, *shown, _ratio(rows, name).text(2), held_out, f"{batch['lr']:g}, {instance['lr']:g}"))
    changes = [rows.curve(f"contrast_{norm}", part="features") for norm in ("batch", "instance")]
    contrasts = zip(_CONTRASTS, *changes, strict=True)
    moved = zip(_ALPHAS, rows.curve("moved", part="features"), strict=True)
    return (
        Table(
            f"Style loss, the mean of the last {_LAST} steps, at the better learning rate; 0 is the style, 1 is what "
            "features of 0 have",
            ("inputs", "batch norm", "instance norm", "ratio", "ratio on held-out crops", "learning rates"),
            tuple(losses),
        ),
        Table(
            "Change of what follows the norm, relative to its size, as the image of most contrast in a batch gets "
            "another one",
            ("contrast, times", "batch norm", "instance norm"),
            tuple((f"{times:g}", b.text(1, 100, "%"), i.text(2, 100, "%")) for times, b, i in contrasts),
        ),
        Table(
            "Style distance of the last layer's features when AdaIN moves those of the layer before, as a share of the "
            "distance without it",
            ("alpha", "distance"),
            tuple((f"{alpha:g}", one.text(1, 100, "%")) for alpha, one in moved),
        ),
    )


def draw_rows(rows: Rows) -> str:
    """The style losses against the step."""
    steps = int(rows.where(part="training").levels("steps")[0])
    plots = []
    for name, title in _INPUTS.items():
        curves = {}
        for norm in ("batch", "instance"):
            found = rows.curve("curve", **_best(rows, name, norm))
            at = [steps * (i + 0.5) / len(found) for i in range(len(found))]
            curves[f"{norm} norm"] = points(at, found)
        plots.append(Plot(f"log10 style loss by step, inputs {title}", curves, log_y=True))
    return draw(plots, "Style losses of batch and instance norm by step, for three kinds of inputs")


def reading(rows: Rows) -> str:
    """What follows."""
    first, second, last = (_ratio(rows, name).text(2) for name in _INPUTS)
    return (
        "What a channel's mean and deviation say of one image is its style, with its contrast; instance norm takes it "
        "away, and AdaIN puts another image's in its place. A network with batch norm must undo the style of every "
        f"input by other means: its loss is {first} times instance norm's on inputs as they are, {second} times with "
        f"their contrast normalized, and {last} times with their style; where an interval has 1, that is no more than "
        "a tendency. So instance norm is for tasks to which an image's own style and contrast are noise; where they "
        "carry the answer, as in most recognition, it removes information. The encoder is untrained and the crops are "
        "tiny pieces of one photograph: the size of the ratios says nothing of style transfer as it is done."
    )


def _plan(steps: int, seeds: int) -> Plan:
    trainings: list[Condition] = [
        {"part": "training", "input": name, "norm": norm, "lr": lr, "steps": steps}
        for name in _INPUTS
        for norm in ("batch", "instance")
        for lr in _RATES
    ]
    return Plan(({"part": "features"}, *trainings), seeds, f"{steps} steps for each training, {seeds} seeds")


REPLICATION = Replication(
    name="style",
    title="Instance norm is a norm of style",
    question="How can instance norm be understood: does it give all images one style?",
    published=(
        Published(
            "In training a network for style transfer, instance norm converges faster than batch norm, also when the "
            "images' contrast has been normalized before; when their style has been, the gap is much smaller. So "
            "instance norm is a norm of style, and giving the channels another image's mean and deviation (AdaIN) "
            "transfers its style",
            "Huang & Belongie 2017, arXiv:1703.06868, section 3.2 and figure 1",
        ),
    ),
    protocol=(
        "Photographs that come with scikit-learn, at half their size (china.jpg and flower.jpg, CC BY 2.0). **The "
        "encoder is random**: three convolutions of 16, 32 and 32 channels (strides 1, 2, 2) with ReLU, not trained, "
        "where the paper has a VGG. The style loss is the squared distance of its channels' means and deviations from "
        "those of the petals in flower.jpg, divided by the size of those, the mean over layers. A network of three "
        "convolutions of 16 channels, each with the norm and ReLU, and one to colours, is trained to give crops of "
        "24 x 24 pixels of china.jpg this style: 10 times the style loss plus the relative squared change of the last "
        "layer's features, Adam, batches of 8. *Contrast normalized*: the luminance of every crop is equalized. *Style "
        "normalized*: another network, with instance norm, first gives every crop the style of the leaves in "
        "flower.jpg. Held-out crops are of a part of china.jpg that was not trained on, with running statistics. "
        "Changed contrast and AdaIN are measured on networks at their start."
    ),
    quick=_plan(200, 3),
    minutes=1,
    full=_plan(500, 3),
    measure=measure,
    judge=judge,
    tables=tables,
    draw=draw_rows,
    reading=reading,
)
