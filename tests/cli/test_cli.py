"""The commands as a user runs them, in processes of their own."""

import io
import json
import os
import re
import shlex
import shutil
import signal
import struct
import subprocess
import sys
import time
from argparse import Namespace
from pathlib import Path

import pexpect
import pytest
from adapters import adapter_folder
from commands import run, wait_for_a_measured_layer
from conftest import REPOSITORY
from mlx.utils import tree_flatten
from mlx_lm.models import llama

from mlx_turboquant import disable, make_prompt_cache, save_prompt_cache
from mlx_turboquant.cli import calibrate, loading
from mlx_turboquant.cli.chat import Conversation
from mlx_turboquant.cli.loading import ensure_profile
from mlx_turboquant.cli.options import given_prompt
from mlx_turboquant.lm import profile
from mlx_turboquant.lm.calibrate import calibration_texts
from mlx_turboquant.lm.compression import compression_of
from mlx_turboquant.lm.prompt_store import PromptStore
from mlx_turboquant.lm.settings import Settings
from mlx_turboquant.stored_arrays import StoredFile

TINY_LM = str(REPOSITORY / "examples" / "tiny-lm")
PROMPT = ("--prompt", "def add(a, b):\n    return", "--max-tokens", "12")


def generate(*arguments: str, **options) -> subprocess.CompletedProcess:
    return run("generate", "--model", TINY_LM, *PROMPT, *arguments, **options)


def assert_refused(result: subprocess.CompletedProcess, message: str) -> None:
    """Check for exit status 2 and one line that says why."""
    assert result.returncode == 2
    assert len(result.stderr.strip().splitlines()) == 1, result.stderr
    assert message in result.stderr
    assert "Traceback" not in result.stderr


def test_generate_prints_the_text_and_then_the_cache():
    result = generate("--kv-bits", "4")
    assert result.returncode == 0, result.stderr
    *_, last = result.stdout.splitlines()
    assert re.fullmatch(
        r"Cache: \d+ tokens, [\d.]+ MB \(nothing is packed yet: the first 163 tokens stay exact\)",
        last,
    )
    assert "Generation: 12 tokens" in result.stdout


def test_generate_reads_the_prompt_from_standard_input():
    result = generate("--prompt", "-", input="import os\n" * 400)
    tokens = int(re.search(r"Cache: ([\d,]+) tokens", result.stdout)[1].replace(",", ""))
    size = re.search(r"MB \(fp16: [\d.]+ MB, ratio ([\d.]+)\)", result.stdout)
    assert tokens > 1000 and float(size[1]) > 1.5


def test_bytes_that_are_not_text_become_question_marks(monkeypatch):
    assert generate("--prompt", "caf\udce9").returncode == 0
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"caf\xe9"), "utf-8"))
    assert given_prompt("-").read() == "caf?"


def test_quiet_generate_prints_the_text_alone():
    verbose, quiet = generate(), generate("--verbose", "F")
    text = verbose.stdout.split("==========\n")[1]
    assert quiet.stdout.strip() == text.strip()


def test_options_of_mlx_lm_without_effect_are_named():
    result = generate("--kv-group-size", "32")
    assert result.returncode == 0
    assert "--kv-group-size has no effect on the compressed cache." in result.stderr


def test_generate_holds_no_more_tokens_than_it_is_told():
    arguments = ("--max-kv-size", "300", "--kv-window", "64", "--prompt", "-", "-v")
    result = generate(*arguments, input="import os\n" * 400)
    assert int(re.search(r"Cache: ([\d,]+) tokens", result.stdout)[1]) <= 300
    assert re.search(r"TurboQuantKVCache +\d+ +[\d.]+ .* 192 tokens a layer packed", result.stdout)


def test_speculative_decoding_gives_the_same_text():
    plain = generate("--kv-bits", "8", "--verbose", "F")
    drafted = generate("--kv-bits", "8", "--verbose", "F", "--draft-model", TINY_LM)
    assert drafted.returncode == 0, drafted.stderr
    assert drafted.stdout == plain.stdout


def test_generate_goes_on_from_a_saved_cache(tiny_lm, tmp_path):
    model, tokenizer = tiny_lm
    cache = make_prompt_cache(model, 8)
    model(tokenizer.encode("def add(a, b):\n", return_tensors="mlx"), cache=cache)
    metadata = {"model": TINY_LM, "tokenizer_config": "{}"}
    file = save_prompt_cache(tmp_path / "cache", cache, model, metadata)
    result = run("generate", "--prompt-cache-file", str(file), "--prompt", "    return", "-m", "8")
    assert result.returncode == 0, result.stderr
    assert " a" in result.stdout
    for option in (["--kv-bits", "4"], ["--profile", str(file)]):
        refused = run("generate", "--prompt-cache-file", str(file), *option)
        assert_refused(refused, "settings of its own")


def test_a_prompt_is_processed_once_and_continued_as_if_it_were_read_again(tmp_path):
    prompt, question, file = "import os\n" * 200, "def add(a, b):\n    return", str(tmp_path / "c")
    arguments = ("--model", TINY_LM, "--prompt", "-", "--prompt-cache-file", file, "--kv-bits", "8")
    result = run("cache_prompt", *arguments, input=prompt)
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[-1] == f"Saved {file}.safetensors"
    quiet = ("--max-tokens", "12", "--verbose", "F")
    loaded = run("generate", "--prompt-cache-file", file, "--prompt", question, *quiet)
    assert loaded.returncode == 0, loaded.stderr
    again = run("generate", "--model", TINY_LM, "--prompt", prompt + question, *quiet)
    assert loaded.stdout == again.stdout
    text = tmp_path / "text.safetensors"
    text.write_text("not a cache, and nobody wants to lose it")
    result = run("cache_prompt", *arguments[:4], "--prompt-cache-file", str(text), input=prompt)
    assert_refused(result, "is not a complete safetensors file")


