"""What a run is reckoned to need, against what it does need."""

import json
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from typer.testing import CliRunner

from kernels.narrow_casts import fp8_kernels
from kernels.on_triton import DEVICE, needs_triton
from pyper.cli.main import app
from pyper.config import ExpertConfig, RunConfig, SparseConfig, TrainConfig
from pyper.config.data import DataConfig
from pyper.data import Batch
from pyper.nn import (
    Transformer,
    causal_attention,
    count_parameters,
    init_weights,
    train_flops_per_token,
)
from pyper.nn.fp8_linear import use_fp8
from pyper.nn.sparse_feed_forward import SparseFeedForward
from pyper.stages.memory import training_memory
from pyper.train import next_token_loss
from pyper.train.optimizer import ExpertOptimizer

T, ROWS = 64, 4


def run_of(train: dict[str, Any], **model: Any) -> RunConfig:
    shape = {
        "vocab_size": 17,
        "seq_len": T,
        "bos_id": 0,
        "d_model": 64,
        "n_layers": 3,
        "n_heads": 4,
        "d_ff": 256,
    }
    budget = {
        "seed_fraction": 0,
        "steps": 1,
        "global_batch_tokens": T * ROWS,
        "micro_batch_size": ROWS,
    }
    return RunConfig(
        data=DataConfig(seq_len=T),
        model=ExpertConfig(**shape | model),
        train=TrainConfig(**{"precision": "fp32", **budget, **train}),
    )


def kept_bytes(run: RunConfig, kernels: AbstractContextManager[None] | None = None) -> int:
    """Of what blocks, final norm and head keep for the backward pass, weights left out."""
    model = Transformer(run.model).to(DEVICE if kernels else "cpu")
    init_weights(model, 0)
    if run.train.precision == "fp8":
        use_fp8(model.blocks)
    if run.train.precision != "fp32":
        model.to(torch.bfloat16)
    model.train()
    model.begin_step(0.5)  # of all steps: `threshold_after`
    recompute = run.train.recompute_blocks
    model.recompute_blocks = 0 if recompute == "auto" else recompute
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}
    alive = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights and tensor.numel() > 64:
            kept[storage.data_ptr()] = storage.nbytes()
        alive.append(tensor)
        return tensor

    with (
        kernels or nullcontext(),
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
    ):
        states = model.hidden(torch.zeros(ROWS, T, dtype=torch.long, device=model.device))
    return sum(kept.values()) + states.nbytes  # which the head keeps


SHAPES: dict[str, dict[str, Any]] = {
    "plain": {},
    "grouped queries": {"n_kv_heads": 2},
    "qk norm": {"qk_norm": True},
    "swiglu": {"activation": "swiglu"},
    "post-norm": {"norm_position": "post", "qk_norm": True, "qk_norm_over": "projection"},
    "no RoPE": {"no_rope_layers": [2], "attention_output_bias": True},
    "wider, deeper": {"d_ff": 512, "n_layers": 5},
}


@pytest.mark.parametrize("model", SHAPES.values(), ids=SHAPES)
def test_activations_are_reckoned_within_a_tenth(model: dict[str, Any]) -> None:
    run = run_of({}, **model)
    assert training_memory(run)["activations"] == pytest.approx(kept_bytes(run), rel=0.1)


