"""Pools and stores on rows whose first value is a number by which they are known."""

from __future__ import annotations

import pytest
import torch

from memretrofit.modules.long_term import LayerLongTerm
from memretrofit.modules.pool import LayerPool, dropped_places
from memretrofit.modules.segment_memory import Columns, Part

SIZES = {"spans": (4,), "hidden_size": 2, "stored": "input", "seed": 0}
STORED = {"top_k": 2, "long_term_size": 4, "key_dim": 2, "activation": torch.nn.SiLU()}


def rows(*names):
    """[1, n, 2] rows with these names; the second value tells them from nothing."""
    return torch.tensor([[[float(name), 1.0] for name in names]])


def names(pool):
    """Of each row of the batch."""
    return [[int(x[0]) for x in row] for row in pool]


def closing(count, columns):
    """All rows close the writing span, the second, behind so many columns."""
    return Part(1, columns, columns, torch.ones(count, dtype=torch.bool))


def written(part, state, new):
    """The state after `new` [B, n, E] were the columns of a write pass."""
    return state | part.write(new, new + 100, state, closing(*new.shape[:2]))


def test_what_is_dropped_is_a_part_of_the_places():
    """Each place stays or goes, in order; it depends on the number of writes and the seed alone."""
    writes = torch.tensor([0.0, 7.0, 1e6, 7.0])
    stay, leave = dropped_places(writes, 12, 5, seed=3)
    assert torch.equal(torch.cat([stay, leave], 1).sort().values, torch.arange(12).repeat(4, 1))
    assert (stay.diff() > 0).all()
    assert (leave.diff() > 0).all()
    assert torch.equal(leave[1], leave[3])
    assert torch.equal(leave[1:2], dropped_places(writes[1:2], 12, 5, seed=3)[1])
    assert not torch.equal(leave[1], leave[2])
    assert not torch.equal(leave, dropped_places(writes, 12, 5, seed=4)[1])


@pytest.mark.parametrize("seed", [0, 1, 12345])
def test_all_places_are_dropped_equally_often(seed):
    """And so are neighbours, and a place in two writes one behind the other, within 5 standard
    deviations of n draws. Witness: the same draw twice."""
    size, count, draws = 16, 4, 20_000
    _, leave = dropped_places(torch.arange(draws), size, count, seed)
    gone = torch.zeros(draws, size).scatter(1, leave, 1.0)
    share = count / size

    def off(found, expected):
        spread = (expected * (1 - expected) / draws) ** 0.5
        return ((found.mean(0) - expected).abs().max() / spread).item()

    assert off(gone, share) < 5
    assert off(gone * gone.roll(1, dims=1), share * (count - 1) / (size - 1)) < 5
    assert off(gone * gone.roll(1, dims=0), share**2) < 5
    assert off(gone * gone, share**2) > 5


def test_survival_is_geometric():
    """(1 - K/N)^t of the rows of one write are left after t, within 3 standard deviations over
    400 conversations, of which each drops others. Witness: one write more or less."""
    runs, block, blocks = 400, 4, 5
    part = LayerPool(num_memory_tokens=block, num_blocks=blocks, **SIZES)
    size = block * blocks
    state = part.begin(runs, torch.device("cpu"))
    state["pool"] = torch.arange(size).float()[None, :, None].repeat(runs, 1, 2)
    state["writes"] = 1.0 + 1000 * torch.arange(runs)
    rate, shares = 1 - 1 / blocks, []
    for _ in range(9):
        state = written(part, state, torch.full((runs, block, 2), 99.0))
        alive = (state["pool"][..., 0] < size).float().sum(1)
        shares.append((alive.mean() / size, alive.std() / size / runs**0.5))
    for done in (2, 5, 9):
        mean, error = shares[done - 1]
        assert (mean - rate**done).abs() < 3 * error
        assert (mean - rate ** (done + 1)).abs() > 3 * error
        assert (mean - rate ** (done - 1)).abs() > 3 * error


def test_two_writes_by_hand():
    """The first fills the pool with copies, the second appends; what stays keeps its order."""
    part = LayerPool(num_memory_tokens=2, num_blocks=2, **SIZES)
    state = written(part, part.begin(1, torch.device("cpu")), rows(8, 9, 1, 2))
    assert names(state["pool"]) == [[1, 2, 1, 2]]
    assert state["writes"].tolist() == [1]
    after = part.replaced(rows(3, 4), state, torch.tensor([[1, 2]]), torch.tensor([[0, 3]]))
    assert names(after["pool"]) == [[2, 1, 3, 4]]
    assert after["writes"].tolist() == [2]
    stay, _ = dropped_places(state["writes"], 4, 2, seed=0)
    expected = [names(state["pool"])[0][n] for n in stay[0]] + [3, 4]
    assert names(written(part, state, rows(3, 4))["pool"]) == [expected]


def test_rows_of_a_batch_are_at_their_own_writes():
    """One row has written nothing, its neighbour once: each is as it would be alone."""
    part = LayerPool(num_memory_tokens=2, num_blocks=3, **SIZES)
    fresh = part.begin(1, torch.device("cpu"))
    once = written(part, fresh, rows(1, 2))
    both = {name: torch.cat([fresh[name], once[name]]) for name in fresh}
    found = written(part, both, torch.cat([rows(5, 6), rows(7, 8)]))
    assert names(found["pool"])[:1] == names(written(part, fresh, rows(5, 6))["pool"])
    assert names(found["pool"])[1:] == names(written(part, once, rows(7, 8))["pool"])


