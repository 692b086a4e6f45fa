"""train/schedule.py, train/guard.py: every step is taken at its own rate, and a run that changes nothing has failed."""

import gc
import json
import math
import signal
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from tests.train.conftest import Trained, weights

from tundish.checkpoints.folder import MODEL_PREFIX

pytestmark = pytest.mark.slow

Plan = Callable[..., Path]


def _plain_loop(file: Path, multiplier: Callable[[int], float]) -> dict[str, Any]:
    """The weights after training a run's rows in their order, by PyTorch alone."""
    import torch
    from llmfoundry.optim import DecoupledLionW
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from tundish.train.loader import build_packed_dataloader
    from tundish.train.model import target_loss

    content = yaml.safe_load(file.read_text())
    folder = content["model"]["pretrained_model_name_or_path"]
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="sdpa")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    loader: Any = build_packed_dataloader(tokenizer, 4, content["train_loader"]["dataset"]).dataloader
    optimizer = DecoupledLionW(model.parameters(), lr=content["optimizer"]["lr"], betas=(0.99, 0.95), weight_decay=0.0)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, multiplier)
    for epoch in range(int(content["max_duration"].removesuffix("ep"))):
        loader.sampler.set_epoch(epoch)
        for batch in loader:
            segments = batch["segment_ids"]
            # [B, 1, T, T]: a token sees those before it in its own sample.
            sees = (segments[:, None, :] == segments[:, :, None]).tril()[:, None]
            mask = torch.zeros(sees.shape).masked_fill(~sees, torch.finfo(torch.float32).min)
            logits = model(batch["input_ids"], attention_mask=mask, position_ids=batch["position_ids"]).logits
            target_loss(logits, batch["labels"]).backward()
            optimizer.step()
            optimizer.zero_grad()
            scheduler.step()
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def test_a_run_is_what_plain_pytorch_makes_of_the_formula(ranks: Any, plan: Plan, tmp_path: Path) -> None:
    """Two steps would be taken at a rate of 0 and all others one late: other weights than the recipe says."""
    # A warm-up of several steps, as long runs have.
    file = plan("run", training_duration="3ep", learning_rate=1e-3, overrides={"scheduler.t_warmup": "3ba"})
    trained: Trained = ranks.train(file, 1, tmp_path / "out")
    assert trained.ok, trained.log[-3000:]
    steps = len(trained.rates)
    assert steps > 6

    def multiplier(step: int) -> float:
        return min((step + 1) / 3, (steps - step) / (steps - 3), 1)

    assert trained.rates == pytest.approx([1e-3 * multiplier(step) for step in range(steps)])
    prefix = f"{MODEL_PREFIX}model."
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of imports, and of Streaming, which leaves its index open
        expected = _plain_loop(file, multiplier)
        gc.collect()
    found = {name.removeprefix(prefix): tensor for name, tensor in weights(file).items() if name.startswith(prefix)}
    assert found.keys() == expected.keys()
    total = sum(tensor.numel() for tensor in found.values())
    # Lion takes the sign: where a sum in another order turns one, a weight differs by twice a step's rate.
    differing = sum(int(((found[name] - expected[name]).abs() > 1e-5).sum()) for name in found)
    assert differing < total / 1000, f"{differing:,} of {total:,} weights"


def test_another_schedule_and_a_run_that_goes_on_are_in_time(ranks: Any, plan: Plan, tmp_path: Path) -> None:
    """Callers' own schedules would be a step late as ever; after a kill, a step be taken at the rate of another."""
    overrides = {"scheduler": {"name": "cosine_with_warmup", "t_warmup": "2ba", "alpha_f": 0.1}}
    file = plan("run", training_duration="8ba", learning_rate=1e-3, overrides=overrides)
    first: Trained = ranks.train(file, 1, tmp_path / "first", KILL_RANK=0, KILL_AT=5, KILL_WHEN="batch")
    assert first.codes == [-signal.SIGKILL]
    second: Trained = ranks.train(file, 1, tmp_path / "second")
    # From the newest checkpoint that was complete when the rank was killed: a slow disk may have had none yet.
    begun = min(second.losses)
    assert begun < 5

    def rate(step: int) -> float:
        cosine = 0.1 + 0.9 * (1 + math.cos(math.pi * max(0, step - 2) / 6)) / 2
        return 1e-3 * min((step + 1) / 2, cosine)

    assert second.rates == pytest.approx([rate(step) for step in range(begun, 8)])


