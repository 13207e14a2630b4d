"""DeepSpeed JSON files in the forms of other trainers."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from common.errors import InputError
from mindmerger.config import BatchSizes
from mindmerger.zero import deepspeed_config, weights_dtype

CPU = torch.device("cpu")


def read(folder: Path, content: dict[str, Any]) -> dict[str, Any]:
    path = folder / "ds.json"
    path.write_text(json.dumps(content))
    return deepspeed_config(str(path), BatchSizes(8, 2, 4), CPU)


@pytest.mark.parametrize("bf16", [False, True])
def test_auto_is_as_if_left_out(tmp_path: Path, bf16: bool) -> None:
    bare = {"bf16": {"enabled": bf16}, "zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}
    auto = {
        "bf16": {"enabled": bf16},
        "zero_optimization": {
            "stage": 2,
            "reduce_bucket_size": "auto",
            "offload_optimizer": {"device": "cpu", "pin_memory": "auto"},
        },
        **dict.fromkeys(("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"), "auto"),
        **dict.fromkeys(("gradient_clipping", "steps_per_print", "wall_clock_breakdown"), "auto"),
        **dict.fromkeys(("optimizer", "scheduler", "fp16", "communication_data_type"), "auto"),
    }
    config = read(tmp_path, auto)
    assert config == read(tmp_path, bare)
    assert config["gradient_clipping"] == 1.0 and config["train_batch_size"] == 8
    assert weights_dtype(config) == (torch.bfloat16 if bf16 else torch.float32)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"bf16": {"enabled": "auto"}}, """write "bf16": {"enabled": true} or false, not {'enabled': 'auto'}"""),
        ({"bf16": "auto"}, """write "bf16": {"enabled": true} or false, not 'auto'"""),
        ({"bf16": {"enabled": "false"}}, """write "bf16": {"enabled": true} or false, not {'enabled': 'false'}"""),
        ({"gradient_clipping": "1.0"}, "gradient_clipping is '1.0', not a number"),
        ({"optimizer": {"type": "AdamW", "params": {"lr": "auto"}}}, "remove 'optimizer', and use --lr instead"),
        ({"scheduler": {"type": "WarmupLR"}}, "remove 'scheduler', and use --lr_scheduler instead"),
        ({"amp": {"enabled": "auto"}}, "invalid for DeepSpeed: NVIDIA Apex AMP"),
        ({"zero_optimization": {"stage": "auto"}}, 'set "zero_optimization": {"stage": 2}, or 1, or 3'),
    ],
)
def test_what_stays_open_is_refused_with_file_and_key(tmp_path: Path, content: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as error:
        read(tmp_path, {"zero_optimization": {"stage": 2}} | content)
    assert str(error.value).startswith(f"{tmp_path / 'ds.json'}: {message}")
