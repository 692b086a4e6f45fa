"""runs/records.py: what notebooks read has the names, order and shapes that they know."""

import dataclasses
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from tundish.foundation_model import TrainingRun
from tundish.runs.records import ObjectList, RunStatus, TrainingEvent, TrainingModelConstants

NOW = datetime(2026, 11, 21, 10, 0, tzinfo=UTC)
FIELDS = (
    "name status created_by model save_folder train_data_path register_to submitted_experiment_path task_type "
    "eval_data_path eval_prompts custom_weights_path training_duration learning_rate context_length "
    "data_prep_cluster_id details created_at started_at estimated_end_time formatted_eta completed_at "
    "submitted_config events experiment_id run_id"
).split()


def _run(**changes: object) -> TrainingRun:
    return dataclasses.replace(TrainingRun(name="ift-x", status=RunStatus.PENDING, created_by="me"), **changes)


def test_statuses_are_ordered_as_the_service_ordered_them() -> None:
    """`run.status >= RunStatus.COMPLETED` in a notebook would mean something else."""
    names = "UNKNOWN PENDING QUEUED STARTING RUNNING TERMINATING COMPLETED STOPPED FAILED".split()
    assert [status.value for status in sorted(RunStatus)] == names
    assert RunStatus.RUNNING < RunStatus.COMPLETED <= RunStatus.COMPLETED < RunStatus.FAILED
    assert RunStatus.FAILED > RunStatus.PENDING >= RunStatus.PENDING
    assert RunStatus.PENDING.before(RunStatus.RUNNING) and not RunStatus.PENDING.before(RunStatus.PENDING)
    assert RunStatus.PENDING.before(RunStatus.PENDING, inclusive=True)
    assert RunStatus.FAILED.after(RunStatus.RUNNING) and RunStatus.FAILED.after(RunStatus.FAILED, inclusive=True)


def test_terminal_statuses_are_those_from_completed_on() -> None:
    """A poller would wait for ever, or stop while the run goes on."""
    terminal = {status.value for status in RunStatus if status.is_terminal()}
    assert terminal == {"COMPLETED", "STOPPED", "FAILED"}


@pytest.mark.parametrize(
    ("text", "status"),
    [
        ("COMPLETED", RunStatus.COMPLETED),
        ("failed", RunStatus.FAILED),
        ("what", RunStatus.UNKNOWN),
        (RunStatus.RUNNING, RunStatus.RUNNING),
    ],
)
def test_statuses_are_read_from_text(text: str | RunStatus, status: RunStatus) -> None:
    """A filter by text would raise, or find nothing."""
    assert RunStatus.from_string(text) is status


def test_callers_poll_for_display_names() -> None:
    """`run.status.display_name == "Completed"` would never be true."""
    assert (RunStatus.COMPLETED.display_name, RunStatus.FAILED.display_name) == ("Completed", "Failed")
    assert str(RunStatus.RUNNING) == "RUNNING"


def test_a_run_has_every_field_of_the_original() -> None:
    """A notebook's `run.<field>` would raise AttributeError."""
    assert [field.name for field in dataclasses.fields(TrainingRun)][: len(FIELDS)] == FIELDS


@pytest.mark.parametrize(
    ("share", "shown"),
    [
        (0.0, "RUNNING □□□□□□□□□□(0%)"),
        (0.35, "RUNNING ■■■□□□□□□□(35%)"),
        (1.5, "RUNNING ■■■■■■■■■■(100%)"),
        (-1, "RUNNING □□□□□□□□□□(0%)"),
    ],
)
def test_progress_is_a_bar_of_ten_squares(share: float, shown: str) -> None:
    """The bar would run over, or show another share than the time that has passed."""
    total = timedelta(seconds=100_000)
    started = datetime.now(UTC) - share * total - timedelta(seconds=100)
    run = _run(status=RunStatus.RUNNING, started_at=started, estimated_end_time=started + total)
    assert run.run_progress == shown


def test_progress_without_an_end_in_sight_is_the_status() -> None:
    """A run that has ended or not begun would show a bar."""
    assert _run(status=RunStatus.RUNNING).run_progress == "RUNNING"
    ended = _run(status=RunStatus.COMPLETED, started_at=NOW, estimated_end_time=NOW + timedelta(hours=1))
    assert ended.run_progress == "COMPLETED"


def test_lists_behave_like_lists() -> None:
    """`len(fm.list())`, `runs[0]`, `runs[-2:]` or a loop in a notebook would raise."""
    runs = ObjectList((_run(name=name) for name in "abc"), TrainingRun.COLUMNS)
    assert len(runs) == 3 and [run.name for run in runs] == ["a", "b", "c"]
    assert runs[0].name == "a" and [run.name for run in runs[-2:]] == ["b", "c"]
    assert not ObjectList([], TrainingRun.COLUMNS)


def test_lists_become_data_frames_with_attribute_names() -> None:
    """`fm.get_models().to_pandas()["name"].to_list()` would raise."""
    models = ObjectList([TrainingModelConstants("a/b", "B", 8192)], TrainingModelConstants.COLUMNS)
    frame = models.to_pandas()
    assert set(frame.columns) == {"name", "display_name", "max_context_length"}
    assert frame["name"].to_list() == ["a/b"] and frame["max_context_length"].to_list() == [8192]
    assert ObjectList([_run()], TrainingRun.COLUMNS).to_pandas()["model"].to_list() == [""]


