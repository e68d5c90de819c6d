"""Folders of images, one folder a class."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image, UnidentifiedImageError

from renorm.errors import DataError

__all__ = ["MAX_BYTES", "SUFFIXES", "Pictures", "read"]

SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
MAX_BYTES = 8 * 2**30  # of all images as float32; training holds them all in memory

_PARTS = {"train": "train", "training": "train", "valid": "valid", "validation": "valid", "val": "valid"}
_PARTS |= {"test": "test", "testing": "test"}
# A palette's numbers and the packed bits mean nothing as brightness
_DECODED = {"P": "RGB", "1": "L"}


@dataclass(frozen=True, eq=False)
class Pictures:
    """The images of a folder, all of one size and mode."""

    x: npt.NDArray[np.generic]  # (N, C, H, W), as the files store them: 0 to 255 in most
    labels: npt.NDArray[np.str_]  # (N,): the name of the folder each image lies in
    part: npt.NDArray[np.str_]  # (N,): "train", "valid" or "test"; all "train" where the folder names no parts
    notes: tuple[str, ...]  # what was seen and decided, in sentences


def read(folder: Path) -> Pictures:
    """All images of `folder/class/*.png`, or of `folder/train/class/*.png`, `folder/test/class/*.png`, ...

    Other files are passed over, with a note; sub-folders of a class belong to it.

    Raises:
        DataError: no class folders or no images in one, a file that is not an image, or images that differ
        in size
            or mode; the message names the file.
    """
    parts = _parts(folder)
    files = [(path, name, part) for part, root in parts for name, path in _files(root)]
    first = _open(files[0][0])
    if len(files) * first.size * 4 > MAX_BYTES:
        raise DataError(
            f"{folder}: all images must fit into memory ({MAX_BYTES / 2**30:g} GiB as float32); "
            f"{len(files)} images of shape {first.shape} do not; write them smaller"
        )
    x = np.empty((len(files), *first.shape), first.dtype)
    for index, (path, _, _) in enumerate(files):
        image = first if index == 0 else _open(path)
        if image.shape != first.shape or image.dtype != first.dtype:
            raise DataError(
                f"{path}: all images must have one size and mode; this one is {_shape(image)}, the first, "
                f"{files[0][0]}, is {_shape(first)}; resize or convert it"
            )
        x[index] = image
    labels = np.array([name for _, name, _ in files])
    return Pictures(x, labels, np.array([part for _, _, part in files]), _passed_over(folder))


def _parts(folder: Path) -> list[tuple[str, Path]]:
    """The training, validation and test folders; the folder itself where it is not divided."""
    named = [(_PARTS[path.name.lower()], path) for path in _folders(folder) if path.name.lower() in _PARTS]
    if all(part != "train" for part, _ in named):
        return [("train", folder)]
    twice = [path.name for part, path in named if [other for other, _ in named].count(part) > 1]
    if twice:
        raise DataError(f"{folder}: {' and '.join(twice)} name the same part; keep one of them")
    return sorted(named, key=lambda item: ("train", "valid", "test").index(item[0]))


def _files(folder: Path) -> list[tuple[str, Path]]:
    """(class, file) of all images below a folder of class folders."""
    classes = _folders(folder)
    if not classes:
        raise DataError(
            f"{folder}: a folder of images needs a folder for each class, such as {folder.name}/cat/1.png; "
            "this one has no folders"
        )
    found = []
    for path in classes:
        images = sorted(file for file in path.rglob("*") if _is_image(file))
        if not images:
            raise DataError(
                f"{path}: each class folder must hold images ({', '.join(SUFFIXES)}); this one has none; "
                "add some or remove the folder"
            )
        found += [(path.name, file) for file in images]
    return found


def _folders(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith((".", "__")))


def _is_image(path: Path) -> bool:
    return path.suffix.lower() in SUFFIXES and not path.name.startswith(".") and path.is_file()


def _open(path: Path) -> npt.NDArray[np.generic]:
    """One image as (C, H, W)."""
    try:
        with Image.open(path) as image:
            pixels = np.asarray(image.convert(_DECODED[image.mode]) if image.mode in _DECODED else image)
    # Pillow raises SyntaxError and ValueError too for files that break off or are damaged
    except (OSError, SyntaxError, ValueError, UnidentifiedImageError, Image.DecompressionBombError) as error:
        raise DataError(f"{path}: the image cannot be read: {error}; replace or remove it") from error
    return pixels[None] if pixels.ndim == 2 else np.moveaxis(pixels, -1, 0)


def _shape(image: npt.NDArray[np.generic]) -> str:
    channels, height, width = image.shape
    kind = {1: "grey", 3: "RGB", 4: "RGBA or CMYK"}.get(channels, f"{channels} channels")
    return f"{width} x {height} pixels, {kind}, {8 * image.dtype.itemsize} bit"


def _passed_over(folder: Path) -> tuple[str, ...]:
    others = [path for path in folder.rglob("*") if path.is_file() and not _is_image(path)]
    visible = sorted(path for path in others if not path.name.startswith("."))
    if not visible:
        return ()
    return (f"{len(visible)} files are no images and passed over, the first {visible[0].relative_to(folder)}",)
