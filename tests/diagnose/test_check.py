"""`check` itself: it leaves everything as it was, takes every kind of program, and survives its own rules."""

import copy
import random
import sys
from collections import OrderedDict, deque
from dataclasses import dataclass

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from renorm.diagnose import RULES, Found, Report, check, rule
from renorm.diagnose.evidence import gather
from renorm.diagnose.hidden import attributes
from renorm.errors import RuleError

CE = nn.CrossEntropyLoss()


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture
def _own_rule():
    """Rules that a test registers are gone after it."""
    before = dict(RULES)
    yield
    RULES.clear()
    RULES.update(before)


def classes(n=32, features=8, k=5):
    return torch.randn(n, features), torch.randint(k, (n,))


def bits(tensor):
    """A tensor's bytes, and what else there is of it."""
    plain = tensor.detach().contiguous()
    return tensor.dtype, tuple(tensor.shape), tensor.requires_grad, bytes(plain.view(-1).view(torch.uint8).tolist())


def state_of(model):
    """All that a pass may change, with the identities of what is held."""
    state = {}
    for name, module in model.named_modules():
        state[name, "type"] = type(module)
        state[name, "children"] = [(key, id(child)) for key, child in module._modules.items()]
        for kind, held in (("parameter", module._parameters), ("buffer", module._buffers)):
            for key, tensor in held.items():
                state[name, kind, key] = None if tensor is None else (id(tensor), bits(tensor))
                if tensor is not None and tensor.is_leaf and tensor.grad is not None:
                    state[name, kind, key, "grad"] = (id(tensor.grad), bits(tensor.grad))
        for key, value in attributes(module).items():
            state[name, "attribute", key] = plain(value)
        for hooks in (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks):
            state[name, "hooks", id(hooks)] = list(hooks)
    return state


def plain(value):
    if isinstance(value, torch.Tensor):
        return id(value), bits(value)
    if isinstance(value, (list, tuple, deque)):
        return id(value), [plain(item) for item in value]
    if isinstance(value, dict):
        return id(value), [(key, plain(item)) for key, item in value.items()]
    if isinstance(value, (bool, int, float, str)):
        return type(value), repr(value)
    return id(value)


def random_state():
    name, keys, *rest = np.random.get_state()  # noqa: NPY002
    return bits(torch.get_rng_state()), random.getstate(), (name, keys.tobytes(), rest)


class Odd(nn.Module):
    """Changes whatever a forward pass can change."""

    def __init__(self):
        super().__init__()
        self.fc, self.head = nn.Linear(8, 16), nn.Linear(16, 5)
        self.register_buffer("count", torch.zeros((), dtype=torch.long))
        self.register_buffer("average", torch.zeros(16))
        self.register_buffer("queue", torch.full((4, 16), float("nan")))
        self.register_buffer("later", None)
        self.calls, self.cache, self.seen, self.recent = 0, {}, [], deque(maxlen=2)
        self.hidden, self.memory = None, torch.zeros(16)

    def forward(self, x):
        x = F.relu(self.fc(x))
        self.count += 1
        self.average = 0.9 * self.average + 0.1 * x.detach().mean(0)  # replaced, not written into
        self.queue[0] = x[0].detach()
        self.later = x.detach().sum()
        self.memory.add_(x.detach().mean(0))
        self.calls += 1
        self.cache[len(self.cache)] = x
        self.seen.append(x)
        self.recent.append(float(x.sum()))
        self.hidden, self.new = x, "made in forward"
        if not hasattr(self, "extra"):
            self.extra = nn.Linear(16, 16)
        noise = random.random() + np.random.rand() + torch.rand(())  # noqa: NPY002
        return self.head(self.extra(x)) + noise + self.calls


class Swings(nn.Module):
    """Switches a mode inside of forward."""

    def __init__(self):
        super().__init__()
        self.fc, self.drop = nn.Linear(8, 5), nn.Dropout(0.5)

    def forward(self, x):
        self.drop.eval()
        return self.drop(self.fc(x))


class Kept(nn.Module):
    """Layers with running statistics that are not registered."""

    def __init__(self):
        super().__init__()
        self.first, self.layers = nn.Linear(8, 16), [nn.BatchNorm1d(16), nn.Linear(16, 5)]

    def forward(self, x):
        x = self.first(x)
        for layer in self.layers:
            x = layer(x)
        return x


