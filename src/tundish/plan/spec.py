"""RunSpec: the checked arguments of `create()`.

`read_arguments` is the door: strings become values here, once, and all problems are reported together. Nothing behind
it sees an unchecked argument.
"""

import dataclasses
import getpass
import json
import math
import os
import re
import secrets
import string
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, Literal, cast, get_args

from tundish import __version__
from tundish.base.run_folder import RUN_NAME, RunFolder
from tundish.base.text import holds_secret
from tundish.base.typed_json import NewerError, moment, object_of, parse
from tundish.errors import SpecError
from tundish.plan.address import Address, Takes
from tundish.plan.compute import Compute
from tundish.plan.models import ModelCard, find_card
from tundish.plan.options import Option
from tundish.plan.overrides import ATTENTION, BATCH_SIZE, PATHS, check_overrides, flat, unused_overrides

TaskType = Literal["CHAT_COMPLETION", "INSTRUCTION_FINETUNE", "CONTINUED_PRETRAIN"]
TASK_PREFIXES: Mapping[TaskType, str] = {
    "CHAT_COMPLETION": "chat",
    "INSTRUCTION_FINETUNE": "ift",
    "CONTINUED_PRETRAIN": "cpt",
}
DEFAULT_CONTEXT_LENGTH = 8192
SPEC_VERSION = 1
"""Of `spec.json`'s format; raised when an older tundish would read a newer one's file wrongly."""
MOST_PROMPTS = 1_000
PROMPT_CHARACTERS = 4_000_000
"""Of all eval prompts together."""
ANSWER_TOKENS = 100
"""At most, of an answer to an eval prompt: the managed service's setting."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Duration:
    """How long to train."""

    value: int
    unit: Literal["ep", "ba", "tok"]
    """Composer's unit: epochs, batches or tokens."""

    @classmethod
    def parse(cls, text: object) -> "Duration":
        """Read `3ep`, `100ba` or `1_000_000tok`.

        Raises:
            ValueError: the text is something else, or not positive.
        """
        match = re.fullmatch(r"\s*([0-9]+(?:_[0-9]+)*)\s*(ep|ba|tok)\s*", str(text)[:40])
        if match is None or int(match[1]) == 0:
            raise ValueError(
                f"must be a positive integer followed by ep, ba or tok, not {text!r}. "
                "For example '3ep', '100ba' or '1_000_000tok'."
            )
        return cls(value=int(match[1]), unit=cast(Any, match[2]))

    def __str__(self) -> str:
        return f"{self.value}{self.unit}"


