"""train/loader.py: every row once an epoch at every world size, and batches that are true to their rows."""

import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

pytestmark = pytest.mark.slow

Row = Mapping[str, npt.NDArray[Any]]
MakeOrder = Callable[..., Any]

WORLD_SIZES = (1, 2, 4)
GLOBAL_BATCH = 8


@pytest.fixture(scope="module", autouse=True)
def imported() -> None:
    """Composer warns several times while it is imported."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import tundish.train.loader  # noqa: F401


@pytest.fixture
def orders(monkeypatch: pytest.MonkeyPatch) -> MakeOrder:
    """`orders(rows, world_size, …)`: the order of each rank, as that rank would make it."""
    from tundish.train import loader

    def make(num_rows: int, world_size: int, *, shuffle: bool = True, seed: int = 17, epoch: int = 0) -> list[Any]:
        monkeypatch.setattr(loader.dist, "get_world_size", lambda: world_size)
        ranks: list[Any] = []
        for rank in range(world_size):
            monkeypatch.setattr(loader.dist, "get_global_rank", lambda rank=rank: rank)
            ranks.append(loader.RowOrder(num_rows, GLOBAL_BATCH // world_size, shuffle=shuffle, seed=seed))
            ranks[-1].set_epoch(epoch)
        return ranks

    return make


def _batches(ranks: list[Any]) -> list[list[int]]:
    """The rows of each global batch, rank after rank, fillers left out."""
    size = GLOBAL_BATCH // len(ranks)
    numbers = [list(order) for order in ranks]
    assert {len(mine) for mine in numbers} == {len(ranks[0])}, "no rank waits for another"
    return [
        [row for mine in numbers for row in mine[start : start + size] if row >= 0]
        for start in range(0, len(numbers[0]), size)
    ]


def _samples(*lengths: int, seed: int = 0) -> Row:
    """A row of samples; of each, the first half is its prompt."""
    random = np.random.default_rng((seed, *lengths))
    masks = [np.arange(n) >= n // 2 for n in lengths]
    return {
        "tokens": random.integers(3, 384, sum(lengths)).astype(np.int32),
        "loss_mask": np.concatenate([np.zeros(0, bool), *masks]).astype(np.uint8),
        "segments": np.array(lengths, dtype=np.int32),
    }


def _collate(rows: list[Row], max_seq_len: int = 64) -> dict[str, Any]:
    from tundish.train.loader import Collate

    return Collate(pad_token_id=2, max_seq_len=max_seq_len)(rows)


@pytest.mark.parametrize("world_size", WORLD_SIZES)
@pytest.mark.parametrize("num_rows", [1, 7, 8, 9, 30, 64])
def test_every_row_comes_once_an_epoch(orders: MakeOrder, num_rows: int, world_size: int) -> None:
    """Samples would be trained twice, or never, where rows do not divide by ranks and batch."""
    for epoch in range(3):
        ranks = orders(num_rows, world_size, epoch=epoch)
        rows = [row for order in ranks for row in order if row >= 0]
        assert sorted(rows) == list(range(num_rows))
        assert all(order.num_batches == -(-num_rows // GLOBAL_BATCH) for order in ranks)
        assert all(len(list(order)) == len(order) == order.num_batches * GLOBAL_BATCH // world_size for order in ranks)


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("num_rows", [5, 30, 64])
def test_global_batches_are_the_same_at_every_world_size(orders: MakeOrder, num_rows: int, shuffle: bool) -> None:
    """A run that goes on with more GPUs would train other steps than it began with."""
    alone, *others = (_batches(orders(num_rows, size, shuffle=shuffle, epoch=2)) for size in WORLD_SIZES)
    assert len(alone) == -(-num_rows // GLOBAL_BATCH) and len(others) == 2
    for ranks in others:
        assert ranks == alone, "even the rows' order in the batch is the same"


def test_the_order_follows_seed_and_epoch(orders: MakeOrder) -> None:
    """Every epoch would repeat the last one's batches, or a resumed run see another order than before."""

    def order(**settings: Any) -> list[int]:
        (only,) = orders(64, 1, **settings)
        return list(only)

    assert order(seed=17, epoch=0) == order(seed=17, epoch=0)
    different = [order(seed=seed, epoch=epoch) for seed in (17, 18) for epoch in (0, 1, 2)]
    assert len({tuple(rows) for rows in [*different, range(64)]}) == 7


