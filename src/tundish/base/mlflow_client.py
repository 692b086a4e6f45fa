"""Opens MLflow's stores, and turns what their clients raise into a sentence.

A store is a server, a database or a folder; behind each is another library with errors of its own.
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
"""What to install for a module that a store's address asks for."""
DATABASES = {"sqlite": 0, "postgresql": 5432, "mysql": 3306, "mssql": 1433}
"""Schemes of SQLAlchemy that MLflow takes, and the usual port of a server."""
CONNECT_SECONDS = 5.0

_LOGIN = (
    "Set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN, to what the server takes."
)
_RUNS = "Check MLFLOW_TRACKING_URI, and that the server runs and can be reached from here."
_NO_SERVER = "what answers there is no MLflow server"
_STORE_LOGIN = "Set the credentials of the store that keeps the artifacts, where this process and the server find them."
_SENTENCES = (
    # Signs in what an error and its causes say; what is wrong; what to do.
    (r"Name or service not known|NameResolution|Failed to resolve|nodename nor servname|could not translate host",
     "its host name cannot be resolved", _RUNS),
    (r"Connection refused", "connection refused", _RUNS),
    (r"No route to host|Network is unreachable", "no route to its host", _RUNS),
    (r"CERTIFICATE_VERIFY|SSLError|certificate", "its certificate is not accepted",
     "Set MLFLOW_TRACKING_SERVER_CERT_PATH, or MLFLOW_TRACKING_INSECURE_TLS=true."),
    (r"ProxyError", "the proxy that the environment names does not connect", "Check HTTPS_PROXY and NO_PROXY."),
    (r"[Tt]imed out|TimeoutError", "it timed out", _RUNS),
    (r"Connection aborted|RemoteDisconnected|Connection reset|BrokenPipe|Broken pipe",
     "it closed the connection", _RUNS),
    (r"InvalidURL|InvalidSchema|Failed to parse|Could not parse|invalid literal for int|could not be cast",
     "this is no address of a store", "Write `/`, `@`, `:` and `#` in an address's parts as %2F, %40, %3A and %23."),
    (r"error code 401|too many 401|UNAUTHENTICATED", "it requires another login (401)", _LOGIN),
    (r"error code 403|too many 403|PERMISSION_DENIED", "it does not permit this (403)", _LOGIN),
    (r"error code 507|too many 507|No space left|disk is full|ENOSPC|Disk quota|QuotaExceeded|Insufficient Storage",
     "its disk is full", "Free some space there."),
    (r"ValueError: not enough values to unpack", "it is not in an MLflow server's artifacts, as http(s) addresses are",
     "Copy the address from get_checkpoints()."),
    (r"error code 413", "it does not accept so large a file (413)", "Raise the limit of the proxy before the server."),
    (r"not in a valid JSON format|error code (?:30\d|404|405)\b", _NO_SERVER, _RUNS),
    (r"(?:error code |too many )(5\d\d)", r"it returned a server error (\1)", "Check the server's log."),
    (r"Resource\w* exhausted|error code 429|too many 429", "it received too many requests (429)", "Try again later."),
    (r"must be in (?:the )?'?active'? (?:state|lifecycle)|Current state is deleted|deleted state",
     "the experiment or the run has been deleted there",
     "Restore it (`mlflow experiments restore`, `mlflow runs restore`), or name another experiment_path."),
    (r"Run with id=\S+ not found|No Experiment with id", "it does not have the run, or its experiment, any more",
     "Check that MLFLOW_TRACKING_URI is the store in which the run was made."),
    (r"database is locked", "another process has locked the database",
     "Wait until it is done, or end it; several writers at once need an MLflow server or PostgreSQL."),
    (r"file is not a database|malformed|file is encrypted", "the file is no SQLite database, or damaged",
     "Restore it from a copy, or name another store."),
    (r"unable to open database file|readonly database|read-only", "the file cannot be opened or written",
     "Check that its folder is there, and that you may write both."),
    (r"Can't locate revision|out-of-date database schema", "another version of MLflow has made it",
     "Use that version, or another store; `mlflow db upgrade` brings an older one up to date, after a backup."),
    (r"password authentication failed|Access denied for user|no password supplied|Login failed",
     "the login is refused", "Set PGPASSWORD or ~/.pgpass for PostgreSQL, an option file for MySQL."),
    (r"database \"[^\"]*\" does not exist|Unknown database", "there is no such database", "Make it first."),
    (r"Reading Databricks credential|default auth: cannot configure|DatabricksConfig",
     "the databricks-sdk package or the workspace's credentials are missing",
     "`pip install databricks-sdk`, and set DATABRICKS_HOST and DATABRICKS_TOKEN, or write ~/.databrickscfg."),
    (r"unsupported URI|Could not find a registered artifact|Unity Catalog (?:backend|tracking)|NoSuchModuleError",
     "MLflow knows no store of this kind",
     "Known are http(s)://, sqlite:///, postgresql://, mysql://, mssql://, databricks and folders."),
    (r"NoCredentials|Unable to locate credentials|CredentialsError|ProfileNotFound|DefaultCredential",
     "there are no credentials for it", _STORE_LOGIN),
    (r"AccessDenied|Forbidden|InvalidAccessKeyId|SignatureDoesNotMatch|ExpiredToken|AuthorizationFailure",
     "its credentials are refused", _STORE_LOGIN),
    (r"NoSuchBucket", "there is no such bucket", "Make it first, or name another."),
    (r"operation: Not Found", "there is no such object or bucket", "Check the address."),
    (r"EndpointConnectionError|Could not connect to the endpoint", "it cannot be reached",
     "Check the network, and S3_ENDPOINT_URL for a store of your own."),
)  # fmt: skip


