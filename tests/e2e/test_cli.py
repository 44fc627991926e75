"""The commands as a person runs them: what they print, what they say of wrong input, how they end."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
from typer.testing import CliRunner

from kvarn.cli.main import app
from kvarn.serving.executors.torch_executor import TorchExecutor
from tests.conftest import ServerProcess


def kvarn(*arguments: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "kvarn.cli.main", *arguments]
    return subprocess.run(command, input=stdin, capture_output=True, text=True, timeout=240, check=False)


def test_generate_prints_text():
    done = kvarn("generate", "What is the capital of France?", "--temperature", "0", "--precision", "float32")
    assert done.returncode == 0, done.stderr
    assert "Paris" in done.stdout


def test_generate_json_for_a_file_of_prompts(tmp_path: Path):
    file = tmp_path / "prompts.txt"
    file.write_text("One, two,\n\nThe sky is\n")
    done = kvarn("generate", "--file", str(file), "--raw", "--json", "--max-tokens", "5", "--seed", "1")
    assert done.returncode == 0, done.stderr
    records = [json.loads(line) for line in done.stdout.splitlines()]
    assert [record["output_tokens"] for record in records] == [5, 5]


def test_chat_asks_a_running_server(server: ServerProcess):
    done = kvarn("chat", "--base-url", f"{server.url}/v1", "--once", "Say hello.", "--max-tokens", "16")
    assert done.returncode == 0, done.stderr
    assert "tokens/s" in done.stdout


def test_chat_reads_lines_and_commands(server: ServerProcess):
    lines = "/system Be brief.\nHello\n/clear\n/exit\n"
    done = kvarn("chat", "--base-url", f"{server.url}/v1", "--max-tokens", "8", stdin=lines)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("tokens/s") == 1


def test_chat_goes_on_after_an_error(server: ServerProcess):
    lines = "word " * 9000 + "\nHello\n/exit\n"
    done = kvarn("chat", "--base-url", f"{server.url}/v1", "--max-tokens", "8", stdin=lines)
    assert done.returncode == 0, done.stderr
    assert "context" in done.stdout and done.stdout.count("tokens/s") == 1


@pytest.mark.parametrize("as_json", [True, False])
def test_generate_says_what_broke_and_exits_1(monkeypatch: pytest.MonkeyPatch, as_json: bool):
    def fail(*_: object) -> None:
        raise RuntimeError("boom")

    monkeypatch.setattr(TorchExecutor, "execute", fail)
    done = CliRunner().invoke(app, ["generate", "hi", *(["--json"] if as_json else [])])
    assert done.exit_code == 1
    assert "error: the forward pass failed: boom" in done.stderr
    if as_json:
        assert json.loads(done.stdout)["error"] == "the forward pass failed: boom"


def test_model_inspect_and_list():
    facts = json.loads(kvarn("model", "inspect", "smollm2", "--json").stdout)
    assert facts["architecture"] == "LlamaForCausalLM" and facts["kv_bytes_per_token_bfloat16"] == 23_040
    listed = json.loads(kvarn("model", "list", "--json").stdout)
    assert "smollm2" in [model["name"] for model in listed]
    assert Path(kvarn("model", "pull", "smollm2").stdout.strip()).is_dir()


def test_bench_serve_reports_json(server: ServerProcess):
    done = kvarn(
        "bench", "serve", "--base-url", server.url, "--model", "smollm2", "--arrivals", "burst", "--requests", "4",
        "--input-tokens", "16", "--output-tokens", "8", "--json",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("generate",), "no prompt"),
        (("generate", "hi", "--model", "no-such-model"), "no-such-model"),
        (("generate", "hi", "--temperature", "9"), "temperature"),
        (("generate", "hi", "--max-tokens", "0"), "max-tokens"),
        (("serve", "--threads", "100000000"), "threads"),
        (("serve", "--max-running", "1000000000000"), "max_running"),
        (("generate", "hi", "--precision", "float7"), "float7"),
        (("generate", "word " * 9000), "context"),
        (("generate", "hi", "--file", "absent.txt"), "absent.txt"),
        (("chat", "--base-url", "http://127.0.0.1:9", "--once", "hi"), "kvarn serve"),
        (("chat", "--base-url", "http://[::1", "--once", "hi"), "http://[::1"),
        (("model", "inspect", "absent.gguf"), "absent.gguf"),
        (("frobnicate",), "frobnicate"),
    ],
)
def test_wrong_input_is_one_message_and_exit_code_2(arguments: tuple[str, ...], message: str):
    done = kvarn(*arguments)
    assert done.returncode == 2
    assert message in done.stderr and "Traceback" not in done.stderr


def test_kernels_that_do_not_exist_are_one_message(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("KVARN_KERNELS", "quantum")
    done = kvarn("serve")
    assert done.returncode == 2
    assert "KVARN_KERNELS is 'quantum'" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize("answer", ["<html>", "[]", '{"data": []}'])
def test_chat_with_something_that_is_no_openai_server(answer: str):
    class Elsewhere(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(answer.encode())

        def log_message(self, *_: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Elsewhere) as elsewhere:
        thread = threading.Thread(target=elsewhere.handle_request)
        thread.start()
        done = kvarn("chat", "--base-url", f"http://127.0.0.1:{elsewhere.server_port}", "--once", "hi")
        thread.join()
    assert done.returncode == 2
    assert "no model" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize(
    "header", [b"{not json", b"[1]", b'{"a": {"shape": [2]}}', b'{"a": {"shape": "x", "data_offsets": 1}}']
)
def test_inspect_names_a_corrupt_file(tmp_path: Path, model_folder: Path, header: bytes):
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((model_folder / name).read_bytes())
    (tmp_path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    done = kvarn("model", "inspect", str(tmp_path))
    assert done.returncode == 2
    assert "model.safetensors" in done.stderr and "Traceback" not in done.stderr


def test_corrupt_files_are_named(tmp_path: Path, model_folder: Path):
    gguf = tmp_path / "broken.gguf"
    gguf.write_bytes(b"GGUF\x03\x00\x00\x00" + b"\xff" * 64)
    folder = tmp_path / "model"
    folder.mkdir()
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((model_folder / name).read_bytes())
    (folder / "model.safetensors").write_bytes(b"\x10\x00\x00\x00\x00\x00\x00\x00{not json")
    for broken in (gguf, folder):
        done = kvarn("generate", "hi", "--model", str(broken))
        assert done.returncode == 2, done.stderr
        assert broken.name in done.stderr and "Traceback" not in done.stderr
