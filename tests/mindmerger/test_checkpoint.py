import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from common.errors import InputError
from mindmerger.checkpoint import mapping_shapes, read_mapping, write_mapping


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
        (lambda s: s["mlp.linear1.bias"].fill_(float("nan")), "mlp.linear1.bias holds values that are not finite"),
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
