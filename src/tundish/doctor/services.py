"""What a run talks to: MLflow, the model hub, Slurm. Each is asked once, and no answer is waited for long.

A `judge_…` function says what is to be thought of what was read; the function after it reads.
"""

import contextlib
import os
import re
import shutil
import socket
import sqlite3
import subprocess
from collections import defaultdict
from pathlib import Path
from urllib.parse import quote, urlsplit

from tundish.doctor.finding import Finding
from tundish.doctor.machine import obstacle_to_writing
from tundish.runs.tracking import tracking_uri

SECONDS = (3.0, 4.0)
"""To connect, and to answer."""
PORTS = {"postgresql": 5432, "mysql": 3306, "mssql": 1433}
CHECK_URI = "Check MLFLOW_TRACKING_URI, and that the server runs and can be reached from here."


def judge_server(uri: str, status: int | None, answer: str) -> Finding:
    """What to think of an MLflow server.

    Args:
        uri: its address.
        status: of its answer to `/health`; None: it gave none.
        answer: what it said, or why it said nothing.
    """
    if status is None:
        return Finding("MLflow", "problem", f"{uri}: {answer}", CHECK_URI)
    if status in (401, 403):
        advice = "Set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN."
        return Finding("MLflow", "problem", f"{uri} answers, but wants another login ({status})", advice)
    if status != 200 or answer.strip() != "OK":
        found = f"{uri} answers /health with {status}, which is not what an MLflow server says"
        return Finding("MLflow", "problem", found, CHECK_URI)
    return Finding("MLflow", "ok", f"{uri} answers")


def mlflow() -> Finding:
    """Look at the tracking store, whatever its kind."""
    uri = tracking_uri()
    scheme = uri.partition(":")[0].partition("+")[0] if ":" in uri else uri
    if scheme in ("http", "https"):
        return judge_server(uri, *_get(f"{uri.rstrip('/')}/health"))
    if scheme == "sqlite":
        return _sqlite(Path(uri.removeprefix("sqlite:///").partition("?")[0]))
    if scheme in PORTS:
        return _database(uri, PORTS[scheme])
    if scheme == "databricks":
        return _databricks(uri)
    if scheme == "file" or "://" not in uri:
        folder = Path(uri.removeprefix("file:").removeprefix("//"))
        return _unwritable(folder / "0") or Finding("MLflow", "ok", f"folder {folder}")
    advice = (
        "Known are http(s), sqlite, postgresql, mysql, mssql, databricks and folders; a plugin of MLflow may know more."
    )
    return Finding("MLflow", "problem", f"{uri}: nothing is known of {scheme}://", advice)


def _get(address: str) -> tuple[int | None, str]:
    import requests

    environment = os.environ.get
    user, password = environment("MLFLOW_TRACKING_USERNAME"), environment("MLFLOW_TRACKING_PASSWORD")
    token = environment("MLFLOW_TRACKING_TOKEN")
    insecure = environment("MLFLOW_TRACKING_INSECURE_TLS", "").lower() in ("1", "true")
    try:
        got = requests.get(
            address,
            auth=(user, password) if user and password else None,
            headers={"Authorization": f"Bearer {token}"} if token else {},
            verify=environment("MLFLOW_TRACKING_SERVER_CERT_PATH") or not insecure,
            timeout=SECONDS,
        )
    except requests.RequestException as error:
        return None, _reason(error)
    return got.status_code, got.text[:100]


def _reason(error: Exception) -> str:
    """Why a request got no answer, in a few words; the libraries' own texts are long, and hold the whole address."""
    import requests

    if isinstance(error, requests.exceptions.InvalidURL | requests.exceptions.InvalidSchema):
        return "this is no address of a server"
    if isinstance(error, requests.Timeout):
        connecting = isinstance(error, requests.ConnectTimeout)
        return f"no answer within {SECONDS[0] if connecting else SECONDS[1]:g} s"
    if isinstance(error, requests.exceptions.SSLError):
        return "its certificate is not accepted"
    if isinstance(error, requests.exceptions.ProxyError):
        return "the proxy that the environment names does not connect"
    known = {"refused": "nothing listens there", "resol": "its name is not known", "unreachable": "no way leads there"}
    return next((words for part, words in known.items() if part in str(error)), "no connection")


def _sqlite(file: Path) -> Finding:
    if finding := _unwritable(file):
        return finding
    if not file.exists():
        return Finding("MLflow", "ok", f"SQLite file {file}, to be made by the first run")
    try:
        with contextlib.closing(sqlite3.connect(f"file:{quote(str(file))}?mode=ro", uri=True, timeout=2)) as database:
            database.execute("PRAGMA schema_version").fetchone()
    except sqlite3.Error as error:
        advice = "Restore it from a copy, or set MLFLOW_TRACKING_URI to another store."
        return Finding("MLflow", "problem", f"SQLite file {file} cannot be read ({error})", advice)
    return Finding("MLflow", "ok", f"SQLite file {file}")


