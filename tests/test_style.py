"""Style norms and conditional norms: what is particular to them. What all norms share is in checks.py."""

import copy

import cases.style
import checks
import pytest
import torch
import torch.nn.functional as F
from checks import close, eps_of
from torch import nn
from torch.utils.checkpoint import checkpoint

import renorm as rn
from renorm.errors import ShapeError, UnknownNormError
from renorm.norms.condition import SPADE, ConditionalNorm, FiLM
from renorm.norms.style import AdaIN, CrossNorm, SelfNorm

BY_NAME = {case.name: case for case in cases.style.CASES}
TIGHT = 32 * eps_of(torch.float32)


def draw(*shape, mean=1.5, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator, dtype=torch.float64) + mean).to(dtype)


def moved(layer, seed=0):
    """Parameters away from where they start."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return layer


@pytest.mark.parametrize("name", [name for name, case in BY_NAME.items() if "magnitudes" in case.exempt])
@pytest.mark.parametrize("scale", [1e15, 1e-12])
def test_magnitudes_where_the_output_is_as_large_as_the_input(name, scale):
    case = BY_NAME[name]
    x = case.input() * scale
    expected = case.formula(case.layer(torch.float64), x.double(), None)
    for laid in checks.layouts(x).values():
        close(case.layer()(laid), expected, 1e-5 * expected.abs().max().item())


# ---- AdaIN


def equation(x, s, eps=1e-5):
    """arXiv:1703.06868, equation 8, with torch's biased variance."""
    x, s = x.double(), s.double()
    dims, others = tuple(range(2, x.dim())), tuple(range(2, s.dim()))
    std_x = (x.var(dims, unbiased=False, keepdim=True) + eps).sqrt()
    shape = [*x.shape[:2], *[1] * len(dims)]
    std_s = (s.var(others, unbiased=False) + eps).sqrt().expand(x.shape[:2]).reshape(shape)
    return (x - x.mean(dims, keepdim=True)) / std_x * std_s + s.mean(others).expand(x.shape[:2]).reshape(shape)


@pytest.mark.parametrize("size", [(4, 7), (9, 2), (1, 1), (3,), (2, 3, 5)])
@pytest.mark.parametrize("samples", [5, 1])
def test_adain_is_its_equation_for_a_style_of_any_size_and_rank(size, samples):
    x, s = draw(5, 6, 4, 7), draw(samples, 6, *size, mean=-2, seed=1)
    close(AdaIN()(x, s), equation(x, s), TIGHT)


def test_one_position_has_a_style():
    """Peers divide by n - 1: NaN."""
    x, s = draw(2, 3, 4, 4), draw(2, 3, 1, 1, seed=1)
    y = AdaIN()(x, s)
    close(y.mean((2, 3)), s[:, :, 0, 0], 1e-6)
    close(AdaIN()(s, x), x.mean((2, 3), keepdim=True), 1e-6)
    close(AdaIN()(s[:, :, 0, 0], x), x.mean((2, 3)), 1e-6)
    assert AdaIN()(s[:1], s[:1]).isfinite().all()


def test_the_style_of_the_content_itself_changes_nothing():
    x = draw(2, 3, 4, 5)
    close(AdaIN()(x, x), x, TIGHT)


def test_alpha_goes_from_the_content_to_the_style():
    x, s = draw(2, 3, 4, 5), draw(2, 3, 8, 8, mean=-1, seed=1)
    for alpha in (0.0, 0.3, 1.0):
        close(AdaIN()(x, s, alpha=alpha), alpha * equation(x, s) + (1 - alpha) * x.double(), TIGHT)


def test_a_style_as_mean_and_std():
    x, mean, std = draw(2, 4, 5, 3), draw(2, 3, seed=1), draw(2, 3, seed=2).abs()
    y = AdaIN(axis=-1)(x, (mean, std))
    alone = F.instance_norm(x.movedim(-1, 1).double()).movedim(1, -1)
    close(y, alone * std[:, None, None] + mean[:, None, None], TIGHT)
    close(AdaIN(axis=-1)(x, (mean[:1], std[:1]))[1], alone[1] * std[0] + mean[0], TIGHT)


