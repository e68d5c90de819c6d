"""The command line: what it accepts, prints and returns, and that no way of stopping it loses results."""

from __future__ import annotations

import itertools
import json
import os
import shlex
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import small
from typer.testing import CliRunner

import renorm.comparison
import renorm.comparison.api
from renorm.cli import main
from renorm.comparison.spec import TrialResult
from renorm.comparison.study import Study
from renorm.errors import StudyError

QUICK = ["--norm", "batch,layer", "--batch-size", "8", "--seeds", "2", "--epochs", "1"]
EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture
def runner(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> CliRunner:
    monkeypatch.chdir(tmp_path)
    return CliRunner(env={"COLUMNS": "200"})


def renorm_command(*arguments: str, folder: Path, **options: Any) -> subprocess.Popen[str]:
    code = "import sys; sys.argv[0] = 'renorm'; from renorm.cli import main; main()"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200", "PYTHONWARNINGS": "error"}
    return subprocess.Popen(
        [sys.executable, "-c", code, *arguments],
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


def results(folder: Path) -> dict[str, TrialResult]:
    files = sorted((folder / "trials").iterdir())
    return {path.stem: TrialResult.from_json(json.loads(path.read_text())) for path in files}


def test_a_table_from_end_to_end_and_again(runner: CliRunner, tmp_path: Path) -> None:
    small.csv(tmp_path / "table.csv")
    command = ["compare", "--data", "table.csv", "--target", "kind", *QUICK, "--jobs", "2"]
    out, err = (first := renorm_command(*command, folder=tmp_path)).communicate()
    assert first.returncode == 0, err
    folder = tmp_path / "renorm-runs" / "table-mlp"
    assert (folder / "report.html").is_file()
    assert "4 of 4 trials" in err
    for expected in ("batch norm", "layer norm", "test error", "took ", str(Path("renorm-runs/table-mlp/report.html"))):
        assert expected in out
    kept = results(folder)
    assert {result.status for result in kept.values()} == {"ok"}

    again = runner.invoke(main, command)
    assert again.exit_code == 0
    assert "of 4 trials" not in again.stderr, "nothing is left to be run"
    assert results(folder) == kept


def stop_after_the_first_lines(command: list[str], folder: Path, how: int) -> tuple[str, int]:
    """Start the command, send its whole process group a signal when some trials are kept; what it said then."""
    process = renorm_command(*command, folder=folder, start_new_session=True)
    assert process.stderr is not None
    before = list(itertools.takewhile(lambda line: " of 20 trials" not in line, process.stderr))
    assert "table-mlp: 120 training, 40 validation and 40 test samples; 20 trials, 2 at a time\n" in before
    if how == signal.SIGKILL:
        process.kill()  # the parent only
    else:
        os.killpg(process.pid, how)
    # The pipe ends when nobody holds it any more: neither the command nor a worker lives on.
    said = process.communicate(timeout=60)[1]
    return said, process.returncode


@pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_a_stopped_run_goes_on_where_it_was(runner: CliRunner, tmp_path: Path, how: int) -> None:
    small.csv(tmp_path / "table.csv", 200)
    command = shlex.split("compare --data table.csv --target kind --norm batch,layer --batch-size 2")
    command += ["--seeds", "10", "--epochs", "2"]
    said, code = stop_after_the_first_lines([*command, "--jobs", "2"], tmp_path, how)
    folder = tmp_path / "renorm-runs" / "table-mlp"
    kept = results(folder)
    assert 2 <= len(kept) < 20
    assert "Traceback" not in said
    if how == signal.SIGINT:
        assert code == 130
        assert f"{len(kept)} of 20 trials are kept; run the same command to go on" in said
    else:
        assert code == -signal.SIGKILL

    again = runner.invoke(main, [*command, "--jobs", "1"])
    assert again.exit_code == 0, again.stderr
    everything = results(folder)
    assert len(everything) == 20
    assert {key: everything[key] for key in kept} == kept, "kept results are not run again"
    assert "test error" in again.stdout


def test_a_model_of_the_users_own_is_trained_with_each_norm(runner: CliRunner, tmp_path: Path) -> None:
    (tmp_path / "nets.py").write_text(
        "from torch import nn\n"
        "def build():\n    return nn.Sequential(nn.Linear(13, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))\n"
    )
    result = runner.invoke(main, ["compare", "--data", "wine", "--model", "nets.py:build", *QUICK, "--jobs", "1"])
    assert result.exit_code == 0, result.stderr
    assert "1 norms of the model give way to each norm" in result.stderr
    kept = results(tmp_path / "renorm-runs" / "wine-build").values()
    assert {(trial.spec.norm, trial.status) for trial in kept} == {("batch", "ok"), ("layer", "ok")}
    assert all(trial.spec.model.startswith("nets.py:build@") for trial in kept)


NETS = """
import sys
import torch
from torch import nn

def net(width=13, classes=3, *more):
    return nn.Sequential(nn.Linear(width, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, classes), *more)

def leaves(): sys.exit(0)
def narrow(): return net(width=12)
def other(): return net(classes=4)
def lazy(): return nn.Sequential(nn.LazyLinear(8), nn.LazyBatchNorm1d(), nn.Linear(8, 3))
def plain(): return nn.Linear(13, 3)
def soft(): return net(13, 3, nn.Softmax(1))

class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = net()
    def forward(self, x): return self.net(x), x

class Leaving(nn.Module):
    calls = 0
    def __init__(self):
        super().__init__()
        self.net = net()
    def forward(self, x):
        self.calls += 1
        return self.net(x) if self.calls < 5 else sys.exit(1)
"""


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("leaves", "nets.py:leaves must build a model without arguments; it raised SystemExit: 0"),
        ("narrow", "the model must take samples of the shape (13,); it raised RuntimeError: "),
        ("other", "the model's output must have the shape (32, 3) for 32 samples of this data; it has (32, 4)"),
        ("lazy", "0 has no shape yet: run a lazy layer on a batch first"),
        ("plain", "plain must have norms, which give way to those that are compared; it has none"),
        ("Two", "the model must return one tensor; it returned a tuple"),
    ],
)
def test_a_faulty_model_of_the_users_own(runner: CliRunner, tmp_path: Path, function: str, message: str) -> None:
    (tmp_path / "nets.py").write_text(NETS)
    result = runner.invoke(main, ["compare", "--data", "wine", "--model", f"nets.py:{function}", *QUICK])
    assert result.exit_code == 2, result.stdout
    assert message in result.stderr
    assert not (tmp_path / "renorm-runs").exists(), "nothing is written"


