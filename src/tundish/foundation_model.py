"""The public verbs, and the run objects they return: `from tundish import foundation_model as fm`.

The first parameters, their defaults and the returned objects are those of the original client, so that a notebook
changes only its import line. Each verb is a few calls into the parts that do the work, which know plain records only.
"""

import builtins
import dataclasses
import inspect
import sys
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Any

from tundish.base.progress_bar import in_notebook, progress_bar
from tundish.base.run_folder import RunFolder
from tundish.errors import RequestError
from tundish.plan.compute import Compute
from tundish.plan.models import model_cards
from tundish.runs import control, creating, following, planning, reading, selecting
from tundish.runs.records import ObjectList, RunRecord, RunStatus, TrainingEvent, TrainingModelConstants
from tundish.tracking import this_process

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

    from tundish.data.estimate import Estimate
    from tundish.data.report import Validation

__all__ = [
    "TrainingRun",
    "cancel",
    "create",
    "estimate",
    "get",
    "get_checkpoints",
    "get_events",
    "get_models",
    "list",
    "resume",
    "validate",
]


@dataclasses.dataclass(repr=False)
class TrainingRun(RunRecord):
    """A run as it was when it was read, and what can be done with it; `refresh()` reads it again."""

    def refresh(self) -> "TrainingRun":
        """The run as it is now."""
        return get(self)

    def cancel(self) -> int:
        """Stop the run: 1 if it was stopped, 0 if it had already ended."""
        return cancel(self)

    def get_events(self) -> ObjectList[TrainingEvent]:
        """All events so far."""
        return get_events(self)

    def wait(self, timeout: float | None = None) -> "TrainingRun":
        """Wait for the run to end, and return it as it is then.

        Args:
            timeout: seconds; None waits without a limit.

        Raises:
            TimeoutError: it has not ended in time; it continues.
        """
        return _training_run(reading.wait(self.name, timeout))

    def metrics(self, key: str | None = None) -> "pd.DataFrame":
        """All points of the run's metrics so far: columns `key`, `step`, `time`, `value`.

        They come from MLflow, or from the run's folder while MLflow cannot be reached.

        Args:
            key: only this metric, such as `loss/train/total`; None returns all.

        Raises:
            RequestError: MLflow cannot be reached and the run's folder has no metrics, or no metric of that name.
        """
        from tundish.tracking import metrics  # loads matplotlib

        if not self.tracking_uri or not self.run_id:
            raise RequestError(f"{self.name}: has no MLflow run. Get the run by fm.get({self.name!r}) first.")
        return metrics.read(
            self.tracking_uri, self.run_id, key, RunFolder(self.run_dir).metrics if self.run_dir else None
        )

    def plot(self) -> "Figure":
        """Training and evaluation loss so far, by batch; `run.plot().savefig("loss.png")` saves it.

        Raises:
            RequestError: MLflow cannot be reached and the run's folder has no metrics.
        """
        from tundish.tracking import metrics  # loads matplotlib

        return metrics.plot(self.metrics(), f"{self.name}: {self.status.display_name.lower()}")


def _training_run(record: RunRecord) -> TrainingRun:
    return TrainingRun(**{field.name: getattr(record, field.name) for field in dataclasses.fields(record)})


