from __future__ import annotations

import re
import sys
from types import ModuleType

import pytest

from app.cli import main
from app.cli.serve import read_settings
from app.settings import Settings
from tests.cli.conftest import Run


def served(run: Run, monkeypatch: pytest.MonkeyPatch, *arguments: str, code: int = 0) -> Settings:
    """The settings with which the command would start a server that ends with ``code``."""
    seen: list[Settings] = []
    module = ModuleType("app.api.server")
    module.run_server = lambda settings: seen.append(settings) or code  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "app.api.server", module)
    assert run("serve", *arguments).code == code
    return seen[0]


def test_flags_go_before_the_environment_and_that_before_defaults(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MEMORYLLM_PORT", "8100")
    monkeypatch.setenv("MEMORYLLM_RESIDENT_BYTES", "2GiB")
    monkeypatch.setenv("MEMORYLLM_KEEP_TEXT", "false")
    monkeypatch.setenv("MEMORYLLM_HOST", "0.0.0.0")
    monkeypatch.setenv("MEMORYLLM_DEVICE", "")
    settings = served(run, monkeypatch, "--host", "::1", "--warm-bytes", "3MB", "--store", "disk:///a b")
    expected = {
        "host": "::1",
        "port": 8100,
        "store": "disk:///a b",
        "device": "auto",
        "resident_bytes": 2 * 2**30,
        "warm_bytes": 3 * 2**20,
        "keep_text": False,
        "model": "pocket",
    }
    assert settings.model_dump(include=set(expected)) == expected
    settings = served(run, monkeypatch, "--port", "9", "--keep-text", "--log-json")
    assert (settings.port, settings.keep_text, settings.log_json) == (9, True, True)


def test_a_list_is_a_repeated_flag_or_a_variable_with_commas(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    page, local = "https://chat.example.com", "http://localhost:3000"
    assert served(run, monkeypatch).allow_origin == ()
    monkeypatch.setenv("MEMORYLLM_ALLOW_ORIGIN", f" {page}, {local},")
    assert served(run, monkeypatch).allow_origin == (page, local)
    # a flag takes the place of all that the variable names
    other = "HTTPS://Other.Example.com:443"
    settings = served(run, monkeypatch, "--allow-origin", other, "--allow-origin", "http://[::1]:80")
    assert settings.allow_origin == ("https://other.example.com", "http://[::1]")
    # as the worker is told
    assert Settings.model_validate_json(settings.model_dump_json()) == settings


@pytest.mark.parametrize(
    "origin",
    [
        "*",
        "null",
        "chat.example.com",
        "https://",
        "https://chat.example.com/",
        "https://*.example.com",
        "https://chat.example.com:99999",
        "https://user@chat.example.com",
        "https://a.com https://b.com",
        "https://b\u00fccher.example",
    ],
)
def test_an_origin_that_no_browser_sends(run: Run, monkeypatch: pytest.MonkeyPatch, origin: str) -> None:
    ran = run("serve", "--allow-origin", "https://good.example", "--allow-origin", origin)
    assert (ran.code, ran.out) == (2, "")
    assert re.fullmatch(r"error: --allow-origin: an origin looks like .+\n", ran.err)


@pytest.mark.parametrize("host", ["*", "server:8000", "http://server", "a b", ".example.com", "[::1]"])
def test_a_host_is_a_name_alone(run: Run, host: str) -> None:
    ran = run("serve", "--allow-host", host)
    assert (ran.code, ran.out) == (2, "")
    assert re.fullmatch(r"error: --allow-host: a host is a name like .+\n", ran.err)


def test_every_setting_has_a_flag_and_a_variable(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "250")
    text = re.sub(r"[\s│]+", " ", run("serve", "--help").out)
    for name in Settings.model_fields:
        assert f"--{name.replace('_', '-')} " in text, name
        assert f"(MEMORYLLM_{name.upper()})" in text, name
    assert "default 8000" in text


def test_elsewhere_than_on_linux_it_is_one_line(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("app.cli.serve._CAN_SERVE", False)
    monkeypatch.setitem(sys.modules, "app.api.server", None)
    ran = run("serve")
    assert (ran.code, ran.out) == (1, "")
    assert "Linux only" in ran.err
    assert len(ran.err.strip().splitlines()) == 1


@pytest.mark.parametrize(("platform", "words", "begins"), [
    ("linux", ["serve"], True), ("darwin", ["serve"], False), ("linux", ["serve", "--help"], False),
])  # fmt: skip
def test_a_worker_is_begun_ahead_only_where_it_can_serve(
    monkeypatch: pytest.MonkeyPatch, platform: str, words: list[str], begins: bool
) -> None:
    begun: list[bool] = []
    monkeypatch.setattr(sys, "argv", ["memoryllm", *words])
    monkeypatch.setattr(sys, "platform", platform)
    monkeypatch.setattr("app.headstart.begin", lambda: begun.append(True))
    monkeypatch.setattr("app.cli.commands.run", lambda arguments: sys.exit(0))
    with pytest.raises(SystemExit):
        main()
    assert bool(begun) is begins


def test_the_servers_exit_code_is_the_commands(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    served(run, monkeypatch, code=1)


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("--port", "abc"),
        ("--port", "65536"),
        ("--port", "-1"),
        ("--device", "tpu"),
        ("--resident-bytes", "much"),
        ("--step-tokens", "0"),
        ("--request-timeout", "nan"),
        ("--drain-timeout", "inf"),
        ("--served-model-name", "a\nb"),
        ("--served-model-name", "b" * 257),
    ],
)
def test_a_wrong_value_is_one_line_that_names_where_it_was_given(
    run: Run, monkeypatch: pytest.MonkeyPatch, flag: str, value: str
) -> None:
    ran = run("serve", flag, value)
    assert (ran.code, ran.out) == (2, "")
    assert re.fullmatch(rf"error: {flag}: .+\n", ran.err)
    variable = f"MEMORYLLM_{flag[2:].replace('-', '_').upper()}"
    monkeypatch.setenv(variable, value)
    ran = run("serve")
    assert ran.code == 2
    assert re.fullmatch(rf"error: {variable}: .+\n", ran.err)


def test_a_machine_without_a_home_is_asked_for_a_store(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def homeless() -> str:
        raise RuntimeError("no home directory")

    monkeypatch.delenv("XDG_DATA_HOME", raising=False)
    monkeypatch.setattr("pathlib.Path.home", homeless)
    ran = run("serve")
    assert ran.code == 2
    assert "--store" in ran.err
    assert read_settings({"store": "disk:///tmp/x"}).store == "disk:///tmp/x"