def test_a_model_that_leaves_in_training_is_a_row(runner: CliRunner, tmp_path: Path) -> None:
    (tmp_path / "nets.py").write_text(NETS)
    result = runner.invoke(main, ["compare", "--data", "wine", "--model", "nets.py:Leaving", *QUICK, "--jobs", "1"])
    assert result.exit_code == 1
    assert "SystemExit: 1" in result.stdout


def test_a_model_that_ends_in_a_softmax_is_noted(runner: CliRunner, tmp_path: Path) -> None:
    (tmp_path / "nets.py").write_text(NETS)
    result = runner.invoke(main, ["compare", "--data", "wine", "--model", "nets.py:soft", *QUICK, "--jobs", "1"])
    assert result.exit_code == 0
    assert "the model's outputs are probabilities" in result.stderr


# what is refused; in this process, which is quicker


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--norm", "bach"], "did you mean 'batch'"),
        (["--data", "none.csv", "--target", "kind"], "none.csv"),
        (["--data", "table.csv"], "say which column to predict"),
        (["--data", "table.csv", "--target", "knd"], "did you mean 'kind'"),
        (["--batch-size", "9999"], "a batch must fit into the training part"),
        (["--seeds", "many"], "seeds: "),
        (["--study", "none.toml"], "no study file at none.toml"),
        (["--jobs", "0"], "jobs must be at least 1"),
        (["--backend", "threading"], "cannot run trials"),
        (["--model", "[red]:x"], "[red]"),
        (["--data", "table.csv", "--target", "kind:fire:"], "no column 'kind:fire:'"),
        (["--model", "no_such:build"], "No module named 'no_such'"),
    ],
)
def test_bad_input_is_one_message_and_exit_code_2(
    runner: CliRunner, tmp_path: Path, arguments: list[str], message: str
) -> None:
    small.csv(tmp_path / "table.csv")
    result = runner.invoke(main, ["compare", *arguments])
    assert result.exit_code == 2
    assert message in result.stderr
    assert "Traceback" not in result.stderr
    assert result.stdout == ""
    assert [path.name for path in tmp_path.iterdir()] == ["table.csv"], "nothing is written"


