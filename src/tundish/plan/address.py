"""What a text is an address of: a path, a Delta table, a name on the hub, an object, an MLflow run's artifact.

Decided once, where a caller's arguments come in, and absolute from then on: a run's stages work in other folders than
its caller. `Address.parse` reads what people write, `Address.of` what `parse` has made of it, as `spec.json` holds it.
"""

import os
import re
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Literal
from urllib.parse import unquote

from tundish.base.files import inside
from tundish.base.home import home, mlflow_artifacts_dir
from tundish.base.objects.contract import SCHEMES, is_uri, scheme_of, unable
from tundish.base.text import holds_secret
from tundish.errors import SpecError

Kind = Literal["path", "table", "hub", "object", "artifact"]
Takes = Literal["data", "model", "checkpoint", "folder", "file"]
"""What an argument is for: training data, a model, a checkpoint, a root of checkpoints, any file of this machine."""

MOST_BYTES = 4095
"""Of a path on Linux; of each name in it, 255."""
_STORES = tuple(SCHEMES)
ADDRESS_SCHEMES: dict[Takes, tuple[str, ...]] = {
    "data": _STORES,
    "model": (),
    # Of http(s), an MLflow server's artifacts: see `_of_uri`.
    "checkpoint": tuple(name for name in _STORES if name != "hf"),
    "folder": tuple(name for name in _STORES if name != "hf"),
    "file": (),
}
"""URIs that each accepts besides `file:` and `dbfs:`."""
LINE_SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst")
FILE_SUFFIXES = (*LINE_SUFFIXES, ".parquet")
"""Of files of samples: a name that ends so is no name of a table."""
ARTIFACTS = "/databricks/mlflow-tracking/"
_TABLE = re.compile(r"[\w-]+\.[\w-]+\.[\w-]+")
_HUB_NAMES: dict[Takes, re.Pattern[str]] = {
    "data": re.compile(r"\w[\w.-]*(/\w[\w.-]*){0,2}/\w+(\[[\w:%+-]*\])?"),
    "model": re.compile(r"\w[\w.-]*(/\w[\w.-]*)?"),
}
MOST_FILES = 10_000
"""Of a local dataset."""
USUAL_SPLITS = ("train", "validation", "test")
"""That `datasets` knows by many names of files."""
_BLANKS = " \t\r\n\v\f\u00a0\u200b\u2060\ufeff"
"""What comes with a copied path."""


class Beside(str):
    """A text from a file: relative paths in it start from that file's folder."""

    folder: Path

    def __new__(cls, text: str, folder: Path) -> "Beside":
        """`text`, as written in a file of `folder`."""
        made = super().__new__(cls, text)
        made.folder = folder
        return made


@dataclass(frozen=True, slots=True)
class Address:
    """What a text stands for."""

    kind: Kind
    text: str
    """An absolute path, a URI, or the name of a table or of the hub: the same for every process, wherever it works."""
    given: str
    """As the caller wrote it, for messages."""
    looked: tuple[str, ...] = ()
    """The other places of this machine at which it was looked for first."""

    @classmethod
    def parse(cls, given: str | Path, takes: Takes, argument: str = "") -> "Address":
        """The address that a caller's text means.

        Relative paths start from the working folder, or from the folder of the file that the text stands in (`Beside`).
        Where the text may be a path or a name, what stands on this machine decides: a path if it is there.

        Args:
            given: the text.
            takes: what it is to be an address of.
            argument: what messages begin with.

        Raises:
            SpecError: it is not an address that the argument accepts, or it leaves its root.
        """
        try:
            return _parsed(given, takes)
        except SpecError as error:
            raise SpecError(f"{argument}: {error.message}" if argument else error.problems) from None

    @classmethod
    def of(cls, text: str) -> "Address":
        """The address whose `text` this is; nothing is looked for."""
        if text.startswith(f"dbfs:{ARTIFACTS}"):
            return cls("artifact", text, text)
        if text.startswith("/"):
            return cls("path", text, text)
        if is_uri(text):
            return cls("object", text, text)
        return cls("table" if _TABLE.fullmatch(text) else "hub", text, text)

    @property
    def path(self) -> Path:
        """Of this machine: the path itself, or the folder of the table of that name."""
        return inside(home() / "tables", *self.text.split(".")) if self.kind == "table" else Path(self.text)

    @property
    def places(self) -> str:
        """Where on this machine it is, or would be, for messages."""
        own = [str(self.path)] if self.kind in ("path", "table") else []
        return " or ".join([*own, *self.looked])


