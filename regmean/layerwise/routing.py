"""Routing of a mixture of experts: how often a merge chooses the experts that a model chooses."""

from contextlib import ExitStack
from typing import Any

import torch
from torch import nn

from common.ranks import Process
from regmean.experts import chosen, expert_layers
from regmean.layerwise.model import BEFORE, Course


def advance(course: Course, step: int, weights: dict[str, torch.Tensor], index: int) -> None:
    """Move a batch through a step, as `Course.advance`, and keep the experts of its tokens in `course.routes`.

    Raises:
        InputError: a state is NaN or infinite.
    """
    masks: list[torch.Tensor] = []

    def record(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        masks.append(chosen(module, *args, **kwargs))

    layers, batch = course.model.layers, course.batches[index]
    with ExitStack() as hooks:
        for name, module in layers[step].named_modules() if BEFORE < step < len(layers) else ():
            if expert_layers(name, module):
                hooks.enter_context(module.register_forward_pre_hook(record, with_kwargs=True))
        course.advance(step, weights, index)
    course.routes.pop(index, None)
    # Some models pass other rows than the tokens.
    if masks and all(len(mask) == batch.mask.numel() for mask in masks):
        course.routes[index] = batch.rows(torch.cat(masks, 1)[None]).cpu()


def agreement(merged: Course, own: Course, process: Process) -> float | None:
    """Mean over tokens of the fraction of a token's experts in a model that the merge chooses, too, after the last step
    of both courses; None if it has no experts.
    """
    same = tokens = 0.0
    for index, mask in own.routes.items():
        both = mask & merged.routes[own.numbers[index]]
        same += (both.sum(1) / mask.sum(1).clamp(min=1)).double().sum().item()
        tokens += len(mask)
    same, tokens = process.sum(same, tokens)
    return same / tokens if tokens else None
