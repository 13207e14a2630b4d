"""The report of a merge: a table on the terminal, `merge_report.json`, and the model card."""

import re
from collections import Counter
from copy import deepcopy
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING, Any, Self

from huggingface_hub import ModelCardData

from common.io import atomic_path, write_json, write_text
from regmean.gram_file import Grams
from regmean.merge_plan import MergePlan
from regmean.model_folder import Checkpoint

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from regmean.solve import Objective

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
TITLES = {
    "avg": "weighted average",
    "regmean": "RegMean",
    "regmean++": "RegMean++",
    "regmean_asym": "asymmetric RegMean",
}
DISTANCES = "distances.png"


class _Report:
    """A report with an objective, which can be read from JSON."""

    @classmethod
    def of_json(cls, entry: dict[str, Any]) -> Self:
        """The report that `asdict` wrote."""
        from regmean.solve import Objective  # imports torch, which an average does not need

        return cls(**entry | {"objective": Objective(**entry["objective"])})


@dataclass(frozen=True)
class LayerReport(_Report):
    """Results for the layers of one shared Gram: names of their weights, and the token count of each model's Gram;
    the solver, with dtype and jitter; the system's condition number, estimated, where the solver gives one; RegMean's
    objective at the mean, at each model's weights and at the merge; for an expert, the name of all experts' Gram.
    """

    tensors: list[str]
    tokens: list[int]
    solver: str
    condition: float | None
    objective: "Objective"
    pool: str = ""

    @classmethod
    def of_blocks(
        cls,
        tensors: list[str],
        tokens: list[int],
        solver: str,
        condition: float | None,
        objectives: dict[str, dict[str, Any]],
        pool: str = "",
    ) -> "LayerReport":
        """Add up the objectives of blocks of outputs, which are given by the first output, in their order."""
        from regmean.solve import Objective

        total = Objective()
        for first in sorted(objectives, key=int):
            total.add(Objective(**objectives[first]))
        return cls(tensors, tokens, solver, condition, total, pool)


@dataclass(frozen=True)
class TableReport(_Report):
    """Results for an embedding table merged by token counts: the number of tokens of each model's texts; the numbers of
    all rows and of rows that no text reads; the factor `beta` on the embedding's objective if the table is the output
    head as well; the objective at the mean, at each model's table and at the merge.
    """

    tensor: str
    tokens: list[int]
    rows: int
    unread: int
    beta: float | None
    objective: "Objective"

    def __str__(self) -> str:
        kind = "by token counts" if self.beta is None else "embedding and head at once"
        tokens, at_mean = " and ".join(f"{n:,}" for n in self.tokens), self.objective.mean
        fraction = self.objective.merged / (at_mean or 1.0)
        read = f"no text reads {self.unread:,} of {self.rows:,} rows"
        return f"{self.tensor}: {kind}, {tokens} tokens, {read}; objective {fraction:.4f} of that at the mean"


@dataclass(frozen=True)
class Routing:
    """Agreement of a mixture's routing with that of each of `models`, on that model's texts: for each layer and model,
    the mean over tokens of the fraction of the model's experts that the merge chooses, too; None without experts.
    """

    models: list[str]
    layers: list[list[float | None]]

    @property
    def means(self) -> list[float]:
        """The mean over layers with experts, for each model; none without such layers."""
        measured = [layer for layer in self.layers if None not in layer]
        return [mean(values) for values in zip(*measured, strict=True)]

    def __str__(self) -> str:
        means = ", ".join(f"{name} {mean:.1%}" for name, mean in zip(self.models, self.means, strict=True))
        return f"of the experts that each model chooses for the tokens of its texts, the merge chooses: {means}"


