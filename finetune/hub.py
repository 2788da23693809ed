"""Section 3: sign in. And the Hub's client: time limits, retries, whole commits, no paths."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import re
import tempfile
import time
from collections.abc import Callable, Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import huggingface_hub
from huggingface_hub import HfApi, constants
from huggingface_hub.utils import _http as http

from finetune.files import SEAL, file_hash, files_of, read_seal
from finetune.machine import T, chain, short
from qlora_helpers import Settings, UserError


def _colab_token() -> tuple[str | None, str]:
    try:
        from google.colab import userdata
    except ImportError:
        return None, ""
    how = (
        "click the key on Colab's left edge, add a secret named HF_TOKEN, "
        "and switch 'Notebook access' on"
    )
    try:
        return userdata.get("HF_TOKEN"), ""
    except userdata.SecretNotFoundError:
        return None, f"Colab has no secret HF_TOKEN: {how}."
    except userdata.NotebookAccessError:
        return (
            None,
            (
                "Colab's secret HF_TOKEN is not open to this notebook: "
                "click the key, switch 'Notebook access' on."
            ),
        )
    except userdata.TimeoutException:
        return None, "Colab did not answer when asked for the secret HF_TOKEN: run this cell again."


def _kaggle_token() -> tuple[str | None, str]:
    try:
        from kaggle_secrets import UserSecretsClient
    except ImportError:
        return None, ""
    try:
        return UserSecretsClient().get_secret("HF_TOKEN"), ""
    except Exception as error:  # the client raises its own types for each backend answer
        return (
            None,
            (
                f"Kaggle has no secret HF_TOKEN ({type(error).__name__}): "
                "Add-ons › Secrets › Add secret."
            ),
        )


def _typed_token() -> tuple[str | None, str]:
    from getpass import getpass

    try:
        return getpass("Hugging Face token (hidden; press Enter to go on without): "), ""
    except (EOFError, NotImplementedError):  # a headless kernel has nobody to ask
        return None, ""


FROM_A_SECRET: set[str] = set()  # tokens that `sign_in` has put into the environment


def sign_in(needed: bool = True) -> str | None:
    """Put a Hugging Face token into this process's environment, and say where it was found.

    Looks in the environment (`HF_TOKEN`), Colab's secrets, Kaggle's secrets and the token that
    `hf auth login` stored; asks, hidden, only if `needed`. Returns None without one, which is
    enough for a public or local base model. The token itself is never printed, and never given to
    git.
    """
    if os.environ.get("HF_TOKEN") in FROM_A_SECRET:  # the secret may have been replaced since
        del os.environ["HF_TOKEN"]
    sources = {
        "the environment": lambda: (os.environ.get("HF_TOKEN"), ""),
        "Colab's secrets": _colab_token,
        "Kaggle's secrets": _kaggle_token,
        "an earlier sign-in": lambda: (huggingface_hub.get_token(), ""),
    }
    if needed:
        sources["what you typed"] = _typed_token
    for source, find in sources.items():
        found, hint = find()
        token = (found or "").strip()
        if re.fullmatch(r"[!-~]+", token):
            os.environ["HF_TOKEN"] = token
            if source.endswith("secrets"):
                FROM_A_SECRET.add(token)
            print(f"Hugging Face token found in {source}.")
            return token
        if token:  # no request can carry it, and an error would print it
            os.environ.pop("HF_TOKEN", None)
            print(f"The token in {source} holds a blank or an odd sign: copy it anew.")
        elif hint and needed:
            print(hint)
    print(
        "No Hugging Face token: public and local base models work, gated ones and pushing do not."
    )
    return None


# What goes to the adapter's repository: an allow-list.
PUSHED_FILES = [
    *("adapter_model.safetensors", "adapter_config.json", "tokenizer*", "special_tokens_map.json"),
    *("chat_template.jinja", "generation_config.json", "README.md", "run.json", "checksums.json"),
    "held_out.json",
]
# What goes to a merged model's besides.
MERGED_FILES = ["model*.safetensors", "config.json", "model.safetensors.index*"]
CARD_FILES = ["README.md", "run.json", "checksums.json"]


def hub_repo_id(settings: Settings, user: str) -> str:
    """The repository to push to: `hub_repo`, under the user's name where it has no owner."""
    name = settings.hub_repo or settings.run_name
    return name if "/" in name else f"{user}/{name}"


def hub_api(token: str | None = None) -> HfApi:
    """The Hub's client with a time limit on every request: by itself it waits for ever.

    60 s without a byte end a request; an upload that moves has all the time it needs.
    huggingface_hub before 1.0 is on requests, later on httpx, whose limits are set in different
    places.
    """

    def client() -> Any:
        made = http.default_client_factory()
        made.timeout = REQUEST_SECONDS
        return made

    def session() -> Any:
        made = http._default_backend_factory()
        made.request = functools.partial(made.request, timeout=REQUEST_SECONDS)
        return made

    if hasattr(http, "set_client_factory"):
        http.set_client_factory(client)
    else:
        http.configure_http_backend(session)
    return HfApi(token=token)


REQUEST_SECONDS = 60


def status_of(error: Exception) -> int | None:
    """The HTTP status that an error of the Hub's client carries, itself or in what it came from."""
    answers = (getattr(one, "response", None) for one in chain(error))
    return next((answer.status_code for answer in answers if answer is not None), None)


