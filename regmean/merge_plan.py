"""Plan for each tensor of a merge, and checks that Grams fit to the models, from headers alone. One error lists every
difference, before a tensor is read."""

import math
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import numpy as np

from common.errors import InputError
from regmean.comparison import compare_models, refuse
from regmean.gram_file import Counts, Gram, Grams
from regmean.model_folder import Checkpoint
from regmean.names import compact
from regmean.slices import slice_name, sliced, slices_within, split_name
from regmean.tensor_file import FLOATS, JoinedTensor, TensorInfo, encode

ROUTER = re.compile(r"\.(gate|router)\.[\w.]+$")  # names of a router's tensors
STORED_AS = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}


@dataclass(frozen=True)
class LayerGroup:
    """Tensors that share a Gram in every model, and so one system of `width` inputs; `grams` has its name in each file.

    If `conv1d`, the weights are stored as (in, out). Of experts, `pools` has the name of the sum over all experts in
    each file, and a tensor may be a slice of one (slices.py).
    """

    grams: tuple[str, ...]
    tensors: list[str]
    width: int
    conv1d: bool
    pools: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class CountedTable:
    """An embedding table that is merged by the token counts of each model's texts.

    `grams` has the name of the Gram in each file if the table is also the output head; else it is empty.
    """

    tensor: str
    counts: list[np.ndarray]
    grams: tuple[str, ...]

    @property
    def unread(self) -> int:
        """Number of rows that no text of any model reads."""
        return int((sum(self.counts) == 0).sum())


