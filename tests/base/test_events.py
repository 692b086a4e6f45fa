"""events.py: what was appended is read back, whole and in order."""

import json
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path

from tundish.base import events


def test_an_event_is_read_back_with_its_time_and_facts(tmp_path: Path) -> None:
    """Readers would see another message, time or fact than the stage wrote."""
    path = tmp_path / "events.jsonl"
    before = datetime.now(UTC) - timedelta(milliseconds=1)
    events.append(path, "DATA_VALIDATED", "3 Zeilen, geprüft\nund gepackt", rows=3)
    (event,) = events.read(path)
    assert (event.type, event.message, event.facts) == (
        "DATA_VALIDATED",
        "3 Zeilen, geprüft\nund gepackt",
        {"rows": 3},
    )
    assert before <= event.time <= datetime.now(UTC) and event.time.utcoffset() == timedelta(0)


def test_a_file_that_is_not_there_holds_no_events(tmp_path: Path) -> None:
    """Reading a run that was just made would raise."""
    assert events.read(tmp_path / "events.jsonl") == []


def test_of_progress_only_the_latest_is_read(tmp_path: Path) -> None:
    """`get_events` would show every progress line of a long run, or an old one, or lose the lasting events."""
    path = tmp_path / "events.jsonl"
    for type, message in [
        ("TRAIN_STARTED", "go"),
        ("TRAIN_UPDATED", "1"),
        ("TRAIN_UPDATED", "2"),
        ("CHECKPOINT_SAVED", "ep1-ba2"),
        ("TRAIN_UPDATED", "3"),
        ("TRAIN_FINISHED", "done"),
    ]:
        events.append(path, type, message)
    assert [event.message for event in events.read(path)] == ["go", "ep1-ba2", "3", "done"]


def test_a_line_that_was_cut_off_is_left_out(tmp_path: Path) -> None:
    """A reader would fail on the half line that a killed writer has left."""
    path = tmp_path / "events.jsonl"
    events.append(path, "STARTED", "go")
    with open(path, "a") as file:
        file.write('{"type": "TRAIN_UPD')
    assert [event.type for event in events.read(path)] == ["STARTED"]


def test_an_event_after_a_cut_off_line_is_not_lost(tmp_path: Path) -> None:
    """FAILED would be glued to the half line of the killed writer, and nobody would learn that the run has ended."""
    path = tmp_path / "events.jsonl"
    events.append(path, "STARTED", "go")
    with open(path, "a") as file:
        file.write('{"type": "TRAIN_UPD')
    events.append(path, "FAILED", "killed")
    assert [event.type for event in events.read(path)] == ["STARTED", "FAILED"]


def test_lines_of_several_writers_stay_whole(tmp_path: Path) -> None:
    """Two writers at once would tear each other's lines."""
    path = tmp_path / "events.jsonl"
    texts = [f"{number}: " + "x" * 5000 for number in range(80)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda text: events.append(path, "CHECKPOINT_SAVED", text), texts))
    lines = path.read_text().splitlines()
    assert len(lines) == 80 and sorted(json.loads(line)["message"] for line in lines) == sorted(texts)


def test_terminal_types_are_the_ends_of_a_run() -> None:
    """Callers that poll for the end would wait for ever, or stop too early."""
    assert {"COMPLETED", "FAILED", "STOPPED", "CANCELED"} == events.TERMINAL_TYPES
