"""Who may use the server: keys, hosts and origins, signed URLs, rates, the routes for operators."""

import os
import re
import ssl
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, urlsplit

import httpx
import pytest
from serving import certificates
from serving.clients import SMALL, sent
from serving.stub_ranks import StubRanks, free_port, front_settings, served

from halovae.serving.errors import ApiError
from halovae.serving.rates import Rates
from halovae.serving.signatures import Signatures

KEYS = "# keys of a test\n\nalice  alices-key\nbob bobs-key\nalice alices-new-key\n"


def completed(url: str, key: str, **fields: Any) -> str:
    """Make a small video with a key, and return its id."""
    answer = httpx.post(f"{url}/v1/videos", json={"prompt": "a", **SMALL, **fields}, headers=sent(key))
    assert answer.status_code == 200, answer.text
    video = str(answer.json()["id"])
    deadline = time.monotonic() + 30
    while httpx.get(f"{url}/v1/videos/{video}", headers=sent(key)).json()["status"] != "completed":
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return video


@pytest.fixture(scope="module")
def keyed(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    """The URL of a server with keys, and its output folder."""
    home = tmp_path_factory.mktemp("keyed")
    (home / "keys").write_text(KEYS)
    (home / "keys").chmod(0o600)
    with served(model, home / "output", api_key="secret", api_key_file=home / "keys") as (url, stub):
        assert isinstance(stub, StubRanks)
        yield url, home / "output"


@pytest.fixture(scope="module")
def open_server(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URL of a server without keys."""
    with served(model, tmp_path_factory.mktemp("open")) as (url, _):
        yield url


@pytest.mark.parametrize(
    ("header", "status"),
    [
        ("Bearer secret", 200), ("bearer secret", 200), ("BEARER alices-key", 200), ("Bearer alices-new-key", 200),
        ("Bearer wrong", 401), ("secret", 401), ("Basic secret", 401), ("Bearer", 401),
        ("Bearer secret secret", 401), ("Bearer Secret", 401), (None, 401),
    ],
)  # fmt: skip
def test_only_a_bearer_key_lets_in(header: str | None, status: int, keyed: tuple[str, Path]) -> None:
    answer = httpx.get(f"{keyed[0]}/v1/models", headers={} if header is None else {"authorization": header})
    assert answer.status_code == status
    if status == 401:
        assert answer.headers["www-authenticate"] == "Bearer"
        assert answer.json()["error"]["code"] == "invalid_api_key"


def test_jobs_of_one_key_do_not_exist_for_another(keyed: tuple[str, Path]) -> None:
    url, _ = keyed
    video = completed(url, "alices-key")
    for key, status in (("alices-new-key", 200), ("bobs-key", 404), ("secret", 404)):
        assert httpx.get(f"{url}/v1/videos/{video}", headers=sent(key)).status_code == status


def test_the_description_says_how_to_send_a_key_and_needs_no_internet(keyed: tuple[str, Path]) -> None:
    url, _ = keyed
    described = httpx.get(f"{url}/openapi.json").json()
    schemes = described["components"]["securitySchemes"]
    assert [(scheme["type"], scheme["scheme"]) for scheme in schemes.values()] == [("http", "bearer")]
    assert described["paths"]["/v1/videos"]["post"]["security"] == [{name: [] for name in schemes}]
    page = httpx.get(f"{url}/docs").text
    assert re.findall(r"https?://[^\s\"']+", page) == []
    loaded = re.findall(r"""(?:src|href)=["'](/[^"']+)["']""", page)
    assert len(loaded) == 2
    assert all(len(httpx.get(url + path).content) > 1000 for path in loaded)


def test_only_holders_of_keys_see_the_model_and_the_numbers_of_jobs(keyed: tuple[str, Path], open_server: str) -> None:
    url, _ = keyed
    assert {*httpx.get(f"{url}/health").json()} == {"status"}
    assert {*httpx.get(f"{url}/health", headers=sent("wrong")).json()} == {"status"}
    assert {*httpx.get(f"{url}/health", headers=sent("bobs-key")).json()} == {"status", "model", "jobs"}
    assert {*httpx.get(f"{open_server}/health").json()} == {"status", "model", "jobs"}


def test_routes_for_operators_may_require_a_key(model: Path, tmp_path: Path) -> None:
    with served(model, tmp_path, api_key="secret", private_endpoints=True) as (url, _):
        for path in ("/metrics", "/docs", "/openapi.json"):
            assert httpx.get(url + path).status_code == 401, path
            assert httpx.get(url + path, headers=sent("secret")).status_code == 200, path
        assert httpx.get(f"{url}/livez").status_code == 200


def test_routes_for_operators_may_have_a_port_of_their_own(model: Path, tmp_path: Path) -> None:
    port = free_port()
    with served(model, tmp_path, api_key="secret", admin_port=port) as (url, _):
        admin = f"http://127.0.0.1:{port}"
        for path in ("/metrics", "/docs", "/openapi.json"):
            assert httpx.get(url + path, headers=sent("secret")).status_code == 404, path
            assert httpx.get(admin + path).status_code == 200, path
            assert httpx.head(admin + path).status_code == 200, path
        for path in ("/livez", "/readyz", "/health"):
            assert httpx.get(url + path).status_code == httpx.get(admin + path).status_code, path
        assert {*httpx.get(f"{url}/health").json()} == {"status"}
        assert {*httpx.get(f"{admin}/health").json()} == {"status", "model", "jobs"}
        for path in ("/v1/models", "/", "/v1/videos"):
            assert httpx.get(admin + path, headers=sent("secret")).status_code == 404, path
        assert httpx.get(f"{admin}/metrics", headers={"host": "evil.example"}).status_code == 421
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{admin}/livez")


def test_the_description_on_the_admin_port_names_the_other_port(model: Path, tmp_path: Path) -> None:
    port = free_port()
    with served(model, tmp_path, stub=False, admin_port=port, root_path="/made") as (url, _):
        described = httpx.get(f"http://127.0.0.1:{port}/openapi.json").json()
        assert described["servers"] == [{"url": f"{url}/made"}]
        assert f"another port than this page's: {url}/made" in described["info"]["description"]
        page = httpx.get(f"http://127.0.0.1:{port}/docs").text
        assert '"supportedSubmitMethods": []' in page  # a browser would refuse what is tried
    with served(model, tmp_path, stub=False) as (url, _):
        assert "servers" not in httpx.get(f"{url}/openapi.json").json()
        assert "supportedSubmitMethods" not in httpx.get(f"{url}/docs").text


@pytest.mark.parametrize(
    ("host", "root", "url"),
    [
        ("0.0.0.0", "", "http://example.com:8080"),
        ("::", "/made", "http://example.com:8080/made"),
        ("::1", "", "http://[::1]:8080"),
    ],
)
def test_a_front_knows_its_url(host: str, root: str, url: str, model: Path) -> None:
    assert front_settings(model, host=host, port=8080, root_path=root).url("example.com") == url


def test_without_keys_the_admin_port_alone_tells_of_jobs(model: Path, tmp_path: Path) -> None:
    port = free_port()
    with served(model, tmp_path, admin_port=port) as (url, _):
        assert {*httpx.get(f"{url}/health").json()} == {"status"}
        assert {*httpx.get(f"http://127.0.0.1:{port}/health").json()} == {"status", "model", "jobs"}


def test_an_admin_port_that_is_taken_is_named(model: Path, tmp_path: Path, open_server: str) -> None:
    port = int(open_server.rpartition(":")[2])
    with pytest.raises(OSError, match=f"--admin-port {port}"), served(model, tmp_path, admin_port=port):
        pass


def test_probes_may_call_a_server_by_its_address(model: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"api_key": "secret", "trusted_hosts": ("video.example.com",)}
    with served(model, tmp_path, stub=False, **options) as (url, _):
        assert httpx.get(f"{url}/livez").status_code == 200
        assert httpx.get(f"{url}/readyz").status_code == 503
        assert httpx.get(f"{url}/health").status_code == 421


def test_a_server_on_all_addresses_is_called_by_any_address_but_not_by_names(model: Path, tmp_path: Path) -> None:
    with served(model, tmp_path, stub=False, host="0.0.0.0") as (url, _):
        for host, status in (("10.0.0.1:80", 200), ("[fd00::1]", 200), ("evil.example", 421), ("localhost", 200)):
            assert httpx.get(f"{url}/v1/models", headers={"host": host}).status_code == status


@pytest.mark.parametrize(
    "origin", ["http://evil.example", "null", "http://127.0.0.1:1", "http://localhost", "http://["]
)
def test_pages_of_other_origins_change_nothing_without_keys(origin: str, open_server: str) -> None:
    before = httpx.get(f"{open_server}/v1/videos").json()
    form = {"prompt": "a", "size": "64x48"}
    for method, path in (("POST", "/v1/videos"), ("DELETE", "/v1/videos/x"), ("POST", "/v1/images/generations")):
        answer = httpx.request(method, open_server + path, data=form, headers={"origin": origin})
        assert (answer.status_code, answer.json()["error"]["code"]) == (403, "foreign_origin")
    assert httpx.get(f"{open_server}/v1/videos", headers={"origin": origin}).json() == before


def test_the_servers_own_page_and_clients_without_an_origin_change_things(open_server: str) -> None:
    for headers in ({"origin": open_server}, {}):
        answer = httpx.post(f"{open_server}/v1/videos", json={"prompt": "a", **SMALL}, headers=headers)
        assert answer.status_code == 200


def test_with_keys_the_origin_does_not_matter(keyed: tuple[str, Path]) -> None:
    headers = {"origin": "http://a.example", **sent("secret")}
    assert httpx.post(f"{keyed[0]}/v1/videos", json={"prompt": "a", **SMALL}, headers=headers).status_code == 200


def test_pages_of_named_origins_may_use_the_server(model: Path, tmp_path: Path) -> None:
    with served(model, tmp_path, cors_origins=("http://a.example",)) as (url, _):
        ask = {"access-control-request-method": "POST", "access-control-request-headers": "authorization"}
        allowed = httpx.options(f"{url}/v1/videos", headers={"origin": "http://a.example", **ask})
        assert (allowed.status_code, allowed.headers["access-control-allow-origin"]) == (200, "http://a.example")
        refused = httpx.options(f"{url}/v1/videos", headers={"origin": "http://b.example", **ask})
        assert "access-control-allow-origin" not in refused.headers
        for origin, status in (("http://a.example", 200), ("http://b.example", 403)):
            answer = httpx.post(f"{url}/v1/videos", json={"prompt": "a", **SMALL}, headers={"origin": origin})
            assert answer.status_code == status


def test_submissions_of_a_key_have_a_rate(model: Path, tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text(KEYS)
    with served(model, tmp_path / "out", api_key_file=file, rate="2/hour") as (url, _):
        answers = [
            httpx.post(f"{url}/v1/videos", json={"prompt": "a", **SMALL}, headers=sent("alices-key")) for _ in range(3)
        ]
        assert [answer.status_code for answer in answers] == [200, 200, 429]
        left = [answer.headers["x-ratelimit-remaining-requests"] for answer in answers]
        assert left == ["1", "0", "0"]
        assert answers[0].headers["x-ratelimit-limit-requests"] == "2"
        assert 0 < int(answers[2].headers["retry-after"]) <= 3600
        assert answers[2].headers["x-ratelimit-reset-requests"] == f"{answers[2].headers['retry-after']}s"
        assert answers[2].json()["error"]["code"] == "rate_limit_exceeded"
        other = httpx.post(f"{url}/v1/videos", json={"prompt": "a", **SMALL}, headers=sent("alices-new-key"))
        assert other.status_code == 429  # the same name
        assert httpx.post(f"{url}/v1/videos", json={}, headers=sent("bobs-key")).status_code == 400
        video = answers[0].json()["id"]
        for _ in range(3):  # what is not a submission has no rate
            assert httpx.get(f"{url}/v1/videos/{video}", headers=sent("alices-key")).status_code == 200
            assert httpx.post(f"{url}/v1/videos/{video}/cancel", headers=sent("alices-key")).status_code == 200
        assert httpx.post(f"{url}/v1/videos", json={}).status_code == 401  # counts for nobody


def test_without_keys_each_address_has_a_rate() -> None:
    rates = Rates("1/minute")
    rates.take(None, "10.0.0.1")
    rates.take(None, "10.0.0.2")
    rates.take(None, "fd00::1")
    rates.take(None, "fd00:0:0:1::1")
    rates.take(None, "")
    rates.take("10.0.0.1", "10.0.0.1")  # a key
    for address in ("10.0.0.1", "fd00::ffff:1", ""):  # a client has all addresses of its network
        with pytest.raises(ApiError, match="this address may submit 1/minute"):
            rates.take(None, address)


def test_a_signed_url_needs_no_key(keyed: tuple[str, Path]) -> None:
    url, output = keyed
    video = completed(url, "alices-key")
    path = f"/v1/videos/{video}/content?variant=thumbnail"
    assert httpx.get(url + path).status_code == 401
    signed = Signatures(output).signed(path, "alice", 60)
    answer = httpx.get(url + signed)
    assert (answer.status_code, answer.headers["content-type"]) == (200, "image/webp")
    assert httpx.head(url + signed).status_code == 200
    assert httpx.get(url + signed, headers=sent("wrong")).status_code == 200


def test_a_signed_url_is_good_for_nothing_else(keyed: tuple[str, Path]) -> None:
    url, output = keyed
    first, second = completed(url, "alices-key", seed=1), completed(url, "alices-key", seed=2)
    signatures = Signatures(output)
    signed = signatures.signed(f"/v1/videos/{first}/content?index=0", "alice", 60)
    query = signed.partition("?")[2]
    expires = dict(parse_qsl(query))["expires"]
    for other in (
        signed.replace(first, second),
        signed.replace("index=0", "index=1"),
        signed.replace("index=0&", ""),
        f"{signed}&owner=bob",
        signed.replace(expires, str(int(expires) + 1)),
        f"{signed}&variant=thumbnail",
        signed[:-1],
        signed.partition("&signature")[0],
        f"/v1/videos/{first}?{query}",
        f"/v1/videos?{query}",
        signatures.signed(f"/v1/videos/{first}", "alice", 60),
        signatures.signed(f"/v1/videos/{first}/content", "alice", -1),
        signatures.signed(f"/v1/videos/{first}/content", "nobody", 60),
    ):
        assert httpx.get(url + other).status_code == 401, other
    assert httpx.delete(url + signed).status_code == 405
    assert httpx.delete(url + f"/v1/videos/{first}?{query}").status_code == 401
    assert httpx.get(url + signatures.signed(f"/v1/videos/{first}/content", "bob", 60)).status_code == 404
    assert httpx.get(url + signed).status_code == 200


def test_a_signed_url_says_nothing_about_its_owner(tmp_path: Path) -> None:
    signatures, path = Signatures(tmp_path), "/v1/videos/a/content?index=0"
    signed = {owner: signatures.signed(path, owner, 60) for owner in (None, "alice", "bob")}
    assert len({*signed.values()}) == 3
    for url in signed.values():
        assert "alice" not in url
        assert [name for name, _ in parse_qsl(urlsplit(url).query)] == ["index", "expires", "signature"]


def test_the_secret_of_signatures_is_kept_and_only_its_user_reads_it(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        Signatures(tmp_path)
    finally:
        os.umask(before)
    (path,) = tmp_path.iterdir()
    assert (path.stat().st_mode & 0o777, path.stat().st_size) == (0o600, 32)
    kept = path.read_bytes()
    Signatures(tmp_path)
    assert path.read_bytes() == kept
    path.write_bytes(b"")
    Signatures(tmp_path)
    assert len(path.read_bytes()) == 32
    assert path.read_bytes() != kept


def test_a_server_serves_https(model: Path, tmp_path: Path) -> None:
    certificate, key, authority = certificates.made(tmp_path)
    with served(model, tmp_path / "out", stub=False, ssl_certfile=certificate, ssl_keyfile=key) as (url, _):
        trusting = ssl.create_default_context(cafile=str(authority))
        port = urlsplit(url).port
        assert httpx.get(f"https://127.0.0.1:{port}/livez", verify=trusting).status_code == 200
        with pytest.raises(httpx.TransportError):
            httpx.get(f"{url}/livez")


def test_behind_a_proxy_paths_and_urls_have_its_prefix(model: Path, tmp_path: Path) -> None:
    with served(model, tmp_path, stub=False, root_path="/made", api_key="secret") as (url, _):
        assert httpx.get(f"{url}/v1/models", headers=sent("secret")).status_code == 200
        assert httpx.get(f"{url}/openapi.json").json()["servers"] == [{"url": "/made"}]
        assert '"/made/docs/files/swagger-ui-bundle.js"' in httpx.get(f"{url}/docs").text
        signed = Signatures(tmp_path).signed("/v1/videos/none/content", None, 60)
        assert httpx.get(url + signed).status_code == 404


def test_only_named_proxies_tell_addresses_of_clients(model: Path, tmp_path: Path) -> None:
    for proxies, statuses in (("10.0.0.1", [400, 429]), ("127.0.0.1", [400, 400])):
        with served(model, tmp_path, stub=False, forwarded_allow_ips=proxies, rate="1/hour") as (url, _):
            answers = [
                httpx.post(f"{url}/v1/videos", json={}, headers={"x-forwarded-for": f"192.0.2.{client}"})
                for client in (1, 2)
            ]
            assert [answer.status_code for answer in answers] == statuses