def test_without_shuffling_rows_come_as_they_are_stored(orders: MakeOrder) -> None:
    """An evaluation would take other rows each time when it is cut short."""
    for epoch in (0, 1):
        (only,) = orders(20, 1, shuffle=False, epoch=epoch)
        assert list(only) == [*range(20), *[-1] * 4]
    assert _batches(orders(20, 4, shuffle=False)) == [[*range(8)], [*range(8, 16)], [*range(16, 20)]]


# No optimizer is needed to evaluate, but Composer makes one and says so.
@pytest.mark.filterwarnings("ignore:No optimizer was specified:UserWarning")
def test_an_evaluation_by_composer_leaves_out_no_row(tmp_path: Path) -> None:
    """Composer would take our fillers for rows that are there twice, and drop as many real rows from the metrics."""
    import torch
    from composer import ComposerModel, DataSpec, Trainer
    from torch.utils.data import DataLoader, Dataset
    from torchmetrics import SumMetric

    from tundish.train.loader import FILLER, Collate, RowOrder, count_tokens

    rows = [_samples(6 + number, seed=number) for number in range(5)]

    class Counting(ComposerModel):
        """Counts the targets it is evaluated on."""

        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(1))
            self.metric = SumMetric()

        def forward(self, batch: Any) -> Any:
            return (batch["labels"] != -100).sum()

        def loss(self, outputs: Any, batch: Any) -> Any:
            return outputs

        def get_metrics(self, is_train: bool = False) -> dict[str, Any]:
            return {} if is_train else {"targets": self.metric}

        def update_metric(self, batch: Any, outputs: Any, metric: Any) -> None:
            metric.update(outputs)

    class Numbered(Dataset[Row]):
        def __len__(self) -> int:
            return len(rows)

        def __getitem__(self, number: int) -> Row:
            return rows[number] if number >= 0 else FILLER

    order = RowOrder(len(rows), 4, shuffle=False, seed=0)
    assert len(order) == 8
    loader = DataLoader(Numbered(), batch_size=4, sampler=order, collate_fn=Collate(0, 64))
    trainer = Trainer(
        model=Counting(),
        eval_dataloader=DataSpec(loader, get_num_tokens_in_batch=count_tokens),
        progress_bar=False,
        device="cpu",
    )
    trainer.eval()
    trainer.close()
    found = float(trainer.state.eval_metric_values["targets"])
    assert found == sum(int(row["loss_mask"].sum()) for row in rows) > 0


def test_a_batch_is_as_long_as_its_longest_row() -> None:
    """Most of the work would go into padding: at 8,192 tokens a short batch costs as much as a full one."""
    for longest, length in ((5, 8), (8, 8), (9, 16), (57, 64), (61, 64), (64, 64)):
        batch = _collate([_samples(3, 2), _samples(longest)])
        assert batch["input_ids"].shape == batch["labels"].shape == batch["position_ids"].shape == (2, length)
        assert batch["segment_ids"].shape == (2, length)


def test_no_batch_is_longer_than_the_context() -> None:
    """Rounding up would go past the positions that the model knows."""
    assert _collate([_samples(59)], max_seq_len=60)["input_ids"].shape == (1, 60)
    assert _collate([_samples(50)], max_seq_len=60)["input_ids"].shape == (1, 56)
    # Rows prepared for a longer context are not cut: their targets would be lost in silence.
    assert _collate([_samples(61)], max_seq_len=60)["input_ids"].shape == (1, 61)


def test_tokens_stand_in_their_places() -> None:
    """The model would be trained on other tokens than were prepared."""
    rows = [_samples(4, 7), _samples(3), _samples(13, 1, 2)]
    batch = _collate(rows)
    for row, ids in zip(rows, batch["input_ids"].tolist(), strict=True):
        n = len(row["tokens"])
        assert ids == [*row["tokens"].tolist(), *[2] * (16 - n)] and n > 0


def test_labels_are_the_masked_tokens_and_never_a_samples_first() -> None:
    """Prompts would be trained; or each sample's first token be predicted from the sample before it."""
    row = {**_samples(4, 1, 3), "loss_mask": np.array([1, 1, 0, 1, 1, 1, 0, 1], dtype=np.uint8)}
    tokens = row["tokens"].tolist()
    (labels,) = _collate([row])["labels"].tolist()
    assert labels == [-100, tokens[1], -100, tokens[3], -100, -100, -100, tokens[7]]


