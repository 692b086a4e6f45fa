"""address.py: what a text is an address of, the same for every argument, from any folder."""

import json
from pathlib import Path
from typing import Any, get_args

import pytest

from tundish.errors import SpecError
from tundish.plan.address import Address, Beside, Takes, local_path
from tundish.plan.spec import parse_spec

ALL: tuple[Takes, ...] = get_args(Takes)
NAMES: tuple[Takes, ...] = ("data", "model")
STORES: tuple[Takes, ...] = ("checkpoint", "folder")


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The caller's working folder, with a blank in its name."""
    folder = tmp_path / "my work"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


@pytest.mark.parametrize("takes", ALL)
@pytest.mark.parametrize(
    ("given", "found"),
    [
        ("./x.jsonl", "{here}/x.jsonl"),
        (".hidden/x", "{here}/.hidden/x"),
        ("../x.jsonl", "{above}/x.jsonl"),
        ("./a/../../x", "{above}/x"),
        ("/data/x.jsonl", "/data/x.jsonl"),
        ("/data/two words/x.jsonl", "/data/two words/x.jsonl"),
        ("~/x.jsonl", "{user}/x.jsonl"),
        ("./two words.jsonl", "{here}/two words.jsonl"),
        ("  ./x.jsonl\n", "{here}/x.jsonl"),
        ("\u00a0/data/x.jsonl\u200b", "/data/x.jsonl"),
        ("two words/x.jsonl", "{here}/two words/x.jsonl"),
        ("file:///data/x.jsonl", "/data/x.jsonl"),
        ("file:/data/x.jsonl", "/data/x.jsonl"),
        ("file://localhost/data/two%20words.jsonl", "/data/two words.jsonl"),
        ("FILE:///data/x.jsonl", "/data/x.jsonl"),
        ("dbfs:/Volumes/main/lab/v/x.jsonl", "{home}/Volumes/main/lab/v/x.jsonl"),
        ("dbfs:///Volumes/main/lab/v/x.jsonl", "{home}/Volumes/main/lab/v/x.jsonl"),
        ("/Volumes/main/lab/v/x.jsonl", "{home}/Volumes/main/lab/v/x.jsonl"),
        ("file:///Volumes/main/lab/v/x.jsonl", "{home}/Volumes/main/lab/v/x.jsonl"),
        ("dbfs:/FileStore/x.jsonl", "/FileStore/x.jsonl"),
        (Path("x.jsonl"), "{here}/x.jsonl"),
        (Path("org/dataset/train"), "{here}/org/dataset/train"),
    ],
)
def test_what_looks_like_a_path_is_one_in_every_argument(
    home: Path, here: Path, takes: Takes, given: Any, found: str
) -> None:
    """A path would mean a file in one argument, and another one, or a name, in the next."""
    address = Address.parse(given, takes)
    assert address.kind == "path"
    assert address.text == found.format(here=here, above=here.parent, user=Path.home(), home=home)
    assert Address.of(address.text) == Address("path", address.text, address.text)


@pytest.mark.parametrize("takes", ["data", "checkpoint", "folder", "file"])
@pytest.mark.parametrize("given", ["x", "train.jsonl", "data/x.jsonl", "data/x.jsonl.gz", "a/b/c/d/e", "data/x.csv"])
def test_a_bare_name_of_a_file_is_a_path(here: Path, takes: Takes, given: str) -> None:
    """`train.jsonl` would be looked for in the folder where a stage works, or on the hub."""
    assert Address.parse(given, takes).text == str(here / given)


WRITABLE = ("s3", "gs", "azure", "abfss", "wasbs", "azure-dl", "oci", "r2", "hdfs")
SERVED = "https://lab:8443/api/2.0/mlflow-artifacts/artifacts/1/ab/artifacts/x"


