"""lm-evaluation-harness with MindMerger as a model: `python -m tools.lm_eval --model mindmerger ...`

The flags are those of the harness.
"""

from common.errors import exit_with_message
from common.optional import require
from common.ranks import leave_together


def main() -> None:
    require("lm_eval", "requirements-lm_eval.txt")
    from lm_eval.__main__ import cli_evaluate

    # The import registers the model.
    import tools.harness  # noqa: F401

    cli_evaluate()
    leave_together()


if __name__ == "__main__":
    exit_with_message(main)
