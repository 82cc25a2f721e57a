"""Runs: what train.py and eval.py promise a user, tried with a small recipe."""

import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from unittest.mock import Mock, patch
from zlib import crc32

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from matplotlib.quiver import Quiver
from PIL import Image
from torch._dynamo.utils import counters
from torch.utils._pytree import tree_map_only

import eval as evaluation
import frozen_lake
import train
from frozen_lake import DIRECTIONS, NOTEBOOK_LAKE, Episode, RandomAgent, make_env, random_lakes
from frozen_lake import rollout
from icrl import PRETRAINED, always_greedy, encode_slice, greedy_probability, load_run, td_loss
from icrl import td_targets

ROOT = Path(train.__file__).parent
SMALL = """--layers 1 --width 16 --heads 2 --lakes 24 --episodes 40 --tokens 64 --max-steps 10
    --batch 4 --steps 30 --collection-steps 5 --final-from 0.4 --on-policy 0.5 --cropped 0.5
    --max-side 4 --goal-distance 3 --far-goals 0.2 --shuffled 0.3 --slippery 0.2 --final-tokens 128
    --eval-every 100 --trials 3""".split()
SCHEDULES = {"greedy": always_greedy, "with the exploration schedule": greedy_probability}
BASELINES = ["systematic explorer", "tabular Q-learning", "uniform random"]
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
torch.set_num_threads(1)  # runs are equal to the last bit only with the same number of threads
INTERRUPT = """import os, runpy, signal as signals, sys, icrl
signals.signal(2, signals.default_int_handler)  # a shell's background jobs ignore Ctrl-C
function, call, signal = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
owner, calls = os if function == "replace" else icrl, []
def interrupted(*arguments, original=getattr(owner, function)):
    calls.append(function)
    return os.kill(os.getpid(), signal) if len(calls) == call else original(*arguments)
setattr(owner, function, interrupted)
del sys.argv[:4]
runpy.run_path(sys.argv[0], run_name="__main__")"""
FIRST = [("replace", 9, 0), ("polyak_update", 3, 0)]  # in the first checkpoint, and before it
INTERRUPTED = [  # settings; at which call of which function, and at which step it then continues
    ("NEW", [*FIRST, ("replace", 5, 5), ("replace", 18, 25), ("replace", 5, 30)]),
    ("NEW --on-policy 0 --steps 60 --collection-steps 20", [("polyak_update", 54, 50)]),
    ("--model RUN --steps 15", [("polyak_update", 5, 0), ("polyak_update", 13, 10)]),
]
EXPERIMENTS = [(experiment, "A") for experiment in [*evaluation.TITLES][:8]]
EXPERIMENTS += [("unseen", "AB"), ("changing", "AB"), ("stitching", "AB")]
BAD = """eval.py tsitching; eval.py shuffeld runs/1; eval.py RUN; eval.py watch RUN RUN;
    eval.py policy_map RUN RUN; eval.py unseen TMP/nothing; eval.py unseen RUN larger;
    eval.py graphs RUN --skip -2; eval.py graphs RUN --trials 0; eval.py watch RUN --lake -1;
    train.py --out RUN; eval.py unseen RUN --device nonsense; eval.py unseen RUN --context -5;
    eval.py unseen RUN --trials 1 --out TMP/file; eval.py unseen RUN --context 20;
    train.py --resume TMP/nothing; train.py --resume RUN --steps 5;
    train.py --out TMP/file/run; train.py --model RUN --width 8;
    train.py --model RUN --muon-rate 1; train.py NEW --max-side 11;
    train.py NEW --goal-distance 0; train.py NEW --final-tokens 20; train.py NEW --gamma 1.5;
    train.py NEW --shuffled 2; train.py NEW --final-tokens -1; train.py NEW --batch 0;
    train.py NEW --learning-rate nan; eval.py unseen RUN --skip -1; eval.py unseen RUN --trials 0;
    train.py NEW --quality best; train.py NEW --heads 20; train.py NEW --tokens 2;
    train.py NEW --device nonsense; train.py NEW --eval-every 0; train.py NEW --trials 0;
    train.py NEW --steps many;
    train.py NEW --learning-rate 4e9 --warm-up 1 --collection-steps 1"""
