"""Checks that models can be merged with each other, from headers, configs and tokenizers alone."""

from collections.abc import Callable
from typing import Any, NamedTuple

from common.errors import InputError
from regmean.heads import settle_heads
from regmean.model_folder import Checkpoint, base_vocabulary, same_tokenizer_file
from regmean.names import NUMBERED, compact
from regmean.tensor_file import FLOATS, TensorInfo

MAX_LISTED = 20
# Settings that must be equal for weights to be comparable, and those that a merge can only take from one model.
SAME = (
    *("model_type", "vocab_size", "hidden_act", "hidden_activation"),
    *("num_attention_heads", "num_key_value_heads", "head_dim"),
)
ALIKE = ("rope_theta", "rope_scaling", "rope_parameters", "sliding_window", "rms_norm_eps")
# Settings that fine-tuned models often change, and that do not concern the weights.
UNRELATED = {
    *("_name_or_path", "architectures", "transformers_version", "dtype", "torch_dtype", "use_cache"),
    *("bos_token_id", "eos_token_id", "pad_token_id", "attention_dropout"),
}


class Compared(NamedTuple):
    """Models that can be merged.

    Attributes:
        models: the models, all with the first one's tensors.
        infos: tensors of the first model that the merge has, in its order.
        selected: names of the tensors to merge.
        copies: names of stored heads that are copies of an embedding table.
        untied: True if the merge has a separate head although the first model's config ties it.
    """

    models: list[Checkpoint]
    infos: dict[str, TensorInfo]
    selected: set[str]
    copies: set[str]
    untied: bool


def compare_models(models: list[Checkpoint], selects: Callable[[str], bool], notes: list[str]) -> Compared:
    """Compare configs, vocabularies and tensors; differences that are no errors are added to `notes`.

    Raises:
        InputError: the models do not fit together; the message lists every difference.
    """
    problems: list[str] = []
    models, unused = _aligned(models, selects)
    copies, untied = settle_heads(models, selects, problems, notes)
    first, *others = models
    names = [set(model.tensors) - copies for model in models]
    selected = {name for name in set().union(*names) if selects(name)}
    selected -= _left_to_first(names, selected & unused, notes)
    if not selected:
        problems.append("--include and --exclude leave no tensor to merge")
    unlike = problems if _has_tables(models, selected) else notes
    for model in others:
        _compare_configs(first, model, problems, unlike, notes)
        _compare_vocabularies(first, model, unlike, notes)
    _compare_tensors(models, names, selected, problems)
    refuse(problems)
    infos = {name: info for name, info in first.tensors.items() if name in names[0]}
    return Compared(models, infos, selected, copies, untied)


def _aligned(models: list[Checkpoint], selects: Callable[[str], bool]) -> tuple[list[Checkpoint], set[str]]:
    """Convert models written by other versions of transformers to the tensors of the first one; also return the names
    of tensors that are not parameters of it.
    """
    first, *others = models
    selected = [{(name, info.shape) for name, info in model.tensors.items() if selects(name)} for model in models]
    if not first.tensors or all(theirs == selected[0] for theirs in selected):
        return models, set()
    from regmean.architectures import build_on_meta, in_layout_of  # imports transformers, which takes seconds

    built, unused = build_on_meta(first), set()
    if built is None:
        return models, unused
    aligned = [first]
    for model in others:
        other, theirs = in_layout_of(first, model, built)
        aligned.append(other)
        unused |= theirs
    return aligned, unused


def _left_to_first(names: list[set[str]], unused: set[str], notes: list[str]) -> set[str]:
    """Names of `unused` tensors that some models lack; the merge has the first model's."""
    partial = {name for name in unused if not all(name in theirs for theirs in names)}
    # Only whole stacks of layers, and buffers in layers. A head alone is refused, since it may have been trained.
    stacks = {_stem(name) for name in partial if NUMBERED.search(name)}
    partial = {name for name in partial if _stem(name) in stacks}
    if partial:
        listed = ", ".join(compact(sorted(partial)))
        notes.append(f"not in every model, and not used by transformers; the merge has the first model's: {listed}")
    return partial


def _stem(name: str) -> str:
    return name.removeprefix("model.").partition(".")[0]


def _has_tables(models: list[Checkpoint], selected: set[str]) -> bool:
    """True if a merged tensor has as many rows as the vocabulary, or if the vocabulary's size is unknown."""
    for model in models:
        text = model.config.get("text_config")
        size = model.config.get("vocab_size", text.get("vocab_size") if isinstance(text, dict) else None)
        if size is None or any(size in info.shape[:1] for name, info in model.tensors.items() if name in selected):
            return True
    return False


