"""The user's own code by reference: "package.module:function" or "path/to/file.py:function"."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import nn

from renorm.errors import StudyError

__all__ = ["Reference"]


@dataclass(frozen=True)
class Reference:
    """A function without arguments, by name: it builds a model, or returns data.

    The current folder and the file's own folder are put on ``sys.path`` and stay there, as Python does with a
    script's folder, because the function may import from them when it is called.
    """

    text: str  # "package.module:function" or "path/to/file.py:function"

    @property
    def __name__(self) -> str:
        return self.text.rpartition(":")[2]

    def resolve(self) -> Callable[[], Any]:
        """The function itself.

        Raises:
            StudyError: there is no such module, file or function, or importing it fails.
        """
        module, _, name = self.text.rpartition(":")
        function = getattr(_load(module), name, None)
        if not callable(function):
            raise StudyError(f"{module} must have the function that is named; it has no function {name!r}")
        return function  # type: ignore[no-any-return]

    def __call__(self) -> nn.Module:
        """The model that the function builds.

        Raises:
            StudyError: the function raises, or returns something else than a module.
        """
        function = self.resolve()
        try:
            model = function()
        # the user's code may raise anything
        except (Exception, SystemExit) as error:
            raise StudyError(f"{self.text} must build a model without arguments; it raised {_told(error)}") from error
        if not isinstance(model, nn.Module):
            raise StudyError(f"{self.text} must return a torch.nn.Module; it returned {type(model).__name__}")
        return model


def _load(name: str) -> ModuleType:
    try:
        if not name.endswith(".py"):
            return _load_module(name)
        path = Path(name).expanduser()
        if not path.is_file():
            raise StudyError(f"a file of code must exist; there is no file {str(path)!r}")
        return _load_file(path.resolve())
    except StudyError:
        raise
    # the user's code may raise anything
    except (Exception, SystemExit) as error:
        raise StudyError(f"the module {name!r} must be importable; it raised {_told(error)}") from error


def _load_module(name: str) -> ModuleType:
    _put_on_path(Path.cwd())
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise StudyError(
            f"a module must be importable from the current folder; {error}; "
            "write package.module:function or path/to/file.py:function"
        ) from None


@lru_cache  # by the whole path: the current folder may change
def _load_file(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"renorm_user_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    _put_on_path(path.parent)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses and pickle look their module up there
    spec.loader.exec_module(module)
    return module


def _put_on_path(folder: Path) -> None:
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))


def _told(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"
