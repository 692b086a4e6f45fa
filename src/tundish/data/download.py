"""Data of object stores, copied to this machine by Streaming's clients (`s3://`, `gs://`, `oci://`, `azure://` …)."""

import hashlib
import json
import os
import shutil
import tempfile
import urllib.parse
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from tundish.base.files import inside, locked, make_folder
from tundish.base.home import downloads_dir
from tundish.errors import SpecError

T = TypeVar("T")
TIMEOUT = 3600.0
"""Seconds that one object may take."""


def fetch_file(uri: str) -> Path:
    """A local copy of one object; an S3 object that has not changed is not read again.

    Raises:
        SpecError: there is no such object, or it may not be read.
    """
    _check_name(uri)
    parent, _, name = uri.rpartition("/")
    return _copy(f"{parent}/", {name: _try(uri, lambda: _version(uri))}) / name


def fetch_texts(uri: str) -> Path:
    """A local copy of all .txt objects below a prefix; S3 objects that have not changed are not read again.

    Raises:
        SpecError: there is none, or they may not be read.
    """
    root = uri.rstrip("/") + "/"
    return _copy(root, _try(uri, lambda: _versions(root)))


def _copy(root: str, versions: dict[str, str | None]) -> Path:
    """A folder with the objects of these names below `root`, complete; another one if one of them has changed."""
    for name in versions:
        _check_name(root + name)
    facts = json.dumps([root, sorted(versions.items())])
    folder = downloads_dir() / hashlib.sha256(facts.encode()).hexdigest()[:24]
    make_folder(folder.parent)
    with locked(folder.with_name(f"{folder.name}.lock")):
        if folder.exists() and None not in versions.values():
            return folder
        beside = folder.with_name(f".{folder.name}.tmp")
        shutil.rmtree(beside, ignore_errors=True)  # of a process that was killed
        beside.mkdir()
        for name in versions:
            copy = _try(root + name, lambda name=name: inside(beside, name))
            _try(root + name, lambda copy=copy: copy.parent.mkdir(parents=True, exist_ok=True))
            _try(root + name, lambda name=name, copy=copy: _download(root + name, copy))
        # Stores other than S3 do not tell versions: what is there may be old.
        shutil.rmtree(folder, ignore_errors=True)
        beside.rename(folder)
        return folder


def _check_name(uri: str) -> None:
    if set("#?") & set(uri):
        raise SpecError(f"{uri}: '#' and '?' are not allowed in names. Rename the object.")


def _try(uri: str, action: Callable[[], T]) -> T:
    try:
        return action()
    except Exception as error:  # each store's client has errors of its own
        reason = (str(error).strip() or repr(error)).splitlines()[0]
        raise SpecError(
            f"{uri}: cannot be read ({reason}). Check the path, the credentials, and S3_ENDPOINT_URL for a store of "
            "your own."
        ) from error


def _download(uri: str, copy: Path) -> None:
    from streaming.base.storage.download import CloudDownloader

    CloudDownloader.direct_download(uri, str(copy), timeout=TIMEOUT)


def _s3() -> Any:
    import boto3

    return boto3.client("s3", endpoint_url=os.environ.get("S3_ENDPOINT_URL"))


def _version(uri: str) -> str | None:
    """What changes when an S3 object does; None for other stores."""
    parsed = urllib.parse.urlparse(uri)
    if parsed.scheme != "s3":
        return None
    return _s3().head_object(Bucket=parsed.netloc, Key=parsed.path.lstrip("/"))["ETag"]


def _versions(root: str) -> dict[str, str | None]:
    """Names of the .txt objects below `root`, each with its version."""
    parsed = urllib.parse.urlparse(root)
    prefix = parsed.path.lstrip("/")
    if parsed.scheme == "s3":
        pages = _s3().get_paginator("list_objects_v2").paginate(Bucket=parsed.netloc, Prefix=prefix)
        found = {entry["Key"]: entry["ETag"] for page in pages for entry in page.get("Contents", ())}
    else:
        found = dict.fromkeys(_list(root))
    return {key.removeprefix(prefix): version for key, version in found.items() if key.endswith(".txt")}


def _list(root: str) -> list[str]:
    from streaming.base.storage.upload import CloudUploader

    # The listing is a method of the uploader, which wants a folder to upload from.
    with tempfile.TemporaryDirectory() as unused:
        return CloudUploader.get((unused, root), keep_local=True, exist_ok=True).list_objects() or []
