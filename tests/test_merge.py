"""Section 15: adapter and base become one model, which is checked, and which both transformers
majors load.
"""

import json
import subprocess

import pytest
import torch
import transformers
from architectures import random_model
from computing import in_nf4, with_lora
from safetensors import safe_open
from tiny import one_thread, pythons, tiny_base, tiny_nf4, tiny_tuned  # noqa: F401  `one_thread` works by being here

from finetune.answers import trained_logits
from finetune.base_model import renamed, require_exportable, write_config
from finetune.files import read_seal, seal
from finetune.merge import merge_adapter, merged_weights, write_shards
from finetune.save import write_for_others
from finetune.tokens import encode_prompt, encode_rows
from qlora_helpers import Settings, UserError

ROWS = [
    {"prompt": f"Say the number {i}", "completion": f"It is {i}, " * (1 + i % 4)} for i in range(4)
]


@pytest.fixture(scope="module")
def base(tmp_path_factory, mistral_tokenizer):
    return tiny_base(tmp_path_factory.mktemp("base"), mistral_tokenizer)


@pytest.fixture
def cfg(settings, base, tmp_path):
    """Settings whose run has a finished adapter's folder."""
    cfg = settings(
        base_model=base,
        output_dir=str(tmp_path),
        merged_dir=str(tmp_path / "merged"),
        max_new_tokens=4,
    )
    cfg.final_model.mkdir(parents=True)
    (cfg.final_model / "run.json").write_text("{}")
    return cfg


def logits(model, tokenizer):
    examples = encode_rows(ROWS, tokenizer, 512)
    return torch.cat([each for each, _ in trained_logits(model, examples)])


@pytest.mark.parametrize(
    ("lora", "model"),
    [
        ({}, {}),
        ({"use_rslora": True, "target_modules": "all-linear"}, {}),
        ({"use_dora": True}, {}),
        ({}, {"tie_word_embeddings": True}),
    ],
)
def test_the_merge_is_the_adapter_on_the_4_bit_base(
    cfg, tmp_path, mistral_tokenizer, base, lora, model, capsys
):
    where = tiny_base(tmp_path / "tied", mistral_tokenizer, **model) if model else base
    tuned = tiny_tuned(where, **lora)
    folder = merge_adapter(cfg, tuned, mistral_tokenizer, ROWS, "card")
    assert folder == tmp_path / "merged" and "same answer 4 of 4" in capsys.readouterr().out
    merged = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    assert torch.allclose(
        logits(merged, mistral_tokenizer), logits(tuned, mistral_tokenizer), atol=1e-3
    )
    names = {path.name for path in folder.iterdir()}
    assert {
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "README.md",
        "run.json",
    } <= names
    assert not [name for name in names if name.endswith((".bin", ".part", ".pt"))]
    assert len([name for name in names if name.endswith(".safetensors")]) == 1  # it is small


def test_a_merge_has_every_weight_of_its_base_under_the_names_of_the_base():
    """Qwen 2 has biases beside the weights that are adapted."""
    plain = random_model("Qwen2")
    with torch.no_grad():
        for name, parameter in plain.named_parameters():
            if name.endswith("bias"):
                parameter.normal_()
    found = dict(merged_weights(with_lora(in_nf4(plain))))
    assert found.keys() == dict(plain.named_parameters()).keys()
    name = "model.layers.1.self_attn.q_proj.bias"
    assert torch.equal(found[name], plain.get_parameter(name))
    assert all(found[n].shape == p.shape for n, p in plain.named_parameters())


def test_a_merge_is_written_in_the_type_that_the_model_computes_in(cfg, mistral_tokenizer):
    sizes = {"vocab_size": len(mistral_tokenizer), "max_position_embeddings": 512}
    tuned = with_lora(in_nf4(random_model("Llama", **sizes), torch.bfloat16), r=4).eval()
    folder = merge_adapter(cfg, tuned, mistral_tokenizer, ROWS, "card")
    with safe_open(next(folder.glob("*.safetensors")), "pt") as file:
        assert {file.get_tensor(name).dtype for name in file.keys()} == {torch.bfloat16}  # noqa: SIM118
    assert json.loads((folder / "config.json").read_text())["torch_dtype"] == "bfloat16"


WRONG = {
    "base": lambda base, other, _: tiny_tuned(other),
    "adapter": lambda base, other, _: tiny_tuned(base, seed=1),
    "half of alpha": lambda base, other, _: halved(tiny_tuned(base)),
    "no adapter": lambda base, other, _: halved(tiny_tuned(base), 0),
    "the last row alone": lambda base, _, words: with_another_three(tiny_tuned(base), words),
}


def halved(model, factor=0.5):
    for module in model.modules():
        if isinstance(getattr(module, "scaling", None), dict):
            module.scaling["default"] *= factor
    return model