def test_a_style_mask_cuts_the_style_out():
    x, s = draw(2, 3, 4, 5), draw(2, 3, 6, 6, mean=-1, seed=1)
    mask = torch.zeros(2, 1, 6, 6, dtype=torch.bool)
    mask[:, :, 1:4, 2:] = True
    dirty = torch.where(mask, s, float("nan")).requires_grad_()
    y = AdaIN()(x, dirty, style_mask=mask)
    close(y, equation(x, s[:, :, 1:4, 2:]), TIGHT)
    (gradient,) = torch.autograd.grad(y.square().sum(), dirty)
    assert gradient.isfinite().all()
    assert (gradient.masked_select(~mask) == 0).all()
    mask[1] = False
    y = AdaIN()(x, torch.where(mask, s, float("nan")), style_mask=mask)
    close(y[1], x[1], TIGHT)


def test_gradients_reach_content_and_style():
    x, s = draw(2, 2, 3, 2, dtype=torch.float64), draw(2, 2, 5, seed=1, dtype=torch.float64)
    mask, style_mask = draw(2, 2, 3, 2, seed=2, mean=1) > 0, draw(2, 2, 5, seed=3, mean=1) > 0
    for masks in ((None, None), (mask, style_mask)):
        inputs = (x.clone().requires_grad_(), s.clone().requires_grad_())
        for check in (torch.autograd.gradcheck, torch.autograd.gradgradcheck):
            assert check(lambda x, s, masks=masks: AdaIN()(x, s, *masks, alpha=0.7), inputs, fast_mode=True)
    pair = [value.detach().requires_grad_() for value in (s.mean(2), s.std(2))]
    assert torch.autograd.gradcheck(lambda x, mean, std: AdaIN()(x, (mean, std)), (inputs[0], *pair))


def test_content_and_style_may_differ_in_dtype():
    x, s = draw(2, 3, 4, 5, dtype=torch.bfloat16), draw(2, 3, 4, 4, seed=1)
    y = AdaIN()(x, s)
    assert y.dtype == torch.bfloat16
    close(y, equation(x, s), 2 * eps_of(torch.bfloat16) * 5)


@pytest.mark.parametrize(
    ("style", "words"),
    [
        (torch.zeros(3, 4, 5, 5), r"2 samples, or 1 for all, and 4 channels; its statistics are \(3, 4\)"),
        (torch.zeros(2, 3, 5, 5), r"are \(2, 3\)"),
        ((torch.zeros(2, 4), torch.ones(4)), r"are \(4,\)"),
        (torch.zeros(4), "at least 2 dimensions; the tensor has 1"),
    ],
)
def test_styles_that_do_not_fit(style, words):
    with pytest.raises(ShapeError, match=words):
        AdaIN()(torch.zeros(2, 4, 3, 3), style)


def test_a_pair_takes_no_mask_and_channels_are_first_or_last():
    with pytest.raises(ShapeError, match="leave it out"):
        AdaIN()(torch.zeros(2, 4, 3), (torch.zeros(2, 4), torch.ones(2, 4)), style_mask=torch.ones(1))
    for make in (lambda: AdaIN(axis=2), lambda: CrossNorm(axis=0), lambda: SelfNorm(3, axis=2)):
        with pytest.raises(ShapeError, match="axis 1 or -1"):
            make()


# ---- CrossNorm


def test_crossnorm_swaps_the_statistics_of_samples():
    x = draw(7, 3, 6, 6) * (1 + torch.arange(7).view(7, 1, 1, 1))
    torch.manual_seed(0)
    y = CrossNorm(p=1.0)(x)
    means, stds = ([(t.mean((2, 3)), t.std((2, 3), unbiased=False)) for t in (x, y)][i] for i in (0, 1))
    order = torch.cdist(stds[0], means[0]).argmin(1)
    assert sorted(order.tolist()) == list(range(7))
    assert order.tolist() != list(range(7))
    close(stds[0], means[0][order], 1e-4)
    close(stds[1], means[1][order], 1e-4)
    close(F.instance_norm(y), F.instance_norm(x), 1e-4)


def test_crossnorm_swaps_the_statistics_of_channels():
    x = draw(2, 5, 6, 6) * (1 + torch.arange(5).view(5, 1, 1))
    torch.manual_seed(1)
    y = CrossNorm(p=1.0, mode="1-instance")(x)
    order = torch.cdist(y.mean((2, 3)).T, x.mean((2, 3)).T).argmin(1)
    assert sorted(order.tolist()) == list(range(5))
    assert order.tolist() != list(range(5))
    close(y.std((2, 3)), x.std((2, 3))[:, order], 1e-4)


