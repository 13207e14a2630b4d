"""Optional packages."""

from importlib.util import find_spec

from common.errors import InputError


def require(package: str, requirements: str) -> None:
    """Raise InputError, saying how to install it, unless the Python package `package` is there.

    Args:
        package: as in `import package`.
        requirements: the file that names it, in the repository's root.
    """
    spec = find_spec(package)
    # A folder of that name, which a package may leave where it runs, would be found as well.
    if spec is None or spec.origin is None:
        raise InputError(f"{package} is not installed: pip install -r {requirements}")
