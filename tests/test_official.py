"""The paper's way, in small: an official-looking checkpoint, its tokenizer, IA3; against transformers + PEFT, and end to end."""

import copy
import json
import re
import resource
import subprocess
import sys

import numpy as np
import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file
from test_icrl import CHATML_MARKERS, LLAMA3_MARKERS, byte_tokenizer
from test_train import ENVIRONMENT, ROOT, refused, run

import train
from ia3 import IA3
from icrl import Encoder, QNetwork, collate, draw_set, encode_slice, load_run
from llama import LlamaConfig, load_llama, load_tokenizer

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 256,
}
PEFT = {"task_type": "CAUSAL_LM", "target_modules": ["k_proj", "v_proj", "down_proj"], "feedforward_modules": ["down_proj"]}
FLAGS = """--dtype float32 --tokens 1100 --max-steps 50 --batch 2 --steps 40 --collection-steps 40 --lakes 20 --episodes 40
    --reward-scale 1 --trials 3 --checkpoint-every 20 --look-every 30""".split()
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")  # PEFT calls what transformers has renamed


def save_checkpoint(folder, markers):
    """A small random Llama as transformers saves it, in three shards, with a tokenizer.json."""
    tokenizer = byte_tokenizer(markers)
    config = transformers.LlamaConfig(
        vocab_size=tokenizer.get_vocab_size(), hidden_size=64, intermediate_size=96, num_hidden_layers=2, initializer_range=0.2,
        num_attention_heads=4, num_key_value_heads=2, rope_parameters={"rope_theta": 500_000.0, **LLAMA3},
        max_position_embeddings=4096,
    )  # fmt: skip
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(config).save_pretrained(folder, max_shard_size="200KB")
    tokenizer.save(str(folder / "tokenizer.json"))
    assert len(list(folder.glob("*.safetensors"))) == 3
    return folder


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return save_checkpoint(tmp_path_factory.mktemp("official"), LLAMA3_MARKERS)


@pytest.fixture(scope="module")
def trained(checkpoint, tmp_path_factory):
    """An IA3 run on that checkpoint, and what it printed."""
    folder = tmp_path_factory.mktemp("runs") / "ia3"
    before = {path.name: path.read_bytes() for path in checkpoint.iterdir()}
    done = run("train.py", "--model", checkpoint, *FLAGS, "--out", folder)
    assert done.returncode == 0, done.stderr
    assert {path.name: path.read_bytes() for path in checkpoint.iterdir()} == before
    return folder, done.stdout


def slices(encoder, count=2, length=500):
    recipe = train.Recipe(lakes=4, episodes=40, sides=(3, 4), min_hops=2, easy_until=0.0, max_steps=20)
    rng = np.random.default_rng(0)
    lakes = train.random_lakes(4, rng, (3, 4), 2)
    env = train.FrozenLake(lakes, rng, max_steps=recipe.max_steps)
    played = train.roll_out(env, train.TabularQ(env, rng, lambda episode: 0.5 + 0 * episode), 40)
    sets = (draw_set(played[i % 4], rng) for i in range(1000))
    return collate([encode_slice(encoder, sets, length, gamma=0.9) for _ in range(count)])


# ------------------------------------------------------------------------------------------------ against transformers + PEFT


