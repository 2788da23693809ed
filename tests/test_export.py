"""Section 15: what servers take answers as the notebook does, asked of real llama.cpp."""

import contextlib
import json
import re
import shutil
import sys
import types
import zipfile
from pathlib import Path

import peft
import pytest
import torch
import transformers
from mistral import mistral_tokenizer as build_mistral
from safetensors import safe_open
from serve.serving import ask, blocks, gap, llama
from tiny import tiny_base, tiny_nf4, tiny_tuned

from finetune.answers import generate_answers
from finetune.base_model import mend_cpu_gradients
from finetune.card import model_card
from finetune.data import read_rows
from finetune.export import (
    convert,
    converters,
    export_base,
    export_gguf,
    require_convertible,
    take_with_you,
    write_page,
)
from finetune.merge import merge_adapter
from finetune.save import save_adapter
from finetune.scores import compare
from finetune.sixteen_bits import on_16_bits, why_not_measured
from finetune.template import usable
from finetune.tokens import encode_prompt
from qlora_helpers import Settings, UserError

ROOT = Path(__file__).parents[1]
RUN = {
    "results": {},
    "base_revision": None,
    "device": "a CPU",
    "versions": {"torch": torch.__version__},
    "fingerprint": {"training rows": "f00d"},
    "roles": ["user"],
}


def cell(cfg, **changes):
    return Settings(**cfg.model_dump() | changes)


def saved(cfg, model, tokenizer):
    """The adapter in its folder, as section 11 leaves it."""
    run = RUN | {"base_model": cfg.base_model, "settings": cfg.model_dump()}
    save_adapter(model, tokenizer, cfg.final_model, model_card(cfg, run), run)
    return run


@pytest.fixture(scope="module")
def smollm(tmp_path_factory, defaults, smollm_path):
    """The embedded model in NF4 with an adapter that changes what it says: settings and model."""
    root = tmp_path_factory.mktemp("export")
    cfg = Settings.from_cell(
        defaults
        | {
            "base_model": smollm_path,
            "data_files": str(ROOT / "data_examples" / "*.jsonl"),
            "output_dir": str(root / "outputs"),
            "merged_dir": str(root / "merged"),
            "model_cache": str(root / "cache"),
            "run_name": "shown",
            "max_new_tokens": 24,
            "merge": True,
            "export": ["base", "gguf"],
        }
    )
    lora = {"r": 8, "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"]}
    model = peft.get_peft_model(
        tiny_nf4(smollm_path), peft.LoraConfig(task_type="CAUSAL_LM", **lora)
    )
    mend_cpu_gradients(model)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.2, generator=generator)
    return cfg, model.eval()


@pytest.fixture(scope="module")
def table(smollm, smollm_tokenizer):
    """Twenty rows, answered by the model without and with its adapter."""
    cfg, model = smollm
    rows = list(read_rows(cfg).select(range(20)))
    after = generate_answers(model, smollm_tokenizer, rows, cfg.max_new_tokens)
    with model.disable_adapter():
        before = generate_answers(model, smollm_tokenizer, rows, cfg.max_new_tokens)
    return rows, compare(rows, before, after)


@pytest.fixture(scope="module")
def exported(smollm, smollm_tokenizer, table, fetched):
    cfg, model = smollm
    shutil.copytree(fetched, cfg.cache_dir / fetched.name)
    saved(cfg, model, smollm_tokenizer)
    merged = merge_adapter(cfg, model, smollm_tokenizer, table[0][:4], "card")
    base = export_base(cfg, model)
    return export_gguf(cfg, smollm_tokenizer, base, merged), base, merged


@pytest.mark.slow
@pytest.mark.parametrize("number", [0, 1], ids=["merged", "adapter on the dequantised base"])
def test_llama_cpp_answers_as_the_table_says(exported, smollm, table, number):
    """By the Python in the folder's own page, over HTTP."""
    pytest.importorskip("xllamacpp")
    (folder, *_), (cfg, model), (rows, answers) = exported, smollm, table
    tokenizer = transformers.AutoTokenizer.from_pretrained(cfg.final_model)
    with llama(folder / "README.md", number, 8431 + number) as url:
        for row, wanted in zip(rows, answers["after"], strict=True):
            chat = [{"role": "user", "content": row["prompt"]}]
            got = ask(url, chat, max_tokens=cfg.max_new_tokens)
            if got != wanted:
                apart = gap(model, tokenizer, row["prompt"], got, cfg.max_new_tokens)
                assert apart < 0.05, (wanted, got)
    changed = (answers["after"] != answers["before"]).sum()
    assert changed >= 10, "an adapter that changes little tells little"


