"""Files of keys: what they hold, and when they are read again."""

import asyncio
import logging
import os
import re
import signal
from pathlib import Path

import httpx
import pytest
from serving.stub_ranks import front_settings, rank_settings

from halovae.cli import serve
from halovae.serving.app import make_app
from halovae.serving.keys import Keys


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A file of keys."""
    path = tmp_path / "keys"
    path.write_text("# keys of a test\n\nalice  alices-key\nbob bobs-key\nalice alices-new-key\n")
    path.chmod(0o600)
    return path


def test_each_key_of_a_file_has_the_name_before_it(file: Path) -> None:
    keys = Keys("secret", file)
    names = {"alices-key": "alice", "alices-new-key": "alice", "bobs-key": "bob", "secret": "default"}
    for key in (*names, "alice", "", "alices-key ", "ALICES-KEY"):
        assert keys.name_of(key.encode()) == names.get(key), key
    assert keys.names == {"alice", "bob", "default"}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("alice\n", "line 1: expected NAME KEY, got 1 word"),
        ("alice k\nbob two words\n", "line 2: expected NAME KEY, got 3 word"),
        ("alice k\n\nal:ice other\n", "line 3: expected a name"),
        ("alice k\nbob k\n", "line 2: the key of bob is given twice (first for alice)"),
        ("alice secret\n", "line 1: the key of alice is given twice (first for default)"),
        ("alice k\x07\n", "line 1: the key of alice has characters"),
        ("", "got no key"),
        ("# nothing\n", "got no key"),
        ("alice \udcff\n", "expected text in UTF-8"),
    ],
)
def test_a_line_without_a_key_is_refused(text: str, words: str, file: Path) -> None:
    file.write_text(text, errors="surrogateescape")
    with pytest.raises(ValueError, match=re.escape(words)):
        Keys("secret", file)


@pytest.mark.parametrize("path", ["missing", "."])
def test_a_file_of_keys_that_cannot_be_read_is_named(path: str, tmp_path: Path) -> None:
    with pytest.raises(OSError, match="--api-key-file .*: cannot be read"):
        Keys(file=tmp_path / path)


def test_a_server_with_a_broken_file_of_keys_does_not_start(model: Path, file: Path, tmp_path: Path) -> None:
    file.write_text("alice\n")
    with pytest.raises(ValueError, match="line 1"):
        make_app(rank_settings(model, tmp_path), front_settings(model, api_key_file=file))
    file.unlink()
    with pytest.raises(OSError, match="--api-key-file .*cannot be read"):
        make_app(rank_settings(model, tmp_path), front_settings(model, api_key_file=file))


def test_keys_are_read_again_and_stay_if_that_fails(file: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "halovae")
    keys = Keys(None, file)
    file.write_text("carol carols-key\nbroken\n")
    keys.reload()
    assert (keys.name_of(b"bobs-key"), keys.name_of(b"carols-key")) == ("bob", None)
    assert "line 2" in caplog.text
    file.write_text("carol carols-key\n")
    keys.reload()
    assert (keys.name_of(b"bobs-key"), keys.name_of(b"carols-key")) == (None, "carol")
    assert "keys were read again: carol" in caplog.text
    assert "carols-key" not in caplog.text


def test_a_file_of_keys_that_others_can_read_is_warned_of(file: Path, caplog: pytest.LogCaptureFixture) -> None:
    Keys(None, file)
    assert "chmod" not in caplog.text
    file.chmod(0o644)
    Keys(None, file)
    assert "chmod 600" in caplog.text


def test_sighup_reads_the_keys_of_a_running_server_again(
    model: Path, file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    front = front_settings(model, api_key_file=file)
    output = tmp_path / "output"
    output.mkdir()
    statuses: list[int] = []

    async def status(key: str) -> int:
        async with httpx.AsyncClient() as client:
            headers = {"authorization": f"Bearer {key}"}
            return (await client.get(f"http://127.0.0.1:{front.port}/v1/models", headers=headers)).status_code

    async def rotate() -> None:
        """Take the place of the watch over the agent: when this returns, the server ends."""
        statuses.extend([await status("bobs-key"), await status("carols-key")])
        file.write_text("carol carols-key\n")
        os.kill(os.getpid(), signal.SIGHUP)
        while await status("carols-key") != 200:
            await asyncio.sleep(0.02)
        statuses.extend([await status("bobs-key"), await status("carols-key")])

    monkeypatch.setattr(serve, "_agent_gone", rotate)
    serve._run_front(rank_settings(model, output), front, None)
    assert statuses == [200, 401, 401, 200]
