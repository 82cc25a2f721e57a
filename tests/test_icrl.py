"""From transcript to play: against tokenizers, gymnasium, full passes and examples by hand."""

import json
import os
import re
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import asdict
from functools import partial
from itertools import chain
from pathlib import Path

import gymnasium
import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

import icrl
from frozen_lake import ACTIONS, Episode, Explorer, FrozenLake, Lake, RandomAgent, TabularQ
from frozen_lake import Transition, ValueIteration, random_lakes, rollout
from ia3 import IA3
from icrl import TEMPLATES, Recipe, Run, TranscriptTokenizer, encode_slice
from llama import Llama, LlamaConfig

ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
WORDS = ["observation", "action", "reward", "edit", "1.0", "...", *map(str, range(100))]
MARKERS = {  # what begins an episode, a role and a text; what ends a text and an episode
    "Llama 3": "<|begin_of_text|> <|start_header_id|> <|end_header_id|> <|eot_id|> <|end_of_text|>",
    "ChatML": " <|im_start|> \n <|im_end|>\n <|endoftext|>",
    "Llama 2": "<s>  </s> </s> </s>",
}
with_and_without = pytest.mark.parametrize("adapter", [False, True], ids=["every weight", "IA3"])
WRONG = {"tokens": ["many", 0, 99.5, True], "dtype": ["system"], "gamma": [1.1, float("nan")]}
WRONG |= {"max_side": [[5], "5", 1], "model": [None], "learning_rate": [-1, float("inf")]}


def make_tokenizer(markers: str, actions=ACTIONS, prefix=False) -> Tokenizer:
    """A byte-level BPE, like Llama 3's. With a space before each text it is like Llama 2's."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix)
    letters = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=500, initial_alphabet=letters, show_progress=False)
    tokenizer.train_from_iterator([*WORDS, *actions] * 20, trainer)
    tokenizer.add_special_tokens(sorted(set(markers.split())))
    return tokenizer


def transcript_tokenizer(tokenizer: Tokenizer) -> TranscriptTokenizer:
    return TranscriptTokenizer(tokenizer, tokenizer.get_vocab_size())


COMPACT = transcript_tokenizer(icrl.compact_tokenizer())
ALL = {name: make_tokenizer(m, prefix=name == "Llama 2") for name, m in MARKERS.items()}
ALL["several tokens per action"] = make_tokenizer(MARKERS["Llama 3"], actions=())
ALL = {name: transcript_tokenizer(tokenizer) for name, tokenizer in ALL.items()}
every_tokenizer = pytest.mark.parametrize("tokenizer", [COMPACT, *ALL.values()])


def episode(tiles, actions, paid=0.0, truncated=False) -> Episode:
    rewards = np.array([0.0] * (len(actions) - 1) + [paid])
    return Episode(np.array(tiles), np.array(actions), rewards, truncated)


WON, CUT = episode([0, 1, 2], [2, 2], paid=1.0), episode([0, 0, 3], [0, 1], truncated=True)


def make_run(tokenizer: TranscriptTokenizer = COMPACT, adapter=False, **recipe) -> Run:
    """A small random network whose Q-values are far from equal."""
    torch.manual_seed(0)
    llama = Llama(LlamaConfig(tokenizer.tokenizer.get_vocab_size(), 32, 48, 2, 4, 2, head_dim=8))
    vectors = IA3(llama.config)
    for parameter in (*llama.parameters(), *vectors.parameters()):
        torch.nn.init.normal_(parameter, mean=float((parameter == 1).all()), std=0.3)
    network = icrl.QNetwork(llama, tokenizer.action_tokens, vectors if adapter else None)
    return Run(Path(), Recipe(**recipe), network, tokenizer)


def text_of(tokenizer: TranscriptTokenizer, *episodes: Episode) -> str:
    return "".join(map(tokenizer.text, episodes))


def read(tokenizer: TranscriptTokenizer, text: str) -> tuple[torch.Tensor, torch.Tensor]:
    """The tokens (1, T) of a text, and the last one before each action word (1, N)."""
    parts = [text, *(text[: match.start()] for match in re.finditer("|".join(ACTIONS), text))]
    encodings = tokenizer.tokenizer.encode_batch(parts, add_special_tokens=False)
    tokens, *before = (encoding.ids for encoding in encodings)
    return torch.tensor([tokens]), torch.tensor([[len(ids) - 1 for ids in before]])


@torch.no_grad()
def q_of(run: Run, text: str) -> np.ndarray:
    """The action words' logits (N, A) before each action, by one pass without a cache."""
    (tokens, (where,)), llama = read(run.tokenizer, text), run.network.llama
    begin = text[: re.search("|".join(ACTIONS), text).start()]
    words = [int(read(run.tokenizer, begin + word)[0][0, where[0] + 1]) for word in ACTIONS]
    return (llama(tokens, run.network.adapter)[0, where] @ llama.unembedding[words].T).numpy()


