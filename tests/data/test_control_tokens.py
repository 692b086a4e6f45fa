"""data/control.py: control tokens in what people write are found, and stay text."""

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tundish.data.control_tokens import Finder, Known, PlainText
from tundish.data.tokenizer import load_tokenizer


@given(st.lists(st.text("<|a>x", min_size=1, max_size=4), max_size=5), st.text("<|a>x", max_size=12))
def test_the_finder_finds_what_is_there(words: list[str], text: str) -> None:
    """A control token that begins as another does would be overlooked."""
    found = Finder(words).find(text)
    there = [(text.index(word), -len(word), word) for word in words if word in text]
    assert found == (min(there)[2] if there else None)


def test_what_a_template_writes_is_known() -> None:
    """A message could write a border that is no token; or any text with a short one be refused."""
    control = Finder(["<s>", "</s>"])
    fixed = ("<s>### user:\n", "\n\n### assistant:\n", "</s>\n### user:\n", "\n>>\n", "</s>")
    assert Known.of(fixed, control) == Known(frozenset({"<s>", "</s>"}), 3, ("\n\n### assistant:\n",))
    assert Known.of(("### user", "</s>"), control).borders == (), "what begins and ends a chat is no border"


@pytest.mark.parametrize("name", ["tiny", "letters", "llama 3", "mistral", "mistral first"])
def test_a_word_as_text_is_that_word(
    name: str,
    tmp_path: Path,
    save_tokenizer: Any,
    request: pytest.FixtureRequest,
) -> None:
    """Letters of it would be lost, or be those of another word, where a tokenizer joins what stands side by side."""
    from tokenizers import pre_tokenizers

    if name in ("tiny", "letters"):
        folder = save_tokenizer(tmp_path / "model")
    else:
        folder = request.getfixturevalue(f"{name.removesuffix(' first').replace(' ', '')}_tokenizer")
    tokenizer: Any = load_tokenizer(str(folder), "CHAT_COMPLETION")
    if name == "letters":
        # Words that merges would join to a letter before them, as in "and two", and none that is a token otherwise.
        tokenizer.add_special_tokens({"additional_special_tokens": ["nd two", "zy dog", "nd-four", "x jumps"]})
    if name == "mistral first":
        # Which puts a blank before a text's first word, and so before that of each piece that is tokenized apart.
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    words = [str(token) for token in tokenizer.all_special_tokens]
    plain = PlainText(tokenizer.backend_tokenizer.to_str(), words)
    assert len(words) >= 2
    control = set(tokenizer.all_special_ids)
    for word in words[:12]:
        messages, masked = plain.mask([{"role": "user", "content": f"x {word} y {word}{word}"}], Finder(words))
        assert (masked and word not in messages[0]["content"]) or word in ("x", "t")
        ids = plain.unmask(plain.encode(messages[0]["content"]))
        assert not control & set(ids.tolist())
        decoded = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        assert decoded.strip() == f"x {word} y {word}{word}".strip()