@pytest.mark.slow
def test_the_dequantised_base_is_what_was_trained_against_and_the_16_bit_one_is_not(
    exported, smollm, smollm_path, smollm_tokenizer
):
    _, model = smollm
    ids = torch.tensor([encode_prompt(smollm_tokenizer, "What is the capital of France?")])
    load = transformers.AutoModelForCausalLM.from_pretrained
    with torch.no_grad(), model.disable_adapter():
        wanted = model(ids).logits
    with torch.no_grad():
        dequantised, plain = (
            load(folder, dtype=torch.float32)(ids).logits for folder in (exported[1], smollm_path)
        )
    assert torch.allclose(dequantised, wanted, atol=1e-3)
    assert (plain - wanted).abs().max() > 0.5


@pytest.mark.slow
def test_the_cards_lines_make_the_same_base(exported, smollm, tmp_path, monkeypatch):
    cfg, _ = smollm
    code = blocks(model_card(cfg, RUN), "python")[1]
    monkeypatch.chdir(tmp_path)
    (tmp_path / Path(cfg.base_model).name).symlink_to(cfg.base_model)
    exec(code.replace("bfloat16", "float32"), {})
    with contextlib.ExitStack() as stack:
        ours, theirs = (
            stack.enter_context(safe_open(next(folder.glob("*.safetensors")), "pt"))
            for folder in (exported[1], tmp_path / "dequantised")
        )
        assert set(theirs.keys()) >= set(ours.keys())
        for name in ours.keys():  # noqa: SIM118
            assert torch.equal(ours.get_tensor(name), theirs.get_tensor(name)), name


def test_a_base_saved_in_4_bits_computes_and_is_dequantised_in_the_cards_type(
    cfg_of, mistral_tokenizer, tmp_path, monkeypatch
):
    """Its own type, which it was saved with, is another."""
    base = tiny_base(tmp_path / "base", mistral_tokenizer)
    nf4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    config = transformers.BitsAndBytesConfig(bnb_4bit_compute_dtype=torch.bfloat16, **nf4)
    load = transformers.AutoModelForCausalLM.from_pretrained
    four = load(base, quantization_config=config, dtype=torch.bfloat16, device_map={"": "cpu"})
    four.save_pretrained(tmp_path / "four")
    mistral_tokenizer.save_pretrained(tmp_path / "four")
    cfg = cfg_of(base_model=str(tmp_path / "four"), bf16=False)
    loading, dequantising = blocks(model_card(cfg, RUN), "python")
    monkeypatch.chdir(tmp_path)
    scope = {}
    exec(loading[: loading.index("model = PeftModel")], scope)
    layers = [each for each in scope["model"].modules() if hasattr(each, "compute_dtype")]
    assert layers and {(e.compute_dtype, e.compute_type_is_set) for e in layers} == {
        (torch.float32, True)
    }
    if transformers.__version__.startswith("5.15."):
        pytest.skip(
            "5.15 cannot save what it has read in 4 bits: Bnb4bitDeserialize, no reverse_op"
        )
    exec(dequantising, {})
    with safe_open(next((tmp_path / "dequantised").glob("*.safetensors")), "pt") as file:
        names = list(file.keys())
        assert {file.get_tensor(name).dtype for name in names} == {torch.float32}
    told = json.loads((tmp_path / "dequantised" / "config.json").read_text())
    assert "float32" in (told.get("dtype"), told.get("torch_dtype"))
    assert "quantization_config" not in told


