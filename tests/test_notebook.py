"""A notebook in a real Jupyter kernel: the calls that people bring with them, and the tables that they see."""

import re
from pathlib import Path
from typing import Any

import pytest

CELLS = """
from tundish import foundation_model as fm
run = fm.create(**{arguments!r})
---
import time
while len(run.get_events()) < 2:
    time.sleep(0.05)
run.get_events()
---
run.refresh()
---
fm.list()
---
fm.get_models()[0]
---
import threading
threading.Timer(1, fm.cancel, [run.name]).start()
fm.get_events(run, follow=True)
---
fm.get(run).status.display_name, run.cancel()
"""


@pytest.fixture
def executed(
    tiny_model: Path, arguments: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> list[list[Any]]:
    """The outputs of each cell, once all were run."""
    # The kernel that this Python ships, whatever the user has set up for Jupyter and IPython.
    for name in ("JUPYTER_DATA_DIR", "JUPYTER_CONFIG_DIR", "JUPYTER_RUNTIME_DIR", "IPYTHONDIR"):
        monkeypatch.setenv(name, str(tmp_path / name.lower()))
    monkeypatch.setenv("JUPYTER_PLATFORM_DIRS", "1")
    import nbformat
    from nbclient import NotebookClient

    given = arguments | {"eval_prompts": ["Is <b>1</b> less?"]}
    cells = [text.strip() for text in CELLS.format(arguments=given).split("---")]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(text) for text in cells])
    client = NotebookClient(notebook, timeout=120, kernel_name="python3", allow_errors=True)
    client.execute(cwd=str(tmp_path))
    return [cell.outputs for cell in notebook.cells]


def _table(outputs: list[Any]) -> str:
    """The HTML that a cell's last expression shows."""
    (result,) = [output for output in outputs if output.output_type == "execute_result"]
    return result.data["text/html"]


def test_a_notebook_shows_a_run_from_its_start_to_its_end(executed: list[list[Any]], arguments: dict[str, Any]) -> None:
    """A notebook of the managed service would not run, show objects instead of tables, or hang with its run."""
    errors = [output for outputs in executed for output in outputs if output.output_type == "error"]
    assert not errors, "\n".join(errors[0].traceback)
    created, events, run, runs, model, followed, ended = executed
    assert "rich" not in str(created)  # it would ask for ipywidgets, in an output of its own for each bar
    assert ">Message</th>" in _table(events) and "CREATED" in _table(events)
    name = re.search(r"chat-tiny-llama-[a-z0-9]{6}", _table(run))
    assert name and name[0] in _table(runs)
    assert "Training Duration" in _table(runs) and arguments["train_data_path"] in _table(run)
    assert "Is &lt;b&gt;1&lt;/b&gt; less?" in _table(run) and "<b>" not in _table(run)
    assert "databricks/dbrx-base" in _table(model)
    assert "CANCELED" in _table(followed) and "Canceled by user." in _table(followed)
    (state,) = [output for output in ended if output.output_type == "execute_result"]
    assert state.data["text/plain"] == "('Stopped', 0)"