def with_another_three(model, tokenizer):
    """The token that comes in no row but the last has another embedding."""
    ids = [set(row["input_ids"]) for row in encode_rows(ROWS, tokenizer, 512)]
    (three,) = ids[3] - ids[0] - ids[1] - ids[2]
    with torch.no_grad():
        weight = model.get_input_embeddings().weight
        weight[three] = -weight[three]
    return model


@pytest.mark.parametrize("wrong", WRONG)
def test_a_merge_of_the_wrong_thing_is_rejected_and_deleted(
    cfg, base, tmp_path, mistral_tokenizer, wrong, monkeypatch
):
    other = tiny_base(tmp_path / "other", mistral_tokenizer, seed=1) if wrong == "base" else ""
    torch.manual_seed(0)  # of the two adapters, too, nothing else differs
    source = WRONG[wrong](base, other, mistral_tokenizer)
    torch.manual_seed(0)
    tuned = tiny_tuned(base)
    monkeypatch.setattr("finetune.merge.merged_weights", lambda *_: merged_weights(source))
    earlier = tmp_path / "merged" / "config.json"
    earlier.parent.mkdir()
    for path in (earlier, earlier.with_name("model.safetensors")):
        path.write_text("{}")
    seal(earlier.parent, "merged", cfg.run_name)
    with pytest.raises(UserError, match="is not what was trained"):
        merge_adapter(cfg, tuned, mistral_tokenizer, ROWS, "card")
    assert [path.name for path in tmp_path.glob("merged*")] == ["merged"] and earlier.exists()


@pytest.mark.parametrize(
    ("factor", "good"), [(0.85, True), (0.75, False), (1.15, True), (1.25, False)]
)
def test_a_merge_may_be_a_fifth_off_and_no_more(
    cfg, base, mistral_tokenizer, factor, good, monkeypatch
):
    monkeypatch.setattr("finetune.merge.MERGE_NOISE", 0.0)  # what 16 bits would allow besides
    torch.manual_seed(0)
    source = halved(tiny_tuned(base), factor)
    torch.manual_seed(0)
    tuned = tiny_tuned(base)
    monkeypatch.setattr("finetune.merge.merged_weights", lambda *_: merged_weights(source))
    if good:
        assert merge_adapter(cfg, tuned, mistral_tokenizer, ROWS, "card").exists()
        return
    with pytest.raises(UserError, match="is not what was trained"):
        merge_adapter(cfg, tuned, mistral_tokenizer, ROWS, "card")


def test_a_merged_model_answers_with_a_cache_though_its_base_had_none(cfg, base, mistral_tokenizer):
    tuned = tiny_tuned(base)
    tuned.config.use_cache = False
    folder = merge_adapter(cfg, tuned, mistral_tokenizer, ROWS, "card")
    saved = json.loads((folder / "config.json").read_text())
    assert saved["use_cache"] is True and "quantization_config" not in saved
    assert tuned.config.use_cache is False
    assert saved["dtype"] == saved["torch_dtype"] == "float32"  # for newer readers and for older
    generation = json.loads((folder / "generation_config.json").read_text())
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}
    assert ids.items() <= generation.items() and generation.get("do_sample", False) is False
    assert "repetition_penalty" not in generation
    assert (folder / "README.md").read_text() == "card"
    assert set(read_seal(folder)["files"]) == {
        path.name for path in folder.iterdir() if path.name != "checksums.json"
    }
    assert read_seal(folder)["run"] == cfg.run_name


def test_a_merge_that_dies_leaves_nothing_half_made(
    cfg, base, tmp_path, mistral_tokenizer, monkeypatch
):
    def full(*_):
        raise OSError("No space left on device")

    monkeypatch.setattr("finetune.merge.write_config", full)
    with pytest.raises(UserError, match=r"The disk is full: .*merged .*The adapter is safe: "):
        merge_adapter(cfg, tiny_tuned(base), mistral_tokenizer, ROWS, "card")
    assert not list(tmp_path.glob("merged*"))


def test_shards_hold_every_weight_once_in_files_of_the_size_asked_for(tmp_path):
    weights = {f"w{i}": torch.full((10, 10), float(i)) for i in range(23)}
    write_shards(iter(weights.items()), tmp_path, torch.bfloat16, 400)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 23 * 200
    assert [p.name for p in sorted(tmp_path.glob("*.safetensors"))] == sorted(
        set(index["weight_map"].values())
    )
    assert len(set(index["weight_map"].values())) == 12
    for name, weight in weights.items():
        with safe_open(tmp_path / index["weight_map"][name], "pt") as file:
            assert torch.equal(file.get_tensor(name), weight.bfloat16())


