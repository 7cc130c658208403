"""Tokens behind the vocabulary, against the same model with longer tables."""

from __future__ import annotations

import copy

import pytest
import torch
from contract.families import FAMILIES, VOCABULARY, build, tokens
from contract.runs import apart, in_pieces, left_padded, one_pass, positions_of
from tolerances import REORDERED, WRONG
from torch.nn import functional as F
from transformers import Gemma2Config, Gemma2ForCausalLM, LlamaForCausalLM, LlamaModel

from memretrofit.errors import ConfigError, StateError, UnsupportedModelError
from memretrofit.methods.tokmem import TokMemConfig
from memretrofit.patching.controls import memory_disabled, memory_silenced, writes_disabled
from memretrofit.patching.vocabulary import (
    open_procedures,
    procedure_ids,
    renormalise_procedures,
    vocabulary_ledger_of,
)
from memretrofit.retrofit import is_patched, memory_parameters, patch, patched_config, unpatch

LENGTH, ROOM, OPEN = 14, 5, 3
CONFIGS = {
    "tied": TokMemConfig(num_procedures=ROOM),
    "decoupled": TokMemConfig(num_procedures=ROOM, decouple_embeddings=True),
}
every_family = pytest.mark.parametrize("family", list(FAMILIES))
every_config = pytest.mark.parametrize("kind", list(CONFIGS))


def patched(family: str = "llama", kind: str = "tied", opened: int = OPEN):
    model = build(family)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        patch(model, CONFIGS[kind])
    if opened:
        open_procedures(model, opened)
    return model


def mixed(rows: int = 2, seed: int = 0) -> torch.Tensor:
    """Text [rows, LENGTH] with each open procedure in each row."""
    ids = tokens(rows, LENGTH, seed)
    ids[:, [2, 3, 9]] = torch.arange(VOCABULARY, VOCABULARY + OPEN)
    return ids


def longer(family: str, model):
    """The base model with the open rows of `model` at the end of its own tables."""
    base = build(family)
    inputs, outputs = vocabulary_ledger_of(model).memory()
    for table, rows in ((base.get_input_embeddings(), inputs), (base.lm_head, outputs)):
        table.weight = torch.nn.Parameter(torch.cat([table.weight, rows]).detach())
    return base


def emitting(ids: torch.Tensor):
    """A model that answers `ids` with its second procedure: its class is what it sees there."""
    model = patched(kind="decoupled")
    with torch.no_grad():
        hidden = model(ids, output_hidden_states=True).hidden_states[-1][:, -1].mean(0)
        memory = vocabulary_ledger_of(model).memory
        list(memory.output_rows)[1].copy_(hidden * 9 / hidden.norm())
    return model


@every_family
def test_a_closed_vocabulary_is_the_base_model(family):
    """Bit for bit, and no class more: draws are the same ones too."""
    base, model, ids = build(family), patched(family, opened=0), tokens(2, LENGTH)
    assert torch.equal(one_pass(model, ids), one_pass(base, ids))
    drawn = []
    for one in (base, model):
        torch.manual_seed(3)
        drawn.append(one.generate(ids, max_new_tokens=6, do_sample=True))
    assert torch.equal(*drawn)
    # the witness: classes of -inf leave the probabilities, and change the draws
    logits, draws = one_pass(base, ids)[:, -1], []
    for extra in (0, ROOM):
        torch.manual_seed(3)
        wide = F.pad(logits, (0, extra), value=-torch.inf).softmax(-1)
        draws.append(torch.cat([torch.multinomial(wide, 1) for _ in range(9)]))
    assert not torch.equal(*draws)


@every_config
@every_family
def test_open_rows_are_longer_tables(family, kind):
    """Embeddings and classes are those of a model whose tables end with the rows."""
    model, ids = patched(family, kind), mixed()
    reference = longer(family, model)
    found, expected = one_pass(model, ids), one_pass(reference, ids)
    assert found.shape[-1] == VOCABULARY + OPEN
    assert apart(found, expected) < REORDERED
    other = ids.clone()
    other[:, 9] = VOCABULARY
    assert apart(found, one_pass(reference, other)) > WRONG