def test_the_rows_are_not_changed() -> None:
    """Another epoch would find other targets in rows that a reader keeps in memory."""
    row = _samples(4, 3)
    row["loss_mask"][:] = 1
    kept = {name: column.copy() for name, column in row.items()}
    for column in row.values():
        column.setflags(write=False)
    _collate([row])
    assert all(np.array_equal(row[name], kept[name]) for name in kept)


def test_positions_restart_at_each_sample() -> None:
    """A sample would be trained at places where it never is in use; flash attention would not find its borders."""
    batch = _collate([_samples(4, 1, 3), _samples(5)])
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3, 0, 0, 1, 2], [0, 1, 2, 3, 4, 0, 0, 0]]


def test_tokens_and_targets_are_counted() -> None:
    """Token durations and the weights of microbatches would count padding, prompts or what is no target."""
    from tundish.train.loader import FILLER, count_tokens

    batch = _collate([_samples(4, 6), FILLER, _samples(1)])
    # Of 4 and 6 tokens the last 2 and 3 are targets; a sample of one token has nothing to be predicted from.
    assert batch["total_tokens"] == [10, 0, 1] and batch["loss_generating_tokens"] == [5, 0, 0]
    assert count_tokens(batch) == {"total": 11, "loss_generating": 5}


def test_a_batch_of_fillers_is_a_batch() -> None:
    """The ranks that get nothing but fillers of the last batch would fail, and the others wait for them."""
    from tundish.train.loader import FILLER, count_tokens

    batch = _collate([FILLER, FILLER])
    assert batch["input_ids"].tolist() == [[2] * 8] * 2 and batch["position_ids"].tolist() == [[0] * 8] * 2
    assert batch["labels"].tolist() == [[-100] * 8] * 2
    assert count_tokens(batch) == {"total": 0, "loss_generating": 0}
    assert batch["segment_ids"].tolist() == [[0] * 8] * 2


def test_composer_cuts_microbatches_with_their_counts() -> None:
    """A microbatch's loss would be weighted with the tokens of others."""
    import torch
    from composer.core.data_spec import _default_split_batch

    from tundish.train.loader import FILLER, count_tokens

    rows = [_samples(4, 6), _samples(3), FILLER, _samples(9), _samples(2, 2, 2)]
    batch = _collate(rows)
    parts = _default_split_batch(batch, 2)
    assert [part["input_ids"].shape[0] for part in parts] == [2, 2, 1]
    for part, few in zip(parts, (rows[:2], rows[2:4], rows[4:]), strict=True):
        assert set(part) == set(batch)
        assert count_tokens(part) == count_tokens(_collate(few))
        assert count_tokens(part)["loss_generating"] == int((part["labels"] != -100).sum()) > 0
    whole = {name: torch.cat([part[name] for part in parts]) for name in ("input_ids", "labels", "position_ids")}
    assert all(torch.equal(whole[name], batch[name]) for name in whole)
    assert sum(count_tokens(part)["total"] for part in parts) == count_tokens(batch)["total"] == 28


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_the_mask_blocks_other_samples_and_what_is_to_come(attention: Any) -> None:
    """Samples would see each other, or the tokens that they are to predict."""
    import torch

    from tundish.train.attention import attention_mask

    segment_ids = torch.tensor([[1, 1, 2, 2, 0], [1, 1, 1, 1, 1], [0, 0, 0, 0, 0]])
    mask = attention_mask(segment_ids, attention)
    assert mask is not None and mask.shape == (3, 1, 5, 5) and mask.dtype == torch.float32
    assert set(mask.unique().tolist()) == {torch.finfo(torch.float32).min, 0.0}
    for row, segments in enumerate(segment_ids.tolist()):
        for i in range(5):
            seen = [j for j in range(5) if mask[row, 0, i, j] == 0]
            assert seen == [j for j in range(i + 1) if segments[j] == segments[i]] and i in seen


def test_flex_attention_gets_the_segments_and_flash_attention_nothing() -> None:
    """FlashAttention takes any mask for padding and forgets the borders; flex_attention needs the samples' numbers."""
    from tundish.train.attention import attention_mask

    segment_ids = _collate([_samples(2, 3), _samples(8)])["segment_ids"]
    assert segment_ids.tolist() == [[1, 1, 2, 2, 2, 0, 0, 0], [1] * 8]
    assert attention_mask(segment_ids, "flex_attention") is segment_ids
    assert attention_mask(segment_ids, "flash_attention_2") is None