@pytest.mark.slow
def test_what_the_16_bit_base_costs_is_measured_and_told(
    exported, smollm, smollm_tokenizer, table, capsys
):
    cfg, model = smollm
    rows, answers = table
    answers = answers.assign(reference=answers["after"])  # as if all were right
    found = on_16_bits(cfg, model, smollm_tokenizer, rows, answers)
    assert (found["rows"], found["ours"]) == (20, 20) and found["right"] == found["same"] < 15
    told = f"in 16 bits would get {found['right']} of 20 right, not 20: serve it as "
    assert told in capsys.readouterr().out
    card = model_card(cfg, RUN | {"results": {"sixteen_bits": found}})
    told = f"{found['right']} of 20 held-out answers were exactly right in place of 20"
    assert told in " ".join(card.split())
    assert "may answer otherwise" in " ".join(model_card(cfg, RUN).split())


@pytest.mark.parametrize(("dtype", "size"), [(torch.bfloat16, 2), (torch.float32, 4)])
def test_a_base_that_computes_in_32_bits_takes_twice_the_memory(
    cfg_of, mistral_tokenizer, tmp_path, monkeypatch, dtype, size
):
    wide = {"hidden_size": 256, "intermediate_size": 2048}  # so that packed weights tell
    base = tiny_base(tmp_path / "base", mistral_tokenizer, **wide)
    cfg, model = cfg_of(base_model=base), tiny_tuned(base).to(dtype)
    weights = sum(
        p.numel() for p in transformers.AutoModelForCausalLM.from_pretrained(base).parameters()
    )
    for part, fits in ((0.98, False), (1.02, True)):
        # The adapter's own weights are counted, too.
        free = 0.5 + part * 1.2 * size * weights / 2**30
        monkeypatch.setattr("finetune.sixteen_bits.free_memory_size", lambda free=free: free)
        assert (why_not_measured(cfg, model) == "") == fits
    monkeypatch.setattr("finetune.sixteen_bits.is_spread", lambda: True)
    assert why_not_measured(cfg, model) == "several GPUs hold this model in parts"


def test_it_is_told_why_the_16_bit_base_was_not_asked(
    cfg_of, mistral_tokenizer, tmp_path, monkeypatch
):
    base = tiny_base(tmp_path / "base", mistral_tokenizer)
    cfg, model = cfg_of(base_model=base), tiny_tuned(base)
    monkeypatch.setattr("finetune.sixteen_bits.free_memory_size", lambda: 0.2)
    assert "0.2 GB are free" in on_16_bits(cfg, model, mistral_tokenizer, [{}], None)["why"]
    assert on_16_bits(cfg, model, mistral_tokenizer, [], None) == {"why": "nothing is asked"}
    monkeypatch.undo()
    tiny_nf4(base).save_pretrained(tmp_path / "four")
    cfg = cfg_of(base_model=str(tmp_path / "four"))
    why = on_16_bits(cfg, model, mistral_tokenizer, [{}], None)["why"]
    assert why == "the base model has no 16-bit weights"
    card = model_card(cfg, RUN | {"results": {"sixteen_bits": {"why": why}}})
    assert f"may answer otherwise (not measured here: {why})" in " ".join(card.split())


@pytest.fixture(scope="session")
def fetched(defaults):
    """llama.cpp's converters, fetched once for all tests."""
    cache = str(ROOT / "content" / "model_cache")
    return converters(Settings.from_cell(defaults | {"model_cache": cache}))


@pytest.fixture
def no_fetching(fetched, monkeypatch):
    monkeypatch.setattr("finetune.export.converters", lambda _: fetched)


@pytest.fixture
def cfg_of(defaults, tmp_path):
    folders = {"output_dir": "outputs", "merged_dir": "merged", "model_cache": "cache"}
    here = {name: str(tmp_path / folder) for name, folder in folders.items()}
    return lambda **changes: Settings.from_cell(defaults | here | changes)


@pytest.fixture
def tiny_mistral(tmp_path, mistral_tokenizer):
    """A tiny Mistral with the real v0.3 vocabulary and its SentencePiece file."""
    from importlib.util import find_spec

    base = tiny_base(tmp_path / "tiny-mistral", mistral_tokenizer)
    data = Path(find_spec("mistral_common").submodule_search_locations[0]) / "data"
    shutil.copy(data / "mistral_instruct_tokenizer_240323.model.v3", f"{base}/tokenizer.model")
    return base


