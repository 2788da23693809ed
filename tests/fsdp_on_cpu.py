"""`launch.py` under FSDP without a GPU, for tests: accelerate offers FSDP to GPUs alone, and is
told otherwise here.

    python -m torch.distributed.run --nproc_per_node 2 tests/fsdp_on_cpu.py BASE_MODEL=… DATA=…

Everything else is the real thing: torch's FSDP2 over gloo, accelerate's wrapping, the Trainer's
saving and loading.
"""

import os
import sys
from pathlib import Path

import yaml
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType

sys.path.insert(0, str(Path(__file__).parents[1]))

from finetune import launch
from finetune.headless import defaults, parse

initialise = AcceleratorState.__init__


def with_fsdp(self, *args, fsdp_plugin=None, **kwargs) -> None:
    initialise(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
    if fsdp_plugin is not None:
        self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, fsdp_plugin


AcceleratorState.__init__ = with_fsdp
settings = yaml.safe_load(Path(launch.__file__).with_name("fsdp.yaml").read_text())["fsdp_config"]
os.environ |= {name.upper(): str(value) for name, value in settings.items()}
os.environ |= {"ACCELERATE_USE_FSDP": "true", "ACCELERATE_USE_CPU": "true"}
launch.run_cells(parse(sys.argv[1:], defaults()))
