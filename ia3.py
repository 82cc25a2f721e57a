"""IA3: three learned vectors a layer, and nothing else (Liu et al. 2022, arXiv 2205.05638, section 3.3).

    k <- key * (W_k x)        v <- value * (W_v x)        down_proj's input <- feed_forward * (silu(W_gate x) * W_up x)

Part of the paper: section 3, the 524,288 trained parameters of Llama 3.1 8B: 32 x (1024 + 1024 + 14336), all ones at first.
The vectors live outside of the transformer, which takes them as an argument: one frozen base serves the online and the
delayed network. Files are PEFT's own (adapter_config.json, adapter_model.safetensors), so adapters travel both ways.
"""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

# our parameter -> the module whose `ia3_l` it is in PEFT; PEFT keeps output scales as columns and input scales as rows
PEFT_NAMES = {
    "key": "base_model.model.model.layers.{}.self_attn.k_proj.ia3_l",
    "value": "base_model.model.model.layers.{}.self_attn.v_proj.ia3_l",
    "feed_forward": "base_model.model.model.layers.{}.mlp.down_proj.ia3_l",
}
TARGET_MODULES, FEEDFORWARD_MODULES = ["down_proj", "k_proj", "v_proj"], ["down_proj"]


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Write to the yielded temporary name; when all went well it becomes `path` in one step, so no file is ever half there."""
    path = Path(path)
    temporary = path.with_name(path.name + ".tmp")
    try:
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


class IA3(nn.Module):
    """The vectors of all layers, float32, ones: key and value (L, K*hd), feed_forward (L, I)."""

    def __init__(self, layers: int, key_value_size: int, feed_forward_size: int):
        super().__init__()
        self.key = nn.Parameter(torch.ones(layers, key_value_size))
        self.value = nn.Parameter(torch.ones(layers, key_value_size))
        self.feed_forward = nn.Parameter(torch.ones(layers, feed_forward_size))

    @classmethod
    def for_llama(cls, config) -> "IA3":
        """The adapter that fits a LlamaConfig."""
        return cls(config.num_hidden_layers, config.num_key_value_heads * config.head_dim, config.intermediate_size)

    def to_peft(self) -> dict[str, Tensor]:
        """The tensors of PEFT's adapter_model.safetensors: (K*hd, 1) for k_proj and v_proj, (1, I) for down_proj."""
        return {
            name.format(layer): vector[None].clone() if ours == "feed_forward" else vector[:, None].clone()
            for ours, name in PEFT_NAMES.items()
            for layer, vector in enumerate(getattr(self, ours).detach().cpu())
        }

    def save(self, folder: str | Path, base: str = "") -> None:
        """Write PEFT's two files into `folder`; `base` names the base model for whoever loads the adapter."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        config = {
            "peft_type": "IA3",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": base,
            "target_modules": TARGET_MODULES,
            "feedforward_modules": FEEDFORWARD_MODULES,
            "inference_mode": True,
        }
        with replacing(folder / "adapter_model.safetensors") as temporary:
            save_file(self.to_peft(), temporary, metadata={"format": "pt"})
        with replacing(folder / "adapter_config.json") as temporary:
            temporary.write_text(json.dumps(config, indent=2) + "\n")

    @classmethod
    def load(cls, folder: str | Path) -> "IA3":
        """Read an adapter that this class or PEFT saved. Raises ValueError, in one sentence, if it is not such an adapter."""
        folder = Path(folder)
        try:
            config = json.loads((folder / "adapter_config.json").read_text())
            tensors = load_file(folder / "adapter_model.safetensors")
        except (OSError, ValueError, SafetensorError) as error:  # ValueError: not JSON, or not even text
            raise ValueError(f"{folder} holds no whole PEFT adapter: {error}.") from error
        implemented = {"peft_type": "IA3", "target_modules": TARGET_MODULES, "feedforward_modules": FEEDFORWARD_MODULES}
        for key, ours in implemented.items():
            theirs = config.get(key) if isinstance(config, dict) else None
            if (sorted(theirs) if isinstance(theirs, list) else theirs) != ours:
                raise ValueError(f"{folder} holds an adapter with {key} = {theirs!r}: only {ours} is implemented.")
        layers = len(tensors) // len(PEFT_NAMES)
        try:
            stacks = {
                ours: torch.stack([tensors.pop(name.format(layer)).flatten().float() for layer in range(layers)])
                for ours, name in PEFT_NAMES.items()
            }
        except (KeyError, RuntimeError) as error:
            raise ValueError(f"{folder} lacks a vector of some layer or has one of another size: {error}.") from error
        if tensors:
            raise ValueError(f"{folder} holds tensors that belong to no layer: {', '.join(sorted(tensors)[:3])}.")
        adapter = cls(layers, stacks["key"].shape[1], stacks["feed_forward"].shape[1])
        adapter.load_state_dict(stacks)
        return adapter

    def check_fits(self, config) -> None:
        """Raises ValueError if these are not the vectors of a Llama of this LlamaConfig."""
        for ours, theirs in zip(self.parameters(), IA3.for_llama(config).parameters()):
            if ours.shape != theirs.shape:
                raise ValueError(f"The adapter's vectors are {tuple(ours.shape)}, but the model needs {tuple(theirs.shape)}.")

    @torch.no_grad()
    def merge(self, llama: nn.Module) -> None:
        """Fold the vectors into the weights of `llama`, in place: rows of k_proj and v_proj, columns of down_proj."""
        self.check_fits(llama.config)
        for i, layer in enumerate(llama.model.layers):
            layer.self_attn.k_proj.weight.mul_(self.key[i][:, None])
            layer.self_attn.v_proj.weight.mul_(self.value[i][:, None])
            layer.mlp.down_proj.weight.mul_(self.feed_forward[i])
