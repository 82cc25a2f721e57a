"""Runs: what train.py and eval.py promise a user, tried from outside with a small recipe."""

import os
import re
import runpy
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from zlib import crc32

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from matplotlib.quiver import Quiver
from PIL import Image
from safetensors.torch import load_file

import eval as evaluation
import train
from frozen_lake import DIRECTIONS, NOTEBOOK_LAKE, Episode, random_lakes, roll_out, worlds
from icrl import encode_slice, load_run, td_loss, td_targets

ROOT = Path(train.__file__).parent
SMALL = """--layers 1 --width 16 --heads 2 --lakes 24 --episodes 40 --tokens 64 --max-steps 10
    --batch 4 --steps 30 --collection-steps 5 --late-from 0.4 --own 0.5 --windows 0.5 --max-side 4
    --min-hops 3 --hard 0.2 --shuffled 0.3 --slippery 0.2 --late-tokens 128
    --look-every 100 --trials 3""".split()
ADAPTER = "adapter_model.safetensors"
PLAYERS = "transformer in context;systematic explorer;tabular Q-learning;uniform random".split(";")
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
torch.set_num_threads(1)  # runs are equal to the last bit on one CPU set-up only


def go(module, *arguments):
    module.main([*map(str, arguments)])


def python(*arguments, status: int = 0) -> str:
    command = [sys.executable, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, timeout=200)
    assert (done.returncode, "Traceback" in done.stderr) == (status, False), done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    go(train, *SMALL, "--out", folder := tmp_path_factory.mktemp("runs") / "small")
    return folder


def contents(folder: Path) -> dict[str, int]:
    return {path.name: crc32(path.read_bytes()) for path in folder.iterdir()}


def rows_of(path: Path) -> np.ndarray:
    return np.loadtxt(path, delimiter=",", dtype=str, quotechar='"')


def test_a_run_leaves_what_it_promises(finished):
    """Eight files, none half-written; a log row a step; a curve with intervals around means."""
    names = "recipe.json config.json tokenizer.json model.safetensors state.safetensors"
    assert contents(finished).keys() == {*names.split(), "log.csv", "curve.csv", "curve.png"}
    log, curve = rows_of(finished / "log.csv"), rows_of(finished / "curve.csv")
    assert ",".join(log[0]) == "step,loss,mean_q,mean_target,learning_rate,gradient_norm"
    assert log[1:, 0].tolist() == [*map(str, range(1, 31))]
    assert ",".join(curve[0]) == "experiment,player,episode,mean_return,ci_low,ci_high,trials"
    mean, low, high = curve[1:, 3:6].T.astype(float)
    assert np.all((low >= 0) & (low <= mean) & (mean <= high) & (high <= 1))


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
INTERRUPTED = [  # settings; at which call of which function, and from which step it then goes on
    (SMALL, [("polyak_update", 3, 0), ("replace", 5, 5), ("replace", 15, 30)]),
    ([*SMALL, *"--own 0 --steps 60 --collection-steps 20".split()], [("polyak_update", 54, 50)]),
    ("--model RUN --steps 15".split(), [("polyak_update", 5, 0), ("polyak_update", 13, 10)]),
]


@pytest.mark.parametrize(("settings", "places"), INTERRUPTED)
def test_interrupted_anywhere_a_run_goes_on_bit_for_bit(finished, tmp_path, settings, places):
    """SIGKILL amid a collection and before any file that is written, the last time Ctrl-C."""
    settings, folder = [finished if word == "RUN" else word for word in settings], tmp_path / "run"
    go(train, *settings, "--trials", 3, "--out", tmp_path / "whole")
    settings += ["--out", folder]
    for place in places:
        signal, status = (2, 130) if place == places[-1] else (9, -9)
        python("-c", INTERRUPT, *place[:2], signal, ROOT / "train.py", *settings, status=status)
        state = folder / "state.safetensors"
        assert (load_file(state)["step"].item() if state.exists() else 0) == place[2]
        settings = ["--resume", folder, "--trials", 3]
    go(train, *settings)
    assert contents(folder) == contents(tmp_path / "whole")


