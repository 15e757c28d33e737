"""Help texts, messages about wrong input, and behaviour when a command is stopped."""

import json
import os
import re
import resource
import signal
import subprocess
import sys

import pexpect
import pytest
from commands import not_above_permissions, run
from huggingface_hub.errors import RepositoryNotFoundError
from test_cli import TINY_LM, assert_refused, generate

from mlx_turboquant import __version__
from mlx_turboquant.cli import COMMANDS, doctor
from mlx_turboquant.cli.options import parse_size
from mlx_turboquant.lm.loading import model_errors

PLAN = ("plan", "--shape", "llama-3.1-8b", "--memory")
EVALUATE = ("evaluate", "--model", TINY_LM, "--uniform", "--kv-bits", "4")
SHORT = ("--context", "64", "--samples", "1", "--scored", "16", "--greedy", "2")


def test_the_version_is_printed():
    assert run("--version").stdout == f"mlx_turboquant {__version__}\n"


def test_a_mistyped_command_is_answered_with_the_one_that_was_meant():
    assert_refused(run("chta"), "'chta' is not a command: did you mean chat?")
    assert_refused(run("xyz"), "'xyz' is not a command: use one of generate, chat, ")


@pytest.mark.parametrize("command", COMMANDS)
def test_help_is_in_short_sentences_without_markup(command):
    result = run(command, "--help", env={**os.environ, "COLUMNS": "9999"})
    assert result.returncode == 0
    assert "`" not in result.stdout and ":class:" not in result.stdout
    _, text = result.stdout.split("\n\n", 1)
    for line in text.splitlines():
        *_, description = re.split(r"\s{2,}", line)
        for sentence in description.split(". "):
            assert len(sentence.split()) <= 30, sentence


@pytest.mark.parametrize(
    "options, message",
    [
        (("--model", "/nope"), "/nope is not a folder, and not a name on the hub: give the folder"),
        (("--adapter-path", "nope"), "The adapter path nope has no adapter_config.json: give"),
        (("--profile", "nofile"), "The profile nofile does not exist: give a file that calibrate"),
        (("--prompt", ""), "The prompt is empty: give a text as --prompt"),
    ],
)
def test_what_is_not_there_is_named_with_a_remedy(options, message):
    assert_refused(generate(*options), message)


def test_an_empty_standard_input_is_an_empty_prompt(tmp_path):
    assert_refused(generate("--prompt", "-", input=""), "The prompt is empty")
    options = ("--model", TINY_LM, "--prompt", "-", "--prompt-cache-file", str(tmp_path / "cache"))
    assert_refused(run("cache_prompt", *options, input=""), "The prompt is empty")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("command", ["evaluate", "benchmark", "server", "chat"])
def test_every_command_names_a_profile_that_is_not_there(command):
    result = run(command, "--model", TINY_LM, "--profile", "nofile")
    assert_refused(result, "The profile nofile does not exist: give a file")


