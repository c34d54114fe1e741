"""The kernel of `adamw`: one pass over a weight, its gradient and its moments."""

import triton
import triton.language as tl

from pyper.kernels.multi_tensor import pointer, read, write
from pyper.kernels.rounding import (
    as_bf16,
    bits_at,
    high_half,
    join_halves,
    key_of,
    low_half,
    more_bits_of,
)
from pyper.kernels.state_8bit import (
    decode_signed,
    decode_unsigned,
    encode_signed,
    encode_unsigned,
)


@triton.jit(do_not_specialize=["seed"])  # a seed of 1 would be no number but a constant
def _adamw(
    addresses,
    grads,
    sizes,
    pieces,
    numbers,
    decays,
    n_tensors,
    steps,
    corrections1,
    corrections2,
    lr_ptr,
    factor_ptr,
    rest1,
    rest2,
    eps,
    seed,
    WEIGHT: tl.constexpr,
    GRAD: tl.constexpr,
    SPLIT: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    SMALL: tl.constexpr,
    MASKED: tl.constexpr,
    ALIGNED: tl.constexpr,
    ROWS: tl.constexpr,
):
    # 1. which piece of which tensor
    t = tl.load(pieces + 2 * tl.program_id(0))
    row = tl.load(pieces + 2 * tl.program_id(0) + 1).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    at = row[:, None] * 256 + tl.arange(0, 256)[None, :]
    inside = at < tl.load(sizes + t)
    weight_ptr = pointer(addresses + t, WEIGHT, ALIGNED) + at
    low_ptr = pointer(addresses + n_tensors + t, tl.int16, ALIGNED) + at
    entry = addresses + 2 * n_tensors + t
    number = tl.load(numbers + t)
    lr = tl.load(lr_ptr)

    # 2. weight and moments as float32
    grad_ptr = pointer(grads + t, GRAD, ALIGNED) + at
    grad = read(grad_ptr, inside, MASKED).to(tl.float32) * tl.load(factor_ptr)
    weight = read(weight_ptr, inside, MASKED)
    if SPLIT:
        weight = join_halves(weight, read(low_ptr, inside, MASKED))
    weight = weight.to(tl.float32)
    if SMALL:
        mean_ptr = pointer(entry, tl.int8, ALIGNED) + at
        square_ptr = pointer(entry + n_tensors, tl.uint8, ALIGNED) + at
        mean_top = pointer(entry + 2 * n_tensors, tl.float32, ALIGNED) + row
        square_top = pointer(entry + 3 * n_tensors, tl.float32, ALIGNED) + row
        has_row = row * 256 < tl.load(sizes + t)
        mean = decode_signed(read(mean_ptr, inside, MASKED), read(mean_top, has_row, MASKED))
        square = decode_unsigned(
            read(square_ptr, inside, MASKED), read(square_top, has_row, MASKED)
        )
    else:
        mean_ptr = pointer(entry, tl.float32, ALIGNED) + at
        square_ptr = pointer(entry + n_tensors, tl.float32, ALIGNED) + at
        mean = read(mean_ptr, inside, MASKED)
        square = read(square_ptr, inside, MASKED)

    # 3. the step
    weight *= 1.0 - lr * tl.load(decays + t)
    mean += (grad - mean) * rest1
    square += (grad * grad - square) * rest2
    scale = 1.0 / tl.sqrt_rn(tl.load(corrections2 + number))
    rate = lr / tl.load(corrections1 + number)
    weight -= rate * (mean / (tl.sqrt(square) * scale + eps))

    # 4. back, rounded
    key = key_of(seed, number, tl.load(steps + number).to(tl.int32))
    random = bits_at(at, key)
    if SPLIT:
        high = high_half(weight, 0x8000)
        write(low_ptr, low_half(weight, high), inside, MASKED)
        write(weight_ptr, as_bf16(high), inside, MASKED)
    elif STOCHASTIC:
        carry = (more_bits_of(random) & 0xFFFF).to(tl.int32)
        write(weight_ptr, as_bf16(high_half(weight, carry)), inside, MASKED)
    else:
        write(weight_ptr, weight, inside, MASKED)
    if SMALL:
        # What lies beyond the end was read as the largest, and fades like it: never above it.
        code, top = encode_signed(mean, random)
        write(mean_ptr, code, inside, MASKED)
        write(mean_top, top, has_row, MASKED)
        code, top = encode_unsigned(square, random >> 16)
        write(square_ptr, code, inside, MASKED)
        write(square_top, top, has_row, MASKED)
    else:
        write(mean_ptr, mean, inside, MASKED)
        write(square_ptr, square, inside, MASKED)
