"""What the tests share: the notebook's cells and settings, real models and tokenizers."""

import copy
import json
import os
import sys
from pathlib import Path

os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ.pop("HF_TOKEN", None)  # a developer's own token must not reach a test

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
sys.path.append(str(ROOT / "tests" / "faults"))

import pytest  # noqa: E402

from finetune import command_line  # noqa: E402
from finetune.base_model import base_model_path, mend_cpu_gradients  # noqa: E402
from finetune.lock import release  # noqa: E402
from finetune.setup import quiet  # noqa: E402
from qlora_helpers import Settings  # noqa: E402

quiet()


def pytest_sessionstart(session):
    """Prepare the embedded model before there are two processes that would."""
    if not hasattr(session.config, "workerinput"):
        values = command_line.defaults()
        smollm(lambda **changes: Settings.from_cell(values | changes))


def smollm(settings):
    return base_model_path(
        settings(base_model="embedded", model_cache=str(ROOT / "content" / "model_cache"))
    )


@pytest.fixture(scope="session")
def notebook():
    """The committed notebook, as JSON."""
    return json.loads((ROOT / "finetune_mistral.ipynb").read_text())


@pytest.fixture(scope="session")
def defaults():
    """The hyperparameter cell's values."""
    return command_line.defaults()


@pytest.fixture(scope="session")
def settings(defaults):
    """Makes checked settings: the notebook's defaults with some changed."""
    return lambda **changes: Settings.from_cell(defaults | changes)


@pytest.fixture(scope="session")
def smollm_path(settings):
    """The embedded SmolLM2-135M-Instruct, prepared once under the repository's own model cache."""
    return smollm(settings)


@pytest.fixture(scope="session")
def tokenizers(smollm_path):
    """The two real tokenizers, as they come."""
    from mistral import mistral_tokenizer
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(smollm_path), mistral_tokenizer()


# A copy for each file: some tests give their tokenizer another chat template.
@pytest.fixture(scope="module")
def smollm_tokenizer(tokenizers):
    return copy.deepcopy(tokenizers[0])


@pytest.fixture(scope="module")
def mistral_tokenizer(tokenizers):
    return copy.deepcopy(tokenizers[1])


@pytest.fixture(params=["mistral", "smollm"])
def tokenizer(request):
    """Each real tokenizer in turn: one that adds BOS (SentencePiece), one that does not (byte
    level).
    """
    return request.getfixturevalue(f"{request.param}_tokenizer")


@pytest.fixture
def nf4_model(smollm_path):
    """Makes the embedded model in real 4-bit NF4 with the recipe's LoRA, dropout off, in fp32; of
    its 30 layers the first few, which compute alike and load sooner.
    """
    import peft
    import torch
    import transformers

    def make(mend: bool = True, layers: int = 4):
        quantization = transformers.BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.float32,
        )
        model = transformers.AutoModelForCausalLM.from_pretrained(
            smollm_path,
            quantization_config=quantization,
            dtype=torch.float32,
            device_map={"": "cpu"},
            num_hidden_layers=layers,
        )
        if mend:
            mend_cpu_gradients(model)
        targets = ["q_proj", "k_proj", "v_proj", "o_proj"]
        torch.manual_seed(0)
        return peft.get_peft_model(
            model, peft.LoraConfig(task_type="CAUSAL_LM", r=8, target_modules=targets)
        )

    return make


@pytest.fixture
def begun(settings, tmp_path, monkeypatch):
    """Settings of a run with copies on a Drive that is mounted."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "content" / "drive" / "MyDrive").mkdir(parents=True)
    yield settings(output_dir=str(tmp_path / "out"), run_name="faults", backup_to="drive")
    release()


@pytest.fixture
def hub(monkeypatch):
    """A stand-in for the Hub, which this process asks, once each time."""
    from hub import Hub
    from huggingface_hub import constants

    with Hub() as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        monkeypatch.setattr("finetune.hub.RETRY_WAITS", ())
        yield server