CUT = ["recipe.json", "config.json", "tokenizer.json", "model.safetensors", "state.pt"]
CASES = [(command, None) for command in re.split(r";\s+", BAD)]
CASES += [("train.py --resume RUN", damage) for damage in CUT]


def go(module, *arguments):
    module.main([*map(str, arguments)])


def status_of(command: str, **folders) -> int:
    """The exit status of one of the six files. Some words of the command stand for folders."""
    words = [str(folders.get(word, word)) for word in shlex.split(command)]
    with patch.object(sys, "argv", words):
        try:
            runpy.run_path(str(ROOT / words[0]), run_name="__main__")
        except SystemExit as end:
            return end.code or 0
    return 0


def python(*arguments, status: int = 0) -> str:
    command = [sys.executable, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, timeout=200)
    assert (done.returncode, "Traceback" in done.stderr) == (status, False), done.stderr
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    go(train, *SMALL, "--out", folder := tmp_path_factory.mktemp("runs") / "small")
    return folder


def contents(folder: Path) -> dict:
    """A checksum of each file by its path in the folder; of state.pt its values, if it is whole."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    found = {str(path.relative_to(folder)): crc32(path.read_bytes()) for path in files}
    with suppress(OSError, RuntimeError):
        state = torch.load(folder / "state.pt", weights_only=True)
        found["state.pt"] = tree_map_only(torch.Tensor, lambda x: (x.dtype, x.tolist()), state)
    return found


def rows_of(path: Path) -> np.ndarray:
    return np.loadtxt(path, delimiter=",", dtype=str, quotechar='"')


def test_a_run_leaves_what_it_promises(finished):
    """Eight files, no temporary ones; a log row per step; a curve with intervals around means."""
    names = "recipe.json config.json tokenizer.json model.safetensors state.pt log.csv"
    assert contents(finished).keys() == {*names.split(), "unseen/curve.csv", "unseen/curve.png"}
    log, curve = rows_of(finished / "log.csv"), rows_of(finished / "unseen" / "curve.csv")
    assert ",".join(log[0]) == "step,loss,mean_q,mean_target,learning_rate,gradient_norm"
    assert log[1:, 0].tolist() == [*map(str, range(1, 31))]
    assert ",".join(curve[0]) == "experiment,agent,episode,mean_return,ci_low,ci_high,trials"
    mean, low, high = curve[1:, 3:6].T.astype(float)
    assert np.all((low >= 0) & (low <= mean) & (mean <= high) & (high <= 1))


@pytest.mark.parametrize(("settings", "places"), INTERRUPTED)
def test_interrupted_anywhere_a_run_continues_bit_for_bit(finished, tmp_path, settings, places):
    """Killed within a collection, or before a file is written. The last time it is Ctrl-C."""
    folder = tmp_path / "run"
    settings = settings.replace("NEW", " ".join(SMALL)).replace("RUN", str(finished)).split()
    go(train, *settings, "--trials", 3, "--out", tmp_path / "whole" / "run")
    settings += ["--out", folder]
    for place in places:
        signal, status = (2, 130) if place == places[-1] else (9, -9)
        python("-c", INTERRUPT, *place[:2], signal, ROOT / "train.py", *settings, status=status)
        assert torch.load(folder / "state.pt", weights_only=True)["step"] == place[2]
        settings = ["--resume", folder, "--trials", 3]
    go(train, *settings)
    assert contents(folder) == contents(tmp_path / "whole" / "run")


def test_ia3_trains_only_the_vectors_and_evaluation_repeats_curves(finished, tmp_path):
    """No weight and no file of the base changes. All vectors do. Evaluation repeats the files."""
    before, folder = contents(finished), tmp_path / "adapted"
    go(train, "--model", finished, "--steps", 12, "--trials", 3, "--out", folder)
    adapter = {"adapter_config.json", "adapter_model.safetensors"}
    assert before.keys() - contents(folder).keys() == {"config.json", "model.safetensors"}
    assert contents(folder).keys() - before.keys() == adapter
    run, base = load_run(folder), load_run(finished)
    assert base.recipe.easy_until > run.recipe.easy_until == 0  # a base knows easy lakes
    base = base.network.llama.state_dict()
    assert all((vectors != 1).any(1).all() for vectors in run.network.adapter.parameters())
    assert all(torch.equal(w, base[name]) for name, w in run.network.llama.state_dict().items())
    for run, files in ((finished, before), (folder, contents(folder))):
        go(evaluation, "unseen", run, "--trials", 3, "--out", out := tmp_path / f"{run.name}-again")
        assert contents(run) == files
        assert contents(out) == {n: files[f"unseen/{n}"] for n in ("curve.csv", "curve.png")}


@pytest.mark.parametrize("final", [0, 128])
def test_a_run_with_long_slices_is_a_base_too(tmp_path, final):
    """Its config.json names their length, so --model does not refuse it."""
    short = ("--steps", 1, "--collection-steps", 1, "--trials", 1)
    go(train, *SMALL, *short, "--tokens", 2500, "--final-tokens", final, "--out", tmp_path / "base")
    go(train, "--model", tmp_path / "base", *short, "--out", tmp_path / "adapted")
    assert load_run(tmp_path / "adapted").recipe.context == (final or 2500)


def test_no_lake_of_a_training_is_a_test_lake(finished, monkeypatch):
    """Neither easy lakes, nor far goals, nor on-policy trials, among few lakes. No graph occurs."""
    run = load_run(finished)
    monkeypatch.setattr(train, "make_env", spy := Mock(wraps=make_env))
    run = run._replace(recipe=replace(run.recipe, max_side=3, goal_distance=1, lakes=200))
    early, final = next(train.collect(run, 0)), next(train.collect(run, 5))
    assert (early.tokens.shape, final.tokens.shape) == ((4, 64), (2, 128))  # as many tokens
    seen = [lake for call in spy.mock_calls for lake in call.args[0]]
    tests = set(evaluation.unseen_lakes(3000, (3, 3), 2))
    others = random_lakes(200, np.random.default_rng(0), (3, 3), 2, test=True)
    assert len(seen) > 400
    assert len(tests & set(others)) > 50
    assert not tests & set(seen)
    assert not any(lake.links for lake in seen)


def test_too_few_lakes_for_the_last_evaluation_are_refused_at_the_start(tmp_path, monkeypatch):
    """Though there are enough for the training. No folder is made."""
    monkeypatch.setattr(frozen_lake, "BLOCK_TILES", 64)  # so that few lakes are found, but quickly
    monkeypatch.setattr(train, "new_lakes", Mock())
    with pytest.raises(ValueError, match=r"^There are too few lakes of 3 to 4 [^.]*\.$"):
        go(train, *SMALL, "--trials", 5000, "--out", tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_on_policy_trials_are_the_networks_and_as_many_as_asked(finished, monkeypatch):
    """On every second lake each action is the best. To count them, "left" is made the best."""
    run = load_run(finished)
    for parameter in run.network.parameters():
        parameter.data *= 3 if parameter.ndim == 2 else 1  # Q-values that differ
    trials = []
    monkeypatch.setattr(train, "rollout", lambda *a, **k: trials.extend(rollout(*a, **k)) or trials)
    drawn = train.on_policy_trials(run, 3)
    monkeypatch.undo()
    for number, trial in enumerate(trials):
        batch = encode_slice(run.tokenizer, iter([trial]), 64, 0.9)
        q = run.network(batch.tokens[None], batch.positions[None])[0]  # (N, A)
        worse = (q.max(1).values - q.gather(1, batch.actions[:, None])[:, 0])[batch.mask]
        assert len(batch.tokens) > 50
        assert (worse.max() < 1e-4) == (number % 2 == 0)
    places = [[id(trial) for trial in trials].index(id(trial)) for trial in drawn]
    assert sorted(places) == [*range(64)] != places
    run.network.llama.lm_head.weight.data[run.tokenizer.action_tokens] = 0
    cases = [(1.0, 0.6, 0, 0.4), (0.0, 0.0, 0, 0.4), (0.5, 0.5, 0.4, 0.6), (1.0, 0.5, 0.6, 1)]
    for on_policy, start, low, high in cases:
        changes = {"on_policy": on_policy, "final_from": start, "collection_steps": 64}
        recipe = replace(run.recipe, **changes, steps=640)
        drawn = train.collect(run._replace(recipe=recipe), 5)
        share = np.mean([(batch.actions[batch.mask] == 0).float().mean() for batch in drawn])
        assert low < share < high


@pytest.mark.parametrize(("kind", "atol"), [("bfloat16", 2e-3), ("float", 1e-6)])
def test_muon_is_torchs(finished, monkeypatch, kind, atol):
    """Up to bfloat16's rounding; up to float32's if torch's computes in float32, too."""
    monkeypatch.setattr(torch.Tensor, "bfloat16", getattr(torch.Tensor, kind))
    run, generator = load_run(finished), torch.Generator().manual_seed(0)
    _, muon = train.make_optimizers(run.recipe, run.network)
    ours, muon.param_groups[0]["lr"] = muon.param_groups[0]["params"], 0.02
    assert sorted(p.shape for p in ours) == [(16, 16)] * 4 + [(16, 48)] + [(48, 16)] * 2
    theirs = [p.detach().clone() for p in ours]
    reference = torch.optim.Muon(theirs, lr=0.02, weight_decay=0.01)
    for _ in range(3):
        for p, q in zip(ours, theirs):
            p.grad = q.grad = torch.randn(p.shape, generator=generator)
        muon.step()
        reference.step()
    torch.testing.assert_close(ours, theirs, rtol=0, atol=atol)


