"""Which store the settings of a registry name."""

from pathlib import Path

import pytest

from registry_service.settings import RegistrySettings
from registry_service.store.choice import etcd_access, make_store
from registry_service.store.etcd import EtcdStore
from registry_service.store.etcd_client import EtcdAccess
from registry_service.store.sqlite import SqliteStore
from steward.config.settings import SettingsError, describe, load
from steward.runtime.clock import boot_ms


def settings(tmp_path: Path, **environ: str) -> RegistrySettings:
    names = {f"STEWARD_REGISTRY_{name.upper()}": value for name, value in environ.items()}
    return load(RegistrySettings, [f"--data={tmp_path}", "--cluster=blue"], names)


def test_without_a_setting_it_is_the_embedded_one(tmp_path: Path) -> None:
    store, clock = make_store(settings(tmp_path))
    assert isinstance(store, SqliteStore)
    assert clock is boot_ms


def test_an_etcd_url_names_hosts_and_the_cluster(tmp_path: Path) -> None:
    given = settings(tmp_path, store="etcd://h1:2379, h2,[::1]:2381,[::2]/green")
    hosts = ("h1:2379", "h2:2379", "[::1]:2381", "[::2]:2379")
    assert etcd_access(given) == (EtcdAccess(hosts), "green")
    store, clock = make_store(given)
    assert isinstance(store, EtcdStore)
    assert clock is not boot_ms


def test_without_a_name_it_is_that_of_the_cluster(tmp_path: Path) -> None:
    assert etcd_access(settings(tmp_path, store="etcd://h1"))[1] == "blue"


def test_credentials_are_settings_of_their_own_and_the_password_is_never_shown(
    tmp_path: Path,
) -> None:
    files = {name: tmp_path / name for name in ("ca", "cert", "key")}
    for name, file in files.items():
        file.write_text(f"the {name}")
    given = settings(
        tmp_path,
        store="etcd://h1",
        store_user="registry",
        store_password="word",
        **{f"store_{name}": str(file) for name, file in files.items()},
    )
    access, _ = etcd_access(given)
    assert (access.ca, access.cert, access.key) == (b"the ca", b"the cert", b"the key")
    assert (access.user, access.password) == ("registry", "word")
    assert "word" not in [row["value"] for row in describe(given)]
    assert "word" not in repr(access)


@pytest.mark.parametrize(
    ("environ", "why"),
    [
        ({"store": "postgresql://h/d"}, "neither sqlite nor etcd"),
        ({"store": "etcd:///green"}, "names no host"),
        ({"store": "etcd://me:word@h1/green"}, "by settings of their own"),
        ({"store": "etcd://h1", "store_cert": "/nowhere"}, "go together"),
        ({"store": "etcd://h1", "store_ca": "/nowhere"}, "registry.store_ca: /nowhere"),
    ],
)
def test_what_can_not_be_used_is_refused_in_one_line(
    tmp_path: Path, environ: dict[str, str], why: str
) -> None:
    with pytest.raises(SettingsError, match=why) as refused:
        make_store(settings(tmp_path, **environ))
    assert "\n" not in str(refused.value)
