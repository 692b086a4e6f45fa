"""foundation_model.py: a notebook changes its import line and nothing else."""

import dataclasses
import inspect
import pickle
import re
from collections.abc import Callable
from typing import Any

import pytest

from tundish import foundation_model as fm
from tundish.base.run_folder import RunFolder
from tundish.plan.options import documented_fields
from tundish.plan.spec import RunSpec

ORIGINAL_CREATE: dict[str, Any] = {
    "model": inspect.Parameter.empty,
    "train_data_path": inspect.Parameter.empty,
    "register_to": inspect.Parameter.empty,
    "experiment_path": "",
    "task_type": "CHAT_COMPLETION",
    "eval_data_path": None,
    "eval_prompts": None,
    "custom_weights_path": None,
    "training_duration": None,
    "learning_rate": None,
    "context_length": None,
    "validate_inputs": True,
    "data_prep_cluster_id": None,
}


def test_create_takes_what_the_original_took() -> None:
    """A notebook's call would raise TypeError, or mean another default."""
    parameters = inspect.signature(fm.create).parameters
    names = list(parameters)
    assert {name: parameters[name].default for name in names[: len(ORIGINAL_CREATE)]} == ORIGINAL_CREATE
    assert all(parameters[name].kind is inspect.Parameter.KEYWORD_ONLY for name in names[3:])
    assert set(names[len(ORIGINAL_CREATE) :]) >= {"run_name", "compute", "overrides"}


@pytest.mark.parametrize(
    ("verb", "parameters"),
    [
        (
            "list",
            dict.fromkeys(["training_runs", "experiment_id", "statuses", "user_emails", "before", "after"])
            | {"include_details": True, "limit": 100},
        ),
        ("cancel", {"runs": None, "experiment_id": None}),
        ("get", {"training_run": inspect.Parameter.empty}),
        ("get_events", {"training_run": inspect.Parameter.empty, "follow": False}),
        ("get_checkpoints", {"training_run": inspect.Parameter.empty}),
        ("get_models", {}),
    ],
)  # fmt: skip
def test_the_other_verbs_take_what_the_original_s_took(verb: str, parameters: dict[str, Any]) -> None:
    """A notebook's call would raise TypeError, or mean another default."""
    assert verb in fm.__all__
    found = inspect.signature(getattr(fm, verb)).parameters
    assert {name: parameter.default for name, parameter in found.items()} == parameters


def test_create_s_signature_and_docstring_are_the_fields_of_the_spec() -> None:
    """`help(fm.create)` and `tundish create --help` would describe different arguments."""
    fields = {field.name: field for field in documented_fields(RunSpec) if not field.name.startswith("created_")}
    parameters = inspect.signature(fm.create).parameters
    assert list(fields) == list(parameters)
    section = inspect.cleandoc(fm.create.__doc__ or "").partition("Args:\n")[2].partition("\n\n")[0]
    texts = re.findall(r"^    (\w+): (.*(?:\n {8}.*)*)", section, flags=re.MULTILINE)
    assert [(name, " ".join(text.split())) for name, text in texts] == [(name, fields[name].text) for name in fields]
    required = [name for name, parameter in parameters.items() if parameter.default is inspect.Parameter.empty]
    assert required == [name for name, field in fields.items() if field.option and field.option.required]
    assert [name for name, field in fields.items() if field.option is None] == ["compute", "overrides"]


def test_models_are_what_callers_do_with_them() -> None:
    """`fm.get_models().to_pandas()["name"].to_list()` is how notebooks ask for the names."""
    models = fm.get_models()
    names = models.to_pandas()["name"].to_list()
    assert len(models) == len(names) == 35 and "meta-llama/Meta-Llama-3.1-8B-Instruct" in names
    first = models[0]
    assert (first.name, first.display_name, first.max_context_length) == ("databricks/dbrx-base", "DBRX Base", 32768)


def test_every_verb_is_public() -> None:
    """`from tundish.foundation_model import *` would leave a verb out."""
    verbs = {name for name, verb in vars(fm).items() if inspect.isfunction(verb) and verb.__module__ == fm.__name__}
    assert {name for name in verbs if not name.startswith("_")} == set(fm.__all__) - {"TrainingRun"}


def test_every_verb_returns_runs_that_have_verbs(make_run: Callable[..., RunFolder]) -> None:
    """`fm.list()[0].wait()` would raise AttributeError, or a pickled run could not be read again."""
    make_run("ift-1", ("CREATED", "waits"), ("COMPLETED", "done"))
    run = fm.get("ift-1")
    again = [run.refresh(), run.wait(), fm.list()[0], pickle.loads(pickle.dumps(run)), dataclasses.replace(run)]
    assert [type(one) for one in again] == [fm.TrainingRun] * 5 and again[-1] == run
    assert {(one.name, one.status, one.run_id, one.completed_at) for one in again} == {
        (run.name, run.status, run.run_id, run.completed_at)
    }
    assert repr(run) == "TrainingRun(name='ift-1', status=COMPLETED, details='done')"
    assert [event.message for event in run.get_events()] == ["waits", "done"] and run.cancel() == 0
