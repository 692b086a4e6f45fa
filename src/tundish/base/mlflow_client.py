"""Opens MLflow's stores, and turns the errors of their clients into one sentence.

A store is a server, a database or a folder, each behind a different library with its own errors.
"""

import contextlib
import logging
import logging.config
import os
import re
import socket
from collections.abc import Iterator
from errno import EACCES, EISDIR, ENOENT, ENOTDIR
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlparse

from tundish.base.text import redacted
from tundish.errors import StoreError, TundishError

PACKAGES = {
    "psycopg2": "psycopg2-binary",
    "psycopg": "psycopg[binary]",
    "MySQLdb": "mysqlclient",
    "pymysql": "pymysql",
    "pyodbc": "pyodbc",
    "pymssql": "pymssql",
    "boto3": "boto3",
    "google": "google-cloud-storage",
    "azure": "azure-storage-blob azure-identity",
    "databricks": "databricks-sdk",
}
"""What to install for a missing module that a store's address requires."""
DATABASES = {"sqlite": 0, "postgresql": 5432, "mysql": 3306, "mssql": 1433}
"""SQLAlchemy's schemes that MLflow supports, and the default port of a server; 0: it has none."""
CONNECT_SECONDS = 5.0

_LOGIN = (
    "Set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN, to what the server accepts."
)
_SERVER = "Check MLFLOW_TRACKING_URI, and that the server is running and reachable from here."
_NOT_MLFLOW = "the server there is not an MLflow server"
_STORE_LOGIN = "Set the credentials of the store that keeps the artifacts, where this process and the server find them."
_SENTENCES = (
    # A pattern in the messages of an error and its causes; what is wrong; what to do. The first match counts.
    (r"Name or service not known|NameResolution|Failed to resolve|nodename nor servname|could not translate host",
     "its host name cannot be resolved", _SERVER),
    (r"Connection refused", "connection refused", _SERVER),
    (r"No route to host|Network is unreachable", "no route to its host", _SERVER),
    (r"CERTIFICATE_VERIFY|SSLError|certificate", "its TLS certificate is not trusted",
     "Set MLFLOW_TRACKING_SERVER_CERT_PATH, or MLFLOW_TRACKING_INSECURE_TLS=true."),
    (r"ProxyError", "the proxy does not connect", "Check HTTPS_PROXY and NO_PROXY."),
    (r"[Tt]imed out|TimeoutError", "it timed out", _SERVER),
    (r"Connection aborted|RemoteDisconnected|Connection reset|BrokenPipe|Broken pipe",
     "it closed the connection", _SERVER),
    (r"InvalidURL|InvalidSchema|Failed to parse|Could not parse|invalid literal for int|could not be cast",
     "the address is malformed", "Write `/`, `@`, `:` and `#` in an address's parts as %2F, %40, %3A and %23."),
    (r"error code 401|too many 401|UNAUTHENTICATED", "authentication failed (401)", _LOGIN),
    (r"error code 403|too many 403|PERMISSION_DENIED", "permission denied (403)", _LOGIN),
    (r"error code 507|too many 507|No space left|disk is full|ENOSPC|Disk quota|QuotaExceeded|Insufficient Storage",
     "its disk is full", "Free some space there."),
    (r"ValueError: not enough values to unpack", "an http(s) address must be that of an MLflow server's artifacts",
     "Copy the address from get_checkpoints()."),
    (r"error code 413", "the file is too large for it (413)", "Raise the limit of the proxy in front of the server."),
    (r"not in a valid JSON format|error code (?:30\d|404|405)\b", _NOT_MLFLOW, _SERVER),
    (r"(?:error code |too many )(5\d\d)", r"it returned a server error (\1)", "Check the server's log."),
    (r"Resource\w* exhausted|error code 429|too many 429", "it received too many requests (429)", "Try again later."),
    (r"must be in (?:the )?'?active'? (?:state|lifecycle)|Current state is deleted|deleted state",
     "the experiment or the run has been deleted there",
     "Restore it (`mlflow experiments restore`, `mlflow runs restore`), or name another experiment_path."),
    (r"Run with id=\S+ not found|No Experiment with id", "the run or its experiment no longer exists there",
     "Check that MLFLOW_TRACKING_URI is the store in which the run was created."),
    (r"database is locked", "another process has locked the database",
     "Wait until it is done, or end it; several writers at once require an MLflow server or PostgreSQL."),
    (r"file is not a database|malformed|file is encrypted", "the file is not a SQLite database, or is damaged",
     "Restore it from a copy, or choose another store."),
    (r"unable to open database file|readonly database|read-only", "the file cannot be opened or written",
     "Check that its folder exists, and the permissions of both."),
    (r"Can't locate revision|out-of-date database schema", "it was created by another version of MLflow",
     "Use that version or another store; after a backup, `mlflow db upgrade` updates an older one."),
    (r"password authentication failed|Access denied for user|no password supplied|Login failed",
     "authentication failed", "Set PGPASSWORD or ~/.pgpass for PostgreSQL, an option file for MySQL."),
    (r"database \"[^\"]*\" does not exist|Unknown database", "there is no such database", "Create it first."),
    (r"Reading Databricks credential|default auth: cannot configure|DatabricksConfig",
     "the databricks-sdk package or the workspace's credentials are missing",
     "`pip install databricks-sdk`, and set DATABRICKS_HOST and DATABRICKS_TOKEN, or write ~/.databrickscfg."),
    (r"unsupported URI|Could not find a registered artifact|Unity Catalog (?:backend|tracking)|NoSuchModuleError",
     "MLflow does not support this kind of store",
     "Supported are http(s)://, sqlite:///, postgresql://, mysql://, mssql://, databricks and folders."),
    (r"NoCredentials|Unable to locate credentials|CredentialsError|ProfileNotFound|DefaultCredential",
     "there are no credentials for it", _STORE_LOGIN),
    (r"AccessDenied|Forbidden|InvalidAccessKeyId|SignatureDoesNotMatch|ExpiredToken|AuthorizationFailure",
     "access denied", _STORE_LOGIN),
    (r"NoSuchBucket", "there is no such bucket", "Create it, or choose another."),
    (r"operation: Not Found", "there is no such object or bucket", "Check the address."),
    (r"EndpointConnectionError|Could not connect to the endpoint", "it cannot be reached",
     "Check the network, and S3_ENDPOINT_URL for a store of your own."),
)  # fmt: skip


