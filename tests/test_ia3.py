"""ia3.py against PEFT's IA3 on the same Llama with the same vectors."""

import runpy
from pathlib import Path

import peft
import pytest
import torch
import transformers

from ia3 import IA3
from icrl import QNetwork, Recipe, Run, save_network
from llama import Llama, LlamaConfig, load_tensors

ADAPTER = "adapter_model.safetensors"
TOKENS = torch.randint(97, (2, 20), generator=torch.Generator().manual_seed(1))


def random_twins() -> tuple[transformers.LlamaForCausalLM, Llama, IA3]:
    """A Llama of transformers, ours with the same random weights, and vectors far from ones."""
    torch.manual_seed(0)
    config = LlamaConfig(97, 32, 48, 11, 4, 2, 8)
    hf = transformers.LlamaConfig(**config.to_dict(), initializer_range=0.2)
    theirs, ours, adapter = transformers.LlamaForCausalLM(hf), Llama(config), IA3(config)
    ours.load_state_dict(theirs.state_dict())
    for vectors in adapter.parameters():
        torch.nn.init.uniform_(vectors, 0.5, 1.5)
    return theirs, ours, adapter


def save(folder: Path, llama: Llama, adapter: IA3):
    recipe = Recipe(model="the/base", revision="of this commit")
    save_network(Run(folder, recipe, QNetwork(llama, [], adapter), None))


def test_llama_3_1_8b_has_524288_parameters(capsys):
    """The paper's number. All are trained, and all are ones at first. `python ia3.py` says so."""
    adapter = IA3(LlamaConfig(128_256, 4096, 14_336, 32, 32, 8, 128))
    assert sum(v.numel() for v in adapter.parameters() if v.requires_grad) == 524_288
    assert all(torch.equal(v, torch.ones_like(v)) for v in adapter.parameters())
    runpy.run_path(str(Path(__file__).parents[1] / "ia3.py"), run_name="__main__")
    assert "524,288" in capsys.readouterr().out


def test_ones_change_nothing():
    ours = random_twins()[1].bfloat16()
    assert torch.equal(ours(TOKENS), ours(TOKENS, IA3(ours.config)))


def test_files_logits_and_gradients_are_those_of_peft(tmp_path):
    """PEFT loads our file, and we load PEFT's. Logits and gradients are the same."""
    theirs, ours, adapter = random_twins()
    save(tmp_path, ours, adapter)
    theirs = peft.PeftModel.from_pretrained(theirs, tmp_path, is_trainable=True)
    found = theirs.peft_config["default"]
    assert (found.base_model_name_or_path, found.revision) == ("the/base", "of this commit")
    theirs.save_pretrained(tmp_path / "theirs", save_embedding_layers=False)
    loaded = IA3(ours.config)
    loaded.from_peft(load_tensors(tmp_path / "theirs" / ADAPTER))
    assert all(map(torch.equal, loaded.parameters(), adapter.parameters()))
    found, expected = ours(TOKENS, loaded) @ ours.unembedding.T, theirs(TOKENS).logits
    assert (ours(TOKENS) @ ours.unembedding.T - expected).abs().max() > 0.1
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
    for values in (found, expected):
        values.tanh().square().sum().backward()
    gradients = [p.grad.flatten() for name, p in theirs.named_parameters() if "ia3_l" in name]
    vectors = (vector for layer in zip(*(v.grad for v in loaded.parameters())) for vector in layer)
    for vector, gradient in zip(vectors, gradients, strict=True):
        size = gradient.abs().max().item()
        assert size > 0.01
        torch.testing.assert_close(vector, gradient, atol=1e-4 * size, rtol=0)


def test_vectors_of_another_model_or_method_are_refused():
    """A missing vector, an unknown one, one of another size, and a LoRA's matrices."""
    theirs, _, adapter = random_twins()
    lora = peft.get_peft_model(theirs, peft.LoraConfig(target_modules=["k_proj", "v_proj"]))
    tensors = adapter.to_peft()
    (name, vector), *rest = tensors.items()
    wrong = [dict(rest), tensors | {"x": vector}, tensors | {name: torch.ones(17, 1)}]
    for tensors in [*wrong, peft.get_peft_model_state_dict(lora)]:
        with pytest.raises(ValueError, match="not those of this model: see "):
            adapter.from_peft(tensors)


def test_a_save_that_fails_leaves_the_earlier_files(tmp_path, monkeypatch):
    """A file has its name only when it is whole. What was written before a failure is deleted."""
    _, ours, adapter = random_twins()
    save(tmp_path, ours, adapter)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert before.keys() == {"adapter_config.json", ADAPTER}
    monkeypatch.setattr(Path, "replace", None)  # fails when all is written, but not in place
    with pytest.raises(TypeError, match="not callable"):
        save(tmp_path, ours, IA3(ours.config))
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
