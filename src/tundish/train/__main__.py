"""Every rank's entry: `composer -n N -m tundish.train run.yaml`.

Builds Composer's Trainer from LLM Foundry's own builders. It does what `llmfoundry train` does with the keys that
tundish writes, except that FSDP2 stays on with one rank, so that checkpoints are sharded at every world size, and that
a run with a complete checkpoint in its save folder goes on from there.
"""

import os
import signal
import sys
from pathlib import Path
from typing import Any, cast

os.environ.setdefault("FSDP_VERSION", "2")

from tundish.base.processes import die_with_starter
from tundish.base.run_folder import RUN_VARIABLE, RunFolder

if __name__ == "__main__":
    # Before the imports, which take a while. The launcher may be deaf to SIGTERM; its ranks are not.
    die_with_starter(RUN_VARIABLE)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)

import torch
from composer import State, Trainer
from composer.loggers import LoggerDestination
from composer.utils import dist, get_device, reproducibility
from llmfoundry import registry
from llmfoundry.command_utils.train import validate_config
from llmfoundry.data.dataloader import build_dataloader
from llmfoundry.eval.metrics import InContextLearningMetric
from llmfoundry.utils.builders import (
    add_metrics_to_eval_loaders,
    build_algorithm,
    build_callback,
    build_composer_model,
    build_evaluators,
    build_logger,
    build_optimizer,
    build_scheduler,
    build_tokenizer,
)
from llmfoundry.utils.config_utils import (
    TRAIN_CONFIG_KEYS,
    TrainConfig,
    make_dataclass_and_log_config,
    process_init_device,
)
from omegaconf import DictConfig, OmegaConf

from tundish.checkpoints.save_folder import SaveFolder
from tundish.errors import TundishError
from tundish.tracking.notes import tell_plan
from tundish.tracking.publishing import Checkpoints, Publisher, channels, tell_status
from tundish.train.beats import Beats
from tundish.train.gloo import GlooMean, meet_on_loopback, name_interface
from tundish.train.guard import has_learned, nothing_learned
from tundish.train.loader import RowOrder
from tundish.train.peers import Peers
from tundish.train.publish import PublishWhileTraining
from tundish.train.resume import load_all, load_weights, newest_checkpoint
from tundish.train.run_logger import RunLogger
from tundish.train.saver import Saver
from tundish.train.schedule import StepRates
from tundish.train.stop import StopWhenAsked
from tundish.train.threads import single_out_gloo

# Its entry point is for stock LLM Foundry; an installation that people edit in does not see new ones.
registry.callbacks.register("tundish_schedule", func=StepRates)

TRAINER_KEYS = (
    "run_name seed max_duration eval_interval eval_subset_num_batches train_subset_num_batches precision progress_bar "
    "log_to_console console_log_interval device_train_microbatch_size python_log_level dist_timeout compile_config "
    "spin_dataloaders accumulate_train_batch_on_tokens"
).split()
"""Keys of LLM Foundry's that are the Trainer's arguments by the same name."""


def build_trainer(cfg: DictConfig) -> Trainer:
    """The Trainer of a run's YAML, on this rank."""
    logged, config = make_dataclass_and_log_config(cfg, TrainConfig, TRAIN_CONFIG_KEYS, transforms="all")
    name_interface()
    meet_on_loopback(config.dist_timeout)
    dist.initialize_dist(get_device(None), timeout=config.dist_timeout)
    if torch.distributed.is_initialized() and torch.distributed.get_backend() == "gloo":
        single_out_gloo()
    place = SaveFolder(config.save_folder) if config.save_folder else None
    checkpoint = newest_checkpoint(place) if place else None
    validate_config(config)
    reproducibility.seed_all(config.seed)
    fsdp = config.fsdp_config
    init_context = process_init_device(config.model, fsdp)
    tokenizer = build_tokenizer(config.tokenizer["name"], config.tokenizer.get("kwargs", {}))
    callbacks = [build_callback(str(name), kwargs, logged) for name, kwargs in (config.callbacks or {}).items()]
    savers = [_saver(config, place)] if place else []
    publisher = _publisher(config, place)
    ends = [
        StopWhenAsked(RunFolder.of_this_process(), publisher),
        *([PublishWhileTraining(publisher)] if publisher else []),
    ]
    train_loader = build_dataloader(config.train_loader, tokenizer, config.device_train_batch_size)
    model_name = config.model.pop("name")
    model = build_composer_model(model_name, config.model, tokenizer, init_context)
    optimizer = build_optimizer(model, config.optimizer.pop("name"), config.optimizer)
    scheduler = build_scheduler(config.scheduler.pop("name"), config.scheduler)
    trainer = Trainer(
        model=model,
        train_dataloader=train_loader,
        eval_dataloader=_evaluators(config, tokenizer, model),
        optimizers=optimizer,
        schedulers=scheduler,
        loggers=[_logger(str(name), kwargs) for name, kwargs in (config.loggers or {}).items()],
        callbacks=[
            *callbacks,
            *GlooMean.where_needed(),
            *Peers.where_needed(config.dist_timeout),
            *_beats(),
            *savers,
            *ends,
        ],
        algorithms=[build_algorithm(str(name), kwargs) for name, kwargs in (config.algorithms or {}).items()],
        parallelism_config={"fsdp": fsdp},
        **{key: getattr(config, key) for key in TRAINER_KEYS},
    )
    _load(trainer, config, checkpoint)
    order = cast(RowOrder, cast(Any, train_loader.dataloader).sampler)
    order.done = int(trainer.state.timestamp.epoch), int(trainer.state.timestamp.batch_in_epoch)
    return trainer


