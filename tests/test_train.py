"""Runs: what train.py and eval.py promise a user, tried from outside with a small recipe."""

import csv
import json
import os
import platform
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import eval as evaluation
import train
from frozen_lake import FrozenLake, RandomPlayer, random_lakes, roll_out
from icrl import COMPACT_TEMPLATE, Encoder, compact_tokenizer, load_run

ROOT = Path(__file__).parent.parent
SMALL = """--layers 1 --width 16 --heads 2 --feed-forward 24 --lakes 24 --episodes 40 --collection-steps 5 --tokens 96
    --max-steps 20 --batch 4 --steps 24 --sides 3 4 --min-hops 3 --trials 10 --checkpoint-every 3
    --look-every 8"""
SMALL = SMALL.split()


ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}  # equal to the last bit on one CPU set-up


def command(program: str, *arguments) -> list[str]:
    return [sys.executable, str(ROOT / program), *map(str, arguments)]


def run(program: str, *arguments, cwd=None) -> subprocess.CompletedProcess:
    return subprocess.run(command(program, *arguments), capture_output=True, text=True, env=ENVIRONMENT, cwd=cwd, timeout=300)


@pytest.fixture(scope="session")
def finished(tmp_path_factory) -> Path:
    """A small run, trained to its end in a process of its own."""
    folder = tmp_path_factory.mktemp("runs") / "small"
    done = run("train.py", *SMALL, "--out", folder)
    assert done.returncode == 0, done.stderr
    (folder / "stdout.txt").write_text(done.stdout)
    return folder


def test_a_run_leaves_what_it_promises(finished):
    """Config, tokenizer, weights, state, a log row a step, curve.csv by the contract, curve.png; nothing half-written."""
    names = {p.name for p in finished.iterdir()} - {"stdout.txt"}
    expected = "config.json tokenizer.json model.safetensors state.safetensors log.csv curve.csv curve.png"
    assert names == set(expected.split())
    log = list(csv.DictReader((finished / "log.csv").read_text().splitlines()))
    assert [int(row["step"]) for row in log] == list(range(1, 25))
    assert (finished / "curve.png").read_bytes().startswith(b"\x89PNG")
    lines = (finished / "curve.csv").read_text().splitlines()
    assert lines[0] == "experiment,player,episode,mean_return,ci_low,ci_high,trials"
    rows = list(csv.DictReader(lines))
    players = ["transformer in context", "systematic explorer", "tabular Q-learning", "uniform random"]
    assert [(r["experiment"], r["player"], int(r["episode"])) for r in rows] == [
        ("unseen", p, e) for p in players for e in range(30)
    ]
    for row in rows:
        low, mean, high = (float(row[k]) for k in ("ci_low", "mean_return", "ci_high"))
        assert 0 <= low <= mean <= high <= 1
        assert row["trials"] == "10"


def test_training_moves_every_weight_and_the_loss_falls():
    """In two hundred steps: the TD loss ends below where it began, and the delayed network has followed."""
    recipe = train.Recipe(
        layers=1, width=32, heads=2, feed_forward=64, lakes=40, episodes=40, collection_steps=20, tokens=96, max_steps=20,
        batch=8, steps=200, sides=(3, 3), min_hops=2, easy_until=0.0, learning_rate=3e-3,
    )  # fmt: skip
    encoder = Encoder(compact_tokenizer(), COMPACT_TEMPLATE)
    training = train.Training(recipe, train.new_network(recipe, encoder))
    before = {name: p.detach().clone() for name, p in training.online.trained().items()}
    stream = train.batches(encoder, training)
    losses = [training.update(next(stream))["loss"] for _ in range(200)]
    assert np.mean(losses[-20:]) < 0.7 * np.mean(losses[:20])
    assert all(not torch.equal(before[name], p) for name, p in training.online.trained().items())
    for name, p in training.delayed.trained().items():
        assert not torch.equal(p, before[name])


