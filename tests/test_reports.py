"""What users of projects of this kind have reported, and what should happen instead."""

import io
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
import transformers
from matplotlib.figure import Figure
from safetensors.torch import load_file, save_file
from test_icrl import MARKERS, episode, make_tokenizer
from test_llama import TINY, save_files
from test_train import ENVIRONMENT, ROOT, SMALL, contents, status_of

import eval as evaluation
import frozen_lake
import icrl
from icrl import load_run, read_recipe
from llama import Llama, LlamaConfig

SHORT = " ".join([*SMALL, "--steps 10 --episodes 20 --trials 1 --eval-every 5"])
REFUSED = """revision: train.py --model EXTRA --revision x; older version: eval.py unseen OLD
    2048: eval.py unseen ADAPTED --context 2049; older version: train.py --resume OLD
    older version: train.py --model OLD; float16: train.py --model HALF --dtype float16 --steps 9
    --tokens: train.py --model TALKS --tokens 64 --final-tokens 8192
    state.pt: train.py --resume RUN; state.pt: train.py --resume ADAMW
    no state.pt: train.py --resume EXTRA; no recipe.json: train.py --resume nowhere
    state.pt: train.py --resume WIDE; token: llama.py EXTRA '<|im_end|>'
    prompt is empty: llama.py EXTRA ' '; tokenizer.json does not exist: llama.py PLAIN 1
    config.json does not exist: llama.py . 1; /no/such is not a folder: llama.py /no/such 1
    ./no is not a folder: llama.py ./no 1; ~/no is not a folder: train.py --model ~/no
    a/b/c is not a folder: train.py --model a/b/c; /dev/null/x: train.py NEW --out /dev/null/x
    usage: llama.py; usage: llama.py . w1 w2; prompt is empty: llama.py EXTRA ''
    nowhere: icrl.py nowhere; nearer goals: train.py NEW --goal-distance 30"""
CASES = [case.strip().split(": ") for case in re.split(r"; |\n", REFUSED)]
CASES += [("--seed", f"train.py NEW --seed {seed}") for seed in (-1, 2**32, 2**64)]
CASES += [("--seed", f"eval.py unseen EXTRA --seed {seed}") for seed in (-1, 2**32, 2**64)]
for experiment in ("unseen", "stitching", "changing", "policy_map"):
    CASES.append(("/dev/null/x", f"eval.py {experiment} EXTRA --out /dev/null/x"))
PRINTING = ["frozen_lake.py", "llama.py RUN 1", "icrl.py RUN", "eval.py watch RUN"]
TOGETHER = """import os, runpy, sys, time, eval
from pathlib import Path
def together(*arguments, original=eval.unseen_lakes):
    Path(f"here{os.getpid()}").touch()
    while len(list(Path().glob("here*"))) < 2:
        time.sleep(0.01)
    return original(*arguments)
eval.unseen_lakes = together  # both get here before either makes its folder
sys.argv.pop(0)
runpy.run_path(sys.argv[0], run_name="__main__")"""
LAUNCHERS = [({"RANK": "3"}, 0, 1), ({"RANK": "3", "WORLD_SIZE": "1"}, 0, 1)]
LAUNCHERS += [({"RANK": "", "WORLD_SIZE": ""}, 0, 1), ({"RANK": "1", "WORLD_SIZE": "2"}, 1, 2)]


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "small"
    assert status_of(f"train.py {SHORT} --out RUN", RUN=folder) == 0
    return folder