@pytest.mark.parametrize("normalised", [False, True], ids=["equation 7", "normalised"])
def test_a_training_step_is_that_of_transformers_and_peft(checkpoint, normalised):
    """Same weights, same slices, two PEFT adapters on one base: Q-values, loss and the gradient of every vector to 1e-4."""
    encoder = Encoder(load_tokenizer(checkpoint))
    batch, random = slices(encoder), torch.Generator().manual_seed(1)
    adapters = [IA3.for_llama(load_llama(checkpoint).config) for _ in range(2)]
    for vectors in (vector for adapter in adapters for vector in adapter.parameters()):
        vectors.data = 0.5 + torch.rand(vectors.shape, generator=random)

    ours = QNetwork(load_llama(checkpoint), encoder.action_tokens, adapters[0])
    training = train.Training(train.Recipe(model="a base", adapter="ia3", normalised=normalised, reward_scale=30.0), ours)
    training.delayed.adapter.load_state_dict(adapters[1].state_dict())
    loss, _, _ = training.evaluate(batch)
    loss.backward()

    theirs = transformers.LlamaForCausalLM.from_pretrained(checkpoint)
    theirs = peft.get_peft_model(theirs, peft.IA3Config(**PEFT), adapter_name="theta")
    theirs.add_adapter("phi", peft.IA3Config(**PEFT))
    for name, adapter in zip(("theta", "phi"), adapters):
        for layer, block in enumerate(theirs.base_model.model.model.layers):
            modules = (block.self_attn.k_proj, block.self_attn.v_proj, block.mlp.down_proj)
            for module, vectors in zip(modules, (adapter.key, adapter.value, adapter.feed_forward)):
                module.ia3_l[name].data = vectors[layer].detach().clone().view_as(module.ia3_l[name])
    q = {}
    for name in ("phi", "theta"):
        theirs.set_adapter(name)
        logits = theirs(batch.tokens).logits[..., torch.as_tensor(encoder.action_tokens)]
        q[name] = torch.stack([row[positions] for row, positions in zip(logits, batch.positions)])
    torch.testing.assert_close(ours(batch.tokens, batch.positions), q["theta"], atol=1e-4, rtol=1e-4)
    assert q["theta"].std() > 0.1

    total, count = 0.0, int(batch.mask.sum())
    for b in range(len(batch.tokens)):  # equations 4, 6 and 7 once more, position by position
        errors, targets = [], []
        for n in range(batch.mask.shape[1]):
            if batch.mask[b, n]:
                y = 30 * batch.rewards[b, n]
                if batch.discounts[b, n] > 0:
                    y = y + 0.9 * q["phi"][b, n + 1, q["theta"][b, n + 1].argmax()].detach()
                targets.append(y)
                errors.append(y - q["theta"][b, n, batch.actions[b, n]])
        scale = sum(targets) / len(targets) if normalised else 1.0
        total = total + sum((error / scale) ** 2 for error in errors) / count
    torch.testing.assert_close(loss, total, atol=1e-4, rtol=1e-4)
    total.backward()
    for layer, block in enumerate(theirs.base_model.model.model.layers):
        modules = (block.self_attn.k_proj, block.self_attn.v_proj, block.mlp.down_proj)
        for module, vectors in zip(modules, (ours.adapter.key, ours.adapter.value, ours.adapter.feed_forward)):
            expected = module.ia3_l["theta"].grad.flatten()
            torch.testing.assert_close(vectors.grad[layer], expected, atol=1e-4 * expected.abs().max().item(), rtol=0)


def test_slices_one_at_a_time_give_the_same_step(checkpoint):
    """Gradient accumulation and checkpointing change neither the step nor the row of the log, but for rounding."""
    encoder, outcomes = Encoder(load_tokenizer(checkpoint)), []
    batch = slices(encoder, count=3)
    for at_once, checkpointing in ((3, False), (2, False), (1, True)):
        llama = load_llama(checkpoint)
        network = QNetwork(llama, encoder.action_tokens, IA3.for_llama(llama.config))
        recipe = train.Recipe(model="a base", adapter="ia3", batch=3, muon_rate=0.0, at_once=at_once, checkpointing=checkpointing)
        training = train.Training(recipe, network)
        row = training.update(batch)
        outcomes.append((row, {name: vector.grad.clone() for name, vector in network.adapter.named_parameters()}))
    (row, gradients), *others = outcomes
    for other_row, other_gradients in others:
        assert other_row == pytest.approx(row, rel=1e-5)
        for name, gradient in gradients.items():
            torch.testing.assert_close(other_gradients[name], gradient, atol=1e-5 * gradient.abs().max().item(), rtol=0)


# --------------------------------------------------------------------------------------------------------------- end to end


def test_the_user_sees_what_the_model_sees(trained):
    """At the start: the choice of memory settings, the template, an example episode and its tokens."""
    folder, output = trained
    assert "40 steps of 2 x 1100 tokens" in output
    assert re.search(r"GB free on cpu, so 2 of 2 slices at once, without activation checkpointing", output)
    text = re.search(r"as the model sees it \(Llama 3's markers\): '(.*)'\n", output).group(1)
    assert text.startswith("<|begin_of_text|><|start_header_id|>observation<|end_header_id|>2<|eot_id|>")
    tokens = json.loads(re.search(r"tokens (\[.*\])", output).group(1))
    assert load_tokenizer(folder).encode(text, add_special_tokens=False).ids == tokens


