"""The paper's method in miniature: a checkpoint as on the Hub, IA3, transformers and PEFT."""

import re
import shutil
from argparse import Namespace

import numpy as np
import peft
import pytest
import torch
import transformers
from test_icrl import MARKERS, make_tokenizer, transcript_tokenizer
from test_train import INTERRUPT, contents, python

import train
from frozen_lake import FrozenLake, RandomAgent, random_lakes, rollout
from ia3 import IA3
from icrl import QNetwork, Recipe, Run, TranscriptTokenizer, collate, encode_slice, load_run
from llama import load_llama, user_errors

SHAPE = {"hidden_size": 64, "intermediate_size": 96, "initializer_range": 0.2}
SHAPE |= {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
ROPE = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
ROPE |= {"rope_theta": 500_000.0, "original_max_position_embeddings": 256}
PEFT = {"target_modules": ["k_proj", "v_proj", "down_proj"], "feedforward_modules": ["down_proj"]}
FLAGS = """--tokens 300 --max-steps 15 --batch 2 --steps 75 --collection-steps 75 --lakes 9
    --episodes 30 --reward-scale 1 --dtype float32 --device cpu --trials 2""".split()
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")  # PEFT's, about transformers
SHARD = "model-00002-of-00003.safetensors"
BAD = [  # a file of the base, how many of its bytes are left, flags, words of the sentence
    ("config.json", 9, "--model BASE", "config.json cannot be used"),
    ("tokenizer.json", 0, "--model BASE", "tokenizer.json does not exist"),
    (SHARD, 0, "--model BASE", f"{SHARD} does not exist"),
    (SHARD, 9999, "--model BASE", f"{SHARD} cannot be used"),
    (SHARD, None, "--model BASE --tokens 4097", "contexts of 4096 tokens"),
    (SHARD, None, "--model BASE --dtype int8", "--dtype has to be one of"),
    (SHARD, None, "--model BASE --layers 2", "--layers is for a new network"),
    (SHARD, None, "--dtype bfloat16", "--dtype is for a base"),
    (SHARD, None, "--model RUN", "is itself an adapter"),
]


def save_checkpoint(folder, markers: str) -> TranscriptTokenizer:
    """A small random Llama as transformers saves it, in three shards, with a tokenizer.json."""
    tokenizer = make_tokenizer(MARKERS[markers])
    settings = {"vocab_size": tokenizer.get_vocab_size(), "max_position_embeddings": 4096}
    config = transformers.LlamaConfig(**SHAPE, **settings, rope_parameters=ROPE)
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(config).save_pretrained(folder, max_shard_size="200KB")
    tokenizer.save(str(folder / "tokenizer.json"))
    assert len(list(folder.glob("*.safetensors"))) == 3
    return transcript_tokenizer(tokenizer)


@pytest.fixture(scope="module")
def official(tmp_path_factory):
    """A checkpoint's folder, its tokenizer, and a batch with padding and truncated episodes."""
    folder, rng = tmp_path_factory.mktemp("official"), np.random.default_rng(0)
    tokenizer = save_checkpoint(folder, "Llama 3")
    env = FrozenLake(random_lakes(3, rng, (3, 4), 2, test=False), rng, max_steps=15)
    played = rollout(env, RandomAgent(env, rng), 20)
    batch = collate([encode_slice(tokenizer, iter([trial]), 400, 0.9) for trial in played])
    return folder, tokenizer, batch


def q_of(theirs, tokenizer, batch):
    logits = theirs(batch.tokens).logits[..., torch.tensor(tokenizer.action_tokens)]
    return torch.stack([row[positions] for row, positions in zip(logits, batch.positions)])


@pytest.mark.parametrize(("needed", "slices"), [(0, 3), (6 * 10**8, 1), (10**10, 1)])
def test_a_step_is_that_of_transformers_and_peft(official, tmp_path, monkeypatch, needed, slices):
    """Q-values, loss and gradients to 1e-4: all slices at once, one by one, or recomputed."""
    folder, tokenizer, batch = official
    theirs = transformers.LlamaForCausalLM.from_pretrained(folder)
    theirs = peft.get_peft_model(theirs, peft.IA3Config(**PEFT), adapter_name="theta")
    theirs.add_adapter("phi", peft.IA3Config(**PEFT))
    random, q, vectors = torch.Generator().manual_seed(1), {}, {}
    state = {"step": 0, "processes": 1}
    for name, network in (("phi", "target"), ("theta", "online")):
        theirs.set_adapter(name)
        vectors = {n.replace(f".{name}", ""): p for n, p in theirs.named_parameters() if name in n}
        for vector in vectors.values():
            vector.data = 0.5 + torch.rand(vector.shape, generator=random)
        adapter = IA3(load_llama(folder).config)
        adapter.from_peft(vectors)
        state[network] = adapter.state_dict()
        q[name] = q_of(theirs, tokenizer, batch)
    targets, taken = 30 * batch.rewards[batch.mask], []
    for i, (b, n) in enumerate(batch.mask.nonzero().tolist()):  # equations 4 and 6
        taken.append(q["theta"][b, n, batch.actions[b, n]])
        if batch.discounts[b, n] > 0:
            targets[i] += 0.9 * q["phi"][b, n + 1, q["theta"][b, n + 1].argmax()].detach()
    loss = (targets - torch.stack(taken)).square().mean()  # equation 7
    loss.backward()

    ours = QNetwork(load_llama(folder), tokenizer.action_tokens, adapter)
    torch.testing.assert_close(ours(*batch[:2]), q["theta"], atol=1e-4, rtol=1e-4)
    recipe = Recipe(steps=1, batch=3, tokens=400, reward_scale=30.0, grad_clip=0.0)
    state["optimizers"] = [o.state_dict() for o in train.make_optimizers(recipe, ours)]
    torch.save(state, tmp_path / "state.pt")
    monkeypatch.setattr(train, "collect", lambda *_: iter([batch]))
    monkeypatch.setattr(train, "memory_budget", lambda _: 10**9)
    monkeypatch.setattr(train, "activation_bytes", lambda *_: needed)
    run = Run(tmp_path, recipe, ours, tokenizer)
    assert train.plan_memory(run) == (slices, needed > 10**9)
    train.train(run, Namespace(resume=tmp_path, compile=False, eval_every=9))
    assert ours.llama.recompute_layers == (needed > 10**9)
    row = np.loadtxt(tmp_path / "log.csv", delimiter=",", skiprows=1)
    expected = [loss.item(), torch.stack(taken).mean().item(), targets.mean().item()]
    np.testing.assert_allclose(row[1:4], expected, rtol=1e-4)
    for vector in adapter.parameters():
        vector.data = vector.grad
    for name, ours in adapter.to_peft().items():
        theirs = vectors[name].grad
        torch.testing.assert_close(ours, theirs, atol=1e-4 * theirs.abs().max().item(), rtol=0)


@pytest.fixture(scope="module")
def trained(official, tmp_path_factory):
    """The folder of an IA3 run of train.py on the checkpoint, whose files do not change."""
    base, folder = official[0], tmp_path_factory.mktemp("runs") / "ia3"
    before = contents(base)
    train.main(["--model", str(base), *FLAGS, "--out", str(folder)])
    assert contents(base) == before
    return folder


def test_the_loss_falls_and_the_adapter_loads_in_peft(official, trained):
    """A run holds no base. PEFT puts its vectors on transformers' base: same logits."""
    base, tokenizer, batch = official
    assert not (trained / "model.safetensors").exists()
    losses = np.loadtxt(trained / "log.csv", delimiter=",", skiprows=1)[:, 1]
    assert losses[-10:].mean() < 0.6 * losses[:10].mean()
    theirs = transformers.LlamaForCausalLM.from_pretrained(base)
    q = q_of(peft.PeftModel.from_pretrained(theirs, trained), tokenizer, batch)
    torch.testing.assert_close(load_run(trained).network(*batch[:2]), q, atol=1e-4, rtol=1e-4)


def test_an_interrupted_run_ends_with_the_same_adapter(official, trained, tmp_path):
    """SIGKILL after the checkpoint at step 50, then --resume: all files are the same."""
    folder = tmp_path / "ia3"
    killed = ("-c", INTERRUPT, "polyak_update", 60, 9, train.__file__, "--model", official[0])
    python(*killed, *FLAGS, "--out", folder, status=-9)
    assert len((folder / "log.csv").read_text().splitlines()) == 51
    train.main(["--resume", str(folder), "--trials", "2"])
    assert contents(folder) == contents(trained)


def test_bfloat16_and_chatml_train_too(tmp_path, capsys):
    save_checkpoint(tmp_path, "ChatML")
    flags = ["--model", str(tmp_path), *FLAGS, "--dtype", "bfloat16", "--steps", "1"]
    train.main([*flags, "--out", str(tmp_path / "run")])
    assert r"<|im_start|>action\ndown<|im_end|>\n" in capsys.readouterr().err
    network = load_run(tmp_path / "run").network
    assert network.llama.unembedding.dtype == torch.bfloat16
    assert {vector.dtype for vector in network.adapter.parameters()} == {torch.float32}


@pytest.mark.parametrize("case", BAD)
def test_bad_bases_end_in_one_sentence_and_write_nothing(official, trained, tmp_path, capsys, case):
    file, left, flags, sentence = case
    base = shutil.copytree(official[0], tmp_path / "base")
    (base / file).write_bytes((base / file).read_bytes()[:left])
    if left == 0:
        (base / file).unlink()
    flags = flags.replace("BASE", str(base)).replace("RUN", str(trained)).split()
    with pytest.raises(SystemExit, match="2"), user_errors():
        train.main([*flags, "--out", str(tmp_path / "run")])
    assert re.fullmatch(f"[^\n]*{re.escape(sentence)}[^\n]*\n", capsys.readouterr().err)
    assert not (tmp_path / "run").exists()
