"""From transcript to tokens to Q-values to loss to play, each claim against a hand-worked example or another computation."""

import hashlib
import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers

import icrl
from frozen_lake import ACTIONS, Episode, FrozenLake, Lake, RandomPlayer, TabularQ, random_lakes, roll_out
from ia3 import IA3, replacing
from icrl import (
    COMPACT_TEMPLATE,
    LLAMA_TEMPLATE,
    Batch,
    Encoder,
    InContext,
    QNetwork,
    choose_template,
    collate,
    compact_tokenizer,
    draw_set,
    encode_slice,
    model_probability,
    polyak_update,
    td_loss,
    td_targets,
)
from llama import KVCache, Llama, LlamaConfig

ENCODER = Encoder(compact_tokenizer(), COMPACT_TEMPLATE)


WORDS = ["observation", "action", "reward", "edit", *ACTIONS, "1.0", "...", *map(str, range(100))]
LLAMA3_MARKERS = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
CHATML_MARKERS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
LLAMA3_SPLIT = (  # how Llama 3's tokenizer.json cuts text into words before it merges
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def byte_tokenizer(markers: list[str], words: list[str] = WORDS) -> Tokenizer:
    """A byte-level BPE as Llama 3's or SmolLM2's, trained on a few words."""
    tokenizer = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(LLAMA3_SPLIT), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)])
    trainer = trainers.BpeTrainer(vocab_size=500, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False)
    tokenizer.train_from_iterator(words * 20, trainer)
    tokenizer.add_special_tokens(markers)
    return tokenizer


def sentence_tokenizer() -> Tokenizer:
    """A tokenizer as Llama 2's or TinyLlama's: SentencePiece's underscore before every word, and no marker but <s> and </s>."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["<unk>", "<s>", "</s>"], show_progress=False)
    tokenizer.train_from_iterator(WORDS * 20, trainer)
    return tokenizer


ENCODERS = {
    "compact": ENCODER,
    "Llama 3": Encoder(byte_tokenizer(LLAMA3_MARKERS)),
    "ChatML": Encoder(byte_tokenizer(CHATML_MARKERS)),
    "sentence": Encoder(sentence_tokenizer()),
}
every_encoder = pytest.mark.parametrize("encoder", ENCODERS.values(), ids=ENCODERS)


def network(adapter: bool = False, seed: int = 0, vocabulary: int = 107, action_tokens=ENCODER.action_tokens) -> QNetwork:
    """A small random network whose Q-values are far from equal."""
    torch.manual_seed(seed)
    config = LlamaConfig(vocabulary, 32, 48, 2, 4, 2, head_dim=8, rope_theta=10_000.0)
    llama = Llama(config)
    for parameter in llama.parameters():
        if parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=0.3)
    if not adapter:
        return QNetwork(llama, action_tokens)
    vectors = IA3.for_llama(config)
    for vector in vectors.parameters():
        torch.nn.init.normal_(vector, mean=1.0, std=0.3)
    return QNetwork(llama, action_tokens, vectors)


def episode(tiles, actions, paid=0.0, truncated=False) -> Episode:
    rewards = np.zeros(len(actions), np.float32)
    rewards[-1] = paid
    return Episode(np.array(tiles), np.array(actions), rewards, truncated)


def played_lakes(count: int = 6, episodes: int = 50, seed: int = 0):
    rng = np.random.default_rng(seed)
    env = FrozenLake(lakes := random_lakes(count, rng, (3, 4), 2), rng)
    return lakes, roll_out(env, TabularQ(env, rng, lambda e: e / episodes), episodes)


# ------------------------------------------------------------------------------------------------- transcript to tokens


def test_llama_template_is_the_notebooks_text():
    """The example of the paper's notebook, to the letter."""

    def header(role):
        return f"<|start_header_id|>{role}<|end_header_id|>"

    expected = (
        f"<|begin_of_text|>{header('observation')}2<|eot_id|>{header('action')}down<|eot_id|>{header('observation')}6<|eot_id|>"
        f"{header('action')}right<|eot_id|>{header('observation')}7<|eot_id|>{header('reward')}1.0<|eot_id|><|end_of_text|>"
    )
    encoder = ENCODERS["Llama 3"]
    assert encoder.text(episode([2, 6, 7], [1, 2], paid=1.0)) == expected
    cut = encoder.text(episode([2, 6, 7], [1, 2], truncated=True))
    assert cut.endswith(f"7<|eot_id|>{header('edit')}...<|eot_id|><|end_of_text|>")


