"""data/findings.py: one message a mistake, with the names of all samples that have it."""

import json
from array import array

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tundish.data.findings import Finding, Findings, Location
from tundish.data.samples import Problem

LINES = Location("train.jsonl", "line")
LAST = Problem("last speaker", "the last message is from 'user'.")


def test_one_mistake_on_many_lines_is_one_message() -> None:
    """A thousand lines with one mistake would make a thousand messages, or hide which lines they are."""
    found = Findings()
    assert not found and found.count == 0 and found.findings(LINES, 10) == []
    for line in (17, 88, 412):
        found.add(line, LAST)
    found.add(5, Problem("not JSON", "not JSON."))
    text = "train.jsonl, line 17: the last message is from 'user'. 3 of 2,000 lines are like this (17, 88, 412)."
    assert found.findings(LINES, 2000) == [
        Finding("last speaker", text, 3, [17, 88, 412]),
        Finding("not JSON", "train.jsonl, line 5: not JSON.", 1, [5]),
    ]
    assert found and found.count == 4


def test_the_message_is_that_of_the_first_sample() -> None:
    """The number in the message and what it says would belong to different lines."""
    found = Findings()
    found.add(3, Problem("keys", "has the keys id."))
    found.add(7, Problem("keys", "has the keys name."))
    (finding,) = found.findings(LINES, 9)
    assert finding.message == "train.jsonl, line 3: has the keys id. 2 of 9 lines are like this (3, 7)."


def test_a_long_list_of_lines_is_cut_in_the_message_alone() -> None:
    """A message would fill the screen with line numbers; or nobody could learn the rest of them."""
    found = Findings()
    for line in range(1, 31):
        found.add(1000 * line, Problem("x", "bad."))
    (finding,) = found.findings(Location("main.lab.chats", "row"), 40_000)
    assert finding.message.startswith("main.lab.chats, row 1,000: bad. 30 of 40,000 rows are like this (1000, 2000, ")
    assert finding.message.endswith("19000, 20000, …).")
    assert finding.count == 30 and finding.where == [1000 * line for line in range(1, 31)]


def test_names_of_files_do_not_fill_the_screen() -> None:
    """Twenty names of four thousand characters each would."""
    found = Findings()
    for number in range(1, 6):
        found.add(number, LAST)
    (finding,) = found.findings(Location("texts", "file", lambda number: f"{number}" * 300), 9)
    assert finding.message.count("222") == 100 and "33" not in finding.message and finding.message.endswith(", …).")


@pytest.mark.parametrize("count", [19, 20, 21])
def test_nothing_is_left_out_before_twenty(count: int) -> None:
    """The message would end in dots where there is no more to say, or hide the last line."""
    found = Findings()
    for line in range(1, count + 1):
        found.add(line, LAST)
    (finding,) = found.findings(LINES, count)
    assert finding.message.endswith("19, 20, …)." if count > 20 else f", {count}).")


def test_files_are_named() -> None:
    """The user of a folder would have to count its files."""
    names = ("a.txt", "deep/b.txt", "c.txt")
    place = Location("books", "file", lambda number: names[number - 1])
    found = Findings()
    found.add(2, Problem("not UTF-8", "not UTF-8."))
    assert found.findings(place, 3) == [Finding("not UTF-8", "deep/b.txt: not UTF-8.", 1, ["deep/b.txt"])]
    found.add(3, Problem("not UTF-8", "not UTF-8."))
    (finding,) = found.findings(place, 3)
    assert finding.message == "deep/b.txt: not UTF-8. 2 of 3 files are like this (deep/b.txt, c.txt)."
    assert finding.where == ["deep/b.txt", "c.txt"]
    assert place.names(array("q", [1])) == ["a.txt"] and place.of(1) == "a.txt"


def test_text_of_the_data_cannot_command_a_terminal() -> None:
    """A message that shows what the data holds would clear the screen, or write over the line above it."""
    names = ("a\x1b[2J.txt", "b\x9bK\r.txt")
    place = Location("books", "file", lambda number: names[number - 1])
    found = Findings()
    for number in (1, 2):
        found.add(number, Problem("role", "has the role '\x1b]0;x\x07é☕'."))
    (finding,) = found.findings(place, 2)
    assert finding.message == (
        r"a\x1b[2J.txt: has the role '\x1b]0;x\x07é☕'. 2 of 2 files are like this (a\x1b[2J.txt, b\x9bK\x0d.txt)."
    )
    assert finding.where == list(names), "as they are, for a program"


@given(st.lists(st.lists(st.tuples(st.integers(1, 5), st.sampled_from(["a", "b", "c"])), max_size=4), max_size=6))
def test_parts_put_together_are_what_the_whole_is(parts: list[list[tuple[int, str]]]) -> None:
    """Line numbers would be those of a chunk, not of the file; or the order of parts change the message."""
    whole, joined = Findings(), Findings()
    for number, part in enumerate(parts):
        own = Findings()
        for line, rule in part:
            problem = Problem(rule, f"{rule} of part {number}.")
            own.add(line, problem)
            whole.add(line + 5 * number, problem)
        joined.extend(own, 5 * number)
    assert joined.findings(LINES, 30) == whole.findings(LINES, 30)
    assert joined.count == sum(map(len, parts))
    again = Findings.of(json.loads(json.dumps(joined.to_records())))
    assert again.findings(LINES, 30) == joined.findings(LINES, 30), "what a manifest keeps"
