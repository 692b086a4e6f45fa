"""runs/checking.py: what others wrote cannot hang, fill or end the process of the caller."""

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from deltalake import write_deltalake

from tundish import foundation_model as fm
from tundish.base import workers
from tundish.data import encoding, tokenize, tokenizer
from tundish.errors import DataError, SpecError

pytestmark = pytest.mark.slow

WriteLines = Callable[[Path, Any], Path]
SaveTokenizer = Callable[..., Path]
PLAIN = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
IF_BAD = "{% if messages[0]['content'] == 'bad' %}"
HANGS = IF_BAD + "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}{% endif %}" + PLAIN
GROWS = IF_BAD + "{{ 'a' * 2 ** 31 }}{% endif %}" + PLAIN


def _chat(content: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": content}, {"role": "assistant", "content": "4"}]}


@pytest.fixture
def foreign(arguments: dict[str, Any], tmp_path: Path, write_lines: WriteLines) -> Callable[..., dict[str, Any]]:
    """`foreign(template, **changes)`: arguments with a model of that template, its tokenizer.json changed."""
    write_lines(Path(arguments["train_data_path"]), [_chat("2 + 2?")] * 299 + [_chat("bad")] + [_chat("3 + 3?")] * 9)

    def make(template: str = PLAIN, **changes: Any) -> dict[str, Any]:
        folder = tmp_path / "foreign"
        folder.mkdir()
        for file in Path(arguments["model"]).iterdir():
            (folder / file.name).write_bytes(file.read_bytes())
        (folder / "chat_template.jinja").write_text(template)
        (folder / "tokenizer.json").write_text(
            json.dumps(json.loads((folder / "tokenizer.json").read_text()) | changes)
        )
        return {**arguments, "model": str(folder), "context_length": 64}

    return make


def _replacing(word: str, times: int) -> dict[str, Any]:
    """A normalizer that makes ten of a word, again and again."""
    replace = {"type": "Replace", "pattern": {"String": word}, "content": word * 10}
    return {"type": "Sequence", "normalizers": [replace] * times}


VERBS = [fm.create, fm.validate, fm.estimate]


@pytest.mark.usefixtures("nothing_starts")
@pytest.mark.parametrize("verb", VERBS)
def test_a_template_that_does_not_end_is_told_by_line(
    foreign: Any, monkeypatch: pytest.MonkeyPatch, verb: Callable[..., Any]
) -> None:
    """`create()` would hang."""
    monkeypatch.setattr(encoding, "SAMPLE_SECONDS", 0.3)
    with pytest.raises(DataError) as error:
        verb(**foreign(HANGS))
    assert str(error.value) == (
        "train_data_path: train.jsonl, line 300: the model's chat template or tokenizer took more than 0.3 s of CPU "
        "time. Shorten the sample or remove it, or use another model."
    )


def test_a_template_that_fills_the_memory_is_told_by_line(foreign: Any) -> None:
    """It took 9 GB of the caller's."""
    (report,) = fm.validate(**foreign(GROWS)).reports
    (problem,) = report.problems
    assert problem.message == (
        "train.jsonl, line 300: the model's chat template took more than 1 GiB of memory for the conversation."
    )


@pytest.mark.usefixtures("nothing_starts")
@pytest.mark.parametrize("verb", VERBS)
def test_a_tokenizer_that_fills_the_memory_is_a_problem_of_the_model(
    foreign: Any, monkeypatch: pytest.MonkeyPatch, verb: Callable[..., Any]
) -> None:
    """Its library would end the caller's process with SIGABRT."""
    monkeypatch.setattr(workers, "MEMORY_BYTES", 1 << 29)
    given = foreign(normalizer=_replacing("a", 12))
    with pytest.raises(SpecError) as error:
        verb(**given)
    assert f"model: the tokenizer of {given['model']} took more than 0.5 GiB of memory." in str(error.value)


@pytest.mark.usefixtures("nothing_starts")
def test_a_tokenizer_that_ends_its_process_at_a_sample_is_told_by_line(
    foreign: Any, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Of thousands of lines, nobody would know which."""
    monkeypatch.setattr(encoding, "SAMPLE_BYTES", 1 << 28)
    monkeypatch.setattr(tokenize, "TRIED_SAMPLES", 2)
    with pytest.raises(DataError, match=r"line 300: the model's chat template or tokenizer took more than 0\.25 GiB"):
        fm.create(**foreign(normalizer=_replacing("b", 12)))
    assert capfd.readouterr().err == "", "what its library said last is for nobody"


def test_a_tokenizer_that_ends_its_process_at_a_prompt_is_a_problem_of_it(
    foreign: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The check of a prompt's length would end the caller."""
    monkeypatch.setattr(encoding, "SAMPLE_BYTES", 1 << 28)
    given = foreign(normalizer=_replacing("b", 12))
    with pytest.raises(SpecError, match=r"eval_prompts: the model's tokenizer, at prompt 2, took more than 0\.25 GiB"):
        fm.validate(**given, eval_prompts=["What?", "bad"])


def test_a_pattern_that_is_none_is_a_problem_of_the_model(foreign: Any, capfd: pytest.CaptureFixture[str]) -> None:
    """The terminal would be filled with a panic of Rust's."""
    split = {"type": "Split", "pattern": {"Regex": "(("}, "behavior": "Isolated", "invert": False}
    with pytest.raises(SpecError, match=r"model: the tokenizer of .* cannot be loaded \(.*parenthesis"):
        fm.validate(**foreign(pre_tokenizer=split))
    assert capfd.readouterr().err == ""


def test_a_table_of_few_bytes_that_expands_is_told_by_row(arguments: dict[str, Any], tmp_path: Path) -> None:
    """A text that a dictionary holds once, and every row again: 24 KB took 7.8 GB of the caller's memory."""
    table = tmp_path / "table"
    rows = pa.table({"prompt": ["a"] * 512, "response": ["b"] * 512})
    write_deltalake(str(table), rows)
    (file,) = table.glob("*.parquet")
    long = pa.DictionaryArray.from_arrays(pa.array([0] * 256 + [1] * 256, pa.int32()), ["a", "a" * (1 << 23)])
    expanding = pa.table({"prompt": long, "response": rows["response"]})
    pq.write_table(expanding, file, compression="zstd", store_schema=False)
    (log,) = (table / "_delta_log").glob("*.json")
    log.write_text(re.sub(r'"size":\d+', f'"size":{file.stat().st_size}', log.read_text()))
    assert file.stat().st_size < 1 << 16
    given = arguments | {"train_data_path": str(table), "task_type": "INSTRUCTION_FINETUNE"}
    with pytest.raises(SpecError) as error:
        fm.validate(**given, learning_rate=-1)  # so that no tokenizer is loaded, which takes the test most of its time
    assert "table (version 0), row 257: this row and those after it take more than 1,024 MiB of memory." in str(
        error.value
    )


def test_a_dataset_of_few_bytes_that_expands_is_a_sentence(
    arguments: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its reader takes a whole group of rows at once, in the memory of the caller."""
    monkeypatch.setattr(workers, "MEMORY_BYTES", 1 << 28)
    (tmp_path / "texts").mkdir()
    long = pa.DictionaryArray.from_arrays(pa.array([0] * 256, pa.int32()), ["a" * (1 << 21)])
    rows = pa.table({"prompt": long, "response": ["b"] * 256})
    pq.write_table(rows, tmp_path / "texts" / "train.parquet", compression="zstd", store_schema=False)
    given = arguments | {"train_data_path": str(tmp_path / "texts" / "train"), "task_type": "INSTRUCTION_FINETUNE"}
    with pytest.raises(SpecError, match=r"texts/train: its reader took more than 0\.25 GiB of memory\. Shorten"):
        fm.validate(**given, learning_rate=-1)


@pytest.mark.parametrize("verb", [fm.validate, fm.estimate])
def test_the_caller_never_loads_a_tokenizer(arguments: dict[str, Any], verb: Callable[..., Any]) -> None:
    """What a tokenizer does to its process would be done to the caller's."""
    tokenize._load_encoder.cache_clear()
    caller = os.getpid()

    def load(model: str, task_type: Any) -> Any:
        assert os.getpid() != caller
        return tokenizer.load_tokenizer(model, task_type)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokenize, "load_tokenizer", load)
        assert verb(**arguments, eval_prompts=["What?"])
    assert tokenize._load_encoder.cache_info().currsize == 0
