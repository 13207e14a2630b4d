"""Evaluate an LLM with a mapping, or alone: `python run_evaluation.py --llm_path L --mt_path M --init_checkpoint C`"""

from common.errors import exit_with_message
from common.flags import parse_flags


def main() -> None:
    from mindmerger.flags import EvaluationFlags

    flags = parse_flags(EvaluationFlags)
    if flags.plan is not None:
        from mindmerger.plan import plan_evaluation

        plan_evaluation(flags)
        return
    # torch and transformers take seconds to import: wrong flags are told before.
    from mindmerger.evaluation import evaluate

    evaluate(flags)


if __name__ == "__main__":
    exit_with_message(main)
