"""Reading and writing of trained mappings, as a Hugging Face folder and in the published form."""

import io
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers
from safetensors import SafetensorError
from safetensors.torch import load_file, save

from common.errors import InputError
from common.io import read_json, sha256, write_bytes, write_json
from common.models import base_config

if TYPE_CHECKING:
    from common.ranks import Process
    from mindmerger.config import ModelPair

CONFIG = "config.json"
SAFETENSORS = "model.safetensors"
PUBLISHED = "pytorch_model.bin"
# Model types that multiply `inputs_embeds` by the square root of their width in transformers 4 and earlier only.
_SCALED_BEFORE_5 = ("gemma", "gemma2", "vaultgemma")


def mapping_shapes(mt_hidden_size: int, llm_hidden_size: int) -> dict[str, tuple[int, ...]]:
    """Shapes of the tensors of a mapping between models of these widths."""
    return {
        "mlp.linear1.weight": (2 * mt_hidden_size, mt_hidden_size),
        "mlp.linear1.bias": (2 * mt_hidden_size,),
        "mlp.linear2.weight": (llm_hidden_size, 2 * mt_hidden_size),
        "mlp.linear2.bias": (llm_hidden_size,),
        "end_boundary": (1, 1, llm_hidden_size),
    }


def mapping_file(checkpoint: Path) -> Path:
    """Path of the mapping's file: `checkpoint` itself, or the file in that folder.

    Raises:
        InputError: no such file.
    """
    candidates = [checkpoint / SAFETENSORS, checkpoint / PUBLISHED] if checkpoint.is_dir() else [checkpoint]
    for path in candidates:
        if path.is_file():
            return path
    raise InputError(f"no mapping at {checkpoint}: looked for {', '.join(map(str, candidates))}")


def read_mapping(checkpoint: Path, mt_hidden_size: int, llm_hidden_size: int) -> dict[str, torch.Tensor]:
    """Read a mapping between models of the given widths, as float32 on the CPU.

    Args:
        checkpoint: a folder, a `.safetensors` file, or a published `pytorch_model.bin`.

    Raises:
        InputError: the file is missing or damaged, or tensors are missing, unknown, of another shape, or not finite;
            the message names all such tensors.
    """
    path = mapping_file(checkpoint)
    state = _read_safetensors(path) if path.suffix == ".safetensors" else _read_published(path)

    expected = mapping_shapes(mt_hidden_size, llm_hidden_size)
    problems = [f"{name} is missing" for name in expected if name not in state]
    problems += [f"{name} is not a tensor of a mapping" for name in state if name not in expected]
    for name, shape in expected.items():
        if name in state and tuple(state[name].shape) != shape:
            problems.append(f"{name} is {list(state[name].shape)}, these models need {list(shape)}")
        elif name in state and (not state[name].dtype.is_floating_point or state[name].itemsize < 2):
            problems.append(f"{name} is {state[name].dtype}, not a float of 16 bits or more")
        elif name in state and not torch.isfinite(state[name]).all():
            problems.append(f"{name} has values that are not finite")
    if problems:
        raise InputError(
            f"{path} is not a mapping from an encoder of width {mt_hidden_size} to an LLM of width {llm_hidden_size}: "
            + "; ".join(problems)
        )
    return {name: tensor.float() for name, tensor in state.items()}


def read_record(checkpoint: Path) -> dict[str, Any]:
    """Read the `config.json` beside a mapping; empty for a published file without one.

    Raises:
        InputError: there is no mapping, or the config is damaged.
    """
    path = mapping_file(checkpoint).parent / CONFIG
    record = read_json(path) if path.is_file() else {}
    if not isinstance(record, dict):
        raise InputError(f"{path}: expected a JSON object")
    kinds = {f"{name}_{what}": str for name in ("llm", "mt") for what in ("path", "revision")}
    for name, kind in (kinds | {"augmentation": bool, "encoder_layer": int, "prompt_format": str}).items():
        if not isinstance(record.get(name), kind | None):
            raise InputError(f"{path}: {name} is {record[name]!r}, not of type {kind.__name__}")
    return record


def with_trained_layer(models: "ModelPair", checkpoint: Path) -> "ModelPair":
    """Set the encoder layer of `models` to the one that the mapping in `checkpoint` was trained on.

    Raises:
        InputError: `models` have another layer.
    """
    record = read_record(checkpoint)
    trained = record.get("encoder_layer")
    if models.encoder_layer is None:
        return replace(models, encoder_layer=trained)
    if record and models.encoder_layer != trained:
        layers = "all layers" if trained is None else f"{trained} layer(s)"
        raise InputError(f"--encoder_layer {models.encoder_layer}: {checkpoint} was trained on {layers} of the encoder")
    return models


