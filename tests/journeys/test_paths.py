"""What people write as a path, from the folder in which they are: the real command line, and what its answers say."""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

pytestmark = pytest.mark.slow

CHATS = [
    {"messages": [{"role": "user", "content": f"{n} + 1?"}, {"role": "assistant", "content": str(n + 1)}]}
    for n in range(24)
]
ARGUMENTS = ["--task-type", "CHAT_COMPLETION", "--context-length", "64", "--device", "cpu", "--devices", "1"]
Tundish = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def here(tmp_path: Path, write_lines: Callable[[Path, Any], Path], tiny_model: Path) -> Path:
    """A user's folder: a model, data, and names with blanks."""
    folder = tmp_path / "my work"
    for name in ("train.jsonl", "data/x.jsonl", "my eval.jsonl", "exp/chats.jsonl"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        write_lines(folder / name, CHATS)
    shutil.copytree(tiny_model, folder / "my model")
    return folder


@pytest.fixture
def tundish(here: Path) -> Iterator[Tundish]:
    """The command, in that folder and with a home given by a relative path; what it has started ends with the test."""
    environment = {**os.environ, "TUNDISH_HOME": "./home", "HF_HUB_OFFLINE": "1", "HF_HOME": "hf", "NO_COLOR": "1"}

    def call(*line: str, cwd: Path = here, code: int = 0) -> "subprocess.CompletedProcess[str]":
        environment["TUNDISH_HOME"] = os.path.relpath(here / "home", cwd)
        environment["HF_HOME"] = os.path.relpath(here / "hf", cwd)
        command = [sys.executable, "-m", "tundish", *line]
        done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == code, done.stdout + done.stderr
        assert "Traceback" not in done.stderr
        return done

    yield call
    runs = [run["name"] for run in json.loads(call("list", "--json").stdout)]
    if runs:
        call("cancel", *runs)


def _validated(tundish: Tundish, here: Path, run: str) -> dict[str, Any]:
    """The run's spec, once its data was found and prepared by the stage, which works in another folder."""
    while True:
        types = [event["type"] for event in json.loads(tundish("events", run, "--json").stdout)]
        assert "FAILED" not in types, tundish("get", run).stdout
        if "DATA_VALIDATED" in types:
            tundish("cancel", run)
            return json.loads((here / "home" / "runs" / run / "spec.json").read_text())
        time.sleep(0.5)


def test_commands_take_paths_as_people_write_them(tundish: Tundish, here: Path) -> None:
    """The README's first command was accepted, and its run FAILED: no such file in the folder of a stage."""
    for path in (
        "train.jsonl",
        "./train.jsonl",
        "data/x.jsonl",
        "my eval.jsonl",
        " ./train.jsonl ",
        "my work/../x.jsonl",
    ):
        # The last one is not there.
        code = 2 if path.endswith("../x.jsonl") else 0
        done = tundish("validate", "--model", "my model", "--train-data-path", path, *ARGUMENTS, code=code)
        if code:
            assert f"there is no such file ({here}/x.jsonl)" in done.stderr
        else:
            assert f"{Path(path.strip()).name}, 24 lines, 24 samples" in done.stdout
    data = [
        "--model",
        "./my model",
        "--train-data-path",
        "data/x.jsonl",
        "--eval-data-path",
        "my eval.jsonl",
        *ARGUMENTS,
    ]
    assert f"{here}/my report.json" in tundish("validate", *data, "--report", "my report.json").stdout
    assert json.loads((here / "my report.json").read_text())["ok"]
    assert f"{here}/l.png" in tundish("estimate", *data, "--plot", "./l.png").stdout
    assert (here / "l.png").read_bytes().startswith(b"\x89PNG")
    assert f"{here}/made here/train" in tundish("prepare", *data, "--out", "made here").stdout
    assert (here / "made here" / "eval" / "index.json").is_file()
    content = yaml.safe_load(tundish("render", *data, "--register-to", "a.b", "--set", "save_folder=kept").stdout)
    assert content["model"]["pretrained_model_name_or_path"] == f"{here}/my model"
    assert content["save_folder"].startswith(f"{here}/kept/")
    assert content["train_loader"]["dataset"]["local"].startswith(f"{here}/home/runs/")


def test_a_run_finds_what_its_caller_named(tundish: Tundish, here: Path) -> None:
    """A stage works in another folder than its caller, who may have given his home by a relative path too."""
    data = ["--model", "my model", "--train-data-path", "train.jsonl", "--eval-data-path", "./my eval.jsonl"]
    line = ["create", *data, "--register-to", "a.b", "--run-name", "relative", *ARGUMENTS, "--set", "save_folder=kept"]
    assert "Run relative was created." in tundish(*line).stdout
    spec = _validated(tundish, here, "relative")
    assert (spec["model"], spec["train_data_path"]) == (f"{here}/my model", f"{here}/train.jsonl")
    assert (spec["eval_data_path"], spec["overrides"]) == (f"{here}/my eval.jsonl", {"save_folder": f"{here}/kept"})


def test_an_experiment_s_paths_start_from_its_file(tundish: Tundish, here: Path) -> None:
    """`main.lab.chats` and `org/dataset/train` got the file's folder in front, and data beside it was not found."""
    import pyarrow as pa
    from deltalake import write_deltalake

    write_deltalake(str(here / "home" / "tables" / "main" / "lab" / "chats"), pa.Table.from_pylist(CHATS))
    _cache_dataset(here / "hf", "lab/dates")
    content = {
        "model": "../my model",
        "train_data_path": "chats.jsonl",
        "eval_data_path": "main.lab.chats",
        "register_to": "a.b",
        "context_length": 64,
        "compute": {"device": "cpu", "devices_per_node": 1},
    }
    (here / "exp" / "chat.yaml").write_text(yaml.safe_dump(content))
    elsewhere = here / "else where"
    elsewhere.mkdir()
    file = "../exp/chat.yaml"
    assert "Run yaml was created." in tundish("run", file, "run_name=yaml", "--detach", cwd=elsewhere).stdout
    spec = _validated(tundish, here, "yaml")
    assert (spec["model"], spec["train_data_path"]) == (f"{here}/my model", f"{here}/exp/chats.jsonl")
    assert spec["eval_data_path"] == "main.lab.chats"

    hub = ["train_data_path=lab/dates/train", "eval_data_path=../my eval.jsonl", "run_name=hub"]
    assert "Run hub was created." in tundish("run", file, *hub, "--detach", cwd=elsewhere).stdout
    spec = _validated(tundish, here, "hub")
    assert (spec["train_data_path"], spec["eval_data_path"]) == ("lab/dates/train", f"{here}/my eval.jsonl")

    wrong = ["train_data_path=lab/date/train", "eval_data_path=main.lab.chat"]
    said = tundish("run", file, *wrong, cwd=elsewhere, code=2).stderr
    assert f"There is no file or folder {elsewhere}/lab/date/train either." in said
    assert f"({here}/home/tables/main/lab/chat), nor is there a file or folder {elsewhere}/main.lab.chat" in said


def _cache_dataset(hf_home: Path, name: str) -> None:
    """What `datasets` keeps of a dataset of the hub that was loaded before."""
    import datasets

    organization, _, short = name.partition("/")
    folder = hf_home / "datasets" / f"{organization}___{short}" / "default" / "0.0.0" / ("0" * 40)
    datasets.Dataset.from_list(CHATS).save_to_disk(str(hf_home / "saved"))
    folder.mkdir(parents=True)
    (arrow,) = (hf_home / "saved").glob("*.arrow")
    arrow.rename(folder / f"{short}-train.arrow")
    info = json.loads((hf_home / "saved" / "dataset_info.json").read_text())
    split = {"name": "train", "num_bytes": 1, "num_examples": len(CHATS), "dataset_name": short}
    (folder / "dataset_info.json").write_text(
        json.dumps(info | {"dataset_name": short, "config_name": "default", "splits": {"train": split}})
    )
