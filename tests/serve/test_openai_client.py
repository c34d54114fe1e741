"""The official client gets completions as the engine writes them, errors, and may go away."""

import json
import time

import numpy as np
import openai
import pytest
import torch

from pyper.data import TextTokenizer
from pyper.generate import SamplingConfig, complete
from pyper.mixture import Mixture
from serve.raw_http import request
from serve.small_requests import chat_of, completion_of
from serve.small_server import CONTEXT, NAMES, Server, wait_until


class TestCompletions:
    """/v1/completions."""

    def test_the_text_is_that_of_the_engine_with_the_same_seed(
        self, client: openai.OpenAI, loaded: tuple[Mixture, TextTokenizer]
    ) -> None:
        for sampling in (
            SamplingConfig(12, 0.7, seed=5),
            SamplingConfig(12, 0.0),
            SamplingConfig(12, 1.1, top_k=7, top_p=0.9, min_p=0.01, repetition_penalty=1.3, seed=9),
        ):
            (expected,) = complete(*loaded, ["the fox"], sampling)
            got = completion_of(
                client,
                temperature=sampling.temperature,
                top_p=sampling.top_p,
                seed=sampling.seed,
                extra_body={
                    "top_k": sampling.top_k or -1,
                    "min_p": sampling.min_p,
                    "repetition_penalty": sampling.repetition_penalty,
                },
            )
            assert got.choices[0].text == expected.text
            assert got.choices[0].finish_reason == expected.finished
            assert got.usage.prompt_tokens == 1 + len("the fox")
            assert got.usage.completion_tokens == len(expected.pieces)
            assert got.usage.total_tokens == got.usage.prompt_tokens + len(expected.pieces)

    def test_without_a_seed_every_answer_differs(self, client: openai.OpenAI) -> None:
        texts = {
            completion_of(client, seed=None, temperature=1.0).choices[0].text for _ in range(3)
        }
        assert len(texts) == 3

    def test_prompts_and_n_give_their_product_in_order(self, client: openai.OpenAI) -> None:
        got = completion_of(client, ["a", "bb"], n=2)
        assert [choice.index for choice in got.choices] == [0, 1, 2, 3]
        assert got.usage.prompt_tokens == 2 + 3
        alone = [
            completion_of(client, prompt, seed=5 + i) for prompt in ("a", "bb") for i in (0, 1)
        ]
        assert [c.text for c in got.choices] == [a.choices[0].text for a in alone]

    def test_token_ids_are_prompts_with_and_without_the_document_token(
        self, client: openai.OpenAI
    ) -> None:
        ids = TextTokenizer.bytes_only().encode("the fox")
        expected = completion_of(client).choices[0].text
        for prompt in (ids, [0, *ids], [ids]):
            assert completion_of(client, prompt).choices[0].text == expected

    def test_a_prompt_can_be_cut_to_its_end(self, client: openai.OpenAI) -> None:
        ids = TextTokenizer.bytes_only().encode("the fox")
        got = completion_of(
            client, "x" * 3000 + "the fox", extra_body={"truncate_prompt_tokens": 8}
        )
        assert got.choices[0].text == completion_of(client, ids).choices[0].text

    def test_a_stream_adds_up_to_the_whole(self, client: openai.OpenAI) -> None:
        whole = completion_of(client, n=2)
        parts = list(completion_of(client, n=2, stream=True))
        assert len(parts) > 4
        for index in (0, 1):
            own = [c for part in parts for c in part.choices if c.index == index]
            assert "".join(c.text for c in own) == whole.choices[index].text
            assert [c.finish_reason for c in own][-1] == "length"
            assert {c.finish_reason for c in own[:-1]} <= {None}
        assert all(part.usage is None for part in parts)

    def test_a_stream_ends_with_the_usage_if_asked(self, client: openai.OpenAI) -> None:
        parts = list(completion_of(client, stream=True, stream_options={"include_usage": True}))
        assert parts[-1].choices == []
        assert parts[-1].usage.completion_tokens == 12
        assert [part.usage for part in parts[:-1]] == [None] * (len(parts) - 1)

    def test_stop_strings_end_the_text_and_are_left_out(self, client: openai.OpenAI) -> None:
        text = completion_of(client, temperature=0, max_tokens=40).choices[0].text
        stop = text[5:8]
        got = completion_of(client, temperature=0, max_tokens=40, stop=[stop, "never there"])
        assert got.choices[0].text == text[: text.index(stop)]
        assert got.choices[0].finish_reason == "stop"

    def test_logprobs_are_those_of_the_mixture(
        self, client: openai.OpenAI, loaded: tuple[Mixture, TextTokenizer]
    ) -> None:
        mixture, tokenizer = loaded
        got = completion_of(client, logprobs=3, max_tokens=6, temperature=0).choices[0].logprobs
        tokens = [0, *tokenizer.encode("the fox")]
        for drawn, top, name in zip(got.token_logprobs, got.top_logprobs, got.tokens, strict=True):
            log_probs = mixture.log_probs(torch.tensor([tokens]))[0, -1]
            best = log_probs.topk(3)
            assert sorted(top.values(), reverse=True) == pytest.approx(
                best.values.tolist(), abs=1e-4
            )
            assert drawn == pytest.approx(float(best.values[0]), abs=1e-4)
            assert top[name] == drawn
            tokens.append(int(best.indices[0]))
        assert got.text_offset == [sum(map(len, got.tokens[:i])) for i in range(6)]

    def test_the_end_of_the_context_ends_the_text(self, client: openai.OpenAI) -> None:
        got = completion_of(client, "x" * (CONTEXT - 4), max_tokens=12)
        assert (got.usage.completion_tokens, got.choices[0].finish_reason) == (3, "length")


