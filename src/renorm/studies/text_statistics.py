"""Batch statistics of text and of images, and layer norm beside batch norm in a transformer."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

from renorm.measures.stability import record_instability
from renorm.norms import named
from renorm.studies.corpus import corpus, fingerprint, identified, windows
from renorm.studies.picture import Plot, draw, points
from renorm.studies.replication import Claim, Plan, Published, Replication, Table
from renorm.studies.rows import Condition, Interval, Rows, Value
from renorm.studies.training import mean_loss

_SAMPLES, _PLACES = 8, 64  # windows of 64 words, or images of 64 pixels: 512 values for each statistic, everywhere
_WIDTH, _HEADS, _WORDS = 64, 4, 2000
_RATES = (3e-3, 6e-3, 1.2e-2)
_SHOWN_RATE = 3e-3  # at which stability is looked at
_TEXT, _IMAGES = ("random", "document"), ("convolutions", "pixels")
_MEANING = {
    "random": "text, windows from anywhere",
    "document": "text, all windows from one document",
    "convolutions": "images, convolutions",
    "pixels": "images, the transformer on pixels",
}
_SETTLE, _LOOK = 30, 100  # batches in which running statistics settle, and that are looked at

Batches = Callable[[], tuple[Tensor, Tensor]]


class _Block(nn.Module):
    """A pre-norm transformer block in which no token sees a later one, unless its norm averages over them."""

    def __init__(self, norm: str) -> None:
        super().__init__()
        self.norm1 = named.build(norm, _WIDTH, axis=-1)
        self.qkv = nn.Linear(_WIDTH, 3 * _WIDTH)
        self.out = nn.Linear(_WIDTH, _WIDTH)
        self.norm2 = named.build(norm, _WIDTH, axis=-1)
        self.feed_forward = nn.Sequential(nn.Linear(_WIDTH, 4 * _WIDTH), nn.ReLU(), nn.Linear(4 * _WIDTH, _WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        """(N, tokens, width) -> the same shape."""
        heads = self.qkv(self.norm1(x)).unflatten(2, (3 * _HEADS, -1)).transpose(1, 2)
        q, k, v = heads.chunk(3, 1)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(y.transpose(1, 2).flatten(2))
        return x + self.feed_forward(self.norm2(x))  # type: ignore[no-any-return]


class _LanguageModel(nn.Module):
    """Which token is next: logits of (N, vocabulary, tokens) for tokens (N, tokens)."""

    def __init__(self, num_tokens: int, norm: str) -> None:
        super().__init__()
        self.embedding = nn.Embedding(num_tokens, _WIDTH)
        self.position = nn.Parameter(0.02 * torch.randn(_PLACES, _WIDTH))
        last = named.build(norm, _WIDTH, axis=-1)
        self.layers = nn.Sequential(_Block(norm), _Block(norm), last, nn.Linear(_WIDTH, num_tokens))

    def forward(self, tokens: Tensor) -> Tensor:
        """(N, tokens) -> (N, vocabulary, tokens)."""
        return self.layers(self.embedding(tokens) + self.position).transpose(1, 2)  # type: ignore[no-any-return]


def _convolutions(norm: str) -> nn.Module:
    """Three convolutions without pooling, so that each statistic is one of as many values."""
    layers: list[nn.Module] = []
    for inputs in (1, 32, 32):
        layers += [nn.Conv2d(inputs, 32, 3, padding=1), named.build(norm, 32), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10))


def measure(condition: Condition, seed: int) -> Mapping[str, Value]:
    """Held-out loss after training, and how far batches are from the running statistics, weights held still."""
    data, norm = str(condition["data"]), str(condition["norm"])
    if data == "convolutions":
        model = _convolutions(norm)
    else:
        model = _LanguageModel(17 if data == "pixels" else corpus("word", _WORDS).num_tokens, norm)
    draw_batch, held_out = _data(data, torch.Generator().manual_seed(seed))
    optimizer = torch.optim.Adam(model.parameters(), lr=float(condition["lr"]))
    for _ in range(int(condition["steps"])):
        x, y = draw_batch()
        optimizer.zero_grad()
        logits = model(x).movedim(1, -1).flatten(0, -2)  # a row for each token: a step takes a fifth less
        F.cross_entropy(logits, y.flatten()).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    # In evaluation mode: a batch's own statistics would show a token the ones to come.
    found: dict[str, Value] = {"loss": mean_loss(model, *held_out), "text": fingerprint()}
    return found | (_instability(model, draw_batch) if norm == "batch" else {})


@torch.no_grad()
def _instability(model: nn.Module, draw_batch: Batches) -> dict[str, Value]:
    """Root mean square over layers and batches."""
    model.train()
    with record_instability(model) as records:
        for _ in range(_SETTLE + _LOOK):
            model(draw_batch()[0])
    looked = [one for found in records.values() for one in found[_SETTLE:]]
    assert {one.num_values for one in looked} == {_SAMPLES * _PLACES}
    mean = math.sqrt(sum(one.mean_shift**2 for one in looked) / len(looked))
    var = math.sqrt(sum(one.var_shift**2 for one in looked) / len(looked))
    return {"mean_shift": mean, "var_shift": var}


def _data(data: str, random: torch.Generator) -> tuple[Batches, tuple[Tensor, Tensor]]:
    """What draws a training batch (x, y), and the held-out one."""
    if data in _TEXT:
        documents = [one for one in corpus("word", _WORDS).training if len(one) > _PLACES]
        held_out = windows(corpus("word", _WORDS).held_out, _PLACES + 1)
        return functools.partial(_text, documents, data == "document", random), (held_out[:, :-1], held_out[:, 1:])
    images, labels = load_digits(return_X_y=True)
    x, y = torch.from_numpy(images), torch.from_numpy(labels)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    if data == "pixels":
        y = x.long()  # 17 shades
        x = F.pad(y, (1, 0))[:, :-1]  # each pixel from those before it
    else:
        x = (x.float() / 16).view(-1, 1, 8, 8)
    kept = order[300:]

    def batch() -> tuple[Tensor, Tensor]:
        rows = kept[torch.randint(len(kept), (_SAMPLES,), generator=random)]
        return x[rows], y[rows]

    return batch, (x[order[:300]], y[order[:300]])


def _text(documents: list[Tensor], together: bool, random: torch.Generator) -> tuple[Tensor, Tensor]:
    """Windows at random places; a document comes as often as it has places, `together` or not."""
    places = torch.tensor([len(one) - _PLACES for one in documents], dtype=torch.float64)
    chosen = torch.multinomial(places, 1 if together else _SAMPLES, replacement=True, generator=random)
    found = []
    for which in chosen.expand(_SAMPLES).tolist():
        start = int(torch.randint(len(documents[which]) - _PLACES, (), generator=random))
        found.append(documents[which][start : start + _PLACES + 1])
    both = torch.stack(found)
    return both[:, :-1], both[:, 1:]


def judge(rows: Rows) -> tuple[Claim, ...]:
    """What must hold of the losses, and of the shifts of the mean."""
    claims = []
    for data in _TEXT:
        gap = _gap(rows, data)
        text = f"Batch norm's held-out loss is above layer norm's, each at its best learning rate: {_MEANING[data]}"
        claims.append(Claim(text, gap.text(3), gap.low > 0))
    shuffled, together = (_over_images(rows, data) for data in _TEXT)
    return (
        *claims,
        Claim(
            "The mean of a batch from one document is at least 1.5 times as far from the running one as that of images",
            _times(together),
            together.mean >= 1.5 and together.low > 1,
        ),
        Claim("So it is, by whatever factor, of windows from anywhere in the text", _times(shuffled), shuffled.low > 1),
    )


def _over_images(rows: Rows, data: str, against: str = "convolutions") -> Interval:
    return rows.ratio("mean_shift", _shown(data), _shown(against))


def _gap(rows: Rows, data: str) -> Interval:
    return rows.difference("loss", *(rows.best("loss", data=data, norm=norm) for norm in ("batch", "layer")))


def _shown(data: str) -> dict[str, object]:
    return {"data": data, "norm": "batch", "lr": _SHOWN_RATE}


def _times(value: Interval) -> str:
    return value.text(2, unit=" times")


def tables(rows: Rows) -> tuple[Table, ...]:
    """Losses and instabilities."""
    losses = tuple(
        (_MEANING[data], f"{lr:g}", *(rows.mean("loss", data=data, norm=n, lr=lr).text(3) for n in ("layer", "batch")))
        for data in _TEXT
        for lr in _RATES
    )
    shifts = tuple(
        (
            _MEANING[data],
            rows.mean("mean_shift", **_shown(data)).text(4),
            rows.mean("var_shift", **_shown(data)).text(4),
            *("" if data == image else _times(_over_images(rows, data, image)) for image in _IMAGES),
        )
        for data in (*_TEXT, *_IMAGES)
    )
    null = 1 / math.sqrt(_SAMPLES * _PLACES)
    return (
        Table("Held-out loss, nats a word", ("training batches", "learning rate", "layer norm", "batch norm"), losses),
        Table(
            "How far a batch of 512 values is from the running statistics: root mean squares of the mean's shift in "
            f"standard deviations ({null:.4f} for independent values) and of the log-variance's",
            ("batches", "mean", "log-variance", "mean, over that of convolutions", "over that of pixels"),
            shifts,
        ),
    )


def draw_rows(rows: Rows) -> str:
    """Loss against the learning rate, and the shifts."""
    losses = {
        f"{norm} norm, {data}": points(_RATES, [rows.mean("loss", data=data, norm=norm, lr=lr) for lr in _RATES])
        for data in _TEXT
        for norm in ("layer", "batch")
    }
    seeds = sorted({row.seed for row in rows})
    shifts = {
        _MEANING[data]: list(zip(map(float, seeds), rows.values("mean_shift", **_shown(data)).tolist(), strict=True))
        for data in (*_TEXT, *_IMAGES)
    }
    return draw(
        [
            Plot("held-out loss against log10 learning rate", losses, log_x=True),
            Plot("shift of a batch's mean, by seed", shifts, joined=False),
        ],
        "The losses of layer and batch norm, and how far the means of batches of text and images move",
    )


def reading(rows: Rows) -> str:
    """What follows."""
    shuffled = _over_images(rows, "random")
    variance = rows.ratio("var_shift", _shown("document"), _shown("convolutions"))
    gaps = [_gap(rows, data).text(3) for data in _TEXT]
    return (
        "Means of batches of text are less stable than those of as many values of images: windows of one document "
        f"share words and topic, and even with windows from anywhere the shift is {_times(shuffled)} that of images. "
        "Differences of orders of magnitude were not seen at this scale, and variances tell another story: the "
        f"log-variance of windows of one document moves {_times(variance)} as far as that of convolutions. Whether it "
        f"costs anything is another question: batch norm's loss less layer norm's is {gaps[0]} with windows from "
        f"anywhere and {gaps[1]} with those of one document, each at its best rate. Both norms start from the same "
        "weights and see the same windows. A causal model with batch norm must be judged with running statistics: in "
        f"training its batches show a token the ones to come. {identified(rows.values('text')[0])}"
    )


def _plan(steps: int, seeds: int) -> Plan:
    conditions: list[Condition] = [
        {"data": data, "norm": norm, "lr": lr, "steps": steps}
        for data in _TEXT
        for norm in ("layer", "batch")
        for lr in _RATES
    ]
    conditions += [{"data": data, "norm": "batch", "lr": _SHOWN_RATE, "steps": steps} for data in _IMAGES]
    return Plan(tuple(conditions), seeds, f"{steps:,} steps, {seeds} seeds")


REPLICATION = Replication(
    name="text-statistics",
    title="Batch statistics of text",
    question=(
        "Why do transformers use layer norm and not batch norm: are the batch statistics of text less stable than "
        "those of images?"
    ),
    published=(
        Published(
            "The statistics of batches of text, in a transformer, vary far more in training than those of images in a "
            "convolutional network; batch norm does worse than layer norm there, and PowerNorm better than both: by "
            "0.4 and 0.6 BLEU, and 5.6 and 3.0 in perplexity, than layer norm",
            "Shen et al. 2020, PowerNorm, arXiv:2003.07845",
        ),
    ),
    protocol=(
        "Text: the language reference of Python's `pydoc_data.topics`, cut into words and punctuation, 2,000 of them "
        "in the vocabulary; every fifth document is held out. Images: scikit-learn's digits, 8 x 8. The model predicts "
        "the next token: 2 pre-norm transformer blocks of width 64 with 4 heads, Adam, batches of 8 windows of 64 "
        "words. The windows of a batch come from anywhere, or all from one document, where a document comes as often "
        "as it is long. For images it is 3 convolutions of 32 channels that tell digits apart, or the same transformer "
        "on the 64 pixels. So every statistic is one of 512 values. Held-out losses use running statistics. The rates "
        "are about the best: at 0.03 trial runs with windows from anywhere ended higher for both norms. Stability "
        f"is looked at after training at the rate {_SHOWN_RATE:g}, weights held still, over {_LOOK} batches, by "
        "`renorm.measures.stability`."
    ),
    quick=_plan(200, 3),
    minutes=2,
    full=_plan(800, 4),
    measure=measure,
    judge=judge,
    tables=tables,
    draw=draw_rows,
    reading=reading,
)
