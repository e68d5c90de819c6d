"""The picture: right colours on right cells, valid SVG and PNG."""

import re
import xml.etree.ElementTree as ElementTree

import pytest
from PIL import Image

import renorm as rn
from renorm.errors import PatternError, RenormError

SVG = "{http://www.w3.org/2000/svg}"


def parts(drawing):
    """For each path: its colour, the set it says it is, and how many cells it has."""
    root = ElementTree.fromstring(drawing.svg)
    return [(p.get("fill"), p.find(SVG + "title").text, p.get("d").count("M")) for p in root.iter(SVG + "path")]


def test_group_norm_shows_each_set_in_a_colour_of_its_own():
    shown = parts(rn.draw("n (g [c]) [...]", n=2, g=3, c=2, h=4, w=5))
    front = shown[:3]
    assert [title for _, title, _ in front] == ["g=0, n=0", "g=1, n=0", "g=2, n=0"]
    assert [cells for _, _, cells in front] == [2 * 20] * 3
    assert len({colour.split()[0] for colour, _, _ in front}) == 3


@pytest.mark.parametrize(
    ("pattern", "sizes", "sets"),
    [
        ("[n] c [...]", {"n": 3, "c": 4, "h": 2, "w": 2}, 4),
        ("n c [...]", {"n": 3, "c": 4, "h": 2, "w": 2}, 12),
        ("n [c ...]", {"n": 3, "c": 4, "h": 2, "w": 2}, 3),
        ("n (g [c]) [h w]", {"n": 3, "g": 2, "c": 2, "h": 2, "w": 2}, 6),
        ("(k [b]) c", {"k": 2, "b": 3, "c": 4}, 8),
        ("[n] c", {"n": 3, "c": 4}, 4),
        ("[c]", {"c": 5}, 1),
        ("... [c]", {"n": 2, "l": 3, "c": 4}, 6),
        ("t [n] c", {"t": 2, "n": 3, "c": 4}, 8),
    ],
)
def test_a_caption_counts_the_sets_and_sets_differ_in_colour(pattern, sizes, sets):
    drawing = rn.draw(pattern, **sizes)
    label = ElementTree.fromstring(drawing.svg).get("aria-label")
    assert label.startswith(f"{pattern}: {sets} set")
    hue = {}
    for colour, title, _ in parts(drawing):
        assert hue.setdefault(title, colour.split()[0]) == colour.split()[0]
    assert len(set(hue.values())) == len(hue)
    assert len(hue) <= sets


def test_front_has_every_cell_of_a_flat_tensor_once():
    shown = parts(rn.draw("[n] c", n=3, c=4))
    assert sum(cells for _, _, cells in shown) == 12


def test_default_sizes_and_notebooks():
    drawing = rn.draw("n c [...]")
    assert drawing._repr_svg_() == drawing.svg
    assert "currentColor" in drawing.svg


def test_text_in_a_name_is_escaped():
    assert "&lt;" not in rn.draw("n [c]").svg
    assert re.search(r"<text[^>]*>\[c\]</text>", rn.draw("n [c]").svg)


def test_save(tmp_path):
    drawing = rn.draw("n [c]", n=2, c=3)
    assert drawing.save(tmp_path / "a.svg").read_text() == drawing.svg
    image = Image.open(drawing.save(tmp_path / "a.png")).convert("RGB")
    assert len(image.getcolors(maxcolors=100_000)) > 3
    with pytest.raises(RenormError, match=r"\.svg or \.png; got 'a\.gif'"):
        drawing.save(tmp_path / "a.gif")


@pytest.mark.parametrize(
    ("pattern", "sizes", "words"),
    [
        ("n [c", {}, "never closed"),
        ("n [c]", {"h": 3}, "no axis 'h'"),
        ("n [c]", {"c": 0}, "positive integer"),
        ("n (g [c]) [d h w]", {}, "at most five axes"),
        ("n [c]", {"n": 1000, "c": 1000}, "at most 100000 cells"),
    ],
)
def test_what_cannot_be_drawn(pattern, sizes, words):
    with pytest.raises(PatternError, match=words):
        rn.draw(pattern, **sizes)
