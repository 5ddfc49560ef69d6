"""What torchrun tells its workers by environment variables, and what the workers of a machine tell by files.

Loads nothing heavy: the command line asks before it does anything else.
"""

from __future__ import annotations

import hashlib
import os
import sys
from pathlib import Path


def rank_and_count() -> tuple[int, int]:
    """Number of this process, and how many torchrun started; (0, 1) without it."""
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


def is_main() -> bool:
    """Whether this is the first of the processes that torchrun started, which prints and writes."""
    return rank_and_count()[0] == 0


def is_restarted() -> bool:
    """Whether torchrun started this worker again after a failure, or because machines came or went.

    The first call of a worker that is not restarted leaves a note for a later one.
    """
    return _RESTARTED


def say_once(text: str) -> None:
    """Print a line on standard error, unless another worker of this machine, or an earlier start, printed it."""
    folder = _job_folder()
    if folder is None or _note(folder / f"afa_said_{hashlib.sha256(text.encode()).hexdigest()[:16]}"):
        print(text, file=sys.stderr, flush=True)


def end_job(status: int) -> int:
    """Note that starting again would change nothing, such as after a mistake of the user; returns the status."""
    folder = _job_folder()
    if folder is not None and status:
        _note(folder / "afa_ended", str(status))
    return status


def ended_with() -> int | None:
    """The status that `end_job` noted before torchrun started this worker again; None if there is none."""
    folder = _job_folder()
    if folder is not None and is_restarted() and (folder / "afa_ended").is_file():
        return int((folder / "afa_ended").read_text() or 2)  # empty where the disk was full
    return None


def _job_folder() -> Path | None:
    """Folder that all workers of a torchrun on this machine share, whatever their start; None without torchrun."""
    place = os.environ.get("TORCHELASTIC_ERROR_FILE", "")  # JOB/attempt_0/RANK/error.json
    folder = Path(place).parents[2] if place else None
    return folder if folder is not None and folder.is_dir() else None


def _note(path: Path, text: str = "") -> bool:
    """Write a file; False where it is there already."""
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(text)
    except OSError:
        return not path.exists()  # where no note can be left, it is better to speak twice than never
    return True


def _find_restart() -> bool:
    folder = _job_folder()
    if folder is not None:
        began = folder / f"afa_began_{os.environ.get('LOCAL_RANK', '0')}"
        if not _note(began, str(os.getpid())) and began.read_text() != str(os.getppid()):  # not a child of the worker
            return True
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0


_RESTARTED = _find_restart()