def create(
    model: str,
    train_data_path: str,
    register_to: str,
    *,
    experiment_path: str | None = "",
    task_type: str | None = "CHAT_COMPLETION",
    eval_data_path: str | None = None,
    eval_prompts: Sequence[str] | None = None,
    custom_weights_path: str | None = None,
    training_duration: str | None = None,
    learning_rate: float | str | None = None,
    context_length: int | None = None,
    validate_inputs: bool | None = True,
    data_prep_cluster_id: str | None = None,
    run_name: str | None = None,
    compute: Compute | Mapping[str, Any] | None = None,
    overrides: Mapping[str, Any] | None = None,
) -> TrainingRun:
    """Fine-tune a model. Returns as soon as the run is accepted; a detached process does the work.

    Args:
        model: Name of a supported model (`tundish models` lists them), or path of a Hugging Face model folder.
        train_data_path: Training data. For chats and instructions: a .jsonl file (also .gz or .zst), a .parquet file or
            a folder of them, a Delta table (`catalog.schema.table` or its folder), or a Hugging Face dataset with its
            split (`org/dataset/split`). For continued pretraining: a folder of .txt files. Files and tables may be in
            an object store (`s3://…`).
        register_to: Where to register the model: `catalog.schema` or `catalog.schema.name`. An existing name gets a new
            version.
        experiment_path: MLflow experiment; default `/Users/<user>/<run_name>`.
        task_type: `CHAT_COMPLETION` (default), `INSTRUCTION_FINETUNE` or `CONTINUED_PRETRAIN`.
        eval_data_path: Evaluation data, in the format of the training data.
        eval_prompts: Prompts that the model completes at every checkpoint; the completions are logged to MLflow.
            Prompts are used verbatim: for a chat model, include the markers of its chat template.
        custom_weights_path: A Composer checkpoint whose weights replace the pretrained ones.
        training_duration: `3ep` (epochs), `100ba` (batches) or `1_000_000tok` (tokens); default `1ep`.
        learning_rate: Peak learning rate; default 5e-7 (1e-5 for Llama 3.1 405B).
        context_length: Maximum tokens per row; longer samples are truncated. Default: 8192, or the model's maximum if
            that is less.
        validate_inputs: Check every row before accepting the run. Data of up to 8 MB is tokenized as well; what only
            tokens reveal in larger data, and everything if this is false, is checked by the run itself.
        data_prep_cluster_id: A Spark master that prepares the data: `spark://host:port`, `sc://host:port` or
            `local[4]`; default: no Spark.
        run_name: Name of the run; default `<task>-<model>-<6 random characters>`.
        compute: Where to train, a mapping: `device` ("gpu" or "cpu"), `devices_per_node`; default: all GPUs of this
            machine, else its CPU. For a cluster: `launcher` "slurm", `nodes`, `time_limit`, `grace_s`, and further
            sbatch options as `sbatch`.
        overrides: LLM Foundry keys that replace the defaults, nested or dotted (`optimizer.lr`); merged last.

    Raises:
        SpecError: an argument is wrong; all problems of the call are listed, those of the data too.
        DataError: only the data is wrong.
    """
    run = creating.create(dict(locals()), progress_bar)
    _use_store_of(run, aloud=True)
    return _training_run(run)


def _use_store_of(run: RunRecord, *, aloud: bool = False) -> None:
    """Point MLflow in this process to the store of the run, if the user has not chosen one."""
    notebook = in_notebook()
    if run.tracking_uri and this_process.use(run.tracking_uri, run.registry_uri) and (aloud or notebook):
        text = f"MLflow in this process now uses {run.tracking_uri}, the store of the run"
        text += f" ({this_process.VARIABLE} was not set)."
        # The standard output of a script is its own.
        print(text, file=sys.stdout if notebook else sys.stderr)


def validate(model: str, train_data_path: str, register_to: str | None = None, **others: Any) -> "Validation":
    """Check every row as `create()` does, without creating a run. A later run reuses the data that this prepares.

    Args:
        model: as in `create()`.
        train_data_path: as in `create()`.
        register_to: not needed here.
        others: as in `create()`.

    Returns:
        A report: `.ok`, `.reports` with problems and warnings, and `.save(path)`, which writes all of it as JSON.

    Raises:
        SpecError: an argument is wrong.
        DataError: the data has no samples, or compressed data is damaged.
    """
    return planning.validate(_bound(model, train_data_path, register_to, others), progress_bar)


def estimate(model: str, train_data_path: str, register_to: str | None = None, **others: Any) -> "Estimate":
    """Estimate what a run would train on: samples, tokens, rows, steps and lengths.

    Large data is sampled, and the estimate has a margin of error.

    Args:
        model: as in `create()`.
        train_data_path: as in `create()`.
        register_to: not needed here.
        others: as in `create()`.

    Raises:
        SpecError: an argument is wrong.
        DataError: the data has no valid samples.
    """
    return planning.estimate(_bound(model, train_data_path, register_to, others), progress_bar)


