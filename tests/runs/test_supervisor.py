"""runs/supervisor.py: a failed stage says why, in one sentence."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tundish.errors import StageError
from tundish.paths import RunPaths
from tundish.runs.supervisor import last_error, run_stage

TRACEBACK = """\
Traceback (most recent call last):
  File "/x/train.py", line 3, in <module>
    raise ValueError("first")
ValueError: first

During handling of the above exception, another exception occurred:

Traceback (most recent call last):
  File "/x/train.py", line 5, in <module>
    main()
torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB.
"""
LAUNCHER = """\
ERROR:composer.cli.launcher:Rank 0 crashed with exit code 1.
Waiting up to 30 seconds for all training processes to terminate. Press Ctrl-C to exit immediately.
Global rank 0 (PID 4242) exited with code 1
Error occurred. Press Ctrl-C to exit.
"""


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (TRACEBACK, "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB."),
        (TRACEBACK + LAUNCHER, "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB."),
        ("[rank1]: Traceback (most recent call last):\n[rank1]: RuntimeError: boom\n", "RuntimeError: boom"),
        ("KeyboardInterrupt\n", "KeyboardInterrupt"),
        ("tundish.errors.DataError: train.jsonl is gone\r\n", "tundish.errors.DataError: train.jsonl is gone"),
        ("a.b_c.MyException: x\nINFO: closing\n", "a.b_c.MyException: x"),
    ],
)
def test_the_last_exception_of_a_log_is_the_cause(text: str, found: str) -> None:
    """The user would read the launcher's words, or the first of several errors, instead of the cause."""
    assert last_error(text) == found


@pytest.mark.parametrize(
    "text",
    ["", LAUNCHER, "INFO: 0 Errors\nan Error: in a sentence\n  ValueError: quoted and indented\nExitStack closed\n"],
)
def test_a_log_without_an_exception_has_no_cause(text: str) -> None:
    """Any line with the word error in it would be called the cause."""
    assert last_error(text) is None


def test_a_stage_that_refuses_its_input_is_the_run_s_cause(
    make_run: Callable[..., RunPaths], arguments: dict[str, Any]
) -> None:
    """FAILED would say nothing but an exit code: the sentence that the stage's process wrote must come through."""
    paths = make_run("chat-1", ("CREATED", "waits"))
    Path(arguments["train_data_path"]).unlink()
    with pytest.raises(
        StageError, match=r"^Stage 'prepare' failed: .*train\.jsonl: there is no such file .*Check the path"
    ) as error:
        run_stage(paths, "prepare")
    assert error.value.log_path == str(paths.log("prepare")) and paths.log("prepare").is_file()
