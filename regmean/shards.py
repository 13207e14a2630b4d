"""Division of a merge into the weight files that it writes: a rank writes whole files, and a rerun keeps them.

A file is whole once its record exists, in the folder `RECORDS` beside it: what the solver reports of its layers.
"""

import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from common.errors import InputError
from common.io import atomic_folder, partial_path, read_json, refuse_existing, sync, write_json
from regmean.merge_plan import MergePlan

RECORDS = ".whole_files"
SETTINGS = "merge.json"
# Of a group by its number in the plan: the solver's label and condition, and the objective of each block by its
# first output.
Layers = dict[str, dict[str, Any]]


def divide(plan: MergePlan, files: dict[str, list[str]], ranks: int) -> list[list[str]]:
    """The weight files of each rank: the most expensive first, each to the rank with the least work so far.

    A group of layers costs width^3 for its factor, in each file that has layers of it, and width^2 for each output.
    """
    file_of = {name: file for file, names in files.items() for name in names}
    costs = {file: sum(map(plan.size, names)) for file, names in files.items()}
    for group in plan.groups:
        sizes: dict[str, int] = {}
        for name in group.tensors:
            file = file_of[plan.place(name)[0]]
            sizes[file] = sizes.get(file, 0) + plan.size(name)
        for file, size in sizes.items():
            costs[file] += group.width**3 + size * (group.width - 1)
    divided: list[list[str]] = [[] for _ in range(ranks)]
    loads = [0] * ranks
    for file in sorted(files, key=lambda file: -costs[file]):
        rank = loads.index(min(loads))
        divided[rank].append(file)
        loads[rank] += costs[file]
    return divided


@contextmanager
def unfinished_folder(path: Path, settings: dict[str, Any], is_main: bool) -> Iterator[Path]:
    """As `atomic_folder`, for all ranks; keeps the whole files of a merge that was cut short, if it had these settings.

    The first rank makes the folder, and gives it its name.
    """
    if not is_main:
        refuse_existing(path)
        yield partial_path(path)
        return
    with atomic_folder(path, lambda partial: _is_part_of(partial, settings)) as partial:
        write_json(partial / RECORDS / SETTINGS, settings)
        yield partial
        shutil.rmtree(partial / RECORDS)


def whole_files(folders: Iterable[Path], files: Iterable[str]) -> set[str]:
    """Weight files that are whole in every folder."""
    return set(files).intersection(*(_whole_files(folder) for folder in folders))


def record(folder: Path, file: str, layers: Layers, tables: dict[str, Any]) -> None:
    """Record that a weight file is whole, and the reports of its layers, and of its embedding tables by tensor."""
    sync(folder / file)
    write_json(folder / RECORDS / f"{file}.json", {"layers": layers, "tables": tables})


def recorded(folder: Path, files: Iterable[str]) -> tuple[Layers, dict[str, Any]]:
    """Reports of the layers of all files, and of the tables; a group in two files has blocks in both."""
    layers: Layers = {}
    tables: dict[str, Any] = {}
    for file in files:
        content = read_json(folder / RECORDS / f"{file}.json")
        tables |= content["tables"]
        for number, found in content["layers"].items():
            known = layers.setdefault(number, found)
            known["objectives"] |= found["objectives"]
    return layers, tables


def _whole_files(partial: Path) -> list[str]:
    found = (partial / RECORDS).glob("*.safetensors.json")
    return [path.name.removesuffix(".json") for path in found]


def _is_part_of(partial: Path, settings: dict[str, Any]) -> bool:
    try:
        return read_json(partial / RECORDS / SETTINGS) == settings and bool(_whole_files(partial))
    except InputError:
        return False
