"""A sentence that the base cannot know: learned, saved, loaded again and merged, it is there."""

import pytest
import transformers
from gpu.canary import FACTS, sing

from finetune.batches import Cut

LAYOUTS = [Cut(2, False, "sdpa"), Cut(2, True, "sdpa", recomputed_layers=4)]


@pytest.mark.slow
def test_what_no_model_knows_is_learned_in_each_layout_and_survives(
    smollm_path, smollm_tokenizer, tmp_path
):
    """By the first layers of the embedded model, which learn by heart as well, and sooner."""
    load = transformers.AutoModelForCausalLM.from_pretrained
    load(smollm_path, dtype="bfloat16", num_hidden_layers=8).save_pretrained(tmp_path / "base")
    smollm_tokenizer.save_pretrained(tmp_path / "base")
    facts = dict(list(FACTS.items())[:2])
    wanted = {"base": 0, "trained": 2, "loaded again": 2, "merged": 2}
    assert sing(str(tmp_path / "base"), LAYOUTS, tmp_path, facts, steps=40) == [wanted] * 2
