"""Object stores: what all of them can do, and which addresses lead to one.

Everything outside of this package lists, reads, writes and deletes objects through `ObjectStore` and knows no client
library. `opening.open_store` gives the one that belongs to an address.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

Client = Literal["s3", "gs", "azure", "oci", "hub", "mlflow", "web"]
SCHEMES: Mapping[str, Client] = {
    "s3": "s3",
    "gs": "gs",
    "azure": "azure",
    "abfss": "azure",
    "wasbs": "azure",
    "azure-dl": "azure",
    "oci": "oci",
    "r2": "s3",
    "hf": "hub",
    "hdfs": "mlflow",
    "mlflow-artifacts": "mlflow",
    "http": "web",
    "https": "web",
}
"""Schemes of addresses, and what reads and writes there. Of http(s), an MLflow server's artifacts are 'mlflow'."""
READ_ONLY: frozenset[Client] = frozenset({"hub", "web"})
NO_LISTING: frozenset[Client] = frozenset({"web"})
SERVED_ARTIFACTS = "/api/2.0/mlflow-artifacts/artifacts/"
"""What the web address of every artifact on an MLflow server contains."""
_URI = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):/")


@dataclass(frozen=True, slots=True)
class StoredObject:
    """An object of a store."""

    key: str
    """Below the store's root, parts separated by "/"; may hold any character."""
    size: int | None
    """Bytes; None where the store does not say."""
    version: str | None
    """Differs when the content does (an ETag); None where the store has no such thing, so every read may differ."""


class ObjectStore(Protocol):
    """The objects below one address (`root`).

    Keys are relative to the root. There are no folders: a prefix is a text at which keys begin, always up to a "/".
    All methods block, try again for about a minute after failures of the network or the server (5xx), and then raise
    StoreError, whose sentence names the address, what is wrong and what to do.

    What a backend may lack: hf:// and http(s):// are read-only; http(s):// cannot list; hdfs:// and MLflow servers
    have no versions, and read a range by reading everything. `unable` says so before a run depends on it.

    What a crash may lose: an object appears whole or not at all, in every backend but hdfs:// and MLflow servers,
    where a killed upload may leave a part under its name. The parts of a killed upload to S3 stay invisible and are
    billed until the bucket's lifecycle rule removes them. Two objects are never written as one: a caller that needs
    several to appear together writes the one that makes them count last.
    """

    @property
    def root(self) -> str:
        """The address, without a "/" at its end."""
        ...

    def list(self, prefix: str = "") -> list[StoredObject]:
        """All objects whose keys begin with `prefix` and a "/", in the order of their keys; none is an empty list."""
        ...

    def find(self, key: str) -> StoredObject | None:
        """One object without its content; None if it does not exist. A missing bucket is an error."""
        ...

    def read(self, key: str, start: int = 0, length: int | None = None) -> bytes:
        """Content of an object from byte `start` on, at most `length` bytes; meant for what fits into memory."""
        ...

    def download(self, key: str, path: Path) -> None:
        """Write an object to a file, in parts and several at once; the file is complete when this returns.

        An object that is replaced meanwhile is an error where the store has versions.
        """
        ...

    def upload(self, path: Path, key: str) -> None:
        """Write a file to an object, replacing it; in parts and several at once where it is large."""
        ...

    def delete(self, key: str) -> None:
        """Remove one object, and no other whose key begins with its key; a missing one is not an error."""
        ...


def is_uri(address: str) -> bool:
    """Whether an absolute address is a URI, not a path of this machine."""
    return _URI.match(address) is not None


def scheme_of(address: str) -> str:
    """The scheme of a URI in lower case; empty for a path or a name."""
    match = _URI.match(address)
    return match[1].lower() if match else ""


def client_of(address: str) -> Client:
    """What reads and writes at a URI. MLflow's artifact roots may have other schemes (dbfs, sftp, those of plugins)."""
    return "mlflow" if SERVED_ARTIFACTS in address else SCHEMES.get(scheme_of(address), "mlflow")


def unable(address: str, action: Literal["write", "list"]) -> str:
    """Why a store cannot do what it is needed for, as part of a sentence; empty if it can."""
    client = client_of(address)
    if action == "write" and client in READ_ONLY:
        return f"{scheme_of(address)}:// is read-only"
    if action == "list" and client in NO_LISTING:
        return f"{scheme_of(address)}:// cannot list files"
    return ""