def _compare_configs(
    first: Checkpoint, other: Checkpoint, problems: list[str], unlike: list[str], notes: list[str]
) -> None:
    """Compare settings; other vocabulary sizes are added to `unlike`."""
    a, b = ({key: model.config.get(key) for key in (*SAME, *ALIKE)} for model in (first, other))
    if any(first.config.get(key) != other.config.get(key) for key in {*first.config, *other.config} - UNRELATED):
        # Older files write the same settings in other forms. transformers reads all, but takes seconds to import.
        known = [_as_transformers_has_it(model) for model in (first, other)]
        if None not in known:
            a, b = known
    for key in SAME:
        if a[key] is not None and b[key] is not None and a[key] != b[key]:
            to = unlike if key == "vocab_size" else problems
            to.append(f"{key} is {a[key]!r} in {first.name} and {b[key]!r} in {other.name}")
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
    # Models with and without parts for images read the same text.
    known["model_type"] = text.model_type
    # Both are in rope_parameters, too, where the type may also have an older name.
    known |= {"rope_theta": None, "rope_scaling": None}
    if isinstance(known["rope_parameters"], dict):
        known["rope_parameters"] = {key: value for key, value in known["rope_parameters"].items() if key != "type"}
    return known


def check_vocabularies(models: list[Checkpoint]) -> None:
    """Check that all models give the same ids to the same texts.

    Raises:
        InputError: they do not.
    """
    problems: list[str] = []
    for model in models[1:]:
        _compare_vocabularies(models[0], model, problems, [])
    refuse(problems)


def _compare_vocabularies(first: Checkpoint, other: Checkpoint, unlike: list[str], notes: list[str]) -> None:
    if same_tokenizer_file(first, other):
        return
    a, b = base_vocabulary(first), base_vocabulary(other)
    if a is None or b is None:
        notes.append(f"the vocabularies of {first.name} and {other.name} were not compared: no tokenizer.json")
        return
    if len(a[0]) != len(b[0]):
        unlike.append(f"the tokenizers have {len(a[0])} texts in {first.name} and {len(b[0])} in {other.name}")
    elif a[0] != b[0]:
        unlike.append(f"the tokenizers of {first.name} and {other.name} give the same ids to different text")
    renamed = [id for id in sorted(a[1].keys() & b[1].keys()) if a[1][id] != b[1][id]]
    if renamed:
        # Fine-tuned models often rename reserved tokens, so this alone is no reason to refuse.
        pairs = ", ".join(f"{id}: {a[1][id]!r}, {b[1][id]!r}" for id in renamed[:5])
        notes.append(f"{first.name} and {other.name} name {len(renamed)} added tokens differently ({pairs})")
    for (model, mine), (lacking, theirs) in (((first, a), (other, b)), ((other, b), (first, a))):
        # A dict by text, or a list of pairs of text and score.
        texts = {str(text[0] if isinstance(text, list) and text else text) for text in theirs[0]}
        own = [id for id in sorted(mine[1].keys() - theirs[1].keys()) if str(mine[1][id]) not in texts]
        if own:
            listed = ", ".join(f"{id}: {mine[1][id]!r}" for id in own[:MAX_LISTED])
            listed += f" and {len(own) - MAX_LISTED} more" if len(own) > MAX_LISTED else ""
            notes.append(f"only the tokenizer of {model.name} has {listed}; in {lacking.name} these rows are spare")


def _compare_tensors(models: list[Checkpoint], names: list[set[str]], selected: set[str], problems: list[str]) -> None:
    missing: dict[tuple[str, str, str], list[str]] = {}
    for name in sorted(selected):
        holders = [model for model, theirs in zip(models, names, strict=True) if name in theirs]
        if len(holders) < len(models):
            lacking = ", ".join(model.name for model in models if model not in holders)
            # With --exclude, the first model's tensor would be between merged layers.
            advice = "" if NUMBERED.search(name) else "; --exclude leaves it out"
            missing.setdefault((holders[0].name, lacking, advice), []).append(name)
            continue
        infos = [model.tensors[name] for model in models]
        if len({info.shape for info in infos}) > 1:
            shapes = ", ".join(f"{list(info.shape)} in {info.path}" for info in infos)
            problems.append(f"tensor {name} is {shapes}")
        elif len({info.dtype for info in infos}) > 1 and not all(info.dtype in FLOATS for info in infos):
            problems.append(f"tensor {name} is {', '.join(f'{info.dtype} in {info.path}' for info in infos)}")
    for (holder, lacking, advice), found in missing.items():
        problems.extend(f"tensor {name} of {holder} is missing in {lacking}{advice}" for name in compact(found))


def refuse(problems: list[str]) -> None:
    """Raise InputError, with a list of `problems`, if there are any."""
    if problems:
        listed = "".join(f"\n  - {problem}" for problem in problems[:MAX_LISTED])
        more = f"\n  and {len(problems) - MAX_LISTED} more" if len(problems) > MAX_LISTED else ""
        raise InputError(f"these do not merge:{listed}{more}")
