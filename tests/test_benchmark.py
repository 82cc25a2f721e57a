"""benchmark.py and memory.py: what they claim, except for speed."""

import re
from pathlib import Path

import benchmark
import gpu
import memory
import pytest
import torch
from test_official import save_checkpoint

import train
from ia3 import IA3
from icrl import QNetwork
from llama import Llama, LlamaConfig
from train import activation_bytes

DEFAULT, SMOLLM2, LLAMA3 = (64, 192, 4, 2, 2, 32), (72, 192, 4, 9, 3, 8), (64, 224, 4, 8, 2, 8)
CASES = [(torch.float32, False), (torch.float32, True), (torch.bfloat16, True)]


@pytest.mark.parametrize(("dtype", "ia3"), CASES)
@pytest.mark.parametrize("shape", [DEFAULT, SMOLLM2, LLAMA3])
def test_activation_bytes_are_what_autograd_stores(shape, dtype, ia3):
    """Within 5 %. Each storage counts once, weights do not. The shapes are scaled down."""
    config = LlamaConfig(107, *shape)
    llama, adapter, stored = Llama(config).to(dtype), IA3(config), {}
    network = QNetwork(llama, range(4), adapter if ia3 else None)

    def store(tensor):
        return stored.setdefault(tensor.untyped_storage().data_ptr(), tensor)

    with torch.autograd.graph.saved_tensors_hooks(store, store):
        llama(torch.randint(107, (1, 256)), adapter if ia3 else None)
    weights = {p.untyped_storage().data_ptr() for p in (*llama.parameters(), *adapter.parameters())}
    total = sum(stored[data].untyped_storage().nbytes() for data in stored.keys() - weights)
    assert activation_bytes(network, 256) == pytest.approx(total, rel=0.05)


def test_the_8b(capsys, monkeypatch):
    """Memory as in the paper. The benchmark runs with a tiny shape; both sides' Q-values agree."""
    assert memory.row("Llama-3.1-8B-Instruct")[1:5:3] == ["524,288", "512 MiB"]
    benchmark.compare("8B", ("our_step('tiny 8B')", "their_step('tiny 8B')"), turns=1)
    benchmark.compare("Before", ["our_step('tiny 8B')"] * 2, Path(train.__file__).parent, turns=1)
    monkeypatch.setattr("sys.stdin", ["a turn"])
    with pytest.raises(SystemExit):
        benchmark.our_playing("tiny 8B", trials=2)
    printed = capsys.readouterr().out
    assert printed.count(" times\n    our_step('tiny 8B')") == printed.count(" apart\n") == 2


def test_the_script_for_gpus_runs_without_one(tmp_path, capsys):
    """The paper's recipe on a small checkpoint; its adapter names a repository. The 8B's part."""
    save_checkpoint(tmp_path / "base", "ChatML")
    flags = "--tokens 300 --max-steps 15 --lakes 9 --episodes 30 --batch 2"
    command = ["--flags", flags, *"--minutes 0.01 --name some/base --only paper 8B".split()]
    gpu.main([str(tmp_path / "base"), "--out", str(tmp_path), *command])
    assert "some/base" in (tmp_path / "run" / "adapter_config.json").read_text()
    apart = re.search(r"at most (\S+) apart", capsys.readouterr().out)[1]
    assert float(apart) < 0.05
