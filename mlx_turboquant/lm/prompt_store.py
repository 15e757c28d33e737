"""A folder of prompts that were read once: packed caches, found again by their tokens.

Every entry is one file, which says all about itself: its tokens, and the model and the settings
that its cache belongs to. There is no index to keep in step; a store reads what the headers of the
files say. Several processes can share a folder: a file appears and disappears whole.
"""

import base64
import contextlib
import copy
import fcntl
import hashlib
import json
import logging
import os
import shutil
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.models.cache import can_trim_prompt_cache, make_prompt_cache, trim_prompt_cache

from ..cache.single import TurboQuantKVCache
from ..files import write_json
from ..stored_arrays import Damaged, read_header
from .compressible import flat_caches
from .profile import fingerprint
from .prompt_cache import load_prompt_cache, save_prompt_cache

FORMAT_VERSION = 2
DEFAULT_SIZE = 20 * 10**9
# Fewer tokens are read again faster than they are found.
LEAST_TOKENS = 256
# Tokens between two caches that are kept of a prompt which cannot be cut back.
CHECKPOINT_TOKENS = 4096
# A cache is written so many seconds after its request, unless one that begins with it has come.
WRITE_DELAY = 5.0
# Of a prompt, what people who list it are shown.
SHOWN_TOKENS = 24
_KEY_ATTRIBUTE = "_mlx_turboquant_store_key"
_ABOUT = "store.json"
_LOCK = ".lock"
_SUFFIX = ".safetensors"
# Folders in which entries are written.
_UNFINISHED = f".{'[0-9a-f]' * 32}-*"

_log = logging.getLogger("mlx_turboquant")


class Entry(NamedTuple):
    """One file: the first ``tokens`` of a text, read by a model with certain settings.

    ``key`` names model and settings. An entry that ``can_trim`` also serves texts that begin as
    its own does. ``used`` is when it was last written or found, in seconds, 0 if nobody knows.
    """

    file: Path
    key: str
    tokens: np.ndarray
    can_trim: bool
    nbytes: int
    used: float
    model: str
    beginning: str


class _Pending(NamedTuple):
    """A cache that is to be written at ``due``."""

    key: str
    tokens: np.ndarray
    can_trim: bool
    cache: list[Any]
    model: nn.Module
    metadata: dict[str, str]
    due: float


