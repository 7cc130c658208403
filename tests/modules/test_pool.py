"""Pools and stores on rows whose first value is a number by which they are known."""

from __future__ import annotations

import pytest
import torch

from memretrofit.modules.long_term import LayerLongTerm
from memretrofit.modules.pool import LayerPool, PoolSizes, dropped_places
from memretrofit.modules.segment_memory import Columns, Part

SIZES = {"hidden_size": 2, "dtype": torch.float32, "stored": "input", "seed": 0}
STORED = {"top_k": 2, "long_term_size": 4, "key_dim": 2, "activation": torch.nn.SiLU()}


def pool(block, blocks, **changes):
    """K = `block` rows of each write, N = `block` * `blocks`."""
    sizes = PoolSizes(spans=(4,), num_memory_tokens=block, num_blocks=blocks)
    return LayerPool(sizes, **SIZES | changes)


def rows(*names):
    """[1, n, 2] rows with these names; the second value tells them from nothing."""
    return torch.tensor([[[float(name), 1.0] for name in names]])


def names(held):
    """Of each row of the batch."""
    return [[int(x[0]) for x in row] for row in held]


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
    part = pool(block, blocks)
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
    part = pool(2, 2)
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
    part = pool(2, 3)
    fresh = part.begin(1, torch.device("cpu"))
    once = written(part, fresh, rows(1, 2))
    both = {name: torch.cat([fresh[name], once[name]]) for name in fresh}
    found = written(part, both, torch.cat([rows(5, 6), rows(7, 8)]))
    assert names(found["pool"])[:1] == names(written(part, fresh, rows(5, 6))["pool"])
    assert names(found["pool"])[1:] == names(written(part, once, rows(7, 8))["pool"])


def test_what_a_layer_gave_out_is_stored_where_that_is_asked():
    """And nothing where another span closes."""
    part = pool(2, 1, stored="output")
    state = part.begin(1, torch.device("cpu"))
    assert names(written(part, state, rows(1, 2, 3))["pool"]) == [[102, 103]]
    inputs = rows(1, 2, 3)
    assert part.write(inputs, inputs, state, Part(0, 3, 3, torch.ones(1, dtype=torch.bool))) == {}


def test_rows_stand_in_the_columns_that_wait_for_them():
    """Behind the sink, in front of the tokens; of the pool's last K where a segment is written."""
    part = pool(2, 2)
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


def long_term(**changes):
    sizes = PoolSizes(spans=(4,), num_memory_tokens=2, num_blocks=2)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return LayerLongTerm(sizes, **SIZES | STORED | changes)


def with_store(part, held, born):
    """A state whose store holds the rows [1, C, 2] at places 0, 1, ..., with these births."""
    state = part.begin(1, torch.device("cpu"))
    state |= {name: held[:, begin:end] for name, (begin, end) in part.parts.items()}
    return state | {"store_born": torch.tensor([born])}


def test_what_is_dropped_goes_to_the_store_by_hand():
    """K = 2, N = 4, C = 4. Copies are lost; the row that came first leaves a full store; born is
    how many rows were written before."""
    part = long_term()
    state = written(part, part.begin(1, torch.device("cpu")), rows(1, 2))
    assert names(state["pool"]) == [[1, 2, 1, 2]]
    assert state["born"].tolist() == [[-1, -1, 0, 1]]
    assert state["store_born"].tolist() == [[-1, -1, -1, -1]]

    def after(state, new, leave):
        stay = [n for n in range(4) if n not in leave]
        found = part.replaced(rows(*new), state, torch.tensor([stay]), torch.tensor([leave]))
        return state | found

    state = after(state, (3, 4), [1, 2])  # a copy of 2, and 1
    assert names(state["pool"]) == [[1, 2, 3, 4]]
    assert state["born"].tolist() == [[-1, 1, 2, 3]]
    assert names(part.store(state))[0][:1] == [1]
    assert state["store_born"].tolist() == [[0, -1, -1, -1]]
    state = after(state, (5, 6), [1, 3])  # 2 and 4
    assert names(state["pool"]) == [[1, 3, 5, 6]]
    assert state["born"].tolist() == [[-1, 2, 4, 5]]
    assert names(part.store(state))[0][:3] == [1, 2, 4]
    assert state["store_born"].tolist() == [[0, 1, 3, -1]]
    state = after(state, (7, 8), [1, 2])  # 3 and 5: five rows for four places
    assert names(part.store(state)) == [[5, 2, 4, 3]]
    assert state["store_born"].tolist() == [[4, 1, 3, 2]]
    assert state["stored"].tolist() == [5]
    assert torch.allclose(state["store_key"], part.key_map(part.store(state)))


