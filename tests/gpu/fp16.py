"""fp16 as on a T4: the loss scale is there and skips an overflow; a model too large for it is told.

python tests/gpu/fp16.py     # seconds
"""

import re
import sys
import tempfile
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[n]) for n in (2, 1)]
sys.path.insert(0, str(Path(__file__).parents[1] / "faults"))

import child  # noqa: E402
from conftest import settings_of, shared_model  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402


def main() -> None:
    with tempfile.TemporaryDirectory() as made:
        root = Path(made)
        make = settings_of(shared_model(root))
        (root / "skips").mkdir()
        settings = make(root / "skips", bf16=False)
        code, shown = child.run(settings, root / "skips" / "log", ("overflow_at", 4))
        scales = [int(found) for found in re.findall(r"SCALE (\d+)", shown)]
        print("loss scale after each step:", scales)
        assert code == 0, shown
        assert scales == [65536] * 3 + [32768] * 3

        weights = load_file(root / "model" / "model.safetensors")
        weights = {n: 1e6 * w if "down_proj" in n else w for n, w in weights.items()}
        save_file(weights, root / "model" / "model.safetensors", {"format": "pt"})
        (root / "tells").mkdir()
        code, shown = child.run(make(root / "tells", bf16=False), root / "tells" / "log")
        last = [line for line in shown.splitlines() if line.strip()][-2:]
        print(*last, sep="\n")
        assert code == 2 and "fp16, which ends at 65,504" in shown, shown


if __name__ == "__main__":
    main()
