"""Options that `halovae serve` refuses before anything is loaded."""

from pathlib import Path

import pytest
from typer.testing import CliRunner

from halovae.cli import serve
from halovae.cli.main import app
from halovae.pipelines import tiny
from halovae.serving.settings import FrontSettings


@pytest.fixture
def fronts(monkeypatch: pytest.MonkeyPatch) -> list[FrontSettings]:
    """Return a list that collects the settings of fronts instead of starting them."""
    started: list[FrontSettings] = []
    monkeypatch.delenv("HALOVAE_API_KEY", raising=False)
    monkeypatch.setattr(serve, "_run_front", lambda _ranks, front, _start: started.append(front))
    return started


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "wan2.1"
    tiny.make_model("wan2.1", folder)
    return folder


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
    ],
)
@pytest.mark.parametrize("under_torchrun", [False, True])
def test_a_server_without_the_key_it_needs_does_not_start(
    options: list[str], variable: str | None, words: str, under_torchrun: bool, model: Path,
    fronts: list[FrontSettings], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    ranks: list[object] = []
    monkeypatch.setattr(serve, "_run_rank", ranks.append)
    if variable is not None:
        monkeypatch.setenv("HALOVAE_API_KEY", variable)
    if under_torchrun:
        monkeypatch.setenv("RANK", "0")
        monkeypatch.setenv("WORLD_SIZE", "1")
    status, output = served(model, *options)
    assert (status, fronts, ranks) == (2, [], []), output
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
    options: list[str], variable: str | None, key: str | None, model: Path, fronts: list[FrontSettings],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    if variable is not None:
        monkeypatch.setenv("HALOVAE_API_KEY", variable)
    status, output = served(model, *options)
    assert status == 0, output
    assert [front.api_key for front in fronts] == [key]
