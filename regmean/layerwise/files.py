"""Files of a layer-sequential merge while it runs: one weight file and one report for each step that is merged."""

from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from common.io import read_json, sync, write_json
from regmean.layerwise.model import BEFORE, LayerwiseModel
from regmean.layerwise.survey import Survey
from regmean.merge_plan import MergePlan
from regmean.report import LayerReport, TableReport
from regmean.tensor_file import JoinedTensor, TensorFile, TensorInfo, TensorWriter


@dataclass
class StepReport:
    """Results of one step: reports of its groups and embedding tables; weights of experts that no model's texts reach;
    for each model |H - X| / |X| of its hidden states after it, and how often the merge routes as the model does.
    """

    layers: list[LayerReport]
    tables: list[TableReport]
    unreached: list[str] = field(default_factory=list)
    distances: list[float] = field(default_factory=list)
    routing: list[float | None] = field(default_factory=list)


class StepFiles:
    """The weights that `merged`, a model without weights, reads: those of the steps that are on disk.

    Attributes:
        tensors: the stored tensors so far, by name.
        folder: of the files.

    Args:
        merged: a `LayerwiseModel` of the merge's form; its tensors are replaced.
    """

    def __init__(self, merged: LayerwiseModel, folder: Path):
        self.tensors: dict[str, TensorInfo] = {}
        self.folder, self._merged = folder, merged
        self._sources, merged.tensors = merged.tensors, {}

    def names(self, plan: MergePlan, found: Survey) -> dict[int, list[str]]:
        """Stored names of the tensors that each step writes."""
        count, prefix = len(self._merged.layers), f"{self._merged.prefix}."
        steps: dict[str, int] = {}
        for name, info in self._sources.items():
            number = name.removeprefix(prefix).partition(".")[0]
            if name.startswith(prefix) and number.isdigit():
                steps |= dict.fromkeys(_stored(info), int(number))
        solved_after = {name for names in found.groups_of(count) for name in names}
        for group in plan.groups:
            if set(plan.grams[0].grams[group.grams[0]].modules) <= solved_after:
                steps |= dict.fromkeys(group.tensors, count)
        names: dict[int, list[str]] = {step: [] for step in range(BEFORE, count + 1)}
        for name in plan.layout:
            names[steps.get(name, BEFORE)].append(name)
        return names

    def open_writer(self, step: int, part: MergePlan) -> TensorWriter:
        """A writer of the step's unfinished file."""
        return TensorWriter(self._unfinished(step), part.layout, {"format": "pt"})

    def sync(self, step: int) -> None:
        """Put what the step's unfinished file has so far on the disk, for ranks of other machines."""
        sync(self._unfinished(step))

    def use_unfinished(self, step: int) -> None:
        """Let the merge read the step's unfinished file; tensors that are not written yet are zeros."""
        self._use(self._unfinished(step))

    def close(self, step: int, writer: TensorWriter) -> None:
        """Finish the step's file."""
        writer.close()
        self.sync(step)
        self._unfinished(step).replace(self._file(step))

    def use(self, step: int) -> None:
        """Let the merge read the step's file, if it has one."""
        if self._file(step).exists():
            self._use(self._file(step))

    def write_report(self, step: int, report: StepReport) -> None:
        """Record that a step is whole."""
        write_json(self._report(step), asdict(report))

    def read_report(self, step: int) -> StepReport | None:
        """The report of a step that is whole, else None."""
        if not self._report(step).exists():
            return None
        content = read_json(self._report(step))
        layers = [LayerReport.of_json(entry) for entry in content["layers"]]
        tables = [TableReport.of_json(entry) for entry in content["tables"]]
        return StepReport(**content | {"layers": layers, "tables": tables})

    def _file(self, step: int) -> Path:
        return self.folder / f"step{step + 1}.safetensors"

    def _unfinished(self, step: int) -> Path:
        return self._file(step).with_suffix(".partial")

    def _report(self, step: int) -> Path:
        return self._file(step).with_suffix(".json")

    def _use(self, path: Path) -> None:
        self.tensors |= TensorFile(path).tensors
        for name, info in self._sources.items():
            if (moved := _moved(info, self.tensors)) is not None:
                self._merged.tensors[name] = moved


def _stored(info: TensorInfo) -> list[str]:
    """Names of the stored tensors that a tensor consists of."""
    return [part.name for part, _, _ in info.parts] if isinstance(info, JoinedTensor) else [info.name]


def _moved(info: TensorInfo, tensors: dict[str, TensorInfo]) -> TensorInfo | None:
    """`info` made of other tensors of the same names; None if one is missing."""
    if not all(name in tensors for name in _stored(info)):
        return None
    if not isinstance(info, JoinedTensor):
        return tensors[info.name]
    parts = tuple((tensors[part.name], first, last) for part, first, last in info.parts)
    return replace(info, dtype=parts[0][0].dtype, parts=parts)
