"""What is masked, wherever it would leave the process, and what is left as it is."""

import json
import pickle
from pathlib import Path
from typing import Any

import pytest

from tundish import foundation_model as fm
from tundish.base import events
from tundish.base.text import MASK, holds_secret, names_secret, printable, redacted, size_text
from tundish.cli import main
from tundish.doctor.finding import Finding
from tundish.errors import SpecError, StageError

SECRET = "Gehe1mnis"
LEAKS = [
    "postgresql://lab:Gehe1mnis@db:5432/x",
    "postgresql+psycopg2://lab:Gehe1mnis@db/x is away",
    "mysql://lab:a/Gehe1mnis@db/x",
    "mysql://lab:a@Gehe1mnis/b@db/x",
    "redis://:Gehe1mnis@db",
    "https://Gehe1mnis@server:5000/path",
    "http://lab:Gehe1mnis@server",
    "uc:https://Gehe1mnis@host",
    "git+https://Gehe1mnis@host/lab/code",
    "s3://AKIDEXAMPLE:Gehe1mnis@bucket/x",
    "https://acc.blob.core.windows.net/c/x?sv=2022&sig=Gehe1mnis&se=2027",
    "https://host/x?token=Gehe1mnis",
    "https://host/x?key=Gehe1mnis",
    "https://host/x?a=1&access_token=Gehe1mnis#part",
    "https://bucket.s3.amazonaws.com/x?X-Amz-Signature=Gehe1mnis&X-Amz-Expires=60",
    "https://bucket.s3.amazonaws.com/x?X-Amz-Security-Token=Gehe1mnis",
    "postgresql://db/x?user=lab&password=Gehe1mnis&sslmode=require",
    "postgresql://db/x?sslpassword=Gehe1mnis",
    "mssql+pyodbc:///?odbc_connect=Driver%3DODBC%3BUID%3Dsa%3BPWD%3DGehe1mnis%3B",
    "Server=db;UID=sa;PWD=Gehe1mnis;",
    "Server=db;Pwd={a;Gehe1mnis};Database=x",
    "DefaultEndpointsProtocol=https;AccountName=a;AccountKey=Gehe1mnis==;EndpointSuffix=x",
    "WANDB_KEY=Gehe1mnis",
    "DB_PASSWD=Gehe1mnis HOME=/home/lab",
    "MYSQL_PWD=Gehe1mnis",
    "HF_TOKEN='Gehe1mnis'",
    "connect(host='db', password='two words, Gehe1mnis')",
    "{'api_key': 'Gehe1mnis'}",
    '{"hf_token": "Gehe1mnis"}',
    "password: Gehe1mnis",
    "secret_key=Gehe1mnis",
    "Authorization: Bearer Gehe1mnis",
    "{'Authorization': 'Basic Gehe1mnis=='}",
    "authorization: Gehe1mnis",
    "X-Api-Key: Gehe1mnis",
    "curl: bearer Gehe1mnis.abc",
]
SHAPES = [
    "hf_" + "aB3dE" * 7,
    "AKIAIOSFODNN7EXAMPLE",
    "dapi0123456789abcdef0123456789abcdef",
    "ghp_" + "a1B2" * 9,
    "sk-" + "a1B2" * 9,
    "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0In0.abc-DEF_123",
    "-----BEGIN RSA PRIVATE KEY-----\nMIIEow\nIBAAK\n-----END RSA PRIVATE KEY-----",
]
HARMLESS = [
    "train.jsonl, line 17: the last message is from 'user'; a chat must end with 'assistant'.",
    "[token=1,000/5,000][ETA=5min] Train loss: 2.3",
    "[epoch=1/3][batch=4/12][ETA=45s]",
    "MLFLOW_TRACKING_URI: holds a password. Set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or a token.",
    "Set HF_TOKEN to a token of that account.",
    "found key=value; give options as key=value",
    "KeyError: 'messages'",
    "pad_token='<pad>', eos_token_id=2, max_new_tokens=64",
    "{'pad_token': '<pad>', 'bos_token_id': 1}",
    "the tokenizer has no token: <|im_end|>",
    "sqlite:////home/lab/.tundish/mlflow/mlflow.db",
    "postgresql://lab@db:5432/mlflow?sslmode=require",
    "http://server:5000/#/experiments/1",
    "s3://bucket/lab@home/train.jsonl",
    "abfss://container@account.dfs.core.windows.net/x",
    "hf://datasets/lab/chats@main/train.jsonl",
    "databricks://profile and databricks-uc",
    "PWD=/home/lab",
    "File '/x.py', line 3: sorted(rows, key=len)",
    "Basic authentication is asked for; bearer tokens are not.",
    "/Users/me@lab.org/run",
]


@pytest.mark.parametrize("text", LEAKS)
def test_secrets_are_masked(text: str) -> None:
    """A report that is pasted into a ticket would carry it."""
    masked = redacted(text, {})
    assert SECRET not in masked and MASK in masked
    assert redacted(masked, {}) == masked
    assert redacted(f"({text})", {}).count(SECRET) == 0 and SECRET not in redacted(f"ValueError: {text}\nat x", {})


@pytest.mark.parametrize("text", SHAPES)
def test_tokens_are_known_by_their_beginning(text: str) -> None:
    """They stand alone in many libraries' messages."""
    assert redacted(f"found {text}, which is wrong", {}) == "found ***, which is wrong"


@pytest.mark.parametrize("text", HARMLESS)
def test_other_text_stays(text: str) -> None:
    """A message that masks what it is about helps nobody."""
    assert redacted(text, {}) == text


