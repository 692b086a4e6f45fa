"""The model's answers to the eval prompts at every checkpoint, logged to MLflow with their step.

Composer's own `Generate` logs no step and leaves the tokenizer changed when generation fails. This one leaves
training unchanged: mode, random state and tokenizer.
"""

import dataclasses
import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from composer import Callback, Logger, State
from composer.callbacks import CheckpointSaver
from composer.core import get_precision_context
from composer.utils import dist, reproducibility
from torch.distributed.fsdp import FSDPModule

from tundish.plan.spec import ANSWER_TOKENS
from tundish.train.saver import checkpoint_name

log = logging.getLogger(__name__)

GENERATION = {"max_new_tokens": ANSWER_TOKENS, "do_sample": True, "temperature": 1.0, "top_k": 50, "top_p": 0.95}
"""The managed service's settings."""
SEED = 17
NO_ANSWER = "[not answered: earlier prompts took all the time]"


class EvalPrompts(Callback):
    """Registered with LLM Foundry as the callback `tundish_eval_prompts`; works with Composer's saver as well.

    Args:
        prompts: texts to continue.
        max_seconds: for all prompts together at one checkpoint. Weights that are spread over many devices are gathered
            for every token, which may take long; later prompts get NO_ANSWER, and training continues.
    """

    def __init__(self, prompts: Sequence[str] = (), max_seconds: float = 300) -> None:
        self.prompts, self.max_seconds = list(prompts), max_seconds
        self._answered_batch: int | None = None
        """The latest batch whose checkpoint was answered for."""

    def fit_start(self, state: State, logger: Logger) -> None:
        """Move behind the saver, which LLM Foundry sorts to the end."""
        state.callbacks = [callback for callback in state.callbacks if callback is not self] + [self]
        if int(state.timestamp.batch):
            self._answered_batch = int(state.timestamp.batch)  # before the run was killed

    def batch_checkpoint(self, state: State, logger: Logger) -> None:
        """Answer where the saver has just saved this batch."""
        self._answer_if_saved(state, logger)

    def epoch_checkpoint(self, state: State, logger: Logger) -> None:
        """Answer where the saver has just saved this batch."""
        self._answer_if_saved(state, logger)

    def _answer_if_saved(self, state: State, logger: Logger) -> None:
        saver = next((callback for callback in state.callbacks if isinstance(callback, CheckpointSaver)), None)
        batch = int(state.timestamp.batch)
        if not self.prompts or saver is None or saver.last_checkpoint_batch != batch or self._answered_batch == batch:
            return
        self._answered_batch = batch
        started = time.monotonic()
        # On every rank: a sharded model generates on all of them together. Rank 0 logs.
        outputs = generate(state, self.prompts, self.max_seconds)
        name = checkpoint_name(state.timestamp)
        rows = [[batch, name, *pair] for pair in zip(self.prompts, outputs, strict=True)]
        # Rows of later checkpoints are appended to the same table.
        logger.log_table(columns=["step", "checkpoint", "prompt", "output"], rows=rows, name="eval_prompts")
        answered = sum(output != NO_ANSWER for output in outputs)
        log.info("Answered %d of %d eval prompts in %.1f s.", answered, len(rows), time.monotonic() - started)


def generate(state: State, prompts: list[str], max_seconds: float) -> list[str]:
    """The model's continuation of each prompt, without special tokens; the same at any world size.

    An answer that is not complete after `max_seconds` is cut off; later prompts have NO_ANSWER.
    """
    model: Any = state.model.module if state.is_model_ddp else state.model
    tokenizer = model.tokenizer
    padding = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    outputs: list[str] = []
    ends = time.monotonic() + max_seconds
    with _undisturbed(model), _inputs_as_given(model), torch.no_grad(), get_precision_context(state.precision):
        for prompt in prompts:
            left = _of_first_rank(ends - time.monotonic())
            if left <= 0:
                outputs.append(NO_ANSWER)
                continue
            # A prompt that a chat template made begins with the bos token already.
            begun = bool(tokenizer.bos_token) and prompt.startswith(tokenizer.bos_token)
            encoded = tokenizer(prompt, add_special_tokens=not begun)["input_ids"]
            ids = state.device.tensor_to_device(torch.tensor([encoded]))
            # One prompt at a time needs no padding, and so no mask that differs between attentions.
            arguments: dict[str, Any] = {"attention_mask": torch.ones_like(ids), "pad_token_id": padding, **GENERATION}
            arguments |= {"use_cache": True, "max_time": left, "synced_gpus": dist.get_world_size() > 1}
            whole = model.generate(ids, **arguments)
            outputs.append(tokenizer.decode(whole[0, ids.shape[1] :], skip_special_tokens=True))
    return outputs


def _of_first_rank(seconds: float) -> float:
    """Clocks differ, and every rank must answer the same prompts."""
    shared = [seconds]
    dist.broadcast_object_list(shared, src=0)
    return shared[0]


@contextmanager
def _undisturbed(model: torch.nn.Module) -> Iterator[None]:
    """Evaluation mode and a fixed seed on every rank; restores mode and random state, also after an error."""
    mode, random_state = model.training, reproducibility.get_rng_state()[dist.get_global_rank()]
    config: Any = getattr(model, "config", None)
    attention = getattr(config, "_attn_implementation", None)
    model.eval()
    reproducibility.seed_all(SEED)
    if attention == "flex_attention":
        # Its block mask does not support decoding token by token from a cache.
        config._attn_implementation = "sdpa"
    try:
        yield
    finally:
        if attention == "flex_attention":
            config._attn_implementation = attention
        model.train(mode)
        _restore(random_state)


@contextmanager
def _inputs_as_given(model: torch.nn.Module) -> Iterator[None]:
    """Stop FSDP2 from casting, and so copying, the inputs of each layer."""
    # What a layer adds to a copy of the cache would be lost. Nothing else changes: what one layer passes to the next
    # has the type of the parameters already.
    parts: list[Any] = [part for part in model.modules() if isinstance(part, FSDPModule)]
    states: list[Any] = [part._get_fsdp_state() for part in parts]
    policies = [state._mp_policy for state in states]
    for state, policy in zip(states, policies, strict=True):
        state._mp_policy = dataclasses.replace(policy, cast_forward_inputs=False)
    try:
        yield
    finally:
        for state, policy in zip(states, policies, strict=True):
            state._mp_policy = policy


def _restore(state: dict[str, Any]) -> None:
    import random

    import numpy as np

    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.random.set_rng_state(state["torch"])
    if "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"])
