"""TokMem: what rows learn, what they leave alone, and that they come back from disk."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from contract.families import VOCABULARY, build, tokens
from contract.runs import apart, one_pass
from peft import LoraConfig
from tolerances import WRONG
from transformers import LlamaConfig, LlamaForCausalLM

from memretrofit.errors import ConfigError
from memretrofit.hub import from_pretrained, save_pretrained
from memretrofit.hub.adapter import add_adapter
from memretrofit.methods import get_method
from memretrofit.methods.tokmem import DECOUPLED, TokMemConfig
from memretrofit.modules.vocabulary_rows import VocabularyRows, like_rows_of, renormalised
from memretrofit.patching.controls import memory_silenced
from memretrofit.patching.vocabulary import open_procedures, procedure_ids, vocabulary_ledger_of
from memretrofit.retrofit import memory_parameters, patch, unpatch
from memretrofit.vocabulary_description import render_vocabulary

LETTERS, LENGTH = 6, 3
RULES = (
    lambda x: x,
    lambda x: x.flip(1),
    lambda x: (x + 1) % LETTERS,
    lambda x: x[:, -1:].expand(-1, LENGTH),
)
"""Procedures on strings [B, LENGTH] of letters."""
WORDS = torch.arange(LETTERS, LETTERS + len(RULES))
"""The words of the base model for them."""
CUES = WORDS + len(RULES)
"""What a query begins with to ask for one."""
SIZE = LETTERS + 2 * len(RULES)
QUERY = 1 + LENGTH


def test_hand_values_of_the_rule_for_lengths():
    """Rows (3, 0), (0, 1), (0, 3), the first active: the others are 2 long on average."""
    rows = torch.tensor([[3.0, 0.0], [0.0, 1.0], [0.0, 3.0]])
    active = torch.tensor([True, False, False])
    assert renormalised(rows, active).tolist() == [[2.0, 0.0], [0.0, 1.0], [0.0, 3.0]]
    everything = renormalised(rows, ~torch.zeros(3, dtype=torch.bool))
    torch.testing.assert_close(everything.norm(dim=-1), torch.full((3,), 7 / 3))
    assert torch.equal(renormalised(rows, torch.zeros(3, dtype=torch.bool)), rows)
    assert renormalised(torch.zeros(2, 2), active[:2]).isfinite().all()


def test_rows_begin_like_those_of_a_table():
    """Mean and spread of each place; a table whose rows are equal gives that row."""
    spread = torch.tensor([0.0, 1.0, 4.0])
    table = torch.tensor([5.0, 0.0, -2.0]) + torch.tensor([[1.0], [-1.0]]) * spread
    torch.manual_seed(0)
    drawn = like_rows_of(table, 4000)
    error = 5 * spread / math.sqrt(4000)
    assert ((drawn.mean(0) - table.mean(0)).abs() <= error).all()
    torch.testing.assert_close(drawn.std(0), spread, rtol=0.1, atol=1e-6)


def test_the_config():
    assert get_method("tokmem").presets == {"DECOUPLED": DECOUPLED}
    with pytest.raises(ConfigError, match="num_procedures=0"):
        TokMemConfig(num_procedures=0)
    rows = VocabularyRows(torch.zeros(2, 3))
    with pytest.raises(ConfigError, match="count=3"):
        rows.open(3)


def texts(which, openers, rows: int, generator: torch.Generator, stray: float = 0.0):
    """Texts [rows, T] of a query, the token that opens a procedure, and its response; and the
    number of each row's procedure. A share of queries, `stray`, asks for any other one."""
    kinds = torch.tensor(which)[torch.randint(len(which), (rows,), generator=generator)]
    strings = torch.randint(LETTERS, (rows, LENGTH), generator=generator)
    every = torch.stack([rule(strings) for rule in RULES])
    responses = every[kinds, torch.arange(rows)]
    asked = torch.randint(len(RULES), (rows,), generator=generator)
    asked = torch.where(torch.rand(rows, generator=generator) < stray, asked, kinds)
    parts = [CUES[asked, None], strings, openers[kinds, None], responses]
    return torch.cat(parts, dim=1), kinds


