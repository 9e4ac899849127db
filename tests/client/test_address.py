"""Addresses of servers as people write them, and the proxies of the environment."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from reftserve.client import AsyncClient, Client
from reftserve.client.address import base_url, connection_options
from reftserve.client.exceptions import AddressError

PROXIES = ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY")


@pytest.fixture(autouse=True)
def no_proxies(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in PROXIES:
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("http://127.0.0.1:8000", "http://127.0.0.1:8000"),
        ("http://host", "http://host"),
        ("https://host/", "https://host"),
        ("HTTP://Host:80/v1/", "http://host"),
        ("host:9000", "http://host:9000"),
        ("host", "http://host:8000"),
        ("host/behind/a/proxy/v1", "http://host:8000/behind/a/proxy"),
        (" localhost:8000/v1 ", "http://localhost:8000"),
        ("http://[::1]:8000/v1", "http://[::1]:8000"),
        ("[::1]:8000", "http://[::1]:8000"),
        ("[::1]", "http://[::1]:8000"),
        ("::1", "http://[::1]:8000"),
        ("fe80::a", "http://[fe80::a]:8000"),
        ("1:2:3:4:5:6:7:8:9000", "http://[1:2:3:4:5:6:7:8]:9000"),
    ],
)
def test_an_address_may_lack_its_scheme_port_and_brackets(written: str, meant: str) -> None:
    assert base_url(written) == meant


@pytest.mark.parametrize(
    ("written", "reason"),
    [
        ("", "names no host"),
        ("http://", "names no host"),
        ("/v1", "names no host"),
        ("ftp://host", "expected http:// or https://"),
        ("http://127.0.0.1:port", "Invalid port: 'port'"),
        ("::1:8000", r"two ways; write \[::1:8000\] or \[::1\]:8000"),
        ("http://[::1", "is wrong"),
        ("host:99999", "port 99999; the last one is 65535"),
    ],
)
def test_a_wrong_address_is_refused_with_what_is_expected(written: str, reason: str) -> None:
    with pytest.raises(AddressError, match=reason) as found:
        Client(written)
    assert "\n" not in str(found.value)
    with pytest.raises(AddressError, match=reason):
        AsyncClient(written)


@pytest.mark.parametrize("url", ["127.0.0.1", "localhost", "my.localhost", "[::1]", "0.0.0.0:8000", "127.8.9.10"])
@pytest.mark.parametrize("proxy", ["http://127.0.0.1:9", "socks5://127.0.0.1:9", "nonsense://x"])
def test_no_proxy_is_asked_for_this_machine(url: str, proxy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in PROXIES[:3]:
        monkeypatch.setenv(name, proxy)
    assert connection_options(url, None)["trust_env"] is False
    Client(url).close()


def test_a_host_in_no_proxy_is_asked_directly_and_others_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ALL_PROXY", "http://proxy:3128")
    monkeypatch.setenv("NO_PROXY", "inner.example")
    assert connection_options("inner.example", None)["trust_env"] is False
    assert connection_options("outer.example", None)["trust_env"] is True


def test_certificates_of_the_environment_are_read_for_direct_hosts_too(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("NO_PROXY", "inner.example")
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "no-file"))
    with pytest.raises(FileNotFoundError):
        connection_options("https://inner.example", None)
    connection_options("http://inner.example", None)


def test_a_socks_proxy_without_its_package_is_refused_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "socksio", None)
    monkeypatch.setattr("reftserve.client.address.find_spec", lambda name: None)
    monkeypatch.setenv("ALL_PROXY", "socks5://proxy:1080")
    with pytest.raises(
        AddressError, match=r"ALL_PROXY is a SOCKS proxy: pip install 'httpx\[socks\]', or unset ALL_PROXY"
    ):
        Client("host")


def test_a_proxy_that_cannot_be_used_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTP_PROXY", "gopher://proxy")
    with pytest.raises(AddressError, match="HTTP_PROXY is no proxy that can be used"):
        Client("host")


def test_a_file_name_that_is_no_utf8_can_be_uploaded(tmp_path: Path) -> None:
    from reftserve.client.calls.files import upload_file

    file = Path(os.fsdecode(os.fsencode(tmp_path) + b"/m\xfcller.jsonl"))
    call = upload_file(file, "fine-tune", None)
    assert call.upload is not None
    assert call.upload.name == "m\N{REPLACEMENT CHARACTER}ller.jsonl"
    umlaut = upload_file(tmp_path / "m\N{LATIN SMALL LETTER U WITH DIAERESIS}ller.jsonl", "fine-tune", None).upload
    assert umlaut is not None
    assert umlaut.name == "m\N{LATIN SMALL LETTER U WITH DIAERESIS}ller.jsonl"