@every_encoder
def test_encoding_by_table_equals_tokenizing_the_whole_text(encoder):
    """Message by message or all at once: the same tokens."""
    _, played = played_lakes(2)
    for e in itertools.chain(*played):
        tokens, counts = encoder.join(np.array([encoder.messages(e)]))
        assert tokens[0].tolist() == encoder.tokenizer.encode(encoder.text(e), add_special_tokens=False).ids
        assert counts[0] == tokens.shape[1]


def test_the_template_follows_from_the_vocabulary():
    """Llama 3's markers come first, then ChatML's, then <s> and </s>; without any the tokenizer is refused."""
    assert {name: encoder.template.name for name, encoder in ENCODERS.items()} == {
        "compact": "two tokens a step",
        "Llama 3": "Llama 3's markers",
        "ChatML": "ChatML's markers",
        "sentence": "<s> and </s>",
    }
    assert choose_template(byte_tokenizer(CHATML_MARKERS + LLAMA3_MARKERS)) == LLAMA_TEMPLATE
    with pytest.raises(ValueError, match="has neither the markers of Llama 3"):
        Encoder(byte_tokenizer(["<|im_start|>", "<|eot_id|>"]))


def test_an_action_word_of_several_tokens_is_refused():
    """It would not be clear whose logit the Q-value is."""
    with pytest.raises(ValueError, match="action word 'left' is not a single token"):
        Encoder(byte_tokenizer(LLAMA3_MARKERS, words=["up", "down", "right"]))


def test_a_tokenizer_that_joins_messages_is_refused():
    """Tokens that reach over the end of a message would make a transcript's tokens other than its messages' tokens."""
    tokenizer = byte_tokenizer(LLAMA3_MARKERS)
    plain = replace(LLAMA_TEMPLATE, begin="", observation="{}", prompt=":", action="{}", reward="{}", cut="...", end="")
    assert tokenizer.encode("12:left").ids != [i for text in ("1", "2", ":", "left") for i in tokenizer.encode(text).ids]
    with pytest.raises(ValueError, match="does not cut a transcript where its messages end"):
        Encoder(tokenizer, plain)


def test_join_pads_rows_at_the_right():
    """Rows of different lengths keep their own tokens, in order."""
    rows = [m.tolist() for m in map(ENCODER.messages, (episode([0, 1], [2]), episode([5, 6, 7], [2, 2], paid=1.0)))]
    width = max(map(len, rows))
    tokens, counts = ENCODER.join(np.array([r + [0] * (width - len(r)) for r in rows]))
    for row, count, messages in zip(tokens, counts, rows):
        assert row[:count].tolist() == ENCODER.join(np.array([messages]))[0][0].tolist()