def test_ia3_trains_the_vectors_alone_and_evaluation_replays_runs(finished, tmp_path):
    """No weight and no file of the base changes, no vector stays ones; curves come out again."""
    before, folder = contents(finished), tmp_path / "adapted"
    go(train, "--model", finished, "--steps", 12, "--trials", 3, "--out", folder)
    base, adapter = {"config.json", "model.safetensors"}, {"adapter_config.json", ADAPTER}
    assert before.keys() - contents(folder).keys() == base
    assert contents(folder).keys() - before.keys() == adapter
    run, base = load_run(folder), load_run(finished)
    assert base.recipe.easy_until > run.recipe.easy_until == 0  # a base needs no easy lakes
    base = base.network.llama.state_dict()
    assert all((vectors != 1).any(1).all() for vectors in run.network.adapter.parameters())
    assert all(torch.equal(w, base[name]) for name, w in run.network.llama.state_dict().items())
    for run, files in ((finished, before), (folder, contents(folder))):
        go(evaluation, run, "unseen", "--trials", 3, "--out", out := tmp_path / f"{run.name}-again")
        assert contents(run) == files
        assert contents(out) == {name: files[name] for name in ("curve.csv", "curve.png")}


@pytest.mark.parametrize("late", [0, 128])
def test_a_run_with_long_slices_is_a_base_too(tmp_path, late):
    """Its config.json says that it knows them, so --model does not refuse its own recipe."""
    short = ("--steps", 1, "--collection-steps", 1, "--trials", 1)
    go(train, *SMALL, *short, "--tokens", 2500, "--late-tokens", late, "--out", tmp_path / "base")
    go(train, "--model", tmp_path / "base", *short, "--out", tmp_path / "adapted")
    assert load_run(tmp_path / "adapted").recipe.context == (late or 2500)


def test_no_lake_of_a_training_is_a_test_lake(finished, monkeypatch):
    """Neither easy, hard and other lakes nor own trials' are, though there are few of this size.
    Shuffled ones are of the same lakes. No graph is in it."""
    seen, run = [], load_run(finished)
    monkeypatch.setattr(
        train, "worlds", lambda lakes, *rest: seen.extend(lakes) or worlds(lakes, *rest)
    )
    run = run._replace(recipe=replace(run.recipe, max_side=3, min_hops=1, lakes=200))
    early, late = next(train.collect(run, 0)), next(train.collect(run, 5))
    assert (early.tokens.shape, late.tokens.shape) == ((4, 64), (2, 128))  # as many tokens
    tests = set(evaluation.test_lakes(3000, (3, 3), 2))
    others = random_lakes(200, np.random.default_rng(0), (3, 3), 2, test=True)
    assert len(seen) > 400
    assert len(tests & set(others)) > 50
    assert not tests & set(seen)
    assert not any(lake.links for lake in seen)


def test_own_trials_are_what_the_network_does_as_often_as_asked(finished, monkeypatch):
    """In half of them, of the first lakes as of the last, which are hard, each action is the best.
    Of equal ones it is left: how often slices do so."""
    run = load_run(finished)
    for parameter in run.network.parameters():
        parameter.data *= 3 if parameter.ndim == 2 else 1  # Q-values that differ
    trials = []
    monkeypatch.setattr(
        train, "roll_out", lambda *a, **k: trials.extend(roll_out(*a, **k)) or trials
    )
    drawn = train.own_trials(run, 3)
    monkeypatch.undo()
    for number, trial in enumerate(trials):
        batch = encode_slice(run.encoder, [trial], 64, 0.9)
        q = run.network(batch.tokens[None], batch.positions[None])[0]  # (N, A)
        worse = q.max(1).values - q.gather(1, batch.actions[:, None])[:, 0]
        assert len(batch.tokens) > 50
        assert (worse.max() < 1e-4) == (number % 2 == 0)
    places = [[id(trial) for trial in trials].index(id(trial)) for trial in drawn]
    assert sorted(places) == [*range(64)] != places
    run.network.llama.lm_head.weight.data[run.encoder.action_tokens] = 0
    cases = [(1.0, 0.6, 0, 0.4), (0.0, 0.0, 0, 0.4), (0.5, 0.5, 0.4, 0.6), (1.0, 0.5, 0.6, 1)]
    for own, late_from, low, high in cases:
        changes = {"own": own, "late_from": late_from, "steps": 640, "collection_steps": 64}
        drawn = train.collect(run._replace(recipe=replace(run.recipe, **changes)), 5)
        share = np.mean([(batch.actions[batch.mask] == 0).float().mean() for batch in drawn])
        assert low < share < high


@pytest.mark.parametrize(("kind", "atol"), [("bfloat16", 2e-3), ("float", 1e-6)])
def test_muon_is_torchs(finished, monkeypatch, kind, atol):
    """As it is, to bfloat16's rounding; and made to compute in float32 as well, to float32's."""
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