@pytest.mark.parametrize("crop", ["none", "content", "style", "both"])
def test_crossnorm_needs_no_flag_and_follows_the_seed(crop):
    """The authors' is active for one call after a flag was set, and asserts with its default crop."""
    layer, x = CrossNorm(crop=crop), draw(6, 3, 5, 7)
    torch.manual_seed(0)
    first = [layer(x) for _ in range(40)]
    swapped = sum(y is not x for y in first)
    assert 8 < swapped < 32
    torch.manual_seed(0)
    assert all(torch.equal(a, layer(x)) for a in first)
    assert all(CrossNorm(p=0.0, crop=crop)(x) is x for _ in range(5))
    assert layer.eval()(x) is x


def test_crossnorm_masked_in_evaluation_is_x_where_it_is_real():
    x, mask = draw(3, 2, 4), draw(3, 2, 4, seed=1) > 1
    for layer in (CrossNorm(p=1.0).eval(), CrossNorm(p=0.0)):
        y = layer(torch.where(mask, x, float("nan")), mask)
        assert torch.equal(y, torch.where(mask, x, 0))


def test_a_sample_without_a_real_entry_lends_no_style():
    x, mask = draw(2, 3, 4, 4), torch.ones(2, 1, 4, 4, dtype=torch.bool)
    mask[1] = False
    y = cases.style.Fixed()(torch.where(mask, x, float("nan")), mask)
    close(y[0], x[0], TIGHT)
    assert (y[1] == 0).all()


def test_one_sample_is_its_own_partner():
    x = draw(1, 3, 4, 4)
    for crop in ("none", "content"):
        y = CrossNorm(p=1.0, crop=crop)(x)
        assert y.isfinite().all()
        if crop == "none":
            close(y, x, TIGHT)
    assert CrossNorm(p=1.0, crop="both")(draw(3, 2, 1, 1)).isfinite().all()
    assert CrossNorm(p=1.0, crop="both")(draw(3, 2)).isfinite().all()


@pytest.mark.parametrize("least", [0.1, 0.6, 1.0])
def test_boxes(least):
    torch.manual_seed(0)
    shares = []
    for shape in ((2, 3, 9), (2, 3, 8, 11), (2, 3, 4, 5, 6), (2, 3, 1, 1)):
        layer = CrossNorm(min_area=least)
        for _ in range(200):
            box = layer._box(torch.empty(shape))
            inside = box[0, 0].nonzero()
            sides = inside.max(0).values - inside.min(0).values + 1
            assert sides.prod() == box.sum()  # without holes
            shares.append(box.float().mean().item())
            assert shares[-1] >= least
    assert max(shares) == 1.0
    assert least == 1.0 or min(shares) < least + 0.1
    last = CrossNorm(min_area=least, axis=-1)._box(torch.empty(2, 8, 11, 3))
    assert last.shape == (1, 8, 11, 1)


@pytest.mark.parametrize("crop", ["none", "both"])
def test_crossnorm_compiles_with_its_random_numbers(crop):
    torch._dynamo.reset()
    layer = CrossNorm(crop=crop)
    compiled = torch.compile(copy.deepcopy(layer), fullgraph=True, backend="aot_eager", dynamic=True)
    x = draw(11, 3, 5, 7)
    same = 0
    for seed in range(6):
        torch.manual_seed(seed)
        expected = layer(x)
        torch.manual_seed(seed)
        leaf = x.clone().requires_grad_()
        y = compiled(leaf)
        y.sum().backward()
        close(y, expected, TIGHT)
        if expected is x:
            same += 1
            assert torch.equal(y, x)  # to the last bit
            assert (leaf.grad == 1).all()
    assert 0 < same < 6


def test_crossnorm_under_vmap():
    x = torch.stack([draw(4, 3, 5, seed=seed) for seed in range(3)])
    for p in (0.0, 1.0):
        for randomness in ("same", "different"):
            layer = CrossNorm(p=p, crop="both")
            y = torch.vmap(layer, randomness=randomness)(x)
            assert y.isfinite().all()
            assert torch.equal(y, x) == (p == 0)


