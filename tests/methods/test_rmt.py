"""RMT and AutoCompressors against the loop that their equations are, one segment after another on
the model as it was."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from contract.families import build, tokens
from contract.runs import apart, in_pieces, left_padded, one_pass
from tolerances import REORDERED, WRONG
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from memretrofit.errors import ConfigError
from memretrofit.methods.rmt import AUTOCOMPRESSOR, RMT_PUBLISHED, RMTConfig
from memretrofit.modules.memory_tokens import Carry, MemoryTokens, sink_tokens
from memretrofit.modules.segment_memory import Past
from memretrofit.patching.controls import memory_silenced, state_shuffled
from memretrofit.patching.segments import patch_segments
from memretrofit.retrofit import memory_parameters, patch

SEGMENT, MEMORY, LENGTH = 8, 3, 29
SMALL = RMTConfig(segment_length=SEGMENT, num_memory_tokens=MEMORY)
"""Three whole segments and a part of a fourth."""
ACCUMULATED = replace(SMALL, retention="accumulate", queue_length=2 * MEMORY)
"""The fourth segment no longer reads what the first wrote."""
CONFIGS = {
    "default": SMALL,
    "published": replace(RMT_PUBLISHED, segment_length=SEGMENT, num_memory_tokens=MEMORY),
    "rescaled": replace(SMALL, carry="rescaled", num_sink_tokens=2),
    "accumulate": ACCUMULATED,
    "autocompressor": replace(ACCUMULATED, carry="raw", starts_from="sink"),
    "uneven queue": replace(ACCUMULATED, queue_length=MEMORY + 2),
}
configs = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)


def patched(config: RMTConfig, family: str = "llama", **options):
    torch.manual_seed(0)
    return patch(build(family, **options), config)


def parts_of(model) -> list[torch.Tensor]:
    """The trained rows, and the gate where there is one."""
    found = memory_parameters(model)
    return [found[name] for name in sorted(found, key=lambda name: name.endswith("gate"))]


def rows_of(model) -> torch.Tensor:
    """The trained rows [M, E]."""
    return parts_of(model)[0]


def by_hand(model, parts, ids, config: RMTConfig, *, carried=True, capacity=None):
    """Logits [B, T, vocabulary] of the loop, on a model that is not patched."""
    embed, accumulates = model.get_input_embeddings(), config.retention == "accumulate"
    rows, *gate = parts
    first = rows.expand(len(ids), -1, -1)
    sinks = embed(ids.new_full((len(ids), config.num_sink_tokens), model.config.bos_token_id))
    norm = embed.weight.norm(dim=-1).mean()
    memory = first[:, :0] if accumulates else first
    logits = []
    for segment in ids.split(config.segment_length, dim=1):
        behind = first if accumulates else memory
        columns = torch.cat([sinks, memory, embed(segment), behind], dim=1)
        hidden = model.model(inputs_embeds=columns).last_hidden_state
        begin = sinks.shape[1] + memory.shape[1]
        logits.append(model.lm_head(hidden[:, begin : begin + segment.shape[1]]))
        written = hidden[:, -len(rows) :]
        long = written.norm(dim=-1, keepdim=True)
        if config.carry == "rescaled":
            written = written / long * norm
        if config.carry == "added":
            written = first + gate[0] * written / long * norm
        if accumulates:
            written = torch.cat([memory, written], dim=1)[:, -(capacity or config.queue_length) :]
        memory = written if carried else memory
    return torch.cat(logits, dim=1)


@configs
@torch.no_grad()
def test_it_is_the_loop_over_segments(config: RMTConfig) -> None:
    model, ids = patched(config), tokens(2, LENGTH)
    parts, base, found = parts_of(model), build("llama"), one_pass(model, ids)
    assert apart(found, by_hand(base, parts, ids, config)) < REORDERED
    assert apart(found, by_hand(base, parts, ids, config, carried=False)) > WRONG


@torch.no_grad()
def test_the_queue_ends() -> None:
    model, ids = patched(ACCUMULATED), tokens(2, LENGTH)
    longer = by_hand(build("llama"), parts_of(model), ids, ACCUMULATED, capacity=100)
    found, inside = one_pass(model, ids), 3 * SEGMENT
    assert apart(found[:, :inside], longer[:, :inside]) < REORDERED
    assert apart(found[:, inside:], longer[:, inside:]) > WRONG


def test_without_memory_and_sink_it_is_the_base_on_each_segment() -> None:
    def make_memory(spec) -> MemoryTokens:
        return MemoryTokens(
            segment_length=SEGMENT,
            sinks=sink_tokens(spec, 0),
            first=torch.zeros(0, spec.hidden_size),
            carry=Carry(torch.ones(())),
        )

    model, ids, base = build("llama"), tokens(2, LENGTH), build("llama")
    patch_segments(model, SMALL, make_memory)
    alone = torch.cat([one_pass(base, x) for x in ids.split(SEGMENT, dim=1)], dim=1)
    assert torch.equal(one_pass(model, ids), alone)
    assert apart(one_pass(patched(SMALL), ids), alone) > WRONG


@configs
def test_gradients_reach_the_rows_through_all_segments(config: RMTConfig) -> None:
    """A loss in the third segment alone: what the rows did in the first two is all that counts."""
    model, ids, base = patched(config), tokens(2, LENGTH), build("llama")
    parts, third = parts_of(model), slice(2 * SEGMENT, 3 * SEGMENT)

    def gradients(logits):
        loss = F.cross_entropy(logits[:, third].flatten(0, 1), ids[:, third].flatten())
        return torch.autograd.grad(loss, parts)

    found = gradients(model(ids, use_cache=False).logits)
    wanted = gradients(by_hand(base, parts, ids, config))
    for ours, theirs in zip(found, wanted, strict=True):
        assert theirs.abs().max() > WRONG
        assert apart(ours, theirs) < REORDERED * theirs.abs().max()


def test_the_last_token_of_a_segment_predicts_the_first_of_the_next() -> None:
    model, ids = patched(SMALL), tokens(2, LENGTH)
    labels = torch.full_like(ids, -100)
    labels[:, SEGMENT] = ids[:, SEGMENT]
    logits = one_pass(model, ids)
    boundary = F.cross_entropy(logits[:, SEGMENT - 1], ids[:, SEGMENT])
    every = F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    assert torch.allclose(model(ids, labels=labels).loss, boundary)
    assert torch.allclose(model(ids, labels=ids).loss, every)


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_rows_and_sinks_are_as_the_model_makes_embeddings(family: str) -> None:
    """Gemma multiplies its embeddings: what stands in front is what the model makes of a token."""
    model = patched(replace(SMALL, num_sink_tokens=2, starts_from="sink"), family)
    embed = model.get_input_embeddings()
    sink, spread = embed(torch.tensor(1)), embed(torch.arange(101)).std()
    like = sink.new_zeros(2, 0, len(sink))
    past = Past(
        state=model.model.memory.begin(2, sink.device),
        segments=torch.zeros(2),
        embeds=like,
        real=like[..., 0].bool(),
    )
    front = model.model.memory.opening(0, past).embeds
    assert torch.equal(front[:, :2], sink.expand(2, 2, -1))
    distance = (front[0, 2:] - sink).std() / spread
    assert 0.05 < distance < 0.2
    assert apart(front[0, 2], front[0, 3]) > 0
    random = rows_of(patched(replace(SMALL, num_memory_tokens=8), family))
    assert 0.8 < random.std() / spread < 1.25


@configs
def test_one_pass_is_any_split_and_rows_are_rows_alone(config: RMTConfig) -> None:
    model, ids = patched(config), tokens(2, LENGTH)
    found = one_pass(model, ids)
    for ends in ([1, 2, 7, 9, 16], [8, 24], list(range(1, LENGTH))):
        assert apart(in_pieces(model, ids, ends)[0], found) < REORDERED
    rows = [ids[0, :22], ids[1, :13]]
    padded, mask = left_padded(rows)
    together, _ = in_pieces(model, padded, [5, 17], mask=mask)
    for row, logits in zip(rows, together, strict=True):
        alone = one_pass(model, row[None])[0]
        assert apart(logits[-len(row) :], alone) < REORDERED
        assert apart(logits[-len(row) :].roll(1, 0), alone) > WRONG


@configs
def test_a_token_changes_nothing_before_it(config: RMTConfig) -> None:
    model, ids = patched(config), tokens(1, LENGTH)
    found = one_pass(model, ids)
    for place in (0, 5, SEGMENT - 1, SEGMENT, 2 * SEGMENT + 3):
        other = ids.clone()
        other[0, place] = ids[0, place] % 100 + 1
        changed = one_pass(model, other)
        assert torch.equal(changed[:, :place], found[:, :place])
        assert apart(changed[:, place:], found[:, place:]) > WRONG


def test_what_cannot_be() -> None:
    with pytest.raises(ConfigError, match="num_memory_tokens=9: more than the 8 tokens"):
        replace(SMALL, num_memory_tokens=9)
    with pytest.raises(ConfigError, match="queue_length=2: below the 3 vectors"):
        replace(ACCUMULATED, queue_length=2)
    assert AUTOCOMPRESSOR.retention == "accumulate"


NAMES, VALUES, TOLD = 2, 8, 6
"""A segment tells what the two names stand for, and the next one asks for one of them: with both
values known and not whose they are, half of the answers are right.
"""
REST = NAMES + VALUES


def lessons(count: int, generator: torch.Generator) -> torch.Tensor:
    """[count, 2 * TOLD] ids; the last token of a row is the value that is asked for."""
    names = torch.arange(NAMES).expand(count, -1)
    values = NAMES + torch.rand(count, VALUES, generator=generator).argsort(-1)[:, :NAMES]
    pairs = torch.stack([names, values], dim=-1)
    told = F.pad(pairs.flatten(1), (TOLD - 2 * NAMES, 0), value=REST)
    which = torch.randint(NAMES, (count,), generator=generator)
    asked = F.pad(pairs[torch.arange(count), which], (TOLD - 2, 0), value=REST)
    return torch.cat([told, asked], dim=1)


def test_a_tiny_model_learns_to_recall_across_segments() -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    special = {"bos_token_id": REST + 1, "eos_token_id": None, "initializer_range": 0.1}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=REST + 2, **sizes, **heads, **special))
    patch(model, RMTConfig(segment_length=TOLD, num_memory_tokens=4))
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3, weight_decay=0.0)

    def answers(ids):
        return model(ids[:, :-1], use_cache=False, logits_to_keep=1).logits[:, -1]

    for _ in range(300):
        ids = lessons(64, generator)
        optimizer.zero_grad()
        F.cross_entropy(answers(ids), ids[:, -1]).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    model.eval()
    held_out = lessons(512, generator)

    @torch.no_grad()
    def share() -> float:
        return float((answers(held_out).argmax(-1) == held_out[:, -1]).float().mean())

    chance, spread = 1 / VALUES, 4 * (7 / 8 / 8 / 512) ** 0.5
    assert share() > 0.9
    with memory_silenced(model):
        assert abs(share() - chance) < spread
    with state_shuffled(model):
        assert abs(share() - chance) < spread
