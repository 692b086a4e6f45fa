"""base/objects/settings.py: what addresses and variables mean. No store is asked, but for a bucket's region."""

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from tundish.base.objects import settings
from tundish.base.objects.settings import bucket_region, delta_location, store_settings
from tundish.errors import StoreError


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """No variable of a store is set, and AWS cannot be reached."""
    import os

    for name in list(os.environ):
        if name.startswith(("AWS_", "S3_", "MLFLOW_S3", "AZURE_", "GCS_", "GOOGLE_")):
            monkeypatch.delenv(name)
    for name in ("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"):
        monkeypatch.setenv(name, "/nowhere")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setattr(settings, "AWS", "http://127.0.0.1:1")
    bucket_region.cache_clear()


@pytest.mark.parametrize(
    "name", ["S3_ENDPOINT_URL", "MLFLOW_S3_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL"]
)
def test_an_endpoint_of_any_tool_is_taken(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """The data would be read from the user's own store, and checkpoints go to AWS."""
    monkeypatch.setenv(name, "http://minio:9000/")
    options = store_settings("s3://b/x").options
    assert (options["aws_endpoint"], options["aws_region"]) == ("http://minio:9000", "us-east-1")


def test_the_first_endpoint_is_streaming_s(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that has both would read from another store than before."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://other")
    monkeypatch.setenv("S3_ENDPOINT_URL", "http://minio:9000")
    assert store_settings("s3://b/x").options["aws_endpoint"] == "http://minio:9000"


def test_a_profile_s_keys_are_used(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """obstore itself does not read ~/.aws: a user who has logged in by a profile would be anonymous."""
    (tmp_path / "credentials").write_text("[lab]\naws_access_key_id = id\naws_secret_access_key = secret\n")
    (tmp_path / "config").write_text("[profile lab]\nregion = eu-west-3\nendpoint_url = http://minio\n")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    monkeypatch.setenv("AWS_PROFILE", "lab")
    found = store_settings("s3://b/deep/er/")
    assert found.login is not None and not found.is_anonymous
    assert (found.login()["access_key_id"], found.login()["secret_access_key"]) == ("id", "secret")
    assert (found.bucket, found.prefix, found.options) == (
        "b",
        "deep/er",
        {"aws_region": "eu-west-3", "aws_endpoint": "http://minio"},
    )
    location, options = delta_location("s3://b/deep/er")
    assert location == "s3://b/deep/er" and options["aws_access_key_id"] == "id" and options["aws_allow_http"] == "true"


def test_without_credentials_public_objects_are_read() -> None:
    """A public bucket could not be read without an account."""
    found = store_settings("s3://b/x")
    assert found.is_anonymous and found.login is None and found.options["aws_skip_signature"] == "true"


@pytest.fixture
def aws(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Denies everything, and names the region of the bucket, as AWS does."""

    class Answer(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.send_response(403)
            self.send_header("x-amz-bucket-region", "eu-central-1" if self.path == "/b" else "us-west-2")
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Answer)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(settings, "AWS", f"http://127.0.0.1:{server.server_port}")
    yield
    server.shutdown()
    server.server_close()


def test_a_bucket_is_asked_for_where_it_is(aws: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """boto3 followed AWS to the bucket's region; obstore fails where AWS_REGION is another, or none."""
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-west-1")
    assert store_settings("s3://b/x").options["aws_region"] == "eu-central-1"


def test_r2_is_s3_at_the_account_s_endpoint() -> None:
    """Cloudflare's addresses name the account behind the bucket."""
    found = store_settings("r2://b@acc.r2.cloudflarestorage.com/x/y")
    assert (found.kind, found.bucket, found.prefix) == ("s3", "b", "x/y")
    assert found.options["aws_endpoint"] == "https://acc.r2.cloudflarestorage.com"


def test_google_s_keys_for_its_s3_interface_are_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """Streaming reads with them; they are no login for Google's own interface."""
    monkeypatch.setenv("GCS_KEY", "id")
    monkeypatch.setenv("GCS_SECRET", "secret")
    found = store_settings("gs://b/x")
    assert (found.kind, found.bucket, found.options["aws_endpoint"]) == ("s3", "b", "https://storage.googleapis.com")


def test_google_s_key_file_is_taken(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The usual login of a machine without a person."""
    import json

    account = {"type": "authorized_user", "client_id": "a", "client_secret": "b", "refresh_token": "c"}
    (tmp_path / "key.json").write_text(json.dumps(account))
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(tmp_path / "key.json"))
    found = store_settings("gs://b/x")
    assert (found.kind, found.bucket, found.prefix) == ("gs", "b", "x") and found.login is not None


@pytest.mark.parametrize(
    ("address", "container", "prefix", "endpoint"),
    [
        ("azure://c/x/y", "c", "x/y", None),
        ("azure-dl://c/x/y", "c", "x/y", None),
        ("azure://acc/c/x/y", "c", "x/y", None),
        ("azure://acc.blob.core.windows.net/c/x/y", "c", "x/y", None),
        ("abfss://c@acc.dfs.core.windows.net/x/y", "c", "x/y", "https://acc.blob.core.windows.net"),
        ("wasbs://c@acc.blob.core.windows.net/x/y", "c", "x/y", "https://acc.blob.core.windows.net"),
        ("abfss://c@acc.dfs.core.chinacloudapi.cn/x/y", "c", "x/y", "https://acc.blob.core.chinacloudapi.cn"),
    ],
)
def test_azure_s_addresses_name_account_container_and_path(
    monkeypatch: pytest.MonkeyPatch, address: str, container: str, prefix: str, endpoint: str | None
) -> None:
    """Each tool writes them in another way; the wrong part would be taken for the container."""
    monkeypatch.setenv("AZURE_ACCOUNT_NAME", "acc")
    monkeypatch.setenv("AZURE_ACCOUNT_ACCESS_KEY", "a2V5")
    found = store_settings(address)
    assert (found.kind, found.bucket, found.prefix) == ("azure", container, prefix)
    assert found.options["azure_storage_account_name"] == "acc" and found.options["azure_storage_account_key"] == "a2V5"
    assert found.options.get("azure_endpoint") == endpoint
    assert delta_location(address)[0] == "az://c/x/y"


def test_azure_s_connection_string_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """MLflow's way to name account and key."""
    text = "DefaultEndpointsProtocol=https;AccountName=acc;AccountKey=a2V5==;EndpointSuffix=core.windows.net"
    monkeypatch.setenv("AZURE_STORAGE_CONNECTION_STRING", text)
    options = store_settings("azure://c/x").options
    assert options == {"azure_storage_account_name": "acc", "azure_storage_account_key": "a2V5=="}


def test_a_missing_account_is_told() -> None:
    """A client would ask the address of no account."""
    with pytest.raises(StoreError, match=r"^azure://c/x: the storage account is missing\. Set AZURE_ACCOUNT_NAME, or"):
        store_settings("azure://c/x")


@pytest.mark.parametrize("address", ["oci://b/t", "https://host/t", "hf://datasets/a/b/t"])
def test_where_no_table_can_be_read_is_told(address: str) -> None:
    """delta-rs says that it knows no such scheme."""
    with pytest.raises(StoreError, match=f"^{address}: Delta tables cannot be read from {address.split(':')[0]}://"):
        delta_location(address)
