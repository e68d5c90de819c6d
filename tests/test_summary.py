"""The summary: counts that add up, arithmetic that is true, shapes that torch gives, and nothing left changed."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import renorm as rn
from renorm.choices import models
from renorm.choices.summary import Row, Summary, summary


def value_of(arithmetic: str) -> int:
    assert re.fullmatch(r"[\d+*() ]+", arithmetic)
    return eval(arithmetic)


def check(model: nn.Module, batch: Any) -> Summary:
    """What holds for every summary."""
    found = summary(model, batch)
    assert found.num_parameters == sum(p.numel() for p in model.parameters())
    assert found.num_trainable == sum(p.numel() for p in model.parameters() if p.requires_grad)
    for row in found.rows:
        assert (value_of(row.arithmetic) if row.arithmetic else 0) == row.num_parameters
    return found


x2, x3 = torch.zeros(2, 6), torch.zeros(2, 5, 6)
LAYERS: dict[str, tuple[nn.Module, Tensor, str]] = {
    "linear": (nn.Linear(6, 4), x2, "4 * (6 + 1)"),
    "linear without bias": (nn.Linear(6, 4, bias=False), x2, "4 * 6"),
    "conv 2-D": (nn.Conv2d(3, 64, 3), torch.zeros(1, 3, 5, 5), "64 * (3*3*3 + 1)"),
    "conv 1-D": (nn.Conv1d(5, 8, 3), x3, "8 * (5*3 + 1)"),
    "conv 3-D": (nn.Conv3d(2, 4, (1, 2, 3)), torch.zeros(1, 2, 4, 4, 4), "4 * (2*1*2*3 + 1)"),
    "conv in groups": (nn.Conv2d(6, 12, 3, groups=3), torch.zeros(1, 6, 5, 5), "12 * (2*3*3 + 1)"),
    "conv without bias": (nn.Conv2d(6, 12, 3, bias=False), torch.zeros(1, 6, 5, 5), "12 * (6*3*3)"),
    "transposed conv": (nn.ConvTranspose2d(6, 4, 2, groups=2), torch.zeros(1, 6, 5, 5), "4 * (3*2*2 + 1)"),
    "embedding": (nn.Embedding(11, 8), torch.zeros(2, 3, dtype=torch.long), "11*8"),
    "batch norm": (nn.BatchNorm1d(6), x2, "2 * 6"),
    "our batch norm": (rn.BatchNorm1d(6), x2, "2 * 6"),
    "layer norm": (nn.LayerNorm((5, 6)), x3, "2 * 5*6"),
    "group norm": (rn.GroupNorm(3, 6), torch.zeros(2, 6, 4), "2 * 6"),
    "RMS norm": (nn.RMSNorm(6), x2, "6"),
    "norm without parameters": (nn.InstanceNorm1d(6), torch.zeros(2, 6, 4), ""),
    "a pattern": (rn.Norm("... (g [c])", g=2, c=3), x2, None),
    "switch norm": (rn.SwitchNorm1d(6), torch.zeros(2, 6, 4), None),
    "LSTM": (nn.LSTM(6, 8, batch_first=True), x3, "4 * (8*6 + 8*8 + 2*8)"),
    "LSTM without bias": (nn.LSTM(6, 8, bias=False), x3, "4 * (8*6 + 8*8)"),
    "LSTM, stacked": (nn.LSTM(6, 8, 3), x3, "4 * (8*6 + 8*8 + 2*8) + 2 * (4 * (8*8 + 8*8 + 2*8))"),
    "GRU, both ways": (nn.GRU(6, 8, bidirectional=True), x3, "2 * (3 * (8*6 + 8*8 + 2*8))"),
    "GRU, stacked": (
        nn.GRU(6, 8, 2, bidirectional=True), x3, "2 * (3 * (8*6 + 8*8 + 2*8)) + 2 * (3 * (8*16 + 8*8 + 2*8))",
    ),
    "RNN": (nn.RNN(6, 8), x3, "8*6 + 8*8 + 2*8"),
    "LSTM cell": (nn.LSTMCell(6, 8), x2, "4 * (8*6 + 8*8 + 2*8)"),
    "GRU cell": (nn.GRUCell(6, 8, bias=False), x2, "3 * (8*6 + 8*8)"),
    "RNN cell": (nn.RNNCell(6, 8), x2, "8*6 + 8*8 + 2*8"),
    "PReLU": (nn.PReLU(), x2, "1"),
    "weight norm": (rn.weight_norm(nn.Linear(6, 4)), x2, None),
    "cosine": (rn.CosineLinear(6, 4), x2, None),
    "nothing": (nn.Flatten(), x3, ""),
}  # fmt: skip


@pytest.mark.parametrize(("layer", "batch", "arithmetic"), LAYERS.values(), ids=LAYERS)
def test_a_layers_arithmetic(layer: nn.Module, batch: Tensor, arithmetic: str | None) -> None:
    (row,) = check(layer, batch).rows
    assert (row.name, row.kind) == ("", type(layer).__name__)
    if arithmetic is not None:
        assert row.arithmetic == arithmetic


def test_an_lstm_with_a_projection() -> None:
    layer = nn.LSTM(6, 8, 2, proj_size=3)
    with pytest.warns(UserWarning, match="projections"):  # torch's, of what runs it
        (row,) = check(layer, x3).rows
    assert row.arithmetic == "4 * (8*6 + 8*3 + 2*8) + 3*8 + 4 * (8*3 + 8*3 + 2*8) + 3*8"


def test_equal_sizes_are_counted() -> None:
    (row,) = check(rn.SwitchNorm1d(6), torch.zeros(2, 6, 4)).rows
    assert row.arithmetic == "2 * 6 + 2 * 2"  # weight, bias; weights of two partitions for mean and variance


def test_a_bilinear_layer() -> None:
    (row,) = check(nn.Bilinear(6, 3, 4), (x2, torch.zeros(2, 3), None)).rows
    assert row.arithmetic == "4 * (6*3 + 1)"


@pytest.mark.parametrize("options", [{}, {"bias": False}, {"kdim": 5, "vdim": 4}, {"add_bias_kv": True}])
def test_attention_is_one_layer(options: dict[str, Any]) -> None:
    attention = nn.MultiheadAttention(6, 2, batch_first=True, **options)
    batch = (x3, torch.zeros(2, 5, options.get("kdim", 6)), torch.zeros(2, 5, options.get("vdim", 6)), None)
    (row,) = check(attention, batch).rows
    assert row.shapes[0] == (2, 5, 6)
    if not options:
        assert row.arithmetic == "4 * 6 * (6 + 1)"


@pytest.mark.parametrize("name", models.NAMES)
def test_the_built_in_models(name: str) -> None:
    found = check(models.build(name, (1, 8, 8), 10, norm="switch"), torch.zeros(3, 1, 8, 8))
    assert found.rows[-1].shapes == ((3, 10),)
    assert all(row.num_calls == 1 for row in found.rows if row.num_parameters)


class Tied(nn.Module):
    """An embedding whose weight is the output layer's, a parameter of its own, a layer that runs twice."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(8, 11, bias=True)
        self.token = nn.Parameter(torch.zeros(8))
        self.embedding = nn.Embedding(11, 8)
        self.head.weight = self.embedding.weight
        self.twice = nn.Sequential(nn.Linear(8, 8), nn.Dropout())
        self.idle = nn.Linear(2, 2)
        self.loose = nn.ParameterList([nn.Parameter(torch.zeros(3))])

    def forward(self, x: Tensor) -> dict[str, Any]:
        y = self.embedding(x) + self.token
        y = self.twice(self.twice(y))
        return {"logits": self.head(y), "rest": [y, None]}