class PromptStore:
    """The prompts in a folder, of at most ``size`` bytes; least recently used ones go first.

    Caches are written by a thread of its own, ``delay`` seconds after they are kept.

    Raises:
        ValueError: a path that is no folder, a size that is none, or a store of a newer version.
        OSError: a folder that cannot be made or written to.
    """

    def __init__(self, folder: str | Path, size: int = DEFAULT_SIZE, delay: float = WRITE_DELAY):
        if size <= 0:
            raise ValueError(f"A store of {size} bytes holds nothing: use a size as 20GB.")
        self.folder = _prepared(Path(folder).expanduser())
        self.size = size
        self._delay = delay
        # Headers that were read, by name, inode and size of a file.
        self._known: dict[tuple[str, int, int], Entry] = {}
        self._pending: list[_Pending] = []
        self._is_closing = False
        # Of what follows and precedes it: requests keep caches, one thread writes them.
        self._changed = threading.Condition()
        self._writer: threading.Thread | None = None
        self._counts = dict.fromkeys(("found_tokens", "written_bytes", "written", "removed"), 0)

    def entries(self) -> list[Entry]:
        """All entries in the folder, the most recently used first.

        Files that are damaged are removed, with a warning.
        """
        found, known = [], {}
        for file in self.files():
            try:
                status = file.stat()
                identity = (file.name, status.st_ino, status.st_size)
                entry = self._known.get(identity) or _read_entry(file)
            except ValueError as error:
                if file.exists():  # and was not removed by another process
                    self._remove_damaged(file, error)
                continue
            except FileNotFoundError:
                continue
            known[identity] = entry
            # What seems to be used in the future is of a clock that was wrong.
            used = status.st_mtime if status.st_mtime <= time.time() else 0.0
            found.append(entry._replace(nbytes=status.st_size, used=used))
        self._known = known
        return sorted(found, key=lambda entry: entry.used, reverse=True)

    def find(
        self, model: nn.Module, tokens: list[int], least: int = 0, scope: str = ""
    ) -> tuple[list[Any], int] | None:
        """A cache of a known beginning of ``tokens``, and how many they are: more than ``least``.

        It is the longest beginning that is known; one token at least is left to be read. What was
        kept in one ``scope`` is not found in another one.
        """
        wanted, key = np.asarray(tokens, np.uint32), key_of(model, scope)
        candidates = []
        for entry in (each for each in self.entries() if each.key == key):
            common = min(_common(entry.tokens, wanted), len(wanted) - 1)
            if common > least and (entry.can_trim or common == len(entry.tokens)):
                candidates.append((common, entry))
        for common, entry in sorted(candidates, key=lambda each: each[0], reverse=True):
            cache = self._load(entry, model, common)
            if cache is not None:
                self._counts["found_tokens"] += common
                return cache, common
        return None

    def _load(self, entry: Entry, model: nn.Module, count: int) -> list[Any] | None:
        """The cache of the first ``count`` tokens of an entry, None if it cannot be read."""
        tokens = count if count < len(entry.tokens) else None
        try:
            cache, metadata = load_prompt_cache(entry.file, model, True, tokens)
            if _tokens(metadata["tokens"]).tolist() != entry.tokens.tolist():
                raise Damaged(entry.file, "it is another file than it was")
            _touch(entry.file)
            return cache
        except (ValueError, KeyError) as error:
            if entry.file.exists():
                self._remove_damaged(entry.file, error)
        except OSError as error:
            _log.warning("%s cannot be read (%s): the prompt is read again.", entry.file, error)
        return None

    def keep(
        self,
        model: nn.Module,
        tokens: list[int],
        cache: list[Any],
        name: str = "",
        text: str = "",
        scope: str = "",
    ) -> None:
        """Write a cache of ``tokens`` in the background, if it is worth it.

        The last tokens may not be in the cache yet, or the cache has more. ``name`` of the model
        and the beginning of the ``text`` are for people.
        """
        held, can_trim = _count(cache), can_trim_prompt_cache(cache)
        count = min(held, len(tokens))
        if count < LEAST_TOKENS or (count < held and not can_trim):
            return
        if sum(layer.nbytes for layer in cache) > self.size:
            return
        kept = np.asarray(tokens[:count], np.uint32)
        metadata = {"store": str(FORMAT_VERSION), "key": key_of(model, scope), "name": name}
        metadata |= {"tokens": base64.b64encode(kept.tobytes()).decode(), "text": text[:80]}
        metadata |= {"can_trim": str(int(can_trim))}
        mx.eval([layer.state for layer in cache])  # in the thread that knows how
        own = copy.deepcopy(cache)
        trim_prompt_cache(own, held - count)
        due = time.monotonic() + self._delay
        pending = _Pending(metadata["key"], kept, can_trim, own, model, metadata, due)
        with self._changed:
            if any(_covers(each, pending) for each in self._pending):
                return
            self._pending = [each for each in self._pending if not _covers(pending, each)]
            self._pending.append(pending)
            if self._writer is None:
                self._writer = threading.Thread(target=self._write_pending, daemon=True)
                self._writer.start()
            self._changed.notify_all()

    def checkpoints(
        self, model: nn.Module, tokens: list[int], known: int, cache: list[Any], **about: str
    ) -> Callable[[int, int], None]:
        """The ``prompt_progress_callback`` of mlx-lm that keeps a cache while it reads ``tokens``.

        A cache that cannot be cut back is kept every 4 096 tokens. ``known`` tokens are in it at
        first; ``about`` are the texts of :meth:`keep`.
        """
        kept = known

        def progress(processed: int, total: int) -> None:
            nonlocal kept
            count = known + processed
            is_due = processed < total and count - kept >= CHECKPOINT_TOKENS
            if is_due and not can_trim_prompt_cache(cache):
                self.keep(model, tokens[:count], cache, **about)
                kept = count

        return progress

    def close(self) -> None:
        """Write what is pending, and stop."""
        with self._changed:
            self._is_closing = True
            self._changed.notify_all()
        if self._writer is not None:
            self._writer.join()

    def _write_pending(self) -> None:
        while True:
            with self._changed:
                while not self._is_closing and (wait := self._seconds_to_wait()) != 0:
                    self._changed.wait(wait)
                if not self._pending:
                    return
                pending = min(self._pending, key=lambda each: each.due)
                self._pending.remove(pending)
            try:
                self._write(pending)
            except (OSError, ValueError) as error:
                _log.warning("A prompt of %d tokens is not kept: %s", len(pending.tokens), error)

    def _seconds_to_wait(self) -> float | None:
        """Until something is due; None if nothing is pending."""
        if not self._pending:
            return None
        return max(0.0, min(each.due for each in self._pending) - time.monotonic())

    def _write(self, pending: _Pending) -> None:
        entries = self.entries()
        if any(_covers(entry, pending) for entry in entries):
            return
        file = self.folder / f"{uuid.uuid4().hex}{_SUFFIX}"
        with self._locked(fcntl.LOCK_SH):
            save_prompt_cache(file, pending.cache, pending.model, pending.metadata)
            file.chmod(0o600)
            self._counts["written"] += 1
            self._counts["written_bytes"] += file.stat().st_size
        with self._locked():
            for entry in entries:
                if _covers(pending, entry):
                    entry.file.unlink(missing_ok=True)
        self.prune(self.size)

    def prune(self, size: int) -> int:
        """Remove the least recently used entries beyond ``size`` bytes; returns how many."""
        with self._locked():
            for unfinished in self.folder.glob(_UNFINISHED):  # of a process that was killed
                shutil.rmtree(unfinished, ignore_errors=True)
            entries = self.entries()
            total, removed = sum(entry.nbytes for entry in entries), 0
            while total > size:
                entry = entries.pop()
                entry.file.unlink(missing_ok=True)
                total -= entry.nbytes
                removed += 1
        self._counts["removed"] += removed
        return removed

    def check(self) -> Iterator[bool]:
        """Read every file, and tell whether it is as it was written; if not, it is removed."""
        for file in self.files():
            try:
                _read_entry(file)
                load_prompt_cache(file)
                yield True
            except ValueError as error:
                self._remove_damaged(file, error)
                yield False

    def files(self) -> list[Path]:
        """The files of all entries, whatever is in them."""
        return sorted(self.folder.glob(f"*{_SUFFIX}"))

    def statistics(self) -> dict[str, int]:
        """Entries and bytes in the folder, and what this process found, wrote and removed."""
        entries = self.entries()
        nbytes = sum(entry.nbytes for entry in entries)
        held = {"entries": len(entries), "bytes": nbytes, "size": self.size}
        return {**held, "pending": len(self._pending), **self._counts}

    def _remove_damaged(self, file: Path, error: Exception) -> None:
        _log.warning("%s is removed from the store: %s", file.name, error)
        with contextlib.suppress(OSError):
            file.unlink(missing_ok=True)

    @contextlib.contextmanager
    def _locked(self, kind: int = fcntl.LOCK_EX) -> Iterator[None]:
        """Among all processes: many that write to this folder, or one that removes from it."""
        with (self.folder / _LOCK).open("w") as lock:
            fcntl.flock(lock, kind)
            yield


