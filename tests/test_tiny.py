"""tiny.py: a base model and a task, made on the spot, that the rest of tundish takes."""

import re
from datetime import date
from pathlib import Path

import pytest

from tundish import tiny
from tundish.data.opening import open_source
from tundish.errors import SpecError
from tundish.plan.models import find_card


def test_dates_are_written_and_iso_forms_of_one_day() -> None:
    """The demo would teach and measure a wrong task, or ask for what it has trained on."""
    pairs = tiny.date_pairs(500, seed=1)
    assert len(set(pairs)) == 500 and pairs == tiny.date_pairs(500, seed=1) != tiny.date_pairs(500, seed=2)
    assert pairs[:100] != tiny.date_pairs(100, seed=2)
    for written, iso in pairs:
        day = date.fromisoformat(iso)
        assert re.fullmatch(r"[A-Z][a-z]+day, \d{1,2} [A-Z][a-z]+ \d{4}", written) and str(day.year) in written
        assert written == f"{day:%A}, {day.day} {day:%B} {day.year}"


def test_chats_are_samples_as_they_stand(tmp_path: Path) -> None:
    """The demo's own data would be refused."""
    path = tiny.write_chats(tmp_path / "train.jsonl", [("a", "b"), ("c", "d")])
    source = open_source(str(path), "CHAT_COMPLETION", system_message=False)
    samples = [sample for chunk in source.chunks() for sample in chunk.samples(source.rules)]
    assert [number for number, _ in samples] == [1, 2]
    assert samples[1][1] == [{"role": "user", "content": "c"}, {"role": "assistant", "content": "d"}]


def test_a_base_model_is_a_folder_that_can_be_trained_and_asked(tmp_path: Path) -> None:
    """The demo's model would be refused, have no chat template, or answer with the question."""
    folder = tiny.make_base_model(tmp_path / "base", ["Friday, 11 March 1977"], num_hidden_layers=1)
    card = find_card(str(folder))
    assert (card.layers, card.family) == (1, "llama") and card.parameters < 600_000
    answers = tiny.answer(folder, ["Friday, 11 March 1977", "x"], max_new_tokens=3)
    assert len(answers) == 2 and not any("Friday, 11" in answer for answer in answers)


def test_the_same_seed_makes_the_same_model(tmp_path: Path) -> None:
    """Two runs of the demo would differ in more than what was trained."""
    folders = [
        tiny.make_base_model(tmp_path / str(number), ["abc"], seed=seed) for number, seed in enumerate((0, 0, 1))
    ]
    weights = [(folder / "model.safetensors").read_bytes() for folder in folders]
    assert weights[0] == weights[1] != weights[2]


def test_an_example_is_written_once_and_never_over_somebodys_files(tmp_path: Path) -> None:
    """The README's first command would make nothing that the next ones take, or destroy a train.jsonl."""
    made = tiny.write_example(tmp_path / "new folder")
    assert [path.name for path in made] == ["my-model", "train.jsonl", "eval.jsonl", "chat.yaml"]
    train, evaluation = (path.read_text().splitlines() for path in made[1:3])
    assert (len(train), len(evaluation)) == (2000, 100) and not set(train) & set(evaluation)
    (tmp_path / "train.jsonl").write_text("mine")
    with pytest.raises(SpecError, match=r"train\.jsonl already exists"):
        tiny.write_example(tmp_path)
    assert (tmp_path / "train.jsonl").read_text() == "mine" and not (tmp_path / "my-model").exists()
