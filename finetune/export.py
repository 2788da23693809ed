"""Section 15: files for servers: the base model as it was trained against, GGUF, a Modelfile."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

import transformers
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from finetune.base_model import base_place, cache_of, called, write_config
from finetune.card import quoted, request
from finetune.files import (
    Record,
    edit_json,
    files_of,
    new_folder,
    read_seal,
    seal,
    telling_if_full,
    why_unusable,
    zip_of,
)
from finetune.identity import base_weights
from finetune.merge import merged_weights, write_shards
from finetune.modelfile import write_modelfile
from finetune.save import save_tokenizer, write_generation_config
from finetune.setup import install_pinned, run_pip
from finetune.template import sentencepiece_file
from qlora_helpers import Settings, UserError, locate, on_colab

# llama.cpp's converters, in the source of a package that builds it (MIT, 38 MB).
CONVERTERS = "xllamacpp==2026.10.11549"
PARTS = ("convert_hf_to_gguf.py", "convert_lora_to_gguf.py", "conversion/", "gguf-py/")


def base_folder(settings: Settings, model: PreTrainedModel) -> Path:
    """Where the dequantised base model is kept, for all adapters that are trained on it."""
    kind = str(model.dtype).removeprefix("torch.")
    name = called(settings.base_model).replace("/", "--")
    return settings.cache_dir / f"{name}-dequantised-{kind}"


def export_base(settings: Settings, model: PreTrainedModel) -> Path:
    """Write the base model as the adapter was trained against it: its 4-bit weights in 16 bits.

    A server that holds these answers as the notebook does; on the base's own 16-bit weights an
    adapter answers otherwise. Made once: another run on the same base finds it.
    """
    folder = base_folder(settings, model)
    made_from = {
        "base_model": called(settings.base_model),
        "revision": getattr(model.config, "_commit_hash", None),
        "weights": base_weights(settings),
        "dtype": str(model.dtype),
    }
    told = folder / "made_from.json"
    if (
        not why_unusable(folder, "base")
        and json.loads(told.read_text(encoding="utf-8")) == made_from
    ):
        return folder
    base, cache = base_place(settings), cache_of(settings)
    own = transformers.AutoTokenizer.from_pretrained(base, cache_dir=cache)
    own.sentencepiece_file = sentencepiece_file(base, cache)
    left = f"The adapter is safe: {settings.final_model}."
    with telling_if_full(folder, left), new_folder(folder, "base") as work:
        write_shards(merged_weights(model, adapter=False), work, model.dtype, 2 * 2**30)
        write_config(model, work, model.dtype)
        save_tokenizer(work, own)
        write_generation_config(work, own)
        (work / told.name).write_text(json.dumps(made_from, indent=2) + "\n", encoding="utf-8")
        seal(work, "base")
    return folder


def converters(settings: Settings) -> Path:
    """The folder of llama.cpp's converters, fetched once into `model_cache`."""
    folder = settings.cache_dir / CONVERTERS.replace("==", "-")
    if not why_unusable(folder, "converters"):
        return folder
    with new_folder(folder, "converters") as work, tempfile.TemporaryDirectory() as fetched:
        print("Fetching llama.cpp's converters, once: about half a minute …")
        name = CONVERTERS.partition("=")[0]
        run_pip("download", "--no-deps", "--no-binary", name, "--dest", fetched, CONVERTERS)
        with tarfile.open(next(Path(fetched).glob("*.tar.gz"))) as archive:
            for member in archive.getmembers():
                member.name = member.name.partition("/llama.cpp/")[2]
                if member.name.startswith(PARTS) and member.isfile():
                    archive.extract(member, work, filter="data")
        seal(work, "converters")
    return folder


