"""cli/: the verbs on a terminal; messages without tracebacks; exit codes that scripts can trust."""

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from tundish import __version__
from tundish.base.run_folder import RunFolder
from tundish.cli import COMMANDS, build_parser, main
from tundish.cli.arguments import assignment, create_arguments, read_experiment, replaced
from tundish.errors import SpecError
from tundish.plan.spec import parse_spec

pytestmark = pytest.mark.usefixtures("nothing_starts")

Capture = pytest.CaptureFixture[str]
WriteLines = Callable[[Path, Any], Path]
MakeRun = Callable[..., RunFolder]
USER = {"role": "user", "content": "2 + 2?"}
CHAT = {"messages": [USER, {"role": "assistant", "content": "4"}]}


def _options(arguments: dict[str, Any]) -> list[str]:
    return [text for name, value in arguments.items() for text in (f"--{name.replace('_', '-')}", str(value))]


def test_every_command_is_described_and_does_something(capsys: Capture) -> None:
    """A command would be missing from the help, or parse and then crash."""
    assert main(["--help"]) == 0
    shown = capsys.readouterr().out
    for name in "create validate estimate prepare run render get list cancel events checkpoints models doctor".split():
        assert re.search(rf"^    {name}\s+[a-z]", shown, re.MULTILINE) and name in COMMANDS


def test_options_are_the_parameters_of_create(arguments: dict[str, Any]) -> None:
    """An option would be dropped, or reach another argument of `create()`."""
    given = arguments | {
        "task_type": "INSTRUCTION_FINETUNE",
        "eval_data_path": "e.jsonl",
        "training_duration": "3ep",
        "learning_rate": "1e-4",
        "context_length": 128,
        "experiment_path": "/x",
        "custom_weights_path": "/w",
        "data_prep_cluster_id": "0101-1",
        "run_name": "mine",
    }
    line = ["create", *_options(given), "--eval-prompts", "a b", "c", "--devices", "2", "--device", "cpu"]
    line += [
        "--no-validate-inputs",
        "--set",
        "optimizer.lr=0.5",
        "--set",
        "seed=3",
        "--set",
        "a=x=y",
        "--set",
        "b=",
        "--set",
        "c=[1, 2]",
    ]
    values = create_arguments(build_parser().parse_args(line))
    assert values == given | {
        "eval_prompts": ["a b", "c"],
        "validate_inputs": False,
        "compute": {"devices_per_node": 2, "device": "cpu"},
        "overrides": {"optimizer.lr": 0.5, "seed": 3, "a": "x=y", "b": None, "c": [1, 2]},
    }


def test_options_not_given_mean_the_defaults(arguments: dict[str, Any]) -> None:
    """The command line would have defaults of its own, and two runs from the same arguments differ."""
    values = create_arguments(build_parser().parse_args(["render", *_options(arguments)]))
    assert {name: value for name, value in values.items() if value not in (None, {})} == arguments


@pytest.mark.parametrize(
    "line",
    [
        ["no-such"],
        ["get"],
        ["create", "--no-such", "1"],
        ["list", "--limit", "x"],
        ["list", "--limit", "0"],
        ["list", "--limit=-1"],
        ["logs", "@last", "-n", "0"],
        ["run"],
    ],
)
def test_a_line_that_makes_no_sense_is_exit_code_2(line: list[str], capsys: Capture) -> None:
    """A script with a typo would go on as if all were well."""
    assert main(line) == 2
    shown = capsys.readouterr().err
    assert shown.startswith("tundish: ") and "\nusage: tundish" in shown


def test_the_version_is_told(capsys: Capture) -> None:
    """A bug report could not say what it is about."""
    assert main(["--version"]) == 0 and capsys.readouterr().out == f"tundish {__version__}\n"


