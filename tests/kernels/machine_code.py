"""Reading what ptxas made of a kernel, as `cuobjdump` prints it: an instruction per line."""

import re
from collections.abc import Iterator

# They write no register: all that they name is read.
_READERS = {
    "ST",
    "STG",
    "STS",
    "STSM",
    "RED",
    "BAR",
    "BRA",
    "EXIT",
    "NOP",
    "ISETP",
    "FSETP",
    "PLOP3",
}
_WIDTHS = {"128": 4, "4": 4, "64": 2, "WIDE": 2, "CS2R": 2}


def lost_registers(sass: str) -> list[str]:
    """Instructions that read a register which nothing above has written, or that of the stack.

    ptxas (12.8, 12.9) has been seen to make such, where it loses the result of a conversion. What
    moves 16 bits into half a register reads the other half, whatever it holds, and is left out.
    """
    written, found = set[int](), []
    for line in _instructions(sass):
        name, _, rest = line.partition(" ")
        operands = [part.strip() for part in rest.split(",")]
        if name.startswith("SHFL"):  # whether the other thread is there comes first
            operands = operands[1:]
        to = re.match(r"R(\d+)", operands[0])
        reads = operands
        if to and name.split(".")[0] not in _READERS:
            reads = operands[1:]
            if name == "PRMT" and operands[3] == operands[0]:
                reads = operands[1:2]
        numbers = {int(n) for part in reads for n in re.findall(r"(?<![\w])R(\d+)", part)}
        if numbers - written or 1 in numbers:
            found.append(line)
        if to and reads is not operands:
            first = int(to[1])
            written |= {first + i for i in range(_width(name))}
    return found


def _instructions(sass: str) -> Iterator[str]:
    for line in sass.splitlines():
        given = re.search(r"\t(?:@!?U?P\w+\s+)?([A-Z].*);", line)
        if given:
            yield given[1]


def _width(name: str) -> int:
    return max(_WIDTHS.get(part, 1) for part in name.split("."))
