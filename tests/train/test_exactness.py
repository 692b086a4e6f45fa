"""Training that does not depend on how it is cut: microbatches, ranks, evaluation; and ends where it says."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from tests.train.conftest import Trained, counted, prepared, weights

from tundish.checkpoints.folder import list_checkpoints

pytestmark = pytest.mark.slow

Plan = Callable[..., Path]
CLOSE = 2e-4
"""Relative. Sums in another order differ by 1e-7; where an update of Lion is that close to 0, its sign differs, and the
weight by twice the learning rate, 1e-4 here."""


def _run(ranks: Any, plan: Plan, tmp_path: Path, name: str, world: int = 1, **more: Any) -> Trained:
    """A run of two epochs whose last batch of an epoch is not full."""
    more = {"samples": 43, "learning_rate": 1e-4} | more
    trained: Trained = ranks.train(plan(name, world, **more), world, tmp_path / f"{name} out")
    assert trained.ok, trained.log[-3000:]
    # Whoever can reach the machine could join in, or send what a rank would unpickle.
    assert len(trained.listening) == world and {ip for rank in trained.listening for ip in rank} <= {"127.0.0.1"}
    assert world == 1 or trained.listening[0], "rank 0 of several listens for the others"
    return trained


def _close(one: Trained, other: Trained) -> bool:
    assert one.losses.keys() == other.losses.keys() and len(one.losses) > 6
    return all(math.isclose(loss, other.losses[batch], rel_tol=CLOSE) for batch, loss in one.losses.items())


def _momentum(file: Path) -> float:
    """Norm of the optimizer's state at the end."""
    states = [tensor for name, tensor in weights(file).items() if name.endswith("exp_avg")]
    assert len(states) > 10
    return math.sqrt(sum(float(tensor.square().sum()) for tensor in states))


def test_the_loss_depends_on_no_way_to_cut_a_batch(ranks: Any, plan: Plan, tmp_path: Path) -> None:
    """Rows with few targets would weigh more in a small microbatch, or on a rank of their own."""
    ways = {
        "whole": (1, {"device_train_microbatch_size": 4}),
        "rows": (1, {"device_train_microbatch_size": 1}),
        "uneven": (1, {"device_train_microbatch_size": 3}),
        "two ranks": (2, {"device_train_microbatch_size": 1}),
        "four ranks": (4, {}),
    }
    found = {
        name: _run(ranks, plan, tmp_path, name, world, overrides=overrides) for name, (world, overrides) in ways.items()
    }
    assert math.isclose(found["whole"].losses[0], math.log(384), rel_tol=0.05), "the loss of a model that knows nothing"
    for name, trained in found.items():
        assert _close(trained, found["whole"]), name
    data = prepared(tmp_path / "whole" / "foundry.yaml")
    assert data.rows % 4, "the last batch of an epoch is filled up"
    for name in ways:
        assert counted(tmp_path / name / "foundry.yaml")["tokens"] == 2 * data.tokens, "every sample once an epoch"
        # Sums of all gradients; Lion, which sees only signs, would hide a factor.
        momentum = _momentum(tmp_path / name / "foundry.yaml")
        assert math.isclose(momentum, _momentum(tmp_path / "whole" / "foundry.yaml"), rel_tol=1e-3), name


@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2)])
def test_a_run_goes_on_with_another_number_of_ranks(
    ranks: Any, plan: Plan, tmp_path: Path, before: int, after: int
) -> None:
    """Whoever loses a device would lose the run; or it would train other batches from there on."""
    whole = _run(ranks, plan, tmp_path, "whole", before)
    file = plan("killed", before, samples=43, learning_rate=1e-4)
    # Behind the second checkpoint, which waits for the first to be complete.
    ranks.train(file, before, tmp_path / "first", KILL_RANK=0, KILL_AT=7, KILL_WHEN="batch")
    text = file.read_text()
    second: Trained = ranks.train(file, after, tmp_path / "second")
    assert second.ok, second.log[-3000:]
    assert text == file.read_text() and min(second.losses) in (3, 6)
    assert all(math.isclose(loss, whole.losses[batch], rel_tol=CLOSE) for batch, loss in second.losses.items())