@dataclass(frozen=True, kw_only=True, slots=True)
class RunSpec:
    """Everything that a run is asked to do. Made by `parse_spec` only."""

    # The docstrings of those that create() takes are the help texts of the command line and, word for word, those of
    # create(); a test compares them. Paths and names are kept as `Address.text`: absolute, or a name.
    created_by: str
    created_at: str
    """ISO 8601 with zone."""
    model: Annotated[str, Option(group="training", metavar="MODEL", required=True, is_path=True)]
    """Name of a supported model (`tundish models` lists them), or path of a Hugging Face model folder."""
    train_data_path: Annotated[str, Option(group="data", metavar="PATH", required=True, is_path=True)]
    """Training data. For chats and instructions: a .jsonl file (also .gz or .zst), a .parquet file or a folder of them,
    a Delta table (`catalog.schema.table` or its folder), or a Hugging Face dataset with its split
    (`org/dataset/split`). For continued pretraining: a folder of .txt files. Files and tables may be in an object store
    (`s3://…`)."""
    register_to: Annotated[str, Option(group="output", metavar="NAME", required=True)]
    """Where to register the model: `catalog.schema` or `catalog.schema.name`. An existing name gets a new version."""
    experiment_path: Annotated[str, Option(group="output", metavar="NAME")]
    """MLflow experiment; default `/Users/<user>/<run_name>`."""
    task_type: Annotated[TaskType, Option(group="training", metavar="TYPE")]
    """`CHAT_COMPLETION` (default), `INSTRUCTION_FINETUNE` or `CONTINUED_PRETRAIN`."""
    eval_data_path: Annotated[str | None, Option(group="data", metavar="PATH", is_path=True)] = None
    """Evaluation data, in the format of the training data."""
    eval_prompts: Annotated[tuple[str, ...], Option(group="data", metavar="TEXT")] = ()
    """Prompts that the model completes at every checkpoint; the completions are logged to MLflow. Prompts are used
    verbatim: for a chat model, include the markers of its chat template."""
    custom_weights_path: Annotated[str | None, Option(group="training", metavar="PATH", is_path=True)] = None
    """A Composer checkpoint whose weights replace the pretrained ones."""
    training_duration: Annotated[Duration, Option(group="training", metavar="DURATION")]
    """`3ep` (epochs), `100ba` (batches) or `1_000_000tok` (tokens); default `1ep`."""
    learning_rate: Annotated[float, Option(group="training", metavar="X")]
    """Peak learning rate; default 5e-7 (1e-5 for Llama 3.1 405B)."""
    context_length: Annotated[int, Option(group="training", metavar="N")]
    """Maximum tokens per row; longer samples are truncated. Default: 8192, or the model's maximum if that is less."""
    validate_inputs: Annotated[bool, Option(group="data")] = True
    """Check every row before accepting the run. Data of up to 8 MB is tokenized as well; what only tokens reveal in
    larger data, and everything if this is false, is checked by the run itself."""
    data_prep_cluster_id: Annotated[str | None, Option(group="data", metavar="MASTER")] = None
    """A Spark master that prepares the data: `spark://host:port`, `sc://host:port` or `local[4]`; default: no Spark."""
    run_name: Annotated[str, Option(group="output", metavar="NAME")]
    """Name of the run; default `<task>-<model>-<6 random characters>`."""
    compute: Compute
    """Where to train, a mapping: `device` ("gpu" or "cpu"), `devices_per_node`; default: all GPUs of this machine, else
    its CPU. For a cluster: `launcher` "slurm", `nodes`, `time_limit`, `grace_s`, and further sbatch options as
    `sbatch`."""
    overrides: Mapping[str, Any] = field(default_factory=dict[str, Any])
    """LLM Foundry keys that replace the defaults, nested or dotted (`optimizer.lr`); merged last."""

    @property
    def registered_name(self) -> str:
        """`catalog.schema.name`; the run's own name where only `catalog.schema` was given."""
        return self.register_to if self.register_to.count(".") == 2 else f"{self.register_to}.{self.run_name}"

    @classmethod
    def read(cls, run: RunFolder) -> "RunSpec":
        """The spec in a run's folder.

        Raises:
            RunDamagedError: it is missing, cannot be read, or belongs to another run.
            RunNotFoundError: the folder no longer exists.
        """

        def parsed(text: bytes) -> RunSpec:
            spec = cls.from_json(text)
            run.check_name(spec.run_name)
            return spec

        return run.read(run.spec, parsed)

    def to_json(self) -> str:
        """The content of `spec.json`."""
        content = {"version": SPEC_VERSION, **dataclasses.asdict(self)}
        return json.dumps(content, indent=2, ensure_ascii=False) + "\n"

    @classmethod
    def from_json(cls, text: str | bytes) -> "RunSpec":
        """Read what `to_json` wrote.

        Raises:
            NewerError: a newer tundish has written it.
            ValueError: it is something else.
        """
        content = object_of(text)
        version = content.pop("version", 1)
        if type(version) is int and version > SPEC_VERSION:
            raise NewerError(
                f"was written by a newer version of tundish (format {version}; tundish {__version__} reads up to "
                f"{SPEC_VERSION})"
            )
        spec = parse(cls, content)
        try:
            moment(spec.created_at)
        except ValueError as error:
            raise ValueError(f"'created_at': {error}") from None
        return spec


@dataclass(frozen=True, kw_only=True, slots=True)
class Arguments:
    """What could be read of the arguments of a call."""

    spec: RunSpec | None
    """None if an argument could not be read; present besides the problems if only overrides are wrong."""
    card: ModelCard | None
    """None if the model is unknown."""
    task_type: TaskType | None
    """None if it is not a task type."""
    data: Mapping[str, Address]
    """Addresses that could be read, by their argument's name."""
    weights: Address | None
    """Of the checkpoint that replaces the model's weights."""
    validate_inputs: bool
    problems: Sequence[str]
    """All that are wrong with the arguments themselves."""


def parse_spec(arguments: Mapping[str, Any], *, created_at: str) -> tuple[RunSpec, ModelCard]:
    """The spec and the model's card.

    Raises:
        SpecError: with every problem of the call.
    """
    read = read_arguments(arguments, created_at=created_at)
    if read.problems or read.spec is None or read.card is None:
        raise SpecError(read.problems)
    return read.spec, read.card


