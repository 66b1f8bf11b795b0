"""The file for Ray's cluster launcher is valid by Ray's own schema, and names what is there."""

import importlib.util
import json
import os
import re
import subprocess
from pathlib import Path

import jsonschema
import pytest
import yaml

ROOT = Path(__file__).parents[2]
PATH = ROOT / "cluster" / "ray-cluster.yaml"
COMMANDS = ("setup_commands", "head_start_ray_commands", "worker_start_ray_commands")


def written():
    return yaml.safe_load(PATH.read_text(encoding="utf-8"))


def schema():
    """Ray's schema, found without importing Ray."""
    (folder,) = importlib.util.find_spec("ray").submodule_search_locations
    return json.loads((Path(folder) / "autoscaler" / "ray-schema.json").read_text(encoding="utf-8"))


def test_ray_s_own_schema_takes_it():
    jsonschema.validate(written(), schema())


def test_the_schema_refuses_a_key_that_ray_does_not_know():
    with pytest.raises(jsonschema.ValidationError, match="setup_comands"):
        jsonschema.validate(written() | {"setup_comands": []}, schema())


def test_commands_find_the_checkout_where_it_is_put():
    cluster = written()
    assert cluster["file_mounts"]["~/eopd"] == "."
    text = "\n".join(command for name in COMMANDS for command in cluster[name])
    assert set(re.findall(r"(~/[\w-]+)(?=[/ ])", text)) == {"~/eopd"}
    for lock in re.findall(r"LOCK=(\S+)", text):
        assert (ROOT / lock).is_file()


def test_a_shell_on_the_head_finds_ray(tmp_path):
    """As that of ``ray exec`` and of ``ray down``, which otherwise leaves Ray running; written once."""
    (command,) = [text for text in written()["setup_commands"] if ".bashrc" in text]
    program = tmp_path / "eopd/.venv/bin/ray"
    program.parent.mkdir(parents=True)
    program.write_text("#!/bin/sh\necho found $RAY_AUTH_MODE\n")
    program.chmod(0o755)

    def shell(*words):
        environment = {"HOME": str(tmp_path), "PATH": os.environ["PATH"]}
        done = subprocess.run(
            ["bash", *words], env=environment, stdout=subprocess.PIPE, text=True, check=True
        )
        return done.stdout

    shell("-c", command)
    shell("-c", command)
    assert len((tmp_path / ".bashrc").read_text().splitlines()) == 1
    assert shell("--rcfile", str(tmp_path / ".bashrc"), "-i", "-c", "ray status") == "found token\n"


def test_head_and_workers_ask_for_the_token_that_is_copied_to_them():
    cluster = written()
    assert "~/.ray/auth_token" in cluster["file_mounts"]
    for name in COMMANDS[1:]:
        (start,) = [command for command in cluster[name] if "ray start" in command]
        assert "RAY_AUTH_MODE=token" in start
        assert ". .venv/bin/activate" in start  # jobs find eopd on the PATH of Ray's processes

    head = cluster["head_start_ray_commands"][-1]
    assert "--head" in head and "RAY_JOB_STOP_WAIT_TIME_S=" in head
    port = re.search(r"--port=(\d+)", head).group(1)
    assert f"--address=$RAY_HEAD_IP:{port}" in cluster["worker_start_ray_commands"][-1]