def test_the_templates_are_the_notebooks_text_with_the_markers_of_the_vocabulary():
    """The example of the paper's notebook, letter by letter. Llama 3's markers come first."""
    won, cut = (episode([2, 6, 7], [1, 2], paid, paid == 0) for paid in (1.0, 0.0))
    steps = "^[observation]2|[action]down|[observation]6|[action]right|[observation]7|"
    for name, markers in MARKERS.items():
        table = str.maketrans(dict(zip("^[]|$", markers.split(" "))))
        texts = [(steps + end).translate(table) for end in ("[reward]1.0|$", "[edit]...|$")]
        assert [text_of(ALL[name], e) for e in (won, cut)] == texts
    texts = ("2 down 6 right 7 1.0 <|end_of_text|> ", "2 down 6 right 7 ... <|end_of_text|> ")
    assert text_of(COMPACT, won, cut) == "".join(texts)
    both = transcript_tokenizer(make_tokenizer(MARKERS["ChatML"] + MARKERS["Llama 3"]))
    assert text_of(both, won) == text_of(ALL["Llama 3"], won)


def test_a_tokenizer_that_fits_no_template_is_refused():
    """It has no markers, or joins segments, or two action words begin with the same token."""
    bare, joining = make_tokenizer("", actions=()), make_tokenizer("", actions=["left", " left"])
    alike = make_tokenizer("<s> </s>", actions=(), prefix=True)  # both begin with a space
    for message, tokenizer in (("none of", bare), ("joins", joining), ("begin with", alike)):
        with pytest.raises(ValueError, match=f"^[^\n]*{message}[^\n]*$"):
            transcript_tokenizer(tokenizer)


def test_a_template_that_does_not_fit_gives_way_to_the_next():
    """Llama 2 with a marker of ChatML, and markers without a row of the embedding."""
    llama2 = make_tokenizer(MARKERS["Llama 2"], prefix=True)
    both = make_tokenizer(MARKERS["ChatML"])
    llama2.add_special_tokens(["<|im_end|>"])
    assert transcript_tokenizer(llama2).template == TEMPLATES["</s>"]
    rows = both.get_vocab_size()
    both.add_special_tokens(MARKERS["Llama 3"].split())
    assert transcript_tokenizer(both).template == TEMPLATES["<|eot_id|>"]
    assert TranscriptTokenizer(both, rows).template == TEMPLATES["<|im_end|>"]
    with pytest.raises(ValueError, match=rf"^[^\n]+ {rows - 1}\D[^\n]*$"):
        TranscriptTokenizer(both, rows - 1)


@pytest.mark.parametrize("reward", [-1.0, 0.5, 2.0, float("nan")])
def test_a_reward_that_a_transcript_cannot_tell_is_refused(reward):
    """There are words for 0 and 1 only, so the network would not see any other reward."""
    with pytest.raises(ValueError, match="reward"):
        COMPACT.encode(episode([0, 1], [2], paid=reward))


@every_tokenizer
def test_a_slice_holds_the_tokens_of_legal_transitions(tokenizer):
    """By segments or all at once. Q is read at the last token before an action word."""
    lakes = random_lakes(3, rng := np.random.default_rng(0), (3, 4), 2, test=False)
    env = FrozenLake(lakes, rng, max_steps=12)
    sets = [icrl.sample_set(e, rng) for e in rollout(env, RandomAgent(env, rng), 6)]
    text, rules = "", {"is_slippery": False, "max_episode_steps": 12}
    for lake, drawn in zip(lakes, sets):
        env = gymnasium.make("FrozenLake-v1", desc=lake.rows, **rules)
        for e in drawn:
            env.reset()
            tile = env.unwrapped.s = e.observations[0]
            assert lake.tiles[tile] == "S"
            text += tokenizer.template.start_text(tile)
            for i, action in enumerate(e.actions):
                tile, reward, done, cut, _ = env.step(action)
                step = Transition(None, action, tile, reward, done, cut and not done)
                text += tokenizer.template.transition_text(step)
                assert (done or cut) == (i == len(e.actions) - 1)
    assert all(end in text for end in ("1.0", "..."))
    tokens, positions = read(tokenizer, text)
    length = tokens.shape[1] - 7
    batch = encode_slice(tokenizer, iter(sets), length, 0.9)
    assert torch.equal(batch.tokens, tokens[0, :length])
    inside = positions[positions < length]
    assert torch.equal(batch.positions[: len(inside)], inside)
    assert not batch.mask[len(inside) :].any()