def test_a_cache_of_another_model_is_refused(random_model, tmp_path):
    file = save_prompt_cache(tmp_path / "c", make_prompt_cache(random_model), random_model)
    assert_refused(generate("--prompt-cache-file", str(file)), "belongs to another model")


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--kv-bits", "9"], "9.0 bits are not supported: use 2 to 8 in quarters"),
        (["--kv-bits", "3.3"], "3.3 bits are not supported"),
        (["--key-bits", "0"], "0 bits per value are not supported"),
        (["--kv-window", "-1"], "A window of -1 is not possible"),
        (["--kv-sinks", "-1"], "sink tokens of -1"),
        (["--max-kv-size", "100"], "A cache of 100 tokens is too small"),
        (["--max-kv-size", "300", "--draft-model", TINY_LM], "--draft-model cannot be used with"),
        (
            ["--model", "no/such/folder"],
            "no/such/folder is not a folder, and not a name on the hub: give",
        ),
        (["--prompt-cache-file", "missing"], "missing.safetensors does not exist"),
    ],
)
def test_bad_input_is_one_sentence_and_status_2(arguments, message):
    assert_refused(generate(*arguments), message)


def test_bits_that_are_no_number_get_the_ways_to_give_them():
    result = generate("--kv-bits", "K4V4")
    expected = "'K4V4' is not a number: use 2 to 8 in quarters, or --key-bits and --value-bits\n"
    assert result.returncode == 2 and result.stderr.endswith(expected)


@pytest.mark.parametrize("command", ["generate", "chat", "server", "cache_prompt"])
def test_the_help_lists_the_options_of_the_cache(command):
    result = run(command, "--help")
    assert result.returncode == 0
    for option in ("bits", "codec", "window", "sinks"):
        assert f"--kv-{option}" in result.stdout
    assert "--key-bits" in result.stdout and "--value-bits" in result.stdout


def test_the_codec_is_an_option_and_another_one_is_refused():
    result = generate("--kv-codec", "trellis", "--kv-bits", "2", "--no-calibrate", "-v")
    assert result.returncode == 0 and ", trellis codes" in result.stdout
    refused = generate("--kv-codec", "huffman")
    assert refused.returncode == 2 and "invalid choice: 'huffman'" in refused.stderr


def test_commands_are_listed_and_a_wrong_one_is_refused():
    assert "generate" in run("--help").stdout
    assert run("--help").stdout == run().stdout
    assert_refused(run("genrate"), "'genrate' is not a command: did you mean generate?")


def test_doctor_says_where_kernels_run():
    result = run("doctor", env={**os.environ, "MLX_TURBOQUANT_BACKEND": "reference"})
    assert result.returncode == 0
    assert "Kernels run on: reference." in result.stdout
    result = run("doctor", env={**os.environ, "MLX_TURBOQUANT_BACKEND": "fpga"})
    assert_refused(result, "MLX_TURBOQUANT_BACKEND is 'fpga'")


def test_a_model_is_calibrated_once_and_then_every_command_uses_its_profile(tmp_path):
    env = {**os.environ, "XDG_CACHE_HOME": str(tmp_path)}
    first = generate("--kv-bits", "3", env=env)
    assert "is calibrated once" in first.stderr and "%|" in first.stderr  # a progress bar
    file, bases = sorted((tmp_path / "mlx_turboquant" / "profiles").iterdir())
    second = generate("--kv-bits", "3", "-v", env=env)
    assert second.returncode == 0 and "calibrated" not in second.stderr
    assert "expected divergence" in second.stdout
    moved = file.rename(tmp_path / "profile.json")
    alone = generate("--kv-bits", "3", "--profile", str(moved), env=env)
    assert_refused(alone, "(it is missing): copy both files, or calibrate the model again")
    bases.rename(tmp_path / "profile.safetensors")
    third = generate("--kv-bits", "3", "-v", "--profile", str(moved), env=env)
    assert "calibrated" not in third.stderr and "expected divergence" in third.stdout
    assert not list(file.parent.iterdir())


def test_ctrl_c_while_a_command_calibrates_goes_on_and_the_next_start_continues(tmp_path):
    env = {**os.environ, "XDG_CACHE_HOME": str(tmp_path)}
    arguments = ["-m", "mlx_turboquant", "generate", "--model", TINY_LM, *PROMPT]
    command = pexpect.spawn(sys.executable, arguments, encoding="utf-8", timeout=60, env=env)
    wait_for_a_measured_layer(tmp_path)
    command.sendintr()
    command.expect("Calibration was stopped: bits are chosen without a profile.")
    command.expect(pexpect.EOF)
    assert "Cache: " in command.before and "Traceback" not in command.before
    assert command.wait() == 0
    (file,) = (tmp_path / "mlx_turboquant" / "profiles").iterdir()
    assert file.suffix == ".unfinished"
    second = generate(env=env)
    assert "step 12 of 12" in second.stderr and "stopped" not in second.stderr
    assert sorted(x.suffix for x in file.parent.iterdir()) == [".json", ".safetensors"]


def test_without_calibration_nothing_is_measured_or_written(tmp_path):
    env = {**os.environ, "XDG_CACHE_HOME": str(tmp_path)}
    result = generate("--no-calibrate", "-v", env=env)
    assert result.returncode == 0 and "calibrated" not in result.stderr
    assert "bytes a token" in result.stdout and "expected divergence" not in result.stdout
    assert not list(tmp_path.iterdir())


def test_calibrate_prints_what_to_expect_of_budgets_and_writes_the_profile(tmp_path):
    text, out = tmp_path / "some.txt", tmp_path / "profile.json"
    text.write_text(calibration_texts()["code"])
    arguments = ("calibrate", "--model", TINY_LM, "--out", str(out))
    result = run(*arguments, "--text", str(text))
    assert result.returncode == 0, result.stderr
    rows = [line.split() for line in result.stdout.splitlines()]
    budgets = {row[0]: row for row in rows if len(row) > 5 and row[3] == "nats"}
    assert list(budgets) == ["8", "6", "5", "4", "3.5", "3", "2.5", "2"]
    assert int(budgets["4"][1]) == 528  # 1,024 values of 4 bits and 8 scales of 16
    divergences = [float(row[2]) for row in budgets.values()]
    assert divergences == sorted(divergences) and divergences[-1] > 10 * divergences[0]
    said = f"were scored. Wrote {out} and profile.safetensors"
    assert said in " ".join(result.stdout.split()) and out.with_suffix(".safetensors").exists()
    assert json.loads(out.read_text())["texts"] == [str(text)]


