"""Chat templates: the texts of a conversation's turns, with one rendering per chat.

LLM Foundry renders every prefix of a conversation, which is quadratic in the number of turns. Here the positions of the
contents are determined once for each sequence of roles, by rendering marks instead of contents. A chat is then rendered
once, as a whole, and cut at those positions; if the result does not match, its prefixes are rendered after all.

The positions in a long conversation are determined without rendering every prefix: see `_turns_by_places`.
"""

import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, NamedTuple, TypeVar, cast

from tundish.base.workers import took_memory
from tundish.data.samples import Messages
from tundish.errors import DataError

TEMPLATE_DATE = "26 Jul 2024"
"""The date that Llama 3.1's own template prints by default."""

CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
OPEN, CLOSE = "\ufdd0", "\ufdd1"
"""Unicode noncharacters, which no text should contain; a number between them stands for something else."""
MARK = OPEN + "{}" + CLOSE

EVERY_PREFIX = 128
"""In a conversation of up to this many messages, every prefix is rendered to find the positions of its contents."""
MOST_RENDERED = 1 << 21
"""The most messages that are rendered for one chat if the template needs all of its prefixes: enough for a chat of two
thousand messages."""
MOST_KEPT = 1 << 17
"""The most roles, over all sequences, whose positions are kept."""

Turn = tuple[str, str]
"""Prompt and reply, as the template writes them."""
Value = TypeVar("Value")


class Kept(Generic[Value]):
    """A cache of values by a sequence of texts; the oldest are dropped first."""

    def __init__(self, make: Callable[[tuple[str, ...]], Value]) -> None:
        self._make, self._values = make, dict[tuple[str, ...], Value]()

    def __call__(self, key: tuple[str, ...]) -> Value:
        """The value of a key, made at its first use."""
        if key not in self._values:
            self._values[key] = self._make(key)
            while len(self._values) > 1 and sum(map(len, self._values)) > MOST_KEPT:
                del self._values[next(iter(self._values))]
        return self._values[key]


class Rendered(NamedTuple):
    """A templated chat."""

    turns: list[Turn]
    """Prompt and reply of each assistant message."""
    fixed: "tuple[str, ...] | None"
    """What the template itself wrote, around and between the contents; None if it cannot be separated from them."""


@dataclass(frozen=True, slots=True)
class _Hole:
    """The position of a message's content."""

    message: int
    edit: Callable[[str], str]


@dataclass(frozen=True, slots=True)
class _Skeleton:
    """The texts of every turn, with holes for the contents."""

    turns: Sequence[tuple[Sequence[str | _Hole], Sequence[str | _Hole]]]
    fixed: tuple[str, ...]
    """The texts before, between and after the holes."""

    def filled(self, messages: Messages) -> list[Turn]:
        return [(_fill(prompt, messages), _fill(reply, messages)) for prompt, reply in self.turns]


def _fill(pieces: Sequence[str | _Hole], messages: Messages) -> str:
    return "".join(
        piece if isinstance(piece, str) else piece.edit(messages[piece.message]["content"]) for piece in pieces
    )


