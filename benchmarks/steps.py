"""Sides of `make bench-train`: `python -m benchmarks.steps SIDE ARGUMENTS RESULT`, one side a process."""

import os
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

import orjson

from benchmarks.processes import free_port
from benchmarks.sides import Facts

# One rank, as the composer launcher sets it.
ONE_RANK = {
    **{name: "0" for name in ("RANK", "LOCAL_RANK", "NODE_RANK")},
    **{name: "1" for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE")},
    "MASTER_ADDR": "127.0.0.1",
}
WARM_UP_STEPS = 2
IGNORED = -100
TENSORS = ("input_ids", "labels", "position_ids", "segment_ids")


def _clock_type() -> Any:
    """A callback class that records when each step ended, and the tokens of its batch."""
    from composer import Callback, Logger, State

    class Clock(Callback):
        def __init__(self) -> None:
            self.times, self.tokens, self.targets = list[float](), list[int](), list[int]()

        def batch_start(self, state: State, logger: Logger) -> None:
            self.tokens.append(sum(state.batch.get("total_tokens", [state.batch["labels"].numel()])))
            self.targets.append(int((state.batch["labels"] != IGNORED).sum()))

        def batch_end(self, state: State, logger: Logger) -> None:
            self.times.append(time.perf_counter())

    return Clock


def _speeds(clock: Any, skip: int) -> Facts:
    """Tokens and targets per second of all steps after the first `skip`, including waits for the loader."""
    seconds = clock.times[-1] - clock.times[skip - 1]
    return {"seconds": seconds, "tokens": sum(clock.tokens[skip:]), "targets": sum(clock.targets[skip:])}


def _trainer(file: str) -> Any:
    from omegaconf import OmegaConf

    from tundish.train.trainer import build_trainer

    return build_trainer(OmegaConf.load(file))  # pyright: ignore[reportArgumentType]


def ours(file: str) -> Facts:
    """A whole training run of ours."""
    trainer, clock = _trainer(file), _clock_type()()
    trainer.state.callbacks.append(clock)
    trainer.fit()
    trainer.close()
    return _speeds(clock, WARM_UP_STEPS)


def foundry(file: str) -> Facts:
    """The same by `llmfoundry train`."""
    from llmfoundry.command_utils import train
    from llmfoundry.registry import callbacks
    from omegaconf import OmegaConf

    os.chdir(tempfile.mkdtemp())  # it writes files to the working directory
    kind = _clock_type()
    callbacks.register("clock", func=kind)
    trainer = train(OmegaConf.load(file))  # pyright: ignore[reportArgumentType]
    return _speeds(next(each for each in trainer.state.callbacks if isinstance(each, kind)), WARM_UP_STEPS)


def by_turns(file: str, epochs: int) -> Facts:
    """Our step and a bare loop in one process, an epoch of each by turns, on the same batches."""
    from omegaconf import OmegaConf

    trainer, bare = _trainer(file), Bare(cast(dict[str, Any], OmegaConf.to_container(OmegaConf.load(file))))
    callbacks, kind = list(trainer.state.callbacks), _clock_type()

    def epoch() -> Facts:
        clock = kind()
        trainer.state.callbacks = [*callbacks, clock]
        trainer.fit(duration="1ep")
        return _speeds(clock, 1)

    sides = {"ours": epoch, "bare": bare.epoch}
    # The sides take turns in going first, so that a slow phase of the machine hits both.
    results = [{name: sides[name]() for name in sorted(sides, reverse=bool(turn % 2))} for turn in range(epochs + 1)]
    trainer.close()
    return {"epochs": results[1:]}


class Bare:
    """A plain PyTorch loop: the same model, batches, microbatches, masks, loss and optimizer."""

    def __init__(self, cfg: Mapping[str, Any]) -> None:
        from llmfoundry.optim import DecoupledLionW
        from transformers import AutoModelForCausalLM, AutoTokenizer

        from tundish.train.loader import build_packed_dataloader

        name, self.rows = cfg["model"]["pretrained_model_name_or_path"], cfg["device_train_microbatch_size"]
        self.attention = cfg["model"]["attn_implementation"]
        model: Any = AutoModelForCausalLM.from_pretrained(name, attn_implementation=self.attention)
        self.model = model.train()
        self.optimizer = DecoupledLionW(self.model.parameters(), lr=cfg["optimizer"]["lr"], betas=(0.99, 0.95))
        tokenizer, size = AutoTokenizer.from_pretrained(name), cfg["global_train_batch_size"]
        self.loader = build_packed_dataloader(tokenizer, size, cfg["train_loader"]["dataset"]).dataloader

    def epoch(self) -> Facts:
        """Train an epoch; tokens per second of all steps but the first."""
        times, tokens, targets = list[float](), list[int](), list[int]()
        for batch in self.loader:
            tokens.append(sum(batch["total_tokens"]))
            targets.append(self._step({name: batch[name] for name in TENSORS}))
            times.append(time.perf_counter())
        return {"seconds": times[-1] - times[0], "tokens": sum(tokens[1:]), "targets": sum(targets[1:])}

    def _step(self, batch: Mapping[str, Any]) -> int:
        from torch.nn.functional import cross_entropy, pad

        from tundish.train.attention import attention_mask

        labels = batch["labels"][:, 1:]
        targets = int((labels != IGNORED).sum())
        for start in range(0, len(labels), self.rows):
            part = {name: tensor[start : start + self.rows] for name, tensor in batch.items()}
            mask = attention_mask(part["segment_ids"], self.attention)
            logits = self.model(part["input_ids"], attention_mask=mask, position_ids=part["position_ids"]).logits
            wanted = pad(part["labels"][:, 1:], (0, 1), value=IGNORED).reshape(-1)
            scores = logits.reshape(len(wanted), -1)
            loss = cross_entropy(scores, wanted, ignore_index=IGNORED, reduction="sum") / targets
            loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return targets


def optimizers(layers: int, hidden: int, rounds: int) -> Facts:
    """Seconds of each step of our DecoupledLionW and of LLM Foundry's, on weights that FSDP2 has sharded."""
    import torch
    from llmfoundry.optim import DecoupledLionW as FoundryLion
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from transformers import LlamaConfig, LlamaForCausalLM

    from tundish.train.lion import DecoupledLionW

    torch.distributed.init_process_group("gloo")
    config = LlamaConfig(
        hidden_size=hidden, intermediate_size=3 * hidden, num_hidden_layers=layers, num_attention_heads=4,
        vocab_size=1000,
    )  # fmt: skip
    model: Any = LlamaForCausalLM(config)
    mesh = init_device_mesh("cpu", (1,))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    sides = {"ours": DecoupledLionW, "foundry": FoundryLion}
    made = {name: kind(model.parameters(), lr=1e-6, betas=(0.99, 0.95)) for name, kind in sides.items()}
    results: Facts = {name: [] for name in made}
    for _ in range(rounds):
        for name, optimizer in made.items():
            start = time.perf_counter()
            optimizer.step()
            results[name].append(time.perf_counter() - start)
    sizes = [parameter.numel() for parameter in model.parameters()]
    return {**{name: times[1:] for name, times in results.items()}, "tensors": len(sizes), "parameters": sum(sizes)}


SIDES: dict[str, Callable[..., Facts]] = {side.__name__: side for side in (ours, foundry, by_turns, optimizers)}

if __name__ == "__main__":
    os.environ.update({**ONE_RANK, "MASTER_PORT": str(free_port())})
    _, name, arguments, result = sys.argv
    Path(result).write_bytes(orjson.dumps(SIDES[name](**orjson.loads(arguments))))
