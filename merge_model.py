"""Merge models into one; the flags are in regmean/config.py.

python merge_model.py avg                        presets of configs/regmean
python merge_model.py regmean
python merge_model.py regmean++                  layer by layer, without Grams; also regmean_asym, and under torchrun
python merge_model.py --method regmean --models A B --grams GA GB --alpha 0.1 0.5
"""

import shlex
import sys

from common.cli import parse_flags
from common.errors import exit_with_message
from regmean.config import PRESETS, SEQUENTIAL, TIMEOUT, MergeFlags
from regmean.merge import merge


def main() -> None:
    flags = parse_flags(MergeFlags, presets=PRESETS)
    if flags.plan is not None:
        from tools.estimate_regmean import plan_merging

        plan_merging(flags)
        return
    command = shlex.join(["python", "merge_model.py", *sys.argv[1:]])
    if flags.method not in SEQUENTIAL:
        merge(flags, command)
        return
    from common.ranks import start_process  # imported late: bad flags are reported before torch loads
    from regmean.layerwise.merge import merge_layer_by_layer

    process = start_process(flags.device, TIMEOUT)
    merge_layer_by_layer(flags, process, command)
    process.close()


if __name__ == "__main__":
    exit_with_message(main)
