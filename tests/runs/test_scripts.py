"""runs/scripts.py: what people start on each host when no scheduler does."""

import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from tundish.base.run_folder import RunFolder
from tundish.cli import main
from tundish.errors import SpecError
from tundish.runs.scripts import scripts, write

TWO = {"device": "cpu", "nodes": 2, "devices_per_node": 2}


def test_each_host_gets_its_own_number_and_the_first_one_s_address(arguments: dict[str, Any]) -> None:
    """Two hosts with one number wait for each other for ever."""
    texts = scripts({**arguments, "compute": TWO}, "10.0.0.1", 29501)
    assert list(texts) == ["node0.sh", "node1.sh"]
    for number, text in enumerate(texts.values()):
        assert f"--world_size 4 --node_rank {number} --master_addr 10.0.0.1 --master_port 29501" in text
        assert "-n 2 " in text and "export FSDP_VERSION=2" in text and "export OMP_NUM_THREADS=" in text
        assert subprocess.run(["bash", "-n"], input=text, text=True, capture_output=True).stderr == ""


def test_printing_makes_nothing(arguments: dict[str, Any], home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A look at a plan would leave runs behind."""
    options = [f"--{name.replace('_', '-')}={value}" for name, value in arguments.items()]
    options += ["--launch", "--device=cpu", "--nodes=2", "--devices=1", "--master-addr=10.0.0.1"]
    assert main(["render", *options]) == 0
    assert "tundish.launch.composer_launcher" in capsys.readouterr().out
    assert not home.exists()


def test_a_job_s_script_can_be_looked_at(arguments: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    """Administrators want to read what will be submitted."""
    options = [f"--{name.replace('_', '-')}={value}" for name, value in arguments.items()]
    options += [
        "--launch",
        "--launcher=slurm",
        "--devices=4",
        "--nodes=2",
        "--sbatch=partition=gpu",
        "--time-limit=1:00:00",
    ]
    assert main(["render", *options]) == 0
    out = capsys.readouterr().out
    assert "#SBATCH --partition=gpu" in out and "#SBATCH --time=1:00:00" in out and "srun --nodes=2" in out


def test_a_folder_holds_all_that_hosts_need(arguments: dict[str, Any], tmp_path: Path) -> None:
    """A host would train other data, or write its checkpoints where nobody looks."""
    out = tmp_path / "shared"
    given = {**arguments, "run_name": "by-hand", "overrides": {"global_train_batch_size": 4}}
    made = write({**given, "compute": TWO}, "10.0.0.1", 29500, out)
    assert [path.name for path in made] == ["node0.sh", "node1.sh"]
    content = yaml.safe_load((out / "foundry.yaml").read_text())
    assert content["train_loader"]["dataset"]["local"] == str(out / "data" / "train")
    assert content["save_folder"] == str(out / "checkpoints")
    assert (out / "data" / "train" / "index.json").is_file()
    run_id = RunFolder(out).read_tracking().run_id
    assert all(f"export MLFLOW_RUN_ID={run_id}" in path.read_text() for path in made)

    # Fewer hosts later: the same batches, the same MLflow run.
    del given["overrides"]
    (only,) = write({**given, "compute": {"device": "cpu", "devices_per_node": 1}}, None, 29500, out)
    assert not (out / "node1.sh").exists() and f"export MLFLOW_RUN_ID={run_id}" in only.read_text()
    assert yaml.safe_load((out / "foundry.yaml").read_text())["global_train_batch_size"] == 4
    with pytest.raises(SpecError, match="batches of 4 rows cannot be shared equally by 3 devices"):
        write({**given, "compute": {"device": "cpu", "devices_per_node": 3}}, None, 29500, out)


@pytest.mark.parametrize(
    "address", ["$(touch ran)", "`touch ran`", "a b", "a;b", "-x", "", "$HOME", "10.0.0.1\n", "a" * 300, "http://x"]
)
def test_an_address_is_a_host_s(arguments: dict[str, Any], address: str) -> None:
    """`$(…)` would run on each host that the script is started on."""
    with pytest.raises(SpecError, match=r"^--master-addr: must be the name or the IP address of a host, not "):
        scripts({**arguments, "compute": TWO}, address, 29500)


@pytest.mark.parametrize("address", ["node-1", "gpu01.lab.example.org", "10.0.0.1", "fe80::1", "fe80::1%eth0", "::1"])
def test_names_and_addresses_of_hosts_are_taken(arguments: dict[str, Any], address: str) -> None:
    """Somebody's cluster could not be used."""
    assert f"--master_addr {address} " in scripts({**arguments, "compute": TWO}, address, 29500)["node1.sh"]


@pytest.mark.parametrize(
    ("options", "found"),
    [
        (["--master-addr=10.0.0.1"], "--master-addr has no effect without --launch"),
        (["--master-port=1"], "--master-port has no effect without --launch"),
        (["--out=x"], "--out has no effect without --launch"),
        (["--launch", "--master-addr=10.0.0.1"], "--master-addr has no effect unless there are several --nodes"),
        (["--launch", "--master-port=70000"], "--master-port must be from 1 to 65535, not 70000"),
    ],
)
def test_options_without_use_are_refused(
    arguments: dict[str, Any], capsys: pytest.CaptureFixture[str], options: list[str], found: str
) -> None:
    """The caller would believe that they were heeded."""
    given = [f"--{name.replace('_', '-')}={value}" for name, value in arguments.items()]
    assert main(["render", *given, "--device=cpu", *options]) == 2
    assert found in capsys.readouterr().err


def test_what_is_printed_can_be_copied(
    arguments: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A folder's name with a blank, or worse, would be another command in the reader's shell."""
    given = [f"--{name.replace('_', '-')}={value}" for name, value in arguments.items()]
    out = tmp_path / "it's $(touch ran)"
    assert main(["render", *given, "--device=cpu", "--devices=1", "--launch", f"--out={out}"]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    command = line.partition(":  ")[2].replace("bash ", "bash -n ", 1)
    done = subprocess.run(["bash", "-c", command], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "") and not (tmp_path / "ran").exists()
