#!/usr/bin/env python3
"""What a disk gives to random direct reads, and the system's cache of a file's pages: dropped, and looked at.

    python3 bench/limited/disk.py FILE                 # bytes per second, and how much of the file is cached
    python3 bench/limited/disk.py FILE --drop          # drops the cached pages before

Reads of 1 MiB at random places, each place once, by 4 threads with O_DIRECT. Linux.
"""

import argparse
import contextlib
import ctypes
import errno
import json
import mmap
import os
import random
import sys
import threading
import time
from pathlib import Path

BLOCK = 1 << 20
LANES = 4
SECONDS = 2.0
PAGE = mmap.PAGESIZE
# Of fewer pieces of memory a virtual disk gives twice as much.
LARGE_PAGE = 2 << 20
PROT_READ, MAP_SHARED = 1, 1


class NoDirectReads(Exception):
    """The file system refuses O_DIRECT."""


class Places:
    """Places of a file in random order, each once; for several threads."""

    def __init__(self, size, block, seed):
        self.places = [block * at for at in range(size // block)]
        random.Random(seed).shuffle(self.places)
        self.lock = threading.Lock()

    def take(self):
        with self.lock:
            return self.places.pop() if self.places else None


def open_direct(path):
    try:
        return os.open(path, os.O_RDONLY | os.O_DIRECT)
    except OSError as error:
        if error.errno == errno.EINVAL:
            raise NoDirectReads(f"the file system of {path} refuses O_DIRECT; put the file on another disk") from error
        raise


def in_large_pages(area, size):
    """A part of a map that starts at a large page, and lies in large pages where the system has them."""
    if hasattr(mmap, "MADV_HUGEPAGE"):
        # Refused where the kernel has none; the map is right as it is.
        with contextlib.suppress(OSError):
            area.madvise(mmap.MADV_HUGEPAGE)
    first = ctypes.c_char.from_buffer(area)
    skip = -ctypes.addressof(first) % LARGE_PAGE
    del first
    part = memoryview(area)[skip : skip + size]
    # Pages are there when they have been written.
    part[:] = bytes(size)
    return part


def bandwidth(path, seconds=SECONDS, lanes=LANES, block=BLOCK, seed=None):
    """Bytes per second of random direct reads from a file."""
    places = Places(os.stat(path).st_size, block, seed)
    handles = [open_direct(path) for _ in range(lanes)]
    maps = [mmap.mmap(-1, 2 * LARGE_PAGE + block) for _ in range(lanes)]
    buffers = [in_large_pages(one, block) for one in maps]
    done, failed = [0] * lanes, []
    start = time.perf_counter()

    def lane(at):
        try:
            while time.perf_counter() - start < seconds and (place := places.take()) is not None:
                done[at] += os.preadv(handles[at], [buffers[at]], place)
        except OSError as error:
            failed.append(error)

    threads = [threading.Thread(target=lane, args=(at,)) for at in range(lanes)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    took = time.perf_counter() - start
    for handle in handles:
        os.close(handle)
    if failed:
        raise failed[0]
    if not sum(done):
        raise ValueError(f"{path} is smaller than {block} bytes: nothing to measure")
    return sum(done) / took


def window_file(path):
    """The setting that says how much the system reads around a page that is missing from a mapped file; None where there is none."""
    number = os.stat(path).st_dev
    at = Path(f"/sys/dev/block/{os.major(number)}:{os.minor(number)}")
    found = [folder / "queue" / "read_ahead_kb" for folder in (at, at.resolve().parent)]
    return next((window for window in found if window.is_file()), None)


def window_kib(path):
    """That setting, in KiB; None where the system does not say."""
    window = window_file(path)
    return int(window.read_text()) if window else None


@contextlib.contextmanager
def window_of(path, kib):
    """Another window of reading ahead for a while, for everything on that disk; None leaves it as it is. Needs root."""
    if kib is None:
        yield
        return
    window = window_file(path)
    if window is None:
        raise OSError(errno.ENOENT, f"the system has no window of reading ahead for {path}")
    before = window.read_text()
    window.write_text(str(kib))
    try:
        yield
    finally:
        window.write_text(before)


def cached_bytes(path):
    """Bytes of a file that the system holds in its cache."""
    size = os.stat(path).st_size
    if size == 0:
        return 0
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
    libc.mincore.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_char_p]
    libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    handle = os.open(path, os.O_RDONLY)
    try:
        at = libc.mmap(None, size, PROT_READ, MAP_SHARED, handle, 0)
    finally:
        os.close(handle)
    if at in (None, ctypes.c_void_p(-1).value):
        raise OSError(ctypes.get_errno(), f"{path} cannot be mapped")
    try:
        pages = ctypes.create_string_buffer(-(-size // PAGE))
        if libc.mincore(at, size, pages) != 0:
            raise OSError(ctypes.get_errno(), f"mincore of {path} failed")
        return PAGE * sum(byte & 1 for byte in pages.raw[: len(pages)])
    finally:
        libc.munmap(at, size)


def drop_cache(path):
    """Drops a file's pages from the system's cache; returns the bytes that stayed, which other processes use."""
    with open(path, "rb") as handle:
        os.fsync(handle.fileno())
        for _ in range(20):
            os.posix_fadvise(handle.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            left = cached_bytes(path)
            if left == 0:
                return 0
            time.sleep(0.1)
    return left


def main():
    parser = argparse.ArgumentParser(description="What a disk gives to random direct reads of a file.")
    parser.add_argument("file", type=Path)
    parser.add_argument("--drop", action="store_true", help="drop the file's cached pages before")
    parser.add_argument("--seconds", type=float, default=SECONDS)
    parser.add_argument("--lanes", type=int, default=LANES)
    parser.add_argument("--block", type=int, default=BLOCK, help="bytes of one read, a multiple of 4096")
    args = parser.parse_args()
    if not args.file.is_file():
        sys.exit(f"disk.py: {args.file} is no file")
    try:
        if args.drop:
            drop_cache(args.file)
        rate = bandwidth(args.file, args.seconds, args.lanes, args.block)
    except (NoDirectReads, OSError, ValueError) as error:
        sys.exit(f"disk.py: {error}")
    print(json.dumps({"bytes_per_s": round(rate), "cached_bytes": cached_bytes(args.file), "window_kib": window_kib(args.file)}))


if __name__ == "__main__":
    main()
