"""The file of API keys: what it may hold, how entries are made, and what is said of a wrong one."""

from __future__ import annotations

import hashlib
import stat
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.cli import main
from server.keys import MAX_KEYS, KeysError, create_key, find_entry, parse_keys, read_keys

SHA = hashlib.sha256(b"secret").hexdigest()
OK = f'[[key]]\nname = "a"\nsha256 = "{SHA}"\nroles = ["infer"]\n'


def test_an_entry() -> None:
    (entry,) = parse_keys(f"{OK}requests_per_minute = 5\ntokens_per_minute = 6\nmax_concurrent = 7\n".encode())
    assert (entry.name, entry.roles) == ("a", {"infer"})
    assert (entry.requests_per_minute, entry.tokens_per_minute, entry.max_concurrent) == (5, 6, 7)
    assert find_entry([entry], "secret") is entry
    for wrong in ("", "Secret", "secret ", "secre", SHA, "\ud800"):
        assert find_entry([entry], wrong) is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "has no"),
        ("# nothing\n", "has no"),
        ("key = 1\n", "has no"),
        ("[[key]", "is not TOML"),
        ("key = [1]\n", "is no table"),
        (f"{OK}[other]\n", "something else"),
        (OK.replace('"a"', '"a b"'), "name must be"),
        (OK.replace('"a"', '"a\\nb"'), "name must be"),
        (OK.replace('"a"', f'"{"a" * 65}"'), "name must be"),
        (OK.replace(SHA, SHA[1:]), "sha256 must be"),
        (OK.replace(SHA, SHA.upper()), "sha256 must be"),
        (OK.replace('"infer"', '"root"'), "roles must be"),
        (OK.replace('["infer"]', "[]"), "roles must be"),
        (OK.replace('["infer"]', '"infer"'), "roles must be"),
        (f"{OK}max_concurrent = 0\n", "max_concurrent must be"),
        (f"{OK}max_concurrent = true\n", "max_concurrent must be"),
        (f"{OK}tokens_per_minute = 1.5\n", "tokens_per_minute must be"),
        (f'{OK}key = "stet-abc"\n', "a member that is not known"),
        (OK + OK, "the same name"),
        (OK + OK.replace('"a"', '"b"'), "the same sha256"),
    ],
)
def test_what_is_refused(text: str, message: str) -> None:
    with pytest.raises(KeysError, match=message) as caught:
        parse_keys(text.encode())
    assert "\n" not in str(caught.value)
    assert SHA not in str(caught.value)


def test_bounds(tmp_path: Path) -> None:
    def entry(number: int) -> str:
        return OK.replace('"a"', f'"a{number}"').replace(SHA, hashlib.sha256(str(number).encode()).hexdigest())

    assert len(parse_keys("".join(map(entry, range(MAX_KEYS))).encode())) == MAX_KEYS
    with pytest.raises(KeysError, match="more than"):
        parse_keys("".join(map(entry, range(MAX_KEYS + 1))).encode())
    (tmp_path / "large").write_bytes(b"#" * (2**20 + 1))
    with pytest.raises(KeysError, match="larger"):
        read_keys(tmp_path / "large")
    with pytest.raises(KeysError, match="cannot be read"):
        read_keys(tmp_path / "none")


@given(st.binary(max_size=200) | st.text(max_size=200).map(lambda text: OK.encode() + text.encode("utf-8", "ignore")))
def test_any_bytes_are_keys_or_refused(content: bytes) -> None:
    message = ""
    try:
        assert parse_keys(content)
    except KeysError as error:
        message = str(error)
    assert "\n" not in message


def test_created_keys_are_found_and_not_kept(tmp_path: Path) -> None:
    path = tmp_path / "keys.toml"
    first = create_key(path, "first", ["infer", "metrics"], {"max_concurrent": 3})
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    path.write_text("# a comment stays\n" + path.read_text())
    path.chmod(0o640)
    second = create_key(path, "second", ["admin"], {})
    text = path.read_text()
    assert text.startswith("# a comment stays\n")
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
    assert first not in text
    assert second not in text
    assert first != second
    assert len(first) > 40
    entries = parse_keys(read_keys(path))
    assert [entry.name for entry in entries] == ["first", "second"]
    assert find_entry(entries, first) is entries[0]
    assert entries[0].max_concurrent == 3
    assert [item.name for item in tmp_path.iterdir()] == ["keys.toml"]
    with pytest.raises(KeysError, match="already"):
        create_key(path, "first", ["infer"], {})
    path.write_text("broken")
    with pytest.raises(KeysError, match="TOML"):
        create_key(path, "third", ["infer"], {})
    assert path.read_text() == "broken"


def test_two_writers_do_not_lose_each_others_entries(tmp_path: Path) -> None:
    path = tmp_path / "keys.toml"
    (tmp_path / "keys.toml.new").touch()
    with pytest.raises(KeysError, match="another"):
        create_key(path, "first", ["infer"], {})
    assert not path.exists()


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "keys.toml"
    flags = "--role infer --role metrics --requests-per-minute 60 --max-concurrent 2".split()
    assert main(["keys", "create", "alice", "--api-keys", str(path), *flags]) == 0
    shown = capsys.readouterr()
    key = shown.out.strip()
    assert key not in shown.err
    assert find_entry(parse_keys(read_keys(path)), key) is not None
    monkeypatch.setenv("STET_API_KEYS", str(path))
    assert main(["keys", "list"]) == 0
    listed = capsys.readouterr().out
    assert listed.splitlines()[1].split() == ["alice", "infer", "metrics", "60", "-", "2"]
    assert parse_keys(read_keys(path))[0].digest.hex() not in listed
    for wrong in (["create", "alice"], ["create", "b c"], ["create", "b", "--max-concurrent", "0"]):
        assert main(["keys", *wrong]) == 2
        assert capsys.readouterr().err.count("\n") == 1
    monkeypatch.delenv("STET_API_KEYS")
    assert main(["keys", "list"]) == 2
    assert "--api-keys FILE is needed" in capsys.readouterr().err