def test_a_compiled_run_has_the_same_log_up_to_rounding(tmp_path):
    """Two lengths of slices, with and without a gradient: four graphs, and one of the trial."""
    before = counters["stats"]["unique_graphs"]
    short = ("--steps", 4, "--collection-steps", 2, "--final-from", 0.5, "--trials", 1)
    for name, more in (("plain", []), ("compiled", ["--compile"])):
        go(train, *SMALL, *short, *more, "--out", tmp_path / name)
    assert counters["stats"]["unique_graphs"] - before <= 5
    logs = (rows_of(tmp_path / name / "log.csv")[1:] for name in ("plain", "compiled"))
    np.testing.assert_allclose(*(log.astype(float) for log in logs), rtol=1e-3, atol=1e-5)


def test_two_processes_average_their_gradients(tmp_path, monkeypatch, capsys):
    """The weights are those of a loop by hand. If one process goes on alone, it says so."""
    settings = [*SMALL, *"--on-policy 0 --muon-rate 0 --steps 10 --warm-up 4".split()]
    settings += ["--eval-every", 5, "--out", tmp_path / "run"]
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2]
    output = python(*torchrun, ROOT / "train.py", *settings)
    assert len(re.findall(r"step 5: mean return .* lakes [▁▂▃▄▅▆▇█]{30}$", output, re.M)) == 1
    for agent in (*(f"run, {name}" for name in SCHEDULES), *BASELINES):
        assert output.count(f"\n{agent} ") == 1
    go(train, "--resume", tmp_path / "run", "--trials", 1)
    assert len(re.findall(r"^.*\b2 processes.*$", "\n".join(capsys.readouterr()), re.M)) == 1
    run, shares = load_run(tmp_path / "run"), []
    online, target = (train.new_network(run.recipe, run.tokenizer) for _ in range(2))
    monkeypatch.setattr(train, "WORLD_SIZE", 2)
    for rank in (0, 1):
        monkeypatch.setattr(train, "RANK", rank)
        shares.append([*train.collect(run, 0), *train.collect(run, 1)])
    assert not torch.equal(shares[0][0].tokens, shares[1][0].tokens)
    adamw = torch.optim.AdamW(online.parameters(), weight_decay=0.01)
    for step, pair in enumerate(zip(*shares)):
        adamw.zero_grad()
        for batch in pair:
            q, q_target = (n(batch.tokens, batch.positions) for n in (online, target))
            targets = td_targets(q, q_target, batch.rewards, batch.discounts)
            (td_loss(q, batch.actions, targets, batch.mask) / 2).backward()
        torch.nn.utils.clip_grad_norm_(online.parameters(), 1.0)
        factor = min(1, (step + 1) / 4) * (1 - 0.97 * max(0, step / 10 - 0.2) / 0.8)
        adamw.param_groups[0]["lr"] = 0.01 * factor  # it rises for 4 steps, and falls from 20 % on
        adamw.step()
        for phi, theta in zip(target.parameters(), online.parameters()):
            phi.data = 0.1 * theta.data + 0.9 * phi.data
    state = torch.load(tmp_path / "run" / "state.pt", weights_only=True)
    for prefix, network in (("online", online), ("target", target)):
        for name, weight in network.trainable_parameters().items():
            torch.testing.assert_close(state[prefix][name], weight, rtol=0, atol=1e-4)
    monkeypatch.setattr(train, "RANK", 0)
    for slices, changes in ((3, {"batch": 3}), (1, {"final_tokens": 4 * 64})):
        with pytest.raises(ValueError, match=f"2 processes cannot share a batch of {slices}"):
            train.create_run(replace(run.recipe, **changes), tmp_path / "new", "cpu", trials=1)
    assert not (tmp_path / "new").exists()