def test_a_base_is_written_once_for_all_its_adapters(cfg_of, tiny_mistral, capsys):
    one, other = (cfg_of(base_model=tiny_mistral, run_name=name) for name in ("one", "other"))
    folder = export_base(one, tiny_tuned(tiny_mistral))
    weights = next(folder.glob("*.safetensors"))
    before = weights.stat().st_mtime_ns
    assert export_base(other, tiny_tuned(tiny_mistral, seed=5)) == folder
    assert weights.stat().st_mtime_ns == before
    assert (weights.stat().st_mode & 0o777) == 0o644
    # The folder has other weights now: what was made of the old ones is of no use.
    changed = tiny_base(Path(tiny_mistral).parent / "again", build_mistral(), seed=9)
    shutil.copy(f"{changed}/model.safetensors", tiny_mistral)
    assert export_base(one, tiny_tuned(tiny_mistral)) == folder
    assert next(folder.glob("*.safetensors")).stat().st_mtime_ns > before
    load = transformers.AutoModelForCausalLM.from_pretrained
    ids = torch.tensor([[1, 5000, 600]])
    with torch.no_grad():
        found = load(folder)(ids).logits
        with (tuned := tiny_tuned(tiny_mistral)).disable_adapter():
            wanted = tuned(ids).logits
    assert torch.allclose(found, wanted, atol=1e-3)


def test_a_base_with_recommendations_of_its_own_is_greedy_all_the_same(cfg_of, tiny_mistral):
    (Path(tiny_mistral) / "generation_config.json").write_text('{"repetition_penalty": 1.3}')
    cfg = cfg_of(base_model=tiny_mistral)
    told = json.loads(
        (export_base(cfg, tiny_tuned(tiny_mistral)) / "generation_config.json").read_text()
    )
    assert "repetition_penalty" not in told and not told.get("do_sample")


ONE = [("user", "What is the capital of France?")]
THREE = [
    ("system", "Be  brief."),
    *ONE,
    ("assistant", "Paris."),
    ("user", " And\nof Spain? </thing>"),
    ("assistant", "Madrid"),
    ("user", "### End ünïcode 日本"),
]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["merged", "adapter"])
def test_llama_cpp_sends_the_ids_that_were_trained_on_mistrals_vocabulary(
    cfg_of, tiny_mistral, kind, no_fetching
):
    pytest.importorskip("xllamacpp")
    export = ["gguf"] if kind == "merged" else ["base", "gguf"]
    cfg = cfg_of(base_model=tiny_mistral, export=export)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_mistral)
    tokenizer = usable(tokenizer, tiny_mistral, cfg.cache_dir)
    model = tiny_tuned(tiny_mistral)
    saved(cfg, model, tokenizer)
    assert (cfg.final_model / "tokenizer.model").is_file()
    rows = [{"prompt": "a", "completion": "b"}]
    whole = export_base(cfg, model) if "base" in export else None
    merged = merge_adapter(cfg, model, tokenizer, rows, "card") if cfg.merges else None
    assert (whole is None) == (kind == "merged") == (merged is not None)
    folder = export_gguf(cfg, tokenizer, whole, merged)
    with llama(folder / "README.md", 0, 8441) as url:
        for turns in (ONE, THREE):
            chat = [{"role": role, "content": text} for role, text in turns]
            text = post(url, "/apply-template", messages=chat)["prompt"]
            ids = post(url, "/tokenize", content=text, add_special=True, parse_special=True)
            assert ids["tokens"] == encode_prompt(tokenizer, turns)


def post(url, path, **body):
    import urllib.request

    request = urllib.request.Request(
        url + path, json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.load(answer)


def test_gguf_without_the_sentencepiece_file_is_refused_by_name(cfg_of, tiny_mistral, tmp_path):
    (Path(tiny_mistral) / "tokenizer.model").unlink()
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_mistral)
    tokenizer = usable(tokenizer, tiny_mistral, tmp_path)
    with pytest.raises(UserError, match=r"needs the file tokenizer\.model"):
        require_convertible(tokenizer)


def test_a_byte_level_vocabulary_needs_no_file_of_sentencepieces(smollm_tokenizer):
    require_convertible(smollm_tokenizer)


