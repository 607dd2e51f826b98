"""PTX as lists: registers, parameters, instructions."""

import re
from typing import NamedTuple


class Address(NamedTuple):
    base: str  # a register, a parameter, a variable
    offset: int


class Instruction(NamedTuple):
    name: str  # of "mad.lo.s32" it is "mad"
    kinds: tuple[str, ...]  # and these are ("lo", "s32")
    operands: tuple  # str, Address, or a tuple of str in braces
    guard: str | None  # the predicate that it hangs on
    negated: bool
    text: str


class Kernel(NamedTuple):
    parameters: list[str]
    registers: dict[str, str]  # the prefix of a register's name to its type: "%rd" to "b64"
    code: list[Instruction]
    labels: dict[str, int]  # to the place in `code`


GUARD = re.compile(r"@(!?)(%\w+)\s+")
REGISTERS = re.compile(r"\.reg\s+\.(\w+)\s+(%[a-z]+)<\d+>")
HALF = re.compile(r"\{ \.reg \.b32 (\w+); (.*?;) \}")  # a block with a register of its own, for what is thrown away
DIRECTIVE = re.compile(r"\.(loc|file|pragma|reg|reqntid|maxntid|minnctapersm)\b")


def read(ptx: str) -> Kernel:
    """The one entry of a module."""
    text = re.sub(r"//[^\n]*", "", ptx)
    text = HALF.sub(lambda block: re.sub(rf"\b{block[1]}\b", "_", block[2]), text)
    signature, _, body = text.partition(".entry")[2].partition(")")
    body = body.partition("{")[2]
    registers = {prefix: type_ for type_, prefix in REGISTERS.findall(body)}
    code: list[Instruction] = []
    labels: dict[str, int] = {}
    for line in body.splitlines():
        line = line.strip()
        if line == "}":  # the end of the function: what follows is for debuggers
            break
        if label := re.match(r"(\$\w+):$", line):
            labels[label[1]] = len(code)
        elif not DIRECTIVE.match(line):
            code += (_instruction(part.strip()) for part in line.split(";") if part.strip())
    return Kernel(re.findall(r"\w+_param_\d+", signature), registers, code, labels)


def _instruction(text: str) -> Instruction:
    guard = GUARD.match(text)
    mnemonic, _, operands = text[guard.end() if guard else 0 :].partition(" ")
    if "\t" in mnemonic:
        mnemonic, _, more = mnemonic.partition("\t")
        operands = f"{more} {operands}"
    name, *kinds = mnemonic.replace("::", "_").split(".")
    # Braces and brackets hold commas of their own.
    parts = re.findall(r"\{[^}]*\}|\[[^\]]*\]|[^,{}\[\]\s][^,{}\[\]]*", operands)
    return Instruction(
        name, tuple(kinds), tuple(map(_operand, parts)), guard[2] if guard else None, bool(guard and guard[1]), text
    )


def _operand(text: str):
    text = text.strip()
    if text.startswith("{"):
        return tuple(part.strip() for part in text[1:-1].split(","))
    if text.startswith("["):
        base, _, offset = text[1:-1].replace(" ", "").partition("+")
        return Address(base, int(offset or 0))
    return text
