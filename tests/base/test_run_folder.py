"""run_folder.py: whatever a run's files have become, one error names the file, and all other runs stay in sight."""

import ast
import ctypes
import json
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import tundish
from tundish import cli
from tundish import foundation_model as fm
from tundish.base.run_folder import RunFolder
from tundish.errors import RunDamagedError, RunNotFoundError
from tundish.plan.spec import RunSpec

MakeRun = Callable[..., RunFolder]
Damage = Callable[[RunFolder], None]


def _text(name: str, text: str | bytes) -> Damage:
    return lambda run: _write(run.folder / name, text)


def _write(path: Path, text: str | bytes) -> None:
    path.write_bytes(text.encode() if isinstance(text, str) else text)


def _changed(name: str, **changes: Any) -> Damage:
    def change(run: RunFolder) -> None:
        path = run.folder / name
        record = json.loads(path.read_text()) | changes
        path.write_text(json.dumps({key: value for key, value in record.items() if value is not ...}))

    return change


def _cut(name: str) -> Damage:
    return lambda run: os.truncate(run.folder / name, (run.folder / name).stat().st_size // 2)


def _folder(name: str) -> Damage:
    def damage(run: RunFolder) -> None:
        (run.folder / name).unlink(missing_ok=True)
        (run.folder / name).mkdir()

    return damage


def _pipe(name: str) -> Damage:
    def damage(run: RunFolder) -> None:
        (run.folder / name).unlink(missing_ok=True)
        os.mkfifo(run.folder / name)

    return damage


def _line(text: str) -> Damage:
    def append(run: RunFolder) -> None:
        with open(run.events, "a") as file:
            file.write(text + "\n")

    return append


def _loop(run: RunFolder) -> None:
    run.spec.unlink()
    run.spec.symlink_to(run.spec)


def _file_for_folder(run: RunFolder) -> None:
    shutil.rmtree(run.folder)
    run.folder.write_text("notes")


NOW = '"time": "2026-11-21T10:00:00+00:00"'
TRACKING = "results/tracking.json"
DAMAGES: dict[str, tuple[Damage, str, str]] = {
    "spec cut": (_cut("spec.json"), "spec.json", "is not JSON, or was cut off"),
    "spec empty": (_text("spec.json", ""), "spec.json", "is empty"),
    "spec of no fields": (_text("spec.json", "{}"), "spec.json", "lacks 'created_by'; lacks 'created_at'"),
    "spec a list": (_text("spec.json", "[1]"), "spec.json", "must contain a JSON object, not [1]"),
    "spec binary": (_text("spec.json", b"\xff\xfe\x00spec" * 9), "spec.json", "is not "),
    "spec nested without end": (_text("spec.json", "[" * 200_000), "spec.json", "is not JSON"),
    "spec of a newer version": (_changed("spec.json", version=2, more=1), "spec.json", "newer version of tundish (for"),
    "spec with an unknown field": (_changed("spec.json", lora_rank=8), "spec.json", "has 'lora_rank', which this vers"),
    "spec with a wrong type": (_changed("spec.json", learning_rate="x"), "spec.json", "must be a number, not \"x\""),
    "spec with a wrong part": (_changed("spec.json", compute=[]), "spec.json", "'compute': must be an object, not []"),
    "spec with a wrong unit": (
        _changed("spec.json", training_duration={"value": 1, "unit": "h"}), "spec.json", "'ep' or 'ba' or 'tok'",
    ),
    "spec with a wrong time": (_changed("spec.json", created_at="now"), "spec.json", "Invalid isoformat string: 'now'"),
    "spec with a local time": (_changed("spec.json", created_at="2026-11-21"), "spec.json", "a time with a time zone"),
    "spec of a time before all": (
        _changed("spec.json", created_at="0001-01-01T00:00:00+14:00"), "spec.json", "from 1970 to 9998",
    ),
    "spec of a time after all": (
        _changed("spec.json", created_at="9999-12-31T23:59:59-12:00"), "spec.json", "from 1970 to 9998",
    ),
    "spec of another run": (_changed("spec.json", run_name="b"), "spec.json", "is of the run 'b': this folder was"),
    "spec missing": (lambda run: run.spec.unlink(), "spec.json", "is missing"),
    "spec a folder": (_folder("spec.json"), "spec.json", "is a folder"),
    "spec a pipe": (_pipe("spec.json"), "spec.json", "is not a regular file"),
    "spec a link to itself": (_loop, "spec.json", "cannot be read (Too many levels of symbolic links)"),
    "tracking missing": (lambda run: run.result("tracking").unlink(), TRACKING, "is missing"),
    "tracking without keys": (_changed(TRACKING, run_id=..., save_folder=...), TRACKING, "lacks 'run_id'; lacks 'save"),
    "tracking of numbers": (_changed(TRACKING, experiment_id=7), TRACKING, "'experiment_id': must be text, not 7"),
    "results a file": (
        lambda run: (shutil.rmtree(run.folder / "results"), _write(run.folder / "results", ""))[1],
        TRACKING, "cannot be read (Not a directory)",
    ),
    "event of a number as time": (_line('{"type": "STARTED", "time": 5, "message": ""}'), "events.jsonl", "line 2 is"),
    "event without message": (_line(f'{{"type": "STARTED", {NOW}}}'), "events.jsonl", "line 2 is not an event: "),
    "event without zone": (
        _line('{"type": "STARTED", "time": "2026-11-21", "message": ""}'), "events.jsonl", "line 2 is not",
    ),
    "event of a time before all": (
        _line('{"type": "STARTED", "time": "0001-01-01T00:00:00+14:00", "message": ""}'), "events.jsonl", "line 2 is",
    ),
    "event of a list": (_line('["STARTED"]'), "events.jsonl", "line 2 is not"),
    "event whose type is a list": (_line(f'{{"type": [], {NOW}, "message": ""}}'), "events.jsonl", "line 2 is not"),
    "event with a wrong fact": (
        _line(f'{{"type": "TRAIN_UPDATED", {NOW}, "message": "", "eta_s": "soon"}}'), "events.jsonl", "line 2 is not",
    ),
    "events of zeros": (_text("events.jsonl", b"\0" * 5000 + b"\n"), "events.jsonl", "contains no event"),
    "events a folder": (_folder("events.jsonl"), "events.jsonl", "is a folder"),
    "events missing": (lambda run: run.events.unlink(), "events.jsonl", "is missing"),
    "supervisor empty": (_text("supervisor.json", ""), "supervisor.json", "is empty"),
    "supervisor of an unknown launcher": (
        _text("supervisor.json", '{"launcher": "ray"}'), "supervisor.json", "must be local or slurm, not 'ray'",
    ),
    "supervisor of an odd launcher": (
        _text("supervisor.json", '{"launcher": []}'), "supervisor.json", "launcher must be local or slurm, not []",
    ),
    "supervisor without fields": (
        _text("supervisor.json", '{"launcher": "local", "pid": "7"}'), "supervisor.json", "lacks 'ticks'",
    ),
    "a file instead of a folder": (_file_for_folder, "", "must be a folder, as of a run. Move it elsewhere"),
}  # fmt: skip


def _cli(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code = cli.main(arguments)
    said = capsys.readouterr()
    return code, said.out, said.err


@pytest.mark.parametrize(("damage", "file", "what"), DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_run_is_listed_as_one_and_named_by_every_command(
    make_run: MakeRun, capsys: pytest.CaptureFixture[str], damage: Damage, file: str, what: str
) -> None:
    """`tundish list` would end with a traceback for a file that somebody has touched, and no run be seen any more."""
    make_run("good", ("COMPLETED", "done"))
    bad = make_run("bad", ("CREATED", "waits"))
    damage(bad)
    path = str(bad.folder / file if file else bad.folder)
    code, out, err = _cli(capsys, "list")
    assert code == 0 and "good  COMPLETED" in out and "bad   DAMAGED" in out
    assert path in out + err and what in out + err
    code, out, err = _cli(capsys, "list", "--json")
    found = {run["name"]: run for run in json.loads(out)}
    assert code == 0 and (found["good"]["status"], found["good"]["damaged_file"]) == ("COMPLETED", None)
    record = found["bad"]
    assert (record["status"], record["damaged_file"]) == ("UNKNOWN", path) and what in record["details"]
    for arguments in (["get", "bad"], ["resume", "bad"], ["cancel", "bad"]):
        code, out, err = _cli(capsys, *arguments)
        assert (code, out) == (1, "") and err.startswith(f"tundish: {path}: ") and what in err, arguments
    code, out, err = _cli(capsys, "get", "bad", "--json")
    assert code == 1 and path in json.loads(out)["error"]["message"]
    for command in ("events", "checkpoints", "export"):
        code, out, err = _cli(capsys, command, "bad")
        # Those that need other files work on, or have nothing to show.
        assert code in (0, 1) and (code == 0 or f"{path}: " in err or "has no complete checkpoint yet" in err), err
        assert "Traceback" not in err


def test_a_filter_that_cannot_ask_a_damaged_run_says_so(
    make_run: MakeRun, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    """A run that is missing from a list would be taken for one that the filter has refused."""
    make_run("good", ("COMPLETED", "done"), experiment_id="7")
    bad = make_run("bad", ("CREATED", "waits"), experiment_id="7")
    bad.spec.write_text("{}")
    every: list[dict[str, Any]] = [{"statuses": ["COMPLETED"]}, {"experiment_id": "7"}, {"before": "2030-01-01"}]
    for filters in every:
        caplog.clear()
        assert [run.name for run in fm.list(**filters)] == ["good"]
        assert "Skipped a damaged run that the filter cannot judge" in caplog.text and str(bad.spec) in caplog.text
    caplog.clear()
    assert [run.name for run in fm.list(statuses=["UNKNOWN"])] == ["bad"] and not caplog.text
    assert fm.cancel(experiment_id="7") == 0 and str(bad.spec) in caplog.text
    with pytest.raises(RunDamagedError) as error:
        fm.cancel(["good", "bad"])
    assert error.value.path == bad.spec


def test_what_a_kill_or_a_power_cut_leaves_of_a_line_is_no_damage(make_run: MakeRun) -> None:
    """A run whose writer was killed could not be resumed."""
    run = make_run("ift-1", ("CREATED", "waits"))
    with open(run.events, "ab") as file:
        file.write(b'{"type": "TRAIN_UPD\n' + b"\0" * 512 + b"\n" + b'{"type": "STA')
    assert [event.type for event in run.read_events()] == ["CREATED"]
    assert fm.get("ift-1").damaged_file is None


def test_a_checkpoint_is_found_beside_damaged_runs(
    make_run: MakeRun, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    """One damaged run would keep the checkpoints of all others from being exported by their paths."""
    make_run("bad", ("CREATED", "waits")).result("tracking").write_text("{}")
    good = make_run("good", ("COMPLETED", "done"))
    path = f"dbfs:/databricks/mlflow-tracking/1/{good.read_tracking().run_id}/artifacts/good/checkpoints/ep1-ba1"
    code, _, err = _cli(capsys, "export", path)
    assert code == 2 and "ep1-ba1" in err and "Skipped a damaged run" in caplog.text


def test_names_of_other_things_among_the_runs_are_shown(make_run: MakeRun, home: Path) -> None:
    """A folder that somebody has copied would hide, or stop the list."""
    run = make_run("ift-1", ("COMPLETED", "done"))
    shutil.copytree(run.folder, home / "runs" / "copy of ift 1")
    (home / "runs" / "ünïcode").mkdir()
    found = {run.name: run for run in fm.list()}
    assert {name: run.run_progress for name, run in found.items()} == {
        "ift-1": "COMPLETED", "copy of ift 1": "DAMAGED", "ünïcode": "DAMAGED",
    }  # fmt: skip
    assert "is of the run 'ift-1': this folder was copied, or renamed from it" in (found["copy of ift 1"].details or "")
    with pytest.raises(RunDamagedError, match=r"ünïcode/spec\.json: is missing"):
        fm.get("ünïcode")
    with pytest.raises(RunNotFoundError):
        fm.get("copy")


def test_a_name_of_two_lines_is_one_row_of_the_list(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The second line would look like a run of its own."""
    (home / "runs" / "a\nb").mkdir(parents=True)
    code, out, _ = _cli(capsys, "list")
    assert code == 0 and out.splitlines()[1] == "a\\nb  DAMAGED"


@pytest.mark.parametrize("command", [["resume"], ["rm", "--yes"], ["rm", "--yes", "--local"], ["cancel"], ["logs"]])
def test_what_is_no_folder_stays_as_it_is(home: Path, capsys: pytest.CaptureFixture[str], command: list[str]) -> None:
    """A lock was taken on the file itself, which was emptied for it, or made where a link led to nothing."""
    runs = home / "runs"
    runs.mkdir(parents=True)
    (runs / "notes").write_text("notes")
    (runs / "link").symlink_to("nothing")
    for name in ("notes", "link"):
        code, _, err = _cli(capsys, *command, name)
        assert code == 1 and err == f"tundish: {runs / name}: must be a folder, as of a run. Move it elsewhere.\n"
    assert (runs / "notes").read_text() == "notes" and sorted(os.listdir(runs)) == ["link", "notes"]


def test_a_folder_that_may_not_be_read_is_named(make_run: MakeRun, home: Path) -> None:
    """In a shared home, a colleague's private run would end everybody's list."""
    make_run("good", ("COMPLETED", "done"))
    make_run("private", ("COMPLETED", "done")).folder.chmod(0)

    def without_override() -> None:
        for capability in (1, 2):  # CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH; of no avail to others than root
            ctypes.CDLL(None).prctl(24, capability)

    done = subprocess.run(
        [sys.executable, "-m", "tundish", "list"], capture_output=True, text=True, preexec_fn=without_override
    )
    (home / "runs" / "private").chmod(0o700)
    assert done.returncode == 0 and "good     COMPLETED" in done.stdout and "private  DAMAGED" in done.stdout
    assert f"{home}/runs/private/spec.json: permission denied. Ask its owner, or" in done.stdout + done.stderr


def test_a_run_that_is_gone_is_not_a_damaged_one(make_run: MakeRun) -> None:
    """A run that is removed while the list is made would be shown as damaged."""
    run = make_run("ift-1", ("COMPLETED", "done"))
    shutil.rmtree(run.folder)
    for read in (lambda: RunSpec.read(run), run.read_tracking, run.read_events):
        with pytest.raises(RunNotFoundError, match="there is no run 'ift-1'"):
            read()


def test_a_damaged_result_is_named_with_what_to_do(make_run: MakeRun) -> None:
    """The supervisor would end without a word, and the run could never be resumed."""
    run = make_run("ift-1", ("FAILED", "over"))
    run.result("train").write_text('{"che')
    with pytest.raises(
        RunDamagedError, match=r"train\.json: is not JSON.* Remove it, then `tundish resume ift-1` repeats"
    ):
        fm.resume("ift-1")
    assert [event.type for event in run.read_events()] == ["FAILED"]


def test_the_error_crosses_processes(tmp_path: Path) -> None:
    """A worker's error would lose its path, or not arrive."""
    error = pickle.loads(pickle.dumps(RunDamagedError("x: is empty.", tmp_path)))
    assert (error.message, error.path) == ("x: is empty.", tmp_path)


def test_no_other_module_spells_a_file_name_of_a_run() -> None:
    """A file that is renamed in one place would be looked for under its old name in another."""
    folder = RunFolder(Path("/runs/x"))
    properties = [name for name, value in vars(RunFolder).items() if isinstance(value, property)]
    paths = [path for path in (getattr(folder, name) for name in properties) if isinstance(path, Path)]
    names = {path.name for path in paths if path.suffix}
    assert {"spec.json", "events.jsonl", "supervisor.json", "foundry.yaml"} <= names
    spelled = [
        f"{file.name}: {node.value}"
        for file in Path(tundish.__file__).parent.rglob("*.py")
        if file.name != "run_folder.py"
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.rpartition("/")[2] in names
    ]
    assert spelled == []