def test_calibrate_refuses_bad_input_and_writes_nothing(tmp_path):
    text, out = tmp_path / "short.txt", tmp_path / "profile.json"
    text.write_text("import os\n")
    arguments = ("calibrate", "--model", TINY_LM, "--out", str(out))
    assert_refused(run(*arguments, "--text", str(text)), "short.txt has 3 tokens")
    assert_refused(run(*arguments, "--text", "missing"), "missing cannot be read (No such file")
    assert not out.exists()
    assert_refused(run(*arguments[:-1], str(text)), "short.txt exists and is not a profile: give")
    assert text.read_text() == "import os\n"
    assert_refused(run(*arguments[:-1], str(tmp_path)), "exists and is not a profile: give another")
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    beside = run(*arguments[:-1], str(tmp_path / "model.json"))
    assert_refused(beside, "model.safetensors is not a complete safetensors file: use another")
    no_ending = run(*arguments[:-1], str(tmp_path / "profile"))
    assert_refused(no_ending, "profile is no name for a profile: use one that ends with .json")
    foreign = tmp_path / "foreign.json"
    foreign.write_text('{"format": "1", "codec": "?", "fingerprint": "?"}')
    assert_refused(generate("--profile", str(foreign)), "calibrate the model again")
    foreign.write_text("[")
    assert_refused(generate("--profile", str(foreign)), "foreign.json is not a profile")


def test_what_cannot_be_calibrated_or_kept_is_named_and_the_command_goes_on(
    tiny_lm, monkeypatch, capsys, caplog, tmp_path
):
    model, tokenizer = tiny_lm
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))  # no profile of another test
    disable(model)  # so that the profile is looked up again
    # Here too, no profile of another test is found.
    (tmp_path / "file").touch()
    monkeypatch.setattr(profile, "profile_path", lambda name: tmp_path / "file" / "folder" / name)
    arguments = Namespace(profile=None, calibrate=True)
    ensure_profile(model, None, arguments, Settings())  # a tokenizer that fails
    message = capsys.readouterr().err.splitlines()[-1]
    assert message.startswith("Bits are chosen without a profile: The model cannot be calibrated (")
    assert message.endswith("): use --no-calibrate with the other commands.")
    ensure_profile(model, tokenizer, arguments, Settings())
    assert "The profile is not kept for the next start: " in caplog.text
    assert "(Not a directory): use a place with space" in caplog.text
    assert compression_of(model).expected is not None


