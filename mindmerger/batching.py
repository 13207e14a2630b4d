"""Batches of token ids: plan of the rows of each rank and step, and their layout for the models."""

import bisect
import itertools
import random
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

# Label that cross entropy ignores, by PyTorch's and Hugging Face's convention.
IGNORED = -100

# Token sequences of an example.
KINDS = ("source", "prompt", "target")


@dataclass(frozen=True)
class Tokens:
    """Token ids of one example, each sequence a list or an int32 array.

    Attributes:
        source: input of the encoder, with its special tokens.
        prompt: input of the LLM, without special tokens; empty without augmentation.
        target: target of the LLM, ending in eos unless it was cut; empty for generation.
        language: English name of the source's language.
        cut: those of `KINDS` that were shortened.
        mapped: False for the LLM alone, whose sequence has no mapped states and no boundary.
        opening: ids between bos and mapped states: a chat template up to the text of the user's turn.
    """

    source: Sequence[int]
    prompt: Sequence[int]
    target: Sequence[int]
    language: str = ""
    cut: tuple[str, ...] = ()
    mapped: bool = True
    opening: Sequence[int] = ()

    def __len__(self) -> int:
        """Length of the LLM's sequence: bos, opening, source and boundary if mapped, prompt, target."""
        mapped = len(self.source) + 1 if self.mapped else 0
        return 1 + len(self.opening) + mapped + len(self.prompt) + len(self.target)


def without_sources(rows: Sequence[Tokens]) -> list[Tokens]:
    """The rows as the LLM alone reads them."""
    return [replace(row, mapped=False) for row in rows]


@dataclass(frozen=True)
class Batch:
    """Input of encoder and LLM on the host; each sequence is
    `[bos | opening | mapped states | boundary | prompt | target]`, with an empty opening unless prompts are chats.

    The last target token is no input, since nothing is predicted from it. A packed batch has all sequences end to end
    in one row. A padded batch has one row for each sequence, padded on the left. All values that depend on lengths are
    computed on the host, so that no later step waits for the device. Positions are indices into flattened tensors.

    Attributes:
        source_ids, source_mask: int64 [mapped rows, longest source], padded on the right; the mask is 1 for a token.
        source_index: int64 [states], positions of the tokens in `source_ids`.
        token_ids: int64 [1, tokens] or [rows, longest sequence]; 0 for a mapped state, a boundary or padding.
        position_ids: int64, same shape as `token_ids`; each sequence counts from 0.
        mapped_positions: int64 [states + boundaries], positions in `token_ids` of the mapped states, then of the
            boundaries; a row of the LLM alone has neither.
        labels: int64 [targets], target tokens of all rows.
        logit_positions: int64 [targets], positions of the tokens that predict `labels`; in a padded batch, among the
            last `columns` columns.
        columns: columns of a padded batch whose logits are computed: the number of tokens of the longest target.
        mask: int64 [rows, longest sequence], 1 for a token; None for a packed batch.
        cumulative_lengths: int32 [rows + 1], start and end positions of the sequences.
        lengths: number of tokens of each sequence.
    """

    source_ids: torch.Tensor
    source_mask: torch.Tensor
    source_index: torch.Tensor
    token_ids: torch.Tensor
    position_ids: torch.Tensor
    mapped_positions: torch.Tensor
    labels: torch.Tensor
    logit_positions: torch.Tensor
    columns: int
    mask: torch.Tensor | None
    cumulative_lengths: torch.Tensor
    lengths: list[int]

    def to(self, device: torch.device) -> "Batch":
        """Copy the batch to `device`, asynchronously to a GPU."""

        def move(value: object) -> object:
            return to_device(value, device) if isinstance(value, torch.Tensor) else value

        return Batch(**{name: move(value) for name, value in vars(self).items()})


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Copy a tensor on the CPU to `device`, asynchronously to a GPU."""
    return (tensor.pin_memory() if device.type == "cuda" else tensor).to(device, non_blocking=True)


def lay_out(rows: Sequence[Tokens], bos_token_id: int | None, source_pad_id: int = 0, packed: bool = False) -> Batch:
    """Build the batch of `rows` on the CPU.

    Args:
        rows: one or more examples.
        bos_token_id: first token of every sequence; None for an LLM without one.
        source_pad_id: padding id of the sources; some encoders detect padding by this id, not by the mask.
        packed: True for all sequences in one row, False for one row each.
    """
    bos = [] if bos_token_id is None else [bos_token_id]
    openings = [[*bos, *row.opening] for row in rows]
    sequences = [
        [*opening, *[0] * (len(row.source) + 1 if row.mapped else 0), *row.prompt, *row.target[:-1]]
        for row, opening in zip(rows, openings, strict=True)
    ]
    lengths = [len(sequence) for sequence in sequences]
    edges, columns = [0, *itertools.accumulate(lengths)], max(1, *(len(row.target) for row in rows))
    shape = (1, edges[-1]) if packed else (len(rows), max(lengths))
    ends = edges[1:] if packed else range(shape[1], len(rows) * shape[1] + 1, shape[1])
    tokens, positions, mask = (np.zeros(shape, np.int64).reshape(-1) for _ in range(3))
    states, boundaries = [], []
    for row, sequence, opening, end in zip(rows, sequences, openings, ends, strict=True):
        start = end - len(sequence)
        tokens[start:end], positions[start:end], mask[start:end] = sequence, range(len(sequence)), 1
        if row.mapped:
            states.append(start + len(opening) + np.arange(len(row.source)))
            boundaries.append(start + len(opening) + len(row.source))
    # The logits of a token predict the next token: those of the last tokens of a sequence predict its target.
    ends = ends if packed else range(columns, len(rows) * columns + 1, columns)
    predicting = [np.arange(end - len(row.target), end) for row, end in zip(rows, ends, strict=True)]
    source_ids, source_mask = pad([row.source for row in rows if row.mapped], source_pad_id)
    return Batch(
        source_ids,
        source_mask,
        source_mask.flatten().nonzero().flatten(),
        *(torch.from_numpy(flat).view(shape) for flat in (tokens, positions)),
        *map(_joined, ([*states, boundaries], [row.target for row in rows], predicting)),
        columns,
        None if packed else torch.from_numpy(mask).view(shape),
        torch.tensor(edges, dtype=torch.int32),
        lengths,
    )


def _joined(sequences: Sequence[Sequence[int]]) -> torch.Tensor:
    return torch.from_numpy(np.concatenate([np.asarray(sequence, np.int64) for sequence in sequences]))


def pad(sequences: Sequence[Sequence[int]], pad_id: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Pad sequences on the right to (ids, mask), both int64 [sequences, longest]."""
    longest = max(map(len, sequences), default=0)
    ids = torch.full((len(sequences), longest), pad_id)
    mask = torch.zeros_like(ids)
    for row, sequence in enumerate(sequences):
        ids[row, : len(sequence)] = torch.as_tensor(np.asarray(sequence, np.int64))
        mask[row, : len(sequence)] = 1
    return ids, mask