def test_what_a_layer_gave_out_is_stored_where_that_is_asked():
    """And nothing where another span closes."""
    part = LayerPool(num_memory_tokens=2, num_blocks=1, **SIZES | {"stored": "output"})
    state = part.begin(1, torch.device("cpu"))
    assert names(written(part, state, rows(1, 2, 3))["pool"]) == [[102, 103]]
    inputs = rows(1, 2, 3)
    assert part.write(inputs, inputs, state, Part(0, 3, 3, torch.ones(1, dtype=torch.bool))) == {}


def test_rows_stand_in_the_columns_that_wait_for_them():
    """Behind the sink, in front of the tokens; of the pool's last K where a segment is written."""
    part = LayerPool(num_memory_tokens=2, num_blocks=2, **SIZES)
    with torch.no_grad():
        part.move_sink.vector.fill_(10)
        part.mark_written.vector.fill_(1000)
    state = part.begin(1, torch.device("cpu")) | {"pool": rows(1, 2, 3, 4)}
    every = torch.ones(1, dtype=torch.bool)

    def read(span, *columns):
        opening = Part(span, 0, len(columns) - (span == 0), every)
        found = Columns(
            state=state, segments=torch.ones(1), real=None, openings=(opening,), closings=()
        )
        return names(part.read(rows(*columns), state, found))[0]

    assert read(0, 50, 0, 0, 0, 0, 60) == [60, 1, 2, 3, 4, 60]
    assert read(1, 50, 0, 0, 61, 62, 63, 64) == [60, 3, 4, 61, 62, 1063, 1064]
    assert read(1, 61, 62, 63, 64) == [61, 62, 1063, 1064]  # an empty pool


def long_term(**sizes):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return LayerLongTerm(num_memory_tokens=2, num_blocks=2, **SIZES, **STORED | sizes)


def test_what_is_dropped_goes_to_the_store_by_hand():
    """K = 2, N = 4, C = 4. Copies are lost; the row that came first leaves a full store; ages are
    in tokens, 0 the last that was written."""
    part = long_term()
    state = written(part, part.begin(1, torch.device("cpu")), rows(1, 2))
    assert names(state["pool"]) == [[1, 2, 1, 2]]
    assert state["age"].tolist() == [[-1, -1, 1, 0]]
    assert state["store_age"].tolist() == [[-1, -1, -1, -1]]

    def after(state, new, leave):
        stay = [n for n in range(4) if n not in leave]
        return part.replaced(rows(*new), state, torch.tensor([stay]), torch.tensor([leave]))

    state = after(state, (3, 4), [1, 2])  # a copy of 2, and 1
    assert names(state["pool"]) == [[1, 2, 3, 4]]
    assert state["age"].tolist() == [[-1, 2, 1, 0]]
    assert names(state["store"])[0][3:] == [1]
    assert state["store_age"].tolist() == [[-1, -1, -1, 3]]
    state = after(state, (5, 6), [1, 3])  # 2 and 4
    assert names(state["pool"]) == [[1, 3, 5, 6]]
    assert state["age"].tolist() == [[-1, 3, 1, 0]]
    assert names(state["store"])[0][1:] == [1, 2, 4]
    assert state["store_age"].tolist() == [[-1, 5, 4, 2]]
    state = after(state, (7, 8), [1, 2])  # 3 and 5: five rows for four places
    assert names(state["store"]) == [[2, 4, 3, 5]]
    assert state["store_age"].tolist() == [[6, 4, 5, 3]]
    assert torch.allclose(state["store_key"], part.key_map(state["store"]))


def test_the_best_rows_are_recalled_oldest_first():
    """Keys by hand: of four rows the two whose keys go with the queries; where there are fewer,
    those there are, on the right."""
    part = long_term()
    with torch.no_grad():
        found = part.query_map(rows(5))[0, 0]
    state = part.begin(1, torch.device("cpu"))
    state["store"] = rows(1, 2, 3, 4)
    state["store_key"] = torch.stack([found, -found, 3 * found, 2 * found])[None]
    state["store_age"] = torch.tensor([[6.0, 4, 5, 7]])
    assert names(part.recalled(rows(5), state)) == [[4, 3]]
    scores = part.scores(rows(5, 5), state)[0]
    expected = (torch.tensor([1, -1, 3, 2]) * (found @ found)).sigmoid()
    assert torch.allclose(scores, expected)
    state["store_age"] = torch.tensor([[-1.0, 4, -1, -1]])
    assert names(part.recalled(rows(5), state))[0][1] == 2


def test_a_score_takes_the_gradient_of_its_row_against_the_mean():
    """Rows 1 to 4 of mean 2.5, beside a place that holds no row: a loss that falls as a recalled
    row grows raises the score of 4 and lowers that of 1. The values stay those of the rows."""
    part = long_term(top_k=4, long_term_size=5)
    state = part.begin(1, torch.device("cpu"))
    state["store"], state["store_age"] = rows(99, 4, 3, 2, 1), torch.tensor([[-1.0, 8, 6, 4, 2]])
    state["store_key"] = keys = torch.full((1, 5, 2), 0.1, requires_grad=True)
    query = part.query_map(rows(5))[0, 0].detach()
    found = part.recalled(rows(5), state)
    assert torch.equal(found, state["store"][:, 1:])
    (slope,) = torch.autograd.grad(-found[..., 0].sum(), keys)
    score = (query.sum() * 0.1).sigmoid()
    expected = torch.tensor([0, -1.5, -0.5, 0.5, 1.5])[:, None] * score * (1 - score) * query
    assert torch.allclose(slope[0], expected, atol=1e-6)
