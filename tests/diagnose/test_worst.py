"""The worst cases: which they are, what is said of them, and their nearest training examples."""

import io
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from renorm.diagnose.cases import SURE, Case, Neighbor, WorstCases, png
from renorm.diagnose.worst import worst_cases
from renorm.errors import RuleError

CE = nn.CrossEntropyLoss(reduction="none")


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def classifier():
    return nn.Sequential(
        nn.Linear(5, 16), nn.ReLU(), nn.Dropout(0.5), nn.BatchNorm1d(16), nn.Linear(16, 4), nn.Identity()
    )


def data(num=50):
    return torch.randn(num, 5), torch.randint(4, (num,))


def by_hand(model, x, y):
    model.eval()
    with torch.no_grad():
        hidden = model[:4](x)
        logits = model(x)
    model.train()
    return hidden, logits, F.cross_entropy(logits, y, reduction="none")


def test_the_worst_are_those_with_the_highest_loss():
    model, (x, y) = classifier(), data()
    _, logits, losses = by_hand(model, x, y)
    found = worst_cases(model, CE, (x, y), k=7, batch_size=8)
    order = losses.argsort(descending=True)[:7]
    assert [case.index for case in found] == order.tolist()
    assert [case.loss for case in found] == pytest.approx(losses[order].tolist())
    assert [case.prediction for case in found] == logits.argmax(1)[order].tolist()
    assert [case.target for case in found] == y[order].tolist()
    assert [case.confidence for case in found] == pytest.approx(logits.softmax(1).amax(1)[order].tolist())
    assert all(case.error is None for case in found)
    assert all(torch.equal(case.input, x[case.index]) for case in found)
    assert found.num_samples == 50
    assert found.mean_loss == pytest.approx(float(losses.mean()))
    assert isinstance(found, WorstCases)
    assert found[0] is next(iter(found))
    assert len(found[:2]) == 2


def test_neighbours_are_those_in_front_of_the_last_layer():
    model, (x, y), train = classifier(), data(), data(80)
    hidden, _, _ = by_hand(model, x, y)
    theirs, _, _ = by_hand(model, *train)
    far = torch.cdist(hidden, theirs)
    for metric, distance in (("euclidean", far), ("cosine", 1 - F.normalize(hidden) @ F.normalize(theirs).T)):
        found = worst_cases(model, CE, (x, y), k=5, train=train, neighbors=4, metric=metric, batch_size=9)
        for case in found:
            expected = distance[case.index].argsort()[:4]
            assert [n.index for n in case.neighbors] == expected.tolist()
            assert [n.distance for n in case.neighbors] == pytest.approx(
                distance[case.index][expected].tolist(), abs=1e-5
            )
            assert [n.target for n in case.neighbors] == train[1][expected].tolist()
            assert all(torch.equal(n.input, train[0][n.index]) for n in case.neighbors)


def test_a_sample_is_no_neighbour_of_itself():
    both = data()
    found = worst_cases(classifier(), CE, both, train=both, k=3, batch_size=8)
    assert all(neighbor.index != case.index for case in found for neighbor in case.neighbors)
    other = worst_cases(classifier(), CE, both, train=(both[0].clone(), both[1]), k=3)
    assert all(case.neighbors[0].index == case.index for case in other)


def test_nothing_changes():
    model, both = classifier(), data()
    model[2].eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    numbers = torch.get_rng_state()
    worst_cases(model, CE, DataLoader(TensorDataset(*both), 8, shuffle=True), train=both)
    assert torch.equal(torch.get_rng_state(), numbers)
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("form", ["tensors", "dataset", "loader", "shuffled", "list", "generator"])
def test_the_data_may_come_in_any_form(form):
    model, (x, y) = classifier(), data(20)
    dataset = TensorDataset(x, y)
    forms = {
        "tensors": (x, y),
        "dataset": dataset,
        "loader": DataLoader(dataset, 6),
        "shuffled": DataLoader(dataset, 6, shuffle=True, drop_last=True),
        "list": [(x[:7], y[:7]), (x[7:], y[7:])],
        "generator": (pair for pair in [(x[:7], y[:7]), (x[7:], y[7:])]),
    }
    expected = worst_cases(model, CE, (x, y), k=4)
    found = worst_cases(model, CE, forms[form], k=4)
    assert [case.index for case in found] == [case.index for case in expected]
    assert found.num_samples == 20


class Rows(torch.utils.data.IterableDataset):
    def __iter__(self):
        return iter(zip(*data(10), strict=True))


def test_an_iterable_data_set():
    assert worst_cases(classifier(), CE, DataLoader(Rows(), 4), k=2).num_samples == 10


def test_a_regression():
    model = nn.Linear(3, 1)
    x, y = torch.randn(20, 3), torch.randn(20, 1)
    found = worst_cases(model, nn.MSELoss(reduction="none"), (x, y), k=2, train=(x, y))
    off = (model(x) - y).detach().abs().flatten()
    assert [case.error for case in found] == pytest.approx(off.sort(descending=True).values[:2].tolist())
    assert all(case.confidence is None and case.hint == "" for case in found)
    assert isinstance(found[0].prediction, float)
    assert "off by" in str(found)


