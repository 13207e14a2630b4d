"""Adapter folders of PEFT: opened as models, with the base's files and the adapter's. PEFT itself is not needed.

PEFT names a module as the base model's class does; in its file, `base_model.model.` stands before the name.
"""

import hashlib
import json
import math
import re
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

from common.errors import InputError
from common.io import inside, read_json
from regmean.adapters import AdaptedTensor, BiasTensor, LoraTensor, ReplacedTensor, TokenTensor, updated_experts
from regmean.heads import HEAD, TABLE, is_copy, same_values
from regmean.model_folder import (
    ADAPTER,
    ADAPTER_WEIGHTS,
    INDEX_NAME,
    SINGLE_NAME,
    Checkpoint,
    commit,
    companions,
    is_adapter,
    locate_model,
    open_checkpoint,
    untied_config,
)
from regmean.tensor_file import FLOATS, TensorFile, TensorInfo, decode

PREFIX = "base_model.model."
# Ends of names in the adapter's file, and the part of an update that each is.
PARTS = {
    "lora_A.weight": "a",
    "lora_B.weight": "b",
    "lora_B.bias": "bias",
    "lora_embedding_A": "a of a table",
    "lora_embedding_B": "b of a table",
    "lora_magnitude_vector": "magnitude",
    "lora_magnitude_vector.weight": "magnitude",
    "trainable_tokens_delta": "rows",
}
# Parts of names that PEFT's wrappers of a module add, and the one of the wrapped module's untrained values.
WRAPPERS, UNTRAINED = re.compile(r"\.(base_layer|modules_to_save|token_adapter)(?=\.)"), ".original_module."
# Settings that the updates depend on.
USED = ("peft_type", "lora_alpha", "alpha_pattern", "use_rslora", "use_dora")
TOKENS = ("trainable_token_indices", "token_indices")
PARAMETERS = "target_parameters"  # ends of names of parameters with an update, such as those of all experts
# Settings of training, and those that the file's tensors show.
WITHOUT_EFFECT = {
    *("base_model_name_or_path", "revision", "task_type", "auto_mapping", "peft_version", "inference_mode"),
    *("r", "rank_pattern", "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"),
    *("modules_to_save", "lora_dropout", "bias", "lora_bias", "ensure_weight_tying", "megatron_config"),
    *("megatron_core", "init_weights", "loftq_config", "eva_config", "corda_config", "lora_ga_config"),
    *("init_lora_weights", "qalora_group_size", "fan_in_fan_out"),
}
LARGEST = 1e30  # alpha: beyond it, float32 overflows
ALPHA_FOR = r"(.*\.)?({})$"  # pattern of the names of modules that a key of alpha_pattern is for
# Other initialisations take a part of the base's weights away.
INITIALISATIONS = ("true", "false", "none", "gaussian", "eva", "orthogonal", "mica")
# Files of a tokenizer, among the companions of a model, and those of them that hold its vocabulary.
VOCABULARY = re.compile(r"tokenizer\.json|vocab|.*\.(model|tiktoken|codes|bpe|spm)$")
TOKENIZER = re.compile(
    rf"{VOCABULARY.pattern}|tokenizer|merges\.txt|special_tokens_map|added_tokens|(additional_)?chat_template"
)
LOADED = 32  # factors kept in memory: those of the layers of one Gram, of a few models


