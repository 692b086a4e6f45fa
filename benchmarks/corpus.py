"""Text to measure with: the documentation and code of installed packages, shuffled into chats and .txt files.

It is real text: English prose from docstrings and READMEs, with lists, numbers, code and some other scripts, about as
many bytes a token as chats that people write. The lock file and a seed decide it to the byte.
"""

import random
import re
import sysconfig
import textwrap
from collections.abc import Iterable, Iterator
from functools import cache
from itertools import islice
from math import exp
from pathlib import Path

import orjson

SEED = 2026
PACKAGE_CHARS = 1_500_000
"""Most that is taken from one package: generated code repeats itself."""
PROSE_SHARE = 0.75
"""Share of the text; the rest is code, lists and tables."""
PAGE = 4_000
"""Paragraphs that are shuffled and joined at a time."""
SIGN = re.compile(r"[^A-Za-z ]")
SMART = str.maketrans({"'": "’", '"': "”", "*": "•"})
LEFT_OUT = ("Copyright", "<|", "[INST]", "<s>", "</s>", "<unk>")
"""No licenses, which repeat themselves; no control tokens, which tundish and LLM Foundry treat differently."""
TURNS = (1,) * 11 + (2,) * 5 + (3,) * 2 + (4,) * 2
"""Questions and answers of a chat, with the frequency that each has here."""


def _packages() -> list[Path]:
    return sorted(path for path in Path(sysconfig.get_path("purelib")).iterdir() if path.is_dir())


def _texts(package: Path) -> Iterator[str]:
    """Docstrings and some code of every module, and the description of the package."""
    for path in sorted(path for path in package.rglob("*") if path.name == "METADATA" or path.suffix in (".md", ".py")):
        content = path.read_text(errors="ignore")
        if path.suffix == ".py":
            yield from content.split('"""')[1::2]
            yield from islice((f"```python\n{part}\n```" for part in content.split("\n\n\n") if _is_function(part)), 2)
        else:
            yield content.partition("\n\n")[2]


def _is_function(code: str) -> bool:
    return code.startswith(("def ", "class ")) and 200 < len(code) < 1200


def _some(texts: Iterable[str], chars: int) -> Iterator[str]:
    for text in texts:
        yield text
        chars -= len(text)
        if chars < 0:
            return


def _paragraphs(text: str) -> Iterator[str]:
    parts = [text] if text.startswith("```") else (textwrap.dedent(part).strip() for part in re.split(r"\n\s*\n", text))
    return (part for part in parts if len(part) >= 40 and not any(word in part for word in LEFT_OUT))


def _is_prose(paragraph: str) -> bool:
    return len(SIGN.findall(paragraph)) < 0.1 * len(paragraph)


@cache
def paragraphs() -> list[str]:
    """Every paragraph once, in a fixed order, with as much code, lists and tables as their share allows."""
    parts = (
        part for package in _packages() for text in _some(_texts(package), PACKAGE_CHARS) for part in _paragraphs(text)
    )
    prose, other = list[str](), list[str]()
    for part in dict.fromkeys(parts):
        (prose if _is_prose(part) else other).append(part)
    random.Random(SEED).shuffle(other)
    wanted = sum(map(len, prose)) * (1 - PROSE_SHARE) / PROSE_SHARE
    return prose + list(_some(other, int(wanted)))


class Writer:
    """Writes messages and documents of any length from paragraphs, in an order that never repeats."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self._page, self._place = "", 0

    def text(self, median: float, sigma: float) -> str:
        """The next text of a log-normal length; one in seven has the typography of word processors."""
        length = max(12, int(median * exp(self.random.gauss(0, sigma))))
        text = self._take(length).strip() or "Why?"
        return text.translate(SMART) if self.random.random() < 1 / 7 else text

    def chat(self) -> list[dict[str, str]]:
        """A chat of one to four turns; one in ten has a system message."""
        messages = []
        if self.random.random() < 0.1:
            messages.append({"role": "system", "content": self.text(100, 0.6)})
        for _ in range(self.random.choice(TURNS)):
            messages.append({"role": "user", "content": self.text(100, 1)})
            messages.append({"role": "assistant", "content": self.text(310, 1)})
        return messages

    def _take(self, length: int) -> str:
        parts = []
        while length > 0:
            if self._place >= len(self._page):
                self._page, self._place = "\n\n".join(self.random.choices(paragraphs(), k=PAGE)), 0
            end = self._page.find(" ", self._place + length)
            parts.append(self._page[self._place : end if end >= 0 else None])
            self._place = end if end >= 0 else len(self._page)
            length -= len(parts[-1])
        return "".join(parts)


def write_chats(path: Path, *, chats: int | None = None, size: int | None = None) -> Path:
    """A JSONL file with the given number of chats, or at least the given number of bytes."""
    writer, written, count = Writer(SEED), 0, 0
    with open(path, "wb") as file:
        while (chats is None or count < chats) and (size is None or written < size):
            written += file.write(orjson.dumps({"messages": writer.chat()}) + b"\n")
            count += 1
    return path


def write_texts(folder: Path, size: int) -> Path:
    """Nested folders of .txt files with the given number of bytes in all."""
    writer, number = Writer(SEED + 1), 0
    while size > 0:
        path = folder / f"{number // 256:03}" / f"{number:05}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        size -= path.write_bytes(writer.text(8_000, 1).encode())
        number += 1
    return folder
