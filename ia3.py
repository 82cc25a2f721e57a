"""IA3: three learned vectors per layer, and nothing else (Liu et al. 2022, arXiv 2205.05638).

    python ia3.py    counts the 8B's parameters, and shows that vectors of ones change nothing

    k <- key * (W_k x)     v <- value * (W_v x)     down_proj's input <- feed_forward * (...)

Section 3 of the paper: for Llama 3.1 8B these are 32 x (1024 + 1024 + 14336) = 524,288 parameters,
initialised to ones. They live outside of the transformer, so one frozen base serves both the online
and the target network. They are saved in PEFT's format.
"""

import torch
from torch import nn

PEFT_NAME = "base_model.model.model.layers.{}.{}.ia3_l"  # of a layer and one of its modules
MODULES = {"key": "self_attn.k_proj", "value": "self_attn.v_proj", "feed_forward": "mlp.down_proj"}
PEFT_CONFIG = {  # what adapter_config.json says of the method
    "peft_type": "IA3",
    "task_type": "CAUSAL_LM",
    "target_modules": ["down_proj", "k_proj", "v_proj"],
    "feedforward_modules": ["down_proj"],
}


class IA3(nn.Module):
    """For all layers of a LlamaConfig: key, value (L, K*hd) and feed_forward (L, I), float32."""

    def __init__(self, config):
        super().__init__()
        layers = config.num_hidden_layers
        key_size = config.num_key_value_heads * config.head_dim
        self.key = nn.Parameter(torch.ones(layers, key_size))
        self.value = nn.Parameter(torch.ones(layers, key_size))
        self.feed_forward = nn.Parameter(torch.ones(layers, config.intermediate_size))

    def to_peft(self):
        """Views of the vectors by PEFT's names, in its shapes: (K*hd, 1), and (1, I)."""
        views = {}
        for name, module in MODULES.items():
            shape = (1, -1) if name == "feed_forward" else (-1, 1)
            for layer, vector in enumerate(getattr(self, name).detach()):
                views[PEFT_NAME.format(layer, module)] = vector.view(shape)
        return views

    @torch.no_grad()
    def from_peft(self, tensors):
        """Copy the tensors of PEFT's file into the vectors; ValueError if they do not fit."""
        views = self.to_peft()
        for name in sorted({*views, *tensors}):
            if name not in views or name not in tensors or views[name].shape != tensors[name].shape:
                raise ValueError(f"The vectors are not those of this model: see {name}.")
        for name, view in views.items():  # a view shares the parameter's memory
            view.copy_(tensors[name])


def main():
    from llama import Llama, LlamaConfig

    llama_8b = LlamaConfig(
        vocab_size=128_256,
        hidden_size=4096,
        intermediate_size=14_336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
    )
    adapter = IA3(llama_8b)
    for name, vectors in adapter.named_parameters():
        print(f"{name:12} {tuple(vectors.shape)} = {vectors.numel():7,}")
    print(f"together {sum(p.numel() for p in adapter.parameters()):,} parameters")

    config = LlamaConfig(100, 64, 192, 2, 4, 2, 16)  # a small one, with the same fields
    llama = Llama(config)
    tokens = torch.arange(100)[None]
    difference = (llama(tokens, IA3(config)) - llama(tokens)).abs().max()
    print(f"\nOnes change nothing: hidden states differ by {difference.item()}")


if __name__ == "__main__":
    main()
