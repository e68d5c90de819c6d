"""The command line: parse, call, print."""

from __future__ import annotations

import importlib.metadata
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

try:
    import typer
    from rich.console import Console
    from rich.markup import escape
except ModuleNotFoundError as error:
    raise SystemExit(f"{error}: the command line needs: pip install 'renorm[compare]'") from None

__all__ = ["main"]

main = typer.Typer(
    help="The workbench for normalization in deep networks.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # brackets in a help text are brackets
)


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"renorm {importlib.metadata.version('renorm')}")
        raise typer.Exit


@main.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """The workbench for normalization in deep networks."""


def _axis(text: str) -> Any:
    return typer.Option(help=text + "; commas between values, or the option again.", metavar="A,B,...")


@main.command()
def compare(
    data: Annotated[
        str | None,
        typer.Option(
            help="digits, wine, breast_cancer, diabetes; a .csv, .tsv, .parquet or .npz file; "
            "a folder of images by class; module:function or file.py:function.  [default: digits]"
        ),
    ] = None,
    target: Annotated[str | None, typer.Option(help="The column of a table to predict.")] = None,
    task: Annotated[
        str | None, typer.Option(help="classification, regression, or auto to see it from the target.")
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            help="mlp, cnn, resnet, transformer; or module:function or file.py:function that builds yours, "
            "whose norms are then replaced.  [default: mlp]"
        ),
    ] = None,
    norm: Annotated[
        list[str] | None,
        _axis("none, batch, layer, instance, group, group(32), rms, switch, or a pattern"),
    ] = None,
    batch_size: Annotated[list[str] | None, _axis("Samples a step  [default: 2,32]")] = None,
    lr: Annotated[
        list[str] | None, _axis("Learning rates at batch size 32  [default: 0.1, in a regression 0.01]")
    ] = None,
    lr_scale: Annotated[
        str | None, typer.Option(help="linear: lr * batch size / 32; none: lr as it is.  [default: linear]")
    ] = None,
    tune_lr: Annotated[
        bool | None,
        typer.Option(
            "--tune-lr",
            help="Choose the rate for each norm and batch size on the validation part, from --lr or a default range.",
        ),
    ] = None,
    optimizer: Annotated[list[str] | None, _axis("sgd, momentum, adam, adamw, ...  [default: sgd]")] = None,
    activation: Annotated[list[str] | None, _axis("relu, gelu, tanh, ...  [default: relu]")] = None,
    seeds: Annotated[str | None, typer.Option(help="How many seeds, or the seeds: 7,8,9.  [default: 3]")] = None,
    epochs: Annotated[int | None, typer.Option(help="Passes over the training part.  [default: 15]")] = None,
    valid: Annotated[float | None, typer.Option(help="Share of the samples for validation.  [default: 0.2]")] = None,
    test: Annotated[float | None, typer.Option(help="Share of the samples for the test.  [default: 0.2]")] = None,
    split_seed: Annotated[int | None, typer.Option(help="Decides which samples these are.  [default: 0]")] = None,
    name: Annotated[
        str | None, typer.Option(help="The study's name and folder.  [default: from data and model]")
    ] = None,
    study: Annotated[Path | None, typer.Option(help="A TOML file of these settings; options override it.")] = None,
    out: Annotated[Path, typer.Option(help="The folder that holds the studies' folders.")] = Path("renorm-runs"),
    jobs: Annotated[int | None, typer.Option(help="Trials at the same time.  [default: one for each core]")] = None,
    backend: Annotated[str, typer.Option(help="joblib's backend: loky, dask or ray.")] = "loky",
) -> None:
    """Train one model with different norms on your data, and say what that shows.

    Without options: an MLP on scikit-learn's digits, six norms, batch sizes 2 and 32, three seeds. Ctrl-C
    keeps the trials that have ended; the same command goes on from there.
    """
    given = {
        "data": data, "target": target, "task": task, "model": model, "norm": norm, "batch_size": batch_size,
        "lr": lr, "lr_scale": lr_scale, "tune_lr": tune_lr, "optimizer": optimizer, "activation": activation,
        "seeds": seeds, "epochs": epochs, "valid": valid, "test": test, "split_seed": split_seed,
        "name": name,
    }  # fmt: skip
    settings = {key: value for key, value in given.items() if value is not None}
    with _told():
        from renorm.comparison import Study, run_study
        from renorm.comparison.progress import duration
        from renorm.comparison.terminal import table

        start = time.monotonic()
        plan = Study(**settings) if study is None else Study.from_toml(study, **settings)
        comparison = run_study(plan, out=out, jobs=jobs, backend=backend)
        report = comparison.report()
        console = Console()
        console.print(table(comparison.analysis))
        console.print(comparison.sentence, markup=False, highlight=False)
        for note in (*comparison.analysis.notes, *comparison.notes):
            console.print(f"note: {note}", markup=False, highlight=False)
        console.print(f"took {duration(time.monotonic() - start)}; report: ", end="", highlight=False)
        console.print(str(report), markup=False, highlight=False, soft_wrap=True)


@main.command()
def explain(
    norm: Annotated[
        str | None,
        typer.Argument(help="batch, group, rms, LayerNorm2d, gn, ...; all cards in a table where it is left out."),
    ] = None,
    lang: Annotated[str, typer.Option(help="en or zh.")] = "en",
) -> None:
    """What a norm computes and costs, where it is strong and weak, and who says so."""
    with _told():
        from renorm import cards

        console = Console()
        width = min(console.width, 110)
        text = cards.contents(lang, width) if norm is None else cards.explain(norm, lang).to_text(width)
        console.print(text, markup=False, highlight=False, soft_wrap=True)


@contextmanager
def _told() -> Iterator[None]:
    """Turn the errors that a user can cause into one red message and an exit code."""
    from renorm.errors import RenormError

    try:
        yield
    except RenormError as error:
        raise _fail(str(error), 2) from None
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] in ("torch", "renorm"):
            raise
        raise _fail(f"{error}: install what the command needs: pip install 'renorm[compare]'", 1) from None
    except KeyboardInterrupt as stop:
        raise _fail(f"interrupted: {stop}" if str(stop) else "interrupted", 130) from None
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        raise _fail(f"{where}{error.strerror or error}", 1) from None


def _fail(message: str, code: int) -> typer.Exit:
    Console(stderr=True).print(f"[red]{escape(message)}[/red]", highlight=False, soft_wrap=True)
    return typer.Exit(code)