LOADS = """
import json, sys, torch, transformers
ids = json.loads(sys.argv[1])
for folder in sys.argv[2:]:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    chat = [{"role": "user", "content": "Say the number 3"}]
    inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True)
    assert inputs["input_ids"] == ids and set(inputs) == {"input_ids", "attention_mask"}
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id == 2
    with torch.no_grad():
        print(json.dumps(model(torch.tensor([ids])).logits[0, -1, :8].tolist()))
"""


@pytest.mark.slow
def test_both_transformers_majors_load_it_alike(base, tmp_path, mistral_tokenizer):
    scaling = {
        "rope_type": "linear",
        "factor": 4.0,
    }  # as Llama 3's, the scaling must survive beside theta
    five = transformers.__version__ >= "5"
    key = {"rope_parameters": scaling | {"rope_theta": 1e6}} if five else {"rope_scaling": scaling}
    ids = encode_prompt(mistral_tokenizer, "Say the number 3")
    folders, expected = [], []
    for where in (base, tiny_base(tmp_path / "scaled", mistral_tokenizer, **key)):
        tuned, folder = tiny_tuned(where), tmp_path / f"merged_{len(folders)}"
        folder.mkdir()
        write_shards(merged_weights(tuned), folder, torch.float32, 2**30)
        write_config(tuned, folder, torch.float32)
        write_for_others(folder, mistral_tokenizer)
        config = json.loads((folder / "config.json").read_text())
        assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == 1e6
        with torch.no_grad():
            expected.append(tuned(torch.tensor([ids])).logits[0, -1, :8])
        folders.append(str(folder))
    assert not torch.allclose(*expected, atol=0.1)
    for python in pythons():
        command = [python, "-c", LOADS, json.dumps(ids), *folders]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr[-2000:]
        found = torch.tensor([json.loads(line) for line in done.stdout.splitlines()])
        assert found.allclose(torch.stack(expected), atol=1e-3), python


def in_4_bits(plain, folder):
    """The folder of a base model, and the model as section 7 loads it."""
    plain.save_pretrained(folder)
    nf4 = transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    load = transformers.AutoModelForCausalLM.from_pretrained
    return str(folder), load(folder, quantization_config=nf4, device_map={"": "cpu"})


@pytest.mark.parametrize("wanted", [{"merge": True}, {"export": ["base"]}])
def test_a_merge_that_would_have_other_names_than_its_base_is_refused_by_name(
    settings, tmp_path, wanted
):
    """transformers 5 fuses a Mixtral's experts on loading; elsewhere they would be random."""
    base, model = in_4_bits(random_model("Mixtral"), tmp_path / "mixtral")
    if not renamed(settings(base_model=base), model):
        pytest.skip("this transformers holds experts as the files do")
    with pytest.raises(UserError, match=r"model\.layers\.0\.\S+ under another name than the base"):
        require_exportable(settings(base_model=base, **wanted), model)
    require_exportable(settings(base_model=base), model)


@pytest.mark.parametrize("architecture", ["Llama", "Gemma2", "Qwen2"])
def test_other_models_have_the_names_of_their_files(settings, tmp_path, architecture):
    base, model = in_4_bits(random_model(architecture), tmp_path / "base")
    assert renamed(settings(base_model=base), model) == []
    require_exportable(settings(base_model=base, merge=True), model)


def test_a_head_that_is_one_matrix_with_the_embeddings_is_not_merged(settings, tmp_path):
    targets = {"target_modules": ["q_proj", "lm_head"], "merge": True}
    for tied in (True, False):
        plain = random_model("Llama", tie_word_embeddings=tied)
        base, model = in_4_bits(plain, tmp_path / str(tied))
        cfg = settings(base_model=base, **targets)
        if tied:
            with pytest.raises(UserError, match="lm_head, in target_modules, is one matrix"):
                require_exportable(cfg, model)
        else:
            require_exportable(cfg, model)


def test_a_base_that_came_in_4_bits_merges_under_the_plain_names(
    cfg, base, tmp_path, mistral_tokenizer
):
    four = tmp_path / "four"
    tiny_nf4(base).save_pretrained(four)
    mistral_tokenizer.save_pretrained(four)
    tuned, own = tiny_tuned(str(four)), {"base_model": str(four), "merge": True}
    require_exportable(Settings(**cfg.model_dump() | own), tiny_nf4(str(four)))
    folder = merge_adapter(cfg, tuned, mistral_tokenizer, ROWS, "card")
    told = json.loads((folder / "config.json").read_text())
    assert "quantization_config" not in told
    with (
        safe_open(next(folder.glob("*.safetensors")), "pt") as ours,
        safe_open(f"{base}/model.safetensors", "pt") as theirs,
    ):
        assert set(ours.keys()) == set(theirs.keys())
