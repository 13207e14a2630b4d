import os
import resource
import subprocess
import sysconfig
import tempfile
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from hypothesis import HealthCheck, settings

# Set before huggingface_hub is imported, which reads it once: no test may wait for the hub.
os.environ["HF_HUB_OFFLINE"] = "1"
# Tests compare float32 results to 1e-5, on more ranks than a machine may have GPUs.
os.environ["CUDA_VISIBLE_DEVICES"] = ""
os.environ["DS_ACCELERATOR"] = "cpu"
# As in an activated environment. DeepSpeed compiles its operator with the first `ninja` on the path, and another
# version of ninja compiles everything again.
os.environ["PATH"] = os.pathsep.join([sysconfig.get_path("scripts"), os.environ["PATH"]])
# A cache for the tests' tokenised rows and prepared data sets only.
CACHE = tempfile.TemporaryDirectory(prefix="datasets-")
os.environ["HF_DATASETS_CACHE"] = CACHE.name

# Workers of pytest-xdist share the cores.
torch.set_num_threads(max(1, torch.get_num_threads() // int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 1))))

# Number of fuzz cases per reader. Every case writes the test's folder again.
_FUZZ = {
    "deadline": timedelta(seconds=20),
    "suppress_health_check": [HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large],
    "database": None,
}
settings.register_profile("quick", max_examples=80, derandomize=True, **_FUZZ)
settings.register_profile("thorough", max_examples=3600, **_FUZZ)
settings.load_profile("quick")

REPOSITORY = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session", autouse=True)
def _tests_go_on() -> Iterator[None]:
    """Fail a test that would end the test process, which would skip all further tests with exit code 0."""
    process, end = os.getpid(), os._exit

    def refuse(code: int) -> None:
        if os.getpid() == process:
            pytest.fail(f"os._exit({code}) in the tests' own process")
        end(code)

    with patch.object(os, "_exit", refuse):
        yield


@pytest.fixture(scope="session")
def shared_datas() -> Path:
    """Folder of real MGSM, MSVAMP and GSM8K translations, which only developers have."""
    folder = REPOSITORY.parent / "shared/data/datas"
    if not folder.is_dir():
        pytest.skip(f"no real data in {folder}")
    return folder


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[int, int], Path]]:
    """Create a folder on a disk of `size` bytes; without the right to mount, one with files of at most `largest`."""
    mounted: list[Path] = []
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def make(size: int, largest: int) -> Path:
        folder = tmp_path / "disk"
        folder.mkdir()
        mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "none", str(folder)]
        if subprocess.run(mount, capture_output=True).returncode == 0:
            mounted.append(folder)
        else:
            # Python ignores SIGXFSZ, so that writing beyond the limit fails as on a full disk.
            resource.setrlimit(resource.RLIMIT_FSIZE, (largest, hard))
        return folder

    yield make
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    for folder in mounted:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)
