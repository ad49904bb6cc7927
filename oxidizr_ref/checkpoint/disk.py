"""Every call to the file system that checkpoints make, in one place: so that tests can fail, stop and record each one.

Three rules hold for whatever is written here:

* A new file is made under a temporary name that was free, never through a link, and gets its own name only when its bytes
  are on the disk (`create`, `write_at`, `flush`, `rename`).
* A name is on the disk only when its directory is (`sync_directory`); that of a directory, when its parent is.
* After a failed `flush` nothing is known about a file: it is thrown away, never flushed again.

All functions raise OSError. macOS and Windows take branches of their own; those are tested with the functions of the
system substituted, never on the systems themselves.
"""

from __future__ import annotations

import errno
import os
import shutil
import stat
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeAlias

fcntl: Any
msvcrt: Any
try:
    import fcntl
except ImportError:  # Windows
    fcntl = None
try:
    import msvcrt
except ImportError:  # everywhere else
    msvcrt = None

Buffer: TypeAlias = bytes | memoryview

_NOT_SUPPORTED = (errno.EINVAL, errno.ENOTSUP, errno.ENOTTY)
_one_position = threading.Lock()  # where a file's position is shared by all threads


# --- one file ---------------------------------------------------------------------------------------------------------


def create(path: Path) -> int:
    """Open a new file for writing; what stands there under this (temporary) name is removed, never written through."""
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL
    try:
        return _open(path, flags, "O_NOFOLLOW")
    except FileExistsError:
        remove(path)
        return _open(path, flags, "O_NOFOLLOW")


@contextmanager
def reading(path: Path) -> Iterator[int]:
    """A descriptor of an existing regular file, closed afterwards. A pipe or a device is refused, not waited for."""
    descriptor = _open(path, os.O_RDONLY, "O_NONBLOCK")
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, "not a regular file", str(path))
        yield descriptor
    finally:
        os.close(descriptor)


def _open(path: Path, flags: int, *more: str) -> int:
    """A descriptor for bytes as they are, which other programs do not inherit; ``more``: flags not every system has."""
    names = (*more, "O_CLOEXEC", "O_BINARY", "O_NOINHERIT")
    return os.open(path, flags | sum(getattr(os, name, 0) for name in names), 0o666)


def size(descriptor: int) -> int:
    """Bytes in an open file."""
    return os.fstat(descriptor).st_size


def write_at(descriptor: int, data: Buffer, offset: int) -> None:
    """Write all of ``data`` at ``offset``, in as many calls as the system wants."""
    view = memoryview(data)
    while view:
        count = _write_some(descriptor, view, offset)
        if count <= 0:
            raise OSError(errno.EIO, "nothing could be written")
        view, offset = view[count:], offset + count


def _write_some(descriptor: int, data: memoryview, offset: int) -> int:
    if hasattr(os, "pwrite"):
        return os.pwrite(descriptor, data, offset)
    with _one_position:
        os.lseek(descriptor, offset, os.SEEK_SET)
        return os.write(descriptor, data)


def read_at(descriptor: int, into: memoryview, offset: int) -> int:
    """Fill ``into`` from ``offset`` on. Returns the bytes read: fewer only where the file ends."""
    done = 0
    while done < len(into):
        count = _read_some(descriptor, into[done:], offset + done)
        if count == 0:
            break
        done += count
    return done


def _read_some(descriptor: int, into: memoryview, offset: int) -> int:
    if hasattr(os, "preadv"):
        return os.preadv(descriptor, [into], offset)
    with _one_position:
        os.lseek(descriptor, offset, os.SEEK_SET)
        data = os.read(descriptor, len(into))
    into[: len(data)] = data
    return len(data)


def flush(descriptor: int) -> None:
    """Bring a file to the disk. macOS flushes the drive's own cache only when asked in a way of its own."""
    if hasattr(fcntl, "F_FULLFSYNC"):
        try:
            fcntl.fcntl(descriptor, fcntl.F_FULLFSYNC)
            return
        except OSError as error:
            if error.errno not in _NOT_SUPPORTED:  # some network drives know only fsync
                raise
    os.fsync(descriptor)


def forget_cached(descriptor: int, offset: int = 0, count: int = 0) -> None:
    """Ask the system to drop a part of a file (0, 0: all of it) from its cache, so that reading it again asks the disk.

    A part that was just written is only begun to be brought to the disk, which is what makes the `flush` at the end short.
    """
    if hasattr(os, "posix_fadvise"):
        with suppress(OSError):  # advice: a file system may not take it
            os.posix_fadvise(descriptor, offset, count, os.POSIX_FADV_DONTNEED)


def close(descriptor: int) -> None:
    """Close a descriptor."""
    os.close(descriptor)


@contextmanager
def new_file(path: Path, temporary: Path) -> Iterator[int]:
    """A descriptor of a new file, which replaces ``path`` in one instant when the context ends well, or else leaves nothing.

    Whoever writes must `flush`. When this returns, the name is on the disk too.
    """
    descriptor = create(temporary)
    try:
        try:
            yield descriptor
        finally:
            close(descriptor)
        rename(temporary, path)
    except BaseException:
        with suppress(OSError):
            remove(temporary)
        raise
    sync_directory(path.parent)