def read_arguments(arguments: Mapping[str, Any], *, created_at: str) -> Arguments:
    """Check the arguments of `create()` and make values of them; the only function that sees them unchecked."""
    problems: list[str] = []

    def attempt(name: str, value: object, read: Callable[[Any], Any]) -> Any:
        try:
            return read(value)
        except SpecError as error:
            problems.extend(f"{name}: {problem.removeprefix(f'{name}: ')}" for problem in error.problems)
        except (ValueError, TypeError) as error:
            problems.append(f"{name}: {error}")
        return None

    def check(name: str, read: Callable[[Any], Any]) -> Any:
        return attempt(name, arguments.get(name), read)

    user = _user()
    card: ModelCard | None = check("model", _read_model)
    task_type: TaskType | None = check("task_type", _read_task)
    run_name = check("run_name", lambda given: _read_run_name(given, task_type or "CHAT_COMPLETION", card))
    train: Address | None = check("train_data_path", lambda given: _address(given, "data") or _required_text(None))
    values: dict[str, Any] = {
        "run_name": run_name,
        "register_to": check("register_to", _read_register_to),
        "experiment_path": check("experiment_path", _optional_text) or f"/Users/{user}/{run_name}",
    }
    evaluation: Address | None = check("eval_data_path", lambda given: _address(given, "data"))
    values["eval_prompts"] = check("eval_prompts", _read_prompts)
    weights: Address | None = check("custom_weights_path", lambda given: _address(given, "checkpoint"))
    values |= {
        "training_duration": check("training_duration", lambda given: Duration.parse(given or "1ep")),
        "learning_rate": check("learning_rate", lambda given: _read_learning_rate(given, card)),
        "context_length": check("context_length", lambda given: _read_context_length(given, card)),
        "validate_inputs": check("validate_inputs", _read_switch),
        "data_prep_cluster_id": check("data_prep_cluster_id", _read_cluster),
        "compute": check("compute", Compute.parse),
    }
    overrides: dict[str, Any] = check("overrides", _read_overrides) or {}
    for key in PATHS:
        if key in overrides:
            overrides[key] = attempt("overrides", overrides[key], lambda given, key=key: _override_path(key, given))
    spec = None
    if not problems and card is not None and task_type is not None and train is not None:
        spec = RunSpec(
            created_by=user, created_at=created_at, model=card.name, task_type=task_type, train_data_path=train.text,
            eval_data_path=None if evaluation is None else evaluation.text, overrides=overrides,
            custom_weights_path=None if weights is None else weights.text, **values,
        )  # fmt: skip
        problems.extend(_device_problems(spec, card))
    problems.extend([*check_overrides(overrides), *unused_overrides(overrides, arguments)])
    addresses = {"train_data_path": train, "eval_data_path": evaluation}
    return Arguments(
        spec=spec,
        card=card,
        task_type=task_type,
        data={argument: address for argument, address in addresses.items() if address is not None},
        weights=weights,
        validate_inputs=values["validate_inputs"] is not False,
        problems=problems,
    )


def _device_problems(spec: RunSpec, card: ModelCard) -> Iterator[str]:
    """Overrides that do not fit the devices."""
    compute = spec.compute
    batch_size = spec.overrides.get(BATCH_SIZE)
    if batch_size is not None and (type(batch_size) is not int or batch_size < 1 or batch_size % compute.devices):
        yield (
            f"overrides: {BATCH_SIZE} must be a multiple of the number of devices, {compute.devices}, "
            f"not {batch_size!r}."
        )
    attention, isolating = spec.overrides.get(ATTENTION), card.isolating_attentions(compute.device)
    if attention is not None and attention not in isolating:
        yield (
            f"overrides: {ATTENTION} must be {' or '.join(isolating)} for {card.family} on a {compute.device}, not "
            f"{attention!r}: packed samples must not see each other."
        )


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        # A container's user that has no entry in the password file.
        return str(os.getuid())


def _read_model(given: object) -> ModelCard:
    address = _address(given, "model")
    if address is None:
        raise ValueError("is missing. Give a supported model's name or a folder of a Hugging Face model.")
    card = find_card(address.text)
    # A folder's card has the folder that a link leads to.
    return card if "${" not in card.name else _fail(f"must not contain '${{', but is {card.name!r}. Rename it.")


def _address(given: object, takes: Takes) -> Address | None:
    if given is None or given == "":
        return None
    if not isinstance(given, str | Path):
        raise ValueError(f"must be text, not {type(given).__name__}.")
    return Address.parse(given, takes)


def _fail(text: str) -> Any:
    raise ValueError(text)


def _required_text(given: object) -> str:
    missing = "is missing." if given is None else "must not be empty."
    return _optional_text(given) or _fail(missing)


def _optional_text(given: object) -> str | None:
    if given is None or given == "":
        return None
    if not isinstance(given, str | Path):
        raise ValueError(f"must be text, not {type(given).__name__}.")
    # LLM Foundry resolves ${…} in its YAML, environment variables included.
    return str(given) if "${" not in str(given) else _fail(f"must not contain '${{', but is {str(given)!r}.")


def _read_task(given: object) -> TaskType:
    allowed = get_args(TaskType)
    if not given:
        return "CHAT_COMPLETION"
    if given not in allowed:
        raise ValueError(f"must be {', '.join(allowed[:-1])} or {allowed[-1]}, not {given!r}.")
    return cast(TaskType, given)


