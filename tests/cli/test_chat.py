from __future__ import annotations

from tests.cli.conftest import UPDATED, Fake, Run


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def test_remembers_asks_and_leaves(fake: Fake, run: Run) -> None:
    fake.generated("Re", "x")
    fake.events("/update", ("done", UPDATED))
    ran = run(
        "chat",
        "-t",
        "ada",
        stdin="/remember My dog is Rex.\n\nWho?\n/nonsense\n/remember\n/help\n/quit\nlost\n",
    )
    assert ran.code == 0
    assert [(path, body.get("text"), body.get("messages")) for _, path, body in fake.seen] == [
        ("/update", "My dog is Rex.", None),
        ("/generate", None, [user("Who?")]),
    ]
    assert ran.out.startswith("Rex\n/remember TEXT")
    assert "'ada' is at version 3" in ran.err
    assert "no /nonsense" in ran.err


def test_earlier_turns_go_along_if_wished(fake: Fake, run: Run) -> None:
    fake.generated("yes")
    said = {"role": "assistant", "content": "yes"}
    run("chat", "--turns", "1", "--temperature", "0", stdin="a\nb\nc")
    assert [body["messages"] for _, _, body in fake.seen] == [
        [user("a")],
        [user("a"), said, user("b")],
        [user("b"), said, user("c")],
    ]
    assert all(body["temperature"] == 0 for _, _, body in fake.seen)


def test_an_empty_answer_is_not_told_again(fake: Fake, run: Run) -> None:
    fake.generated("")
    assert run("chat", "--turns", "5", stdin="a\nb\n").code == 0
    assert fake.seen[1][2]["messages"] == [user("b")]


def test_history_and_memory_are_shown(fake: Fake, run: Run) -> None:
    entry = {
        "memory_version": 1,
        "time": 0.0,
        "tokens": 20,
        "text": "Rex [bold]is\x1b[2J",
        "surviving_share": 0.5,
    }
    fake.answer("/tenants/default/history", {"updates": [entry]})
    share = {"version": 1, "age": 1, "tokens": 3, "share": 0.25}
    fake.answer("/tenants/default/memory", {"memory_version": 2, "layers": [{"versions": [share]}]})
    ran = run("chat", stdin="/history\n/memory\n")
    assert "50%" in ran.out
    assert "Rex [bold]is\\x1b[2J" in ran.out
    assert "25.0%" in ran.out


def test_a_refusal_ends_a_script(fake: Fake, run: Run) -> None:
    fake.answer("/generate", {"error": {"message": "too long", "code": "too_many_tokens"}}, 422)
    ran = run("chat", stdin="a\nb\n")
    assert (ran.code, len(fake.seen)) == (3, 1)
    assert "too long" in ran.err