def test_a_stopped_calibration_says_whether_it_goes_on_from_there(
    tiny_lm, monkeypatch, capsys, tmp_path
):
    def stopped(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(loading, "calibrated", stopped)
    monkeypatch.setattr(calibrate, "calibrate", stopped)
    (tmp_path / "text").write_text("x = 1")
    model, tokenizer = tiny_lm
    disable(model)
    unfinished = profile.unfinished_path(profile.fingerprint(model))
    unfinished.parent.mkdir(parents=True)
    said = []
    for _ in range(2):
        ensure_profile(model, tokenizer, Namespace(profile=None, calibrate=True), Settings())
        for options in ((), ("--text", str(tmp_path / "text"))):
            with pytest.raises(KeyboardInterrupt):
                calibrate.main(["--model", TINY_LM, *options])
        said += [x for x in capsys.readouterr().err.splitlines() if "was stopped" in x]
        unfinished.touch()
    lost = "Calibration was stopped: nothing is kept."
    kept = "Calibration was stopped: the next one keeps the measured layers."
    without = "Calibration was stopped: bits are chosen without a profile."
    then = " The next start keeps the measured layers."
    assert said == [without, lost, lost, without + then, kept, lost]


PROMPT_SIGN = ">\x08"  # as prompt_toolkit draws the empty prompt
CHAT = ["-m", "mlx_turboquant", "chat", "--model", TINY_LM, "--no-calibrate"]


def chat_in_terminal(*options: str, **environment: str) -> pexpect.spawn:
    """A chat at its prompt, in a terminal of 40 columns."""
    env = {**os.environ, "TERM": "xterm-256color", "PROMPT_TOOLKIT_NO_CPR": "1", **environment}
    spawn = {"encoding": "utf-8", "timeout": 60, "dimensions": (24, 40), "env": env}
    chat = pexpect.spawn(sys.executable, [*CHAT, *options], **spawn)
    chat.expect(PROMPT_SIGN)
    return chat


def say(chat: pexpect.spawn, keys: str, expected: str) -> None:
    """Press keys and Enter; wait for the expected text, and then for the prompt."""
    chat.send(f"{keys}\r")
    chat.expect(expected)
    chat.expect(PROMPT_SIGN)


def ask(chat: pexpect.spawn, question: str) -> None:
    """Press keys and Enter, and wait for the first letters of the reply."""
    chat.send(f"{question}\r")
    chat.expect(r"\x1b\[\?2004h[^\x1b]*[a-z]{2}")


def leave(chat: pexpect.spawn) -> str:
    """Press Ctrl-D, and return what is printed then."""
    chat.sendeof()
    chat.expect(pexpect.EOF)
    chat.close()
    assert chat.exitstatus == 0
    return chat.before


def pasted(lines: list[str]) -> str:
    return "\x1b[200~" + "\r".join(lines) + "\x1b[201~"


def kept_messages(folder: Path) -> list[str]:
    """The messages of the only conversation in a store, which holds nothing else."""
    (file,) = (folder / "sessions").iterdir()
    return messages_of(file)


def messages_of(file: Path) -> list[str]:
    messages = json.loads(StoredFile(file).metadata["0.chat"])["messages"]
    return [message["content"] for message in messages]


def piped_chat(text: str, *options: str) -> subprocess.CompletedProcess:
    return run("chat", "--model", TINY_LM, "--no-calibrate", "-m", "8", *options, input=text)


def test_a_chat_streams_stops_saves_and_leaves(tmp_path):
    chat = chat_in_terminal("--max-tokens", "3000")
    assert "4 bits per value" in chat.before and "this chat is not kept" in chat.before
    say(chat, "/help", "Alt-Enter +a new line")
    ask(chat, "def add(a, b):")
    chat.sendintr()
    chat.expect(r"tokens/s · cache [\d,]+ tokens")
    chat.expect(PROMPT_SIGN)
    say(chat, "/stats", "2 messages.*TurboQuantKVCache")
    say(chat, f"/save {tmp_path}/talk", "saved to")
    say(chat, "/reset", "a new conversation begins")
    say(chat, "/stats", "0 messages, cache 0 tokens")
    say(chat, f"/load {tmp_path}/talk", "2 messages")
    say(chat, f"/load {tmp_path}/nothing", "does not exist")
    say(chat, "/nonsense", "/nonsense is not a command")
    chat.send("not sent")
    chat.sendintr()
    chat.expect("Ctrl-D leaves")
    chat.expect(PROMPT_SIGN)
    say(chat, "/stats", "2 messages")
    leave(chat)
    assert (tmp_path / "talk.safetensors").is_file()


def test_pasted_lines_are_one_message_and_a_key_begins_a_new_line(tmp_path):
    lines = [f"x{i} = {i}" for i in range(12)]
    chat = chat_in_terminal("--prompt-store", str(tmp_path), "--max-tokens", "60")
    say(chat, pasted(lines), "tokens/s")
    ask(chat, "one\x1b\rtwo")
    chat.send(pasted(["a = 1", "b = 2"]) + "\r")  # while the reply is printed
    chat.expect("tokens/s")
    chat.expect("b = 2")
    chat.expect("tokens/s")
    chat.expect(PROMPT_SIGN)
    say(chat, "/usr/bin/env is no command", "tokens/s")
    leave(chat)
    said = ["\n".join(lines), "one\ntwo", "a = 1\nb = 2", "/usr/bin/env is no command"]
    assert kept_messages(tmp_path)[::2] == said


def test_what_was_entered_is_there_at_the_next_start(tmp_path):
    options, folder = ("--max-tokens", "4"), {"XDG_CACHE_HOME": str(tmp_path)}
    chat = chat_in_terminal(*options, **folder)
    say(chat, "one\x1b\rtwo", "tokens/s")
    leave(chat)
    file = tmp_path / "mlx_turboquant" / "chat_history"
    assert file.stat().st_mode & 0o777 == 0o600
    chat = chat_in_terminal(*options, **folder)
    chat.send("\x1b[A")  # the up arrow
    chat.expect("one")
    chat.expect("two")
    chat.sendintr()
    chat.expect(PROMPT_SIGN)
    leave(chat)


def test_a_history_that_cannot_be_written_does_not_hinder_a_chat(tmp_path):
    (tmp_path / "file").touch()
    chat = chat_in_terminal("--max-tokens", "4", XDG_CACHE_HOME=str(tmp_path / "file"))
    say(chat, "import os", "tokens/s")
    assert "Error" not in leave(chat)


def test_a_history_that_cannot_be_read_does_not_hinder_a_chat(tmp_path):
    (tmp_path / "mlx_turboquant" / "chat_history").mkdir(parents=True)
    chat = chat_in_terminal("--max-tokens", "4", XDG_CACHE_HOME=str(tmp_path))
    say(chat, "import os", "tokens/s")
    assert "Error" not in leave(chat)


def test_two_chats_that_continue_one_conversation_both_keep_their_turns(tmp_path):
    store = ("--prompt-store", str(tmp_path), "--max-tokens", "4")
    name = re.search(r"--resume ([\da-f-]+),", piped_chat("import os\n", *store).stderr)[1]
    one, two = (chat_in_terminal(*store, "--resume", name) for _ in range(2))
    say(one, "a = 1", "tokens/s")
    say(two, "b = 2", "another +chat +has +changed")
    say(two, "c = 3", "tokens/s")
    for chat in (one, two):
        leave(chat)
    entries = {entry.name: entry.file for entry in PromptStore(tmp_path).sessions()}
    assert len(entries) == 2
    said = [messages_of(file)[::2] for file in (entries.pop(name), *entries.values())]
    assert said == [["import os", "a = 1"], ["import os", "b = 2", "c = 3"]]


def test_a_chat_that_cannot_be_kept_says_so_also_after_ctrl_c(tmp_path):
    chat = chat_in_terminal("--prompt-store", str(tmp_path), "--max-tokens", "3000")
    ask(chat, "import os")
    (tmp_path / "sessions").rmdir()
    (tmp_path / "sessions").touch()  # a file in place of the folder
    chat.sendintr()
    chat.expect("sessions")
    chat.expect(PROMPT_SIGN)
    leave(chat)


def test_a_chat_that_is_killed_in_a_reply_goes_on_with_the_turn_before(tmp_path):
    store = ("--prompt-store", str(tmp_path), "--max-tokens", "3000")
    chat = chat_in_terminal(*store)
    ask(chat, "import os")
    chat.sendintr()
    chat.expect("tokens/s")
    chat.expect(PROMPT_SIGN)
    ask(chat, "def add(a, b):")
    chat.kill(signal.SIGKILL)
    chat.expect(pexpect.EOF)
    question, answer = kept_messages(tmp_path)
    assert question == "import os" and answer
    (file,) = (tmp_path / "sessions").iterdir()
    chat = chat_in_terminal(*store, "--resume", file.stem)
    say(chat, "/stats", "2 messages")
    assert f"--resume {file.stem}" in leave(chat).replace("\r\n", "")


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGTERM])
@pytest.mark.parametrize("in_a_reply", [False, True])
def test_a_chat_that_is_ended_keeps_the_last_turn_and_says_nothing(tmp_path, number, in_a_reply):
    chat = chat_in_terminal("--prompt-store", str(tmp_path), "--max-tokens", "300")
    say(chat, "import os", "tokens/s")
    if in_a_reply:
        ask(chat, "def add(a, b):")
    chat.kill(number)
    chat.kill(number)  # as a closing terminal and its shell do
    chat.expect(pexpect.EOF)
    chat.close()
    assert chat.exitstatus == 128 + number
    assert "Traceback" not in chat.before and "Error" not in chat.before
    assert len(kept_messages(tmp_path)) == (4 if in_a_reply else 2)  # also a partial answer
    assert not list(tmp_path.glob(".*-*"))  # no unfinished prompt


