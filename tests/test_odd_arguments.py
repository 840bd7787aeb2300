"""Whatever stands in the place of an argument: one of our errors or a result; never one of Python's, never a hang."""

import numpy as np
import odd_arguments
import pytest


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return odd_arguments.World(tmp_path_factory.mktemp("world"))


DOORS = odd_arguments.NAMES


def found(world, door: str, share: float) -> list[str]:
    "What came of a share of the trials of one door, where it was not fine."
    said = odd_arguments.outcome(world, door, None, None)
    assert said == "content", f"{door} with its arguments as they should be: {said}"
    trials = odd_arguments.trials(world, door)
    rng = np.random.default_rng(sum(door.encode()))
    some = [one for one in trials if rng.random() < share]
    told = {one: odd_arguments.outcome(world, *one) for one in some}
    return [f"{name}={odd}: {said}" for (_, name, odd), said in told.items() if not odd_arguments.is_fine(said)]


@pytest.mark.parametrize("door", DOORS)
def test_an_odd_argument_is_named_or_taken(world, door):
    assert found(world, door, 0.04) == []


@pytest.mark.slow
@pytest.mark.parametrize("door", DOORS)
def test_every_odd_argument_is_named_or_taken(world, door):
    assert found(world, door, 1) == []