WORDS = torch.zeros(2, 5, dtype=torch.long)


def test_shared_parameters_count_once_in_the_order_of_the_run() -> None:
    found = check(Tied(), WORDS)
    rows = {row.name: row for row in found.rows}
    assert list(rows) == ["", "embedding", "twice.0", "twice.1", "head", "idle", "loose"]
    assert rows["embedding"].num_parameters == 88
    assert rows["head"].num_parameters == 11
    assert rows["head"].shared == ("weight is embedding.weight",)
    assert rows["twice.0"].num_calls == 2
    assert rows[""].shapes == ((2, 5, 11), (2, 5, 8))  # what the model returns, out of a dict
    assert rows[""].arithmetic == "8"
    assert rows["idle"].shape == "-"
    notes = [rows[name].note for name in ("head", "twice.0", "idle", "loose")]
    assert notes == ["11; weight is embedding.weight", "8 * (8 + 1); called 2 times", "2 * (2 + 1); not called", "3"]


def test_one_module_under_two_names_is_one_row() -> None:
    layer = nn.Linear(6, 6)
    (row,) = check(nn.Sequential(layer, layer), x2).rows
    assert (row.name, row.num_calls) == ("0", 2)


def test_torchs_encoder_shows_its_parts_in_evaluation_mode() -> None:
    """Its fast path would call none of them."""
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(6, 2, 12, batch_first=True), 2)
    for model in (encoder, encoder.eval()):
        found = check(model, x3)
        assert [row.num_calls for row in found.rows] == [1] * 16