def test_a_store_smaller_than_a_write_keeps_the_last_row():
    part = long_term(top_k=1, long_term_size=1)
    state = written(part, part.begin(1, torch.device("cpu")), rows(1, 2))
    two = torch.tensor([[0, 1]]), torch.tensor([[2, 3]])
    state = state | part.replaced(rows(3, 4), state, *two)
    assert names(part.store(state)) == [[2]]
    assert state["stored"].tolist() == [2]


def test_a_write_shares_what_it_does_not_touch():
    """Of a store in sixteen parts, one write of two rows makes one anew, and the state before it
    is still what it was."""
    part = long_term(long_term_size=64)
    state = written(part, part.begin(1, torch.device("cpu")), rows(1, 2))
    before = {name: x.clone() for name, x in state.items()}
    two = torch.tensor([[0, 1]]), torch.tensor([[2, 3]])
    found = state | part.replaced(rows(3, 4), state, *two)
    same = [name for name in part.parts if found[name] is state[name]]
    assert len(part.parts) == 16
    assert same == list(part.parts)[1:]
    assert all(torch.equal(x, before[name]) for name, x in state.items())
    assert names(part.store(found))[0][:2] == [1, 2]


def test_rows_have_the_type_of_the_model():
    """A copy of a hidden state loses nothing in it; what is computed of it is single."""
    part = long_term(dtype=torch.bfloat16)
    state = written(part, part.begin(1, torch.device("cpu")), rows(1, 2).bfloat16())
    kinds = {name: x.dtype for name, x in state.items()}
    assert {kinds[name] for name in ("pool", *part.parts)} == {torch.bfloat16}
    assert kinds["store_key"] is torch.float32
    assert {kinds[x] for x in ("writes", "born", "stored", "store_born")} == {torch.int64}


def test_the_best_rows_are_recalled_oldest_first():
    """Keys by hand: of four rows the two whose keys go with the queries; where there are fewer,
    those there are, on the right."""
    part = long_term()
    with torch.no_grad():
        found = part.query_map(rows(5))[0, 0]
    state = with_store(part, rows(1, 2, 3, 4), [1, 3, 2, 0])
    state["store_key"] = torch.stack([found, -found, 3 * found, 2 * found])[None]
    assert names(part.recalled(rows(5), state)) == [[4, 3]]
    scores = part.scores(rows(5, 5), state)[0]
    expected = (torch.tensor([1, -1, 3, 2]) * (found @ found)).sigmoid()
    assert torch.allclose(scores, expected)
    state["store_born"] = torch.tensor([[-1, 3, -1, -1]])
    assert names(part.recalled(rows(5), state))[0][1] == 2


def test_a_score_takes_the_gradient_of_its_row_against_the_mean():
    """Rows 1 to 4 of mean 2.5, beside a place that holds no row: a loss that falls as a recalled
    row grows raises the score of 4 and lowers that of 1. The values stay those of the rows."""
    part = long_term(top_k=4, long_term_size=5)
    state = with_store(part, rows(99, 4, 3, 2, 1), [-1, 1, 2, 3, 4])
    state["store_key"] = keys = torch.full((1, 5, 2), 0.1, requires_grad=True)
    query = part.query_map(rows(5))[0, 0].detach()
    found = part.recalled(rows(5), state)
    assert torch.equal(found, part.store(state)[:, 1:])
    (slope,) = torch.autograd.grad(-found[..., 0].sum(), keys)
    score = (query.sum() * 0.1).sigmoid()
    expected = torch.tensor([0, -1.5, -0.5, 0.5, 1.5])[:, None] * score * (1 - score) * query
    assert torch.allclose(slope[0], expected, atol=1e-6)