def test_the_screen_shows_progress_and_the_curve(finished):
    """A look at unseen lakes while training; at the end a plot and a table of all players."""
    text = (finished / "stdout.txt").read_text()
    assert len(re.findall(r"step (8|16): mean return on 32 unseen lakes", text)) == 2
    for player in evaluation.PLAYERS.keys() - {evaluation.UNFORCED}:
        assert player in text
    assert "curve.csv" in text
    assert "curve.png" in text


def test_the_same_seed_gives_the_same_log(finished, tmp_path):
    """Number for number; another seed gives another one."""
    again, other = tmp_path / "again", tmp_path / "other"
    assert run("train.py", *SMALL, "--out", again).returncode == 0
    assert run("train.py", *SMALL, "--out", other, "--seed", "1").returncode == 0
    for name in ("log.csv", "curve.csv"):
        assert (again / name).read_text() == (finished / name).read_text()
        assert (other / name).read_text() != (finished / name).read_text()


@pytest.mark.parametrize("seed", [0, 1])
def test_a_killed_run_goes_on_bit_for_bit(finished, tmp_path, seed):
    """SIGKILL at random moments, --resume each time: weights, state and log end as those of a run that was left alone."""
    chance, folder = random.Random(seed), tmp_path / "killed"
    arguments = [*SMALL, "--out", folder]
    for _ in range(3):
        process = subprocess.Popen(
            command("train.py", *arguments),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env=ENVIRONMENT,
        )
        target = chance.randrange(1, 20)  # kill soon after so many rows of the log
        while process.poll() is None:
            rows = len((folder / "log.csv").read_text().splitlines()) - 1 if (folder / "log.csv").exists() else 0
            if rows >= target:
                time.sleep(chance.random() * 0.05)
                process.send_signal(signal.SIGKILL)
                process.wait()
                break
            time.sleep(0.002)
        load_run(folder)  # whatever was there at that instant is whole
        load_file(folder / "state.safetensors")
        arguments = ["--resume", folder, "--trials", 10, "--checkpoint-every", 3, "--look-every", 8]
    done = run("train.py", *arguments)
    assert done.returncode == 0, done.stderr
    for name in ("model.safetensors", "state.safetensors"):
        ours, theirs = load_file(folder / name), load_file(finished / name)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[k], theirs[k]) for k in ours)
    for name in ("log.csv", "curve.csv"):
        assert (folder / name).read_text() == (finished / name).read_text()


def test_ctrl_c_saves_and_says_how_to_go_on(tmp_path):
    """SIGINT: the step is finished, a checkpoint written, and the exit code is the shell's for an interrupt."""
    folder = tmp_path / "stopped"
    process = subprocess.Popen(
        command("train.py", *SMALL, "--steps", "100000", "--checkpoint-every", "100000", "--out", folder),
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env=ENVIRONMENT,
    )
    while not (folder / "log.csv").exists() or len((folder / "log.csv").read_text().splitlines()) < 4:
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 130
    assert f"--resume {folder}" in output
    step = int(re.search(r"Stopped at step (\d+)", output).group(1))
    assert step == len((folder / "log.csv").read_text().splitlines()) - 1


def test_no_training_lake_is_a_test_lake():
    """Neither easy nor other lakes of a collection are, nor those that the network plays; unasked, some would be."""
    recipe = train.Recipe(
        layers=1, width=16, feed_forward=16, sides=(3, 3), min_hops=3, lakes=400, episodes=20, collection_steps=100, batch=1,
        steps=1000, late_from=0.0, own_trials=100, tokens=144,
    )  # fmt: skip
    encoder = Encoder(compact_tokenizer(), COMPACT_TEMPLATE)
    drawn = []
    original = train.random_lakes
    train.random_lakes = lambda *args, **settings: drawn.extend(lakes := original(*args, **settings)) or lakes
    try:
        training = train.Training(recipe, train.new_network(recipe, encoder))
        stream = train.batches(encoder, training)
        for _ in range(201):
            next(stream)
    finally:
        train.random_lakes = original
    assert len(drawn) == 1500
    assert not any(lake.is_test for lake in drawn)
    assert any(lake.is_test for lake in random_lakes(400, np.random.default_rng(0), (3, 3), 2))
    assert all(lake.is_test for lake in evaluation.test_lakes(300, (3, 3), 2))


