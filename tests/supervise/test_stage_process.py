"""supervise/stage_process.py: a stage runs in a process of its own, and a failed one says why."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tundish.base.run_folder import RunFolder
from tundish.errors import StageError
from tundish.supervise import stage_process
from tundish.supervise.stage_process import Devices, run_stage

pytestmark = pytest.mark.slow


def test_a_stage_that_was_killed_after_its_result_is_done(
    make_run: Callable[..., RunFolder], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run would fail although all is there: loaded libraries take seconds to end, and may crash meanwhile."""
    paths = make_run("chat-1", ("CREATED", "waits"))
    script = f"echo '{{}}' > {paths.result('export')}; kill -9 $$"
    monkeypatch.setattr(stage_process, "_command", lambda *_: (["sh", "-c", script], {}))
    run_stage(paths, "export", Devices())
    assert paths.is_done("export")


def test_a_stage_that_refuses_its_input_is_the_run_s_cause(
    make_run: Callable[..., RunFolder], arguments: dict[str, Any]
) -> None:
    """FAILED would say nothing but an exit code: the sentence that the stage's process wrote must come through."""
    paths = make_run("chat-1", ("CREATED", "waits"))
    Path(arguments["train_data_path"]).unlink()
    with pytest.raises(
        StageError, match=r"^Stage 'prepare' failed: .*train\.jsonl: there is no such file .*Check the path"
    ) as error:
        run_stage(paths, "prepare", Devices())
    assert error.value.log_path == str(paths.log("prepare")) and paths.log("prepare").is_file()
