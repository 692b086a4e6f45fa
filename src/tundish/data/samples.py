"""The rules for samples: one line of JSONL, one row of a table, or one .txt file, checked before it is tokenized.

Every rule has a name, so that a thousand lines with the same mistake make one message. Valid lines take a fast path
(orjson and a few comparisons); any other line takes the slow one, which explains what is wrong.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NoReturn, cast

import orjson

from tundish.plan.spec import TaskType

Messages = list[dict[str, str]]
PromptResponse = tuple[str, str]
Sample = Messages | PromptResponse | str
"""Chat messages, prompt and response, or raw text: one for each task type."""

MAX_LINE_BYTES = 1 << 23
"""A longer line is refused unread: each worker would need many times its size in memory, and no model reads as much."""
CHAT_HINT = 'Write {"messages": [{"role": "user", "content": "…"}, {"role": "assistant", "content": "…"}]}.'
PAIR_HINT = 'Write {"prompt": "…", "response": "…"}.'


@dataclass(frozen=True, slots=True)
class Problem:
    """What is wrong with one sample."""

    rule: str
    """Groups samples with the same mistake."""
    text: str
    """What is wrong, what is expected, what to do."""


@dataclass(frozen=True, slots=True)
class Rules:
    """Decide whether a record is a valid sample."""

    task_type: TaskType
    system_message: bool
    """Whether the model's chat template accepts a system message."""

    def parse(self, line: bytes) -> Sample | Problem:
        """The sample in a line of JSONL, or what is wrong with it."""
        if len(line) > MAX_LINE_BYTES:
            limit = f"{MAX_LINE_BYTES >> 20} MiB, the most that a sample may have"
            return Problem("line too long", f"the line is longer than {limit}. Split it, or drop it.")
        try:
            record: Any = orjson.loads(line)
        except ValueError:
            return self._explain(line)
        quick = None
        if type(record) is dict:
            known = cast(dict[str, Any], record)
            is_chat = self.task_type == "CHAT_COMPLETION"
            quick = _quick_chat(line, known, self.system_message) if is_chat else _quick_pair(line, known)
        return self._explain(line) if quick is None else quick

    def check(self, record: Mapping[str, Any]) -> Sample | Problem:
        """The sample in a record of a table, or what is wrong with it."""
        return _parse_chat(record, self.system_message) if self.task_type == "CHAT_COMPLETION" else _parse_pair(record)

    def parse_messages(self, text: str) -> Sample | Problem:
        """The chat in a column that contains messages as JSON text, or what is wrong with it."""
        messages = _read_json(text, "The column must hold a JSON list of messages.")
        return messages if isinstance(messages, Problem) else self.check({"messages": messages})

    def _explain(self, line: bytes) -> Sample | Problem:
        if b"\0" in line:
            reason = "holds zero bytes, as UTF-16 and binary files do. Save the file as UTF-8."
            return Problem("zero bytes", reason)
        try:
            text = line.decode().rstrip()
        except UnicodeDecodeError as error:
            reason = f"the byte at offset {error.start} of the line is not UTF-8. Save the file as UTF-8."
            return Problem("not UTF-8", reason)
        record = _read_json(text, "Each line must be one JSON object.")
        if isinstance(record, Problem):
            return record
        if not isinstance(record, dict):
            hint = CHAT_HINT if self.task_type == "CHAT_COMPLETION" else PAIR_HINT
            reason = f"the line is a JSON {_json_type(record)}; each line must be one object. {hint}"
            return Problem("not an object", reason)
        return self.check(cast(dict[str, Any], record))


def _read_json(text: str, expected: str) -> object:
    """The value of a JSON text, or the Problem with it, which ends with `expected`."""
    try:
        return json.loads(text, object_pairs_hook=_unique, parse_constant=_refuse_constant)
    except _Refused as error:
        return error.problem
    except json.JSONDecodeError as error:
        return Problem("not JSON", f"not JSON: {error.msg} at column {error.colno}. {expected}")
    except ValueError:  # Python does not convert numbers of more than 4,300 digits
        return Problem("long number", f"holds a number of thousands of digits. {expected}")
    except RecursionError:
        return Problem("nesting", f"nested too deeply to be a sample. {expected}")


_TURNS = ["user", "assistant"] * 64
"""Alternating roles; a chat with more takes the slow path."""


class _Refused(ValueError):
    """JSON that Python's reader accepts and tundish refuses."""

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem.text)
        self.problem = problem


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    record = dict(pairs)
    if len(record) != len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        reason = f"the key {_names([twice])} appears twice in one object. Keep one of them."
        raise _Refused(Problem("duplicate key", reason))
    return record


def _refuse_constant(name: str) -> NoReturn:
    raise _Refused(Problem("NaN", f"holds {name}, which is not JSON. Write text in its place, or drop the sample."))


