"""The command line: parse, call, print."""

from __future__ import annotations

import importlib.metadata
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from time import monotonic
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


def _of_forecasts(text: str, several: bool = False) -> Any:
    metavar = "A,B,..." if several else None
    return typer.Option(help=text, metavar=metavar, rich_help_panel="Forecasts")


@main.command()
def compare(
    data: Annotated[
        str | None,
        typer.Option(
            help="digits, wine, breast_cancer, diabetes; parking, household (forecasts); a .csv, .tsv, .parquet or "
            ".npz file; a folder of images by class; module:function or file.py:function.  [default: digits]"
        ),
    ] = None,
    target: Annotated[str | None, typer.Option(help="The column of a table to predict.")] = None,
    task: Annotated[
        str | None, typer.Option(help="classification, regression, forecast, or auto to see it from the target.")
    ] = None,
    model: Annotated[
        list[str] | None,
        _axis(
            "mlp, cnn, resnet, lstm, tcn, transformer; or module:function or file.py:function that builds yours, whose "
            "norms are then replaced  [default: mlp]"
        ),
    ] = None,
    norm: Annotated[
        list[str] | None,
        _axis("none, batch, layer, instance, group, group(32), rms, switch, or a pattern; around a forecast revin"),
    ] = None,
    batch_size: Annotated[list[str] | None, _axis("Samples a step, or all of them  [default: 2,32]")] = None,
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
    loss: Annotated[
        list[str] | None, _axis("cross_entropy, label_smoothing, focal, ...; mse, mae, huber  [default: the first]")
    ] = None,
    dropout: Annotated[list[str] | None, _axis("Shares that are set to 0 in training  [default: 0]")] = None,
    seeds: Annotated[str | None, typer.Option(help="How many seeds, or the seeds: 7,8,9.  [default: 3]")] = None,
    epochs: Annotated[int | None, typer.Option(help="Passes over the training part.  [default: 15]")] = None,
    valid: Annotated[float | None, typer.Option(help="Share of the samples for validation.  [default: 0.2]")] = None,
    test: Annotated[float | None, typer.Option(help="Share of the samples for the test.  [default: 0.2]")] = None,
    split_seed: Annotated[int | None, typer.Option(help="Decides which samples these are.  [default: 0]")] = None,
    time: Annotated[str | None, _of_forecasts("The column of times: whole numbers or ISO dates.")] = None,
    series: Annotated[str | None, _of_forecasts("The column that tells series apart.")] = None,
    columns: Annotated[list[str] | None, _of_forecasts("Columns that the model sees", several=True)] = None,
    static: Annotated[list[str] | None, _of_forecasts("Columns constant in each series", several=True)] = None,
    window: Annotated[int | None, _of_forecasts("Steps of the past.  [default: two seasons, or 24]")] = None,
    horizon: Annotated[int | None, _of_forecasts("Steps to forecast.  [default: 6]")] = None,
    season: Annotated[int | None, _of_forecasts("Steps of a season.  [default: by the step's length]")] = None,
    stride: Annotated[int | None, _of_forecasts("Steps from a window to the next.  [default: at most 6000]")] = None,
    gaps: Annotated[str | None, _of_forecasts("Rows not there: cut (missing), join (no time).  [default: cut]")] = None,
    missing: Annotated[str | None, _of_forecasts("drop windows, or carry the last value on.  [default: drop]")] = None,
    aggregate: Annotated[
        list[str] | None, _of_forecasts("column=first|last|max|min|mean|sum: a bar's entry", several=True)
    ] = None,
    pooling: Annotated[
        list[str] | None, _of_forecasts("local, pooled, static  [default: pooled]", several=True)
    ] = None,
    bar: Annotated[list[str] | None, _of_forecasts("Steps in an entry of the past  [default: 1]", several=True)] = None,
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
    keeps the trials that have ended; the same command goes on from there. The exit code is 1 where no trial
    gave a score.
    """
    given = {
        "data": data, "target": target, "task": task, "model": model, "norm": norm, "batch_size": batch_size,
        "lr": lr, "lr_scale": lr_scale, "tune_lr": tune_lr, "optimizer": optimizer, "activation": activation,
        "loss": loss, "dropout": dropout, "seeds": seeds, "epochs": epochs, "valid": valid, "test": test,
        "split_seed": split_seed,
        "time": time, "series": series, "columns": columns, "static": static, "window": window, "horizon": horizon,
        "season": season, "stride": stride, "gaps": gaps, "missing": missing, "aggregate": aggregate,
        "pooling": pooling, "bar": bar, "name": name,
    }  # fmt: skip
    settings: dict[str, Any] = {key: value for key, value in given.items() if value is not None}
    # Lists of columns are taken literally elsewhere, so that a name may have a comma.
    settings |= {key: ",".join(settings[key]) for key in ("columns", "static", "aggregate") if key in settings}
    with _told():
        from renorm.comparison import Study, run_study
        from renorm.comparison.progress import duration
        from renorm.comparison.terminal import TerminalTable

        start = monotonic()
        plan = Study(**settings) if study is None else Study.from_toml(study, **settings)
        comparison = run_study(plan, out=out, jobs=jobs, backend=backend)
        report = comparison.report()
        console = Console(emoji=False)
        console.print(TerminalTable(comparison.analysis))
        console.print(comparison.sentence, markup=False, highlight=False)
        for note in (*comparison.analysis.notes, *comparison.notes):
            console.print(f"note: {note}", markup=False, highlight=False)
        console.print(f"took {duration(monotonic() - start)}; report: ", end="", highlight=False)
        console.print(str(report), markup=False, highlight=False, soft_wrap=True)
        if not any(row.score.num for row in comparison.analysis.rows):
            raise typer.Exit(1)


@main.command()
def check(
    program: Annotated[
        str,
        typer.Argument(
            help="module:function or file.py:function; it returns a model, (model, loss, optimizer, loader), or a dict "
            "of renorm.check's arguments.",
            metavar="PROGRAM",
        ),
    ],
    format: Annotated[str, typer.Option(help="text, json, sarif or github (annotations).")] = "text",
    output: Annotated[Path | None, typer.Option(help="Write to this file, and one line to the terminal.")] = None,
    ignore: Annotated[
        list[str] | None, typer.Option(help="Rules to leave out; commas, or the option again.", metavar="ID,...")
    ] = None,
    include: Annotated[
        list[str] | None, typer.Option(help="Rules that are left out otherwise: C29.", metavar="ID,...")
    ] = None,
    strict: Annotated[bool, typer.Option("--strict", help="Warnings count as errors do.")] = False,
    seed: Annotated[int, typer.Option(help="Set before the function is called.")] = 0,
) -> None:
    """Look for mistakes in a training program on one batch, before it trains.

    Ends with 0 where there is no error, with 1 where there is one, with 2 where the program cannot be checked.
    """
    with _told():
        from renorm.diagnose import check as look
        from renorm.diagnose.formats import FORMATS, Checked, show
        from renorm.diagnose.program import arguments, place_of
        from renorm.errors import RuleError

        if format not in FORMATS:
            raise RuleError(f"--format is one of {', '.join(FORMATS)}; got {format!r}")
        build, returned = _built(program, seed)
        given = arguments(returned, program)
        with _users(program, "must give a batch that can be looked at"):
            report = look(**given, ignore=_several(ignore), include=_several(include))
        places = tuple(place_of(finding, given["model"], build) for finding in report.findings)
        checked = Checked(report, program, places)
        if output is not None:
            output.write_text(FORMATS[format](checked) + "\n", encoding="utf-8")
            typer.echo(f"{program}: {report.summary}; written to {output}")
        elif format == "text":
            show(checked, Console(emoji=False))
        else:
            typer.echo(FORMATS[format](checked))
        failing = ("error", "warning") if strict else ("error",)
        if any(finding.severity in failing for finding in report.findings):
            raise typer.Exit(1)


def _built(program: str, seed: int) -> tuple[Callable[..., Any], Any]:
    """The function that is named, and what it returned."""
    import torch

    from renorm.comparison.reference import Reference
    from renorm.errors import RuleError

    if not program.rpartition(":")[0]:
        raise RuleError(f"a program is module:function or file.py:function; got {program!r}")
    with redirect_stdout(sys.stderr):
        build = Reference(program).resolve()
    torch.manual_seed(seed)
    with _users(program, "must return what is to be checked"):
        return build, build()


@contextmanager
def _users(program: str, must: str) -> Iterator[None]:
    """Run the user's code: what it prints is no part of the report, and where it fails is told."""
    from renorm.errors import RenormError, RuleError

    try:
        with redirect_stdout(sys.stderr):
            yield
    except RenormError:
        raise
    except (Exception, SystemExit) as error:  # the user's code may raise anything
        traceback.print_exc()
        raise RuleError(f"{program} {must}; it raised {type(error).__name__}: {error}") from error


def _several(given: list[str] | None) -> tuple[str, ...]:
    return tuple(word.strip() for text in given or () for word in text.split(",") if word.strip())


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

        console = Console(emoji=False)
        width = min(console.width, 110)
        text = cards.contents(lang, width) if norm is None else cards.explain(norm, lang).to_text(width)
        console.print(text, markup=False, highlight=False, soft_wrap=True)


@main.command()
def study(
    name: Annotated[str, typer.Argument(help="A study's name, or: list.")],
    quick: Annotated[bool, typer.Option("--quick", help="The small form, of at most some minutes.")] = False,
    out: Annotated[Path, typer.Option(help="The folder that holds the studies' folders.")] = Path("renorm-runs"),
    jobs: Annotated[int | None, typer.Option(help="Measurements at once.  [default: one for each core]")] = None,
) -> None:
    """Run a published finding again, and say whether it comes out.

    Ctrl-C keeps what has been measured; the same command goes on from there.
    """
    with _told():
        from rich.progress import Progress

        from renorm.studies import catalogue
        from renorm.studies.page import summary, write
        from renorm.studies.run import run

        console = Console(emoji=False)
        if name == "list":
            width = max(map(len, catalogue.NAMES))
            for each in catalogue.NAMES:
                console.print(f"{each:<{width}}  {catalogue.get(each).question}", markup=False, highlight=False)
            return
        with Progress(console=Console(stderr=True, emoji=False), transient=True) as progress:
            task = progress.add_task(name)
            results, folder = run(
                name, quick=quick, out=out, jobs=jobs,
                on_row=lambda done, total: progress.update(task, completed=done, total=total),
            )  # fmt: skip
        console.print(summary(results), markup=False, highlight=False, soft_wrap=True)
        console.print(f"page: {write(results, folder)}", markup=False, highlight=False, soft_wrap=True)


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
        raise _fail(f"{error}: install what the command needs: pip install 'renorm[compare]'", 2) from None
    except KeyboardInterrupt as stop:
        raise _fail(f"interrupted: {stop}" if str(stop) else "interrupted", 130) from None
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        raise _fail(f"{where}{error.strerror or error}", 2) from None


def _fail(message: str, code: int) -> typer.Exit:
    Console(stderr=True, emoji=False).print(f"[red]{escape(message)}[/red]", highlight=False, soft_wrap=True)
    return typer.Exit(code)