def open_client(uri: str, registry_uri: str | None = None) -> Any:
    """MLflow's client of a tracking store, once the store has answered a request.

    Args:
        uri: of the tracking store.
        registry_uri: of the model registry; None: the tracking store is also the registry.

    Raises:
        StoreError: the store cannot be used.
    """
    with store_errors(uri):
        with quiet(), impatient():
            from mlflow import MlflowClient

            check_database(uri)
            client: Any = MlflowClient(uri, registry_uri)
            client.search_experiments(max_results=1)
        return client


def check_database(uri: str) -> None:
    """Connect to a store once if it is a database: MLflow itself retries for many minutes.

    Raises:
        Exception: whatever the database's library or the system raises.
    """
    if database_of(uri) is None:
        return
    from sqlalchemy import create_engine
    from sqlalchemy.engine import make_url
    from sqlalchemy.pool import NullPool

    url = make_url(uri)
    if file := file_of(uri):
        check_file(file)
    timeout = {"timeout": CONNECT_SECONDS} if url.get_backend_name() == "sqlite" else {}
    # Loads the driver. A missing one is reported even if the server does not answer either.
    engine = create_engine(url, poolclass=NullPool, connect_args=timeout)
    if url.host:
        socket.create_connection((url.host, url.port or DATABASES[url.get_backend_name()]), CONNECT_SECONDS).close()
    with engine.connect() as connection:
        if url.get_backend_name() == "sqlite":
            connection.exec_driver_sql("SELECT name FROM sqlite_master")


def ask_registry(uri: str, tracking_uri: str, name: str) -> None:
    """Look up a name in a model registry; the name may be new.

    Raises:
        StoreError: the registry cannot be used.
    """
    with store_errors(uri), quiet(), impatient():
        from mlflow import MlflowClient
        from mlflow.exceptions import MlflowException

        check_database(uri)
        try:
            MlflowClient(tracking_uri, uri).search_model_versions(f"name='{name}'", max_results=1)
        except MlflowException as error:
            if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "NOT_FOUND"):
                raise


