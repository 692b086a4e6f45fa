"""Where an object store is and how to log in there, from its address and the environment.

The variables are those of each store's own tools, and those that Streaming, Composer and MLflow have given them. The
settings have the names of the Rust crate `object_store`, on which both obstore and delta-rs stand.
"""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from functools import lru_cache
from typing import Any, Literal

from tundish.base.objects.contract import scheme_of
from tundish.errors import StoreError

AWS = "https://s3.amazonaws.com"
GOOGLE = "https://storage.googleapis.com"
AZURE_SCOPE = "https://storage.azure.com/.default"
GOOGLE_SCOPE = "https://www.googleapis.com/auth/devstorage.read_write"
RENEW = timedelta(minutes=10)
"""How long a login is used before botocore is asked for a newer one; it renews those that expire."""
REGION_SECONDS = 10.0
Kind = Literal["s3", "gs", "azure"]
_DELTA_LOGIN: Mapping[Kind, Mapping[str, str]] = {
    "s3": {
        "access_key_id": "aws_access_key_id",
        "secret_access_key": "aws_secret_access_key",
        "token": "aws_session_token",
    },
    "gs": {},  # delta-rs reads Google's credentials by itself, and takes no token
    "azure": {"token": "azure_storage_token"},
}


@dataclass(frozen=True, kw_only=True, slots=True)
class StoreSettings:
    """What a client of an object store needs."""

    kind: Kind
    bucket: str
    """Or container."""
    prefix: str
    """Of all keys; without "/" at its ends."""
    options: Mapping[str, str]
    """By `object_store`'s names."""
    login: Callable[[], dict[str, Any]] | None = field(default=None, compare=False)
    """Returns a login that is valid now; None if the options hold it, or there is none."""
    is_anonymous: bool = False
    """No credentials were found: only what is public can be read."""


def store_settings(address: str) -> StoreSettings:
    """The settings for `s3:`, `r2:`, `gs:` and the schemes of Azure.

    Raises:
        StoreError: the address or a variable that it needs is missing.
    """
    # Not by urllib: it would cut a key at its "#" or "?".
    host, _, path = address.partition("://")[2].partition("/")
    prefix = path.strip("/")
    match scheme_of(address):
        case "s3":
            return _s3(host, prefix)
        case "r2":
            bucket, _, server = host.partition("@")
            return _s3(bucket, prefix, endpoint=f"https://{server}", region="auto")
        case "gs":
            return _google(host, prefix)
        case _:
            return _azure(address, host, prefix)


def _s3(bucket: str, prefix: str, endpoint: str | None = None, region: str | None = None) -> StoreSettings:
    import botocore.session

    session = botocore.session.Session()
    profile = session.get_scoped_config()
    # The variables of Streaming and Composer, of MLflow, and of AWS itself.
    names = ("S3_ENDPOINT_URL", "MLFLOW_S3_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL")
    endpoint = endpoint or _variable(*names) or profile.get("endpoint_url")
    if region is None:
        # AWS answers only in the bucket's own region, and names that region in its answer elsewhere.
        region = session.get_config_variable("region") or "us-east-1"
        region = region if endpoint else bucket_region(bucket) or region
    options = {"aws_region": region}
    if endpoint:
        options["aws_endpoint"] = endpoint.rstrip("/")
    if bucket in os.environ.get("MOSAICML_STREAMING_AWS_REQUESTER_PAYS", "").split(","):
        options["aws_request_payer"] = "true"
    credentials = session.get_credentials()
    if credentials is None:
        options["aws_skip_signature"] = "true"
        return StoreSettings(kind="s3", bucket=bucket, prefix=prefix, options=options, is_anonymous=True)

    def login() -> dict[str, Any]:
        now = credentials.get_frozen_credentials()
        return {
            "access_key_id": now.access_key,
            "secret_access_key": now.secret_key,
            "token": now.token,
            "expires_at": datetime.now(UTC) + RENEW,
        }

    return StoreSettings(kind="s3", bucket=bucket, prefix=prefix, options=options, login=login)


def _variable(*names: str) -> str | None:
    """The first of these environment variables that is set and not empty."""
    return next(filter(None, map(os.environ.get, names)), None)


@lru_cache
def bucket_region(bucket: str) -> str | None:
    """The AWS region of a bucket, which AWS names even where it denies access; None where AWS cannot be asked."""
    import requests

    try:
        answer = requests.head(f"{AWS}/{bucket}", timeout=REGION_SECONDS, allow_redirects=False)
    except requests.RequestException:
        return None  # the first request of the client says what is wrong
    return answer.headers.get("x-amz-bucket-region")


