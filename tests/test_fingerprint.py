"""The fingerprint of a model, and models by reference."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from renorm.comparison.fingerprint import fingerprint
from renorm.comparison.given import Given
from renorm.comparison.reference import Reference
from renorm.errors import StudyError


def layer(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))


def test_the_same_model_has_the_same_fingerprint() -> None:
    assert fingerprint(layer()) == fingerprint(layer())
    assert fingerprint(layer) == fingerprint(layer)


def test_weights_buffers_layers_and_dtype_change_it() -> None:
    changed = layer()
    changed[1].running_mean += 1  # type: ignore[index,operator]
    models = [layer(), layer(1), changed, layer().double(), nn.Sequential(*layer(), nn.ReLU())]
    assert len({fingerprint(model) for model in models}) == len(models)


def test_a_builder_is_built_without_touching_the_callers_random_numbers() -> None:
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    fingerprint(lambda: nn.Linear(2, 3))
    assert torch.equal(torch.rand(3), expected)


NET = """
from torch import nn
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(2, 3)
        self.norm = nn.BatchNorm1d(3)
    def forward(self, x):
        return self.norm(self.linear(x)) * {factor} if x is not None and "a" in {{"a", "b"}} else x
def build():
    return Net()
"""


def test_changed_code_in_a_file_changes_it(tmp_path: Path) -> None:
    found = set()
    for factor in (1, 2):
        path = tmp_path / f"net{factor}.py"
        path.write_text(NET.format(factor=factor))
        found.add(fingerprint(Reference(f"{path}:build")()))
    assert len(found) == 2


def without_file(factor: int) -> str:
    """The fingerprint of a class that has no source file, as in a notebook, from a process of its own."""
    code = (
        "import torch; from renorm.comparison.fingerprint import fingerprint\n"
        f"exec(compile('''{NET.format(factor=factor)}''', '<cell>', 'exec'))\n"
        "torch.manual_seed(0); print(fingerprint(Net()), fingerprint(build))"
    )
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout


def test_changed_code_without_a_file_changes_it_and_a_new_process_does_not() -> None:
    assert without_file(1) == without_file(1)
    assert not set(without_file(1).split()) & set(without_file(2).split())


# by reference


def test_a_file_beside_others_is_found_and_may_import_them(tmp_path: Path) -> None:
    (tmp_path / "widths_beside.py").write_text("WIDTH = 5\n")
    (tmp_path / "nets_a.py").write_text(
        "from __future__ import annotations\nfrom dataclasses import dataclass\nfrom torch import nn\n"
        "@dataclass\nclass Settings:\n    width: int\n"
        "def build():\n    from widths_beside import WIDTH\n"
        "    return nn.Linear(Settings(WIDTH).width, 1)\n"
    )
    model = Reference(f"{tmp_path / 'nets_a.py'}:build")()
    assert model.in_features == 5


def test_a_module_in_the_current_folder_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "nets_b.py").write_text("from torch import nn\ndef build():\n    return nn.BatchNorm1d(4)\n")
    monkeypatch.chdir(tmp_path)
    given = Given(Reference("nets_b:build"))
    assert given.name == "build"
    assert given.identify().startswith("nets_b:build@")


def test_other_code_of_a_reference_is_another_model(tmp_path: Path) -> None:
    def identify(name: str, text: str) -> str:
        path = tmp_path / name
        path.write_text(text)
        return Given(Reference(f"{path}:build")).identify().partition("@")[2]

    plain = "from torch import nn\ndef build():\n    return nn.BatchNorm1d(4)\n"
    assert identify("c1.py", plain) == identify("c2.py", plain)
    assert identify("c1.py", plain) != identify("c3.py", plain + "# changed\n")


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ("no_such_module_here:build", "No module named 'no_such_module_here'; write package.module:function"),
        ("no/such/file.py:build", r"a file of code must exist; there is no file 'no/such/file\.py"),
        ("torch.nn:build_it", "torch.nn must have the function .*; it has no function 'build_it'"),
        ("torch.nn:Linear", r"torch.nn:Linear must build a model without arguments; it raised TypeError: .*"),
        ("os:getcwd", r"os:getcwd must return a torch.nn.Module; it returned str"),
    ],
)
def test_a_reference_to_no_model_is_refused(reference: str, message: str) -> None:
    with pytest.raises(StudyError, match=message):
        Reference(reference)()


def test_a_file_that_cannot_be_imported_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "broken.py"
    path.write_text("1 / 0\n")
    with pytest.raises(StudyError, match="must be importable; it raised ZeroDivisionError"):
        Reference(f"{path}:build")()


def test_something_else_than_a_model_is_refused() -> None:
    with pytest.raises(StudyError, match=r"a model must be a torch.nn.Module, .* got int"):
        Given(3)  # type: ignore[arg-type]
