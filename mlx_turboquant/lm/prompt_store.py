"""A folder of prefilled prompts: packed caches that are found again by their tokens.

Every entry is one file, whose header describes it: its tokens, model and settings. No index has to
be kept consistent; a store reads the headers of the files. Several processes can share a folder,
because files are created and removed atomically.
"""

import base64
import contextlib
import copy
import fcntl
import hashlib
import json
import logging
import os
import re
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
from mlx_lm.models.cache import can_trim_prompt_cache, trim_prompt_cache

from ..cache.single import TurboQuantKVCache
from ..files import make_folder, read_errors, write_errors, write_json
from ..stored_arrays import Damaged, StoredFile
from .compressible import flat_caches
from .identity import description
from .prompt_cache import identity_of, load_prompt_cache, write_prompt_cache

FORMAT_VERSION = 3
# Prefill of fewer tokens is faster than finding them.
LEAST_TOKENS = 256
# Tokens between the caches that are kept of one prompt if a cache cannot be cut back.
CHECKPOINT_TOKENS = 4096
# Tokens of a prompt that a listing shows.
SHOWN_TOKENS = 24
_ABOUT = "store.json"
_OWN = {"format": FORMAT_VERSION, "made_by": "mlx_turboquant"}
_LOCK = ".lock"
_SESSIONS = "sessions"
_SUFFIX = ".safetensors"
# The names of entries: files with other names may belong to somebody else.
_DIGITS = "[0-9a-f]" * 32

_log = logging.getLogger("mlx_turboquant")

# The ``prompt_progress_callback`` of mlx-lm: tokens prefilled so far, and in total.
Progress = Callable[[int, int], None]


class Entry(NamedTuple):
    """One file: the cache of the first ``tokens`` of a prompt, for one model and settings.

    ``key`` identifies model, settings and scope. An entry that ``can_trim`` also serves prompts
    that share only its beginning. ``used`` is the last write or use in seconds, 0 if unknown.
    ``settings`` are those of a conversation.
    """

    file: Path
    key: str
    tokens: np.ndarray
    can_trim: bool
    nbytes: int
    used: float
    model: str
    beginning: str
    settings: dict[str, Any] = {}

    @property
    def name(self) -> str:
        """The name of a conversation, or the first digits of a prompt's file name."""
        stem = self.file.stem
        return stem if self.file.parent.name == _SESSIONS else stem[:8]


class _Pending(NamedTuple):
    """A cache that is to be written at ``due``."""

    key: str
    tokens: np.ndarray
    can_trim: bool
    cache: list[Any]
    metadata: dict[str, str]
    due: float