def test_an_action_word_of_two_tokens_is_refused():
    """A Q-value is one token's logit, so an action has to be one token."""
    tokenizer = Tokenizer(models.WordLevel({"l": 0, "eft": 1, "?": 2}, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("l", "isolated")
    with pytest.raises(ValueError, match="'left' is not a single token"):
        Encoder(tokenizer, COMPACT_TEMPLATE)


# ---------------------------------------------------------------------------------------------------- tokens to slices


def decode(tokens) -> list[str]:
    words = {i: word for word, i in ENCODER.tokenizer.get_vocab().items()}
    return [words[t] for t in tokens.tolist()]


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000), length=st.integers(20, 600), quality=st.sampled_from(["high", "mid", "low"]))
def test_a_slice_has_exactly_T_tokens_and_decodes_to_legal_transitions(seed, length, quality):
    """Every word follows from the ones before it on one of the lakes: tile, action, the tile it leads to, reward, end."""
    rng = np.random.default_rng(seed)
    lakes, played = played_lakes(seed=seed % 7)
    order = rng.integers(0, len(lakes), 100)
    batch = encode_slice(ENCODER, (draw_set(played[i], rng, quality) for i in order), length, 0.9)
    assert batch.tokens.shape == (1, length)
    words = decode(batch.tokens[0])
    positions = batch.positions[0].tolist()
    assert positions == sorted(set(positions))
    assert all(words[p].isdigit() for p in positions)  # Q is read at a tile ...
    inside = [p for p in positions if p + 1 < length]
    assert [words[p + 1] for p in inside] == [ACTIONS[a] for a in batch.actions[0, : len(inside)]]  # ... before its action
    assert len(inside) == sum(word in ACTIONS for word in words)
    assert batch.mask[0, :-1].all()
    assert batch.mask[0, -1] == (batch.discounts[0, -1] == 0)  # no target without the position that it bootstraps from

    episodes = " ".join(words).split("<|end_of_text|>")
    owner = 0
    for text in episodes[:-1]:  # the last one is cut off
        e = text.split()
        while not legal(e, lakes[order[owner]]):
            owner += 1  # the next set begins
            assert owner < 100, text


def legal(words: list[str], lake: Lake) -> bool:
    env = FrozenLake([lake], np.random.default_rng(0))
    if int(words[0]) >= lake.tiles.size or lake.tiles[int(words[0])] != "S":
        return False
    env.state[:] = int(words[0])
    rest = words[1:]
    while rest and rest[0] in ACTIONS:
        state, reward, terminated, truncated = env.step(np.array([ACTIONS.index(rest[0])]))
        if str(state[0]) != rest[1]:
            return False
        rest = rest[2:]
        if terminated or truncated:
            return rest == (["1.0"] if reward else []) + (["..."] if truncated else [])
    return False


def test_rewards_and_discounts_of_a_slice_are_those_of_its_episodes():
    """r = 1 where the goal is entered, discount 0 at each episode's last action and gamma before."""
    first, second = episode([0, 1, 2], [2, 2], paid=1.0), episode([0, 0, 3], [0, 1])
    batch = encode_slice(ENCODER, iter([[first, second], [first] * 20]), 13, gamma=0.9)
    assert " ".join(decode(batch.tokens[0])) == "0 right 1 right 2 1.0 <|end_of_text|> 0 left 0 down 3 <|end_of_text|>"
    assert batch.rewards[0].tolist() == [0, 1, 0, 0]
    assert batch.discounts[0].tolist() == pytest.approx([0.9, 0, 0.9, 0])
    assert batch.mask.all()
    across = encode_slice(ENCODER, iter([[first, second], [first] * 20]), 13, gamma=0.9, gamma_episode=0.5)
    assert across.discounts[0].tolist() == pytest.approx([0.9, 0.5, 0.9, 0])  # 0 where the lake changes


def test_a_slice_cut_before_the_next_tile_leaves_its_last_action_out():
    """Without the next action position in the slice there is no target, except at an episode's end."""
    e = episode([0, 1, 2], [2, 2], paid=1.0)  # 0 right 1 right 2 1.0 <|end_of_text|>
    for length, masks in ((1, [False]), (2, [False]), (3, [True, True]), (4, [True, True]), (5, [True, True])):
        batch = encode_slice(ENCODER, iter([[e]]), length, gamma=0.9)
        assert batch.mask[0].tolist() == masks, length


def test_collate_pads_what_the_loss_ignores():
    """Shorter slices are filled up with masked positions."""
    _, played = played_lakes()
    rng = np.random.default_rng(0)
    slices = [encode_slice(ENCODER, (draw_set(played[i], rng) for i in itertools.count()), 100, 0.9) for _ in range(2)]
    slices[1] = Batch(slices[1].tokens, *(field[:, :-3] for field in slices[1][1:]))
    batch = collate(slices)
    assert batch.tokens.shape == (2, 100)
    assert batch.mask[1].sum() == slices[1].mask.sum()
    assert torch.equal(batch.actions[0, : slices[0].actions.shape[1]], slices[0].actions[0])


