"""Tiny base models and a task that they can learn on a CPU: for the demo, and for CI that tests a recipe.

The task: convert a date in words ("Friday, 11 March 1977") to ISO format ("1977-03-11"). A model has to copy digits,
look up months and fill in zeros; guessing scores nothing.
"""

import json
import os
import random
from collections.abc import Iterable, Mapping, Sequence
from datetime import date, timedelta
from pathlib import Path
from typing import Any

from tundish.errors import SpecError

SPECIAL_TOKENS = ("<|pad|>", "<|end|>", "<|user|>", "<|assistant|>", "<|system|>")
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
TINY_LLAMA: Mapping[str, Any] = {
    "hidden_size": 96,
    "intermediate_size": 256,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 1024,
    # With the usual 0.02, a model of this size does not learn the dates.
    "initializer_range": 0.06,
}
"""0.4 million parameters with the demo's vocabulary."""


def make_base_model(
    folder: Path | str, texts: Iterable[str], *, vocabulary: int = 320, seed: int = 0, **config: Any
) -> Path:
    """A Llama with random weights, and a byte-level BPE tokenizer trained on `texts`, as a Hugging Face folder.

    Args:
        folder: created if it does not exist.
        texts: what the tokenizer learns its merges from; digits stay single tokens.
        vocabulary: maximum number of tokens, of which 261 are bytes and control tokens.
        seed: random seed of the weights.
        config: `LlamaConfig` arguments that replace those of TINY_LLAMA.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = _train_tokenizer(texts, vocabulary)
    torch.manual_seed(seed)
    settings: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "pad_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "bos_token_id": None,
    }
    LlamaForCausalLM(LlamaConfig(**{**settings, **TINY_LLAMA, **config})).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return Path(folder)


def _train_tokenizer(texts: Iterable[str], vocabulary: int) -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer: Any = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    make_trainer: Any = trainers.BpeTrainer
    trainer = make_trainer(
        vocab_size=vocabulary,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<|pad|>",
        eos_token="<|end|>",
        additional_special_tokens=list(SPECIAL_TOKENS[2:]),
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def date_pairs(count: int, seed: int) -> list[tuple[str, str]]:
    """`count` different dates from 1900 to 2099, in words and in ISO format."""
    first = date(1900, 1, 1)
    days = random.Random(seed).sample(range((date(2100, 1, 1) - first).days), count)
    dates = [first + timedelta(days=day) for day in days]
    return [(f"{day:%A}, {day.day} {day:%B} {day.year}", day.isoformat()) for day in dates]


def write_chats(path: Path | str, pairs: Iterable[tuple[str, str]]) -> Path:
    """Write a .jsonl file of chats with one turn: a question from the user, an answer from the assistant."""
    lines = (
        json.dumps({"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]})
        for question, answer in pairs
    )
    Path(path).write_text("\n".join(lines) + "\n")
    return Path(path)


EXAMPLE_YAML = """\
# Arguments of create(), one per line. `tundish run chat.yaml` starts the run;
# `tundish run chat.yaml learning_rate=1e-4` replaces one of them.
# Paths are relative to this file.
model: ./my-model
train_data_path: ./train.jsonl
eval_data_path: ./eval.jsonl
eval_prompts: ["Friday, 11 March 1977"]
register_to: main.lab.dates
training_duration: 1ep
learning_rate: 7e-4
context_length: 256
"""


def write_example(folder: Path | str) -> list[Path]:
    """Write what is needed to try the commands: a tiny model, chats for training and evaluation, and a YAML file.

    Returns:
        The paths: `my-model`, `train.jsonl`, `eval.jsonl`, `chat.yaml`.

    Raises:
        SpecError: one of them already exists; nothing is written.
    """
    folder = Path(folder)
    model, train, evaluation, experiment = (
        folder / name for name in ("my-model", "train.jsonl", "eval.jsonl", "chat.yaml")
    )
    if existing := [str(path) for path in (model, train, evaluation, experiment) if os.path.lexists(path)]:
        raise SpecError(f"{', '.join(existing)} already exists. Choose another folder: `tundish example DIR`.")
    folder.mkdir(parents=True, exist_ok=True)
    pairs = date_pairs(2_100, seed=1)
    make_base_model(model, (text for pair in pairs for text in pair))
    write_chats(train, pairs[100:])
    write_chats(evaluation, pairs[:100])
    experiment.write_text(EXAMPLE_YAML, encoding="utf-8")
    return [model, train, evaluation, experiment]


def answer(model_folder: Path | str, questions: Sequence[str], max_new_tokens: int = 24) -> list[str]:
    """The answers of the model in a Hugging Face folder, generated by plain transformers with greedy decoding."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model_folder, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(model_folder, torch_dtype=torch.float32)
    chats = [[{"role": "user", "content": question}] for question in questions]
    inputs = tokenizer.apply_chat_template(
        chats, add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
    )
    with torch.no_grad():
        outputs = model.generate(
            inputs["input_ids"], attention_mask=inputs["attention_mask"], max_new_tokens=max_new_tokens, do_sample=False
        )
    return tokenizer.batch_decode(outputs[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
