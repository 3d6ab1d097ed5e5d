"""A mixture whose experts are modules in a list, as in code that comes with a checkpoint."""

import torch
from torch import nn
from transformers import LlamaForCausalLM


class Expert(nn.Module):
    """A gated MLP with biases."""

    def __init__(self, hidden: int, width: int) -> None:
        super().__init__()
        self.w1, self.w3 = nn.Linear(hidden, width), nn.Linear(hidden, width, bias=False)
        self.w2 = nn.Linear(width, hidden)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """The output of each token."""
        return self.w2(nn.functional.silu(self.w1(hidden)) * self.w3(hidden))


class Mixture(nn.Module):
    """A router, and the experts that each token is sent to, one after the other."""

    def __init__(self, config) -> None:
        super().__init__()
        self.picked, hidden = config.num_experts_per_tok, config.hidden_size
        self.router = nn.Linear(hidden, config.num_local_experts, bias=False)
        width = config.moe_intermediate_size
        experts = (Expert(hidden, width) for _ in range(config.num_local_experts))
        self.experts = nn.ModuleList(experts)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """The sum of the experts by the weights of the router."""
        rows = hidden.flatten(0, -2)
        weights, chosen = self.router(rows).softmax(-1).topk(self.picked, -1)
        out = torch.zeros_like(rows)
        for index, expert in enumerate(self.experts):
            tokens, places = (chosen == index).nonzero(as_tuple=True)
            if len(tokens):
                found = expert(rows[tokens]) * weights[tokens, places].unsqueeze(1)
                out.index_add_(0, tokens, found)
        return out.view_as(hidden)


class ListedMixture(LlamaForCausalLM):
    """A LLaMA with a mixture in place of every MLP."""

    def __init__(self, config) -> None:
        super().__init__(config)
        for layer in self.model.layers:
            layer.mlp = Mixture(config)
