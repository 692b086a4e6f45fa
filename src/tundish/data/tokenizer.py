"""The model's own tokenizer: loaded without code, and known by a digest."""

import hashlib
from typing import TYPE_CHECKING

from tundish.base.model_files import check_files
from tundish.data.templates import CHATML
from tundish.errors import SpecError
from tundish.plan.spec import TaskType

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CHATML_ADDED = "tundish_added_chatml"
LOAD_SECONDS = 60.0
"""Of CPU time, for loading a tokenizer and finding out what it does; that of Llama 3 takes four."""


def load_tokenizer(model: str, task_type: TaskType) -> "PreTrainedTokenizerBase":
    """The model's tokenizer; with ChatML as template for chats where it has none.

    Raises:
        SpecError: it cannot be loaded, or has no end-of-sequence token.
    """
    from transformers import AutoTokenizer

    check_files(model)
    try:
        tokenizer = AutoTokenizer.from_pretrained(model, trust_remote_code=False)
    except BaseException as error:  # tokenizers raises bare ones, and panics, which is no Exception
        if isinstance(error, KeyboardInterrupt | SystemExit | MemoryError):
            raise
        reason = (str(error).strip() or repr(error)).splitlines()[0]
        raise SpecError(
            f"model: the tokenizer of {model} cannot be loaded ({reason}). "
            "Check that the folder has tokenizer files; for a gated model set HF_TOKEN after accepting its license."
        ) from error
    if tokenizer.eos_token_id is None:
        raise SpecError(f"model: the tokenizer of {model} has no end-of-sequence token. Set eos_token in its config.")
    if not tokenizer.is_fast:
        raise SpecError(f"model: {model} has no tokenizer.json. Save its tokenizer with a fast class of transformers.")
    if task_type == "CHAT_COMPLETION" and tokenizer.chat_template is None:
        tokenizer.chat_template = CHATML
        setattr(tokenizer, CHATML_ADDED, True)
    return tokenizer


def tokenizer_digest(tokenizer: "PreTrainedTokenizerBase", serialized: str) -> str:
    """SHA-256 over all that decides the tokens of a text; `serialized` is the JSON of its backend."""
    facts = [serialized, str(tokenizer.chat_template), str(tokenizer.special_tokens_map), type(tokenizer).__name__]
    return hashlib.sha256("\0".join(facts).encode()).hexdigest()
