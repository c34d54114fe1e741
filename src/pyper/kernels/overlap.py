"""Kernels that begin while the one before them ends (programmatic dependent launch, Hopper on).

A kernel of a few microseconds spends as many on being launched, on its first loads and on its last
stores. One that asks for what nobody has just written (weights) before it waits hides all of that.
"""

from functools import cache

import torch

from pyper.kernels import launch

if launch.HAS_TRITON:
    import triton
    import triton.language as tl
    from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


def overlap_options(wanted: bool, device: torch.device) -> dict[str, bool]:
    """What a launch and its kernel are told."""
    options = launch_options(wanted, device)
    return {"OVERLAP": True, **options} if options else {}


def launch_options(wanted: bool, device: torch.device) -> dict[str, bool]:
    """What a launch is told, of a kernel that waits for the one before in any case."""
    return {"launch_pdl": True} if wanted and can_overlap(device) else {}


@cache
def can_overlap(device: torch.device) -> bool:
    """Whether kernels may begin before others have ended."""
    if device.type != "cuda" or torch.version.hip is not None:
        return False
    return torch.cuda.get_device_capability(device) >= (9, 0)


if launch.HAS_TRITON:

    @triton.jit
    def wait_for_others(OVERLAP: tl.constexpr, EARLY: tl.constexpr = False):
        """Before this, a kernel reads what no kernel writes; behind it, all before it have ended.

        Only then is the next one let in: two at a time share the processors and the cache.
        EARLY: it is let in as soon as all programs of this one have sent off their first loads. It
        too waits for this one's end before it reads what may not be there yet.
        """
        if OVERLAP:
            if EARLY:
                gdc_launch_dependents()
            gdc_wait()
            if not EARLY:
                gdc_launch_dependents()

    @triton.jit
    def ask_ahead(lines):
        """Has the cache lines at these pointers brought near; nobody waits for them."""
        tl.inline_asm_elementwise(
            "prefetch.global.L2 [$1]; mov.u32 $0, 0;",
            "=r,l",
            [lines.to(tl.int64)],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )
