"""Tokenizers to measure with, built from files that installed packages ship: Llama 3 (byte-level) and Mistral v3."""

import base64
import shutil
from importlib.resources import files
from pathlib import Path
from typing import Any

CONTROL_TOKENS = (
    *("<|begin_of_text|>", "<|end_of_text|>", "<|reserved_special_token_0|>", "<|reserved_special_token_1|>"),
    *("<|finetune_right_pad_id|>", "<|step_id|>", "<|start_header_id|>", "<|end_header_id|>"),
    *("<|eom_id|>", "<|eot_id|>", "<|python_tag|>"),
    *(f"<|reserved_special_token_{number}|>" for number in range(2, 247)),
)
LLAMA_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
LLAMA_TEMPLATE = r"""
{%- if date_string is not defined %}{% set date_string = "26 Jul 2024" %}{% endif %}
{%- if messages[0]["role"] == "system" %}
{%- set system, chat = messages[0]["content"] | trim, messages[1:] %}
{%- else %}
{%- set system, chat = "", messages %}
{%- endif %}
{{- bos_token + "<|start_header_id|>system<|end_header_id|>\n\nCutting Knowledge Date: December 2023\n" }}
{{- "Today Date: " + date_string + "\n\n" + system + "<|eot_id|>" }}
{%- for message in chat %}
{{- "<|start_header_id|>" + message["role"] + "<|end_header_id|>\n\n" + message["content"] | trim + "<|eot_id|>" }}
{%- endfor %}
{%- if add_generation_prompt %}{{- "<|start_header_id|>assistant<|end_header_id|>\n\n" }}{% endif %}
"""


def llama_ranks_file() -> Path:
    """The ranks of Llama 3's tokens, in tiktoken's form."""
    return Path(str(files("llama_models") / "llama3" / "tokenizer.model"))


def save_llama(folder: Path) -> Path:
    """A folder with Llama 3's tokenizer, and a chat template like that of Llama 3.1."""
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast
    from transformers.convert_slow_tokenizer import TikTokenConverter

    converter = TikTokenConverter(
        vocab_file=str(llama_ranks_file()), pattern=LLAMA_PATTERN, additional_special_tokens=list(CONTROL_TOKENS)
    )
    core: Any = converter.converted()
    core.model.ignore_merges = True
    start = CONTROL_TOKENS[0]
    core.post_processor = TemplateProcessing(
        single=f"{start} $A", pair=f"{start} $A {start}:1 $B:1", special_tokens=[(start, core.token_to_id(start))]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token=start, eos_token="<|eot_id|>", pad_token="<|finetune_right_pad_id|>"
    )
    tokenizer.chat_template = LLAMA_TEMPLATE.strip()
    tokenizer.save_pretrained(folder)
    return folder


def save_mistral(folder: Path) -> Path:
    """A folder with Mistral v3's tokenizer, a SentencePiece one."""
    from transformers import LlamaTokenizerFast

    folder.mkdir()
    model = folder / "tokenizer.model"
    shutil.copy(str(files("mistral_common") / "data" / "mistral_instruct_tokenizer_240323.model.v3"), model)
    LlamaTokenizerFast(vocab_file=str(model), legacy=False).save_pretrained(folder)
    return folder


def llama_encoding() -> Any:
    """Llama 3's tokenizer as tiktoken alone runs it."""
    import tiktoken

    lines = (line.split() for line in llama_ranks_file().read_bytes().splitlines())
    ranks = {base64.b64decode(token): int(rank) for token, rank in lines}
    special = {token: len(ranks) + number for number, token in enumerate(CONTROL_TOKENS)}
    return tiktoken.Encoding("llama3", pat_str=LLAMA_PATTERN, mergeable_ranks=ranks, special_tokens=special)