def _bound(model: str, train_data_path: str, register_to: str | None, others: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of `create()` with its defaults; a TypeError for arguments that it does not have."""
    bound = inspect.signature(create).bind(model, train_data_path, register_to or "main.default", **others)
    bound.apply_defaults()
    return dict(bound.arguments)


def get(training_run: str | TrainingRun) -> TrainingRun:
    """The run as it is now.

    Raises:
        RunNotFoundError: there is no run of that name.
    """
    run = reading.read_run(selecting.name_of(training_run))
    _use_store_of(run)
    return _training_run(run)


def list(
    training_runs: Sequence[str | TrainingRun] | ObjectList[TrainingRun] | None = None,
    experiment_id: str | None = None,
    *,
    statuses: Sequence[str | RunStatus] | None = None,
    user_emails: Sequence[str] | None = None,
    before: str | datetime | None = None,
    after: str | datetime | None = None,
    include_details: bool = True,
    limit: int | None = 100,
) -> ObjectList[TrainingRun]:
    """Runs of this machine, newest first.

    Args:
        training_runs: only these runs, by name or object.
        experiment_id: only runs of this MLflow experiment.
        statuses: only runs with one of these statuses.
        user_emails: only runs created by one of these users.
        before: only runs created before this time (`Y-m-d`, `m-d-Y`, with or without a time, or a datetime).
        after: only runs created at or after this time.
        include_details: False leaves out `events` and `submitted_config`.
        limit: maximum number of runs; None for all.
    """
    names = None if training_runs is None else {selecting.name_of(run) for run in training_runs}
    # Notebooks fill these from widgets, whose empty texts mean "not set".
    condition = selecting.Filter.parse(
        names, experiment_id or None, statuses, user_emails, before or None, after or None
    )
    runs = selecting.select(condition, limit=limit, include_details=include_details)
    if runs:
        _use_store_of(runs[0])
    return ObjectList(map(_training_run, runs), TrainingRun.COLUMNS, TrainingRun.MORE_COLUMNS)


def cancel(
    runs: str | TrainingRun | Sequence[str] | Sequence[TrainingRun] | None = None, experiment_id: str | None = None
) -> int:
    """Stop runs, given by name or object, or all runs of an MLflow experiment. Their checkpoints are kept.

    Returns:
        The number of runs that were stopped; a summary is printed.

    Raises:
        RequestError: neither or both were given.
    """
    canceled, asked = control.cancel(runs, experiment_id)
    print(control.cancel_message(canceled, asked))
    return len(canceled)


def resume(
    training_run: str | TrainingRun,
    *,
    training_duration: str | None = None,
    compute: Mapping[str, Any] | None = None,
) -> TrainingRun:
    """Continue a run that failed, was canceled or was killed, or train one for longer. Returns at once.

    Finished stages are not repeated. Training resumes from the newest complete checkpoint, with its optimizer, schedule
    and random state, and with the same batches in the same order.

    Args:
        training_run: name or object.
        training_duration: a longer duration than before, such as `2ep` instead of `1ep`; completed runs can be
            extended as well. From the newest checkpoint on, the learning rate follows the schedule of the whole new
            duration. The export is replaced, and a new version is registered.
        compute: other devices than before, as in `create()`; the batches stay the same.

    Raises:
        RequestError: the run is still active, or it is completed and no longer duration was given.
        SpecError: `training_duration` or `compute` is wrong.
    """
    run = control.resume(selecting.name_of(training_run), compute, training_duration)
    _use_store_of(run)
    return _training_run(run)


def get_events(training_run: str | TrainingRun, follow: bool = False) -> ObjectList[TrainingEvent]:
    """The events of a run.

    Args:
        training_run: name or object.
        follow: print new events until the run ends; in a notebook, redraw the table.
    """
    name = selecting.name_of(training_run)
    if follow:
        following.follow(name)
    return reading.read_events(reading.find_run(name))


def get_checkpoints(training_run: str | TrainingRun) -> builtins.list[str]:
    """Full paths of the complete `ep…` folders, oldest first; prints a note if there are none."""
    paths = selecting.checkpoints(selecting.name_of(training_run))
    if not paths:
        print("No checkpoints created yet for this run. Please try again later.")
    return paths


def get_models() -> ObjectList[TrainingModelConstants]:
    """The supported models."""
    cards = model_cards().values()
    models = (TrainingModelConstants(card.name, card.display_name, card.max_context_length) for card in cards)
    return ObjectList(models, TrainingModelConstants.COLUMNS)
