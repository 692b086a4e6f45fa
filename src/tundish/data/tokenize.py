"""Samples → tokens and loss mask, equal to LLM Foundry's own tokenization with `target_responses="all"`.

Two differences on purpose: a chat template that prints the date gets a fixed one, so that the same data gives the
same tokens tomorrow; and a tokenizer without a template gets ChatML visibly, saved with the tokenizer.
"""

import hashlib
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import numpy as np
from numpy.typing import NDArray

from tundish.data.records import Messages, PromptResponse, Sample
from tundish.errors import DataError, SpecError
from tundish.spec import TaskType

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TEMPLATE_DATE = "26 Jul 2024"
"""The date that Llama 3.1's own template prints when it is given none."""

CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


class Encoded(NamedTuple):
    """One sample: `tokens` int32 [n]; `loss_mask` uint8 [n], 1 where the token is a target."""

    tokens: NDArray[np.int32]
    loss_mask: NDArray[np.uint8]


def load_tokenizer(model: str, task_type: TaskType) -> "PreTrainedTokenizerBase":
    """The model's tokenizer; with ChatML as template for chats where it has none.

    Raises:
        SpecError: it cannot be loaded, or has no end-of-sequence token.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(model, trust_remote_code=False)
    except Exception as error:  # tokenizers raises bare ones
        reason = (str(error).strip() or repr(error)).splitlines()[0]
        raise SpecError(
            f"model: the tokenizer of {model} cannot be loaded ({reason}). "
            "Check that the folder has tokenizer files; for a gated model set HF_TOKEN after accepting its licence."
        ) from error
    if tokenizer.eos_token_id is None:
        raise SpecError(f"model: the tokenizer of {model} has no end-of-sequence token. Set eos_token in its config.")
    if task_type == "CHAT_COMPLETION" and tokenizer.chat_template is None:
        tokenizer.chat_template = CHATML
    return tokenizer


def tokenizer_digest(tokenizer: "PreTrainedTokenizerBase") -> str:
    """SHA-256 over all that decides the tokens of a text."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    content = backend.to_str() if backend is not None else json.dumps(tokenizer.get_vocab(), sort_keys=True)
    facts = [content, str(tokenizer.chat_template), str(tokenizer.special_tokens_map), type(tokenizer).__name__]
    return hashlib.sha256("\0".join(facts).encode()).hexdigest()


def encode(tokenizer: "PreTrainedTokenizerBase", samples: Sequence[Sample], task_type: TaskType) -> list[Encoded]:
    """Tokens and loss mask of every sample, untruncated.

    Raises:
        DataError: the chat template refuses or rewrites a conversation.
    """
    if task_type == "CHAT_COMPLETION":
        return _encode_chats(tokenizer, cast(Sequence[Messages], samples))
    if task_type == "INSTRUCTION_FINETUNE":
        return _encode_pairs(tokenizer, cast(Sequence[PromptResponse], samples))
    return [
        _joined([([], _with_eos(ids, tokenizer))])
        for ids in _ids(tokenizer, cast(Sequence[str], samples), special=True)
    ]


def _ids(tokenizer: "PreTrainedTokenizerBase", texts: Sequence[str], *, special: bool) -> list[list[int]]:
    if not texts:
        return []
    # verbose: no warning about samples longer than the model; they are cut and counted after this.
    encoded = tokenizer(list(texts), add_special_tokens=special, padding=False, truncation=False, verbose=False)
    return cast(list[list[int]], encoded["input_ids"])


def _encode_pairs(tokenizer: "PreTrainedTokenizerBase", pairs: Sequence[PromptResponse]) -> list[Encoded]:
    prompts = _ids(tokenizer, [prompt for prompt, _ in pairs], special=True)
    responses = _ids(tokenizer, [response for _, response in pairs], special=True)
    encoded: list[Encoded] = []
    for prompt, response in zip(prompts, responses, strict=True):
        # Both texts got a beginning-of-sequence token; the sample needs one.
        doubled = tokenizer.bos_token_id is not None and prompt[:1] == response[:1] == [tokenizer.bos_token_id]
        encoded.append(_joined([(prompt, _with_eos(response[1:] if doubled else response, tokenizer))]))
    return encoded


def _encode_chats(tokenizer: "PreTrainedTokenizerBase", chats: Sequence[Messages]) -> list[Encoded]:
    turns = [_turns(tokenizer, messages) for messages in chats]
    texts = [text for chat in turns for turn in chat for text in turn]
    # The template has written the special tokens already.
    ids = iter(_ids(tokenizer, texts, special=False))
    encoded: list[Encoded] = []
    for chat in turns:
        pairs = [(next(ids), next(ids)) for _ in chat]
        pairs[-1] = (pairs[-1][0], _with_eos(pairs[-1][1], tokenizer))
        encoded.append(_joined(pairs))
    return encoded


def _turns(tokenizer: "PreTrainedTokenizerBase", messages: Messages) -> list[tuple[str, str]]:
    """Templated (prompt, reply) texts, one pair for each assistant message."""
    turns: list[tuple[str, str]] = []
    before = ""
    for number, message in enumerate(messages):
        if message["role"] == "assistant":
            prompt = _templated(tokenizer, messages[:number], add_generation_prompt=True)
            whole = _templated(tokenizer, messages[: number + 1], add_generation_prompt=False)
            if not (prompt.startswith(before) and whole.startswith(prompt)):
                raise DataError(
                    "the model's chat template rewrites earlier turns, so a reply cannot be told from its prompt. "
                    "Use one turn a sample, or a template that only appends."
                )
            turns.append((prompt[len(before) :], whole[len(prompt) :]))
            before = whole
    return turns


def _templated(tokenizer: "PreTrainedTokenizerBase", messages: Messages, *, add_generation_prompt: bool) -> str:
    from jinja2 import TemplateError

    arguments: dict[str, Any] = {"add_generation_prompt": add_generation_prompt, "date_string": TEMPLATE_DATE}
    try:
        return cast(str, tokenizer.apply_chat_template(messages, tokenize=False, **arguments))
    except TemplateError as error:
        raise DataError(f"the model's chat template refuses the conversation: {error}.") from error


def _with_eos(ids: list[int], tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    eos = cast(int, tokenizer.eos_token_id)
    return ids if ids and ids[-1] == eos else [*ids, eos]


def _joined(pairs: Sequence[tuple[list[int], list[int]]]) -> Encoded:
    tokens = [token for prompt, reply in pairs for token in (*prompt, *reply)]
    mask = [bit for prompt, reply in pairs for bit in (*[0] * len(prompt), *[1] * len(reply))]
    return Encoded(np.array(tokens, dtype=np.int32), np.array(mask, dtype=np.uint8))