def test_an_attention_that_cannot_isolate_is_refused() -> None:
    """Samples would see each other in silence."""
    from tundish.train.attention import attention_mask

    with pytest.raises(ValueError, match=r"must be sdpa, eager.*not 'paged'"):
        attention_mask(_collate([_samples(2, 3)])["segment_ids"], "paged")


@pytest.fixture
def prepared(tiny_model: Path, tmp_path: Path, write_lines: Any) -> str:
    """A prepared folder of 40 pairs in some ten rows."""
    from tundish.data.encoding import Job
    from tundish.data.opening import open_source
    from tundish.data.prepare import prepare

    pairs = [{"prompt": f"{n}: two? ", "response": "fox " * (n % 7) + f"four {n}"} for n in range(40)]
    path = write_lines(tmp_path / "train.jsonl", pairs)
    source = open_source(str(path), "INSTRUCTION_FINETUNE", system_message=True)
    return prepare(source, Job(model=str(tiny_model), task_type="INSTRUCTION_FINETUNE", context_length=64)).folder


# Streaming leaves its index.json open.
@pytest.mark.filterwarnings(r"ignore:unclosed file .*index\.json:ResourceWarning")
@pytest.mark.parametrize("num_workers", [0, 2])
def test_the_loader_gives_every_prepared_sample_once(prepared: str, tiny_model: Path, num_workers: int) -> None:
    """What was prepared would not be what is trained, with or without processes that read ahead."""
    from transformers import AutoTokenizer

    from tundish.data.manifest import Prepared
    from tundish.train.loader import PackedRows, build_packed_dataloader

    manifest, rows = Prepared.read(Path(prepared)), PackedRows(prepared)
    assert len(rows) == manifest.rows > 4 and manifest.rows % 4
    dataset = {"local": prepared, "max_seq_len": 64, "shuffle": True, "shuffle_seed": 3}
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    spec = build_packed_dataloader(tokenizer, 4, dataset, num_workers=num_workers)
    loader: Any = spec.dataloader
    orders: list[list[int]] = []
    for epoch in (0, 1):
        loader.sampler.set_epoch(epoch)
        orders.append(list(loader.sampler))
        batches = list(loader)
        assert len(batches) == len(loader) == -(-manifest.rows // 4)
        assert all(spec.get_num_samples_in_batch(batch) == 4 for batch in batches)
        assert sum(spec.get_num_tokens_in_batch(batch) for batch in batches) == manifest.tokens
        targets = sum(spec.get_num_tokens_in_batch(batch, "loss_generating") for batch in batches)
        assert targets == manifest.target_tokens
        seen = [ids[:n] for b in batches for ids, n in zip(b["input_ids"].tolist(), b["total_tokens"], strict=True)]
        assert seen == [rows[number]["tokens"].tolist() for number in orders[-1]]
    assert orders[0] != orders[1] and sorted(orders[0]) == sorted(orders[1])
    # Ends the workers now. The spec refers to itself, and left to the garbage collector they are waited for 10 s.
    del spec.dataloader


@pytest.mark.filterwarnings(r"ignore:unclosed file .*index\.json:ResourceWarning")
def test_padding_is_the_tokenizers(prepared: str, tmp_path: Path, save_tokenizer: Any) -> None:
    """A tokenizer without padding token, as Llama 3's, would end the run; padding is its end of sequence then."""
    from transformers import AutoTokenizer

    from tundish.train.loader import build_packed_dataloader

    tokenizer = AutoTokenizer.from_pretrained(save_tokenizer(tmp_path / "model"))
    dataset = {"local": prepared, "max_seq_len": 64, "shuffle": False}
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    for padding in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        last = list(build_packed_dataloader(tokenizer, 4, dataset).dataloader)[-1]
        assert last["total_tokens"][-1] == 0 and set(last["input_ids"][-1].tolist()) == {padding}
        tokenizer.pad_token = None


def test_llm_foundry_finds_the_loader() -> None:
    """A run's YAML would not train: LLM Foundry knows the loader by its entry point alone."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from llmfoundry import registry
    from tundish.train.loader import build_packed_dataloader

    assert registry.dataloaders.get("tundish_packed") is build_packed_dataloader