class ChatTemplate:
    """The chat template of a tokenizer."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._skeleton = Kept(self._find_skeleton)

    def render(self, chats: Sequence[Messages]) -> list[Rendered | DataError]:
        """Every chat's turns, or the error if the template refuses it."""
        try:
            wholes: list[str | None] = list(self._rendered(list(chats), add_generation_prompt=False))
        except DataError:
            wholes = [None] * len(chats)  # unknown which of them is refused: each is rendered on its own
        return [self._render_one(chat, whole) for chat, whole in zip(chats, wholes, strict=True)]

    def _render_one(self, messages: Messages, whole: str | None) -> Rendered | DataError:
        try:
            if whole is None:
                (whole,) = self._rendered([messages], add_generation_prompt=False)
            skeleton = self._skeleton(tuple(message["role"] for message in messages))
            if skeleton is not None:
                turns = skeleton.filled(messages)
                if "".join(text for turn in turns for text in turn) == whole:
                    return Rendered(turns, skeleton.fixed)
            return Rendered(self.turns_by_prefix(messages), None)
        except DataError as error:
            return error

    def turns_by_prefix(self, messages: Messages) -> list[Turn]:
        """The turns as LLM Foundry finds them: by rendering the conversation up to each.

        Raises:
            DataError: the template refuses the conversation or rewrites earlier turns, or the conversation is too long.
        """
        turns: list[Turn] = []
        before = ""
        rendered = 0
        for number, message in enumerate(messages):
            if message["role"] == "assistant":
                rendered += 2 * number + 1
                if rendered > MOST_RENDERED:
                    raise DataError(
                        f"the chat has {len(messages):,} messages, too many for this model's chat template, which must "
                        f"be rendered again for each reply; the limit is reached at message {number:,}. Split the chat "
                        "into several."
                    )
                prompt, *_ = self._rendered([messages[:number]], add_generation_prompt=True)
                whole, *_ = self._rendered([messages[: number + 1]], add_generation_prompt=False)
                if not (prompt.startswith(before) and whole.startswith(prompt)):
                    raise DataError(
                        "the model's chat template rewrites earlier turns, so a reply cannot be separated from its "
                        "prompt. Use one turn per sample, or a template that only appends."
                    )
                turns.append((prompt[len(before) :], whole[len(prompt) :]))
                before = whole
        return turns

    def _rendered(self, chats: list[Messages], *, add_generation_prompt: bool) -> list[str]:
        from jinja2 import TemplateError

        settings: dict[str, Any] = {
            "add_generation_prompt": add_generation_prompt,
            # Templates print today's date in two ways; the same data must give the same tokens tomorrow.
            "date_string": TEMPLATE_DATE,
            "strftime_now": _template_date,
        }
        try:
            return cast(list[str], self._tokenizer.apply_chat_template(chats, tokenize=False, **settings))
        except TemplateError as error:
            text = " ".join(str(error).split())[:300]
            raise DataError(f"the model's chat template refuses the conversation: {text}.") from error
        except MemoryError as error:
            raise DataError(f"the model's chat template {took_memory()} for the conversation.") from error
        except Exception as error:  # templates are programs: division by zero, for example
            text = f"{type(error).__name__}: {error}"[:300]
            raise DataError(f"the model's chat template fails on the conversation ({text}).") from error

    def _find_skeleton(self, roles: tuple[str, ...]) -> _Skeleton | None:
        marked = [{"role": role, "content": f" \n{MARK.format(number)}\n "} for number, role in enumerate(roles)]
        try:
            turns = self.turns_by_prefix(marked) if len(roles) <= EVERY_PREFIX else self._turns_by_places(marked)
        except DataError:
            return None  # the chat itself is rendered next, and its error reported
        turns_of_pieces = [(list(_pieces(prompt)), list(_pieces(reply))) for prompt, reply in turns]
        pieces = [piece for turn in turns_of_pieces for pieces in turn for piece in pieces]
        holes = [piece.message for piece in pieces if isinstance(piece, _Hole)]
        between = "".join(piece if isinstance(piece, str) else OPEN for piece in pieces)
        return _Skeleton(turns_of_pieces, tuple(between.split(OPEN))) if holes == list(range(len(roles))) else None

    def _turns_by_places(self, marked: Messages) -> list[Turn]:
        """The turns of a long conversation of marks, with far fewer renderings than prefixes.

        A prompt ends with what the template writes to ask for a reply, a reply with what it writes after one. Both
        endings are taken from the first prefixes, from some of each length, and from the last ones; after the same
        roles they must be the same. At every turn, the whole rendering must contain them.

        Raises:
            DataError: the template refuses the conversation, or does not write one message after the other.
        """
        (whole,) = self._rendered([marked], add_generation_prompt=False)
        ends = [0, *(mark.end() for mark in _MARKED.finditer(whole))]
        kinds = {
            number: tuple(before["role"] for before in marked[max(0, number - 2) : number])
            for number, message in enumerate(marked)
            if message["role"] == "assistant"
        }
        other = DataError("the template does not write one message after the other.")
        if len(ends) != len(marked) + 1:
            raise other
        tails: dict[tuple[str, ...], tuple[str, str]] = {}
        for number in _some(kinds):
            (prompt,) = self._rendered([marked[:number]], add_generation_prompt=True)
            (reply,) = self._rendered([marked[: number + 1]], add_generation_prompt=False)
            tail = prompt[ends[number] :], reply[ends[number + 1] :]
            if (
                not (reply.startswith(prompt) and whole.startswith(reply))
                or tails.setdefault(kinds[number], tail) != tail
            ):
                raise other
        turns: list[Turn] = []
        start = 0
        for number, kind in kinds.items():
            asked, ended = tails[kind]
            middle, end = ends[number] + len(asked), ends[number + 1] + len(ended)
            if not (whole.startswith(asked, ends[number]) and whole.startswith(ended, ends[number + 1])):
                raise other
            turns.append((whole[start:middle], whole[middle:end]))
            start = end
        if start != len(whole):
            raise other
        return turns


def _some(kinds: Mapping[int, object]) -> list[int]:
    """The replies to render: the first ones, ever fewer of the later ones, the last two, and two of each kind."""
    numbers = list(kinds)
    of_kind = defaultdict[object, list[int]](list)
    for number, kind in kinds.items():
        of_kind[kind].append(number)
    chosen = {*(number for number in numbers if number < EVERY_PREFIX), *numbers[-2:]}
    chosen.update(number for same in of_kind.values() for number in (same[0], same[-1]))
    half = len(numbers)
    while half := half // 2:
        chosen.add(numbers[half])
    return sorted(chosen)


def _template_date(_format: str) -> str:
    return TEMPLATE_DATE


_MARKED = re.compile(rf"( \n)?{OPEN}(\d+){CLOSE}(\n )?")


def _pieces(text: str) -> Iterator[str | _Hole]:
    """Fixed texts and holes; a template that strips contents leaves the marks without the spaces around them."""
    end = 0
    for mark in _MARKED.finditer(text):
        yield text[end : mark.start()]
        if (mark[1] is None) != (mark[3] is None):
            yield mark[0]  # stripped at one end only, which no hole describes: the skeleton is then not used
        else:
            yield _Hole(int(mark[2]), str.strip if mark[1] is None else str)
        end = mark.end()
    yield text[end:]
