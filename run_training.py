"""Train MindMerger's mapping, one stage at a time: `deepspeed run_training.py --deepspeed --llm_path L ...`"""

import os

from common.cli import parse_flags
from common.errors import exit_with_message


def main() -> None:
    from mindmerger.config import TrainingFlags

    flags = parse_flags(TrainingFlags)
    if flags.device == "cpu":
        # DeepSpeed chooses its device at import.
        os.environ["DS_ACCELERATOR"] = "cpu"
    if flags.plan is not None:
        from tools.estimate_mindmerger import plan_training

        plan_training(flags)
        return
    # Imported only after the flags are checked: DeepSpeed and transformers take seconds.
    from mindmerger.build import train

    train(flags)


if __name__ == "__main__":
    exit_with_message(main)
