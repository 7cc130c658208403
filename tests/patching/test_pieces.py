"""Reading in pieces: what a caller asks of a forward comes back as if it had been one."""

from __future__ import annotations

import functools

import pytest
import torch
from contract.families import build, tokens
from contract.runs import apart, in_pieces, one_pass
from tolerances import REORDERED, WRONG
from transformers import DynamicCache

from memretrofit import patch, unpatch
from memretrofit.errors import UnsupportedModelError
from memretrofit.methods.em_llm import EMLLMConfig
from memretrofit.methods.window_sinks import WindowSinksConfig
from memretrofit.patching.pieces import Reader, read_in_pieces

LENGTH = 50
SMALL = EMLLMConfig(
    sliding_window=8, num_sink_tokens=3, min_event_size=2, max_event_size=5, recalled_tokens=10
)


def reader(family="llama", **options):
    return patch(build(family, **options), SMALL)


def pieces_of(model) -> list[tuple[int, int]]:
    """Filled, while `model` runs, with the first slot and the end of every piece."""
    seen: list[tuple[int, int]] = []

    def look(module, args, kwargs):
        cache, ids = kwargs["past_key_values"], kwargs["input_ids"]
        seen.append((cache.get_seq_length(), cache.get_seq_length() + ids.shape[1]))

    model.model.register_forward_pre_hook(look, with_kwargs=True)
    return seen


def test_cuts_are_slots_whatever_the_calls():
    """Sinks and window, then a window at a time; calls add cuts of their own and move none."""
    model = reader()
    seen = pieces_of(model)
    one_pass(model, tokens(1, 30))
    assert seen == [(0, 11), (11, 19), (19, 27), (27, 30)]
    seen.clear()
    in_pieces(model, tokens(1, 30), (5, 20))
    assert seen == [(0, 5), (5, 11), (11, 19), (19, 20), (20, 27), (27, 30)]


@pytest.mark.parametrize("family", ["llama", "gpt_neox", "gemma3"])
def test_logits_to_keep_are_the_last_logits(family):
    model, ids = reader(family), tokens(2, LENGTH)
    expected = one_pass(model, ids)
    for kept in (1, 7, 20):
        found = one_pass(model, ids, logits_to_keep=kept)
        assert torch.equal(found, expected[:, -kept:])
    index = torch.tensor([0, 12, 49])
    assert torch.equal(one_pass(model, ids, logits_to_keep=index), expected[:, index])


@torch.no_grad()
def test_the_loss_is_that_of_all_logits():
    model, ids = reader(), tokens(2, LENGTH)
    labels = ids.clone()
    labels[0, :9] = -100
    output = model(ids, labels=labels, use_cache=False)
    flat = output.logits[:, :-1].flatten(0, 1)
    expected = torch.nn.functional.cross_entropy(flat, labels[:, 1:].flatten())
    assert torch.allclose(output.loss, expected)
    assert output.past_key_values is None
    loss, logits = model(ids, labels=labels, use_cache=False, return_dict=False)
    assert torch.equal(loss, output.loss)
    assert torch.equal(logits, output.logits)
    shifted = torch.full_like(ids, -100)
    shifted[:, 30] = 5
    expected = torch.nn.functional.cross_entropy(output.logits[:, 30], shifted[:, 30])
    assert torch.allclose(model(ids, labels=ids, shift_labels=shifted).loss, expected)
    labels[labels == -100] = 7
    found = model(ids, labels=labels, ignore_index=7).loss
    expected = torch.nn.functional.cross_entropy(flat, labels[:, 1:].flatten(), ignore_index=7)
    assert torch.allclose(found, expected)


def test_gradients_reach_through_every_piece():
    """The loss of the last token alone moves the first one's embedding."""
    model, ids = reader(layers=1), tokens(1, LENGTH)
    embedded = model.get_input_embeddings()(ids).detach().requires_grad_()
    model(inputs_embeds=embedded, use_cache=False).logits[:, -1].sum().backward()
    reached = embedded.grad.abs().amax(-1)[0]
    assert (reached[-8:] > 0).all()
    assert (reached[:3] > 0).all()
    assert (reached[3:-8] > 0).any()


