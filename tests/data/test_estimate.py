"""data/estimate.py, fm.estimate: what is told of the whole data is what preparing it gives, or within its margin."""

import random
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import joblib
import pytest

from tundish import foundation_model as fm
from tundish.data import estimate as estimating
from tundish.data import lines
from tundish.errors import DataError

pytestmark = pytest.mark.slow

WriteLines = Callable[[Path, Any], Path]


def _chats(count: int, longest: int = 30) -> list[dict[str, Any]]:
    chance = random.Random(5)
    return [
        {
            "messages": [
                {"role": "user", "content": "two and two? " * chance.randint(1, longest)},
                {"role": "assistant", "content": "four " * chance.randint(1, longest)},
            ]
        }
        for _ in range(count)
    ]


@pytest.fixture
def many(arguments: dict[str, Any], write_lines: WriteLines) -> dict[str, Any]:
    """Four thousand chats of different lengths."""
    write_lines(Path(arguments["train_data_path"]), _chats(4000))
    return arguments


def test_small_data_is_counted_not_estimated(many: dict[str, Any]) -> None:
    """The numbers would not be those of the run."""
    found, prepared = fm.estimate(**{**many, "training_duration": "3ep"}), fm.validate(**many).reports[0].prepared
    assert prepared is not None
    for name in ("samples", "tokens", "target_tokens", "rows", "fill"):
        assert getattr(found, name) == pytest.approx(getattr(prepared, name)), name
    assert (found.sampled_share, found.margin, found.refused) == (1, 0, 0)
    assert found.truncated_share == prepared.truncated / prepared.samples
    assert found.steps == 3 * -(-found.rows // found.batch_size)
    assert sum(found.counts) == 4000 and len(found.edges) == len(found.counts) + 1


def test_large_data_is_estimated_within_the_margin(many: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Somebody would plan a run with numbers that are wrong, and a margin that does not say so."""
    exact = fm.estimate(**many)
    monkeypatch.setattr(lines, "CHUNK_BYTES", 4096)
    monkeypatch.setattr(estimating, "SAMPLED_CHUNKS", 60)
    found = fm.estimate(**many)
    assert 0.05 < found.sampled_share < 0.5 and 0 < found.margin < 0.2
    for name in ("samples", "tokens", "target_tokens", "rows", "steps"):
        assert getattr(found, name) == pytest.approx(getattr(exact, name), rel=1.5 * found.margin, abs=1), name
    assert found.fill == pytest.approx(exact.fill, abs=0.02)
    assert f"± {found.margin:.1%}" in str(found) and "± " not in str(exact)
    assert fm.estimate(**many) == found, "the same sample each time"


def test_margins_hold_as_often_as_they_say(many: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """A margin that is too narrow promises what the sample does not know: 95 % of samples should be within it."""
    exact = fm.estimate(**many).tokens
    monkeypatch.setattr(lines, "CHUNK_BYTES", 8192)
    monkeypatch.setattr(estimating, "SAMPLED_CHUNKS", 40)
    monkeypatch.setattr(joblib, "cpu_count", lambda: 1)
    within = 0
    for seed in range(40):
        monkeypatch.setattr(estimating, "SEED", seed)
        found = fm.estimate(**many)
        within += abs(found.tokens - exact) <= found.margin * found.tokens
    assert within >= 33, "under 33 of 40 has a chance of 1 in 300 if 95 % is true"


def test_durations_in_batches_and_tokens(many: dict[str, Any]) -> None:
    """The steps of another run would be told."""
    assert fm.estimate(**{**many, "training_duration": "77ba"}).steps == 77
    found = fm.estimate(**{**many, "training_duration": "50_000tok"})
    epoch = fm.estimate(**many)
    assert found.steps == pytest.approx(50_000 / epoch.tokens * epoch.steps, abs=1)


def test_bad_lines_are_counted_not_fatal(many: dict[str, Any]) -> None:
    """One bad line would keep the estimate back, or be forgotten."""
    path = Path(many["train_data_path"])
    path.write_text(path.read_text() + "{\n[]\n")
    found = fm.estimate(**many)
    assert found.refused == 2 and "2 samples would be refused" in str(found)
    path.write_text("{\n")
    with pytest.raises(DataError, match="holds no valid sample"):
        fm.estimate(**many)


def test_the_picture_is_one(many: dict[str, Any], tmp_path: Path) -> None:
    """The file would not open; the notebook show no picture."""
    found = fm.estimate(**many, context_length=128)
    assert found.truncated_share > 0
    found.plot(tmp_path / "lengths.png")
    content = (tmp_path / "lengths.png").read_bytes()
    assert content.startswith(b"\x89PNG") and struct.unpack(">II", content[16:24]) > (600, 300)
    assert 'src="data:image/png;base64,iVBOR' in found._repr_html_()


def test_the_histogram_shows_every_sample_once(many: dict[str, Any]) -> None:
    """Short or long samples would be missing at the ends."""
    found = fm.estimate(**many)
    bars = [line for line in found.histogram() if "█" in line or "▏" in line]
    assert sum(int(line.rsplit(" ", 1)[1].replace(",", "")) for line in bars) == 4000
    assert found.edges == [2**power for power in range(found.edges[0].bit_length() - 1, found.edges[-1].bit_length())]