def convert(settings: Settings, script: str, file: Path, *arguments: str | Path) -> None:
    """Write `file` by one of llama.cpp's converters.

    Raises `UserError` with its last words if it fails.
    """
    if importlib.util.find_spec("sentencepiece") is None:
        install_pinned(["sentencepiece"])
    print(f"Writing {file.name} by llama.cpp's {script} …")
    command = [sys.executable, str(converters(settings) / script), *map(str, arguments)]
    command += ["--outfile", str(file)]
    offline = os.environ | {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
    done = subprocess.run(command, capture_output=True, text=True, env=offline)
    if done.returncode:
        told = "\n".join(done.stderr.strip().splitlines()[-5:])
        raise UserError(
            f"llama.cpp's {script} could not convert this model:\n{told}\n"
            f"The adapter is safe: {settings.final_model}."
        )


def to_gguf(settings: Settings, folder: Path, file: Path) -> None:
    """Convert a folder of a whole model to one GGUF file, in the format of `export`.

    SentencePiece puts a space before the first word of a text; llama.cpp's reading of it does so
    behind every control token, too, unless it is told not to at all: our template writes the space.
    """
    with tempfile.TemporaryDirectory() as made:
        work = Path(made) / folder.name
        work.mkdir()
        for name in files_of(folder):
            (work / name).symlink_to(folder / name)
        if (folder / "tokenizer.model").exists():
            (work / "tokenizer_config.json").unlink()
            shutil.copy(folder / "tokenizer_config.json", work)
            edit_json(work / "tokenizer_config.json", add_prefix_space=False)
        convert(settings, "convert_hf_to_gguf.py", file, work, "--outtype", settings.gguf)


LLAMA = """import xllamacpp  # llama.cpp as a package; any build of llama.cpp does

params = xllamacpp.CommonParams()
params.model.path = {model}{adapter}
params.model_alias = "{name}"
params.n_ctx, params.port = {context}, 8000
server = xllamacpp.Server(params)
input(f"Serving at {{server.listening_address}}, until Enter is pressed.")"""
ADAPTER = """
params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo("{file}", 1.0)]
params.chat_template = open("chat_template.jinja", encoding="utf-8").read()"""


def context_of(settings: Settings) -> int:
    """How many tokens a server needs room for: the longest row that is trained, and an answer."""
    return settings.max_length + settings.max_new_tokens


def write_page(folder: Path, settings: Settings, run: Record, models: dict) -> None:
    """Write how llama.cpp and Ollama take the files of a `gguf` folder; `models` says which."""
    parts = [f"# {settings.run_name} as GGUF\n"]
    for title, (model, adapter) in models.items():
        given = ADAPTER.format(file=adapter) if adapter else ""
        code = LLAMA.format(
            model=quoted(model), adapter=given, name=settings.run_name, context=context_of(settings)
        )
        parts.append(f"## {title}\n\nIn this folder:\n\n```python\n{code}\n```\n")
    parts.append(f"Ask it:\n\n```bash\n{request(settings, run)}\n```\n")
    if settings.prompt_format != "chat":
        parts.append(
            "Ollama takes a Modelfile that stands here. Its template was compared with the chat\n"
            "template; Ollama itself was not run.\n"
        )
    (folder / "README.md").write_text("\n".join(parts), encoding="utf-8")


def require_convertible(tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise `UserError` for a SentencePiece vocabulary whose own file is not there.

    Without it llama.cpp's converter knows no scores, and cuts words otherwise.
    """
    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    if model.get("byte_fallback") and not getattr(tokenizer, "sentencepiece_file", None):
        raise UserError(
            "export = 'gguf' needs the file tokenizer.model of this base model, which its "
            "repository or folder lacks: put it there, or leave 'gguf' out of export."
        )


def why_no_adapter_gguf(settings: Settings) -> str:
    """Why llama.cpp cannot serve this adapter by itself; empty if it can."""
    if settings.use_dora:
        return "llama.cpp knows no DoRA"
    return "llama.cpp takes alpha / r for the strength of an rsLoRA" if settings.use_rslora else ""


def export_gguf(
    settings: Settings, tokenizer: PreTrainedTokenizerBase, base: Path | None, merged: Path | None
) -> Path:
    """Write the run's `gguf` folder: the merged model, or the adapter for the base's GGUF, or both.

    With a Modelfile for each (`write_modelfile`) and the chat template, which an adapter's file
    does not hold. The base's GGUF stands beside its folder, shared by adapters.
    """
    require_convertible(tokenizer)
    folder, kind = settings.run_dir / "gguf", settings.gguf
    run = json.loads((settings.final_model / "run.json").read_text(encoding="utf-8"))
    left, models = f"The adapter is safe: {settings.final_model}.", {}
    with telling_if_full(folder, left), new_folder(folder, "gguf", aside=True) as work:
        if merged:
            models["The merged model"] = f"merged-{kind}.gguf", ""
            to_gguf(settings, merged, work / f"merged-{kind}.gguf")
            model = f"./merged-{kind}.gguf"
            write_modelfile(work / "Modelfile", tokenizer, context_of(settings), model)
        if base and (why := why_no_adapter_gguf(settings)):
            print(f"No GGUF of the adapter alone, but of the merged model: {why}.")
        elif base:
            whole = base_gguf(settings, base)
            file, options = work / "adapter-f32.gguf", ("--base", base, "--outtype", "f32")
            convert(settings, "convert_lora_to_gguf.py", file, settings.final_model, *options)
            where = os.path.relpath(whole, folder)
            models["The adapter, on the dequantised base"] = where, "adapter-f32.gguf"
            page = work / "Modelfile.adapter"
            write_modelfile(page, tokenizer, context_of(settings), where, "./adapter-f32.gguf")
        write_page(work, settings, run, models)
        shutil.copy(settings.final_model / "chat_template.jinja", work)
        seal(work, "gguf", settings.run_name)
    return folder


def base_gguf(settings: Settings, base: Path) -> Path:
    """The GGUF file of the dequantised base, made once."""
    folder = base.with_name(f"{base.name}-gguf-{settings.gguf}")
    file = folder / f"{base.name}-{settings.gguf}.gguf"
    of = read_seal(base)["files"]["made_from.json"]
    if why_unusable(folder, "gguf") or (folder / "made_from").read_text(encoding="utf-8") != of:
        with new_folder(folder, "gguf") as work:
            to_gguf(settings, base, work / file.name)
            (work / "made_from").write_text(of, encoding="utf-8")
            seal(work, "gguf")
    return file


def take_with_you(
    settings: Settings, address: str | None, base: Path | None = None, pushed: str | None = None
) -> None:
    """Say where everything is, and what next; on Colab the browser is given zip and report.

    `address` is the adapter's on the Hub, `pushed` the merged model's, `base` the dequantised base.
    """
    places = {
        "Adapter": settings.final_model,
        "As a zip": zip_of(settings.final_model, settings.run_name),
        "On the Hub": address,
        "Report": settings.run_dir / "report.html",
        "Merged model": locate(settings.merged_dir) if settings.merges else None,
        "Merged on Hub": pushed,
        "Base model": base,
        "GGUF": settings.run_dir / "gguf" if settings.gguf else None,
    }
    print("Done.\n" + "\n".join(f"{name:13} {place}" for name, place in places.items() if place))
    print(
        "Next: add rows like those it got wrong. To change a setting, edit section 2, set a new "
        "run_name and Run all again; finetune.report.compare_runs shows what differs between runs."
    )
    if on_colab():
        from google.colab import files

        for place in (places["As a zip"], places["Report"]):
            if place:
                files.download(str(place))