class PromptStore:
    """The prompts in a folder, of at most ``size`` bytes; the least recently used are evicted.

    A thread writes each cache ``delay`` seconds after it is kept, unless one that covers it is kept
    meanwhile. The folder also holds conversations. They do not count towards ``size``, and are
    removed only on request.

    Raises:
        ValueError: a path that is not a folder, a size of 0 or less, or a store of another version.
        OSError: the folder cannot be made or written to.
    """

    def __init__(self, folder: str | Path, size: int = 20 * 10**9, delay: float = 5.0):
        if size <= 0:
            raise ValueError(f"A store of {size} bytes holds nothing: use a size such as 20GB.")
        self.folder = folder = Path(folder).expanduser()
        if folder.exists() and not folder.is_dir():
            raise ValueError(f"{folder} is not a folder: give the folder of a prompt store.")
        make_folder(folder, 0o700)
        version = version_of(folder)
        if version not in (None, FORMAT_VERSION):
            raise ValueError(
                f"{folder} is a prompt store of version {version}, this is version "
                f"{FORMAT_VERSION}: use another folder, or clear it with `mlx_turboquant store`."
            )
        if version is None:
            write_json(folder / _ABOUT, _OWN)
        with write_errors(folder):
            (folder / _LOCK).open("a").close()
        self.size = size
        self._delay = delay
        # Headers that were read, by name, inode and size of a file.
        self._known: dict[tuple[str, int, int], Entry] = {}
        self._pending: list[_Pending] = []
        self._is_closing = False
        # Guards _pending, _is_closing and _writer: requests keep caches, one thread writes them.
        self._changed = threading.Condition()
        self._writer: threading.Thread | None = None
        self._counts = dict.fromkeys(("found_tokens", "written_bytes", "written", "removed"), 0)

    def entries(self) -> list[Entry]:
        """All entries in the folder, the most recently used first.

        Damaged files are removed with a warning.
        """
        found, known = [], {}
        for file in self.files():
            with self._without_damaged(file):
                status = file.stat()
                identity = (file.name, status.st_ino, status.st_size)
                entry = known[identity] = self._known.get(identity) or _read_entry(file)
                # A time in the future comes from a wrong clock.
                used = status.st_mtime if status.st_mtime <= time.time() else 0.0
                found.append(entry._replace(nbytes=status.st_size, used=used))
        self._known = known
        return sorted(found, key=lambda entry: entry.used, reverse=True)

    def sessions(self) -> list[Entry]:
        """All conversations in the folder, latest first, including damaged ones."""
        found = []
        for file in (self.folder / _SESSIONS).glob(f"*{_SUFFIX}"):
            tokens, model, settings = np.zeros(0, np.uint32), "", {}
            try:
                status = file.stat()
            except OSError:  # another process has deleted it, or it is a link to nothing
                continue
            try:
                texts = StoredFile(file).metadata
                chat = json.loads(texts["0.chat"])
                tokens = np.asarray(chat["tokens"], np.uint32)
                model, settings = _label(chat["model"], texts), dict(chat.get("settings") or {})
                first = (x["content"] for x in chat["messages"] if x["role"] == "user")
                text = str(next(first, ""))
            except Exception as error:  # a crafted file may raise anything
                text = f"cannot be read: {error}"
            about = status.st_size, status.st_mtime, model, text, settings
            found.append(Entry(file, "", tokens, False, *about))
        return sorted(found, key=lambda entry: entry.used, reverse=True)

    def session_file(self, name: str) -> Path:
        """The file of the conversation with this name."""
        folder = self.folder / _SESSIONS
        make_folder(folder, 0o700)
        return folder / f"{name}{_SUFFIX}"

    def writing(self) -> contextlib.AbstractContextManager[None]:
        """Hold a lock under which no process removes unfinished files."""
        return _locked(self.folder, fcntl.LOCK_SH)

    def find(
        self, model: nn.Module, tokens: list[int], like: list[Any], least: int = 0, scope: str = ""
    ) -> tuple[list[Any], int] | None:
        """A cache of the longest known beginning of ``tokens``, and its number of tokens.

        It has the settings of ``like``, a cache that was made for the model. The beginning has more
        than ``least`` tokens and leaves at least one to prefill, or the result is None. Prompts
        that were kept in another ``scope`` are not found.
        """
        wanted, key = np.asarray(tokens, np.uint32), key_of(model, like, scope)
        candidates = []
        for entry in (each for each in self.entries() if each.key == key):
            common = min(_common(entry.tokens, wanted), len(wanted) - 1)
            if common > least and (entry.can_trim or common == len(entry.tokens)):
                candidates.append((common, entry))
        for common, entry in sorted(candidates, key=lambda each: each[0], reverse=True):
            if (cache := self._load(entry, model, common)) is not None:
                self._counts["found_tokens"] += common
                return cache, common
        return None

    def _load(self, entry: Entry, model: nn.Module, count: int) -> list[Any] | None:
        """The cache of the first ``count`` tokens of an entry, or None if it cannot be read."""
        tokens = count if count < len(entry.tokens) else None
        with self._without_damaged(entry.file, Damaged):
            cache, metadata = load_prompt_cache(entry.file, model, True, tokens)
            if _tokens(metadata.get("tokens", "")).tolist() != entry.tokens.tolist():
                raise Damaged(entry.file, "it has changed since its header was read")
            with contextlib.suppress(OSError):  # a failure only makes the entry seem older
                os.utime(entry.file)
            return cache
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
        """Write a cache of ``tokens`` in the background, if that is worthwhile.

        The cache may lack the last tokens, or have more. ``name`` (of the model) and the beginning
        of ``text`` are shown in listings.

        Raises:
            ValueError: the store is closed, or the model's weights have changed since the cache.
        """
        seen, can_trim = seen_tokens(cache), can_trim_prompt_cache(cache)
        count = min(seen, len(tokens))
        nbytes = sum(layer.nbytes for layer in cache)
        if count < LEAST_TOKENS or (count < seen and not can_trim) or nbytes > self.size:
            return
        kept = np.asarray(tokens[:count], np.uint32)
        metadata = {"key": key_of(model, cache, scope), "name": name, "text": text[:80]}
        # The model may have other weights when the cache is written.
        metadata |= {"identity": identity_of(model, cache), "made_by": description(model)}
        metadata |= {"tokens": base64.b64encode(kept.tobytes()).decode()}
        metadata |= {"can_trim": str(int(can_trim))}
        mx.eval([layer.state for layer in cache])  # lazy arrays belong to this thread
        own = copy.deepcopy(cache)
        trim_prompt_cache(own, seen - count)
        due = time.monotonic() + self._delay
        pending = _Pending(metadata["key"], kept, can_trim, own, metadata, due)
        with self._changed:
            if self._is_closing:
                raise ValueError(f"{self.folder} is closed: open the store again to keep prompts.")
            if any(_covers(each, pending) for each in self._pending):
                return
            self._pending = [each for each in self._pending if not _covers(pending, each)]
            self._pending.append(pending)
            if self._writer is None:
                self._writer = threading.Thread(target=self._write_pending, daemon=True)
                self._writer.start()
            self._changed.notify_all()

    def close(self) -> None:
        """Write what is pending, and stop: afterwards prompts can be found but not kept."""
        with self._changed:
            self._is_closing = True
            self._changed.notify_all()
        if self._writer is not None:
            self._writer.join()

    def _write_pending(self) -> None:
        while True:
            with self._changed:
                while not self._is_closing:
                    wait = self._pending[0].due - time.monotonic() if self._pending else None
                    if wait is not None and wait <= 0:
                        break
                    self._changed.wait(wait)
                if not self._pending:
                    return
                pending = self._pending.pop(0)
            try:
                self._write(pending)
            except (OSError, ValueError) as error:
                _log.warning("A prompt of %d tokens is not kept: %s", len(pending.tokens), error)

    def _write(self, pending: _Pending) -> None:
        entries = self.entries()
        if any(_covers(entry, pending) for entry in entries):
            return
        file = self.folder / f"{uuid.uuid4().hex}{_SUFFIX}"
        with self.writing():
            write_prompt_cache(file, pending.cache, pending.metadata)
            self._counts["written"] += 1
            self._counts["written_bytes"] += file.stat().st_size
        with _locked(self.folder):
            for entry in entries:
                if _covers(pending, entry):
                    entry.file.unlink(missing_ok=True)
        self.prune(self.size)

    def prune(self, size: int) -> int:
        """Evict the least recently used entries beyond ``size`` bytes; return how many."""
        with _locked(self.folder):
            _remove_unfinished(self.folder)
            entries = self.entries()
            total, removed = sum(entry.nbytes for entry in entries), 0
            while total > size:
                entry = entries.pop()
                entry.file.unlink(missing_ok=True)
                total -= entry.nbytes
                removed += 1
        self._counts["removed"] += removed
        return removed

    def delete(self, entry: Entry) -> None:
        """Remove a prompt, or a conversation and all prompts that are beginnings of it."""
        entry.file.unlink(missing_ok=True)
        if entry.file.parent.name == _SESSIONS:
            for other in self.entries():
                if _common(other.tokens, entry.tokens) == len(other.tokens):
                    other.file.unlink(missing_ok=True)

    def check(self) -> Iterator[bool]:
        """Read every file, and yield whether it is as it was written.

        A damaged prompt is removed. A damaged conversation stays. Both log a warning.
        """
        for file in self.files():
            is_right = False
            with self._without_damaged(file):
                _read_entry(file)
                load_prompt_cache(file)
                is_right = True
            yield is_right
        for entry in self.sessions():
            try:
                load_prompt_cache(entry.file)
                yield True
            except (ValueError, OSError) as error:
                _log.warning("The conversation %s cannot be continued: %s", entry.name, error)
                yield False

    def files(self) -> list[Path]:
        """The files of all entries, including damaged ones."""
        return sorted(self.folder.glob(f"{_DIGITS}{_SUFFIX}"))

    def statistics(self) -> dict[str, int]:
        """Entries and bytes in the folder, and what this process found, wrote and removed."""
        sizes = [entry.nbytes for entry in self.entries()]
        held = {"entries": len(sizes), "bytes": sum(sizes), "size": self.size}
        return {**held, "pending": len(self._pending), **self._counts}

    @contextlib.contextmanager
    def _without_damaged(self, file: Path, damage: type = ValueError) -> Iterator[None]:
        """Warn if a file cannot be used, and remove it if an error of this type tells why."""
        try:
            yield
        except FileNotFoundError:
            pass  # another process has removed it
        except (ValueError, OSError) as error:
            if not isinstance(error, damage):
                _log.warning("A stored prompt cannot be used: %s", error)
            elif file.exists():
                _log.warning("%s is removed from the store: %s", file.name, error)
                with contextlib.suppress(OSError):
                    file.unlink(missing_ok=True)