@dataclass(frozen=True)
class Provenance:
    """The origin of a merged model."""

    method: str
    alpha: float | None
    solver: str | None
    command: str
    models: list[dict[str, Any]]
    grams: list[dict[str, Any]]
    versions: dict[str, str]
    solved_fraction: float | None = None

    @classmethod
    def of(
        cls,
        method: str,
        alpha: float | None,
        solver: str,
        command: str,
        models: list[Checkpoint],
        model_weights: list[float],
        grams: list[Grams],
        solved_fraction: float | None = None,
    ) -> "Provenance":
        """Collect the origin from the stored models; without Grams there is no solver."""
        weighted = zip(models, model_weights, strict=True)
        described = [{**model.origin(), "weight": w, "fingerprint": model.fingerprint()} for model, w in weighted]
        files = [{**file.provenance, "file": str(file.path)} for file in grams]
        versions = {name: version(name) for name in ("torch", "numpy")}
        return cls(method, alpha, solver if grams else None, command, described, files, versions, solved_fraction)


def write_report(
    folder: Path,
    provenance: Provenance,
    plan: MergePlan,
    layers: list[LayerReport],
    tables: list[TableReport],
    routing: Routing | None = None,
    distances: list[list[float]] | None = None,
) -> None:
    """Write `merge_report.json`, the model card `README.md` and a plot of `distances` into a model's folder.

    `distances` are those of a layer-sequential merge: for the embeddings and each layer, |H - X| / |X| of the states
    after it, of every model.
    """
    copied = [name for name, index in plan.copied.items() if not index]
    of_tensors = {"averaged": plan.averaged, "copied_from_first": copied, "notes": plan.notes}
    report = asdict(provenance) | {"layers": [asdict(layer) for layer in layers]} | of_tensors
    report["tables"] = [asdict(table) for table in tables]
    if routing is not None and routing.means:
        report["routing"] = {"mean": routing.means, "layers": routing.layers}
    if distances is not None:
        report["distances"] = distances
        names = [model["model"] for model in provenance.models]
        with atomic_path(folder / DISTANCES) as partial:
            _plot(names, distances).savefig(partial, format="png", dpi=150)
    write_json(folder / "merge_report.json", report)
    write_text(folder / "README.md", model_card(provenance, tables, routing, distances is not None))


def _plot(names: list[str], distances: list[list[float]]) -> "Figure":
    # Imported here, since it takes seconds.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.0, 3.0), layout="constrained")
    axes = figure.add_subplot()
    for name, values in zip(names, zip(*distances, strict=True), strict=True):
        axes.plot(range(len(values)), values, marker=".", label=Path(name).name[:24])
    axes.set_xlabel("layers merged (0: embeddings)")
    axes.set_ylabel("|H - X| / |X|")
    axes.set_ylim(bottom=0)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    return figure


def model_card(
    provenance: Provenance,
    tables: list[TableReport] | None = None,
    routing: Routing | None = None,
    has_plot: bool = False,
) -> str:
    """The model card of a merged model; `tables` are the embedding tables merged by token counts."""
    title, names = TITLES[provenance.method], [model["model"] for model in provenance.models]
    bases = dict.fromkeys(model["base"] for model in provenance.models if "base" in model)
    # The hub looks these up; a local folder may have a name of the same form.
    hub_ids = [name for name in (*names, *bases) if HUB_ID.fullmatch(name) and not Path(name).exists()]
    header = ModelCardData(base_model=hub_ids or None, library_name="transformers", tags=["merge", provenance.method])
    alpha = "" if provenance.alpha is None else f" with alpha {provenance.alpha:g}"
    rows = [f"| {_named(model)} | {model['weight']:.4g} |" for model in provenance.models]
    lines = [f"# {title} of {len(names)} models", f"Merged by {title}{alpha}."]
    lines += ["\n".join(["| model | weight |", "| --- | --- |", *rows])]
    if provenance.grams:
        lines += ["Inner products of the layers' inputs, in the models' order:"]
        lines += ["\n".join(f"- {_code(_describe(gram))}" for gram in provenance.grams)]
        if provenance.solved_fraction is not None:
            lines += [f"RegMean solved {provenance.solved_fraction:.1%} of the parameters; the rest is averaged."]
        if tables:
            lines += ["Embedding tables:", "\n".join(f"- {_code(str(table))}" for table in tables)]
        lines += [f"Layer by layer, `merge_report.json` gives the solver ({provenance.solver}) and the objective."]
    if routing is not None and routing.means:
        lines += [f"Routing: {_code(str(routing))}."]
    if has_plot:
        lines += [
            "Relative distance of the merged model's hidden states H from each model's own X, on its calibration "
            f"texts, after each layer:\n\n![distances]({DISTANCES})"
        ]
    lines += [f"The command:\n\n```\n{provenance.command}\n```"]
    return f"---\n{header.to_yaml()}\n---\n\n" + "\n\n".join(lines) + "\n"