def _google(bucket: str, prefix: str) -> StoreSettings:
    key, secret = os.environ.get("GCS_KEY"), os.environ.get("GCS_SECRET")
    if key and secret:  # Google's keys for its S3 interface
        options = {
            "aws_endpoint": GOOGLE,
            "aws_region": "auto",
            "aws_access_key_id": key,
            "aws_secret_access_key": secret,
        }
        return StoreSettings(kind="s3", bucket=bucket, prefix=prefix, options=options)
    import google.auth
    import google.auth.exceptions
    import google.auth.transport.requests

    try:
        credentials: Any = google.auth.default(scopes=[GOOGLE_SCOPE])[0]
    except google.auth.exceptions.DefaultCredentialsError:
        options = {"google_skip_signature": "true"}
        return StoreSettings(kind="gs", bucket=bucket, prefix=prefix, options=options, is_anonymous=True)

    def login() -> dict[str, Any]:
        credentials.refresh(google.auth.transport.requests.Request())
        expiry = credentials.expiry
        return {"token": credentials.token, "expires_at": expiry and expiry.replace(tzinfo=UTC)}

    return StoreSettings(kind="gs", bucket=bucket, prefix=prefix, options={}, login=login)


def _azure(address: str, host: str, prefix: str) -> StoreSettings:
    connection = dict[str, str]()
    for part in os.environ.get("AZURE_STORAGE_CONNECTION_STRING", "").split(";"):
        name, _, value = part.partition("=")
        connection[name] = value
    account = _variable("AZURE_ACCOUNT_NAME", "AZURE_STORAGE_ACCOUNT_NAME") or connection.get("AccountName")
    container, at, server = host.partition("@")
    options = dict[str, str]()
    if at:  # abfss://container@account.dfs.core.windows.net/path
        account, _, domain = server.partition(".")
        # Data Lake's files are blobs as well, under the same names.
        options["azure_endpoint"] = f"https://{account}.{domain.replace('dfs.', 'blob.', 1)}"
    elif host == account or ".blob." in host:  # azure://account/container/path, as Streaming's downloader has it
        account = host.partition(".")[0]
        container, _, prefix = prefix.partition("/")
    if not account:
        raise StoreError(
            f"{address}: the storage account is missing",
            "Set AZURE_ACCOUNT_NAME, or write abfss://container@account.dfs.core.windows.net/path.",
        )
    if endpoint := connection.get("BlobEndpoint"):
        options["azure_endpoint"] = endpoint.rstrip("/")
    options["azure_storage_account_name"] = account
    settings = StoreSettings(kind="azure", bucket=container, prefix=prefix, options=options)
    # Streaming's name, ours, MLflow's, and object_store's.
    names = ("AZURE_ACCOUNT_ACCESS_KEY", "AZURE_ACCOUNT_KEY", "AZURE_STORAGE_ACCESS_KEY", "AZURE_STORAGE_ACCOUNT_KEY")
    if key := _variable(*names) or connection.get("AccountKey"):
        options["azure_storage_account_key"] = key
        return settings
    if token := os.environ.get("AZURE_STORAGE_SAS_TOKEN") or connection.get("SharedAccessSignature"):
        options["azure_storage_sas_token"] = token
        return settings
    return _azure_identity(settings)


def _azure_identity(settings: StoreSettings) -> StoreSettings:
    """With what the machine or `az login` gives."""
    from azure.core.exceptions import ClientAuthenticationError
    from azure.identity import DefaultAzureCredential

    credential = DefaultAzureCredential()
    try:
        credential.get_token(AZURE_SCOPE)
    except ClientAuthenticationError:
        return replace(settings, options={**settings.options, "azure_skip_signature": "true"}, is_anonymous=True)

    def login() -> dict[str, Any]:
        token = credential.get_token(AZURE_SCOPE)
        return {"token": token.token, "expires_at": datetime.fromtimestamp(token.expires_on, UTC)}

    return replace(settings, login=login)


def delta_location(address: str) -> tuple[str, dict[str, str]]:
    """Where delta-rs finds a table, and the options that it needs there. A path of this machine is itself.

    Raises:
        StoreError: it reads no tables there, or the address or a variable is incomplete.
    """
    scheme = scheme_of(address)
    if not scheme:
        return address, {}
    if scheme not in ("s3", "r2", "gs", "azure", "abfss", "wasbs", "azure-dl"):
        raise StoreError(
            f"{address}: Delta tables cannot be read from {scheme}://",
            "Copy the table to this machine or to s3://, gs:// or abfss://, or give a .jsonl file.",
        )
    settings = store_settings(address)
    options = dict(settings.options)
    if options.get("aws_endpoint", "").startswith("http:"):
        options["aws_allow_http"] = "true"
    if settings.login is not None:
        names = _DELTA_LOGIN[settings.kind]
        options |= {names[name]: value for name, value in settings.login().items() if name in names and value}
    return f"{'az' if settings.kind == 'azure' else settings.kind}://{settings.bucket}/{settings.prefix}", options
