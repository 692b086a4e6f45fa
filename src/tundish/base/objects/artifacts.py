"""Artifacts that an MLflow server keeps, and HDFS, by MLflow's clients."""

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tundish.base.mlflow_client import store_errors
from tundish.base.objects.contract import StoredObject


@dataclass(frozen=True, slots=True)
class ArtifactFolder:
    """A folder of artifacts. It has no versions, and reads a range by reading everything."""

    root: str

    @property
    def _client(self) -> Any:
        from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

        return get_artifact_repository(self.root)

    def list(self, prefix: str = "") -> list[StoredObject]:
        """See ObjectStore; one request for each folder."""
        objects, folders = list[StoredObject](), [prefix]
        with store_errors(self.root):
            while folders:
                for entry in self._client.list_artifacts(folders.pop() or None):
                    if entry.is_dir:
                        folders.append(entry.path)
                    else:
                        objects.append(StoredObject(entry.path, entry.file_size, None))
        return sorted(objects, key=lambda entry: entry.key)

    def find(self, key: str) -> StoredObject | None:
        """See ObjectStore."""
        folder = key.rpartition("/")[0]
        with store_errors(self.root):
            entries = self._client.list_artifacts(folder or None)
        sizes = (entry.file_size for entry in entries if entry.path == key and not entry.is_dir)
        return next((StoredObject(key, size, None) for size in sizes), None)

    def read(self, key: str, start: int = 0, length: int | None = None) -> bytes:
        """See ObjectStore."""
        with tempfile.TemporaryDirectory() as scratch:
            copy = Path(scratch) / "object"
            self.download(key, copy)
            with open(copy, "rb") as file:
                file.seek(start)
                return file.read(-1 if length is None else length)

    def download(self, key: str, path: Path) -> None:
        """See ObjectStore."""
        with store_errors(self.root):
            self._client._download_file(key, str(path))

    def upload(self, path: Path, key: str) -> None:
        """See ObjectStore. MLflow gives an artifact the name of its file."""
        folder, _, name = key.rpartition("/")
        with tempfile.TemporaryDirectory() as scratch, store_errors(self.root):
            named = Path(scratch) / name
            named.symlink_to(path.absolute())
            self._client.log_artifact(str(named if path.name != name else path), folder or None)

    def delete(self, key: str) -> None:
        """See ObjectStore."""
        with store_errors(self.root):
            self._client.delete_artifacts(key)