@contextlib.contextmanager
def reading(
    store: PromptStore | None,
    model: nn.Module,
    tokenizer: Any,
    tokens: list[int],
    cache: list[Any],
    known: int = 0,
    name: str = "",
    progress: Progress = lambda *_: None,
    keeps_prompt: bool = False,
) -> Iterator[tuple[list[Any], int, Progress]]:
    """Look up ``tokens`` in a store before their prefill, and keep their cache afterwards.

    Yields the cache to use, the number of tokens in it (``known`` at least), and a callback for the
    ``prompt_progress_callback`` of mlx-lm. It calls ``progress``, and keeps every 4,096 tokens of
    the prompt if a cache cannot be cut back. With ``keeps_prompt`` it keeps the whole prompt as
    well, in case a signal ends the command during the reply. Generated tokens may have been added
    to ``tokens`` at the end. Without a store, the arguments are yielded unchanged.
    """
    if store is None:
        yield cache, known, progress
        return
    cache, known = store.find(model, tokens, cache, known) or (cache, known)
    about = {"name": name, "text": tokenizer.decode(tokens[:SHOWN_TOKENS])}
    kept = known

    def keep_prompt(processed: int, total: int) -> None:
        nonlocal kept
        progress(processed, total)
        count = known + processed
        is_due = count - kept >= CHECKPOINT_TOKENS and not can_trim_prompt_cache(cache)
        if is_due or keeps_prompt and processed == total:
            store.keep(model, tokens[:count], cache, **about)
            kept = count

    try:
        yield cache, known, keep_prompt
    except GeneratorExit:  # raised between two tokens; other exceptions may come from a layer
        store.keep(model, tokens, cache, **about)
        raise
    store.keep(model, tokens, cache, **about)


