"""Batches of near-equal length, results in the caller's order, and what happens when memory runs out."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from scellfm import inference
from scellfm.core import DataError, OptionError, ScellfmWarning

lengths_of_cells = st.lists(st.integers(0, 60), max_size=80)


@given(lengths_of_cells, st.integers(1, 200), st.sampled_from([0.0, 0.25, 0.9]))
@settings(deadline=None)
def test_a_plan_holds_every_nonempty_sequence_once_within_budget_and_spread(lengths, budget, spread):
    plan = inference.plan_batches(lengths, budget, spread)
    lengths = np.array(lengths, dtype=int)
    assert sorted(np.concatenate([*plan, np.empty(0, int)])) == list(np.flatnonzero(lengths))
    for batch in plan:
        longest = lengths[batch].max()
        assert len(batch) == 1 or longest * len(batch) <= budget
        assert lengths[batch].min() >= longest * (1 - spread)


def test_a_plan_is_longest_first_and_keeps_the_order_of_equals():
    plan = inference.plan_batches([5, 9, 5, 9, 5], token_budget=18)
    assert [list(batch) for batch in plan] == [[1, 3], [0, 2, 4]]


def test_a_plan_of_sorted_cells_wastes_little():
    lengths = np.minimum(np.random.default_rng(1).lognormal(6.5, 0.6, 3000), 2048).astype(int)
    computed = sum(lengths[batch].max() * len(batch) for batch in inference.plan_batches(lengths))
    assert computed < 1.1 * lengths.sum()


@pytest.mark.parametrize("budget", [0, -5])
def test_an_impossible_budget_is_an_error(budget):
    with pytest.raises(OptionError, match="token_budget"):
        inference.plan_batches([3], budget)


def test_padding_fills_up_and_masks():
    ids, mask = inference.pad([[4, 5, 6], [], [7]], pad_id=9)
    assert ids.tolist() == [[4, 5, 6], [9, 9, 9], [7, 9, 9]]
    assert mask.tolist() == [[True] * 3, [False] * 3, [True, False, False]]
    assert ids.dtype == torch.int64 and mask.dtype == torch.bool


@given(lengths_of_cells.filter(any), st.integers(1, 300))
@settings(deadline=None)
def test_results_come_in_the_order_of_the_caller_whatever_the_budget(lengths, budget):
    sequences = [np.arange(n) + i for i, n in enumerate(lengths)]
    result = inference.run(lambda ids, mask: (ids * mask).sum(1).double(), sequences, device="cpu", token_budget=budget)
    expected = np.array([s.sum() if len(s) else np.nan for s in sequences])
    np.testing.assert_array_equal(result.numpy(), expected)


def test_rows_may_have_any_shape():
    result = inference.run(lambda ids, mask: torch.ones(len(ids), 2, 3), [[1], [2, 3]], device="cpu")
    assert result.shape == (2, 2, 3)


def test_a_function_with_missing_rows_is_an_error():
    with pytest.raises(DataError, match="one row each"):
        inference.run(lambda ids, mask: torch.ones(1), [[1], [2]], device="cpu")


def test_only_empty_sequences_are_an_error():
    with pytest.raises(DataError, match="empty"):
        inference.run(lambda ids, mask: ids.sum(1), [[], []], device="cpu")


@pytest.mark.parametrize(
    "error",
    [
        torch.cuda.OutOfMemoryError("CUDA out of memory."),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"),
        RuntimeError("MPS backend out of memory (MPS allocated: 9 GB)"),
    ],
)
def test_out_of_memory_halves_the_budget_goes_on_and_is_recorded(error):
    sequences, record, sizes = [np.arange(n) for n in [8] * 10 + [3] * 4], [], []

    def small_memory(ids, mask):
        if ids.numel() > 20:
            raise error
        sizes.append(ids.numel())
        return ids.sum(1).float()

    with pytest.warns(ScellfmWarning, match="out of memory"):
        result = inference.run(small_memory, sequences, device="cpu", token_budget=80, record=record)
    assert result.tolist() == [28.0] * 10 + [3.0] * 4
    assert [step["token_budget"] for step in record] == [40, 20] and record[0]["remaining"] == 14
    assert max(sizes) <= 20 and len(sizes) == 6


def test_what_is_done_is_not_done_again_after_running_out_of_memory():
    seen = []

    def fails_late(ids, mask):
        if ids.shape == (4, 2):
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        seen.extend(ids[:, 0].tolist())
        return ids.sum(1).float()

    sequences = [np.full(9, i) for i in range(2)] + [np.full(2, i) for i in range(2, 6)]
    with pytest.warns(ScellfmWarning):
        inference.run(fails_late, sequences, device="cpu", token_budget=18)
    assert sorted(seen) == list(range(6))


def test_a_single_sequence_that_does_not_fit_ends_the_run():
    def full(ids, mask):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    with pytest.warns(ScellfmWarning), pytest.raises(MemoryError, match="one sequence of 7 tokens"):
        inference.run(full, [np.arange(7), np.arange(7)], device="cpu")


def test_other_errors_are_not_taken_for_memory():
    def broken(ids, mask):
        raise RuntimeError("shapes do not match")

    with pytest.raises(RuntimeError, match="shapes"):
        inference.run(broken, [[1, 2]], device="cpu")


def test_devices_and_precisions_by_name():
    assert inference.pick_device("cpu") == torch.device("cpu") and inference.pick_device().type in (
        "cpu",
        "cuda",
        "mps",
    )
    assert inference.pick_dtype("bfloat16") is torch.bfloat16 and inference.pick_dtype(torch.float32) is torch.float32
    with pytest.raises(OptionError, match="abacus"):
        inference.pick_device("abacus")
    with pytest.raises(OptionError, match="float31"):
        inference.pick_dtype("float31")


# ---- sequences


class Stored:
    "Cells in several flat blocks, the first of which does not begin at 0; token ids of 16 bits, as on disk."

    def __init__(self, cells, at):
        self.blocks = []
        for part in (cells[:at], cells[at:]):
            tokens = np.concatenate([np.array([60000, 60000]), *part]).astype(np.uint16)
            self.blocks.append((tokens, np.cumsum([2, *map(len, part)])))


def cut_one(cell, max_length, end):
    if len(cell) <= max_length:
        return list(cell)
    return list(cell[:max_length]) if end is None else [*cell[: max_length - 1], end]


@given(st.lists(st.lists(st.integers(0, 50000), max_size=12), max_size=12), st.data())
@settings(deadline=None)
def test_views_show_the_cells_whatever_was_taken_and_cut(cells, data):
    at = data.draw(st.integers(0, len(cells)))
    view = data.draw(st.sampled_from([inference.Sequences(cells), inference.Sequences(Stored(cells, at))]))
    shown = [list(cell) for cell in cells]
    for _ in range(data.draw(st.integers(0, 3))):
        if shown:
            rows = data.draw(st.lists(st.integers(-len(shown), len(shown) - 1), max_size=8))
            view, shown = view.take(rows), [shown[row] for row in rows]
    longest, end = data.draw(st.integers(1, 12)), data.draw(st.sampled_from([None, 7]))
    for length in (longest, data.draw(st.integers(1, 12))):
        view, shown = view.cut(length, end), [cut_one(cell, length, end) for cell in shown]
    assert [cell.tolist() for cell in view] == shown and view.lengths.tolist() == list(map(len, shown))
    assert all(cell.dtype == np.int64 for cell in view)
    ids, mask = view.batch(np.arange(len(view)), pad_id=3)
    expected = inference.pad(shown, 3)
    assert torch.equal(ids, expected[0]) and torch.equal(mask, expected[1])
    (tokens,), offsets = view.flat()
    assert tokens.tolist() == sum(shown, []) and np.diff(offsets).tolist() == view.lengths.tolist()


def test_a_view_copies_no_tokens_and_leaves_its_cells_alone():
    stored = Stored([[1, 2, 3, 4], [5, 6]], 1)
    before = [tokens.copy() for tokens, _ in stored.blocks]
    view = inference.Sequences(stored).take(np.array([True, False])).cut(2, end=9)
    assert view[0].tolist() == [1, 9] and view.n_cut == 1 and view[-1].tolist() == [1, 9]
    assert all(np.array_equal(tokens, old) for (tokens, _), old in zip(stored.blocks, before))
    assert all(
        np.shares_memory(part, stored.blocks[i][0]) for i, (parts, _) in enumerate(view.stored) for part in parts
    )
    with pytest.raises(IndexError, match="cell 1 of 1"):
        view[1]
    with pytest.raises(OptionError, match="max_length=0"):
        view.cut(0)


def test_arrays_side_by_side_keep_their_types_and_padding():
    class Binned:
        blocks = [((np.array([1, 7, 1], np.int32), np.array([0.5, 2, 3], np.float32)), np.array([0, 2, 3]))]

    cells = inference.Sequences(Binned())
    ids, values, mask = cells.batch([0, 1], pad_id=60, pad_value=-2)
    assert ids.tolist() == [[1, 7], [1, 60]] and ids.dtype == torch.int64
    assert values.tolist() == [[0.5, 2], [3, -2]] and values.dtype == torch.float32 and mask.sum() == 3
    assert [part.tolist() for part in cells[0]] == [[1, 7], [0.5, 2]]


# ---- inputs of one size


@given(st.integers(1, 40), st.integers(1, 50))
@settings(deadline=None)
def test_rows_of_one_size_come_in_order_whatever_the_batch_size(n, batch_size):
    inputs, sizes = np.random.default_rng(n).normal(size=(n, 3, 2)), []

    def total(batch):
        sizes.append(len(batch))
        return batch.sum(2)

    result = inference.run_rows(total, inputs, batch_size=batch_size, device="cpu")
    np.testing.assert_array_equal(result.numpy(), inputs.sum(2))
    assert max(sizes) <= batch_size and sum(sizes) == n


def test_rows_may_be_made_while_they_are_needed():
    class Windows:
        def __len__(self):
            return 5

        def __getitem__(self, positions):
            return torch.as_tensor(positions)[:, None] * torch.ones(2)

    assert inference.run_rows(lambda batch: batch[:, 0], Windows(), batch_size=2, device="cpu").tolist() == [*range(5)]


def test_rows_go_on_in_smaller_batches_where_memory_runs_out():
    record = []

    def small(batch):
        if len(batch) > 2:
            raise RuntimeError("CUDA out of memory")
        return batch * 2

    with pytest.warns(ScellfmWarning, match="out of memory: 7"):
        result = inference.run_rows(small, np.arange(7), batch_size=4, device="cpu", record=record)
    assert result.tolist() == [*range(0, 14, 2)] and record == [{"token_budget": 2, "remaining": 7}]
    with pytest.raises(DataError, match="no rows"):
        inference.run_rows(small, np.zeros((0, 3)), device="cpu")
    with pytest.raises(OptionError, match="batch_size=0"):
        inference.run_rows(small, np.zeros((2, 3)), batch_size=0, device="cpu")


@pytest.mark.parametrize(
    "text, fast",
    [
        ("processor : 0\nflags\t\t: fpu avx512f avx512_bf16 amx_tile\n", True),
        ("processor : 0\nflags\t\t: fpu avx2 avx512f\n", False),
        ("processor : 0\nFeatures\t: fp asimd bf16\n", True),
        ("model name\t: avx512_bf16\n", False),
    ],
)
def test_the_processors_flags_tell_whether_bfloat16_is_fast(tmp_path, text, fast):
    (tmp_path / "cpuinfo").write_text(text)
    assert inference.bfloat16_is_fast(tmp_path / "cpuinfo") is fast
    assert inference.bfloat16_is_fast(tmp_path / "missing") is False


@pytest.mark.parametrize(
    "fast, dtype, patience, shown, hints",
    [
        (True, "float32", 0.0, True, 1),
        (False, "float32", 0.0, True, 0),  # such a processor has nothing to offer
        (True, "bfloat16", 0.0, True, 0),  # it is in use
        (True, "float32", 60.0, True, 0),  # a short run
        (True, "float32", 0.0, False, 0),  # switched off with the bars
    ],
)
def test_bfloat16_is_hinted_at_once_where_it_would_help(monkeypatch, capsys, fast, dtype, patience, shown, hints):
    monkeypatch.setattr(inference, "hint", inference.Hint())
    monkeypatch.setattr(inference, "PATIENCE", patience)
    monkeypatch.setattr(inference, "bfloat16_is_fast", lambda: fast)
    monkeypatch.setattr(inference.settings, "progress", shown)
    model = inference.in_precision(torch.nn.Linear(3, 2), torch.device("cpu"), inference.pick_dtype(dtype))
    assert model.weight.dtype == torch.float32 or dtype == "bfloat16"  # the default stays
    for _ in range(2):
        list(inference.batches(lambda rows: (rows,), lambda rows: rows, np.array([3, 2, 2]), token_budget=3))
    assert capsys.readouterr().err.count("dtype='bfloat16'") == hints
