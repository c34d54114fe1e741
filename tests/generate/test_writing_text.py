from itertools import pairwise

import pytest
import torch

from mixture.small_mixtures import MODES, ROUTERS, small_mixture, small_settings
from nn.small_experts import small_config
from pyper.data import TextTokenizer
from pyper.errors import PromptError
from pyper.generate import Completion, SamplingConfig, complete, encode_prompt, stream
from pyper.mixture import Mixture
from pyper.nn import Transformer

BYTES = TextTokenizer.bytes_only()
GREEDY = SamplingConfig(max_new_tokens=8, temperature=0.0)
SAMPLED = SamplingConfig(max_new_tokens=8, temperature=1.0, seed=5)
PROMPTS = ["", "a", "the fox and", "x" * 20]


def scripted(text: str, seq_len: int = 40) -> Mixture:
    """A mixture that goes on with `text` (of different bytes), then ends the document."""
    tokens = [BYTES.bos_id, *BYTES.encode(text), BYTES.bos_id]
    assert len(set(tokens)) == len(tokens) - 1
    config = small_config(vocab_size=257, d_model=264, d_ff=4, n_layers=1, seq_len=seq_len)
    model = Transformer(config).eval()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim == 2:
                weight.zero_()
        model.embedding.weight[:, :257] = torch.eye(257)
        for now, after in pairwise(tokens):
            model.head.weight[after, now] = 5.0
    settings = small_settings(experts=("only",), router="experts", seq_len=seq_len)
    return Mixture(settings, [lambda: model], None)


def small_bytes(router: str = "unigram", **changes: object) -> Mixture:
    return small_mixture(router, vocab_size=257, **changes)


def one(mixture: Mixture, prompt: str, **changes: object) -> Completion:
    values = {"max_new_tokens": 30, "temperature": 0.0} | changes
    return complete(mixture, BYTES, [prompt], SamplingConfig(**values))[0]


def test_text_ends_where_the_next_document_would_begin() -> None:
    got = one(scripted("abé€dz"), "")
    assert (got.text, got.finished) == ("abé€dz", "stop")
    assert got.pieces[-1].token == BYTES.bos_id
    assert [p.finished for p in got.pieces[:-1]] == [None] * (len(got.pieces) - 1)


def test_tokens_that_end_a_text_elsewhere_end_it_here() -> None:
    mixture = scripted("abé€dz")
    (stop,) = BYTES.encode("d")
    mixture.settings = mixture.settings.model_copy(update={"stop_ids": (stop,)})
    got = one(mixture, "")
    assert (got.text, got.finished) == ("abé€", "stop")
    assert got.pieces[-1].token == stop


@pytest.mark.parametrize("changes", [{}, {"temperature": 2.0}, {"temperature": 2.0, "top_k": 9}])
def test_entries_without_a_token_are_never_written(changes: dict[str, float]) -> None:
    padded = small_mixture("experts", vocab_size=300)
    for expert in range(padded.n_experts):
        with torch.no_grad():
            head = padded.expert(expert).head.weight
            head[257:] = 4 * head[:43]  # far likelier than any token, now and then
    got = complete(padded, BYTES, ["a", "b"], SamplingConfig(max_new_tokens=20, **changes))
    assert max(p.token or 0 for row in got for p in row.pieces) < 257
    tokens = torch.tensor([[BYTES.bos_id, *BYTES.encode(got[0].text)]])
    assert padded.log_probs(tokens[:, :8]).argmax(dim=-1).max() >= 257


def test_writing_goes_on_from_the_end_of_the_prompt() -> None:
    assert one(scripted("abé€dz"), "zdb").text == "é€dz"


def test_a_stop_string_ends_the_text_and_is_left_out() -> None:
    got = one(scripted("abé€dz"), "", stop=("€d", "q"))
    assert (got.text, got.finished) == ("abé", "stop")
    assert one(scripted("abé€dz"), "", stop=("dz?",)).text == "abé€dz"


def test_the_limit_ends_the_text_and_releases_what_was_held_back() -> None:
    got = one(scripted("abé€dz"), "", max_new_tokens=3)
    assert (got.text, got.finished) == ("ab\ufffd", "length")
    assert len(got.pieces) == 3
    got = one(scripted("abcd"), "", max_new_tokens=2, stop=("bc",))
    assert (got.text, got.finished) == ("ab", "length")


@pytest.mark.parametrize("n_prompt", [0, 5, 10])
def test_the_context_caps_the_new_tokens(n_prompt: int) -> None:
    mixture = scripted("abcdefghijklmnopqrstuvwxyz", seq_len=12)
    got = one(mixture, "zyxwvutsra"[10 - n_prompt :])
    assert got.finished == "length"
    assert len(got.pieces) == 12 - 1 - n_prompt


