"""ia3.py against PEFT's IA3 on the same Llama with the same vectors."""

import copy
import json
import re

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from test_llama import assert_same, logits, random_tokens, refusal, twins
from torch import Tensor

import ia3
from ia3 import IA3
from llama import Llama, LlamaConfig

CONFIG = {
    "task_type": "CAUSAL_LM",
    "target_modules": ["k_proj", "v_proj", "down_proj"],
    "feedforward_modules": ["down_proj"],
}
NAMES = ("key", "value", "feed_forward")
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")  # PEFT calls what transformers has renamed


def random_ia3(config: LlamaConfig) -> IA3:
    """An adapter with vectors far from ones."""
    adapter, random = IA3.for_llama(config), torch.Generator().manual_seed(2)
    for vectors in adapter.parameters():
        vectors.data = 0.3 + 1.4 * torch.rand(vectors.shape, generator=random)
    return adapter


def peft_vectors(model: peft.PeftModel, layer: int) -> dict[str, torch.nn.Parameter]:
    """PEFT's own parameters of one layer under our names; (size, 1) for the key and the value, (1, size) for the third."""
    block = model.base_model.model.model.layers[layer]
    modules = {"key": block.self_attn.k_proj, "value": block.self_attn.v_proj, "feed_forward": block.mlp.down_proj}
    return {name: module.ia3_l["default"] for name, module in modules.items()}


def adapted_twins() -> tuple[peft.PeftModel, Llama, IA3]:
    """A Llama in PEFT, and ours with our adapter: the same random weights and the same random vectors."""
    theirs, ours = twins()
    adapter = random_ia3(ours.config)
    theirs = peft.get_peft_model(theirs, peft.IA3Config(**CONFIG)).eval()
    for layer in range(ours.config.num_hidden_layers):
        for name, vector in peft_vectors(theirs, layer).items():
            vector.data = getattr(adapter, name)[layer].detach().clone().view_as(vector)
    return theirs, ours, adapter


def assert_equal_vectors(one: IA3, other: IA3):
    for name in NAMES:
        assert torch.equal(getattr(one, name), getattr(other, name))


# ------------------------------------------------------------------------------------------------------ the same function