def key_of(model: nn.Module, scope: str = "") -> str:
    """A hash of a model, of the settings of the caches that it makes, and of a scope."""
    key = getattr(model, _KEY_ATTRIBUTE, None)
    if key is None:
        digest = hashlib.sha256(fingerprint(model).encode())
        for layer in flat_caches(make_prompt_cache(model)):
            digest.update(type(layer).__name__.encode())
            if isinstance(layer, TurboQuantKVCache):
                digest.update(repr(layer.settings).encode())
        key = digest.hexdigest()[:32]
        setattr(model, _KEY_ATTRIBUTE, key)
    return hashlib.sha256(f"{key} {scope}".encode()).hexdigest()[:32] if scope else key


def _prepared(folder: Path) -> Path:
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is not a folder: give the folder of a prompt store.")
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    about = folder / _ABOUT
    try:
        version = json.loads(about.read_text(encoding="utf-8"))["format"]
    except (FileNotFoundError, ValueError, TypeError, KeyError):
        version = None
    if type(version) is int and version > FORMAT_VERSION:
        raise ValueError(
            f"{folder} is a prompt store of version {version}, this is version {FORMAT_VERSION}: "
            "use another folder, or a newer mlx_turboquant."
        )
    if version != FORMAT_VERSION:
        write_json(about, {"format": FORMAT_VERSION})
    with (folder / _LOCK).open("a"):
        return folder  # which can be written to


def _read_entry(file: Path) -> Entry:
    """What the header of a file says; ValueError if it is none of ours."""
    texts = read_header(file)["__metadata__"]
    try:
        return Entry(
            file,
            texts["0.key"],
            _tokens(texts["0.tokens"]),
            texts["0.can_trim"] == "1",
            0,
            0.0,
            texts["0.name"],
            texts["0.text"],
        )
    except (KeyError, ValueError) as error:
        raise Damaged(file, f"{error} is not there") from error


def _tokens(text: str) -> np.ndarray:
    return np.frombuffer(base64.b64decode(text, validate=True), np.uint32)


def _common(first: np.ndarray, second: np.ndarray) -> int:
    """How many tokens two texts begin with alike."""
    count = min(len(first), len(second))
    different = np.flatnonzero(first[:count] != second[:count])
    return int(different[0]) if different.size else count


def _covers(entry: "Entry | _Pending", other: "Entry | _Pending") -> bool:
    """Whether an entry serves all that another one would."""
    count = len(other.tokens)
    enough = entry.can_trim or len(entry.tokens) == count
    return entry.key == other.key and enough and _common(entry.tokens, other.tokens) == count


def _count(cache: list[Any]) -> int:
    """How many tokens a cache has, 0 if its layers do not agree."""
    counts = {layer.offset for layer in flat_caches(cache) if isinstance(layer, TurboQuantKVCache)}
    return counts.pop() if len(counts) == 1 else 0


def _touch(file: Path) -> None:
    """Note that an entry was used; where that is not possible it only seems older."""
    with contextlib.suppress(OSError):
        os.utime(file)
