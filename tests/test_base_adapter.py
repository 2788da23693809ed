"""Section 8: training goes on from an adapter that is there already."""

import json
import shutil

import datasets
import peft
import pytest
import torch
from safetensors.torch import load_file
from tiny import one_thread, tiny_base, tiny_nf4, tiny_tuned  # noqa: F401

from finetune.base_adapter import (
    adapter_folder,
    as_in_base_adapter,
    before_training,
    held_out_before,
    is_untrained,
    load_base_adapter,
    record_held_out,
)
from finetune.base_model import mend_cpu_gradients
from finetune.data import split_rows
from finetune.identity import fingerprint, require_as_planned
from qlora_helpers import UserError


@pytest.fixture(scope="module")
def base(tmp_path_factory, mistral_tokenizer):
    return tiny_base(tmp_path_factory.mktemp("base"), mistral_tokenizer)


def saved(base, folder, **lora):
    """A trained adapter of a rank and layers that are not the notebook's."""
    shape = {"r": 3, "lora_alpha": 5, "target_modules": ["v_proj", "down_proj"]}
    model = tiny_tuned(base, 1, **shape | lora)
    model.save_pretrained(folder)
    return model


def fresh(base, cfg):
    """The base in 4 bits with an untrained adapter, as section 8 makes it."""
    shape = {"r": cfg.lora_r, "lora_alpha": cfg.lora_alpha, "use_dora": cfg.use_dora}
    lora = peft.LoraConfig(
        task_type="CAUSAL_LM", target_modules=cfg.target_modules, use_rslora=cfg.use_rslora, **shape
    )
    return peft.get_peft_model(plain(base), lora)


def plain(base):
    """The base in 4 bits, as section 7 makes it."""
    model = tiny_nf4(base)
    mend_cpu_gradients(model)
    return model.eval()


def logits(model):
    with torch.no_grad():
        return model(torch.tensor([[1, 5, 9, 11]])).logits


@pytest.mark.parametrize("more", [{}, {"use_dora": True}, {"use_rslora": True}])
def test_training_begins_as_the_adapter_was_with_its_rank_and_layers(
    base, settings, tmp_path, capsys, more
):
    theirs = saved(base, tmp_path / "adapter", **more)
    cfg = settings(base_model=base, base_adapter=str(tmp_path / "adapter"), lora_dropout=0.25)
    found = as_in_base_adapter(cfg)
    assert (found.lora_r, found.lora_alpha, found.lora_dropout) == (3, 5, 0.25)
    assert found.target_modules == ["down_proj", "v_proj"]
    assert (found.use_dora, found.use_rslora) == tuple(
        n in more for n in ("use_dora", "use_rslora")
    )
    shown = capsys.readouterr().out
    assert "with its lora_r = 3, lora_alpha = 5" in shown and "!" not in shown
    model = fresh(base, found)
    load_base_adapter(model, found)
    assert torch.equal(logits(model), logits(theirs))
    assert is_untrained(model, found)
    end = next(w for n, w in model.named_parameters() if "lora_B" in n)
    end.data[0, 0] += 0.5
    assert not is_untrained(model, found)
    changed = logits(model)
    with before_training(model, found):
        assert torch.equal(logits(model), logits(theirs))
    assert torch.equal(logits(model), changed) and not torch.equal(changed, logits(theirs))


def test_without_a_base_adapter_nothing_changes(base, settings, capsys):
    cfg = settings(base_model=base)
    assert as_in_base_adapter(cfg) is cfg and adapter_folder(cfg) is None
    model = fresh(base, cfg)
    load_base_adapter(model, cfg)
    assert is_untrained(model, cfg) and capsys.readouterr().out == ""
    next(w for n, w in model.named_parameters() if "lora_B" in n).data += 0.5
    with before_training(model, cfg):
        assert torch.equal(logits(model), logits(plain(base)))


def edit(folder, **values):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"modules_to_save": ["lm_head"]}, "uses modules_to_save, which"),
        ({"init_lora_weights": "pissa"}, "uses init_lora_weights, which"),
        (
            {"rank_pattern": {"v_proj": 8}, "bias": "all"},
            "uses rank_pattern, bias, which|bias, rank",
        ),
        ({"peft_type": "IA3"}, "is no LoRA"),
    ],
)
def test_an_adapter_of_another_kind_is_refused_by_what_it_uses(
    base, settings, tmp_path, change, words
):
    saved(base, tmp_path / "adapter")
    edit(tmp_path / "adapter", **change)
    with pytest.raises(UserError, match=words):
        as_in_base_adapter(settings(base_model=base, base_adapter=str(tmp_path / "adapter")))


