"The one training loop: repeatable, resumable, the same on one process and on several."

import json
import math
import os
import signal
import subprocess
import sys
import textwrap
import time

import numpy as np
import pytest
import torch
from two_processes import two_processes

from scellfm.core import DataError, DivergedError, OptionError, StoreError
from scellfm.training import CHECKPOINT, History, Recipe, Rows, batches, fit, model_tensors

SETUP = textwrap.dedent("""
    import sys, time
    import numpy as np, torch
    from scellfm.training import Rows, fit

    generator = torch.Generator().manual_seed(0)
    x = torch.randn(93, 6, generator=generator)
    y = torch.randint(0, 3, (93,), generator=generator)

    def make(dropout=0.2):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            return torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.LayerNorm(8), torch.nn.Dropout(dropout),
                                       torch.nn.Linear(8, 3))

    def batch(rows, epoch):
        keep = torch.as_tensor(rows)
        return {"x": x[keep], "y": y[keep]}

    def loss(model, batch):
        # classes weigh unequally, so that the parts of a split batch have unequal numbers of terms
        chosen = batch["y"] != 2
        logits = model(batch["x"])[chosen]
        return torch.nn.functional.cross_entropy(logits, batch["y"][chosen], reduction="sum"), chosen.sum()

    options = dict(epochs=4, batch_size=8, learning_rate=0.05, device="cpu")
""")
exec(SETUP)


def run_script(path, body, *arguments, prefix=(), **kwargs):
    path.write_text(SETUP + textwrap.dedent(body))
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    env = {**os.environ, "PYTHONPATH": root, "OMP_NUM_THREADS": str(torch.get_num_threads()), "SCELLFM_PROGRESS": "0"}
    return subprocess.Popen(
        [sys.executable, *prefix, str(path), *map(str, arguments)],
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        **kwargs,
    )