def artifact_address(artifact_uri: str, tracking_uri: str) -> str:
    """The path or URI of an artifact folder, valid in every process, wherever its MLFLOW_TRACKING_URI points.

    Args:
        artifact_uri: that of a run, as MLflow has it.
        tracking_uri: of the run's store, which serves addresses at `mlflow-artifacts:/…`.
    """
    parsed = urlparse(artifact_uri)
    if parsed.scheme in ("", "file"):
        return unquote(parsed.path)
    if parsed.scheme != "mlflow-artifacts":
        return artifact_uri
    scheme, _, server = tracking_uri.rstrip("/").partition("://")
    return f"{scheme}://{parsed.netloc or server}/api/2.0/mlflow-artifacts/artifacts{parsed.path}"


def database_of(uri: str) -> str | None:
    """The key in DATABASES of a store's address; None: the store is not a database."""
    scheme = uri.partition("://")[0].partition("+")[0] if "://" in uri else ""
    return scheme if scheme in DATABASES else None


def file_of(uri: str) -> Path | None:
    """The file of a SQLite store; None: another kind of store, or one in memory."""
    path = uri.partition("://")[2].partition("?")[0][1:] if database_of(uri) == "sqlite" else ""
    return Path(unquote(path)) if path and path != ":memory:" else None


def check_file(file: Path) -> None:
    """Check that a SQLite file can be opened or created: SQLite reports every reason as `unable to open`.

    Raises:
        OSError: it cannot.
    """
    if not file.parent.exists():
        raise FileNotFoundError(ENOENT, "there is no such folder", str(file.parent))
    if not file.parent.is_dir():
        raise NotADirectoryError(ENOTDIR, "is not a folder", str(file.parent))
    if file.is_dir():
        raise IsADirectoryError(EISDIR, "is a folder", str(file))
    for place in (file.parent, file):
        if place.exists() and not os.access(place, os.W_OK):
            raise PermissionError(EACCES, "permission denied", str(place))


@contextlib.contextmanager
def store_errors(uri: str) -> Iterator[None]:
    """Turn whatever the client of the store at `uri` raises into a StoreError."""
    try:
        yield
    except TundishError:
        raise
    except Exception as error:
        problem, advice = why(error)
        raise StoreError(f"{uri}: {problem}", advice) from error


def why(error: BaseException) -> tuple[str, str]:
    """What is wrong with a store, and what to do about it, from an error of its client."""
    chain = _chain(error)
    for cause in chain:
        if isinstance(cause, ModuleNotFoundError) and cause.name:
            module = cause.name.partition(".")[0]
            return "it needs a package that is not installed", f"`pip install {PACKAGES.get(module, module)}`."
    for cause in chain:
        if isinstance(cause, OSError) and cause.filename and cause.strerror:
            reason = cause.strerror[0].lower() + cause.strerror[1:]
            return f"{cause.filename}: {reason}", "Fix that, or set MLFLOW_TRACKING_URI to another store."
    messages = "\n".join(f"{type(cause).__name__}: {cause}" for cause in chain)
    for pattern, problem, advice in _SENTENCES:
        if match := re.search(pattern, messages):
            return match.expand(problem), advice
    first = " ".join(redacted(str(error)).split())[:300] or type(error).__name__
    return first.rstrip("."), "Check the address, the credentials, and that it can be reached from here."


def _chain(error: BaseException) -> list[BaseException]:
    """An error and its causes, outermost first."""
    chain: list[BaseException] = []
    cause: BaseException | None = error
    while cause is not None and cause not in chain:
        chain.append(cause)
        cause = cause.__cause__ or cause.__context__
    return chain


@contextlib.contextmanager
def impatient(seconds: int = 10, retries: int = 2) -> Iterator[None]:
    """Give up on an unreachable server within half a minute; MLflow retries for 4 to 20 minutes.

    The environment's own settings take precedence.
    """
    limits = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": str(retries), "MLFLOW_HTTP_REQUEST_TIMEOUT": str(seconds)}
    added = {name: limit for name, limit in limits.items() if name not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            os.environ.pop(name, None)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Log nothing below a warning, and leave this process's logging as it is."""
    before, configure = logging.root.manager.disable, logging.config.fileConfig
    # MLflow's first database migration logs each of its forty steps.
    logging.disable(logging.INFO)
    # The migration also configures logging, as a program of its own would, and closes this process's log files.
    logging.config.fileConfig = _configure_nothing
    try:
        yield
    finally:
        logging.config.fileConfig = configure
        logging.disable(before)


def _configure_nothing(*_: object, **__: object) -> None:
    """Replaces `fileConfig`."""
