"""Detection of separate output heads and of heads that are the embedding table, from the tensors.

If the config ties the two and the stored head differs from the table, transformers uses the head. Other programs write
such folders.
"""

import re
from collections.abc import Callable

import numpy as np

from common.errors import InputError
from regmean.model_folder import Checkpoint
from regmean.tensor_file import FLOATS, TensorInfo, decode

# Patterns of the names of heads and of embedding tables.
HEAD = re.compile(
    r"(^|\.)(lm_head|embed_out|output_projection|decoder|pred_layer\.proj|vocab_projector|generator_lm_head|lm_loss)\.weight$"
)
TABLE = re.compile(r"emb|wte|transformer\.w\.")
CHUNK_ELEMENTS = 1 << 22  # elements of two tensors compared at a time
OWN, TIED, LACKING = "own", "tied", "lacking"


def settle_heads(
    models: list[Checkpoint], selects: Callable[[str], bool], problems: list[str], notes: list[str]
) -> tuple[set[str], bool]:
    """Compare the models' heads.

    Returns:
        Names of stored heads that are copies of an embedding table; and True if the merge has a separate head although
        the first model's config ties it.
    """
    heads = {head.name for model in models if (head := _head(model)) is not None}
    explicit = [_explicitly_tied(model) for model in models]
    if not heads:
        for model, tied in zip(models, explicit, strict=True):
            if None not in (tied, explicit[0]) and tied != explicit[0]:
                _differ(models[0], model, explicit[0], tied, problems)
        return set(), False
    states = [_state(model, tied) for model, tied in zip(models, explicit, strict=True)]
    first, own = models[0], next((model for model, state in zip(models, states, strict=True) if state == OWN), None)
    for model, state, tied in zip(models, states, explicit, strict=True):
        if own is not None and state == TIED and any(map(selects, heads)):
            problems.append(
                f"{own.name} has an output head of its own ({', '.join(sorted(heads & set(own.tensors)))}), and the "
                f"head of {model.name} is its embedding table: merge models that were trained alike"
            )
            return heads, False
        if own is None and {state, states[0]} == {TIED, LACKING}:
            _differ(first, model, explicit[0], tied, problems)
    if states[0] == OWN:
        # BERT's config ties the biases of two modules, too; transformers uses the stored head in any case.
        untied = explicit[0] is not False and not any(name.endswith("decoder.weight") for name in heads)
        if explicit[0]:
            change = ": tie_word_embeddings becomes false" if untied else ""
            notes.append(f"{first.name} has an output head of its own{change}")
        return set(), untied
    return (heads if TIED in states else set()), False


def _differ(first: Checkpoint, other: Checkpoint, a: bool | None, b: bool | None, problems: list[str]) -> None:
    problems.append(f"tie_word_embeddings is {a} in {first.name} and {b} in {other.name}")


def _state(model: Checkpoint, explicit: bool | None) -> str:
    head = _head(model)
    if head is not None and (explicit is False or not is_copy(head, model)):
        return OWN
    if explicit or (explicit is None and _tied_by_default(model)):
        return TIED
    return LACKING if head is None else OWN


def _head(model: Checkpoint) -> TensorInfo | None:
    # The shortest name is the model's; parts that predict further tokens may have heads of the same name.
    found = [name for name in model.tensors if HEAD.search(name)]
    return model.tensors[min(found, key=len)] if found else None


def _explicitly_tied(model: Checkpoint) -> bool | None:
    """Value in the config; None if the config leaves it to the default of its class."""
    text = model.config.get("text_config")
    for config in (model.config, text if isinstance(text, dict) else {}):
        if isinstance(config.get("tie_word_embeddings"), bool):
            return config["tie_word_embeddings"]
    return None


def _tied_by_default(model: Checkpoint) -> bool:
    from common.models import base_config  # imports transformers, which takes seconds

    try:
        config = base_config(str(model.folder))
    except InputError:
        return False
    return bool(getattr(config, "tie_word_embeddings", getattr(config.get_text_config(), "tie_word_embeddings", False)))


def is_copy(head: TensorInfo, model: Checkpoint) -> bool:
    """True if the head has the values of an embedding table of the model."""
    alike = [
        info
        for name, info in model.tensors.items()
        if info.shape == head.shape and info.dtype in FLOATS and TABLE.search(name) and not HEAD.search(name)
    ]
    return head.dtype in FLOATS and any(same_values(head, table) for table in alike)


def same_values(a: TensorInfo, b: TensorInfo) -> bool:
    """True if two tensors of one shape have the same values."""
    for start in range(0, a.size, CHUNK_ELEMENTS):
        stop = min(start + CHUNK_ELEMENTS, a.size)
        if not np.array_equal(decode(a.read(start, stop), a.dtype), decode(b.read(start, stop), b.dtype)):
            return False
    return True