def test_the_pretrained_network_repeats_its_curve(tmp_path):
    """`python eval.py` stays within its intervals: another processor may round differently."""
    go(evaluation, "--out", tmp_path)
    saved, ours = (rows_of(path / "curve.csv")[1:] for path in (PRETRAINED / "unseen", tmp_path))
    assert np.array_equal(ours[60:], saved[60:])  # agents without a network
    assert np.array_equal(ours[:, :3], saved[:, :3])
    mean, (low, high) = ours[:60, 3].astype(float), saved[:60, 4:6].T.astype(float)
    assert np.all((low <= mean) & (mean <= high))
    assert mean[55:].mean() > 0.97  # with the exploration schedule


@pytest.mark.parametrize(("experiment", "names"), EXPERIMENTS)
def test_experiments(finished, tmp_path, monkeypatch, capsys, experiment, names):
    """A table, a curve and a picture of all agents, for one run or two, with the right lakes."""
    calls, play, trials = [], evaluation.play, "20" if experiment == "stitching" else "2"

    def recorded(run, lakes, *arguments, **settings):
        played = play(run, lakes, *arguments, **settings)
        named = dict(zip(("seed", "episodes", "first_episode", "given", "schedule"), arguments))
        calls.append((lakes, played, named | settings))
        return played

    monkeypatch.setattr(evaluation, "play", recorded)
    runs = [shutil.copytree(finished, tmp_path / name) for name in names]
    go(evaluation, experiment, *runs, "--trials", trials)
    out = runs[0] / "-".join([experiment, *names[1:]])
    assert contents(out).keys() == {"curve.csv", "curve.png"}
    rows, printed = rows_of(out / "curve.csv")[1:], capsys.readouterr().out
    episodes = {"changing": 60, "stitching": 5}.get(experiment, 30)
    variants, schedules, stages = [*SCHEDULES], [*SCHEDULES.values()], 1 + (episodes == 60)
    if experiment == "stitching":
        variants, schedules = ["greedy", "without the given episodes"], [always_greedy] * 2
    agents = [f"{name}, {variant}" for name in names for variant in variants] + BASELINES
    agents += ["optimal"] * (experiment == "slippery")
    expected = [[experiment, a, str(e), trials] for a in agents for e in range(episodes)]
    assert rows[:, [0, 1, 2, 6]].tolist() == expected
    assert all(f"\n{agent} " in printed for agent in agents)
    used = [call[2]["schedule"] for call in calls]
    assert used == [s for _ in names for s in schedules for _ in range(stages)]
    assert all(lake.is_test != bool(lake.links) for lake in calls[0][0][5:])
    assert all(bool(lake.links) == (experiment == "graphs") for lake in calls[0][0])
    for change in ("shuffled", "slippery"):
        assert {call[2].get(change) == 1.0 for call in calls} == {experiment == change}
    for before, after in zip(calls[::2], calls[1::2]) if experiment == "changing" else ():
        assert (after[2]["given"], after[2]["first_episode"]) == (before[1], 30)
        assert not set(before[0]) & set(after[0])
    for lake, pair in zip(calls[0][0], calls[0][2]["given"]) if experiment == "stitching" else ():
        paths = sorted((e.episode_return, e.observations.tolist(), e.actions) for e in pair)
        for _, tiles, actions in paths:
            moves = np.diff(np.divmod(tiles, lake.width)).T
            assert np.array_equal(moves, np.array(DIRECTIONS)[actions])
        (loss, lost, _), (success, won, _) = paths
        assert (loss, success, *lake.tiles[[lost[0], lost[-1], won[-1]]]) == (0, 1, *"SHG")
        assert set(won[:-1]) & set(lost[:-1])
        assert not {won[0]} & set(lost) | {lost[0]} & set(won)  # neither begins on the other one
        assert not {*lake.tiles[won[:-1] + lost[:-1]]} & {"H", "G"}
        notebooks = ([2, 6, 10, 14, 18, 22], [8, 9, 10, 11])
        assert lake != NOTEBOOK_LAKE or (won, lost) == notebooks


