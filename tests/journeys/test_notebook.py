"""The notebook of the retired tutorial in a real Jupyter kernel, with its import line changed: what its reader sees."""

import ast
import base64
import html
import json
import re
from pathlib import Path
from typing import Any

import pytest

from tundish.tiny import date_pairs, make_base_model, write_chats

pytestmark = pytest.mark.slow

KNOWN = date_pairs(4, seed=1)
"""What the model learns by heart, in seconds: a question and its answer."""
QUESTION, ANSWER = KNOWN[0]
CELLS = f"""
from tundish import foundation_model as fm
run = fm.create(
    model="./base model",
    train_data_path="train.jsonl",
    register_to="main.lab.dates",
    eval_data_path="./eval.jsonl",
    eval_prompts=["<|user|>{QUESTION}<|end|><|assistant|>", "Is <b>1</b> less?"],
    training_duration="4ep",
    learning_rate="3e-3",
    context_length=160,
)
run
---
import time
while run.status.display_name not in ("Running", "Completed", "Failed"):
    time.sleep(0.1)
    run = run.refresh()
run.get_events()
---
fm.get_events(run, follow=True)
---
run = fm.get(run)
run
---
fm.list()
---
fm.get_checkpoints(run)
---
import mlflow
mlflow.get_run(run.run_id).data.metrics["metrics/eval/LanguageCrossEntropy"]
---
found = mlflow.search_runs(experiment_names=[run.experiment_path])
found[["params.training_duration", "params.learning_rate", "params.train_samples", "params.global_train_batch_size"]]
---
run.metrics("loss/train/total")["value"].iloc[[0, -1]].to_list()
---
run.plot()
---
mlflow.set_experiment(experiment_id=run.experiment_id)
mlflow.load_table("eval_prompts.json", run_ids=[run.run_id])[["checkpoint", "output"]].values.tolist()
---
model = mlflow.pyfunc.load_model("models:/main.lab.dates/1")
---
def ask(question):
    answer = model.predict({{"messages": [{{"role": "user", "content": question}}]}})
    return answer[0]["choices"][0]["message"]["content"]
[ask(question) for question in {[question for question, _ in KNOWN]!r}]
---
pipeline = mlflow.transformers.load_model(run.model_uri)
pipeline([{{"role": "user", "content": "{QUESTION}"}}], do_sample=False, return_full_text=False)[0]["generated_text"]
---
print(run)
print(fm.list())
---
run.cancel()
---
import os
sorted(os.listdir("."))
---
fm.get_models()[0]
"""


@pytest.fixture
def executed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[list[Any]]:
    """The outputs of each cell, once all were run in a folder with a model and data."""
    # The kernel that this Python ships, whatever the user has set up for Jupyter and IPython.
    for name in ("JUPYTER_DATA_DIR", "JUPYTER_CONFIG_DIR", "JUPYTER_RUNTIME_DIR", "IPYTHONDIR"):
        monkeypatch.setenv(name, str(tmp_path / name.lower()))
    monkeypatch.setenv("JUPYTER_PLATFORM_DIRS", "1")
    import nbformat
    from nbclient import NotebookClient

    folder = tmp_path / "my notebooks"
    folder.mkdir()
    make_base_model(folder / "base model", [text for pair in KNOWN for text in pair])
    write_chats(folder / "train.jsonl", KNOWN * 30)
    write_chats(folder / "eval.jsonl", KNOWN)
    cells = [text.strip() for text in CELLS.split("---\n")]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(text) for text in cells])
    client = NotebookClient(notebook, timeout=3600, kernel_name="python3", allow_errors=True)
    client.execute(cwd=str(folder))
    nbformat.write(notebook, tmp_path / "notebook.ipynb")
    return [cell.outputs for cell in notebook.cells]


def _shown(outputs: list[Any], kind: str = "text/plain") -> str:
    """What a cell's last expression shows."""
    (result,) = [output for output in outputs if output.output_type == "execute_result"]
    return result.data[kind]


def _value(outputs: list[Any]) -> Any:
    return ast.literal_eval(_shown(outputs))


def _printed(outputs: list[Any], stream: str) -> str:
    return "".join(output.text for output in outputs if output.output_type == "stream" and output.name == stream)


def _rows(table: str) -> list[list[str]]:
    """The texts of an HTML table, row by row."""
    rows = re.findall(r"<tr>(.*?)</tr>", table, flags=re.DOTALL)
    cells = (re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row, flags=re.DOTALL) for row in rows)
    return [[html.unescape(re.sub(r"<[^>]+>", "", cell)) for cell in row] for row in cells]