def test_own_trials_are_what_the_network_does():
    """They fill a slice each; where nothing is forced, every action is the best of the network's Q-values in that transcript."""
    recipe = train.Recipe(layers=1, width=16, feed_forward=16, sides=(3, 3), own_trials=6, tokens=160, max_steps=30, windows=0.5)
    encoder = Encoder(compact_tokenizer(), COMPACT_TEMPLATE)
    network = train.new_network(recipe, encoder)
    trials = train.own_trials(recipe, np.random.default_rng(3), encoder, network)
    assert len(trials) == 6
    for number, trial in enumerate(trials):
        batch = train.encode_slice(encoder, iter([trial]), recipe.tokens, recipe.gamma)
        assert batch.tokens.shape == (1, recipe.tokens)
        best = network(batch.tokens, batch.positions).argmax(-1)
        assert bool((best == batch.actions).all()) == (number % 2 == 0)
        assert not batch.mask[0, -1] or batch.discounts[0, -1] == 0


def test_own_trials_are_drawn_as_often_as_asked():
    """A network whose Q-values are all equal goes left: with own = 1 the slices show it, before late_from they do not."""
    encoder = Encoder(compact_tokenizer(), COMPACT_TEMPLATE)

    def left(own: float, late_from: float) -> float:
        recipe = train.Recipe(
            layers=1, width=16, feed_forward=16, sides=(3, 3), own_trials=8, tokens=160, max_steps=30, batch=2,
            own=own, late_from=late_from, steps=640, collection_steps=64,
        )  # fmt: skip
        network = train.new_network(recipe, encoder)
        network.llama.lm_head.weight.detach()[encoder.action_tokens] = 0
        drawn = train.collect(recipe, 5, encoder, network)  # at half of the training
        return np.mean([(batch.actions[batch.mask] == 0).float().mean() for batch in drawn])

    late, never, mixed, always = left(1.0, 0.6), left(0.0, 0.0), left(0.5, 0.5), left(1.0, 0.5)
    assert late == never < 0.4
    assert never + 0.1 < mixed < always - 0.1
    assert always > 0.6  # the other half of the trials is mostly forced


def test_evaluation_replays_the_run_and_changes_no_file_of_it(finished, tmp_path):
    """eval.py RUN unseen: the same curve as at the end of training; every file of the run is as before."""
    before = {p.name: p.read_bytes() for p in finished.iterdir()}
    done = run("eval.py", finished, "unseen", "--trials", 10, "--out", tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "curve.csv").read_text() == (finished / "curve.csv").read_text()
    assert {p.name: p.read_bytes() for p in finished.iterdir()} == before


def test_the_shipped_run_gives_the_shipped_curve(tmp_path):
    """python eval.py without a run plays it; another processor may round differently, and so move single trials."""
    done = run("eval.py", "--out", tmp_path)
    assert done.returncode == 0, done.stderr
    shipped, replayed = (
        np.array([float(row["mean_return"]) for row in csv.DictReader(path.read_text().splitlines())]).reshape(4, 30)
        for path in (evaluation.SHIPPED / "curve.csv", tmp_path / "curve.csv")
    )
    assert np.abs(shipped - replayed).max() < 0.1  # a single episode, of 200 trials
    assert np.abs(shipped - replayed).mean() < 0.02


