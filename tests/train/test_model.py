"""train/model.py: the loss is transformers' own, and 0 instead of NaN where a batch has no targets."""

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.slow

IGNORED = -100


@pytest.fixture(scope="module", autouse=True)
def imported() -> Iterator[None]:
    """Composer and LLM Foundry warn a dozen times while they are imported."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import torch

        import tundish.train.model  # noqa: F401
    threads = torch.get_num_threads()
    # Handing work so small to a second thread takes a hundred times longer than doing it.
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def model(tiny_model: Path) -> Any:
    """The tiny model as LLM Foundry builds it from a run's YAML: by name, through its registry."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from llmfoundry.utils.builders import build_composer_model, build_tokenizer

        tokenizer = build_tokenizer(str(tiny_model), {"model_max_length": 64})
        settings = {
            "pretrained_model_name_or_path": str(tiny_model),
            "pretrained": True,
            "init_device": "cpu",
            "trust_remote_code": False,
            "use_auth_token": False,
            "attn_implementation": "sdpa",
        }
        return build_composer_model("tundish_causal_lm", settings, tokenizer)


@pytest.fixture
def batch() -> dict[str, Any]:
    """Two packed rows of three and one samples, and a filler."""
    import numpy as np

    from tundish.train.loader import FILLER, Collate

    random = np.random.default_rng(8)

    def row(*lengths: int) -> dict[str, np.ndarray]:
        total = sum(lengths)
        return {
            "tokens": random.integers(3, 384, total).astype(np.int32),
            "loss_mask": (random.random(total) < 0.6).astype(np.uint8),
            "segments": np.array(lengths, dtype=np.int32),
        }

    return Collate(0, 64)([row(5, 9, 4), row(11), FILLER])


def _random(*shape: int) -> Any:
    import torch

    return torch.randn(*shape, generator=torch.Generator().manual_seed(6)) * 3


def test_the_loss_is_that_of_transformers() -> None:
    """A run's losses could not be compared with anybody else's; labels may be off by one."""
    import torch
    from transformers.loss.loss_utils import ForCausalLMLoss

    from tundish.train.model import target_loss

    logits = _random(3, 10, 50)
    labels = torch.randint(0, 50, (3, 10), generator=torch.Generator().manual_seed(7))
    for ignored in ([], [0], [0, 4, 5, 6, 29], list(range(29))):
        some = labels.clone()
        some.view(-1)[ignored] = IGNORED
        expected = ForCausalLMLoss(logits, some, vocab_size=50)
        assert float(expected) > 1
        torch.testing.assert_close(target_loss(logits, some), expected)


def test_logits_in_bfloat16_are_summed_in_float32() -> None:
    """A loss in bfloat16 has three digits, and its gradient is lost in them."""
    import torch

    from tundish.train.model import target_loss

    logits = _random(2, 8, 50).bfloat16()
    labels = torch.arange(16).view(2, 8)
    loss = target_loss(logits, labels)
    assert loss.dtype == torch.float32
    assert torch.equal(loss, target_loss(logits.float(), labels)) and float(loss) > 1


def test_no_targets_are_no_loss_and_no_gradient() -> None:
    """The rank whose share of a batch is all filler would turn every weight of the model into NaN."""
    import torch

    from tundish.train.model import target_loss

    labels = torch.full((2, 8), IGNORED)
    # The first token of a row is no target either: nothing stands before it.
    labels[:, 0] = 5
    logits = _random(2, 8, 50).requires_grad_()
    loss = target_loss(logits, labels)
    loss.backward()
    assert float(loss.detach()) == 0 and logits.grad is not None
    assert not logits.grad.any() and logits.grad.isfinite().all()


def test_only_targets_have_a_gradient() -> None:
    """Padding and prompts would pull at the weights."""
    import torch

    from tundish.train.model import target_loss

    labels = torch.full((2, 8), IGNORED)
    labels[0, 3], labels[1, 7] = 4, 9
    logits = _random(2, 8, 50).requires_grad_()
    target_loss(logits, labels).backward()
    assert logits.grad is not None
    # Position t predicts token t + 1.
    assert logits.grad.any(-1).nonzero().tolist() == [[0, 2], [1, 6]]


