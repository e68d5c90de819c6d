"""Every zoo entry through every check."""

import contextlib
import os

import cases
import checks
import pytest
import table_of_checks
from torch import nn

import renorm as rn
from renorm.errors import BackendError
from renorm.kernels import extension, select

PAIRS = [
    pytest.param(case, check, id=f"{case.name}-{name}")
    for case in cases.ALL
    for name, check in checks.CHECKS.items()
    if table_of_checks.applies(case, name)
]


@pytest.mark.parametrize(("case", "check"), PAIRS)
def test_zoo(case, check):
    check(case)


@pytest.mark.parametrize(("case", "check"), PAIRS)
def test_zoo_natively(case, check, monkeypatch):
    """The inputs of the checks are small, where torch's kernels are chosen: once more with the native ones."""
    if extension.module() is None:
        pytest.skip(extension.status())
    monkeypatch.setattr(select, "faster", lambda *_: True)
    check(case)


BY_TRITON = os.environ.get("RENORM_TEST_DEVICE", "cpu") != "cpu" or os.environ.get("TRITON_INTERPRET") == "1"


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of NumPy in the interpreter, where a GPU gives infinity or NaN
@pytest.mark.parametrize(("case", "check"), PAIRS if BY_TRITON else [])
def test_zoo_by_triton(case, check, monkeypatch):
    """On a GPU, or in Triton's interpreter: with its kernels wherever they can run."""
    choose = select.choose

    def triton_first(*arguments, **options):
        if options.get("backend", "auto") == "auto":
            with contextlib.suppress(BackendError):
                return choose(*arguments, **options | {"backend": "triton"})
        return choose(*arguments, **options)

    monkeypatch.setattr(select, "choose", triton_first)
    check(case)


def test_exemptions_name_real_checks():
    assert all(set(case.exempt) <= set(checks.CHECKS) for case in cases.ALL)


def test_every_public_layer_is_checked():
    tested = {case.name.split("-")[0] for case in cases.ALL}
    layers = {
        name for name in rn.__all__ if isinstance(getattr(rn, name), type) and issubclass(getattr(rn, name), nn.Module)
    }
    # Local response norm has no sets: test_local.py. What normalizes weights, or a recurrence, has tests of its own.
    others = {"LocalResponseNorm", "CosineLinear", "CosineConv1d", "CosineConv2d", "CosineConv3d"}
    others |= {"LayerNormLSTM", "LayerNormGRU"}
    assert layers - others - {"SwitchNorm"} <= tested


def test_the_table_is_what_was_checked():
    found = table_of_checks.PAGE.read_text(encoding="utf-8")
    assert found == table_of_checks.table(), "write it again: python tests/table_of_checks.py"
