"""Draw the pictures of the documentation into docs/pictures; with ``--check``, only say whether they are up to date."""

from __future__ import annotations

import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import renorm as rn

FOLDER = Path(__file__).parent / "pictures"
SVG = "http://www.w3.org/2000/svg"
GREY = "#767676"  # readable on white and on black: a page's colours do not reach into an <img>
IMAGE = {"n": 4, "h": 3, "w": 2}
NORMS = (  # title, pattern, sizes
    ("batch norm", "[n] c [...]", {**IMAGE, "c": 6}),
    ("instance norm", "n c [...]", {**IMAGE, "c": 6}),
    ("group norm", "n (g [c]) [...]", {**IMAGE, "g": 3, "c": 2}),
    ("layer norm", "n [c ...]", {**IMAGE, "c": 6}),
    ("layer, RMS norm of tokens", "... [c]", {"n": 4, "t": 6, "c": 6}),
)
WIDTH, HEIGHT, HEAD = 208, 178, 48  # px: of a tile's picture, and of the lines above it
LEFT, TOP = 24, 16  # px: empty space that `draw` leaves


def strip() -> str:
    """The classic norms side by side, each under its name and pattern."""
    ET.register_namespace("", SVG)
    size = (WIDTH * len(NORMS), HEAD + HEIGHT)
    names = "; ".join(f"{title}: {pattern}" for title, pattern, _ in NORMS)
    root = ET.Element(
        f"{{{SVG}}}svg",
        {
            "viewBox": f"0 0 {size[0]} {size[1]}",
            "role": "img",
            "aria-label": f"The entries of a tensor that share statistics, in one colour. {names}",
            "color": GREY,
            "fill": "currentColor",
            "text-anchor": "middle",
        },
    )
    for index, (title, pattern, sizes) in enumerate(NORMS):
        root.append(_picture(pattern, sizes, index * WIDTH))
        middle = str(index * WIDTH + WIDTH / 2)
        _line(root, title, {"x": middle, "y": "18", "font-family": "sans-serif", "font-size": "15"})
        _line(root, pattern, {"x": middle, "y": "40", "font-family": "monospace", "font-size": "14"})
    return ET.tostring(root, encoding="unicode") + "\n"


def _picture(pattern: str, sizes: dict[str, int], x: int) -> ET.Element:
    drawing = ET.fromstring(rn.draw(pattern, **sizes).svg)
    drawing.remove(drawing[-1])  # the caption: the lines above say it
    place = {"x": str(x), "y": str(HEAD), "width": str(WIDTH), "height": str(HEIGHT)}
    drawing.attrib.update(place, viewBox=f"{LEFT} {TOP} {WIDTH} {HEIGHT}")
    return drawing


def _line(root: ET.Element, text: str, attributes: dict[str, str]) -> None:
    ET.SubElement(root, f"{{{SVG}}}text", attributes).text = text


def main(arguments: list[str]) -> int:
    """Write the pictures, or compare them with what is there; the exit code says whether they agree."""
    path, picture = FOLDER / "norms.svg", strip()
    if arguments == ["--check"]:
        current = path.is_file() and path.read_text(encoding="utf-8") == picture
        print(f"{path.name}: {'up to date' if current else 'out of date, run python docs/make_pictures.py'}")
        return 0 if current else 1
    FOLDER.mkdir(exist_ok=True)
    path.write_text(picture, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