def test_a_hub_that_cannot_be_reached_is_not_blamed_on_the_name():
    result = run(
        "plan", "--model", "some/model", env={**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": "/x"}
    )
    assert_refused(result, "some/model is not a folder, and the Hugging Face hub could not be re")


def test_a_name_that_the_hub_does_not_have_is_no_name():
    missing = RepositoryNotFoundError.__new__(RepositoryNotFoundError)
    with (
        pytest.raises(ValueError, match="some/model is not a folder, and not a name on the hub"),
        model_errors("some/model"),
    ):
        raise missing


def test_a_bare_number_is_a_size_in_gigabytes():
    assert parse_size("16") == parse_size("16GB") == 16 * 10**9
    assert parse_size("1023.5") == 1023_500_000_000
    assert parse_size("1024") == parse_size("1024B") == 1024
    assert parse_size("8B") == 8
    assert run(*PLAN, "16").stdout == run(*PLAN, "16GB").stdout
    for nonsense in ("0", "0GB", "-8", "8 bananas", ""):
        with pytest.raises(ValueError, match="is not a size of memory: use one like 16GB"):
            parse_size(nonsense)


def test_plan_says_which_bits_to_use_and_why_caches_of_mlx_lm_hold_less():
    *_, why, advice = run(*PLAN, "16").stdout.splitlines()
    assert why.startswith("mlx-lm's quantized caches fit fewer tokens than their bytes suggest")
    assert advice == (
        "Use 4.5 bits, the largest cache that holds the 131,072 tokens that the model was "
        "trained for."
    )
    last = run(*PLAN, "64").stdout.splitlines()[-1]
    assert last.startswith("Use the exact cache, the largest cache that holds")
    lines = run(*PLAN, "9", "--kv-bits", "8", "4").stdout.splitlines()
    reached = next(line.split()[3] for line in lines if line.startswith("4 bits"))
    assert lines[-1].startswith(f"Use 4 bits, which holds {reached} of the 131,07")


def test_plan_keeps_silent_about_workspace_where_all_caches_need_it():
    result = run("plan", "--shape", "qwen3.8-27b", "--memory", "64")
    assert result.returncode == 0 and "fewer tokens than" not in result.stdout


def test_short_caches_are_called_exact_and_have_no_ratio(tmp_path):
    assert "nothing is packed yet" in generate("--uniform").stdout
    out = ("--out", str(tmp_path))
    result = run(*EVALUATE, *SHORT, *out)
    assert "Still exact, because texts this short are not packed: 4 bits.\n" in result.stdout
    options = ("--contexts", "32", "300", "--repeats", "1", "--new-tokens", "9", "--kv-bits", "4")
    result = run("benchmark", "--model", TINY_LM, "--uniform", *options, *out)
    rows = [line for line in result.stdout.splitlines() if "4 bits" in line and "mlx" not in line]
    assert ["(still exact)" in row for row in rows] == [True, False]


@pytest.mark.parametrize("command", [(*PLAN, "16"), ("doctor",), ("--help",), ("plan", "--help")])
def test_a_reader_that_has_gone_ends_a_command_quietly(command):
    reading, writing = os.pipe()
    os.close(reading)
    # Without a buffer argparse would ignore the error itself.
    environment = {**os.environ, "MLX_TURBOQUANT_BACKEND": "reference", "PYTHONUNBUFFERED": ""}
    result = subprocess.run(
        [sys.executable, "-m", "mlx_turboquant", *command],
        stdout=writing,
        stderr=subprocess.PIPE,
        env=environment,
    )
    os.close(writing)
    assert (result.returncode, result.stderr) == (128 + signal.SIGPIPE, b"")


def test_a_table_that_nobody_reads_ends_a_command_quietly(tmp_path):
    reading, writing = os.pipe()
    os.close(reading)
    result = subprocess.run(
        [sys.executable, "-m", "mlx_turboquant", *EVALUATE, *SHORT, "--out", tmp_path],
        stdout=writing,
        stderr=subprocess.PIPE,
        text=True,
    )
    os.close(writing)
    assert result.returncode == 128 + signal.SIGPIPE
    assert "Traceback" not in result.stderr and "Exception" not in result.stderr
    assert sorted(file.name for file in tmp_path.iterdir()) == ["evaluation.json", "kl.png"]


def test_ctrl_c_ends_a_command_without_a_traceback(tmp_path):
    command = [sys.executable, "-m", "mlx_turboquant", *EVALUATE, "--out", str(tmp_path / "out")]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        while "%|" not in process.stderr.readline(50):
            assert process.poll() is None
        process.send_signal(signal.SIGINT)
        assert "Traceback" not in process.stderr.read()
    assert process.returncode == 130
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize("columns, tables", [(80, 2), (40, 4)])
def test_a_table_fits_into_a_terminal_with_every_number(tmp_path, columns, tables):
    arguments = ["-m", "mlx_turboquant", *EVALUATE, *SHORT, "--out", str(tmp_path)]
    environment = {name: value for name, value in os.environ.items() if name != "COLUMNS"}
    about = {"encoding": "utf-8", "timeout": 60, "env": environment, "dimensions": (24, columns)}
    terminal = pexpect.spawn(sys.executable, arguments, **about)
    terminal.expect(pexpect.EOF)
    table = terminal.before.partition("1 text of 64 tokens")[2]
    assert max(map(len, table.split("Still exact")[0].splitlines())) <= columns
    rows = re.findall(r"^exact  +(.*\S)\s*$", table, flags=re.M)
    assert len(rows) == tables and "\x1b" not in table
    [codec, *_] = json.loads((tmp_path / "evaluation.json").read_text())["codecs"]
    divergences = ["0.00000", "0.0000", "0.0000", "0.000"]
    numbers = ["16.00", "2,048", *divergences, f"{codec['perplexity']:.3f}", *2 * ["100.0%"]]
    assert re.split("  +", "  ".join(rows)) == [*numbers, "> 2"]


def no_space() -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))


def restricted(restrict, *arguments: str, **options) -> subprocess.CompletedProcess:
    """Run a command in a process that calls ``restrict`` first."""
    command = [sys.executable, "-m", "mlx_turboquant", *arguments]
    options |= {"capture_output": True, "text": True, "preexec_fn": restrict}
    return subprocess.run(command, **options)


@pytest.mark.parametrize(
    "command",
    [
        (*EVALUATE, "--out"),
        ("benchmark", "--model", TINY_LM, "--uniform", "--out"),
        ("doctor", "--report"),
        ("calibrate", "--model", TINY_LM, "--out"),
        ("cache_prompt", "--model", TINY_LM, "--prompt", "x", "--prompt-cache-file"),
        ("generate", "--model", TINY_LM, "--prompt", "x", "--prompt-store"),
    ],
)
def test_a_folder_that_cannot_be_written_to_is_refused_before_work_is_done(tmp_path, command):
    tmp_path.chmod(0o500)
    result = restricted(not_above_permissions, *command, str(tmp_path / "new"))
    tmp_path.chmod(0o700)
    assert_refused(result, "cannot be written (Permission denied): use a place with space")
    assert str(tmp_path) in result.stderr and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "command", [("doctor", "--report"), ("generate", "--model", TINY_LM, "--prompt-store")]
)
def test_a_full_disk_is_one_sentence_and_leaves_no_half_made_file(tmp_path, command):
    environment = {**os.environ, "MLX_TURBOQUANT_BACKEND": "reference"}
    place = tmp_path / "report.md" if command[0] == "doctor" else tmp_path
    result = restricted(no_space, *command, str(place), env=environment)
    assert_refused(result, f"{tmp_path}")
    assert "cannot be written (File too large): use a place with space" in result.stderr
    assert not list(tmp_path.iterdir())