def test_what_is_no_adapter_or_does_not_fit_is_told(base, settings, tmp_path, mistral_tokenizer):
    for name in ("./nothing", str(tmp_path)):
        with pytest.raises(UserError, match=r"has no adapter_config.json and no adapter_model"):
            adapter_folder(settings(base_adapter=name))
    saved(base, tmp_path / "adapter")
    wider = tiny_base(tmp_path / "wider", mistral_tokenizer, intermediate_size=192)
    cfg = settings(base_model=wider, base_adapter=str(tmp_path / "adapter"))
    cfg = as_in_base_adapter(cfg)
    with pytest.raises(UserError, match="does not fit this base model: 2 of its 8 matrices"):
        load_base_adapter(fresh(wider, cfg), cfg)
    saved(tiny_base(tmp_path / "deeper", mistral_tokenizer, num_hidden_layers=3), tmp_path / "deep")
    cfg = as_in_base_adapter(settings(base_model=base, base_adapter=str(tmp_path / "deep")))
    with pytest.raises(UserError, match="does not fit this base model: 4 of its 12 matrices"):
        load_base_adapter(fresh(base, cfg), cfg)


@pytest.mark.parametrize(
    ("name", "is_other"), [("mistralai/Another-7B", True), ("mistralai/Mistral-7B", False)]
)
def test_another_base_models_name_is_told(base, settings, tmp_path, capsys, name, is_other):
    saved(base, tmp_path / "adapter")
    edit(tmp_path / "adapter", base_model_name_or_path=name)
    own = {"base_adapter": str(tmp_path / "adapter"), "base_model": "mistralai/Mistral-7B"}
    as_in_base_adapter(settings(**own))
    told = "! It was trained on Another-7B, and base_model is" in (out := capsys.readouterr().out)
    assert told == ("!" in out) == is_other


def test_a_run_from_other_adapter_weights_is_another(base, settings, tmp_path):
    from test_checkpoints import trainer_of

    saved(base, tmp_path / "adapter")
    cfg = settings(base_model=base, base_adapter=str(tmp_path / "adapter"))
    mark = fingerprint(cfg, trainer_of())
    assert fingerprint(cfg, trainer_of()) == mark
    shutil.rmtree(tmp_path / "adapter")
    tiny_tuned(base, 2, r=3, target_modules=["v_proj", "down_proj"]).save_pretrained(
        tmp_path / "adapter"
    )
    assert fingerprint(cfg, trainer_of()) != mark
    assert fingerprint(settings(base_model=base), trainer_of())["adapter_weights"] is None


def rows_of(numbers):
    prompts = [f"{n} and {n}" for n in numbers]
    where = [f"rows.jsonl:{n}" for n in numbers]
    return datasets.Dataset.from_dict(
        {"prompt": prompts, "completion": [str(2 * n) for n in numbers], "where": where}
    )


@pytest.mark.parametrize("by", ["base_adapter", "resume"])
def test_what_was_held_out_once_stays_so_whatever_is_added(base, settings, tmp_path, by):
    first = settings(output_dir=str(tmp_path), run_name="first")
    _, held = split_rows(rows_of(range(60)), 0.3)
    record_held_out(held, first)
    text = (first.run_dir / "held_out.json").read_text()
    assert "and" not in text and len(json.loads(text)) == len(held)
    saved(base, first.final_model)
    shutil.copy(first.run_dir / "held_out.json", first.final_model)
    changes = {"base_adapter": str(first.final_model)} if by == "base_adapter" else {}
    second = first.model_copy(update=changes or {"resume": "anyway"})
    if changes:
        second = second.model_copy(update={"run_name": "second"})
    train, later = split_rows(rows_of(range(200)), 0.01, held_out_before(second))
    assert set(held["prompt"]) <= set(later["prompt"])
    assert not set(held["prompt"]) & set(train["prompt"]) and len(train) > 100
    assert not held_out_before(first)  # a run of its own
    with pytest.raises(UserError, match="all of these were held out by the run that this one"):
        split_rows(held, 0.01, held_out_before(second))


