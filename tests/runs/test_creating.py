"""runs/creating.py: bad input is told in one message, before anything is started, and leaves nothing behind."""

import shutil
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import pytest
import yaml

from tundish import foundation_model as fm
from tundish.errors import DataError, InputError, SpecError
from tundish.runs import creating, planning

pytestmark = pytest.mark.usefixtures("nothing_starts")

WriteLines = Callable[[Path, Any], Path]
USER = {"role": "user", "content": "2 + 2?"}
CHAT = {"messages": [USER, {"role": "assistant", "content": "4"}]}


def _refused(arguments: dict[str, Any], home: Path) -> InputError:
    """The error of `create()`, after a look at what it has left behind."""
    before = _files(home)
    with pytest.raises(InputError) as error:
        fm.create(**arguments)
    assert _files(home) == before, "something was left behind"
    return error.value


def _files(home: Path) -> dict[Path, int]:
    """All files but locks of prepared data, which another process may be waiting for, and what configs ask for."""
    files = (path for path in home.rglob("*") if path.is_file() and path.suffix != ".lock")
    return {path: path.stat().st_mtime_ns for path in files if path.parent.name != "architectures"}


def test_a_base_model_without_its_weights_is_refused_before_anything_waits(
    arguments: dict[str, Any], home: Path, tiny_model: Path, tmp_path: Path
) -> None:
    """The run would wait for a device, and train from random numbers; its data can be looked at without weights."""
    folder = shutil.copytree(tiny_model, tmp_path / "base")
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[:-1000])
    arguments["model"] = str(folder)
    error = _refused(arguments | {"train_data_path": "/no/such/file"}, home)
    assert [problem.partition(": ")[0] for problem in error.problems] == ["model", "train_data_path"]
    assert "model.safetensors: is truncated" in error.problems[0]
    assert fm.validate(**arguments).ok


def test_all_problems_of_a_call_are_one_message(arguments: dict[str, Any], home: Path) -> None:
    """The caller would repair one thing after the other, or a run be started that must fail."""
    (home / "runs" / "mine").mkdir(parents=True)
    wrong = {
        "task_type": "CHAT",
        "training_duration": "3 epochs",
        "context_length": 100_000,
        "train_data_path": "/no/such/train.jsonl",
        "overrides": {"global_train_batchsize": 8},
        "run_name": "mine",
    }
    error = _refused(arguments | wrong, home)
    assert type(error) is SpecError
    expected = [
        "task_type: must be CHAT_COMPLETION, INSTRUCTION_FINETUNE or CONTINUED_PRETRAIN, not 'CHAT'.",
        "training_duration: must be a positive integer followed by ep, ba or tok, not '3 epochs'",
        "context_length: must be at most 512, the maximum of ",
        "train_data_path: /no/such/train.jsonl: there is no such file",
        "overrides: a run has no LLM Foundry key 'global_train_batchsize'. Did you mean global_train_batch_size",
        "run_name: run 'mine' already exists. Choose another name",
    ]
    for start in expected:
        assert [problem for problem in error.problems if problem.startswith(start)], start
    assert len(error.problems) == len(expected)
    assert error.message.startswith("6 problems:\n  - ") and all(problem in error.message for problem in error.problems)


@pytest.mark.parametrize(
    ("lines", "found"),
    [
        ([CHAT] * 6 + ['{"messages": ['] + [CHAT], "train.jsonl, line 7: not JSON: Expecting value at column 15."),
        ([CHAT, {"messages": [USER]}], "train.jsonl, line 2: the last message is from 'user'; a chat must end"),
        ([], "holds no sample"),
    ],
    ids=["JSON error on line 7", "chat ends with user", "empty file"],
)  # fmt: skip
def test_wrong_data_alone_is_an_error_of_the_data(
    arguments: dict[str, Any], home: Path, write_lines: WriteLines, lines: list[Any], found: str
) -> None:
    """The run would fail later; or the exit code say that the arguments are wrong."""
    write_lines(Path(arguments["train_data_path"]), lines)
    error = _refused(arguments, home)
    assert type(error) is DataError and len(error.problems) == 1 and found in error.message


