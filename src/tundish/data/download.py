"""Training data in object stores: copied to this machine, once for each version of it."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

from tundish.base.files import inside, make_folder, new_folder, remove_half_made
from tundish.base.home import downloads_dir
from tundish.base.objects.contract import ObjectStore
from tundish.base.objects.errors import store_errors_as
from tundish.base.objects.opening import open_store
from tundish.errors import FolderExistsError, SpecError


def fetch_file(uri: str) -> Path:
    """The path of a local copy of one object. It is downloaded again only if its version has changed.

    Raises:
        SpecError: it does not exist, or cannot be read.
    """
    root, _, key = uri.rpartition("/")
    with store_errors_as(SpecError):
        store = open_store(root)
        entry = store.find(key)
    if entry is None:
        raise SpecError(f"{uri}: it does not exist. Check the path.")
    return _copy(store, {key: entry.version}) / key


def fetch_folder(uri: str, suffix: str) -> Path:
    """A folder with copies of all objects below a prefix whose names end with `suffix`; empty if there are none.

    It is downloaded again only if an object has changed.

    Raises:
        SpecError: the prefix cannot be read, or an object's name cannot be that of a file.
    """
    versions = versions_below(uri)
    return fetch_objects(uri, {key: version for key, version in versions.items() if key.endswith(suffix)})


def versions_below(uri: str) -> dict[str, str | None]:
    """Keys of all objects below a prefix, each with its version.

    Raises:
        SpecError: the prefix may not be read.
    """
    with store_errors_as(SpecError):
        return {entry.key: entry.version for entry in open_store(uri).list()}


def fetch_objects(uri: str, versions: Mapping[str, str | None]) -> Path:
    """A folder with copies of some of the objects that `versions_below` names.

    Raises:
        SpecError: one of them cannot be read, or its name cannot be that of a file.
    """
    with store_errors_as(SpecError):
        store = open_store(uri)
    return _copy(store, versions)


def _copy(store: ObjectStore, versions: Mapping[str, str | None]) -> Path:
    """A complete folder with these objects; a folder of its own for each set of versions."""
    facts = json.dumps([f"{store.root}/", sorted(versions.items())])
    folder = downloads_dir() / hashlib.sha256(facts.encode()).hexdigest()[:24]
    make_folder(folder.parent)
    remove_half_made(folder.parent)
    # Where the store has no versions, an existing copy may be outdated.
    outdated = None in versions.values()
    try:
        with new_folder(folder, wait=True, replace=outdated) as beside:
            for key in versions:
                try:
                    copy = inside(beside, key)
                    copy.parent.mkdir(parents=True, exist_ok=True)
                    copy.touch(exist_ok=False)
                except (OSError, SpecError) as error:  # a file and a folder of one name, '..', a name that is too long
                    raise SpecError(
                        f"{store.root}/{key}: cannot be the name of a file here ({error}). Rename the object."
                    ) from error
                with store_errors_as(SpecError):
                    store.download(key, copy)
    except FolderExistsError:
        pass  # the same versions were downloaded before, or by another process just now
    return folder
