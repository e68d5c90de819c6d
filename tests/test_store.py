"""The store: what it keeps comes back whole, and damage is seen."""

from __future__ import annotations

import errno
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import small
from made_up import record as made_record

from renorm.comparison.data import Splits
from renorm.comparison.spec import EpochRecord, TrialResult
from renorm.comparison.store import Store
from renorm.errors import StudyError


def result(loss: float = 0.5) -> TrialResult:
    (spec,) = small.specs(norm="batch", seeds=1)
    curve = (EpochRecord(6, 1.0, loss, 0.25),)
    return TrialResult(spec, "ok", "é \ud800", {"error": 0.25, "loss": loss}, {}, curve, 7, 6, 1e-4, 1.5)


def test_a_result_comes_back_as_it_was(tmp_path: Path) -> None:
    with Store(tmp_path / "deep" / "study").open() as store:
        store.write(result())
    assert Store(tmp_path / "deep" / "study").read([result().spec.key]) == {result().spec.key: result()}


@pytest.mark.parametrize("loss", [math.inf, -math.inf, math.nan])
def test_numbers_that_are_not_finite_come_back(tmp_path: Path, loss: float) -> None:
    with Store(tmp_path).open() as store:
        store.write(result(loss))
    (back,) = store.read([result().spec.key]).values()
    assert repr(back.curve[0].valid_loss) == repr(loss)


def test_a_key_without_a_file_is_left_out(tmp_path: Path) -> None:
    store = Store(tmp_path)
    assert store.read(["0" * 16]) == {}
    assert store.notes == []


def test_a_file_cut_off_anywhere_counts_as_not_run(tmp_path: Path) -> None:
    with Store(tmp_path).open() as store:
        store.write(result())
    (path,) = (tmp_path / "trials").iterdir()
    whole = path.read_bytes().rstrip()
    for length in range(0, len(whole), 7):
        path.write_bytes(whole[:length])
        fresh = Store(tmp_path)
        assert fresh.read([path.stem]) == {}
        assert len(fresh.notes) == 1
        assert f"{path} is damaged" in fresh.notes[0]


@pytest.mark.parametrize("text", ["[]", "3", '{"spec": {}}', '{"spec": 3}', "null", "\x00\x00"])
def test_a_file_that_is_no_result_counts_as_not_run(tmp_path: Path, text: str) -> None:
    with Store(tmp_path).open() as store:
        (tmp_path / "trials" / "0123.json").write_text(text)
    assert store.read(["0123"]) == {}
    assert "is damaged" in store.notes[0]


def test_a_file_under_another_name_counts_as_not_run(tmp_path: Path) -> None:
    with Store(tmp_path).open() as store:
        store.write(result())
    (path,) = (tmp_path / "trials").iterdir()
    path.rename(path.with_stem("f" * 16))
    assert store.read(["f" * 16]) == {}
    assert store.read(["f" * 16]) == {}
    assert len(store.notes) == 1, "a note is made once"
    assert "holds another trial" in store.notes[0]


def test_leftovers_of_killed_runs_are_removed(tmp_path: Path) -> None:
    (tmp_path / "trials").mkdir()
    left = [tmp_path / "data.npz.77.tmp", tmp_path / "trials" / "0123.json.77.tmp"]
    for path in left:
        path.write_text("half a fi")
    with Store(tmp_path).open():
        assert not any(path.exists() for path in left)


@pytest.mark.parametrize("name", ["fsync", "replace"])
def test_a_full_disk_leaves_the_former_result_and_no_rubbish(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    def full(*args: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with Store(tmp_path).open() as store:
        store.write(result(0.5))
        monkeypatch.setattr(os, name, full)
        with pytest.raises(OSError, match="No space left"):
            store.write(result(0.75))
    assert [item.valid["loss"] for item in store.read([result().spec.key]).values()] == [0.5]
    assert len(list((tmp_path / "trials").iterdir())) == 1


def test_the_record_and_the_data_come_back(tmp_path: Path) -> None:
    with Store(tmp_path).open() as store:
        record = made_record([result()])
        store.write_record(record)
        store.write_data(small.splits())
    assert store.read_record() == record
    assert Splits.load(store.data).fingerprint == small.splits().fingerprint
    assert json.loads((tmp_path / "study.json").read_text())["keys"] == [result().spec.key]


@pytest.mark.parametrize("text", ["{", "[]", '{"keys": []}'])
def test_a_damaged_record_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "study.json").write_text(text)
    with pytest.raises(StudyError, match=r"study\.json is damaged .*: run the study again"):
        Store(tmp_path).read_record()


def test_a_folder_without_a_study_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StudyError, match=r"must be the folder of a study; it has no study\.json"):
        Store(tmp_path).read_record()


def test_two_processes_cannot_write_one_study(tmp_path: Path) -> None:
    code = (
        "import sys; from renorm.comparison.store import Store\n"
        "with Store(sys.argv[1]).open():\n    print('open', flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "open\n"
        with pytest.raises(StudyError, match="is in use by another one"), Store(tmp_path).open():
            pass
        other.kill()
        other.wait()
        with Store(tmp_path).open():
            pass  # the system has given the lock of the killed process back
    with Store(tmp_path).open(), pytest.raises(StudyError, match="in use"), Store(tmp_path).open():
        pass


def test_a_file_system_without_locks_is_noted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fcntl = pytest.importorskip("fcntl")

    def none(*args: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", none)
    with Store(tmp_path).open() as store:
        assert "without locks" in store.notes[0]
