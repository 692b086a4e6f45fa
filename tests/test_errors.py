"""errors.py: one tree, catchable in the ways that callers use."""

import pickle

import pytest

from tundish import errors


@pytest.mark.parametrize(
    ("kind", "builtin"),
    [
        (errors.SpecError, ValueError),
        (errors.DataError, ValueError),
        (errors.RequestError, ValueError),
        (errors.RunNotFoundError, LookupError),
        (errors.CheckpointError, ValueError),
        (errors.StageError, RuntimeError),
    ],
)
def test_every_error_is_a_tundish_error_and_the_builtin_that_fits(
    kind: type[errors.TundishError], builtin: type[Exception]
) -> None:
    """`except TundishError` or `except ValueError` in a caller's code would miss it."""
    error = kind("train.jsonl: is empty.")
    assert isinstance(error, errors.TundishError) and isinstance(error, builtin)
    assert error.message == str(error) == "train.jsonl: is empty."


def test_one_problem_is_said_as_it_is_and_several_are_listed() -> None:
    """A problem would be lost from the message, or a single one dressed up as a list."""
    assert errors.SpecError(["model: is missing."]).message == "model: is missing."
    several = errors.SpecError(["model: is missing.", "register_to: is missing."])
    assert several.message == "2 problems:\n  - model: is missing.\n  - register_to: is missing."
    assert several.problems == ("model: is missing.", "register_to: is missing.")
    assert errors.DataError("one sentence").problems == ("one sentence",)


@pytest.mark.parametrize(
    "error",
    [
        errors.SpecError(["a", "b"]),
        errors.DataError("c"),
        errors.StageError("d", "/logs/train.log"),
        errors.StageError("d", failure=errors.FailureCause.DIVERGED),
        errors.CheckpointError("e"),
        errors.CheckpointError("f", failure=errors.FailureCause.MODEL_MISMATCH),
        errors.WorkerError("g", 3, "took too long", failure=errors.FailureCause.HOST_OUT_OF_MEMORY),
    ],
)
def test_errors_survive_pickling(error: errors.TundishError) -> None:
    """An error raised in a worker process would arrive without its problems or its log."""
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is type(error) and copy.message == error.message and vars(copy) == vars(error)


def test_names_of_the_original_client_still_catch_what_they_caught() -> None:
    """A notebook's `except` clauses would stop working after its import line is changed."""
    assert issubclass(errors.SpecError, errors.DatabricksGenAIError)
    assert issubclass(errors.RequestError, errors.DatabricksModelTrainingRequestError)
    assert issubclass(errors.RunNotFoundError, errors.DatabricksGenAIResponseError)
    assert issubclass(errors.SpecError, errors.DatabricksGenAIConfigError)
    assert issubclass(errors.DataError, errors.ValidationError)
