"""A bucket of the tests' S3 server (fixtures in conftest.py)."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ENVIRONMENT = {
    "AWS_ACCESS_KEY_ID": "nobody",
    "AWS_SECRET_ACCESS_KEY": "nothing",
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_EC2_METADATA_DISABLED": "true",
}
PAGE = 5
"""Keys in a page of a listing; S3 has a thousand."""


@dataclass(frozen=True)
class Bucket:
    """A bucket of the server, for one test."""

    name: str
    client: Any
    log: Path
    """The server's log, with one line per request."""

    def uri(self, key: str) -> str:
        return f"s3://{self.name}/{key}"

    def put(self, key: str, content: bytes) -> str:
        """Store an object; returns its URI."""
        self.client.put_object(Bucket=self.name, Key=key, Body=content)
        return self.uri(key)

    def downloads(self, key: str) -> int:
        """How often the server has sent an object's content."""
        return len(re.findall(rf"GET /{self.name}/{re.escape(key)} HTTP/1\.1\S* 20\d", self.log.read_text()))
