"""benchmark.py's way through the 8B's shape, which needs a GPU, on a tiny one."""

import re

import benchmark
import pytest

from icrl import Encoder

# the peers' own, and torch.compile's
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")


def test_the_benchmark_of_the_8b(capsys):
    """Both sides train and their Q-values agree (or `training` raises), in bfloat16; the trials are played."""
    benchmark.training("tiny 8B", 1)
    benchmark.playing_large("tiny 8B", trials=5, episodes=4)
    printed = capsys.readouterr().out
    for line in (
        r"Training step, tiny 8B \(2 slices of 128 tokens, IA3\): [\d.]+ times",
        r"    peak memory: [\d,]+ MiB against [\d,]+ MiB",
        r"    ours does [\d,]+ GFLOP/s in matrix products, \d+% of the machine's best",
        r"Playing 4 episodes, tiny 8B: 5 trials in [\d.]+ s",
    ):
        assert re.search(line, printed), f"{line} is not in\n{printed}"


def test_the_stand_in_tokenizer_makes_ten_tokens_a_step():
    """As the paper's notebook has them: three of a header, a word and an end, twice."""
    encoder = Encoder(benchmark.stand_in_tokenizer())
    assert encoder.template.name == "Llama 3's markers"
    assert encoder.step_lengths == (benchmark.STEP, benchmark.STEP)
    assert benchmark.STEP == 10
