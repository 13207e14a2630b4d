"""Optional packages."""

from importlib.util import find_spec

from common.errors import InputError


def require(package: str, requirements: str) -> None:
    """Raise InputError, with the command that installs it, unless the Python package `package` is installed.

    Args:
        package: as in `import package`.
        requirements: the file in the repository's root that lists it.
    """
    spec = find_spec(package)
    # find_spec also finds a folder of that name here, such as the one that wandb writes; it has no origin.
    if spec is None or spec.origin is None:
        raise InputError(f"{package} is not installed: pip install -r {requirements}")