def test_watch_shows_lake_path_and_q_values(finished):
    """eval.py RUN --watch: thirty episodes, four Q-values a step, and the returns at the end."""
    done = run("eval.py", finished, "--watch")
    assert done.returncode == 0, done.stderr
    assert len(re.findall(r"^episode \d+: ", done.stdout, re.M)) == 30
    assert re.search(r"^ +\d+ ( +-?\d+\.\d{3}){4}   (left|down|right|up)", done.stdout, re.M)
    assert len(re.findall(r"^ended by (the goal, return 1|(a hole|the step limit), return 0)$", done.stdout, re.M)) == 30
    assert re.search(r"^returns: ([01] ){29}[01]$", done.stdout, re.M)
    assert "<" in done.stdout


@pytest.mark.parametrize("experiment", ["larger", "changing", "exploration", "stitching"])
def test_every_experiment_prints_and_writes(finished, tmp_path, experiment):
    """A table with every player, the CSV contract with as many episodes as the experiment has, and a picture."""
    done = run("eval.py", finished, experiment, "--trials", 4, "--out", tmp_path)
    assert done.returncode == 0, done.stderr
    rows = list(csv.DictReader((tmp_path / "curve.csv").read_text().splitlines()))
    episodes = {"changing": 60, "stitching": 5}.get(experiment, 30)
    players = list(dict.fromkeys(row["player"] for row in rows))
    assert [(r["experiment"], r["player"], int(r["episode"]), r["trials"]) for r in rows] == [
        (experiment, player, episode, "4") for player in players for episode in range(episodes)
    ]
    assert len(players) == (5 if experiment in ("exploration", "stitching") else 4)
    assert all(f"\n{player} " in done.stdout for player in players)
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")


def test_paths_are_printed_and_drawn(finished, tmp_path):
    """The first, the eleventh and the last episode of a trial, as text and as a picture."""
    done = run("eval.py", finished, "paths", "--out", tmp_path)
    assert done.returncode == 0, done.stderr
    assert re.findall(r"^episode (\d+), return [01]$", done.stdout, re.M) == ["0", "10", "29"]
    assert (tmp_path / "paths.png").read_bytes().startswith(b"\x89PNG")


def test_runs_are_compared_by_what_differs(finished, tmp_path):
    """Two runs on the same lakes: one curve each, named by folder and setting."""
    done = run("train.py", *SMALL, "--alpha", 0.5, "--trials", 1, "--out", tmp_path / "half")
    assert done.returncode == 0, done.stderr
    done = run("eval.py", "compare", finished, tmp_path / "half", "--trials", 5, "--out", tmp_path)
    assert done.returncode == 0, done.stderr
    rows = list(csv.DictReader((tmp_path / "curve.csv").read_text().splitlines()))
    references = ["systematic explorer", "tabular Q-learning", "uniform random"]
    assert list(dict.fromkeys(row["player"] for row in rows)) == ["small (alpha 0.1)", "half (alpha 0.5)", *references]


def test_given_paths_of_stitching_cross():
    """One legal path from a start into a hole, one from elsewhere to a goal; they meet, and neither begins on the other."""
    rng, found = np.random.default_rng(0), 0
    for lake in random_lakes(200, rng):
        if "".join(lake.rows).count("S") == 1 and (pair := evaluation.crossing_paths(lake, rng)):
            found += 1
            winning, losing = (episode.observations.tolist() for episode in pair)
            assert [lake.tiles[losing[0]], lake.tiles[losing[-1]], lake.tiles[winning[-1]]] == ["S", "H", "G"]
            assert set(winning[:-1]) & set(losing[:-1])
            assert winning[0] not in losing
            assert losing[0] not in winning
            assert not {lake.tiles[tile] for tile in winning[:-1] + losing[:-1]} & {"H", "G"}
            for episode, path in zip(pair, (winning, losing)):
                assert evaluation.along(lake, path[0], episode.actions).observations.tolist() == path
                assert episode.total == (path is winning)
    assert found > 30