def test_targets_of_a_real_batch_are_those_of_its_rewards():
    """With Q = 0 everywhere y = r; with Q = 1 everywhere y = r + gamma, or r alone at the end of an episode."""
    _, played = played_lakes(4)
    rng = np.random.default_rng(0)
    sets = (draw_set(played[i % 4], rng) for i in itertools.count())
    batch = collate([encode_slice(ENCODER, sets, length, 0.9) for length in [101] * 20])
    for value in (0.0, 1.0):
        q = torch.full((*batch.positions.shape, 4), value)
        y = td_targets(q, q, batch.rewards, batch.discounts)[batch.mask]
        expected = batch.rewards + value * torch.where(batch.discounts > 0, 0.9, 0.0)
        torch.testing.assert_close(y, expected[batch.mask])


def test_sets_have_20_to_40_episodes_of_one_lake():
    """Every size from 20 to 40 occurs, without replacement."""
    _, (played, *_) = played_lakes(1, 60)
    rng = np.random.default_rng(0)
    sizes = []
    for _ in range(500):
        drawn = draw_set(played, rng)
        sizes.append(len(drawn))
        assert len({id(e) for e in drawn}) == len(drawn)
        assert all(any(e is p for p in played) for e in drawn)
    assert set(sizes) == set(range(20, 41))


def test_quality_weights_change_the_success_rate_in_the_right_direction():
    """Figure 6: high draws more successful episodes than mid, mid more than low."""
    half = [episode([0, 1], [2], paid=float(i % 2)) for i in range(200)]
    rng = np.random.default_rng(0)
    rate = {q: np.mean([e.total for _ in range(200) for e in draw_set(half, rng, q)]) for q in ("high", "mid", "low")}
    # five to one, drawn without replacement from many: a little less than 5/6, 1/2, a little more than 1/6
    assert rate["high"] == pytest.approx(5 / 6, abs=0.04)
    assert rate["mid"] == pytest.approx(1 / 2, abs=0.03)
    assert rate["low"] == pytest.approx(1 / 6, abs=0.04)


def test_the_order_within_a_set_carries_no_information():
    """An episode's place in its set is independent of when Q-learning played it: no algorithm distillation."""
    numbered = [episode([0, 1], [2], paid=float(i)) for i in range(100)]
    rng = np.random.default_rng(0)
    pairs = [(place / len(s), e.total) for s in (draw_set(numbered, rng) for _ in range(400)) for place, e in enumerate(s)]
    correlation = np.corrcoef(np.array(pairs).T)[0, 1]
    assert abs(correlation) < 4 / math.sqrt(len(pairs))  # four standard errors


# ------------------------------------------------------------------------------------------------------------ learning


def test_targets_and_loss_of_two_episodes_by_hand():
    """Equations 4, 6 and 7 on a transcript of two episodes and a cut-off slice, worked out in the comments."""
    # gamma = 0.9. Positions: t0, t1 (episode one, into the goal), t2, t3 (episode two, cut off by the step limit), t4 (episode
    # three: the slice ends before its next tile), one column of padding.
    q_theta = torch.tensor([[[0.1, 0.5, 0.2, 0.0], [0.3, 0.1, 0.9, 0.2], [0.0, 0.4, 0.1, 0.6], [0.7, 0.2, 0.1, 0.0],
                             [0.2, 0.2, 0.8, 0.1], [9.0, 9.0, 9.0, 9.0]]], requires_grad=True)  # fmt: skip
    q_phi = torch.tensor([[[0.2, 0.4, 0.1, 0.3], [0.8, 0.2, 0.5, 0.1], [0.1, 0.3, 0.2, 0.4], [0.6, 0.9, 0.3, 0.2],
                           [0.3, 0.1, 0.7, 0.2], [9.0, 9.0, 9.0, 9.0]]])  # fmt: skip
    actions = torch.tensor([[1, 2, 3, 0, 2, 0]])
    rewards = torch.tensor([[0.0, 1.0, 0.0, 0.0, 0.0, 0.0]])
    discounts = torch.tensor([[0.9, 0.0, 0.9, 0.0, 0.9, 0.0]])
    mask = torch.tensor([[True, True, True, True, False, False]])
    y = td_targets(q_theta, q_phi, rewards, discounts)
    # t0: theta's best at t1 is action 2 (0.9), which phi values 0.5 (phi's own best would be 0.8): 0 + 0.9 * 0.5 = 0.45
    # t1: terminal, y = r = 1
    # t2: theta's best at t3 is action 0 (0.7), which phi values 0.6 (phi's own best would be 0.9): 0 + 0.9 * 0.6 = 0.54
    # t3: truncated, the last action of its episode, y = r = 0
    # t4: not in the loss: its next tile is beyond the slice
    torch.testing.assert_close(y[0, :4], torch.tensor([0.45, 1.0, 0.54, 0.0]))
    assert not y.requires_grad
    loss = td_loss(q_theta, actions, y, mask)
    # errors y - Q_theta(a): 0.45 - 0.5 = -0.05; 1 - 0.9 = 0.1; 0.54 - 0.6 = -0.06; 0 - 0.7 = -0.7
    # mean of squares: (0.0025 + 0.01 + 0.0036 + 0.49) / 4 = 0.126525
    torch.testing.assert_close(loss, torch.tensor(0.126525))
    loss.backward()
    # dL/dQ(a) = -2 / 4 * error, elsewhere 0
    expected = torch.zeros(6, 4)
    expected[0, 1], expected[1, 2], expected[2, 3], expected[3, 0] = 0.025, -0.05, 0.03, 0.35
    torch.testing.assert_close(q_theta.grad[0], expected)