@torch.no_grad()
def test_hidden_states_are_joined():
    model, ids = reader(), tokens(2, LENGTH)
    output = model(ids, output_hidden_states=True, use_cache=False)
    assert [x.shape[:2] for x in output.hidden_states] == [(2, LENGTH)] * 3
    logits = model.lm_head(output.hidden_states[-1])
    assert apart(logits, output.logits) < REORDERED


def test_what_cannot_be_joined_is_refused_by_name():
    model = patch(build("mixtral"), SMALL)
    with pytest.raises(UnsupportedModelError, match="router_logits"):
        model(tokens(1, 30), output_router_logits=True)
    assert model(tokens(1, 9), output_router_logits=True).router_logits is not None


@pytest.mark.parametrize("removed", [1, 2, 5])
def test_a_token_whose_prediction_was_cropped_is_read_again(removed):
    """Nothing has left yet, so any cache can be cropped; later events are as if it had not been."""
    model, ids = reader(), tokens(2, LENGTH)
    expected, straight = in_pieces(model, ids, ())
    cache = DynamicCache(config=model.config)
    wrong = torch.cat([ids[:, : 10 - removed], tokens(2, removed, seed=9)], dim=1)
    in_pieces(model, wrong, (), cache=cache)
    cache.crop(-removed)
    with torch.no_grad():
        rest = model(ids[:, 10 - removed :], past_key_values=cache, output_hidden_states=True)
    assert apart(rest.logits, expected[:, 10 - removed :]) < REORDERED
    assert rest.hidden_states[0].shape[1] == rest.logits.shape[1]
    for one, other in zip(cache.layers, straight.layers, strict=True):
        assert torch.equal(one.state[2], other.state[2])


def test_embeddings_of_tokens_are_read_as_the_tokens():
    """Others surprise nobody: their events are as long as events can be."""
    model, ids = reader(), tokens(2, LENGTH)
    embedded = model.get_input_embeddings()(ids).detach()
    with torch.no_grad():
        found = model(inputs_embeds=embedded)
        soft = model(inputs_embeds=embedded + 1e-3)
    _, cache = in_pieces(model, ids, ())
    assert apart(found.logits, one_pass(model, ids)) < REORDERED
    sizes = [x.past_key_values.layers[0].state[2] for x in (found, soft)]
    assert torch.equal(sizes[0], cache.layers[0].state[2])
    assert (sizes[1] == SMALL.max_event_size).all()
    assert apart(soft.logits, found.logits) > WRONG


def test_checkpointing_that_leaves_the_cache_out_is_refused():
    model = reader().train()
    model.activation_checkpointing_enable()
    with pytest.raises(UnsupportedModelError, match="gradient checkpointing"):
        model(tokens(1, 30), use_cache=False)
    model(tokens(1, 11), use_cache=False)  # one piece needs no cache


def test_unpatching_gives_back_a_forward_that_was_there_before():
    """Of the instance (accelerate puts its own there), or of the class."""
    model, ids = build("llama"), tokens(1, 9)
    wrapped = model.forward = functools.partial(type(model).forward, model)
    patch(model, SMALL)
    assert model.forward is not wrapped
    unpatch(model)
    assert vars(model)["forward"] is wrapped
    del model.forward
    unpatch(patch(model, SMALL))
    assert "forward" not in vars(model)
    assert torch.equal(one_pass(model, ids), one_pass(build("llama"), ids))


# A recurrence over segments on this seam: what a method of the tokens family needs of it