class TestWhoWrote:
    """The field `pyper`, and pinned experts."""

    def test_every_choice_says_which_experts_wrote_it(
        self, client: openai.OpenAI, loaded: tuple[Mixture, TextTokenizer]
    ) -> None:
        (expected,) = complete(*loaded, ["the fox"], SamplingConfig(12, 0.7, seed=5))
        author = completion_of(client).choices[0].pyper
        means = np.mean([piece.weights for piece in expected.pieces], axis=0)
        assert author["weights"] == pytest.approx(
            {name: w for name, w in zip(NAMES, means, strict=True) if w >= 5e-5}, abs=2e-4
        )
        assert author["expert"] == NAMES[int(means.argmax())]
        assert "".join(span["text"] for span in author["spans"]) == expected.text
        by_token = [s["expert"] for s in author["spans"] for _ in range(s["tokens"])]
        assert by_token == [NAMES[piece.expert] for piece in expected.pieces]

    def test_so_does_every_part_of_a_stream(self, client: openai.OpenAI) -> None:
        for part in chat_of(client, stream=True):
            for choice in part.choices:
                if choice.delta.content:
                    assert sum(choice.pyper["weights"].values()) == pytest.approx(1, abs=1e-3)

    @pytest.mark.parametrize("expert", range(4))
    def test_a_pinned_expert_writes_alone(
        self, client: openai.OpenAI, loaded: tuple[Mixture, TextTokenizer], expert: int
    ) -> None:
        got = completion_of(client, model=f"tiny/expert-{expert}", temperature=0)
        assert got.model == f"tiny/expert-{expert}"
        assert got.choices[0].pyper["weights"] == {NAMES[expert]: 1.0}
        mixture, tokenizer = loaded
        tokens = [0, *tokenizer.encode("the fox")]
        for _ in range(12):
            tokens.append(int(mixture.expert(expert)(torch.tensor([tokens]))[0, -1].argmax()))
        assert got.choices[0].text == tokenizer.decode(tokens[8:])


class TestErrors:
    """The client recognises what went wrong."""

    def test_a_model_that_is_not_there(self, client: openai.OpenAI) -> None:
        with pytest.raises(openai.NotFoundError) as caught:
            completion_of(client, model="gpt-9")
        assert caught.value.code == "model_not_found"
        with pytest.raises(openai.NotFoundError):
            client.models.retrieve("tiny/expert-9")

    def test_a_prompt_that_is_too_long(self, client: openai.OpenAI) -> None:
        with pytest.raises(openai.BadRequestError, match="2,049 tokens") as caught:
            completion_of(client, "x" * 2048, stream=True)
        assert (caught.value.code, caught.value.param) == ("context_length_exceeded", "prompt")


class TestCancelling:
    """A client that goes away costs nothing more."""

    @pytest.mark.parametrize("n", [1, 3])
    def test_a_closed_stream_stops_the_engine(
        self, server: Server, client: openai.OpenAI, n: int
    ) -> None:
        stream = chat_of(client, n=n, max_tokens=CONTEXT - 20, stream=True, temperature=0)
        parts = [next(stream) for _ in range(5)]
        assert parts
        assert server.health()["running"] == n
        stream.close()
        server.wait_until_idle(seconds=2)
        assert decoded_in(server, 0.2) == 0

    def test_a_client_that_stops_waiting_stops_the_engine(self, server: Server) -> None:
        body = {
            "model": "tiny",
            "prompt": "a",
            "n": 8,
            "max_tokens": CONTEXT - 20,
            "temperature": 0,
        }
        with server.connect() as connection:
            connection.sendall(request(server, json.dumps(body).encode()))
            wait_until(lambda: server.health()["running"] == 8)
        server.wait_until_idle(seconds=1)
        assert decoded_in(server, 0.2) == 0

    def test_neighbours_get_what_they_would_get_alone(
        self, server: Server, client: openai.OpenAI
    ) -> None:
        alone = [completion_of(client, p, logprobs=2, max_tokens=24) for p in ("a", "the fox")]
        others = [
            chat_of(client, f"{i}" * (i + 1), max_tokens=CONTEXT // 2, stream=True, temperature=1)
            for i in range(4)
        ]
        for other in others:
            next(other)
        together = [completion_of(client, p, logprobs=2, max_tokens=24) for p in ("a", "the fox")]
        for other in others:
            other.close()
        for a, b in zip(alone, together, strict=True):
            assert a.choices[0].text == b.choices[0].text
            assert a.choices[0].logprobs.token_logprobs == b.choices[0].logprobs.token_logprobs


def decoded_in(server: Server, seconds: float) -> float:
    before = server.metric("pyper_decoded_tokens")
    time.sleep(seconds)
    return server.metric("pyper_decoded_tokens") - before