def test_the_normalised_loss_by_hand():
    """The notebook's reading: each error is divided by the mean target of its row, over the positions in the loss."""
    q_theta = torch.zeros(2, 3, 4)
    q_theta[0, :, 1], q_theta[1, :, 1] = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([4.0, 5.0, 6.0])
    y = torch.tensor([[2.0, 6.0, 9.0], [4.0, 7.0, 4.0]])
    mask = torch.tensor([[True, True, False], [True, True, True]])
    # row 0: mean target (2 + 6) / 2 = 4, errors (2 - 1) / 4 = 0.25, (6 - 2) / 4 = 1
    # row 1: mean target (4 + 7 + 4) / 3 = 5, errors 0, (7 - 5) / 5 = 0.4, (4 - 6) / 5 = -0.4
    # mean of squares: (0.0625 + 1 + 0 + 0.16 + 0.16) / 5 = 0.2765
    loss = td_loss(q_theta, torch.ones(2, 3, dtype=torch.long), y, mask, normalised=True)
    torch.testing.assert_close(loss, torch.tensor(0.2765))


def test_a_batch_splits_into_parts_of_whole_slices():
    """In order, the last part smaller, every field alike."""
    batch = Batch(*(torch.arange(15).view(5, 3) + i for i in range(6)))
    parts = batch.split(2)
    assert [len(part.tokens) for part in parts] == [2, 2, 1]
    for field, of_parts in zip(batch, zip(*parts)):
        assert torch.equal(torch.cat(of_parts), field)


@pytest.mark.parametrize("adapter", [False, True], ids=["every weight", "ia3"])
def test_checkpointing_changes_no_value_and_no_gradient(adapter):
    """Computing the layers once more in the backward pass gives the gradients that keeping everything gives."""
    tokens, positions = torch.randint(0, 107, (2, 12)), torch.arange(0, 12, 2).expand(2, -1)
    outcomes = []
    for checkpointing in (False, True):
        theta = network(adapter)
        theta.llama.checkpointing = checkpointing
        q = theta(tokens, positions)
        q.square().mean().backward()
        outcomes.append([q.detach()] + [p.grad for p in theta.trained().values()])
    assert all(torch.equal(kept, computed) for kept, computed in zip(*outcomes))


