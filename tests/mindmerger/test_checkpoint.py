import os
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import save_file
from transformers import (
    Gemma2Config,
    Gemma2Model,
    Gemma3TextConfig,
    GemmaConfig,
    GemmaModel,
    PretrainedConfig,
    PreTrainedModel,
    VaultGemmaConfig,
    VaultGemmaModel,
)

from common.errors import InputError
from common.ranks import Process
from mindmerger.checkpoint import (
    SAFETENSORS,
    harmed_languages,
    mapping_shapes,
    read_mapping,
    read_record,
    switched_languages,
    warn_of_scale,
    write_mapping,
    write_verdicts,
)
from mindmerger.config import ModelPair


@pytest.fixture
def state() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return {name: torch.randn(shape) for name, shape in mapping_shapes(6, 4).items()}


def test_every_form_is_read_back(state: dict[str, torch.Tensor], tmp_path: Path) -> None:
    write_mapping(tmp_path, {"model_type": "mindmerger"}, state)
    torch.save({"model_state_dict": state}, tmp_path / "old.bin", _use_new_zipfile_serialization=False)
    for path in (tmp_path, tmp_path / "model.safetensors", tmp_path / "pytorch_model.bin", tmp_path / "old.bin"):
        read = read_mapping(path, 6, 4)
        assert read.keys() == state.keys()
        assert all(torch.equal(read[name], state[name]) for name in state)
    (tmp_path / "model.safetensors").unlink()
    assert read_mapping(tmp_path, 6, 4).keys() == state.keys()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("end_boundary"), "end_boundary is missing"),
        (lambda s: s.update(extra=torch.ones(1)), "extra is not a tensor of a mapping"),
        (
            lambda s: s.update({"mlp.linear2.bias": torch.ones(5)}),
            r"mlp.linear2.bias is \[5\], these models need \[4\]",
        ),
        (lambda s: s["mlp.linear1.bias"].fill_(float("nan")), "mlp.linear1.bias has values that are not finite"),
    ],
)
def test_a_wrong_mapping_is_refused_by_tensor(
    state: dict[str, torch.Tensor], tmp_path: Path, change: object, message: str
) -> None:
    change(state)
    save_file(state, tmp_path / "m.safetensors")
    torch.save({"model_state_dict": state}, tmp_path / "m.bin")
    for path in (tmp_path / "m.safetensors", tmp_path / "m.bin"):
        with pytest.raises(InputError, match=message) as error:
            read_mapping(path, 6, 4)
        assert str(path) in str(error.value)


def test_a_mapping_of_another_llm_is_refused(state: dict[str, torch.Tensor], tmp_path: Path) -> None:
    write_mapping(tmp_path, {}, state)
    with pytest.raises(
        InputError, match=r"LLM of width 8: mlp.linear2.weight is \[4, 12\], these models need \[8, 12\]"
    ):
        read_mapping(tmp_path, 6, 8)


class Malicious:
    def __init__(self, witness: Path):
        self.witness = witness

    def __reduce__(self) -> tuple:
        return os.system, (f"touch {self.witness}",)