def test_lazy_layers_are_counted_once_they_have_sizes() -> None:
    model = nn.Sequential(nn.LazyLinear(4), nn.ReLU())
    assert check(model, x2).rows[0].arithmetic == "4 * (6 + 1)"


def test_lazy_layers_that_do_not_run_have_no_count() -> None:
    class Idle(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lazy, self.linear = nn.LazyLinear(4), nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(x)

    assert [row.num_parameters for row in summary(Idle(), x2).rows] == [14, 0]


class Two(nn.Module):
    """Two inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.other = nn.Linear(6, 3), nn.Linear(2, 3)

    def forward(self, x: Tensor, z: Tensor) -> tuple[Tensor, ...]:
        return self.one(x), self.other(z)


@pytest.mark.parametrize(
    "batch",
    [
        (x2, torch.zeros(2, 2), torch.zeros(2)),
        ((x2, torch.zeros(2, 2)), None),
        (x2, torch.zeros(2, 2)),  # no target: two inputs are needed
        [x2, torch.zeros(2, 2)],
        [[x2, torch.zeros(2, 2)], torch.zeros(2)],
        {"x": x2, "z": torch.zeros(2, 2)},
        ({"x": x2, "z": torch.zeros(2, 2)}, torch.zeros(2)),
    ],
)
def test_batches_are_read_as_check_reads_them(batch: Any) -> None:
    assert [row.shapes for row in check(Two(), batch).rows] == [((2, 3),), ((2, 3),)]


@pytest.mark.parametrize("batch", [x2, (x2,), (x2, torch.zeros(2)), [x2, None]])
def test_a_target_is_left_out(batch: Any) -> None:
    assert check(nn.Linear(6, 3), batch).rows[0].shapes == ((2, 3),)


def test_nothing_stays_changed() -> None:
    model = nn.Sequential(nn.Linear(6, 6), rn.BatchNorm1d(6), nn.Dropout(), nn.BatchNorm1d(6).eval())
    before = {key: value.clone() for key, value in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    state = torch.get_rng_state()
    summary(model, torch.randn(4, 6, generator=torch.Generator().manual_seed(0)))
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_what_the_model_raises_is_raised_and_nothing_stays_changed() -> None:
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(5, 5))
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        summary(model, x2)
    assert model.training
    assert not any(module._forward_hooks for module in model.modules())


def test_frozen_parameters_are_named() -> None:
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 1))
    model[0].requires_grad_(False)
    found = check(model, x2)
    assert [row.num_trainable for row in found.rows] == [0, 7]
    assert str(found).endswith("Sequential: 49 parameters, 42 of them frozen")


def test_a_compiled_model_is_looked_into() -> None:
    model = nn.Sequential(nn.Linear(6, 4))
    assert check(torch.compile(model), x2).rows[0].name == "0"


def test_the_table_in_text_and_html() -> None:
    found = summary(Tied(), WORDS)
    lines = str(found).splitlines()
    assert lines[0].split() == ["layer", "kind", "output", "parameters", "how", "many"]
    assert len(lines) == len(found.rows) + 4
    assert all(line == line.rstrip() for line in lines)
    place = lines[0].index("parameters") + len("parameters")
    assert [line[:place].split()[-1] for line in lines[2:-2]] == [f"{row.num_parameters:,}" for row in found.rows]
    table = ElementTree.fromstring(found._repr_html_())
    assert len(table.findall("tbody/tr")) == len(found.rows)
    assert [cell.text for cell in table.findall("tbody/tr")[1]] == ["embedding", "Embedding", "(2, 5, 8)", "88", "11*8"]
    assert "".join(table.itertext()).endswith(f"Tied: {found.num_parameters:,} parameters")


def test_html_is_escaped() -> None:
    row = Row("<b>", "A&B", (), 1, 0, 0, "", ())
    text = Summary("<i>", (row,))._repr_html_()
    assert "<b>" not in text
    assert "<i>" not in text
    ElementTree.fromstring(text)
