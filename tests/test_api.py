"""The names at the top of the package: lazy, typed, and what an opened model does."""

import math
import pkgutil
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import pyper
from mixture.small_mixtures import NAMES
from pyper.mixture import load_mixture
from serve.small_server import save_small_mixture
from small_training import train_small

pytestmark = pytest.mark.usefixtures("one_thread")


def in_a_new_process(code: str) -> str:
    command = [sys.executable, "-W", "error", "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return done.stdout


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four random experts over bytes."""
    return save_small_mixture(tmp_path_factory.mktemp("api"))


@pytest.fixture
def model(folder: Path) -> pyper.Model:
    return pyper.load(folder)


# The package


def test_importing_pyper_imports_nothing_heavy() -> None:
    code = (
        "import sys, pyper; dir(pyper); pyper.PyperError\n"
        "print([m for m in ('torch', 'numpy', 'pydantic', 'rich') if m in sys.modules])\n"
        "pyper.ExpertConfig; print('torch' in sys.modules)\n"
        "pyper.load; print('torch' in sys.modules, 'lm_eval' in sys.modules)"
    )
    assert in_a_new_process(code).splitlines() == ["[]", "False", "True False"]


def test_every_name_is_there_listed_and_no_package() -> None:
    """A package of the same name would take its place as soon as anybody imports it."""
    assert set(pyper.__all__) <= set(dir(pyper))
    for name in pyper.__all__:
        assert getattr(pyper, name).__doc__, name
    packages = {module.name for module in pkgutil.iter_modules(pyper.__path__)}
    assert not packages & set(pyper.__all__)


def test_a_name_that_is_not_there() -> None:
    with pytest.raises(AttributeError, match="'lod'"):
        pyper.lod  # type: ignore[attr-defined]  # noqa: B018


@pytest.mark.slow  # mypy reads all of torch
def test_type_checkers_see_the_names(tmp_path: Path) -> None:
    pytest.importorskip("mypy")
    program = tmp_path / "program.py"
    program.write_text(
        "import pyper\n"
        'reveal_type(pyper.load("x").score("y").nats)\n'
        "reveal_type(pyper.ExpertConfig(d_model=3).d_model)\n"
        "pyper.lod\n"
        "pyper.load(3)\n"
    )
    command = [sys.executable, "-m", "mypy", "--strict", program.name]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    said = done.stdout.splitlines()
    assert 'float"' in said[0], done.stdout + done.stderr
    assert 'int"' in said[1]
    assert '"lod"' in said[2]
    assert "Argument 1" in said[3]
    assert (Path(pyper.__path__[0]) / "py.typed").is_file()


# A model


def test_a_text_gets_the_log_probs_of_the_mixture(model: pyper.Model, folder: Path) -> None:
    mixture, tokenizer = load_mixture(folder)
    tokens = torch.tensor([[tokenizer.bos_id, *tokenizer.encode("to be or not")]])
    said = mixture.log_probs(tokens)[0, :-1]
    expected = said.gather(1, tokens[0, 1:, None]).squeeze(1)

    torch.testing.assert_close(model.log_probs("to be or not"), expected, atol=1e-5, rtol=0)
    score = model.score("to be or not")
    assert score.nats == pytest.approx(-float(expected.sum()), abs=1e-4)
    assert (score.tokens, score.bytes) == (12, 12)
    assert score.nats_per_token == pytest.approx(score.nats / 12)
    assert score.bits_per_byte == pytest.approx(score.nats / 12 / math.log(2))
    assert score.perplexity == pytest.approx(math.exp(score.nats / 12))
    assert model.log_probs("").shape == (0,)


def test_a_text_longer_than_the_context_is_scored_whole(model: pyper.Model) -> None:
    model.mixture.settings = model.mixture.settings.model_copy(update={"seq_len": 10})
    text = "all that glitters is not gold"
    log_probs = model.log_probs(text)
    assert len(log_probs) == len(text)
    first = model.log_probs(text[:10])
    torch.testing.assert_close(log_probs[:10], first, atol=1e-5, rtol=0)
    assert model.route(text) == model.route(text[:9]) != model.route(text[:8])


def test_routes_are_the_weights_of_what_comes_next(folder: Path) -> None:
    for mixing in ("posterior", "top1", "window"):
        model = pyper.load(folder, mixing=mixing)
        tokens = [model.tokenizer.bos_id, *model.tokenizer.encode("to be or not")]
        expected = model.mixture.log_weights(torch.tensor([tokens]))[0, -1].exp().tolist()
        assert model.route("to be or not") == pytest.approx(
            dict(zip(NAMES, expected, strict=True)), abs=1e-6
        )
    assert pyper.load(folder).route("") == pytest.approx(dict.fromkeys(NAMES, 0.25), abs=0.26)


def test_one_expert_alone(model: pyper.Model, folder: Path) -> None:
    assert model.experts == NAMES
    alone = model.expert("maths")
    assert alone.experts == ("maths",)
    torch.testing.assert_close(
        alone.log_probs("one two"), pyper.load(folder, expert="1").log_probs("one two")
    )
    assert model.expert(1).experts == pyper.load(folder, expert=1).experts == ("maths",)
    assert alone.mixture.expert(0) is model.mixture.expert(1)  # not a copy
    assert alone.route("x") == {"maths": 1.0}


def test_what_is_streamed_is_what_is_generated(model: pyper.Model) -> None:
    settings: dict[str, Any] = {"max_new_tokens": 20, "temperature": 1.0, "top_p": 1.0, "seed": 3}
    pieces = list(model.stream("to be", **settings))
    assert "".join(piece.text for piece in pieces) == model.generate("to be", **settings)
    assert {len(piece.weights) for piece in pieces} == {4}
    assert model.generate("to be", **settings | {"seed": 4}) != model.generate("to be", **settings)
    greedy = model.generate("to be", max_new_tokens=20, temperature=0)
    assert model.generate("to be", max_new_tokens=20, top_k=1) == greedy
    assert (
        model.generate("to be", max_new_tokens=20, temperature=0, stop=greedy[4])
        == greedy[: greedy.index(greedy[4])]
    )


def test_threads_may_share_a_model(model: pyper.Model) -> None:
    prompts = [f"{n} and {n}" for n in range(4)]
    expected = [(model.generate(p, max_new_tokens=12), model.score(p).nats) for p in prompts]
    got: dict[int, Any] = {}

    def work(n: int) -> None:
        for _ in range(3):
            got[n] = model.generate(prompts[n], max_new_tokens=12), model.score(prompts[n]).nats

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [got[n] for n in range(4)] == expected


def test_all_experts_are_verified_at_once_unless_few_stay_in_memory(folder: Path) -> None:
    assert pyper.load(folder).mixture.n_loaded == 4
    few = pyper.load(folder, resident=1)
    assert few.mixture.n_loaded == 0
    assert few.score("abc").nats == pytest.approx(pyper.load(folder).score("abc").nats, abs=1e-5)
    assert few.mixture.n_loaded == 1


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda model, _: pyper.load("/nowhere"), "neither a run nor a mixture"),
        (lambda _, folder: pyper.load(folder, expert="novel"), "no expert `novel`"),
        (lambda _, folder: pyper.load(folder, mixing="mean"), "unknown mixing"),
        (lambda _, folder: pyper.load(folder, device="abacus"), "abacus"),
        (lambda model, _: model.generate("x" * 3000), "3,001 tokens"),
        (lambda model, _: model.generate(top_p=2.0), "`top_p`"),
        (lambda model, _: model.score(""), "empty text"),
        (lambda model, _: model.score("\udcff"), "UTF-8"),
        (lambda model, _: model.route("\udcff"), "UTF-8"),
        (lambda model, _: model.expert("4"), "no expert `4`"),
        (lambda model, _: model.expert(-1), "no expert `-1`"),
        (lambda *_: pyper.prepare("nothing here", "out"), "nothing here"),
        (lambda *_: pyper.prepare(["."], "out", vocab_size=3), "`vocab_size`"),
        (lambda *_: pyper.train_run({"modle": {}}), "`modle`"),
        (lambda *_: pyper.train_run("no-such-run"), "no run file"),
        (lambda *_: pyper.train_run({}, overrides=["train.steps=3"]), "`overrides`"),
        (lambda *_: train_small([]), "no text"),
        (lambda *_: train_small([b"bytes"]), "document 0 is not a string"),
        (lambda *_: train_small("no-data"), "no-data"),
        (lambda *_: train_small(["short"]), "training tokens"),
        (lambda *_: pyper.evaluate_tasks("/nowhere", ["x.yaml"]), "neither a run nor a mixture"),
        (lambda _, folder: pyper.evaluate_tasks(folder, []), "no task"),
        (lambda _, folder: pyper.evaluate_tasks(folder, "x.yaml", limit=0), "`limit`"),
        (lambda _, folder: pyper.evaluate_tasks(folder, "x.yaml", fewshot=-1), "`fewshot`"),
        (lambda *_: pyper.prepare(__file__, "out", filters="chars >"), "no expression"),
        (lambda *_: pyper.prepare(".", "out", columns={"colour": "x"}), "colour"),
        (lambda *_: pyper.train_run("small", overrides="train.stepz=3"), "`train.stepz`"),
        (lambda *_: pyper.merge_run("/nowhere", "out"), "no run file"),
    ],
)
def test_what_goes_wrong_is_a_pyper_error(
    model: pyper.Model,
    folder: Path,
    wrong: Callable[..., object],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(pyper.PyperError) as refused:
        wrong(model, folder)
    assert message in refused.value.message
    assert refused.value.hint


def test_tasks_from_python(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("lm_eval")
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    task = Path(__file__).parent / "evaluate" / "tasks" / "sums.yaml"
    result = pyper.evaluate_tasks(folder, task, expert=None, limit=2, mixing="top1", device="cpu")
    assert result["mixing"] == "top1"
    assert {row["n"] for row in result["results"]} == {2}
