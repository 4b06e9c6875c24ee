from __future__ import annotations

import json

from tests.cli.conftest import Fake, Run


def test_standard_output_is_the_text_and_nothing_else(fake: Fake, run: Run) -> None:
    fake.answer("/generate", {"text": "Tarnovik\x1b[2J", "finish_reason": "stop"})
    ran = run("generate", "Where?")
    assert (ran.code, ran.out, ran.err) == (0, "Tarnovik\x1b[2J\n", "")
    fake.generated("Tar", "novik")
    ran = run("generate", "Where?", "--stream")
    assert (ran.code, ran.out, ran.err) == (0, "Tarnovik\n", "")


def test_only_what_was_given_is_sent(fake: Fake, run: Run) -> None:
    fake.answer("/generate", {"text": ""})
    run("generate", "Where?", "-t", "ada")
    run(
        "generate",
        "-",
        "--chat",
        "--temperature",
        "0",
        "--stop",
        "a",
        "--stop",
        "b",
        "--ignore-eos",
        stdin="Who?",
    )
    run("generate", "x", "--max-tokens", "3", "--top-p", "0.5", "--top-k", "0", "--min-p", "0.1",
        "--repetition-penalty", "1.2", "--seed", "0")  # fmt: skip
    assert [body for _, _, body in fake.seen] == [
        {"tenant": "ada", "prompt": "Where?"},
        {
            "tenant": "default",
            "messages": [{"role": "user", "content": "Who?"}],
            "temperature": 0.0,
            "stop": ["a", "b"],
            "ignore_eos": True,
        },
        {
            "tenant": "default",
            "prompt": "x",
            "max_tokens": 3,
            "top_p": 0.5,
            "top_k": 0,
            "min_p": 0.1,
            "repetition_penalty": 1.2,
            "seed": 0,
        },
    ]


def test_events_end_at_line_feeds_only(fake: Fake, run: Run) -> None:
    # str.splitlines would end a line at each of these, in the middle of the JSON
    odd = "one\u2028two\u2029three\x85four\r\nfive"
    fake.generated(odd)
    ran = run("generate", "x", "--stream")
    assert (ran.code, ran.out) == (0, f"{odd}\n")


def test_comments_and_unknown_fields_of_a_stream_are_passed_over(fake: Fake, run: Run) -> None:
    fake.events("/generate", (None, {"text": "a"}), (None, "[DONE]"))
    reply = fake.replies["/generate"]
    reply.body = b": waiting\n\nid: 7\nretry: 1\n" + reply.body.replace(b"\n", b"\r\n")
    assert run("generate", "x", "--stream").out == "a\n"


def test_json_is_one_document_or_one_event_a_line(fake: Fake, run: Run) -> None:
    whole = {"text": "☕", "finish_reason": "stop", "usage": {"prompt_tokens": 1}}
    fake.answer("/generate", whole)
    assert json.loads(run("generate", "x", "--json").out) == whole
    fake.generated("a", "b")
    lines = run("generate", "x", "--json", "--stream").out.splitlines()
    assert [json.loads(line)["text"] for line in lines] == ["a", "b", ""]


def test_score_sums_up(fake: Fake, run: Run) -> None:
    answer = {"logprobs": [-0.5, -1.0], "greedy": [True, False], "memory_version": 0}
    fake.answer("/score", answer)
    ran = run("score", "a", " b", "-t", "ada")
    assert "-1.5000 over 2 tokens, 1 of them" in ran.out
    assert fake.seen == [("POST", "/score", {"tenant": "ada", "prompt": "a", "continuation": " b"})]
    assert json.loads(run("score", "a", "b", "--json").out) == answer
