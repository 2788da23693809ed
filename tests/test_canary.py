"""A sentence that the base cannot know: learned, saved, loaded again and merged, it is there."""

import pytest
from gpu.canary import FACTS, sing

from finetune.batches import Cut

LAYOUTS = [Cut(2, False, "sdpa"), Cut(2, True, "sdpa", recomputed_layers=15)]


@pytest.mark.slow
def test_what_no_model_knows_is_learned_in_each_layout_and_survives(smollm_path, tmp_path):
    wanted = {"base": 0, "trained": 2, "loaded again": 2, "merged": 2}
    assert sing(smollm_path, LAYOUTS, tmp_path, dict(list(FACTS.items())[:2])) == [wanted] * 2