def test_a_run_of_one_step_trains(ranks: Any, plan: Plan, tmp_path: Path, tiny_model: Path) -> None:
    """The base model would be registered as a fine-tuned one: the rate of the first step was 0."""
    from safetensors.torch import load_file

    file = plan("run", training_duration="1ba", learning_rate=1e-3)
    trained: Trained = ranks.train(file, 1, tmp_path / "out")
    assert trained.ok and trained.rates == [1e-3]
    before, prefix = load_file(tiny_model / "model.safetensors"), f"{MODEL_PREFIX}model."
    after = weights(file)
    assert all(not after[prefix + name].equal(tensor) for name, tensor in before.items())


def test_a_run_that_changes_no_weight_has_failed(ranks: Any, plan: Plan, tmp_path: Path) -> None:
    """The base model would be exported and registered as a fine-tuned one; or be, once the run is resumed."""
    file = plan("run", 2, training_duration="4ba", learning_rate=1e-30)
    for attempt in ("first", "resumed"):
        trained: Trained = ranks.train(file, 2, tmp_path / attempt)
        assert any(trained.codes), attempt
        error = json.loads((file.parent / "results" / "train.json").read_text())["error"]
        assert error.startswith("training changed no weight in 4 steps") and "(it is 1e-30)" in error
        assert "TRAIN_FINISHED" not in (file.parent / "events.jsonl").read_text()


def test_a_change_that_a_killed_process_has_made_counts(ranks: Any, plan: Plan, tmp_path: Path) -> None:
    """A run that goes on for one last step, too small to change anything, would be called a failure."""
    # A checkpoint is written while training continues, and the next one waits for it: that of batch 2 is complete.
    file = plan("run", training_duration="4ba", learning_rate=1e-3, overrides={"save_interval": "1ba"})
    killed: Trained = ranks.train(file, 1, tmp_path / "first", KILL_RANK=0, KILL_AT=4, KILL_WHEN="batch")
    assert killed.codes == [-signal.SIGKILL]
    content = yaml.safe_load(file.read_text())
    content["scheduler"]["alpha_f"] = content["scheduler"]["alpha_i"] = 0
    file.write_text(yaml.safe_dump(content))
    second: Trained = ranks.train(file, 1, tmp_path / "second")
    assert second.ok and set(second.rates) == {0.0} and len(second.rates) <= 2, second.log[-3000:]


def test_a_finished_run_goes_on_as_if_it_had_been_longer_from_the_beginning(
    ranks: Any, plan: Plan, tmp_path: Path
) -> None:
    """One more epoch would begin with an empty optimizer, or train the first epoch's batches once more."""
    # A schedule that does not know the end, so that the two runs can be compared.
    constant = {"scheduler": {"name": "constant_with_warmup", "t_warmup": "1ba"}}
    whole, longer = (plan(name, training_duration="2ep", overrides=constant) for name in ("whole", "longer"))
    assert ranks.train(whole, 1, tmp_path / "whole out").ok
    text = longer.read_text()
    longer.write_text(text.replace("max_duration: 2ep", "max_duration: 1ep"))
    first: Trained = ranks.train(longer, 1, tmp_path / "first")
    longer.write_text(text)
    second: Trained = ranks.train(longer, 1, tmp_path / "second")
    assert first.ok and second.ok, second.log[-3000:]
    assert min(second.losses) == max(first.losses) + 1
    found, expected = weights(longer), weights(whole)
    assert found.keys() == expected.keys() and all(found[name].equal(expected[name]) for name in found)
