"""The store that belongs to an address."""

from tundish.base.mlflow_client import artifact_address, impatient, quiet
from tundish.base.objects.artifacts import ArtifactFolder
from tundish.base.objects.cloud import open_cloud
from tundish.base.objects.contract import ObjectStore, client_of, is_uri
from tundish.base.objects.hub import HubDataset
from tundish.base.objects.oracle import OracleBucket

PROBE = "tundish"
"""Name that is looked for to see whether a store answers."""


def open_store(address: str) -> ObjectStore:
    """The store with the objects below an address. Nothing is asked of it yet.

    Raises:
        StoreError: a variable that it needs is missing.
    """
    root = address.rstrip("/")
    match client_of(root):
        case "s3" | "gs" | "azure" | "web":
            return open_cloud(root)
        case "mlflow":
            return ArtifactFolder(root)
        case "oci":
            return OracleBucket(root)
        case "hub":
            return HubDataset(root)


def check_artifacts(address: str, tracking_uri: str) -> None:
    """Check that the store of an artifact folder answers; a folder of this machine is made when it is needed.

    Raises:
        StoreError: it cannot be used.
    """
    address = artifact_address(address, tracking_uri)
    if is_uri(address):
        with quiet(), impatient():
            store = open_store(address)
            # Not a list of all: an experiment may have millions of artifacts, and MLflow takes a request for each
            # folder. MLflow may refuse to list a folder that does not exist; of other stores, only the answer to a
            # listing says what is wrong.
            _ = store.find(PROBE) if client_of(address) == "mlflow" else store.list(PROBE)