def test_all_problems_of_a_line_are_told_at_once_without_traceback(arguments: dict[str, Any], home: Path) -> None:
    """The user would see a traceback, or repair one thing after the other; a script would not learn that it failed."""
    (home / "runs" / "mine").mkdir(parents=True)
    wrong = {
        "task_type": "CHAT",
        "training_duration": "3 epochs",
        "context_length": 100_000,
        "train_data_path": "/no/such/train.jsonl",
        "run_name": "mine",
        "set": "global_train_batchsize=8",
    }
    before = sorted(home.rglob("*"))
    command = [sys.executable, "-m", "tundish", "create", *_options(arguments | wrong)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert "Traceback" not in done.stderr
    assert done.stderr.startswith("tundish: 6 problems:\n  - ")
    for found in (
        "'CHAT'",
        "'3 epochs'",
        "100000",
        "no such file",
        "'global_train_batchsize'",
        "run 'mine' already exists",
    ):
        assert found in done.stderr, found
    assert sorted(home.rglob("*")) == before


@pytest.mark.parametrize(
    ("lines", "found"),
    [
        ([CHAT] * 6 + ["{"], "train.jsonl, line 7: not JSON"),
        (
            [{"messages": [USER]}],
            "train.jsonl, line 1: the last message is from 'user'; a chat must end with 'assistant'.",
        ),
        ([], "holds no sample"),
    ],
    ids=["JSON error on line 7", "chat ends with user", "empty file"],
)
def test_wrong_data_alone_is_exit_code_1(
    arguments: dict[str, Any], home: Path, write_lines: WriteLines, capsys: Capture, lines: list[Any], found: str
) -> None:
    """A script could not tell bad data from a bad command line."""
    write_lines(Path(arguments["train_data_path"]), lines)
    assert main(["create", *_options(arguments)]) == 1
    output = capsys.readouterr()
    assert output.out == "" and output.err.startswith("tundish: train_data_path: ") and found in output.err
    assert not (home / "runs").exists()


@pytest.mark.parametrize(
    ("line", "code", "found"),
    [
        (["get", "none"], 2, "there is no run 'none'"),
        (["events", "none"], 2, "there is no run 'none'"),
        (["events", "none", "--follow"], 2, "there is no run 'none'"),
        (["checkpoints", "none"], 2, "there is no run 'none'"),
        (["cancel"], 2, "Must provide training run(s) or MLflow experiment ID to cancel"),
        (["run", "/no/such.yaml"], 2, "/no/such.yaml: cannot be read"),
        (["create", "--set", "seed"], 2, "'seed' must have the form key=value"),
        (["create", "--set", "seed=[1"], 2, "'seed=[1': the value is not valid YAML"),
        (["create"], 2, "model: is missing"),
    ],
)
def test_a_wrong_call_is_exit_code_2_with_one_message(
    line: list[str], code: int, found: str, home: Path, capsys: Capture
) -> None:
    """A mistake on the command line would show a traceback, or pass for success."""
    assert main(line) == code
    output = capsys.readouterr()
    assert output.out == "" and output.err.startswith("tundish: ") and found in output.err
    assert not (home / "runs").exists()


@pytest.mark.parametrize(
    ("words", "changed"),
    [
        (["training_duration=3ep"], {"training_duration": "3ep"}),
        (["learning_rate=1e-5"], {"learning_rate": 1e-5}),
        (["compute.devices_per_node=2"], {"compute": {"device": "cpu", "devices_per_node": 2}}),
        (["compute.time_limit=12:00:00"], {"compute": {"device": "cpu", "time_limit": "12:00:00"}}),
        (["compute.sbatch.partition=gpu"], {"compute": {"device": "cpu", "sbatch": {"partition": "gpu"}}}),
        (["overrides.optimizer.lr=1e-5"], {"overrides": {"optimizer": {"lr": 1}, "seed": 3, "optimizer.lr": 1e-5}}),
        (["overrides.seed=4"], {"overrides": {"optimizer": {"lr": 1}, "seed": 4}}),
        (["overrides={}"], {"overrides": {}}),
        (["--set", "seed=4"], {"overrides": {"optimizer": {"lr": 1}, "seed": 4}}),
        (["--set", "overrides.seed=4"], {"overrides": {"optimizer": {"lr": 1}, "seed": 4}}),
        (["--set", "compute.nodes=2"], {"compute": {"device": "cpu", "nodes": 2}}),
        (["--devices", "2", "--run-name", "x"], {"compute": {"device": "cpu", "devices_per_node": 2}, "run_name": "x"}),
        (["--training-duration", "5ep", "training_duration=3ep"], {"training_duration": "5ep"}),
    ],
)
def test_what_is_in_a_file_is_replaced_key_by_key(words: list[str], changed: dict[str, Any]) -> None:
    """One override on the line would drop all those of the file, or be text where the file has a number."""
    file = {"model": "m", "compute": {"device": "cpu"}, "overrides": {"optimizer": {"lr": 1}, "seed": 3}}
    parsed = build_parser().parse_args(["run", "x.yaml", *words])
    values = dict(file)
    replaced(values, parsed, parsed.arguments)
    assert values == file | changed


@pytest.mark.parametrize(
    ("word", "found"),
    [
        ("trainig_duration=1ep", "create() has no argument trainig_duration; .*Did you mean training_duration"),
        ("optimizer.lr=1", "create() has no argument optimizer.lr; .* are written overrides.optimizer.lr"),
        ("compute.nods=2", "has no key nods"),
        ("compute.device.x=2", "device must be a mapping to set device.x, not 'cpu'"),
    ],
)
def test_a_key_that_there_is_not_is_refused(word: str, found: str, tmp_path: Path, capsys: Capture) -> None:
    """It would be ignored."""
    file = tmp_path / "x.yaml"
    file.write_text("compute: {device: cpu}\n")
    assert main(["run", str(file), word]) == 2
    assert re.search(found.replace("()", "\\(\\)"), capsys.readouterr().err)


def test_numbers_are_those_of_yaml_1_2() -> None:
    """`--set optimizer.lr=1e-5` would be a text, and a time limit of 12:00:00 the number 43200."""
    given = {"1e-5": 1e-5, "1.5E3": 1500.0, "-3": -3, "1_000": 1000, "0x1f": 31, ".5": 0.5, "1e3ep": "1e3ep"}
    given |= {"12:00:00": "12:00:00", "010": "010", "3ep": "3ep", "true": True, "null": None, "1.2.3": "1.2.3"}
    assert {text: assignment(f"x={text}")[1] for text in given} == given


def test_render_prints_the_yaml_and_nothing_else(arguments: dict[str, Any], home: Path, capsys: Capture) -> None:
    """`tundish render … > run.yaml` would not make a file that trains, or start something."""
    line = ["render", *_options(arguments), "--devices", "8", "--nodes", "4", "--device", "gpu", "--set", "seed=3"]
    assert main(line) == 0
    content = yaml.safe_load(capsys.readouterr().out)
    assert content["seed"] == 3 and content["global_train_batch_size"] % 32 == 0
    assert not (home / "runs").exists()
    assert main(["render", *_options(arguments), "--set", "global_train_batch_size=many"]) == 2


def test_models_are_listed_for_people_and_machines(capsys: Capture) -> None:
    """A script would have to parse a table."""
    assert main(["models", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert len(found) == 35
    assert {"name": "meta-llama/Llama-3.2-1B", "display_name": "Llama 3.2 1B", "max_context_length": 131072} in found
    assert main(["models"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split("  ")[0] == "NAME" and len(lines) == 36


def test_runs_are_shown_for_people_and_machines(make_run: MakeRun, capsys: Capture) -> None:
    """A run's record would be incomplete, or the document not JSON."""
    make_run("ift-1", ("CREATED", "waits"), ("FAILED", "broken: größe"))
    for line in (
        ["get", "ift-1", "--json"],
        ["list", "--json"],
        ["events", "ift-1", "--json"],
        ["checkpoints", "ift-1", "--json"],
    ):
        assert main(line) == 0
        found = json.loads(capsys.readouterr().out)
        if line[0] == "checkpoints":
            assert found == []
        elif line[0] == "events":
            assert [event["message"] for event in found] == ["waits", "broken: größe"]
        else:
            record = found[0] if line[0] == "list" else found
            assert (record["name"], record["status"], record["created_at"]) == (
                "ift-1",
                "FAILED",
                "2026-11-21T10:00:00+00:00",
            )
            assert record["events"][1]["type"] == "FAILED"
    assert main(["get", "ift-1"]) == main(["list"]) == main(["events", "ift-1"]) == main(["checkpoints", "ift-1"]) == 0
    shown = capsys.readouterr().out
    assert "broken: größe" in shown and "ift-1" in shown and "No checkpoints created yet" in shown


def test_lists_are_filtered_and_empty_ones_are_no_error(make_run: MakeRun, capsys: Capture) -> None:
    """`tundish list` on a new machine would fail; `--status` be ignored."""
    assert main(["list", "--json"]) == 0 and json.loads(capsys.readouterr().out) == []
    make_run("ift-1", ("FAILED", "x"))
    make_run("ift-2", ("COMPLETED", "x"))
    assert main(["list", "--status", "COMPLETED", "--status", "STOPPED", "--json"]) == 0
    assert [run["name"] for run in json.loads(capsys.readouterr().out)] == ["ift-2"]
    assert main(["list", "--limit", "1", "--json"]) == 0 and len(json.loads(capsys.readouterr().out)) == 1


@pytest.mark.parametrize(("last", "code"), [("COMPLETED", 0), ("FAILED", 1)])
def test_following_a_run_tells_how_it_ended(make_run: MakeRun, capsys: Capture, last: str, code: int) -> None:
    """A script that waits for a run could not tell whether it worked."""
    make_run("ift-1", ("CREATED", "waits"), (last, "over"))
    assert main(["events", "ift-1", "--follow"]) == code
    assert capsys.readouterr().out.splitlines()[-1].endswith("over")


def test_cancelling_what_is_not_there_is_said(make_run: MakeRun, capsys: Capture) -> None:
    """The user would believe that a run was stopped."""
    make_run("ift-1", ("FAILED", "x"))
    assert main(["cancel", "ift-2", "ift", "x" * 5000]) == 2
    told = capsys.readouterr().err
    assert "Did you mean ift-1?" in told and "'xxx" in told and len(told) < 1000
    assert main(["cancel", "ift-1"]) == 0
    assert capsys.readouterr().out == "No active runs found to cancel.\n"
    assert main(["cancel", "ift-1", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"canceled": [], "asked": 1}


def test_an_experiment_file_is_the_arguments_of_create(tmp_path: Path, arguments: dict[str, Any]) -> None:
    """`tundish run FILE` would train something else than the file says."""
    file = tmp_path / "run.yaml"
    content = arguments | {"training_duration": "3ep", "overrides": {"seed": 3}, "compute": {"device": "cpu"}}
    file.write_text(yaml.safe_dump(content))
    assert read_experiment(file) == content


def test_paths_in_an_experiment_file_start_from_its_folder(
    tmp_path: Path, arguments: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file would only work from one working directory."""
    folder = tmp_path / "deep"
    folder.mkdir()
    given = {
        "train_data_path": "../train.jsonl",
        "eval_data_path": "main.lab.chats",
        "custom_weights_path": "base/ep1-ba1",
        "overrides": {"save_folder": "runs", "seed": 3, "loggers": {"tensorboard": {"log_dir": "./tb"}}},
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(arguments | given))
    monkeypatch.chdir(tmp_path)
    spec, _ = parse_spec(read_experiment("deep/run.yaml"), created_at="2026-11-21T10:00:00+00:00")
    assert spec.train_data_path == str(tmp_path / "train.jsonl") and spec.eval_data_path == "main.lab.chats"
    assert spec.custom_weights_path == str(folder / "base" / "ep1-ba1")
    logs = {"loggers.tensorboard.log_dir": str(folder / "tb")}
    assert spec.overrides == {"save_folder": str(folder / "runs"), "seed": 3} | logs


@pytest.mark.parametrize(
    ("content", "found"),
    [
        (b"- a\n- b\n", "must be a mapping. Write one argument of create\\(\\) per line"),
        (b"", "must be a mapping"),
        (b"a: [1\n", "cannot be read"),
        (b"\xff\xfe\x00", "cannot be read"),
        (
            b"a: &a [x, x]\n"
            + b"".join(b"%c: &%c [%s]\n" % (n, n, b", ".join([b"*%c" % (n - 1)] * 9)) for n in b"bcdefgh"),
            "cannot be read \\(its aliases stand for more than 100,000 values\\)",
        ),
        (b"a: &a {b: *a}\n", "cannot be read \\(its aliases"),
        (b"a: " + b"[" * 5000, "cannot be read \\(it is nested too deeply"),
        (b"context_length: " + b"1" * 5000, "cannot be read"),
        (b"modle: x\nepochs: 3\n", "create\\(\\) has no argument epochs, modle; it has model, train_data_path"),
        (b"model: !!python/object/apply:os.system ['touch ran']\n", "cannot be read"),
    ],
)
def test_a_wrong_experiment_file_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture, content: bytes, found: str
) -> None:
    """A typo would be ignored, a traceback shown, or a YAML tag run a program."""
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "run.yaml"
    file.write_bytes(content)
    with pytest.raises(SpecError, match=rf"run\.yaml: {found}"):
        read_experiment(file)
    assert main(["run", str(file)]) == 2 and capsys.readouterr().err.startswith(f"tundish: {file}: ")
    assert [path.name for path in tmp_path.iterdir()] == ["run.yaml"]


def test_arguments_on_the_line_replace_those_of_the_file(
    arguments: dict[str, Any], tmp_path: Path, capsys: Capture
) -> None:
    """`tundish run FILE key=value` would train what the file says."""
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(arguments))
    assert main(["run", str(file), "training_duration=soon", "context_length=99999"]) == 2
    shown = capsys.readouterr().err
    assert "not 'soon'" in shown and "99999" in shown and "2 problems" in shown
    assert main(["run", str(file), "epochs=3"]) == 2, "an unknown argument is not ignored"
    assert "epochs" in capsys.readouterr().err