def clear(folder: Path) -> int:
    """Remove all prompts and conversations of a store of any version; return how many."""
    sessions = folder / _SESSIONS
    with _locked(folder):
        files = list(folder.glob(f"{_DIGITS}{_SUFFIX}"))
        files += filter(_is_conversation, sessions.glob(f"*{_SUFFIX}"))
        for path in (*files, folder / _ABOUT):
            path.unlink(missing_ok=True)
        _remove_unfinished(folder)
        with contextlib.suppress(OSError):  # the folder may have other files
            sessions.rmdir()
        write_json(folder / _ABOUT, _OWN)
    return len(files)


def _remove_unfinished(folder: Path) -> None:
    """Remove the unfinished files of killed processes."""
    for path in (*folder.glob(f".{_DIGITS}-*"), *folder.glob(f"{_SESSIONS}/.*-*/")):
        shutil.rmtree(path, ignore_errors=True)


def _is_conversation(file: Path) -> bool:
    """Whether a file is a conversation, judged by its name if it is damaged."""
    try:
        return "0.chat" in StoredFile(file).metadata
    except (ValueError, OSError, LookupError):
        return re.fullmatch(r"\d{4}-\d\d-\d\d-\d{6}(-[0-9a-f]{4})?", file.stem) is not None


def key_of(model: nn.Module, cache: list[Any], scope: str = "") -> str:
    """A hash of a model's weights, the settings of a cache that was made for it, and a scope."""
    settings = [
        (place, type(x).__name__, x.settings)
        for place, x in enumerate(flat_caches(cache))
        if isinstance(x, TurboQuantKVCache)
    ]
    parts = identity_of(model, cache), settings, scope
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:32]


