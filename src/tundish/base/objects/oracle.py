"""Oracle's object storage, by its own client.

obstore has none, and Oracle's S3 interface needs keys of another kind than those of `~/.oci/config`.
"""

import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from tundish.base.objects.contract import StoredObject
from tundish.base.objects.errors import explained

BLOCK_BYTES = 16 << 20
RETRY_SECONDS = 60


@dataclass(frozen=True)
class OracleBucket:
    """The objects below `oci://<bucket>/<prefix>` or `oci://<bucket>@<namespace>/<prefix>`.

    Credentials are those of `~/.oci/config`, or of the file and profile that OCI_CONFIG_FILE and OCI_CONFIG_PROFILE
    name.
    """

    root: str

    @cached_property
    def _client(self) -> Any:
        import oci

        file, profile = oci.config.DEFAULT_LOCATION, os.environ.get("OCI_CONFIG_PROFILE", oci.config.DEFAULT_PROFILE)
        config = oci.config.from_file(os.environ.get("OCI_CONFIG_FILE", file), profile)
        # Oracle's default strategy tries for ten minutes.
        retry = oci.retry.RetryStrategyBuilder(max_attempts=5, total_elapsed_time_seconds=RETRY_SECONDS)
        return oci.object_storage.ObjectStorageClient(config, retry_strategy=retry.get_retry_strategy())

    @cached_property
    def _place(self) -> tuple[str, str]:
        """Namespace and bucket."""
        bucket, _, namespace = self.root.partition("://")[2].partition("/")[0].partition("@")
        return namespace or self._client.get_namespace().data, bucket

    def _path(self, key: str) -> str:
        prefix = self.root.partition("://")[2].partition("/")[2]
        return "/".join(part for part in (prefix, key) if part)

    def list(self, prefix: str = "") -> list[StoredObject]:
        """See ObjectStore."""
        import oci

        begin = f"{self._path(prefix)}/".lstrip("/")
        with explained(self.root):
            answer = oci.pagination.list_call_get_all_results(
                self._client.list_objects, *self._place, prefix=begin, fields="name,size,etag"
            )
        cut = len(self._path("")) + 1 if self._path("") else 0
        entries = [entry for entry in answer.data.objects if not entry.name.endswith("/")]
        return [StoredObject(entry.name[cut:], entry.size, entry.etag) for entry in entries]

    def find(self, key: str) -> StoredObject | None:
        """See ObjectStore."""
        from oci.exceptions import ServiceError

        with explained(f"{self.root}/{key}"):
            try:
                headers = self._client.head_object(*self._place, self._path(key)).headers
            except ServiceError as error:
                if error.status != 404:
                    raise
                self._client.get_bucket(*self._place)  # a missing bucket is an error of its own
                return None
        return StoredObject(key, int(headers["content-length"]), headers.get("etag"))

    def read(self, key: str, start: int = 0, length: int | None = None) -> bytes:
        """See ObjectStore."""
        end = "" if length is None else start + length - 1
        with explained(f"{self.root}/{key}"):
            return self._client.get_object(*self._place, self._path(key), range=f"bytes={start}-{end}").data.content

    def download(self, key: str, path: Path) -> None:
        """See ObjectStore; one stream."""
        with explained(f"{self.root}/{key}"), open(path, "wb") as file:
            answer = self._client.get_object(*self._place, self._path(key))
            for block in answer.data.raw.stream(BLOCK_BYTES, decode_content=False):
                file.write(block)

    def upload(self, path: Path, key: str) -> None:
        """See ObjectStore."""
        import oci

        with explained(f"{self.root}/{key}"):
            manager = oci.object_storage.UploadManager(self._client)
            manager.upload_file(*self._place, self._path(key), str(path))

    def delete(self, key: str) -> None:
        """See ObjectStore."""
        from oci.exceptions import ServiceError

        with explained(f"{self.root}/{key}"):
            try:
                self._client.delete_object(*self._place, self._path(key))
            except ServiceError as error:
                if error.status != 404:
                    raise