def test_the_notebooks_stitching_lake():
    """Paper: episode 1 goes from tile 2 down to the goal at 22, episode 2 from tile 8 right into the hole at 11."""
    lake = evaluation.NOTEBOOK_LAKE
    assert evaluation.along(lake, 2, [1] * 5).observations.tolist() == [2, 6, 10, 14, 18, 22]
    assert evaluation.along(lake, 2, [1] * 5).total == 1
    assert evaluation.along(lake, 8, [2] * 3).observations.tolist() == [8, 9, 10, 11]
    assert (lake.tiles[8], lake.tiles[11]) == ("S", "H")


def test_ia3_on_a_saved_run_trains_the_vectors_alone(finished, tmp_path):
    """The base is bit-for-bit unchanged, the adapter's vectors are not ones any more, and eval plays the adapted network."""
    base = {p.name: p.read_bytes() for p in finished.iterdir()}
    folder = tmp_path / "adapted"
    done = run("train.py", "--adapter", "ia3", "--model", finished, "--steps", 12, "--trials", 10, "--out", folder)
    assert done.returncode == 0, done.stderr
    assert {p.name: p.read_bytes() for p in finished.iterdir()} == base
    assert {"adapter_config.json", "adapter_model.safetensors", "state.safetensors", "curve.csv"} <= {
        p.name for p in folder.iterdir()
    }
    assert not (folder / "model.safetensors").exists()
    network, _, recipe, _ = load_run(folder)
    assert recipe["learning_rate"] == 1e-2  # the paper's
    assert all(not torch.equal(p, torch.ones_like(p)) for p in network.adapter.parameters())
    theirs = load_file(finished / "model.safetensors")
    assert all(torch.equal(p, theirs[name]) for name, p in network.llama.state_dict().items())
    assert run("eval.py", folder, "unseen", "--trials", 5).returncode == 0
    vectors, state = load_file(folder / "adapter_model.safetensors"), load_file(folder / "state.safetensors")
    assert run("train.py", "--resume", folder, "--trials", 5).returncode == 0  # nothing is left to do, and nothing changes
    assert all(torch.equal(load_file(folder / "state.safetensors")[name], tensor) for name, tensor in state.items())
    assert all(torch.equal(load_file(folder / "adapter_model.safetensors")[name], tensor) for name, tensor in vectors.items())


def test_a_base_does_not_say_how_its_successor_is_computed():
    """The shipped run was compiled; what is trained on it is not, unless it is asked for."""
    assert train.read_recipe(evaluation.SHIPPED)["compile"]
    recipes = [train.recipe_of(train.parse(["--model", str(evaluation.SHIPPED), *flags])[1]) for flags in ((), ("--compile",))]
    assert [recipe.compile for recipe in recipes] == [False, True]


