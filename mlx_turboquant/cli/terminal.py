"""The terminal of a chat: its input and its output."""

import atexit
import os
import sys
import termios
import tty
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from platformdirs import user_cache_path
from prompt_toolkit import PromptSession
from prompt_toolkit.history import FileHistory
from prompt_toolkit.key_binding import KeyBindings
from prompt_toolkit.utils import is_dumb_terminal

from .signals import ENDINGS, signals_held


class Terminal:
    """Reads and prints messages; plain lines without a prompt if input or output is piped."""

    def __init__(self):
        self._is_plain = is_dumb_terminal() or not (sys.stdin.isatty() and sys.stdout.isatty())
        sys.stdin.reconfigure(errors="surrogateescape")
        if not self._is_plain:
            keys = KeyBindings()
            # Ctrl-J is not bound: Enter, pressed before the prompt appears, arrives as Ctrl-J.
            keys.add("escape", "enter")(lambda event: event.current_buffer.insert_text("\n"))
            history = _History(user_cache_path("mlx_turboquant") / "chat_history")
            options = {"prompt_continuation": "  ", "enable_suspend": True}
            self._session = PromptSession("> ", history=history, key_bindings=keys, **options)
            # Keys typed during a reply are not echoed, but appear at the next prompt.
            atexit.register(self._restore, termios.tcgetattr(sys.stdin))
            tty.setcbreak(sys.stdin, termios.TCSANOW)

    def read(self) -> str:
        """The next message, which may have several lines; EOFError at the end."""
        if self._is_plain:
            line = input()
        else:
            with signals_held(*ENDINGS, then=self._end_prompt) as came:
                line = self._session.prompt(pre_run=lambda: came and self._end_prompt())
            self.write("\x1b[?2004h", end="")  # also bracket a paste during a reply
        return line.encode(errors="replace").decode().rstrip()  # invalid bytes become "?"

    def write(self, text: str, end: str = "\n", is_note: bool = False) -> None:
        """Print an answer or a note; notes are grey, or go to stderr in a plain terminal."""
        if is_note and not self._is_plain and not os.environ.get("NO_COLOR"):
            text = f"\x1b[90m{text}\x1b[0m"
        file = sys.stderr if is_note and self._is_plain else sys.stdout
        print(text, end=end, file=file, flush=True)

    def _end_prompt(self) -> None:
        """End a running prompt by its event loop, in which SystemExit would print a traceback."""
        answer = self._session.app.future
        if answer is not None:
            answer.get_loop().call_soon_threadsafe(
                lambda: answer.done() or answer.set_exception(EOFError())
            )

    def _restore(self, modes: list) -> None:
        with suppress(OSError, termios.error):  # after a hang-up
            self.write("\x1b[?2004l", end="")
            termios.tcsetattr(sys.stdin, termios.TCSANOW, modes)


class _History(FileHistory):
    """Earlier input, in a file that only the user can read, or nowhere if it cannot be written."""

    def load_history_strings(self) -> Iterator[str]:
        with suppress(OSError):
            yield from super().load_history_strings()

    def store_string(self, string: str) -> None:
        with suppress(OSError):  # a chat works without history
            Path(self.filename).parent.mkdir(parents=True, exist_ok=True)
            Path(self.filename).touch(mode=0o600)
            super().store_string(string)
