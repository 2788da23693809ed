"""Real servers on this machine, asked over HTTP, and their answers held to the notebook's.

    python tests/serve/serving.py llama content/model_outputs/triage
    python tests/serve/serving.py vllm content/model_outputs/triage

The run's folder must be of a run with `MERGE=True EXPORT='["base","gguf"]'`. llama.cpp is started
by the Python that stands in the run's `gguf/README.md`, vLLM by the commands of the two cards.
"""

import argparse
import contextlib
import json
import os
import re
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import torch
import transformers

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from qlora_helpers import locate  # noqa: E402

STOP = "\n\n### End"


def ask(url: str, messages: list[dict], **options) -> str:
    """The answer of a server at `url` to a chat, greedy, without the blanks around it."""
    body = {"messages": messages, "temperature": 0, "stop": [STOP]} | options
    request = urllib.request.Request(
        f"{url}/v1/chat/completions",
        json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=300) as answer:
        return json.load(answer)["choices"][0]["message"]["content"].strip()


def blocks(page: str, language: str) -> list[str]:
    """The code blocks of one language in a Markdown page."""
    return re.findall(rf"```{language}\n(.+?)\n```", page, re.S)


@contextlib.contextmanager
def serving(command: list[str], folder: Path, port: int, seconds: int = 60, **environment):
    """A server started by `command` in `folder`, once it answers; yields its address."""
    url, log = f"http://127.0.0.1:{port}", folder / f".server-{port}.log"
    with log.open("w") as out:
        server = subprocess.Popen(
            command,
            cwd=folder,
            stdin=subprocess.PIPE,
            stdout=out,
            stderr=out,
            env=os.environ | environment,
            start_new_session=True,
        )
        try:
            for _ in range(seconds * 5):
                with contextlib.suppress(OSError):
                    urllib.request.urlopen(f"{url}/health", timeout=5).close()
                    break
                if server.poll() is not None:
                    raise RuntimeError(log.read_text()[-3000:])
                time.sleep(0.2)
            else:
                raise TimeoutError(log.read_text()[-3000:])
            yield url
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(server.pid, 9)
            server.wait()
            log.unlink()


def llama(page: Path, number: int, port: int, python: str = sys.executable):
    """llama.cpp by the page's `number`-th block of Python, on another port.

    And on one thread: several wait for each other in loops, for minutes where others compute, too.
    """
    code = blocks(page.read_text(), "python")[number]
    one = "params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1"
    code, found = re.subn(r"(params.port = \d+), 8000", rf"\1, {port}\n{one}", code)
    assert found == 1
    return serving([python, "-c", code], page.parent, port)


def vllm(card: Path, port: int):
    """vLLM by the command in a card, on another port, with what a CPU wants besides."""
    command = next(c for c in blocks(card.read_text(), "bash") if c.startswith("vllm serve"))
    words = command.replace("\\\n", " ").split()
    words += ["--port", str(port), "--gpu-memory-utilization", "0.4", "--max-model-len", "2048"]
    return serving(words, card.parent, port, seconds=600, VLLM_CPU_KVCACHE_SPACE="1")


def gap(model, tokenizer, prompt: str, got: str, tokens: int) -> float:
    """By how much the two best logits differ at least, up to where `got` leaves the greedy answer.

    Blanks in front count: they are tokens, though an answer is shown without them.
    """
    chat = [{"role": "user", "content": prompt}]
    start = tokenizer.apply_chat_template(
        chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    eos, width = tokenizer.eos_token_id, start["input_ids"].shape[1]
    config = transformers.GenerationConfig(do_sample=False, eos_token_id=eos, pad_token_id=eos)
    config.update(output_logits=True, return_dict_in_generate=True, max_new_tokens=tokens)
    with torch.no_grad():
        out = model.generate(**start, generation_config=config)
    least = float("inf")
    for number, logits in enumerate(out.logits, 1):
        best = logits[0].float().topk(2).values
        least = min(least, (best[0] - best[1]).item())
        text = tokenizer.decode(out.sequences[0, width : width + number], skip_special_tokens=True)
        if not got.startswith(text.strip()):
            break
    return least


def compare(url: str, name: str, rows: list[dict], tokens: int, model, tokenizer) -> int:
    """How many of the rows a server answers as the table says; prints those that it does not."""
    same = 0
    for row in rows:
        prompt, wanted = row["prompt"], row["after"]
        got = ask(url, [{"role": "user", "content": prompt}], model=name, max_tokens=tokens)
        same += got == wanted
        if got != wanted:
            apart = gap(model, tokenizer, prompt, got, tokens)
            print(f"  asked {prompt!r}\n  table {wanted!r}\n  now   {got!r}")
            print(f"  the two best logits are {apart:.3f} apart up to there, at the closest")
    return same


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("server", choices=["llama", "vllm"])
    parser.add_argument("run", type=Path)
    parser.add_argument("--rows", type=int, default=20)
    options = parser.parse_args()
    run = json.loads((options.run / "final_model" / "run.json").read_text())
    name, tokens = run["settings"]["run_name"], run["settings"]["max_new_tokens"]
    lines = (options.run / "answers.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines][: options.rows]
    merged = locate(run["settings"]["merged_dir"])
    model = transformers.AutoModelForCausalLM.from_pretrained(merged, dtype="auto")
    tokenizer = transformers.AutoTokenizer.from_pretrained(merged)
    if options.server == "llama":
        page = options.run / "gguf" / "README.md"
        servers = {"merged": llama(page, 0, 8181), "adapter": llama(page, 1, 8182)}
    else:
        base = next(
            (ROOT / "content" / "model_cache").glob("*-dequantised-*/made_from.json")
        ).parent
        link = options.run / "final_model" / "dequantised"
        if not link.exists():
            link.symlink_to(base)
        servers = {
            "merged": vllm(merged / "README.md", 8181),
            "adapter": vllm(options.run / "final_model" / "README.md", 8182),
        }
    for kind, server in servers.items():
        with server as url:
            same = compare(url, name, rows, tokens, model, tokenizer)
        print(f"{options.server}, {kind}: {same} of {len(rows)} as in answers.jsonl", flush=True)


if __name__ == "__main__":
    main()