def test_a_calibration_whose_profile_cannot_be_written_prints_its_table_all_the_same(tmp_path):
    out = tmp_path / "profile.json"
    result = restricted(no_space, "calibrate", "--model", TINY_LM, "--out", str(out))
    assert result.returncode == 2
    assert f"{out.with_suffix('')}." in result.stderr.splitlines()[-1]
    assert "Below 0.001 nats no one will notice" in result.stdout and "528" in result.stdout
    assert not list(tmp_path.iterdir())


def test_closed_streams_are_no_files():
    command = f"{sys.executable} -m mlx_turboquant plan --shape llama-3.1-8b --memory 64 <&- >&-"
    result = subprocess.run(["sh", "-c", command], capture_output=True, text=True)
    assert result.returncode == 0 and result.stderr == ""


@pytest.mark.parametrize("module", ["mlx.core", "numpy.linalg", "mlx_lm.utils"])
def test_ctrl_c_while_a_command_is_imported_says_nothing(module):
    code = (
        "import os, signal, sys\n"
        "class CtrlC:\n"
        "    def find_spec(self, name, *_):\n"
        f"        if name == '{module}': os.kill(os.getpid(), signal.SIGINT)\n"
        "sys.meta_path.insert(0, CtrlC())\n"
        "from mlx_turboquant.cli import main\n"
        "sys.argv = ['mlx_turboquant', 'evaluate', '--model', 'nothing']\n"
        "main()"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (-signal.SIGINT, "")  # 130 in a shell


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="Linux has a device that is full")
def test_a_full_disk_behind_the_output_is_one_sentence():
    with open("/dev/full", "w") as full:
        result = subprocess.run(
            [sys.executable, "-m", "mlx_turboquant", *PLAN, "16"],
            stdout=full,
            stderr=subprocess.PIPE,
        )
    assert result.returncode == 2
    assert result.stderr == b"mlx_turboquant plan: [Errno 28] No space left on device\n"


def test_doctor_refuses_to_replace_what_is_no_report_before_it_works(tmp_path):
    environment = {**os.environ, "MLX_TURBOQUANT_BACKEND": "reference"}
    result = run("doctor", "--report", str(tmp_path), env=environment)
    assert_refused(result, f"{tmp_path} exists and is not a report: give another name.")
    assert result.stdout == ""
    for _ in range(2):
        result = run("doctor", "--report", "report.md", env=environment, cwd=tmp_path)
        assert result.returncode == 0 and (tmp_path / "report.md").exists()


def test_the_report_of_doctor_is_there_before_anything_is_printed_of_it(monkeypatch, tmp_path):
    def fail(*arguments):
        raise BrokenPipeError

    monkeypatch.setattr(doctor, "backend", lambda: "metal")
    monkeypatch.setattr(doctor, "_configurations", lambda: [()])
    monkeypatch.setattr(doctor, "_check", lambda: doctor.Checked("k", "c", 0.0, 1.0, 0.1, "ok"))
    monkeypatch.setattr(doctor, "_report", lambda results: "?")
    monkeypatch.setattr(doctor, "_settings", fail)
    with pytest.raises(BrokenPipeError):
        doctor.main(["--report", str(tmp_path / "report.md")])
    assert (tmp_path / "report.md").exists()


def test_doctor_says_that_nothing_is_compared_without_a_gpu():
    result = run("doctor", env={**os.environ, "MLX_TURBOQUANT_BACKEND": "reference"})
    *_, last = result.stdout.splitlines()
    assert last == "Nothing was compared: without a GPU, plain MLX replaces the kernels."
    assert result.stderr == ""


@pytest.mark.parametrize("wrong, verdict", [(0, "All is well"), (1, "Not all is well")])
def test_doctor_ends_with_whether_all_is_well_on_a_gpu(monkeypatch, capsys, wrong, verdict):
    verdicts = iter(["WRONG"] * wrong + ["ok"] * 1000)
    monkeypatch.setattr(doctor, "backend", lambda: "metal")
    monkeypatch.setattr(
        doctor, "_check", lambda *_: doctor.Checked("k", "c", 0.0, 1.0, 0.1, next(verdicts))
    )
    monkeypatch.setattr(doctor, "_settings", lambda: [])
    with pytest.raises(SystemExit) as leaving:
        doctor.main([])
    first, *_, last = capsys.readouterr().out.splitlines()
    assert first.endswith("with plain MLX, which takes minutes, most to compile.")
    count = len(list(doctor._configurations()))
    assert last == f"{verdict}: {count - wrong} of {count} configurations are right."
    assert leaving.value.code == wrong
