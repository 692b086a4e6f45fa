"""data/records.py: what a sample must be, and what is said of one that is not."""

import json
from collections import Counter
from typing import Any, cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tundish.data.samples import Messages, Problem, Rules
from tundish.plan.spec import TaskType

U, A, S = ({"role": role, "content": f"from {role}"} for role in ("user", "assistant", "system"))
CHATS, PAIRS = Rules("CHAT_COMPLETION", True), Rules("INSTRUCTION_FINETUNE", True)


def _parse(record: Any, task: TaskType = "CHAT_COMPLETION", *, system_message: bool = True) -> Any:
    line = record if isinstance(record, bytes) else json.dumps(record).encode()
    return Rules(task, system_message).parse(line)


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


CHAT_LINE = json.dumps(_chat(U, A)).encode()


@pytest.mark.parametrize(
    ("record", "found"),
    [
        (_chat(U), "the last message is from 'user'; a chat must end with 'assistant'"),
        (_chat(U, A, U), "the last message is from 'user'; a chat must end with 'assistant'"),
        (_chat(A), "the first message is from 'assistant'; a chat must start with 'user'"),
        (_chat(S, A), "the first message is from 'assistant'; a chat must start with 'user'"),
        (_chat(S), "there is only a message from 'system'; a chat must start with 'user'"),
        (_chat(U, U, A), "messages 1 and 2 are both from 'user'; user and assistant must alternate"),
        (_chat(S, U, A, A), "messages 3 and 4 are both from 'assistant'"),
        (_chat(U, S, A), "a message from 'system' follows others; it must be the first"),
        (_chat(S, S, U, A), "a message from 'system' follows others"),
        (_chat(), "'messages' is an empty list; it must be a list of messages"),
        ({"messages": "hello"}, "'messages' is a JSON text; it must be a list"),
        ({"messages": None}, "'messages' is a JSON null"),
        (_chat(U, "hello"), "message 2 must have role and content, and nothing else"),
        (_chat(U | {"name": "x"}, A), "message 1 must have role and content, and nothing else"),
        (_chat({"role": "user"}, A), "message 1 must have role and content"),
        (_chat({"role": "tool", "content": "x"}, A), "message 1 has the role 'tool'; it must be system, user or"),
        (_chat({"role": ["user"], "content": "x"}, A), "message 1 has the role ['user']"),
        (_chat(U, {"role": "assistant", "content": None}), "the content of message 2 is a JSON null; it must be text"),
        (_chat(U, {"role": "assistant", "content": 4}), "the content of message 2 is a JSON number; it must be text"),
        (_chat(U, {"role": "assistant", "content": " \n"}), "the content of message 2 is empty. Fill it"),
        ({"messages": [U, A], "id": 1}, "has the keys id, messages; it must have messages, and no others"),
        ({"prompt": "a", "response": "b"}, "has the keys prompt, response; it must have messages, and no others"),
        ({}, "has the keys none; it must have messages, and no others"),
        ([U, A], "the line is a JSON array; each line must be one object"),
        ("hello", "the line is a JSON text; each line must be one object"),
        (True, "the line is a JSON boolean; each line must be one object"),
        (None, "the line is a JSON null; each line must be one object"),
        (b'{"messages": [', "not JSON: Expecting value at column 15. Each line must be one JSON object"),
        (b"\xff{}", "the byte at offset 0 of the line is not UTF-8. Save the file as UTF-8"),
        ('{"a": "ö"}'.encode("utf-16-le"), "holds zero bytes, as UTF-16 and binary files do. Save the file as UTF-8"),
        pytest.param(b"[" * 100_000, "nested too deeply to be a sample", id="deep"),
        pytest.param(b'{"messages": ' + b"1" * 5_000 + b"}", "holds a number of thousands of digits", id="huge number"),
        (b'{"messages": [{"role": "user", "content": "\\ud800"}]}', "holds \\ud800, half of a surrogate pair"),
        (b'{"\\ud800": 1}', "has the keys \\ud800; it must have messages, and no others"),
        (_chat(U | {"role": "\ud800"}, A), "message 1 has the role '\\ud800'"),
        (b'{"messages": [], "messages": []}', "the key messages appears twice in one object. Keep one of them"),
        (b'{"messages": [], "m\\u0065ssages": []}', "the key messages appears twice"),
        (CHAT_LINE.replace(b'"role"', b'"role": "system", "role"', 1), "the key role appears twice in one object"),
        (CHAT_LINE.replace(b'"role"', b'"r\\u006fle": "user", "role"', 1), "the key role appears twice"),
        (CHAT_LINE.replace(b'"role"', b'"r\\u006Fle": "user", "r\\u006fle"', 1), "the key role appears twice"),
        (CHAT_LINE.replace(b'"content"', b'"content": "x", "content"', 1), "the key content appears twice"),
        (CHAT_LINE.replace(b'"content"', b'"content": {"a": 1, "a": 2}, "more"', 1), "the key a appears twice"),
        (b'{"messages": NaN}', "holds NaN, which is not JSON. Write text in its place"),
        (b'{"messages": [{"role": "user", "content": -Infinity}]}', "holds -Infinity, which is not JSON"),
        (b'{"messages": Infinity}', "holds Infinity, which is not JSON"),
        (b"\xef\xbb\xbf" + CHAT_LINE, "not JSON"),
        (CHAT_LINE + b"}", "not JSON: Extra data at column"),
        (CHAT_LINE.replace(b"from user", b"from\tuser"), "not JSON: Invalid control character at"),
        (CHAT_LINE.replace(b"from user", b"caf\xe9"), "the byte at offset 46 of the line is not UTF-8"),
        (CHAT_LINE.replace(b"from user", b"\xed\xa0\x80"), "the byte at offset 43 of the line is not UTF-8"),
        (CHAT_LINE.replace(b"from assistant", b"x \\udc00"), "holds \\udc00, half of a surrogate pair"),
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
        ({"prompt": "a"}, "has the keys prompt; it must have prompt and response (or completion)"),
        (
            {"prompt": "a", "response": "b", "completion": "c"},
            "has the keys completion, prompt, response; it must have",
        ),
        ({"prompt": "a", "response": "b", "id": 1}, "has the keys id, prompt, response"),
        ({"messages": [U, A]}, "has the keys messages; it must have prompt and response"),
        ({"prompt": 1, "response": "b"}, "'prompt' is a JSON number; it must be text"),
        ({"prompt": "a", "completion": ["b"]}, "'completion' is a JSON array; it must be text"),
        ({"prompt": "", "response": "b"}, "'prompt' is empty; neither may be"),
        ({"prompt": "a", "response": ""}, "'response' is empty; neither may be"),
        ({"prompt": "a", "response": 1.5}, "'response' is a JSON number; it must be text"),
        ({"prompt": "a", "response": None}, "'response' is a JSON null; it must be text"),
        ({"prompt": "a\ud83d", "response": "b"}, "holds \\ud83d, half of a surrogate pair"),
        ({"prompt": "a", "response": "\udfff b"}, "holds \\udfff, half of a surrogate pair"),
        (b'{"prompt": "a", "response": "b", "response": "b"}', "the key response appears twice in one object"),
        (b'{"prompt": "a", "completion": "b", "c\\u006Fmpletion": "b"}', "the key completion appears twice"),
        (b'{"prompt": "a", "\\u0070rompt": "a", "response": "b"}', "the key prompt appears twice"),
        (b'{"prompt": "a", "response": NaN}', "holds NaN, which is not JSON"),
        (["a", "b"], 'the line is a JSON array; each line must be one object. Write {"prompt": "…", "response": "…"}.'),
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
    assert isinstance(problem, Problem) and "which this model's chat template does not accept" in problem.text


@pytest.mark.parametrize(
    ("task", "record", "sample"),
    [
        ("CHAT_COMPLETION", CHAT_LINE + b" \r", [U, A]),
        ("CHAT_COMPLETION", CHAT_LINE.replace(b'"role"', b'"r\\u006fle"'), [U, A]),
        ("CHAT_COMPLETION", CHAT_LINE.replace(b"from user", b"\\u0066rom user"), [U, A]),
        ("CHAT_COMPLETION", json.dumps(_chat(U | {"content": "role"}, A)).encode(), [U | {"content": "role"}, A]),
        (
            "CHAT_COMPLETION",
            json.dumps(_chat(U, A | {"content": '{"role": "content", "messages": []}'})).encode(),
            [U, A | {"content": '{"role": "content", "messages": []}'}],
        ),
        ("CHAT_COMPLETION", _chat(U, A | {"content": "\x00\ufffe👍"}), [U, A | {"content": "\x00\ufffe👍"}]),
        ("INSTRUCTION_FINETUNE", b'{"\\u0070rompt":"prompt","response":"\\ud83d\\udc4d"}', ("prompt", "👍")),
        ("INSTRUCTION_FINETUNE", {"prompt": "completion", "completion": "response"}, ("completion", "response")),
        ("INSTRUCTION_FINETUNE", {"prompt": " ", "response": "\n"}, (" ", "\n")),
    ],
)
def test_odd_spellings_of_good_samples_are_taken(task: Any, record: Any, sample: Any) -> None:
    """Escapes, blanks, and texts that look like keys would have good lines refused, or changed."""
    assert _parse(record, task) == sample


def test_a_line_that_is_too_long_is_refused_unread(monkeypatch: pytest.MonkeyPatch) -> None:
    """A line of gigabytes would be held in memory many times over; or one that just fits be refused."""
    monkeypatch.setattr("tundish.data.samples.MAX_LINE_BYTES", 1 << 20)
    room = (1 << 20) - len(CHAT_LINE)
    fits = CHAT_LINE.replace(b"from user", b"from user" + b"x" * room)
    assert len(fits) == 1 << 20 and isinstance(_parse(fits), list)
    problem = _parse(fits + b" ")
    assert problem == Problem(
        "line too long", "the line is longer than 1 MiB, the most that a sample may have. Split it, or drop it."
    )


def test_rows_of_tables_keep_the_same_rules() -> None:
    """A table would be let in what a file is refused for."""
    assert CHATS.check({"messages": [S, U, A]}) == [S, U, A]
    assert PAIRS.check({"prompt": "a", "completion": "b"}) == ("a", "b")
    for rules, record in ((CHATS, {"messages": [U]}), (CHATS, {"messages": None}), (PAIRS, {"prompt": None})):
        found = rules.check(record)
        assert isinstance(found, Problem) and found == _parse(record, rules.task_type)


def test_the_same_mistake_has_one_rule_wherever_it_is() -> None:
    """Lines with one mistake would be told apart by the number of the message, one finding a line."""
    rules = [_parse(_chat(*chat)).rule for chat in ([U, U, A], [S, U, A, U, U, A], [U, A, U, U])]
    assert rules == ["two user"] * 3
    others = [_parse(record).rule for record in (_chat(U), _chat(A), _chat(U, A, A), {"id": 1}, [], b"{")]
    assert len({*others, "two user"}) == 7


SPELLINGS = [
    '"x"', '"role"', '"content"', '"messages"', '"prompt"', '"response"', '"user"', '"assistant"', r'"\"role\":"',
    r'"\u0072ole"', r'"\u006F \u0000"', r'"{\"role\": 1}"', r'"\\"',
    '"é👍"', r'"\ud83d\udc4d"', '"\ufdd0"', '" x\u2003"',
]  # fmt: skip
"""Texts as JSON writes them, among them those that look like keys."""
CHANGES = [
    *[('"role"', new) for new in (r'"r\u006fle"', r'"\u0072\u006F\u006cE"', '"name"', '"role":"user","role"')],
    *[('"role"', new) for new in (r'"r\u006fle":"user","role"', r'"id":1,"role"', r'"r\u006fle":"tool","r\u006fle"')],
    *[('"content"', new) for new in (r'"\u0063ontent"', '"content":"x","content"', '"content":null,"content"')],
    *[('"messages"', new) for new in (r'"messages":[],"messages"', r'"m\u0065ssages"', '"id":1,"messages"')],
    *[('"messages"', new) for new in (r'"m\u0065ssages":[],"messages"', '"messages" \t', '"prompt"')],
    *[('"prompt"', new) for new in ('"prompt":"x","prompt"', r'"\u0070rompt"', r'"\u0070rompt":"","prompt"', '"id"')],
    *[('"response"', new) for new in ('"completion"', r'"completion":"x","response"', '"response":"x","response"')],
    *[('"response"', new) for new in (r'"respons\u0065":"x","response"', r'"r\u0065sponse"', '"prompt"')],
    *[('"user"', new) for new in ('"assistant"', '"system"', '"tool"', '"User"', "null", '["user"]', r'"\u0075ser"')],
    *[('"assistant"', new) for new in ('"user"', '"system"', '""', "1")],
    *[('"x"', new) for new in ('""', '" "', r'"\u2003\n"', "null", "1", "NaN", "[]", '{"a":1,"a":2}', r'"\ud800"')],
    *[("{", new) for new in ("{ \r", '{"a":1,', "[{", "")],
    *[("}", new) for new in ("}\t", "},{}", "}}", ',"a":1}', "")],
    *[("[", new) for new in ("[ ", '["x",', "{", "[{},")],
    *[(",", ", "), (",", ",,"), (",", ""), (":", " : "), (":", ""), ("x", "\x01"), ("x", "\ufeff"), ("x", "\\")],
]  # fmt: skip
"""What is put in the place of what: changes that matter and changes that do not."""


@st.composite
def _lines(draw: st.DrawFn, task: TaskType) -> bytes:
    """A line of JSONL that is a sample, or almost, in a spelling that a JSON writer would not choose."""
    roles = draw(st.sampled_from([["user", "assistant"], ["system", "user", "assistant"], ["user", "assistant"] * 2]))
    texts = draw(st.lists(st.sampled_from(SPELLINGS), min_size=4, max_size=4))
    if task == "CHAT_COMPLETION":
        messages = [f'{{"role":"{role}","content":{text}}}' for role, text in zip(roles, texts, strict=False)]
        line = f'{{"messages":[{",".join(messages)}]}}'
    else:
        line = f'{{"prompt":{texts[0]},"response":{texts[1]}}}'
    for old, new in draw(st.lists(st.sampled_from([change for change in CHANGES if change[0] in line]), max_size=2)):
        parts = line.split(old)
        at = draw(st.integers(1, max(1, len(parts) - 1)))
        line = old.join(parts[:at]) + (new + old.join(parts[at:]) if len(parts) > 1 else "")
    return line.encode()


@pytest.mark.parametrize("task", ["CHAT_COMPLETION", "INSTRUCTION_FINETUNE"])
def test_the_short_way_takes_nothing_that_the_long_way_refuses(task: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lines that break a rule would be trained, for the speed of it; or be read as another sample."""
    ways, explain = Counter[str](), Rules._explain
    monkeypatch.setattr(Rules, "_explain", lambda rules, line: ways.update(long=1) or explain(rules, line))

    @settings(max_examples=600)
    @given(_lines(task), st.booleans())
    def check(line: bytes, system_message: bool) -> None:
        rules = Rules(task, system_message)
        before = ways["long"]
        found, explained = rules.parse(line), explain(rules, line)
        quick = ways["long"] == before
        ways["quick"] += quick
        ways["refused"] += isinstance(explained, Problem)
        ways["only the long way"] += not quick and not isinstance(explained, Problem)
        assert found == explained and type(found) is type(explained)

    check()
    assert min(ways["quick"], ways["refused"]) >= 150 and ways["only the long way"] >= 10, ways


@pytest.mark.parametrize("task", ["CHAT_COMPLETION", "INSTRUCTION_FINETUNE"])
def test_what_is_taken_is_what_the_line_says(task: Any) -> None:
    """Held against Python's own reader and the rules in words: a shape let through would fail in the template."""
    taken = 0

    @settings(max_examples=400)
    @given(_lines(task))
    def check(line: bytes) -> None:
        nonlocal taken
        sample = Rules(task, True).parse(line)
        if isinstance(sample, Problem):
            sample.text.encode()  # can be printed
            return
        taken += 1
        record = json.loads(line)
        if isinstance(sample, tuple):
            assert len(record) == 2 and sample == (record["prompt"], record.get("response", record.get("completion")))
            assert all(sample) and all(isinstance(text, str) and text.encode() for text in sample)
            return
        assert record == {"messages": sample} and all(set(message) == {"role", "content"} for message in sample)
        messages = cast(Messages, sample)
        roles = [message["role"] for message in messages]
        turns = roles[1:] if roles[0] == "system" else roles
        assert turns == ["user", "assistant"] * (len(turns) // 2) and turns
        assert all(message["content"].strip().encode() for message in messages)

    check()
    assert taken >= 100


@settings(max_examples=300)
@given(
    st.binary(max_size=60) | st.text(max_size=30).map(str.encode) | _lines("CHAT_COMPLETION").map(lambda line: line[3:])
)
def test_no_line_is_too_odd_to_be_told_of(line: bytes) -> None:
    """One line of rubbish would end preparation in a traceback."""
    for rules in (CHATS, PAIRS):
        found = rules.parse(line)
        assert not isinstance(found, Problem) or (
            found.rule and found.text.endswith((".", "}")) and "\n" not in found.text
        )
