"""runs/selecting.py: exactly the runs that a call means."""

import os
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from tundish import foundation_model as fm
from tundish.base.run_folder import RunFolder
from tundish.errors import RequestError, RunNotFoundError, SpecError, ValidationError
from tundish.runs.records import RunStatus
from tundish.runs.selecting import name_of, named, parse_time

MakeRun = Callable[..., RunFolder]
DAYS = {"run-a": 1, "run-b": 2, "run-c": 3}


@pytest.fixture
def three_runs(make_run: MakeRun) -> None:
    """run-a failed on day 1, run-b completed on day 2, run-c was canceled on day 3; each day at 10:00 UTC."""
    ends = {"run-a": "FAILED", "run-b": "COMPLETED", "run-c": "CANCELED"}
    for name, day in DAYS.items():
        experiment = "7" if name == "run-b" else "1"
        paths = make_run(
            name, ("CREATED", "waits"), (ends[name], "over"), created_at=_day(day).isoformat(), experiment_id=experiment
        )
        os.utime(paths.spec, (_day(day).timestamp(), _day(day).timestamp()))


def _day(day: int) -> datetime:
    return datetime(2026, 11, day, 10, 0, tzinfo=UTC)


def _names(**filters: Any) -> list[str]:
    return [run.name for run in fm.list(**filters)]


@pytest.mark.usefixtures("three_runs")
def test_runs_are_listed_newest_first_up_to_the_limit() -> None:
    """The limit would cut off the newest runs."""
    assert _names() == ["run-c", "run-b", "run-a"]
    assert _names(limit=2) == ["run-c", "run-b"]
    assert _names(limit=None) == ["run-c", "run-b", "run-a"] and _names(limit=0) == []


@pytest.mark.usefixtures("three_runs")
@pytest.mark.parametrize(
    ("filters", "names"),
    [
        ({"training_runs": ["run-a", "run-c", "none"]}, ["run-c", "run-a"]),
        ({"training_runs": []}, []),
        (
            {"experiment_id": "", "statuses": [], "user_emails": [], "before": "", "after": ""},
            ["run-c", "run-b", "run-a"],
        ),
        ({"experiment_id": "7"}, ["run-b"]),
        ({"experiment_id": "8"}, []),
        ({"statuses": ["FAILED", "completed"]}, ["run-b", "run-a"]),
        ({"statuses": [RunStatus.STOPPED]}, ["run-c"]),
        ({"statuses": ["RUNNING"]}, []),
        ({"user_emails": ["nobody@nowhere"]}, []),
        ({"before": _day(2)}, ["run-a"]),
        ({"after": _day(2)}, ["run-c", "run-b"]),
        ({"after": _day(2), "before": _day(3)}, ["run-b"]),
        ({"after": "2026-11-03", "statuses": ["FAILED"]}, []),
        ({"statuses": ["STOPPED", "FAILED"], "limit": 1}, ["run-c"]),
    ],
)
def test_filters_hold_together(filters: dict[str, Any], names: list[str]) -> None:
    """A filter would be ignored, `before` include its time, or the limit count runs that were filtered out."""
    assert _names(**filters) == names


@pytest.mark.usefixtures("three_runs")
def test_runs_of_a_user_are_found() -> None:
    """The filter would find nobody's runs."""
    user = fm.get("run-a").created_by
    assert _names(user_emails=[user, "x"]) == ["run-c", "run-b", "run-a"]


@pytest.mark.usefixtures("three_runs")
def test_details_can_be_left_out() -> None:
    """A long list would carry every event of every run, or a short one none."""
    assert all(run.events is not None and run.submitted_config is not None for run in fm.list())
    assert all(run.events is run.submitted_config is None for run in fm.list(include_details=False))


def test_without_any_run_the_list_is_empty(home: Path) -> None:
    """The first call on a new machine would raise, or make folders."""
    assert len(fm.list()) == 0 and not home.exists()


