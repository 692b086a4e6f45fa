"""S3, Google Cloud, Azure and web servers, by obstore."""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import timedelta
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

from tundish.base.objects.contract import StoredObject, client_of
from tundish.base.objects.errors import explained
from tundish.base.objects.settings import StoreSettings, store_settings
from tundish.errors import StoreError

T = TypeVar("T")
PART_BYTES = 16 << 20
"""Read at a time: a download holds THREADS of them in memory."""
THREADS = 4
SMALLEST_PART = 8 << 20
MOST_PARTS = 5000
"""Of an upload; S3 takes 10,000."""
RETRIES = 5
RETRY_SECONDS = 60
CONNECT_SECONDS = 5
READ_SECONDS = 60
"""Without a byte; a whole request may take as long as it moves."""
REQUEST_SECONDS = 3600
_process: int | None = None
"""The process that has used obstore."""


def open_cloud(root: str) -> "CloudFolder":
    """The objects below an address of S3, Google Cloud, Azure or a web server.

    Raises:
        StoreError: a variable that is needed is missing or wrong.
    """
    with explained(root):
        return CloudFolder(root, _web_client(root)) if client_of(root) == "web" else _cloud_folder(root, _environment())


@lru_cache(maxsize=64)
def _cloud_folder(root: str, environment: object) -> "CloudFolder":
    """Kept, since looking for credentials may take seconds; anew when the environment names others."""
    del environment
    settings = store_settings(root)
    return CloudFolder(root, _cloud_client(settings), settings.prefix, settings.is_anonymous)


def _environment() -> tuple[tuple[str, str], ...]:
    names = ("AWS_", "S3_", "AZURE_", "GCS_", "GOOGLE_", "MLFLOW_S3_", "MOSAICML_STREAMING_")
    return (("pid", str(os.getpid())), *sorted(item for item in os.environ.items() if item[0].startswith(names)))


def _limits(*, plain: bool) -> dict[str, Any]:
    options: dict[str, Any] = {
        "allow_http": plain,
        "connect_timeout": timedelta(seconds=CONNECT_SECONDS),
        "read_timeout": timedelta(seconds=READ_SECONDS),
        "timeout": timedelta(seconds=REQUEST_SECONDS),
    }
    names = ("AWS_CA_BUNDLE", "REQUESTS_CA_BUNDLE", "SSL_CERT_FILE")
    if bundle := next(filter(None, map(os.environ.get, names)), None):
        options["root_certificate"] = Path(bundle).read_bytes()
    retries = {"max_retries": RETRIES, "retry_timeout": timedelta(seconds=RETRY_SECONDS)}
    return {"client_options": options, "retry_config": retries}


def _cloud_client(settings: StoreSettings) -> Any:
    from obstore.store import AzureStore, GCSStore, S3Store

    kinds: dict[str, Any] = {"s3": S3Store, "gs": GCSStore, "azure": AzureStore}
    endpoint = settings.options.get("aws_endpoint") or settings.options.get("azure_endpoint") or ""
    return kinds[settings.kind](
        settings.bucket,
        config=dict(settings.options),
        credential_provider=settings.login,
        **_limits(plain=endpoint.startswith("http:")),
    )


def _web_client(root: str) -> Any:
    from obstore.store import HTTPStore

    return HTTPStore.from_url(root, **_limits(plain=root.startswith("http:")))


@dataclass(frozen=True)
class CloudFolder:
    """The objects below a prefix of a bucket, by obstore."""

    root: str
    client: Any
    """obstore's, of the whole bucket."""
    prefix: str = ""
    is_anonymous: bool = False

    def list(self, prefix: str = "") -> list[StoredObject]:
        """See ObjectStore."""
        begin = f"{self._path(prefix)}/".lstrip("/")
        if client_of(self.root) == "web":
            raise StoreError(
                f"{self.root}: is not in an MLflow server's artifacts, and other web servers cannot list files",
                "Copy the address from get_checkpoints(), or give that of one file.",
            )

        def pages() -> list[StoredObject]:
            return [
                StoredObject(str(entry["path"])[len(self._path("")) :].lstrip("/"), entry["size"], entry["e_tag"])
                for page in self.client.list(begin or None)
                for entry in page
                if str(entry["path"]).startswith(begin)  # not the empty object that marks a folder
            ]

        return sorted(self._try(prefix, pages), key=lambda entry: entry.key)

    def find(self, key: str) -> StoredObject | None:
        """See ObjectStore."""
        try:
            entry = self._try(key, lambda: self.client.head(self._path(key)))
        except StoreError as error:
            if not isinstance(error.__cause__, FileNotFoundError):
                raise
            if client_of(self.root) != "web":
                self.list(key)  # answers to HEAD have no text; only a listing reports that the bucket is missing
            return None
        return StoredObject(key, entry["size"], entry["e_tag"])

    def read(self, key: str, start: int = 0, length: int | None = None) -> bytes:
        """See ObjectStore."""
        options = None if not start and length is None else {"range": {"offset": start}}
        if length is not None:
            options = {"range": (start, start + length)}
        return self._try(key, lambda: bytes(self.client.get(self._path(key), options=options).bytes()))

    def download(self, key: str, path: Path) -> None:
        """See ObjectStore."""
        self._try(key, lambda: self._download(self._path(key), path))

    def _download(self, key: str, path: Path) -> None:
        if client_of(self.root) == "web":  # not every server supports ranges, or reports a size
            with open(path, "wb") as file:
                for block in self.client.get(key).stream(PART_BYTES):
                    file.write(block)
            return
        entry = self.client.head(key)
        size, same = entry["size"], {"if_match": entry["e_tag"]} if entry["e_tag"] else {}
        with open(path, "wb") as file, ThreadPoolExecutor(THREADS) as pool:

            def part(start: int) -> None:
                options = {"range": (start, min(start + PART_BYTES, size)), **same}
                data, done = memoryview(self.client.get(key, options=options).bytes()), 0
                while done < len(data):
                    done += os.pwrite(file.fileno(), data[done:], start + done)

            for _ in pool.map(part, range(0, size, PART_BYTES)):
                pass

    def upload(self, path: Path, key: str) -> None:
        """See ObjectStore."""
        part = max(SMALLEST_PART, -(-path.stat().st_size // MOST_PARTS))
        self._try(key, lambda: self.client.put(self._path(key), path, chunk_size=part, max_concurrency=THREADS))

    def delete(self, key: str) -> None:
        """See ObjectStore."""
        try:
            self._try(key, lambda: self.client.delete(self._path(key)))
        except StoreError as error:
            if not isinstance(error.__cause__, FileNotFoundError):
                raise

    def _path(self, key: str) -> str:
        return "/".join(part for part in (self.prefix, key) if part)

    def _try(self, key: str, action: Callable[[], T]) -> T:
        global _process
        # obstore's threads do not exist in a forked process, where every call would wait for them.
        if _process is not None and _process != os.getpid():
            raise RuntimeError(f"{self.root}: used in a process that was forked from one that has used a store.")
        _process = os.getpid()
        with explained(f"{self.root}/{key}".rstrip("/"), anonymous=self.is_anonymous):
            return action()
