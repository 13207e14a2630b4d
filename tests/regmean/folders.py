"""Folders of tiny models of many architectures, and a float64 RegMean to compare their merges with."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from common.ranks import start_process
from regmean.compute import compute_grams
from regmean.config import GramFlags, MergeFlags
from regmean.merge import merge
from tests.regmean.conftest import make_tokenizer

TEXTS = [" ".join(f"w{(3 * i + j * j + i * j) % 20}" for j in range(1 + i % 9)) for i in range(30)]
ALPHA = 0.5
TEXT = {
    "vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 4, "max_position_embeddings": 64,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
EXPERTS = {"num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8,
           "norm_topk_prob": True}  # fmt: skip
TRANSPOSED = ("GptOssExperts", "Llama4TextExperts")  # weights stored as (in, out)
VISION = {"hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 1, "num_attention_heads": 2}
# Names of the config's and the model's class, and settings.
MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "bert": ("BertConfig", "BertForSequenceClassification", TEXT),
    "roberta": ("RobertaConfig", "RobertaForTokenClassification", TEXT | {"pad_token_id": 3}),
    "distilbert": (
        "DistilBertConfig",
        "DistilBertForQuestionAnswering",
        TEXT | {"dim": 16, "hidden_dim": 24, "n_layers": 2, "n_heads": 4},
    ),
    "convbert": ("ConvBertConfig", "ConvBertForMaskedLM", TEXT | {"embedding_size": 16}),  # tokens depend on padding
    "llama": ("LlamaConfig", "LlamaForCausalLM", TEXT),
    "neox": ("GPTNeoXConfig", "GPTNeoXForCausalLM", TEXT),
    "gemma2": ("Gemma2Config", "Gemma2ForCausalLM", TEXT),
    "mixtral": ("MixtralConfig", "MixtralForCausalLM", TEXT | EXPERTS),
    "qwen3_moe": ("Qwen3MoeConfig", "Qwen3MoeForCausalLM", TEXT | EXPERTS),
    "olmoe": ("OlmoeConfig", "OlmoeForCausalLM", TEXT | EXPERTS),
    "gpt_oss": (
        "GptOssConfig",
        "GptOssForCausalLM",
        TEXT | EXPERTS | {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 8},
    ),
    "deepseek_v3": (
        "DeepseekV3Config",
        "DeepseekV3ForCausalLM",
        TEXT
        | EXPERTS
        | {"n_routed_experts": 4, "n_shared_experts": 1, "n_group": 2, "topk_group": 1, "first_k_dense_replace": 1}
        | {"kv_lora_rank": 8, "q_lora_rank": 8, "qk_nope_head_dim": 4, "qk_rope_head_dim": 4, "v_head_dim": 4}
        | {"num_key_value_heads": 4},
    ),
    "gemma3": (
        "Gemma3Config",
        "Gemma3ForConditionalGeneration",
        {
            "text_config": TEXT | {"sliding_window": 8},
            "vision_config": VISION | {"image_size": 8, "patch_size": 4},
            "mm_tokens_per_image": 4,
        },
    ),
    "qwen3_5": (
        "Qwen3_5Config",
        "Qwen3_5ForConditionalGeneration",
        {
            "tie_word_embeddings": False,
            "text_config": TEXT
            | {
                "layer_types": ["linear_attention", "full_attention"],
                "linear_key_head_dim": 4,
                "linear_value_head_dim": 4,
                "linear_num_key_heads": 2,
                "linear_num_value_heads": 2,
                "rope_parameters": {
                    "rope_type": "default",
                    "rope_theta": 1e4,
                    "mrope_section": [1, 1, 0],
                    "partial_rotary_factor": 1.0,
                },
            },
            "vision_config": {"depth": 1, "hidden_size": 8, "intermediate_size": 12, "num_heads": 2, "patch_size": 4}
            | {"out_hidden_size": 16, "num_position_embeddings": 16},
        },
    ),
    "llama4": (
        "Llama4Config",
        "Llama4ForConditionalGeneration",
        {
            "text_config": TEXT | EXPERTS | {"intermediate_size_mlp": 24, "attention_chunk_size": 8},
            "vision_config": VISION
            | {"image_size": 8, "patch_size": 4, "vision_output_dim": 8, "intermediate_size": 32}
            | {"projector_input_dim": 8, "projector_output_dim": 8},
        },
    ),
    "nemotron_h": (
        "NemotronHConfig",
        "NemotronHForCausalLM",
        TEXT
        | {"hybrid_override_pattern": "M*-M", "num_hidden_layers": 4, "ssm_state_size": 4, "mamba_num_heads": 4}
        | {"mamba_head_dim": 8, "n_groups": 2, "chunk_size": 8},
    ),
    "kimi_linear": (
        "KimiLinearConfig",
        "KimiLinearForCausalLM",
        TEXT
        | EXPERTS
        | {"kv_lora_rank": 8, "q_lora_rank": None, "qk_nope_head_dim": 4, "qk_rope_head_dim": 4, "v_head_dim": 4}
        | {"linear_head_dim": 4, "linear_num_heads": 2, "layer_types": ["linear_attention", "full_attention"]}
        | {"num_key_value_heads": 4},
    ),
    "zamba2": (
        "Zamba2Config",
        "Zamba2ForCausalLM",
        TEXT
        | {"num_hidden_layers": 3, "layers_block_type": ["mamba", "hybrid", "hybrid"], "hybrid_layer_ids": [1, 2]}
        | {"mamba_d_state": 4, "mamba_headdim": 8, "n_mamba_heads": 4, "num_mem_blocks": 1, "chunk_size": 8}
        | {"adapter_rank": 4, "attention_head_dim": 8, "attention_hidden_size": 32},
    ),
}
MLA = {"kv_lora_rank": 8, "q_lora_rank": 8, "qk_nope_head_dim": 4, "qk_rope_head_dim": 4, "v_head_dim": 4}
ROUTED = {"n_routed_experts": 4, "n_shared_experts": 1, "n_group": 2, "topk_group": 1, "first_k_dense_replace": 1}
MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 4, "mamba_n_groups": 1, "mamba_chunk_size": 8}
LINEAR_ATTENTION = {"layer_types": ["linear_attention", "full_attention"], "linear_key_head_dim": 4,
                    "linear_value_head_dim": 4, "linear_num_key_heads": 2, "linear_num_value_heads": 2}  # fmt: skip
# Further mixtures of experts: the start of the names of their classes, and settings beside TEXT and EXPERTS.
MIXTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "phimoe": ("Phimoe", {"lm_head_bias": True, "attention_bias": True}),
    "granitemoe": ("GraniteMoe", {}),
    "granitemoehybrid": (
        "GraniteMoeHybrid",
        MAMBA | {"shared_intermediate_size": 8, "layer_types": ["mamba", "attention"]},
    ),
    "jamba": (
        "Jamba",
        {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1}
        | {"mamba_d_state": 4, "mamba_dt_rank": 4, "use_mamba_kernels": False},
    ),
    "minimax": ("MiniMax", {"layer_types": ["linear_attention", "full_attention"], "block_size": 8}),
    "minimax_m2": ("MiniMaxM2", {}),
    "glm4_moe": ("Glm4Moe", ROUTED),
    "ernie4_5_moe": (
        "Ernie4_5_Moe",
        {"moe_num_experts": 4, "moe_k": 2, "moe_num_shared_experts": 1, "moe_layer_start_index": 1},
    ),
    "hunyuan_v1_moe": ("HunYuanMoEV1", {"moe_topk": 2}),
    "qwen2_moe": ("Qwen2Moe", {"shared_expert_intermediate_size": 8}),
    "qwen3_next": ("Qwen3Next", LINEAR_ATTENTION | {"shared_expert_intermediate_size": 8}),
    "dots1": ("Dots1", ROUTED | {"layer_types": ["full_attention"] * 2}),
    "lfm2_moe": ("Lfm2Moe", {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1}),
    "nemotron_h_moe": (
        "NemotronH",
        {"hybrid_override_pattern": "ME*E", "num_hidden_layers": 4, "ssm_state_size": 4, "mamba_num_heads": 4}
        | {"mamba_head_dim": 8, "n_groups": 2, "chunk_size": 8, "n_routed_experts": 4, "n_group": 1, "topk_group": 1}
        | {"moe_shared_expert_intermediate_size": 8},
    ),
}
MODELS |= {
    kind: (f"{name}Config", f"{name}ForCausalLM", TEXT | EXPERTS | settings)
    for kind, (name, settings) in MIXTURES.items()
}
MODELS["gemma4"] = (
    "Gemma4TextConfig",
    "Gemma4ForCausalLM",
    TEXT
    | EXPERTS
    | {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 8, "global_head_dim": 4}
    | {"enable_moe_block": True, "top_k_experts": 2, "hidden_size_per_layer_input": 0, "num_kv_shared_layers": 0},
)
MODELS["qwen3_vl_moe"] = (
    "Qwen3VLMoeConfig",
    "Qwen3VLMoeForConditionalGeneration",
    {
        "text_config": TEXT
        | EXPERTS
        | {"moe_intermediate_size": 12}
        | {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 0]}},
        "vision_config": {"depth": 1, "hidden_size": 8, "intermediate_size": 12, "num_heads": 2, "patch_size": 4}
        | {"out_hidden_size": 16, "num_position_embeddings": 16, "deepstack_visual_indexes": [0]},
    },
)
MODELS["llava"] = (
    "LlavaConfig",
    "LlavaForConditionalGeneration",
    {
        "text_config": TEXT | {"model_type": "llama"},
        "vision_config": VISION | {"model_type": "clip_vision_model", "image_size": 8, "patch_size": 4},
        "image_token_index": 5,
    },
)
MODELS["step3p7"] = (
    "Step3p7Config",
    "Step3p7ForConditionalGeneration",
    {
        "text_config": TEXT
        | EXPERTS
        | {"n_routed_experts": 4, "share_expert_dim": 8, "mlp_layer_types": ["dense", "sparse"], "sliding_window": 8},
        "vision_config": VISION | {"image_size": 8, "patch_size": 4},
    },
)


def build(kind: str, seed: int = 0) -> PreTrainedModel:
    config_class, model_class, settings = MODELS[kind]
    torch.manual_seed(0)
    model = getattr(transformers, model_class)(getattr(transformers, config_class)(**settings)).eval()
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def save(model: PreTrainedModel, folder: Path) -> Path:
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def unread(*args: Any, **options: Any) -> None:
    raise AssertionError("the model's weights are read")


def grams(folder: Path, texts: list[str] = TEXTS, **options: Any) -> Path:
    file = folder.with_suffix(".jsonl")
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    settings = {"dataset": str(file), "text_column": "text", "device": "cpu", "dtype": "float32"} | options
    output = folder.with_suffix(".gram")
    compute_grams(GramFlags(model=str(folder), output_dir=str(output), **settings), start_process("cpu"))
    return output


def run(folders: list[Path], output: Path, method: str = "regmean", **options: Any) -> Path:
    files = [str(folder.with_suffix(".gram")) for folder in folders] if method == "regmean" else []
    settings = {"grams": files, "alpha": [ALPHA], "embeddings": "average", "device": "cpu", "output_dir": str(output)}
    merge(MergeFlags(method=method, models=[str(folder) for folder in folders], **(settings | options)), "the command")
    return output


def split_experts(module: nn.Module) -> dict[str, list[nn.Linear]]:
    """Every expert's projections as linear layers of their own, by the name of the parameter of all experts."""
    names = ("gate_up_proj" if hasattr(module, "gate_up_proj") else "up_proj", "down_proj")
    layers: dict[str, list[nn.Linear]] = {}
    for name in names:
        weights = getattr(module, name).detach()
        weights = weights.mT if type(module).__name__ in TRANSPOSED else weights
        biases = getattr(module, f"{name}_bias", [None] * len(weights))
        for weight, bias in zip(weights, biases, strict=True):
            layer = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, dtype=weight.dtype)
            layer.weight.data, layer.bias = weight, None if bias is None else nn.Parameter(bias.detach())
            layers.setdefault(name, []).append(layer)
    return layers


