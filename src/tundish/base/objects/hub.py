"""Datasets of the Hugging Face hub."""

import shutil
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, cast

from tundish.base.objects.contract import StoredObject
from tundish.base.objects.errors import explained
from tundish.errors import StoreError

BLOCK_BYTES = 16 << 20


@dataclass(frozen=True)
class HubDataset:
    """Files of a dataset on the Hugging Face hub: `hf://datasets/<owner>/<name>/<path>`. Read-only."""

    root: str

    @cached_property
    def _files(self) -> Any:
        from huggingface_hub import HfFileSystem

        return HfFileSystem()

    def list(self, prefix: str = "") -> list[StoredObject]:
        """See ObjectStore."""
        with explained(self.root):
            entries = cast(dict[str, Any], self._files.find(self._path(prefix), detail=True))
        begin = len(self._path("")) + 1
        return [StoredObject(path[begin:], entry["size"], entry.get("blob_id")) for path, entry in entries.items()]

    def find(self, key: str) -> StoredObject | None:
        """See ObjectStore."""
        with explained(f"{self.root}/{key}"):
            try:
                entry = self._files.info(self._path(key))
            except FileNotFoundError:
                return None
        return StoredObject(key, entry["size"], entry.get("blob_id"))

    def read(self, key: str, start: int = 0, length: int | None = None) -> bytes:
        """See ObjectStore."""
        with explained(f"{self.root}/{key}"), self._files.open(self._path(key), "rb") as file:
            file.seek(start)
            return file.read(-1 if length is None else length)

    def download(self, key: str, path: Path) -> None:
        """See ObjectStore."""
        with explained(f"{self.root}/{key}"), self._files.open(self._path(key), "rb") as file, open(path, "wb") as copy:
            shutil.copyfileobj(file, copy, BLOCK_BYTES)

    def upload(self, path: Path, key: str) -> None:
        """See ObjectStore."""
        raise StoreError(f"{self.root}/{key}: hf:// is read-only", "Use another store.")

    def delete(self, key: str) -> None:
        """See ObjectStore."""
        raise StoreError(f"{self.root}/{key}: hf:// is read-only", "Use another store.")

    def _path(self, key: str) -> str:
        return "/".join(part for part in (self.root.partition("://")[2], key) if part)
