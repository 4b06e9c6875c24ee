"""Texts as every store keeps them: in the clear, encrypted, or not at all."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from app.errors import StoreFailed
from app.store.base import Store
from tests.store import test_contract as contract
from tests.store.conftest import Open
from tests.store.test_contract import key, manifest

KEY, OTHER_KEY = bytes(range(32)), bytes(32)
SECRET = "The treasure is under the oak."

Contents = Callable[[], list[bytes]]


def commit(store: Store, version: int, text: str, tenant: str = "ada") -> Any:
    return contract.commit(store, version, tenant, text=text, idempotency=key(f"k{version}"))


def told(store: Store, tenant: str = "ada") -> list[str | None]:
    return [record.text for record in store.history(tenant)]


@pytest.mark.parametrize("text", ["The café is in Oslo.", "", "aes256gcm:not really", "plain:plain:", "🙂"])
@pytest.mark.parametrize("text_key", [None, KEY])
def test_texts_come_back_as_they_were(reopen: Open, text: str, text_key: bytes | None) -> None:
    for _ in range(2):
        store = reopen(text_key=text_key)
        if store.load("ada") is None:
            store.create(manifest())
            commit(store, 1, text)
            store.compact("ada", 1, b"pool")
            commit(store, 2, text)
        assert told(store) == [text, text]
        assert [record.text for record in store.find("ada", "k1")] == [text]


@pytest.mark.parametrize(
    ("options", "clear"), [({}, True), ({"text_key": KEY}, False), ({"keep_text": False}, False)]
)
def test_a_text_lies_in_the_clear_only_where_nothing_else_is_asked_for(
    reopen: Open, contents: Contents, options: dict[str, Any], clear: bool
) -> None:
    store = reopen(**options)
    store.create(manifest())
    for version in (1, 2, 3):
        commit(store, version, SECRET)
    store.compact("ada", 2, b"pool")
    store.fork("ada", "bob", created=2.0)
    kept = contents()
    assert any(b"block 3" in piece for piece in kept), "the block beside the text is seen"
    assert any(SECRET.encode() in piece for piece in kept) == clear
    for tenant in ("ada", "bob"):
        assert told(store, tenant) == [SECRET if options.get("keep_text", True) else None] * 3


def test_a_wrong_or_missing_key_is_refused_at_the_start(reopen: Open) -> None:
    store = reopen(text_key=KEY)
    store.create(manifest())
    commit(store, 1, "words")
    with pytest.raises(StoreFailed, match="not the text key"):
        reopen(text_key=OTHER_KEY)
    # or else new texts would be written in the clear
    with pytest.raises(StoreFailed, match="give it the text key"):
        reopen()
    assert told(reopen(keep_text=False)) == [None]
    assert told(reopen(text_key=KEY)) == ["words"]


def test_an_encrypted_text_cannot_be_moved_to_another_tenant_or_version(reopen: Open) -> None:
    store: Any = reopen(text_key=KEY)
    for tenant in ("ada", "bob"):
        store.create(manifest(tenant))
    stolen = commit(store, 1, "words").blocks[0].text
    assert stolen is not None
    plain = store._texts
    for tenant, version in (("bob", 1), ("ada", 2)):
        store._texts = type(plain)(keep=True, key=None)
        store._texts.seal = lambda text, tenant, version: stolen
        commit(store, version, "x", tenant)
        store._texts = plain
        with pytest.raises(StoreFailed, match="cannot be decrypted"):
            store.history(tenant)
