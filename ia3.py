"""IA3: three learned vectors a layer, and nothing else (Liu et al. 2022, arXiv 2205.05638).

    python ia3.py    counts the 8B's parameters, and shows that ones change nothing

    k <- key * (W_k x)     v <- value * (W_v x)     down_proj's input <- feed_forward * (...)

Section 3 of the paper: for Llama 3.1 8B these are 32 x (1024 + 1024 + 14336) = 524,288 parameters,
all ones at first. They live outside of the transformer: one frozen base serves the online and the
delayed network. Their files are PEFT's.
"""

import torch
from torch import nn

PEFT_NAME = "base_model.model.model.layers.{}.{}.ia3_l"  # of a layer and one of its modules
MODULES = {"key": "self_attn.k_proj", "value": "self_attn.v_proj", "feed_forward": "mlp.down_proj"}
PEFT_CONFIG = {  # adapter_config.json
    "peft_type": "IA3",
    "task_type": "CAUSAL_LM",
    "target_modules": ["down_proj", "k_proj", "v_proj"],
    "feedforward_modules": ["down_proj"],
}


class IA3(nn.Module):
    """For all layers of a LlamaConfig: key, value (L, K*hd) and feed_forward (L, I), float32."""

    def __init__(self, config):
        super().__init__()
        layers, size = config.num_hidden_layers, config.num_key_value_heads * config.head_dim
        self.key = nn.Parameter(torch.ones(layers, size))
        self.value = nn.Parameter(torch.ones(layers, size))
        self.feed_forward = nn.Parameter(torch.ones(layers, config.intermediate_size))

    def to_peft(self):
        """Views of the vectors as in PEFT's file: columns (K*hd, 1) of outputs, rows (1, I)."""
        views = {}
        for ours, module in MODULES.items():
            shape = (1, -1) if ours == "feed_forward" else (-1, 1)
            for layer, vector in enumerate(getattr(self, ours).detach()):
                views[PEFT_NAME.format(layer, module)] = vector.view(shape)
        return views

    @torch.no_grad()
    def from_peft(self, tensors):
        """Take over the tensors of PEFT's file; ValueError if they are not exactly ours."""
        views = self.to_peft()
        expected = {name: view.shape for name, view in views.items()}
        if different := expected.items() ^ {n: t.shape for n, t in tensors.items()}.items():
            raise ValueError(f"The vectors are not those of this model: see {min(different)[0]}.")
        for name, view in views.items():
            view.copy_(tensors[name])


if __name__ == "__main__":
    from llama import Llama, LlamaConfig

    adapter = IA3(LlamaConfig(128_256, 4096, 14_336, 32, 32, 8, 128))  # Llama 3.1 8B
    for name, vectors in adapter.named_parameters():
        print(f"{name:12} {len(vectors)} layers x {vectors.shape[1]:6,} = {vectors.numel():7,}")
    print(f"together {sum(p.numel() for p in adapter.parameters()):,} parameters")
    config = LlamaConfig(100, 64, 192, 2, 4, 2, 16)
    llama, tokens = Llama(config), torch.arange(100)[None]
    difference = (llama(tokens, IA3(config)) - llama(tokens)).abs().max()
    print(f"\nOnes change nothing: hidden states differ by {difference.item()}")
