"""Data of object stores, copied to this machine by Streaming's clients (`s3://`, `gs://`, `oci://`, `azure://` …)."""

import hashlib
import os
import shutil
import urllib.parse
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import TypeVar

from filelock import FileLock

from tundish.errors import SpecError
from tundish.paths import downloads_dir, inside, write_atomic

T = TypeVar("T")
TIMEOUT = 3600.0
"""Seconds that one object may take."""


def fetch_file(uri: str) -> Path:
    """A local copy of one object; an S3 object that has not changed is not read again.

    Raises:
        SpecError: there is no such object, or it may not be read.
    """
    name = PurePosixPath(urllib.parse.urlparse(uri).path).name
    folder = _folder(uri)
    with FileLock(f"{folder}.lock"):
        version = _try(uri, lambda: _version(uri))
        mark, copy = folder / "version", inside(folder, name)
        if version is None or not mark.exists() or mark.read_text() != version:
            mark.unlink(missing_ok=True)
            _try(uri, lambda: _download(uri, copy))
            write_atomic(mark, version or "")
        return copy


def fetch_texts(uri: str) -> Path:
    """A local copy of all .txt objects below a prefix.

    Raises:
        SpecError: there is none, or they may not be read.
    """
    root = uri.rstrip("/") + "/"
    folder = _folder(root) / "texts"
    with FileLock(f"{folder}.lock"):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        prefix = urllib.parse.urlparse(root).path.lstrip("/")
        for key in _try(uri, lambda: _list(root)):
            if key.startswith(prefix) and key.endswith(".txt"):
                name = key.removeprefix(prefix)
                copy = inside(folder, name)
                copy.parent.mkdir(parents=True, exist_ok=True)
                _try(root + name, lambda name=name, copy=copy: _download(root + name, copy))
    return folder


def _folder(uri: str) -> Path:
    folder = downloads_dir() / hashlib.sha256(uri.encode()).hexdigest()[:24]
    folder.mkdir(parents=True, exist_ok=True)
    return folder


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

    partial = copy.with_name(f".{copy.name}.{os.getpid()}.tmp")
    try:
        CloudDownloader.direct_download(uri, str(partial), timeout=TIMEOUT)
        partial.replace(copy)
    finally:
        partial.unlink(missing_ok=True)


def _version(uri: str) -> str | None:
    """What changes when an S3 object does; None for other stores."""
    parsed = urllib.parse.urlparse(uri)
    if parsed.scheme != "s3":
        return None
    import boto3

    client = boto3.client("s3", endpoint_url=os.environ.get("S3_ENDPOINT_URL"))
    found = client.head_object(Bucket=parsed.netloc, Key=parsed.path.lstrip("/"))
    return f"{found['ETag']} {found['ContentLength']}"


def _list(root: str) -> list[str]:
    import tempfile

    from streaming.base.storage.upload import CloudUploader

    # The listing is a method of the uploader, which wants a folder to upload from.
    with tempfile.TemporaryDirectory() as unused:
        return CloudUploader.get((unused, root), keep_local=True, exist_ok=True).list_objects() or []