@pytest.mark.parametrize("adapter", [False, True], ids=["every weight", "ia3"])
def test_no_gradient_reaches_phi_and_only_theta_is_trained(adapter):
    """After a backward pass the trained part of theta has gradients; phi and a frozen base have none."""
    theta = network(adapter)
    phi = theta.delayed_copy()
    tokens, positions = torch.randint(0, 107, (2, 12)), torch.arange(0, 12, 2).expand(2, -1)
    q = theta(tokens, positions)
    y = td_targets(q, phi(tokens, positions), torch.rand(2, 6), torch.full((2, 6), 0.9))
    td_loss(q, torch.randint(0, 4, (2, 6)), y, torch.ones(2, 6, dtype=torch.bool)).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for name, p in theta.trained().items() if "lm_head" not in name)
    assert all(p.grad is None and not p.requires_grad for p in phi.parameters() if id(p) not in map(id, theta.parameters()))
    if adapter:
        assert set(theta.trained()) == {"key", "value", "feed_forward"}
        assert all(p.grad is None and not p.requires_grad for p in theta.llama.parameters())
        assert phi.llama is theta.llama  # the frozen base is shared ...
    else:
        assert phi.llama is not theta.llama
    for name, parameter in phi.trained().items():
        assert parameter.data_ptr() != theta.trained()[name].data_ptr()  # ... and what is trained is copied


def test_polyak_is_equation_8():
    """phi <- alpha theta + (1 - alpha) phi, on every trained tensor, and theta stays."""
    theta, phi = network(True, seed=1), network(True, seed=2)
    before = {name: (p.detach().clone(), phi.trained()[name].detach().clone()) for name, p in theta.trained().items()}
    polyak_update(theta, phi, 0.1)
    for name, (old_theta, old_phi) in before.items():
        torch.testing.assert_close(phi.trained()[name], 0.1 * old_theta + 0.9 * old_phi)
        assert torch.equal(theta.trained()[name], old_theta)


def test_q_values_are_the_action_words_logits():
    """Four rows of the vocabulary matrix give what the whole matrix gives."""
    net = network()
    tokens = torch.randint(0, 107, (2, 9))
    positions = torch.tensor([[0, 3, 8], [1, 2, 7]])
    logits = net.llama(tokens) @ net.llama.vocabulary.T  # (B, T, V)
    expected = torch.stack([logits[b, positions[b]][:, torch.as_tensor(ENCODER.action_tokens)] for b in range(2)])
    torch.testing.assert_close(net(tokens, positions), expected)


def test_changing_a_later_token_changes_no_earlier_q_value():
    """Causality: Q(tau_t, .) depends on tau_t alone."""
    net = network()
    tokens, positions = torch.randint(0, 107, (1, 20)), torch.arange(20)[None]
    other = tokens.clone()
    other[0, 11:] = (other[0, 11:] + 1) % 107
    assert torch.equal(net(tokens, positions)[:, :11], net(other, positions)[:, :11])
    assert not torch.allclose(net(tokens, positions)[:, 11:], net(other, positions)[:, 11:])


# ------------------------------------------------------------------------------------------------------------- playing


def play(net, encoder, lakes, episodes, rng, context, probability=model_probability, max_steps=100):
    """The episodes of each trial, and the Q-values (steps, A) that were read in it."""
    env, record = FrozenLake(lakes, rng, max_steps=max_steps), [[] for _ in lakes]
    player = InContext(net, encoder, env, rng, context, probability)

    class Watched:
        learn = player.learn

        def act(self, state, episode, playing):
            action = player.act(state, episode, playing)
            for i in np.flatnonzero(playing):
                record[i].append(player.q[i].copy())
            return action

    played = roll_out(env, Watched(), episodes)
    assert [len(steps) for steps in record] == [sum(len(e.actions) for e in trial) for trial in played]
    return played, record


def test_model_probability_is_the_papers_schedule():
    """0, 0, 0.1, 0.1, ... 0.9, 0.9 over twenty episodes, then 1; for one number or an array of them."""
    expected = [p for tenth in range(10) for p in (tenth / 10, tenth / 10)] + [1.0] * 10
    assert [model_probability(e) for e in range(30)] == pytest.approx(expected)
    assert model_probability(np.arange(30)) == pytest.approx(expected)


