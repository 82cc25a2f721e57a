"""What benchmark.py and memory.py claim beyond speed."""

import benchmark
import memory
import pytest
import torch

from ia3 import IA3
from llama import Llama, LlamaConfig
from train import kept_bytes

DEFAULT, SMOLLM2, LLAMA3 = (64, 192, 2, 2, 2, 32), (72, 192, 4, 9, 3, 8), (64, 224, 4, 8, 2, 8)


@pytest.mark.parametrize(("dtype", "ia3"), [(torch.float32, False), (torch.bfloat16, True)])
@pytest.mark.parametrize("shape", [DEFAULT, SMOLLM2, LLAMA3])
def test_kept_bytes_are_what_autograd_keeps(shape, dtype, ia3):
    """Within 15 %; each storage counts once, and weights do not. Small ones in such proportions."""
    config = LlamaConfig(107, *shape)
    llama, adapter, kept = Llama(config).to(dtype).requires_grad_(not ia3), IA3(config), {}

    def keep(tensor):
        return kept.setdefault(tensor.untyped_storage().data_ptr(), tensor)

    with torch.autograd.graph.saved_tensors_hooks(keep, keep):
        llama(torch.randint(107, (1, 256)), adapter if ia3 else None)
    weights = {p.untyped_storage().data_ptr() for p in (*llama.parameters(), *adapter.parameters())}
    total = sum(kept[data].untyped_storage().nbytes() for data in kept.keys() - weights)
    assert kept_bytes(config, 256, dtype) == pytest.approx(total, rel=0.15)


def test_the_8b(capsys, monkeypatch):
    """Memory as in the paper; the way of the benchmark, on a tiny shape, whose Q-values agree."""
    assert memory.row("Llama-3.1-8B-Instruct")[1:5:3] == ["524,288", "512 MiB"]
    benchmark.compare("8B", ("our_step('tiny 8B')", "their_step('tiny 8B')"), turns=1)
    monkeypatch.setattr("sys.stdin", ["a turn"])
    with pytest.raises(SystemExit):
        benchmark.our_playing("tiny 8B", trials=2)
    assert " times\n    our_step('tiny 8B')" in capsys.readouterr().out