def seen_tokens(cache: list[Any]) -> int:
    """Tokens appended to a cache, including forgotten ones; 0 if its layers do not agree."""
    counts = {layer.offset for layer in flat_caches(cache) if isinstance(layer, TurboQuantKVCache)}
    return counts.pop() if len(counts) == 1 else 0


def named(entries: list[Entry], name: str) -> Entry:
    """The entry with this name; if there is none, a ValueError that lists the names."""
    for entry in entries:
        if entry.name == name:
            return entry
    names = ", ".join(entry.name for entry in entries) or "it has none"
    raise ValueError(f"There is no {name!r} in this prompt store: use one of its names ({names}).")


def version_of(folder: Path) -> int | None:
    """The version of the prompt store in a folder; None if there is none."""
    try:
        with read_errors(folder / _ABOUT):
            about = json.loads((folder / _ABOUT).read_text(encoding="utf-8"))
        version, maker = about["format"], about.get("made_by")
    except (FileNotFoundError, NotADirectoryError, ValueError, TypeError, LookupError):
        return None
    # Versions 1 and 2 do not name their maker.
    is_own = maker == _OWN["made_by"] or (maker is None and (folder / _LOCK).exists())
    return version if type(version) is int and is_own else None


@contextlib.contextmanager
def _locked(folder: Path, kind: int = fcntl.LOCK_EX) -> Iterator[None]:
    """Lock a store among processes: shared by all that write files, or for one that removes."""
    with write_errors(folder):
        lock = (folder / _LOCK).open("w")
    with lock:
        fcntl.flock(lock, kind)
        yield


def _read_entry(file: Path) -> Entry:
    """The entry that the header of a file describes; ValueError if it is not an entry."""
    texts = StoredFile(file).metadata
    try:
        told = texts["0.key"], _tokens(texts["0.tokens"]), texts["0.can_trim"] == "1"
        return Entry(file, *told, 0, 0.0, _label(texts["0.name"], texts), texts["0.text"])
    except (KeyError, ValueError) as error:
        raise Damaged(file, f"{error} is missing") from error


def _label(name: str, texts: dict[str, str]) -> str:
    """The name of a model, with the first digits of the identity of its weights."""
    return f"{name} ({texts['0.identity'][:6]})"


def _tokens(text: str) -> np.ndarray:
    return np.frombuffer(base64.b64decode(text, validate=True), np.uint32)


def _common(first: np.ndarray, second: np.ndarray) -> int:
    """The number of first tokens that two prompts have in common."""
    count = min(len(first), len(second))
    different = np.flatnonzero(first[:count] != second[:count])
    return int(different[0]) if different.size else count


def _covers(entry: "Entry | _Pending", other: "Entry | _Pending") -> bool:
    """Whether an entry serves all prompts that another one serves."""
    count = len(other.tokens)
    enough = entry.can_trim or len(entry.tokens) == count
    return entry.key == other.key and enough and _common(entry.tokens, other.tokens) == count