@pytest.mark.parametrize("experiment", ["unseen", "graphs", "changing"])
def test_skip_leaves_out_the_first_lakes(finished, tmp_path, monkeypatch, experiment):
    lakes = []
    monkeypatch.setattr(evaluation, "play", lambda run, some, *_, **__: lakes.append(some) or 1 / 0)
    for flags in ("--trials 20", "--trials 17 --skip 3"):
        with pytest.raises(ZeroDivisionError):
            go(evaluation, experiment, finished, "--out", tmp_path, *flags.split())
    assert lakes[1] == lakes[0][3:]


def test_watch_shows_a_trial(finished, monkeypatch, capsys):
    """Thirty episodes, and four Q-values before each step, which is the network's or random."""
    monkeypatch.setattr(evaluation, "rollout", spy := Mock(wraps=rollout))
    go(evaluation, "watch", finished, "--lake", 2, "--context", 70)
    (agent,) = {call.args[1] for call in spy.mock_calls}
    assert agent.context == 70
    printed = capsys.readouterr().out
    assert re.findall(r"^episode (\d+)$", printed, re.M) == [*map(str, range(30))]
    step = r"^ +\d+ (?: +-?\d+\.\d{3}){4}   (?:left|down|right|up)( \*)?$"
    assert set(re.findall(step, printed, re.M)) == {"", " *"}
    assert len(re.findall(r"^return [01]$", printed, re.M)) == 30