@pytest.mark.parametrize("reentrant", [False, True])
def test_crossnorm_under_checkpointing_draws_once(reentrant):
    layer, gradients = CrossNorm(crop="both", p=0.7), []
    for again in (False, True):
        torch.manual_seed(3)
        x = draw(4, 3, 5, 5).requires_grad_()
        y = checkpoint(layer, x, use_reentrant=reentrant) if again else layer(x)
        y.square().sum().backward()
        gradients.append(x.grad)
    assert torch.equal(*gradients)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"p": 1.5}, "from 0 to 1; got 1.5"),
        ({"crop": "neither"}, "none, content, style, both; got 'neither'"),
        ({"mode": "3-instance"}, "2-instance, 1-instance; got '3-instance'"),
        ({"min_area": 0}, "above 0 to 1; got 0"),
    ],
)
def test_what_crossnorm_cannot_be_made_of(options, words):
    with pytest.raises(ShapeError, match=words):
        CrossNorm(**options)


def test_crossnorm_names_its_arguments():
    assert "p=0.2, crop='both', mode='2-instance', pattern=" in repr(CrossNorm(0.2, "both"))


# ---- SelfNorm


@pytest.mark.parametrize("batch_norm", [True, False])
def test_selfnorm_of_one_sample(batch_norm):
    """The authors' batch norm raises."""
    layer, x = moved(SelfNorm(3, batch_norm=batch_norm)), draw(1, 3, 4, 4).requires_grad_()
    y = layer(x)
    y.square().sum().backward()
    assert x.grad.isfinite().all()
    assert SelfNorm(3, batch_norm=batch_norm)(draw(1, 3, 1, 1)).isfinite().all()
    if batch_norm:
        assert layer.f.norm.num_batches_tracked == 0
        close(layer.eval()(x), y, TIGHT)


def test_selfnorm_in_evaluation_is_a_linear_attention():
    """Batch norm by running statistics folds into a weight and a bias: the form without it computes the same."""
    layer = moved(SelfNorm(3))
    for seed in range(4):
        layer(draw(8, 3, 5, 5, seed=seed))
    layer.eval()
    plain = SelfNorm(3, batch_norm=False)
    with torch.no_grad():
        for name in ("f", "g"):
            a, b = getattr(layer, name), getattr(plain, name)
            factor = a.norm.weight / (a.norm.running_var + a.norm.eps).sqrt()
            b.weight.copy_(a.weight * factor[:, None])
            b.bias.copy_(a.norm.bias - a.norm.running_mean * factor)
    x = draw(5, 3, 4, 6, seed=9)
    close(layer(x), plain(x), TIGHT)
    mask = draw(5, 3, 4, 6, seed=10) > 1
    dirty = torch.where(mask, x, float("inf"))
    close(layer(dirty, mask), plain(dirty, mask), TIGHT)


def test_a_sample_without_a_real_entry_has_no_share_in_the_attention():
    layer, x, mask = moved(SelfNorm(3)), draw(5, 3, 4, 4), torch.ones(5, 1, 4, 4, dtype=torch.bool)
    mask[3:] = False
    other = copy.deepcopy(layer)
    y = layer(torch.where(mask, x, float("nan")), mask)
    close(y[:3], other(x[:3]), TIGHT)
    assert (y[3:] == 0).all()
    for value, same in zip(layer.state_dict().values(), other.state_dict().values(), strict=True):
        close(value, same, TIGHT)


def test_selfnorm_starts_between_nothing_and_everything():
    layer, x = SelfNorm(64), draw(16, 64, 4, 4)
    assert layer.f.weight.abs().max() <= 0.5**0.5
    share = layer(x).norm() / x.norm()
    assert 0.3 < share < 0.7


# ---- conditions


def test_film_starts_as_the_identity_and_learns():
    for layer, condition in (
        (FiLM(3, 4), draw(2, 4)),
        (FiLM(3, 4, embedding=True), torch.tensor([3, 0], dtype=torch.int32)),
    ):
        x = draw(2, 3, 5)
        y = layer(x, condition)
        assert torch.equal(y, x)
        y.square().sum().backward()
        assert all(parameter.grad.abs().sum() > 0 for parameter in layer.parameters())


def test_film_reaches_its_condition():
    layer = moved(FiLM(3, 4)).double()
    inputs = [draw(*shape, dtype=torch.float64).requires_grad_() for shape in ((2, 3, 5), (2, 4))]
    assert torch.autograd.gradcheck(layer, inputs)
    assert torch.autograd.gradgradcheck(layer, inputs)


