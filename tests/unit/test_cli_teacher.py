"""``eopd teacher serve``: a user's mistake is one message and exit code 2, before any engine
starts.
"""

import json
import socket
import sys

import pytest

from eopd.cli.main import main

CONFIG = """
run: {{name: served, batches: 1}}
student: {{model: /nowhere}}
teachers:
  - {{name: first, model: {root}/model}}
  - {{name: gone, model: {root}/gone, sources: a}}
  - {{name: far, model: {root}/model, sources: b, backend: eopd, server: {{url: "http://far"}}}}
prompts: {{data: none, held_out: none, max_tokens: 32}}
rollout: {{max_response_tokens: 32}}
evaluation: {{max_response_tokens: 32}}
flow: {{batch_prompts: 1}}
loss: {{top_k: {top_k}}}
"""


@pytest.fixture
def root(tmp_path, monkeypatch):
    (tmp_path / "model").mkdir()
    config = {
        "vocab_size": 20,
        "max_position_embeddings": 64,
        "architectures": ["LlamaForCausalLM"],
    }
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    header = b'{"a": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}}'
    (tmp_path / "model" / "model.safetensors").write_bytes(
        len(header).to_bytes(8, "little") + header
    )
    (tmp_path / "c.yaml").write_text(CONFIG.format(root=tmp_path, top_k=16))
    (tmp_path / "wide.yaml").write_text(CONFIG.format(root=tmp_path, top_k=21))
    monkeypatch.setenv("EMPTY", "")
    monkeypatch.setenv("SPACED", "a b")
    monkeypatch.delenv("UNSET", raising=False)

    return tmp_path


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("{root}/no.yaml", "{root}/no.yaml: cannot be read (No such file or directory)"),
        (
            "{root}/c.yaml --teacher x",
            "--teacher x: there is no such teacher; there is first, gone, far",
        ),
        (
            "{root}/c.yaml --teacher far",
            "teachers.far.backend: is eopd, served already; here it must be vllm",
        ),
        ("{root}/c.yaml --teacher gone", "teachers.gone.model: there is no directory {root}/gone;"),
        ("{root}/wide.yaml", "loss.top_k: 21 is larger than the vocabulary of 20 tokens"),
        (
            "{root}/c.yaml --host 0.0.0.0",
            "--host 0.0.0.0: needs --api-key-env; without a token only this machine",
        ),
        ("{root}/c.yaml --host ::", "--host ::: needs --api-key-env"),
        ("{root}/c.yaml --host teacher.example", "--host teacher.example: needs --api-key-env"),
        (
            "{root}/c.yaml --api-key-env UNSET",
            "--api-key-env UNSET: there is no such environment variable",
        ),
        ("{root}/c.yaml --api-key-env EMPTY", "--api-key-env EMPTY: must hold a token"),
        ("{root}/c.yaml --api-key-env SPACED", "--api-key-env SPACED: must hold a token"),
    ],
)
def test_a_mistake_is_one_message_and_exit_code_2(root, arguments, message, capsys, monkeypatch):
    monkeypatch.setattr(
        sys, "argv", ["eopd", "teacher", "serve", *arguments.format(root=root).split()]
    )
    with pytest.raises(SystemExit) as caught:
        main()

    assert caught.value.code == 2
    shown = capsys.readouterr().err
    assert shown.startswith("error: " + message.format(root=root)) and shown.count("\n") == 1


def test_a_taken_port_is_a_mistake_too():
    from eopd.config import ConfigError
    from eopd.teacher.served.server import bind

    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"--host 127.0.0.1 --port {port}: cannot be served"):
            bind("127.0.0.1", port)

    with bind("127.0.0.1", port) as free:
        assert free.getsockname() == ("127.0.0.1", port)


@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.2", "::1", "localhost"])
def test_this_machine_needs_no_token(host):
    from eopd.cli.teacher import token_for

    assert token_for(None, host) is None
