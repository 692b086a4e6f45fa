"""Samples → tokens and loss mask, equal to LLM Foundry's own tokenization.

There are three intended differences: a chat template that prints the date gets a fixed one, so that the same data gives
the same tokens tomorrow; a tokenizer without a template gets ChatML, which is saved with the tokenizer and reported;
and in a chat, what looks like a control token inside a message stays text, so that no message can end or begin a turn.
"""

import functools
import re
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, cast

import numpy as np
from numpy.typing import NDArray

from tundish.base.workers import limited
from tundish.data.bpe import BytePairEncoder, Ids
from tundish.data.control_tokens import Finder, Known, PlainText
from tundish.data.samples import Messages, PromptResponse, Sample
from tundish.data.templates import ChatTemplate, Kept, Rendered
from tundish.data.tokenizer import LOAD_SECONDS, load_tokenizer, tokenizer_digest
from tundish.errors import DataError
from tundish.plan.spec import TaskType

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TargetResponses = Literal["all", "last"]
TRIED_SAMPLES = 64
TRIED_CHARACTERS = 1 << 12
"""Of one text: `tokenizers` needs some hundred times its length in memory."""
PIECE_CHARACTERS = 1 << 22
"""A longer raw text is tokenized in pieces of this length, or of up to twice as many until a line ends."""


class Encoded(NamedTuple):
    """One sample: `tokens` int32 [n]; `loss_mask` uint8 [n], 1 where the token is a target."""

    tokens: NDArray[np.int32]
    loss_mask: NDArray[np.uint8]