@pytest.mark.parametrize(
    ("takes", "given", "found"),
    [
        *((takes, f"{scheme}://b/x", f"{scheme}://b/x") for takes in ("data", *STORES) for scheme in WRITABLE),
        *(
            (takes, text, text)
            for takes in ("data", *STORES)
            for text in ("abfss://c@acc.dfs.core.windows.net/x", SERVED)
        ),
        *(("data", f"{scheme}://b/x.jsonl", f"{scheme}://b/x.jsonl") for scheme in ("hf", "http", "https")),
        ("data", "S3://Bucket/X", "s3://Bucket/X"),
        ("checkpoint", "mlflow-artifacts:/1/ab/artifacts/x", "mlflow-artifacts:/1/ab/artifacts/x"),
    ],
)
def test_uris_of_stores_stay(here: Path, takes: Takes, given: str, found: str) -> None:
    """An object would be looked for on this machine."""
    assert Address.parse(given, takes) == Address("object", found, given)
    assert Address.of(found).kind == "object"


@pytest.mark.parametrize(
    ("takes", "given", "found"),
    [
        *((takes, "https://b/x", r"https:// is read-only, unless it is in an MLflow server's art") for takes in STORES),
        *((takes, "hf://datasets/b/x", "begin with dbfs:/, file:///, s3://, gs://, azure://") for takes in STORES),
        *((takes, "s3://bucket/x", r"begin with dbfs:/, file:///\.") for takes in ("model", "file")),
        *((takes, "s4://bucket/x", "'s4://bucket/x' must be a path") for takes in ALL),
        ("data", "s3://key:Gehe1mnis@bucket/x.jsonl", r"'s3://\*\*\*@bucket/x.jsonl' contains a password"),
        ("data", "s3://bucket/x.jsonl?X-Amz-Signature=Gehe1mnis", r"Signature=\*\*\*' contains a password or token"),
        ("checkpoint", "https://me:Gehe1mnis@host/ep1-ba1", "contains a password or token"),
        ("folder", "https://Gehe1mnis@host/x", "contains a password or token"),
        ("data", "s3:/bucket/x", "'s3://' must be followed by a bucket or host"),
        ("data", "s3://", "'s3://' must be followed by a bucket or host"),
        *((takes, "file://host/x", "'file://' must be followed by an absolute path of this machine") for takes in ALL),
        *((takes, "  ", "must not be empty") for takes in ALL),
        *((takes, "x" * 300, r"'x{40}…' has 300 characters, which is too long for a path") for takes in ALL),
        *((takes, "./" + "x/" * 3000, "has 6,002 characters, which is too long for a path") for takes in ALL),
        *((takes, "./a\nb", "only printable characters are allowed") for takes in ALL),
        *((takes, "./a\0b", "only printable characters are allowed") for takes in ALL),
        *((takes, "./a\udcffb", "only printable characters are allowed") for takes in ALL),
        *((takes, "~no-such-user/x", "cannot be made an absolute path") for takes in ALL),
        *((takes, "dbfs:/Volumes/../../etc/passwd", "leaves") for takes in ALL),
        *((takes, "/Volumes/main/../../etc/passwd", "leaves") for takes in ALL),
        *(
            (takes, "dbfs:/databricks/mlflow-tracking/42/r", "must be followed by '<experiment id>/<run id>/art")
            for takes in ALL
        ),
        ("checkpoint", "dbfs:/databricks/mlflow-tracking/42/r/artifacts", "must be followed by '<experiment id>"),
        *((takes, "dbfs:/databricks/mlflow-tracking/1/r/artifacts/../x", r"must not contain '\.\.'") for takes in ALL),
        *((takes, "./${oc.env:X}", r"must not contain '\$\{'") for takes in ALL if takes != "file"),
    ],
)
def test_what_is_no_address_of_its_argument_is_refused(here: Path, takes: Takes, given: str, found: str) -> None:
    """It would be taken for something else, and fail in a run, or reach files of others."""
    with pytest.raises(SpecError, match=found):
        Address.parse(given, takes)


