"""A split of a Hugging Face dataset, from the hub, its local cache or a local folder."""

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from tundish.base.files import content_root
from tundish.base.workers import limited, took_memory
from tundish.data.findings import Location
from tundish.data.rows import BATCH_ROWS, TableRows, bounded, sample_columns
from tundish.data.samples import Rules
from tundish.data.source import Chunk, Source
from tundish.errors import DataError, SpecError
from tundish.plan.address import Address


@dataclass(frozen=True, slots=True)
class DatasetRows:
    """One split of a Hugging Face dataset, from the hub, its local cache or a local folder."""

    name: str
    """As the caller gave it."""
    rules: Rules
    dataset: Any
    """A `datasets.Dataset` with only the columns of a sample."""

    @property
    def place(self) -> Location:
        """See Source."""
        return Location(self.name, "row")

    @property
    def size(self) -> int:
        """See Source; rows."""
        return len(self.dataset)

    def digest(self) -> str:
        """See Source."""
        total = hashlib.sha256()
        for chunk in self.chunks():
            total.update(cast(TableRows, chunk).data)
        return total.hexdigest()

    def state(self) -> object:
        """See Source; what is loaded never changes."""
        return self.name

    def chunks(self) -> Iterator[Chunk]:
        """See Source."""
        batches = self.dataset.with_format("arrow").iter(BATCH_ROWS)
        return bounded(self.place, (batch.combine_chunks() for batch in batches))

    def parts(self, size: int) -> list[Source]:
        """See Source; Spark reads files and Delta tables."""
        raise DataError(
            f"{self.name}: a Spark cluster prepares Delta tables, .parquet, .jsonl and .txt files. Leave out "
            "data_prep_cluster_id: this machine prepares a Hugging Face dataset."
        )


def open_dataset(address: Address, rules: Rules) -> DatasetRows:
    """A Hugging Face dataset named `org/dataset/split`, `dataset/split`, or `folder/split` of this machine.

    Raises:
        SpecError: there is no such dataset or split, it lacks the columns, or it would run code.
    """
    with limited(f"{address.given}: the reader of datasets"):
        dataset = _load_dataset(address)
    columns = sample_columns(dataset.column_names, rules, address.given)
    return DatasetRows(address.given, rules, dataset.select_columns(columns))


def _load_dataset(address: Address) -> Any:
    from datasets import disable_progress_bars, load_dataset, load_dataset_builder, load_from_disk
    from datasets.exceptions import DatasetsError

    given, local = address.given, address.kind == "path"
    path = Path(address.text)
    name, _, split = (str(path.parent), "", path.name) if local else address.text.rpartition("/")
    saved = local and (path / "state.json").is_file()
    if not local and (name.count("/") > 1 or not _is_hub_name(name)):
        subset = "; subsets are not supported" if name.count("/") > 1 else ""
        raise SpecError(
            f"{given}: must be a file, a folder, catalog.schema.table, or a Hugging Face dataset with its split "
            f"(org/dataset/split or dataset/split){subset}."
        )
    disable_progress_bars()
    try:
        if saved:
            files = json.loads((path / "state.json").read_text()).get("_data_files") or ()
            _check_inside(path, (file["filename"] for file in files), given)
            return load_from_disk(str(path))
        if local:
            builder = load_dataset_builder(name, trust_remote_code=False)
            _check_split(builder, given, split)
            _check_inside(
                path.parent, (name for names in (builder.config.data_files or {}).values() for name in names), given
            )
        return load_dataset(name, split=split, trust_remote_code=False)
    except SpecError:
        raise
    except (DatasetsError, ValueError, OSError, LookupError, TypeError) as error:
        beside = "".join(f" There is no file or folder {place} either." for place in address.looked if not local)
        raise SpecError(f"{given}: {_reason(error)}{beside}") from error


def _check_split(builder: Any, given: str, split: str) -> None:
    """Refuse a split that a folder does not have before its files are read."""
    splits = [str(name) for name in builder.config.data_files or ()]
    if splits and split not in splits:
        raise SpecError(f"{given}: there is no such split; the splits are {', '.join(splits)}. Check the path.")


def _check_inside(folder: Path, names: Iterable[str], given: str) -> None:
    """Refuse a dataset whose description names other files of this machine: it would have them trained."""
    root = content_root(folder)
    for name in names:
        if "://" in name or not (folder / name).resolve().is_relative_to(root):
            raise SpecError(f"{given}: the dataset names {name!r}, outside its folder. Put the file inside.")


def _is_hub_name(name: str) -> bool:
    from datasets import packaged_modules

    # Names of readers, `pandas` among them, which unpickles what lies in the working directory.
    readers = packaged_modules._PACKAGED_DATASETS_MODULES  # pyright: ignore[reportPrivateUsage]  no public list of them
    return name not in readers


def _reason(error: Exception) -> str:
    if isinstance(error.__cause__, MemoryError):
        return f"its reader {took_memory()}. Shorten its texts, or save it as JSONL."
    text = str(error).strip() or repr(error)
    if error.__cause__ is not None:
        text = f"{' '.join(text.split())} {error.__cause__}"
    if "onfig name is missing" in text:
        return "the dataset has subsets, which are not supported. Save the one that you want as JSONL."
    if "trust_remote_code" in text or "loading script" in text:
        return (
            "the dataset needs a loading script, and its code is never run. Save it as JSONL on a machine that you "
            "trust."
        )
    return f"cannot be loaded as a Hugging Face dataset ({text.splitlines()[0][:300]}). Check name, split and network."