# 0 right 1 right 2 1.0 <|end_of_text|> 0 left 0 down 3 ... <|end_of_text|>
@pytest.mark.parametrize(("length", "mask"), [(2, "0"), (3, "11"), (9, "110"), (10, "1111")])
def test_rewards_discounts_and_mask_of_a_slice_by_hand(length, mask):
    """An episode's last action has no next value. Zeros pad to a size by length only."""
    batch, n = encode_slice(COMPACT, iter([[WON, CUT]]), length, gamma=0.9), len(mask)
    padding = [0] * (length // 2 + 1 - n)
    expected = [[0, 2, 7, 9], [2, 2, 0, 1], [0, 1, 0, 0], [0.9, 0, 0.9, 0]]
    for column, numbers in zip(batch[1:5], expected):
        assert column.tolist() == pytest.approx(numbers[:n] + padding)
    assert batch.mask.tolist() == [letter == "1" for letter in mask] + padding
    longer = encode_slice(COMPACT, iter([[episode([0] * 15, [0] * 14)]]), length, gamma=0.9)
    for both, ours, other in zip(icrl.collate([batch, longer]), batch, longer):
        assert torch.equal(both, torch.stack([ours, other]))


@pytest.mark.parametrize(("quality", "share"), [("high", 5 / 6), ("mid", 1 / 2), ("low", 1 / 6)])
def test_a_set_is_20_to_40_episodes_weighted_as_in_figure_6_and_in_no_order(quality, share):
    """Each occurs at most once. Its place says nothing about when it was played, or its return."""
    rng, half = np.random.default_rng(0), [episode([i, 1], [2], paid=i % 2) for i in range(400)]
    sets = [icrl.sample_set(half, rng, quality) for _ in range(400)]
    assert {len(drawn) for drawn in sets} == set(range(20, 41))
    assert all(len(set(map(id, drawn))) == len(drawn) for drawn in sets)
    assert np.mean([e.episode_return for e in chain(*sets)]) == pytest.approx(share, abs=0.03)
    few = half[:60]  # successes run out
    places = [[*enumerate(icrl.sample_set(few, rng, quality))] for _ in range(400)]
    rows = [(i / len(s), e.observations[0], e.episode_return) for s in places for i, e in s]
    place = np.corrcoef(np.transpose(rows))[0, 1:]
    assert np.abs(place).max() < 4 / len(rows) ** 0.5  # standard errors


def test_targets_and_loss_of_two_episodes_by_hand():
    """Equations 4, 6 and 7. The targets have no gradient."""
    # t0, t1: the goal, y = r; t2, t3: truncated, y = r; t4: end of the slice; padding. In tenths:
    theta = [[1, 5, 2, 0], [3, 1, 9, 2], [0, 4, 1, 6], [7, 2, 1, 0], [2, 2, 8, 1], [90] * 4]
    phi = [[2, 4, 1, 3], [8, 2, 5, 1], [1, 3, 2, 4], [6, 9, 3, 2], [3, 1, 7, 2], [90] * 4]
    q = (torch.tensor([theta]) / 10).requires_grad_()
    rewards, discounts = torch.tensor([[[0, 1.0, 0, 0, 0, 0]], [[0.9, 0, 0.9, 0, 0.9, 0]]])
    y = icrl.td_targets(q, torch.tensor([phi]) / 10, rewards, discounts)
    # t0: theta's best at t1 is action 2, which phi values 0.5 (its own best 0.8): 0 + 0.9 * 0.5
    # t2: theta's best at t3 is action 0, which phi values 0.6 (its own best 0.9): 0 + 0.9 * 0.6
    torch.testing.assert_close(y[0, :4], torch.tensor([0.45, 1.0, 0.54, 0.0]))
    assert not y.requires_grad
    loss = icrl.td_loss(q, torch.tensor([[1, 2, 3, 0, 2, 0]]), y, torch.arange(6)[None] < 4)
    # errors y - Q_theta(a): 0.45 - 0.5 = -0.05; 1 - 0.9 = 0.1; 0.54 - 0.6 = -0.06; 0 - 0.7 = -0.7
    torch.testing.assert_close(loss, torch.tensor((0.0025 + 0.01 + 0.0036 + 0.49) / 4))


def test_the_loss_is_the_mean_of_the_squared_errors_that_count():
    """To 1e-6 what indexing by the mask gives; what does not count has no gradient."""
    random = torch.Generator().manual_seed(0)
    q = torch.randn(3, 7, 4, generator=random, requires_grad=True)
    actions = torch.randint(4, (3, 7), generator=random)
    targets, mask = torch.randn(3, 7, generator=random), torch.rand(3, 7, generator=random) < 0.5
    loss = icrl.td_loss(q, actions, targets, mask)
    loss.backward()
    error = (targets - q.gather(-1, actions[..., None])[..., 0])[mask]
    torch.testing.assert_close(loss, error.square().mean(), atol=1e-6, rtol=0)
    assert not q.grad[~mask].any()


@with_and_without
def test_only_theta_is_trained_and_phi_follows_by_equation_8(adapter):
    """Phi and a frozen base, which both share, get no gradient. Polyak changes phi only."""
    theta = make_run(adapter=adapter).network
    phi, tokens, ones = theta.target_copy(), torch.randint(0, 107, (2, 12)), torch.ones(2, 12)
    positions, trained = torch.arange(12).expand(2, -1), theta.trainable_parameters()
    q = theta(tokens, positions)
    y = icrl.td_targets(q, phi(tokens, positions), ones, 0.9 * ones)
    icrl.td_loss(q, tokens % 4, y, ones.bool()).backward()
    assert all(p.grad.abs().sum() > 0 for p in trained.values())
    rest = {*theta.parameters(), *phi.parameters()} - {*trained.values()}
    assert all(p.grad is None for p in rest)
    assert (phi.llama is theta.llama) == adapter
    old = {name: p.clone() for name, p in phi.trainable_parameters().items()}
    new = {name: p.data.normal_().clone() for name, p in trained.items()}
    icrl.polyak_update(theta, phi, 0.1)
    for name, p in phi.trainable_parameters().items():
        torch.testing.assert_close(p, 0.1 * new[name] + 0.9 * old[name])
        assert torch.equal(trained[name], new[name])


@every_tokenizer
@with_and_without
def test_playing_gives_the_q_values_of_a_full_forward_of_the_newest_episodes(tokenizer, adapter):
    """A full context drops its oldest episodes. A context without room for one is refused."""
    lakes = [Lake(("SFG",)), Lake(("SFF", "FFF", "FFG")), Lake(("SFF", "FHF", "FFG"))]
    with pytest.raises(ValueError, match=r"^9 tokens of context are too few for") as error:
        icrl.play(make_run(tokenizer, final_tokens=9, max_steps=9), lakes, seed=0)
    room, seen = int(re.search(r"take (\d+), or", str(error.value))[1]), []
    run = make_run(tokenizer, adapter, final_tokens=room, max_steps=9)
    past = [[CUT] * 20, [WON], []]

    class Watched(icrl.InContext):
        def act(self, *arguments):
            action = super().act(*arguments)
            seen.append(self.q.copy())
            return action

    env, forgotten = FrozenLake(lakes, rng := np.random.default_rng(0), max_steps=9), []
    played = rollout(env, agent := Watched(run, len(env), rng, given=past), 5)
    assert len(agent.trial_of) < 3  # the rows of trials that finished early were dropped
    for given, trial, steps in zip(past, played, np.stack(seen, 1)):
        remembered, q = [text_of(tokenizer, e) for e in given], []
        for text in (text_of(tokenizer, e) for e in trial):
            for match in re.finditer("|".join(ACTIONS), text):
                now = [*remembered, text[: match.start()]]
                if read(tokenizer, "".join(now))[0].numel() > room:
                    while read(tokenizer, "".join(now))[0].numel() > 3 * room // 4:
                        del now[0]
                    remembered = now[:-1]
                q.append(q_of(run, "".join(now) + "left")[-1])
            remembered.append(text)
        np.testing.assert_allclose(steps[: len(q)], q, atol=1e-4)
        forgotten.append(len(given) + len(trial) - len(remembered))
    assert len(set(forgotten)) > 1


def test_every_agent_plays_a_lake_with_links():
    """Its links say where actions lead. Its rows only say which tiles are S, F, H and G."""
    links = ((1, 0, 0, 0), (0, 2, 1, 1), (2, 4, 3, 0), (3, 3, 3, 3), (0, 0, 0, 0))
    tabular = partial(TabularQ, greedy_probability=icrl.greedy_probability)
    run = make_run()

    def transformer(env, rng):
        return icrl.InContext(run, len(env), rng)

    for make in (RandomAgent, tabular, Explorer, ValueIteration, transformer):
        for rows in [("SFFGH",), tuple("SFFGH")]:
            env = FrozenLake([Lake(rows, links)] * 2, rng := np.random.default_rng(0))
            for e in chain(*rollout(env, make(env, rng), 30)):
                for tile, action, onward in zip(e.observations, e.actions, e.observations[1:]):
                    assert links[tile][action] == onward
                assert e.episode_return == (e.observations[-1] == 3)
        assert e.episode_return == 1 or make not in (Explorer, ValueIteration)


def test_no_more_trials_are_played_together_than_memory_holds(monkeypatch):
    run, lakes, rows = make_run(), [Lake(("SFG",))] * 5, []
    cache = icrl.KVCache(run.network.llama, 1, run.recipe.context + icrl.MAX_PADDING).keys.nbytes
    monkeypatch.setattr(icrl, "memory_budget", lambda device: 2 * 4 * cache)
    monkeypatch.setattr(icrl, "InContext", lambda run, trials, *_: rows.append(trials))
    monkeypatch.setattr(icrl, "rollout", lambda env, *_, **__: [[]] * len(env))
    assert len(icrl.play(run, lakes, 0)) == 5
    assert rows == [2, 2, 1]


@pytest.mark.parametrize("first", [0, 10, 20])
def test_playing_follows_the_papers_schedule_and_changes_no_weight(first):
    """Episodes 0 and 1 are random, half of 10 and 11 is greedy, and all of 20 and 21."""
    run, past = make_run(max_steps=25), [[CUT]] * 100
    before = {name: tensor.clone() for name, tensor in run.network.state_dict().items()}
    lakes = random_lakes(100, np.random.default_rng(5), (3, 4), 2, test=True)
    played = icrl.play(run, lakes, 0, 2, first, past)
    q = [q_of(run, text_of(COMPACT, CUT, *trial))[len(CUT.actions) :] for trial in played]
    actions = np.concatenate([e.actions for trial in played for e in trial])
    share = (np.concatenate(q).argmax(1) == actions).mean()
    assert share == pytest.approx(1 / 4 + 3 / 4 * first / 20, abs=0.03 if first < 20 else 0)
    if first == 0:
        np.testing.assert_allclose(np.bincount(actions) / len(actions), 1 / 4, atol=0.03)
    assert all(torch.equal(tensor, before[n]) for n, tensor in run.network.state_dict().items())


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path):
    path = tmp_path / "x.csv"
    for content, fails, left in (("old", 0, "old"), ("half", 1, "old"), ("new", 0, "new")):
        outcome = pytest.raises(ZeroDivisionError) if fails else nullcontext()
        with outcome, icrl.atomic_write(path) as temporary:
            temporary.write_text(content)
            assert str(os.getpid()) in temporary.name  # two processes do not share it
            1 / (1 - fails)
        assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("x.csv", left)]


