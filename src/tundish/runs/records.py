"""The records that the public verbs return, with the names and fields of the original client."""

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Generic, SupportsIndex, TypeVar

from tundish.base.events import TERMINAL_TYPES
from tundish.base.run_folder import RunFolder
from tundish.errors import FailureCause
from tundish.runs import html_tables

if TYPE_CHECKING:
    import pandas as pd

T = TypeVar("T")


class RunStatus(Enum):
    """Status of a run. Ordered; UNKNOWN comes before all others."""

    PENDING = "PENDING"
    QUEUED = "QUEUED"
    STARTING = "STARTING"
    RUNNING = "RUNNING"
    TERMINATING = "TERMINATING"
    COMPLETED = "COMPLETED"
    STOPPED = "STOPPED"
    FAILED = "FAILED"
    UNKNOWN = "UNKNOWN"

    order: ClassVar[list["RunStatus"]]
    """All of them, from the latest to the earliest."""

    def __str__(self) -> str:
        return self.value

    def _comes_after(self, other: object) -> int:
        """By how many places; a TypeError if `other` is not a status."""
        if not isinstance(other, RunStatus):
            raise TypeError(f"a RunStatus can only be compared with another RunStatus, not with {other!r}.")
        return RunStatus.order.index(other) - RunStatus.order.index(self)

    def __lt__(self, other: "RunStatus") -> bool:
        return self._comes_after(other) < 0

    def __le__(self, other: "RunStatus") -> bool:
        return self._comes_after(other) <= 0

    def __gt__(self, other: "RunStatus") -> bool:
        return self._comes_after(other) > 0

    def __ge__(self, other: "RunStatus") -> bool:
        return self._comes_after(other) >= 0

    def before(self, other: "RunStatus", inclusive: bool = False) -> bool:
        """Whether this status usually comes before `other`."""
        return self < other or (inclusive and self is other)

    def after(self, other: "RunStatus", inclusive: bool = False) -> bool:
        """Whether this status usually comes after `other`."""
        return self > other or (inclusive and self is other)

    def is_terminal(self) -> bool:
        """Whether the run has ended."""
        return self >= RunStatus.COMPLETED

    @property
    def display_name(self) -> str:
        """`Completed` for COMPLETED."""
        return self.value.capitalize()

    @classmethod
    def from_string(cls, run_status: "str | RunStatus") -> "RunStatus":
        """The status of that name, in any case; UNKNOWN for any other text."""
        if isinstance(run_status, RunStatus):
            return run_status
        return cls.__members__.get(str(run_status).upper(), cls.UNKNOWN)


RunStatus.order = [*reversed([status for status in RunStatus if status is not RunStatus.UNKNOWN]), RunStatus.UNKNOWN]


class ObjectList(Generic[T]):
    """A list that shows itself as a table in a notebook."""

    def __init__(self, data: Iterable[T], columns: dict[str, str], more_columns: dict[str, str] | None = None) -> None:
        self.data = list(data)
        self.display_columns = columns
        """Attribute name → column title."""
        self.more_columns = more_columns or {}
        """The same for columns that the original client did not have."""

    def __repr__(self) -> str:
        return f"List{self.data}"

    def __str__(self) -> str:
        """One line per item."""
        return "\n".join(str(item) for item in self.data) or "None yet."

    def __iter__(self) -> Iterator[T]:
        return iter(self.data)

    def __getitem__(self, index: SupportsIndex | slice) -> Any:
        return self.data[index]

    def __setitem__(self, index: SupportsIndex, value: T) -> None:
        self.data[index] = value

    def __len__(self) -> int:
        return len(self.data)

    def insert(self, index: SupportsIndex, item: T) -> None:
        """Put `item` before the one at `index`."""
        self.data.insert(index, item)

    def append(self, item: T) -> None:
        """Put `item` at the end."""
        self.data.append(item)

    def extend(self, item: Iterable[T]) -> None:
        """Put all of them at the end."""
        self.data.extend(item)

    def _repr_html_(self) -> str:
        return html_tables.horizontal(self.data, self.display_columns, self.more_columns)

    def to_pandas(self) -> "pd.DataFrame":
        """A DataFrame whose columns are the attribute names."""
        import pandas as pd

        columns: dict[str, list[Any]] = {
            name: [getattr(item, name) or "" for item in self.data] for name in self.display_columns
        }
        columns |= {name: [getattr(item, name) for item in self.data] for name in self.more_columns}
        return pd.DataFrame(data=columns)