# --- names ------------------------------------------------------------------------------------------------------------


def rename(source: Path, target: Path) -> None:
    """Give a file another name, replacing what has it, in one instant."""
    os.replace(source, target)


def remove(path: Path) -> None:
    """Remove a file; one that is not there is fine."""
    try:
        os.unlink(path)
    except FileNotFoundError:
        return


def sync_directory(directory: Path) -> None:
    """Make the names in ``directory`` survive a power cut. Windows has no such call, nor do some network drives."""
    if os.name == "nt":
        return
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _NOT_SUPPORTED:
            raise
    finally:
        os.close(descriptor)


def make_directory(directory: Path) -> None:
    """Make a directory and those above it, each one's name on the disk before anything is put into it."""
    if directory.is_dir():
        return
    parent = directory.parent
    make_directory(parent)
    try:
        os.mkdir(directory)
    except FileExistsError:
        if not directory.is_dir():
            raise
    sync_directory(parent)


def exists(path: Path) -> bool:
    """Whether a regular file (or a link to one) is there."""
    try:
        return stat.S_ISREG(os.stat(path).st_mode)
    except (FileNotFoundError, NotADirectoryError):
        return False


def file_size(path: Path) -> int:
    """Bytes in a file; 0 where there is none."""
    try:
        return os.stat(path).st_size
    except FileNotFoundError:
        return 0


def names(directory: Path) -> list[str]:
    """The names of the regular files in a directory, sorted; none where there is no directory."""
    try:
        with os.scandir(directory) as entries:
            return sorted(entry.name for entry in entries if entry.is_file())
    except FileNotFoundError:
        return []


def free_bytes(directory: Path) -> int:
    """What is free for this user where ``directory`` is or would be made."""
    while not directory.exists():
        directory = directory.parent
    return shutil.disk_usage(directory).free


# --- small files ------------------------------------------------------------------------------------------------------


def read(path: Path) -> bytes:
    """A small file, whole."""
    with reading(path) as descriptor:
        data = memoryview(bytearray(size(descriptor)))
        return bytes(data[: read_at(descriptor, data, 0)])


def replace(path: Path, data: bytes) -> None:
    """Replace a small file: after this the new one is on the disk, and at any moment before, the old one or the new."""
    with new_file(path, temporary_of(path)) as descriptor:
        write_at(descriptor, data, 0)
        flush(descriptor)


def temporary_of(path: Path) -> Path:
    """Where `replace` writes what is to become ``path``. A process that died may have left it."""
    return path.with_name(f".{path.name}.tmp")


def append(path: Path, data: bytes, size_before: int) -> int:
    """Append to a file, made if need be, and return its new size. Nothing is flushed.

    size_before: the size the file should have. What is there beyond it was left by an append that failed, and is cut off.
    """
    with _writing(path, os.O_CREAT) as descriptor:
        end = size(descriptor)
        if end > size_before:
            os.ftruncate(descriptor, size_before)
            end = size_before
        write_at(descriptor, data, end)
    return end + len(data)


def flush_with_name(path: Path) -> None:
    """Bring a file to the disk that was appended to, and its name with it."""
    with _writing(path) as descriptor:
        flush(descriptor)
    sync_directory(path.parent)


@contextmanager
def _writing(path: Path, flags: int = 0) -> Iterator[int]:
    descriptor = _open(path, os.O_RDWR | flags)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


# --- one process a directory ------------------------------------------------------------------------------------------


class Lock:
    """A lock on a file, held until `release` or the end of the process, however it ends.

    It is advisory, and between machines as good as the file system's (most network file systems honour it).
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._descriptor: int | None = None

    def acquire(self) -> bool:
        """Take the lock; False when another process (or another lock in this one) has it.

        A holder may call this again, to be sure: a lock file that was deleted meanwhile guards nothing and is made anew.
        """
        if self._descriptor is not None and self._is_the_file(self._descriptor):
            return True
        self.release()
        descriptor = _open(self.path, os.O_RDWR | os.O_CREAT, "O_NOFOLLOW")
        try:
            taken = _try_lock(descriptor) and self._is_the_file(descriptor)
        except BaseException:
            os.close(descriptor)
            raise
        if taken:
            self._descriptor = descriptor
        else:
            os.close(descriptor)
        return taken

    def release(self) -> None:
        """Let go, if held. The file stays: removing it could take the lock from under another process."""
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is not None:
            with suppress(OSError):  # it is closed, whatever the system says of it
                os.close(descriptor)

    def _is_the_file(self, descriptor: int) -> bool:
        try:
            return os.path.samestat(os.fstat(descriptor), os.stat(self.path))
        except FileNotFoundError:
            return False


def _try_lock(descriptor: int) -> bool:
    try:
        if fcntl is not None:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        else:
            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
    except OSError as error:
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES, errno.EDEADLK):
            return False
        raise
    return True