MSE = nn.MSELoss(reduction="none")


@pytest.mark.parametrize(
    "loss",
    [
        MSE,
        nn.HuberLoss(reduction="none"),
        nn.PoissonNLLLoss(reduction="none"),
        lambda output, y: (output - y) ** 2,
        lambda output, y: (y - output).abs(),
        lambda output, y: MSE(output, y).mean(1),
    ],
)
@pytest.mark.filterwarnings("ignore:Using a target size")
def test_outputs_against_the_targets_of_other_samples(loss):
    x, y = torch.randn(20, 3), torch.rand(20)
    with pytest.raises(RuleError, match=r"\(20, 1\) and target \(20,\) .* \(20, 20\): write .*output\.squeeze\(1\)"):
        worst_cases(nn.Linear(3, 1), loss, (x, y))
    with pytest.raises(RuleError, match=r"\(20,\) and target \(20, 1\) .*: write .*target\.view\(20,\)"):
        worst_cases(nn.Sequential(nn.Linear(3, 1), nn.Flatten(0)), loss, (x, y[:, None]))
    losses = loss(nn.Linear(3, 1)(x), y[:, None])
    assert len(losses) == 20  # of one shape it is a loss for each sample
    worst_cases(nn.Linear(3, 1), loss, (x, y[:, None]))
    worst_cases(nn.Linear(3, 1), loss, [(x[:1], y[:1, None])])


def test_shapes_that_fit():
    """One target for several outputs, centres of bins, pairs of outputs: no output meets another's target."""
    x, y, centres = torch.randn(20, 3), torch.rand(20, 1), torch.linspace(0, 1, 20)
    quantiles = torch.tensor([0.1, 0.5, 0.9])

    def pinball(output, y):
        off = y - output
        return torch.maximum(quantiles * off, (quantiles - 1) * off)

    def binned(output, y):
        return F.cross_entropy(output, torch.softmax(-(((y - centres) / 0.1) ** 2), 1), reduction="none")

    def spread(output, y):
        return (output - y).abs().mean(1) - 0.5 * (output[:, :, None] - output[:, None]).abs().mean((1, 2))

    for model, loss in ((nn.Linear(3, 3), pinball), (nn.Linear(3, 20), binned), (nn.Linear(3, 4), spread)):
        expected = loss(model(x), y).detach().reshape(20, -1).mean(1)
        assert worst_cases(model, loss, (x, y), k=1)[0].loss == pytest.approx(float(expected.max()))


def test_two_classes_and_several_labels():
    x = torch.randn(20, 3)
    with_logits = nn.BCEWithLogitsLoss(reduction="none")
    one = worst_cases(nn.Linear(3, 1), with_logits, (x, torch.randint(2, (20, 1)).float()), k=20, train=(x, x[:, :1]))
    assert {case.prediction for case in one} <= {0, 1}
    assert {case.target for case in one} <= {0, 1}
    assert all(0.5 <= case.confidence <= 1 for case in one)
    model = nn.Sequential(nn.Linear(3, 4), nn.Sigmoid())
    labels = torch.randint(2, (20, 4)).float()
    several = worst_cases(model, nn.BCELoss(reduction="none"), (x, labels), k=1, train=(x, labels))[0]
    assert several.prediction == torch.nonzero(model(x)[several.index] > 0.5).flatten().tolist()
    assert several.target == torch.nonzero(labels[several.index]).flatten().tolist()
    assert isinstance(several.neighbors[0].target, list)


def test_probabilities_of_classes_as_targets():
    x, y = data()
    soft = F.one_hot(y, 4) * 0.9 + 0.025
    found = worst_cases(classifier(), CE, (x, soft), k=3, train=(x, soft))
    assert all(case.target == int(y[case.index]) for case in found)
    assert all(n.target == int(y[n.index]) for case in found for n in case.neighbors)


def test_pixels_and_tokens():
    x, y = torch.randn(6, 3, 8, 8), torch.randint(4, (6, 8, 8))
    segment = nn.Sequential(nn.Conv2d(3, 5, 3, padding=1), nn.ReLU(), nn.Conv2d(5, 4, 1))
    found = worst_cases(segment, CE, (x, y), k=2, train=(x, y))
    assert found[0].prediction.shape == (8, 8)
    assert 0.25 <= found[0].confidence <= 1
    assert "a tensor of shape (8, 8)" in str(found)
    tokens = torch.randint(9, (6, 7))
    language = nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 9))

    def flat(output, y):
        return F.cross_entropy(output.flatten(0, 1), y.flatten(), reduction="none")

    found = worst_cases(language, flat, (tokens, tokens), k=2, train=(tokens, tokens))
    losses = flat(language(tokens), tokens).detach().reshape(6, 7).mean(1)
    assert found[0].loss == pytest.approx(float(losses.max()))
    assert found[0].prediction.shape == (7,)
    index = found[0].index
    assert torch.equal(found[0].prediction, language(tokens)[index].argmax(-1))