def test_the_loss_falls_by_the_vectors_alone(trained):
    """The recipe is the paper's, the run holds no base, and the TD loss ends well below where it began."""
    folder, _ = trained
    assert not (folder / "model.safetensors").exists()
    recipe = json.loads((folder / "config.json").read_text())["icrl"]
    paper = {"learning_rate": 1e-2, "warm_up": 10, "gamma": 0.9, "alpha": 0.1, "weight_decay": 0.01, "muon_rate": 0, "clip": 0}
    assert {name: recipe[name] for name in paper} == paper
    losses = np.loadtxt(folder / "log.csv", delimiter=",", skiprows=1)[:, 1]
    assert len(losses) == 40
    assert losses[-10:].mean() < 0.6 * losses[:10].mean()


def test_an_interrupted_run_ends_with_the_same_adapter(checkpoint, trained, tmp_path):
    """Killed between its checkpoints and resumed: the vectors and the log are those of the run that was left alone."""
    folder, _ = trained
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "train.py"), "--model", str(checkpoint), *FLAGS, "--out", str(tmp_path / "run")],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=ENVIRONMENT,
    )  # fmt: skip
    log = tmp_path / "run" / "log.csv"
    while process.poll() is None and (not log.exists() or len(log.read_text().splitlines()) < 26):
        pass
    process.kill()
    process.wait()
    done = run("train.py", "--resume", tmp_path / "run", "--trials", 3)
    assert done.returncode == 0, done.stderr
    for name in ("adapter_model.safetensors", "state.safetensors"):
        ours, theirs = load_file(tmp_path / "run" / name), load_file(folder / name)
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    for name in ("log.csv", "curve.csv"):
        assert (tmp_path / "run" / name).read_text() == (folder / name).read_text()


def test_the_run_is_evaluated_and_its_adapter_loads_in_peft(checkpoint, trained, tmp_path):
    """eval.py replays it; PEFT on transformers reads its folder and gives its Q-values; merged, they stay."""
    folder, _ = trained
    done = run("eval.py", folder, "--trials", 3, "--out", tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "curve.csv").read_text() == (folder / "curve.csv").read_text()
    network, encoder, *_ = load_run(folder)
    batch = slices(encoder)
    q = network(batch.tokens, batch.positions)
    theirs = peft.PeftModel.from_pretrained(transformers.LlamaForCausalLM.from_pretrained(checkpoint), folder)
    assert theirs.peft_config["default"].base_model_name_or_path == str(checkpoint)
    logits = theirs(batch.tokens).logits[..., torch.as_tensor(encoder.action_tokens)]
    expected = torch.stack([row[positions] for row, positions in zip(logits, batch.positions)])
    torch.testing.assert_close(q, expected, atol=1e-4, rtol=1e-4)
    plain = QNetwork(load_llama(checkpoint), encoder.action_tokens)(batch.tokens, batch.positions)
    assert (plain - q).abs().max() > 0.1  # forty steps have changed something
    merged = copy.deepcopy(network.llama)
    network.adapter.merge(merged)
    torch.testing.assert_close(QNetwork(merged, encoder.action_tokens)(batch.tokens, batch.positions), q, atol=1e-4, rtol=1e-4)