def test_compiled_the_log_is_the_same_but_for_rounding(tmp_path):
    for name, more in (("plain", []), ("compiled", ["--compile"])):
        go(train, *SMALL, "--steps", 2, "--trials", 1, *more, "--out", tmp_path / name)
    logs = (rows_of(tmp_path / name / "log.csv")[1:] for name in ("plain", "compiled"))
    np.testing.assert_allclose(*(log.astype(float) for log in logs), rtol=1e-3, atol=1e-5)


def test_two_processes_average_their_gradients(tmp_path, monkeypatch, capsys):
    """torchrun: the first one writes, the weights of a loop by hand over the shares of both.
    One that goes on alone, on other data than both would, says so in a line."""
    settings = [*SMALL, *"--own 0 --muon-rate 0 --steps 10 --warm-up 4 --look-every 5".split()]
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2]
    output = python(*torchrun, ROOT / "train.py", *settings, "--out", tmp_path / "run")
    assert len(re.findall(r"^step 5: mean return .*: [▁▂▃▄▅▆▇█]{30}$", output, re.M)) == 1
    assert all(output.count(f"\n{player} ") == 1 for player in PLAYERS)
    go(train, "--resume", tmp_path / "run", "--trials", 1)
    assert len(re.findall(r"^.*\b2 processes.*$", "\n".join(capsys.readouterr()), re.M)) == 1
    go(train, "--resume", tmp_path / "run", "--trials", 1)
    run, shares = load_run(tmp_path / "run"), []
    online, delayed = (train.new_network(run.recipe, run.encoder) for _ in range(2))
    monkeypatch.setattr(train, "WORLD_SIZE", 2)
    for rank in (0, 1):
        monkeypatch.setattr(train, "RANK", rank)
        shares.append([*train.collect(run, 0), *train.collect(run, 1)])
    assert not torch.equal(shares[0][0].tokens, shares[1][0].tokens)
    adamw = torch.optim.AdamW(online.parameters(), weight_decay=0.01)
    for step, pair in enumerate(zip(*shares)):
        adamw.zero_grad()
        for batch in pair:
            q, q_delayed = (n(batch.tokens, batch.positions) for n in (online, delayed))
            targets = td_targets(q, q_delayed, batch.rewards, batch.discounts)
            (td_loss(q, batch.actions, targets, batch.mask) / 2).backward()
        torch.nn.utils.clip_grad_norm_(online.parameters(), 1.0)
        share = min(1, (step + 1) / 4) * (1 - 0.97 * max(0, step / 10 - 0.2) / 0.8)
        adamw.param_groups[0]["lr"] = 0.01 * share  # it rises for 4 steps, and falls from 20 % on
        adamw.step()
        for phi, theta in zip(delayed.parameters(), online.parameters()):
            phi.data = 0.1 * theta.data + 0.9 * phi.data
    state = load_file(tmp_path / "run" / "state.safetensors")
    for prefix, network in (("online", online), ("delayed", delayed)):
        for name, weight in network.trained().items():
            torch.testing.assert_close(state[f"{prefix}.{name}"], weight, rtol=0, atol=1e-4)
    with pytest.raises(ValueError, match="2 processes cannot share a batch of 3"):
        train.train(run._replace(recipe=replace(run.recipe, batch=3)), None)
    late = replace(run.recipe, late_tokens=run.recipe.batch * run.recipe.tokens)
    with pytest.raises(ValueError, match="2 processes cannot share a batch of 1"):
        train.train(run._replace(recipe=late), None)


def test_the_shipped_run_gives_the_shipped_curve(tmp_path):
    """python eval.py plays it, within its intervals: another processor may round differently."""
    go(evaluation, "--out", tmp_path)
    shipped, ours = (rows_of(path / "curve.csv")[1:] for path in (evaluation.SHIPPED, tmp_path))
    assert np.array_equal(ours[30:], shipped[30:])  # players without a network
    mean, (low, high) = ours[:30, 3].astype(float), shipped[:30, 4:6].T.astype(float)
    assert np.all((low <= mean) & (mean <= high))
    assert mean[25:].mean() > 0.97


EXPERIMENTS = "larger harder shuffled graphs slippery exploration stitching changing".split()