def local_path(given: str | Path, argument: str) -> Path:
    """The absolute path of a file or folder of this machine that an argument names.

    Raises:
        SpecError: it is not the path of one.
    """
    return Address.parse(given, "file", argument).path


def _parsed(given: str | Path, takes: Takes) -> Address:
    text = str(given) if isinstance(given, Path) else given.strip(_BLANKS)
    if not text:
        raise SpecError("must not be empty.")
    if bad := next((c for c in text if ord(c) < 32 or 0x7F <= ord(c) < 0xA0 or 0xD800 <= ord(c) < 0xE000), None):
        raise SpecError(f"{text!r} contains {bad!r}; only printable characters are allowed. Rename it.")
    folder = given.folder if isinstance(given, Beside) else None
    scheme = scheme_of(text)
    if not scheme and (len(os.fsencode(text)) > MOST_BYTES or any(len(os.fsencode(n)) > 255 for n in text.split("/"))):
        raise SpecError(f"'{text[:40]}…' has {len(text):,} characters, which is too long for a path. Check it.")
    if scheme and not isinstance(given, Path):
        if holds_secret(text):
            raise SpecError(
                f"{text!r} contains a password or token, which would be written into the run's files. Remove it, "
                "and set the store's own variables, such as AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY."
            )
        address = _of_uri(text, scheme, takes)
    elif takes in ("file", "checkpoint", "folder") or isinstance(given, Path) or text.startswith(("/", ".", "~")):
        address = _of_path(text, text, takes, folder)
    else:
        address = _path_or_name(text, takes, folder)
    # LLM Foundry resolves ${…} in its YAML, environment variables included.
    if "${" in address.text and takes != "file":
        absolute = "" if address.text == text else f" ({address.text!r})"
        raise SpecError(f"{text!r}{absolute} must not contain '${{'. Rename it, or work in another folder.")
    return address


def _of_uri(text: str, scheme: str, takes: Takes) -> Address:
    rest = text.partition(":")[2]
    if scheme == "dbfs":
        return _of_path("/" + rest.lstrip("/"), text, takes, None)
    if scheme == "file":
        local = re.fullmatch(r"(?://(?:localhost)?)?(/[^/].*)", rest)
        if local is None:
            raise SpecError(
                f"{text!r}: 'file://' must be followed by an absolute path of this machine, as in file:///data/x."
            )
        return _of_path(unquote(local[1]), text, takes, None)
    if scheme not in ADDRESS_SCHEMES[takes]:
        known = ", ".join(["dbfs:/", "file:///", *(f"{name}://" for name in ADDRESS_SCHEMES[takes])])
        others = "a path or a name" if takes in ("data", "model") else "a path"
        raise SpecError(f"{text!r} must be {others}, or begin with {known}.")
    if takes in ("checkpoint", "folder") and (reason := unable(text, "write")):
        raise SpecError(
            f"{text}: {reason}, unless it is in an MLflow server's artifacts. Copy the address from get_checkpoints(), "
            "or use a path, s3://, gs://, azure://, abfss:// or oci://."
        )
    host = r"//[^/]+(/.*)?" if scheme != "mlflow-artifacts" else r"/.+"
    if not re.fullmatch(host, rest):
        raise SpecError(f"{text!r}: '{scheme}://' must be followed by a bucket or host, then a path.")
    return Address("object", scheme + text[len(scheme) :], text)


