"""Examples to batches: who sees which rows, in which order, padded how little."""

import bisect
import itertools
import random
from array import array
from dataclasses import dataclass

import torch

from mindmerger.tokenization import Tokens

# The label that cross entropy leaves out, by PyTorch's and Hugging Face's convention.
IGNORED = -100


@dataclass
class Batch:
    """Right-padded int64 token ids, under the names that `MindMergerForCausalLM` takes them by.

    Attributes:
        input_ids, attention_mask: the source, [batch, source length]; the mask is 1 for a token, 0 for padding.
        prompt_ids, prompt_attention_mask: [batch, prompt length]; length 0 without augmentation.
        labels: the target, [batch, target length], padded with -100; length 0 for generation.
    """

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    prompt_ids: torch.Tensor
    prompt_attention_mask: torch.Tensor
    labels: torch.Tensor

    def to(self, device: torch.device) -> "Batch":
        """The same batch on `device`."""
        return Batch(**{name: tensor.to(device, non_blocking=True) for name, tensor in vars(self).items()})


def collate(rows: list[Tokens], source_pad_id: int) -> Batch:
    """Pad `rows` to the longest of each kind. An encoder may tell padding by its own padding id alone."""
    input_ids, attention_mask = pad([row.source for row in rows], source_pad_id)
    prompt_ids, prompt_attention_mask = pad([row.prompt for row in rows], 0)
    labels, _ = pad([row.target for row in rows], IGNORED)
    return Batch(input_ids, attention_mask, prompt_ids, prompt_attention_mask, labels)


def pad(sequences: list[array], pad_id: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(ids, mask), both int64 [sequences, longest], filled up on the right with `pad_id` and 0."""
    longest = max(map(len, sequences))
    ids = [[*sequence, *[pad_id] * (longest - len(sequence))] for sequence in sequences]
    mask = [[1] * len(sequence) + [0] * (longest - len(sequence)) for sequence in sequences]
    return torch.tensor(ids, dtype=torch.int64), torch.tensor(mask, dtype=torch.int64)


def plan_epoch(
    lengths: list[int], batch_size: int, accumulation: int, ranks: int, seed: int, epoch: int
) -> list[list[list[list[int]]]]:
    """The rows of every optimizer step of one epoch, shuffled anew.

    A global batch is a random draw, the same for any accumulation and any number of ranks. Within it the rows are
    sorted by length and cut into micro batches of like tokens, so that none needs much more memory than another: a few
    long rows, or more short ones. What shares a micro batch is of like length and needs little padding, and the ranks
    that wait for each other have like work.

    Args:
        lengths: of all rows, in tokens.
        batch_size: rows of a global batch; the epoch's last one may have fewer.
        accumulation: micro batches of a step on each rank.
        ranks: how many.
        seed, epoch: of the shuffle.

    Returns:
        `plan[step][i][rank]`: row numbers of the i-th micro batch of a step on a rank; as many rows on every rank, and
        some on each, but where a last batch has too few.
    """
    order = list(range(len(lengths)))
    random.Random(f"{seed} {epoch}").shuffle(order)
    plan = []
    for start in range(0, len(order), batch_size):
        rows = sorted(order[start : start + batch_size], key=lambda row: (lengths[row], row))
        peers = [rows[first : first + ranks] for first in range(0, len(rows), ranks)]
        edges = _even_cuts([sum(lengths[row] for row in group) for group in peers], accumulation)
        micro_batches = [rows[a * ranks : b * ranks] for a, b in itertools.pairwise(edges)]
        plan.append([[micro[rank::ranks] for rank in range(ranks)] for micro in micro_batches])
    return plan


def _even_cuts(sizes: list[int], parts: int) -> list[int]:
    """Edges, from 0 to len(sizes), of contiguous parts of like total size; none is empty if there are enough sizes."""
    totals = list(itertools.accumulate(sizes, initial=0))
    edges = [0]
    for part in range(1, parts):
        wanted = totals[-1] * part / parts
        after = bisect.bisect_left(totals, wanted)
        nearest = after if totals[after] - wanted <= wanted - totals[after - 1] else after - 1
        first, last = edges[-1] + 1, len(sizes) - (parts - part)
        edges.append(max(min(nearest, last), min(first, len(sizes))))
    return [*edges, len(sizes)]


def plan_once(lengths: list[int], batch_size: int, ranks: int) -> list[list[list[int]]]:
    """Every row once, longest first, for evaluation.

    Returns:
        `plan[rank]`: that rank's batches of row numbers, of like length; as many on every rank, the last ones of
        some ranks empty.
    """
    order = sorted(range(len(lengths)), key=lambda row: (-lengths[row], row))
    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    batches += [[]] * (-len(batches) % ranks)
    return [batches[rank::ranks] for rank in range(ranks)]