def padded_rows(
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    prompt_ids: torch.Tensor | None = None,
    prompt_attention_mask: torch.Tensor | None = None,
    labels: torch.Tensor | None = None,
) -> list[Tokens]:
    """Rows of tensors padded on either side; the arguments are those of `MindMergerForCausalLM.forward`."""

    def unpad(ids: torch.Tensor, mask: torch.Tensor) -> list[list[int]]:
        return [row[real].tolist() for row, real in zip(ids.cpu(), mask.bool().cpu(), strict=True)]

    sources = unpad(input_ids, attention_mask)
    prompts = [[]] * len(sources) if prompt_ids is None else unpad(prompt_ids, prompt_attention_mask)
    targets = [[]] * len(sources) if labels is None else unpad(labels, labels != IGNORED)
    return [Tokens(*row) for row in zip(sources, prompts, targets, strict=True)]


def plan_epoch(
    lengths: Sequence[int], batch_size: int, accumulation: int, ranks: int, seed: int, epoch: int
) -> Iterator[list[list[list[int]]]]:
    """Plan the rows of every optimizer step of one epoch, shuffled with `seed` and `epoch`.

    A global batch is a random draw, the same for any accumulation and any number of ranks. Its rows are sorted by
    length and split into micro batches with similar numbers of tokens, so that their memory is similar: few long rows
    or many short ones. The rows of a micro batch have similar lengths, which keeps padding low and gives all ranks
    similar work.

    Args:
        lengths: tokens of each row.
        batch_size: rows of a global batch; the last one of an epoch may have fewer.
        accumulation: micro batches of a step on each rank.
        ranks: number of ranks.
        seed, epoch: seeds of the shuffle.

    Yields:
        For each step `micro[i][rank]`: row numbers of the i-th micro batch on a rank. Every rank has the same number
        of rows, at least one, unless the last batch has too few.
    """
    order = array("q", range(len(lengths)))
    random.Random(f"{seed} {epoch}").shuffle(order)
    for start in range(0, len(order), batch_size):
        rows = sorted(order[start : start + batch_size], key=lambda row: (lengths[row], row))
        peers = [rows[first : first + ranks] for first in range(0, len(rows), ranks)]
        edges = _even_cuts([sum(int(lengths[row]) for row in group) for group in peers], accumulation)
        micro_batches = [rows[a * ranks : b * ranks] for a, b in itertools.pairwise(edges)]
        yield [[micro[rank::ranks] for rank in range(ranks)] for micro in micro_batches]


def _even_cuts(sizes: list[int], parts: int) -> list[int]:
    """Edges, from 0 to len(sizes), of contiguous parts of similar total size, none empty if there are enough sizes."""
    totals = list(itertools.accumulate(sizes, initial=0))
    edges = [0]
    for part in range(1, parts):
        wanted = totals[-1] * part / parts
        after = bisect.bisect_left(totals, wanted)
        nearest = after if totals[after] - wanted <= wanted - totals[after - 1] else after - 1
        first, last = edges[-1] + 1, len(sizes) - (parts - part)
        edges.append(max(min(nearest, last), min(first, len(sizes))))
    return [*edges, len(sizes)]


def plan_once(lengths: Sequence[int], batch_size: int, ranks: int) -> list[list[list[int]]]:
    """Plan batches for evaluation: every row once, longest first.

    Returns:
        `plan[rank]`: batches of row numbers, of similar length, for each rank. All ranks have the same number of
        batches, of which the last may be empty.
    """
    order = sorted(range(len(lengths)), key=lambda row: (-lengths[row], row))
    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    batches += [[]] * (-len(batches) % ranks)
    return [batches[rank::ranks] for rank in range(ranks)]