def weights(model):
    return {name: value.clone() for name, value in model_tensors(model).items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_every_row_comes_once_and_lengths_only_regroup():
    lengths = np.random.default_rng(0).integers(1, 1000, 1003)
    plain, grouped = batches(1003, 10), batches(1003, 10, lengths=lengths)
    for groups in (plain, grouped):
        assert sorted(np.concatenate(groups)) == list(range(1003))
        assert len(groups) == 101
    padded = [sum(lengths[g].max() * len(g) for g in groups) for groups in (plain, grouped)]
    assert padded[1] < 1.1 * lengths.sum() < 1.5 * lengths.sum() < padded[0]


def test_order_is_keyed_by_seed_and_epoch():
    first = np.concatenate(batches(50, 7, seed=1, epoch=2))
    assert (first == np.concatenate(batches(50, 7, seed=1, epoch=2))).all()
    assert (first != np.concatenate(batches(50, 7, seed=1, epoch=3))).any()
    assert (first != np.concatenate(batches(50, 7, seed=2, epoch=2))).any()


def test_two_runs_are_equal_bit_for_bit_and_leave_the_callers_random_state():
    torch.manual_seed(7)
    before = torch.get_rng_state()
    a, b = make(), make()
    one = fit(a, loss, 93, batch, **options)
    torch.rand(5)
    two = fit(b, loss, 93, batch, **options)
    assert one.step_rows == two.step_rows and same(weights(a), weights(b))
    torch.manual_seed(7)
    assert torch.equal(before, torch.get_rng_state())
    fit(make(), loss, 93, batch, **options)
    assert torch.equal(before, torch.get_rng_state())
    assert fit(make(), loss, 93, batch, **{**options, "seed": 1}).step_rows != one.step_rows


def test_dropout_is_drawn_anew_at_each_step():
    model, seen = make(0.5), []
    model[2].register_forward_hook(lambda module, inputs, output: seen.append(output.detach() == 0))
    fit(model, loss, 93, batch, **{**options, "epochs": 1})
    assert any(not torch.equal(a, b) for a, b in zip(seen, seen[1:]) if a.shape == b.shape)


@pytest.mark.parametrize("dies_after", [1, 12, 23, 47])
def test_a_resumed_run_has_the_losses_of_an_uninterrupted_one(tmp_path, dies_after):
    whole = make()
    expected = fit(whole, loss, 93, batch, **options)
    calls = []

    def dying(rows, epoch):
        calls.append(1)
        if len(calls) > dies_after:
            raise KeyboardInterrupt
        return batch(rows, epoch)

    with pytest.raises(KeyboardInterrupt):
        fit(make(), loss, 93, dying, folder=tmp_path, save_every=5, **options)
    model, fresh_calls = make(), []
    counted = lambda rows, epoch: fresh_calls.append(1) or batch(rows, epoch)  # noqa: E731
    resumed = fit(model, loss, 93, counted, folder=tmp_path, save_every=5, **options)
    assert resumed.step_rows == expected.step_rows
    assert resumed.epoch_rows == expected.epoch_rows
    assert same(weights(model), weights(whole))
    if dies_after >= 5:
        assert len(fresh_calls) < len(expected.step_rows)  # it went on and did not begin anew


def test_kill_minus_nine_then_resume_gives_the_same_losses(tmp_path):
    body = """
        slow = lambda rows, epoch: time.sleep(float(sys.argv[2])) or batch(rows, epoch)
        history = fit(make(), loss, 93, slow, folder=sys.argv[1], save_every=3, **options)
    """
    process = run_script(tmp_path / "run.py", body, tmp_path / "run", 0.05)
    deadline = time.time() + 60
    while not (tmp_path / "run" / CHECKPOINT).exists():
        assert process.poll() is None and time.time() < deadline, process.stdout.read()
        time.sleep(0.02)
    time.sleep(0.4)
    process.send_signal(signal.SIGKILL)
    process.wait()
    calls, model, whole = [], make(), make()
    counted = lambda rows, epoch: calls.append(1) or batch(rows, epoch)  # noqa: E731
    resumed = fit(model, loss, 93, counted, folder=tmp_path / "run", save_every=3, **options)
    assert resumed.step_rows == fit(whole, loss, 93, batch, **options).step_rows
    assert same(weights(model), weights(whole))
    assert 0 < len(calls) < len(resumed.step_rows), "it began anew, or there was nothing left to do"


def test_a_finished_run_is_not_run_again(tmp_path):
    first = make()
    history = fit(first, loss, 93, batch, folder=tmp_path, **options)

    def never(rows, epoch):
        raise AssertionError("a batch was asked for")

    again = make()
    assert fit(again, loss, 93, never, folder=tmp_path, **options).step_rows == history.step_rows
    assert same(weights(first), weights(again))


@pytest.mark.parametrize(
    "change, word",
    [
        (dict(learning_rate=0.01), "learning_rate"),
        (dict(seed=3), "seed"),
        (dict(inputs={"cells": "b"}), "cells"),
    ],
)
def test_a_checkpoint_of_another_run_is_refused(tmp_path, change, word):
    fit(make(), loss, 93, batch, folder=tmp_path, inputs={"cells": "a"}, **{**options, "epochs": 1})
    with pytest.raises(StoreError, match=word):
        fit(make(), loss, 93, batch, folder=tmp_path, **{"inputs": {"cells": "a"}, **options, "epochs": 1, **change})


def test_a_checkpoint_of_another_beginning_is_refused(tmp_path):
    fit(make(), loss, 93, batch, folder=tmp_path, **options)
    other = make()
    with torch.no_grad():
        other[0].bias += 1
    with pytest.raises(StoreError, match="weights"):
        fit(other, loss, 93, batch, folder=tmp_path, **options)


def test_a_full_disk_stops_training_which_then_goes_on(tmp_path):
    resource = pytest.importorskip("resource")
    fit(make(), loss, 93, batch, folder=tmp_path / "sized", **{**options, "epochs": 1})
    size = (tmp_path / "sized" / CHECKPOINT).stat().st_size  # it grows with the history: later ones find no room
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size + 300, old[1]))
    try:
        with pytest.raises(StoreError, match=f"{CHECKPOINT} could not be written.*free some disk space"):
            fit(make(), loss, 93, batch, folder=tmp_path / "run", save_every=3, **options)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
    assert [path.name for path in (tmp_path / "run").iterdir()] == [CHECKPOINT]
    calls, model, whole = [], make(), make()
    counted = lambda rows, epoch: calls.append(1) or batch(rows, epoch)  # noqa: E731
    resumed = fit(model, loss, 93, counted, folder=tmp_path / "run", save_every=3, **options)
    assert resumed.step_rows == fit(whole, loss, 93, batch, **options).step_rows and same(
        weights(model), weights(whole)
    )
    assert len(calls) < len(resumed.step_rows)


def test_a_folder_that_is_a_file_is_a_store_error(tmp_path):
    (tmp_path / "taken").write_text("in the way")
    with pytest.raises(StoreError, match="taken could not be written.*choose another folder"):
        fit(make(), loss, 93, batch, folder=tmp_path / "taken", **options)


