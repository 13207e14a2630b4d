"""Names of tensors, combined for messages."""

import re
from collections.abc import Iterable

NUMBERED = re.compile(r"(?<=[.\[])\d+(?=[.\]]|$)")  # number of a layer or slice in the name of a tensor


def compact(names: Iterable[str]) -> list[str]:
    """Combine names that differ only in numbers into one with their count."""
    alike: dict[str, list[str]] = {}
    for name in names:
        alike.setdefault(NUMBERED.sub("*", name), []).append(name)
    return [f"{shape} ({len(found)})" if len(found) > 1 else found[0] for shape, found in alike.items()]
