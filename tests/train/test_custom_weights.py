"""train/resuming.py: a run that starts from the weights of another one, in each form that these come in."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from tests.train.conftest import weights

from tundish.checkpoints.manifest import base_model

pytestmark = pytest.mark.slow

Plan = Callable[..., Path]


def test_a_run_starts_from_a_folder_as_from_a_file(ranks: Any, plan: Plan, tmp_path: Path) -> None:
    """One form would start from other weights than the other, or from the base model's; of any number of ranks."""
    import torch

    first = plan("first #1?", 2, training_duration="3ba", learning_rate=1e-2)  # as no URI would have it
    assert ranks.train(first, 2, tmp_path / "first out").ok
    folder = next((first.parent / "checkpoints").glob("ep*-ba3"))
    assert base_model(folder) == yaml.safe_load(first.read_text())["model"]["pretrained_model_name_or_path"]
    model = {name.removeprefix("state.model."): t for name, t in weights(first).items() if name.startswith("state.m")}
    torch.save({"state": {"model": model, "run_name": "first"}, "rng": []}, tmp_path / "weights.pt")
    losses: list[dict[int, float]] = []
    for name, path, world in (("base", None, 1), ("folder", folder, 1), ("file", tmp_path / "weights.pt", 2)):
        file = plan(name, world, training_duration="3ba")
        content = yaml.safe_load(file.read_text())
        content |= {"load_path": str(path), "load_weights_only": True} if path else {}
        file.write_text(yaml.safe_dump(content))
        trained = ranks.train(file, world, tmp_path / f"{name} out")
        assert trained.ok, trained.log[-3000:]
        losses.append(trained.losses)
    base, folders, files = losses
    assert min(folders) == 0 and abs(folders[0] - base[0]) > 0.01, "the weights of the first run, and a new schedule"
    assert all(abs(loss - files[batch]) < 1e-4 for batch, loss in folders.items())
