"""What happens to each tensor, and whether models and Grams fit together: from headers alone, with every difference in
one error before a tensor is read."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from common.errors import InputError
from regmean.gram_file import Gram, Grams
from regmean.model_folder import Checkpoint, base_vocabulary, same_tokenizer_file
from regmean.tensor_file import FLOATS, encode

MAX_LISTED = 20
# Settings that must be the same for weights to mean the same, and those that a merge can only take from one model.
SAME = (
    *("model_type", "tie_word_embeddings", "vocab_size", "hidden_act", "hidden_activation"),
    *("num_attention_heads", "num_key_value_heads", "head_dim"),
)
ALIKE = ("rope_theta", "rope_scaling", "rope_parameters", "sliding_window", "rms_norm_eps")
# Settings that fine-tuned models often have of their own, and that say nothing of their weights.
UNRELATED = {
    *("_name_or_path", "architectures", "transformers_version", "dtype", "torch_dtype", "use_cache"),
    *("bos_token_id", "eos_token_id", "pad_token_id", "attention_dropout"),
}
STORED_AS = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}


@dataclass(frozen=True)
class LayerGroup:
    """Tensors that share a Gram in every model, `grams` by its name in each file, and so one system of `width` inputs.

    With `conv1d` the weights are stored as (in, out).
    """

    grams: tuple[str, ...]
    tensors: list[str]
    width: int
    conv1d: bool


@dataclass(frozen=True)
class MergePlan:
    """What is merged, and what happens to every tensor.

    Attributes:
        models: to merge; the first lends its layout.
        model_weights: the models' weights, which sum to 1.
        grams: of each model, for RegMean; none for an average.
        layout: dtype and shape of each tensor written, in the first model's order.
        groups: solved by RegMean.
        averaged: averaged over all models.
        copied: not selected, and taken from the first model.
        notes: differences that are no error.
    """

    models: list[Checkpoint]
    model_weights: list[float]
    grams: list[Grams]
    layout: dict[str, tuple[str, tuple[int, ...]]]
    groups: list[LayerGroup]
    averaged: list[str]
    copied: list[str]
    notes: list[str]

    def systems(self) -> list[tuple[int, int]]:
        """(inputs, outputs) of each group."""
        return [(g.width, sum(math.prod(self.layout[name][1]) for name in g.tensors) // g.width) for g in self.groups]

    def encode(self, name: str, values: np.ndarray) -> np.ndarray:
        """Values of the tensor `name` in the dtype that it is written in.

        Raises:
            InputError: a value does not fit.
        """
        try:
            return encode(values, self.layout[name][0])
        except OverflowError as error:
            raise InputError(f"tensor {name}: {error}; choose a wider --dtype") from error


def plan_merge(
    models: list[Checkpoint], model_weights: list[float], grams: list[Grams], selects: Callable[[str], bool], dtype: str
) -> MergePlan:
    """Check that the models, and the Grams where there are any, fit together, and decide on every tensor.

    `selects` is whether the tensor of a name is merged; `dtype` that of the merged floats, "auto" the first model's.

    Raises:
        InputError: they do not; the message lists every difference.
    """
    problems: list[str] = []
    notes: list[str] = []
    first, *others = models
    for model in others:
        _compare_configs(first, model, problems, notes)
        _compare_vocabularies(first, model, problems, notes)
    # Where embeddings are tied, a stored head is a copy of them that loading ignores.
    ignored = {"lm_head.weight"} if all(model.ties_embeddings for model in models) else set()
    names = [set(model.tensors) - ignored for model in models]
    selected = {name for name in set().union(*names) if selects(name)}
    if not selected:
        problems.append("--include and --exclude leave no tensor to merge")
    _compare_tensors(models, names, selected, problems)
    _refuse(problems)

    infos = {name: info for name, info in first.tensors.items() if name in names[0]}
    merged = [name for name in infos if name in selected]
    groups = _group_layers(models, grams, merged, ignored, problems)
    if grams and not groups and not problems:
        problems.append("none of the selected tensors has a Gram in every file")
    _refuse(problems)
    solved = {name for group in groups for name in group.tensors}
    averaged = [name for name in merged if name not in solved]
    copied = [name for name in infos if name not in selected]
    layout = {
        name: (STORED_AS.get(dtype, info.dtype) if info.dtype in FLOATS else info.dtype, info.shape)
        for name, info in infos.items()
    }
    return MergePlan(models, model_weights, grams, layout, groups, averaged, copied, notes)


def _compare_configs(first: Checkpoint, other: Checkpoint, problems: list[str], notes: list[str]) -> None:
    a, b = ({key: model.config.get(key) for key in (*SAME, *ALIKE)} for model in (first, other))
    if any(first.config.get(key) != other.config.get(key) for key in {*first.config, *other.config} - UNRELATED):
        # Files of several years write the same in several ways. transformers reads all, but takes seconds to import.
        known = [_as_transformers_has_it(model) for model in (first, other)]
        if None not in known:
            a, b = known
    for key in SAME:
        if a[key] is not None and b[key] is not None and a[key] != b[key]:
            problems.append(f"{key} is {a[key]!r} in {first.name} and {b[key]!r} in {other.name}")
    for key in ALIKE:
        if a[key] != b[key]:
            values = f"{key} is {a[key]!r} in {first.name} and {b[key]!r} in {other.name}"
            notes.append(f"{values}: the merge has that of {first.name}")


def _as_transformers_has_it(model: Checkpoint) -> dict[str, Any] | None:
    """The settings to compare, with defaults; None where transformers cannot read the config."""
    from common.models import base_config

    try:
        config = base_config(str(model.folder))
    except InputError:
        return None
    text = config.get_text_config()
    known = {key: getattr(config, key, getattr(text, key, None)) for key in (*SAME, *ALIKE)}
    # Both are in rope_parameters, too, and there its kind may stand under an older name as well.
    known |= {"rope_theta": None, "rope_scaling": None}
    if isinstance(known["rope_parameters"], dict):
        known["rope_parameters"] = {key: value for key, value in known["rope_parameters"].items() if key != "type"}
    return known


def _compare_vocabularies(first: Checkpoint, other: Checkpoint, problems: list[str], notes: list[str]) -> None:
    if same_tokenizer_file(first, other):
        return
    a, b = base_vocabulary(first), base_vocabulary(other)
    if a is None or b is None:
        notes.append(f"the vocabularies of {first.name} and {other.name} were not compared: no tokenizer.json")
        return
    if len(a[0]) != len(b[0]):
        problems.append(f"the tokenizers have {len(a[0])} texts in {first.name} and {len(b[0])} in {other.name}")
    elif a[0] != b[0]:
        problems.append(f"the tokenizers of {first.name} and {other.name} give the same ids to different text")
    renamed = [id for id in sorted(a[1].keys() & b[1].keys()) if a[1][id] != b[1][id]]
    if renamed:
        # Fine-tuned models often rename reserved tokens, so this alone is no reason to refuse.
        pairs = ", ".join(f"{id}: {a[1][id]!r}, {b[1][id]!r}" for id in renamed[:5])
        notes.append(f"{first.name} and {other.name} name {len(renamed)} added tokens differently ({pairs})")


def _compare_tensors(models: list[Checkpoint], names: list[set[str]], selected: set[str], problems: list[str]) -> None:
    for name in sorted(selected):
        holders = [model for model, theirs in zip(models, names, strict=True) if name in theirs]
        if len(holders) < len(models):
            lacking = ", ".join(model.name for model in models if model not in holders)
            problems.append(f"tensor {name} of {holders[0].name} is missing in {lacking}; --exclude leaves it out")
            continue
        infos = [model.tensors[name] for model in models]
        if len({info.shape for info in infos}) > 1:
            shapes = ", ".join(f"{list(info.shape)} in {info.path}" for info in infos)
            problems.append(f"tensor {name} is {shapes}")
        elif len({info.dtype for info in infos}) > 1 and not all(info.dtype in FLOATS for info in infos):
            problems.append(f"tensor {name} is {', '.join(f'{info.dtype} in {info.path}' for info in infos)}")


def _group_layers(
    models: list[Checkpoint], grams: list[Grams], selected: list[str], ignored: set[str], problems: list[str]
) -> list[LayerGroup]:
    if not grams:
        return []
    found = [_grams_by_tensor(model, file, ignored, problems) for model, file in zip(models, grams, strict=True)]
    groups: dict[tuple[str, ...], LayerGroup] = {}
    for name in selected:
        if all(name in theirs for theirs in found):
            key = tuple(theirs[name].name for theirs in found)
            conv1d = any(theirs[name].conv1d for theirs in found)
            groups.setdefault(key, LayerGroup(key, [], found[0][name].width, conv1d)).tensors.append(name)
    return list(groups.values())


def _grams_by_tensor(model: Checkpoint, file: Grams, ignored: set[str], problems: list[str]) -> dict[str, Gram]:
    """The Gram of each weight of a model that has one."""
    recorded = file.provenance.get("fingerprint")
    if recorded is not None and recorded != model.fingerprint():
        problems.append(
            f"{file.path} holds the Grams of {file.provenance.get('model')}, not of {model.name}; "
            "--grams goes in the order of --models"
        )
    found: dict[str, Gram] = {}
    for gram in file.grams.values():
        for module in gram.modules:
            # Some checkpoints are stored without the prefix of the base model: "h.0..." for "transformer.h.0...".
            candidates = (f"{module}.weight", f"{module.partition('.')[2]}.weight")
            name = next((candidate for candidate in candidates if candidate in model.tensors), None)
            if name is None:
                if f"{module}.weight" not in ignored:
                    problems.append(f"{file.path}: {model.name} has no layer {module}")
                continue
            shape = model.tensors[name].shape
            if len(shape) != 2 or shape[0 if gram.conv1d else 1] != gram.width:
                own = f"its weight in {model.name} is {list(shape)}"
                problems.append(f"{file.path}: the Gram of {module} has width {gram.width}, {own}")
            found[name] = gram
    return found


def _refuse(problems: list[str]) -> None:
    if problems:
        listed = "".join(f"\n  - {problem}" for problem in problems[:MAX_LISTED])
        more = f"\n  and {len(problems) - MAX_LISTED} more" if len(problems) > MAX_LISTED else ""
        raise InputError(f"these do not merge:{listed}{more}")