@pytest.fixture(scope="module")
def folders(finished, tmp_path_factory) -> dict[str, Path]:
    """Runs and bases, most of them with a fault, by name."""
    top, short = tmp_path_factory.mktemp("folders"), "--steps 1 --collection-steps 1 --trials 1"
    names = "ADAPTED ADAMW WIDE RUN OLD HALF EXTRA PLAIN TALKS".split()
    made = {name: top / name for name in names}
    flags = {"ADAPTED": f"--model RUN {short}", "ADAMW": f"{SHORT} {short} --muon-rate 0"}
    flags["WIDE"] = f"{SHORT} {short} --width 32"
    for name in "RUN OLD HALF EXTRA PLAIN".split():
        shutil.copytree(finished, made[name])
    for name, more in flags.items():
        assert status_of(f"train.py {more} --out {name}", **made) == 0
    shutil.copy(made["RUN"] / "state.pt", made["WIDE"])
    for name, old, new in (("RUN", "0.01", "0.0"), ("ADAMW", "0.0", "0.01"), ("WIDE", "0", "0")):
        text = re.sub(r'"steps": \d+', '"steps": 20', (made[name] / "recipe.json").read_text())
        text = text.replace(f'"muon_rate": {old},', f'"muon_rate": {new},')
        (made[name] / "recipe.json").write_text(text)
    recipe = json.loads((made["OLD"] / "recipe.json").read_text())
    (made["OLD"] / "recipe.json").unlink()
    (made["OLD"] / "config.json").write_text(json.dumps(TINY.to_dict() | {"icrl": recipe}))
    weights = load_file(made["HALF"] / "model.safetensors")
    for name in weights.keys() & {f"model.layers.0.mlp.{n}_proj.weight" for n in ("gate", "up")}:
        weights[name] *= 3e4 / weights[name].abs().max()  # their product is too large for float16
    save_file(weights, made["HALF"] / "model.safetensors")
    (tokenizer := icrl.compact_tokenizer()).add_tokens(["<|im_end|>"])
    tokenizer.save(str(made["EXTRA"] / "tokenizer.json"))
    (made["PLAIN"] / "tokenizer.json").unlink()
    (made["EXTRA"] / "state.pt").unlink()
    with patch("test_icrl.WORDS", []):  # a token for each letter
        tokenizer = make_tokenizer(MARKERS["Llama 3"], actions=())
    sizes = {"vocab_size": tokenizer.get_vocab_size(), "max_position_embeddings": 8192}
    network = Llama(LlamaConfig(**asdict(TINY) | sizes))
    save_files(made["TALKS"], {"model": network.state_dict()}, **sizes)
    tokenizer.save(str(made["TALKS"] / "tokenizer.json"))
    return made


@pytest.mark.parametrize(("words", "command"), CASES)
def test_refused(folders, tmp_path, monkeypatch, capsys, words, command):
    """Exit status 2 and one sentence with these words. Nothing is played, and no folder made."""
    for module in (frozen_lake, icrl, evaluation) if "HALF" not in command else ():
        monkeypatch.setattr(module, "rollout", lambda *_, **__: pytest.fail("it plays"))
    monkeypatch.chdir(tmp_path)
    assert status_of(command.replace("NEW", SHORT), **folders) == 2
    (output, errors), program = capsys.readouterr(), command.split()[0]
    assert program == "train.py" or not output
    assert re.search(rf"^{program}: .*{re.escape(words)}.*\n\Z", errors, re.M), errors
    assert len(re.findall(rf"^{program}: ", errors, re.M)) == 1
    assert "HALF" in command or not [*tmp_path.iterdir()]


def test_a_full_disk_ends_in_a_sentence(tmp_path, capsys):
    """Files of at most 20 KiB, too few for the weights. No part of a file is left."""
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20 * 1024, before[1]))
    try:
        assert status_of(f"train.py {SHORT} --out RUN", RUN=tmp_path / "run") == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert re.fullmatch("train.py: [^\n]+\n", capsys.readouterr().err)
    assert contents(tmp_path / "run").keys() == {"tokenizer.json"}


def outcome(*arguments, stdout=subprocess.PIPE, **environment) -> tuple[int, list[str]]:
    """Exit status and the lines on stderr of a separate process."""
    command, env = [sys.executable, *map(str, arguments)], ENVIRONMENT | environment
    done = subprocess.run(command, stdout=stdout, stderr=-1, env=env, text=True, timeout=200)
    return done.returncode, done.stderr.splitlines()


def test_without_a_compiler_compile_is_refused_in_a_sentence(tmp_path):
    """Before anything is written, without the long message of the compiler."""
    where = {"PATH": "/none", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    flags = [*SHORT.split(), "--compile", "--out", tmp_path / "run"]
    status, (line,) = outcome(ROOT / "train.py", *flags, **where)
    assert (status, line[:10], "--compile" in line) == (2, "train.py: ", True)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("command", PRINTING)
def test_a_closed_pipe_is_no_error(finished, monkeypatch, capsys, command):
    """As with `| head -1`: exit status 0 and no message, even if all is written at the end."""
    read, write = os.pipe()
    os.close(read)
    monkeypatch.setattr(sys, "stdout", open(write, "w"))  # noqa: SIM115
    assert status_of(command, RUN=finished) == 0
    sys.stdout.close()  # as at exit
    assert capsys.readouterr().err == ""


def test_a_training_whose_reader_has_gone_writes_all_files(finished, tmp_path):
    read, write = os.pipe()
    os.close(read)
    command = (ROOT / "train.py", *SHORT.split(), "--out", tmp_path / "small")
    status, errors = outcome(*command, stdout=write)
    assert (status, "Error" in str(errors), "step 5: mean" in str(errors)) == (0, False, True)
    assert contents(tmp_path / "small") == contents(finished)


def test_no_terminal_and_no_notebook_spoils_an_evaluation(finished, tmp_path):
    """What a terminal cannot print is replaced. A notebook's backend does not matter."""
    notebook = {"MPLBACKEND": "module://matplotlib_inline.backend_inline"}
    command = (ROOT / "eval.py", "unseen", finished, "--trials", 1, "--out", tmp_path / "out")
    assert outcome(*command, PYTHONIOENCODING="cp1252", **notebook)[0] == 0
    assert contents(tmp_path / "out").keys() == {"curve.csv", "curve.png"}


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_no_terminal_stops_a_training(finished, tmp_path, monkeypatch, encoding):
    """One without the characters of the curves: all files are the same."""
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, io.TextIOWrapper(io.BytesIO(), encoding=encoding))
    assert status_of(f"train.py {SHORT} --out NEW", NEW=tmp_path / "small") == 0
    assert contents(tmp_path / "small") == contents(finished)


