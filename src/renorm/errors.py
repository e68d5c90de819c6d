"""The errors a user's mistake can raise; each says what must hold, what came, and what to write instead."""

__all__ = [
    "BackendError",
    "DataError",
    "DiagnosisError",
    "LossError",
    "MeasureError",
    "PatternError",
    "RenormError",
    "RuleError",
    "ShapeError",
    "StudyError",
    "SwapError",
    "UnknownNormError",
]


class RenormError(Exception):
    """Base of every error renorm raises on purpose."""


class PatternError(RenormError, ValueError):
    """A pattern that cannot be read, or axis sizes that do not fit it.

    The message ends with the pattern and a caret under the place that is wrong.
    """

    def __init__(self, message: str, text: str = "", column: int | None = None, width: int = 1) -> None:
        self.text = text
        self.column = column
        self.width = width
        if column is not None:
            message = f"{message}\n    {text}\n    {' ' * column}{'^' * max(width, 1)}"
        super().__init__(message)

    def __reduce__(self) -> tuple[object, ...]:
        return (_restore, (type(self), self.args[0], self.text, self.column, self.width))


def _restore(kind: type[PatternError], message: str, text: str, column: int | None, width: int) -> PatternError:
    error = kind(message)
    error.text, error.column, error.width = text, column, width
    return error


class ShapeError(RenormError, ValueError, RuntimeError):
    """A tensor whose rank or size does not fit the layer.

    It is both a ValueError and a RuntimeError because torch raises one or the other for the same mistake.
    """


class BackendError(RenormError, RuntimeError):
    """A kernel backend was asked for by name and cannot run here."""


class UnknownNormError(RenormError, ValueError):
    """A norm was named in words, such as ``"group(32)"``, and there is none of that name."""


class SwapError(RenormError, ValueError):
    """A norm could not be replaced in a model, or nothing matched the rule."""


class DataError(RenormError, ValueError):
    """The user's data cannot be used as it is: names file, column and row where it can."""


class StudyError(RenormError, ValueError):
    """A study's settings are wrong: an unknown key, an empty axis, a value out of range."""


class MeasureError(RenormError, ValueError):
    """A measure was given what it is not defined for: no probabilities, an unknown kind, values that are not finite."""


class LossError(RenormError, ValueError):
    """An output and a target that no loss fits, or not the one that was asked for."""


class RuleError(RenormError, ValueError):
    """A diagnostic rule cannot be registered, or `check` was given what it cannot run."""


class DiagnosisError(RenormError, RuntimeError):
    """`watch` found an error and was told to raise it; `report` has the findings."""

    def __init__(self, message: str, report: object = None) -> None:
        super().__init__(message)
        self.report = report