def test_problems_of_arguments_and_data_come_together(
    arguments: dict[str, Any], home: Path, tmp_path: Path, write_lines: WriteLines
) -> None:
    """Data would only be looked at once the arguments are right."""
    write_lines(Path(arguments["train_data_path"]), [CHAT, "{"])
    evaluation = write_lines(tmp_path / "eval.jsonl", [{"messages": [USER]}])
    error = _refused(arguments | {"eval_data_path": str(evaluation), "learning_rate": "fast"}, home)
    assert type(error) is SpecError
    assert [problem.split(":")[0] for problem in error.problems] == [
        "learning_rate",
        "train_data_path",
        "eval_data_path",
    ]


def test_a_system_message_is_judged_by_the_model(
    arguments: dict[str, Any], home: Path, write_lines: WriteLines
) -> None:
    """Mistral's template would raise mid-run."""
    chat = {"messages": [{"role": "system", "content": "be short"}, *CHAT["messages"]]}
    write_lines(Path(arguments["train_data_path"]), [chat])
    creating.check(arguments)
    error = _refused(arguments | {"model": "mistralai/Mistral-7B-Instruct-v0.2"}, home)
    assert (
        "line 1: the first message is from 'system', which this model's chat template does not accept" in error.message
    )


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        ({"eval_data_path": "/no/such/eval.jsonl"}, "eval_data_path: /no/such/eval.jsonl: there is no such file"),
        ({"task_type": "CONTINUED_PRETRAIN"}, "is a file; CONTINUED_PRETRAIN takes a folder of .txt files"),
        ({"custom_weights_path": "/no/such/ep1-ba1"}, "custom_weights_path: /no/such/ep1-ba1: does not exist"),
        ({"compute": {"nodes": 2}}, "compute: nodes is 2, but a run on this machine uses one."),
        ({"overrides": {"global_train_batch_size": 3}, "compute": {"devices_per_node": 2}}, "multiple of the number"),
        ({"overrides": {"global_train_batch_size": "8"}}, "must be a multiple of the number of devices, 1, not '8'"),
        ({"overrides": {"global_train_batch_size": 0}}, "must be a multiple of the number of devices, 1, not 0"),
        ({"overrides": {"code_paths": ["x.py"]}}, "tundish runs no code from configuration"),
        ({"overrides": {1: 2}}, "overrides: must be a mapping of LLM Foundry keys"),
        ({"overrides": {"load_path": Path("/weights")}}, "overrides: 'load_path'"),
        ({"overrides": {"metadata.day": date(2026, 11, 21)}}, "overrides: 'metadata.day'"),
        ({"train_data_path": "x" * 5000}, "train_data_path: "),
        ({"train_data_path": "a\0b.jsonl"}, "train_data_path: "),
        ({"train_data_path": 5}, "train_data_path: must be text, not int"),
        ({"train_data_path": "dbfs:/Volumes/../../etc/passwd"}, "train_data_path: "),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_single_argument_is_told(
    arguments: dict[str, Any], home: Path, changes: dict[str, Any], found: str
) -> None:
    """The run would be accepted and fail in its supervisor, or the call end in a traceback of another error."""
    error = _refused(arguments | changes, home)
    assert type(error) is SpecError and found in error.message
    assert len(error.problems) == 1, error.problems


def test_a_damaged_checkpoint_is_told_before_the_run(arguments: dict[str, Any], home: Path, tmp_path: Path) -> None:
    """The data would be prepared for an hour before the weights are found to be incomplete."""
    folder = tmp_path / "ep1-ba1"
    folder.mkdir()
    error = _refused(arguments | {"custom_weights_path": str(folder)}, home)
    assert type(error) is SpecError
    assert (
        error.message.startswith("custom_weights_path: ")
        and "has no .metadata, so the checkpoint is incomplete" in error.message
    )