def test_llm_foundry_builds_our_model(model: Any) -> None:
    """A run's YAML would train LLM Foundry's own model, whose loss can be NaN."""
    import torch
    from llmfoundry.models import ComposerHFCausalLM

    from tundish.train.model import CausalLM

    assert type(model) is CausalLM and isinstance(model, ComposerHFCausalLM)
    assert model.config._attn_implementation == "sdpa"
    assert {"input_ids", "position_ids", "attention_mask"} <= set(model.model_forward_args)
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())


def test_a_batch_with_labels_has_the_loss_of_its_logits(model: Any, batch: dict[str, Any]) -> None:
    """Composer would train on another loss than ours, or on none."""
    from tundish.train.model import target_loss

    given = dict(batch)
    outputs = model(batch)
    assert outputs["logits"].shape == (3, 24, 384)
    assert float(outputs["loss"].detach()) > 1
    assert model.loss(outputs, batch) is outputs["loss"] is outputs.loss
    assert float(outputs["loss"]) == float(target_loss(outputs["logits"], batch["labels"]))
    assert batch.keys() == given.keys() and all(batch[name] is given[name] for name in given), "Composer uses it again"


def test_a_batch_without_labels_has_no_loss(model: Any, batch: dict[str, Any]) -> None:
    """Evaluation and generation take the labels away first."""
    import torch

    with_labels = model(batch)["logits"]
    labels = batch.pop("labels")
    outputs = model(batch)
    assert labels is not None and "loss" not in outputs
    assert torch.equal(outputs["logits"], with_labels)


def test_mask_and_positions_reach_the_model(model: Any, batch: dict[str, Any]) -> None:
    """LLM Foundry's wrapper drops what the model does not name: packed samples would see each other in silence."""
    import torch

    with torch.no_grad():
        # The second sample of the first row: tokens 5 … 13.
        packed = model(batch)["logits"][0, 5:14]
        alone = model({"input_ids": batch["input_ids"][:1, 5:14]})["logits"][0]
        plain = model({"input_ids": batch["input_ids"]})["logits"][0, 5:14]
    torch.testing.assert_close(packed, alone, rtol=0, atol=1e-5)
    assert float((plain - alone).abs().max()) > 1e-2


def test_fillers_have_finite_zero_gradients(model: Any, batch: dict[str, Any]) -> None:
    """One rank's NaN is every rank's after the gradients are summed."""
    from tundish.train.loader import FILLER, Collate

    model.zero_grad()
    outputs = model(Collate(0, 64)([FILLER, FILLER]))
    outputs["loss"].backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert float(outputs["loss"].detach()) == 0
    assert len(gradients) == len(list(model.parameters())) and not any(grad.any() for grad in gradients.values())
    model.zero_grad()
    model(batch)["loss"].backward()
    assert all(p.grad.any() for p in model.parameters()), "real rows do have gradients"
    model.zero_grad()


def test_an_evaluation_does_not_see_fillers(model: Any, batch: dict[str, Any]) -> None:
    """Evaluation losses would depend on the number of devices, which decides how many fillers there are."""
    import torch

    expected = float(model(batch)["loss"].detach())
    metrics = model.get_metrics(is_train=False)
    assert "LanguageCrossEntropy" in metrics
    metric = metrics["LanguageCrossEntropy"]
    metric.reset()
    # Row by row: the filler is a batch of its own.
    for number in range(3):
        one = {
            name: value[number : number + 1] if isinstance(value, torch.Tensor) else value
            for name, value in batch.items()
        }
        one["labels"] = one["labels"].clone()
        with torch.no_grad():
            model.update_metric(one, model.eval_forward(one), metric)
    assert float(metric.compute()) == pytest.approx(expected, rel=1e-5)
    metric.reset()