@every_family
def test_the_base_models_own_logits_keep_their_bits(family):
    model, ids = patched(family), tokens(2, LENGTH)
    found = one_pass(model, ids)
    assert torch.equal(found[..., :VOCABULARY], one_pass(build(family), ids))


def test_switches():
    model, base, ids = patched(), build("llama"), mixed()
    plain = tokens(2, LENGTH)
    with memory_disabled(model):
        assert torch.equal(one_pass(model, plain), one_pass(base, plain))
        with pytest.raises(StateError, match=f"ids of this model end at {VOCABULARY - 1}"):
            one_pass(model, ids)
    with memory_silenced(model):
        silenced = one_pass(model, ids)
    assert torch.equal(silenced, one_pass(model, ids)[..., :VOCABULARY])
    with pytest.raises(StateError, match="writes"), writes_disabled(model):
        pass


@every_config
@every_family
def test_unpatching_leaves_no_trace(family, kind):
    model, ids = build(family), tokens(2, LENGTH)
    before = {name: x.clone() for name, x in model.state_dict().items()}
    attributes = {name: set(vars(m)) for name, m in model.named_modules()}
    tied = model.lm_head.weight is model.get_input_embeddings().weight
    expected, settings = one_pass(model, ids), model.config.to_dict()
    for _ in range(2):
        patch(model, CONFIGS[kind])
        open_procedures(model)
        added = model.state_dict().keys() - before.keys()
        assert all(".memory." in name for name in added)
        numbers = {n for n, _ in model.named_parameters() if n in added}
        assert numbers == set(memory_parameters(model))
        assert (model.lm_head.weight is model.get_input_embeddings().weight) == tied
        model.generate(ids, max_new_tokens=2, do_sample=False)
        assert model.config.to_dict() == settings
        unpatch(model)
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert {name: set(vars(m)) for name, m in model.named_modules()} == attributes
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert torch.equal(one_pass(model, ids), expected)
    assert not is_patched(model)


@every_family
def test_any_split_and_any_padding_is_one_pass(family):
    model, ids = patched(family), mixed()
    expected = one_pass(model, ids)
    assert apart(in_pieces(model, ids, (3, 9, 10))[0], expected) < REORDERED
    padded, mask = left_padded([ids[0], ids[1, :6]])
    found = one_pass(model, padded, attention_mask=mask, position_ids=positions_of(mask))
    assert apart(found[1, -6:], expected[1, :6]) < REORDERED
    swapped = one_pass(model, ids.flip(0))
    assert apart(swapped[0, :6], expected[1, :6]) < REORDERED
    assert apart(swapped[0, :6], expected[0, :6]) > WRONG


def test_generation_emits_procedures():
    """Greedy, with beams, without a cache, from a draft in the text: they agree, and the scores
    are those of the tokens."""
    ids = mixed(1)
    model = emitting(ids)
    greedy = {"max_new_tokens": 5, "do_sample": False}
    found = model.generate(ids, **greedy)
    assert found[0, LENGTH] == procedure_ids(model)[1]
    assert torch.equal(model.generate(ids, use_cache=False, **greedy), found)
    assert torch.equal(model.generate(ids, prompt_lookup_num_tokens=2, **greedy), found)
    # each token is the likeliest after those before it
    logits = one_pass(model, found)[:, LENGTH - 1 : -1]
    assert torch.equal(logits.argmax(-1), found[:, LENGTH:])
    for beams in (1, 3):
        output = model.generate(
            ids.expand(2, -1),
            num_beams=beams,
            output_scores=True,
            return_dict_in_generate=True,
            **greedy,
        )
        held = getattr(output, "beam_indices", None)
        scores = model.compute_transition_scores(
            output.sequences, output.scores, held, normalize_logits=True
        )
        logits = one_pass(model, output.sequences)[:, LENGTH - 1 : -1].log_softmax(-1)
        said = output.sequences[:, LENGTH:, None]
        assert apart(scores, logits.gather(-1, said)[..., 0]) < REORDERED
    with memory_silenced(model):
        assert int(model.generate(ids, **greedy)[:, LENGTH:].max()) < VOCABULARY