def test_llama_3_1_8b_has_524288_parameters():
    """The adapter of Llama 3.1 8B has the paper's 524,288 parameters, all trained and all ones at first."""
    adapter = IA3.for_llama(LlamaConfig())
    assert sum(vectors.numel() for vectors in adapter.parameters() if vectors.requires_grad) == 524_288
    assert all((vectors == 1).all() and vectors.dtype == torch.float32 for vectors in adapter.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_ones_change_nothing(dtype):
    """A new adapter leaves every hidden state bit for bit as it was."""
    _, ours = twins()
    ours, tokens = ours.to(dtype), random_tokens(2, 20)
    plain = ours(tokens)
    adapted = ours(tokens, IA3.for_llama(ours.config))
    assert plain.dtype == adapted.dtype == dtype
    assert torch.equal(plain, adapted)


@torch.no_grad()
def test_logits_equal_those_of_peft():
    """With the same random vectors the logits are PEFT's, and not those of the base."""
    theirs, ours, adapter = adapted_twins()
    tokens = random_tokens(2, 20)
    expected = theirs(tokens).logits
    assert_same(logits(ours, tokens, adapter), expected)
    assert (logits(ours, tokens) - expected).abs().max() > 0.1


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_each_vector_of_each_layer_matters(name):
    """Setting one layer's vector back to ones changes the logits, so that none of the comparisons here passes without it."""
    _, ours, adapter = adapted_twins()
    tokens = random_tokens(2, 20)
    expected = logits(ours, tokens, adapter)
    for layer in range(ours.config.num_hidden_layers):
        changed = copy.deepcopy(adapter)
        getattr(changed, name)[layer] = 1
        assert (logits(ours, tokens, changed) - expected).abs().max() > 0.01


def test_gradients_equal_those_of_peft():
    """The gradient of a loss by each vector of each layer is PEFT's."""
    theirs, ours, adapter = adapted_twins()
    tokens = random_tokens(2, 20)
    weights = torch.randn(20, 97, generator=torch.Generator().manual_seed(3))

    def loss(values: Tensor) -> Tensor:
        return (weights * values.tanh()).sum()

    loss(theirs(tokens).logits).backward()
    loss(logits(ours, tokens, adapter)).backward()
    for layer in range(ours.config.num_hidden_layers):
        for name, vector in peft_vectors(theirs, layer).items():
            expected = vector.grad.flatten()
            size = expected.abs().max()
            assert size > 0.1
            torch.testing.assert_close(getattr(adapter, name).grad[layer], expected, atol=1e-4 * size.item(), rtol=0)


@torch.no_grad()
def test_merged_weights_equal_the_adapter():
    """Folded into the weights, the vectors give the logits that they gave as an adapter, and touch no other weight."""
    _, ours, adapter = adapted_twins()
    tokens, before = random_tokens(2, 20), copy.deepcopy(ours)
    adapter.merge(ours)
    assert_same(logits(ours, tokens), logits(before, tokens, adapter))
    changed = {name for name, weight in ours.state_dict().items() if not torch.equal(weight, before.state_dict()[name])}
    assert {name.split(".")[-2] for name in changed} == {"k_proj", "v_proj", "down_proj"}


# ----------------------------------------------------------------------------------------------------------------- files


@torch.no_grad()
def test_an_adapter_saved_here_loads_in_peft(tmp_path):
    """PeftModel.from_pretrained reads our files and gives our logits."""
    hf, ours = twins()
    adapter, tokens = random_ia3(ours.config), random_tokens(2, 20)
    adapter.save(tmp_path, base="meta-llama/Llama-3.1-8B")
    loaded = peft.PeftModel.from_pretrained(hf, tmp_path).eval()
    assert_same(loaded(tokens).logits, logits(ours, tokens, adapter))
    assert loaded.peft_config["default"].base_model_name_or_path == "meta-llama/Llama-3.1-8B"


def test_an_adapter_saved_by_peft_loads_here(tmp_path):
    """IA3.load reads PEFT's files, with the same vectors in the same layers."""
    theirs, _, adapter = adapted_twins()
    theirs.save_pretrained(tmp_path)
    assert_equal_vectors(IA3.load(tmp_path), adapter)


def test_a_saved_adapter_loads_again(tmp_path):
    """What `save` wrote, into a folder that it made, `load` reads bit for bit; the loaded vectors can be trained on."""
    adapter = random_ia3(LlamaConfig(97, 32, 48, 12, 4, 2, 8))  # 12 layers: "10" sorts before "2"
    adapter.save(tmp_path / "new" / "folder")
    loaded = IA3.load(tmp_path / "new" / "folder")
    assert_equal_vectors(loaded, adapter)
    assert all(vectors.requires_grad and vectors.dtype == torch.float32 for vectors in loaded.parameters())


def test_saved_files_appear_whole(tmp_path, monkeypatch):
    """A save leaves PEFT's two files and no temporary one; a later one that dies half-way leaves the earlier as it was."""
    first = random_ia3(LlamaConfig(97, 32, 48, 2, 4, 2, 8))
    first.save(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}

    def die(tensors, path, metadata=None):
        path.write_bytes(b"half of it")
        raise OSError("no space left on device")

    monkeypatch.setattr(ia3, "save_file", die)
    with pytest.raises(OSError, match="no space"):
        IA3.for_llama(LlamaConfig(97, 32, 48, 2, 4, 2, 8)).save(tmp_path)
    assert_equal_vectors(IA3.load(tmp_path), first)


@pytest.fixture
def saved(tmp_path):
    """The folder of a whole adapter of two layers, for a test to damage."""
    random_ia3(LlamaConfig(97, 32, 48, 2, 4, 2, 8)).save(tmp_path)
    IA3.load(tmp_path)
    return tmp_path


def test_a_lora_adapter_is_refused(tmp_path):
    """Another method's adapter, saved by PEFT, is refused by its name."""
    lora = peft.LoraConfig(task_type="CAUSAL_LM", target_modules=CONFIG["target_modules"])
    peft.get_peft_model(twins()[0], lora).save_pretrained(tmp_path)
    assert re.search("LORA.*only IA3", refusal(IA3.load, tmp_path))


def test_ia3_on_other_modules_is_refused(saved):
    """An IA3 adapter without the value vectors is not ours."""
    path = saved / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"target_modules": ["k_proj", "down_proj"]}))
    assert re.search(r"target_modules.*only \['down_proj', 'k_proj', 'v_proj'\] is implemented", refusal(IA3.load, saved))


def test_a_missing_folder_is_refused(tmp_path):
    """A folder that does not exist is named."""
    assert str(tmp_path / "nowhere") in refusal(IA3.load, tmp_path / "nowhere")


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_a_missing_file_is_named(name, saved):
    """A folder with one of the two files is refused with the name of the other."""
    (saved / name).unlink()
    assert name in refusal(IA3.load, saved)


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
@pytest.mark.parametrize("kept", [0, 4, 100, -4])
def test_a_truncated_file_is_refused(name, kept, saved):
    """Either file cut short anywhere is not a whole adapter."""
    path = saved / name
    path.write_bytes(path.read_bytes()[:kept])
    assert "no whole PEFT adapter" in refusal(IA3.load, saved)


@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("module", ["self_attn.k_proj", "self_attn.v_proj", "mlp.down_proj"])
def test_a_missing_vector_is_refused(layer, module, saved):
    """Every vector of every layer has to be there."""
    path = saved / "adapter_model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    del tensors[f"base_model.model.model.layers.{layer}.{module}.ia3_l"]
    save_file(tensors, path)
    assert str(saved) in refusal(IA3.load, saved)


def test_a_vector_of_another_size_is_refused(saved):
    """The vectors of all layers have to be equally long."""
    path, name = saved / "adapter_model.safetensors", "base_model.model.model.layers.1.self_attn.k_proj.ia3_l"
    save_file({key: tensor.clone() for key, tensor in load_file(path).items()} | {name: torch.ones(17, 1)}, path)
    assert "another size" in refusal(IA3.load, saved)


def test_an_unknown_tensor_is_refused(saved):
    """A tensor that belongs to no layer is named."""
    path, name = saved / "adapter_model.safetensors", "base_model.model.lm_head.ia3_l"
    save_file({key: tensor.clone() for key, tensor in load_file(path).items()} | {name: torch.ones(1, 97)}, path)
    assert name in refusal(IA3.load, saved)