def gated(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """The experts' activation, as in each model's paper."""
    if type(module).__name__ == "GptOssExperts":
        gate, up = x[..., ::2].clamp(max=7.0), x[..., 1::2].clamp(-7.0, 7.0)
        return (up + 1) * gate * torch.sigmoid(1.702 * gate)
    if not hasattr(module, "gate_up_proj"):
        return module.act_fn(x)
    gate, up = x.chunk(2, -1)
    return module.act_fn(gate) * up


def expert_rows(module: nn.Module, args: tuple) -> list[torch.Tensor]:
    """The rows that each expert reads."""
    count = len(module.down_proj)
    if len(args) == 1:
        return [rows[rows.abs().sum(1) > 0] for rows in args[0].chunk(count)]
    return [args[0][(args[1] == number).any(1)] for number in range(count)]


def watch_experts(model: nn.Module, sums: dict[str, list], counts: dict[str, list[int]]) -> list:
    """Sum x x^T and count tokens for each expert of each parameter of experts, in forward passes of the model."""
    handles = []
    for path, module in model.named_modules():
        if not isinstance(getattr(module, "down_proj", None), nn.Parameter):
            continue

        def add(module: nn.Module, args: tuple, path: str = path, layers: dict | None = None) -> None:
            layers = split_experts(module)
            (up, ups), (down, _) = layers.items()
            for number, rows in enumerate(expert_rows(module, args)):
                inner = gated(module, ups[number](rows))
                for name, x in ((up, rows), (down, inner)):
                    zeros = [torch.zeros(x.shape[1], x.shape[1], dtype=x.dtype) for _ in ups]
                    sums.setdefault(f"{path}.{name}", zeros)[number] += x.T @ x
                    counts.setdefault(f"{path}.{name}", [0] * len(ups))[number] += len(x)

        handles.append(module.register_forward_pre_hook(add))
    return handles


def merged_experts(
    values: list[torch.Tensor], sums: list[list[torch.Tensor]], counts: list[list[int]], transposed: bool
) -> torch.Tensor:
    """RegMean of every expert: each model's sum, and an eighth of the width in tokens of the mean over all experts."""
    merged = sum(values) / 2
    for number in range(len(merged)):
        if not any(count[number] for count in counts):
            continue
        grams = []
        for own, count in zip(sums, counts, strict=True):
            every = sum(own) / sum(count)
            gram = (own[number] + len(every) / 8 * every) / sum(count)
            grams.append(ALPHA * gram + (1 - ALPHA) * torch.diag(gram.diagonal()))
        columns = [value[number] if transposed else value[number].T for value in values]
        solved = torch.linalg.solve(sum(grams), sum(g @ w for g, w in zip(grams, columns, strict=True)))
        merged[number] = solved if transposed else solved.T
    return merged


@torch.no_grad()
def oracle(models: list[PreTrainedModel], texts: list[str] = TEXTS) -> dict[str, torch.Tensor]:
    """RegMean of two float64 models: one text at a time, Grams summed over all layers that have one weight."""
    sums, weights = [], []
    of_experts: list[tuple[dict, dict]] = []
    for model in models:
        tokenizer = AutoTokenizer.from_pretrained(model.name_or_path)
        totals: dict[int, torch.Tensor] = {}
        counts: dict[int, int] = {}

        def add(module: nn.Module, args: tuple, totals: dict = totals, counts: dict = counts) -> None:
            rows, key = args[0].reshape(-1, args[0].shape[-1]), id(module.weight)
            totals[key] = totals.get(key, 0) + rows.T @ rows
            counts[key] = counts.get(key, 0) + len(rows)

        table = model.get_input_embeddings().weight
        # Routers of mixtures are linear layers with a class of their own.
        layers = {
            name: module
            for name, module in model.named_modules(remove_duplicate=False)
            if isinstance(module, nn.Linear | Conv1D) or type(module).__name__.endswith("Router")
        }
        layers = {n: layer for n, layer in layers.items() if getattr(layer, "weight", table) is not table}
        handles = [layer.register_forward_pre_hook(add) for layer in set(layers.values())]
        of_experts.append(({}, {}))
        handles += watch_experts(model, *of_experts[-1])
        for text in texts:
            model(input_ids=torch.tensor([tokenizer(text)["input_ids"]]))
        for handle in handles:
            handle.remove()
        keys = {f"{name}.weight": id(layer.weight) for name, layer in layers.items()}
        sums.append({name: totals[key] / counts[key] for name, key in keys.items() if key in totals})
        weights.append(model.state_dict())
    merged = {}
    for name, first in weights[0].items():
        values = [theirs[name] for theirs in weights]
        merged[name] = sum(values) / 2 if first.is_floating_point() else first
        if all(name in theirs for theirs in sums):
            scaled = [ALPHA * g + (1 - ALPHA) * torch.diag(g.diagonal()) for g in (theirs[name] for theirs in sums)]
            right = sum(g @ value.T for g, value in zip(scaled, values, strict=True))
            merged[name] = torch.linalg.solve(sum(scaled), right).T
        if name in of_experts[0][0]:
            transposed = type(models[0].get_submodule(name.rpartition(".")[0])).__name__ in TRANSPOSED
            theirs = [[of[name] for of in kind] for kind in zip(*of_experts, strict=True)]
            merged[name] = merged_experts(values, *theirs, transposed)
    return merged


def load(folder: Path, auto: Any = AutoModelForCausalLM, dtype: torch.dtype = torch.float64) -> PreTrainedModel:
    # Kernels of experts do not support float64.
    return auto.from_pretrained(folder, dtype=dtype, experts_implementation="eager").eval()


def assert_merged(
    out: Path,
    folders: list[Path],
    auto: Any = AutoModelForCausalLM,
    texts: list[str] = TEXTS,
    tolerance: float = 1e-3,
    dtype: torch.dtype = torch.float64,
) -> None:
    """Assert that a merge equals the oracle, relative to the models' difference, and solves the same tensors."""
    a, b = models = [load(folder, auto, dtype) for folder in folders]
    expected, merged = oracle(models, texts), load(out, auto, dtype).state_dict()
    a, b = a.state_dict(), b.state_dict()
    for name, value in expected.items():
        if value.is_floating_point():
            error = (merged[name] - value).norm() / ((a[name] - b[name]).norm() + 1e-6)
            assert error < tolerance, (name, error)


def rename(folder: Path, change: Callable[[str], str]) -> None:
    tensors = load_file(folder / "model.safetensors")
    save_file({change(name): value for name, value in tensors.items()}, folder / "model.safetensors", {"format": "pt"})


def in_older_naming(name: str) -> str:
    """Old names of multimodal Gemma 3, from before transformers 5."""
    name = re.sub(r"^(model\.)?language_model\.(model\.)?", "language_model.model.", name)
    return re.sub(r"^model\.", "", re.sub(r"^lm_head", "language_model.lm_head", name))