def test_a_policy_map_shows_the_best_action_of_every_tile(finished, tmp_path):
    """A picture, and a film of 30 frames. The arrows are those of a pass without a cache."""
    go(evaluation, "policy_map", finished, "--lake", 2, "--out", tmp_path)
    go(evaluation, "policy_map", finished, "--gif", "--out", tmp_path)
    files = (tmp_path / f"policy_map.{kind}" for kind in ("png", "gif"))
    with Image.open(next(files)) as picture, Image.open(next(files)) as film:
        assert (picture.format, film.format, film.n_frames) == ("PNG", "GIF", 30)
    run, (lake,) = load_run(finished), random_lakes(1, np.random.default_rng(3), test=True)
    env = make_env([lake], np.random.default_rng(4), 10, shuffled=1.0)
    (episodes,) = rollout(env, RandomAgent(env, env.rng), 4)
    axes = Figure().subplots()
    evaluation.draw_episode(axes, run, env, lake, episodes, 2)
    arrows, path = (artist for artist in axes.collections if isinstance(artist, Quiver))
    assert len(path.X) == len(episodes[2].actions)
    past = [token for e in episodes[:2] for token in run.tokenizer.encode(e)]
    columns = (arrows.X, arrows.Y, arrows.U, arrows.V, arrows.get_array())
    tiles = np.flatnonzero(np.isin(lake.tiles, ["S", "F"]))
    for tile, x, y, dx, dy, value in zip(tiles, *columns, strict=True):
        tokens = past + run.tokenizer.start(env.tile_ids[0][tile])
        q = run.network(torch.tensor([tokens]), torch.tensor([[len(tokens) - 1]]))[0, 0]
        direction = DIRECTIONS[env.action_map[0, q.argmax()]]
        assert (y, x) == divmod(tile, lake.width)
        assert (-dy, dx) == direction  # a picture's y axis points down
        assert value == pytest.approx(q.max().item(), abs=1e-4)