@pytest.mark.parametrize(
    ("layer", "x", "condition", "words"),
    [
        (
            FiLM(3, 4),
            (2, 3, 5),
            torch.zeros(2, 5),
            r"must be \(N, 4\), a vector for each of the 2 samples; got \(2, 5\)",
        ),
        (FiLM(3, 4), (2, 3, 5), torch.zeros(1, 4), r"got \(1, 4\)"),
        (FiLM(3, 4), (2, 3, 5), torch.tensor([1, 2]), "embedding=True takes classes"),
        (FiLM(3, 4, embedding=True), (2, 3, 5), torch.zeros(2, 4), r"integers \(N,\), the class of each"),
        (FiLM(3, 4, embedding=True), (2, 3, 5), torch.zeros(2), "got .* of torch.float32"),
        (FiLM(3, 4), (2, 5, 3), torch.zeros(2, 4), r"3 channels on axis 1; got \(2, 5, 3\)"),
        (FiLM(3, 4), (3,), torch.zeros(3, 4), r"got \(3,\)"),
        (SPADE("batch", 3, 4, 2), (2, 3, 5, 5), torch.zeros(2, 5, 5, 5), r"the first two \(2, 4\); got \(2, 5, 5, 5\)"),
        (SPADE("batch", 3, 4, 2), (2, 3, 5, 5), torch.zeros(2, 5, 5, dtype=torch.long), r"F.one_hot\(labels, 4\)"),
        (SPADE("batch", 3, 4, 2), (2, 3, 5), torch.zeros(2, 4, 5), "4 dimensions and 3 channels"),
    ],
)
def test_conditions_that_do_not_fit(layer, x, condition, words):
    with pytest.raises(ShapeError, match=words):
        layer(torch.zeros(x), condition)


def test_what_a_conditional_norm_cannot_be_made_of():
    with pytest.raises(ShapeError, match="axis 1 or -1; got axis=2"):
        FiLM(3, 4, axis=2)
    with pytest.raises(ShapeError, match="got dims=4"):
        SPADE("batch", 3, 4, dims=4)
    with pytest.raises(ShapeError, match="odd size; got 4"):
        SPADE("batch", 3, 4, kernel_size=4)
    with pytest.raises(UnknownNormError, match="did you mean 'batch'"):
        ConditionalNorm("bath", 3, 4)


@pytest.mark.parametrize(
    ("norm", "alone"),
    [
        ("batch", lambda x: F.batch_norm(x, None, None, training=True)),
        ("instance", F.instance_norm),
        ("layer", lambda x: F.layer_norm(x, x.shape[1:])),
        ("group(2)", lambda x: F.group_norm(x, 2)),
        ("n [c] ...", lambda x: F.layer_norm(x.movedim(1, -1), x.shape[1:2]).movedim(-1, 1)),
        (rn.RMSNorm(5, eps=1e-5, elementwise_affine=False), lambda x: F.rms_norm(x, (5,), eps=1e-5)),
        ("none", lambda x: x),
    ],
)
def test_each_class_has_a_weight_and_a_bias(norm, alone):
    """As in arXiv:1610.07629: one norm, N styles."""
    layer, x, classes = moved(ConditionalNorm(norm, 6, 3, embedding=True)), draw(4, 6, 3, 5), torch.tensor([2, 0, 0, 1])
    rows = layer.film.project.weight.view(3, 2, 6, 1, 1)[classes]
    close(layer(x, classes), alone(x.double()) * (1 + rows[:, 0]) + rows[:, 1], TIGHT)
    mask = torch.ones(4, 1, 3, 5, dtype=torch.bool)
    mask[:, :, :, 4] = False
    y = layer(torch.where(mask, x, float("nan")), classes, mask)
    assert y.isfinite().all()
    assert (y[..., 4] == 0).all()


@pytest.mark.parametrize("kind", ["conditional", "spade", "film", "adain"])
def test_a_sample_in_evaluation_depends_on_its_own_condition_only(kind):
    x = draw(5, 6, 4, 4)
    layer, condition = {
        "conditional": (ConditionalNorm("batch", 6, 3), draw(5, 3, seed=1)),
        "spade": (SPADE("batch", 6, 3, hidden=4), draw(5, 3, 2, 2, seed=1)),
        "film": (FiLM(6, 3), draw(5, 3, seed=1)),
        "adain": (AdaIN(), draw(5, 6, 7, seed=1)),
    }[kind]
    moved(layer)(x, condition)
    state = copy.deepcopy(layer.eval().state_dict())
    whole = layer(x, condition)
    for i in range(5):
        # A convolution of one sample may sum in another order than that of five.
        close(layer(x[i : i + 1], condition[i : i + 1]), whole[i : i + 1], 8 * TIGHT)
    assert all(torch.equal(value, state[name]) for name, value in layer.state_dict().items())


