"""The data loader: prepared rows → batches that say which sample each token belongs to.

Registered with LLM Foundry as the loader `tundish_packed`. Every row is in exactly one batch of an epoch; where rows do
not divide evenly, the last batch is filled with rows that have no targets.
"""

import os
import signal
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch
from composer.core import DataSpec
from composer.utils import dist
from streaming import LocalDataset
from torch.utils.data import DataLoader, Dataset
from torch.utils.data.distributed import DistributedSampler
from transformers import PreTrainedTokenizerBase

from tundish.base.processes import die_with

IGNORE_INDEX = -100
Row = Mapping[str, npt.NDArray[Any]]

FILLER: Row = {
    "tokens": np.zeros(0, dtype=np.int32),
    "loss_mask": np.zeros(0, dtype=np.uint8),
    "segments": np.zeros(0, dtype=np.int32),
}
"""A row of nothing but padding."""


class PackedRows(Dataset[Row]):
    """The rows of a prepared folder by number; -1 is FILLER."""

    def __init__(self, local: str) -> None:
        self.shards = LocalDataset(local)

    def __len__(self) -> int:
        return len(self.shards)

    def __getitem__(self, number: int) -> Row:
        return FILLER if number < 0 else self.shards[number]


class RowOrder(DistributedSampler[int]):
    """Row numbers of one rank, with the same global batches at any world size.

    Batch b of an epoch is rows b·G … (b+1)·G of that epoch's order; rank r takes the r-th of its equal parts.
    Composer calls `set_epoch` before each epoch.
    """

    def __init__(self, num_rows: int, rank_batch_size: int, *, shuffle: bool, seed: int) -> None:
        self.num_rows, self.rank_batch_size = num_rows, rank_batch_size
        self.num_replicas, self.rank = dist.get_world_size(), dist.get_global_rank()
        self.shuffle, self.seed, self.epoch = shuffle, seed, 0
        self.done: tuple[int, int] = (0, 0)
        """Epoch, and batches of it that were trained before a resume: Composer skips them, so they are not read."""
        # Composer drops the difference of these two from evaluation, as rows that are there twice. Here they are equal:
        # our surplus rows are fillers, which no metric counts.
        self.total_size = len(self) * self.num_replicas
        self.dataset = range(self.total_size)

    @property
    def num_batches(self) -> int:
        """Batches in an epoch."""
        return -(-self.num_rows // (self.rank_batch_size * self.num_replicas))

    def __len__(self) -> int:
        return self.num_batches * self.rank_batch_size

    def __iter__(self) -> Iterator[int]:
        rows = np.arange(self.num_rows)
        if self.shuffle:
            # Depends on seed and epoch alone: the same order on any number of ranks, and after a resume.
            np.random.default_rng((self.seed, self.epoch)).shuffle(rows)
        # Fillers, not repeated rows: every row is trained exactly once in an epoch.
        filled = np.full(len(self) * self.num_replicas, -1)
        filled[: self.num_rows] = rows
        # [batches, ranks, rows of a rank]: this rank's column
        mine = filled.reshape(self.num_batches, self.num_replicas, self.rank_batch_size)[:, self.rank]
        if self.epoch == self.done[0]:
            mine[: self.done[1]] = -1  # Composer skips these batches without training on them
        return iter(mine.ravel().tolist())


@dataclass(frozen=True, slots=True)
class Collate:
    """Rows → one batch, as long as its longest row (rounded up to 8)."""

    pad_token_id: int
    max_seq_len: int

    def __call__(self, rows: Sequence[Row]) -> dict[str, Any]:
        """A batch of B rows, T tokens.

        `input_ids`, `labels`, `position_ids` and `segment_ids` (1, 2, … for a row's samples, 0 for padding) int64
        [B, T]; `total_tokens`, `loss_generating_tokens` lists of B numbers, so that microbatches can be cut from them.
        """
        longest = max(1, *(len(row["tokens"]) for row in rows))
        # Rounding up must not make a row longer than the model's context.
        length = min(-(-longest // 8) * 8, max(self.max_seq_len, longest))
        shape = (len(rows), length)
        input_ids, labels = torch.full(shape, self.pad_token_id), torch.full(shape, IGNORE_INDEX)
        segment_ids, position_ids = torch.zeros(shape, dtype=torch.long), torch.zeros(shape, dtype=torch.long)
        for i, row in enumerate(rows):
            n = len(row["tokens"])
            tokens, lengths = torch.from_numpy(row["tokens"].astype(np.int64)), row["segments"]
            starts = np.cumsum(lengths) - lengths
            input_ids[i, :n] = tokens
            targets = row["loss_mask"].astype(bool)
            # A sample's first token is not predicted from the sample before it.
            targets[starts] = False
            labels[i, :n] = torch.where(torch.from_numpy(targets), tokens, IGNORE_INDEX)
            segment_ids[i, :n] = torch.from_numpy(np.repeat(np.arange(1, len(lengths) + 1), lengths))
            position_ids[i, :n] = torch.from_numpy(np.arange(n) - np.repeat(starts, lengths))
        return {
            "input_ids": input_ids,
            "labels": labels,
            "position_ids": position_ids,
            "segment_ids": segment_ids,
            "total_tokens": (segment_ids > 0).sum(1).tolist(),
            "loss_generating_tokens": (labels != IGNORE_INDEX).sum(1).tolist(),
        }


def count_tokens(batch: Mapping[str, Any]) -> dict[str, int]:
    """`total`: tokens that are not padding; `loss_generating`: targets."""
    return {"total": sum(batch["total_tokens"]), "loss_generating": sum(batch["loss_generating_tokens"])}


def _start_worker(rank: int, _number: int) -> None:
    # Signals that stop a run reach all of its processes. Without its workers, a rank would fail before its checkpoint.
    die_with(rank)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)


def build_packed_dataloader(
    tokenizer: PreTrainedTokenizerBase,
    device_batch_size: int,
    dataset: Mapping[str, Any],
    num_workers: int = 0,
) -> DataSpec:
    """LLM Foundry's builder of `name: tundish_packed`.

    Args:
        tokenizer: gives the padding token.
        device_batch_size: rows in a batch of one rank.
        dataset: `local` (prepared folder), `max_seq_len`, `shuffle`, `shuffle_seed`.
        num_workers: processes that read ahead; 0 = none.
    """
    rows = PackedRows(dataset["local"])
    order = RowOrder(len(rows), device_batch_size, shuffle=dataset["shuffle"], seed=dataset.get("shuffle_seed", 0))
    padding = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    collate = Collate(cast(int, padding), dataset["max_seq_len"])
    loader = DataLoader(
        rows,
        batch_size=device_batch_size,
        sampler=order,
        collate_fn=collate,
        num_workers=num_workers,
        pin_memory=torch.cuda.is_available(),
        persistent_workers=num_workers > 0,
        worker_init_fn=partial(_start_worker, os.getpid()),
    )
    return DataSpec(loader, get_num_tokens_in_batch=count_tokens)
