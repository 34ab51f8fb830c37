"""The options of `halovae serve`: what is refused before anything is loaded, and where each of them goes."""

import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import fields
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from serving import certificates
from typer.testing import CliRunner

from halovae.cli import common, serve, serve_options
from halovae.cli.main import app
from halovae.cli.serve_options import ServeOptions
from halovae.grid import Grid
from halovae.serving import logs
from halovae.serving.limits import Limits
from halovae.serving.settings import FrontSettings, RankSettings, ReplicaSettings


@pytest.fixture(autouse=True)
def quiet(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[str, str]]]:
    """Leave the logs and the umask of this process as they are. Return a list that collects how logs are set up."""
    formats: list[tuple[str, str]] = []
    monkeypatch.setattr(logs, "configure", lambda *given: formats.append(given))
    before = os.umask(0o022)
    yield formats
    os.umask(before)


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Return a list that collects what fronts get instead of starting them: the two settings, and how many ranks."""
    calls: list[Any] = []
    for name in ("HALOVAE_API_KEY", "HALOVAE_WEBHOOK_SECRET"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(serve, "_run_front", lambda *settings: calls.append(settings))
    return calls


def served(model: Path, *options: str) -> tuple[int, str]:
    """Run `halovae serve`, and return its exit status and output."""
    words = ["serve", "--model-path", str(model), "--output-dir", str(model.parent / "out"), *options]
    done = CliRunner().invoke(app, words)
    return done.exit_code, " ".join(done.output.split())


@pytest.mark.parametrize(
    ("options", "variable", "words"),
    [
        (["--api-key", ""], None, "blank"),
        (["--api-key", " \t\n"], None, "blank"),
        (["--api-key", ""], "secret", "blank"),
        (["--api-key", "two\nlines"], None, "cannot be sent"),
        ([], "", "blank"),
        ([], "\n", "blank"),
        (["--no-auth"], "", "blank"),
        (["--host", "0.0.0.0"], None, "--host 0.0.0.0"),
        (["--host", "::"], None, "--host ::"),
        (["--host", ""], None, "--no-auth"),
        (["--host", "192.168.1.1"], None, "--no-auth"),
        (["--host", "example.com"], None, "--no-auth"),
        (["--no-auth", "--api-key", "secret"], None, "omit one"),
        (["--no-auth"], "secret", "omit one"),
        (["--no-auth", "--api-key-file", "keys"], None, "omit one"),
    ],
)
@pytest.mark.parametrize("under_torchrun", [False, True])
def test_a_server_without_the_key_it_needs_does_not_start(
    options: list[str], variable: str | None, words: str, under_torchrun: bool, model: Path,
    started: list[Any], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    ranks: list[object] = []
    monkeypatch.setattr(serve, "_run_rank", lambda *settings: ranks.append(settings))
    if variable is not None:
        monkeypatch.setenv("HALOVAE_API_KEY", variable)
    if under_torchrun:
        monkeypatch.setenv("RANK", "0")
        monkeypatch.setenv("WORLD_SIZE", "1")
    status, output = served(model, *options)
    assert (status, started, ranks) == (2, [], []), output
    assert words in output


@pytest.mark.parametrize(
    ("options", "variable", "key"),
    [
        ([], None, None),
        (["--host", "::1"], None, None),
        (["--host", "localhost", "--no-auth"], None, None),
        (["--host", "0.0.0.0", "--no-auth"], None, None),
        (["--host", "0.0.0.0", "--api-key", "secret"], None, "secret"),
        (["--api-key", " secret\n"], None, "secret"),
        (["--host", "0.0.0.0"], "secret\r\n", "secret"),
        (["--api-key", "option"], "", "option"),
    ],
)
def test_a_server_asks_for_the_key_it_was_given(
    options: list[str], variable: str | None, key: str | None, model: Path, started: list[Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    if variable is not None:
        monkeypatch.setenv("HALOVAE_API_KEY", variable)
    status, output = served(model, *options)
    assert status == 0, output
    assert [front.api_key for _, front, _ in started] == [key]


REACHED: dict[str, tuple[list[str], str, object]] = {
    "ring_degree": (["--num-gpus", "2", "--ring-degree", "2"], "ranks.ring", 2),
    "ulysses_degree": (["--num-gpus", "2", "--ulysses-degree", "2"], "ranks.ulysses", 2),
    "sp_degree": (["--num-gpus", "2", "--sp-degree", "1"], "ranks.ulysses", 1),
    "num_gpus": (["--num-gpus", "3"], "start", 3),
    "dtype": (["--dtype", "fp16"], "ranks.dtype", torch.float16),
    "vae_precision": (["--vae-precision", "bf16"], "ranks.vae_dtype", torch.bfloat16),
    "vae_parallel": (["--vae-parallel", "on"], "ranks.vae_mode", "parallel"),
    "vae_grid": (["--num-gpus", "2", "--vae-grid", "1x2"], "ranks.vae_grid", Grid(rows=1, cols=2)),
    "memory_budget": (["--memory-budget", "8GiB"], "ranks.memory_budget", 8 * 2**30),
    "cpu_offload": (["--cpu-offload"], "ranks.offload", True),
    "decode_batch": (["--decode-batch", "7"], "ranks.decode_batch", 7),
    "warmup": (["--warmup", "64x48x5"], "ranks.warmup", (64, 48, 5)),
    "log_format": (["--log-format", "json"], "ranks.log_format", "json"),
    "log_level": (["--log-level", "error"], "ranks.log_level", "error"),
    "host": (["--host", "::1"], "front.host", "::1"),
    "port": (["--port", "8081"], "front.port", 8081),
    "api_key": (["--api-key", "secret"], "front.api_key", "secret"),
    "api_key_file": (["--api-key-file", "keys"], "front.api_key_file", Path("keys")),
    "no_auth": (["--no-auth", "--host", "0.0.0.0"], "front.api_key", None),
    "trusted_hosts": (["--trusted-hosts", "a.example, *.b"], "front.trusted_hosts", ("a.example", "*.b")),
    "cors_origins": (["--cors-origins", "https://a.example/"], "front.cors_origins", ("https://a.example",)),
    "private_endpoints": (["--api-key", "secret", "--private-endpoints"], "front.private_endpoints", True),
    "allow_url_inputs": (["--allow-url-inputs"], "front.allow_url_inputs", True),
    "admin_port": (["--admin-port", "9090"], "front.admin_port", 9090),
    "admin_host": (["--admin-host", "0.0.0.0", "--admin-port", "9"], "front.admin_host", "0.0.0.0"),
    "root_path": (["--root-path", "/videos/"], "front.root_path", "/videos"),
    "forwarded_allow_ips": (["--forwarded-allow-ips", "10.0.0.1"], "front.forwarded_allow_ips", "10.0.0.1"),
    "max_connections": (["--max-connections", "9"], "front.max_connections", 9),
    "max_pixels": (["--max-pixels", "9"], "front.limits.pixels", 9),
    "max_frames": (["--max-frames", "9"], "front.limits.frames", 9),
    "max_steps": (["--max-steps", "9"], "front.limits.steps", 9),
    "max_n": (["--max-n", "9"], "front.limits.results", 9),
    "max_body": (["--max-body", "9KiB"], "front.limits.body", 9 * 2**10),
    "max_body_memory": (["--max-body-memory", "9MiB"], "front.limits.body_memory", 9 * 2**20),
    "max_queue": (["--max-queue", "9"], "front.limits.queue", 9),
    "max_queue_per_key": (["--max-queue-per-key", "9"], "front.limits.queue_per_key", 9),
    "rate_limit": (["--rate-limit", "9/minute"], "front.limits.rate", "9/minute"),
    "job_timeout": (["--job-timeout", "9.5"], "front.limits.job_seconds", 9.5),
    "stall_timeout": (["--stall-timeout", "9.5"], "front.stall_timeout", 9.5),
    "drain_timeout": (["--drain-timeout", "0"], "front.drain_timeout", 0),
    "log_prompts": (["--log-prompts"], "front.log_prompts", True),
    "expire_after": (["--expire-after", "0.5"], "front.expire_after", 1800),
    "max_output": (["--max-output", "1MiB"], "front.max_output", 2**20),
    "replicas": (["--replicas", "2"], "front.replicas.least", 2),
    "ray_address": (["--replicas", "2", "--ray-address", "10.0.0.1"], "front.replicas.address", "10.0.0.1"),
    "replica_idle": (["--replicas", "2", "--replica-idle", "9.5"], "front.replicas.idle", 9.5),
}


@pytest.mark.parametrize("option", REACHED)
def test_an_option_reaches_its_place(
    option: str, model: Path, started: list[Any], quiet: list[tuple[str, str]]
) -> None:
    words, place, value = REACHED[option]
    status, output = served(model, *words)
    assert status == 0, output
    ((ranks, front, start),) = started
    reached = {"ranks": ranks, "front": front, "start": start}[place.split(".")[0]]
    for name in place.split(".")[1:]:
        reached = getattr(reached, name)
    assert reached == value
    assert quiet == [(ranks.log_format, ranks.log_level)]


def test_each_option_has_a_test_that_it_reaches_its_place() -> None:
    elsewhere = {
        "model_path",
        "revision",
        "output_dir",
        "ssl_certfile",
        "ssl_keyfile",
        "interface",
    }  # in the tests below
    elsewhere |= {"webhook_url", "webhook_secret_file"}
    assert {*REACHED} | elsewhere == {option.name for option in fields(ServeOptions)}


def test_without_options_the_settings_have_their_defaults(model: Path, started: list[Any]) -> None:
    assert served(model)[0] == 0
    ((ranks, front, start),) = started
    assert (ranks.model, ranks.output, start) == (model, model.parent / "out", 1)
    assert front.limits == Limits()
    for settings, kind in ((ranks, RankSettings), (front, FrontSettings)):
        for field in fields(kind):
            if field.default is not field.default_factory:  # it has one
                assert getattr(settings, field.name) == field.default


def test_a_revision_reaches_the_hub(model: Path, started: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[object] = []

    def find(source: str, revision: str | None) -> Path:
        asked.append((source, revision))
        return model

    monkeypatch.setattr(serve_options, "find_pipeline", find)
    words = ["serve", "--model-path", "some/model", "--revision", "abc", "--output-dir", str(model.parent / "out")]
    assert CliRunner().invoke(app, words).exit_code == 0
    assert asked == [("some/model", "abc")]
    assert started[0][1].name == "some/model"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--private-endpoints"], "--private-endpoints without keys"),
        (["--cors-origins", "*"], "without keys"),
        (["--cors-origins", "a.example"], "such as https://example.com"),
        (["--cors-origins", "https://a.example/path"], "such as https://example.com"),
        (["--cors-origins", "https://*.a.example"], "such as https://example.com"),
        (["--trusted-hosts", "https://a.example"], "--trusted-hosts"),
        (["--trusted-hosts", "a.example:8080"], "without scheme and port"),
        (["--admin-host", "0.0.0.0"], "--admin-host 0.0.0.0 without --admin-port"),
        (["--private-endpoints", "--api-key", "a", "--admin-port", "9090"], "omit one"),
        (["--rate-limit", "30/minute;500/day"], "expected one number and a time"),
        (["--root-path", "videos"], "begins with /"),
        (["--rate-limit", "often"], "--rate-limit often"),
        (["--rate-limit", "0/minute"], "--rate-limit 0/minute"),
        (["--log-format", "xml"], "expected text, json"),
        (["--log-level", "loud"], "expected debug, info, warning, error"),
        (["--interface", "lo"], "--interface lo: ranks that torchrun has not started are on one host"),
        (["--ssl-keyfile", "key.pem"], "expected also --ssl-certfile"),
        (["--ssl-certfile", "missing.pem"], "--ssl-certfile missing.pem: cannot be used"),
        (["--max-n", "11"], "--max-n"),
        (["--drain-timeout", "-1"], "--drain-timeout"),
        (["--revision", "main"], "no revisions"),
        (["--replicas", "0"], "--replicas 0: expected a number of 1 or more, such as 2, or LEAST:MOST, such as 1:8"),
        (["--replicas", "3:2"], "--replicas 3:2: expected"),
        (["--replicas", "1:"], "--replicas 1:: expected"),
        (["--replicas", "-1:2"], "--replicas -1:2: expected"),
        (["--replicas", "two"], "--replicas two: expected"),
        (["--ray-address", "auto"], "--ray-address auto without --replicas: give both"),
        (["--replicas", "2", "--interface", "eth77"], "--interface eth77: "),
    ],
)
def test_what_cannot_work_is_refused(options: list[str], words: str, model: Path, started: list[Any]) -> None:
    status, output = served(model, *options)
    assert (status, started) == (2, []), output
    assert words in output


SECRET = "whsec_" + "c2VjcmV0" * 4


@pytest.mark.parametrize(
    ("url", "file", "variable", "words"),
    [
        ("https://a.example/", None, None, "--webhook-url without a secret: give HALOVAE_WEBHOOK_SECRET or"),
        (None, None, SECRET, "HALOVAE_WEBHOOK_SECRET without --webhook-url"),
        (None, None, "", "HALOVAE_WEBHOOK_SECRET without --webhook-url"),
        (None, SECRET, None, "without --webhook-url: give both or neither"),
        ("https://a.example/", SECRET, SECRET, "omit one"),
        ("https://a.example/", None, "", "HALOVAE_WEBHOOK_SECRET is blank"),
        ("https://a.example/", " \n", None, "is blank"),
        ("https://a.example/", "hidden", None, "does not begin with whsec_"),
        ("https://a.example/", None, "whsec_hidden!" * 9, "is not in base64"),
        ("https://a.example/", None, SECRET[:-1], "is not in base64"),
        ("https://a.example/", None, "whsec_c2VjcmV0", "has 6 bytes: expected whsec_ and 24 to 64 bytes"),
        ("a.example", None, SECRET, "expected a URL such as https://example.com/events"),
        ("ftp://a.example/", None, SECRET, "expected a URL such as https://example.com/events"),
        ("https://", None, SECRET, "expected a URL such as https://example.com/events"),
        ("https://a.example/#b", None, SECRET, "expected a URL such as https://example.com/events"),
        ("https://a.example:b/", None, SECRET, "expected a URL such as https://example.com/events"),
        ("https://a:hidden@a.example/", None, SECRET, "expected no user or password"),
    ],
)
def test_a_webhook_that_cannot_work_is_refused(
    url: str | None, file: str | None, variable: str | None, words: str, model: Path, started: list[Any],
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    options = [] if url is None else ["--webhook-url", url]
    if file is not None:
        (tmp_path / "secret").write_text(file)
        options += ["--webhook-secret-file", str(tmp_path / "secret")]
    if variable is not None:
        monkeypatch.setenv("HALOVAE_WEBHOOK_SECRET", variable)
    status, output = served(model, *options)
    assert (status, started) == (2, []), output
    assert words in output
    assert "hidden" not in output
    assert "c2VjcmV0" not in output


def test_a_webhook_reaches_the_front(
    model: Path, started: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "secret").write_text(f"{SECRET}\n")
    url = ["--webhook-url", "http://a.example:81/events"]
    assert served(model, *url, "--webhook-secret-file", str(tmp_path / "secret"))[0] == 0
    monkeypatch.setenv("HALOVAE_WEBHOOK_SECRET", SECRET)
    assert served(model, *url)[0] == 0
    for _, front, _ in started:
        assert (front.webhook.url, front.webhook.secret) == (url[1], b"secret" * 4)
        assert "secret" not in repr(front.webhook)
    assert served(model, *url, "--webhook-secret-file", str(tmp_path / "none"))[0] == 2


def test_an_interface_is_used_by_ranks_of_several_hosts(
    model: Path, started: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serve, "_run_rank", lambda *_: None)
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(psutil, "net_if_addrs", lambda: {"lo": [], "wire": []})
    variables = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME", "HCCL_SOCKET_IFNAME")
    for variable, value in zip(variables, (" ", "=other", ""), strict=True):
        monkeypatch.setenv(variable, value)
    status, output = served(model, "--interface", "wir")
    assert (status, "--interface wir: this host has no such network interface; here: lo, wire" in output) == (2, True)
    status, output = served(model, "--interface", "wire")
    assert status == 0, output
    assert [os.environ[variable] for variable in variables] == ["wire", "=other", "wire"]
    for name in ("RANK", "WORLD_SIZE"):  # the front that rank 0 starts has the same options
        monkeypatch.delenv(name)
    monkeypatch.setenv("HALOVAE_AGENT", "1")
    assert served(model, "--interface", "wire")[0] == 0
    assert len(started) == 1


def test_replicas_get_the_model_as_each_host_finds_it(model: Path, started: list[Any]) -> None:
    status, output = served(model, "--replicas", "1:8", "--num-gpus", "4", "--interface", "lo")
    assert status == 0, output
    ((ranks, front, _),) = started
    assert front.replicas == ReplicaSettings(1, 8, 4, str(model), interface="lo")
    assert ranks.ulysses == 4


def test_replicas_are_not_for_torchrun(model: Path, started: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    status, output = served(model, "--replicas", "2")
    assert (status, started) == (2, [])
    assert "--replicas 2, but torchrun has started this" in output


def test_replicas_without_ray_say_what_to_install(
    model: Path, started: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(common, "find_spec", lambda name: None if name == "ray" else find_spec(name))
    status, output = served(model, "--replicas", "2")
    assert (status, started) == (2, [])
    assert "--replicas 2 needs pip install 'halovae[ray]' (no module ray)" in output
    assert served(model)[0] == 0


def test_a_front_never_imports_ray() -> None:
    """Also not with replicas: their agent does, in a process of its own."""
    script = (
        "import sys, halovae.cli.serve, halovae.serving.app, halovae.serving.replica_supervisor;"
        "print([name for name in sys.modules if name.split('.')[0] == 'ray'])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_certificates_reach_the_front(model: Path, started: list[Any], tmp_path: Path) -> None:
    certificate, key, _ = certificates.made(tmp_path)
    status, output = served(model, "--ssl-certfile", str(certificate), "--ssl-keyfile", str(key))
    assert status == 0, output
    front = started[0][1]
    assert (front.ssl_certfile, front.ssl_keyfile) == (certificate, key)
    assert front.url().startswith("https://127.0.0.1:")


def test_files_of_a_server_are_for_its_user_only(model: Path, started: list[Any], tmp_path: Path) -> None:
    served(model, "--output-dir", str(tmp_path / "out"))
    assert (tmp_path / "out").stat().st_mode & 0o777 == 0o700
    (tmp_path / "made later").touch()
    assert (tmp_path / "made later").stat().st_mode & 0o777 == 0o600


def test_the_key_is_not_among_the_words_of_the_front_that_a_rank_starts(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    commands: list[tuple[list[str], dict[str, str]]] = []

    class Ended(Exception):
        pass

    def run(command: list[str], env: dict[str, str], start_new_session: bool) -> None:
        commands.append((command, env))
        raise Ended

    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(subprocess, "run", run)
    for words in (["--api-key", "secret"], ["--api-key=secret"]):
        monkeypatch.setattr(sys, "argv", ["halovae", "serve", *words, "--port", "8081"])
        with pytest.raises(Ended):
            serve._keep_front(tmp_path, "secret")
    for command, environment in commands:
        assert command[1:] == ["-m", "halovae.cli.main", "serve", "--port", "8081", "--num-gpus", "2"]
        assert environment["HALOVAE_API_KEY"] == "secret"


def test_the_help_shows_options_in_groups() -> None:
    shown = CliRunner().invoke(app, ["serve", "--help"], env={"COLUMNS": "200"}).output
    titles = [
        shown.find(f" {title} ") for title in ("Replicas", "Who gets in", "Network", "Limits", "Operation", "Files")
    ]
    assert -1 not in titles
    assert titles == sorted(titles)
    assert titles[0] < shown.find("--ray-address") < titles[1] < shown.find("--api-key-file") < titles[2]
    assert titles[2] < shown.find("--admin-port") < titles[3]
