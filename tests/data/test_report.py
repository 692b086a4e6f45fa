"""data/report.py, fm.validate: what is wrong is told with its place, and a sample is shown as the model will see it."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tundish import foundation_model as fm
from tundish.data.findings import Finding
from tundish.data.report import Report, Validation
from tundish.errors import DataError, SpecError

WriteLines = Callable[[Path, Any], Path]
USER = {"role": "user", "content": "two and two?"}
CHAT = {"messages": [USER, {"role": "assistant", "content": "four"}]}


@pytest.fixture
def mixed(arguments: dict[str, Any], write_lines: WriteLines) -> dict[str, Any]:
    """Thirty lines without an answer among sixty, one that is no JSON, one with a control token."""
    forged = {"messages": [{"role": "user", "content": "a</s>b"}, CHAT["messages"][1]]}
    lines = [CHAT, {"messages": [USER]}] * 30 + ["{", forged]
    write_lines(Path(arguments["train_data_path"]), lines)
    return arguments


def test_problems_are_told_by_kind_with_their_lines(mixed: dict[str, Any]) -> None:
    """Thirty lines with one mistake would be thirty messages, or one would hide another."""
    found = fm.validate(**mixed)
    assert not found.ok and len(found.reports) == 1
    (report,) = found.reports
    assert (report.total, report.samples, report.prepared) == (62, 31, None)
    assert [(problem.rule, problem.count) for problem in report.problems] == [("last speaker", 30), ("not JSON", 1)]
    speaker, syntax = report.problems
    assert speaker.where == list(range(2, 61, 2)) and syntax.where == [61]
    assert "30 of 62 lines are like this (2, 4, 6," in speaker.message and speaker.message.endswith("40, …).")
    assert [(warning.rule, warning.where) for warning in report.warnings] == [("control token", [62])]
    assert "'</s>'" in report.warnings[0].message


def test_the_same_is_refused_by_create_in_the_same_words(mixed: dict[str, Any], nothing_starts: None) -> None:
    """What validation passes, create() would refuse; or the other way round."""
    (report,) = fm.validate(**mixed).reports
    with pytest.raises(DataError) as error:
        fm.create(**mixed)
    assert list(error.value.problems) == report.messages and len(report.messages) == 2


def test_all_line_numbers_are_in_the_file(mixed: dict[str, Any], tmp_path: Path) -> None:
    """Line 50 is in no message; who repairs the data needs it."""
    found = fm.validate(**mixed)
    found.save(tmp_path / "report.json")
    saved = json.loads((tmp_path / "report.json").read_text())
    assert saved["ok"] is False and saved["reports"][0]["problems"][0]["where"] == list(range(2, 61, 2))


def test_a_million_bad_lines_are_a_file_of_two_megabytes(tmp_path: Path) -> None:
    """The report would be fifteen megabytes of numbers, one a line."""
    every_second, in_one = list(range(1, 2_000_001, 2)), list(range(5, 1_000_005))
    findings = [Finding("a", "bad.", 1_000_000, every_second), Finding("b", "worse.", 1_000_000, in_one)]
    source = Report(
        argument="train_data_path", source="train.jsonl", unit="line", total=3_000_000, samples=1, problems=findings,
        warnings=[], prepared=None, preview=[],
    )  # fmt: skip
    Validation([source]).save(tmp_path / "report.json")
    assert 500_000 < (tmp_path / "report.json").stat().st_size <= 2_000_000
    first, second = json.loads((tmp_path / "report.json").read_text())["reports"][0]["problems"]
    assert first["count"] == 1_000_000 and first["where"] == every_second[: first["shown"]] and first["shown"] > 50_000
    assert (second["where"], second["shown"]) == ([[5, 1_000_004]], 1_000_000)


def test_a_sample_is_shown_with_its_trained_tokens_marked(arguments: dict[str, Any]) -> None:
    """A mask that covers the prompt, or nothing, would be seen only in the model's answers."""
    found = fm.validate(**arguments)
    assert found.ok
    (report,) = found.reports
    assert "".join(text for text, _ in report.preview) == "<|user|>2 + 2?\n<|assistant|>4</s>\n</s>"
    assert "".join(text for text, trained in report.preview if trained) == "4</s>\n</s>"
    assert "<|assistant|>[[4" in str(found)
    page = found._repr_html_()
    assert re.search(r"&lt;\|assistant\|&gt;<mark[^>]*>4&lt;/s&gt;", page) and "<script" not in page


def test_nothing_of_the_data_becomes_html(arguments: dict[str, Any], write_lines: WriteLines) -> None:
    """Opening a report in a notebook would run what somebody wrote into a chat."""
    evil = {"messages": [{"role": "user", "content": "<script>alert(1)</script>"}, CHAT["messages"][1]]}
    bad = {"<img src=x onerror=alert(1)>": 1}
    write_lines(Path(arguments["train_data_path"]), [evil, bad])
    page = fm.validate(**arguments)._repr_html_()
    assert "&lt;script&gt;" in page and "<script" not in page and "<img" not in page


def test_evaluation_data_is_checked_too(mixed: dict[str, Any], tmp_path: Path, write_lines: WriteLines) -> None:
    """A bad line would be found when the model is evaluated for the first time."""
    path = write_lines(tmp_path / "eval.jsonl", [CHAT, 5])
    _, evaluation = fm.validate(**mixed, eval_data_path=str(path)).reports
    assert evaluation.argument == "eval_data_path"
    assert evaluation.messages[0].startswith("eval_data_path: eval.jsonl, line 2: the line is a JSON number")


def test_wrong_arguments_and_what_can_be_said_of_the_rows(mixed: dict[str, Any]) -> None:
    """One call would tell of the arguments, the next one of the data."""
    with pytest.raises(SpecError) as error:
        fm.validate(**{**mixed, "training_duration": "soon"})
    assert [problem.split(":")[0] for problem in error.value.problems] == [
        "training_duration",
        *["train_data_path"] * 2,
    ]


def test_a_tokenizer_that_is_not_there_hides_no_bad_line(mixed: dict[str, Any], config_folder: Path) -> None:
    """The two would be told one after the other."""
    with pytest.raises(SpecError) as error:
        fm.validate(**mixed | {"model": str(config_folder)})
    first, *others = error.value.problems
    assert first.startswith("model: the tokenizer of") and len(others) == 2


def test_an_argument_that_create_does_not_have_is_an_error(arguments: dict[str, Any]) -> None:
    """A misspelt one would be ignored, and other data be validated than is trained."""
    with pytest.raises(TypeError, match="contextlength"):
        fm.validate(**arguments, contextlength=5)
    with pytest.raises(TypeError, match="contextlength"):
        fm.estimate(**arguments, contextlength=5)


def test_register_to_is_not_needed(arguments: dict[str, Any]) -> None:
    """To look at data, one would have to invent a name for a model."""
    del arguments["register_to"]
    assert fm.validate(**arguments).ok and fm.estimate(**arguments).samples == 3


def test_what_was_validated_is_prepared(arguments: dict[str, Any]) -> None:
    """A run would prepare everything a second time."""
    first, second = fm.validate(**arguments).reports[0], fm.validate(**arguments).reports[0]
    assert first.prepared is not None and first.prepared == second.prepared
    assert (first.total, first.samples, first.warnings) == (second.total, second.samples, second.warnings)
    assert (Path(first.prepared.folder) / "manifest.json").exists()
