"""data/records.py: what a sample must be, and what is said of one that is not."""

import json
from typing import Any

import pytest

from tundish.data.records import Problem, ProblemList, parse_sample

U, A, S = ({"role": role, "content": f"from {role}"} for role in ("user", "assistant", "system"))


def _parse(record: Any, task: Any = "CHAT_COMPLETION", *, system_message: bool = True) -> Any:
    line = record if isinstance(record, bytes) else json.dumps(record).encode()
    return parse_sample(line, task, system_message=system_message)


@pytest.mark.parametrize("messages", [[U, A], [S, U, A], [U, A, U, A], [S, U, A, U, A, U, A]])
def test_good_chats_are_taken_as_they_are(messages: list[dict[str, str]]) -> None:
    """Data that the service trained would be refused or changed."""
    assert _parse({"messages": messages}) == messages


@pytest.mark.parametrize("key", ["response", "completion"])
def test_good_pairs_are_taken_as_they_are(key: str) -> None:
    """One of the two spellings would be refused, or texts stripped."""
    assert _parse({"prompt": " 2 + 2? ", key: " 4\n"}, "INSTRUCTION_FINETUNE") == (" 2 + 2? ", " 4\n")


def _chat(*messages: Any) -> dict[str, Any]:
    return {"messages": list(messages)}


@pytest.mark.parametrize(
    ("record", "found"),
    [
        (_chat(U), "the last message is from 'user'; a chat must end with 'assistant'"),
        (_chat(U, A, U), "the last message is from 'user'; a chat must end with 'assistant'"),
        (_chat(A), "the first to speak is 'assistant'; a chat must start with 'user'"),
        (_chat(S, A), "the first to speak is 'assistant'; a chat must start with 'user'"),
        (_chat(S), "the first to speak is nobody; a chat must start with 'user'"),
        (_chat(U, U, A), "messages 1 and 2 are both from 'user'; user and assistant must alternate"),
        (_chat(S, U, A, A), "messages 3 and 4 are both from 'assistant'"),
        (_chat(U, S, A), "a message from 'system' stands after others; it is allowed only first"),
        (_chat(S, S, U, A), "a message from 'system' stands after others"),
        (_chat(), "'messages' is an empty list; it must be a list of messages"),
        ({"messages": "hello"}, "'messages' is a JSON text; it must be a list"),
        ({"messages": None}, "'messages' is a JSON null"),
        (_chat(U, "hello"), "message 2 must have role and content, and nothing else"),
        (_chat(U | {"name": "x"}, A), "message 1 must have role and content, and nothing else"),
        (_chat({"role": "user"}, A), "message 1 must have role and content"),
        (_chat({"role": "tool", "content": "x"}, A), "message 1 has the role 'tool'; allowed are system, user and"),
        (_chat({"role": ["user"], "content": "x"}, A), "message 1 has the role ['user']"),
        (_chat(U, {"role": "assistant", "content": None}), "the content of message 2 is a JSON null; it must be text"),
        (_chat(U, {"role": "assistant", "content": 4}), "the content of message 2 is a JSON number; it must be text"),
        (_chat(U, {"role": "assistant", "content": " \n"}), "the content of message 2 is empty. Fill it"),
        ({"messages": [U, A], "id": 1}, "found the keys id, messages; allowed is messages alone"),
        ({"prompt": "a", "response": "b"}, "found the keys prompt, response; allowed is messages alone"),
        ({}, "found the keys none; allowed is messages alone"),
        ([U, A], "found a JSON array; each line must be one object"),
        ("hello", "found a JSON text; each line must be one object"),
        (True, "found a JSON boolean; each line must be one object"),
        (None, "found a JSON null; each line must be one object"),
        (b'{"messages": [', "not JSON: Expecting value at column 15. Each line must be one JSON object"),
        (b"\xff{}", "the byte at offset 0 of the line is not UTF-8. Save the file as UTF-8"),
        pytest.param(b"[" * 100_000, "nested too deeply to be a sample", id="deep"),
        pytest.param(b'{"messages": ' + b"1" * 5_000 + b"}", "", id="huge number"),
        (b'{"messages": [{"role": "user", "content": "\\ud800"}]}', "holds \\ud800, half of a character"),
        (b'{"\\ud800": 1}', "found the keys"),
    ],
)  # fmt: skip
def test_a_bad_chat_is_told_what_is_wrong(record: Any, found: str) -> None:
    """The line would fail in the template mid-run, or be trained as something else."""
    problem = _parse(record)
    assert isinstance(problem, Problem) and found in problem.text
    assert problem.text.endswith((".", "}")) and "\n" not in problem.text
    problem.text.encode()  # can be printed


@pytest.mark.parametrize(
    ("record", "found"),
    [
        ({"prompt": "a"}, "found the keys prompt; allowed are prompt and response (or completion)"),
        (
            {"prompt": "a", "response": "b", "completion": "c"},
            "found the keys completion, prompt, response; allowed are",
        ),
        ({"prompt": "a", "response": "b", "id": 1}, "found the keys id, prompt, response"),
        ({"messages": [U, A]}, "found the keys messages; allowed are prompt and response"),
        ({"prompt": 1, "response": "b"}, "'prompt' is a JSON number; it must be text"),
        ({"prompt": "a", "completion": ["b"]}, "'completion' is a JSON array; it must be text"),
        ({"prompt": "", "response": "b"}, "'prompt' is empty; both must say something"),
        ({"prompt": "a", "response": ""}, "'response' is empty; both must say something"),
        ({"prompt": "a", "response": 1.5}, "'response' is a JSON number; it must be text"),
        (["a", "b"], 'found a JSON array; each line must be one object. Write {"prompt": "…", "response": "…"}.'),
    ],
)
def test_a_bad_pair_is_told_what_is_wrong(record: Any, found: str) -> None:
    """An empty or missing response would be trained as a sample without targets."""
    problem = _parse(record, "INSTRUCTION_FINETUNE")
    assert isinstance(problem, Problem) and found in problem.text


def test_a_system_message_is_refused_where_the_template_takes_none() -> None:
    """Mistral's template would raise in the middle of preparation."""
    assert _parse(_chat(U, A), system_message=False) == [U, A]
    problem = _parse(_chat(S, U, A), system_message=False)
    assert isinstance(problem, Problem) and "which this model's chat template does not take" in problem.text


def test_one_mistake_on_many_lines_is_one_message() -> None:
    """A thousand lines with one mistake would make a thousand messages, or hide which lines they are."""
    problems = ProblemList("train.jsonl")
    assert not problems and problems.messages(10) == []
    for line in (17, 88, 412):
        problems.add(line, Problem("last speaker", "the last message is from 'user'."))
    problems.add(5, Problem("not JSON", "not JSON."))
    assert problems.messages(2000) == [
        "train.jsonl, line 17: the last message is from 'user'. 3 of 2,000 lines are like this (17, 88, 412).",
        "train.jsonl, line 5: not JSON.",
    ]


def test_a_long_list_of_lines_is_cut() -> None:
    """A message would fill the screen with line numbers."""
    problems = ProblemList("a", "file")
    for line in range(1, 31):
        problems.add(line, Problem("x", "bad."))
    (message,) = problems.messages(30)
    assert message.startswith("a, file 1: bad. 30 of 30 files are like this (1, 2, ") and message.endswith(
        "19, 20, …)."
    )