def test_a_converter_that_fails_says_its_last_words(cfg_of, tmp_path, monkeypatch):
    cfg = cfg_of()
    (tmp_path / "convert.py").write_text("raise SystemExit('no such architecture')")
    monkeypatch.setattr("finetune.export.converters", lambda _: tmp_path)
    with pytest.raises(UserError, match="no such architecture\nThe adapter is safe: "):
        convert(cfg, "convert.py", tmp_path / "model.gguf")


WRITES_ITS_ARGUMENTS = """import pathlib, sys
pathlib.Path(sys.argv[sys.argv.index("--outfile") + 1]).write_text(str(sys.argv))
"""


@pytest.fixture
def no_converting(tmp_path, monkeypatch):
    """Converters that write what they were given, at once."""
    for name in ("convert_hf_to_gguf.py", "convert_lora_to_gguf.py"):
        (tmp_path / name).write_text(WRITES_ITS_ARGUMENTS)
    monkeypatch.setattr("finetune.export.converters", lambda _: tmp_path)


@pytest.fixture
def run_of(cfg_of, tiny_mistral, no_converting):
    """Exports a run on the tiny Mistral: its settings, its folder, the base's."""

    def export(**changes):
        cfg = cfg_of(base_model=tiny_mistral, **{"export": ["base", "gguf"]} | changes)
        tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_mistral)
        tokenizer = usable(tokenizer, tiny_mistral, cfg.cache_dir)
        model = tiny_tuned(tiny_mistral)
        saved(cfg, model, tokenizer)
        base = export_base(cfg, model)
        return export_gguf(cfg, tokenizer, base, base if cfg.merges else None), base

    return export


def test_an_adapters_files_name_the_bases_from_where_they_stand(run_of):
    folder, base = run_of()
    whole = base.with_name(f"{base.name}-gguf-f16") / f"{base.name}-f16.gguf"
    told = (folder / "Modelfile.adapter").read_text().splitlines()
    assert told[1] == "ADAPTER ./adapter-f32.gguf" and (folder / "adapter-f32.gguf").is_file()
    page = (folder / "README.md").read_text()
    for path in (told[0].removeprefix("FROM "), re.search('model.path = "(.+)"', page)[1]):
        assert not Path(path).is_absolute() and (folder / path).resolve() == whole
    given = (folder / "adapter-f32.gguf").read_text()
    assert f"'--base', '{base}', '--outtype', 'f32'" in given and "final_model" in given
    assert "'--outtype', 'f16'" in whole.read_text()


def test_a_base_of_any_name_stands_in_a_line_that_python_reads(cfg_of, tmp_path):
    write_page(tmp_path, cfg_of(), RUN, {"The adapter": ('../7b "new" \\ ß.gguf', "a.gguf")})
    code = blocks((tmp_path / "README.md").read_text(), "python")[0]
    path = re.search("model.path = (.+)", code)[1]
    assert eval(path) == '../7b "new" \\ ß.gguf' and "ß" in path
    compile(code, "page", "exec")


def test_servers_hold_the_longest_row_and_an_answer(run_of):
    folder, _ = run_of(max_length=8000, max_new_tokens=300)
    assert "params.n_ctx, params.port = 8300, 8000\n" in (folder / "README.md").read_text()
    assert "PARAMETER num_ctx 8300\n" in (folder / "Modelfile.adapter").read_text()


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"use_rslora": True}, "llama.cpp takes alpha / r for the strength of an rsLoRA"),
        ({"use_dora": True}, "llama.cpp knows no DoRA"),
    ],
)
def test_an_adapter_whose_strength_llama_cpp_gets_wrong_is_exported_merged(
    run_of, changes, why, capsys
):
    folder, _ = run_of(**changes)
    assert f"No GGUF of the adapter alone, but of the merged model: {why}." in (
        capsys.readouterr().out
    )
    assert (folder / "merged-f16.gguf").is_file() and not (folder / "adapter-f32.gguf").exists()
    assert "dequantised" not in (folder / "README.md").read_text()


