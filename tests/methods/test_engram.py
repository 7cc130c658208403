"""Engram against its definition, one token at a time, and what its safe form leaves alone."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from contract.families import build, tokens
from contract.runs import apart, one_pass
from tokenizers import Tokenizer, models
from tolerances import ONE_LAYER, WRONG
from transformers import PreTrainedTokenizerFast

from memretrofit.errors import ConfigError, StateError
from memretrofit.methods.engram import ENGRAM_27B, EngramConfig
from memretrofit.modules.bank import PAD, Preparation, Tokens
from memretrofit.modules.engram import EngramRead, NgramBank, Ngrams, compress_vocabulary
from memretrofit.ops.ngram import odd_multipliers
from memretrofit.patching.ledger import ledger_of
from memretrofit.retrofit import memory_parameters, patch

LENGTH, DILATION, WIDTH = 18, 3, 4
WIDE = EngramConfig(table_size=1_000_000, num_heads=2, value_dim=4)
"""So many rows that texts of a test share none by accident. They take no memory."""
PUBLISHED = replace(WIDE, starts_at_zero="projection")
CONVOLVED = replace(WIDE, conv_width=2)


def patched(config: EngramConfig, **options):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return patch(build("llama", **options), config)


def bank_of(model) -> NgramBank:
    return ledger_of(model).bank


def taught(config: EngramConfig, text: torch.Tensor, steps: int = 3):
    """A model whose bank learned a text, all of its parameters far from where they began."""
    model = patched(config)
    bank_of(model).open_rows([text])
    optimizer = torch.optim.SGD(memory_parameters(model).values(), lr=1.0)
    for _ in range(steps):
        optimizer.zero_grad()
        model(text[None], labels=text[None]).loss.backward()
        optimizer.step()
    return model


def by_hand(read: EngramRead, hidden, rows, *, root=True, dilation=DILATION):
    """What is added at each token [T, E], token by token, in float64."""
    weights = {name: x.detach().double() for name, x in read.named_parameters()}
    hidden, rows = hidden.double(), rows.double()
    width = hidden.shape[-1]

    def norm(x, scale, epsilon):
        return x / (x.square().mean() + epsilon).sqrt() * scale

    values, kept, out = [], [], []
    for h, e in zip(hidden, rows, strict=True):
        key = norm(weights["key_map.weight"] @ e, weights["key_scale"], 0)
        s = float(norm(h, weights["hidden_scale"], 0) @ key) / math.sqrt(width)
        s = math.copysign(math.sqrt(abs(s)), s) if root else s
        values.append(weights["value_map.weight"] @ e / (1 + math.exp(-s)))
        kept.append(norm(values[-1], weights["conv_scale"], 1e-5))
    for t, value in enumerate(values):
        taps = [t - dilation * (WIDTH - 1 - j) for j in range(WIDTH)]
        y = sum(weights["conv_weight"][j] * kept[tap] for j, tap in enumerate(taps) if tap >= 0)
        out.append(value + y / (1 + (-y).exp()))
    return torch.stack(out)


def live_read() -> tuple[EngramRead, torch.Tensor, torch.Tensor]:
    """A read with every parameter away from its start, hidden states [T, E] and rows [T, 8]."""
    torch.manual_seed(0)
    read = EngramRead(
        number=0, row_width=8, hidden_size=6, conv_width=WIDTH, dilation=DILATION, silent=True
    )
    with torch.no_grad():
        for parameter in read.parameters():
            parameter.add_(torch.randn(parameter.shape))
    return read, torch.randn(LENGTH, 6), torch.randn(LENGTH, 8)


def found(rows: torch.Tensor) -> Ngrams:
    live = (rows != 0).any(-1)
    return Ngrams(rows[None, :, None], live[None, :, None])


@torch.no_grad()
def test_a_read_is_its_definition():
    read, hidden, rows = live_read()
    added = read(hidden[None], found(rows), None).added
    assert apart(added[0].double(), by_hand(read, hidden, rows)) < ONE_LAYER
    assert apart(added[0].double(), by_hand(read, hidden, rows, root=False)) > WRONG
    assert apart(added[0].double(), by_hand(read, hidden, rows, dilation=1)) > WRONG


@torch.no_grad()
def test_each_layer_reads_rows_of_its_own():
    read, hidden, rows = live_read()
    expected = read(hidden[None], found(rows), None).added
    read.number = 1
    both = torch.stack([rows.flip(0), rows], dim=1)[None]
    live = torch.ones(both.shape[:3], dtype=torch.bool)
    assert torch.equal(read(hidden[None], Ngrams(both, live), None).added, expected)


@torch.no_grad()
def test_a_read_in_pieces_is_one_read():
    """With what it kept of the last tokens; with one less it is another."""
    read, hidden, rows = live_read()
    whole = read(hidden[None], found(rows), None)
    for cut in (1, 5, 12):
        past = whole.kept[:, :cut][:, -read.history :]
        rest = read(hidden[None, cut:], found(rows[cut:]), past)
        assert apart(rest.added, whole.added[:, cut:]) < ONE_LAYER
        assert apart(rest.kept, whole.kept[:, cut:]) < ONE_LAYER
        blind = read(hidden[None, cut:], found(rows[cut:]), None)
        assert apart(blind.added, whole.added[:, cut:]) > WRONG
    assert read.history == (WIDTH - 1) * DILATION


@torch.no_grad()
def test_the_convolution_reaches_its_taps_and_nothing_else():
    """One token has rows; what it says is heard at its own place and `dilation` apart."""
    read, hidden, rows = live_read()
    rows[:2] = rows[3:] = 0
    read_at = read(hidden[None], found(rows), None)
    heard = [2, 5, 8, 11]
    assert read_at.where[0].nonzero().flatten().tolist() == heard
    assert read_at.added[0].abs().sum(-1).nonzero().flatten().tolist() == heard
    past = read_at.kept[:, :6][:, -read.history :]
    later = read(hidden[None, 6:], found(rows[6:]), past)
    assert later.where[0].nonzero().flatten().tolist() == [2, 5]


@pytest.mark.parametrize("config", [WIDE, CONVOLVED], ids=["plain", "convolved"])
def test_text_that_shares_no_row_stays_as_it_is(config):
    """The reason for rows that start at zero, after training too."""
    text, other = tokens(1, LENGTH)[0] % 50, 50 + tokens(1, LENGTH, seed=1)[0] % 50
    model, base = taught(config, text), build("llama")
    own, foreign = (bank_of(model).addresses(Tokens.of(x))["rows"] for x in (text, other))
    assert not torch.isin(foreign, own).any()
    assert not bank_of(model)(Tokens.of(other)).live.any()
    assert torch.equal(one_pass(model, other[None]), one_pass(base, other[None]))
    assert apart(one_pass(model, text[None]), one_pass(base, text[None])) > WRONG
    both = torch.cat([other, text])[None]
    changed = (one_pass(model, both) != one_pass(base, both)).any(-1)[0]
    # nobody learned the n-grams of the first word of `text` behind the last one of `other`
    assert not changed[: LENGTH + 1].any()
    assert changed[LENGTH + 1 :].all()


def test_the_published_form_speaks_to_every_text():
    """Rows that nobody trained go through a projection that was."""
    text, other = tokens(1, LENGTH)[0] % 50, 50 + tokens(1, LENGTH, seed=1)[0] % 50
    model = taught(PUBLISHED, text)
    assert apart(one_pass(model, other[None]), one_pass(build("llama"), other[None])) > WRONG


@pytest.mark.parametrize("config", [WIDE, PUBLISHED], ids=["rows", "projection"])
def test_gradients_reach_the_rows_of_the_batch_alone(config):
    """A step leaves the open rows of other texts as they were, bit for bit."""
    texts = tokens(2, LENGTH)
    model = taught(config, texts.flatten(), steps=1)
    bank = bank_of(model)
    table = bank.table("rows")
    before, table.delta.grad = table.delta.detach().clone(), None
    optimizer = torch.optim.SparseAdam([table.delta], lr=0.1)
    # padding asks for nothing: the first five tokens of the row are hidden
    mask = torch.ones_like(texts[:1])
    mask[:, :5] = 0
    model(texts[:1], attention_mask=mask).logits.square().mean().backward()
    read = bank.addresses(Tokens(ids=texts[:1].masked_fill(mask == 0, PAD), new=LENGTH))["rows"]
    asked = torch.isin(table.delta_index, read)
    touched = table.delta.grad.coalesce().indices()[0]
    assert torch.equal(touched, asked.nonzero()[:, 0])
    optimizer.step()
    moved = (table.delta != before).any(-1)
    assert torch.equal(moved, asked)
    assert 0 < int(asked.sum()) < len(asked)


def test_a_bank_has_the_rows_of_its_primes():
    """Engram-27B: 5.7 billion values in two layers (section 4.1), of which a token reads 32 rows;
    no memory is held for any.
    """
    sizes = {"num_heads": 8, "hot_bytes": 0, "std": 1.0, "seed": 0}
    sizes |= {"table_size": ENGRAM_27B.table_size, "value_dim": ENGRAM_27B.value_dim}
    bank = NgramBank(layers=(1, 15), vocab_size=129_280, ngram_orders=(2, 3), **sizes)
    table = bank.table("rows")
    assert table.rows == int(bank.primes.sum())
    assert 5.7e9 < table.rows * ENGRAM_27B.value_dim < 5.85e9
    assert sum(table.nbytes.values()) == 0
    ids = tokens(1, 2)
    assert len(bank.addresses(Tokens(ids=ids, new=1))["rows"]) == 32
    assert bank(Tokens(ids=ids, new=1)).rows.shape == (1, 1, 2, 2 * 8 * 80)


def test_heads_do_not_share_rows():
    bank = bank_of(patched(replace(WIDE, table_size=11)))
    starts, primes = bank.offsets.flatten(), bank.primes.flatten()
    assert starts[0] == 0
    assert torch.equal(starts[1:], (starts + primes)[:-1])
    index = bank.addresses(Tokens(ids=tokens(4, 200), new=200))["rows"]
    assert torch.equal(index, torch.arange(bank.table("rows").rows))


def test_hash_constants_are_loaded_and_not_drawn():
    """A bank of another seed is the bank that was saved once its state is loaded."""
    saved, other = (bank_of(patched(replace(WIDE, seed=seed))) for seed in (0, 1))
    text = Tokens.of(tokens(1, LENGTH)[0])
    assert not torch.equal(other.addresses(text)["rows"], saved.addresses(text)["rows"])
    other.load_state_dict(saved.state_dict())
    assert torch.equal(other.addresses(text)["rows"], saved.addresses(text)["rows"])
    constants = {"token_map", "pad", "multipliers", "primes", "offsets"}
    assert saved.state_dict().keys() == constants


def test_the_second_and_the_middle_layer_read():
    assert bank_of(patched(WIDE, layers=8)).layers == (1, 4)
    assert bank_of(patched(WIDE, layers=1)).layers == (0,)


def test_taps_stand_as_far_apart_as_the_longest_ngram_is():
    model = patched(replace(PUBLISHED, ngram_orders=(2, 4), conv_width=3))
    assert [m.history for m in model.modules() if isinstance(m, EngramRead)] == [2 * 4]


PIECES = ["<pad>", "Apple", "apple", " apple", "áppLE", " ", "\t", "  ", "\n ", "pie", "", "\ufffd"]
"""What each token of a tiny tokenizer decodes to."""
CLASSES = [0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 4, 5]
"""Which of them are one."""


class _Pieces(PreTrainedTokenizerFast):
    def decode(self, token_ids, **_) -> str:
        return PIECES[token_ids[0]]


def tiny_tokenizer(**special) -> PreTrainedTokenizerFast:
    names = {f"piece{n}": n for n in range(len(PIECES))}
    words = Tokenizer(models.WordLevel(names, unk_token="piece9"))
    return _Pieces(tokenizer_object=words, **special)


def test_tokens_that_read_the_same_are_one():
    """Case, accents and surrounding space; a lone space stays one, and a broken character keeps
    its piece."""
    tokenizer = tiny_tokenizer(pad_token="piece0")
    token_map, count, pad = compress_vocabulary(tokenizer, len(PIECES) + 3)
    assert token_map.tolist() == [*CLASSES, 0, 0, 0]  # ids that the tokenizer lacks are padding
    assert (count, pad) == (6, 0)
    assert compress_vocabulary(tiny_tokenizer(eos_token="piece9"), 12)[1:] == (6, 3)
    assert compress_vocabulary(tiny_tokenizer(), 12)[1:] == (7, 6)  # padding is one more


def test_a_prepared_bank_finds_the_same_rows_for_tokens_that_are_one():
    bank = bank_of(patched(WIDE))
    shouted, plain = torch.tensor([1, 9, 5]), torch.tensor([4, 9, 7])

    def rows(text):
        return bank.addresses(Tokens.of(text))["rows"]

    assert not torch.equal(rows(shouted), rows(plain))
    embedding = torch.zeros(101, 1)
    nothing = Preparation(examples=[], generic=[], embedding=embedding)
    before = rows(plain)
    bank.prepare(nothing)
    assert torch.equal(rows(plain), before)
    bank.prepare(replace(nothing, tokenizer=tiny_tokenizer(pad_token="piece0")))
    assert torch.equal(rows(shouted), rows(plain))
    assert torch.equal(bank.multipliers, odd_multipliers(0, bank.layers, 3, max(CLASSES) + 1))
    bank.open_rows([plain])
    with pytest.raises(StateError, match="before rows are opened"):
        bank.prepare(replace(nothing, tokenizer=tiny_tokenizer(pad_token="piece0")))


def test_before_a_row_stands_the_padding_of_its_tokenizer():
    """As if so many padding tokens were there; an unprepared bank has an id for that alone."""
    bank = bank_of(patched(WIDE))
    alone, behind = (Tokens(ids=torch.tensor([ids]), new=1) for ids in ([4], [9, 9, 4]))

    def rows(tokens):
        return bank.addresses(tokens)["rows"]

    assert not torch.isin(rows(alone), rows(behind)).any()
    tokenizer = tiny_tokenizer(pad_token="piece9")
    bank.prepare(
        Preparation(examples=[], generic=[], embedding=torch.zeros(101, 1), tokenizer=tokenizer)
    )
    assert torch.equal(rows(alone), rows(behind))


@pytest.mark.parametrize("orders", [(), (3, 2), (2, 2), (0, 1)])
def test_orders_that_name_no_ngrams_are_refused(orders):
    with pytest.raises(ConfigError, match="ngram_orders"):
        EngramConfig(ngram_orders=orders)
