"""Adapters that peft writes, compared with what peft makes of them; skipped where peft is not installed."""

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from regmean.adapter_folder import open_models
from regmean.tensor_file import decode
from tests.regmean.conftest import make_gpt2, make_llama
from tests.regmean.folders import build, run, save

peft = pytest.importorskip("peft", reason="pip install -r requirements-peft.txt")

IDS = torch.arange(2, 14)[None]
LINEAR = ["q_proj", "o_proj", "down_proj"]
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "lora": ({}, {"target_modules": LINEAR}),
    "rslora": ({}, {"target_modules": LINEAR, "use_rslora": True}),
    "patterns": (
        {},
        {"target_modules": LINEAR, "rank_pattern": {"q_proj": 2, r"layers\.1\.mlp\.down_proj": 6}}
        | {"alpha_pattern": {"layers.0.self_attn.o_proj": 32, "down_proj": 3}},
    ),
    "dora": ({}, {"target_modules": LINEAR, "use_dora": True}),
    "tables": ({}, {"target_modules": ["embed_tokens", "lm_head"]}),
    "dora of tables": ({}, {"target_modules": ["embed_tokens", "lm_head"], "use_dora": True}),
    "whole": ({}, {"target_modules": LINEAR, "modules_to_save": ["lm_head", "norm"]}),
    "tokens": ({}, {"target_modules": LINEAR, "trainable_token_indices": [30, 2]}),
    "bias": ({"attention_bias": True}, {"target_modules": ["q_proj"], "lora_bias": True}),
    "all biases": ({"attention_bias": True}, {"target_modules": ["q_proj"], "bias": "all"}),
    "layers": ({}, {"target_modules": LINEAR, "layers_to_transform": [1]}),
    "experts": ({"kind": "qwen3_moe"}, {"target_parameters": ["mlp.experts.down_proj", "mlp.experts.gate_up_proj"]}),
    "fused experts": (
        {"kind": "gpt_oss"},
        {"target_parameters": ["layers.1.mlp.experts.gate_up_proj", "experts.down_proj"], "target_modules": ["q_proj"]}
        | {"rank_pattern": {"experts.down_proj": 2}, "alpha_pattern": {"experts.gate_up_proj": 5}},
    ),
    "router": ({"kind": "qwen3_moe"}, {"target_parameters": ["mlp.gate.weight"], "target_modules": ["q_proj"]}),
    "gpt2": ({"gpt2": True}, {"target_modules": ["c_attn", "c_proj"]}),
    "gpt2 biases": ({"gpt2": True}, {"target_modules": ["c_attn"], "bias": "all", "modules_to_save": ["ln_f"]}),
    "gpt2 dora": ({"gpt2": True}, {"target_modules": ["c_proj", "c_fc"], "use_dora": True}),
}
TIED: dict[str, dict[str, Any]] = {
    "table": {"target_modules": ["q_proj", "embed_tokens"]},
    "head": {"target_modules": ["q_proj", "lm_head"]},
    "both": {"target_modules": ["embed_tokens", "lm_head"]},
    "alike": {"target_modules": ["embed_tokens"], "ensure_weight_tying": True},
    "dora": {"target_modules": ["embed_tokens"], "use_dora": True},
    "whole table": {"target_modules": LINEAR, "modules_to_save": ["embed_tokens"]},
    "whole head": {"target_modules": LINEAR, "modules_to_save": ["lm_head"]},
    "whole alike": {"target_modules": LINEAR, "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    "tokens": {"target_modules": LINEAR, "trainable_token_indices": [30, 2]},
    "other tokens": {"target_modules": LINEAR, "trainable_token_indices": {"embed_tokens": [30], "lm_head": [4]}},
}


def trained(base: Path, folder: Path, **settings: Any) -> Any:
    """An adapter with random values, saved to `folder`."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = AutoModelForCausalLM.from_pretrained(base)
        config = peft.LoraConfig(r=4, lora_alpha=6, task_type="CAUSAL_LM", **settings)
        model = peft.get_peft_model(model, config).eval()
        torch.manual_seed(1)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data.add_(0.2 * torch.randn_like(parameter))
        model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("case", CASES)
def test_tensors_are_those_that_peft_merges(case: str, tmp_path: Path) -> None:
    options, settings = CASES[case]
    if "kind" in options:
        made = build(options["kind"])
    else:
        made = make_gpt2() if options.get("gpt2") else make_llama(**options)
    base = save(made, tmp_path / "base")
    merged = trained(base, tmp_path / "lora", **settings).merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    expected = merged.state_dict() if "kind" not in options else load_file(tmp_path / "merged" / "model.safetensors")
    (model,) = open_models([str(tmp_path / "lora")], [], None)
    assert model.changed()
    for name, info in model.tensors.items():
        read = torch.from_numpy(decode(info.read(), info.dtype)).view(info.shape)
        torch.testing.assert_close(read, expected[name], rtol=1e-6, atol=1e-6, msg=name)


@pytest.mark.parametrize("case", TIED)
def test_with_tied_tables_the_merge_is_the_model_that_was_trained(case: str, tmp_path: Path) -> None:
    """`merge_and_unload` ties what the adapter has untied, and adds a tied update twice."""
    base = save(make_llama(tied=True), tmp_path / "base")
    model = trained(base, tmp_path / "lora", **TIED[case])
    out = run([tmp_path / "lora"] * 2, tmp_path / "out", "avg")
    merged = AutoModelForCausalLM.from_pretrained(out).eval()
    with torch.no_grad():
        torch.testing.assert_close(merged(IDS).logits, model(IDS).logits, rtol=1e-5, atol=1e-5)