@pytest.mark.parametrize("method", ["Conversation.save", "PromptStore.close"])
def test_a_hang_up_waits_for_a_file_that_is_being_written(tmp_path, method):
    code = (
        "import os, sys, time, mlx_turboquant.cli.chat as chat\n"
        f"original = chat.{method}\n"
        "def slow(*arguments):\n"
        "    os.write(2, b'writing\\n'), time.sleep(1)\n"
        "    return original(*arguments)\n"
        f"chat.{method} = slow\n"
        "chat.main(sys.argv[1:])"
    )
    options = [*CHAT[3:], "--max-tokens", "200", "--prompt-store", str(tmp_path)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", code, *options], text=True, **pipes) as chat:
        chat.stdin.write("import os\n" + "x = 1 " * 100 + "\n")
        chat.stdin.close()
        while "writing" not in chat.stderr.readline():
            pass
        chat.send_signal(signal.SIGHUP)
        assert chat.wait(60) == 128 + signal.SIGHUP
        assert "Traceback" not in chat.stderr.read()
    assert len(kept_messages(tmp_path)) == (2 if method == "Conversation.save" else 4)
    assert method == "Conversation.save" or len(PromptStore(tmp_path).entries()) == 1


def test_a_terminal_that_is_closed_ends_a_chat_without_a_traceback(tmp_path):
    errors = tmp_path / "errors"
    script = f"{shlex.join([sys.executable, *CHAT])} --prompt-store {tmp_path / 'store'} -m 3000"
    env = {**os.environ, "TERM": "xterm-256color", "PROMPT_TOOLKIT_NO_CPR": "1"}
    command = ["-c", f"exec {script} 2> {errors}"]
    chat = pexpect.spawn("sh", command, env=env, encoding="utf-8", timeout=60)
    chat.expect(PROMPT_SIGN)
    ask(chat, "import os")
    chat.close()
    assert not chat.isalive()
    assert "Traceback" not in errors.read_text()


def test_no_color_means_none():
    colour = re.compile(r"\x1b\[(?:[\d;]*;)?(?:[34]8;|3[0-7]|9[0-7])")

    def output(**environment: str) -> str:
        chat = chat_in_terminal("--max-tokens", "4", **environment)
        text = chat.before
        chat.send("import os\r")
        chat.expect("tokens/s")
        text += chat.before
        chat.expect(PROMPT_SIGN)
        return text + leave(chat)

    assert colour.search(output()) and not colour.search(output(NO_COLOR="1"))


def test_piped_lines_are_messages_and_the_output_is_plain(tmp_path):
    store = ("--prompt-store", str(tmp_path))
    result = piped_chat("import os\n\nx = 1\n", *store)
    assert result.returncode == 0
    first, one, second, two = kept_messages(tmp_path)
    assert (first, second) == ("import os", "x = 1")
    assert result.stdout == f"{one}\n{two}\n" and "tokens/s" in result.stderr
    assert "\x1b" not in result.stdout + result.stderr and "\r" not in result.stdout


def test_a_closed_output_ends_a_chat_quietly():
    command = [sys.executable, *CHAT, "-m", "3000"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, text=True, **pipes) as chat:
        chat.stdin.write("import os\n")
        chat.stdin.flush()
        chat.stdout.read(1)
        chat.stdout.close()
        assert chat.wait(60) == 128 + signal.SIGPIPE
        assert "Broken" not in (errors := chat.stderr.read()) and "Traceback" not in errors


def test_a_question_is_taken_back_and_the_system_prompt_replaced(tmp_path):
    lines = ["import os", "x = 1", "/undo", "/system Be brief.", "/system", "/undo", "/undo"]
    result = piped_chat("\n".join(lines), "--prompt-store", str(tmp_path))
    assert "Be brief." in result.stdout
    assert "taken back: x = 1\n" in result.stderr and "taken back: import os\n" in result.stderr
    assert "There is no question to take back: ask one first." in result.stderr
    assert kept_messages(tmp_path) == ["Be brief."]


def test_conversations_are_listed_with_age_and_size_and_deleted_by_name(tiny_lm, tmp_path):
    file = with_conversation(PromptStore(tmp_path), "monday", tiny_lm, "def add(a, b):")
    os.utime(file, (time.time() - 7300,) * 2)
    lines = "import os\n/sessions\n/delete tuesday\n/delete\n/delete monday\n/sessions\n"
    result = piped_chat(lines, "--prompt-store", str(tmp_path))
    listed = [line for line in result.stdout.splitlines() if " tokens: " in line]
    assert re.fullmatch(r"monday  2 hours ago, \d+ tokens: def add\(a, b\):", listed[1])
    assert len(listed) == 3 and all("import os" in line for line in (listed[0], listed[2]))
    assert "There is no 'tuesday' in this prompt store: use one of" in result.stderr
    assert "/delete needs a name" in result.stderr and "monday is deleted" in result.stderr
    name = listed[0].split()[0]
    result = piped_chat(f"/delete {name}\n", "--prompt-store", str(tmp_path), "--resume", name)
    assert f"{name} is this conversation: leave it with /reset first" in result.stderr
    assert kept_messages(tmp_path)
    assert "/delete needs a store: start the chat with" in piped_chat(f"/delete {name}").stderr


def test_a_new_conversation_leaves_the_one_before_in_the_store(tmp_path):
    piped_chat("import os\n/reset\nx = 1\n", "--prompt-store", str(tmp_path))
    assert {entry.beginning for entry in PromptStore(tmp_path).sessions()} == {"import os", "x = 1"}


def test_a_prompt_that_was_generated_from_is_read_once(tmp_path):
    prompt = "import os\n" * 150
    options = ("--prompt", prompt, "--max-tokens", "5", "--prompt-store", str(tmp_path))
    first, second = (run("generate", "--model", TINY_LM, *options) for _ in range(2))
    total = re.search(r"Prompt: 0 of ([\d,]+) tokens from the store\n", first.stdout)[1]
    known = int(total.replace(",", "")) - 1
    assert f"Prompt: {known:,} of {total} tokens from the store\n" in second.stdout
    answers = [result.stdout.split("==========")[1] for result in (first, second)]
    assert answers[0] == answers[1]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP, signal.SIGTERM, signal.SIGPIPE])