@pytest.mark.parametrize("duration", ["1ep", "5ba", "900tok"])
def test_a_run_ends_where_its_duration_says(ranks: Any, plan: Plan, tmp_path: Path, duration: str) -> None:
    """A run would be longer or shorter than what was asked, or paid, for."""
    trained = _run(ranks, plan, tmp_path, "run", training_duration=duration)
    data, found = prepared(tmp_path / "run" / "foundry.yaml"), counted(tmp_path / "run" / "foundry.yaml")
    assert found["batches"] == len(trained.losses)
    if duration == "1ep":
        assert found == {"batches": math.ceil(data.rows / 4), "tokens": data.tokens}
    elif duration == "5ba":
        assert found["batches"] == 5
    else:
        assert 900 <= found["tokens"] < 900 + 4 * 64, "the batch in which the number is reached is the last"
    steps = len(trained.losses)
    clock = trained.tokens if duration == "900tok" else list(range(steps + 1))
    total = {"1ep": steps, "5ba": 5, "900tok": 900}[duration]
    warm_up = 18 if duration == "900tok" else 1
    expected = [
        1e-4 * min(1, clock[step + 1] / warm_up, (total - clock[step]) / (total - warm_up)) for step in range(steps)
    ]
    assert trained.rates == pytest.approx(expected), "linear to 0, no step at 0"
    assert min(trained.rates) > 0 and trained.rates[0] == 1e-4, "at most one step is 2 % of these runs"


def test_eval_prompts_change_nothing_and_are_answered_alike(ranks: Any, plan: Plan, tmp_path: Path) -> None:
    """What is drawn for an answer would be missing in training; or the answers depend on the number of devices."""
    prompts = ["1: ", "fox"]
    without = _run(ranks, plan, tmp_path, "without")
    answered = {world: _run(ranks, plan, tmp_path, f"of {world}", world, eval_prompts=prompts) for world in (1, 2)}
    assert answered[1].losses == without.losses
    assert _close(answered[2], without)
    tables = {world: trained.tables["eval_prompts"] for world, trained in answered.items()}
    rows = json.loads(tables[1])["data"]
    assert [row[2] for row in rows[:2]] == prompts and all(row[3] for row in rows)
    assert rows == json.loads(tables[2])["data"]


def test_answers_are_those_of_the_exported_model(ranks: Any, plan: Plan, tmp_path: Path) -> None:
    """A model that answers rightly would be shown to answer with garbage: what the layers cache was lost."""
    import warnings

    prompts = ["17: ", "fox fox", "what is two and two?"]
    file = plan("run", learning_rate=1e-3, eval_prompts=prompts)
    trained: Trained = ranks.train(file, 1, tmp_path / "out", GREEDY=1)
    assert trained.ok, trained.log[-3000:]
    rows = json.loads(trained.tables["eval_prompts"])["data"]
    newest = max(int(row[0]) for row in rows)
    answers = {prompt: answer for batch, _, prompt, answer in rows if int(batch) == newest}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        from tundish.export.safetensors import export

        base = yaml.safe_load(file.read_text())["model"]["pretrained_model_name_or_path"]
        checkpoint = list_checkpoints(file.parent / "checkpoints")[-1]
        export(checkpoint, base, "INSTRUCTION_FINETUNE", tmp_path / "export", dtype="float32")
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "export", torch_dtype="auto")
        tokenizer = AutoTokenizer.from_pretrained(tmp_path / "export")
    assert checkpoint.name.endswith(f"-ba{newest}") and set(answers) == set(prompts)
    for prompt, answer in answers.items():
        ids = torch.tensor([tokenizer(prompt)["input_ids"]])
        plain = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=100)
        assert answer == tokenizer.decode(plain[0, ids.shape[1] :], skip_special_tokens=True), prompt
    assert len(set(answers.values())) > 1 and all(answers.values()), answers


def test_a_run_goes_on_with_layers_computed_again(ranks: Any, plan: Plan, tmp_path: Path) -> None:
    """A run resumed on smaller devices would not find its weights: the wrapper's name stands inside theirs."""
    whole = _run(ranks, plan, tmp_path, "whole")
    file = plan("killed", samples=43, learning_rate=1e-4)
    first = ranks.train(file, 1, tmp_path / "first", KILL_RANK=0, KILL_AT=7, KILL_WHEN="batch")
    assert not first.ok
    content = yaml.safe_load(file.read_text())
    assert content["fsdp_config"]["activation_checkpointing"] is False
    content["fsdp_config"] |= {"activation_checkpointing": True, "reshard_after_forward": True}
    file.write_text(yaml.safe_dump(content))
    second = ranks.train(file, 1, tmp_path / "second")
    assert second.ok, second.log[-3000:]
    assert second.losses.keys() < whole.losses.keys() and max(second.losses) == max(whole.losses)
    assert all(math.isclose(loss, whole.losses[batch], rel_tol=CLOSE) for batch, loss in second.losses.items())
