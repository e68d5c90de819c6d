"""Plans: statistics by a plan's loops are those of an explicit walk over the index sets."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from renorm.errors import ShapeError
from renorm.pattern import partition
from renorm.plan import plan


def sums_by_plan(made, memory):
    """Walk a plan's loops over flat memory, as a kernel would: the sum and count of each set."""
    total, count = np.zeros(made.num_sets), np.zeros(made.num_sets, dtype=int)
    for index in itertools.product(*(range(loop.size) for loop in made.loops)):
        at = sum(i * loop.stride for i, loop in zip(index, made.loops, strict=True))
        group = sum(i * loop.stat_stride for i, loop in zip(index, made.loops, strict=True))
        total[group] += memory[at]
        count[group] += 1
    return total, count


def sums_by_index_sets(part, x):
    """The definition: entries whose kept indices agree are one set."""
    split = np.asarray(part.view(x))
    sets: dict[tuple[int, ...], list[float]] = {}
    for index in np.ndindex(split.shape):
        sets.setdefault(tuple(index[i] for i in part.kept), []).append(split[index])
    order = np.ndindex(*(split.shape[i] for i in part.kept))
    groups = [sets.get(key, []) for key in order]
    return np.array([sum(group) for group in groups]), np.array([len(group) for group in groups])


@st.composite
def cases(draw):
    """A random pattern with splits, sizes down to 0 and 1, and a tensor of random strides."""
    rank = draw(st.integers(1, 4))
    names = iter("abcdefgh")
    words, shape, sizes, weighted, reduced_any = [], [], {}, [], False
    for _ in range(rank):
        parts = draw(st.lists(st.tuples(st.integers(1, 3), st.booleans(), st.booleans()), min_size=1, max_size=2))
        axes = [(next(names), *part) for part in parts]
        text = " ".join(f"[{name}]" if inside else name for name, _, inside, _ in axes)
        reduced_any |= any(inside for _, _, inside, _ in axes)
        weighted += [name for name, _, _, along in axes if along]
        if len(axes) > 1:
            sizes |= {name: size for name, size, _, _ in axes}
            shape.append(math.prod(size for _, size, _, _ in axes))
            words.append(f"({text})")
        else:
            shape.append(draw(st.sampled_from([0, 1, 2, 3, 4])))
            words.append(text)
    if not reduced_any:
        words.append("[z]")
        shape.append(draw(st.integers(0, 3)))
    layout = draw(st.sampled_from(["permuted", "sliced", "expanded"]))
    order = draw(st.permutations(range(len(shape))))
    base = torch.arange(math.prod(max(2 * size, 2) for size in shape), dtype=torch.float64) * 0.37 + 1
    if layout == "permuted":
        x = (
            base[: math.prod(shape)]
            .view([shape[i] for i in order])
            .permute([order.index(i) for i in range(len(shape))])
        )
    elif layout == "sliced":
        x = base[: math.prod(2 * size for size in shape)].view([2 * shape[i] for i in order])[
            tuple(slice(None, None, 2) for _ in shape)
        ]
        x = x.permute([order.index(i) for i in range(len(shape))])
    else:
        dim = draw(st.integers(0, len(shape) - 1))
        small = [1 if i == dim else size for i, size in enumerate(shape)]
        x = base[: math.prod(small)].view(small).expand(shape)
    assert list(x.shape) == shape
    return " ".join(words), sizes, tuple(weighted), x