def _of_path(text: str, given: str, takes: Takes, folder: Path | None) -> Address:
    """The address of what is a path by its looks."""
    if text.startswith("/Volumes/"):
        below = text.removeprefix("/Volumes/")
        machine, own = inside(Path("/Volumes"), below), inside(home() / "Volumes", below)
        there = machine.exists()
        return Address("path", str(machine if there else own), given, () if there else (str(machine),))
    if text.startswith(ARTIFACTS):
        path = _artifact_path(text, given, looked_for=takes != "checkpoint")
        return Address("artifact", f"dbfs:{text}", given) if path is None else Address("path", str(path), given)
    return Address("path", str(_absolute(text, folder)), given)


def _path_or_name(text: str, takes: Takes, folder: Path | None) -> Address:
    """The address of what may be a path or a name: what stands there decides, as in `datasets` and `transformers`."""
    path = _absolute(text, folder)
    hub = _HUB_NAMES[takes].fullmatch(text)
    if takes == "model":
        return (
            Address("hub", text, text, (str(path),)) if hub and not path.is_dir() else Address("path", str(path), text)
        )
    name: Kind | None = None
    if _TABLE.fullmatch(text) and not text.endswith(FILE_SUFFIXES):
        name = "table"
    elif hub and not path.parent.is_dir():
        name = "hub"
    there = os.path.exists(path)
    return Address("path", str(path), text) if there or name is None else Address(name, text, text, (str(path),))


def _absolute(text: str, folder: Path | None) -> Path:
    try:
        path = (folder or Path()) / Path(text).expanduser()
        # What is above a folder is known once links to that folder are followed.
        above = max((number for number, part in enumerate(path.parts, 1) if part == ".."), default=0)
        return Path(*path.parts[:above]).resolve().joinpath(*path.parts[above:]) if above else path.absolute()
    except (OSError, RuntimeError) as error:  # a user that is not there, a working folder that was removed
        raise SpecError(f"{text}: cannot be made an absolute path ({error}). Give the whole path.") from None


def _artifact_path(text: str, given: str, *, looked_for: bool) -> Path | None:
    """The path below an MLflow run's artifacts in the default store; None where the caller looks for it."""
    parts = text.removeprefix(ARTIFACTS).split("/")
    if len(parts) < (3 if looked_for else 4) or parts[2] != "artifacts":
        raise SpecError(
            f"{given}: 'mlflow-tracking/' must be followed by '<experiment id>/<run id>/artifacts/…'. "
            "Copy the path from get_checkpoints()."
        )
    if ".." in parts:
        raise SpecError(f"{given}: must not contain '..'. Copy the path from get_checkpoints().")
    if not looked_for:
        return None
    folders = [folder for folder in mlflow_artifacts_dir().glob("*/*/artifacts") if folder.parent.name == parts[1]]
    if not folders:
        raise SpecError(f"{given}: this machine has no MLflow run {parts[1]!r}. Copy the path from get_checkpoints().")
    return inside(folders[0], *parts[3:])


def may_be_split(path: Path) -> bool:
    """Whether a path that is not a file may be a local folder of a dataset, with a split's name at its end.

    `datasets` looks at all files below a folder: in a project with its packages, or above home folders, for minutes.
    """
    usual = path.name in USUAL_SPLITS
    if path.is_dir() and (usual or (path / "state.json").is_file()):  # what `save_to_disk` has written has the latter
        return True
    if not path.parent.is_dir() or path.suffix:
        return False
    files = list(islice((name for _, _, names in os.walk(path.parent) for name in names), MOST_FILES + 1))
    # A card may name any split.
    named = any(name == "README.md" or path.name in name for name in files)
    return bool(files) and len(files) <= MOST_FILES and (usual or named)