@dataclass
class TrainingEvent:
    """An event of a run."""

    type: str
    time: datetime
    message: str
    cause: FailureCause | None = field(default=None, repr=False, compare=False)
    """Why the run failed, or had to be started again."""
    COLUMNS: ClassVar[dict[str, str]] = {"type": "Type", "time": "Time", "message": "Message"}

    def is_terminal_state(self) -> bool:
        """Whether the run ended with this event."""
        return self.type in TERMINAL_TYPES

    def __str__(self) -> str:
        return f"{self.time.astimezone():%Y-%m-%d %H:%M:%S}  {self.type:<17}  {self.message}"


@dataclass
class TrainingModelConstants:
    """A supported model."""

    name: str
    display_name: str
    max_context_length: int
    COLUMNS: ClassVar[dict[str, str]] = {
        "display_name": "Model Name",
        "name": "Input Name",
        "max_context_length": "Maximum Context Length",
    }

    def _repr_html_(self) -> str:
        return html_tables.vertical(
            {title: html_tables.text(getattr(self, name)) for name, title in self.COLUMNS.items()}
        )


@dataclass(repr=False)
class RunRecord:
    """A run as it was when it was read: plain values, and how tables show them. Users get it as a TrainingRun."""

    name: str
    status: RunStatus
    created_by: str
    model: str | None = None
    save_folder: str | None = None
    train_data_path: str | None = None
    register_to: str | None = None
    submitted_experiment_path: str | None = None
    task_type: str | None = "INSTRUCTION_FINETUNE"
    eval_data_path: str | None = None
    eval_prompts: list[str] | None = None
    custom_weights_path: str | None = None
    training_duration: str | None = None
    learning_rate: float | None = None
    context_length: int | None = None
    data_prep_cluster_id: str | None = None
    details: str | None = None
    """The latest event's message."""
    created_at: datetime | None = None
    started_at: datetime | None = None
    estimated_end_time: datetime | None = None
    """End of training; checkpoint upload, export and registration come after it."""
    formatted_eta: str | None = None
    completed_at: datetime | None = None
    submitted_config: Any = None
    """The run's RunSpec."""
    events: ObjectList[TrainingEvent] | None = field(default=None, repr=False)
    experiment_id: str | None = None
    run_id: str | None = None
    run_dir: Path | None = None
    """The run's folder on this machine."""
    tracking_uri: str | None = None
    """The MLflow tracking store of the run."""
    registry_uri: str | None = None
    """The model registry; None if it is the tracking store."""
    damaged_file: Path | None = None
    """The damaged file, if the run cannot be read; `details` says more."""
    train_loss: float | None = field(default=None, compare=False)
    """Latest loss, in nats per target token."""
    eval_loss: float | None = field(default=None, compare=False)
    tokens_per_second: float | None = field(default=None, compare=False)
    """Training throughput so far, over all devices, without evaluation."""
    registered_name: str | None = field(default=None, compare=False)
    """Name of the registered model, once there is a version."""
    registered_version: str | None = field(default=None, compare=False)
    cause: FailureCause | None = field(default=None, compare=False)
    """Why the run failed; `details` says it in words."""
    last_seen: datetime | None = field(default=None, compare=False)
    """Latest sign of life: while training, of the rank that has been silent longest; else the latest event."""
    COLUMNS: ClassVar[dict[str, str]] = {
        "name": "Name",
        "run_progress": "Status",
        "experiment_path": "MLflow Experiment",
        "model": "Model",
        "learning_rate": "Learning Rate",
        "training_duration": "Training Duration",
        "train_data_path": "Train Data Path",
        "register_to": "Register To",
    }
    MORE_COLUMNS: ClassVar[dict[str, str]] = {
        "train_loss": "Train Loss",
        "eval_loss": "Eval Loss",
        "registered_version": "Version",
        "created_at": "Created",
        "took": "Took",
    }

    def __repr__(self) -> str:
        return f"{type(self).__name__}(name={self.name!r}, status={self.status}, details={self.details!r})"

    def __str__(self) -> str:
        """One line: name, status, details, losses and duration."""
        numbers = [("train loss", self.train_loss), ("eval loss", self.eval_loss)]
        results = [f"{title} {value:.4g}" for title, value in numbers if value is not None]
        results += [f"took {html_tables.duration(self.took)}"] if self.took else []
        return "  ".join([self.name, self.run_progress, *([self.details] if self.details else []), *results])

    @property
    def run_progress(self) -> str:
        """`RUNNING ■■■□□□□□□□(30%)` while the end can be estimated, else the status; `DAMAGED` if it cannot be read."""
        if self.damaged_file is not None:
            return "DAMAGED"
        if self.status is RunStatus.RUNNING and self.started_at and self.estimated_end_time:
            total = (self.estimated_end_time - self.started_at).total_seconds()
            done = (datetime.now(UTC) - self.started_at).total_seconds()
            percent = max(0, min(int(100 * done / total), 100)) if total > 0 else 100
            return f"{self.status} {'■' * (percent // 10)}{'□' * (10 - percent // 10)}({percent}%)"
        return str(self.status)

    @property
    def formatted_events(self) -> str:
        """The events as lines of HTML."""
        return "<br>".join(
            f"{html_tables.text(event.type)} {html_tables.text(event.time)}" for event in self.events or ()
        )

    @property
    def experiment_path(self) -> str:
        """The MLflow experiment's name."""
        return self.submitted_experiment_path or ""

    @property
    def mlflow_url(self) -> str | None:
        """URL of the run's page, if it is on an MLflow server."""
        return self._page(self.tracking_uri, f"experiments/{self.experiment_id}/runs/{self.run_id}")

    @property
    def model_uri(self) -> str | None:
        """`models:/<name>/<version>` for MLflow, once the model is registered."""
        return f"models:/{self.registered_name}/{self.registered_version}" if self.registered_version else None

    @property
    def took(self) -> timedelta | None:
        """Time from the start to the end, or until now."""
        return (self.completed_at or datetime.now(UTC)) - self.started_at if self.started_at else None

    @property
    def links(self) -> dict[str, str | None]:
        """Attribute name → URL that tables link to, if it is on a server."""
        version = f"models/{self.registered_name}/versions/{self.registered_version}"
        return {
            "experiment_path": self.mlflow_url,
            "registered_version": self._page(self.registry_uri or self.tracking_uri, version),
        }

    @staticmethod
    def _page(server: str | None, path: str) -> str | None:
        return f"{server.rstrip('/')}/#/{path}" if server and server.startswith(("http://", "https://")) else None

    @property
    def export_dir(self) -> Path | None:
        """The exported Hugging Face folder, once it exists."""
        folder = RunFolder(self.run_dir).export if self.run_dir else None
        return folder if folder and os.path.isdir(folder) else None  # false, too, if it may not be read

    def _repr_html_(self) -> str:
        shown = {
            "Name": self.name,
            "Status": self.run_progress,
            "Details": self.details,
            "Cause": self.cause,
            "Train Loss": self.train_loss,
            "Eval Loss": self.eval_loss,
            "Tokens per Second": None if self.tokens_per_second is None else f"{self.tokens_per_second:,.0f}",
            "Registered Model": html_tables.Link(self.model_uri or "", self.links["registered_version"]),
            "Created": self.created_at,
            "Started": self.started_at,
            "Estimated End": self.estimated_end_time,
            "Completed": self.completed_at,
            "Last Seen": None if self.completed_at else self.last_seen,
            "Took": self.took,
            "Model": self.model,
            "Task Type": self.task_type,
            "Learning Rate": self.learning_rate,
            "Training Duration": self.training_duration,
            "Context Length": self.context_length,
            "Train Data Path": self.train_data_path,
            "Eval Data Path": self.eval_data_path,
            "Eval Prompts": self.eval_prompts,
            "Custom Weights Path": self.custom_weights_path,
            "Register To": self.register_to,
            "Data Prep Cluster Id": self.data_prep_cluster_id,
            "MLflow Experiment": self.experiment_path,
            "Experiment Id": self.experiment_id,
            "MLflow Run": html_tables.Link(self.run_id or "", self.mlflow_url),
            "Run Folder": self.run_dir,
        }
        rows = {title: html_tables.text(value) for title, value in shown.items()}
        return html_tables.vertical(rows | {"Events": self.formatted_events or html_tables.NOTHING})