@given(cases())
@settings(max_examples=300, deadline=None)
def test_statistics_by_plan_equal_those_of_the_index_sets(case):
    pattern, sizes, weighted, x = case
    part = partition(pattern, x.dim(), sizes, weighted)
    made = plan(part, x.shape, x.stride())
    memory = np.asarray(torch.as_strided(x, (x.untyped_storage().size() // 8,), (1,), 0))
    total, count = sums_by_plan(made, memory[x.storage_offset() :])
    expected_total, expected_count = sums_by_index_sets(part, x)
    np.testing.assert_array_equal(count, expected_count)
    np.testing.assert_allclose(total, expected_total, rtol=1e-12)
    assert made.num_sets == len(expected_total)
    assert set(expected_count.tolist()) <= {made.set_size}


@given(cases())
@settings(max_examples=200, deadline=None)
def test_parameters_by_plan_are_those_of_the_weighted_axes(case):
    """Each entry meets the parameter of its own weighted indices."""
    pattern, sizes, weighted, x = case
    part = partition(pattern, x.dim(), sizes, weighted)
    made = plan(part, x.shape, x.stride())
    split = part.split_shape(x.shape)
    shape = [split[i] for i in part.weighted]
    seen = set()
    for index in itertools.product(*(range(loop.size) for loop in made.loops)):
        at = sum(i * loop.stride for i, loop in zip(index, made.loops, strict=True))
        seen.add((at, sum(i * loop.param_stride for i, loop in zip(index, made.loops, strict=True))))
    strides = part.view(x).stride()
    expected = {
        (
            sum(i * s for i, s in zip(index, strides, strict=True)),
            int(np.ravel_multi_index([index[i] for i in part.weighted], shape)) if shape else 0,
        )
        for index in np.ndindex(*split)
    }
    assert seen == expected


@pytest.mark.parametrize(
    ("pattern", "sizes", "loops", "kind"),
    [
        ("[n] c [...]", {}, 3, "row"),
        ("n c [...]", {}, 2, "row"),
        ("n (g [c]) [...]", {"g": 4}, 2, "row"),
        ("n [c ...]", {}, 2, "row"),
        ("n [c] ...", {}, 3, "column"),
    ],
)
def test_a_contiguous_image_needs_few_loops(pattern, sizes, loops, kind):
    made = plan(pattern, (2, 8, 5, 3), sizes=sizes)
    assert len(made.loops) == loops
    assert made.kind == kind


def test_channels_last_makes_batch_norm_two_loops():
    x = torch.empty(2, 8, 5, 3, memory_format=torch.channels_last)
    made = plan("[n] c [...]", x.shape, x.stride())
    assert [(loop.size, loop.stride, loop.reduced) for loop in made.loops] == [(30, 8, True), (8, 1, False)]
    x = torch.empty(2, 8, 5, 3, 4, memory_format=torch.channels_last_3d)
    made = plan("[n] c [...]", x.shape, x.stride())
    assert [(loop.size, loop.stride, loop.reduced) for loop in made.loops] == [(120, 8, True), (8, 1, False)]


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(
    "pattern", ["[n] c [...]", "n c [...]", "n (g [c]) [...]", "n [c ...]", "n [c] ...", "... [w]"]
)
def test_every_norm_of_the_zoo_needs_at_most_five_loops(pattern, layout):
    x = torch.empty(2, 8, 5, 3, memory_format=layout)
    sizes = {"g": 2, "c": 4} if "g" in pattern else {}
    weighted = ("g", "c") if "g" in pattern else ("c",) if "c" in pattern else ("w",)
    assert len(plan(pattern, x.shape, x.stride(), sizes=sizes, weighted=weighted).loops) <= 5


def test_plans_are_cached_by_value():
    first = plan("n [c]", (3, 4))
    assert plan("n [c]", torch.Size([3, 4]), [4, 1]) is first
    assert plan("n [c]", (3, 4), (1, 3)) is not first


def test_a_plan_prints_its_loops():
    text = str(plan("n (g [c]) [...]", (8, 64, 7, 7), sizes={"g": 32}, weighted=("g", "c")))
    assert text.splitlines()[0] == "n (g [c]) [...] on 8x64x7x7: 256 sets of 98 entries, row kernel"
    assert len(text.splitlines()) == 5


def test_one_entry_has_no_loops():
    made = plan("[n] c [...]", (1, 1, 1))
    assert made.loops == ()
    assert (made.num_sets, made.set_size, made.kind) == (1, 1, "row")


def test_a_shape_that_does_not_fit_is_refused():
    with pytest.raises(ShapeError, match="multiple of 3"):
        plan("n (g [c])", (2, 8), sizes={"g": 3})