def test_weights_of_another_shape_are_told_before_the_run(
    arguments: dict[str, Any], home: Path, tmp_path: Path, tiny_model: Path
) -> None:
    """The data would be prepared, and a device waited for, before somebody compares them."""
    import torch
    from safetensors.torch import load_file

    weights = {f"model.{name}": tensor for name, tensor in load_file(tiny_model / "model.safetensors").items()}
    weights["model.lm_head.weight"] = torch.zeros(400, 64)
    torch.save({"state": {"model": weights}, "rng": []}, tmp_path / "other.pt")
    error = _refused(arguments | {"custom_weights_path": str(tmp_path / "other.pt")}, home)
    (problem,) = error.problems
    assert problem.startswith("custom_weights_path: ") and "not a checkpoint of this model: 1 of its 21" in problem
    assert "lm_head.weight [400, 64] instead of [384, 64]" in problem


def test_rows_are_not_read_when_that_is_not_wanted(arguments: dict[str, Any], write_lines: WriteLines) -> None:
    """`validate_inputs=False` would still read a huge file; but a missing one must be told all the same."""
    write_lines(Path(arguments["train_data_path"]), ["{"])
    plan = creating.check(arguments | {"validate_inputs": False})
    assert plan.spec.validate_inputs is False and plan.data["train"].prepared is None and plan.steps is None
    with pytest.raises(SpecError, match="there is no such file"):
        creating.check(arguments | {"validate_inputs": False, "train_data_path": "/no/such.jsonl"})


def test_good_input_passes_and_leaves_nothing_either(arguments: dict[str, Any], home: Path) -> None:
    """The tests above would pass if everything were refused."""
    plan = creating.check(arguments | {"task_type": "", "experiment_path": ""})
    assert plan.spec.model == arguments["model"] and not (home / "runs").exists()