def test_a_generate_that_is_stopped_keeps_its_prompt(tmp_path, number):
    options = ("--prompt", "import os\n" * 150, "--max-tokens", "9999")
    command = [sys.executable, "-m", "mlx_turboquant", "generate", "--model", TINY_LM, *options]
    command += ["--ignore-chat-template", "--prompt-store", str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        while process.stdout.readline() != "==========\n":
            assert process.poll() is None
        assert process.stdout.readline()  # of the answer
        if number == signal.SIGPIPE:
            process.stdout.close()
        else:
            process.send_signal(number)
            process.send_signal(number)
        assert process.wait(60) == 128 + number
    [entry] = PromptStore(tmp_path).entries()
    assert len(entry.tokens) > 300


def test_an_adapter_goes_on_with_no_prompt_of_its_base_and_with_its_own(tiny_lm, tmp_path):
    adapter = adapter_folder(tmp_path / "adapter", tiny_lm[0])
    prompt = ("--prompt", "import os\n" * 150, "--max-tokens", "5")
    store = ("--prompt-store", str(tmp_path / "store"))

    def known_tokens(*options: str) -> int:
        result = run("generate", "--model", TINY_LM, *prompt, *store, *options)
        return int(
            re.search(r"Prompt: ([\d,]+) of [\d,]+ tokens", result.stdout)[1].replace(",", "")
        )

    adapted = ("--adapter-path", str(adapter))
    assert known_tokens() == 0 and known_tokens() > 300
    assert known_tokens(*adapted) == 0 and known_tokens(*adapted) > 300


def test_a_prompt_file_of_the_base_is_refused_with_an_adapter(tiny_lm, tmp_path):
    adapter = adapter_folder(tmp_path / "adapter", tiny_lm[0])
    file = ("--prompt-cache-file", str(tmp_path / "book"))
    assert run("cache_prompt", "--model", TINY_LM, "--prompt", "import os", *file).returncode == 0
    result = run("generate", *file, "--prompt", "x", "--adapter-path", str(adapter))
    assert_refused(result, "belongs to another model (llama with 4 layers, weights ")
    assert "this is llama with 4 layers and adapters, weights" in result.stderr


def test_a_chat_goes_on_where_it_was_left(tmp_path):
    store = ("--prompt-store", str(tmp_path))
    first = piped_chat("def add(a, b):\n", *store)
    name = re.search(r"--resume ([\da-f-]+),", first.stderr)[1]
    second = piped_chat("/stats\n/sessions\n", *store, "--resume", name, "--kv-bits", "4")
    assert "2 messages" in second.stdout and name in second.stdout
    refused = run("chat", "--model", TINY_LM, *store, "--resume", name, "--kv-bits", "2")
    assert_refused(refused, f"The conversation {name} has settings of its own: leave out")


@pytest.mark.parametrize(
    "options, message",
    [
        (("--resume", "monday"), "add --prompt-store DIR"),
        (("--prompt-store", "{}", "--resume", "monday"), "no 'monday' in this prompt store"),
        (("--prompt-store", "{}", "--prompt-store-size", "20 bananas"), "is not a size"),
    ],
)
def test_a_conversation_that_there_is_not_is_one_sentence(tmp_path, options, message):
    options = [option.format(tmp_path) for option in options]
    assert_refused(run("chat", "--model", TINY_LM, *options), message)


def stored(folder: Path, *prompts: str) -> PromptStore:
    """A store that ``generate`` has filled with prompts."""
    options = ("--max-tokens", "2", "--prompt-store", str(folder))
    for prompt in prompts:
        result = run("generate", "--model", TINY_LM, "--prompt", prompt, *options)
        assert result.returncode == 0, result.stderr
    return PromptStore(folder)


def with_conversation(store: PromptStore, name: str, tiny_lm, text: str) -> Path:
    """Put a conversation into a store, as ``chat`` does."""
    conversation = Conversation(*tiny_lm, Settings(8), "Be brief.", model_name="tiny")
    list(conversation.reply(text, max_tokens=4))
    return conversation.save(store.session_file(name))


def test_store_lists_checks_prunes_and_clears(tmp_path):
    stored(tmp_path, "import os\n" * 150, "x = 1\n" * 150)
    listed = run("store", "list", str(tmp_path)).stdout
    assert (
        re.search(r"tiny-lm \([0-9a-f]{6}\): import os", listed)
        and "2 prompts, 0 conversations, " in listed
    )
    assert "2 of 2 prompts and conversations are in" in run("store", "check", str(tmp_path)).stdout
    file = min(tmp_path.glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-1])
    checked = run("store", "check", str(tmp_path))
    assert checked.returncode == 1 and "1 of 2 prompts and" in checked.stdout
    assert "0 removed, 1 prompts and 0 con" in run("store", "prune", str(tmp_path)).stdout
    assert "1 removed, 0 prompts and 0 con" in run("store", "clear", str(tmp_path)).stdout


def test_conversations_are_listed_kept_when_prompts_are_pruned_and_cleared(tiny_lm, tmp_path):
    store = stored(tmp_path, "import os\n" * 150)
    file = with_conversation(store, "monday", tiny_lm, "def add(a, b):\n" * 20)
    damaged = with_conversation(store, "2026-01-02-120000", tiny_lm, "x = 1")
    damaged.write_bytes(damaged.read_bytes()[:100])
    nothing = file.parent / "nothing.safetensors"
    nothing.symlink_to("nowhere")  # as good as deleted meanwhile
    unfinished = file.parent / ".monday-abc" / "monday.safetensors"
    unfinished.parent.mkdir()
    shutil.copy(file, unfinished)
    listed = run("store", "list", str(tmp_path)).stdout
    assert re.search(
        r"monday .* tokens .* MB .* ago  tiny \([0-9a-f]{6}\): def add\(a, b\): def", listed
    )
    assert re.search(r"2026-01-02-120000 .* cannot be read", listed)
    assert "1 prompts, 2 conversations, " in listed
    checked = run("store", "check", str(tmp_path))
    assert checked.returncode == 1 and "2 of 3 prompts and conversations are" in checked.stdout
    assert "The conversation 2026-01-02-120000 cannot be continued" in checked.stderr
    assert damaged.exists()
    nothing.unlink()
    pruned = run("store", "prune", str(tmp_path), "--size", "1KB")
    assert pruned.stdout == "1 removed, 0 prompts and 2 conversations left.\n"
    cleared = run("store", "clear", str(tmp_path))
    assert cleared.stdout == "2 removed, 0 prompts and 0 conversations left.\n"
    assert sorted(x.name for x in tmp_path.rglob("*")) == [".lock", "store.json"]


