"""How both tables in miniature are printed."""

from collections.abc import Sequence


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows))


def cost_table(steps: dict[str, dict[str, float]]) -> str:
    """What `steps.costs` returns, a line each."""
    lines = (f"{cost['seconds']:>7.1f}{cost['cpu_seconds']:>8.1f}  {name}" for name, cost in steps.items())
    return "\n".join(["seconds  of CPU  step", *lines])