def test_a_damaged_checkpoint_is_named(tmp_path):
    fit(make(), loss, 93, batch, folder=tmp_path, **options)
    path = tmp_path / CHECKPOINT
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(StoreError, match=CHECKPOINT):
        fit(make(), loss, 93, batch, folder=tmp_path, **options)


def test_two_gloo_processes_agree_with_one(tmp_path):
    body = """
        model = make(dropout=0.0)
        valid = {"valid": Rows(11, batch)}
        history = fit(model, loss, 93, batch, valid=valid, folder=sys.argv[1], **options)
        import json, os
        if os.environ.get("RANK", "0") == "0":
            record = {"weights": {k: v.tolist() for k, v in model.state_dict().items()}, **history.to_dict()}
            open(sys.argv[2], "w").write(json.dumps(record))
    """
    launch = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")
    process = run_script(tmp_path / "run.py", body, tmp_path / "run", tmp_path / "two.json", prefix=launch)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output
    two = json.loads((tmp_path / "two.json").read_text())
    model = make(dropout=0.0)
    one = fit(model, loss, 93, batch, valid={"valid": Rows(11, batch)}, **options)
    assert len(two["step_rows"]) == len(one.step_rows)
    np.testing.assert_allclose(np.array(two["step_rows"]), np.array(one.step_rows), rtol=2e-4, atol=1e-5)
    for mine, theirs in zip(one.epoch_rows, two["epoch_rows"]):
        assert theirs == pytest.approx(mine, rel=1e-4)
    for name, value in model.state_dict().items():
        np.testing.assert_allclose(np.array(two["weights"][name]), value.numpy(), atol=1e-4)


def test_a_run_on_two_processes_that_was_killed_goes_on_with_one(tmp_path):
    body = """
        import os, signal
        steps = []
        def dying(rows, epoch):
            steps.append(1)
            if len(steps) > 20:
                os.kill(os.getpid(), signal.SIGKILL)
            return batch(rows, epoch)
        fit(make(dropout=0.0), loss, 93, dying, folder=sys.argv[1], save_every=4, **options)
    """
    (tmp_path / "run.py").write_text(SETUP + textwrap.dedent(body))
    process = two_processes(tmp_path / "run.py", tmp_path / "run")
    process.communicate(timeout=120)
    assert process.returncode != 0 and (tmp_path / "run" / CHECKPOINT).exists()
    model, whole = make(dropout=0.0), make(dropout=0.0)
    resumed = fit(model, loss, 93, batch, folder=tmp_path / "run", save_every=4, **options)
    expected = fit(whole, loss, 93, batch, **options)
    np.testing.assert_allclose(np.array(resumed.step_rows), np.array(expected.step_rows), rtol=2e-4, atol=1e-5)
    for name, value in whole.state_dict().items():
        np.testing.assert_allclose(model.state_dict()[name].numpy(), value.numpy(), atol=1e-4)


def test_early_stopping_on_a_named_split_keeps_its_best_weights():
    def swapped(at, epoch):
        return {**batch(at, epoch), "y": torch.tensor([1, 0, 2])[batch(at, epoch)["y"]]}

    sets, best = {"near": Rows(93, batch), "far": Rows(93, swapped)}, {}
    for name, rows in sets.items():
        model = make()
        history = fit(model, loss, 93, batch, valid=sets, stop=f"{name}_loss", patience=1, **options)
        losses = history.epochs[f"{name}_loss"]
        best[name] = history.best
        assert history.best == int(losses.argmin())
        with torch.no_grad():
            total, count = loss(model.eval(), rows.batch(np.arange(93), 0))
        assert losses[history.best] == pytest.approx((total / count).item(), rel=1e-5)
    assert best["far"] < best["near"]  # what is learnt from one is unlearnt for the other


def test_early_stopping_keeps_the_best_epoch(tmp_path):
    scores = iter([0.5, 0.9, 0.4, 0.3, 0.8])
    kept = []
    options_ = {**options, "epochs": 5, "stop": "valid_f1", "greater_is_better": True, "patience": 2}

    def metrics(model):
        kept.append(weights(model))
        return {"valid_f1": next(scores)}

    model = make()
    history = fit(model, loss, 93, batch, metrics=metrics, folder=tmp_path, **options_)
    assert history.best == 1 and history.stopped_early and len(history.epochs) == 4
    assert same(weights(model), kept[1]) and not same(weights(model), kept[3])
    again = make()
    assert fit(again, loss, 93, batch, metrics=metrics, folder=tmp_path, **options_).stopped_early
    assert same(weights(again), kept[1])