def test_the_tutorial_s_notebook_shows_its_reader_what_came_out(executed: list[list[Any]], home: Path) -> None:
    """A notebook of the managed service would end in an error, show objects, or wrong answers, or hide the losses."""
    errors = [output for outputs in executed for output in outputs if output.output_type == "error"]
    assert not errors, "\n".join(errors[0].traceback)
    (
        created, started, followed, run, runs, checkpoints, metric, searched, losses, picture, prompts, loaded, answers,
        piped, printed, canceled, folder, model,
    ) = executed  # fmt: skip

    # Created: a record, one line that says which store MLflow uses, and nothing to be worried by.
    record = dict(_rows(_shown(created, "text/html")))
    assert record["Train Data Path"].endswith("my notebooks/train.jsonl") and "Train Loss" not in record
    assert record["Eval Prompts"].endswith("Is <b>1</b> less?") and "<b>" not in _shown(created, "text/html")
    (line,) = _printed(created, "stdout").splitlines()
    assert line.startswith(f"MLflow in this process now uses sqlite:///{home}/mlflow/mlflow.db, the store of the run")
    assert _printed(created, "stderr") == "" and "rich" not in str(created)

    # Events: as a table, each in a row, with losses and speed.
    assert _rows(_shown(started, "text/html"))[0] == ["Type", "Time", "Message"]
    events = {type: message for type, _, message in _rows(_shown(followed, "text/html"))[1:]}
    assert [*events][:: len(events) - 1] == ["CREATED", "COMPLETED"]
    assert "120 samples with" in events["DATA_VALIDATED"]
    for type in ("TRAIN_UPDATED", "TRAIN_FINISHED"):
        assert re.search(r" Train loss: [\d.]+, Eval loss: [\d.]+, [\d,]+ tokens/s$", events[type]), events[type]
    assert events["COMPLETED"] == "Run completed. Registered as version 1 of main.lab.dates."

    (file,) = home.glob("runs/*/events.jsonl")
    updates = [one for line in file.read_text().splitlines() if (one := json.loads(line))["type"] == "TRAIN_UPDATED"]
    assert sum("eval_loss" in one for one in updates) >= 4 and updates[-1]["share"] == 1
    for one in updates:
        assert f"[batch={one['batch']}/80]" in one["message"] and one["share"] == one["batch"] / 80

    # The run and the list of runs tell what came out.
    record = dict(_rows(_shown(run, "text/html")))
    assert record["Status"] == "COMPLETED" and record["Registered Model"] == "models:/main.lab.dates/1"
    assert float(record["Eval Loss"]) < 0.3 and re.fullmatch(r"\d+:\d\d:\d\d", record["Took"])
    titles, row = _rows(_shown(runs, "text/html"))
    listed = dict(zip(titles, row, strict=True))
    assert (listed["Name"], listed["Eval Loss"], listed["Version"]) == (record["Name"], record["Eval Loss"], "1")
    paths = _value(checkpoints)
    assert [path.split("/")[-1].split("-")[0] for path in paths] == ["ep1", "ep2", "ep3", "ep4"]

    # MLflow finds the run, and compares it with others by its arguments.
    assert _value(metric) == pytest.approx(float(record["Eval Loss"]), rel=1e-3)
    (values,) = [line.split()[1:] for line in _shown(searched).splitlines() if line.startswith("0")][:1]
    assert values[:3] == ["4ep", "0.003", "120"]
    first, last = _value(losses)
    assert first > 4 > 0.3 > last
    assert base64.b64decode(_shown(picture, "image/png")).startswith(b"\x89PNG")

    # The model has learned what it was shown, whoever asks it, and answers without a page of warnings.
    table = _value(prompts)
    last = [output for checkpoint, output in table if checkpoint == table[-1][0]]
    assert len(table) == 8 and last[0] == ANSWER
    assert _value(answers) == [answer for _, answer in KNOWN] and _value(piped) == ANSWER
    spoken = [line for cell in (loaded, answers, piped) for line in _printed(cell, "stderr").splitlines() if line]
    assert len(spoken) <= 3, spoken

    line = f"{record['Name']}  COMPLETED  {events['COMPLETED']}  train loss {record['Train Loss']}  eval loss"
    assert [text.startswith(line) for text in _printed(printed, "stdout").splitlines()] == [True, True]
    assert _printed(canceled, "stdout") == "No active runs found to cancel.\n" and _value(canceled) == 0
    assert _value(folder) == ["base model", "eval.jsonl", "train.jsonl"]
    assert "databricks/dbrx-base" in _shown(model, "text/html")
