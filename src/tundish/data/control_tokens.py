"""Control tokens: finds them in texts, counts those that a template writes, and keeps those in messages as text."""

import functools
import re
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from tundish.data.bpe import Ids
from tundish.data.samples import Messages
from tundish.data.templates import CLOSE, MARK, OPEN

BORDER_LETTERS = 4
"""A text between turns with fewer letters and digits is too common to be searched for in messages."""


class Finder:
    """Finds any of a set of words in a text; fast for texts without one."""

    def __init__(self, words: Iterable[str]) -> None:
        longest_first = sorted(words, key=lambda word: (-len(word), word))
        self._starts = sorted({word[:2] for word in longest_first})
        self._words = longest_first

    @functools.cached_property
    def pattern(self) -> re.Pattern[str]:
        """Matches any of the words, the longest one at each place."""
        return re.compile("|".join(map(re.escape, self._words)) or r"(?!)")

    def find(self, text: str) -> str | None:
        """The first of the words in the text; None: it contains none."""
        if not any(start in text for start in self._starts):
            return None
        match = self.pattern.search(text)
        return None if match is None else match[0]


class Known(NamedTuple):
    """What a chat template writes around contents."""

    added: frozenset[str]
    """The control tokens in it."""
    control: int
    """How often they occur in it."""
    borders: tuple[str, ...]
    """Texts between two contents that are not tokens: inside a content, they could not be distinguished from a turn."""

    @classmethod
    def of(cls, fixed: tuple[str, ...], control: Finder) -> "Known":
        """From the texts around and between contents."""
        tokens = [token for text in fixed for token in control.pattern.findall(text)]
        plain = (text for text in fixed[1:-1] if control.find(text) is None)
        borders = dict.fromkeys(text for text in plain if sum(letter.isalnum() for letter in text) >= BORDER_LETTERS)
        return cls(frozenset(tokens), len(tokens), tuple(borders))


class PlainText:
    """Tokenizes chats whose messages contain control tokens as text.

    Before such a chat is templated and tokenized, each of them is replaced by a mark; a second tokenizer has the marks
    as tokens, so that everything around them is tokenized as it is around a token. Then each mark is replaced by the
    ids of the word as text.
    """

    def __init__(self, serialized: str, control: Sequence[str]) -> None:
        self._serialized = serialized
        # A message's own noncharacters too: they could look like marks.
        words = [*control, OPEN, CLOSE]
        self._marks = {word: MARK.format(number) for number, word in enumerate(words)}
        self._finder = Finder(words)

    def mask(self, messages: Messages, control: Finder) -> tuple[Messages, bool]:
        """The messages with marks, and whether they have any."""
        if all(control.find(message["content"]) is None for message in messages):
            return messages, False
        texts = (
            self._finder.pattern.sub(lambda match: self._marks[match[0]], message["content"]) for message in messages
        )
        return [{**message, "content": text} for message, text in zip(messages, texts, strict=True)], True

    @functools.cached_property
    def _backend(self) -> Any:
        from tokenizers import AddedToken, Tokenizer

        backend = Tokenizer.from_str(self._serialized)
        # Not as special tokens, so that they stay tokens where special ones are encoded as text.
        backend.add_tokens([AddedToken(mark, normalized=False) for mark in self._marks.values()])
        return backend

    @functools.cached_property
    def _words(self) -> dict[int, Ids]:
        """The ids of each word as a text, by the id of its mark."""
        return {self._backend.token_to_id(mark): self._as_text(word) for word, mark in self._marks.items()}

    def _as_text(self, word: str) -> Ids:
        self._backend.encode_special_tokens = True
        try:
            # Split, the word is not a token; behind a mark, each part is tokenized as it will be in a chat.
            texts = [self._marks[word] + part for part in (word[:1], word[1:])]
            parts = [self._backend.encode(text, add_special_tokens=False).ids for text in texts]
        finally:
            self._backend.encode_special_tokens = False
        mark = self._backend.token_to_id(self._marks[word])
        return np.array([number for part in parts for number in part[part.index(mark) + 1 :]], dtype=np.int32)

    def encode(self, text: str) -> Ids:
        """Ids of a templated text, marks included."""
        return np.array(self._backend.encode(text, add_special_tokens=False).ids, dtype=np.int32)

    def unmask(self, ids: Ids) -> Ids:
        """The ids, with those of the words in place of the marks."""
        parts = (self._words.get(number, np.array([number], dtype=np.int32)) for number in ids.tolist())
        return np.concatenate([np.zeros(0, np.int32), *parts])
