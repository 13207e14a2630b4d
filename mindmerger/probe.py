"""Tests of a loaded LLM on a few tokens: its logits must depend neither on the batch nor on the cache."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import DynamicCache, PreTrainedModel

from common.errors import InputError, first_line
from mindmerger.evaluation.decoding import cached_logits, continued_logits
from mindmerger.modeling import InputEmbeds

# Allowed relative difference of logits. Over all causal LMs of transformers, tiny and in float32, right ones differ by
# at most 0.0008 (steps of Zamba 2), wrong ones by at least 0.04. In 16 bits the limit is the square root of eps: 0.09
# in bfloat16, 0.03 in float16.
_LEAST = 0.01
# Also allowed: this multiple of the effect of changing the last bit of each input, which models of many experts
# amplify, up to a limit below the difference between logits of different tokens.
_AMPLIFIED, _MOST = 4, 0.5
# Tokens of the two rows; the last ones of each follow a cache of the others.
_LENGTHS, _LATER = (9, 6), 3


def check_padding(llm: PreTrainedModel) -> None:
    """Raise InputError if an LLM's logits depend on the padding of a batch, as in training without packing.

    Args:
        llm: LLM in eval mode.

    Raises:
        InputError: the logits depend on it, or the LLM cannot run.
    """
    with _one_line(llm), torch.no_grad():
        trial = _Trial(llm)
        sequence = trial.sequence(len(_LENGTHS))
        arguments = {"attention_mask": sequence.mask, "position_ids": sequence.position_ids, "use_cache": False}
        logits = llm(inputs_embeds=sequence.embeds, **arguments).logits
        trial.compare([row[-len(own) :] for row, own in zip(logits, trial.alone, strict=True)], "in a padded batch")


def check_answers(llm: PreTrainedModel) -> None:
    """Raise InputError if an LLM's logits with and without a cache differ, for one row or in a padded batch.

    Args:
        llm: LLM in eval mode.

    Raises:
        InputError: the logits differ, or the LLM cannot run.
    """
    with _one_line(llm), torch.no_grad():
        trial = _Trial(llm)
        trial.compare(trial.behind_cache(1, at_once=False), "with a cache")
        trial.compare(trial.behind_cache(2, at_once=False), "with a cache, in a padded batch")
        trial.compare(trial.behind_cache(2, at_once=True), "with a cache, of several tokens at once")


class _Trial:
    """Two short rows, and an LLM's logits of each row alone, without cache, mask and positions."""

    def __init__(self, llm: PreTrainedModel):
        self._llm = llm
        embedding, count = llm.get_input_embeddings(), sum(_LENGTHS)
        ids = torch.arange(count, device=llm.device) * (embedding.num_embeddings // count)
        self._ids = ids.split(_LENGTHS)
        self._embeds = [embedding(row[None])[0] for row in self._ids]
        self.alone = [self._logits(row) for row in self._embeds]
        signs = 1 - 2.0 * (torch.arange(self._embeds[0].shape[1], device=llm.device) % 3 % 2)
        unit = torch.finfo(llm.dtype).eps
        nudged = [self._logits((row * (1 + unit * signs)).to(row.dtype)) for row in self._embeds]
        self._tolerance = min(_MOST, max(_LEAST, unit**0.5, _AMPLIFIED * _difference(nudged, self.alone)))

    def _logits(self, embeds: torch.Tensor) -> torch.Tensor:
        return self._llm(inputs_embeds=embeds[None], use_cache=False).logits[0]

    def sequence(self, count: int) -> InputEmbeds:
        """The first `count` rows, left-padded."""
        embeds, masks = (
            pad_sequence(rows, batch_first=True, padding_side="left")
            for rows in (self._embeds[:count], [torch.ones_like(row) for row in self._ids[:count]])
        )
        return InputEmbeds(embeds, masks)

    def behind_cache(self, count: int, at_once: bool) -> list[torch.Tensor]:
        """Logits of the last tokens of the first rows after a cache of the others, all at once or one by one."""
        cache, sequence = DynamicCache(config=self._llm.config), self.sequence(count)
        mask, positions = sequence.mask, sequence.position_ids
        inputs = {"inputs_embeds": sequence.embeds[:, :-_LATER]}
        logits = [
            cached_logits(self._llm, inputs, mask[:, :-_LATER], positions[:, :-_LATER], cache, logits_to_keep=1)[:, -1:]
        ]
        later = torch.stack([row[-_LATER:] for row in self._ids[:count]])
        size = _LATER if at_once else 1
        for start in range(0, _LATER, size):
            end = mask.shape[1] - _LATER + start + size
            logits.append(
                continued_logits(self._llm, later[:, start : start + size], mask[:, :end], positions[:, :end], cache)
            )
        return list(torch.cat(logits, dim=1))

    def compare(self, logits: list[torch.Tensor], where: str) -> None:
        """Raise InputError unless these logits equal those of the last tokens of each row alone, up to rounding."""
        alone = [own[-len(row) :] for row, own in zip(logits, self.alone, strict=False)]
        difference = _difference(logits, alone)
        # `not ... <=` also refuses NaN.
        if not difference <= self._tolerance:
            raise InputError(
                f"the LLM {self._llm.name_or_path} ({type(self._llm).__name__}) gives logits {where} that differ by "
                f"{difference:.0%} from those of a row alone without a cache: use another LLM"
            )


def _difference(logits: list[torch.Tensor], reference: list[torch.Tensor]) -> float:
    """Largest difference of a token, relative to the reference's RMS; constants that softmax ignores are removed."""
    logits, reference = (torch.cat(rows).float() for rows in (logits, reference))
    logits, reference = (rows - rows.mean(dim=-1, keepdim=True) for rows in (logits, reference))
    return float((logits - reference).norm(dim=-1).max() / reference.norm(dim=-1).square().mean().sqrt())


@contextmanager
def _one_line(llm: PreTrainedModel) -> Iterator[None]:
    try:
        yield
    except InputError:
        raise
    # Families raise different errors for arguments that they do not take.
    except Exception as error:
        name = f"{llm.name_or_path} ({type(llm).__name__})"
        raise InputError(f"the LLM {name} cannot run: {first_line(error)}") from error
