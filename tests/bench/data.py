"""How fast rows are read, checked, encoded and audited, against the tokenizer alone, and in how
much memory.

    python tests/bench/data.py --rows 1000000

Makes a JSONL file of --rows rows of about 1 kB (words drawn from a vocabulary by Zipf's law), and
takes it through section 6 of the notebook. The yardstick is the tokenizer called on batches of the
same texts, with nothing around it. Memory is what the process itself holds: pages of mapped files,
which the system can take back, are told apart.
"""

import argparse
import itertools
import json
import os
import random
import statistics
import sys
import tempfile
import threading
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import datasets  # noqa: E402
import transformers  # noqa: E402
from mistral import mistral_tokenizer  # noqa: E402

from finetune.audit import audit_labels  # noqa: E402
from finetune.command_line import defaults  # noqa: E402
from finetune.data import read_rows, split_rows  # noqa: E402
from finetune.lengths import fit_length  # noqa: E402
from finetune.tokens import encode_rows  # noqa: E402
from qlora_helpers import COMPLETION_TEMPLATE, PROMPT_TEMPLATE, Settings  # noqa: E402

SYLLABLES = [
    "an",
    "ber",
    "con",
    "de",
    "el",
    "for",
    "gra",
    "hi",
    "in",
    "jo",
    "ka",
    "lo",
    "men",
    "no",
    "or",
    "pre",
    "qui",
    "re",
]


def write_rows(file: Path, rows: int, times: int = 1) -> None:
    """Rows of 1 kB on average, from 200 bytes to 4 kB, or so many `times` that; all different."""
    draw = random.Random(0)
    words = ["".join(draw.choices(SYLLABLES, k=draw.randint(1, 4))) for _ in range(20_000)]
    weights = [*itertools.accumulate(1 / rank for rank in range(1, len(words) + 1))]
    with file.open("w") as stream:
        for number in range(rows):
            size = min(600, max(25, int(draw.lognormvariate(4.85, 0.6))))
            text = draw.choices(words, cum_weights=weights, k=size * times)
            half = len(text) // 2
            row = {
                "prompt": f"{number} {' '.join(text[:half])}?",
                "completion": f"{' '.join(text[half:]).capitalize()}.",
            }
            stream.write(json.dumps(row) + "\n")


class Memory(threading.Thread):
    """The most megabytes this process held: its own, and in all with mapped files."""

    def __init__(self):
        super().__init__(daemon=True)
        self.own = self.all = 0.0
        self.start()

    def run(self) -> None:
        while True:
            status = dict(
                line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines()
            )
            own, whole = (int(status[key].split()[0]) / 1024 for key in ("RssAnon", "VmRSS"))
            self.own, self.all = max(self.own, own), max(self.all, whole)
            time.sleep(0.05)


def tokenizer_alone(file: Path, tokenizer) -> float:
    """Seconds a row of the tokenizer on the first 10,000 joint texts, in batches of 256."""
    with file.open() as stream:
        pairs = [json.loads(line) for line, _ in zip(stream, range(10_000), strict=False)]
    texts = [PROMPT_TEMPLATE.format(**row) + COMPLETION_TEMPLATE.format(**row) for row in pairs]
    os.environ["TOKENIZERS_PARALLELISM"] = (
        "true"  # its own threads, whatever the passes before it wanted
    )
    start = time.perf_counter()
    for place in range(0, len(texts), 256):
        tokenizer(texts[place : place + 256])
    return (time.perf_counter() - start) / len(texts)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--tokenizer", help="a folder; without it Mistral v0.3's")
    parser.add_argument("--times", type=int, default=1, help="as long rows: 120 gives 120 kB")
    parser.add_argument("--folder", help="where file and cache go; without it a temporary folder")
    options = parser.parse_args()
    tokenizer = (
        transformers.AutoTokenizer.from_pretrained(options.tokenizer)
        if options.tokenizer
        else mistral_tokenizer()
    )
    datasets.disable_progress_bars()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        file = Path(folder) / "rows.jsonl"
        write_rows(file, options.rows, options.times)
        print(f"{options.rows:,} rows, {file.stat().st_size / options.rows:,.0f} bytes a row")
        measure(file, folder, tokenizer, options.rows)


def measure(file: Path, folder: str, tokenizer, count: int) -> None:
    """The notebook's section 6 over `file`, step by step, with the yardstick before, between and
    after.
    """
    values = defaults()
    changes = {"data_files": str(file), "output_dir": folder, "max_length": 2**20}
    cfg = Settings.from_cell(values | changes)
    alone, spent = [tokenizer_alone(file, tokenizer)], []
    memory, start = Memory(), time.perf_counter()
    time.sleep(0.2)
    base = memory.own

    def done(step: str) -> None:
        nonlocal start
        spent.append(time.perf_counter() - start)
        alone.append(tokenizer_alone(file, tokenizer))
        print(
            f"  {step:6} {spent[-1]:8.1f} s; tokenizer alone {1 / alone[-1]:,.0f} rows/s",
            flush=True,
        )
        start = time.perf_counter()

    rows = read_rows(cfg)
    done("read")
    data = fit_length(encode_rows(rows, tokenizer), tokenizer, cfg)
    done("encode")
    for part in split_rows(data, cfg.validation_fraction):
        audit_labels(part, tokenizer)
    done("audit")
    ours, theirs = sum(spent) / count, statistics.mean(alone)
    print(f"{ours * 1e6:,.0f} µs a row, {theirs / ours:.2f} of the tokenizer's speed")
    print(
        f"Memory: {memory.own:,.0f} MB at most, {memory.own - base:,.0f} more than at the start; "
        f"{memory.all:,.0f} MB with mapped files"
    )


if __name__ == "__main__":
    main()