@every_encoder
@pytest.mark.parametrize("adapter", [False, True], ids=["no adapter", "ia3"])
def test_playing_with_the_cache_gives_the_q_values_of_a_full_forward(encoder, adapter):
    """Ragged rows, fed in chunks as the trials go, against each trial's whole transcript in one pass: equal to 1e-4."""
    size = encoder.tokenizer.get_vocab_size()
    net = network(adapter, vocabulary=size, action_tokens=encoder.action_tokens)
    lakes = random_lakes(5, np.random.default_rng(1), (2, 4), 2)
    played, record = play(net, encoder, lakes, 4, np.random.default_rng(0), 4000, max_steps=30)
    assert len({sum(len(e.actions) for e in trial) for trial in played}) > 1  # the rows are ragged
    for trial, steps in zip(played, record):
        text = "".join(encoder.text(e) for e in trial)
        tokens = torch.tensor([encoder.tokenizer.encode(text, add_special_tokens=False).ids])
        words = torch.isin(tokens[0], torch.as_tensor(encoder.action_tokens))
        positions = torch.nonzero(words).T - 1
        q = net(tokens, positions)[0].detach().numpy()
        np.testing.assert_allclose(np.stack(steps), q, atol=1e-4)
        assert q.std() > 0.1  # or else the comparison would say little