@dataclass(frozen=True)
class AdapterCheckpoint(Checkpoint):
    """An adapter and its base as one model: folder, config and names of tensors are the base's.

    Attributes:
        base: the base.
        own_folder: folder of the adapter.
        own_tensors: tensors of the adapter's file.
        settings: content of `adapter_config.json`.
    """

    base: Checkpoint
    own_folder: Path
    own_tensors: dict[str, TensorInfo] = field(repr=False)
    settings: dict[str, Any] = field(repr=False)

    @property
    def tokenizer_folder(self) -> Path:
        """The adapter's folder if it has a whole tokenizer, else the base's."""
        whole = any(VOCABULARY.match(path.name) for path in self.own_folder.iterdir())
        return self.own_folder if whole and (self.own_folder / "tokenizer_config.json").exists() else self.folder

    def files(self) -> set[Path]:
        return self.base.files() | {self.own_folder / ADAPTER, self.own_folder / ADAPTER_WEIGHTS}

    def changed(self) -> set[str]:
        return {name for name, info in self.tensors.items() if info is not self.base.tensors.get(name)}

    def origin(self) -> dict[str, Any]:
        return {"model": self.name, "base": self.base.name}

    def revision(self) -> str | None:
        return commit(self.own_folder)

    def companions(self) -> dict[Path, Path]:
        """The base's, with the adapter's tokenizer in place of the base's if it has one."""
        found = companions(self.folder)
        if self.tokenizer_folder == self.folder:
            return found
        of_adapter = companions(self.own_folder).items()
        found = {path: to for path, to in found.items() if not TOKENIZER.match(str(to))}
        return found | {path: to for path, to in of_adapter if TOKENIZER.match(str(to))}

    def fingerprint(self) -> str:
        """Hex digest of base and adapter. The last bits of the base merged with it depend on the machine."""
        own = Checkpoint(self.name, self.own_folder, {}, self.own_tensors)
        settings = {key: self.settings.get(key) for key in (*USED, *TOKENS)}
        settings |= {PARAMETERS: targets} if (targets := self.settings.get(PARAMETERS)) else {}
        text = json.dumps([self.base.fingerprint(), own.fingerprint(), settings], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()


def open_models(names: list[str], revisions: list[str | None], base: str | None) -> list[Checkpoint]:
    """Open models and adapters; `revisions` may be empty, and `base` replaces the base of every adapter.

    Raises:
        InputError: as of `open_checkpoint` and `open_adapter`, or `base` without an adapter.
    """
    models = []
    for name, revision in zip(names, revisions or [None] * len(names), strict=True):
        folder = locate_model(name, revision)
        if is_adapter(folder):
            models.append(open_adapter(name, folder, base))
        else:
            models.append(open_checkpoint(name, revision, folder))
    if base and not any(isinstance(model, AdapterCheckpoint) for model in models):
        raise InputError(f"--base {base} is for adapters, and there is none among {', '.join(names)}")
    return models


def open_adapter(name: str, folder: Path, base: str | None) -> AdapterCheckpoint:
    """Open an adapter and its base, and match the updates with the base's tensors.

    Raises:
        InputError: the adapter is of a kind that this cannot add to weights, or does not fit the base.
    """
    settings = read_settings(folder)
    named, revision = base_of(folder, settings, base)
    if not (folder / ADAPTER_WEIGHTS).exists() and commit(folder):
        folder = locate_model(name, folder.name, adapter=True)
    if not (folder / ADAPTER_WEIGHTS).exists():
        raise InputError(f"adapter {name}: {folder} holds no {ADAPTER_WEIGHTS}; save it in that form with peft first")
    try:
        model = open_checkpoint(named, revision)
    except InputError as error:
        raise InputError(f"adapter {name}, base {named}: {error}; --base names another base") from error
    own = TensorFile(inside(folder, ADAPTER_WEIGHTS)).tensors
    tensors, untied = _Matching(model, folder, settings, own).tensors()
    config = untied_config(model.config) if untied else model.config
    return AdapterCheckpoint(name, model.folder, config, tensors, model, folder, own, settings, untied=untied)


def config_name(name: str, revision: str | None, base: str | None) -> tuple[str, str | None]:
    """Name and revision of the model whose config a model has, itself or an adapter's base; no weights are read."""
    folder = Path(name) if Path(name).is_dir() else _downloaded_settings(name, revision)
    return base_of(folder, read_settings(folder), base) if folder and is_adapter(folder) else (name, revision)


def _downloaded_settings(name: str, revision: str | None) -> Path | None:
    """Folder of the settings of an adapter of the hub; None for other models, or if the hub cannot be reached."""
    from huggingface_hub import list_repo_files, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        files = set(list_repo_files(name, revision=revision))
        if ADAPTER not in files or files & {SINGLE_NAME, INDEX_NAME}:
            return None
        return Path(snapshot_download(name, revision=revision, allow_patterns=[ADAPTER]))
    except (HfHubHTTPError, HFValidationError, OSError):
        return None


def base_of(folder: Path, settings: dict[str, Any], base: str | None) -> tuple[str, str | None]:
    """Name and revision of an adapter's base; `base` replaces those in the settings.

    Raises:
        InputError: neither names one.
    """
    if base:
        return base, None
    named, revision = settings.get("base_model_name_or_path"), settings.get("revision")
    if not isinstance(named, str) or not named or not isinstance(revision, str | None):
        raise InputError(f"{folder / ADAPTER}: no base_model_name_or_path; give the base by --base")
    return named, revision


def read_settings(folder: Path) -> dict[str, Any]:
    """The content of a folder's `adapter_config.json`.

    Raises:
        InputError: settings of an adapter that is no sum of a base's weights and LoRA's or DoRA's.
    """
    path = folder / ADAPTER
    settings = read_json(path)
    if not isinstance(settings, dict):
        raise InputError(f"{path}: expected an object")
    kind = settings.get("peft_type")
    if kind not in ("LORA", "TRAINABLE_TOKENS"):
        raise InputError(f"{path}: adapters of type {kind} are not read, only LORA (with DoRA) and TRAINABLE_TOKENS")
    unknown = sorted(settings.keys() - WITHOUT_EFFECT - {*USED, *TOKENS, PARAMETERS})
    if used := [key for key in unknown if settings[key]]:
        raise InputError(f"{path}: {used[0]} is not supported: merge the adapter into its base with peft first")
    start = settings.get("init_lora_weights")
    if str(start).lower() not in INITIALISATIONS:
        raise InputError(
            f"{path}: init_lora_weights {start} changes the base's weights: save the adapter again with peft's "
            "path_initial_model_for_weight_conversion, or merge it into its base with peft first"
        )
    alpha, pattern = settings.get("lora_alpha", 8), settings.get("alpha_pattern") or {}
    alphas = [alpha, *pattern.values()] if isinstance(pattern, dict) else [None]
    if not all(isinstance(value, int | float) and abs(value) < LARGEST for value in alphas):
        raise InputError(f"{path}: lora_alpha and alpha_pattern must be numbers")
    for key in pattern:
        try:
            re.compile(ALPHA_FOR.format(key))
        except (re.error, OverflowError, RecursionError) as error:
            raise InputError(f"{path}: alpha_pattern {key!r}: not a regular expression: {error}") from error
    return settings


class _Matching:
    """Tensors of a base with the updates of an adapter."""

    def __init__(self, base: Checkpoint, folder: Path, settings: dict[str, Any], own: dict[str, TensorInfo]):
        self.base, self.settings, self.path = base, settings, folder / ADAPTER_WEIGHTS
        self.load = lru_cache(LOADED)(lambda info: decode(info.read(), info.dtype).reshape(info.shape))
        self.modules: dict[str, dict[str, TensorInfo]] = defaultdict(dict)
        self.whole: dict[str, TensorInfo] = {}
        for key, info in own.items():
            name = WRAPPERS.sub("", key.removeprefix(PREFIX))
            part = next((part for part in PARTS if name.endswith(f".{part}")), None)
            if info.dtype not in FLOATS:
                raise InputError(f"{self.path}: tensor {key} is of {info.dtype}; adapters of floats are read")
            if part:
                module = name.removesuffix(f".{part}")
                if targets := settings.get(PARAMETERS):
                    module = _updated_parameter(self._built, module, targets, key.count(".base_layer")) or module
                self.modules[module][PARTS[part]] = info
            elif "lora_" in name:
                raise InputError(
                    f"{self.path}: tensor {key} is no part of an update that is known here: "
                    "save the adapter by peft's save_pretrained, or merge it into its base with peft first"
                )
            elif UNTRAINED not in name:
                self.whole[name] = info

    def tensors(self) -> tuple[dict[str, TensorInfo], bool]:
        """The tensors, and True if an output head that is the base's embedding table is so no more."""
        adapted: dict[str, AdaptedTensor] = {}
        for name, info in self.whole.items():
            target, base = self._target(name)
            self._check_shape(info, base.shape, base)
            adapted[target] = ReplacedTensor.of(base, self.path, info)
        for module, parts in self.modules.items():
            if self.settings.get(PARAMETERS) and module in self._parameters:
                adapted |= self._update_experts(module, parts)
                continue
            target, base = self._target(f"{module}.weight")
            adapted[target] = self._update(module, parts, adapted.get(target, base))
            if "bias" in parts:
                target, base = self._target(f"{module}.bias")
                self._check_shape(parts["bias"], base.shape, base)
                bias = (parts["bias"], self._scale(module, parts["a"].shape[0]))
                adapted[target] = BiasTensor.of(adapted.get(target, base), self.path, *bias)
        if not adapted:
            raise InputError(f"{self.path}: no tensor of an adapter")
        return self._settled(adapted)

    def _update(self, module: str, parts: dict[str, TensorInfo], base: TensorInfo) -> AdaptedTensor:
        kinds = [{"rows"}, {"a of a table", "b of a table"}, {"a", "b"}, {"a", "b", "bias"}]
        if parts.keys() - {"magnitude"} not in kinds:
            raise InputError(
                f"{self.path}: the update of {module} is not whole: {', '.join(i.name for i in parts.values())}"
            )
        if "rows" in parts:
            return self._with_rows(module, parts["rows"], base)
        of_table = "a of a table" in parts
        a, b = (parts[f"{part} of a table" if of_table else part] for part in "ab")
        if len(base.shape) != 2:
            raise InputError(
                f"{self.path}: {module} is no linear layer: {base.name} in {base.path} is {list(base.shape)}; "
                "merge the adapter into its base with peft first"
            )
        shape, rank = (*b.shape[:1], *a.shape[1:]), math.prod(a.shape[:1])
        transposed = of_table or (shape[::-1] == base.shape and (shape != base.shape or self._is_conv1d))
        if not rank or b.shape[1:] != (rank,) or (shape[::-1] if transposed else shape) != base.shape:
            self._refuse(f"the product of {list(b.shape)} and {list(a.shape)} of {module}", base.shape, base)
        magnitude = parts.get("magnitude")
        if bool(self.settings.get("use_dora")) != (magnitude is not None):
            raise InputError(
                f"{self.path}: use_dora is {self.settings.get('use_dora')}, unlike the tensors of {module}"
            )
        if magnitude is not None:
            self._check_shape(magnitude, (base.shape[1 if transposed else 0],), base)
        update = (a, b, magnitude, self._scale(module, rank), transposed, self.load)
        return LoraTensor.of(base, self.path, *update)

    def _update_experts(self, name: str, parts: dict[str, TensorInfo]) -> dict[str, TensorInfo]:
        """The tensors that hold a parameter of all experts, with their updates."""
        (count, *shape), base = self._built.get_parameter(name).shape, self._parameters.get(name)
        if parts.keys() != {"a", "b"} or base is None:
            raise InputError(f"{self.path}: the update of {name} is not whole, or the base's tensors do not hold it")
        a, b = parts["a"], parts["b"]
        product, rank = [*b.shape[:1], *a.shape[1:]], math.prod(a.shape[:1]) // count
        if (
            not rank
            or a.shape[:1] != (rank * count,)
            or b.shape[1:] != (rank * count,)
            or sorted(product) != sorted(shape)
        ):
            self._refuse(f"the product of {list(b.shape)} and {list(a.shape)} of {name}", (count, *shape), base)
        experts = self._built.get_submodule(name.rpartition(".")[0])
        transposed = product != shape or (shape[0] == shape[1] and getattr(experts, "is_transposed", False))
        return updated_experts(base, self.path, a, b, self._scale(name, rank), transposed, self.load)

    def _scale(self, module: str, rank: int) -> float:
        """alpha / r, with the first alpha whose pattern fits the end of the module's name."""
        patterns = self.settings.get("alpha_pattern") or {}
        found = (value for key, value in patterns.items() if re.match(ALPHA_FOR.format(key), module))
        alpha = next(found, self.settings.get("lora_alpha", 8))
        return alpha / (math.sqrt(rank) if self.settings.get("use_rslora") else rank)

    def _with_rows(self, module: str, rows: TensorInfo, base: TensorInfo) -> TokenTensor:
        tokens = next((self.settings[key] for key in TOKENS if self.settings.get(key)), None)
        if isinstance(tokens, dict):
            found = [ids for name, ids in tokens.items() if f".{module}".endswith(f".{name}")]
            # A tied head without ids of its own has those of its table.
            found += tokens.values() if HEAD.search(f"{module}.weight") else []
            tokens = found[0] if found else None
        if not isinstance(tokens, list) or not all(isinstance(id, int) and 0 <= id < base.shape[0] for id in tokens):
            raise InputError(
                f"{self.path.with_name(ADAPTER)}: no token ids of {module}, or ids beyond its table's rows"
            )
        self._check_shape(rows, (len(tokens), *base.shape[1:]), base)
        return TokenTensor.of(base, self.path, rows, tuple(tokens))

    def _check_shape(self, info: TensorInfo, shape: tuple[int, ...], base: TensorInfo) -> None:
        if info.shape != shape:
            self._refuse(f"{info.name} of {list(info.shape)}", shape, base)

    def _refuse(self, found: str, shape: tuple[int, ...], base: TensorInfo) -> None:
        raise InputError(
            f"{self.path}: {found} does not fit {base.name} in {base.path}, which takes {list(shape)}: give the "
            "adapter's own base by --base; if the vocabulary was resized, a base resized alike"
        )

    @cached_property
    def _is_conv1d(self) -> bool:
        """True if the base has weights stored as (inputs, outputs): the length of their biases is their width."""
        for name, info in self.base.tensors.items():
            bias = self.base.tensors.get(f"{name.removesuffix('weight')}bias") if len(info.shape) == 2 else None
            if bias is not None and bias.shape == info.shape[1:] != info.shape[:1]:
                return True
        return False

    @cached_property
    def _built(self) -> Any:
        """The base model without data, in which a tied head is tied; None if transformers has no class for it."""
        from regmean.architectures import build_on_meta  # imports transformers, which takes seconds

        built = build_on_meta(self.base)
        if built is not None:
            built.tie_weights()
        return built

    @cached_property
    def _parameters(self) -> dict[str, TensorInfo]:
        """The base's tensor of each parameter of the model that transformers builds."""
        from regmean.architectures import parameter_tensors

        return parameter_tensors(self._built, self.base.tensors)

    @cached_property
    def _tied(self) -> tuple[str, str] | None:
        """Names of the base's embedding table and of its output head, if the head is the table."""
        head, table = (
            (get() if (get := getattr(self._built, f"get_{end}_embeddings", None)) else None)
            for end in ("output", "input")
        )
        if head is None or table is None or head.weight is not table.weight:
            return None
        names = [
            f"{name}.weight" for of in (table, head) for name, module in self._built.named_modules() if module is of
        ]
        stored = [self._stored(name) for name in names]
        if stored[0] is None or (stored[1] and not is_copy(self.base.tensors[stored[1]], self.base)):
            return None
        return stored[0], stored[1] or names[1]

    @cached_property
    def _stored_names(self) -> Callable[[str], str | None]:
        """Function from the name of a parameter to that of the tensor that holds the parameter and no more."""
        from regmean.architectures import parameter_names

        if self._built is None:
            return lambda name: None
        found = self._parameters.items()
        whole = {name: info.name for name, info in found if info is self.base.tensors.get(info.name)}
        return lambda name: whole.get(name, whole.get(parameter_names(self._built, [name])[name][0]))

    def _stored(self, name: str) -> str | None:
        return name if name in self.base.tensors else self._stored_names(name)

    def _target(self, name: str) -> tuple[str, TensorInfo]:
        """Name of the base's tensor that `name` stands for, and the tensor; a tied head's is the embedding table."""
        stored = self._stored(name)
        if stored is not None:
            return stored, self.base.tensors[stored]
        if self._tied is not None and HEAD.search(name):
            table, head = self._tied
            return head, replace(self.base.tensors[table], name=head)
        raise InputError(
            f"{self.path}: no tensor of the base {self.base.name} holds {name} and no more: if this is the "
            "adapter's base, load it with the class that the adapter was trained on, save it, and give that by --base"
        )

    def _settled(self, adapted: dict[str, AdaptedTensor]) -> tuple[dict[str, TensorInfo], bool]:
        """All tensors. A tied head stays tied if both are updated alike, or if only rows of the table are replaced."""
        tensors = self.base.tensors | adapted
        if not any(HEAD.search(name) or TABLE.search(name) for name in adapted):
            return tensors, False
        if self._built is None and not any(HEAD.search(name) for name in self.base.tensors):
            raise InputError(f"{self.path}: the embedding table is updated, and transformers cannot build the base")
        if self._tied is None:
            return tensors, False
        name, head_name = self._tied
        if name not in adapted and head_name not in adapted:
            return tensors, False
        shared = replace(self.base.tensors[name], name=head_name)
        table, head = adapted.get(name, self.base.tensors[name]), adapted.get(head_name, shared)
        only_tokens = isinstance(table, TokenTensor) and head is shared
        if only_tokens or same_values(table, head):
            tensors.pop(head_name, None)
            return tensors, False
        tensors[head_name] = head
        return tensors, True


def _updated_parameter(built: Any, module: str, targets: list[str], depth: int) -> str | None:
    """The parameter of all experts that an update of a module is for, `depth` wrappers below the outermost: each of the
    module's parameters that has an update adds a wrapper around those before. None for other modules.
    """
    if built is None:
        return None
    own = {name: of for name, of in built.named_parameters() if name.rpartition(".")[0] == module}
    names = [name for name in own if f".{name}".endswith(tuple(f".{target}" for target in targets))]
    return names[-1 - depth] if depth < len(names) and own[names[-1 - depth]].ndim == 3 else None