def test_one_prompt_or_one_conversation_is_removed_by_the_name_that_is_listed(tiny_lm, tmp_path):
    store = stored(tmp_path, "[/INST] [bold]\n" * 60, "x = 1\n" * 150)
    with_conversation(store, "2026-01-01-120000", tiny_lm, "import os")
    listed = run("store", "list", str(tmp_path)).stdout
    name = next(line.split()[0] for line in listed.splitlines() if "[/INST] [bold]" in line)
    refused = run("store", "remove", str(tmp_path), "monday")
    assert_refused(refused, "There is no 'monday' in this prompt store: use one of its names (")
    assert name in refused.stderr and "2026-01-01-120000" in refused.stderr
    removed = run("store", "remove", str(tmp_path), name)
    assert removed.stdout == "1 removed, 1 prompts and 1 conversations left.\n"
    removed = run("store", "remove", str(tmp_path), "2026-01-01-120000")
    assert removed.stdout == "1 removed, 1 prompts and 0 conversations left.\n"
    assert store.entries()[0].beginning.startswith("x = 1")


@pytest.mark.parametrize("action", ["list", "check", "prune", "clear", "remove"])
def test_a_folder_that_is_no_store_is_refused_and_left_as_it_is(tmp_path, action):
    name = ("monday",) if action == "remove" else ()
    mine = tmp_path / "mine"
    (mine / "sessions").mkdir(parents=True)
    (mine / "sessions" / "talk.safetensors").write_text("a talk")
    (mine / f"{'0' * 32}.safetensors").write_text("weights")
    (mine / "store.json").write_text('{"name": "a shop"}')
    before = {x: x.is_file() and x.read_bytes() for x in tmp_path.rglob("*")}
    for folder in (mine, tmp_path / "typo", mine / "store.json"):
        message = f"{folder} is not a prompt store: give a folder that --prompt-store made."
        assert_refused(run("store", action, str(folder), *name), message)
    assert {x: x.is_file() and x.read_bytes() for x in tmp_path.rglob("*")} == before


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("prune", "--size", "20 bananas"), "'20 bananas' is not a size of memory"),
        (("clear", "monday"), "remove needs a NAME that list shows, and other actions take none."),
        (("remove",), "remove needs a NAME that list shows, and other actions take none."),
    ],
)
def test_a_wrong_store_command_is_one_sentence(tmp_path, arguments, message):
    PromptStore(tmp_path)
    action, *rest = arguments
    assert_refused(run("store", action, str(tmp_path), *rest), message)


EVALUATE = ("evaluate", "--model", TINY_LM)
SHORT = ("--context", "300", "--samples", "1", "--scored", "40", "--greedy", "4")