def norms():
    return nn.Sequential(
        nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.5), nn.Linear(16, 16), nn.LayerNorm(16),
        nn.BatchNorm1d(16, momentum=None), nn.Linear(16, 5),
    )  # fmt: skip


def frozen():
    model = norms()
    model[0].requires_grad_(False)
    model[1].eval()
    return model


MODELS = {
    "dropout": lambda: nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Dropout(0.5), nn.Linear(16, 5)),
    "norms": norms,
    "frozen": frozen,
    "eval": lambda: norms().eval(),
    "spectral": lambda: nn.Sequential(nn.utils.parametrizations.spectral_norm(nn.Linear(8, 16)), nn.Linear(16, 5)),
    "weight": lambda: nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(8, 16)), nn.Linear(16, 5)),
    "old spectral": lambda: nn.Sequential(nn.utils.spectral_norm(nn.Linear(8, 16)), nn.ReLU(), nn.Linear(16, 5)),
    "odd": Odd,
    "swings": Swings,
    "kept": Kept,
}


@pytest.mark.parametrize("with_grad", [False, True])
@pytest.mark.parametrize("kind", MODELS)
def test_everything_is_put_back(kind, with_grad):
    model = MODELS[kind]()
    x, y = classes()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.3)
    if with_grad:
        for parameter in model.parameters():
            parameter.grad = torch.randn_like(parameter) if parameter.requires_grad else None
        optimizer.step()
    layers = model.layers if kind == "kept" else []
    before = state_of(model), [state_of(layer) for layer in layers]
    data, numbers, steps = (bits(x), bits(y)), random_state(), copy.deepcopy(optimizer.state_dict())
    report = check(model, CE, optimizer, (x, y), include=["C29"])
    assert not report.failures
    assert random_state() == numbers
    assert (bits(x), bits(y)) == data
    assert (state_of(model), [state_of(layer) for layer in layers]) == before
    torch.testing.assert_close(optimizer.state_dict(), steps, rtol=0, atol=0)
    assert [id(p) for g in optimizer.param_groups for p in g["params"]] == list(map(id, model.parameters()))


@pytest.mark.parametrize("kind", MODELS)
def test_training_goes_on_as_if_nothing_had_happened(kind):
    def train(checked):
        torch.manual_seed(0)
        random.seed(0)
        np.random.seed(0)  # noqa: NPY002
        model = MODELS[kind]()
        optimizer, losses = torch.optim.Adam(model.parameters(), lr=1e-2), []
        for step in range(4):
            x, y = classes()
            if checked and step in (0, 2):
                check(model, CE, optimizer, (x, y))
            optimizer.zero_grad()
            loss = CE(model(x), y)
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
        return losses

    assert train(True) == train(False)


