"""What makes two runs the same: base weights, releases, how a run began."""

import json
import os
import re

import pytest
import torch
from safetensors.torch import save_file
from test_checkpoints import trainer_of, whole

from finetune import identity
from finetune.checkpoints import find_checkpoint
from finetune.identity import base_weights, fingerprint, hash_of_fingerprint, run_of, sampled_hash
from qlora_helpers import UserError


def test_a_local_base_with_other_weights_at_the_same_path_is_another(settings, tmp_path):
    base = tmp_path / "base"
    base.mkdir()
    weights = {"a": torch.zeros(50_000), "b": torch.zeros(20), "c": torch.zeros(5000)}
    save_file(weights, base / "model.safetensors")
    cfg, marks = settings(base_model=str(base)), set()
    marks.add(base_weights(cfg))
    for name in weights:  # each in turn, at its end
        changed = {n: w.clone() for n, w in weights.items()}
        changed[name][-1] = 1.0
        save_file(changed, base / "model.safetensors")
        os.utime(base / "model.safetensors", (1e9, 1e9 + len(marks)))
        marks.add(base_weights(cfg))
    save_file({"d": torch.zeros(3)}, base / "model-2.safetensors")
    marks.add(base_weights(cfg))
    assert len(marks) == 5 and fingerprint(cfg, trainer_of())["base_weights"] in marks
    (base / "model-2.safetensors").unlink()
    save_file(weights, base / "model.safetensors")  # the first again, at another time and place
    os.utime(base / "model.safetensors", (2e9, 2e9))
    moved = base.rename(tmp_path / "moved")
    assert base_weights(settings(base_model=str(moved))) in marks
    assert base_weights(settings(base_model="embedded")) is None


def test_of_large_files_parts_from_end_to_end_are_looked_at(tmp_path):
    file = tmp_path / "model.safetensors"
    file.write_bytes(bytes(256 * 2**14 * 3))
    size = file.stat().st_size
    before = sampled_hash(((file, size, 0),))
    assert sampled_hash(((file, size, 1),)) == before
    data = bytearray(size)
    seen = 0
    for place in (0, size // 2 - 2**15, size - 1):
        changed = bytearray(data)
        changed[place : place + 2**17] = b"x" * len(changed[place : place + 2**17])
        file.write_bytes(changed)
        seen += sampled_hash(((file, len(changed), place + 2),)) != before
    assert seen == 3


def test_the_order_of_the_layers_makes_no_other_run(begun):
    trainer = trainer_of()
    mark = fingerprint(begun, trainer)
    mark["target_modules"] = sorted(mark["target_modules"])
    assert mark != fingerprint(begun, trainer)
    whole(begun.final_model, "adapter", fingerprint=mark)
    assert find_checkpoint(begun, trainer) == str(begun.final_model)


OLDER = ["base_adapter", "adapter_weights", "encoder", "split", "base_weights"]


@pytest.mark.parametrize("gone", [[], OLDER, ["base_adapter"]])
def test_what_an_earlier_release_began_or_finished_is_this_releases_too(begun, gone):
    trainer = trainer_of()
    mark = fingerprint(begun, trainer)
    older = {name: value for name, value in mark.items() if name not in gone}
    here = whole(begun.run_dir / "checkpoint-10", "checkpoint", fingerprint=older)
    assert find_checkpoint(begun, trainer) == str(here)
    assert trainer.run == hash_of_fingerprint(older)
    whole(begun.final_model, "adapter", fingerprint=older)
    assert find_checkpoint(begun, trainer) == str(begun.final_model)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("encoder", "how rows become tokens (encoder 2, now 9)"),
        ("split", "how rows are held out (split 2, now 9)"),
    ],
)
@pytest.mark.parametrize("checkpoint", [True, False])
def test_a_run_that_another_release_finished_is_not_started_over(
    begun,
    monkeypatch,
    name,
    words,
    checkpoint,
):
    mark = fingerprint(begun, trainer_of())
    if checkpoint:
        whole(begun.run_dir / "checkpoint-10", "checkpoint", fingerprint=mark)
    whole(begun.final_model, "adapter", fingerprint=mark)
    monkeypatch.setattr(identity, name.upper(), 9)
    other = trainer_of([{"input_ids": [1, 2], "labels": [1, 2]}])  # rows are written otherwise
    with pytest.raises(UserError, match=re.escape(words)) as told:
        find_checkpoint(begun, other)
    assert "It is not trained again. Choose a new run_name" in str(told.value)
    assert find_checkpoint(begun.model_copy(update={"resume": "never"}), other) is None


def test_a_run_of_the_first_release_is_known_by_how_it_wrote_rows(begun):
    """Which its fingerprint does not say; the same tokens are the same in any release."""
    mark = fingerprint(begun, trainer_of())
    first = {name: value for name, value in mark.items() if name not in OLDER}
    whole(begun.final_model, "adapter", fingerprint=first)
    other = trainer_of([{"input_ids": [1, 2], "labels": [1, 2]}])
    with pytest.raises(UserError, match=r"rows become tokens \(encoder 1, now \d\)"):
        find_checkpoint(begun, other)


def test_a_setting_that_a_release_adds_or_drops_starts_no_finished_run_over(begun):
    mark = fingerprint(begun, trainer_of())
    for other in (mark | {"older_setting": 1}, {n: v for n, v in mark.items() if n != "seed"}):
        folder = whole(begun.final_model, "adapter", fingerprint=other)
        with pytest.raises(UserError, match=r"the setting (older_setting|seed)"):
            find_checkpoint(begun, trainer_of())
        folder.rename(folder.with_name(f"was-{len(other)}"))


def test_a_run_is_named_by_its_beginning():
    assert run_of({"run": "a1", "fingerprint": {"seed": 1}}) == "a1"
    one, other = ({"fingerprint": {"seed": n, "epochs": 3}} for n in (1, 2))
    assert run_of(one) != run_of(other)
    turned = {"fingerprint": dict(reversed(one["fingerprint"].items()))}
    assert run_of(one) == run_of(json.loads(json.dumps(turned)))


@pytest.mark.parametrize(
    ("was", "now", "longer"),
    [
        ((5, -1), (5, 10), True),  # ten steps may be more than five epochs
        ((1, 100), (3, 50), False),
        ((5, 10), (5, -1), True),
        ((5, 10), (5, 11), True),
        ((5, 11), (5, 10), False),
        ((5, -1), (6, -1), True),
        ((5, -1), (5, -1), False),
    ],
)
def test_a_run_is_longer_by_its_steps_or_else_by_its_epochs(was, now, longer):
    was, now = ({"epochs": epochs, "max_steps": steps, "seed": 1} for epochs, steps in (was, now))
    assert identity.trains_on(was, now) == longer
    assert not identity.trains_on(was, now | {"seed": 2})