@dataclass(frozen=True)
class MergePlan:
    """Models and Grams of a merge, and the plan for every tensor.

    Attributes:
        models: the models to merge; the first provides the layout. Their tensors include the slices of `groups`.
        model_weights: the models' weights, which sum to 1.
        grams: the Grams of each model, for RegMean; empty for an average.
        layout: dtype and shape of each tensor written, in the first model's order.
        groups: tensors that RegMean solves.
        tables: embedding tables merged by token counts.
        averaged: tensors, or slices of tensors, averaged over all models.
        copied: tensors copied from one model, with its index: the first for those that are not selected.
        untied: True if the output head is no embedding table and the config must untie them.
        notes: differences that are not errors.
    """

    models: list[Checkpoint]
    model_weights: list[float]
    grams: list[Grams]
    layout: dict[str, tuple[str, tuple[int, ...]]]
    groups: list[LayerGroup]
    tables: list[CountedTable]
    averaged: list[str]
    copied: dict[str, int]
    untied: bool
    notes: list[str]

    def systems(self) -> list[tuple[int, int]]:
        """(inputs, outputs) of each group."""
        return [(g.width, sum(map(self.size, g.tensors)) // g.width) for g in self.groups]

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor or slice."""
        return self.layout[name][1] if name in self.layout else self.layout[split_name(name)[0]][1][1:]

    def size(self, name: str) -> int:
        """Number of elements of a tensor or slice."""
        return math.prod(self.shape(name))

    def place(self, name: str) -> tuple[str, int]:
        """The tensor that a tensor or slice is written to, and the first element there."""
        if name in self.layout:
            return name, 0
        tensor, number = split_name(name)
        return tensor, number * self.size(name)

    @property
    def has_routers(self) -> bool:
        """True for mixtures of experts."""
        return any(ROUTER.search(name) for name in self.layout)

    def pool_bytes(self) -> int:
        """Bytes of the widest sum over experts of all models."""
        return 4 * len(self.models) * max((group.width**2 for group in self.groups if group.pools), default=0)

    def solved_fraction(self) -> float:
        """Fraction of the floating-point parameters that RegMean solves, without rows that stay at the mean."""
        sizes = {name: math.prod(shape) for name, (dtype, shape) in self.layout.items() if dtype in FLOATS}
        solved = sum(self.size(name) for group in self.groups for name in group.tensors)
        for table in self.tables:
            # A tied table's unread rows are solved as those of a head.
            unread = 0 if table.grams else table.unread
            solved += sizes[table.tensor] * (1 - unread / len(table.counts[0]))
        return solved / (sum(sizes.values()) or 1)

    def encode(self, name: str, values: np.ndarray) -> np.ndarray:
        """Convert values of the tensor `name` to the dtype that it is written in.

        Raises:
            InputError: a value does not fit.
        """
        try:
            return encode(values, self.layout[self.place(name)[0]][0])
        except OverflowError as error:
            raise InputError(f"tensor {name}: {error}; choose a wider --dtype") from error


def plan_merge(
    models: list[Checkpoint],
    model_weights: list[float],
    grams: list[Grams],
    selects: Callable[[str], bool],
    dtype: str,
    by_counts: tuple[bool, bool] = (False, False),
    router: int | None = None,
) -> MergePlan:
    """Check that the models, and the Grams where there are any, fit together, and plan every tensor.

    `selects` is True for names of tensors to merge; `dtype` is that of the merged floats, "auto" the first model's. If
    `by_counts`, embedding tables are merged by the Gram files' token counts; the second value is for output heads. The
    routers of model `router`, an index, are copied; None merges them.

    Raises:
        InputError: they do not fit together; the message lists every difference.
    """
    problems: list[str] = []
    notes: list[str] = []
    aligned, infos, selected, copies, untied = compare_models(models, selects, notes)
    copied = _copied(infos, selected, router, problems, notes)
    merged = [name for name in infos if name not in copied]
    found = [_grams_by_tensor(*each, copies, problems) for each in zip(models, grams, strict=bool(grams))]
    models, parts = _with_slices(aligned, found, merged)
    groups, tables = _plan_solved(models, grams, found, parts, by_counts, problems, notes)
    refuse(problems)
    averaged = _averaged(merged, parts, groups, tables)
    layout = {name: (_written_as(info.file_dtype, dtype), info.shape) for name, info in infos.items()}
    return MergePlan(models, model_weights, grams, layout, groups, tables, averaged, copied, untied, notes)


def without_experts(plan: MergePlan, unreached: set[str]) -> MergePlan:
    """The plan with the weights of experts that no token reached averaged, and a note of them."""
    if not unreached:
        return plan
    groups = [group for group in plan.groups if unreached.isdisjoint(group.tensors)]
    averaged = [name for group in plan.groups for name in group.tensors if name in unreached]
    notes = [*plan.notes, _unreached_note(averaged)]
    return replace(plan, groups=groups, averaged=[*plan.averaged, *averaged], notes=notes)


def _unreached_note(names: list[str]) -> str:
    return f"experts that no model's texts reach, averaged: {len(names)} weights: {', '.join(compact(names))}"


def _written_as(stored: str, dtype: str) -> str:
    return STORED_AS.get(dtype, stored) if stored in FLOATS else stored


def _copied(
    names: Iterable[str], selected: set[str], router: int | None, problems: list[str], notes: list[str]
) -> dict[str, int]:
    """The tensors that are copied, with the index of the model: the first, or `router` for routers if it is given."""
    copied = {name: 0 for name in names if name not in selected}
    if router is not None:
        routers = [name for name in names if name in selected and ROUTER.search(name)]
        if not routers:
            problems.append(f"--router {router + 1}: none of the selected tensors belongs to a router")
        notes.append(f"routers are those of model {router + 1}: {', '.join(compact(routers))}")
        copied |= dict.fromkeys(routers, router)
    return copied


def _with_slices(
    models: list[Checkpoint], found: list[dict[str, Gram]], merged: list[str]
) -> tuple[list[Checkpoint], list[str]]:
    """Divide the tensors of all experts into slices, if the first model's slices have Grams: the models with slices
    among their tensors; and the names, in order.
    """
    whole = {split_name(name)[0] for name in found[0]} - found[0].keys() if found else set()
    slices = {
        name: [slice_name(name, number) for number in range(models[0].tensors[name].shape[0])]
        for name in merged
        if name in whole
    }
    divided = []
    for model in models:
        parts = {part: sliced(model.tensors[name], n) for name, own in slices.items() for n, part in enumerate(own)}
        divided.append(replace(model, tensors=model.tensors | parts) if parts else model)
    return divided, [part for name in merged for part in slices.get(name, [name])]


def _averaged(merged: list[str], parts: list[str], groups: list[LayerGroup], tables: list[CountedTable]) -> list[str]:
    """The tensors of `merged` that are not solved; of those that are in part, the slices among `parts`."""
    solved = {name for group in groups for name in group.tensors} | {table.tensor for table in tables}
    begun = {split_name(name)[0] for name in solved - set(merged)}
    whole = [name for name in merged if name not in solved and name not in begun]
    return whole + [name for name in parts if name not in solved and split_name(name)[0] in begun]


def _plan_solved(
    models: list[Checkpoint],
    grams: list[Grams],
    found: list[dict[str, Gram]],
    merged: list[str],
    by_counts: tuple[bool, bool],
    problems: list[str],
    notes: list[str],
) -> tuple[list[LayerGroup], list[CountedTable]]:
    """Groups and tables that RegMean solves; `found` has the Gram of each stored tensor, for each model."""
    counted = _counts_by_table(models, grams, merged)
    # Without counts, the Gram of a table that is also the head is of no use.
    groups = _group_layers(models, grams, found, [name for name in merged if name not in counted], notes)
    tables = _plan_tables(models, grams, found, counted, by_counts[1], problems, notes) if by_counts[0] else []
    if grams and not groups and not tables and not problems:
        problems.append("none of the selected tensors has a Gram in every file")
    return groups, tables


def _group_layers(
    models: list[Checkpoint], grams: list[Grams], found: list[dict[str, Gram]], selected: list[str], notes: list[str]
) -> list[LayerGroup]:
    """Group the selected tensors that have a Gram in every file; experts that no model's tokens reach are left out."""
    if not found:
        return []
    groups: dict[tuple[str, ...], LayerGroup] = {}
    unreached = []
    for name in selected:
        theirs = [_gram_of(model.tensors[name], of) for model, of in zip(models, found, strict=True)]
        if None in theirs:
            continue
        pools = tuple(gram.pool for gram in theirs if gram.pool)
        pooled = [file.grams[pool].tokens for file, pool in zip(grams, pools, strict=False)]
        if pools and (not any(gram.tokens for gram in theirs) or not all(pooled)):
            unreached.append(name)
            continue
        key = tuple(gram.name for gram in theirs)
        conv1d = theirs[0].conv1d if pools else any(gram.conv1d for gram in theirs)
        form = (theirs[0].width, conv1d, pools)
        groups.setdefault(key, LayerGroup(key, [], *form)).tensors.append(name)
    if unreached:
        notes.append(_unreached_note(unreached))
    # The groups of a pool follow each other, so that the pool is read once.
    order: dict[tuple[str, ...], int] = {}
    for group in groups.values():
        order.setdefault(group.pools or group.grams, len(order))
    return sorted(groups.values(), key=lambda group: order[group.pools or group.grams])


def _counts_by_table(
    models: list[Checkpoint], grams: list[Grams], selected: list[str]
) -> dict[str, list[Counts | None]]:
    """The counts of each of the selected tensors that has some, in the models' order; None where a file has none."""
    of_files = [{name: counts for counts in file.counts.values() for name in counts.tensors} for file in grams]
    found: dict[str, list[Counts | None]] = {}
    for name in selected if grams else ():
        infos = [model.tensors[name] for model in models]
        # A table that is joined from parts is averaged.
        own = [None if isinstance(i, JoinedTensor) else of.get(i.name) for i, of in zip(infos, of_files, strict=True)]
        if any(own):
            found[name] = own
    return found


def _plan_tables(
    models: list[Checkpoint],
    grams: list[Grams],
    found: list[dict[str, Gram]],
    counted: dict[str, list[Counts | None]],
    tied: bool,
    problems: list[str],
    notes: list[str],
) -> list[CountedTable]:
    """Plan the tables that have counts in every file, and a Gram if they are tied; others are averaged, with a note."""
    tables, without = [], {str(file.path) for file in grams if not file.counts}
    if without:
        listed = ", ".join(sorted(without))
        notes.append(f"no token counts in {listed}, embedding tables are averaged: compute_gram.py adds them")
    for name, own in counted.items():
        infos = [model.tensors[name] for model in models]
        theirs = [_gram_of(info, of) for info, of in zip(infos, found, strict=True)]
        if None in own or (any(counts.tied for counts in own) and None in theirs):
            if not without:
                notes.append(f"{name} is averaged: some Gram file lacks its token counts or its Gram")
            continue
        if any(counts.tied for counts in own) and not tied:
            notes.append(f"{name} is averaged, since it is the output head, too; --embeddings counts merges both uses")
            continue
        for counts, info, file in zip(own, infos, grams, strict=True):
            if len(info.shape) != 2 or len(counts.values) != info.shape[0]:
                rows = f"{len(counts.values)} rows, its tensor in {info.path} is {list(info.shape)}"
                problems.append(f"{file.path}: the token counts of {name} have {rows}")
        names = tuple(gram.name for gram in theirs) if any(counts.tied for counts in own) else ()
        tables.append(CountedTable(name, [counts.values for counts in own], names))
    return tables


def _gram_of(info: TensorInfo, grams: dict[str, Gram]) -> Gram | None:
    """The one Gram of all stored tensors, or slices of them, that `info` consists of."""
    sources = [info.name]
    if isinstance(info, JoinedTensor):
        parts = [[part.name] if part.name in grams else slices_within(part, *span) for part, *span in info.parts]
        sources = [name for names in parts for name in names]
    found = {grams[name].name: grams[name] for name in sources if name in grams}
    return next(iter(found.values())) if len(found) == 1 and all(name in grams for name in sources) else None


def _grams_by_tensor(model: Checkpoint, file: Grams, copies: set[str], problems: list[str]) -> dict[str, Gram]:
    """The Gram of each weight of a model that has one."""
    recorded = file.provenance.get("fingerprint")
    if recorded is not None and recorded != model.fingerprint():
        read = file.provenance.get("model")
        reason = f"not of {model.name}; --grams goes in the order of --models"
        if read == model.name:
            reason = "whose weights were others then: compute them again"
        problems.append(f"{file.path} holds the Grams of {read}, {reason}")
    found: dict[str, Gram] = {}
    for gram in (gram for gram in file.grams.values() if not gram.is_pool):
        for name in gram.tensors or (f"{module}.weight" for module in gram.modules):
            # Files without tensors' names have those of layers, and some models are stored without the prefix of the
            # base model: "h.0..." for "transformer.h.0...".
            candidates = (name, *(() if gram.tensors else (name.partition(".")[2],)))
            name = next((candidate for candidate in candidates if candidate in model.tensors), name)
            tensor, number = (name, None) if name in model.tensors else split_name(name)
            shape = model.tensors[tensor].shape[0 if number is None else 1 :] if tensor in model.tensors else ()
            if not shape or (number or 0) >= model.tensors[tensor].shape[0]:
                if name not in copies:
                    problems.append(f"{file.path}: {model.name} has no layer {name.removesuffix('.weight')}")
                continue
            if number is not None and gram.width in shape and len(set(shape)) == 2:
                # A file may hold the transpose of a module's weights.
                gram = replace(gram, conv1d=shape[0] == gram.width)
            if len(shape) != 2 or shape[0 if gram.conv1d else 1] != gram.width:
                own = f"its weight in {model.name} is {list(shape)}"
                layer = name.removesuffix(".weight")
                problems.append(f"{file.path}: the Gram of {layer} has width {gram.width}, {own}")
            found[name] = gram
    return found