RETRY_WAITS = (2, 5, 15, 30)  # seconds before each further try
RETRY_SECONDS = 600  # after so long no further try is begun


def is_transient(error: Exception) -> bool:
    """Whether an error may be gone on a later try: rate limit, server error, lost connection."""
    if status := status_of(error):
        return status in (408, 429) or status >= 500
    clients = ("httpx", "httpx2", "httpcore", "requests", "urllib3")
    return any(
        type(one).__module__.split(".")[0] in clients
        or isinstance(one, (ConnectionError, TimeoutError))
        for one in chain(error)
    )


def with_retries(call: Callable[[], T]) -> T:
    """`call()`, tried again after `RETRY_WAITS` for errors that may pass.

    Raises the last error, or any other at once. huggingface_hub repeats some requests by itself,
    but neither the making of a repository nor a commit.
    """
    began = time.monotonic()
    waits = iter(RETRY_WAITS)
    while True:
        try:
            return call()
        except Exception as error:
            wait = next(waits, None)
            if wait is None or not is_transient(error) or time.monotonic() - began > RETRY_SECONDS:
                raise
            print(f"The Hub: {short(error)}. Trying again in {wait} s.")
        time.sleep(wait)


def ensure_repo(api: HfApi, repo: str, private: bool) -> None:
    """Make `repo` if it is not there.

    Raises `UserError` if it is there and public where `private` is wanted.
    """
    with_retries(lambda: api.create_repo(repo, private=private, exist_ok=True))
    if private and not with_retries(lambda: api.model_info(repo)).private:
        raise UserError(
            f"{repo} exists and is public, and should be private: make it so on the Hub, or choose "
            "another hub_repo"
        )


def commit_folder(
    api: HfApi, repo: str, folder: Path, keep: list[str], remove: list[str] | None = None
) -> None:
    """Upload files of `folder` that match `keep`, and remove others there, as one commit.

    Those that match `remove` go. No path of this machine is sent along (`without_paths`). By plain
    HTTP: Xet's client has retries of its own that no time limit of ours reaches (huggingface_hub
    2.4 with hf_xet 1.8 had not given up after ten minutes without its server).
    """
    options = {
        "allow_patterns": keep,
        "delete_patterns": remove,
        "commit_message": f"Add {keep[0].partition('/')[0]}",
    }
    usual, constants.HF_HUB_DISABLE_XET = constants.HF_HUB_DISABLE_XET, True
    try:
        with without_paths(folder, keep, repo) as copy:
            with_retries(lambda: api.upload_folder(repo_id=repo, folder_path=copy, **options))
    finally:
        constants.HF_HUB_DISABLE_XET = usual


# What a card says of where it stands; a push writes the repository's id in its place.
HERE = 'name = "."  # this folder'
FETCH = "In this folder:"


@contextlib.contextmanager
def without_paths(folder: Path, keep: list[str], repo: str) -> Iterator[Path]:
    """The files of `folder` that match `keep`, as links; those that may name paths rewritten.

    Of an absolute path the last part stays, and a card says `repo` for its folder. The seals then
    have the digests of what is uploaded.
    """
    with tempfile.TemporaryDirectory() as made:
        copy = Path(made)
        for name in files_of(folder):
            if any(fnmatch(name, part) for part in keep) and Path(name).name != SEAL:
                (copy / name).parent.mkdir(parents=True, exist_ok=True)
                write_copy(folder / name, copy / name, repo)
        for path in [folder / SEAL, *folder.glob(f"*/{SEAL}")]:
            place = path.relative_to(folder)
            if path.is_file() and any(fnmatch(place.as_posix(), part) for part in keep):
                seal_copy(path.parent, (copy / place).parent)
        yield copy


def write_copy(source: Path, copy: Path, repo: str) -> None:
    """Link to `source`, or write it without the paths of this machine."""
    if source.name == "README.md":
        name = repo.partition("/")[2]
        fetch = f"In a copy of this repository (`hf download {repo} --local-dir {name}`):"
        text = source.read_text(encoding="utf-8")
        text = text.replace(HERE, f'name = "{repo}"').replace(FETCH, fetch)
        copy.write_text(text, encoding="utf-8")
        return
    if source.name not in ("run.json", "adapter_config.json", "trainer_state.json"):
        copy.symlink_to(source.resolve())
        return
    said = json.loads(source.read_text(encoding="utf-8"))
    copy.write_text(json.dumps(last_parts(said), indent=2) + "\n", encoding="utf-8")


def last_parts(value: object) -> object:
    """`value` of JSON with every absolute path in it cut to its last part."""
    if isinstance(value, dict):
        return {key: last_parts(each) for key, each in value.items()}
    if isinstance(value, list):
        return [last_parts(each) for each in value]
    if isinstance(value, str) and re.match(r"[/~\\]|[A-Za-z]:[/\\]", value):
        return re.split(r"[/\\]", value.rstrip("/\\"))[-1]
    return value


def seal_copy(folder: Path, copy: Path) -> None:
    """Write the seal of `folder` into its `copy`, with the digests of what was rewritten."""
    said = read_seal(folder)
    written = [
        n for n in said.get("files", {}) if (copy / n).is_file() and not (copy / n).is_symlink()
    ]
    said.get("files", {}).update({name: file_hash(copy / name) for name in written})
    (copy / SEAL).write_text(json.dumps(said, indent=2) + "\n", encoding="utf-8")
