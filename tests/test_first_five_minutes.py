"""The first five minutes of README in a terminal of 80 columns, without a network."""

import argparse
import os
import re
import shutil
import signal
import sys
import sysconfig

import pexpect
import pytest
from conftest import REPOSITORY
from servers import client, complete, free_port

README = (REPOSITORY / "README.md").read_text()
MODEL = "mlx-community/Qwen2.5-7B-Instruct-4bit"
TURN_ENDS = r"cache [\d,]+ tokens"
ENDED = r"\[0\]\$ "
PASTE = "\r".join(f"x{number} = {number}" for number in range(12))
CHAT_PROMPT = ">\x08"  # as prompt_toolkit draws the empty prompt


class Session:
    """A shell with a home of its own, in a copy of the checkout; pip finds what is installed."""

    def __init__(self, folder):
        self.checkout, self.home = folder / "checkout", folder / "home"
        ignored = shutil.ignore_patterns(".*", "__pycache__", "*.egg-info", "build", "scratch")
        shutil.copytree(REPOSITORY, self.checkout, ignore=ignored)
        self.home.mkdir()
        installed = folder / "installed"
        installed.mkdir()
        for path in os.scandir(sysconfig.get_path("purelib")):
            if "mlx_turboquant" not in path.name:
                (installed / path.name).symlink_to(path.path)
        fast = {name: os.environ.get(name, "") for name in ("LD_PRELOAD", "OPENBLAS_NUM_THREADS")}
        environment = {
            **fast,
            "HOME": str(self.home),
            "PATH": f"{os.path.dirname(sys.executable)}:{os.environ['PATH']}",
            "PIP_NO_BUILD_ISOLATION": "0",  # which means that there is none
            "PIP_NO_INDEX": "1",
            "PROMPT_TOOLKIT_NO_CPR": "1",
            "PS1": "[$?]$ ",
            "PYTHONPATH": str(installed),
            "TERM": "xterm-256color",
        }
        self.shell = pexpect.spawn(
            "bash --norc --noprofile --noediting",
            cwd=self.checkout,
            dimensions=(24, 80),
            encoding="utf-8",
            env=environment,
            timeout=120,
        )
        self.shell.setecho(False)
        self.shell.expect(ENDED)

    def start(self, command: str, expected: str, *options: str) -> None:
        """Type a command of README, with options of the test behind it, and wait for an output."""
        assert command in README
        for name in (MODEL, "MODEL"):
            command = command.replace(f"--model {name}", "--model examples/tiny-lm")
        self.shell.sendline(" ".join([command, *options]))
        self.shell.expect(expected)

    def run(self, command: str, *options: str) -> str:
        """What a command of README prints until it has ended with success."""
        self.start(command, r"\[(\d+)\]\$ ", *options)
        assert self.shell.match[1] == "0", self.shell.before
        assert "Traceback" not in self.shell.before
        return self.shell.before

    def say(self, message: str, expected: str) -> None:
        """Enter a message in a chat, and wait for the output and the next prompt."""
        self.shell.send(f"{message}\r")
        self.shell.expect(expected)
        self.shell.expect(CHAT_PROMPT)


@pytest.fixture(scope="module")
def session(tmp_path_factory):
    session = Session(tmp_path_factory.mktemp("session"))
    yield session
    session.shell.close(force=True)


def test_the_first_five_minutes_go_as_readme_says(session):
    shell, home = session.shell, session.home
    assert "The hidden code was" in session.run("make demo")

    shell.sendline("python3 -m venv ../env && . ../env/bin/activate; PS1='[$?]$ '")
    shell.expect(ENDED)
    extra = '".[cpu]"' if sys.platform == "linux" else "."
    session.run(f"pip install {extra}", "--quiet --disable-pip-version-check")
    shell.sendline(
        "cd .. && python -c 'import mlx_turboquant as x; print(x.__file__)'; cd checkout"
    )
    shell.expect(r"/env/lib/python3\.\d+/site-packages/mlx_turboquant/__init__.py")

    [program] = re.findall(r"```python\n(.*?)```", README, flags=re.S)
    (session.checkout / "use.py").write_text(program.replace(MODEL, "examples/tiny-lm"))
    shell.sendline("python use.py")
    shell.expect("100%")  # the bar of the calibration, which all that follows finds done
    shell.expect(ENDED)

    chat = f"mlx_turboquant chat --model {MODEL} --kv-bits 4"
    store = "--prompt-store ~/prompts --max-tokens 400"
    session.start(chat, CHAT_PROMPT, store)
    session.say(f"\x1b[200~{PASTE}\x1b[201~", TURN_ENDS)
    session.say("/save talk", "saved to")
    session.say("/sessions", "x0 = 0 x1 = 1")
    shell.send("import os\r")
    shell.expect(r"\x1b\[\?2004h[^\x1b]*[a-z]{2}")  # the first letters of the answer
    os.killpg(os.tcgetpgrp(shell.child_fd), signal.SIGKILL)
    shell.expect(r"\[137\]\$ ")
    [conversation] = (home / "prompts" / "sessions").iterdir()
    session.start(chat, CHAT_PROMPT, store, f"--resume {conversation.stem}")
    session.say("/stats", "2 messages")
    session.say("/load talk", "2 messages")
    shell.sendeof()
    shell.expect(f"To go on: mlx_turboquant chat --resume .*{ENDED}")

    session.run('echo "Why is the sky blue?" | mlx_turboquant chat --model MODEL > answer.txt')
    assert (session.checkout / "answer.txt").read_text().strip()
    generate = "mlx_turboquant generate --model examples/tiny-lm --prompt - --kv-bits 4 < LICENSE"
    assert re.search(r"Cache: [\d,]+ tokens, [\d.]+ MB \(fp16: ", session.run(generate))

    port = free_port()
    server = f"mlx_turboquant server --model {MODEL} --kv-bits 4 --prompt-store ~/prompts"
    address = re.escape(f"http://127.0.0.1:{port}")
    session.start(server, f"INFO Ready at {address}: tiny-lm, 4 bits per value", f"--port {port}")
    assert complete(client(port), "import os")
    shell.expect(r"INFO POST /v1/completions 200, \d+ prompt tokens")
    shell.sendintr()
    shell.expect(ENDED)

    shutil.copy(argparse.__file__, session.checkout / "book.txt")
    evaluate = "mlx_turboquant evaluate --model MODEL --text book.txt --kv-bits 4 trellis:4 3 K5V3"
    table = session.run(evaluate, "--context 512 --samples 1")
    rows = re.findall(r"^K5V3  +(.*\S) *\r?$", table, flags=re.M)  # in parts that fit the width
    values = [value for row in rows for value in re.split("  +", row)]
    numbers = r"4\.12 528 \d\.\d{5}( \d+\.\d{4}){2}( \d+\.\d{3}){2}( \d+\.\d%){2} (> )?\d+"
    assert re.fullmatch(numbers, " ".join(values))
    plan = session.run("mlx_turboquant plan --shape llama-3.1-8b --memory 16GB")
    advice = plan.strip().splitlines()[-1]
    assert advice.startswith("Use 4.5 bits") and advice in README
