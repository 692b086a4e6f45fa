"""What a sample must be: one line of JSONL, or one .txt file, checked before anything is tokenized.

Every rule has a name, so that a thousand lines with the same mistake make one message.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, cast

from tundish.spec import TaskType

Messages = list[dict[str, str]]
PromptResponse = tuple[str, str]
Sample = Messages | PromptResponse | str
"""Chat messages, prompt and response, or raw text: one shape a task type."""

CHAT_HINT = 'Write {"messages": [{"role": "user", "content": "…"}, {"role": "assistant", "content": "…"}]}.'
PAIR_HINT = 'Write {"prompt": "…", "response": "…"}.'


@dataclass(frozen=True, slots=True)
class Problem:
    """What is wrong with one line."""

    rule: str
    """Groups lines with the same mistake."""
    text: str
    """What was found, what is allowed, what to do."""


def parse_sample(line: bytes, task_type: TaskType, *, system_message: bool) -> Sample | Problem:
    """The sample that a line of JSONL holds, or what is wrong with it.

    `system_message`: whether the model's chat template takes one.
    """
    try:
        record = json.loads(line.decode().rstrip())
    except UnicodeDecodeError as error:
        text = f"the byte at offset {error.start} of the line is not UTF-8. Save the file as UTF-8."
        return Problem("not UTF-8", text)
    except json.JSONDecodeError as error:
        return Problem("not JSON", f"not JSON: {error.msg} at column {error.colno}. Each line must be one JSON object.")
    except ValueError as error:
        return Problem("not JSON", f"not JSON that can be read: {error}. Each line must be one JSON object.")
    except RecursionError:
        return Problem("not JSON", "nested too deeply to be a sample. Each line must be one flat JSON object.")
    if not isinstance(record, dict):
        hint = CHAT_HINT if task_type == "CHAT_COMPLETION" else PAIR_HINT
        return Problem("not an object", f"found a JSON {_json_type(record)}; each line must be one object. {hint}")
    if task_type == "CHAT_COMPLETION":
        return _parse_chat(cast(dict[str, Any], record), system_message)
    return _parse_pair(cast(dict[str, Any], record))


def _json_type(value: object) -> str:
    names: list[tuple[type, str]] = [
        (bool, "boolean"),
        (dict, "object"),
        (list, "array"),
        (str, "text"),
        (int, "number"),
    ]
    return next((name for kind, name in names if isinstance(value, kind)), "null" if value is None else "number")


def _names(keys: Iterable[str]) -> str:
    return ", ".join(sorted(keys)).encode(errors="backslashreplace").decode() or "none"


def _parse_pair(record: Mapping[str, Any]) -> Sample | Problem:
    keys = set(record)
    if keys not in ({"prompt", "response"}, {"prompt", "completion"}):
        found = _names(keys)
        return Problem(
            f"keys {found}", f"found the keys {found}; allowed are prompt and response (or completion). {PAIR_HINT}"
        )
    response_key = "response" if "response" in keys else "completion"
    for key in ("prompt", response_key):
        if not isinstance(record[key], str):
            kind = _json_type(record[key])
            return Problem(f"{key} {kind}", f"{key!r} is a JSON {kind}; it must be text. {PAIR_HINT}")
        if not record[key]:
            return Problem(f"{key} empty", f"{key!r} is empty; both must say something. Fill it or drop the line.")
    return _utf8_problem(record["prompt"], record[response_key]) or (record["prompt"], record[response_key])


def _parse_chat(record: Mapping[str, Any], system_message: bool) -> Sample | Problem:
    if set(record) != {"messages"}:
        found = _names(record)
        return Problem(f"keys {found}", f"found the keys {found}; allowed is messages alone. {CHAT_HINT}")
    messages = record["messages"]
    if not isinstance(messages, list) or not messages:
        found = "an empty list" if messages == [] else f"a JSON {_json_type(cast(object, messages))}"
        return Problem("messages", f"'messages' is {found}; it must be a list of messages. {CHAT_HINT}")
    for number, message in enumerate(cast(list[Any], messages), 1):
        if (problem := _message_problem(number, message)) is not None:
            return problem
    checked = cast(Messages, messages)
    return _order_problem([m["role"] for m in checked], system_message) or checked


def _message_problem(number: int, message: object) -> Problem | None:
    if not isinstance(message, dict) or set(cast(dict[str, Any], message)) != {"role", "content"}:
        return Problem("message keys", f"message {number} must have role and content, and nothing else. {CHAT_HINT}")
    role, content = cast(dict[str, Any], message)["role"], cast(dict[str, Any], message)["content"]
    if role not in ("system", "user", "assistant"):
        return Problem("role", f"message {number} has the role {role!r}; allowed are system, user and assistant.")
    if not isinstance(content, str):
        return Problem("content", f"the content of message {number} is a JSON {_json_type(content)}; it must be text.")
    if not content.strip():
        return Problem("empty content", f"the content of message {number} is empty. Fill it or drop the line.")
    return _utf8_problem(content)


def _order_problem(roles: list[str], system_message: bool) -> Problem | None:
    if roles[0] == "system" and not system_message:
        text = (
            "the first message is from 'system', which this model's chat template does not take. Put it in the user's."
        )
        return Problem("system message", text)
    turns = roles[1:] if roles[0] == "system" else roles
    if "system" in turns:
        return Problem("system place", "a message from 'system' stands after others; it is allowed only first.")
    if not turns or turns[0] != "user":
        found = repr(turns[0]) if turns else "nobody"
        return Problem("first speaker", f"the first to speak is {found}; a chat must start with 'user'.")
    for number, (role, following) in enumerate(pairwise(turns), len(roles) - len(turns) + 1):
        if role == following:
            text = f"messages {number} and {number + 1} are both from {role!r}; user and assistant must alternate."
            return Problem(f"two {role}", text)
    if turns[-1] != "assistant":
        return Problem("last speaker", f"the last message is from {turns[-1]!r}; a chat must end with 'assistant'.")
    return None


def _utf8_problem(*texts: str) -> Problem | None:
    for text in texts:
        if not text.isascii():
            try:
                text.encode()
            except UnicodeEncodeError as error:
                found = f"\\u{ord(text[error.start]):04x}"
                return Problem("surrogate", f"holds {found}, half of a character. Write the whole character.")
    return None


class ProblemList:
    """Problems by rule, with the lines that have them."""

    def __init__(self, source: str, unit: str = "line") -> None:
        self.source, self.unit = source, unit
        self._lines: dict[str, list[int]] = {}
        self._first: dict[str, str] = {}

    def add(self, line: int, problem: Problem) -> None:
        """Note that line `line` (from 1) has `problem`."""
        self._lines.setdefault(problem.rule, []).append(line)
        self._first.setdefault(problem.rule, problem.text)

    def __bool__(self) -> bool:
        return bool(self._lines)

    def messages(self, total: int) -> list[str]:
        """One message a rule: the first line in full, the others by number."""
        return [self._message(rule, lines, total) for rule, lines in self._lines.items()]

    def _message(self, rule: str, lines: list[int], total: int) -> str:
        text = f"{self.source}, {self.unit} {lines[0]:,}: {self._first[rule]}"
        if len(lines) == 1:
            return text
        shown = ", ".join(str(line) for line in lines[:20]) + (", …" if len(lines) > 20 else "")
        return f"{text} {len(lines):,} of {total:,} {self.unit}s are like this ({shown})."


def check_lines(
    lines: Iterator[tuple[int, bytes]], parse: Callable[[bytes], Sample | Problem], problems: ProblemList
) -> Iterator[tuple[int, Sample]]:
    """The good samples of numbered lines; the bad ones go to `problems`."""
    for number, line in lines:
        result = parse(line)
        if isinstance(result, Problem):
            problems.add(number, result)
        else:
            yield number, result