def test_without_matplotlib_everything_but_the_picture_is_there(tmp_path, monkeypatch, capsys):
    """Table and curve of two trials by hand. Intervals as in Newcombe (1998), table I, method 3."""
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    lost, won = (Episode(np.array([0, 1]), np.array([2]), np.array([r])) for r in (0.0, 1.0))
    played = [[lost] * 3 + [won] * 2, [replace(lost, truncated=True)] * 5]
    evaluation.report(tmp_path, "unseen", "2 lakes", {"someone": played})
    assert contents(tmp_path).keys() == {"curve.csv"}
    printed = capsys.readouterr().out
    assert "pip install matplotlib" in printed
    assert re.search(r"^someone +▁▁▁▅▅ +0\.200 +50% +50\.0%$", printed, re.M)
    assert rows_of(tmp_path / "curve.csv")[4, 1:5].tolist() == ["someone", "3", "0.5000", "0.0945"]
    trials = np.array([263, 148, 20, 29])
    low, high = evaluation.wilson(np.array([81, 15, 0, 1]) / trials, trials)
    assert low == pytest.approx([0.2553, 0.0624, 0, 0.0061], abs=1e-4)
    assert high == pytest.approx([0.3662, 0.1605, 0.1611, 0.1718], abs=1e-4)


@pytest.mark.parametrize(("command", "damage"), CASES)
def test_bad_input(finished, tmp_path, capsys, command, damage):
    """Exit status 2, and one line that names what is wrong. A NaN does not spoil the checkpoint."""
    (tmp_path / "file").touch()
    run, new = shutil.copytree(finished, tmp_path / "run"), tmp_path / "new"
    if damage:
        (run / damage).write_bytes((run / damage).read_bytes()[:-100])
    before, small = contents(run), f"{' '.join(SMALL)} --out {new}"
    for name, value in {"RUN": run, "NEW": small, "TMP": tmp_path}.items():
        command = command.replace(name, str(value))
    assert status_of(command) == 2
    errors = re.sub(r"usage: .*?^(?=\w+\.py: )", "", capsys.readouterr().err, flags=re.S | re.M)
    *bar, line = errors.splitlines()
    assert line.startswith(f"{command.split()[0]}: ")
    assert any(word.strip("-") in line.lower() for word in command.lower().split()[1:][-2:])
    assert contents(run) == before
    assert bool(bar) == new.exists() == ("4e9" in command)
    if bar:  # the checkpoint of the step before
        state = torch.load(new / "state.pt", weights_only=True)
        assert all(t.isfinite().all() for n in ("online", "target") for t in state[n].values())


def test_runs_whose_folders_have_the_same_name_are_both_there(finished, tmp_path):
    """Their rows have their paths; a run that is the current folder has its folder's name."""
    runs = [shutil.copytree(finished, tmp_path / name / "1") for name in "ab"]
    go(evaluation, "unseen", *runs, "--trials", 1, "--out", tmp_path / "out")
    agents = set(rows_of(tmp_path / "out" / "curve.csv")[1:, 1])
    assert {f"{run}, greedy" for run in runs} <= agents
    here = load_run(runs[0])._replace(folder=Path())
    assert evaluation.names_of([here]) == [Path().resolve().name]