def test_a_map_of_one_position():
    """What a norm by name says of it is the norm's own: it raises, as torch's; a layer can be told otherwise."""
    x, condition = draw(2, 6, 1, 1), draw(2, 3)
    for norm in ("batch", "layer", "group(2)", rn.Norm("n c [...]", weight=None)):
        assert ConditionalNorm(norm, 6, 3)(x, condition).isfinite().all()
        assert SPADE(norm, 6, 3, hidden=2)(x, condition[..., None, None]).isfinite().all()
    with pytest.raises(ShapeError, match="more than 1 spatial element"):
        ConditionalNorm("instance", 6, 3)(x, condition)
    with pytest.raises(ShapeError, match="one_value='running'"):
        ConditionalNorm("batch", 6, 3)(x[:1], condition[:1])
    running = rn.BatchNorm(6, affine=False, one_value="running")
    close(ConditionalNorm(running, 6, 3)(x[:1], condition[:1]), x[:1], 1e-4)


def test_process_groups_reach_the_norm():
    group = object()
    for layer in (ConditionalNorm("batch", 3, 2, process_group=group), SPADE("batch", 3, 2, 2, process_group=group)):
        assert layer.norm.process_group is group
    layer = SelfNorm(3, process_group=group)
    assert layer.f.norm.process_group is layer.g.norm.process_group is group


# ---- SPADE


@pytest.mark.parametrize("norm", ["batch", "instance", "layer", "group(3)"])
@pytest.mark.parametrize("kernel_size", [3, 1])
def test_spade_is_its_equation(norm, kernel_size):
    """The authors' raises for instance norm."""
    alone = {
        "batch": lambda x: F.batch_norm(x, None, None, training=True),
        "instance": F.instance_norm,
        "layer": lambda x: F.group_norm(x, 1),
        "group(3)": lambda x: F.group_norm(x, 3),
    }[norm]
    layer, x = moved(SPADE(norm, 6, 4, hidden=5, kernel_size=kernel_size)), draw(2, 6, 6, 8)
    labels = torch.randint(4, (2, 3, 4), generator=torch.Generator().manual_seed(0))
    one_hot = F.one_hot(labels, 4).movedim(-1, 1)
    full = one_hot.repeat_interleave(2, 2).repeat_interleave(2, 3).float()
    hidden = F.relu(layer.shared(full))
    expected = alone(x) * (1 + layer.gamma(hidden)) + layer.beta(hidden)
    for condition in (one_hot, one_hot.bool(), one_hot.double(), full):
        close(layer(x, condition), expected, TIGHT)


def test_spade_reaches_its_map():
    layer = moved(SPADE("instance", 2, 2, hidden=3)).double()
    inputs = [draw(2, 2, *size, dtype=torch.float64).requires_grad_() for size in ((4, 3), (2, 2))]
    assert torch.autograd.gradcheck(layer, inputs)
    assert torch.autograd.gradgradcheck(layer, inputs)


def test_spade_with_a_large_mean():
    case = BY_NAME["SPADE-batch"]
    for mean in (1e2, 1e4):
        x, layer = case.input(mean=mean), case.layer()
        expected = case.formula(case.layer(torch.float64), x.double(), None)
        hidden = F.relu(layer.layer.shared(F.interpolate(cases.style.label_map(x), x.shape[2:])))
        gain = (1 + layer.layer.gamma(hidden)).abs().max().item()
        close(layer(x), expected, 4 * gain * mean * eps_of(torch.float32))


def test_one_graph_of_spade_serves_many_batches():
    torch._dynamo.reset()
    layer, graphs = BY_NAME["SPADE-instance"].layer().eval(), []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend=backend)
    for count in (17, 19, 23):
        x = draw(count, 6, 4, 7)
        close(compiled(x), layer(x), TIGHT)
    assert len(graphs) == 1


def test_norms_of_conditions_can_be_swapped_and_frozen():
    model = nn.ModuleDict({"a": ConditionalNorm("batch", 6, 3), "b": SPADE("batch", 6, 3, hidden=2)})
    rn.freeze(model)
    assert model["a"].norm.frozen
    assert model["b"].norm.frozen