def open_client(uri: str, registry_uri: str | None = None) -> Any:
    """MLflow's client of a tracking store that has answered.

    Args:
        uri: of the tracking store.
        registry_uri: of the model registry; None: the tracking store is it.

    Raises:
        StoreError: it cannot be used; why, and what to do.
    """
    with told(uri):
        with quiet(), impatient():
            from mlflow import MlflowClient

            check_database(uri)
            client: Any = MlflowClient(uri, registry_uri)
            client.search_experiments(max_results=1)
        return client


def check_database(uri: str) -> None:
    """Connect once to a store that is a database: MLflow itself tries for many minutes what cannot work.

    Raises:
        Exception: the database library's, or the system's.
    """
    if database_of(uri) is None:
        return
    from sqlalchemy import create_engine
    from sqlalchemy.engine import make_url
    from sqlalchemy.pool import NullPool

    url = make_url(uri)
    if file := file_of(uri):
        check_file(file)
    waits = {"timeout": CONNECT_SECONDS} if url.get_backend_name() == "sqlite" else {}
    engine = create_engine(
        url, poolclass=NullPool, connect_args=waits
    )  # the driver is asked for first: the server may be away, too
    if url.host:
        socket.create_connection((url.host, url.port or DATABASES[url.get_backend_name()]), CONNECT_SECONDS).close()
    with engine.connect() as connection:
        if url.get_backend_name() == "sqlite":
            connection.exec_driver_sql("SELECT name FROM sqlite_master")


def ask_registry(uri: str, tracking_uri: str, name: str) -> None:
    """Ask a model registry for a name, which may be new.

    Raises:
        StoreError: it cannot be used.
    """
    with told(uri), quiet(), impatient():
        from mlflow import MlflowClient
        from mlflow.exceptions import MlflowException

        check_database(uri)
        try:
            MlflowClient(tracking_uri, uri).search_model_versions(f"name='{name}'", max_results=1)
        except MlflowException as error:
            if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "NOT_FOUND"):
                raise


