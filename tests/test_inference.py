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
