"""data/templates.py: every chat's turns are those of LLM Foundry's way, at one rendering a chat."""

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tundish.data import templates
from tundish.data.samples import Messages
from tundish.data.templates import CHATML, TEMPLATE_DATE, ChatTemplate, Kept, Rendered
from tundish.data.tokenizer import load_tokenizer
from tundish.errors import DataError

MakeTemplate = Callable[[str], ChatTemplate]


class Counting:
    """A tokenizer that counts the chats it renders."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.rendered: list[int] = []
        """Messages of each chat."""

    def apply_chat_template(self, chats: list[Messages], **settings: Any) -> Any:
        """As that of the tokenizer."""
        self.rendered.extend(map(len, chats))
        return self.tokenizer.apply_chat_template(chats, **settings)


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory, save_tokenizer: Any) -> MakeTemplate:
    """`make(template)`: that template with a tokenizer of its own."""
    folder = save_tokenizer(tmp_path_factory.mktemp("models") / "tokenizer", bos=True)

    def make(template: str) -> ChatTemplate:
        tokenizer: Any = load_tokenizer(str(folder), "CHAT_COMPLETION")
        tokenizer.chat_template = template
        return ChatTemplate(tokenizer)

    return make


def _chat(*contents: str, system: str | None = None) -> Messages:
    turns = [{"role": ("user", "assistant")[n % 2], "content": content} for n, content in enumerate(contents)]
    return turns if system is None else [{"role": "system", "content": system}, *turns]


def _expected(template: ChatTemplate, chat: Messages) -> list[tuple[str, str]] | str:
    """By LLM Foundry's way: rendering every prefix."""
    try:
        return template.turns_by_prefix(chat)
    except DataError as error:
        return error.message


def _found(rendered: Rendered | DataError) -> list[tuple[str, str]] | str:
    return rendered.message if isinstance(rendered, DataError) else rendered.turns


