"""architecture.py: what a config asks of its weights."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tundish.errors import SpecError
from tundish.model.architecture import architecture_of

ASK = "import sys; from tundish.model.architecture import architecture_of; "
ASK += "found = architecture_of(sys.argv[1]); assert 'torch' not in sys.modules; print(len(found.shapes))"


def _write_config(folder: Path, **changes: Any) -> Path:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return folder


def test_shapes_are_those_of_the_model_that_transformers_makes(tiny_model: Path) -> None:
    """A good base model would be refused, or a damaged one taken."""
    from safetensors import safe_open

    with safe_open(tiny_model / "model.safetensors", "pt") as file:
        stored = {name: tuple(file.get_slice(name).get_shape()) for name in list(file.keys())}
    found = architecture_of(str(tiny_model))
    assert (found.shapes, found.tied, found.prefix) == (stored, {}, "model")
    assert found.class_name == "LlamaForCausalLM" and len(stored) == 21


def test_tied_weights_need_not_be_stored(config_folder: Path) -> None:
    """Tied models of the hub have no lm_head."""
    found = architecture_of(str(_write_config(config_folder, tie_word_embeddings=True)))
    assert found.tied == {"lm_head.weight": (384, 64)} and "lm_head.weight" not in found.shapes
    assert "lm_head.weight" in architecture_of(str(_write_config(config_folder, tie_word_embeddings=False))).shapes


def test_the_second_call_needs_no_torch_until_the_config_changes(config_folder: Path, home: Path) -> None:
    """Every `create()` would wait for torch; or a corrected config would be compared as it was before."""
    first = architecture_of(str(config_folder))
    command = [sys.executable, "-c", ASK, str(config_folder)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ, check=False)
    assert (done.stdout, done.stderr) == (f"{len(first.shapes)}\n", "")
    assert architecture_of(str(config_folder)) == first
    assert len(architecture_of(str(_write_config(config_folder, num_hidden_layers=3))).shapes) == 30
    for kept in (home / "architectures").iterdir():
        kept.write_text('{"shapes": 3}')
    assert len(architecture_of(str(config_folder)).shapes) == 30


@pytest.mark.parametrize(
    "changes", [{"hidden_act": "nothing"}, {"rope_scaling": {"rope_type": "x"}}, {"torch_dtype": "float12"}]
)
def test_a_config_of_which_no_model_can_be_made_is_told(config_folder: Path, changes: dict[str, Any]) -> None:
    """A traceback of transformers, after the data was prepared."""
    _write_config(config_folder, **changes)
    with pytest.raises(
        SpecError, match=r"model: .*tiny: .*(transformers cannot build a model|its config cannot be loaded)"
    ):
        architecture_of(str(config_folder))