def test_a_full_context_forgets_its_oldest_whole_episodes():
    """Each Q-value is that of the newest episodes that had room, counted anew here, row by row."""
    net, context = network(), 180
    lakes = [Lake(("SFF", "FFF", "FFG")), Lake(("SFG",)), Lake(("SFF", "FHF", "FFG"))]
    played, record = play(net, ENCODER, lakes, 12, np.random.default_rng(0), context, lambda e: 0 * e, max_steps=40)
    forgotten = []
    for i, trial in enumerate(played):
        ids = [ENCODER.join(np.array([ENCODER.messages(e)]))[0][0] for e in trial]
        steps = record[i]
        first = step = 0  # the oldest episode in the context, worked out anew
        for number, e in enumerate(trial):
            for k in range(len(e.actions)):
                tokens = np.concatenate([*ids[first:number], ids[number][: 2 * k + 1]])
                if len(tokens) > context:
                    # what is fed next: the last action and its tile, or that, reward or cut, end, and the first tile
                    chunk = 2 if k else 4 + int(trial[number - 1].total > 0 or trial[number - 1].truncated)
                    limit = min(3 * context // 4, context - chunk)
                    first = number if k else number - 1
                    while first and sum(map(len, ids[first - 1 : number])) + 2 * k + 1 - chunk <= limit:
                        first -= 1
                    tokens = np.concatenate([*ids[first:number], ids[number][: 2 * k + 1]])
                q = net(torch.from_numpy(tokens)[None], torch.tensor([[len(tokens) - 1]]))[0, 0].detach().numpy()
                np.testing.assert_allclose(steps[step], q, atol=1e-4, err_msg=f"trial {i}, episode {number}, step {k}")
                step += 1
        assert step == len(steps)
        forgotten.append(first)
    assert max(forgotten) > 0  # it had to forget ...
    assert len(set(forgotten)) > 1  # ... but not every row at the same time


@pytest.mark.parametrize("room", [1, 3, 100])
def test_playing_is_legal_and_changes_no_weight(room, monkeypatch):
    """A hash of every weight is the same before and after, every transition is the lake's, however many trials fit the memory."""
    groups = []
    a_trial = (512 + 8) * 2 * 2 * 2 * 8 * 4  # slots, keys and values, layers, heads, head size, bytes
    monkeypatch.setattr(icrl, "free_memory", lambda device: 1 + room * a_trial / 0.8)
    world = lambda lakes, rng, max_steps: groups.append(len(lakes)) or FrozenLake(lakes, rng, max_steps=max_steps)  # noqa: E731
    net = network()
    digest = lambda: hashlib.sha256(b"".join(p.detach().numpy().tobytes() for p in net.parameters())).hexdigest()  # noqa: E731
    before, lakes = digest(), random_lakes(20, np.random.default_rng(3))
    played = icrl.play(net, ENCODER, lakes, 6, np.random.default_rng(0), 512, world=world)
    assert digest() == before
    assert groups == {1: [1] * 20, 3: [3] * 6 + [2], 100: [20]}[room]
    for lake, trial in zip(lakes, played):
        assert len(trial) == 6
        assert all(legal(ENCODER.text(e).split()[:-1], lake) for e in trial)


def test_given_episodes_stand_at_the_beginning_of_the_context():
    """Of different lengths, in one batch: the first Q-values are those of a full forward of the given text and the first tile."""
    net = network()
    lakes = [Lake(("SFF", "FFF", "FFG")), Lake(("SFG",))]
    given = [[episode([0, 1, 2, 5, 8], [2, 2, 1, 1], paid=1.0)], [episode([0, 1], [2], truncated=True), episode([0, 0], [0])]]
    rng = np.random.default_rng(0)
    env = FrozenLake(lakes, rng)
    player = InContext(net, ENCODER, env, rng, 512)
    player.remember(given)
    player.act(env.reset(), np.zeros(2, int), np.ones(2, bool))
    for trial, episodes in enumerate(given):
        text = "".join(ENCODER.text(e) for e in episodes) + "0 "
        tokens = torch.tensor([ENCODER.tokenizer.encode(text).ids])
        expected = net(tokens, torch.tensor([[tokens.shape[1] - 1]]))[0, 0].detach().numpy()
        np.testing.assert_allclose(player.q[trial], expected, atol=1e-4)


def test_the_first_episodes_are_uniformly_random():
    """With probability 0 the network's opinion does not matter: the return is a random player's."""
    lakes = random_lakes(300, np.random.default_rng(5), (3, 3), 2)
    played, _ = play(network(), ENCODER, lakes, 2, np.random.default_rng(0), 512)
    actions = np.concatenate([e.actions for trial in played for e in trial])
    np.testing.assert_allclose(np.bincount(actions, minlength=4) / len(actions), 0.25, atol=0.03)
    env = FrozenLake(lakes, np.random.default_rng(1))
    by_chance = np.mean([e.total for trial in roll_out(env, RandomPlayer(env, env.rng), 10) for e in trial])
    assert np.mean([e.total for trial in played for e in trial]) == pytest.approx(by_chance, abs=0.08)


def test_a_context_too_small_for_one_episode_is_refused():
    """One sentence with the number that is needed."""
    with pytest.raises(ValueError, match="200 tokens of context are too few"):
        play(network(), ENCODER, random_lakes(1, np.random.default_rng(0)), 1, np.random.default_rng(0), 200)


def test_cache_rows_of_finished_trials_do_not_disturb_the_others():
    """Playing lakes together or alone, without coins and with a single start each: the same episodes."""
    net = network(seed=4)
    lakes = [lake for lake in random_lakes(60, np.random.default_rng(8), (3, 4), 2) if "".join(lake.rows).count("S") == 1][:8]
    together, _ = play(net, ENCODER, lakes, 5, np.random.default_rng(0), 512, np.ones_like, max_steps=25)
    assert len({sum(len(e.actions) for e in trial) for trial in together}) > 2  # they end at different times
    for lake, trial in zip(lakes, together):
        ((alone,), _) = play(net, ENCODER, [lake], 5, np.random.default_rng(9), 512, np.ones_like, max_steps=25)
        assert [e.actions.tolist() for e in alone] == [e.actions.tolist() for e in trial]


# --------------------------------------------------------------------------------------------------------------- files


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path):
    """If writing fails, the old file stays and nothing else is left."""
    path = tmp_path / "x.csv"
    path.write_text("old")

    def fail_half_way():
        with replacing(path) as temporary:
            temporary.write_text("half")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail_half_way()
    assert path.read_text() == "old"
    with replacing(path) as temporary:
        temporary.write_text("new")
    assert path.read_text() == "new"
    assert [p.name for p in tmp_path.iterdir()] == ["x.csv"]


def test_the_cache_refuses_what_does_not_fit():
    """A chunk beyond the last slot ends with a sentence, not with a wrong answer."""
    net = network()
    cache = KVCache(net.llama.config, 1, 4)
    with pytest.raises(ValueError, match="holds 4 tokens"):
        net(torch.zeros(1, 5, dtype=torch.long), torch.zeros(1, 1, dtype=torch.long), cache)