@every_family
def test_the_loss_counts_every_class(family):
    model, ids = patched(family), mixed()
    logits = one_pass(model, ids)[:, :-1].flatten(0, 1)
    expected = F.cross_entropy(logits, ids[:, 1:].flatten())
    found = model(ids, labels=ids).loss
    assert apart(found, expected) < REORDERED
    found.backward()
    for number, row in enumerate(vocabulary_ledger_of(model).memory.rows):
        assert (row.grad is not None) == (number < OPEN)
        assert row.grad is None or bool(row.grad.abs().sum() > 0)


def test_logits_that_are_bent_after_the_head():
    """A soft cap would make a class of -inf one of -cap: a closed procedure is no class at all."""
    torch.manual_seed(0)
    config = Gemma2Config(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8, final_logit_softcapping=2.0,
        initializer_range=0.2,
    )  # fmt: skip
    model, ids = Gemma2ForCausalLM(config).eval(), tokens(2, LENGTH)
    expected = one_pass(model, ids)
    patch(model, CONFIGS["tied"])
    assert torch.equal(one_pass(model, ids), expected)
    open_procedures(model, OPEN)
    found = one_pass(model, ids)
    assert torch.equal(found[..., :VOCABULARY], expected)
    assert found[..., VOCABULARY:].abs().max() < 2.0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_other_types(family, dtype):
    base = build(family).to(dtype)
    model = patch(build(family).to(dtype), CONFIGS["tied"])
    open_procedures(model, OPEN)
    found, plain = one_pass(model, mixed()), tokens(2, LENGTH)
    assert found.dtype is dtype
    assert found.isfinite().all()
    assert torch.equal(one_pass(model, plain)[..., :VOCABULARY], one_pass(base, plain))


def test_opening_in_rounds_trains_the_new_ones():
    model = patched(opened=2)
    rows = vocabulary_ledger_of(model).memory.rows
    assert [row.requires_grad for row in rows] == [True, True, False, False, False]
    assert open_procedures(model, 4).tolist() == [VOCABULARY + 2, VOCABULARY + 3]
    assert [row.requires_grad for row in rows] == [False, False, True, True, False]
    assert procedure_ids(model).tolist() == list(range(VOCABULARY, VOCABULARY + 4))
    with pytest.raises(ConfigError, match="4 of 5 procedures are open"):
        open_procedures(model, 4)
    with pytest.raises(ConfigError, match="num_procedures"):
        open_procedures(model, 6)
    assert open_procedures(model).tolist() == [VOCABULARY + 4]


@every_config
def test_renormalising_moves_what_trains(kind):
    """The classes of the new rows take the mean length of the earlier ones."""
    model = patched(kind=kind, opened=2)
    open_procedures(model, OPEN)
    before = {name: x.clone() for name, x in memory_parameters(model).items()}
    renormalise_procedures(model)
    _, classes = vocabulary_ledger_of(model).memory()
    norms = classes.norm(dim=-1)
    assert apart(norms[2], norms[:2].mean()) < REORDERED
    after = memory_parameters(model)
    moved = [name for name in before if not torch.equal(before[name], after[name])]
    name = "rows" if kind == "tied" else "output_rows"
    assert moved == [f"model.embed_tokens.memory.{name}.2"]


@torch.no_grad()
@every_config
def test_rows_are_read_as_they_are(kind):
    """However they changed: in place, by other data, by data in place, which no version counts,
    when more are open, and when others were loaded. While a text is generated, they are put
    together once."""
    model = patched(kind=kind, opened=2)
    memory = vocabulary_ledger_of(model).memory

    def current():
        table = memory.rows if memory.output_rows is None else memory.output_rows
        return torch.stack(list(memory.rows)[: memory.count]), torch.stack(
            list(table)[: memory.count]
        )

    last = list(memory.parameters())[-4]
    for change in (
        lambda: last.add_(1.0),
        lambda: setattr(last, "data", last.data + 1.0),
        lambda: last.data.add_(1.0),
    ):
        with memory.held():
            before = memory()[1]
            assert memory()[1] is before
        change()
        assert not torch.equal(memory()[1], before)
        assert torch.equal(memory()[1], current()[1])
    values = {name: x + 1 for name, x in memory.state_dict().items()}
    memory.load_state_dict(values)
    assert memory.count == 3
    assert torch.equal(memory()[0], current()[0])
    open_procedures(model, 4)
    assert [len(x) for x in memory()] == [4, 4]
    with torch.enable_grad():
        assert memory()[0].requires_grad


