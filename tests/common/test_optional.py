import pytest

from common.errors import InputError
from common.optional import require


def test_what_is_missing_is_told_with_how_to_install_it() -> None:
    require("yaml", "requirements.txt")
    with pytest.raises(InputError, match=r"no_such_package is not installed: pip install -r requirements-x\.txt"):
        require("no_such_package", "requirements-x.txt")
