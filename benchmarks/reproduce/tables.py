"""Format of both tables in miniature."""

from collections.abc import Sequence


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows))


def cost_table(steps: dict[str, dict[str, float]]) -> str:
    """Format the result of `steps.costs`, one line per step."""
    lines = (f"{cost['seconds']:>7.1f}{cost['cpu_seconds']:>8.1f}  {name}" for name, cost in steps.items())
    return "\n".join(["seconds  of CPU  step", *lines])
