"""Where things are: every name in a run folder, atomic writes.

No other module spells a file name of a run folder. Names that come from arguments or data are joined through
`inside`, which refuses what would leave its root by `..` or by a link.
"""

import os
import re
import secrets
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from tundish.errors import SpecError

CHECKPOINT_LINK = "latest-sharded-rank0.symlink"
"""A text file beside the checkpoints that holds the newest one's path."""
RUN_VARIABLE = "TUNDISH_EVENTS"
"""Environment variable with which a run's supervisor lets the ranks write its events: the path of events.jsonl."""
RUN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,99}")
FOLDER_VARIABLES = (
    "TUNDISH_HOME HF_HOME HF_HUB_CACHE HF_DATASETS_CACHE HUGGINGFACE_HUB_CACHE TRANSFORMERS_CACHE XDG_CACHE_HOME "
    "TMPDIR AWS_CONFIG_FILE AWS_SHARED_CREDENTIALS_FILE GOOGLE_APPLICATION_CREDENTIALS SSL_CERT_FILE REQUESTS_CA_BUNDLE"
).split()
"""Variables of the environment that name a file or folder."""


def home() -> Path:
    """`$TUNDISH_HOME`, else `~/.tundish`; not created."""
    return Path(os.environ.get("TUNDISH_HOME") or "~/.tundish").expanduser().absolute()


def absolute_environment() -> dict[str, str]:
    """This process's environment for one that works in another folder: relative paths in it are made absolute."""
    given = {name: os.environ[name] for name in FOLDER_VARIABLES if os.environ.get(name)}
    return {**os.environ, **{name: str(Path(path).expanduser().absolute()) for name, path in given.items()}}


def make_folder(folder: Path) -> Path:
    """Make a folder below `$TUNDISH_HOME`, and that first: for its user alone, as data, specs and logs are in it.

    A home that is there already stays as its owner has made it; all other folders and files get what the umask leaves.
    """
    if not home().exists():
        home().mkdir(mode=0o700, parents=True, exist_ok=True)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def yamls_dir() -> Path:
    """The folder of YAML layers: inside the installed package, or at the top of a source checkout."""
    packaged = Path(__file__).parent / "yamls"
    return packaged if packaged.is_dir() else Path(__file__).parents[2] / "yamls"


def inside(root: Path, *parts: str) -> Path:
    """`root` joined with `parts`, made absolute.

    Raises:
        SpecError: the result would lie outside `root`, by `..`, an absolute part or a link.
    """
    real_root = root.resolve()
    path = root.joinpath(*parts).resolve()
    if not path.is_relative_to(real_root):
        raise SpecError(
            f"{'/'.join(parts)}: leaves {root}. Give a path without '..' and without links to other places."
        )
    return path


def content_root(folder: Path) -> Path:
    """What the files of a model's or dataset's folder may be links to: the folder.

    In the hub's cache a snapshot is made of links to files beside it, in the folder of its model or dataset.
    """
    real = folder.resolve()
    is_snapshot = real.parent.name == "snapshots" and real.parents[1].name.startswith(("models--", "datasets--"))
    return real.parents[1] if is_snapshot else real


def obstacle_to_writing(folder: Path) -> str:
    """Why no file can be made in `folder`, or in the nearest folder above it that exists; empty = it can."""
    try:
        with tempfile.TemporaryFile(dir=existing(folder)):
            return ""
    except OSError as error:
        return f"{existing(folder)}: {error.strerror}"


def existing(folder: Path) -> Path:
    """The path itself, or the nearest folder above it that is there."""
    return next(path for path in (folder, *folder.parents) if path.exists())


def write_atomic(path: Path, content: str | bytes) -> None:
    """Write beside `path`, flush to disk, rename: a reader sees the old content or the new, never a part."""
    # On a disk that is shared, a process of another machine may have the same number.
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    data = content.encode() if isinstance(content, str) else content
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)  # on a full disk, the room that it has taken is needed
        raise
    flush_folder(path.parent)


