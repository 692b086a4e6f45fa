"""The entry point of every rank: `composer -n N -m tundish.train run.yaml`.

Trains a run's YAML to its end and leaves the stage's result in the run folder. See `trainer` for what is built.
"""

import os
import signal
import sys
from typing import Any

# LLM Foundry uses FSDP2 only where this is set when it is imported.
os.environ.setdefault("FSDP_VERSION", "2")

from tundish.base.processes import die_with_starter
from tundish.base.run_folder import RUN_VARIABLE, RunFolder

if __name__ == "__main__":
    # Before the imports below, which take 10 to 20 s. The launcher may ignore SIGTERM; its ranks must not.
    die_with_starter(RUN_VARIABLE)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)

from composer import State
from composer.utils import dist
from omegaconf import DictConfig, OmegaConf

from tundish.errors import TundishError
from tundish.tracking.notes import log_plan
from tundish.tracking.publishing import set_status
from tundish.train.guard import has_learned, nothing_learned
from tundish.train.trainer import build_trainer


def main() -> None:
    """Train the YAML named on the command line."""
    cfg = OmegaConf.load(sys.argv[1])
    assert isinstance(cfg, DictConfig)
    # The publisher retries by itself; MLflow's own retries would delay the end of training.
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    try:
        trainer = build_trainer(cfg)
        _report_status("RUNNING")
        if not _is_done(trainer.state):
            trainer.fit()
        elif not has_learned():
            # Killed after its last checkpoint, before LossGuard could fail it.
            raise nothing_learned(trainer.state)
        trainer.close()
    except Exception as error:
        if isinstance(error, TundishError):
            _write_error(error)
        _report_status("FAILED")
        raise
    _report_status("FINISHED")
    _write_result({"batches": int(trainer.state.timestamp.batch), "tokens": int(trainer.state.timestamp.token)})


def _report_status(status: str) -> None:
    """Log the plan of a run that starts; set the MLflow status of a run that has no supervisor to do so."""
    run = RunFolder.of_this_process()
    if run is None or dist.get_global_rank():
        return
    supervised = run.spec.is_file()
    if supervised and status == "RUNNING":
        log_plan(run)
    elif not supervised and run.result("tracking").exists():
        set_status(run, status)


def _write_result(result: dict[str, Any]) -> None:
    if (run := RunFolder.of_this_process()) is not None and dist.get_global_rank() == 0:
        run.write_result("train", result)


def _write_error(error: TundishError) -> None:
    # On any rank: an error may reach another rank before the first one.
    if (run := RunFolder.of_this_process()) is not None:
        run.write_error("train", error.message, error.failure)


def _is_done(state: State) -> bool:
    """Whether a run was killed after its last batch."""
    duration = state.max_duration
    return duration is not None and state.timestamp.get(duration.unit) >= duration


if __name__ == "__main__":
    main()