def test_rows_that_were_held_out_one_by_one_are_so_again(settings, tmp_path, capsys):
    """Of 1,000 rows that ask the same some are held out: the others stay to be trained on."""
    same = [{"prompt": "Say it", "completion": f"{n}"} for n in range(1000)]
    rows = datasets.Dataset.from_list([*same, *rows_of(range(50))])
    train, held = split_rows(rows, 0.1)
    cfg = settings(output_dir=str(tmp_path), resume="anyway")
    record_held_out(held, cfg, train)
    again, later = split_rows(rows, 0.1, held_out_before(cfg))
    assert later["completion"] == held["completion"] and len(again) == len(train) > 900
    assert capsys.readouterr().out.count("1,000 rows ask the same") == 2


def test_an_adapter_comes_from_the_hub_by_its_id(base, settings, tmp_path, monkeypatch):
    import huggingface_hub.constants
    from hub import Hub, take_for_the_hub

    saved(base, tmp_path / "adapter")
    (tmp_path / "adapter" / "held_out.json").write_text('["abc"]')
    with Hub() as server:
        take_for_the_hub(server, monkeypatch)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        server.repos["ada/adapter"] = {"private": True}
        server.files["ada/adapter"] = {
            path.name: path.read_bytes() for path in (tmp_path / "adapter").iterdir()
        } | {"training_args.bin": b"a pickle"}
        cfg = settings(base_model=base, base_adapter="ada/adapter")
        folder = adapter_folder(cfg)
        mine = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
        theirs = load_file(folder / "adapter_model.safetensors")
        assert mine.keys() == theirs.keys() and all(torch.equal(mine[n], theirs[n]) for n in mine)
        assert not (folder / "training_args.bin").exists()
        assert held_out_before(cfg) == {"abc"}
        with pytest.raises(UserError, match="is no folder here, and cannot be had from the Hub"):
            adapter_folder(settings(base_adapter="ada/none"))


def test_a_finished_runs_own_folder_stands_for_the_adapter_in_it(settings, tmp_path, base):
    saved(base, tmp_path / "first" / "final_model")
    run, adapter = (
        settings(base_adapter=str(folder), output_dir=str(tmp_path), run_name="second")
        for folder in (tmp_path / "first", tmp_path / "first" / "final_model")
    )
    assert adapter_folder(run) == adapter_folder(adapter) == tmp_path / "first" / "final_model"
    (tmp_path / "first" / "final_model" / "adapter_config.json").unlink()
    with pytest.raises(UserError, match=r"no adapter_config\.json\. It must be a finished run"):
        adapter_folder(run)


@pytest.mark.parametrize("part", [".", "final_model", "checkpoints-before/checkpoint-2"])
def test_an_adapter_that_this_very_run_would_replace_is_refused(settings, tmp_path, base, part):
    """It would answer "before" as it answers after, once it is saved."""
    folder = tmp_path / "mine" / part
    saved(base, folder / "final_model" if part == "." else folder)
    cfg = settings(base_adapter=str(folder), output_dir=str(tmp_path), run_name="mine")
    with pytest.raises(UserError, match=r"this very run.*: choose a new run_name"):
        adapter_folder(cfg)


def test_an_adapter_on_the_same_layers_leaves_the_settings_as_section_2_has_them(
    settings, tmp_path, base, capsys
):
    """Else section 2, run again to push or to merge, would count as another run's."""
    given = {"base_model": base, "base_adapter": str(tmp_path / "adapter")}
    mine = settings(**given, lora_r=3, lora_alpha=5)
    saved(base, tmp_path / "adapter", target_modules=mine.target_modules)
    assert as_in_base_adapter(mine) == mine
    assert capsys.readouterr().out == f"Training goes on from {tmp_path / 'adapter'}\n"


def test_section_2_run_again_goes_on_with_what_the_adapter_brought(settings, tmp_path, base):
    """To push or to merge: its own values of what an adapter brings count for nothing."""
    saved(base, tmp_path / "adapter")
    again = settings(base_model=base, base_adapter=str(tmp_path / "adapter"))
    planned = as_in_base_adapter(again)
    assert planned != again and require_as_planned(again, planned) == planned
    later = again.model_copy(update={"merge": True})
    assert require_as_planned(later, planned) == planned.model_copy(update={"merge": True})
    other = again.model_copy(update={"base_adapter": ""})
    with pytest.raises(UserError, match=r"(?s)• base_adapter was .* is ''.*• lora_r was 3"):
        require_as_planned(other, planned)