class Encoder:
    """The tokenizer of a model, for the samples of one task."""

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", task_type: TaskType, targets: TargetResponses) -> None:
        self.tokenizer, self.task_type, self.targets = tokenizer, task_type, targets
        self.backend: Any = cast(Any, tokenizer).backend_tokenizer
        self.backend.no_truncation()
        self.backend.no_padding()
        serialized = self.backend.to_str()
        self.digest = tokenizer_digest(tokenizer, serialized)
        self.eos = cast(int, tokenizer.eos_token_id)
        added = self.backend.get_added_tokens_decoder()
        template = str(tokenizer.chat_template) if task_type == "CHAT_COMPLETION" else ""
        control = {
            number: token.content for number, token in added.items() if token.special or token.content in template
        }
        self._added = frozenset(token.content for token in added.values())
        self._control = Finder(control.values())
        self._other = Finder(self._added - set(control.values()))
        # By id; the last entry stands for all higher ids, which are not added tokens.
        self._is_control = np.isin(np.arange(max([*added, 0]) + 2), list(control))
        self._template = ChatTemplate(tokenizer)
        self._known = Kept(lambda fixed: Known.of(fixed, self._control))
        self._plain_text = PlainText(serialized, sorted(control.values()))
        self._around = self._added_around()
        self._fast = None if self._around is None else BytePairEncoder.of(self.backend, serialized)

    @property
    def engine(self) -> str:
        """The library that turns text into ids."""
        return "tokenizers" if self._fast is None else "tiktoken"

    def control_token(self, sample: Sample) -> str | None:
        """A control token of the tokenizer in the sample's own text; None if there is none."""
        return next((token for text in texts_of(sample) if (token := self._control.find(text)) is not None), None)

    def prove(self, samples: Iterable[Sample]) -> None:
        """Compare tiktoken with the tokenizer itself on the first samples; stop using it if they differ."""
        texts = [text[:TRIED_CHARACTERS] for sample in islice(samples, TRIED_SAMPLES) for text in texts_of(sample)]
        if self._fast is not None and not self._fast.agrees_on(texts, self.backend):
            self._fast = None

    def encode(self, samples: Sequence[Sample]) -> list[Encoded | DataError]:
        """Tokens and loss mask of every sample, not truncated, or the error if the chat template refuses it."""
        if self.task_type == "CHAT_COMPLETION":
            return list(self._encode_chats(cast(Sequence[Messages], samples)))
        if self.task_type == "INSTRUCTION_FINETUNE":
            return list(self._encode_pairs(cast(Sequence[PromptResponse], samples)))
        ids = (self._raw_ids(text) for text in cast(Sequence[str], samples))
        return [_joined([(text_ids[:0], self._with_eos(text_ids))], 0) for text_ids in ids]

    def _raw_ids(self, text: str) -> Ids:
        """Ids of a text of any length, with bounded memory.

        A piece ends at a line break between two characters that are not spaces. The patterns of byte-level BPE split
        there anyway; SentencePiece models begin the next piece as they begin a text.
        """
        if len(text) <= PIECE_CHARACTERS or self._around is None:
            return self._ids([text], special=True)[0]
        before, after = self._around
        return np.concatenate([before, *(self._ids([piece], special=False)[0] for piece in _pieces(text)), after])

    def _encode_pairs(self, pairs: Sequence[PromptResponse]) -> Iterator[Encoded]:
        ids = self._ids([text for pair in pairs for text in pair], special=True)
        bos = self.tokenizer.bos_token_id
        for prompt, response in zip(ids[::2], ids[1::2], strict=True):
            # Both texts got a beginning-of-sequence token; the sample needs only one.
            doubled = bos is not None and len(prompt) and len(response) and prompt[0] == response[0] == bos
            yield _joined([(prompt, self._with_eos(response[1:] if doubled else response))], 0)

    def _encode_chats(self, chats: Sequence[Messages]) -> Iterator[Encoded | DataError]:
        masked = [self._plain_text.mask(messages, self._control) for messages in chats]
        rendered = self._template.render([messages for messages, _ in masked])
        known = [
            self._known(result.fixed) if isinstance(result, Rendered) and result.fixed is not None else None
            for result in rendered
        ]
        texts = [
            (text, template)
            for (_, is_masked), result, template in zip(masked, rendered, known, strict=True)
            if not isinstance(result, DataError) and not is_masked
            for turn in result.turns
            for text in turn
        ]
        # The template has written the special tokens already.
        ids = iter(self._ids([text for text, _ in texts], special=False, known=[template for _, template in texts]))
        for (messages, is_masked), result, template in zip(masked, rendered, known, strict=True):
            if isinstance(result, DataError):
                yield result
                continue
            encode = self._plain_text.encode
            pairs = [
                (encode(prompt), encode(reply)) if is_masked else (next(ids), next(ids))
                for prompt, reply in result.turns
            ]
            if (error := self._forged(messages, template or self._known_of(result, messages), pairs)) is not None:
                yield error
                continue
            if is_masked:
                pairs = [(self._plain_text.unmask(prompt), self._plain_text.unmask(reply)) for prompt, reply in pairs]
            pairs[-1] = (pairs[-1][0], self._with_eos(pairs[-1][1]))
            yield _joined(pairs, len(pairs) - 1 if self.targets == "last" else 0)

    def _forged(self, messages: Messages, known: Known, pairs: Sequence[tuple[Ids, Ids]]) -> DataError | None:
        """The error if messages imitate what the template writes; None if they do not."""
        for border in known.borders:
            if any(border in message["content"] for message in messages):
                return DataError(
                    f"a message contains {border!r}, which this model's chat template writes between turns. It is "
                    "not a token of the model, so it would look like a turn. Remove it from the message."
                )
        whole = np.concatenate([ids for pair in pairs for ids in pair])
        if np.count_nonzero(self._is_control.take(whole, mode="clip")) > known.control:
            return DataError(
                "a message's text becomes a control token when the model's chat template or tokenizer rewrites it. "
                "Remove the characters that are not intended."
            )
        return None

    def _known_of(self, rendered: Rendered, messages: Messages) -> Known:
        """What the template itself writes into a chat like this one, if that cannot be separated from the contents."""
        neutral = [{**message, "content": "x"} for message in messages]
        try:
            text = "".join(text for turn in self._template.turns_by_prefix(neutral) for text in turn)
        except DataError:
            text = "".join(text for turn in rendered.turns for text in turn)
        return Known.of((text,), self._control)

    def _ids(self, texts: Sequence[str], *, special: bool, known: Sequence[Known | None] | None = None) -> list[Ids]:
        """Ids of texts.

        Args:
            texts: any.
            special: whether to include the tokens that the tokenizer adds at the beginning and end.
            known: for each text, what a template has written into it; None if that is unknown.
        """
        if self._fast is None:
            return self._slow_ids(texts, special=special)
        known = known or [None] * len(texts)
        allowed = (self._added_in(text, own) for text, own in zip(texts, known, strict=True))
        return [self._fast_ids(self._fast, text, some, special) for text, some in zip(texts, allowed, strict=True)]

    def _slow_ids(self, texts: Sequence[str], *, special: bool) -> list[Ids]:
        encoded = self.backend.encode_batch_fast(list(texts), add_special_tokens=special)
        return [np.array(encoding.ids, dtype=np.int32) for encoding in encoded]

    def _fast_ids(self, fast: BytePairEncoder, text: str, allowed: frozenset[str], special: bool) -> Ids:
        try:
            ids = fast.encode(text, allowed)
        except ValueError:
            return self._slow_ids([text], special=special)[0]
        before, after = cast(tuple[Ids, Ids], self._around)
        return np.concatenate([before, ids, after]) if special and (len(before) or len(after)) else ids

    def _added_in(self, text: str, known: Known | None) -> frozenset[str]:
        """The added tokens in a text."""
        # Not always all of them: tiktoken would spend more time on the set than on a short text.
        if self._other.find(text) is not None:
            return self._added
        if known is not None:
            return known.added
        return frozenset(self._control.pattern.findall(text)) if self._control.find(text) is not None else _NONE

    def _added_around(self) -> tuple[Ids, Ids] | None:
        """The ids that the tokenizer adds before and after a text; None if it does more than that."""
        bare = self.backend.encode("a", add_special_tokens=False).ids
        whole = self.backend.encode("a", add_special_tokens=True).ids
        for start in range(len(whole) - len(bare) + 1):
            if bare and whole[start : start + len(bare)] == bare:
                ends = whole[:start], whole[start + len(bare) :]
                return np.array(ends[0], dtype=np.int32), np.array(ends[1], dtype=np.int32)
        return None

    def _with_eos(self, ids: Ids) -> Ids:
        return ids if len(ids) and ids[-1] == self.eos else np.append(ids, np.int32(self.eos))