@pytest.mark.usefixtures("three_runs")
def test_a_run_is_given_by_name_or_as_object() -> None:
    """`fm.get(run)` or `run.refresh()` would raise."""
    run = fm.get("run-a")
    assert fm.get(run).name == run.refresh().name == name_of(run) == name_of("run-a") == "run-a"
    assert (
        [event.type for event in fm.get_events(run)]
        == [event.type for event in run.get_events()]
        == ["CREATED", "FAILED"]
    )
    assert _names(training_runs=[run]) == _names(training_runs=fm.list(training_runs=[run])) == ["run-a"]
    with pytest.raises(RequestError, match="a run must be given as its name or a TrainingRun, not as int"):
        fm.get(5)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(
    "given",
    [
        "2026-11-21",
        "11-21-2026",
        "2026/11/21",
        "11/21/2026",
        "2026-11-21 00:00",
        "11-21-2026 00:00:00",
        "2026-11-21T00:00:00",
        datetime(2026, 11, 21),
    ],
)
def test_times_are_read_in_the_original_s_formats(given: str | datetime) -> None:
    """A notebook's date would be refused, or month and day exchanged."""
    assert parse_time("before", given) == datetime(2026, 11, 21).astimezone()


def test_times_with_a_zone_keep_it() -> None:
    """A time in another zone would be taken for local time."""
    zoned = datetime(2026, 11, 21, 12, tzinfo=UTC)
    assert parse_time("after", zoned) == parse_time("after", "2026-11-21T12:00:00+00:00") == zoned
    assert parse_time("after", "2026-11-21T12:00:00+02:00") == zoned - timedelta(hours=2)
    assert parse_time("after", None) is None


@pytest.mark.parametrize("given", ["yesterday", "2026-13-01", "21.11.2026"])
def test_a_text_that_is_no_time_is_named_with_its_argument(given: str) -> None:
    """The list would be silently complete, or the message not say which argument is wrong."""
    with pytest.raises(ValidationError, match=f"before must be a datetime, or text like .*, not {given!r}"):
        fm.list(before=given)


def test_checkpoints_of_a_run_without_any_are_none(make_run: MakeRun, capsys: pytest.CaptureFixture[str]) -> None:
    """A notebook that asks too early would get an error instead of a note."""
    make_run("run-a", ("CREATED", "waits"))
    assert fm.get_checkpoints("run-a") == []
    assert capsys.readouterr().out == "No checkpoints created yet for this run. Please try again later.\n"
    with pytest.raises(RunNotFoundError):
        fm.get_checkpoints("run-b")


@pytest.mark.usefixtures("three_runs")
def test_at_a_terminal_a_run_is_meant_by_its_first_letters_or_as_the_last_one(make_run: MakeRun) -> None:
    """The name would have to be copied; or another run than the one that is meant be canceled or removed."""
    make_run("run-ab", ("CREATED", "waits"))
    assert named("run-b") == "run-b" and named("run-c") == "run-c"
    assert named("run-a") == "run-a", "a name is that run, though others begin with it"
    assert named("@last") == "run-ab"
    with pytest.raises(RequestError, match=r"4 runs begin with 'run': run-a, run-ab, run-b, run-c\. Give more"):
        named("run")
    for none in ("", "unr", "-a", "*", "../runs/run-a"):
        with pytest.raises(RunNotFoundError):
            named(none)
    with pytest.raises(RunNotFoundError, match="there is no run 'run-'"):
        fm.get("run-")  # a program means exactly what it says


def test_the_last_run_of_none_is_an_answer() -> None:
    """An index error on a new machine."""
    with pytest.raises(RunNotFoundError, match="there are no runs yet in "):
        named("@last")


def test_many_candidates_are_counted(make_run: MakeRun) -> None:
    """A thousand names would scroll by."""
    for number in range(10):
        make_run(f"run-{number}", ("CREATED", "waits"))
    with pytest.raises(RequestError, match=r"10 runs begin with 'run-': run-0, .*, run-7 and 2 more\. Give"):
        named("run-")


def test_a_status_that_does_not_exist_is_refused(make_run: MakeRun) -> None:
    """The list would be empty, as if no run had failed."""
    with pytest.raises(SpecError, match=r"status must be one of PENDING, .*, not 'failde'. Did you mean FAILED\?"):
        fm.list(statuses=["failde"])
