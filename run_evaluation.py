"""Evaluate an LLM with a mapping, or alone: `python run_evaluation.py --llm_path L --mt_path M --init_checkpoint C`"""

from common.cli import parse_flags
from common.errors import exit_with_message


def main() -> None:
    from mindmerger.config import EvaluationFlags

    flags = parse_flags(EvaluationFlags)
    if flags.plan is not None:
        from tools.estimate_mindmerger import plan_evaluation

        plan_evaluation(flags)
        return
    # Imported only after the flags are checked: torch and transformers take seconds.
    from mindmerger.evaluation.run import evaluate

    evaluate(flags)


if __name__ == "__main__":
    exit_with_message(main)
