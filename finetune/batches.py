"""How the rows of a step become micro-batches: layout, collator, order."""

from __future__ import annotations

import dataclasses
import heapq
import itertools
import math
import random
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import datasets
import torch
from datasets import Dataset
from torch import Tensor

from finetune.machine import processes
from qlora_helpers import Settings

# A row: `input_ids`, and `labels` with -100 where nothing is trained.
Encoded = Mapping[str, list[int]]
Batch = dict[str, Any]  # what a model is called with: tensors by name, and two that are none


@dataclasses.dataclass(frozen=True)
class Cut:
    """How the rows of a step are computed: rows at once, layout, and what is kept in memory.

    Rows are laid end to end (`flat`) or padded. `recomputed_layers` keep no activations for the
    backward pass; `dense` keeps a dequantised copy of the 4-bit weights.
    """

    micro_batch: int
    flat: bool
    attention: str
    recomputed_layers: int = 0
    dense: bool = False

    @property
    def layout(self) -> str:
        """For people."""
        return f"{'end to end' if self.flat else 'padded'}, {self.attention}"

    def size(self, lengths: Sequence[int]) -> int:
        """Tokens that a micro-batch of rows of these lengths computes, padding included."""
        return sum(lengths) if self.flat else len(lengths) * max(lengths)


