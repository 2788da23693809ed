"""What a folder holds, to be compared before and after."""

import hashlib
from pathlib import Path


def checksums(folder: Path) -> dict[str, str]:
    """SHA-256 of every file under `folder` by its relative name."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in files
    }