def flush_folder(folder: Path) -> None:
    """Make sure that names made, moved or removed in a folder are so after a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@dataclass(frozen=True, slots=True)
class RunPaths:
    """Every name in the folder of one run: `$TUNDISH_HOME/runs/<run_name>/`."""

    folder: Path

    @classmethod
    def of(cls, run_name: str) -> Self:
        """The folder of the run of that name, whether it exists or not."""
        return cls(inside(runs_dir(), run_name))

    @property
    def spec(self) -> Path:
        """The checked arguments, as JSON; written last, so a folder without it is not a run."""
        return self.folder / "spec.json"

    @property
    def foundry_yaml(self) -> Path:
        """What LLM Foundry trains."""
        return self.folder / "foundry.yaml"

    @property
    def events(self) -> Path:
        """Append-only, one JSON object a line."""
        return self.folder / "events.jsonl"

    @property
    def supervisor(self) -> Path:
        """Which launcher has the run, and what it is called there (process, Slurm job), as JSON."""
        return self.folder / "supervisor.json"

    @property
    def lock(self) -> Path:
        """Held by the run's supervisor while it lives: there is never a second one."""
        return self.folder / "supervisor.lock"

    @property
    def job(self) -> Path:
        """The batch script of a run that Slurm has."""
        return self.folder / "job.sbatch"

    @property
    def logs(self) -> Path:
        """One log a stage, and one a rank while training."""
        return self.folder / "logs"

    def log(self, stage: str) -> Path:
        """The log of one stage."""
        return self.logs / f"{stage}.log"

    def result(self, stage: str) -> Path:
        """What a stage found, as JSON: its result, or the sentence that says why it failed."""
        return self.folder / "results" / f"{stage}.json"

    @property
    def learned(self) -> Path:
        """Left by the ranks when training has changed a weight."""
        return self.folder / "results" / "learned"

    def data(self, split: str) -> Path:
        """A link to the prepared data of `train` or `eval`."""
        return self.folder / "data" / split

    @property
    def work(self) -> Path:
        """Working directory of the ranks."""
        return self.folder / "work"

    @property
    def stop_request(self) -> Path:
        """While it is there, the ranks save a checkpoint after their batch and end."""
        return self.work / "stop"

    @property
    def stopped(self) -> Path:
        """Left by the ranks when they have done so."""
        return self.work / "stopped"

    @property
    def beats(self) -> Path:
        """Signs of life of the ranks, a file each."""
        return self.work / "beats"

    @property
    def scratch(self) -> Path:
        """Temporary files of a stage, there while it runs."""
        return self.work / "scratch"

    @property
    def doing(self) -> Path:
        """How far a stage is, as text; gone with the stage."""
        return self.scratch / "doing"

    @property
    def metrics(self) -> Path:
        """Every point of every metric, one JSON object a line; MLflow has them from here."""
        return self.folder / "metrics.jsonl"

    @property
    def artifacts_journal(self) -> Path:
        """What else MLflow is told while training, one JSON object a line: params, data sets, rows, names of files."""
        return self.folder / "artifacts.jsonl"

    @property
    def artifacts(self) -> Path:
        """The files that are named there."""
        return self.folder / "artifacts"

    @property
    def export(self) -> Path:
        """The Hugging Face folder."""
        return self.folder / "export"


def runs_dir() -> Path:
    """Where all run folders are."""
    return home() / "runs"


def prepared_dir() -> Path:
    """Prepared data, shared by all runs; one folder for each distinct input."""
    return home() / "prepared"


def downloads_dir() -> Path:
    """Copies of data from object stores; one folder for each URI."""
    return home() / "downloads"


def copies_dir() -> Path:
    """This machine's copies of checkpoints that are kept elsewhere; one folder for each place."""
    return home() / "checkpoints"


def architectures_dir() -> Path:
    """What models' configs ask of their weights; one file for each config."""
    return home() / "architectures"


def mlflow_artifacts_dir() -> Path:
    """Artifact root of the default MLflow store: `<experiment>/<run id>/artifacts` below it."""
    return home() / "mlflow" / "artifacts"


def default_tracking_uri() -> str:
    """The MLflow store used when `MLFLOW_TRACKING_URI` is not set: a SQLite file."""
    return f"sqlite:///{home() / 'mlflow' / 'mlflow.db'}"
