"""The built-in models, activations and optimizers."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from renorm.choices import activations, models, optimizers
from renorm.errors import StudyError, UnknownNormError
from renorm.norms.norm import Norm

NORMS = ("none", "batch", "layer", "instance", "group", "group(4)", "rms", "switch")
SHAPES = {
    "mlp": [(5,), (1, 8, 8), (3, 7)],
    "cnn": [(3, 9), (1, 8, 8), (3, 1, 5), (2, 4, 5, 6)],
    "resnet": [(1, 8, 8), (3, 11, 9)],
    "lstm": [(5,), (3, 9), (2, 8, 7)],
    "tcn": [(5,), (3, 1), (3, 40), (2, 8, 7)],
    "transformer": [(5,), (3, 9), (2, 8, 7)],
}
SEQUENCES = ("mlp", "cnn", "lstm", "tcn", "transformer")
CASES = [(name, shape) for name, shapes in SHAPES.items() for shape in shapes]


def build(name: str, shape: tuple[int, ...], norm: str, activation: str = "relu", dropout: float = 0.0) -> nn.Module:
    torch.manual_seed(0)
    return models.build(name, shape, 4, norm=norm, activation=activation, dropout=dropout)


def own_weights(model: nn.Module) -> dict[str, Tensor]:
    """The weights that no norm holds, by name."""
    of_norms = {name for name, layer in model.named_modules() if isinstance(layer, Norm)}
    return {name: value for name, value in model.named_parameters() if name.rpartition(".")[0] not in of_norms}


def test_every_model_is_tried() -> None:
    assert set(SHAPES) == set(models.NAMES)


@pytest.mark.parametrize(("name", "shape"), CASES)
def test_a_model_learns_from_every_layer(name: str, shape: tuple[int, ...]) -> None:
    model = build(name, shape, "batch", "gelu")
    output = model(torch.randn(6, *shape))
    assert output.shape == (6, 4)
    (output**2).sum().backward()
    # a bias before batch norm learns nothing
    weights = [value for value in own_weights(model).values() if value.dim() > 1]
    assert all(value.grad is not None and value.grad.abs().max() > 0 for value in weights)


@pytest.mark.parametrize(("name", "shape"), CASES)
def test_all_norms_start_from_the_same_weights(name: str, shape: tuple[int, ...]) -> None:
    reference = own_weights(build(name, shape, "none"))
    state = torch.get_rng_state()
    for norm in NORMS:
        model = build(name, shape, norm)
        weights = own_weights(model)
        assert weights.keys() == reference.keys()
        assert all(torch.equal(weights[key], reference[key]) for key in weights)
        assert torch.equal(torch.get_rng_state(), state), "a norm drew random numbers"


@pytest.mark.parametrize("name", models.NAMES)
@pytest.mark.parametrize("norm", NORMS)
def test_every_norm_is_in_every_model(name: str, norm: str) -> None:
    model = build(name, (1, 8, 8), norm)
    # eight rows of an image are steps enough for two blocks of a TCN
    expected = {"mlp": 3, "cnn": 3, "resnet": 15, "lstm": 2, "tcn": 4, "transformer": 5}[name]
    assert sum(isinstance(layer, Norm) for layer in model.modules()) == (0 if norm == "none" else expected)


def test_the_mlp_is_the_one_in_its_docstring() -> None:
    model = build("mlp", (1, 8, 8), "batch")
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for width in (64, 128, 128):
        layers += [nn.Linear(width, 128), nn.BatchNorm1d(128), nn.ReLU()]
    reference = nn.Sequential(nn.Flatten(), *layers, nn.Linear(128, 4))
    x = torch.randn(9, 1, 8, 8)
    torch.testing.assert_close(model(x), reference(x))
    torch.testing.assert_close(model.eval()(x), reference.eval()(x))


def test_the_resnet_is_the_one_in_its_docstring() -> None:
    model = build("resnet", (3, 8, 8), "none")
    weights = iter(model.parameters())
    x = torch.randn(2, 3, 8, 8)

    def conv(y: Tensor, stride: int = 1) -> Tensor:
        kernel, bias = next(weights), next(weights)
        return F.conv2d(y, kernel, bias, stride, padding=kernel.shape[-1] // 2)

    y = F.relu(conv(x))
    for halves in (False, False, True, False, True, False):
        inner = conv(F.relu(conv(y, 2 if halves else 1)))
        y = F.relu(inner + (conv(y, 2) if halves else y))
    torch.testing.assert_close(model(x), F.linear(y.mean((2, 3)), next(weights), next(weights)))
    assert next(weights, None) is None


@pytest.mark.parametrize("norm", NORMS)
def test_a_transformer_says_the_same_with_and_without_gradients(norm: str) -> None:
    # torch's own encoder layer does not: its fast path takes every norm for a layer norm
    model = build("transformer", (3, 9), norm)
    x = 2 + 3 * torch.randn(8, 3, 9)
    model.train()(x)
    with torch.no_grad():
        without = model.eval()(x)
    torch.testing.assert_close(without, model(x), rtol=1e-4, atol=1e-5)


def test_a_transformer_with_layer_norm_is_torchs_own() -> None:
    model = build("transformer", (3, 9), "layer")
    tokens, embedding, *blocks, norm, _, head = model
    x = torch.randn(4, 3, 9)
    y = embedding(tokens(x))
    for block in blocks:
        layer = nn.TransformerEncoderLayer(64, 4, 128, dropout=0.0, norm_first=True, batch_first=True)
        theirs = {"attention": "self_attn", "feed_forward.0": "linear1", "feed_forward.2": "linear2"}
        state = block.state_dict()
        for ours, name in theirs.items():
            state = {key.replace(ours, name): value for key, value in state.items()}
        layer.load_state_dict(state)
        y = layer(y)
    torch.testing.assert_close(model(x), head(norm(y).mean(1)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("shape", "count"), [((5,), 5), ((3, 9), 9), ((2, 8, 7), 8)])
def test_the_tokens_of_a_transformer(shape: tuple[int, ...], count: int) -> None:
    x = torch.randn(2, *shape)
    tokens = build("transformer", shape, "none")[0](x)
    assert tokens.shape[:2] == (2, count)
    if len(shape) == 3:
        torch.testing.assert_close(tokens[1, 3], x[1, :, 3].flatten())


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("cnn", (5,), r"takes sequences.*samples have the shape \(5,\); choose one of mlp, lstm, tcn, transformer"),
        ("resnet", (3, 9), "takes images.*choose one of mlp, cnn, lstm, tcn, transformer"),
        ("transformer", (1, 2, 3, 4), "choose one of mlp, cnn"),
        ("mlp", (), r"samples of up to 8 axes; this data's .* choose one of your own models"),
        ("mlp", (0,), r"a sample must have one entry or more; got samples of the shape \(0,\)"),
        ("resnt", (1, 8, 8), "model must be one of mlp, cnn.*did you mean 'resnet'"),
    ],
)
def test_models_that_cannot_be_built(name: str, shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(StudyError, match=message):
        models.build(name, shape, 2, norm="batch")


@pytest.mark.parametrize("number", [0, -1])
def test_a_model_gives_something(number: int) -> None:
    with pytest.raises(StudyError, match=f"gives one number or more; got num_outputs={number}: write 1"):
        models.build("mlp", (3,), number, norm="batch")


def test_an_unknown_norm_or_activation_is_refused() -> None:
    with pytest.raises(UnknownNormError, match="did you mean 'batch'"):
        models.build("mlp", (3,), 2, norm="bach")
    with pytest.raises(StudyError, match=r"activation must be one of .*did you mean 'gelu'"):
        models.build("mlp", (3,), 2, norm="batch", activation="gellu")


def test_models_can_be_copied() -> None:
    model = build("resnet", (1, 8, 8), "switch")
    assert copy.deepcopy(model).state_dict().keys() == model.state_dict().keys()


def test_the_lstm_is_the_one_in_its_docstring() -> None:
    model = build("lstm", (3, 9), "layer")
    x = torch.randn(5, 3, 9)
    y = x.transpose(1, 2)
    for lstm, norm in zip(model[1:5:2], model[2:5:2], strict=True):
        reference = nn.LSTM(y.shape[2], 64, batch_first=True)
        reference.load_state_dict({key.removeprefix("lstm."): value for key, value in lstm.state_dict().items()})
        y = F.layer_norm(reference(y)[0], (64,), norm.weight, norm.bias)
    hidden, head = model[6], model[8]
    torch.testing.assert_close(model(x), head(F.relu(hidden(y[:, -1]))), rtol=1e-4, atol=1e-5)


def test_the_tcn_is_the_one_in_its_docstring() -> None:
    model = build("tcn", (3, 20), "none", "tanh")
    weights = iter(model.parameters())
    x = torch.randn(2, 3, 20)
    y = x
    for dilation in (1, 2, 4):
        (w1, b1), (w2, b2) = [(next(weights), next(weights)) for _ in range(2)]
        shortcut = F.conv1d(y, next(weights), next(weights)) if dilation == 1 else y
        inner = F.conv1d(y, w1, b1, padding=2 * dilation, dilation=dilation)[..., :20].tanh()
        inner = F.conv1d(inner, w2, b2, padding=2 * dilation, dilation=dilation)[..., :20].tanh()
        y = (inner + shortcut).tanh()
    torch.testing.assert_close(model(x), F.linear(y[..., -1], next(weights), next(weights)), rtol=1e-4, atol=1e-5)
    assert next(weights, None) is None


@pytest.mark.parametrize("length", [1, 2, 5, 6, 13, 14, 40])
def test_a_tcn_sees_its_first_step_and_no_step_sees_a_later_one(length: int) -> None:
    model = build("tcn", (3, length), "none", "tanh").double()
    x = torch.randn(1, 3, length, dtype=torch.float64, requires_grad=True)
    (seen,) = torch.autograd.grad(model(x).sum(), x)
    assert (seen.abs().amax((0, 1)) > 0).all()
    steps = model[:-2](x)  # without the last step and the head
    middle = length // 2
    (seen,) = torch.autograd.grad(steps[..., middle].sum(), x)
    assert (seen[..., middle + 1 :] == 0).all()
    assert (seen[..., middle] != 0).any()


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("name", SEQUENCES)
def test_forecasters_give_the_horizon(name: str, norm: str) -> None:
    torch.manual_seed(0)
    if (name, norm) == ("mlp", "instance"):
        pytest.skip("instance norm has one value to average on vectors")
    model = models.forecaster(name, (3, 11), 6, num_targets=2, norm=norm, activation="gelu", dropout=0.1)
    x = torch.randn(4, 3, 11)
    y = model(x)
    assert y.shape == (4, 2, 6)
    (y**2).sum().backward()
    assert all(value.grad is not None and value.grad.abs().max() > 0 for value in weights_of(model))


def weights_of(model: nn.Module) -> list[Tensor]:
    return [value for value in own_weights(model).values() if value.dim() > 1]


@pytest.mark.parametrize("name", SEQUENCES)
def test_a_forecast_depends_on_when_something_was(name: str) -> None:
    torch.manual_seed(0)
    model = models.forecaster(name, (1, 16), 1, norm="none")
    early, late = torch.zeros(2, 1, 1, 16)
    early[..., 2], late[..., 14] = 10, 10
    assert (model(early) - model(late)).abs().item() > 1e-4


def test_forecasters_learn_a_seasonal_series() -> None:
    """Better than the mean, on a sine whose phase must be read off the window."""
    time = torch.arange(400) * 0.5
    windows = torch.sin(time).unfold(0, 20, 1)
    x, y = windows[:, None, :16], windows[:, None, 16:]
    for name in SEQUENCES:
        torch.manual_seed(0)
        model = models.forecaster(name, (1, 16), 4, norm="none")
        optimizer = optimizers.build("adam", model.parameters(), 0.003)
        for step in range(60):
            rows = torch.arange(step, len(x), 12)
            optimizer.zero_grad()
            F.mse_loss(model(x[rows]), y[rows]).backward()
            optimizer.step()
        with torch.no_grad():
            assert F.mse_loss(model(x), y) < 0.1 * y.var(), name


@pytest.mark.parametrize(
    ("name", "shape", "options", "message"),
    [
        ("lstm", (5,), {}, r"\(channels, steps\); got \(5,\)"),
        ("cnn", (1, 8, 8), {}, r"\(channels, steps\); got \(1, 8, 8\)"),
        ("resnet", (3, 9), {}, "takes images"),
        ("lstm", (3, 9), {"horizon": 0}, "at least 1; got 0 and 1"),
        ("lstm", (3, 9), {"num_targets": 0}, "at least 1; got 1 and 0"),
        ("lstm", (3, 9), {"dropout": 1.0}, "dropout must be a share from 0 on and below 1; got 1.0"),
    ],
)
def test_forecasters_that_cannot_be_built(
    name: str, shape: tuple[int, ...], options: dict[str, float], message: str
) -> None:
    with pytest.raises(StudyError, match=message):
        models.forecaster(name, shape, **{"horizon": 1, "norm": "none", **options})


@pytest.mark.parametrize("name", models.NAMES)
def test_dropout_changes_no_weight_and_works_in_training_only(name: str) -> None:
    plain, dropping = build(name, (1, 8, 8), "layer"), build(name, (1, 8, 8), "layer", dropout=0.5)
    for ours, theirs in zip(plain.parameters(), dropping.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    x = torch.randn(4, 1, 8, 8)
    torch.testing.assert_close(plain.eval()(x), dropping.eval()(x))
    assert torch.equal(plain.train()(x), plain(x))
    assert not torch.allclose(dropping.train()(x), dropping(x))


@pytest.mark.parametrize("dropout", [-0.1, 1, 1.5, float("nan")])
def test_dropout_must_leave_something(dropout: float) -> None:
    with pytest.raises(StudyError, match="from 0 on and below 1"):
        build("mlp", (3,), "none", dropout=dropout)


FORMULAS = {
    "relu": lambda x: max(x, 0),
    "leaky_relu": lambda x: x if x > 0 else 0.01 * x,
    "elu": lambda x: x if x > 0 else torch.tensor(x).expm1(),
    "silu": lambda x: x / (1 + torch.tensor(-x).exp()),
    "sigmoid": lambda x: 1 / (1 + torch.tensor(-x).exp()),
    "tanh": lambda x: torch.tensor(x).tanh(),
    "softplus": lambda x: torch.tensor(x).exp().log1p(),
    "gelu": lambda x: x * 0.5 * (1 + torch.erf(torch.tensor(x / 2**0.5))),
    "mish": lambda x: x * torch.tensor(x).exp().log1p().tanh(),
    "selu": lambda x: 1.0507009873554805 * (x if x > 0 else 1.6732632423543772 * torch.tensor(x).expm1()),
    "identity": lambda x: x,
}


@pytest.mark.parametrize("name", activations.NAMES)
def test_activations_are_their_formulas(name: str) -> None:
    values = [-2.0, -0.3, 0.0, 0.7, 3.0]
    expected = torch.tensor([float(FORMULAS[name](value)) for value in values])
    torch.testing.assert_close(activations.build(name)(torch.tensor(values)), expected)


def weight_after(name: str, steps: int) -> float:
    """Where minimizing w^2 / 2 from w = 1 at learning rate 0.1 has got to."""
    weight = nn.Parameter(torch.ones(()))
    optimizer = optimizers.build(name, [weight], lr=0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        (weight**2 / 2).backward()
        optimizer.step()
    return weight.item()


@pytest.mark.parametrize(
    ("name", "steps", "expected"),
    [
        ("sgd", 2, 0.9 * 0.9),
        ("momentum", 2, 0.9 - 0.1 * (0.9 * 1 + 0.9)),
        ("nesterov", 1, 1 - 0.1 * (1 + 0.9 * 1)),
        ("adagrad", 2, 0.9 - 0.1 * 0.9 / (1 + 0.9**2) ** 0.5),
        ("adadelta", 1, 1 - 0.1 * (1e-6 / (0.1 + 1e-6)) ** 0.5),
        ("rmsprop", 1, 1 - 0.1 / 0.01**0.5),
        ("adam", 1, 1 - 0.1),
        ("adamw", 1, 1 - 0.1 * 0.01 - 0.1),
    ],
)
def test_optimizers_take_the_steps_of_their_formulas(name: str, steps: int, expected: float) -> None:
    assert weight_after(name, steps) == pytest.approx(expected, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("lr", [0, -1, float("nan"), float("inf")])
def test_a_learning_rate_must_be_positive(lr: float) -> None:
    with pytest.raises(StudyError, match="learning rate must be a positive finite number"):
        optimizers.build("sgd", [nn.Parameter(torch.ones(1))], lr)


def test_an_unknown_optimizer_is_refused() -> None:
    with pytest.raises(StudyError, match=r"optimizer must be one of sgd, .*did you mean 'adam'"):
        optimizers.build("adan", [nn.Parameter(torch.ones(1))], 0.1)