def test_a_failure_while_the_run_is_made_leaves_no_folder(
    arguments: dict[str, Any], home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that was never created would block its name, or be listed."""

    def unreachable(*_: object, **__: object) -> None:
        raise ConnectionError("the tracking server cannot be reached")

    monkeypatch.setattr(creating, "open_tracking", unreachable)
    with pytest.raises(ConnectionError):
        fm.create(**arguments, run_name="mine")
    assert not (home / "runs" / "mine").exists()


def test_rendering_reads_no_data_and_writes_nothing(arguments: dict[str, Any], home: Path) -> None:
    """Planning a run would need its data, or leave folders behind."""
    shutil.rmtree(Path(arguments["train_data_path"]).parent / "train.jsonl", ignore_errors=True)
    content = yaml.safe_load(
        planning.render_only(
            arguments | {"run_name": "planned", "compute": {"nodes": 4, "devices_per_node": 8, "device": "gpu"}}
        )
    )
    assert content["run_name"] == "planned" and content["global_train_batch_size"] % 32 == 0
    assert content["train_loader"]["dataset"]["local"] == str(home / "runs" / "planned" / "data" / "train")
    assert not (home / "runs").exists()


@pytest.mark.parametrize(
    ("overrides", "found"),
    [
        ({"optimiser.lr": 1}, "no LLM Foundry key 'optimiser'"),
        ({"global_train_batch_size": "many"}, "global_train_batch_size"),
        ({"global_train_batch_size": 0}, "global_train_batch_size"),
        ({1: 2}, "overrides: "),
    ],
)
def test_rendering_tells_wrong_overrides(arguments: dict[str, Any], overrides: dict[Any, Any], found: str) -> None:
    """A plan would be printed that no run accepts, or end in a traceback."""
    with pytest.raises(SpecError, match=found):
        planning.render_only(arguments | {"overrides": overrides})


def test_rendering_tells_problems_of_arguments_and_overrides_together(arguments: dict[str, Any]) -> None:
    """The caller would repair one after the other."""
    with pytest.raises(SpecError) as error:
        planning.render_only(arguments | {"overrides": {"optimiser.lr": 1}, "training_duration": "soon"})
    assert len(error.value.problems) == 2


def test_eval_prompts_that_leave_no_room_are_told(nothing_starts: None, arguments: dict[str, Any]) -> None:
    """Generation would fail at the first checkpoint, hours into the run."""
    with pytest.raises(SpecError) as error:
        fm.create(**arguments, context_length=128, eval_prompts=["fox " * 100, "short"])
    (problem,) = error.value.problems
    assert problem.startswith("eval_prompts: prompt 1 has ")
    assert problem.endswith("at most 28 fit into the context of 128. Shorten it, or raise context_length.")


@pytest.mark.parametrize("attention", ["flash_attention_2", "flex_attention", "paged", 7])
def test_an_attention_that_lets_samples_see_each_other_is_refused(arguments: dict[str, Any], attention: object) -> None:
    """The data would be prepared for hours before the first batch says so."""
    with pytest.raises(SpecError) as caught:
        creating.create(arguments | {"overrides": {"model.attn_implementation": attention}})
    (problem,) = caught.value.problems
    assert repr(attention) in problem and "must be sdpa or eager for llama on a cpu" in problem


def test_a_run_does_not_go_on_from_another_of_its_name(arguments: dict[str, Any], tmp_path: Path, home: Path) -> None:
    """A colleague's checkpoint in the same root would be exported as this run's, or be trained on."""
    folder = tmp_path / "shared" / "sft" / "checkpoints" / "ep1-ba1"
    folder.mkdir(parents=True)
    (folder / ".metadata").write_bytes(b"x")
    (folder / "manifest.json").write_text('{"files": {".metadata": {"bytes": 1, "sha256": "0"}}}')
    fm.validate(**arguments)  # prepares the data, which stays
    given = arguments | {"run_name": "sft", "overrides": {"save_folder": str(tmp_path / "shared")}}
    error = _refused(given, home)
    assert f"{folder}: another run of the name 'sft' has saved there" in error.message


def test_folders_that_cannot_be_made_are_told(arguments: dict[str, Any], tmp_path: Path, home: Path) -> None:
    """The run would wait for its devices and its data, and fail when training begins."""
    (tmp_path / "file").write_text("")
    overrides = {"save_folder": f"{tmp_path}/file/x", "loggers.tensorboard.log_dir": f"{tmp_path}/file"}
    error = _refused(arguments | {"overrides": overrides}, home)
    said = f"{tmp_path}/file: Not a directory. Name a folder that you may write into."
    assert error.problems == tuple(f"overrides: {key}: {said}" for key in overrides)


def test_a_password_in_an_address_is_refused(arguments: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """It would be in the run's YAML, in its logs and in every copy of them."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "postgresql://lab:geheim@db:5432/mlflow")
    with pytest.raises(SpecError, match=r"MLFLOW_TRACKING_URI: holds a password.* PGPASSWORD") as error:
        fm.create(**arguments)
    assert "geheim" not in str(error.value)
    for more in ("https://geheim@server:5000", "postgresql://db/mlflow?user=lab&password=geheim"):
        monkeypatch.setenv("MLFLOW_TRACKING_URI", more)
        with pytest.raises(SpecError, match="holds a password"):
            planning.render_only(arguments)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "postgresql://lab@db:5432/mlflow")
    with pytest.raises(pytest.fail.Exception, match="a run was accepted"):
        fm.create(**arguments)


def test_large_data_is_looked_at_without_a_tokenizer(
    arguments: dict[str, Any], monkeypatch: pytest.MonkeyPatch, write_lines: Callable[..., Path]
) -> None:
    """The caller would wait for minutes; or a wrong row only be told after a device was taken."""
    monkeypatch.setattr("tundish.runs.planning.PREPARED_BYTES", 50)
    monkeypatch.setattr("tundish.data.encoding.Job.of", lambda spec: pytest.fail("a tokenizer was loaded"))
    with pytest.raises(pytest.fail.Exception, match="a run was accepted"):
        fm.create(**arguments)
    write_lines(Path(arguments["train_data_path"]), [{"messages": [{"role": "user", "content": "2 + 2?"}]}] * 3)
    with pytest.raises(DataError, match="3 of 3 lines are like this"):
        fm.create(**arguments)