def _beats() -> list[Beats]:
    """Where a supervisor has started this process, and looks at them."""
    run = RunFolder.of_this_process()
    return [Beats(run.beats)] if run else []


def _logger(name: str, kwargs: dict[str, Any]) -> LoggerDestination:
    """LLM Foundry's of that name; in a run that MLflow knows, its own for MLflow."""
    run = RunFolder.of_this_process()
    if name == "mlflow" and run is not None and run.result("tracking").exists():
        return RunLogger(run, bool(kwargs.get("log_system_metrics")))
    return build_logger(name, kwargs)


def _publisher(config: TrainConfig, place: SaveFolder | None) -> Publisher | None:
    """Of the first rank: sends on what waits on the disk."""
    if dist.get_global_rank():
        return None
    run = RunFolder.of_this_process()
    if run is not None and run.result("tracking").exists():
        return Publisher(channels(run), run.events)
    elsewhere = place is not None and place.is_remote
    return Publisher([Checkpoints(place, config.save_num_checkpoints_to_keep)], None) if place and elsewhere else None


def _saver(config: TrainConfig, place: SaveFolder) -> Saver:
    keep = config.save_num_checkpoints_to_keep
    base = config.model.get("pretrained_model_name_or_path")
    return Saver(place, config.save_interval, keep, list(config.save_ignore_keys or ()), base)


def _load(trainer: Trainer, config: TrainConfig, checkpoint: Path | None) -> None:
    """Load what the run goes on from, or starts from. Composer's own loading, which may run code, is never called."""
    if checkpoint is not None:
        ignored = [*(config.load_ignore_keys or ()), *(config.save_ignore_keys or ())]
        rng_state = load_all(trainer.state, trainer.logger, checkpoint, ignored)
        trainer._rng_state = rng_state  # pyright: ignore[reportPrivateUsage]  as Composer's own loading does
    elif config.load_path:
        load_weights(trainer.state, trainer.logger, Path(config.load_path), config.load_strict_model_weights)


def _evaluators(config: TrainConfig, tokenizer: Any, model: Any) -> list[Any] | None:
    if config.eval_loader is None:
        return None
    evaluators, _, _ = build_evaluators(
        config.eval_loader,
        None,
        None,
        tokenizer=tokenizer,
        device_eval_batch_size=config.device_eval_batch_size,
        icl_seq_len=config.max_seq_len,
        icl_subset_num_batches=None,
    )
    # In-context-learning metrics need batches of their own kind.
    metrics = model.get_metrics(is_train=False).items()
    names = [name for name, metric in metrics if not isinstance(metric, InContextLearningMetric)]
    return add_metrics_to_eval_loaders(evaluators, names)


def main() -> None:
    """Train the YAML named on the command line."""
    cfg = OmegaConf.load(sys.argv[1])
    assert isinstance(cfg, DictConfig)
    # Publishing tries again by itself, and may not hold up the end of training for long.
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    try:
        trainer = build_trainer(cfg)
        _tell_mlflow("RUNNING")
        if not _is_done(trainer.state):
            trainer.fit()
        elif not has_learned():
            raise nothing_learned(trainer.state)
        trainer.close()
    except Exception as error:
        if isinstance(error, TundishError):
            _note(error)
        _tell_mlflow("FAILED")
        raise
    _tell_mlflow("FINISHED")
    _note({"batches": int(trainer.state.timestamp.batch), "tokens": int(trainer.state.timestamp.token)})


def _tell_mlflow(status: str) -> None:
    """What a run is; its status where it has no supervisor, as a folder for hosts that are started by hand."""
    run = RunFolder.of_this_process()
    if run is None or dist.get_global_rank():
        return
    if run.spec.is_file() and status == "RUNNING":
        tell_plan(run)
    elif not run.spec.is_file() and run.result("tracking").exists():
        tell_status(run, status)


def _note(result: dict[str, Any] | TundishError) -> None:
    """Leave the result of the stage, or why it failed, in the run folder."""
    run = RunFolder.of_this_process()
    if run is None:
        return
    if isinstance(result, TundishError):  # on any rank: a refusal may reach another one before the first
        run.write_error("train", result.message, result.failure)
    elif dist.get_global_rank() == 0:
        run.write_result("train", result)


def _is_done(state: State) -> bool:
    """Whether a run that was killed had nothing left to train."""
    duration = state.max_duration
    return duration is not None and state.timestamp.get(duration.unit) >= duration


if __name__ == "__main__":
    main()