def test_what_stands_around_a_secret_stays() -> None:
    """The reader must still see which address is meant."""
    assert redacted("postgresql://lab:a/b@c@db:5432/x is away", {}) == "postgresql://***@db:5432/x is away"
    assert redacted("mysql://h/db?user=me&password=x&ssl=1", {}) == "mysql://h/db?user=me&password=***&ssl=1"
    assert redacted("Server=db;PWD={a;b};Database=x", {}) == "Server=db;PWD=***;Database=x"
    assert redacted("connect(password='a b', port=3)", {}) == "connect(password='***', port=3)"


@pytest.mark.parametrize(
    "name",
    ["WANDB_KEY", "DB_PASSWD", "MYSQL_PWD", "PGPASSWORD", "SSHPASS", "HF_TOKEN", "GITHUB_PAT", "AWS_SECRET_ACCESS_KEY",
     "AZURE_STORAGE_SAS_TOKEN", "AZURE_STORAGE_CONNECTION_STRING", "GOOGLE_CREDENTIALS", "db_pass", "api-key"],
)  # fmt: skip
def test_values_of_secret_variables_are_masked(name: str) -> None:
    """The library that fails quotes what it was given, in words of its own, or as a part of an address."""
    assert names_secret(name)
    text = redacted("cannot log in with Gehe/m nis or Gehe%2Fm%20nis", {name: "Gehe/m nis"})
    assert text == "cannot log in with *** or ***"


def test_other_variables_are_not_secret(tmp_path: Path) -> None:
    """Every message that names the folder would be masked."""
    for name in (
        "PWD",
        "OLDPWD",
        "TOKENIZERS_PARALLELISM",
        "TOKENIZER",
        "HF_TOKEN_PATH",
        "AWS_SHARED_CREDENTIALS_FILE",
    ):
        assert not names_secret(name)
    assert redacted(f"{tmp_path} is full", {"MY_KEY": str(tmp_path)}) == f"{tmp_path} is full"
    assert redacted("it is true", {"SOME_KEY": "true"}) == "it is true"


def test_words_and_short_values_are_masked_only_where_they_are_quoted() -> None:
    """With `AWS_SECRET_ACCESS_KEY=nothing`, no message said any more what was to be done."""
    environment = {"AWS_SECRET_ACCESS_KEY": "nothing", "API_KEY": "Training", "PGPASSWORD": "abc"}
    text = "Nothing was trained: nothing is left in training_duration, abcdef=abc, [Training]"
    assert redacted(text, environment) == text
    text = "cannot log in with 'nothing', \"abc\" or me:abc@host"
    assert redacted(text, environment) == "cannot log in with '***', \"***\" or me:***@host"


def test_a_variable_s_address_gives_its_password_away() -> None:
    """Its password may hold blanks, where an address in a text would end; or be quoted alone."""
    environment = {"MLFLOW_TRACKING_URI": "http://me:pass word@host"}
    assert redacted("http://me:pass word@host is away: 'pass word'", environment) == "http://***@host is away: '***'"


def test_addresses_with_secrets_are_told_from_others() -> None:
    """They are refused where they would be written into files."""
    assert all(map(holds_secret, LEAKS[:20])) and not any(map(holds_secret, HARMLESS))


def test_nothing_leaves_unmasked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """One door that was forgotten is enough."""
    monkeypatch.setenv("WANDB_KEY", SECRET)
    error = SpecError([f"data: {SECRET}", LEAKS[0]])
    assert error.problems == ("data: ***", "postgresql://***@db:5432/x") and SECRET not in str(error) + error.message
    assert pickle.loads(pickle.dumps(error)).problems == error.problems
    assert SECRET not in str(StageError(f"{SECRET} is wrong", "x.log"))
    events.append(tmp_path / "events.jsonl", "FAILED", f"No login with {SECRET}.", loss=1.5)
    assert SECRET not in (tmp_path / "events.jsonl").read_text()
    assert "***" in events.read(tmp_path / "events.jsonl")[0].message
    assert SECRET not in json.dumps(repr(Finding("MLflow", "problem", LEAKS[1], SECRET).redacted()))
    assert main(["validate", "--train-data-path", f"https://me:{SECRET}@host/x.jsonl", "--model", f"x?token={SECRET}"])
    shown = capsys.readouterr()
    assert SECRET not in shown.out + shown.err and "***" in shown.err


def test_a_terminal_is_not_commanded() -> None:
    """A name in the data could rewrite what the user sees."""
    assert printable("a\x1b[2Jb\x9bc\nd\te\ud800") == "a\\x1b[2Jb\\x9bc\nd\te\\ud800"


@pytest.mark.parametrize("name", ["MLFLOW_TRACKING_URI", "MLFLOW_REGISTRY_URI"])
@pytest.mark.parametrize("address", [leak for leak in LEAKS[:20] if " " not in leak])
def test_a_refusal_does_not_repeat_a_password(
    name: str, address: str, arguments: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would be in the notebook's output, which is shared."""
    monkeypatch.setenv(name, address)
    with pytest.raises(SpecError, match=f"{name}: holds a password") as error:
        fm.create(**arguments)
    assert SECRET not in str(error.value)


@pytest.mark.parametrize(
    ("size", "said"),
    [(0, "0 bytes"), (999, "999 bytes"), (1_575_552, "1.6 MB"), (141_100_000_000, "141 GB"), (2.5e15, "2,500.0 TB")],
)
def test_sizes_are_said_in_a_unit_that_fits(size: float, said: str) -> None:
    """A small model would be exported as `0.0 GB`."""
    assert size_text(size) == said
