"""Packages that one part needs and the others do without."""

from importlib.util import find_spec

from common.errors import InputError


def require(package: str, requirements: str) -> None:
    """Raise InputError, saying how to install it, unless the Python package `package` is there.

    Args:
        package: as in `import package`.
        requirements: the file that names it, in the repository's root.
    """
    if find_spec(package) is None:
        raise InputError(f"{package} is not installed: pip install -r {requirements}")
