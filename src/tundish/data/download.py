"""Training data of object stores, copied to this machine once for each version of it."""

import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from tundish.base.files import inside, locked, make_folder
from tundish.base.home import downloads_dir
from tundish.base.objects.contract import ObjectStore
from tundish.base.objects.opening import open_store
from tundish.errors import SpecError, StoreError


def fetch_file(uri: str) -> Path:
    """A local copy of one object. An object whose version has not changed is not downloaded again.

    Raises:
        SpecError: it does not exist, or may not be read.
    """
    root, _, key = uri.rpartition("/")
    with _data_errors():
        store = open_store(root)
        entry = store.find(key)
    if entry is None:
        raise SpecError(f"{uri}: it does not exist. Check the path.")
    return _copy(store, {key: entry.version}) / key


def fetch_folder(uri: str, suffix: str) -> Path:
    """A folder with copies of all objects below a prefix whose names end with `suffix`.

    It is not downloaded again unless an object changed.

    Raises:
        SpecError: the prefix may not be read. Without any object, the folder is empty.
    """
    with _data_errors():
        store = open_store(uri)
        versions = {entry.key: entry.version for entry in store.list() if entry.key.endswith(suffix)}
    return _copy(store, versions)


def _copy(store: ObjectStore, versions: Mapping[str, str | None]) -> Path:
    """A complete folder with these objects; a folder of its own for each set of versions."""
    facts = json.dumps([f"{store.root}/", sorted(versions.items())])
    folder = downloads_dir() / hashlib.sha256(facts.encode()).hexdigest()[:24]
    make_folder(folder.parent)
    with locked(folder.with_name(f"{folder.name}.lock")):
        if folder.exists() and None not in versions.values():
            return folder
        beside = folder.with_name(f".{folder.name}.tmp")
        shutil.rmtree(beside, ignore_errors=True)  # of a process that was killed
        beside.mkdir()
        for key in versions:
            try:
                copy = inside(beside, key)
                copy.parent.mkdir(parents=True, exist_ok=True)
                copy.touch(exist_ok=False)
            except (OSError, SpecError) as error:  # a file and a folder of one name, '..', a name that is too long
                raise SpecError(
                    f"{store.root}/{key}: cannot be the name of a file here ({error}). Rename the object."
                ) from error
            with _data_errors():
                store.download(key, copy)
        # Where the store has no versions, a folder that is there may be old.
        shutil.rmtree(folder, ignore_errors=True)
        beside.rename(folder)
        return folder


@contextmanager
def _data_errors() -> Iterator[None]:
    try:
        yield
    except StoreError as error:
        raise SpecError(error.message) from error
