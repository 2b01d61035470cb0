"""The image is made from the lock files, without root, from what is packaged and nothing else."""

import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[2]
DOCKERFILE = (ROOT / "deploy/docker/Dockerfile").read_text()
IGNORE = (ROOT / "deploy/docker/Dockerfile.dockerignore").read_text().splitlines()


def stages() -> list[str]:
    return DOCKERFILE.split("\nFROM ")[1:]


def test_every_installation_is_held_to_the_hashes_of_the_lock_files() -> None:
    joined = DOCKERFILE.replace("\\\n", " ")
    installs = [
        line for part in joined.splitlines() for line in part.split("&&") if " install " in line
    ]
    from_index = [i for i in installs if "pip" in i and "/dist/" not in i]
    assert len(from_index) == 2
    assert all("--require-hashes" in i and "--no-deps" in i for i in from_index)
    assert "-r requirements.lock" in from_index[0] and "dev" not in from_index[0]


def test_the_last_stage_runs_without_root_and_takes_only_the_environment() -> None:
    last = stages()[-1].splitlines()
    copies = [line for line in last if line.startswith(("COPY", "ADD"))]
    assert copies == ["COPY --from=build /opt/steward /opt/steward"]
    users = [line for line in last if line.startswith("USER")]
    assert users == ["USER 10001:10001"]
    assert 'ENTRYPOINT ["steward"]' in last


def test_the_build_sees_every_package_and_no_data_directory() -> None:
    allowed = {line.removeprefix("!") for line in IGNORE if line.startswith("!")}
    assert IGNORE[1] == "*"
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    packages = project["tool"]["setuptools"]["packages"]["find"]["include"]
    assert {name.removesuffix("*") for name in packages} <= allowed
    copied = {
        source
        for line in DOCKERFILE.splitlines()
        if line.startswith("COPY ") and "--from" not in line
        for source in line.split()[1:-1]
    }
    assert copied <= allowed
    assert not {".steward", ".git", ".venv", "tests"} & allowed
