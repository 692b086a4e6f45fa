"""Which kind of source is at an address: the one place that decides it.

Opening a source finds out what it is and refuses what cannot be read; no sample is read by it.
"""

import difflib
from itertools import islice
from pathlib import Path

from tundish.data.lines import Lines
from tundish.data.samples import Rules
from tundish.data.source import Source
from tundish.data.texts import TextFolder
from tundish.errors import SpecError
from tundish.plan.address import LINE_SUFFIXES, MOST_FILES, Address, may_be_split
from tundish.plan.spec import TaskType

TEXT_TASK: TaskType = "CONTINUED_PRETRAIN"


def open_source(given: Address | str, task_type: TaskType, *, system_message: bool) -> Source:
    """The source at an address, without reading samples.

    Args:
        given: the address, or its text as a spec has it.
        task_type: what its samples are for.
        system_message: whether a chat may begin with one.

    Raises:
        SpecError: there is nothing at the address, or nothing that the task type takes.
    """
    rules = Rules(task_type, system_message)
    address = given if isinstance(given, Address) else Address.of(given)
    if address.kind == "object":
        return _open_remote(address.text, rules)
    if task_type == TEXT_TASK:
        return _open_folder(address, rules)
    if address.kind == "hub":
        from tundish.data.huggingface import open_dataset

        return open_dataset(address, rules)
    if address.kind == "table":
        return _open_named_table(address, rules)
    return _open_path(address, rules)


def may_be_table(given: Address | str) -> bool:
    """Whether Rust may read the data at an address: a Delta table, or what is in an object store."""
    address = given if isinstance(given, Address) else Address.of(given)
    if address.kind == "path":
        try:
            return (address.path / "_delta_log").is_dir()
        except OSError:
            return False  # too long for a path, or not to be entered: told when it is opened
    return address.kind in ("table", "object")


_KINDS = (
    "a .jsonl file (.gz and .zst too), a Delta table (its folder, or catalog.schema.table), or a Hugging Face dataset "
    "with its split (org/dataset/split)"
)


def _open_path(address: Address, rules: Rules) -> Source:
    path = address.path
    if path.is_file():
        return _open_file(address, rules)
    if (path / "_delta_log").is_dir():
        return _open_table(str(path), address.given, rules)
    if not path.name.endswith(LINE_SUFFIXES) and may_be_split(path):
        from tundish.data.huggingface import open_dataset

        return open_dataset(address, rules)
    missing = f"there is no such file ({address.places})"
    found = "is a folder" if path.is_dir() else "is no regular file" if path.exists() else missing
    near = _lines_in(path, address.given) if path.is_dir() else [] if path.exists() else _near(path)
    advice = f"Did you mean {' or '.join(near)}?" if near else "Check the path."
    raise SpecError(f"{address.given}: {found}; {rules.task_type} takes {_KINDS}. {advice}")


def _lines_in(folder: Path, given: str) -> list[str]:
    """JSONL files that may have been meant by their folder."""
    names = sorted(path.name for path in islice(folder.iterdir(), MOST_FILES) if path.name.endswith(LINE_SUFFIXES))
    return [f"{given.rstrip('/')}/{name}" for name in names[:3]]


def _near(path: Path) -> list[str]:
    """What stands there under a name like that of a path that is not there."""
    try:
        names = [found.name for found in islice(path.parent.iterdir(), MOST_FILES)]
    except OSError:
        return []
    stems = {name.partition(".")[0]: name for name in sorted(names, reverse=True)}
    return [stems[stem] for stem in difflib.get_close_matches(path.name.partition(".")[0], stems, n=3)]


def _open_named_table(address: Address, rules: Rules) -> Source:
    if not (address.path / "_delta_log").is_dir():
        beside = "".join(f", nor is there a file or folder {place}" for place in address.looked)
        raise SpecError(
            f"{address.given}: there is no Delta table of that name ({address.path}){beside}; {rules.task_type} takes "
            f"{_KINDS}. Check the name."
        )
    return _open_table(str(address.path), address.given, rules)


def _open_file(address: Address, rules: Rules) -> Source:
    path = address.path
    if not path.name.endswith(LINE_SUFFIXES):
        found = path.suffix or "nameless"
        raise SpecError(f"{address.given}: found a {found} file; {rules.task_type} takes {_KINDS}.")
    return Lines(path, rules)


def _open_folder(address: Address, rules: Rules) -> Source:
    # What looks like a name is a folder that is not there: text is read from folders only.
    path = Path(address.looked[0]) if address.kind in ("table", "hub") and address.looked else address.path
    if not path.is_dir():
        places = address.places if address.kind == "path" else path
        found = "is a file" if path.exists() else f"there is no such folder ({places})"
        raise SpecError(f"{address.given}: {found}; CONTINUED_PRETRAIN takes a folder of .txt files. Name the folder.")
    source = TextFolder.of(path, rules)
    if not source.names:
        raise SpecError(f"{address.given}: the folder holds no .txt file. Folders inside it are searched too.")
    return source


def _open_table(uri: str, given: str, rules: Rules) -> Source:
    from tundish.data.delta import DeltaRows

    return DeltaRows.open(uri, given, rules)


def _open_remote(given: str, rules: Rules) -> Source:
    from tundish.data.download import fetch_file, fetch_texts

    if rules.task_type == TEXT_TASK:
        return _open_folder(Address("path", str(fetch_texts(given)), given), rules)
    if given.endswith(LINE_SUFFIXES):
        return Lines(fetch_file(given), rules)
    return _open_table(given.rstrip("/"), given, rules)