def test_rows_can_be_made_where_tensors_have_no_version():
    ids = mixed(1)
    with torch.inference_mode():
        model = patched()
        assert torch.equal(one_pass(model, ids), one_pass(patched(), ids))


def test_a_copy_is_a_model_of_its_own():
    ids = mixed(1)
    model = emitting(ids)
    expected = one_pass(model, ids)
    twin = copy.deepcopy(model)
    open_procedures(twin, 4)
    with memory_silenced(twin):
        assert torch.equal(one_pass(model, ids), expected)
    assert twin(ids, labels=ids).logits.shape[-1] == VOCABULARY + 4
    greedy = {"max_new_tokens": 3, "do_sample": False}
    with memory_silenced(model):
        silent = model.generate(ids, **greedy)
    unpatch(model)
    assert torch.equal(one_pass(twin, ids)[..., : VOCABULARY + OPEN], expected)
    assert twin.generate(ids, **greedy)[0, LENGTH] == VOCABULARY + 1
    with memory_silenced(twin):
        assert torch.equal(twin.generate(ids, **greedy), silent)


def test_a_model_without_numbers_gets_rows_without_numbers():
    """Sizes are rehearsed so."""
    with torch.device("meta"):
        model = LlamaForCausalLM(FAMILIES["llama"](2))
    patch(model, CONFIGS["decoupled"])
    assert all(parameter.is_meta for parameter in memory_parameters(model).values())


def test_the_seed_decides_how_rows_start():
    one, same = (memory_parameters(patched()) for _ in range(2))
    assert all(torch.equal(one[name], same[name]) for name in one)
    torch.manual_seed(1)
    other = memory_parameters(patch(build("llama"), CONFIGS["tied"]))
    assert not any(torch.equal(one[name], other[name]) for name in one)


def test_what_cannot_be_done_is_refused():
    model = patched()
    with pytest.raises(StateError, match=f"id {VOCABULARY + OPEN} was given.*open_procedures"):
        one_pass(model, torch.tensor([[1, VOCABULARY + OPEN]]))
    with pytest.raises(StateError, match="unpatch"):
        model.resize_token_embeddings(VOCABULARY + 9)
    with pytest.raises(StateError, match="patched already"):
        patch(model, CONFIGS["tied"])
    with pytest.raises(StateError, match="not patched"):
        procedure_ids(build("llama"))
    for count in (OPEN + 0.5, "4", OPEN):
        with pytest.raises(ConfigError, match=f"count={count!r}: {OPEN} of"):
            open_procedures(model, count)
    assert patched_config(model) == CONFIGS["tied"]
    with pytest.raises(UnsupportedModelError, match="Linear"):
        patch(torch.nn.Linear(2, 2), CONFIGS["tied"])
    headless = LlamaModel(FAMILIES["llama"](1))
    with pytest.raises(UnsupportedModelError, match=r"found .*none"):
        patch(headless, CONFIGS["tied"])
    base = build("llama")
    handle = base.lm_head.register_forward_hook(lambda *call: call[2][..., :7])
    with pytest.raises(UnsupportedModelError, match="one class was put behind"):
        patch(base, CONFIGS["tied"])
    handle.remove()
    handle = base.model.embed_tokens.register_forward_hook(lambda *call: call[2] + 1)
    with pytest.raises(UnsupportedModelError, match="more than look its rows up"):
        patch(base, CONFIGS["tied"])
    handle.remove()
    assert not is_patched(base)
    assert not any(m._forward_hooks for m in base.modules())
