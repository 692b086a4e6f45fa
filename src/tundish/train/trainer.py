"""A run's YAML → Composer's Trainer, by LLM Foundry's own builders.

Does what `llmfoundry train` does with the keys that tundish writes, with three differences: FSDP2 stays on with one
rank, so that checkpoints are sharded at every world size; a run with a complete checkpoint in its save folder resumes
from it; and checkpoints are written and read without pickle's code (see `saver` and `resume`).
"""

from pathlib import Path
from typing import Any, cast

import torch
from composer import Callback, Trainer
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
from omegaconf import DictConfig

from tundish.base.run_folder import RunFolder
from tundish.checkpoints.save_folder import SaveFolder
from tundish.tracking.publishing import Checkpoints, Publisher, channels
from tundish.train.gloo import GlooMean, meet_on_loopback, name_interface
from tundish.train.gloo_threads import single_out_gloo
from tundish.train.heartbeat import Heartbeat
from tundish.train.loader import RowOrder
from tundish.train.peers import Peers
from tundish.train.resume import load_all, load_weights, newest_checkpoint
from tundish.train.run_logger import PublishWhileTraining, RunLogger
from tundish.train.saver import Saver
from tundish.train.schedule import StepRates
from tundish.train.stop import StopWhenAsked

# Editable installs do not see entry points that were added after they were made.
registry.callbacks.register("tundish_schedule", func=StepRates)

TRAINER_KEYS = (
    "run_name seed max_duration eval_interval eval_subset_num_batches train_subset_num_batches precision progress_bar "
    "log_to_console console_log_interval device_train_microbatch_size python_log_level dist_timeout compile_config "
    "spin_dataloaders accumulate_train_batch_on_tokens"
).split()
"""LLM Foundry's keys that are arguments of the Trainer by the same name."""


def build_trainer(cfg: DictConfig) -> Trainer:
    """The Trainer of a run's YAML on this rank, with the newest checkpoint or the custom weights loaded.

    Raises:
        CheckpointError: what is to be loaded is damaged, unsafe, or of another model.
    """
    logged, config = make_dataclass_and_log_config(cfg, TrainConfig, TRAIN_CONFIG_KEYS, transforms="all")
    _connect_ranks(config.dist_timeout)
    save_folder = SaveFolder(config.save_folder) if config.save_folder else None
    checkpoint = newest_checkpoint(save_folder) if save_folder else None
    validate_config(config)
    reproducibility.seed_all(config.seed)
    init_context = process_init_device(config.model, config.fsdp_config)
    tokenizer = build_tokenizer(config.tokenizer["name"], config.tokenizer.get("kwargs", {}))
    callbacks = [build_callback(str(name), kwargs, logged) for name, kwargs in (config.callbacks or {}).items()]
    callbacks += _own_callbacks(config, save_folder)
    train_loader = build_dataloader(config.train_loader, tokenizer, config.device_train_batch_size)
    model = build_composer_model(config.model.pop("name"), config.model, tokenizer, init_context)
    trainer = Trainer(
        model=model,
        train_dataloader=train_loader,
        eval_dataloader=_evaluators(config, tokenizer, model),
        optimizers=build_optimizer(model, config.optimizer.pop("name"), config.optimizer),
        schedulers=build_scheduler(config.scheduler.pop("name"), config.scheduler),
        loggers=[_logger(str(name), kwargs) for name, kwargs in (config.loggers or {}).items()],
        callbacks=callbacks,
        algorithms=[build_algorithm(str(name), kwargs) for name, kwargs in (config.algorithms or {}).items()],
        parallelism_config={"fsdp": config.fsdp_config},
        **{key: getattr(config, key) for key in TRAINER_KEYS},
    )
    # Composer's own loading, which may run code from a checkpoint, is never called.
    if checkpoint is not None:
        ignored = [*(config.load_ignore_keys or ()), *(config.save_ignore_keys or ())]
        rng_state = load_all(trainer.state, trainer.logger, checkpoint, ignored)
        trainer._rng_state = rng_state  # pyright: ignore[reportPrivateUsage]  as Composer's own loading does
    elif config.load_path:
        load_weights(trainer.state, trainer.logger, Path(config.load_path), config.load_strict_model_weights)
    # Known only now that the checkpoint is loaded: the loader skips what was trained before.
    order = cast(RowOrder, cast(Any, train_loader.dataloader).sampler)
    order.done = int(trainer.state.timestamp.epoch), int(trainer.state.timestamp.batch_in_epoch)
    return trainer


def _connect_ranks(timeout: float) -> None:
    """Make the process group; `timeout` in seconds, for every exchange between ranks."""
    name_interface()
    meet_on_loopback(timeout)
    dist.initialize_dist(get_device(None), timeout=timeout)
    if torch.distributed.is_initialized() and torch.distributed.get_backend() == "gloo":
        single_out_gloo()


def _own_callbacks(config: TrainConfig, save_folder: SaveFolder | None) -> list[Callback]:
    """Those that no YAML names: the stock `llmfoundry train` does without them."""
    run = RunFolder.of_this_process()
    callbacks = [*GlooMean.where_needed(), *Peers.where_needed(config.dist_timeout)]
    if run is not None:
        callbacks.append(Heartbeat(run.beats))
    if save_folder is not None:
        keep = config.save_num_checkpoints_to_keep
        base_model = config.model.get("pretrained_model_name_or_path")
        ignored = list(config.save_ignore_keys or ())
        callbacks.append(Saver(save_folder, config.save_interval, keep, ignored, base_model))
    publisher = _publisher(config, save_folder)
    callbacks.append(StopWhenAsked(run, publisher))
    if publisher is not None:
        callbacks.append(PublishWhileTraining(publisher))
    return callbacks


def _publisher(config: TrainConfig, save_folder: SaveFolder | None) -> Publisher | None:
    """Uploads metrics, artifacts and checkpoints from the disk, on the first rank; None where there is nothing to."""
    if dist.get_global_rank():
        return None
    run = RunFolder.of_this_process()
    if run is not None and run.result("tracking").exists():
        return Publisher(channels(run), run.events)
    if save_folder is not None and save_folder.is_remote:
        return Publisher([Checkpoints(save_folder, config.save_num_checkpoints_to_keep)], None)
    return None


def _logger(name: str, kwargs: dict[str, Any]) -> LoggerDestination:
    """LLM Foundry's logger of that name, or, for MLflow in a run that has an MLflow run, tundish's own."""
    run = RunFolder.of_this_process()
    if name == "mlflow" and run is not None and run.result("tracking").exists():
        return RunLogger(run, bool(kwargs.get("log_system_metrics")))
    return build_logger(name, kwargs)


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
