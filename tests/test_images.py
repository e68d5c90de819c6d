"""Folders of images by class: what is read, and every message for a folder that cannot be used."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from renorm.comparison import images
from renorm.comparison.data import load, split
from renorm.errors import DataError


def picture(seed: int, shape: tuple[int, ...] = (6, 5, 3)) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def save(path: Path, pixels: np.ndarray, mode: str | None = None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(pixels)
    (image.convert(mode) if mode else image).save(path)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for index in range(10):
        save(tmp_path / "pets" / ["cat", "dog"][index % 2] / f"{index}.png", picture(index))
    return tmp_path / "pets"


def test_images_are_read_as_they_are(folder: Path) -> None:
    dataset = load(str(folder))
    assert dataset.name == "pets"
    assert dataset.target.classes == ("cat", "dog")
    assert dataset.x.shape == (10, 3, 6, 5)
    order = [0, 2, 4, 6, 8, 1, 3, 5, 7, 9]
    expected = np.stack([picture(index).transpose(2, 0, 1) for index in order])
    np.testing.assert_array_equal(dataset.x, expected)
    np.testing.assert_array_equal(dataset.target.y, [0] * 5 + [1] * 5)


def test_folders_of_parts_are_kept(folder: Path, tmp_path: Path) -> None:
    for part, count in (("train", 8), ("Val", 4), ("test", 6)):
        for index in range(count):
            save(tmp_path / "parts" / part / ["cat", "dog"][index % 2] / f"{index}.png", picture(index, (4, 4)))
    splits = split(load(str(tmp_path / "parts")))
    assert [len(splits.y_train), len(splits.y_valid), len(splits.y_test)] == [8, 4, 6]
    assert splits.input_shape == (1, 4, 4)
    train = np.stack([picture(index, (4, 4)) for index in [0, 2, 4, 6, 1, 3, 5, 7]]).astype(float)
    np.testing.assert_allclose(splits.x_train[:, 0], (train - train.mean()) / train.std(), rtol=1e-5, atol=1e-6)


def test_a_test_folder_without_a_training_folder_is_a_class(tmp_path: Path) -> None:
    for name in ("test", "other"):
        save(tmp_path / name / "1.png", picture(1))
    assert load(str(tmp_path)).target.classes == ("other", "test")


@pytest.mark.parametrize(("mode", "channels"), [("L", 1), ("RGB", 3), ("RGBA", 4), ("P", 3), ("1", 1), ("LA", 2)])
def test_every_usual_mode_is_read(tmp_path: Path, mode: str, channels: int) -> None:
    for index in range(6):
        save(tmp_path / ["a", "b"][index % 2] / f"{index}.png", picture(index), mode)
    assert split(load(str(tmp_path))).input_shape == (channels, 6, 5)


def test_16_bit_images_keep_their_values(tmp_path: Path) -> None:
    deep = np.arange(30, dtype=np.uint16).reshape(6, 5) * 1000
    for name in "ab":
        save(tmp_path / name / "1.png", deep)
    np.testing.assert_array_equal(load(str(tmp_path)).x[0, 0], deep)


def test_other_files_are_passed_over(folder: Path) -> None:
    (folder / "cat" / "readme.txt").write_text("about cats")
    (folder / "cat" / ".DS_Store").write_text("")
    (folder / ".cache").mkdir()
    notes = load(str(folder)).notes
    assert notes[-1] == f"1 files are no images and passed over, the first {Path('cat', 'readme.txt')}"
    assert len(load(str(folder)).target.y) == 10


@pytest.mark.parametrize(
    ("pixels", "mode", "message"),
    [
        (picture(1, (5, 6, 3)), None, r"dog.3\.png.*6 x 5 pixels, RGB, 8 bit.*is 5 x 6 pixels, RGB, 8 bit"),
        (picture(1), "L", r"dog.3\.png.*5 x 6 pixels, grey, 8 bit.*resize or convert"),
        (np.zeros((6, 5), np.uint16), None, "grey, 16 bit"),
    ],
)
def test_an_image_that_differs_is_named(folder: Path, pixels: np.ndarray, mode: str | None, message: str) -> None:
    save(folder / "dog" / "3.png", pixels, mode)
    with pytest.raises(DataError, match=message):
        load(str(folder))


@pytest.mark.parametrize("keep", [0, 20, 80])
def test_a_broken_image_is_named(folder: Path, keep: int) -> None:
    path = folder / "dog" / "5.png"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(DataError, match=r"dog.5\.png: the image cannot be read"):
        load(str(folder))


def test_a_folder_needs_classes(tmp_path: Path) -> None:
    save(tmp_path / "1.png", picture(1))
    with pytest.raises(DataError, match="needs a folder for each class"):
        load(str(tmp_path))


def test_a_class_needs_images(folder: Path) -> None:
    (folder / "bird").mkdir()
    with pytest.raises(DataError, match="bird: each class folder must hold images"):
        load(str(folder))


def test_two_folders_of_one_part_are_refused(tmp_path: Path) -> None:
    for part in ("train", "val", "valid"):
        save(tmp_path / part / "a" / "1.png", picture(1))
    with pytest.raises(DataError, match="val and valid name the same part"):
        load(str(tmp_path))


def test_one_class_is_refused(tmp_path: Path) -> None:
    save(tmp_path / "cat" / "1.png", picture(1))
    with pytest.raises(DataError, match="'class' is cat in all 1 samples"):
        load(str(tmp_path))


def test_images_beyond_memory_are_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "MAX_BYTES", 10 * 90 * 4 - 1)
    with pytest.raises(DataError, match=r"10 images of shape \(3, 6, 5\) do not; write them smaller"):
        load(str(folder))


def test_images_are_classified(folder: Path) -> None:
    with pytest.raises(DataError, match="the folders of images are classes"):
        load(str(folder), task="regression")
