import psutil
import pytest
import torch

from common.distributed import available_memory


def test_ranks_of_one_machine_share_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    free = psutil.virtual_memory().available
    assert 0.5 * free < available_memory(torch.device("cpu")) < 1.5 * free
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert 0.5 * free < 4 * available_memory(torch.device("cpu")) < 1.5 * free