def test_bf16_and_another_template_work_end_to_end(tmp_path):
    """The paper's type on a ChatML checkpoint, slices one by one with checkpointing."""
    folder = save_checkpoint(tmp_path, CHATML_MARKERS)
    flags = [*FLAGS, "--dtype", "bfloat16", "--steps", 4, "--at-once", 1, "--checkpointing", "--normalised"]
    done = run("train.py", "--model", folder, *flags, "--out", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    assert "ChatML's markers" in done.stdout
    network, _, recipe, _ = load_run(tmp_path / "run")
    assert network.llama.vocabulary.dtype == torch.bfloat16
    assert all(vector.dtype == torch.float32 for vector in network.adapter.parameters())
    assert recipe["checkpointing"] is True


def test_bad_bases_end_with_one_sentence(checkpoint, trained, tmp_path):
    """What cannot be a base is refused with exit code 2, before anything is written."""
    out = ("--out", tmp_path / "run")
    config = json.loads((checkpoint / "config.json").read_text())

    def base(**changes):
        (tmp_path / "base").mkdir(exist_ok=True)
        (tmp_path / "base" / "config.json").write_text(json.dumps(config | changes))
        return run("train.py", "--model", tmp_path / "base", *FLAGS, *out)

    refused(base(model_type="qwen2"), "model_type llama", "qwen2")
    refused(base(attention_bias=True), "attention_bias = True")
    refused(base(quantization_config={"bits": 4}), "quantised")
    refused(base(rope_parameters={"rope_type": "yarn", "rope_theta": 1e4}), "yarn")
    refused(base(), "has no tokenizer.json")
    refused(run("train.py", "--model", trained[0], *FLAGS, *out), "is itself an adapter")
    refused(run("train.py", "--model", checkpoint, *FLAGS, "--adapter", "none", *out), "--learning-rate")
    refused(run("train.py", "--model", checkpoint, *FLAGS, "--dtype", "int8", *out), "--dtype")
    refused(run("train.py", "--model", checkpoint, *FLAGS, "--tokens", 400, *out), "400 tokens of context are too few")
    refused(run("train.py", "--model", checkpoint, *FLAGS, "--tokens", 4097, *out), "at most --tokens 4096")
    assert not (tmp_path / "run").exists()


# --------------------------------------------------------------------------------------------------------------------- plan


def test_the_plan_of_the_papers_run():
    """The numbers of parameters, and by hand: bf16 weights, 128 KiB of cache a token, 15 GFLOPs a token and pass."""
    plan = train.Plan.of(train.PAPER, LlamaConfig())
    assert (plan.trained, plan.frozen) == (524_288, 8_030_261_248)
    assert plan.weights == 2 * 8_030_261_248
    assert plan.cache == 2 * 32 * 8 * 128 * 2 * 4096  # keys and values, layers, heads, head size, bytes, tokens
    layer = 2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 14_336  # q and o, k and v, three of the MLP
    attention = 2 * 32 * 128 * 2 * 2048  # two products over all heads, with 2,048 past tokens on average
    spared = (2 * 4096 * 4096 + 3 * 4096 * 14_336) // 2  # the last layer's q, o and MLP for the tokens that are not read
    assert plan.forward_flops == pytest.approx(32 * (2 * layer + attention) - 2 * spared, rel=1e-4)
    fewer = train.Plan.of(train.PAPER, LlamaConfig(), every=8)
    assert plan.forward_flops - fewer.forward_flops == pytest.approx(2 * 2 * spared * (7 / 8 - 1 / 2), rel=1e-4)
    assert plan.fit(24 * 10**9, 10)[1]  # with checkpointing
    assert not plan.fit(80 * 10**9, 10)[1]
    assert plan.fit(16 * 10**9, 10) is None
    assert plan.peak(1, True) < 24e9


def test_plan_prints_without_weights(tmp_path):
    """--plan needs the config.json alone."""
    (tmp_path / "config.json").write_text(json.dumps(LlamaConfig().to_dict()))
    done = run("train.py", "--model", tmp_path, "--plan")
    assert done.returncode == 0, done.stderr
    assert "524,288 trained, 8,030,261,248 frozen" in done.stdout
    assert re.search(r"GPU of 16 GB:  too small\n", done.stdout)
    assert re.search(r"GPU of 24 GB:  \d of 10 slices at once, checkpointing; \d+ trials side by side\n", done.stdout)


MEASURE = """
import torch, train
from ia3 import IA3
from icrl import QNetwork
from llama import Llama, LlamaConfig
config = LlamaConfig(512, 512, 1536, 6, 8, 4, 64)
recipe = train.Recipe(model="a base", adapter="ia3", tokens=2048, batch=1, checkpointing={checkpointing})
network = QNetwork(Llama(config), range(4), IA3.for_llama(config))
network.llama.checkpointing = recipe.checkpointing
def resident():
    return 4096 * int(open("/proc/self/statm").read().split()[1])
def forward(tokens):
    return network(torch.zeros(1, tokens, dtype=torch.long), torch.arange(0, tokens, 2)[None])
forward(2048).sum().backward()  # what the first pass allocates once and for all
before = resident()
q = forward(2048)
allocated = resident() - before
plan = train.Plan.of(recipe, config)
print(allocated, {figure})
"""


BETWEEN_PASSES = [(False, "plan.activations"), (True, "plan.checkpointed - plan.activations // 6")]  # without a layer's own


@pytest.mark.parametrize(("checkpointing", "figure"), BETWEEN_PASSES)
def test_the_planned_activations_are_what_torch_allocates(checkpointing, figure):
    """Between forward and backward pass the process is larger by the planned bytes, to 3 %."""
    program = MEASURE.format(checkpointing=checkpointing, figure=figure)
    environment = {"OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stderr
    allocated, planned = map(int, done.stdout.split())
    assert allocated > 20 * resource.getpagesize()
    assert planned == pytest.approx(allocated, rel=0.03)
