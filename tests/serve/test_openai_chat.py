"""The official client chats with the server, asks for embeddings and for the list of models."""

import base64
from typing import Any

import numpy as np
import openai
import pytest
import torch

from pyper.data import TextTokenizer
from pyper.mixture import Mixture
from serve.small_requests import chat_of, completion_of
from serve.small_server import CONTEXT, NAMES, Server


class TestChat:
    """/v1/chat/completions."""

    def test_without_a_template_the_messages_follow_each_other(self, client: openai.OpenAI) -> None:
        messages: list[Any] = [
            {"role": "system", "content": "be"},
            {
                "role": "user",
                "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}],
            },
            {"role": "assistant", "content": ""},
            {"role": "user", "content": "c"},
        ]
        got = client.chat.completions.create(
            model="tiny", messages=messages, max_completion_tokens=12, temperature=0.7, seed=5
        )
        assert got.choices[0].message.role == "assistant"
        assert got.choices[0].message.content == completion_of(client, "be\nab\nc").choices[0].text

    def test_a_stream_adds_up_to_the_whole(self, client: openai.OpenAI) -> None:
        whole = chat_of(client).choices[0].message.content
        parts = list(chat_of(client, stream=True, stream_options={"include_usage": True}))
        assert parts[0].choices[0].delta.role == "assistant"
        assert "".join(c.delta.content or "" for p in parts for c in p.choices) == whole
        assert parts[-1].usage.completion_tokens == 12
        assert len({part.id for part in parts}) == 1

    def test_an_answer_can_be_sent_back_as_it_came(self, client: openai.OpenAI) -> None:
        question: Any = {"role": "user", "content": "the fox"}
        answer = chat_of(client).choices[0].message
        for sent in (answer, answer.model_dump(), answer.to_dict()):
            got = client.chat.completions.create(
                model="tiny", messages=[question, sent, question], max_tokens=1
            )
            assert got.usage is not None
            text = f"the fox\n{answer.content}\nthe fox"
            assert got.usage.prompt_tokens == 1 + len(text.encode())

    def test_logprobs_name_tokens_and_bytes(self, client: openai.OpenAI) -> None:
        content = chat_of(client, logprobs=True, top_logprobs=2).choices[0].logprobs.content
        assert len(content) == 12
        for token in content:
            assert len(token.bytes) == 1
            assert len(token.top_logprobs) == 2
            assert token.logprob <= token.top_logprobs[0].logprob + 1e-6

    def test_fields_without_consequence_are_accepted(self, client: openai.OpenAI) -> None:
        got = chat_of(
            client, user="u", metadata={"a": "b"}, store=False, frequency_penalty=0, tools=[],
            response_format={"type": "text"}, logit_bias={}, service_tier="auto",
        )  # fmt: skip
        assert got.choices[0].message.content == chat_of(client).choices[0].message.content


class TestEmbeddings:
    """/v1/embeddings."""

    def test_they_are_means_of_final_states(
        self, client: openai.OpenAI, loaded: tuple[Mixture, TextTokenizer]
    ) -> None:
        mixture, tokenizer = loaded
        texts = ["the fox", "x" * 100]
        for model, experts in {"tiny": [0, 1, 2, 3], "tiny/expert-2": [2]}.items():
            got = client.embeddings.create(model=model, input=texts)
            for text, entry in zip(texts, got.data, strict=True):
                tokens = torch.tensor([[0, *tokenizer.encode(text)]])
                with torch.no_grad():
                    states = [mixture.expert(e).hidden(tokens)[0].mean(0) for e in experts]
                expected = torch.stack(states).mean(0).tolist()
                assert entry.embedding == pytest.approx(expected, abs=1e-5)
            assert got.usage.prompt_tokens == 8 + 101

    def test_both_encodings_are_the_same_numbers(self, server: Server) -> None:
        body = {"model": "tiny", "input": "the fox"}
        plain = server.post("/v1/embeddings", body).json()["data"][0]["embedding"]
        coded = server.post("/v1/embeddings", body | {"encoding_format": "base64"}).json()
        values = np.frombuffer(base64.b64decode(coded["data"][0]["embedding"]), "<f4")
        assert values.tolist() == pytest.approx(plain)

    @pytest.mark.parametrize(
        "changes", [{"input": []}, {"input": ["a"] * 257}, {"dimensions": 3}, {"input": "x" * 2048}]
    )
    def test_what_cannot_be_embedded_is_refused(
        self, server: Server, changes: dict[str, Any]
    ) -> None:
        reply = server.post("/v1/embeddings", {"model": "tiny", "input": "a"} | changes)
        assert reply.status_code == 400
        assert reply.json()["error"]["param"] == next(iter(changes))

    def test_a_text_may_fill_the_context_and_no_more(self, server: Server) -> None:
        for n_bytes, status in ((CONTEXT - 1, 200), (CONTEXT, 400)):
            body = {"model": "tiny", "input": "x" * n_bytes}
            reply = server.post("/v1/embeddings", body)
            assert reply.status_code == status
        message = reply.json()["error"]["message"]
        assert message == f"`input` has {CONTEXT + 1:,} tokens; the context holds {CONTEXT:,}"


class TestModels:
    """/v1/models."""

    def test_the_mixture_and_its_experts_are_listed(self, client: openai.OpenAI) -> None:
        models = client.models.list().data
        assert [m.id for m in models] == ["tiny", *(f"tiny/expert-{i}" for i in range(4))]
        assert models[0].pyper["experts"] == list(NAMES)  # type: ignore[attr-defined]
        assert client.models.retrieve("tiny").max_model_len == CONTEXT  # type: ignore[attr-defined]