def test_a_graph_of_the_users_stays_usable():
    model, (x, y) = norms(), classes()
    loss = CE(model(x), y)
    check(model, CE, torch.optim.Adam(model.parameters()), (x, y))
    loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_a_failing_model_is_put_back_too():
    class Fails(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.calls = nn.BatchNorm1d(8), 0

        def forward(self, x):
            self.calls += 1
            self.norm(x)
            raise ValueError("no")

    model = Fails()
    before = state_of(model)
    assert not check(model, CE, batch=classes()).failures
    assert state_of(model) == before


def test_batches_that_the_model_writes_into():
    class Writes(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(8, 5)

        def forward(self, x):
            return self.fc(x.div_(2))

    x, y = classes()
    before = bits(x)
    assert not check(Writes(), CE, batch=(x, y)).failures
    assert bits(x) == before


def test_losses_with_a_state():
    class Center(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm1d(5)

        def forward(self, output, target):
            return CE(self.norm(output), target)

    loss = Center()
    before = state_of(loss)
    assert not check(nn.Linear(8, 5), loss, batch=classes()).failures
    assert state_of(loss) == before


def test_loaders_shuffle_as_they_would_have():
    x, y = classes(64)
    model = nn.Linear(8, 5)

    def order(checked):
        generator = torch.Generator().manual_seed(3)
        loader = DataLoader(TensorDataset(x, y), 16, shuffle=True, generator=generator)
        if checked:
            check(model, CE, loader=loader)
        return torch.cat([y for _, y in loader])

    assert torch.equal(order(True), order(False))


# ---- programs


def silent(*args, **kwargs):
    report = check(*args, **kwargs)
    assert not report.failures
    assert [str(finding) for finding in report.findings if finding.severity != "info"] == []
    return report


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.left, self.right, self.head = nn.Linear(8, 16), nn.Embedding(10, 16), nn.Linear(16, 5)

    def forward(self, x, ids, scale=1.0):
        return self.head(F.relu(self.left(x) + self.right(ids))) * scale


def two():
    return torch.randn(32, 8), torch.randint(10, (32,)), torch.randint(5, (32,))


@pytest.mark.parametrize("kind", ["flat", "nested", "dict", "list"])
def test_several_inputs(kind):
    x, ids, y = two()
    batch = {
        "flat": (x, ids, y),
        "nested": ((x, ids), y),
        "dict": ({"x": x, "ids": ids}, y),
        "list": [[x, ids], y],
    }[kind]
    model = Two()
    silent(model, CE, torch.optim.Adam(model.parameters()), batch)


@dataclass
class Output:
    loss: torch.Tensor
    logits: torch.Tensor


class Whole(nn.Module):
    """A model that computes its loss, as those of transformers do."""

    def __init__(self, kind):
        super().__init__()
        self.kind, self.embed, self.head = kind, nn.Embedding(20, 16), nn.Linear(16, 3)

    def forward(self, input_ids=None, labels=None, attention_mask=None):
        logits = self.head(self.embed(input_ids).mean(1))
        loss = F.cross_entropy(logits, labels)
        return {"dataclass": Output, "dict": OrderedDict, "tensor": lambda loss, logits: loss}[self.kind](
            loss=loss, logits=logits
        )


@pytest.mark.parametrize("kind", ["dataclass", "dict", "tensor"])
def test_models_that_return_their_loss(kind):
    batch = {"input_ids": torch.randint(20, (16, 7)), "labels": torch.randint(3, (16,)), "attention_mask": None}
    model = Whole(kind)
    report = silent(model, optimizer=torch.optim.AdamW(model.parameters()), batch=batch)
    assert report.ok
    with torch.no_grad():
        model.head.weight.fill_(float("nan"))
    assert "C11b" in {finding.id for finding in check(model, batch=batch).findings}


def test_outputs_in_several_parts():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.a, self.b = nn.Linear(8, 16), nn.Linear(16, 5), nn.Linear(16, 1)

        def forward(self, x):
            x = F.relu(self.body(x))
            return {"class": self.a(x), "value": [self.b(x), "no tensor"]}

    def loss(output, target):
        return CE(output["class"], target["class"]) + F.mse_loss(output["value"][0], target["value"])

    silent(Net(), loss, batch=(torch.randn(32, 8), {"class": classes()[1], "value": torch.randn(32, 1)}))


def test_without_loss_optimizer_or_target():
    model = norms()
    silent(model, batch=[torch.randn(32, 8)])
    silent(model, batch=torch.randn(32, 8))
    silent(model, None, torch.optim.Adam(model.parameters()), (torch.randn(32, 8), torch.randint(5, (32,))))
    silent(nn.Linear(8, 8), lambda output: output.square().mean(), batch=[torch.randn(32, 8)])
    silent(nn.Identity(), batch=torch.randn(32, 8))
    silent(nn.Linear(8, 5).requires_grad_(False), CE, batch=classes())


def test_integer_inputs_alone():
    model = nn.Sequential(nn.EmbeddingBag(30, 16), nn.Linear(16, 5))
    silent(model, CE, batch=(torch.randint(30, (32, 6)), torch.randint(5, (32,))))


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("wrap", [torch.compile, nn.DataParallel], ids=["compile", "DataParallel"])
def test_wrapped_models(wrap):
    inner = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 5), nn.Softmax(1))
    report = check(wrap(inner), CE, torch.optim.Adam(inner.parameters()), classes())
    (finding,) = report.errors
    assert (finding.id, finding.module) == ("C01", "3")
    assert isinstance(report.fix().model[3], nn.Identity)


def test_a_model_with_a_compiled_part():
    model = nn.Sequential(torch.compile(nn.Sequential(nn.Linear(8, 16), nn.ReLU())), nn.Linear(16, 5))
    before = state_of(model)
    silent(model, CE, torch.optim.Adam(model.parameters()), classes())
    assert state_of(model) == before


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_precisions(dtype):
    model = nn.Sequential(nn.Linear(8, 16), nn.LayerNorm(16), nn.ReLU(), nn.Linear(16, 5)).to(dtype)
    x, y = classes()
    silent(model, CE, torch.optim.SGD(model.parameters(), lr=0.1), (x.to(dtype), y))


def test_under_autocast():
    model = nn.Sequential(nn.Linear(8, 16), nn.LayerNorm(16), nn.ReLU(), nn.Linear(16, 5))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        silent(model, CE, torch.optim.Adam(model.parameters()), classes())
        assert torch.is_autocast_enabled("cpu")


def test_where_gradients_are_off():
    with torch.no_grad():
        silent(norms(), CE, batch=classes(64))
        assert not torch.is_grad_enabled()


def test_sparse_buffers_and_gradients():
    class Graph(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("adjacency", torch.eye(32).to_sparse())
            self.embed, self.head = nn.Embedding(40, 8, sparse=True), nn.Linear(8, 5)

        def forward(self, ids):
            return self.head(torch.sparse.mm(self.adjacency, self.embed(ids)))

    model = Graph()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    silent(model, CE, optimizer, (torch.randint(40, (32,)), torch.randint(5, (32,))))


def test_complex_parameters():
    class Spectral(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight, self.head = nn.Parameter(torch.randn(5, dtype=torch.cfloat)), nn.Linear(8, 5)

        def forward(self, x):
            return self.head(torch.fft.irfft(torch.fft.rfft(x) * self.weight, n=8))

    model = Spectral()
    silent(model, CE, torch.optim.Adam(model.parameters()), classes())


def test_the_loader_gives_the_batch():
    model = norms()
    loader = DataLoader(TensorDataset(*classes(64)), 32)
    silent(model, CE, torch.optim.Adam(model.parameters()), loader=loader)


# ---- rules and reports


@pytest.mark.usefixtures("_own_rule")
def test_a_rule_of_ones_own():
    @rule("X01", "few-samples", "warning", title="t", why="w.", fix="f", source="s")
    def few_samples(evidence):
        if evidence.batch_size < 4:
            yield Found(f"the batch has {evidence.batch_size} samples")

    report = check(nn.Linear(8, 5), CE, batch=classes(3))
    assert [(f.slug, f.message) for f in report.findings] == [("few-samples", "the batch has 3 samples")]
    assert not check(nn.Linear(8, 5), CE, batch=classes(4)).findings


@pytest.mark.usefixtures("_own_rule")
def test_a_rule_that_fails():
    @rule("X02", "breaks", "error", title="t", why="w.", fix="f", source="s")
    def breaks(evidence):
        evidence.model[0].weight.data.zero_()
        raise KeyError("missing")

    RULES["C01"], RULES["X02"] = RULES["X02"], RULES.pop("C01")  # before the others
    model = nn.Sequential(nn.Linear(8, 5), nn.Softmax(1))
    before = state_of(model)
    report = check(model, CE, batch=classes())
    assert report.failures == ("rule X02 (breaks) failed: KeyError: 'missing'",)
    assert [finding.id for finding in report.errors] == ["C01"]
    assert state_of(model) == before
    assert "note: rule X02 (breaks) failed" in str(report)


@pytest.mark.usefixtures("_own_rule")
def test_rules_that_are_left_out():
    model, batch = nn.Sequential(nn.Linear(8, 5), nn.Softmax(1)), classes()
    assert not check(model, CE, batch=batch).ok
    for name in ("C01", "softmax-before-cross-entropy"):
        assert check(model, CE, batch=batch, ignore=[name]).ok
    ran = []

    @rule("X03", "slow", "info", title="t", why="w.", fix="f", source="s", opt_in=True)
    def slow(evidence):
        ran.append(1)
        return []

    check(model, CE, batch=batch)
    assert not ran
    for name in ("X03", "slow"):
        check(model, CE, batch=batch, include=[name])
    assert len(ran) == 2
    check(model, CE, batch=batch, include=["X03"], ignore=["X03"])
    assert len(ran) == 2


def test_bad_arguments():
    model = nn.Linear(8, 5)
    with pytest.raises(RuleError, match=r"check needs a batch, \(x, y\) as the loader gives it"):
        check(model, CE)
    for argument in ("ignore", "include"):
        with pytest.raises(RuleError, match=r"there is no rule C999: see renorm.diagnose.RULES"):
            check(model, CE, batch=classes(), **{argument: ["C01", "C999"]})
    lazy = nn.Sequential(nn.LazyLinear(16), nn.ReLU(), nn.Linear(16, 5))
    with pytest.raises(RuleError, match=r"run it once on a batch, model\(x\), before"):
        check(lazy, CE, batch=classes())
    lazy(torch.randn(2, 8))
    silent(lazy, CE, batch=classes())
    with pytest.raises(RuleError, match=r"got the class CrossEntropyLoss: write CrossEntropyLoss\(\)"):
        check(model, nn.CrossEntropyLoss, batch=classes())
    with pytest.raises(RuleError, match=r"got the class Adam: write Adam\(model\.parameters\(\), lr=0\.01\)$"):
        check(model, CE, torch.optim.Adam, classes())
    with pytest.raises(RuleError, match=r"got tuple: write torch\.optim\.SGD\(.*\), and a batch as batch=\(x, y\)"):
        check(model, CE, classes())
    for empty in ([], DataLoader(TensorDataset(*classes(3)), 8, drop_last=True), iter(())):
        with pytest.raises(RuleError, match=r"the loader gave none: give it data, and .* drop_last=False"):
            check(model, CE, loader=empty)


# ---- what user code may do


def leaves(*args):
    sys.exit(0)


class Leaves(nn.Linear):
    def forward(self, x):
        sys.exit()


def test_an_exit_of_the_users_is_a_finding():
    (finding,) = check(nn.Linear(8, 5), leaves, batch=classes()).errors
    assert finding.id == "C00"
    assert finding.message.startswith("the loss raises SystemExit: 0 (output (32, 5)")
    (finding,) = check(nn.Sequential(nn.Linear(8, 8), Leaves(8, 5)), CE, batch=classes()).errors
    assert (finding.id, finding.module) == ("C00", "1")
    assert "raises SystemExit (input (32, 8) float32)" in finding.message
    with pytest.raises(RuleError, match="the loader must give a batch; it raised SystemExit: 0"):
        check(nn.Linear(8, 5), CE, loader=map(leaves, [1]))


class LeavesBackwards(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        sys.exit(0)


def test_an_exit_in_the_backward_pass_is_noted():
    report = check(nn.Linear(8, 5), lambda output, y: CE(LeavesBackwards.apply(output), y), batch=classes())
    assert any(failure.endswith("failed: SystemExit: 0") for failure in report.failures)


@pytest.mark.parametrize(
    ("loss", "came"),
    [
        (lambda output, y: CE(output, y).item(), "float"),
        (lambda output, y: (CE(output, y), {}), "tuple"),
        (lambda output, y: None, "None"),
    ],
)
def test_a_loss_is_a_tensor(loss, came):
    model = nn.Linear(8, 5)
    report = check(model, loss, torch.optim.SGD(model.parameters(), 0.1), classes())
    assert not report.failures
    assert [(finding.id, finding.message) for finding in report.errors] == [
        ("C00", f"the loss must be a tensor, for loss.backward(); the loss function returned {came}")
    ]


def test_a_loss_of_each_sample_has_no_gradient():
    report = check(nn.Linear(8, 5), nn.CrossEntropyLoss(reduction="none"), batch=classes())
    assert not report.failures
    assert [(finding.id, finding.severity) for finding in report.findings] == [("C45", "warning")]
    assert "the loss has shape (32,)" in report.findings[0].message


def test_fixes_are_made_in_copies():
    model = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 5), nn.Softmax(1))
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.1)
    x, y = classes()
    CE(model(x), y).backward()
    optimizer.step()
    before, steps = state_of(model), copy.deepcopy(optimizer.state_dict())
    report = check(model, CE, optimizer, (x, y))
    fixed = report.fix()
    assert state_of(model) == before
    torch.testing.assert_close(optimizer.state_dict(), steps, rtol=0, atol=0)
    assert {said.split()[0] for said in fixed.said} >= {"C01", "C26"}
    ours = {id(p) for p in fixed.model.parameters()}
    assert {id(p) for group in fixed.optimizer.param_groups for p in group["params"]} <= ours
    assert not ours & {id(p) for p in model.parameters()}
    assert torch.equal(
        fixed.optimizer.state[fixed.model[0].weight]["exp_avg"], optimizer.state[model[0].weight]["exp_avg"]
    )
    assert check(fixed.model, CE, fixed.optimizer, (x, y)).ok
    CE(fixed.model(x), y).backward()
    fixed.optimizer.step()


def test_a_report_without_a_model():
    with pytest.raises(ValueError, match="this report has no model"):
        Report(()).fix()


def test_reports_as_values_and_as_text():
    report = check(nn.Sequential(nn.Linear(8, 5), nn.Softmax(1)), CE, batch=classes())
    (finding,) = report.to_dict()["findings"]
    assert (finding["id"], finding["severity"], finding["module"]) == ("C01", "error", "1")
    assert "C01" in str(report)
    assert "softmax" in report._repr_html_()
    assert str(Report(())) == "no findings"


# ---- what a batch may be


class Named(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Linear(4, 3)

    def forward(self, image, scale=1.0):
        return self.net(image) * scale


class Everything(Named):
    def forward(self, image, **others):
        return self.net(image)


def own(output, batch):
    return F.cross_entropy(output, batch["label"])


def alone(output, weight=None):
    return output.square().mean()


@pytest.mark.parametrize("model", [Named, Everything])
@pytest.mark.parametrize("loss", [nn.CrossEntropyLoss(), F.cross_entropy, own, alone])
def test_a_dict_may_hold_the_target(model, loss):
    x, y = torch.randn(16, 4), torch.arange(16) % 3
    model = model()
    batch = {"image": x, "label": y} if loss is not alone else {"image": x}
    evidence = gather(model, loss, None, batch, None)
    assert evidence.run.error is None
    expected = alone(model(x)) if loss is alone else F.cross_entropy(model(x), y)
    assert torch.equal(evidence.run.loss, expected)


def test_a_dict_of_one_input_is_given_by_position():
    x, y = torch.randn(16, 4), torch.arange(16) % 3
    model = nn.Linear(4, 3)
    evidence = gather(model, nn.CrossEntropyLoss(), None, {"features": x, "y": y}, None)
    assert torch.equal(evidence.run.loss, F.cross_entropy(model(x), y))


def test_a_model_that_takes_targets_and_returns_its_loss():
    x, y = torch.randn(16, 4), torch.arange(16) % 3

    class Pair(Named):
        def forward(self, x, targets=None):
            return self.net(x), None if targets is None else F.cross_entropy(self.net(x), targets)

    class Flag(Named):
        def forward(self, x, verbose=False):
            return self.net(x).square().mean()

    assert gather(Pair(), None, None, (x, y), None).loss > 0
    flagged = gather(Flag(), None, None, (x, y), None)
    assert flagged.run.error is None
    assert torch.equal(flagged.target, y)


def test_a_model_that_writes_into_its_input_is_run_on_what_came():
    class Shift(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = nn.Linear(4, 3)

        def forward(self, x):
            return self.net(x.sub_(5))

    x, y = torch.randn(16, 4), torch.arange(16) % 3
    before, model = x.clone(), Shift()
    evidence = gather(model, nn.CrossEntropyLoss(), None, (x, y), None)
    assert torch.equal(x, before - 5)
    for training in (True, False):
        assert torch.equal(evidence.again(training=training).loss, evidence.run.loss)
    assert evidence.backward_error is None
    x.copy_(before)
    report = check(model, nn.CrossEntropyLoss(), batch=(x, y))
    assert [finding.id for finding in report.findings] == ["C40"]
    assert torch.equal(x, before)


def test_a_sparse_input_is_not_judged():
    report = check(nn.Linear(4, 3), nn.CrossEntropyLoss(), batch=(torch.eye(16, 4).to_sparse(), torch.arange(16) % 3))
    assert not report.failures
    assert report.ok


def test_the_failure_of_a_rule_is_told_in_short():
    @rule("X01", "fails", "warning", title="t", why="w", fix="f", source="s")
    def fails(evidence):
        raise KeyError("long " * 200)

    try:
        report = check(nn.Linear(4, 3), nn.CrossEntropyLoss(), batch=(torch.randn(16, 4), torch.arange(16) % 3))
    finally:
        del RULES["X01"]
    assert len(report.failures[0]) < 400