def test_a_folder_that_cannot_be_written_is_exit_code_2(runner: CliRunner, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    result = runner.invoke(main, ["compare", "--data", "wine", *QUICK, "--out", "file/runs"])
    assert result.exit_code == 2
    assert "Not a directory" in result.stderr


def test_a_study_without_any_score_is_exit_code_1(runner: CliRunner, tmp_path: Path) -> None:
    result = runner.invoke(main, ["compare", "--data", "wine", *QUICK, "--lr", "1e30", "--norm", "none", "--jobs", "1"])
    assert result.exit_code == 1
    assert "No trial has finished" in result.stdout
    assert "write a lower --lr, or let --tune-lr find one" in result.stdout
    assert "favours whoever it suits" not in result.stdout
    assert (tmp_path / "renorm-runs" / "wine-mlp" / "report.html").exists(), "it says why"


def test_a_missing_extra_is_named(runner: CliRunner, monkeypatch: pytest.MonkeyPatch) -> None:
    def lacks(study: Study, *, module: str, **options: Any) -> None:
        raise ModuleNotFoundError(f"No module named {module!r}", name=module)

    monkeypatch.setattr(renorm.comparison.api, "run_study", partial(lacks, module="plotly.io"))
    result = runner.invoke(main, ["compare"])
    assert result.exit_code == 2
    assert "No module named 'plotly.io': install what the command needs: pip install 'renorm[compare]'" in result.stderr
    monkeypatch.setattr(renorm.comparison.api, "run_study", partial(lacks, module="renorm.zzz"))
    assert isinstance(runner.invoke(main, ["compare"]).exception, ModuleNotFoundError), "that is a bug of ours"


def test_the_base_install_says_what_the_command_line_needs() -> None:
    code = "import sys; sys.modules['typer'] = None; import renorm.cli"
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert process.returncode == 1
    assert "the command line needs: pip install 'renorm[compare]'" in process.stderr


# what reaches the study


@pytest.fixture
def planned(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Study, dict[str, Any]]]:
    """The studies that the command would run."""
    calls: list[tuple[Study, dict[str, Any]]] = []

    def note(study: Study, **options: Any) -> None:
        calls.append((study, options))
        raise StudyError("planned")

    monkeypatch.setattr(renorm.comparison.api, "run_study", note)
    return calls


def test_without_options_it_is_the_default_study(runner: CliRunner, planned: list[Any]) -> None:
    runner.invoke(main, ["compare"])
    assert planned == [(Study(), {"out": Path("renorm-runs"), "jobs": None, "backend": "loky"})]


@pytest.mark.parametrize(
    "study",
    [
        Study(norm="batch,group(8)", batch_size=[4], seeds=5, epochs=7, lr_scale="none", name="mine"),
        Study(data="a file.csv", target="the kind", task="regression", optimizer="sgd,adam", seeds=[3]),
        Study(tune_lr=True, model="nets.py:build", activation="gelu,tanh", seeds=[4, 9]),
        Study(tune_lr=True, lr="0.1,1", valid=0.25, test=0.0, split_seed=3),
        Study(norm="n (g [c]) [...] g=8"),
    ],
)
def test_the_command_that_reproduces_a_study_is_that_study(runner: CliRunner, planned: list[Any], study: Study) -> None:
    runner.invoke(main, shlex.split(study.command())[1:])
    assert [call[0] for call in planned] == [study]


def test_options_may_be_repeated_and_override_a_file(runner: CliRunner, planned: list[Any], tmp_path: Path) -> None:
    (tmp_path / "study.toml").write_text('epochs = 3\nnorm = "none"\n')
    runner.invoke(main, ["compare", "--study", "study.toml", "--norm", "batch", "--norm", "rms,layer"])
    assert planned[0][0] == Study(epochs=3, norm="batch,rms,layer")


def test_the_examples_are_studies() -> None:
    files = sorted(EXAMPLES.glob("*.toml"))
    assert files
    for file in files:
        Study.from_toml(file)


# help


def test_help_is_quick_and_says_what_there_is() -> None:
    code = (
        "import sys, renorm; before = set(sys.modules)\n"
        "from renorm.cli import main\n"
        "try: main(['compare', '--help'])\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'pandas', 'sklearn', 'plotly', 'joblib', 'scipy'}\n"
        "print('loaded:', sorted(heavy & (set(sys.modules) - before)))"
    )
    environment = {**os.environ, "COLUMNS": "200"}
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert "--tune-lr" in out.stdout
    assert "loaded: []" in out.stdout


def test_the_version_is_printed(runner: CliRunner) -> None:
    result = runner.invoke(main, ["--version"])
    assert (result.exit_code, result.stdout.split()[0]) == (0, "renorm")