def warn_of_scale(models: "ModelPair", checkpoint: Path, process: "Process") -> None:
    """Warn if the mapping was trained under a transformers version that scales the LLM's input differently."""
    from common.logging import say

    trained, current = read_record(checkpoint).get("transformers_version"), transformers.__version__
    if not isinstance(trained, str) or trained.partition(".")[0] == current.partition(".")[0]:
        return
    config = base_config(models.llm_path, models.llm_revision, models.trust_remote_code)
    model_type = config.get_text_config().model_type
    if model_type in _SCALED_BEFORE_5:
        say(
            process,
            f"warning: {checkpoint} was trained under transformers {trained}, which scales the input embeddings of "
            f"{model_type} differently from {current}: train the mapping again, or install that version",
        )


def write_verdicts(mapping: Path, judged: dict[str, dict[str, Any]]) -> None:
    """Add verdicts by language to the config beside the file `mapping`, bound to its sha256.

    Earlier verdicts on the same mapping stay for languages that are not in `judged`.
    """
    path, bound = mapping.parent / CONFIG, sha256(mapping)
    config = read_json(path)
    earlier = config.get("verdicts") or {}
    kept = earlier["languages"] if earlier.get("mapping_sha256") == bound else {}
    write_json(path, config | {"verdicts": {"mapping_sha256": bound, "languages": kept | judged}})


def switched_languages(checkpoint: Path, switch: str, process: "Process") -> frozenset[str]:
    """English names of the languages that the LLM answers alone, by the mapping's verdicts and the flag `--switch`."""
    from common.logging import say

    if switch != "on":
        return frozenset()
    verdicts = read_record(checkpoint).get("verdicts")
    return harmed_languages(mapping_file(checkpoint), verdicts, partial(say, process))


def harmed_languages(mapping: Path, verdicts: Any, warn: Callable[[str], None]) -> frozenset[str]:
    """English names of the languages in which a mapping does harm; none for a `.bin`, which has no verdicts.

    Args:
        mapping: file of the mapping.
        verdicts: `verdicts` of its config, or None.
        warn: gets a note if the verdicts are of another file, in which case none holds.

    Raises:
        InputError: the verdicts are malformed.
    """
    if verdicts is None or mapping.suffix != ".safetensors":
        return frozenset()
    config = mapping.parent / CONFIG
    try:
        bound = verdicts["mapping_sha256"]
        harmed = frozenset(name for name, entry in verdicts["languages"].items() if entry["verdict"] == "harms")
    except (TypeError, KeyError, AttributeError) as error:
        raise InputError(f"{config}: its verdicts are not in the form of a training stage: remove them") from error
    if bound == sha256(mapping):
        return harmed
    warn(f"note: no language is switched, since the verdicts in {config} are of another mapping than {mapping.name}")
    return frozenset()


def write_mapping(folder: Path, config: dict[str, Any], state: dict[str, torch.Tensor]) -> None:
    """Write `model.safetensors`, `pytorch_model.bin` in the published form, and `config.json`, each atomically.

    Args:
        folder: output folder, created if missing.
        config: content of a `MindMergerConfig`.
        state: tensors of a mapping, see `mapping_shapes`, in any dtype and on any device.

    Raises:
        InputError: the disk is full, or the folder cannot be written.
    """
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    # Not save_file and torch.save to a path, which report a full disk by different errors.
    write_bytes(folder / SAFETENSORS, save(state, metadata={"format": "pt"}))
    write_published(folder / PUBLISHED, state)
    write_json(folder / CONFIG, config)


def write_published(path: Path, state: dict[str, torch.Tensor]) -> None:
    """Write the published form, `{"model_state_dict": {...}}`, atomically; `state` as in `write_mapping`."""
    content = io.BytesIO()
    torch.save({"model_state_dict": state}, content)
    write_bytes(path, content.getvalue())


def _read_safetensors(path: Path) -> dict[str, torch.Tensor]:
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path}: not a whole safetensors file: {error}") from error


def _read_published(path: Path) -> dict[str, torch.Tensor]:
    from common.pickles import read_pickled

    content = read_pickled(path, by_torch=True)
    state = content.get("model_state_dict") if isinstance(content, dict) else None
    if not isinstance(state, dict) or not all(isinstance(tensor, torch.Tensor) for tensor in state.values()):
        raise InputError(f'{path}: expected the published form, {{"model_state_dict": {{name: tensor}}}}')
    return state