def test_a_base_can_be_trained_on_with_all_its_weights(finished, tmp_path):
    """--model RUN --adapter none goes on from the base's weights in a run of its own, the next free number under runs/."""
    done = run("train.py", "--model", finished, "--adapter", "none", "--steps", 2, "--trials", 1, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    ours, theirs = (load_file(f / "model.safetensors") for f in (tmp_path / "runs" / "1", finished))
    distance = sum((ours[name] - theirs[name]).square().sum() for name in ours) / sum(t.square().sum() for t in theirs.values())
    assert 0 < distance < 0.1  # two steps away from the base, not from new weights
    assert run("train.py", *SMALL, "--steps", 1, "--trials", 1, cwd=tmp_path).returncode == 0
    assert (tmp_path / "runs" / "2" / "curve.csv").exists()


def test_without_matplotlib_everything_but_the_picture_is_there(finished, tmp_path, monkeypatch, capsys):
    """One line says how to get it."""
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    rng = np.random.default_rng(0)
    env = FrozenLake(random_lakes(3, rng), rng)
    evaluation.report(tmp_path, "unseen", "3 lakes", {"uniform random": roll_out(env, RandomPlayer(env, rng), 30)})
    assert {p.name for p in tmp_path.iterdir()} == {"curve.csv"}
    assert "pip install matplotlib" in capsys.readouterr().out


def test_quality_and_minutes_are_settings_of_the_recipe(tmp_path):
    """--minutes sets the steps by a rehearsal; --quality is kept in the run's config.json."""
    folder = tmp_path / "timed"
    flags = [f for f, before in zip(SMALL, ["", *SMALL]) if "--steps" not in (f, before)]
    done = run("train.py", *flags, "--minutes", 0.02, "--quality", "high", "--out", folder)
    assert done.returncode == 0, done.stderr
    recipe = json.loads((folder / "config.json").read_text())["icrl"]
    assert recipe["quality"] == "high"
    assert recipe["steps"] == len((folder / "log.csv").read_text().splitlines()) - 1
    assert 1 < recipe["steps"] < 2000


FREED_AND_WANTED_AGAIN = """
import resource
import torch
import train
{keep}
for begin in (True, False):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        [torch.ones(2**20) for _ in range(8)]
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def test_freed_memory_is_kept():
    """Eight tensors of 4 MiB, freed and made anew ten times: page faults for each of their pages, or for hardly any."""
    by_default, faults = {"MALLOC_TRIM_THRESHOLD_": "131072", "MALLOC_MMAP_THRESHOLD_": "131072"}, []
    for keep in ("", "train.keep_freed_memory()"):
        program = [sys.executable, "-c", FREED_AND_WANTED_AGAIN.format(keep=keep)]
        done = subprocess.run(program, cwd=ROOT, env=os.environ | by_default, capture_output=True, text=True, check=True)
        faults.append(int(done.stdout))
    assert faults[1] < 0.1 * faults[0] or platform.libc_ver()[0] != "glibc", faults


# ----------------------------------------------------------------------------------------------------------- bad input


def refused(done: subprocess.CompletedProcess, *words: str) -> None:
    """Exit code 2, one sentence on stderr that names the problem, no traceback."""
    last = done.stderr.strip().splitlines()[-1]
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert re.match(r"(train|eval)\.py: ", last), done.stderr
    for word in words:
        assert word in last, last


def test_bad_input_ends_with_one_sentence(finished, tmp_path):
    """Missing and foreign runs, damaged files, sizes out of range, an unwritable place: exit code 2 and what to do."""
    new = ("--out", tmp_path / "new")
    refused(run("eval.py", tmp_path / "nothing"), "nothing is neither a run's folder nor one of unseen, larger")
    refused(run("eval.py", finished, "unseen", "larger"), "One experiment and one run at a time")
    refused(run("eval.py", finished, finished), "One experiment and one run at a time")
    refused(run("eval.py", finished, "--watch", "--lake", -1), "no --lake -1")
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "config.json").write_text('{"model_type": "bert"}')
    refused(run("eval.py", tmp_path / "foreign"), "foreign is no run of train.py")
    refused(run("train.py", "--resume", tmp_path / "nothing"), "is no run of train.py")
    shutil.copytree(finished, damaged := tmp_path / "damaged")
    for name in ("model.safetensors", "state.safetensors"):
        content = (finished / name).read_bytes()
        (damaged / name).write_bytes(content[: len(content) // 2])
    refused(run("eval.py", damaged), "model.safetensors is damaged")
    shutil.copy(finished / "model.safetensors", damaged)
    refused(run("train.py", "--resume", damaged, "--trials", 10), "state.safetensors is damaged")
    refused(run("train.py", *SMALL, "--sides", 1, 3, *new), "2 to 10 tiles")
    refused(run("train.py", *SMALL, "--min-hops", 30, *new), "30 hops away does not fit")
    refused(run("train.py", *SMALL, "--tokens", 20, *new), "20 tokens of context are too few")
    refused(run("train.py", *SMALL, "--batch", 0, *new), "--batch has to be at least 1")
    refused(run("train.py", *SMALL, "--gamma", 1.5, *new), "--gamma has to be between 0 and 1")
    refused(run("train.py", *SMALL, "--quality", "best", *new), "--quality is high, mid or low")
    refused(run("train.py", *SMALL, "--heads", 3, *new), "--width 16")
    refused(run("train.py", *SMALL, "--trials", 0, *new), "--trials have to be at least 1")
    refused(run("train.py", "--adapter", "ia3", *new), "--model")
    refused(run("train.py", "--dtype", "bfloat16", *new), "--dtype is about a base")
    refused(run("train.py", "--at-once", 2, *new), "--at-once and --checkpointing", "together")
    shutil.copytree(finished, old := tmp_path / "old")
    config = json.loads((finished / "config.json").read_text())
    (old / "config.json").write_text(json.dumps(config | {"icrl": config["icrl"] | {"held_out": 1}}))
    refused(run("train.py", "--resume", old), "another version", "held_out")
    refused(run("train.py", "--model", old, *new), "another version", "held_out")
    del config["icrl"]["dtype"]
    (old / "config.json").write_text(json.dumps(config))
    refused(run("eval.py", old), "another version", "dtype")
    refused(run("train.py", "--resume", finished, "--steps", 5), "leave out --steps")
    refused(run("train.py", "--model", finished, "--width", 8, *new), "leave out --width")
    refused(run("train.py", *SMALL, "--look-every", 0, *new), "--look-every")
    refused(run("train.py", *SMALL, "--minutes", 1, *new), "without --steps")
    refused(run("train.py", *SMALL, "--clip", -1, *new), "--clip has to be at least 0")
    refused(run("train.py", *SMALL, "--device", "cuda", *new), "no device 'cuda'")
    assert not (tmp_path / "new").exists()  # a refused run leaves nothing behind
    refused(run("train.py", *SMALL, "--out", finished), "is not empty")
    refused(run("eval.py", finished, "--trials", 0), "at least one trial")
    refused(run("eval.py", finished, "--context", 10, "--trials", 1), "10 tokens of context are too few")
    (tmp_path / "file").write_text("")
    refused(run("train.py", *SMALL, "--out", tmp_path / "file" / "run"), "file")
    refused(run("eval.py", finished, "--trials", 1, "--out", tmp_path / "file"), "file cannot be read or written")
    (tmp_path / "taken" / "curve.csv").mkdir(parents=True)
    refused(run("eval.py", finished, "--trials", 1, "--out", tmp_path / "taken"), "curve.csv")


def test_a_loss_that_turns_nan_keeps_the_last_good_checkpoint(tmp_path):
    """An absurd learning rate: exit code 2, one sentence, and the checkpoint on disk has finite weights."""
    folder = tmp_path / "nan"
    done = run("train.py", *SMALL, "--learning-rate", "1e30", "--warm-up", "1", "--checkpoint-every", "1", "--out", folder)
    refused(done, " is nan after 1 steps", "lower the learning rates")
    assert all(torch.isfinite(t).all() for t in load_file(folder / "state.safetensors").values())
    assert run("eval.py", folder, "--trials", 2, "--out", tmp_path / "played").returncode == 0
    again = run("train.py", "--resume", folder, "--trials", 2)
    refused(again, " is nan after 1 steps")  # at the same step, since a resumed run goes the same way


# ------------------------------------------------------------------------------------------------------------- results


def test_wilson_interval_against_published_values():
    """Newcombe (1998), table I, method 3 (score): 81 of 263, 15 of 148, 0 of 20, 1 of 29."""
    for hits, trials, low, high in (
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ):
        ours = evaluation.wilson(np.array(hits / trials), trials)
        assert ours == pytest.approx((low, high), abs=1e-4)


def test_text_plot_puts_each_player_where_its_mean_is():
    """The transformer at 1.0 in the top row, the random player at 0.0 in the bottom row."""
    returns = {"transformer in context": np.ones((3, 5)), "uniform random": np.zeros((3, 5))}
    lines = evaluation.text_plot(returns, height=5).splitlines()
    assert lines[0].startswith(" 1.0 |T T T T T")
    assert lines[4].startswith(" 0.0 |r r r r r")


def test_compiled_passes_are_the_same(tmp_path):
    """--compile: the log as without it, to fp32 rounding; where there is no compiler, one sentence says so."""
    plain, compiled = tmp_path / "plain", tmp_path / "compiled"
    settings = [*SMALL, "--steps", 6, "--trials", 1]
    assert run("train.py", *settings, "--out", plain).returncode == 0
    done = run("train.py", *settings, "--compile", "--out", compiled)
    if not (shutil.which("g++") or shutil.which("clang++")):
        return refused(done, "leave out --compile")
    assert done.returncode == 0, done.stderr
    ours, theirs = (np.loadtxt(folder / "log.csv", delimiter=",", skiprows=1) for folder in (compiled, plain))
    np.testing.assert_allclose(ours, theirs, rtol=1e-3, atol=1e-5)


def torchrun(processes: int, program: Path, *arguments) -> subprocess.CompletedProcess:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    command_line = [*launcher, str(program), *map(str, arguments)]
    return subprocess.run(command_line, capture_output=True, text=True, env=ENVIRONMENT, timeout=300)


def test_two_processes_learn_as_one(tmp_path):
    """torchrun: every number of the log and every weight as by one process, to the rounding of sums in another order."""
    one, two = tmp_path / "one", tmp_path / "two"
    settings = [*SMALL, "--batch", 3, "--steps", 16, "--late-from", 0.5]
    assert run("train.py", *settings, "--out", one).returncode == 0
    done = torchrun(2, ROOT / "train.py", *settings, "--out", two)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("uniform random") == 2  # the plot and the table, once
    ours, theirs = (np.loadtxt(folder / "log.csv", delimiter=",", skiprows=1) for folder in (two, one))
    assert ours.shape == theirs.shape == (16, 6)
    np.testing.assert_allclose(ours, theirs, rtol=1e-3, atol=1e-5)
    ours, theirs = (load_file(folder / "state.safetensors") for folder in (two, one))
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, rtol=1e-3, atol=2e-3, msg=name)  # Muon computes in bfloat16
    assert len((two / "curve.csv").read_text().splitlines()) == len((one / "curve.csv").read_text().splitlines()) == 121


def test_a_batch_smaller_than_the_group_is_refused(tmp_path):
    done = torchrun(2, ROOT / "train.py", *SMALL, "--batch", 1, "--out", tmp_path / "run")
    assert done.returncode != 0
    assert "2 processes cannot share a batch of 1 slices" in done.stderr
    assert not (tmp_path / "run").exists()


def test_processes_divide_the_trials_of_an_evaluation(finished, tmp_path):
    """Each plays its part; where neither coin nor start is random, the trials are those of one process, in order."""
    program = tmp_path / "program.py"
    program.write_text(
        f"""import json, os, sys
sys.path.insert(0, {str(ROOT)!r})
from eval import always, by_network, join_others, rank_of, test_lakes
from icrl import load_run
join_others("cpu")
lakes = [lake for lake in test_lakes(60, (3, 4), 3) if str(lake).count("S") == 1][:7]
played = by_network(load_run({str(finished)!r}), lakes, 0, 4, probability=always)
with open(f"{tmp_path}/{{rank_of()[1]}}-{{rank_of()[0]}}.json", "w") as file:
    json.dump([[episode.observations.tolist() for episode in trial] for trial in played], file)
"""
    )
    for processes in (1, 2):
        done = torchrun(processes, program)
        assert done.returncode == 0, done.stderr
    alone, first, second = ((tmp_path / f"{name}.json").read_text() for name in ("1-0", "2-0", "2-1"))
    assert alone == first == second
    assert len(json.loads(alone)) == 7