def fit(model, which, openers, *, steps: int, rate: float, decay: float, stray: float = 0.0):
    """Train what takes gradients; the loss is over openers and responses."""
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=decay)
    for _ in range(steps):
        ids, _ = texts(which, openers, 32, generator, stray)
        labels = ids.clone()
        labels[:, :QUERY] = -100
        model(ids, labels=labels, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def measured(model, which: list[int], openers: torch.Tensor) -> dict[str, float]:
    """Shares of queries: `routed` to the right opener by the model itself, `answered` after what
    it chose, after a `forced` right opener, and after that of `another` procedure."""
    ids, kinds = texts(which, openers, 128, torch.Generator().manual_seed(9))
    wrong = ids.clone()
    beside = torch.tensor(which).roll(1)[torch.searchsorted(torch.tensor(which), kinds)]
    wrong[:, QUERY] = openers[beside]
    free, forced, another = (
        model.generate(x, max_new_tokens=ids.shape[1] - x.shape[1], do_sample=False)
        for x in (ids[:, :QUERY], ids[:, : QUERY + 1], wrong[:, : QUERY + 1])
    )

    def share(said: torch.Tensor, place: slice) -> float:
        return (said[:, place] == ids[:, place]).all(1).float().mean().item()

    rest = slice(QUERY + 1, None)
    return {
        "routed": share(free, slice(QUERY, QUERY + 1)),
        "answered": share(free, rest),
        "forced": share(forced, rest),
        "another": share(another, rest),
    }


@pytest.fixture(scope="module")
def able():
    """A tiny model that carries the procedures out that its own words open, also where the query
    asks for another; frozen."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=SIZE, hidden_size=48, intermediate_size=96, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=16,
            initializer_range=0.1, tie_word_embeddings=True,
            bos_token_id=None, eos_token_id=None, pad_token_id=None,
        )  # fmt: skip
        model = LlamaForCausalLM(config)
        fit(model, [0, 1, 2, 3], WORDS, steps=200, rate=5e-3, decay=0.0, stray=0.3)
    model.eval().requires_grad_(False)
    found = measured(model, [0, 1, 2, 3], WORDS)
    assert found["forced"] > 0.95
    assert found["another"] < 0.5
    return model


def test_procedures_are_learned_in_rounds(able):
    """One row each, in two rounds of two, on a frozen model: it routes and carries out. The second
    round changes nothing of the first: rows bit for bit, and what the model says after them."""
    model = copy.deepcopy(able)
    torch.manual_seed(1)
    patch(model, TokMemConfig(num_procedures=len(RULES)))
    openers = torch.arange(SIZE, SIZE + len(RULES))
    first, second = [0, 1], [2, 3]
    assert open_procedures(model, 2).tolist() == openers[:2].tolist()
    untrained = measured(model, first, openers.clamp(max=SIZE + 1))
    assert max(untrained["routed"], untrained["forced"]) < 0.5
    fit(model, first, openers, steps=60, rate=3e-2, decay=0.0)
    rows = vocabulary_ledger_of(model).memory.rows
    kept, waiting = [row.clone() for row in rows[:2]], [row.clone() for row in rows[2:]]
    ids, _ = texts(first, openers, 16, torch.Generator().manual_seed(5))
    before = one_pass(model, ids)

    open_procedures(model, 4)
    assert all(torch.equal(row, old) for row, old in zip(rows[2:], waiting, strict=True))
    # all parameters are given, and they decay: a row whose gradient were zero would shrink
    fit(model, second, openers, steps=60, rate=3e-2, decay=0.1)
    assert all(torch.equal(row, old) for row, old in zip(rows[:2], kept, strict=True))
    assert all(apart(row, old) > WRONG for row, old in zip(rows[2:], waiting, strict=True))
    after = one_pass(model, ids)
    assert torch.equal(after[..., : SIZE + 2], before)

    for which in (first, second, first + second):
        found = measured(model, which, openers)
        assert min(found["routed"], found["answered"], found["forced"]) >= 0.9, (which, found)
        assert found["another"] < 0.5, (which, found)
    plain, _ = texts([0, 1, 2, 3], WORDS, 16, torch.Generator().manual_seed(5))
    with memory_silenced(model):
        assert torch.equal(one_pass(model, plain), one_pass(able, plain))
    unpatch(model)
    assert torch.equal(one_pass(model, plain), one_pass(able, plain))


def test_the_description():
    model = patch(build("llama"), TokMemConfig(num_procedures=3))
    ledger = vocabulary_ledger_of(model)
    assert "0 of 3, none is open" in render_vocabulary(model, ledger)
    open_procedures(model, 2)
    text = render_vocabulary(model, ledger)
    assert f"2 of 3, ids {VOCABULARY} to {VOCABULARY + 1}" in text
    # rows of 32 numbers
    assert "parameters added: 96 (" in text
    assert text.endswith("of which 64 train\ncache: as without the memory")


def adapted(config: TokMemConfig):
    """A tiny model with two of three procedures open, moved from their start, and LoRA around."""
    model = patch(build("llama"), config)
    open_procedures(model, 2)
    wrapped = add_adapter(model, LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_" in name or ".memory." in name:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return wrapped.eval()


@pytest.mark.parametrize("decoupled", [False, True])
def test_a_saved_memory_emits_what_it_learned(decoupled, tmp_path):
    """How many procedures are open is saved with the rows, an adapter beside them."""
    config = TokMemConfig(num_procedures=3, decouple_embeddings=decoupled)
    model, ids = adapted(config), tokens(2, 9)
    ids[:, 4] = torch.tensor([VOCABULARY, VOCABULARY + 1])
    save_pretrained(model, tmp_path)
    loaded = from_pretrained(tmp_path, base=build("llama"))
    assert torch.equal(procedure_ids(loaded), procedure_ids(model))
    expected = one_pass(model, ids)
    assert expected.shape[-1] == VOCABULARY + 2
    assert torch.equal(one_pass(loaded, ids), expected)
    found = memory_parameters(loaded.get_base_model())
    assert found.keys() == memory_parameters(model.get_base_model()).keys()
    assert open_procedures(loaded).tolist() == [VOCABULARY + 2]
    again = loaded.generate(input_ids=ids, max_new_tokens=3, do_sample=False)
    assert again.shape == (2, 12)


def test_rows_train_inside_an_adapter():
    """PEFT freezes what it does not own; the rows are switched on again and get gradients."""
    model, ids = adapted(TokMemConfig(num_procedures=3)), tokens(2, 9)
    memory = vocabulary_ledger_of(model).memory
    for row in memory.rows[:2]:
        row.requires_grad_(True)
    model(input_ids=ids, labels=ids).loss.backward()
    assert all(bool(row.grad.abs().sum() > 0) for row in memory.rows[:2])
    assert memory.rows[2].grad is None
    lora = [p.grad for name, p in model.named_parameters() if "lora_B" in name]
    assert all(bool(gradient.abs().sum() > 0) for gradient in lora)