@pytest.mark.parametrize("experiment", [*EXPERIMENTS, "compare", "compare exploration"])
def test_experiments(finished, tmp_path, monkeypatch, capsys, experiment):
    """All players' table and curve, a picture. Changing: the first lake's episodes are given.
    Stitching: paths to goal and hole, neither beginning on the other one, that cross."""
    calls, play, trials = [], evaluation.play, "20" if experiment == "stitching" else "2"

    def recorded(run, lakes, *arguments, given=None, **settings):
        played = play(run, lakes, *arguments, given=given, **settings)
        calls.append((lakes, given, played, "probability" in settings, settings))
        return played

    monkeypatch.setattr(evaluation, "play", recorded)
    several, name = "compare" in experiment, experiment.replace("compare", "").strip() or "unseen"
    runs = [shutil.copytree(finished, tmp_path / str(number)) for number in range(1 + several)]
    go(evaluation, *experiment.split(), *runs, "--trials", trials)
    out = runs[0] / "compare" / name if several else runs[0] / name
    assert contents(out).keys() == {"curve.csv", "curve.png"}
    rows, printed = rows_of(out / "curve.csv")[1:], capsys.readouterr().out
    players, episodes = list(dict.fromkeys(rows[:, 1])), len(set(rows[:, 2]))
    assert players[2:5] == PLAYERS[1:] or players[1:] == PLAYERS[1:]
    sizes = {"slippery": (6, 30), "changing": (4, 60), "stitching": (5, 5)}
    assert (len(players), episodes) == sizes.get(experiment, (5, 30))
    expected = [[name, p, str(e), trials] for p in players for e in range(episodes)]
    assert rows[:, [0, 1, 2, 6]].tolist() == expected
    assert all(f"\n{player} " in printed for player in players)
    unforced = {"compare": [False] * 2, "changing": [False] * 2}
    unforced |= {"stitching": [True] * 2, "compare exploration": [True] * 2}
    assert [call[3] for call in calls] == unforced.get(experiment, [False, True])
    assert all(lake.is_test != bool(lake.links) for lake in calls[0][0][5:])
    assert all(bool(lake.links) == (experiment == "graphs") for lake in calls[0][0])
    for share in ("shuffled", "slippery"):
        assert {call[4].get(share) == 1.0 for call in calls} == {experiment == share}
    if experiment == "changing":
        assert calls[1][1] == calls[0][2]
        assert not set(calls[0][0]) & set(calls[1][0])
    for lake, pair in zip(*calls[0][:2]) if experiment == "stitching" else ():
        losing, winning = sorted((e.total, e.observations.tolist(), e.actions) for e in pair)
        for _, tiles, actions in (losing, winning):
            moves = np.diff(np.divmod(tiles, lake.width)).T
            assert np.array_equal(moves, np.array(DIRECTIONS)[actions])
        lost, won = losing[1], winning[1]
        assert (losing[0], winning[0], *lake.tiles[[lost[0], lost[-1], won[-1]]]) == (0, 1, *"SHG")
        assert set(won[:-1]) & set(lost[:-1])
        assert not {won[0]} & set(lost) | {lost[0]} & set(won)
        assert not {*lake.tiles[won[:-1] + lost[:-1]]} & {"H", "G"}
        notebooks = ([2, 6, 10, 14, 18, 22], [8, 9, 10, 11])
        assert lake != NOTEBOOK_LAKE or (won, lost) == notebooks


def test_watch_shows_a_trial(finished, monkeypatch, capsys):
    """Thirty episodes with four Q-values before each step, chosen by it or a coin, in a context."""
    contexts = []

    def recorded(env, player, episodes):
        contexts.append(player.context)
        return roll_out(env, player, episodes)

    monkeypatch.setattr(evaluation, "roll_out", recorded)
    go(evaluation, finished, "--watch", "--lake", 2, "--context", 70)
    assert contexts == [70]
    printed = capsys.readouterr().out
    assert re.findall(r"^episode (\d+)$", printed, re.M) == [*map(str, range(30))]
    step = r"^ +\d+ (?: +-?\d+\.\d{3}){4}   (?:left|down|right|up)( \*)?$"
    assert set(re.findall(step, printed, re.M)) == {"", " *"}
    assert re.search(r"^returns: ([01] ){29}[01]$", printed, re.M)