_NONE = frozenset[str]()
_LINE_END = re.compile(r"\S\n\S")


def load_encoder(model: str, task_type: TaskType, targets: TargetResponses) -> Encoder:
    """The encoder of a model, loaded once a process; see `load_tokenizer` for the errors."""
    folder = Path(model)
    # A folder may change while a notebook is open: its files are a part of the cache's key.
    files = [(file.name, file.stat()) for file in sorted(folder.iterdir())] if folder.is_dir() else []
    return _load_encoder(
        model, task_type, targets, tuple((name, stat.st_mtime_ns, stat.st_size) for name, stat in files)
    )


@functools.lru_cache(maxsize=2)
def _load_encoder(
    model: str, task_type: TaskType, targets: TargetResponses, version: tuple[tuple[str, int, int], ...]
) -> Encoder:
    with limited(f"model: the tokenizer of {model}", LOAD_SECONDS):
        return Encoder(load_tokenizer(model, task_type), task_type, targets)


def _pieces(text: str) -> Iterator[str]:
    """A long text in pieces of about PIECE_CHARACTERS, see `Encoder._raw_ids`."""
    start = 0
    while len(text) - start > PIECE_CHARACTERS:
        line_end = _LINE_END.search(text, start + PIECE_CHARACTERS, start + 2 * PIECE_CHARACTERS)
        end = start + 2 * PIECE_CHARACTERS if line_end is None else line_end.end() - 1
        yield text[start:end]
        start = end
    yield text[start:]


def texts_of(sample: Sample) -> Iterator[str]:
    """The texts that a sample is made of."""
    if isinstance(sample, str):
        yield sample
    elif isinstance(sample, tuple):
        yield from sample
    else:
        yield from (message["content"] for message in sample)


def _joined(pairs: Sequence[tuple[Ids, Ids]], first_target: int) -> Encoded:
    """Prompts and replies as one sample; the replies from number `first_target` on are targets."""
    tokens = np.concatenate([ids for pair in pairs for ids in pair])
    mask = np.zeros(len(tokens), dtype=np.uint8)
    end = 0
    for number, (prompt, reply) in enumerate(pairs):
        start, end = end + len(prompt), end + len(prompt) + len(reply)
        if number >= first_target:
            mask[start:end] = 1
    return Encoded(tokens, mask)