CONTENTS = st.one_of(
    st.sampled_from(
        [" hi ", "\n", "a", "\ufdd00\ufdd1", " \n\ufdd01\ufdd1\n ", "<think>x</think> y", "bad", "{{ x }}"]
    ),
    st.text(min_size=1, max_size=8),
).filter(str.strip)
CHATS = st.lists(
    st.builds(
        lambda contents, system: _chat(*contents[: len(contents) // 2 * 2], system=system),
        st.lists(CONTENTS, min_size=2, max_size=6),
        st.none() | CONTENTS,
    ),
    min_size=1,
    max_size=5,
)


@pytest.mark.parametrize("name", ["simple", "chatml", "llama 3.1", "mistral", "trim", "think", "refuses bad"])
@pytest.mark.parametrize("every_prefix", [templates.EVERY_PREFIX, 1], ids=["short", "as if long"])
def test_turns_are_those_of_rendered_prefixes(
    make: MakeTemplate,
    chat_templates: dict[str, str],
    name: str,
    every_prefix: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Prompts and replies would be cut in other places, and other tokens be trained."""
    monkeypatch.setattr(templates, "EVERY_PREFIX", every_prefix)
    template = make(chat_templates[name])
    counts = {"by places": 0, "by prefixes": 0, "refused": 0}

    @given(CHATS)
    def check(chats: list[Messages]) -> None:
        results = template.render(chats)
        assert len(results) == len(chats)
        for chat, result in zip(chats, results, strict=True):
            assert _found(result) == _expected(template, chat)
            kind = (
                "refused" if isinstance(result, DataError) else "by prefixes" if result.fixed is None else "by places"
            )
            counts[kind] += 1

    check()
    assert counts["by places"] > 10, "the short way is taken"
    assert (counts["refused"] > 0) == (name in ("mistral", "think", "refuses bad")), counts


@pytest.mark.parametrize("name", ["simple", "chatml", "llama 3.1", "trim", "think"])
def test_a_chat_is_rendered_once_whatever_its_turns(
    make: MakeTemplate, chat_templates: dict[str, str], name: str
) -> None:
    """A chat of fifty turns would be rendered a hundred times, up to each of its messages."""
    template = make(chat_templates[name])
    counting = template._tokenizer = Counting(template._tokenizer)
    chats = [_chat(*(f"{chat}: {turn}" for turn in range(100))) for chat in range(30)]
    first = template.render(chats)
    # The places of the contents are found by rendering marks up to each turn: once for these roles.
    assert len(counting.rendered) == 2 * 50 + len(chats) and counting.rendered.count(100) == len(chats) + 1
    counting.rendered.clear()
    assert template.render(chats) == first and counting.rendered == [100] * len(chats)
    assert all(isinstance(result, Rendered) and len(result.turns) == 50 for result in first)


def _long(messages: int, system: str | None = None) -> Messages:
    return _chat(*(f" {number}\n" for number in range(messages)), system=system)


@pytest.mark.parametrize("name", ["simple", "chatml", "llama 3.1", "mistral", "trim", "think"])
def test_a_long_chat_is_cut_as_its_prefixes(make: MakeTemplate, chat_templates: dict[str, str], name: str) -> None:
    """Its places are not found by rendering every prefix: from some turn on, other tokens would be trained."""
    template = make(chat_templates[name])
    for chat in (_long(templates.EVERY_PREFIX + 150), _long(templates.EVERY_PREFIX + 2, system="be short")):
        (rendered,) = template.render([chat])
        assert _found(rendered) == _expected(template, chat)
        assert isinstance(rendered, DataError) == (name == "mistral" and chat[0]["role"] == "system")
        assert isinstance(rendered, DataError) or rendered.fixed is not None


def test_what_is_rendered_for_a_long_chat_grows_as_its_turns(
    make: MakeTemplate, chat_templates: dict[str, str]
) -> None:
    """A chat of 4,000 turns took 13 s, one of 60,000 did not end."""
    template = make(chat_templates["chatml"])
    counting = template._tokenizer = Counting(template._tokenizer)
    for messages in (4_000, 16_000):
        counting.rendered.clear()
        (rendered,) = template.render([_long(messages)])
        assert isinstance(rendered, Rendered) and len(rendered.turns) == messages // 2
        assert sum(counting.rendered) < 10 * messages + templates.EVERY_PREFIX**2


@pytest.mark.parametrize(
    "odd",
    [
        "{% if loop.index0 == 300 %}!{% endif %}",
        "{% if loop.last and loop.index > 200 %}!{% endif %}",
        "{{ loop.index0 // 2 }}",
        "{% if messages | length == 340 %}!{% endif %}",
    ],
    ids=["one turn", "the last", "numbers", "one length"],
)
def test_a_template_that_is_odd_late_in_a_chat_is_found_out(make: MakeTemplate, odd: str) -> None:
    """What holds for the first turns would be taken to hold for all."""
    template = make(
        f"{{% for m in messages %}}<{{{{ m['role'] }}}}>{{{{ m['content'] }}}}{odd}</s>{{% endfor %}}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    (rendered,) = template.render([_long(340)])
    assert _found(rendered) == _expected(template, _long(340))


def test_a_chat_that_needs_all_its_prefixes_has_a_limit(make: MakeTemplate, monkeypatch: pytest.MonkeyPatch) -> None:
    """It would hang: what is rendered grows with the square of its turns."""
    template = make("{% for m in messages %}<{{ m['role'] }}>{{ m['content'] | upper }}{{ loop.index }}{% endfor %}")
    assert templates.MOST_RENDERED > 1_000_000
    monkeypatch.setattr(templates, "MOST_RENDERED", 1_000)
    good, bad = template.render([_long(30), _long(100)])
    assert isinstance(good, Rendered) and isinstance(bad, DataError)
    assert bad.message.startswith("the chat has 100 messages") and "Split the chat into several." in bad.message


def test_places_of_few_messages_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """Data in which no two chats have as many turns would fill the memory."""
    monkeypatch.setattr(templates, "MOST_KEPT", 10)
    made = list[int]()
    kept = Kept(lambda key: made.append(len(key)))
    for length in (4, 6, 4, 6, 1, 4, 30, 30):
        kept(("user",) * length)
    assert made == [4, 6, 1, 4, 30] and list(kept._values) == [("user",) * 30]


def test_what_the_template_wrote_is_told(make: MakeTemplate, chat_templates: dict[str, str]) -> None:
    """Control tokens of the template would be taken for text, or those of a message for the template's."""
    (rendered,) = make(chat_templates["chatml"]).render([_chat(" <|im_end|> two?", "four", system="be short")])
    assert isinstance(rendered, Rendered)
    assert rendered.fixed == (
        "<|im_start|>system\n",
        "<|im_end|>\n<|im_start|>user\n",
        "<|im_end|>\n<|im_start|>assistant\n",
        "<|im_end|>\n",
    )
    prompt = (
        "<|im_start|>system\nbe short<|im_end|>\n<|im_start|>user\n <|im_end|> two?<|im_end|>\n<|im_start|>assistant\n"
    )
    assert rendered.turns == [(prompt, "four<|im_end|>\n")]


def test_stripped_contents_are_stripped(make: MakeTemplate, chat_templates: dict[str, str]) -> None:
    """Most templates strip: each such chat would be rendered prefix by prefix."""
    (rendered,) = make(chat_templates["trim"]).render([_chat(" \u3000 two?\x1c\x85\t", "\n\n four \u2028")])
    assert isinstance(rendered, Rendered) and rendered.fixed is not None
    assert rendered.turns == [("### user:\ntwo?\n\n### assistant:\n", "four\n\n")]


def test_our_chatml_takes_every_role(make: MakeTemplate, chat_templates: dict[str, str]) -> None:
    """A tokenizer without template would train other text than one with ChatML."""
    chats = [_chat("a", "b", system="c"), _chat("a", "b", "c", "d")]
    assert make(CHATML).render(chats) == make(chat_templates["chatml"]).render(chats)


@pytest.mark.parametrize(
    ("edit", "short"),
    [
        ("m['content'] | trim", True),
        ("m['content'] | upper", False),
        ("m['content'].lstrip()", False),
        ("m['content'].rstrip('\\n ')", False),
        ("m['content'] | replace('a', 'b')", True),
        ("m['content'] ~ m['content'] | length", False),
        ("m['content'] ~ m['content']", False),
        ("m['content'][:3]", False),
        ("'' if m['content'] == 'aa' else m['content']", True),
    ],
)
def test_edited_contents_are_edited(make: MakeTemplate, edit: str, short: bool) -> None:
    """A template that changes contents would be trained as if it did not."""
    template = make(
        f"{{% for m in messages %}}<{{{{ m['role'] }}}}>{{{{ {edit} }}}}</s>{{% endfor %}}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    plain, changed = _chat(" xy", "z ", "xyx\n", "z"), _chat(" a b ", "aa", "\nba a", " abab ")
    for result, chat in zip(template.render([plain, changed]), (plain, changed), strict=True):
        assert isinstance(result, Rendered) and result.turns == template.turns_by_prefix(chat)
        assert result.fixed is None or short
    (alone,) = template.render([plain])
    assert isinstance(alone, Rendered) and (alone.fixed is not None) == short


def test_a_template_that_forgets_earlier_thoughts_refuses_those_chats_alone(
    make: MakeTemplate, chat_templates: dict[str, str]
) -> None:
    """Targets would be marked in the wrong places; or every chat be refused for what few hold."""
    template = make(chat_templates["think"])
    thought = "<think>2 + 2</think>four"
    chats = [
        _chat("a", "b", "c", "d"),
        _chat("a", thought, "b", "c"),
        _chat("a", "b", "c", thought),
        _chat("a", thought),
    ]
    first, rewritten, *others = template.render(chats)
    assert isinstance(rewritten, DataError)
    assert "rewrites earlier turns, so a reply cannot be separated from its prompt" in rewritten.message
    assert isinstance(first, Rendered) and all(isinstance(other, Rendered) for other in others)
    for other in others:
        assert isinstance(other, Rendered) and other.turns[-1][1] == f"{thought}</s>"


def test_a_template_without_generation_prompt_is_refused(make: MakeTemplate) -> None:
    """With a reply's header in the reply, or a generation prompt that no reply has, places are not what they seem."""
    head = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}</s>{% endfor %}"
    (without,) = make(head).render([_chat("a", "b")])
    assert isinstance(without, Rendered) and without.turns == [("<user>a</s>", "<assistant>b</s>")]
    (other,) = make(head + "{% if add_generation_prompt %}<think>{% endif %}").render([_chat("a", "b")])
    assert isinstance(other, DataError) and "rewrites earlier turns" in other.message


def test_a_template_that_ends_in_another_way_refuses_several_turns(make: MakeTemplate) -> None:
    """The end of a conversation would be trained in its middle."""
    template = make(
        "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% if loop.last and m['role'] == 'assistant' %}"
        "<end>{% endif %}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    one, two = template.render([_chat("a", "b"), _chat("a", "b", "c", "d")])
    assert isinstance(one, Rendered) and one.turns == [("<user>a<assistant>", "b<end>")]
    assert isinstance(two, DataError) and "rewrites earlier turns" in two.message


def test_one_refused_chat_leaves_the_others(make: MakeTemplate, chat_templates: dict[str, str]) -> None:
    """A single bad chat would have all of a batch refused, or be let through with it."""
    template = make(chat_templates["refuses bad"])
    chats = [_chat("a", "b"), _chat("bad", "b"), _chat("c", "d", "e", "f"), _chat("g", "a bad one")]
    results = template.render(chats)
    assert [isinstance(result, DataError) for result in results] == [False, True, False, True]
    for result in (results[1], results[3]):
        assert _found(result) == "the model's chat template refuses the conversation: no bad words."
    for chat, result in ((chats[0], results[0]), (chats[2], results[2])):
        assert _found(result) == template.turns_by_prefix(chat)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ raise_exception('no  chats,\n please' * 100) }}", "refuses the conversation: no chats, please"),
        ("{{ messages[7]['content'] }}", "refuses the conversation: list object has no element 7"),
        ("{{ 1 + messages[0]['content'] }}", "fails on the conversation (TypeError"),
        ("{{ messages[0]['content'] | int // 0 }}", "the conversation (ZeroDivisionError"),
        ("{{ messages.index(1) }}", "fails on the conversation (ValueError"),
        ("{{ messages.__class__.__subclasses__() }}", "refuses the conversation"),
        ("{% for m in messages %}{{ m['content'] }}", "refuses the conversation: "),
    ],
    ids=["raises", "index", "type", "zero", "value", "unsafe", "syntax"],
)
def test_a_template_that_fails_is_an_error_of_the_data(make: MakeTemplate, template: str, message: str) -> None:
    """The run would end in a traceback of the template engine."""
    (result,) = make(template).render([_chat("a", "b")])
    assert isinstance(result, DataError)
    assert message in result.message and "\n" not in result.message and len(result.message) < 500


def test_a_template_that_prints_the_date_gets_a_fixed_one(make: MakeTemplate) -> None:
    """The same data would give other tokens tomorrow."""
    for date in ("date_string", "strftime_now('%d %b %Y')"):
        template = f"{{{{ {date} }}}}{{% for m in messages %}}<{{{{ m['role'] }}}}>{{{{ m['content'] }}}}{{% endfor %}}"
        (rendered,) = make(template).render([_chat("a", "b")])
        assert isinstance(rendered, Rendered) and rendered.turns == [(f"{TEMPLATE_DATE}<user>a", "<assistant>b")]


def test_contents_that_look_like_marks_are_contents(make: MakeTemplate, chat_templates: dict[str, str]) -> None:
    """A text with the noncharacters of marks would be put in the place of another message."""
    for name in ("simple", "trim", "llama 3.1"):
        chat = _chat("\ufdd01\ufdd1", " \n\ufdd00\ufdd1\n ", "\ufdd0", "\ufdd13\ufdd1")
        template = make(chat_templates[name])
        (rendered,) = template.render([chat])
        assert isinstance(rendered, Rendered) and rendered.turns == template.turns_by_prefix(chat)
        assert rendered.fixed is not None and "\ufdd0" not in "".join(rendered.fixed)
