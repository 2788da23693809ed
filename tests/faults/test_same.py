"""The same training, whatever the plan, the processes, the interruptions: a few of `same.py`'s."""

import itertools

import pytest
from same import FIRST, Case, require_same, train

SOME = [
    Case(flat=True, rows=16, processes=1),
    Case(flat=False, rows=4, processes=1, kind="resumed under another plan"),
    # transformers 4.57 cannot load an optimizer in two processes without a GPU.
    pytest.param(Case(flat=True, rows=4, processes=2, kind="resumed"), marks=pytest.mark.slow),
]


@pytest.fixture(scope="module")
def wanted(tiny, tmp_path_factory):
    """One process, rows padded one by one, never interrupted."""
    found = train(FIRST, tiny, tmp_path_factory.mktemp("same") / "first")
    values = sorted(found.validation.values())
    assert all(high - low >= 1e-3 for low, high in itertools.pairwise(values))
    return found


@pytest.mark.parametrize("case", SOME, ids=str)
def test_training_is_the_same(tiny, tmp_path, wanted, case):
    require_same(train(case, tiny, tmp_path / "run"), wanted)
