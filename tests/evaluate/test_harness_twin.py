"""One expert gets from lm-evaluation-harness what its `transformers` twin gets through `HFLM`."""

import random
import warnings
from typing import Any

import pytest
import torch

from mixture.small_mixtures import small_settings
from nn.small_experts import small_expert
from nn.test_transformers_parity import stock_twin
from pyper.data import BOS, TextTokenizer
from pyper.mixture import Mixture

pytest.importorskip("lm_eval")
pytest.importorskip("accelerate")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM
    from tokenizers import Tokenizer, processors
    from transformers import PreTrainedTokenizerFast

    from pyper.evaluate.harness import MixtureLM

CONTEXT = 48
FAMILIES = [
    ("Arcee", {"activation": "gelu"}, {"hidden_act": "gelu"}),
    ("Llama", {"activation": "swiglu", "n_kv_heads": 2}, {}),
]
pytestmark = pytest.mark.filterwarnings("ignore")


def words_of(n: int, rng: random.Random) -> str:
    return " ".join(rng.choice(["sea", "law", "fox", "mill", "oak", "é"]) for _ in range(n))


def their_tokenizer(path: str) -> PreTrainedTokenizerFast:
    """The same bytes; the document token comes first where special tokens are asked for."""
    tokenizer = Tokenizer.from_file(path)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", special_tokens=[(BOS, 0)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=BOS, eos_token=BOS, pad_token=BOS
    )


@pytest.fixture(params=FAMILIES, ids=lambda family: family[0])
def twins(request: pytest.FixtureRequest, tmp_path: Any) -> tuple[MixtureLM, HFLM, HFLM]:
    """Ours, and theirs with and without the document token before a text."""
    family, shape, theirs = request.param
    tokenizer = TextTokenizer.bytes_only()
    tokenizer.save(tmp_path / "tokenizer.json")
    model = small_expert(std=0.3, vocab_size=tokenizer.vocab_size, seq_len=CONTEXT, **shape)
    settings = small_settings(experts=("one",), top_k=1, seq_len=CONTEXT)
    ours = MixtureLM(Mixture(settings, [lambda: model], None), tokenizer, batch_tokens=300)
    twin = stock_twin(model, family, **theirs)

    def wrapped(add_bos: bool) -> HFLM:
        # One at a time: what it pads on the left, it writes differently.
        return HFLM(
            pretrained=twin,
            tokenizer=their_tokenizer(str(tmp_path / "tokenizer.json")),
            device="cpu",
            batch_size=1,
            add_bos_token=add_bos,
        )

    return ours, wrapped(True), wrapped(False)


def asked(kind: str, *arguments: tuple[Any, ...]) -> list[Instance]:
    return [
        Instance(request_type=kind, doc={}, arguments=own, idx=i) for i, own in enumerate(arguments)
    ]


def test_log_likelihoods(twins: tuple[MixtureLM, HFLM, HFLM]) -> None:
    ours, theirs, _ = twins
    rng = random.Random(0)
    pairs = [("", "sea"), ("", "a"), ("the fox ", "met"), ("the fox", " "), ("x" * 60, "yz")]
    for n in range(14):  # up to 80 bytes: the context holds 48
        context = words_of(n, rng)
        pairs += [(context, f" {words_of(rng.randint(1, 3), rng)}") for _ in range(3)]
    written = ours.generate_until(asked("generate_until", ("the", {"max_gen_toks": 3})))[0]
    if "\ufffd" not in written:
        pairs.append(("the", written))
    rng.shuffle(pairs)
    requests = asked("loglikelihood", *pairs)

    got, expected = ours.loglikelihood(requests), theirs.loglikelihood(requests, disable_tqdm=True)

    assert [g[1] for g in got] == [e[1] for e in expected]
    torch.testing.assert_close(
        torch.tensor([g[0] for g in got]), torch.tensor([e[0] for e in expected]), atol=1e-4, rtol=0
    )
    too_long = [len((a + b).encode()) + 1 > CONTEXT + 1 for a, b in pairs]
    assert 5 < sum(too_long) < len(pairs) - 5
    assert ours.n_truncated == sum(too_long)


def test_rolling_log_likelihoods(twins: tuple[MixtureLM, HFLM, HFLM]) -> None:
    ours, _, theirs = twins
    rng = random.Random(1)
    texts = ["a", *(words_of(n, rng) for n in (1, 5, 12, 13, 40)), "b" * CONTEXT, "c" * 2 * CONTEXT]
    requests = asked("loglikelihood_rolling", *((text,) for text in texts))

    got = ours.loglikelihood_rolling(requests)
    expected = theirs.loglikelihood_rolling(requests, disable_tqdm=True)

    torch.testing.assert_close(torch.tensor(got), torch.tensor(expected), atol=1e-4, rtol=1e-6)
    assert ours.n_truncated == 0


def test_written_texts(twins: tuple[MixtureLM, HFLM, HFLM]) -> None:
    ours, theirs, _ = twins
    rng = random.Random(2)
    free = [(words_of(n, rng), {"until": [], "max_gen_toks": 12}) for n in range(16)]
    requests = asked("generate_until", *free)
    expected = theirs.generate_until(requests, disable_tqdm=True)
    assert ours.generate_until(requests) == expected
    assert ours.n_truncated == sum(len(text.encode()) + 1 > CONTEXT - 12 for text, _ in free) > 3

    # Stop strings that do occur; some of several characters.
    stops = [text[4:6] for text in expected]
    stopped = [
        (text, {"until": [stop], "max_gen_toks": 12})
        for (text, _), stop in zip(free, stops, strict=True)
    ]
    requests = asked("generate_until", *stopped)
    shorter = theirs.generate_until(requests, disable_tqdm=True)
    assert sum(len(s) < len(e) for s, e in zip(shorter, expected, strict=True)) > 6
    assert ours.generate_until(requests) == shorter
