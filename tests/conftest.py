import os
from pathlib import Path

import pytest

# Before anything imports huggingface_hub, which reads it once: no test may wait for a hub.
os.environ["HF_HUB_OFFLINE"] = "1"
# Tests compare float32 results to 1e-5, on ranks that a machine's GPUs may be too few for.
os.environ["CUDA_VISIBLE_DEVICES"] = ""
os.environ["DS_ACCELERATOR"] = "cpu"

REPOSITORY = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def shared_datas() -> Path:
    """Real MGSM, MSVAMP and GSM8K translations, where the developers have them; a user has none."""
    folder = REPOSITORY.parent / "shared/data/datas"
    if not folder.is_dir():
        pytest.skip(f"no real data in {folder}")
    return folder
