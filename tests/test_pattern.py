"""Reading patterns: what they mean, and where the caret stands when they mean nothing."""

import pickle
import re
import string

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from renorm.errors import PatternError, ShapeError
from renorm.pattern import parse, partition


def roles(text: str, rank: int, **sizes: int) -> str:
    return partition(text, rank, sizes).roles


@pytest.mark.parametrize(
    ("text", "rank", "expected"),
    [
        ("[n] c [...]", 4, "rkrr"),
        ("[n] c [...]", 2, "rk"),
        ("n c [...]", 5, "kkrrr"),
        ("n (g [c]) [...]", 4, "kkrrr"),
        ("(k [b]) c [...]", 3, "krkr"),
        ("... [c]", 3, "kkr"),
        ("n [c ...]", 4, "krrr"),
        ("n [c] ...", 4, "krkk"),
        ("t [n] c", 3, "krk"),
        ("[(a b)] c", 2, "rrk"),
        ("([a] b [c]) d", 2, "rkrk"),
        ("  n   [c]  ", 2, "kr"),
    ],
)
def test_roles(text, rank, expected):
    sizes = {"g": 2, "k": 2, "a": 2, "b": 3} if "(" in text else {}
    sizes = {name: size for name, size in sizes.items() if name in parse(text).names}
    assert roles(text, rank, **sizes) == expected


@pytest.mark.parametrize(
    ("text", "column", "words"),
    [
        ("n [c", 2, "never closed"),
        ("n (c [d]", 2, "never closed"),
        ("n c]", 3, "no [ before"),
        ("n [c])", 5, "no ( before"),
        ("[n [c]]", 3, "do not nest"),
        ("(a (b [c])) d", 3, "do not nest"),
        ("n (g [c)] d", 7, "overlap"),
        ("[n (g] c) d", 5, "overlap"),
        ("n [] c", 2, "empty"),
        ("n () [c]", 2, "empty"),
        ("a [b] a", 6, "twice"),
        ("... [c] ...", 8, "twice"),
        ("n (g [...])", 6, "whole dimensions"),
        ("n 32 [c]", 2, "g=32"),
        ("n, [c]", 1, "spaces"),
        ("n [c] -> n", 6, "no arrow"),
        ("n [c] .", 6, "three dots"),
        ("n [c] …", 6, "three dots"),
        ("n [c] *", 6, "write ..."),
        ("n [c] ?", 6, "no meaning"),
        ("n c", 0, "no axis is in brackets"),
        ("", 0, "empty"),
    ],
)
def test_errors_point_at_the_place(text, column, words):
    with pytest.raises(PatternError, match=re.escape(words)) as caught:
        parse(text)
    message = str(caught.value)
    first, shown, caret = message.split("\n")
    assert shown == "    " + text
    assert caret.index("^") == 4 + column
    assert first[0].islower() or first[0] in "'."


def test_a_pattern_is_text():
    with pytest.raises(PatternError, match="got int"):
        parse(3)


@pytest.mark.parametrize(
    ("sizes", "words"),
    [
        ({"h": 2}, "no axis 'h'"),
        ({"gg": 2}, "did you mean 'g'"),
        ({"g": 0}, "positive integer"),
        ({"g": 2.0}, "positive integer"),
        ({"g": True}, "positive integer"),
        ({}, "pass also g= or c="),
    ],
)
def test_sizes_must_fit_the_pattern(sizes, words):
    with pytest.raises(PatternError, match=re.escape(words)) as caught:
        partition("n (g [c]) [...]", 4, sizes)
    assert "^" in str(caught.value)


def test_rank_must_fit():
    with pytest.raises(ShapeError, match="at least 2 dimensions; the tensor has 1"):
        partition("n (g [c]) [...]", 1, {"g": 2})
    with pytest.raises(ShapeError, match=r"2 dimensions; the tensor has 3 \(write \.\.\."):
        partition("[n] c", 3)


def test_shape_must_fit_the_sizes():
    part = partition("n (g [c]) [...]", 3, {"g": 4})
    assert part.split_shape((2, 12, 5)) == (2, 4, 3, 5)
    with pytest.raises(ShapeError, match=r"dimension 1 must have a multiple of 4 entries \(g=4\)") as caught:
        part.split_shape((2, 10, 5))
    assert "^" in str(caught.value)
    with pytest.raises(ShapeError, match=r"must have 12 entries \(g=4, c=3\)"):
        partition("n (g [c]) [...]", 3, {"g": 4, "c": 3}).check((2, 16, 5))
    with pytest.raises(ShapeError, match="bound to 3 dimensions; got 2"):
        part.check((2, 12))


def test_view_is_never_a_copy():
    x = torch.randn(6, 8, 5, 7).contiguous(memory_format=torch.channels_last)[:, :, ::2].transpose(0, 3)
    view = partition("n (g [c]) (k [b]) [...]", 4, {"g": 2, "k": 3}).view(x[:, :, :3])
    assert view.data_ptr() == x.data_ptr()
    assert view.shape == (7, 2, 4, 3, 1, 6)


def test_pattern_pickles_and_so_does_its_error():
    assert pickle.loads(pickle.dumps(parse("n [c]"))) == parse("n [c]")
    with pytest.raises(PatternError) as caught:
        parse("n [c")
    again = pickle.loads(pickle.dumps(caught.value))
    assert str(again) == str(caught.value)
    assert again.column == 2


NAMES = st.lists(st.sampled_from(string.ascii_lowercase), min_size=1, max_size=6, unique=True)


@given(NAMES, st.data())
def test_any_pattern_written_is_read_back(names, data):
    """Write a random pattern from its meaning, and read the same meaning from it."""
    reduced = data.draw(st.lists(st.booleans(), min_size=len(names), max_size=len(names)).filter(any))
    splits = data.draw(st.lists(st.integers(1, 3), min_size=len(names), max_size=len(names)))
    words, meaning, at = [], [], 0
    for width in splits:
        group = list(zip(names, reduced, strict=True))[at : at + width]
        if not group:
            break
        at += width
        text = " ".join(f"[{name}]" if inside else name for name, inside in group)
        words.append(f"({text})" if len(group) > 1 else text)
        meaning.append(group)
    pattern = parse(" ".join(words))
    assert [[(axis.name, axis.reduced) for axis in dim] for dim in pattern.dims] == meaning


@given(st.text(alphabet="abc()[]. 12,->", max_size=14))
def test_no_text_breaks_the_parser(text):
    """Whatever is typed, the outcome is a pattern or a PatternError."""
    try:
        pattern = parse(text)
    except PatternError as error:
        assert error.text == text  # noqa: PT017
    else:
        assert any(axis.reduced for axis in pattern.axes)