def test_evaluate_prints_a_table_and_writes_json_and_pictures(tmp_path):
    text, out = tmp_path / "text", tmp_path / "new" / "folder"
    text.write_text("import os\nx = os.getcwd()\n" * 200)
    options = ("--kv-bits", "4", "K3V2", "--text", str(text))
    result = run(*EVALUATE, *SHORT, *options, "--out", str(out))
    assert result.returncode == 0, result.stderr
    lines = [re.split(r"  +", line.strip()) for line in result.stdout.splitlines()]
    table = {line[0]: line[1:] for line in lines if len(line) == 11 and "--" not in line[0]}
    names = ["exact", "mlx-lm 8 bits", "mlx-lm 4 bits", "4 bits", "K3V2"]
    assert list(table) == ["cache", *names]
    bits = ["16.00", "8.50", "4.50", "4.12", "2.62"]
    assert [row[0] for row in table.values()][1:] == bits
    # One head of 128 in four layers: 1,024 values per token.
    assert [row[1] for row in table.values()][1:5] == ["2,048", "1,088", "576", "528"]
    assert "100%" in result.stderr  # the progress bar
    written = json.loads((out / "evaluation.json").read_text())
    for codec in written["codecs"]:
        tail = (f"{codec[key]:.4f}" for key in ("kl_p99", "kl_p999"))
        numbers = [f"{codec['kl_mean']:.5f}", *tail, f"{codec['kl_max']:.3f}"]
        assert table[codec["codec"]][2:6] == numbers
        assert [codec["by_position"][i]["first"] for i in (0, -1)] == [261, 296]
    assert (out / "kl.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(file.name for file in out.iterdir()) == ["evaluation.json", "kl.png"]


@pytest.mark.parametrize(
    "options, message",
    [
        (("--kv-bits", "4", "five"), "'five' is not a preset: use bits like 4"),
        (("--kv-bits", "K9V4"), "9 bits per value are not supported"),
        (("--kv-bits", "prod:4"), "'prod:4' is not a preset: use bits like 4"),
        (("--kv-window", "-1"), "A window of -1 is not possible"),
        (("--context", "10000000"), "tokens and 10,000,001 are needed: give a longer text"),
        (("--context", "100"), "256 scored tokens are not fewer than the context of 100"),
        (("--samples", "0"), "--samples is 0: use 1 or more."),
        (
            ("--text", "missing.txt"),
            "missing.txt cannot be read (No such file or directory): ",
        ),
        (("--model", "missing"), "missing is not a folder, and "),
    ],
)
def test_evaluate_refuses_bad_input_before_it_begins(options, message, tmp_path):
    result = run(*EVALUATE, *options, cwd=tmp_path)
    assert_refused(result, message)
    assert "tokens/s" not in result.stderr


def test_evaluate_generates_with_every_cache_and_with_an_exact_one_again(tmp_path):
    options = ("--uniform", "--kv-bits", "4", "--generate", "12", "--out", str(tmp_path))
    result = run(*EVALUATE, *SHORT, *options)
    assert result.returncode == 0, result.stderr
    assert "100%" in result.stderr
    written = json.loads((tmp_path / "evaluation.json").read_text())
    lines = [re.split(r"  +", line.strip()) for line in result.stdout.splitlines()]
    for codec in (*written["codecs"], written["noise"]):
        rows = [line for line in lines if line[0] == codec["codec"] and len(line) == 14]
        for row, generation in zip(rows, codec["generations"], strict=True):
            places = [
                "never" if x is None else f"{x}" for x in map(generation.get, ("departure", "end"))
            ]
            assert row[1:4] == [*places, f"{generation['repetition']:.0%}"]


def test_evaluate_names_a_text_that_is_too_short(tmp_path):
    text = tmp_path / "short.txt"
    text.write_text("import os\n")
    result = run(*EVALUATE, "--text", str(text), cwd=tmp_path)
    assert_refused(result, "short.txt has 3 tokens and 2,049 are needed: give a longer text")
    assert list(tmp_path.iterdir()) == [text]


def test_evaluate_refuses_a_model_that_does_not_fit(tmp_path):
    """Two terabytes of embeddings, none of them on disk."""
    config = json.loads((Path(TINY_LM) / "config.json").read_text())
    del config["quantization"], config["quantization_config"]
    config |= {"vocab_size": 2**31 - 1}
    model = llama.Model(llama.ModelArgs.from_dict(config))  # lazy: nothing is allocated
    header, end = {}, 0
    for name, array in tree_flatten(model.parameters()):
        start, end = end, end + array.nbytes
        header[name] = {"dtype": "F32", "shape": array.shape, "data_offsets": [start, end]}
    encoded = json.dumps(header).encode()
    shutil.copytree(TINY_LM, tmp_path / "model")
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    with open(tmp_path / "model" / "model.safetensors", "wb") as file:
        file.write(struct.pack("<Q", len(encoded)) + encoded)
        file.truncate(8 + len(encoded) + end)
    result = run("evaluate", "--model", str(tmp_path / "model"), cwd=tmp_path)
    assert_refused(result, "The model does not fit: it needs 2")


def test_benchmark_prints_a_table_and_writes_json_and_a_picture(tmp_path):
    options = ("--contexts", "300", "64", "--kv-bits", "4", "--repeats", "2", "--new-tokens", "12")
    result = run("benchmark", "--model", TINY_LM, *options, "--out", str(tmp_path / "out"))
    assert result.returncode == 0, result.stderr
    assert "100%" in result.stderr  # the progress bar
    written = json.loads((tmp_path / "out" / "benchmark.json").read_text())
    caches = ["exact", "mlx-lm 8 bits", "mlx-lm 4 bits", "4 bits"]
    assert [(r["context"], r["cache"]) for r in written["runs"]] == [
        (context, cache) for context in (64, 300) for cache in caches
    ]
    assert all(len(each["repeats"]) == 2 for each in written["runs"])
    assert {"device", "mlx", "mlx_lm", "version", "settings", "weights"} <= set(written)
    exact, compressed = written["runs"][4], written["runs"][7]
    line = next(x for x in result.stdout.splitlines() if re.match(r"\s*300\s+4 bits", x))
    ratio = compressed["cache_nbytes"] / exact["cache_nbytes"]
    assert f"({ratio:.2f})" in line and f"({exact['decode'] / compressed['decode']:.2f})" in line
    assert (tmp_path / "out" / "benchmark.png").read_bytes().startswith(b"\x89PNG")


def test_a_shape_of_ones_own_is_benchmarked_without_weights(tmp_path):
    shutil.copy(Path(TINY_LM) / "config.json", tmp_path)
    options = ("--contexts", "64", "--repeats", "1", "--new-tokens", "9", "--batch", "2")
    shape = str(tmp_path / "config.json")
    result = run("benchmark", "--shape", shape, *options, "--out", str(tmp_path / "out"))
    assert result.returncode == 0, result.stderr
    assert "2 sequences" in result.stdout


@pytest.mark.parametrize(
    "options, message",
    [
        (("--shape", "llama-9"), "'llama-9' is not a shape"),
        (("--model", TINY_LM, "--contexts", "1"), "--contexts is 1: use 2 or more."),
        (("--model", TINY_LM, "--new-tokens", "3"), "--new-tokens is 3: use 9 or more."),
        (("--model", TINY_LM, "--batch", "0"), "--batch is 0: use 1 or more."),
        (("--model", TINY_LM, "--kv-bits", "nine"), "'nine' is not a preset"),
        (
            ("--model", "no/such/model"),
            "no/such/model is not a folder, and not a name on the hub: give",
        ),
        (("--shape", "llama-3.3-70b"), "The model does not fit: it needs"),
        (("--model", TINY_LM, "--contexts", "2000000000"), "do not fit beside the model"),
    ],
)
def test_benchmark_refuses_bad_input_before_it_begins(options, message, tmp_path):
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    result = run("benchmark", *options, cwd=tmp_path, env=environment)
    assert_refused(result, message)
    assert "tokens/s" not in result.stderr


def test_plan_says_what_fits_without_loading_anything():
    result = run("plan", "--shape", "llama-3.1-8b", "--memory", "16GB", "--kv-bits", "4", "3")
    assert result.returncode == 0, result.stderr
    first, _, *rows = result.stdout.splitlines()
    assert first == "Of 16.0 GB macOS lets the GPU use 10.7 GB; weights 4.5 GB."
    table = {row[:15].strip(): row[15:].split()[:2] for row in rows[:5]}
    assert table["exact"][0] == "131,072"
    longest = {cache: int(row[1].replace(",", "")) for cache, row in table.items()}
    assert 40_000 < longest["exact"] < 47_000  # 6.2 GB without the activations of a chunk
    assert longest["4 bits"] > 2.8 * longest["exact"] and longest["3 bits"] > longest["4 bits"]


def test_plan_knows_a_hybrid_of_which_few_layers_grow():
    result = run("plan", "--shape", "qwen3.8-27b", "--memory", "64GB", "--kv-bits", "4")
    assert result.returncode == 0, result.stderr
    first, _, *rows = result.stdout.splitlines()
    assert first.endswith("weights 15.1 GB.")
    table = {row[:15].strip(): int(row[15:].split()[0].replace(",", "")) for row in rows[:4]}
    assert table["exact"] == 16 * 2 * 4 * 256 * 2  # 16 of 64 layers, two bytes each
    assert 3.9 < table["exact"] / table["4 bits"] < 4


@pytest.mark.parametrize(
    "options, message",
    [
        (("--memory", "lots"), "'lots' is not a size of memory: use one like 16GB, 24GiB or 16."),
        (("--memory", "2GB"), "The weights of 4.5 GB do not fit into 1.3 GB"),
        (("--memory", "16GB", "--kv-bits", "4.2"), "4.2 bits are not supported"),
        (("--memory", "16GB", "--batch", "0"), "--batch is 0: use 1 or more."),
    ],
)
def test_plan_refuses_bad_input(options, message):
    result = run("plan", "--shape", "llama-3.1-8b", *options)
    assert result.returncode == 2
    assert message in result.stderr and "Traceback" not in result.stderr