def test_beliefs_are_the_best_q_values_at_every_tile(finished, tmp_path):
    """A picture, a film of 30 frames; arrows as a full forward of the context says."""
    go(evaluation, finished, "beliefs", "--lake", 2, "--out", tmp_path)
    go(evaluation, finished, "beliefs", "--gif", "--out", tmp_path)
    with (
        Image.open(tmp_path / "beliefs.png") as picture,
        Image.open(tmp_path / "beliefs.gif") as film,
    ):
        assert (picture.format, film.format, film.n_frames) == ("PNG", "GIF", 30)
    run, (lake,) = load_run(finished), random_lakes(1, np.random.default_rng(3), test=True)
    env = worlds([lake], np.random.default_rng(4), 10, shuffled=1.0)
    (episodes,) = roll_out(env, evaluation.RandomPlayer(env, env.rng), 4)
    axes = Figure().subplots()
    evaluation.draw_beliefs(axes, run, env, lake, episodes, 2)
    (arrows,) = (artist for artist in axes.collections if isinstance(artist, Quiver))
    past = [token for e in episodes[:2] for token in run.encoder.tokens(run.encoder.write(e))]
    onward = [i for i, letter in enumerate(lake.tiles) if letter in "SF"]
    for x, y, dx, dy, value, tile in zip(
        arrows.X, arrows.Y, arrows.U, arrows.V, arrows.get_array(), onward, strict=True
    ):
        tokens = past + run.encoder.tokens(run.encoder.opening(env.numbers[0][tile]))
        q = run.network(torch.tensor([tokens]), torch.tensor([[len(tokens) - 1]]))[0, 0]
        direction = DIRECTIONS[env.words[0, q.argmax()]]
        assert (y, x) == divmod(tile, lake.width)
        assert (-dy, dx) == direction  # a picture's y axis points down
        assert value == pytest.approx(q.max().item(), abs=1e-4)


def test_without_matplotlib_everything_but_the_picture_is_there(tmp_path, monkeypatch, capsys):
    """Table and curve of two trials by hand; intervals as in Newcombe (1998), table I, method 3."""
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


BAD = """eval.py TMP/nothing; eval.py RUN unseen larger; eval.py RUN RUN changing;
    eval.py RUN slippery --watch; eval.py RUN RUN --watch;
    eval.py RUN --trials 0; eval.py RUN --watch --lake -1; eval.py RUN --device nonsense;
    eval.py RUN --trials 1 --out TMP/file; eval.py RUN --context 20; train.py --out RUN;
    train.py --resume TMP/nothing; train.py --resume RUN --steps 5; train.py --dtype bfloat16;
    train.py --out TMP/file/run; train.py --model RUN --width 8; train.py --model RUN --muon-rate 1;
    train.py NEW --max-side 11; train.py NEW --min-hops 30;
    train.py NEW --shuffled 2; train.py NEW --late-tokens 20; train.py NEW --late-tokens -1;
    train.py NEW --batch 0; train.py NEW --gamma 1.5; train.py NEW --learning-rate nan;
    train.py NEW --quality best; train.py NEW --heads 20; train.py NEW --device nonsense;
    train.py NEW --look-every 0; train.py NEW --trials 0; train.py NEW --steps many;
    train.py NEW --learning-rate 1e30 --warm-up 1 --collection-steps 1"""
FAULTY = ['"tokens": "many"', '"dtype": "system"', '"max_side": [3]', '"held_out": 1']
CUT = ["recipe.json", "config.json", "tokenizer.json", "model.safetensors", "state.safetensors"]
CASES = [(command, None) for command in re.split(r";\s+", BAD)]
CASES += [("train.py --resume RUN", damage) for damage in FAULTY + CUT]


@pytest.mark.parametrize(("command", "damage"), CASES)
def test_bad_input(finished, tmp_path, capsys, monkeypatch, command, damage):
    """Exit status 2, and one line that names what is wrong; a NaN later keeps the checkpoint."""
    (tmp_path / "file").touch()
    run, new = shutil.copytree(finished, tmp_path / "run"), tmp_path / "new"
    if damage in FAULTY:
        recipe = (run / "recipe.json").read_text()
        (run / "recipe.json").write_text(recipe.replace('"seed": 0', f'"seed": 0, {damage}'))
    elif damage:
        (run / damage).write_bytes((run / damage).read_bytes()[:-100])
    before, small = contents(run), f"{' '.join(SMALL)} --out {new}"
    for name, value in {"RUN": run, "NEW": small, "TMP": tmp_path}.items():
        command = command.replace(name, str(value))
    monkeypatch.setattr(sys, "argv", command.split())
    with pytest.raises(SystemExit, match=r"^2$"):
        runpy.run_path(str(ROOT / sys.argv[0]), run_name="__main__")
    errors = re.sub(r"usage: .*?^(?=\w+\.py: )", "", capsys.readouterr().err, flags=re.S | re.M)
    *bar, line = errors.splitlines()  # argparse has its usage before the line
    assert line.startswith(f"{sys.argv[0]}: ")
    assert any(word.strip("-") in line.lower() for word in command.lower().split()[-2:])
    assert contents(run) == before
    assert bool(bar) == new.exists() == ("1e30" in command)
    if bar:  # the checkpoint of the step before
        assert all(torch.isfinite(t).all() for t in load_file(new / "state.safetensors").values())
