"""Code as people's notebooks and jobs have it, against runs in all states: only its import line was changed."""

import itertools
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tundish import errors
from tundish import foundation_model as fm
from tundish.base import events
from tundish.base.run_folder import RunFolder
from tundish.foundation_model import TrainingRun

MakeRun = Callable[..., RunFolder]
GoOn = Callable[..., Any]
STEPS = [("DATA_VALIDATED", "20 samples"), ("TRAIN_STARTED", "on 1 device"), ("TRAIN_UPDATED", "half")]


@pytest.fixture
def going_on(make_run: MakeRun) -> Iterator[GoOn]:
    """A run that goes on while the test polls: `going_on(*events)` returns it; one event comes each 50 ms.

    Its supervisor is not looked for yet, as its events are seconds old.
    """
    threads: list[threading.Thread] = []

    def start(*happens: tuple[str, str]) -> TrainingRun:
        paths = make_run("ift-1", ("CREATED", "waits"), ("STARTED", "go"))

        def append() -> None:
            for type, message in happens:
                time.sleep(0.05)
                events.append(paths.events, type, message)

        threads.append(threading.Thread(target=append))
        threads[-1].start()
        return fm.get("ift-1")

    yield start
    for thread in threads:
        thread.join()


@pytest.mark.parametrize(("end", "name"), [("COMPLETED", "Completed"), ("FAILED", "Failed")])
def test_a_job_that_polls_the_status_ends_with_the_run(going_on: GoOn, end: str, name: str) -> None:
    """An orchestrated job would wait for ever, or go on to deploy a model that is not there."""
    run = going_on(*STEPS, (end, "over"))
    seen = [run.status.display_name]
    deadline = time.monotonic() + 20
    while run.status.display_name not in ("Completed", "Failed") and time.monotonic() < deadline:
        time.sleep(0.02)
        run = fm.get(run)
        seen.append(run.status.display_name)
    assert seen[-1] == name and {"Starting", "Running", name} >= set(seen)
    assert (run.details, run.completed_at is not None) == ("over", True)


@pytest.mark.parametrize(("end", "outcome"), [("COMPLETED", "done"), ("FAILED", "failed")])
def test_a_job_that_polls_the_events_ends_with_the_run(going_on: GoOn, end: str, outcome: str) -> None:
    """The job would not see the last event, or take a step that is only named for a failure."""
    run, found = going_on(*STEPS, (end, "over")), None
    deadline = time.monotonic() + 20
    while found is None and time.monotonic() < deadline:
        types = [event.type for event in run.get_events()]
        if any("FAILED" in type or "EXCEPTION" in type for type in types):
            found = "failed"
        elif types[-1] == "COMPLETED":
            found = "done"
        time.sleep(0.02)
    assert found == outcome


def test_a_job_that_waits_for_all_of_its_runs_tells_them_apart(make_run: MakeRun) -> None:
    """A sweep's best run would be looked for among those that failed, or its table lack what was asked for."""
    ends = zip(("COMPLETED", "FAILED", "COMPLETED", "CANCELED"), ("1e-6", "1e-5", "5e-7", "1e-7"), strict=True)
    for number, (end, rate) in enumerate(ends):
        make_run(f"ift-{number}", ("CREATED", "waits"), (end, "over"), learning_rate=rate, experiment_id="7")
    runs = fm.list(experiment_id="7")
    assert all(run.status.is_terminal() for run in runs)
    done = fm.list(experiment_id="7", statuses=["COMPLETED"], limit=10).to_pandas()
    assert sorted(done["name"].to_list()) == ["ift-0", "ift-2"]
    assert done.sort_values("name")["learning_rate"].to_list() == [1e-6, 5e-7]
    assert len(fm.list(statuses=["COMPLETED", "FAILED"], limit=2).to_pandas()) == 2
    frame = fm.list().to_pandas()
    assert {"name", "run_progress", "model", "learning_rate", "train_data_path", "register_to"} <= set(frame.columns)
    assert frame.set_index("name").loc["ift-3", "run_progress"] == "STOPPED"
    states = {key: len(list(group)) for key, group in itertools.groupby(sorted(run.status for run in runs))}
    assert {status.display_name: count for status, count in states.items()} == {
        "Completed": 2,
        "Stopped": 1,
        "Failed": 1,
    }


@pytest.mark.parametrize(
    ("call", "error"),
    [
        (lambda: fm.get("none"), errors.DatabricksGenAIResponseError),
        (lambda: fm.get_events("none"), errors.DatabricksGenAIResponseError),
        (lambda: fm.get_checkpoints("none"), errors.DatabricksGenAIResponseError),
        (lambda: fm.cancel(), errors.DatabricksModelTrainingRequestError),
        (lambda: fm.cancel("a", experiment_id="7"), errors.DatabricksModelTrainingRequestError),
        (lambda: fm.list(before="some day"), errors.ValidationError),
        (lambda: fm.create("no/model", "/none.jsonl", "main"), errors.ValidationError),
    ],
)
def test_except_clauses_catch_what_they_caught(call: Callable[[], object], error: type[Exception]) -> None:
    """A job's own handling of errors would be passed by, and the job die with a traceback."""
    try:
        call()
    except error as caught:
        assert isinstance(caught, errors.DatabricksGenAIError)
        assert caught.message and caught.message in str(caught)  # pyright: ignore[reportAttributeAccessIssue]
    else:
        pytest.fail("nothing was raised")


def test_events_that_are_kept_become_a_table(make_run: MakeRun) -> None:
    """A job that saves its run's events beside the model would write something else than type, time and message."""
    make_run("ift-1", ("CREATED", "waits"), ("COMPLETED", "done"))
    frame = fm.get_events("ift-1").to_pandas()
    assert list(frame.columns) == ["type", "time", "message"] and frame["type"].to_list() == ["CREATED", "COMPLETED"]
    assert frame["time"].is_monotonic_increasing and fm.get("ift-1").get_events()[-1].message == "done"
