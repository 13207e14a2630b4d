from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def shared_datas() -> Path:
    """Real MGSM, MSVAMP and GSM8K translations, where the developers have them; a user has none."""
    folder = REPOSITORY.parent / "shared/data/datas"
    if not folder.is_dir():
        pytest.skip(f"no real data in {folder}")
    return folder
