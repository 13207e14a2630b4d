"""Flags of compute_gram.py and merge_model.py."""

import math
import re
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

from common.cli import flag, parse_flags
from common.devices import HERE, PLAN_HELP, parse_devices
from common.errors import InputError

PRESETS = Path(__file__).parents[1] / "configs" / "regmean"
METHODS = ("avg", "regmean", "regmean++", "regmean_asym")
SEQUENTIAL = METHODS[2:]  # methods that run the models layer by layer
# A rank waits for the others' files; one that has died is found by other means.
TIMEOUT = timedelta(days=30)
DTYPES = ("auto", "float32", "bfloat16", "float16")


@dataclass(frozen=True)
class TextSource:
    """The texts that Grams are computed from: the first rows of a data set's split, each cut to `max_length` tokens.

    `columns` has the column of plain texts under the key `text`, or a conversation's columns by role, in its order.
    """

    dataset: str
    revision: str | None
    split: str
    columns: dict[str, str]
    num_examples: int
    max_length: int


@dataclass(frozen=True)
class GramFlags:
    """Compute a model's Grams: inner products of the inputs of its linear layers, summed over a data set's tokens."""

    model: str = flag(None, "hub id or local folder of a model or a LoRA adapter")
    revision: str | None = flag(None, "branch, tag or commit of a hub model")
    base: str | None = flag(None, "base model of an adapter; default: the one that its adapter_config.json names")
    dataset: str = flag(None, "hub id, local folder, or a .json, .jsonl or .parquet file")
    dataset_revision: str | None = flag(None, "branch, tag or commit of a hub data set")
    split: str = flag("train", "split of the data set")
    text_column: str | None = flag(None, "column of plain texts; excludes the chat columns")
    system_column: str | None = flag(None, "column of system messages")
    user_column: str | None = flag(None, "column of user messages")
    assistant_column: str | None = flag(None, "column of assistant messages")
    num_examples: int = flag(10_000, "number of rows, from the first on")
    max_length: int = flag(256, "tokens of an example beyond this are cut")
    tokens_per_batch: int | None = flag(
        None, "tokens of a batch, padding included; default: 8192 on a GPU, 1024 on a CPU, to stay in its caches"
    )
    output_dir: str = flag(None, "folder for gram.safetensors")
    dtype: str = flag("auto", f"the model's: {', '.join(DTYPES)}; auto is the one it was saved in")
    device: str = flag("auto", "auto (GPU if there is one), cpu, cuda")
    layerwise: str = flag("auto", "run one decoder layer at a time: on, off, or auto, where the model is too large")
    offload_dir: str | None = flag(None, "layer by layer: folder for hidden states; default: they stay in host memory")
    trust_remote_code: bool = flag(False, "run Python code that comes with the model")
    overwrite: bool = flag(False, "replace another Gram, or another unfinished run, in the output folder")
    plan: str | None = flag(None, PLAN_HELP, nargs="?", const=HERE)

    required = ("model", "dataset", "output_dir")

    def __post_init__(self) -> None:
        # --plan needs no texts and no output folder.
        for name in ("model",) if self.plan else self.required:
            if not getattr(self, name):
                raise InputError(f"--{name} is missing")
        for name in ("num_examples", "max_length", "tokens_per_batch"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise InputError(f"--{name} must be at least 1")
        if self.plan is not None:
            parse_devices(self.plan)
        elif bool(self.text_column) == bool(self.roles()):
            raise InputError("give either --text_column or chat columns (--user_column, --assistant_column, ...)")
        if self.layerwise not in ("auto", "on", "off"):
            raise InputError("--layerwise is auto, on or off")
        _check_dtype(self.dtype)

    def batch_tokens(self, device_type: str) -> int:
        """Tokens of a batch, padding included, on a device of this type."""
        return self.tokens_per_batch or default_batch_tokens(device_type)

    def roles(self) -> dict[str, str]:
        """Column of each role that has one, in the order of a conversation."""
        columns = {"system": self.system_column, "user": self.user_column, "assistant": self.assistant_column}
        return {role: column for role, column in columns.items() if column}

    def texts(self) -> TextSource:
        """The texts that the flags name."""
        columns = {"text": self.text_column} if self.text_column else self.roles()
        return TextSource(self.dataset, self.dataset_revision, self.split, columns, self.num_examples, self.max_length)


@dataclass(frozen=True)
class CalibrationFlags(GramFlags):
    """Texts of a layer-sequential merge: flags of compute_gram.py, of which those that concern the texts are read."""

    required = ("dataset",)


@dataclass(frozen=True)
class ConvertFlags:
    """Convert a published gram.pkl to gram.safetensors."""

    source: str = flag(None, "the published file")
    output_dir: str | None = flag(None, "folder for gram.safetensors; default: the published file's own")

    def __post_init__(self) -> None:
        if not self.source:
            raise InputError("convert takes the published file: compute_gram.py convert gram.pkl")


@dataclass(frozen=True)
class MergeFlags:
    """Merge models of one architecture into one, by averaging or by RegMean."""

    method: str = flag(None, f"one of {', '.join(METHODS)}; the last two run the models layer by layer")
    models: list[str] = flag(
        [], "hub ids or local folders of models or LoRA adapters; the first provides config and tokenizer"
    )
    revisions: list[str] = flag([], "branch, tag or commit of each hub model")
    base: str | None = flag(None, "base model of all adapters; default: those that their adapter_config.json name")
    grams: list[str] = flag([], "each model's Gram file, or the folder that holds it, in the models' order")
    alpha: list[float] = flag([0.1], "factor on the Grams' off-diagonals, from 0 to 1; one merge for each value")
    model_weights: list[float] = flag([], "weight of each model; default: equal weights")
    include: list[str] = flag([], "regexes: only tensors whose name contains a match are merged")
    exclude: list[str] = flag([], "regexes: tensors whose name contains a match are the first model's, unmerged")
    embeddings: str | None = flag(
        None,
        "embedding tables: counts (by token counts) or average; default: counts, but average for a table that is "
        "the output head, too",
    )
    router: int | None = flag(
        None, "of mixtures of experts: number of the model, from 1, whose routers are taken; default: they are merged"
    )
    solver: str = flag("cholesky", "cholesky, lstsq (as published) or inverse (as in the paper)")
    dtype: str = flag("auto", f"of the merged model: {', '.join(DTYPES)}; auto is the first model's")
    device: str = flag("auto", "device of the solver, and of the layers: auto (GPU if there is one), cpu, cuda")
    calibration: list[str] = flag(
        [],
        "each model's texts: a preset of configs/regmean, or a YAML file of compute_gram.py's flags; avg and regmean "
        "measure the routing of mixtures of experts on them",
    )
    ridge: float = flag(1e-6, "of regmean_asym: added to the diagonal, as a fraction of its mean")
    tokens_per_batch: int | None = flag(
        None, "tokens of a batch of texts, padding included; default: 8192 on a GPU, 1024 on a CPU"
    )
    offload_dir: str | None = flag(None, "folder for the texts' hidden states; default: they stay in host memory")
    max_shard_size: str = flag("5GB", "largest weight file")
    output_dir: str | None = flag(None, "default runs/merges/avg, runs/merges/regmean_ALPHA; several get _ALPHA added")
    plan: str | None = flag(None, PLAN_HELP, nargs="?", const=HERE)

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise InputError(f"--method is one of {', '.join(METHODS)}")
        if len(self.models) < 2:
            raise InputError("--models takes two or more")
        if self.plan is not None:
            parse_devices(self.plan)
        elif self.method == "regmean" and len(self.grams) != len(self.models):
            raise InputError(f"--grams takes one per model: {len(self.models)}, not {len(self.grams)}")
        if self.method != "regmean" and self.grams:
            raise InputError("--grams belongs to --method regmean")
        if self.embeddings not in (None, "counts", "average"):
            raise InputError("--embeddings is counts or average")
        if self.method == "avg" and self.embeddings == "counts":
            raise InputError("--embeddings counts belongs to --method regmean")
        self._check_sequential()
        if self.solver not in ("cholesky", "lstsq", "inverse"):
            raise InputError("--solver is cholesky, lstsq or inverse")
        if self.router is not None and not 1 <= self.router <= len(self.models):
            raise InputError(f"--router is a number of --models: 1 to {len(self.models)}")
        if not self.alpha or not all(0 <= alpha <= 1 for alpha in self.alpha):
            raise InputError("--alpha must lie between 0 and 1")
        if len({f"{alpha:g}" for alpha in self.alpha}) < len(self.alpha):
            raise InputError("--alpha names a value twice: six digits count, as in the names of the output folders")
        for name in ("model_weights", "revisions"):
            given = getattr(self, name)
            if given and len(given) != len(self.models):
                raise InputError(f"--{name} takes one per model: {len(self.models)}, not {len(given)}")
        if not all(weight > 0 and math.isfinite(weight) for weight in self.model_weights):
            raise InputError("--model_weights must be positive")
        for name in ("include", "exclude"):
            for pattern in getattr(self, name):
                try:
                    re.compile(pattern)
                except (re.error, OverflowError, RecursionError) as error:
                    raise InputError(f"--{name} {pattern!r}: not a regular expression: {error}") from error
        _check_dtype(self.dtype)

    @property
    def counts_embeddings(self) -> tuple[bool, bool]:
        """True if embedding tables are merged by token counts; and if those are, too, that are the output head."""
        return self.method != "avg" and self.embeddings != "average", self.embeddings == "counts"

    @property
    def plan_options(self) -> tuple[Any, ...]:
        """The last arguments of `plan_merge`."""
        router = None if self.router is None else self.router - 1
        return self.selects, self.dtype, self.counts_embeddings, router

    def _check_sequential(self) -> None:
        if self.method not in SEQUENTIAL and not self.calibration:
            for name in ("offload_dir", "tokens_per_batch"):
                if getattr(self, name):
                    raise InputError(f"--{name} belongs to --calibration")
        elif (self.plan is None or self.calibration) and len(self.calibration) != len(self.models):
            raise InputError(f"--calibration takes one per model: {len(self.models)}, not {len(self.calibration)}")
        if self.method == "regmean_asym" and self.solver != "cholesky":
            raise InputError("--method regmean_asym has one solver: cholesky")
        if not (self.ridge >= 0 and math.isfinite(self.ridge)):
            raise InputError("--ridge must be at least 0")
        if self.tokens_per_batch is not None and self.tokens_per_batch < 1:
            raise InputError("--tokens_per_batch must be at least 1")

    def texts(self, of_any_model: bool = False) -> list[TextSource]:
        """The calibration texts of each model; `of_any_model` accepts those of others, for an estimate.

        Raises:
            InputError: a preset or file that cannot be read, or that names another model.
        """
        sources = []
        for name, model in zip(self.calibration, self.models, strict=True):
            path = Path(name) if name.endswith((".yaml", ".yml")) else PRESETS / f"{name}.yaml"
            if not path.is_file():
                names = ", ".join(sorted(preset.stem for preset in PRESETS.glob("*.yaml")))
                raise InputError(f"--calibration {name}: no such file, and no preset of that name; presets: {names}")
            flags = parse_flags(CalibrationFlags, ["--config", str(path)])
            if flags.model and flags.model != model and not of_any_model:
                raise InputError(
                    f"--calibration {name}: {path} is for the model {flags.model}, not {model}; --calibration goes in "
                    "the order of --models"
                )
            sources.append(flags.texts())
        return sources

    def weights(self) -> list[float]:
        """Each model's weight; they sum to 1."""
        given = self.model_weights or [1.0] * len(self.models)
        return [weight / sum(given) for weight in given]

    def selects(self, tensor: str) -> bool:
        """True if the tensor of this name is merged."""
        included = not self.include or any(re.search(pattern, tensor) for pattern in self.include)
        return included and not any(re.search(pattern, tensor) for pattern in self.exclude)

    def batch_tokens(self, device_type: str) -> int:
        """Tokens of a batch of texts, padding included, on a device of this type."""
        return self.tokens_per_batch or default_batch_tokens(device_type)

    def output_dirs(self) -> list[Path]:
        """The folder of each merge: one per alpha, or a single one for `avg`."""
        if self.method == "avg":
            return [Path(self.output_dir or "runs/merges/avg")]
        if self.output_dir and len(self.alpha) == 1:
            return [Path(self.output_dir)]
        return [Path(f"{self.output_dir or f'runs/merges/{self.method}'}_{alpha:g}") for alpha in self.alpha]


def default_batch_tokens(device_type: str) -> int:
    """Tokens of a batch on a device of this type; on a CPU they stay in its caches."""
    return 8192 if device_type == "cuda" else 1024


def _check_dtype(dtype: str) -> None:
    if dtype not in DTYPES:
        raise InputError(f"--dtype is one of {', '.join(DTYPES)}")