def _read_run_name(given: object, task_type: TaskType, card: ModelCard | None) -> str:
    if given is None:
        source = card.name if card else "model"
        slug = re.sub(r"[^a-z0-9]+", "-", source.rstrip("/").rsplit("/", 1)[-1].lower()).strip("-")[:60]
        suffix = "".join(secrets.choice(string.ascii_lowercase + string.digits) for _ in range(6))
        return f"{TASK_PREFIXES[task_type]}-{slug or 'model'}-{suffix}"
    name = _required_text(given)
    if not RUN_NAME.fullmatch(name):
        raise ValueError(f"must be 1 to 100 letters, digits, '-' and '_', the first a letter or digit, not {name!r}.")
    if RunFolder.of(name).folder.exists():
        raise ValueError(f"run {name!r} already exists. Choose another name, or leave run_name out to get a new one.")
    return name


def _read_register_to(given: object) -> str:
    text = _required_text(given)
    parts = text.split(".")
    if len(parts) not in (2, 3) or not all(re.fullmatch(r"[\w-]+", part) for part in parts):
        raise ValueError(
            f"must be 'catalog.schema' or 'catalog.schema.name', not {text!r}; each part has letters, digits, '_' and "
            "'-'. Unity Catalog requires three parts, so every registry gets them: the run's name is the third where "
            "none is given."
        )
    return text


def _read_prompts(given: object) -> tuple[str, ...]:
    if given is None:
        return ()
    listed = isinstance(given, Iterable) and not isinstance(given, str)
    prompts = tuple(islice(cast(Iterable[Any], given), MOST_PROMPTS + 1)) if listed else ()
    if not listed or not all(isinstance(prompt, str) and prompt for prompt in prompts):
        raise ValueError("must be a list of texts that are not empty. For example ['What is MLflow?'].")
    length = sum(map(len, prompts))
    if len(prompts) > MOST_PROMPTS or length > PROMPT_CHARACTERS:
        size = f"more than {MOST_PROMPTS:,} prompts" if len(prompts) > MOST_PROMPTS else f"{length:,} characters"
        raise ValueError(
            f"must have at most {MOST_PROMPTS:,} prompts and {PROMPT_CHARACTERS:,} characters in total, not {size}: "
            "each prompt is completed at every checkpoint. Give fewer; eval_data_path takes data of any size."
        )
    if any("${" in prompt or prompt == "???" for prompt in prompts):
        raise ValueError("must not contain '${' or be '???': LLM Foundry would resolve them. Write it in another way.")
    return prompts


def _read_learning_rate(given: object, card: ModelCard | None) -> float:
    if given is None or given == "":
        return card.learning_rate if card else math.nan
    try:
        rate = math.nan if isinstance(given, bool) else float(cast(Any, given))
    except (TypeError, ValueError):
        rate = math.nan
    return rate if 0 < rate < math.inf else _fail(f"must be a number above 0, not {given!r}. For example '5e-7'.")


def _read_context_length(given: object, card: ModelCard | None) -> int:
    maximum = card.max_context_length if card else DEFAULT_CONTEXT_LENGTH
    if given is None:
        return min(DEFAULT_CONTEXT_LENGTH, maximum)
    if type(given) is not int or given < 8:
        raise ValueError(f"must be an integer of at least 8, not {given!r}.")
    if card and given > maximum:
        raise ValueError(f"must be at most {maximum}, the maximum of {card.name}, not {given}.")
    return given


def _read_switch(given: object) -> bool:
    if given is None or isinstance(given, bool):
        return given is not False
    raise ValueError(f"must be true or false, not {given!r}.")


def _read_cluster(given: object) -> str | None:
    text = _optional_text(given)
    if text is not None and not re.fullmatch(r"(spark|sc)://.+|local(\[(\d+|\*)\])?", text):
        raise ValueError(
            f"must be spark://host:port, sc://host:port, or local[4] for 4 processes, not {text!r}. Leave it out to "
            "prepare the data on this machine."
        )
    if text is not None and holds_secret(text):
        raise ValueError(
            f"{text!r} contains a password or token, which would be written into the run's files. Remove it."
        )
    return text


def _read_overrides(given: object) -> dict[str, Any]:
    """Every key with its dotted path."""
    if given is None:
        return {}
    if not isinstance(given, Mapping) or not all(isinstance(key, str) for key in cast(Any, given)):
        raise ValueError("must be a mapping of LLM Foundry keys. For example {'global_train_batch_size': 8}.")
    return flat(cast(Mapping[str, Any], given))


def _override_path(key: str, given: object) -> str:
    """The absolute path, or the URI, that an override of PATHS means."""
    try:
        address = _address(given, "folder" if key == "save_folder" else "file")
    except ValueError as error:
        raise ValueError(f"{key}: {error}") from None
    return _required_text(None) if address is None else address.text
