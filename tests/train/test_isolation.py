"""train/loader.py and train/model.py: in real models, a sample in a packed row is as good as alone.

In a packed row the kernels work on other shapes than for the sample alone, and so sum in another order: that is the
tolerance. A neighbour that shines through makes ten thousand times more.
"""

import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

pytestmark = pytest.mark.slow

if TYPE_CHECKING:
    import torch

FAMILIES = ("llama", "mistral", "mixtral", "dbrx")
VOCABULARY = 97
ROWS = ((7, 12, 5), (9, 3), (), (20,))
"""Lengths of the samples of each row: two packed ones, the second with padding; a filler; a sample alone."""
TOLERANCE = 1e-5
"""On logits of up to 4; 3e-6 was measured."""
SEES = 0.1
"""A sample that sees its neighbours is off by more than this."""


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


@pytest.fixture(autouse=True)
def kernels(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """FlashAttention's kernels in plain PyTorch, as they are documented: no GPU, but all of transformers' own path."""
    import torch
    from torch.nn.functional import scaled_dot_product_attention
    from transformers import PreTrainedModel, modeling_flash_attention_utils
    from transformers.models.dbrx import modeling_dbrx

    def flash(query: Any, key: Any, value: Any, *_: Any, causal: bool, softmax_scale: float | None = None, **__: Any):
        heads_first = (tensor.transpose(1, 2) for tensor in (query, key, value))
        whole = scaled_dot_product_attention(*heads_first, is_causal=causal, scale=softmax_scale, enable_gqa=True)
        return whole.transpose(1, 2)

    def flash_varlen(query: Any, key: Any, value: Any, *, cu_seqlens_q: Any, cu_seqlens_k: Any, **more: Any):
        assert torch.equal(cu_seqlens_q, cu_seqlens_k)
        lengths = cu_seqlens_q.diff().tolist()
        parts = zip(*(tensor.split(lengths) for tensor in (query, key, value)), strict=True)
        return torch.cat([flash(*(tensor[None] for tensor in part), **more)[0] for part in parts])

    utils = modeling_flash_attention_utils
    monkeypatch.setattr(utils, "_flash_supports_window_size", False, raising=False)
    monkeypatch.setattr(utils, "flash_attn_func", flash, raising=False)
    monkeypatch.setattr(utils, "flash_attn_varlen_func", flash_varlen, raising=False)
    monkeypatch.setattr(modeling_dbrx, "_flash_attention_forward", utils._flash_attention_forward, raising=False)
    monkeypatch.setattr(PreTrainedModel, "_check_and_enable_flash_attn_2", lambda config, *_, **__: config)
    yield


def _config(family: str) -> Any:
    from transformers import DbrxConfig, LlamaConfig, MistralConfig, MixtralConfig

    # At the usual initializer_range of 0.02 a model so small hardly looks at its input.
    common: dict[str, Any] = {"vocab_size": VOCABULARY, "initializer_range": 0.2, "pad_token_id": 0}
    if family == "dbrx":
        attention: Any = {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10_000.0}
        experts: Any = {"ffn_hidden_size": 48, "moe_num_experts": 4, "moe_top_k": 2}
        sizes = {"d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 128}
        return DbrxConfig(attn_config=attention, ffn_config=experts, **sizes, **common)
    common |= {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    common |= {"intermediate_size": 48, "max_position_embeddings": 128}
    if family == "mixtral":
        return MixtralConfig(num_local_experts=4, num_experts_per_tok=2, **common)
    return {"llama": LlamaConfig, "mistral": MistralConfig}[family](**common)


def _model(family: str, attention: str, **config: Any) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    settings = _config(family)
    settings.update(config)
    torch.manual_seed(5)
    return AutoModelForCausalLM.from_config(settings, attn_implementation=attention).eval()


def _samples(seed: int = 3) -> list[list[np.ndarray]]:
    """Random tokens in the shape of ROWS."""
    random = np.random.default_rng(seed)
    return [[random.integers(1, VOCABULARY, n).astype(np.int32) for n in row] for row in ROWS]


def _row(samples: list[np.ndarray]) -> dict[str, np.ndarray]:
    """A prepared row; the first third of each sample is its prompt."""
    masks = [(np.arange(len(sample)) >= len(sample) // 3).astype(np.uint8) for sample in samples]
    empty = np.zeros(0, dtype=np.int32)
    return {
        "tokens": np.concatenate([empty, *samples]),
        "loss_mask": np.concatenate([empty.astype(np.uint8), *masks]),
        "segments": np.array([len(sample) for sample in samples], dtype=np.int32),
    }


def _batch(rows: list[list[np.ndarray]], attention: str, sliding_window: int | None = None) -> dict[str, Any]:
    """The batch of the rows, with the mask that `CausalLM.forward` makes."""
    from tundish.train.attention import attention_mask
    from tundish.train.loader import Collate

    batch = Collate(0, 64)([_row(samples) for samples in rows])
    mask = attention_mask(batch["segment_ids"], attention, sliding_window)
    return batch if mask is None else batch | {"attention_mask": mask}


def _logits(model: Any, batch: dict[str, Any]) -> "torch.Tensor":
    inputs = ("input_ids", "position_ids", "attention_mask")
    return model(**{name: batch[name] for name in inputs if name in batch}, use_cache=False).logits


def _pieces(logits: "torch.Tensor") -> list["torch.Tensor"]:
    """Logits of each sample of ROWS."""
    return [
        piece for row, lengths in zip(logits, ROWS, strict=True) for piece in row[: sum(lengths)].split(list(lengths))
    ]


def _alone(model: Any, sample: np.ndarray) -> "torch.Tensor":
    """Logits of a sample as anybody would run it: no mask, no positions, no padding, nothing of ours."""
    import torch

    return model(torch.from_numpy(sample.astype(np.int64))[None], use_cache=False).logits[0]


def _farthest(one: list["torch.Tensor"], other: list["torch.Tensor"]) -> float:
    assert len(one) == len(other) == sum(len(row) for row in ROWS)
    return max(float((a - b).abs().max()) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("attention", ["sdpa", "eager", "flash_attention_2"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_packed_sample_has_the_logits_of_the_sample_alone(family: str, attention: str) -> None:
    """The model would be trained on answers to questions that other samples asked."""
    import torch

    model, rows = _model(family, attention), _samples()
    with torch.no_grad():
        packed = _logits(model, _batch(rows, attention))
        alone = [_alone(model, sample) for row in rows for sample in row]
        assert packed.isfinite().all(), "padding and fillers too"
        assert max(float(piece.abs().max()) for piece in alone) > 0.5
        assert _farthest(_pieces(packed), alone) < TOLERANCE


@pytest.mark.parametrize("attention", ["sdpa", "eager", "flash_attention_2"])
@pytest.mark.parametrize("family", FAMILIES)
def test_without_our_mask_and_positions_samples_do_see_each_other(family: str, attention: str) -> None:
    """The tests here could not tell isolation from its absence."""
    import torch

    model, rows = _model(family, attention), _samples()
    with torch.no_grad():
        plain = _logits(model, {"input_ids": _batch(rows, attention)["input_ids"]})
        alone = [_alone(model, sample) for row in rows for sample in row]
    away = [float((one - other).abs().max()) for one, other in zip(_pieces(plain), alone, strict=True)]
    first = [number == 0 for row in ROWS for number in range(len(row))]
    assert sum(first) == 3 and all(
        (distance < TOLERANCE) == is_first for distance, is_first in zip(away, first, strict=False)
    )
    assert min(distance for distance, is_first in zip(away, first, strict=False) if not is_first) > SEES


@pytest.mark.parametrize("attention", ["sdpa", "eager", "flash_attention_2"])
@pytest.mark.parametrize("family", FAMILIES)
def test_another_neighbour_changes_nothing(family: str, attention: str) -> None:
    """A sample's gradient would depend on what it happens to be packed with."""
    import torch

    model, rows, others = _model(family, attention), _samples(), _samples(seed=4)
    changed = [[others[r][k] if k != 1 else sample for k, sample in enumerate(row)] for r, row in enumerate(rows)]
    assert not any(np.array_equal(rows[r][0], changed[r][0]) for r in (0, 1))
    with torch.no_grad():
        before, after = (_pieces(_logits(model, _batch(these, attention))) for these in (rows, changed))
    # The second samples of the two packed rows: pieces 1 and 4.
    for number in (1, 4):
        if family in ("llama", "mistral"):
            assert torch.equal(before[number], after[number])
        # An expert multiplies all its tokens at once, and which come to it depends on all samples.
        assert float((before[number] - after[number]).abs().max()) < TOLERANCE
    assert float((before[0] - after[0]).abs().max()) > SEES, "what was changed did change"


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_gradients_are_those_of_the_samples_alone(family: str, attention: str) -> None:
    """Packing would change what is learnt: the contract is that it only changes how fast."""
    import torch

    from tundish.train.model import target_loss

    model, rows = _model(family, attention), _samples()
    batch = _batch(rows, attention)
    packed_loss = target_loss(_logits(model, batch), batch["labels"])
    packed_loss.backward()
    packed = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    targets = sum(batch["loss_generating_tokens"])
    loss = 0.0
    for row in rows:
        for sample in row:
            labels = torch.from_numpy(sample.astype(np.int64))[None].clone()
            labels[:, : max(1, len(sample) // 3)] = -100
            share = int((labels != -100).sum()) / targets
            part = share * target_loss(_alone(model, sample)[None], labels)
            part.backward()
            loss += float(part)
    alone = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert float(packed_loss) > 1 and float(packed_loss) == pytest.approx(loss, rel=1e-5)
    assert set(packed) == set(alone) == {name for name, _ in model.named_parameters()}
    for name, gradient in alone.items():
        largest = float(gradient.abs().max())
        assert largest > 0, name
        assert float((packed[name] - gradient).abs().max()) < 1e-4 * largest, name


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_isolation_holds_in_bfloat16(attention: str) -> None:
    """Float32's smallest number is minus infinity in bfloat16: a mask that blocks whole rows would give NaN."""
    import torch

    model, rows, others = _model("llama", attention), _samples(), _samples(seed=4)
    changed = [[others[r][k] if k != 1 else sample for k, sample in enumerate(row)] for r, row in enumerate(rows)]
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        whole = _logits(model, _batch(rows, attention))
        assert whole.isfinite().all() and whole.dtype == torch.bfloat16
        before, after = _pieces(whole), _pieces(_logits(model, _batch(changed, attention)))
    assert torch.equal(before[1], after[1]) and torch.equal(before[4], after[4])
    assert not torch.equal(before[0], after[0])


def test_flash_attention_finds_our_borders() -> None:
    """Its kernel gets no mask: all that it knows of the samples are the positions that restart."""
    import torch
    from transformers.modeling_flash_attention_utils import prepare_fa2_from_position_ids

    batch = _batch(_samples(), "flash_attention_2")
    assert "attention_mask" not in batch
    length = batch["input_ids"].shape[1]
    states = torch.zeros(len(ROWS), length, 2, 8)
    *_, (borders, _), (longest, _) = prepare_fa2_from_position_ids(states, states, states, batch["position_ids"])
    # Each padding token becomes a sample of its own, which nobody looks at.
    expected = [n for row in ROWS for n in (*row, *[1] * (length - sum(row)))]
    assert borders.diff().tolist() == expected and int(longest) == 20


def _allowed(segment_ids: "torch.Tensor") -> "torch.Tensor":
    """Bool [B, T, T]: which token may look at which, by the rule of the 4-D mask."""
    from tundish.train.attention import attention_mask

    mask = attention_mask(segment_ids, "eager")
    assert mask is not None
    return (mask == 0)[:, 0]


def test_the_flex_mask_is_the_four_dimensional_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """flex_attention, which runs on GPUs only, would isolate other samples than the attentions tested here."""
    import torch
    from torch.nn.attention.flex_attention import create_mask
    from transformers.integrations import flex_attention

    eager = flex_attention.create_block_causal_mask_flex
    # Compiling needs a compiler for C++, and takes longer than all the tests here.
    monkeypatch.setattr(flex_attention, "create_block_causal_mask_flex", lambda **kw: eager(**kw | {"_compile": False}))
    segment_ids = _batch(_samples(), "flex_attention")["attention_mask"]
    rows, length = segment_ids.shape
    block_mask = flex_attention.make_flex_block_causal_mask(segment_ids)
    flex = create_mask(block_mask.mask_mod, rows, 1, length, length, device="cpu")[:, 0]
    tokens = segment_ids > 0
    expected = _allowed(segment_ids)
    assert torch.equal(flex[tokens], expected[tokens]) and 0 < int(expected[tokens].sum()) < length**2
    assert int((~tokens).sum()) > 0 and not flex[~tokens].any(), "padding sees nothing"


@pytest.mark.parametrize("family", ["mistral", "mixtral"])
def test_flex_attention_does_not_isolate_in_every_family(family: str) -> None:
    """Tells when transformers has learnt it; until then `foundry.py` must give these families another attention.

    transformers 4.51 says that they support flex_attention, but reads our segment numbers as a plain padding mask.
    """
    import torch

    model = _model(family, "flex_attention")
    segment_ids = _batch(_samples(), "flex_attention")["attention_mask"]
    rows, length = segment_ids.shape
    mask = model.model._update_causal_mask(segment_ids, torch.zeros(rows, length, 32), torch.arange(length), None)
    assert isinstance(mask, torch.Tensor) and mask.shape == (rows, 1, length, length)
    tokens = segment_ids > 0
    seen = (mask == 0)[:, 0] & tokens[:, :, None] & tokens[:, None, :]
    assert torch.equal(seen, torch.ones(length, length).tril().bool() & tokens[:, :, None] & tokens[:, None, :])


def test_dbrx_has_no_flex_attention() -> None:
    """Tells when transformers has learnt it; until then `foundry.py` must give the family another attention."""
    with pytest.raises(ValueError, match="does not support an attention implementation through torch's flex_attention"):
        _model("dbrx", "flex_attention")


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_sliding_window_is_kept(attention: str) -> None:
    """A sample longer than Mistral v0.1's window of 4,096 would be trained on more than the model can see."""
    import torch

    model, rows = _model("mistral", attention, sliding_window=6), _samples()
    with torch.no_grad():
        packed = _logits(model, _batch(rows, attention, sliding_window=6))
        alone = [_alone(model, sample) for row in rows for sample in row]
    assert _farthest(_pieces(packed), alone) < TOLERANCE


def test_a_sample_of_one_token_is_isolated_too() -> None:
    """The sample after it would see it, were the one-token tail of a raw text to stand first in a full row."""
    import torch

    from tundish.data.shards import pack_row
    from tundish.data.tokenize import Encoded
    from tundish.train.loader import Collate

    model, samples = _model("llama", "flash_attention_2"), [_samples()[0][0][:1], _samples()[0][0]]
    assert [len(sample) for sample in samples] == [1, 7], "a full row: 8 tokens"
    row = pack_row([Encoded(sample, np.ones(len(sample), dtype=np.uint8)) for sample in samples])
    with torch.no_grad():
        packed = _logits(model, Collate(0, 64)([row]))[0, :7]
        assert float((packed - _alone(model, samples[1])).abs().max()) < TOLERANCE


ISOLATING = {
    "llama": {"sdpa", "eager", "flash_attention_2", "flex_attention"},
    "mistral": {"sdpa", "eager", "flash_attention_2"},
    "mixtral": {"sdpa", "eager", "flash_attention_2"},
    "dbrx": {"sdpa", "eager", "flash_attention_2"},
}


@pytest.mark.parametrize("device", ["cpu", "gpu"])
@pytest.mark.parametrize("flash", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_model_gets_an_attention_that_isolates(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Any,
    family: str,
    flash: bool,
    device: str,
) -> None:
    """A run would train on samples that see each other, or fail when its model is built."""
    import importlib.util

    import yaml

    from tundish.base.run_folder import RunFolder
    from tundish.plan.foundry import render
    from tundish.plan.models import model_cards
    from tundish.plan.run_plan import RunPlan
    from tundish.plan.spec import parse_spec

    find_spec, stand_in = importlib.util.find_spec, "yaml" if flash else "no_such_package"
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: find_spec(stand_in if name == "flash_attn" else name))
    models = [name for name, card in model_cards().items() if card.family == family]
    assert models
    for model in models:
        given = {"model": model, "train_data_path": "/data/train.jsonl", "register_to": "main.lab", "run_name": "one"}
        spec, card = parse_spec(
            given | {"compute": {"device": device, "devices_per_node": 8}}, created_at="2026-11-21T10:00:00+00:00"
        )
        planned = RunPlan.of(spec, card, save_folder="/save", tracking_uri="sqlite:////db", registry_uri=None)
        content = yaml.safe_load(render(planned.for_rows(1000, 64_000), RunFolder(tmp_path)))
        chosen = content["model"]["attn_implementation"]
        assert chosen in ISOLATING[family]