@pytest.mark.parametrize(("name", "value"), [(n, value) for n in WRONG for value in WRONG[n]])
def test_a_wrong_setting_is_refused_in_one_sentence(name, value, tmp_path):
    """It names the flag, for a run's recipe.json too. Missing or unknown keys are refused, too."""
    with pytest.raises(ValueError, match=rf"^--{name.replace('_', '-')} has [^\n]*$") as error:
        Recipe(**{name: value})
    recipe, other = asdict(Recipe()) | {name: value}, "the recipe of another version"
    for settings, message in ((recipe, error.value), (recipe | {"x": 3}, other), ({"x": 3}, other)):
        (tmp_path / "recipe.json").write_text(json.dumps(settings))
        sentence = rf"recipe.json[^\n]* {re.escape(str(message))}[^\n]*$"
        with pytest.raises(ValueError, match=sentence):
            icrl.load_run(tmp_path)


def test_the_worked_example_adds_up():
    """Targets, errors and loss follow from the Q-values."""
    command = [sys.executable, icrl.__file__]
    output = subprocess.check_output(command, text=True, env=ENVIRONMENT)
    rows = [row.split() for row in output.splitlines() if re.match(r" +\d+ +\d+ +-?\d\.", row)]
    actions = [ACTIONS.index(row.pop(6)) for row in rows]
    _, _, *q, reward, discount, target, error = np.array(rows, float).T
    value = np.append(np.max(q, 0)[1:], 0)  # of the next row
    np.testing.assert_allclose(target, reward + discount * value, atol=2e-3)
    np.testing.assert_allclose(error, target - np.choose(actions, q), atol=2e-3)
    assert float(output.split()[-1]) == pytest.approx(np.square(error).mean(), abs=2e-4)
