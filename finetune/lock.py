"""One run folder, one process: a lock that a dead process does not hold, and a heartbeat."""

from __future__ import annotations

import errno
import json
import os
import socket
import threading
import time
from pathlib import Path
from typing import IO

import psutil

from finetune.files import Record, checkpoints, read_seal
from finetune.machine import processes
from qlora_helpers import UserError

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None  # type: ignore[assignment]

FILE = ".in-use"  # it also marks a folder as one of this notebook's runs
BEAT, STALE = 20, 90  # seconds between two heartbeats, and after which a holder is taken for gone
# What a run writes into its folder by plain names, besides checkpoints and the adapter.
WRITTEN = {
    *("data", "data.rejected.jsonl", "plan.json", "lengths.png", "curves.png", "answers.jsonl"),
    *(
        "run.json",
        "resumed.json",
        "held_out.json",
        "held_out.json.part",
        "report.html",
        "gguf",
        "notebook.ipynb",
        "notebook.html",
        "runs",
    ),
}


def is_written(part: str) -> bool:
    """Whether a run writes something of this name directly into its folder."""
    return part in WRITTEN or part.startswith(("checkpoint", "final_model"))


def is_run(folder: Path) -> bool:
    """Whether `folder` is a run's: it was claimed once, or something sealed is in it."""
    parts = [*checkpoints(folder), folder / "final_model"]
    return (folder / FILE).is_file() or any(read_seal(part) for part in parts)


def require_own(folder: Path) -> None:
    """Raise `UserError` if a run in `folder` would write over files that are not a run's."""
    if folder.exists() and not folder.is_dir():
        raise UserError(f"output_dir / run_name is {folder}, a file: choose another run_name")
    theirs = sorted(name for name in WRITTEN if (folder / name).exists())
    if theirs and not is_run(folder):
        raise UserError(
            f"output_dir / run_name is {folder}, where files stand that this notebook did not "
            f"write ({', '.join(theirs)}). Choose another run_name or output_dir: nothing was "
            "changed."
        )


class Claim:
    """A run folder held by this process, until `release` or its end.

    Where the file system has locks, a second process of this machine is refused by one; a second
    machine, and any process where there are none (Google Drive), by the heartbeat: host, process
    and time in the file `.in-use`, written anew every `BEAT` seconds.
    """

    def __init__(self, folder: Path):
        self.folder, self.over = folder, threading.Event()
        self.file = (folder / FILE).open("a+", encoding="utf-8")
        try:
            take(folder, self.file)
        except BaseException:
            self.file.close()
            raise
        self.beat()
        threading.Thread(target=self.keep_beating, daemon=True).start()

    def beat(self) -> None:
        """Write who holds the folder, and when."""
        self.file.seek(0)
        self.file.truncate()
        told = {"host": socket.gethostname(), "pid": os.getpid(), "time": time.time()}
        self.file.write(json.dumps(told))
        self.file.flush()

    def keep_beating(self) -> None:
        """The heartbeat's thread."""
        while not self.over.wait(BEAT):
            try:
                self.beat()
            except OSError:  # the disk is full, or Drive away for a moment
                continue
            except ValueError:  # the file is closed
                return

    def still_there(self) -> bool:
        """Whether the file that is held is the one in the folder now."""
        try:
            return os.path.samestat(os.fstat(self.file.fileno()), (self.folder / FILE).stat())
        except OSError:
            return False

    def release(self) -> None:
        """Let another have the folder."""
        self.over.set()
        self.file.seek(0)
        self.file.truncate()
        self.file.close()


def take(folder: Path, file: IO[str]) -> None:
    """Lock a run folder's file; raises `UserError` if another process has it, or beats in it."""
    locks = fcntl is not None
    try:
        if locks:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
            raise refusal(folder, read(file)) from None
        locks = False  # this file system has none
    if told := held_by_another(read(file), locks):
        raise refusal(folder, told)


def refusal(folder: Path, told: Record) -> UserError:
    """What the second of two is told."""
    ago = max(0, time.time() - told.get("time", time.time()))
    return UserError(
        f"{folder} is in use by another notebook: process {told.get('pid', '?')} on "
        f"{told.get('host', 'another machine')}, seen {ago:.0f} s ago. Let it end, or shut that "
        f"kernel down, or choose another run_name. If that machine is gone, run this again in "
        f"{STALE} s. Nothing was changed."
    )


def read(file: IO[str]) -> Record:
    """Who holds a folder, as far as its file says."""
    file.seek(0)
    try:
        found = json.loads(file.read())
    except ValueError:
        return {}
    known = isinstance(found, dict) and isinstance(found.get("time"), int | float)
    return found if known else {}


def held_by_another(told: Record, locks: bool) -> Record:
    """`told` if another machine's heartbeat is fresh, or without `locks` another process's."""
    if abs(time.time() - told.get("time", 0)) > STALE:  # another machine's clock may be ahead
        return {}
    if told.get("host") != socket.gethostname():
        return told
    pid = told.get("pid", 0)
    return told if not locks and pid != os.getpid() and psutil.pid_exists(pid) else {}


HELD: dict[Path, Claim] = {}  # what this process holds


def claim(folder: Path) -> None:
    """Hold a run folder, made if it is not there, and let go of any other.

    Again it does nothing, unless the folder was deleted in the meantime.

    Raises `UserError` if another process holds it, or if it is not a run's. Of several processes
    that train together the first does it.
    """
    if processes()[0] or (folder in HELD and HELD[folder].still_there()):
        return
    release()
    require_own(folder)
    folder.mkdir(parents=True, exist_ok=True)
    HELD[folder] = Claim(folder)


def release() -> None:
    """Let go of what this process holds."""
    while HELD:
        HELD.popitem()[1].release()


def require_unused(folder: Path) -> None:
    """Raise `UserError` if `folder` is not a run's or another process holds it; change nothing."""
    require_own(folder)
    if folder not in HELD and (folder / FILE).is_file():
        with (folder / FILE).open("a+", encoding="utf-8") as file:
            take(folder, file)