def test_damaged_and_malicious_files_are_refused(state: dict[str, torch.Tensor], tmp_path: Path) -> None:
    write_mapping(tmp_path, {}, state)
    for name in ("model.safetensors", "pytorch_model.bin"):
        whole = (tmp_path / name).read_bytes()
        for size in (0, 7, len(whole) // 2, len(whole) - 1):
            (tmp_path / name).write_bytes(whole[:size])
            with pytest.raises(InputError, match=name):
                read_mapping(tmp_path / name, 6, 4)
    torch.save({"model_state_dict": Malicious(tmp_path / "unpickled")}, tmp_path / "evil.bin")
    with pytest.raises(InputError, match=r"evil\.bin"):
        read_mapping(tmp_path / "evil.bin", 6, 4)
    assert not (tmp_path / "unpickled").exists()
    torch.save([1, 2], tmp_path / "list.bin")
    with pytest.raises(InputError, match="expected the published form"):
        read_mapping(tmp_path / "list.bin", 6, 4)
    with pytest.raises(InputError, match="no mapping at"):
        read_mapping(tmp_path / "nowhere", 6, 4)


@pytest.mark.parametrize("config", [GemmaConfig(), Gemma2Config(), VaultGemmaConfig(), Gemma3TextConfig()])
@pytest.mark.parametrize("version", ["4.57.3", transformers.__version__, None])
def test_a_mapping_for_gemma_of_another_major_version_is_warned_of(
    state: dict[str, torch.Tensor],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    config: PretrainedConfig,
    version: str | None,
) -> None:
    write_mapping(tmp_path / "checkpoint", {"transformers_version": version}, state)
    config.save_pretrained(tmp_path)
    warn_of_scale(ModelPair(llm_path=str(tmp_path)), tmp_path / "checkpoint", Process(0, 1, torch.device("cpu")))
    printed = capsys.readouterr().out
    if version == "4.57.3" and config.model_type != "gemma3_text":
        assert "checkpoint was trained under transformers 4.57.3, which scales the input" in printed
        assert f"{config.model_type} differently from {transformers.__version__}: train the mapping again" in printed
    else:
        assert printed == ""


@pytest.mark.parametrize("model_class", [GemmaModel, Gemma2Model, VaultGemmaModel])
def test_this_transformers_scales_token_ids_alone(model_class: type[PreTrainedModel]) -> None:
    """Basis of the warning: only embeddings of ids are scaled, vectors given in their place are not."""
    shape = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "head_dim": 4, "vocab_size": 9}
    model = model_class(model_class.config_class(num_attention_heads=2, num_key_value_heads=1, **shape)).eval()
    ids = torch.tensor([[3, 4, 5]])
    scaled = model.embed_tokens.weight[ids] * 8**0.5
    assert torch.allclose(model(input_ids=ids)[0], model(inputs_embeds=scaled)[0], atol=1e-6)


def test_verdicts_are_bound_to_the_mapping(state: dict[str, torch.Tensor], tmp_path: Path, capsys) -> None:
    process, mapping = Process(0, 1, torch.device("cpu")), tmp_path / SAFETENSORS
    write_mapping(tmp_path, {"model_type": "mindmerger"}, state)
    assert switched_languages(tmp_path, "on", process) == frozenset()
    write_verdicts(mapping, {"German": {"verdict": "helps", "p": 0.01}, "English": {"verdict": "harms"}})
    write_verdicts(mapping, {"Thai": {"verdict": "harms"}, "Swahili": {"verdict": "cannot be told"}})
    for checkpoint in (tmp_path, mapping):
        assert switched_languages(checkpoint, "on", process) == {"English", "Thai"}
        assert switched_languages(checkpoint, "off", process) == frozenset()
    assert switched_languages(tmp_path / "pytorch_model.bin", "on", process) == frozenset()
    assert read_record(tmp_path)["verdicts"]["languages"]["German"] == {"verdict": "helps", "p": 0.01}
    assert not capsys.readouterr().out

    config = read_record(tmp_path)
    write_mapping(tmp_path, config, state | {"end_boundary": state["end_boundary"] + 1})
    assert switched_languages(tmp_path, "on", process) == frozenset()
    assert "no language is switched, since the verdicts in" in capsys.readouterr().out
    # New verdicts do not mix with those on another mapping.
    write_verdicts(mapping, {"Greek": {"verdict": "harms"}})
    assert read_record(tmp_path)["verdicts"]["languages"].keys() == {"Greek"}
    for damaged in ({}, [], "harms", {"mapping_sha256": "0", "languages": {"Thai": "harms"}}):
        with pytest.raises(InputError, match="config.json: its verdicts are not in the form of a training stage"):
            harmed_languages(mapping, damaged, pytest.fail)