class Segments(Reader):
    """Segments of SEGMENT tokens: the mean of the last two output states of each closed segment
    stands in front of the next, which is read on a cache of its own."""

    def __init__(self, model, store):
        super().__init__(model)
        self.store = store

    def enter(self, cache, own):
        self.outer = cache
        return self.store.setdefault(id(cache), {"seen": 0, "memory": None, "cache": None})["seen"]

    @property
    def held(self):
        return self.store[id(self.outer)]

    def cuts(self, begin, end, real):
        return [x for x in range(SEGMENT, end + 1, SEGMENT) if x > begin]

    def before(self, piece):
        embedded = self.model.get_input_embeddings()(piece.ids)
        self.front = int(piece.low % SEGMENT == 0)
        if self.front:
            self.held["cache"] = DynamicCache(config=self.model.config)
            memory = self.held["memory"]
            memory = torch.zeros_like(embedded[:, :1]) if memory is None else memory
            embedded = torch.cat([memory, embedded], dim=1)
        for name in ("input_ids", "attention_mask", "position_ids"):
            piece.call.pop(name, None)
        piece.call |= {
            "inputs_embeds": embedded,
            "past_key_values": self.held["cache"],
            "output_hidden_states": True,
        }

    def after(self, piece, output):
        last = output.hidden_states[-1]
        tail = torch.cat([self.held.get("tail", last[:, :0]), last], dim=1)
        self.held.update(tail=tail[:, -2:], seen=piece.high)
        if piece.closes:
            self.held["memory"] = tail[:, -2:].mean(1, keepdim=True)
        output["logits"] = output.logits[:, self.front :]
        output["hidden_states"] = tuple(x[:, self.front :] for x in output.hidden_states)
        return output


SEGMENT = 6


def by_hand(model, ids):
    """The same recurrence, one segment at a time."""
    logits, memory = [], None
    for low in range(0, ids.shape[1], SEGMENT):
        embedded = model.get_input_embeddings()(ids[:, low : low + SEGMENT])
        memory = torch.zeros_like(embedded[:, :1]) if memory is None else memory
        output = model(
            inputs_embeds=torch.cat([memory, embedded], dim=1), output_hidden_states=True
        )
        logits.append(output.logits[:, 1:])
        memory = output.hidden_states[-1][:, -2:].mean(1, keepdim=True)
    return torch.cat(logits, dim=1)


@torch.no_grad()
@pytest.mark.parametrize("ends", [(), (6, 12), (5, 7, 20), range(1, 27)])
def test_a_recurrence_over_segments_is_two_hooks(ends):
    """Any split of a text into calls gives the logits of the segments one by one; the last segment
    stays open, and the caller's cache is the one that comes back."""
    ids = tokens(2, 27)
    expected = by_hand(build("llama"), ids)
    model, store = patch(build("llama"), WindowSinksConfig(sliding_window=99)), {}
    read_in_pieces(model, functools.partial(Segments, store=store))
    logits, cache = in_pieces(model, ids, ends)
    assert apart(logits, expected) < REORDERED
    assert store[id(cache)]["seen"] == 27
    shifted = by_hand(build("llama"), torch.cat([ids[:, :1], ids], dim=1))[:, 1:]
    assert apart(shifted, expected) > WRONG  # witness: segments that begin elsewhere


@torch.no_grad()
def test_what_the_hooks_are_given():
    seen = []

    class Watch(Reader):
        def cuts(self, begin, end, real):
            return [x for x in (4, 9, 12) if begin < x <= end]

        def before(self, piece):
            real = None if piece.real is None else piece.real.sum(-1).tolist()
            seen.append((piece.low, piece.high, piece.closes, piece.wanted, real))
            assert piece.ids.shape == (2, piece.high - piece.low)
            assert piece.embeds is None

    model = patch(build("llama"), WindowSinksConfig(sliding_window=99))
    read_in_pieces(model, Watch)
    mask = torch.ones(2, 12).long()
    mask[1, :3] = 0
    cache = model(tokens(2, 6), attention_mask=mask[:, :6]).past_key_values
    assert seen == [(0, 4, True, 0, [4, 1]), (4, 6, False, 0, [6, 3])]
    seen.clear()
    model(tokens(2, 6), attention_mask=mask, past_key_values=cache, logits_to_keep=2)
    assert seen == [(6, 9, True, 10, [9, 6]), (9, 12, True, 10, [12, 9])]