@pytest.mark.parametrize("scores, best", [([np.nan, 0.5, 0.7], 2), ([0.5, np.nan, 0.4], 0), ([np.nan] * 3, None)])
def test_an_epoch_without_a_score_is_never_the_best(scores, best):
    left, kept = iter(scores), []

    def metrics(model):
        kept.append([value.clone() for value in weights(model).values()])
        return {"auroc": next(left)}

    history = fit(
        model := make(),
        loss,
        93,
        batch,
        **{**options, "epochs": 3},
        metrics=metrics,
        stop="auroc",
        greater_is_better=True,
        patience=3,
    )
    assert history.best == best
    assert all(torch.equal(a, b) for a, b in zip(weights(model).values(), kept[-1 if best is None else best]))


def test_held_out_loss_is_the_mean_over_terms_without_dropout():
    model = make(0.5)
    later = Rows(13, lambda rows, epoch: batch(rows + 80, epoch))
    history = fit(model, loss, 80, batch, valid={"later": later}, **options)
    with torch.no_grad():
        total, count = loss(model.eval(), batch(np.arange(80, 93), 0))
    assert history.epochs.later_loss.iloc[-1] == pytest.approx((total / count).item(), rel=1e-5)


def test_frozen_parameters_do_not_change():
    model = make()
    model[0].requires_grad_(False)
    before = weights(model)
    fit(model, loss, 93, batch, **options)
    after = weights(model)
    assert torch.equal(before["0.weight"], after["0.weight"]) and torch.equal(before["0.bias"], after["0.bias"])
    assert not torch.equal(before["3.weight"], after["3.weight"])


def test_steps_bound_a_run_and_the_rate_ends_near_zero():
    history = fit(make(), loss, 93, batch, **{**options, "steps": 17, "epochs": 1})
    assert len(history.steps) == 17 and list(history.epochs.epoch) == [0, 1]
    assert history.steps.learning_rate.iloc[-1] < 0.1 * options["learning_rate"]


def test_biases_and_norms_are_not_decayed():
    model = make()
    before = weights(model)
    nothing = lambda model, batch: (model(batch["x"]).sum() * 0, len(batch["y"]))  # noqa: E731
    fit(model, nothing, 93, batch, **{**options, "weight_decay": 0.5})
    after = weights(model)
    assert after["0.weight"].norm() < 0.9 * before["0.weight"].norm()
    assert torch.equal(before["0.bias"], after["0.bias"]) and torch.equal(before["1.weight"], after["1.weight"])


def test_history_survives_json(tmp_path):
    history = fit(make(), loss, 93, batch, **options)
    assert History.from_dict(json.loads(json.dumps(history.to_dict()))) == history


@pytest.mark.parametrize(
    "wrong, word",
    [
        (dict(schedule="linaer"), "linear"),
        (dict(learning_rate=-1), "learning_rate=-1"),
        (dict(epochs=0), "epochs=0"),
        (dict(batchsize=4), "batch_size"),
        (dict(dtype="float16"), "bfloat16"),
        (dict(learning_rate=float("nan")), "nan"),
    ],
)
def test_a_wrong_option_is_named(wrong, word):
    with pytest.raises(OptionError, match=word):
        fit(make(), loss, 93, batch, **{**options, **wrong})


def test_what_cannot_be_trained_is_refused():
    with pytest.raises(DataError, match="0 rows"):
        fit(make(), loss, 0, batch, **options)
    with pytest.raises(DataError, match="0 rows in a part of .*'donor7': 0"):
        fit(make(), loss, 93, batch, **options, valid={"donor7": Rows(0, batch)})
    with pytest.raises(OptionError, match="frozen"):
        fit(make().requires_grad_(False), loss, 93, batch, **options)
    with pytest.raises(OptionError, match="valid_los.*train_loss"):
        fit(make(), loss, 93, batch, **options, stop="valid_los")