def test_the_bases_gguf_is_made_once_and_again_when_the_base_is_another(run_of, tiny_mistral):
    _, base = run_of(run_name="one")
    (file,) = base.with_name(f"{base.name}-gguf-f16").glob("*.gguf")
    file.chmod(0o600)  # what is made anew has the usual mode
    run_of(run_name="two")
    assert file.stat().st_mode & 0o777 == 0o600
    changed = tiny_base(Path(tiny_mistral).parent / "again", build_mistral(), seed=9)
    shutil.copy(f"{changed}/model.safetensors", tiny_mistral)
    run_of(run_name="three")
    assert file.stat().st_mode & 0o777 == 0o644


@pytest.mark.parametrize(
    ("changes", "merges", "gguf"),
    [
        ({}, False, ""),
        ({"merge": True}, True, ""),
        ({"merge": "push"}, True, ""),
        ({"export": ["base"]}, False, ""),
        ({"export": ["gguf"]}, True, "f16"),
        ({"export": ["gguf:q8_0"]}, True, "q8_0"),
        ({"export": ["gguf:q8_0", "gguf:bf16"]}, True, "bf16"),  # the last counts
        ({"export": ["base", "gguf:bf16"]}, False, "bf16"),
        ({"export": ["base", "gguf"], "merge": True}, True, "f16"),
        ({"export": ["base", "gguf"], "use_rslora": True}, True, "f16"),
        ({"export": ["base", "gguf"], "use_dora": True}, True, "f16"),
    ],
)
def test_what_is_made_follows_from_merge_and_export(cfg_of, changes, merges, gguf):
    assert (cfg_of(**changes).merges, cfg_of(**changes).gguf) == (merges, gguf)


def test_an_export_that_there_is_not_is_told_with_those_that_there_are(defaults):
    with pytest.raises(UserError, match=r"export = \['gguf:q4_k_m'\]: each of them is 'base'"):
        Settings.from_cell(defaults | {"export": ["gguf:q4_k_m"]})


def test_the_last_section_says_where_everything_is_and_colab_downloads_it(
    cfg_of, capsys, monkeypatch
):
    cfg = cfg_of(run_name="mine", export=["gguf"])
    cfg.run_dir.mkdir(parents=True)
    (cfg.run_dir / "report.html").touch()
    digests = {
        "20260101": "before",
        "20260301": "this",
        "20260401": "another",
    }  # the clock went back
    for day, digest in digests.items():
        with zipfile.ZipFile(cfg.run_dir / f"mine-{day}-000000.zip", "w") as packed:
            told = {"files": {"adapter_model.safetensors": digest}}
            packed.writestr("checksums.json", json.dumps(told))
    (cfg.run_dir / "mine-of-my-own.zip").touch()
    shutil.copy(cfg.run_dir / "mine-20260301-000000.zip", cfg.run_dir / "a-copy.zip")
    cfg.final_model.mkdir()
    sealed = {"purpose": "adapter", "run": "mine"} | {
        "files": {"adapter_model.safetensors": "this"}
    }
    (cfg.final_model / "checksums.json").write_text(json.dumps(sealed))
    take_with_you(cfg, "https://hub/ada/mine")
    out = capsys.readouterr().out
    assert "Merged on Hub" not in out and "Base model" not in out
    take_with_you(cfg, None, cfg.cache_dir / "7b-dequantised", "https://hub/ada/mine-merged")
    lines = capsys.readouterr().out.splitlines()
    assert "Merged on Hub https://hub/ada/mine-merged" in lines
    assert f"Base model    {cfg.cache_dir / '7b-dequantised'}" in lines
    assert "mine-20260301-000000.zip" in out and out.count(".zip") == 1
    assert (
        f"Merged model  {cfg.merged_dir}" in out and f"GGUF          {cfg.run_dir / 'gguf'}" in out
    )
    assert "On the Hub    https://hub/ada/mine" in out and f"Adapter       {cfg.final_model}" in out
    given = []
    colab = types.ModuleType("google.colab")
    colab.files = types.SimpleNamespace(download=given.append)
    monkeypatch.setitem(sys.modules, "google.colab", colab)
    take_with_you(cfg_of(run_name="mine", output_dir=cfg.output_dir), None)
    assert [Path(path).name for path in given] == ["mine-20260301-000000.zip", "report.html"]
    assert "Hub" not in capsys.readouterr().out.split("report.html")[-1]
