"""Reader and writer against the safetensors library and torch."""

import json
import struct
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from common.errors import InputError
from regmean.tensor_file import TensorFile, TensorWriter, decode, decode_into, encode

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def test_reads_what_the_library_wrote(tmp_path: Path) -> None:
    torch.manual_seed(0)
    tensors = {name: torch.randn(5, 7).to(dtype) for name, dtype in DTYPES.items()}
    tensors |= {"I64": torch.arange(9), "empty": torch.zeros(0, 3), "scalar": torch.tensor(2.5)}
    save_file(tensors, tmp_path / "a.safetensors", metadata={"format": "pt"})
    file = TensorFile(tmp_path / "a.safetensors")
    for name in DTYPES:
        info = file.tensors[name]
        expected = tensors[name].double().numpy().ravel()
        np.testing.assert_array_equal(info.read_floats(), expected)
        np.testing.assert_array_equal(info.read_floats(3, 20), expected[3:20])
    np.testing.assert_array_equal(file.tensors["I64"].read(), np.arange(9))
    assert file.tensors["empty"].read().size == 0
    assert file.tensors["scalar"].read_floats() == [2.5]


def test_the_library_reads_what_we_wrote_in_any_order(tmp_path: Path) -> None:
    torch.manual_seed(0)
    tensors = {name: torch.randn(3, 5).to(dtype) for name, dtype in DTYPES.items()} | {"U8": torch.arange(7).byte()}
    layout = {name: (name, tuple(tensor.shape)) for name, tensor in reversed(tensors.items())}
    path = tmp_path / "a.safetensors"
    with TensorWriter(path, layout, {"format": "pt"}) as writer:
        for name, tensor in tensors.items():
            values = tensor.flatten()
            stored = values.view(torch.uint16).numpy() if name == "BF16" else values.numpy()
            writer.write(name, stored[4:], start=4)
            writer.write(name, stored[:4])
    loaded = load_file(path)
    for name, tensor in tensors.items():
        assert torch.equal(loaded[name], tensor), name
    with safe_open(path, "pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_a_tensor_is_written_by_several_threads(tmp_path: Path) -> None:
    values = np.arange(20_000, dtype=np.float32)
    path = tmp_path / "a.safetensors"
    with TensorWriter(path, {"a": ("F32", values.shape)}, {}) as writer, ThreadPoolExecutor(8) as threads:
        pieces = range(0, len(values), 10)
        list(threads.map(lambda start: writer.write("a", values[start : start + 10], start), pieces))
    np.testing.assert_array_equal(load_file(path)["a"], values)


def test_a_file_with_a_gap_is_an_error(tmp_path: Path) -> None:
    with (
        pytest.raises(ValueError, match="not fully written: \\['a'\\]"),
        TensorWriter(tmp_path / "a", {"a": ("F32", (4,))}, {}) as writer,
    ):
        writer.write("a", np.zeros(3, np.float32))
    with TensorWriter(tmp_path / "b", {"a": ("F32", (1,))}, {}) as writer:
        for wrong, start in ((np.zeros(2, np.float32), 0), (np.zeros(1), 0), (np.zeros(1, np.float32), 1)):
            with pytest.raises(ValueError, match="do not fit"):
                writer.write("a", wrong, start)
        writer.write("a", np.zeros(1, np.float32))


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
def test_rounding_is_torchs(dtype: str) -> None:
    torch.manual_seed(0)
    values = torch.cat([torch.randn(10_000), torch.randn(1000) * 1e-6, torch.tensor([0.0, -0.0, 1.00390625, 6e-8])])
    expected = values.to(DTYPES[dtype]).float()
    assert torch.equal(torch.from_numpy(decode(encode(values.numpy(), dtype), dtype)), expected)
    into = np.empty(len(values), np.float32)
    decode_into(into, encode(values.numpy(), dtype), dtype)
    assert torch.equal(torch.from_numpy(into), expected)


def test_a_value_beyond_the_range_is_an_error() -> None:
    with pytest.raises(OverflowError, match="1e\\+05 does not fit F16"):
        encode(np.array([1e5]), "F16")
    with pytest.raises(OverflowError, match="BF16"):
        encode(np.array([3.4e38]), "BF16")


def write_file(path: Path, header: bytes, data: bytes = b"") -> Path:
    path.write_bytes(struct.pack("<Q", len(header)) + header + data)
    return path


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}, "not a whole safetensors file"),
        ({"dtype": "F32", "shape": [-1], "data_offsets": [0, -4]}, "not a whole safetensors file"),
        ({"dtype": "F32", "shape": ["x"], "data_offsets": [0, 4]}, "not a whole safetensors file"),
        ({"dtype": "F32", "shape": [1.0], "data_offsets": [0, 4]}, "not a whole safetensors file"),
        ({"dtype": "F32", "shape": [1]}, "not a whole safetensors file"),
        ({"dtype": "F32", "shape": [10**12], "data_offsets": [0, 4 * 10**12]}, "download it again"),
        ({"dtype": "F8_E4M3", "shape": [4], "data_offsets": [0, 4]}, "tensor a has dtype F8_E4M3"),
        ([], "not a whole safetensors file"),
    ],
)
def test_a_damaged_header_is_named(tmp_path: Path, entry: object, message: str) -> None:
    path = write_file(tmp_path / "a.safetensors", json.dumps({"a": entry}).encode(), bytes(4))
    with pytest.raises(InputError, match=rf"a\.safetensors: .*({message})"):
        TensorFile(path)


@pytest.mark.parametrize("content", [b"", b"abc", b"\xff" * 64, struct.pack("<Q", 10**15) + b"{}", bytes(8)])
def test_what_is_no_safetensors_file_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.safetensors").write_bytes(content)
    with pytest.raises(InputError, match=r"a\.safetensors"):
        TensorFile(tmp_path / "a.safetensors")


def test_a_truncated_file_is_refused_before_reading(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_file({"a": torch.zeros(100)}, path)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(InputError, match="not a whole safetensors file; copy or download it again"):
        TensorFile(path)
    with pytest.raises(InputError, match="cannot be read: No such file"):
        TensorFile(tmp_path / "b.safetensors")


def test_nan_in_a_tensor_is_named(tmp_path: Path) -> None:
    save_file({"a": torch.tensor([1.0, torch.nan])}, tmp_path / "a.safetensors")
    with pytest.raises(InputError, match=r"a\.safetensors: tensor a holds NaN"):
        TensorFile(tmp_path / "a.safetensors").tensors["a"].read_floats()