@needs_triton
@pytest.mark.parametrize(
    ("precision", "model"),
    [
        ("bf16", {}),
        ("bf16", {"qk_norm": True}),
        ("bf16", {"activation": "swiglu"}),
        ("fp8", {}),
        ("fp8", {"qk_norm": True}),
        ("fp8", {"activation": "swiglu"}),
        ("fp8", {"activation": "relu2", "n_kv_heads": 2}),
        ("fp8", {"attention_bias": True}),
        ("fp8", {"feed_forward_bias": True}),
    ],
)
def test_what_blocks_keep_on_kernels_is_reckoned_within_a_tenth(
    precision: str, model: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In fp8 their weights too, once more in 8 bits."""
    monkeypatch.setattr(causal_attention, "_LONGEST_WRITTEN_OUT", 0)  # as a GPU keeps no scores
    run = run_of({"precision": precision}, **{"n_layers": 1, **model})
    memory = training_memory(run, on_kernels=True)
    reckoned = memory["activations"] + memory["fp8_weights"]
    assert reckoned == pytest.approx(kept_bytes(run, fp8_kernels()), rel=0.1)


def test_recomputed_blocks_keep_no_weights_in_8_bits() -> None:
    whole, part, none = (
        training_memory(run_of({"precision": "fp8", "recompute_blocks": n}))["fp8_weights"]
        for n in (0, 2, 3)
    )
    assert (3 * part, none) == (whole, 0)


def test_recomputed_blocks_are_reckoned_to_keep_their_input_only() -> None:
    whole, part, none = (run_of({"recompute_blocks": n}) for n in (0, 2, 3))
    for run in (part, none):
        assert training_memory(run)["activations"] == pytest.approx(kept_bytes(run), rel=0.15)
    sizes = [training_memory(run)["activations"] for run in (whole, part, none)]
    assert sizes[0] > sizes[1] > sizes[2]


@pytest.mark.parametrize(
    "train",
    [
        {"precision": "fp32"},
        {"precision": "bf16"},
        {"precision": "bf16", "weights": "stochastic", "optimizer": "adamw8bit"},
    ],
    ids=["fp32", "bf16, exact", "bf16, random, 8 bits"],
)
def test_weights_and_states_are_those_that_are_saved(train: dict[str, Any]) -> None:
    run = run_of(train, d_ff=1024, vocab_size=512)
    dtype = torch.float32 if train["precision"] == "fp32" else torch.bfloat16
    model = Transformer(run.model).to(dtype)
    init_weights(model, 0)
    optimizer = ExpertOptimizer(model, run.train, 1e-3)
    tokens = torch.zeros(1, 8, dtype=torch.long)
    next_token_loss(model, Batch(tokens, tokens)).total.backward()
    optimizer.step(1.0)

    def size(value: Any) -> int:
        if isinstance(value, torch.Tensor):
            return value.nbytes
        if isinstance(value, dict):
            return sum(map(size, value.values()))
        return sum(map(size, value)) if isinstance(value, list | tuple) else 0

    saved = sum(p.nbytes for p in model.parameters()) + size(optimizer.state_dict())
    memory = training_memory(run)
    reckoned = memory["weights"] + memory["low_halves"] + memory["moments"]
    assert reckoned == pytest.approx(saved, rel=0.03)


@pytest.mark.parametrize(
    ("width", "layers", "precision", "measured"),
    [
        (256, 12, "bf16", 2.0),
        (512, 12, "bf16", 3.8),
        (1024, 12, "bf16", 8.1),
        (2048, 28, "bf16", 42.0),
        (2048, 28, "fp8", 42.6),
    ],
)
def test_experts_need_what_was_measured_on_a_gpu(
    width: int, layers: int, precision: Literal["bf16", "fp8"], measured: float
) -> None:
    """10⁹ bytes at the most: `benchmarks/train_expert.py`, `scaling.py`, 8 × 2,048 tokens."""
    run = RunConfig(
        data=DataConfig(seq_len=2048),
        model=ExpertConfig(
            vocab_size=32_768,
            seq_len=2048,
            bos_id=0,
            d_model=width,
            n_layers=layers,
            n_heads=width // 128,
            d_ff=4 * width,
        ),
        train=TrainConfig(
            precision=precision,
            optimizer="adamw",
            seed_fraction=0,
            steps=1,
            global_batch_tokens=8 * 2048,
            micro_batch_size=8,
        ),
    )
    planned = training_memory(run, on_kernels=True)["total"] / 1e9
    assert planned == pytest.approx(measured, rel=0.05)


def test_several_micro_batches_need_sums_in_float32() -> None:
    one = training_memory(run_of({"precision": "bf16"}))
    two = training_memory(run_of({"precision": "bf16", "micro_batch_size": 2}))
    assert one["gradient_sums"] == 0
    assert two["gradient_sums"] == 4 * count_parameters(run_of({}).model)
    assert two["activations"] == one["activations"] / 2


def test_sparse_feed_forwards_keep_as_much_as_their_experts_read() -> None:
    def needed(capacity: float) -> int:
        sparse = SparseConfig(n_experts=4, capacity_factor=capacity)
        return training_memory(run_of({}, kind="sparse", sparse=sparse))["activations"]

    dense = training_memory(run_of({}))["activations"]
    assert needed(0.5) < needed(1.0) == dense < needed(2.0)


def routed(tokens: int = T * ROWS, **sparse: Any) -> RunConfig:
    """In bf16; a routed model of four experts."""
    run = run_of({"precision": "bf16"}, kind="sparse", sparse=SparseConfig(n_experts=4, **sparse))
    train = run.train.model_copy(
        update={"global_batch_tokens": tokens, "micro_batch_size": tokens // T}
    )
    return run.model_copy(update={"train": train})


@pytest.mark.parametrize(
    "sparse",
    [{"routing": "threshold"}, {"routing": "token_choice", "top_k": 2}],
    ids=["thresholds", "tokens choose"],
)
def test_room_for_whatever_is_chosen_is_reckoned_within_a_tenth(
    sparse: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Products of groups as on a GPU: rows are as many whether they are needed or not."""
    monkeypatch.setattr(causal_attention, "_LONGEST_WRITTEN_OUT", 0)
    monkeypatch.setattr(SparseFeedForward, "_run_mask", SparseFeedForward._run_room)
    run = routed(**sparse)
    reckoned = training_memory(run, on_kernels=True)["activations"]
    assert reckoned == pytest.approx(kept_bytes(run), rel=0.1)


def test_thresholds_need_room_on_kernels_while_it_is_not_too_much() -> None:
    def needed(tokens: int, *, on_kernels: bool = True, **sparse: Any) -> float:
        run = routed(tokens, **sparse)
        return training_memory(run, on_kernels=on_kernels)["activations"] / tokens

    few, many = T * ROWS, 2**27 // (4 * 256)  # at 2²⁷ hidden numbers it ends
    chosen = needed(few)
    assert needed(few, routing="threshold") == needed(many, routing="threshold") > 2 * chosen
    assert needed(many + T, routing="threshold") == chosen
    assert needed(few, routing="threshold", threshold_after=1.0) == chosen  # never
    assert needed(few, routing="threshold", on_kernels=False) == chosen


def test_the_plan_of_a_run_file_counts_the_work_of_a_step(tmp_path: Path) -> None:
    done = CliRunner().invoke(
        app, ["inspect", "--plan", "8x1b5", "--mfu", "0.5", "--tflops", "1000", "--json"]
    )
    planned = json.loads(done.stdout)
    shape = ExpertConfig(**planned["run"]["model"])
    flops = train_flops_per_token(shape, shape.seq_len)
    tokens = planned["run"]["train"]["global_batch_tokens"]
    assert planned["step"]["flops"] == flops * tokens
    assert planned["step"]["seconds"] == pytest.approx(flops * tokens / 5e14)
    assert planned["step"]["mfu"] == 0.5
    assert planned["needs"]["memory"]["total"] > 3e10


def test_a_plan_for_people_says_at_which_rate_and_for_which_vocabulary(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # where no data are
    done = CliRunner().invoke(app, ["inspect", "--plan", "sparse", "--mfu", "0.4"])
    told = " ".join(done.stdout.split())
    assert "at 40 % of 989 TFLOP/s" in told
    assert "a vocabulary of 32,768" in told
    assert "the model" in told
    assert "expert" not in told  # one model, not one of several


@pytest.mark.parametrize(("precision", "measured"), [("bf16", 42.0), ("fp8", 42.6)])
def test_the_plan_of_a_run_file_says_what_was_measured(
    precision: str, measured: float, tmp_path: Path
) -> None:
    """10⁹ bytes, of steps of one micro-batch."""
    text = (Path(__file__).parents[2] / "configs/8x1b5.toml").read_text()
    changes = {"global_batch_tokens = 524_288": "global_batch_tokens = 16_384", '"bf16"': precision}
    for old, new in changes.items():
        assert old in text
        text = text.replace(old, f'"{new}"' if old.startswith('"') else new)
    (tmp_path / "run.toml").write_text(text + '\n[run]\ndevice = "cpu"\n')
    done = CliRunner().invoke(app, ["inspect", "--plan", str(tmp_path / "run.toml"), "--json"])
    needs = json.loads(done.stdout)["needs"]
    assert needs["memory"]["total"] / 1e9 == pytest.approx(measured, rel=0.05)
    assert (needs["memory"]["fp8_weights"] > 1e9) == (precision == "fp8")
