"""runs/exporting.py and the commands on top of it: earlier checkpoints come out as folders, damaged ones are told."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tundish.base.run_folder import RunFolder
from tundish.cli import main
from tundish.errors import CheckpointError, RunNotFoundError, SpecError
from tundish.runs.exporting import find_exportable

# Of PyTorch's own, on saving: it saves from a single process, which is wanted here, and uses its own old storage class.
pytestmark = [
    pytest.mark.filterwarnings("ignore:torch.distributed is disabled, unavailable or uninitialized:UserWarning"),
    pytest.mark.filterwarnings("ignore:TypedStorage is deprecated:UserWarning"),
]

Capture = pytest.CaptureFixture[str]
MakeRun = Callable[..., RunFolder]


@pytest.fixture
def save(tiny_model: Path) -> Callable[[Path, float], Path]:
    """`save(folder, value)`: a checkpoint by tundish's writer, all of the tiny model's weights `value`."""
    import torch
    from safetensors.torch import load_file

    from tundish.checkpoints.save_folder import SaveFolder
    from tundish.checkpoints.saving import Staged, write_checkpoint

    weights = load_file(tiny_model / "model.safetensors")

    def make(folder: Path, value: float) -> Path:
        model = {f"model.{name}": torch.full_like(tensor, value) for name, tensor in weights.items()}
        staged = Staged({"state": {"model": model, "run_name": "ift-1"}}, folder, copy=False)
        write_checkpoint(staged, SaveFolder(str(folder.parent)), lambda given: [given], is_first=True)
        return folder

    return make


@pytest.fixture
def run(make_run: MakeRun, tiny_model: Path, save: Callable[[Path, float], Path]) -> RunFolder:
    """A run with two checkpoints: its weights are 0.5, then 0.75."""
    paths = make_run("ift-1", ("CREATED", "waits"), model=str(tiny_model))
    folder = Path(paths.read_tracking().save_folder)
    save(folder / "ep0-ba5", 0.5)
    save(folder / "ep1-ba10", 0.75)
    return paths


def _value(folder: Path) -> tuple[Any, float]:
    from safetensors.torch import load_file

    weight = load_file(folder / "model-00001-of-00001.safetensors")["lm_head.weight"]
    return str(weight.dtype), float(weight[3, 3])


def test_a_run_means_its_newest_checkpoint(run: RunFolder, tmp_path: Path, capsys: Capture) -> None:
    """Somebody would take home weights of the first hour."""
    assert main(["export", "ift-1", "--out", str(tmp_path / "out")]) == 0
    assert capsys.readouterr().out.startswith("ep1-ba10 of ift-1: ") and _value(tmp_path / "out") == (
        "torch.bfloat16",
        0.75,
    )


@pytest.mark.usefixtures("run")
def test_an_earlier_checkpoint_is_exported_by_its_path(
    run: RunFolder, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The best checkpoint is not always the last."""
    monkeypatch.chdir(tmp_path)
    assert main(["checkpoints", "ift-1"]) == 0
    first, second = capsys.readouterr().out.split()
    assert main(["export", first, "--dtype", "float32", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["checkpoint"] == first and said["bytes"] > 100_000
    assert said["export"] == str(tmp_path / "ift-1-ep0-ba5-float32")
    assert _value(tmp_path / "ift-1-ep0-ba5-float32") == ("torch.float32", 0.5)
    assert find_exportable(str(Path(second).with_name("latest-sharded-rank0.symlink"))).checkpoint == Path(second)


@pytest.mark.usefixtures("run")
def test_nothing_is_written_over(tmp_path: Path, capsys: Capture) -> None:
    """`--out .` would empty a folder."""
    assert main(["export", "ift-1", "--out", str(tmp_path)]) == 2
    assert "already exists. Choose a new folder" in capsys.readouterr().err


def test_a_checkpoint_that_no_run_has_made_needs_its_model(
    run: RunFolder, tmp_path: Path, tiny_model: Path, capsys: Capture
) -> None:
    """Stock LLM Foundry's checkpoints could not be exported, or with a tokenizer that was guessed."""
    foreign = tmp_path / "theirs" / "ep1-ba10"
    shutil.copytree(Path(run.read_tracking().save_folder) / "ep1-ba10", foreign)
    (foreign / "manifest.json").unlink()
    with pytest.raises(SpecError, match=r"was not made by a run of this machine.*Give --model"):
        find_exportable(str(foreign))
    assert main(["export", str(foreign), "--model", str(tiny_model), "--out", str(tmp_path / "out")]) == 0
    assert "ep1-ba10 of theirs" in capsys.readouterr().out and _value(tmp_path / "out")[1] == 0.75


def test_what_is_not_there_is_told(make_run: MakeRun, tmp_path: Path, tiny_model: Path) -> None:
    """A traceback, or an empty folder."""
    make_run("ift-2", ("CREATED", "waits"))
    with pytest.raises(RunNotFoundError, match="Did you mean ift-2"):
        find_exportable("ift-22")
    with pytest.raises(CheckpointError, match="ift-2 has no complete checkpoint yet"):
        find_exportable("ift-2")
    with pytest.raises(SpecError, match="does not exist"):
        find_exportable(f"{tmp_path}/none/ep1-ba1", str(tiny_model))
    (tmp_path / "x.pt").write_bytes(b"")
    assert main(["export", str(tmp_path / "x.pt"), "--model", str(tiny_model), "--out", str(tmp_path / "o")]) == 2


def test_verifying_reads_every_byte(run: RunFolder, capsys: Capture) -> None:
    """A disk that has lost a bit would be noticed by a model that talks nonsense."""
    folder = Path(run.read_tracking().save_folder)
    assert main(["checkpoints", "ift-1", "--verify"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(",")[0] for line in lines] == ["ep0-ba5: OK", "ep1-ba10: OK"]
    (shard,) = (folder / "ep0-ba5").glob("*.distcp")
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 4
    shard.write_bytes(content)
    assert main(["checkpoints", str(folder), "--verify"]) == 1
    shown = capsys.readouterr().out
    assert f"ep0-ba5: DAMAGED, {_size(folder / 'ep0-ba5'):,} bytes (by SHA-256 from the manifest)" in shown
    assert f"{shard}: its content is not what was written (SHA-256 differs)." in shown and "ep1-ba10: OK" in shown
    # Without a manifest, the checksums of the tensors are left.
    (shard.parent / "manifest.json").unlink()
    assert main(["checkpoints", str(shard.parent), "--verify", "--json"]) == 1
    (facts,) = json.loads(capsys.readouterr().out)
    assert len(facts["problems"]) == 1 and "(CRC-32 differs)" in facts["problems"][0]
    shard.unlink()
    assert main(["checkpoints", "ift-1", "--verify"]) == 1
    assert "ep0-ba5: DAMAGED" in capsys.readouterr().out
    assert main(["checkpoints", str(folder / "none"), "--verify"]) == 2


@pytest.mark.parametrize("begun", [False, True])
def test_of_a_run_without_checkpoints_none_is_damaged(make_run: MakeRun, capsys: Capture, begun: bool) -> None:
    """A run that has just begun was told to have no such folder, or a damaged checkpoint of 0 bytes."""
    run = make_run("ift-2", ("CREATED", "waits"))
    if begun:
        Path(run.read_tracking().save_folder).mkdir(parents=True)
    assert main(["checkpoints", "ift-2", "--verify"]) == 0
    assert capsys.readouterr().out == "No checkpoints created yet for this run. Please try again later.\n"
    assert main(["checkpoints", "ift-2", "--verify", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == []


def _size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.iterdir())


def test_what_is_in_a_store_is_verified_there(
    save: Callable[[Path, float], Path], bucket: Any, capsys: Capture, home: Path
) -> None:
    """This machine's copy would be praised while the store's is damaged; or one damaged one would hide the others."""
    from tundish.checkpoints.save_folder import SaveFolder

    place = SaveFolder(bucket.uri("kept"))
    for name in ("ep0-ba5", "ep1-ba10"):
        place.publish(save(place.local / name, 0.5))
    key = "kept/ep1-ba10/__0_0.distcp"
    content = bytearray(bucket.client.get_object(Bucket=bucket.name, Key=key)["Body"].read())
    content[len(content) // 2] ^= 1
    bucket.client.put_object(Bucket=bucket.name, Key=key, Body=bytes(content))
    assert main(["checkpoints", bucket.uri("kept"), "--verify"]) == 1
    shown = capsys.readouterr().out
    assert "ep0-ba5: OK" in shown and "ep1-ba10: DAMAGED" in shown and "(SHA-256 differs)" in shown
    assert [path.name for path in (home / "checkpoints").iterdir()] == [place.local.name], "copies are removed"