class WithLabels(nn.Module):
    def __init__(self):
        super().__init__()
        self.head = nn.Linear(5, 4)

    def forward(self, x, scale, labels=None):
        logits = self.head(x) * scale
        return {"loss": F.cross_entropy(logits, labels), "logits": logits}


def test_batches_of_arguments():
    x, y = data(12)
    batches = [{"x": x, "scale": torch.tensor(2.0), "labels": y}]
    found = worst_cases(
        WithLabels(), lambda out, y: F.cross_entropy(out["logits"], y, reduction="none"), batches, k=3, train=batches
    )
    assert all(case.target == int(y[case.index]) for case in found)
    assert set(found[0].input) == {"x", "scale", "labels"}
    assert found._repr_html_()


def test_a_model_without_a_linear_layer_and_a_loss_that_is_not_torchs():
    x, y = torch.randn(10, 4), torch.randint(4, (10,))
    found = worst_cases(nn.Identity(), lambda out, y: -out.log_softmax(1)[range(len(y)), y], (x, y), k=1, train=(x, y))
    assert isinstance(found[0].prediction, int)
    assert found[0].confidence > 0.25


def test_a_loss_that_is_no_number_is_the_worst():
    x, y = data()
    x[13] = math.nan
    assert worst_cases(nn.Linear(5, 4), CE, (x, y), k=2)[0].index == 13


def case(prediction, target, *near, confidence=0.5):
    neighbors = tuple(Neighbor(i, 0.1, label, torch.zeros(2)) for i, label in enumerate(near))
    return Case(0, 1.0, confidence, None, prediction, target, torch.zeros(2), neighbors)


def test_hints():
    assert case(1, 2).hint == ""
    assert case(1, 1, 1, 1, 1).hint == ""
    assert "the class it was taken for: is the target right?" in case(1, 2, 1, 1).hint
    assert "surely taken for" in case(1, 2, 1, 1, confidence=SURE).hint
    assert "none of the 3 nearest training examples has its class" in case(1, 2, 1, 3, 1).hint
    assert case(1, 2, 2, 2).hint.startswith("all 2 nearest training examples have its class: only the last layer")
    assert case(1, 2, 1, 2, 1).hint == "1 of the 3 nearest training examples have its class: between classes"


def test_html_escapes_names_and_shows_images():
    image = pytest.importorskip("PIL.Image")
    x, y = torch.rand(6, 3, 9, 7), torch.randint(4, (6,))
    model = nn.Sequential(nn.Flatten(), nn.Linear(189, 4))
    found = worst_cases(model, CE, (x, y), k=2, train=(x, y), classes=["<a>", "<b>", "<c>", "<d>"])
    shown = found._repr_html_()
    assert shown.count("data:image/png;base64") == 2 * 4
    assert "&lt;" in shown
    assert "<a>" not in shown
    for channels, mode in ((3, "RGB"), (1, "L")):
        picture = torch.rand(channels, 9, 7)
        read = image.open(io.BytesIO(png(picture)))
        assert (read.size, read.mode) == ((7, 9), mode)
        stretched = (picture - picture.min()) / (picture.max() - picture.min())
        pixels = torch.tensor(np.array(read)).reshape(9, 7, channels).permute(2, 0, 1) / 255
        assert (pixels - stretched).abs().max() <= 0.5 / 255 + 1e-6
    assert png(torch.full((1, 4, 4), math.nan)).startswith(b"\x89PNG")


def test_mistakes():
    x, y = data()
    model = classifier()
    with pytest.raises(RuleError, match=r'it returned one number: write reduction="none"'):
        worst_cases(model, nn.CrossEntropyLoss(), (x, y))
    with pytest.raises(RuleError, match=r"for each of the 50 samples; it returned \(3,\):"):
        worst_cases(model, lambda output, y: output[:3, 0], (x, y))
    with pytest.raises(RuleError, match="the model must run on the data; it raised RuntimeError"):
        worst_cases(model, CE, (x[:, :2], y))
    with pytest.raises(RuleError, match="loss_per_sample must run on the data"):
        worst_cases(model, CE, [(x, y[:3])])
    with pytest.raises(RuleError, match="the same number of samples; got 50 and 3"):
        worst_cases(model, CE, (x, y[:3]))
    with pytest.raises(RuleError, match="at least one sample"):
        worst_cases(model, CE, [])
    with pytest.raises(RuleError, match="k is 1 or more"):
        worst_cases(model, CE, (x, y), k=0)
    with pytest.raises(RuleError, match="a row for each of the 50 samples"):
        worst_cases(nn.Flatten(0), lambda output, y: y.float(), (x, y))
    with pytest.raises(RuleError, match="it returned list: write"):
        worst_cases(model, lambda output, y: CE(output, y).tolist(), (x, y))
    with pytest.raises(RuleError, match="classes must name all 4 classes of the model; got 3"):
        worst_cases(model, CE, (x, y), classes=["a", "b", "c"])
    binary = nn.BCEWithLogitsLoss(reduction="none")
    with pytest.raises(RuleError, match="classes must name all 2 classes of the model; got 1"):
        worst_cases(nn.Linear(5, 1), binary, (x, (x[:, :1] > 0).float()), classes=["no"])
    assert all(module.training for module in model.modules())
