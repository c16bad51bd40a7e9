"""Conversations are captured as the model's own chat template writes them, token for token."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

import moescope as ms
from moescope.capturing.batches import sequences
from moescope.errors import CorpusError
from moescope.hooks import wrap
from tests.capturing.texts import model, tokenizer

TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'judge' %}{{ raise_exception('no such role') }}{% endif %}"
    "<s>{{ m.role }} {{ m.content }}</s>{% endfor %}{% if add_generation_prompt %}<s>assistant {% endif %}"
)
CHATS = [
    [{"role": "user", "content": "the sun"}],
    [{"role": "user", "content": "sun"}, {"role": "assistant", "content": "the sun the sun"}],
]


def chatting() -> ms.Model:
    own = copy.deepcopy(tokenizer())
    own.chat_template = TEMPLATE
    return wrap(model().hf, own, name="chatting")


def corpus(**more: Any) -> ms.Corpus:
    return ms.Corpus([{"messages": chat, "kind": "a"} for chat in CHATS], ["kind"], chat="messages", **more)


@pytest.mark.parametrize("generate", [None, {"max_new_tokens": 3}])
def test_tokens_are_those_of_the_template(generate: dict[str, Any] | None, tmp_path: Path) -> None:
    talker = chatting()
    store = ms.capture(talker, corpus(), tmp_path / "s", ["routing"], generate=generate)
    tokens = store.tokens().to_pandas()
    for document, chat in enumerate(CHATS):
        mine = tokens[(tokens["document"] == document) & (tokens["phase"] == "prefill")]["token_id"].tolist()
        want = talker.tokenizer.apply_chat_template(chat, add_generation_prompt=generate is not None, return_dict=False)
        assert mine == want
    assert store.labels == ["kind"]
    assert store.manifest.corpus.chat_template
    assert store.manifest.corpus.text_field == "messages"


def test_a_conversation_may_be_json(tmp_path: Path) -> None:
    file = tmp_path / "chats.jsonl"
    file.write_text("".join(json.dumps({"messages": json.dumps(chat)}) + "\n" for chat in CHATS))
    own = chatting().tokenizer
    told = ms.Corpus(file, chat="messages").templated(own)
    assert [document.text for document in told] == [document.text for document in corpus().templated(own)]
    assert told.templated(own, answer=True).census().hash != told.census().hash


def test_what_is_no_conversation_is_refused(tmp_path: Path) -> None:
    for row, words in [
        ({"messages": [{"role": "user"}]}, "a list of objects with role and content"),
        ({"messages": "hello"}, "not valid JSON"),
        ({"text": "hello"}, "no conversation in the field"),
    ]:
        with pytest.raises(CorpusError, match=words):
            ms.Corpus([row], chat="messages").census()
    strange = ms.Corpus([{"messages": [{"role": "judge", "content": "sun"}]}], chat="messages")
    with pytest.raises(CorpusError, match="item 0: the chat template refuses this conversation: no such role"):
        ms.capture(chatting(), strange, tmp_path / "s")
    with pytest.raises(CorpusError, match="no chat template"):
        ms.capture(model(), corpus(), tmp_path / "s")
    with pytest.raises(CorpusError, match=r"corpus.templated\(tokenizer\)"):
        list(sequences(corpus(), tokenizer(), 8))
    assert not (tmp_path / "s").exists()