def test_a_step_with_an_infinite_loss_or_gradient_is_not_taken():
    not_a_number = lambda model, batch: (model(batch["x"]).sum() * float("nan"), 1)  # noqa: E731
    steep = lambda model, batch: ((model(batch["x"]) * 0).abs().sqrt().sum(), 1)  # noqa: E731
    for broken, words in ((not_a_number, "loss became nan"), (steep, r"loss became 0 \(gradient nan\)")):
        model = make()
        before = weights(model)
        with pytest.raises(DivergedError, match=words + r".* at step 0; lower learning_rate"):
            fit(model, broken, 93, batch, **options)
        assert all(torch.equal(before[name], value) for name, value in weights(model).items())


def test_bfloat16_learns_as_well():
    full = fit(make(), loss, 93, batch, **options).epochs.train_loss.iloc[-1]
    half = fit(make(), loss, 93, batch, **options, dtype="bfloat16").epochs.train_loss.iloc[-1]
    assert half == pytest.approx(full, rel=0.1)


def test_the_schedule_rises_then_falls():
    recipe = Recipe(learning_rate=1.0, warmup=0.25, schedule="cosine")
    rates = [recipe.rate(step, 40) for step in range(40)]
    assert np.argmax(rates) in (9, 10) and rates[0] == 0.1 and 0 < rates[-1] < 0.01


def parts_loss(model, batch):
    "Two parts of unlike kinds and unlike numbers of terms."
    logits, chosen = model(batch["x"]), batch["y"] != 2
    first = torch.nn.functional.cross_entropy(logits[chosen], batch["y"][chosen], reduction="sum")
    return torch.stack([first, (logits**2).sum()]), torch.stack([chosen.sum(), torch.tensor(logits.numel())])


def test_the_means_of_a_losss_parts_are_added_up():
    model, later = make(0.0), Rows(13, lambda rows, epoch: batch(rows + 80, epoch))
    history = fit(model, parts_loss, 80, batch, valid={"later": later}, **options)
    with torch.no_grad():
        whole = batch(np.arange(80, 93), 0)
        logits, chosen = model(whole["x"]), whole["y"] != 2
        mean = torch.nn.functional.cross_entropy(logits[chosen], whole["y"][chosen]) + (logits**2).mean()
    assert history.epochs.later_loss.iloc[-1] == pytest.approx(mean.item(), rel=1e-5)
    assert history.epochs.train_loss.iloc[-1] < history.epochs.train_loss.iloc[0]
    first, by_hand = make(0.0), make(0.0)
    step = fit(first, parts_loss, 8, batch, **{**options, "steps": 1, "batch_size": 8}).steps.iloc[0]
    totals, counts = parts_loss(by_hand, batch(np.arange(8), 0))
    (totals / counts).sum().backward()
    norm = torch.stack([p.grad.norm() for p in by_hand.parameters()]).norm()
    assert step.gradient_norm == pytest.approx(norm.item(), rel=1e-5)
    assert step.loss == pytest.approx((totals / counts).sum().item(), rel=1e-5)


def test_the_rate_decays_after_each_epoch_as_steplr_does():
    recipe = Recipe(learning_rate=0.5, warmup=0, schedule="constant", decay=0.9)
    weight = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.Adam([weight], lr=0.5)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.9)
    for epoch in range(4):
        assert math.isclose(recipe.rate(7, 40, epoch), optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()


def test_a_batch_in_parts_teaches_the_same():
    x, y = torch.arange(12.0).reshape(6, 2) / 6, torch.arange(6.0)

    def batch(rows, epoch):
        return x[rows], y[rows]

    def loss(model, batch):
        return ((model(batch[0]).squeeze(1) - batch[1]) ** 2).sum(), len(batch[1])

    weights = []
    for parts in (1, 4, 100):
        torch.manual_seed(0)
        model = torch.nn.Linear(2, 1)
        history = fit(model, loss, 6, batch, epochs=2, batch_size=6, accumulate=parts, shuffle=False, device="cpu")
        weights.append((model.weight.detach().clone(), history.steps["loss"].tolist()))
    for weight, losses in weights[1:]:
        torch.testing.assert_close(weight, weights[0][0])
        np.testing.assert_allclose(losses, weights[0][1], rtol=1e-5)
    with pytest.raises(OptionError, match="loss of one part"):
        two = lambda model, batch: (torch.stack([model(batch[0]).sum()] * 2), torch.ones(2))  # noqa: E731
        fit(torch.nn.Linear(2, 1), two, 6, batch, accumulate=2, device="cpu")


def test_without_shuffling_rows_come_in_their_order():
    assert [group.tolist() for group in batches(5, 2, epoch=3, shuffle=False)] == [[0, 1], [2, 3], [4]]