def test_the_curve_is_written_before_anything_is_printed(tmp_path, monkeypatch):
    found, name = [], str(tmp_path / "curve.csv")
    monkeypatch.setattr("builtins.print", lambda *_, **__: found.append(os.path.exists(name)))
    evaluation.report(tmp_path, "unseen", "a title", {"someone": [[episode([0, 1], [2])] * 5]})
    assert set(found) == {True}


@pytest.mark.parametrize("error", [OSError("no font"), RuntimeError("no font")])
def test_a_picture_that_fails_is_a_remark(finished, tmp_path, monkeypatch, capsys, error):
    """Exit status 0, because the curve is written; 2 if only the picture was asked for."""
    monkeypatch.setattr(Figure, "savefig", lambda *_, **__: (_ for _ in ()).throw(error))
    assert status_of("eval.py unseen RUN --trials 1 --out NEW", RUN=finished, NEW=tmp_path) == 0
    assert "no font" in "".join(capsys.readouterr())
    assert contents(tmp_path).keys() == {"curve.csv"}
    assert status_of("eval.py policy_map RUN --out NEW", RUN=finished, NEW=tmp_path) == 2
    assert re.fullmatch("eval.py: [^\n]*no font[^\n]*\n", capsys.readouterr().err)


def test_two_runs_at_once_get_different_numbers(tmp_path):
    short = f"{SHORT} --steps 1 --collection-steps 1"
    command = [sys.executable, "-c", TOGETHER, ROOT / "train.py", *short.split(), "--seed"]
    how = {"cwd": tmp_path, "env": ENVIRONMENT, "stdout": -3, "stderr": -3}
    both = [subprocess.Popen([*command, seed], **how) for seed in "12"]
    assert [process.wait(200) for process in both] == [0, 0]
    runs = sorted((tmp_path / "runs").iterdir())
    assert [run.name for run in runs] == ["1", "2"]
    assert {read_recipe(run).seed for run in runs} == {1, 2}
    command = f"train.py {short} --seed {read_recipe(runs[0]).seed} --out NEW"
    assert status_of(command, NEW=tmp_path / "1") == 0
    assert contents(tmp_path / "1") == contents(runs[0])


@pytest.mark.parametrize(("variables", "rank", "size"), LAUNCHERS)
def test_a_rank_counts_among_several_processes_only(tmp_path, monkeypatch, variables, rank, size):
    """A single process writes its run, whatever RANK is. An empty variable counts as unset."""
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    module = runpy.run_path(str(ROOT / "train.py"))
    assert (module["RANK"], module["WORLD_SIZE"]) == (rank, size)
    if size == 1:
        module["main"]([*SHORT.split(), "--steps", "1", "--out", str(tmp_path / "run")])
        assert (tmp_path / "run" / "model.safetensors").exists()


def test_the_recipe_is_a_separate_file(finished, tmp_path):
    """So transformers loads an adapter's folder: it has no config.json, and names its base."""
    assert json.loads((finished / "recipe.json").read_text()) == asdict(load_run(finished).recipe)
    assert "icrl" not in json.loads((finished / "config.json").read_text())
    command = "train.py --model RUN --steps 3 --collection-steps 3 --learning-rate 0.3 --trials 1"
    assert status_of(f"{command} --out NEW", RUN=finished, NEW=tmp_path / "new") == 0
    names = contents(tmp_path / "new").keys()
    assert {"recipe.json", "adapter_model.safetensors"} <= names
    assert not {"config.json", "model.safetensors"} & names
    base = json.loads((tmp_path / "new" / "adapter_config.json").read_text())
    assert (Path(base["base_model_name_or_path"]), base["revision"]) == (finished.resolve(), None)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "new")
    run, tokens = load_run(tmp_path / "new").network, torch.arange(100)[None]
    ours, plain = (run.llama(tokens, a) @ run.llama.unembedding.T for a in (run.adapter, None))
    torch.testing.assert_close(ours, theirs(tokens).logits, atol=1e-4, rtol=0)
    assert (ours - plain).abs().max() > 1e-3