def print_table(
    alpha: float, models: list[str], layers: list[LayerReport], tables: list[TableReport], solved_fraction: float
) -> None:
    """Print one line per system (solver, condition, and the objective relative to the mean's) and embedding table."""
    measured = "RegMean's objective at the mean, and as a fraction of that at each model and at the merge"
    print(f"\nalpha {alpha:g}, {solved_fraction:.1%} of the parameters; {measured}")
    names = [Path(model).name[:14] for model in models]
    print(f"{'layers':<58} {'solver':<26} {'condition':>9} {'mean':>10} {' '.join(f'{n:>14}' for n in names)}  merged")
    for layer in _with_pools(layers):
        title = layer.pool or layer.tensors[0].removesuffix(".weight")
        title += f" +{len(layer.tensors) - 1}" if len(layer.tensors) > 1 else ""
        condition = "-" if layer.condition is None else f"{layer.condition:.2g}"
        at_mean = layer.objective.mean
        *inputs, merged = (value / (at_mean or 1.0) for value in (*layer.objective.inputs, layer.objective.merged))
        fractions = " ".join(f"{value:>14.3f}" for value in inputs) + f" {merged:>7.4f}"
        print(f"{title[-58:]:<58} {layer.solver:<26} {condition:>9} {at_mean:>10.3g} {fractions}")
    for table in tables:
        print(table)


def _named(model: dict[str, Any]) -> str:
    base = f", an adapter of {_code(model['base'])}" if "base" in model else ""
    return f"`{model['model']}`{base}"


def _with_pools(layers: list[LayerReport]) -> list[LayerReport]:
    """The reports, with one for all experts of a layer: their objectives added up, the most frequent solver, and the
    largest condition number.
    """
    sharing: dict[str, list[LayerReport]] = {}
    for layer in layers:
        sharing.setdefault(layer.pool or layer.tensors[0], []).append(layer)
    joined = []
    for theirs in sharing.values():
        first, objective = theirs[0], deepcopy(theirs[0].objective)
        for layer in theirs[1:]:
            objective.add(layer.objective)
        tensors = [name for layer in theirs for name in layer.tensors]
        solver = Counter(layer.solver for layer in theirs).most_common(1)[0][0]
        condition = max((layer.condition for layer in theirs if layer.condition is not None), default=None)
        joined.append(replace(first, tensors=tensors, solver=solver, condition=condition, objective=objective))
    return joined


def _describe(gram: dict[str, Any]) -> str:
    """Origin of a Gram file, from its provenance."""
    if "dataset" not in gram:
        return gram["file"]
    tokens, examples = (f"{n:,}" if isinstance(n, int) else str(n) for n in (gram.get("tokens"), gram.get("examples")))
    return f"{gram['file']}: {tokens} tokens of {examples} examples, {gram['dataset']} ({gram.get('split')})"


def _code(text: str) -> str:
    """Format `text`, which may be from a foreign file, as an inline code span without active Markdown or HTML."""
    return "`" + " ".join(text.replace("`", "'").replace("|", "/").split()) + "`"
