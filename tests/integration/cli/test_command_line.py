"""The `steward` command from outside: exit codes, one line per mistake, a clean stdout."""

import os
import subprocess
from pathlib import Path

import jwt
import pytest

from steward.cli.cluster_file import CLUSTER_FILE
from steward.rpc.keys import USER_KEY, load_or_create_key
from steward.testing.command import run_steward
from steward.tokens import AUDIENCE


def steward(*words: str, **environ: str) -> "subprocess.CompletedProcess[str]":
    return run_steward(*words, environ={**os.environ, **environ})


@pytest.mark.parametrize(
    "words",
    [
        (),
        ("dance",),
        ("token",),
        ("up", "--agents", "many"),
        ("up", "--colour", "blue"),
        ("up", "--data", ""),
        ("up", "--agent", "no\nline.py:answer"),
        ("config", "everything"),
        ("status", "--users", "0"),
        ("status", "--users", "513"),
        ("status", "--users", "-1"),
        ("status", "--users", "many"),
        ("status", "--registry", "localhost"),
        ("where",),
    ],
)
def test_wrong_use_is_one_line_and_exit_code_2(words: tuple[str, ...]) -> None:
    answer = steward(*words)
    assert answer.returncode == 2
    assert answer.stdout == ""
    assert answer.stderr.startswith("steward: ")
    assert answer.stderr.count("\n") == 1


def test_help_is_a_result() -> None:
    answer = steward("up", "--help")
    assert answer.returncode == 0
    assert "--agent FILE_OR_MODULE:ATTR" in answer.stdout


def test_token_prints_a_token_and_a_newline_and_makes_only_the_key(tmp_path: Path) -> None:
    data = tmp_path / "data"
    answer = steward("token", "--data", str(data), "--user", "alice", "--scope", "chat read")
    assert (answer.returncode, answer.stderr) == (0, "")
    assert answer.stdout.count("\n") == 1
    key = load_or_create_key(data, USER_KEY).public_key()
    claims = jwt.decode(answer.stdout.strip(), key, algorithms=["EdDSA"], audience=AUDIENCE)
    assert (claims["sub"], claims["tid"], claims["scope"]) == ("alice", "default", "chat read")
    assert [str(path.relative_to(data)) for path in sorted(data.rglob("*"))] == [
        "keys",
        f"keys/{USER_KEY}",
    ]


@pytest.mark.parametrize("ttl", ["0", "-5", "99999999999"])
def test_a_token_with_an_impossible_life_is_refused(tmp_path: Path, ttl: str) -> None:
    answer = steward("token", "--data", str(tmp_path), "--user", "alice", f"--ttl={ttl}")
    assert (answer.returncode, answer.stdout) == (2, "")
    assert answer.stderr.count("\n") == 1


def test_a_user_id_that_can_not_be_is_refused(tmp_path: Path) -> None:
    answer = steward("token", "--data", str(tmp_path), "--user", "")
    assert (answer.returncode, answer.stdout) == (2, "")


@pytest.mark.parametrize(
    "command",
    [
        ("where", "alice"),
        ("status",),
        ("move", "alice"),
        ("drain", "node-0"),
        ("evict", "alice"),
        ("violations",),
        ("attack", "--all"),
    ],
)
def test_without_a_cluster_the_operator_is_told_how_to_start_one(
    tmp_path: Path, command: tuple[str, ...]
) -> None:
    answer = steward(*command, "--data", str(tmp_path))
    assert (answer.returncode, answer.stdout) == (2, "")
    assert "steward up" in answer.stderr
    assert not (tmp_path / CLUSTER_FILE).exists()


def test_a_service_command_becomes_the_service() -> None:
    answer = steward("auth", "--no-such-option")
    assert answer.returncode == 2
    assert "--no-such-option" in answer.stderr


def test_config_defaults_names_the_settings_of_every_service() -> None:
    answer = steward("config", "defaults")
    assert answer.returncode == 0, answer.stderr
    for role in ("REGISTRY", "AUTH", "LOG", "AGENT", "EDGE"):
        assert f"STEWARD_{role}_OPS_PORT=0\n" in answer.stdout


def test_config_check_shows_what_is_set() -> None:
    answer = steward("config", "check", STEWARD_EDGE_OPS_PORT="9080")
    assert answer.returncode == 0, answer.stderr
    assert answer.stdout == "STEWARD_EDGE_OPS_PORT=9080\n"


@pytest.mark.parametrize("name", ["STEWARD_EDGE_OPS_PROT", "STEWARD_EGDE_OPS_PORT"])
def test_config_check_refuses_a_misspelt_setting_by_its_name(name: str) -> None:
    answer = steward("config", "check", **{name: "1"})
    assert (answer.returncode, answer.stdout) == (2, "")
    assert name in answer.stderr
