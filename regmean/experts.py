"""Experts of a mixture whose weights are slices of one parameter, and the inputs of each expert's projections.

Classes in transformers' registry of expert implementations (`use_experts_implementation`) hold parameters of three
dimensions, (experts, ...): `gate_up_proj`, or `up_proj` without a gate, and `down_proj`. Llama 4's class is not in the
registry, and its router passes every token to every expert, as zeros where the token is not routed there.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

# Classes outside the registry that are run here, too. DENSE: inputs (experts * tokens, width), weights (experts, in,
# out). ALIKE: as in the registry.
DENSE = ("Llama4TextExperts",)
ALIKE = ("Step3p7Experts",)
# Called with the parameter's name, the expert's number, the rows that the expert reads, and their tokens, ascending:
# positions in the flattened batch.
Receive = Callable[[str, int, torch.Tensor, torch.Tensor], None]


@dataclass(frozen=True, eq=False)
class ExpertLayer:
    """A projection of expert `number`: a linear layer whose weight is a slice of a parameter of all experts."""

    experts: nn.Module
    parameter: str
    number: int

    @property
    def weight(self) -> torch.Tensor:
        """The slice: (in, out) if it `is_transposed`, else (out, in)."""
        return getattr(self.experts, self.parameter)[self.number]

    @property
    def is_transposed(self) -> bool:
        """True if the weight is stored as (in, out)."""
        return _is_transposed(self.experts)


def expert_layers(name: str, module: nn.Module) -> dict[str, ExpertLayer]:
    """The projections of all experts in a module of this name, by names `NAME.NUMBER.PARAMETER`; none in others."""
    if type(module).__name__ not in (*DENSE, *ALIKE) and not (
        hasattr(module, "is_transposed") and hasattr(module, "has_gate")
    ):
        return {}
    parameters = {key: getattr(module, key, None) for key in (_up_name(module), "down_proj")}
    if not all(isinstance(parameter, nn.Parameter) and parameter.ndim == 3 for parameter in parameters.values()):
        return {}
    return {
        f"{name}.{number}.{key}": ExpertLayer(module, key, number)
        for key, parameter in parameters.items()
        for number in range(len(parameter))
    }


def parameter_of(layer: str) -> str:
    """Name of the parameter that holds an expert's weight, and of the Gram of all experts: that without the number."""
    experts, _, key = layer.rsplit(".", 2)
    return f"{experts}.{key}"


def token_count(experts: nn.Module, hidden_states: torch.Tensor) -> int:
    """Number of tokens in the input of a layer's experts."""
    copies = len(experts.down_proj) if type(experts).__name__ in DENSE else 1
    return hidden_states.shape[:-1].numel() // copies


def chosen(
    experts: nn.Module,
    hidden_states: torch.Tensor,
    top_k_index: torch.Tensor | None = None,
    top_k_weights: torch.Tensor | None = None,
) -> torch.Tensor:
    """True for each expert that a token is routed to, bool (tokens, experts); arguments as of `run_experts`."""
    count = len(experts.down_proj)
    if top_k_index is None:
        return hidden_states.view(count, -1, hidden_states.shape[-1]).any(-1).T
    # Higher numbers are those of experts without weights.
    found = torch.zeros(len(top_k_index), count + 1, dtype=torch.bool, device=top_k_index.device)
    return found.scatter_(1, top_k_index.clamp(max=count), True)


def run_experts(
    experts: nn.Module,
    receive: Receive,
    real: torch.Tensor | None,
    hidden_states: torch.Tensor,
    top_k_index: torch.Tensor | None = None,
    top_k_weights: torch.Tensor | None = None,
) -> torch.Tensor:
    """The output of a layer's experts, one after the other; `receive` is called for each projection that is reached.

    Args:
        real: True for each token that is not padding; None if there is no padding. Padding is passed to no expert, and
            its output is 0.
        hidden_states, top_k_index, top_k_weights: arguments of the experts' own forward function.
    """
    count = len(experts.down_proj)
    if top_k_index is None:
        inputs = hidden_states.view(count, -1, hidden_states.shape[-1])
        routed = inputs.any(-1) if real is None else inputs.any(-1) & real
        # On the meta device, which has no data, as if all tokens were routed to the first expert.
        sizes = [inputs.shape[1], *[0] * (count - 1)] if inputs.is_meta else routed.sum(1).tolist()
        rows, tokens = (inputs[0], inputs[0, :, 0]) if inputs.is_meta else (inputs[routed], routed.nonzero()[:, 1])
        results = torch.cat([*_outputs(experts, receive, rows.split(sizes), tokens.split(sizes))])
        outputs = torch.zeros_like(inputs)
        if not inputs.is_meta:
            outputs[routed] = results
        return outputs.view_as(hidden_states)
    top_k = top_k_index.shape[-1]
    # One more number is that of no expert.
    numbers = top_k_index if real is None else top_k_index.masked_fill(~real[:, None], count)
    order = numbers.reshape(-1).argsort(stable=True)
    sizes, tokens = _sizes(numbers, count), order // top_k
    rows = hidden_states[tokens].split(sizes)
    outputs = [*_outputs(experts, receive, rows[:count], tokens.split(sizes)), torch.zeros_like(rows[count])]
    outputs = torch.cat(outputs)
    weighted = outputs * top_k_weights.reshape(-1)[order, None]
    # Every token's experts are added up in the same order, as in the registry's implementations.
    weighted = torch.zeros_like(weighted).index_copy(0, order, weighted)
    return weighted.view(-1, top_k, weighted.shape[-1]).sum(1).to(hidden_states.dtype)


def _sizes(numbers: torch.Tensor, count: int) -> list[int]:
    """Number of rows of each expert, and of none; on the meta device as if all were the first one's."""
    if numbers.is_meta:
        return [numbers.numel()] + count * [0]
    return numbers.reshape(-1).bincount(minlength=count + 1).tolist()


def _outputs(
    experts: nn.Module, receive: Receive, rows: tuple[torch.Tensor, ...], tokens: tuple[torch.Tensor, ...]
) -> Iterator[torch.Tensor]:
    """Yield each expert's outputs for its rows."""
    up = _up_name(experts)
    for number, x in enumerate(rows):
        if len(x):
            receive(up, number, x, tokens[number])
            x = _activation(experts, _projected(experts, up, number, x))
            receive("down_proj", number, x, tokens[number])
            x = _projected(experts, "down_proj", number, x)
            if getattr(experts, "has_post_expert_norm", False):
                x = experts.post_expert_norm(x)
        yield x


def _projected(experts: nn.Module, key: str, number: int, x: torch.Tensor) -> torch.Tensor:
    weight = getattr(experts, key)[number]
    bias = getattr(experts, f"{key}_bias")[number] if getattr(experts, "has_bias", False) else None
    return F.linear(x, weight.T if _is_transposed(experts) else weight, bias)


def _activation(experts: nn.Module, x: torch.Tensor) -> torch.Tensor:
    if not getattr(experts, "has_gate", True):
        return experts.act_fn(x)
    if hasattr(experts, "_apply_gate"):
        return experts._apply_gate(x)
    gate, up = x.chunk(2, dim=-1)
    return experts.act_fn(gate) * up


def _up_name(experts: nn.Module) -> str:
    return "gate_up_proj" if getattr(experts, "has_gate", True) else "up_proj"


def _is_transposed(experts: nn.Module) -> bool:
    return getattr(experts, "is_transposed", type(experts).__name__ in DENSE)
