"""Tokens as readable text, in which the trained parts are marked."""

import html
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tundish.base.text import printable

Segment = tuple[str, bool]
"""A text, and whether its tokens are targets."""


def segments(tokens: NDArray[Any], targets: NDArray[Any], backend: Any) -> Iterator[Segment]:
    """Runs of trained and untrained text, special tokens included.

    Args:
        tokens: ids [n].
        targets: [n], not 0 where the token is a target.
        backend: the `tokenizers.Tokenizer`.
    """
    marks = targets.astype(bool)
    borders = (np.flatnonzero(np.diff(marks)) + 1).tolist()
    for part, bits in zip(np.split(tokens, borders), np.split(marks, borders), strict=True):
        if len(part):
            yield printable(backend.decode(part.tolist(), skip_special_tokens=False)), bool(bits[0])


def marked_html(parts: Sequence[Segment]) -> str:
    """A `pre` element in which trained text is colored."""
    marked = "".join(
        f'<mark style="background:#c8e6c9">{html.escape(text)}</mark>' if trained else html.escape(text)
        for text, trained in parts
    )
    return f'<pre style="white-space:pre-wrap;border:1px solid #ccc;padding:6px">{marked}</pre>'