def _quick_chat(line: bytes, record: dict[str, Any], system_message: bool) -> Messages | None:
    value = record.get("messages")
    if len(record) != 1 or type(value) is not list or not value:
        return None
    messages = cast(list[dict[str, Any]], value)
    try:
        roles: list[Any] = [message["role"] for message in messages]
        for message in messages:
            content: Any = message["content"]
            if type(content) is not str or not content or content.isspace():
                return None
    except (KeyError, TypeError):
        return None
    turns = roles[1:] if system_message and roles[0] == "system" else roles
    if not turns or turns[-1] != "assistant" or turns != _TURNS[: len(turns)]:
        return None
    count = len(messages)
    # Each message has four texts, two keys and two values; one more is the key "messages".
    if line.count(b'"') == 2 * (4 * count + 1):
        return messages  # no quotation marks but those of keys and values, so no other key and none twice
    once = _has_keys(line, {b'"messages"': 1, b'"role"': count, b'"content"': count})
    return messages if once and all(len(message) == 2 for message in messages) else None


def _has_keys(line: bytes, times: Mapping[bytes, int]) -> bool:
    """Whether each key, with its quotation marks, occurs this many times in a line, and none is written with escapes.

    A quotation mark inside a text is escaped, so each occurrence is a key, or a text of that one word.
    """
    if b"\\u00" in line and (b"\\u006" in line or b"\\u007" in line):
        return False
    return all(line.count(key) == count for key, count in times.items())


def _quick_pair(line: bytes, record: dict[str, Any]) -> PromptResponse | None:
    prompt, key = record.get("prompt"), "response" if "response" in record else "completion"
    response = record.get(key)
    if len(record) != 2 or type(prompt) is not str or type(response) is not str or not prompt or not response:
        return None
    once = line.count(b'"') == 8 or _has_keys(line, {b'"prompt"': 1, f'"{key}"'.encode(): 1})
    return (prompt, response) if once else None


def _json_type(value: object) -> str:
    names: list[tuple[Any, str]] = [
        (bool, "boolean"),
        (dict, "object"),
        (list, "array"),
        (str, "text"),
        (int | float, "number"),
        (type(None), "null"),
    ]
    # A table may contain bytes and dates, too.
    return next((name for kind, name in names if isinstance(value, kind)), type(value).__name__)


def _names(keys: Iterable[str]) -> str:
    names = ", ".join(sorted(keys)).encode(errors="backslashreplace").decode() or "none"
    return names if len(names) <= 200 else f"{names[:200]}…"


def _parse_pair(record: Mapping[str, Any]) -> Sample | Problem:
    keys = set(record)
    if keys not in ({"prompt", "response"}, {"prompt", "completion"}):
        names = _names(keys)
        return Problem(
            "keys",
            f"has the keys {names}; it must have prompt and response (or completion), and no others. {PAIR_HINT}",
        )
    response_key = "response" if "response" in keys else "completion"
    for key in ("prompt", response_key):
        if not isinstance(record[key], str):
            kind = _json_type(record[key])
            return Problem(f"{key} {kind}", f"{key!r} is a JSON {kind}; it must be text. {PAIR_HINT}")
        if not record[key]:
            return Problem(f"{key} empty", f"{key!r} is empty; neither may be. Fill it, or drop the sample.")
    return _utf8_problem(record["prompt"], record[response_key]) or (record["prompt"], record[response_key])


def _parse_chat(record: Mapping[str, Any], system_message: bool) -> Sample | Problem:
    if set(record) != {"messages"}:
        names = _names(record)
        return Problem("keys", f"has the keys {names}; it must have messages, and no others. {CHAT_HINT}")
    messages = record["messages"]
    if not isinstance(messages, list) or not messages:
        kind = "an empty list" if messages == [] else f"a JSON {_json_type(cast(object, messages))}"
        return Problem("messages", f"'messages' is {kind}; it must be a list of messages. {CHAT_HINT}")
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
        name = _names([repr(role)])
        return Problem("role", f"message {number} has the role {name}; it must be system, user or assistant.")
    if not isinstance(content, str):
        return Problem("content", f"the content of message {number} is a JSON {_json_type(content)}; it must be text.")
    if not content.strip():
        return Problem("empty content", f"the content of message {number} is empty. Fill it or drop the line.")
    return _utf8_problem(content)


def _order_problem(roles: Sequence[str], system_message: bool) -> Problem | None:
    if roles[0] == "system" and not system_message:
        text = (
            "the first message is from 'system', which this model's chat template does not accept. Move it into the "
            "user's message."
        )
        return Problem("system message", text)
    turns = roles[1:] if roles[0] == "system" else roles
    if "system" in turns:
        return Problem("system place", "a message from 'system' follows others; it must be the first.")
    if not turns or turns[0] != "user":
        first = f"the first message is from {turns[0]!r}" if turns else "there is only a message from 'system'"
        return Problem("first speaker", f"{first}; a chat must start with 'user'.")
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
                half = f"\\u{ord(text[error.start]):04x}"
                return Problem("surrogate", f"holds {half}, half of a surrogate pair. Write the whole character.")
    return None
