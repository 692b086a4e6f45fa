"""yamls/: every layer is one that something reads."""

from pathlib import Path
from typing import get_args

import pytest
import yaml

from tundish.base.home import yamls_dir
from tundish.cli.arguments import read_experiment
from tundish.plan.models import model_cards
from tundish.plan.overrides import KEYS as MAY_BE_SET
from tundish.plan.overrides import REFUSED
from tundish.plan.spec import TaskType

KEYS = MAY_BE_SET | {key.split(".")[0] for key in REFUSED}

FILES = sorted(path.relative_to(yamls_dir()).as_posix() for path in yamls_dir().rglob("*") if path.is_file())


def test_layers_are_found() -> None:
    """The tests below would pass on an empty folder."""
    assert {"base.yaml", "scale.yaml", "model/llama.yaml"} < set(FILES) and len(FILES) >= 9


@pytest.mark.parametrize("name", FILES)
def test_every_file_is_a_layer_that_is_used(name: str) -> None:
    """A file would lie there that nothing reads, or hold a key that LLM Foundry does not know."""
    path = yamls_dir() / name
    content = yaml.safe_load(path.read_text())
    folder = Path(name).parent.name
    if name == "base.yaml":
        assert content and set(content) <= KEYS
    elif name == "scale.yaml":
        assert content and all(
            set(step) == {"above_parameters", "foundry"} and set(step["foundry"]) <= KEYS for step in content
        )
    elif folder == "task":
        assert path.stem.upper() in get_args(TaskType) and set(content) <= KEYS
    elif folder == "model":
        assert set(content.get("foundry", {})) <= KEYS
        assert content["cards"] and all(model_cards()[card].family == path.stem for card in content["cards"])
    elif folder == "experiment":
        assert read_experiment(path)
    else:
        pytest.fail("nothing reads this file")


def test_every_task_type_has_its_layer() -> None:
    """Rendering a run of that task would raise."""
    assert {path.stem.upper() for path in (yamls_dir() / "task").glob("*.yaml")} == set(get_args(TaskType))