def test_tables_show_text_not_markup() -> None:
    """A path or message with `<script>` in it would run in the notebook."""
    event = TrainingEvent("FAILED", NOW, "<script>alert(1)</script>")
    run = _run(train_data_path="<b>", details="<i>", events=ObjectList([event], TrainingEvent.COLUMNS))
    shown = ObjectList([event], TrainingEvent.COLUMNS)._repr_html_() + run._repr_html_()
    shown += ObjectList([run], TrainingRun.COLUMNS)._repr_html_()
    assert "<script" not in shown and "<b>" not in shown and "<i>" not in shown
    assert "&lt;script&gt;" in shown and "ift-x" in shown


def test_events_tell_when_they_are_the_last() -> None:
    """A notebook that follows events would not stop."""
    assert [
        TrainingEvent(type, NOW, "").is_terminal_state() for type in ("COMPLETED", "FAILED", "CANCELED", "STOPPED")
    ] == [True] * 4
    assert not TrainingEvent("TRAIN_FINISHED", NOW, "").is_terminal_state()
    assert str(TrainingEvent("STARTED", NOW, "go")).endswith("  STARTED            go")


def test_the_export_is_told_once_it_is_there(tmp_path: Path) -> None:
    """A notebook would load a folder that is not written yet."""
    run = _run(run_dir=tmp_path)
    assert run.export_dir is None and _run().export_dir is None
    (tmp_path / "export").mkdir()
    assert run.export_dir == tmp_path / "export"


def test_the_mlflow_page_is_that_of_the_run() -> None:
    """The link would lead nowhere, or there be none."""
    at = {"experiment_id": "7", "run_id": "abc", "submitted_experiment_path": "/me/x", "registered_version": "2"}
    run = _run(**at, tracking_uri="http://server:5000/", registered_name="a.b.c")
    page = "http://server:5000/#/experiments/7/runs/abc"
    assert run.mlflow_url == page and run.model_uri == "models:/a.b.c/2"
    for shown in (run._repr_html_(), ObjectList([run], run.COLUMNS, run.MORE_COLUMNS)._repr_html_()):
        assert f'href="{page}"' in shown and 'href="http://server:5000/#/models/a.b.c/versions/2"' in shown
    local = _run(**at, tracking_uri="sqlite:////mlflow.db")
    assert local.mlflow_url is None and _run().mlflow_url is None
    assert "href" not in local._repr_html_() + ObjectList([local], run.COLUMNS, run.MORE_COLUMNS)._repr_html_()


def test_a_run_and_a_list_of_runs_are_printed_in_a_line_each() -> None:
    """`print(run)` would be a page of fields, most of them None."""
    done = {"started_at": NOW, "completed_at": NOW + timedelta(seconds=85), "train_loss": 1.23456, "eval_loss": 1.5}
    run = _run(name="ift-1", status=RunStatus.COMPLETED, details="Registered.", **done)
    line = "ift-1  COMPLETED  Registered.  train loss 1.235  eval loss 1.5  took 0:01:25"
    assert str(run) == line and "\n" not in repr(run) and len(repr(run)) < 100
    assert str(ObjectList([run, _run(name="ift-2")], run.COLUMNS)) == f"{line}\nift-2  PENDING"
    assert str(ObjectList([], run.COLUMNS)) == "None yet."


def test_what_no_run_has_takes_no_room() -> None:
    """A page of dashes would hide what there is."""
    run = _run(name="ift-1", status=RunStatus.RUNNING, train_loss=0.0)
    listed = ObjectList([run, _run()], run.COLUMNS, run.MORE_COLUMNS)
    assert ">Train Loss</th>" in listed._repr_html_() and ">Eval Loss</th>" not in listed._repr_html_()
    assert "Eval" not in run._repr_html_() and "Weights" not in run._repr_html_()
    frame = listed.to_pandas()
    assert frame["train_loss"][0] == 0.0 and set(frame.columns) == {*run.COLUMNS, *run.MORE_COLUMNS}
    assert ObjectList([], run.COLUMNS)._repr_html_() == "<p>None yet.</p>"


def test_lists_can_be_changed() -> None:
    """Notebooks that gather runs with `append`, `extend`, `insert` or by index would raise."""
    runs = ObjectList([_run(name="b")], TrainingRun.COLUMNS)
    runs.append(_run(name="x"))
    runs.extend([_run(name="d")])
    runs.insert(0, _run(name="a"))
    runs[2] = _run(name="c")
    assert [run.name for run in runs] == ["a", "b", "c", "d"]


def test_a_status_is_compared_with_statuses_only() -> None:
    """`run.status < "COMPLETED"` would be an answer, and a wrong one."""
    assert RunStatus.order[0] is RunStatus.FAILED and RunStatus.order[-1] is RunStatus.UNKNOWN
    with pytest.raises(
        TypeError, match="a RunStatus can only be compared with another RunStatus, not with 'COMPLETED'"
    ):
        assert RunStatus.RUNNING < "COMPLETED"  # pyright: ignore[reportOperatorIssue]


def test_a_run_shows_all_that_it_was_asked_for() -> None:
    """A notebook would not show with what a run was made, or which experiment it is in."""
    shown = _run(
        status=RunStatus.FAILED,
        eval_prompts=["What?"],
        experiment_id="4711",
        data_prep_cluster_id="local[4]",
        submitted_experiment_path="/Users/me/x",
        events=ObjectList([TrainingEvent("FAILED", NOW, "")], TrainingEvent.COLUMNS),
    )._repr_html_()
    for part in ("FAILED", "What?", "4711", "local[4]", "/Users/me/x", ">MLflow Experiment</th>", ">Events</th>"):
        assert part in shown