def test_a_prompt_that_fills_the_context_is_refused() -> None:
    assert encode_prompt(BYTES, "x" * 10, 12) == [BYTES.bos_id, *BYTES.encode("x" * 10)]
    with pytest.raises(PromptError, match="the prompt has 12 tokens and the context holds 12") as c:
        one(scripted("abc", seq_len=12), "x" * 11)
    assert "at most 11" in c.value.hint


def test_no_prompt_at_all_is_refused() -> None:
    with pytest.raises(PromptError, match="no prompt") as caught:
        complete(scripted("abc"), BYTES, [], GREEDY)
    assert caught.value.hint


@pytest.mark.parametrize("mode", [MODES[1], *MODES[3:]])
@pytest.mark.parametrize("router", ROUTERS)
def test_greedy_text_of_a_batch_is_that_of_each_prompt_alone(
    mode: dict[str, object], router: str
) -> None:
    mixture = small_bytes(router, **mode)
    together = complete(mixture, BYTES, PROMPTS, GREEDY)
    for prompt, got in zip(PROMPTS, together, strict=True):
        alone = complete(mixture, BYTES, [prompt], GREEDY)[0]
        assert [p.token for p in got.pieces] == [p.token for p in alone.pieces]
        assert (got.text, got.finished) == (alone.text, alone.finished)
    assert len({c.text for c in together}) == len(PROMPTS)


def test_greedy_text_is_the_likeliest_by_scoring() -> None:
    mixture = small_bytes()
    for prompt, got in zip(PROMPTS, complete(mixture, BYTES, PROMPTS, GREEDY), strict=True):
        tokens = encode_prompt(BYTES, prompt, 48)
        for piece in got.pieces:
            assert piece.token == int(mixture.log_probs(torch.tensor([tokens]))[0, -1].argmax())
            tokens.append(piece.token)


def test_sampled_text_depends_on_prompt_place_and_seed_alone() -> None:
    mixture = small_bytes()
    first = complete(mixture, BYTES, PROMPTS, SAMPLED)
    other = complete(mixture, BYTES, ["something else", *PROMPTS[1:3]], SAMPLED)
    assert [c.text for c in other[1:]] == [c.text for c in first[1:3]]
    twice = complete(mixture, BYTES, ["a", "a"], SAMPLED)
    assert twice[0].text != twice[1].text
    again = complete(mixture, BYTES, PROMPTS, SAMPLED)
    assert [c.pieces for c in again] == [c.pieces for c in first]
    reseeded = complete(mixture, BYTES, PROMPTS, SamplingConfig(8, 1.0, seed=99))
    assert [c.text for c in reseeded] != [c.text for c in first]


def test_a_row_that_stops_early_leaves_the_others_alone() -> None:
    mixture = scripted("abcdefghijklmnopqrstuvwxyz", seq_len=64)
    prompts = ["v", "a", "y", "m"]
    got = complete(mixture, BYTES, prompts, SamplingConfig(64, 0.0))
    assert [c.text for c in got] == ["wxyz", "bcdefghijklmnopqrstuvwxyz", "z", "nopqrstuvwxyz"]
    assert {c.finished for c in got} == {"stop"}


def test_pieces_come_side_by_side_and_add_up_to_the_completions() -> None:
    mixture = small_bytes()
    pieces = list(stream(mixture, BYTES, PROMPTS, GREEDY))
    assert [p.row for p in pieces[:8]] == [0, 1, 2, 3] * 2
    for row, whole in enumerate(complete(mixture, BYTES, PROMPTS, GREEDY)):
        own = [p for p in pieces if p.row == row]
        assert tuple(own) == whole.pieces
        assert "".join(p.text for p in own) == whole.text


@pytest.mark.parametrize("mode", MODES)
def test_every_piece_tells_which_expert_wrote_it(mode: dict[str, object]) -> None:
    mixture = small_bytes(**mode)
    got = complete(mixture, BYTES, ["the fox"], GREEDY)[0]
    tokens = [*encode_prompt(BYTES, "the fox", 48), *[p.token for p in got.pieces]]
    weights = mixture.log_weights(torch.tensor([tokens]))[0].exp()
    for step, piece in enumerate(got.pieces):
        expected = weights[7 + step]
        torch.testing.assert_close(torch.tensor(piece.weights), expected, atol=1e-5, rtol=1e-5)
        assert piece.expert == int(torch.tensor(piece.weights).argmax())
        assert sum(piece.weights) == pytest.approx(1)
