"""Compute RegMean's Grams of one model; the flags are in regmean/config.py.

python compute_gram.py code                      a preset of configs/regmean
python compute_gram.py --model LLM --dataset DATASET ...
python compute_gram.py convert gram.pkl          convert a published file to gram.safetensors
"""

import sys
from pathlib import Path

from common.cli import parse_flags
from common.errors import exit_with_message
from regmean.config import PRESETS, TIMEOUT, ConvertFlags, GramFlags


def main() -> None:
    words = sys.argv[1:]
    if words[:1] == ["convert"]:
        from regmean.gram_file import FILE_NAME, convert

        named = words[1:2] and not words[1].startswith("-")
        flags = parse_flags(ConvertFlags, ["--source", *words[1:]] if named else words[1:])
        source = Path(flags.source)
        convert(source, Path(flags.output_dir or source.parent) / FILE_NAME)
        return

    flags = parse_flags(GramFlags, words, presets=PRESETS)
    if flags.plan is not None:
        from tools.estimate_regmean import plan_grams

        plan_grams(flags)
        return
    from common.ranks import start_process  # imported late: bad flags are reported before torch loads
    from regmean.compute import compute_grams

    process = start_process(flags.device, TIMEOUT)
    compute_grams(flags, process)
    # Not after an error: other ranks that wait in a collective would block this process and its message.
    process.close()


if __name__ == "__main__":
    exit_with_message(main)