class Collator:
    """Rows to one micro-batch: padded, [rows, longest], or, if `flat`, end to end, [1, tokens].

    Padding stands on the right, where no real token of a causal model sees it, so no mask is
    needed. Flat rows carry `position_ids`, from which transformers builds a block-diagonal mask
    (unless there is a cache), and the cumulative lengths that varlen needs.
    """

    def __init__(self, cut: Cut, pad: int):
        self.cut, self.pad = cut, pad

    def __call__(self, rows: Sequence[Encoded]) -> Batch:
        """A micro-batch of rows with `input_ids` and `labels`; no row's first label is trained."""
        ids = [list(row["input_ids"]) for row in rows]
        labels = [[-100, *row["labels"][1:]] for row in rows]
        return self.end_to_end(ids, labels) if self.cut.flat else self.padded(ids, labels)

    def end_to_end(self, ids: list[list[int]], labels: list[list[int]]) -> Batch:
        """Flat: `position_ids` begin at 0 in each row."""
        lengths = [len(row) for row in ids]
        batch: Batch = {
            "input_ids": torch.tensor([[*itertools.chain(*ids)]]),
            "labels": torch.tensor([[*itertools.chain(*labels)]]),
            "position_ids": torch.cat([torch.arange(n) for n in lengths])[None],
            "use_cache": False,
        }
        if self.cut.attention == "varlen":
            ends = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
            batch |= {"cu_seq_lens_q": ends, "max_length_q": max(lengths)}
        return batch

    def padded(self, ids: list[list[int]], labels: list[list[int]]) -> Batch:
        """Padded to the longest row, on a GPU to a multiple of 64."""
        # cuDNN plans anew for every length that it has not seen.
        step = 64 if torch.cuda.is_available() else 1
        width = -(-max(map(len, ids)) // step) * step
        return {
            "input_ids": torch.tensor([row + [self.pad] * (width - len(row)) for row in ids]),
            "labels": torch.tensor([row + [-100] * (width - len(row)) for row in labels]),
            "use_cache": False,
        }


class StepSampler:
    """Row numbers of an epoch: shuffled by `seed` and epoch, then laid out within each step.

    A step is `step` rows. Its gradient is the sum over them, normalised by the step's trained
    tokens, so their order within it changes nothing but rounding. Padded micro-batches get rows of
    like length; flat ones a like number of tokens. Several processes take micro-batches in turn. An
    epoch's last, smaller step is then filled up to as many for each with the row after the last, of
    which nothing is trained (`with_void_row`), so that no real row comes twice.
    """

    def __init__(self, lengths: Sequence[int], step: int, seed: int, cut: Cut):
        self.count, self.step, self.seed, self.cut, self.epoch = len(lengths), step, seed, cut, 0
        self.processes = processes()[1]
        self.lengths = lengths if self.processes == 1 else [*lengths, min(lengths)]

    def set_epoch(self, epoch: int) -> None:
        """Called by the training loop: each epoch has its own order, and keeps it if resumed."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.count + self.missing(self.count % self.step)

    def missing(self, rows: int) -> int:
        """Rows that a step lacks for every process to have as many micro-batches."""
        return -rows % (self.cut.micro_batch * self.processes) if self.processes > 1 else 0

    def __iter__(self) -> Iterator[int]:
        for rows in self.steps(self.epoch):
            rows += [self.count] * self.missing(len(rows))
            rows.sort(key=lambda row: self.lengths[row])
            even = self.cut.flat and len(rows) % self.cut.micro_batch == 0
            yield from self.evenly_spread(rows) if even else rows

    def evenly_spread(self, rows: list[int]) -> list[int]:
        """Rows, sorted by length, spread over micro-batches of about equally many tokens.

        The longest that is left goes to the micro-batch with the fewest tokens so far (greedy).
        """
        parts: list[list[int]] = [[] for _ in range(len(rows) // self.cut.micro_batch)]
        unfilled = [(0, number) for number in range(len(parts))]  # tokens, micro-batch: a heap
        for row in reversed(rows):
            tokens, number = heapq.heappop(unfilled)
            parts[number].append(row)
            if len(parts[number]) < self.cut.micro_batch:
                heapq.heappush(unfilled, (tokens + self.lengths[row], number))
        return [*itertools.chain(*parts)]

    def steps(self, epoch: int) -> list[list[int]]:
        """The rows of each step of an epoch."""
        order = list(range(self.count))
        random.Random(f"{self.seed} {epoch}").shuffle(order)
        return [order[start : start + self.step] for start in range(0, len(order), self.step)]

    def micro_batches_by_size(self, epochs: int) -> list[list[int]]:
        """The micro-batches of the first `epochs` epochs, by number of tokens.

        Of a large data set, of the first epochs alone: up to 200,000 rows, but at least one epoch.
        """
        found = []
        for epoch in range(max(1, min(epochs, 200_000 // self.count))):
            self.set_epoch(epoch)
            found += self.micro_batches()
        self.set_epoch(0)
        return sorted(found, key=self.size)

    def size(self, rows: Sequence[int]) -> int:
        """Tokens that a micro-batch of these rows computes."""
        return self.cut.size([self.lengths[row] for row in rows])

    def micro_batches(self) -> list[list[int]]:
        """The epoch's micro-batches, as row numbers."""
        rows, size = list(self), self.cut.micro_batch
        return [rows[i : i + size] for i in range(0, len(rows), size)]


def with_void_row(data: Dataset) -> Dataset:
    """`data` and one more row, its shortest again, of which nothing is trained."""
    lengths = row_lengths(data)
    void = data.select([lengths.index(min(lengths))]).map(
        lambda row: {"labels": [-100] * len(row["labels"])}, load_from_cache_file=False
    )
    return datasets.concatenate_datasets([data, void.cast(data.features)])


def row_lengths(examples: Dataset) -> list[int]:
    """Tokens of each encoded row."""
    if "length" in examples.column_names:
        return list(examples["length"])
    return [len(ids) for ids in examples["input_ids"]]


def steps_of(settings: Settings, rows: int) -> tuple[int, int]:
    """Optimizer steps of an epoch, and of the run."""
    per_epoch = math.ceil(rows / settings.effective_batch)
    if settings.max_steps > 0:
        return per_epoch, settings.max_steps
    return per_epoch, math.ceil(settings.epochs * per_epoch)


def own_lengths(batch: Mapping[str, Tensor]) -> Tensor:
    """For each token of a collated micro-batch the length of its own row, `[rows, tokens]`.

    A padded row ends with its last trained token, which is EOS.
    """
    if "position_ids" in batch:
        row = (batch["position_ids"] == 0).cumsum(1) - 1
        return row[0].bincount()[row]
    places = torch.arange(1, batch["labels"].shape[1] + 1, device=batch["labels"].device)
    ends = ((batch["labels"] != -100) * places).amax(1, keepdim=True).clamp(min=1)
    return ends.expand_as(batch["labels"])


def split_batch(batch: Batch, parts: int) -> list[Batch]:
    """A collated micro-batch, padded or flat, as up to `parts` smaller ones of whole rows."""
    if "position_ids" not in batch:
        ids, labels = (batch[name].chunk(parts) for name in ("input_ids", "labels"))
        return [{**batch, "input_ids": i, "labels": n} for i, n in zip(ids, labels, strict=True)]
    starts = (batch["position_ids"][0] == 0).nonzero()[:, 0].tolist()
    edges = [*starts[:: -(-len(starts) // parts)], batch["input_ids"].shape[1]]
    result = []
    for first, last in itertools.pairwise(edges):
        names = ("input_ids", "labels", "position_ids")
        piece = {**batch, **{name: batch[name][:, first:last] for name in names}}
        if "cu_seq_lens_q" in batch:
            ends = [start - first for start in [*starts, edges[-1]] if first <= start <= last]
            cu = batch["cu_seq_lens_q"].new_tensor(ends)
            piece |= {"cu_seq_lens_q": cu, "max_length_q": int(cu.diff().max())}
        result.append(piece)
    return result
