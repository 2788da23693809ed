"""A sentence that the base cannot know: learned, saved, loaded again and merged, it is there."""

import pytest
from gpu.canary import ROWS, sing

from finetune.batches import Cut

LAYOUTS = [Cut(2, False, "sdpa"), Cut(4, True, "sdpa", recomputed_layers=15)]


@pytest.mark.slow
def test_what_no_model_knows_is_learned_in_each_layout_and_survives(smollm_path, tmp_path):
    wanted = {"base": 0, "trained": 4, "loaded again": 4, "merged": 4}
    assert len(ROWS) == 4
    assert sing(smollm_path, LAYOUTS, tmp_path) == [wanted] * 2