def artifact_address(artifact_uri: str, tracking_uri: str) -> str:
    """The path or URI of an artifact folder, the same for every process, wherever its MLFLOW_TRACKING_URI points.

    Args:
        artifact_uri: as MLflow has it for a run.
        tracking_uri: of the store that has it; serves what is at `mlflow-artifacts:/…`.
    """
    parsed = urlparse(artifact_uri)
    if parsed.scheme in ("", "file"):
        return unquote(parsed.path)
    if parsed.scheme != "mlflow-artifacts":
        return artifact_uri
    scheme, _, server = tracking_uri.rstrip("/").partition("://")
    return f"{scheme}://{parsed.netloc or server}/api/2.0/mlflow-artifacts/artifacts{parsed.path}"


def database_of(uri: str) -> str | None:
    """The kind of database that an address names; None: of none."""
    scheme = uri.partition("://")[0].partition("+")[0] if "://" in uri else ""
    return scheme if scheme in DATABASES else None


def file_of(uri: str) -> Path | None:
    """The file of a SQLite store; None: it is another kind, or in memory."""
    path = uri.partition("://")[2].partition("?")[0][1:] if database_of(uri) == "sqlite" else ""
    return Path(unquote(path)) if path and path != ":memory:" else None


def check_file(file: Path) -> None:
    """Whether a SQLite file is there or can be made; SQLite itself says `unable to open` of all that hinders it.

    Raises:
        OSError: it is not, and cannot.
    """
    if not file.parent.exists():
        raise FileNotFoundError(ENOENT, "there is no such folder", str(file.parent))
    if not file.parent.is_dir():
        raise NotADirectoryError(ENOTDIR, "is no folder", str(file.parent))
    if file.is_dir():
        raise IsADirectoryError(EISDIR, "is a folder", str(file))
    for place in (file.parent, file):
        if place.exists() and not os.access(place, os.W_OK):
            raise PermissionError(EACCES, "you may not write there", str(place))


@contextlib.contextmanager
def told(uri: str) -> Iterator[None]:
    """Whatever the client of the store at `uri` raises, as a StoreError with a sentence."""
    try:
        yield
    except TundishError:
        raise
    except Exception as error:
        found, advice = why(error)
        raise StoreError(f"{uri}: {found}", advice) from error


def why(error: BaseException) -> tuple[str, str]:
    """What is wrong with a store, and what to do, from what its client has raised."""
    chain = _chain(error)
    for one in chain:
        if isinstance(one, ModuleNotFoundError) and one.name:
            module = one.name.partition(".")[0]
            return "it needs a package that is not installed", f"`pip install {PACKAGES.get(module, module)}`."
    for one in chain:
        if isinstance(one, OSError) and one.filename and one.strerror:
            reason = one.strerror[0].lower() + one.strerror[1:]
            return f"{one.filename}: {reason}", "Make it usable, or name another store by MLFLOW_TRACKING_URI."
    said = "\n".join(f"{type(one).__name__}: {one}" for one in chain)
    for sign, wrong, advice in _SENTENCES:
        if match := re.search(sign, said):
            return match.expand(wrong), advice
    first = " ".join(redacted(str(error)).split())[:300] or type(error).__name__
    return first.rstrip("."), "Check the address, the credentials, and that it can be reached from here."


def _chain(error: BaseException) -> list[BaseException]:
    found: list[BaseException] = []
    one: BaseException | None = error
    while one is not None and one not in found:
        found.append(one)
        one = one.__cause__ or one.__context__
    return found


@contextlib.contextmanager
def impatient(seconds: int = 10, retries: int = 2) -> Iterator[None]:
    """A server that is away is told to who waits for it within half a minute; MLflow asks for four, and up to twenty.

    What the environment says of it counts.
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
    """Nothing below a warning is logged: MLflow's first database migration tells of each of its forty steps.

    And it would set up logging anew, as in a program of its own, and close the log files of this process.
    """
    before, configure = logging.root.manager.disable, logging.config.fileConfig
    logging.disable(logging.INFO)
    logging.config.fileConfig = _configure_nothing
    try:
        yield
    finally:
        logging.config.fileConfig = configure
        logging.disable(before)


def _configure_nothing(*_: object, **__: object) -> None:
    """In place of what reads the settings of a program's log."""