def test_a_volume_of_the_machine_comes_before_that_of_the_workspace(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A machine with real Volumes would read others; a message would not say where both were looked for."""
    address = Address.parse("dbfs:/Volumes/main/x.jsonl", "data")
    assert address.places == f"{home}/Volumes/main/x.jsonl or /Volumes/main/x.jsonl"


def test_an_mlflow_path_of_the_default_store_is_its_folder(home: Path) -> None:
    """A path copied from `get_checkpoints()` of the original service's layout would not be found."""
    artifacts = home / "mlflow" / "artifacts" / "0123abcd" / "run7" / "artifacts"
    artifacts.mkdir(parents=True)
    given = "dbfs:/databricks/mlflow-tracking/42/run7/artifacts/chat-x/checkpoints/ep1-ba2"
    assert Address.parse(given, "data").text == str(artifacts / "chat-x" / "checkpoints" / "ep1-ba2")
    assert Address.parse(given.removeprefix("dbfs:"), "checkpoint") == Address(
        "artifact", given, given.removeprefix("dbfs:")
    ), "where a run's checkpoints are, its record says"
    with pytest.raises(SpecError, match=r"has no MLflow run 'run8'.*Copy the path from get_checkpoints\(\)"):
        Address.parse(given.replace("run7", "run8"), "data")


@pytest.mark.parametrize(
    ("takes", "given", "kind"),
    [
        ("data", "main.lab.chats", "table"),
        ("data", "main.my-lab.chats_2", "table"),
        ("data", "org/dataset/train", "hub"),
        ("data", "data/train", "hub"),
        ("data", "org/my.data-set/train[:10%]", "hub"),
        ("model", "meta-llama/Llama-3.2-1B", "hub"),
        ("model", "gpt2", "hub"),
    ],
)
def test_a_name_is_one_unless_it_stands_there(here: Path, takes: Takes, given: str, kind: Any) -> None:
    """A table or a dataset would get the caller's folder in front, or a folder be looked for on the hub."""
    name = Address.parse(given, takes)
    assert name == Address(kind, given, given, (str(here / given),)), "messages tell both"
    assert Address.of(name.text).kind == kind
    (here / given).mkdir(parents=True)
    assert Address.parse(given, takes) == Address("path", str(here / given), given)


def test_a_folder_of_data_is_one_whatever_its_splits(here: Path) -> None:
    """`datasets` takes a folder that stands there for the dataset: the hub's would be meant, and the folder be read."""
    (here / "lab").mkdir()
    assert Address.parse("lab/train", "data").kind == "path"
    assert Address.parse("lab/chats/train", "data").kind == "hub"


def test_texts_of_a_file_start_from_its_folder(here: Path, tmp_path: Path) -> None:
    """A YAML file would mean something else for each folder that it is started from."""
    folder = tmp_path / "exp"
    (folder / "data").mkdir(parents=True)
    (here / "org" / "dataset" / "train").mkdir(parents=True)

    def text(given: str, takes: Takes = "data") -> str:
        return Address.parse(Beside(given, folder), takes).text

    assert text("chats.jsonl") == text("./chats.jsonl") == str(folder / "chats.jsonl")
    assert text("../x.jsonl") == str(tmp_path / "x.jsonl")
    assert text("data/train") == str(folder / "data" / "train")
    assert text("main.lab.chats") == "main.lab.chats" and text("org/dataset/train") == "org/dataset/train"
    assert text("~/x") == str(Path.home() / "x") and text("s3://b/x") == "s3://b/x"
    assert text("base", "checkpoint") == text("base", "folder") == str(folder / "base")


def test_what_is_resolved_is_checked(here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """LLM Foundry's YAML would print a secret of the environment, by way of the name of a folder."""
    odd = tmp_path / "${oc.env:SECRET}"
    odd.mkdir()
    monkeypatch.chdir(odd)
    with pytest.raises(SpecError, match=r"'\./x' \('.*\$\{oc\.env:SECRET\}/x'\) must not contain '\$\{'"):
        Address.parse("./x", "data")
    with pytest.raises(SpecError, match=r"must not contain"):
        Address.parse("~/x".replace("~", str(odd)), "folder")
    monkeypatch.setenv("HOME", str(odd))
    with pytest.raises(SpecError, match=r"must not contain"):
        Address.parse("~/x", "checkpoint")
    assert local_path("report.json", "--report") == odd / "report.json", "no YAML names it"


@pytest.mark.parametrize("takes", ALL)
def test_a_working_folder_that_was_removed_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, takes: Takes
) -> None:
    """A traceback of `getcwd` would be shown."""
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    with pytest.raises(SpecError, match="cannot be made an absolute path"):
        Address.parse("./x.jsonl", takes)
    assert Address.parse("/x.jsonl", takes).text == "/x.jsonl"


def test_a_message_names_the_argument() -> None:
    """The caller would not learn which path is meant."""
    with pytest.raises(SpecError, match=r"^--out: 's3://b/x' must be a path"):
        local_path("s3://b/x", "--out")


# From here on: what create() makes of them.


def _spec(arguments: dict[str, Any]) -> dict[str, Any]:
    spec, _ = parse_spec(arguments, created_at="2026-11-21T10:00:00+00:00")
    return json.loads(spec.to_json())


def test_a_spec_holds_what_the_paths_mean(here: Path, home: Path, arguments: dict[str, Any], tiny_model: Path) -> None:
    """A stage works in another folder than its caller: `./train.jsonl` was looked for there, and the run FAILED."""
    (here / "base model").symlink_to(tiny_model)
    given = {
        "model": "base model",
        "train_data_path": "./train.jsonl",
        "eval_data_path": " data/eval set.jsonl ",
        "custom_weights_path": "../ep1-ba1",
        "overrides": {"save_folder": "checkpoints here", "seed": 3},
    }
    found = _spec(arguments | given)
    assert found["model"] == str(tiny_model.resolve())
    assert found["train_data_path"] == str(here / "train.jsonl")
    assert found["eval_data_path"] == str(here / "data" / "eval set.jsonl")
    assert found["custom_weights_path"] == str(here.parent / "ep1-ba1")
    assert found["overrides"] == {"save_folder": str(here / "checkpoints here"), "seed": 3}
    names = _spec(arguments | {"train_data_path": "main.lab.chats", "eval_data_path": "org/dataset/train"})
    assert (names["train_data_path"], names["eval_data_path"]) == ("main.lab.chats", "org/dataset/train")


@pytest.mark.parametrize("argument", ["model", "train_data_path", "eval_data_path", "custom_weights_path", "overrides"])
def test_a_wrong_address_is_told_with_its_argument(arguments: dict[str, Any], argument: str) -> None:
    """The caller would not learn which path is meant, or see a traceback."""
    for wrong in ("s4://x/y", "dbfs:/Volumes/../x", "a\nb", 7):
        given = {"save_folder": wrong} if argument == "overrides" else wrong
        with pytest.raises(SpecError) as refusal:
            _spec(arguments | {argument: given})
        (problem,) = refusal.value.problems
        assert problem.startswith(f"{argument}: ")


def test_a_link_to_a_model_does_not_bring_in_what_is_resolved(
    here: Path, tmp_path: Path, arguments: dict[str, Any], tiny_model: Path
) -> None:
    """The name of the folder behind a link reaches the YAML, where LLM Foundry would resolve it."""
    import shutil

    odd = tmp_path / "${oc.env:SECRET}"
    shutil.copytree(tiny_model, odd)
    (here / "a").symlink_to(odd)
    with pytest.raises(SpecError, match=r"model: must not contain '\$\{', but is '.*\$\{oc\.env:SECRET\}'"):
        _spec(arguments | {"model": "a"})