def _unwritable(path: Path) -> Finding | None:
    """A finding if nothing can be made beside `path`, which is how SQLite writes, or it cannot be written itself."""
    obstacle = obstacle_to_writing(path.parent)
    if path.exists() and not os.access(path, os.W_OK):
        obstacle = "no permission"
    if not obstacle:
        return None
    advice = "Set TUNDISH_HOME or MLFLOW_TRACKING_URI to a place that you may write."
    return Finding("MLflow", "problem", f"{path} cannot be written ({obstacle})", advice)


def _database(uri: str, usual_port: int) -> Finding:
    try:
        parsed = urlsplit(uri)
        host, port = parsed.hostname or "localhost", parsed.port or usual_port
    except ValueError:
        # The parser's own text may hold a part of the password.
        advice = "Write `/`, `@`, `:` and `#` in a password as %2F, %40, %3A and %23."
        return Finding("MLflow", "problem", "MLFLOW_TRACKING_URI is no database's address", advice)
    try:
        socket.create_connection((host, port), timeout=SECONDS[0]).close()
    except OSError as error:
        why = error.strerror or f"no answer within {SECONDS[0]:g} s"
        return Finding("MLflow", "problem", f"database {uri} does not answer on port {port} ({why})", CHECK_URI)
    return Finding("MLflow", "ok", f"database {uri} takes connections; the login was not tried")


def _databricks(uri: str) -> Finding:
    known = os.environ.get("DATABRICKS_HOST") or (Path.home() / ".databrickscfg").exists()
    if known:
        return Finding("MLflow", "ok", f"{uri}: the workspace that the Databricks settings name; it was not asked")
    advice = "Set DATABRICKS_HOST and DATABRICKS_TOKEN, or write ~/.databrickscfg."
    return Finding("MLflow", "problem", f"{uri}: no workspace is named", advice)


def judge_hub(endpoint: str, obstacle: str, *, offline: str, token: bool) -> Finding:
    """What to think of the model hub.

    Args:
        endpoint: its address.
        obstacle: why it does not answer; empty: it does.
        offline: the setting that switches it off; empty: none does.
        token: whether there is one.
    """
    if offline:
        return Finding(
            "model hub", "absent", f"not asked, as {offline}: models and datasets come from folders and cache"
        )
    if obstacle:
        advice = "Check the network, HF_ENDPOINT and the proxy; on a machine without a way out, set HF_HUB_OFFLINE=1."
        return Finding("model hub", "problem", f"{endpoint}: {obstacle}", advice)
    if not token:
        advice = "Gated models, such as Llama, need one: `huggingface-cli login`, or HF_TOKEN."
        return Finding("model hub", "ok", f"{endpoint} answers; there is no token", advice)
    return Finding("model hub", "ok", f"{endpoint} answers; there is a token")


def hub() -> Finding:
    """Ask the model hub for its first page, unless it is switched off."""
    import requests
    from huggingface_hub import get_token

    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")
    switches = [name for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE") if _is_on(name)]
    obstacle = ""
    if not switches:
        try:
            status = requests.head(endpoint, timeout=SECONDS, allow_redirects=False).status_code
            obstacle = f"answers with {status}" if status >= 500 else ""
        except requests.RequestException as error:
            obstacle = _reason(error)
    offline = f"{switches[0]} is set" if switches else ""
    return judge_hub(endpoint, obstacle, offline=offline, token=bool(get_token()))


def _is_on(name: str) -> bool:
    return os.environ.get(name, "").upper() in ("1", "ON", "YES", "TRUE")


def judge_slurm(version: str, status: int, rows: str, complaint: str) -> Finding:
    """What to think of Slurm.

    Args:
        version: what `sinfo --version` says.
        status: exit code of sinfo.
        rows: what it lists: `partition|nodes|state` a line.
        complaint: what it says on standard error.
    """
    if status:
        if "configuration source" in complaint:
            return Finding("Slurm", "absent", "sinfo is there, but no cluster is configured")
        said = " ".join(complaint.split())[:200] or f"exit code {status}"
        advice = "Check slurm.conf (SLURM_CONF) and that slurmctld runs; runs on this machine do not need it."
        return Finding("Slurm", "problem", f"sinfo says: {said}", advice)
    partitions: dict[str, list[str]] = defaultdict(list)
    for name, nodes, state in (line.split("|") for line in rows.split()):
        partitions[name].append(f"{nodes} {state}")
    told = "; ".join(f"{name}: {', '.join(states)}" for name, states in partitions.items()) or "no partition"
    usable = re.search(r"\|(idle|mix|alloc|comp|plan)", rows)
    found, advice = f"{version}, nodes of {told}", "" if usable else "No node takes jobs: `sinfo -R` tells why."
    return Finding("Slurm", "ok" if usable else "problem", found, advice)


def slurm() -> Finding:
    """Ask sinfo."""
    if shutil.which("sinfo") is None:
        return Finding("Slurm", "absent", "no sinfo on PATH; runs train on this machine")
    version, listed = (
        subprocess.run(["sinfo", *options], capture_output=True, text=True, timeout=sum(SECONDS), check=False)
        for options in (["--version"], ["--noheader", "--format=%R|%D|%T"])
    )
    return judge_slurm(version.stdout.strip(), listed.returncode, listed.stdout, listed.stderr)
