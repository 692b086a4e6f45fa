"""train/guard.py, train/first_batch.py: a run that learns nothing is stopped, and people see what it is trained on."""

import math
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tundish.errors import StageError

pytestmark = pytest.mark.slow

Plan = Callable[..., Path]


@pytest.fixture(scope="module", autouse=True)
def imported() -> None:
    """Composer warns several times while it is imported."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import tundish.train.first_batch  # noqa: F401


@pytest.mark.parametrize("loss", [math.nan, math.inf, -math.inf, 0.0])
def test_a_loss_that_nothing_is_learned_from_stops_the_run(loss: float) -> None:
    """A run would go on for days, and register weights that are no numbers, or those that it began with."""
    from tundish.train.guard import LossGuard

    optimizer = SimpleNamespace(param_groups=[{"lr": 1e-3}])
    state: Any = SimpleNamespace(
        total_loss_dict={"loss/train/total": loss}, timestamp=SimpleNamespace(batch=17), optimizers=[optimizer]
    )
    logged: dict[str, float] = {}
    logger: Any = SimpleNamespace(log_metrics=lambda metrics, step: logged.update(metrics, step=step))
    with pytest.raises(StageError, match=rf"batch 17: the loss is {loss:g}, but must be finite and above 0\."):
        LossGuard().batch_end(state, logger)
    assert not logged
    state.total_loss_dict = {"loss/train/total": 2.0}
    LossGuard().batch_end(state, logger)
    assert logged == {
        "metrics/train/LanguageCrossEntropy": 2.0,
        "metrics/train/LanguagePerplexity": pytest.approx(math.exp(2)),
        "step": 16,
    }


def test_all_ranks_compare_or_none_does(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A rank that does not see the mark yet, on a shared disk, would wait for the others for ever."""
    from tundish.train import guard

    def told_by_first(found: list[bool], src: int) -> None:
        found[0] = True

    monkeypatch.setenv("TUNDISH_EVENTS", str(tmp_path / "events.jsonl"))
    assert not guard.has_learned()
    monkeypatch.setattr(guard.dist, "broadcast_object_list", told_by_first)
    rank = guard.LossGuard()
    state: Any = SimpleNamespace(timestamp=SimpleNamespace(batch=3))
    no_logger: Any = SimpleNamespace()
    rank.fit_start(state, no_logger)
    assert rank._begun is None


def test_a_learning_rate_that_is_too_high_ends_the_run_with_a_sentence(ranks: Any, plan: Plan, tmp_path: Path) -> None:
    """The stage would fail with a trace of Composer's, or not at all."""
    import json

    file = plan("run", learning_rate=1e38)
    trained = ranks.train(file, 1, tmp_path / "out")
    assert trained.codes == [1]
    error = json.loads((file.parent / "results" / "train.json").read_text())["error"]
    assert "the loss is nan" in error and "Lower learning_rate (it is" in error


def test_the_first_batch_is_shown_with_its_targets(tiny_model: Path) -> None:
    """Nobody would see that the wrong part of the samples is trained."""
    from transformers import AutoTokenizer

    from tundish.train.first_batch import page
    from tundish.train.loader import Collate

    tokenizer: Any = AutoTokenizer.from_pretrained(tiny_model)
    import numpy as np

    ids = [tokenizer(text)["input_ids"] for text in ("<b>one?", "two", "three?", "four")]
    row = {
        "tokens": np.array([number for part in ids for number in part], dtype=np.int32),
        "loss_mask": np.array([n % 2 for n, part in enumerate(ids) for _ in part], dtype=np.uint8),
        "segments": np.array([len(ids[0]) + len(ids[1]), len(ids[2]) + len(ids[3])], dtype=np.int32),
    }
    text = page(Collate(0, 64)([row]), tokenizer.backend_tokenizer, "a <run>")
    assert "row 1, sample 1" in text and "row 1, sample 2" in text and "sample 3" not in text
    marked = [part.split("</mark>")[0].split(">")[-1] for part in text.split("<mark")[1:]]
    assert marked == ["two", "four"]
    assert "&lt;b&gt;one?" in text and "<b>" not in text and "a &lt;run&gt;" in text
