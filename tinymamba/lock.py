"""A lock file that keeps a second process from writing the files of the first."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path
from socket import gethostname

from tinymamba.cli import UserError, grant_or_choose, say

NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.ENOTSUP)  # some network file systems


@contextlib.contextmanager
def hold_lock(file: Path, field: str, remedy: str, wait: bool = False) -> Iterator[None]:
    """Hold the lock `file`, which names this process.

    If another process holds it, that is a UserError, or this one waits for it if `wait`. The
    operating system frees the lock when its process ends, however it ends; only the file may stay,
    and is used again. A thread may hold a lock several times over. Without `file`'s folder there is
    nothing to lock.
    """
    from filelock import FileLock, Timeout

    if not file.parent.is_dir():
        yield
        return
    lock = FileLock(file, timeout=-1 if wait else 0, is_singleton=True, fallback_to_soft=False)
    try:
        lock.acquire()
    except Timeout:
        problem = f"is in use by {read_holder(file)}"
        if not file.exists():  # a folder such as /proc, where nothing can be made
            problem, remedy = f"{file} cannot be written", "choose another folder"
        raise UserError(field, problem, remedy) from None
    except OSError as e:
        if e.errno not in NO_LOCKS:
            problem = f"{file} cannot be written ({e.strerror})"
            remedy = "choose another folder"
            if isinstance(e, PermissionError):
                remedy = grant_or_choose(file.parent)
            raise UserError(field, problem, remedy) from None
        say(f"warning: {file.parent} has no locks ({e.strerror}): let no second run write there")
        yield
        return
    try:
        with contextlib.suppress(OSError):  # a full disk; the lock holds without its text
            file.write_text(f"process {os.getpid()} on {gethostname()}", encoding="utf-8")
        yield
    finally:
        if lock.lock_counter == 1:
            with contextlib.suppress(OSError):
                file.unlink()  # while it is held: who waits for it will see that it is gone
        lock.release()


def read_holder(file: Path) -> str:
    """What the lock file says of the process that holds it."""
    try:
        return file.read_text(encoding="utf-8").strip() or "another process"
    except (OSError, UnicodeDecodeError):  # Windows lets nobody read a locked file
        return "another process"
