"""The filter of system calls, worked through instruction by instruction."""

from __future__ import annotations

import errno
import platform
import struct

import pytest

from r1jax.rewards.seccomp import filter_program

ALLOW, KILL = 0x7FFF0000, 0x80000000
EPERM, ENOSYS = 0x50000 | errno.EPERM, 0x50000 | errno.ENOSYS
X86, ARM, I386 = 0xC000003E, 0xC00000B7, 0x40000003


def result(program: bytes, architecture: int, number: int, *arguments: int) -> int:
    """What the kernel does with a call: `struct seccomp_data` is what the filter sees of it."""
    padded = [*arguments, *[0] * (6 - len(arguments))]
    data = struct.pack("<iIQ6Q", number, architecture, 0, *(a & (1 << 64) - 1 for a in padded))
    code = list(struct.iter_unpack("=HBBI", program))
    position, loaded = 0, 0
    while True:
        operation, if_true, if_false, value = code[position]
        position += 1
        if operation == 0x20:
            (loaded,) = struct.unpack_from("<I", data, value)
        elif operation == 0x06:
            return int(value)
        else:
            tests = {0x15: loaded == value, 0x35: loaded >= value, 0x45: loaded & value != 0}
            position += if_true if tests[operation] else if_false


@pytest.mark.parametrize(
    ("machine", "architecture", "column"), [("x86_64", X86, 0), ("aarch64", ARM, 1)]
)
def test_calls_are_denied_by_their_number_and_arguments(
    machine: str, architecture: int, column: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(platform, "machine", lambda: machine)
    program, closed = (filter_program(unix_sockets=each) for each in (True, False))
    assert len(program) // 8 < 4096  # BPF_MAXINSNS

    def does(numbers: tuple[int, int], *arguments: int, code: bytes = program) -> int:
        return result(code, architecture, numbers[column], *arguments)

    read, write, clone, clone3, socket, fcntl = (
        (0, 63),
        (1, 64),
        (56, 220),
        (435,) * 2,
        (41, 198),
        (72, 25),
    )
    assert does(read) == does(write) == ALLOW
    for denied in ((319, 279), (29, 194), (272, 97), (425, 425), (101, 117), (321, 280), (165, 40)):
        assert does(denied) == EPERM
    assert does(clone3) == ENOSYS
    thread, child = 0x3D0F00, 0x01200011
    assert does(clone, thread) == does(clone, child) == ALLOW
    for namespace in (1 << 17, 1 << 25, 1 << 26, 1 << 27, 1 << 28, 1 << 29, 1 << 30):
        assert does(clone, child | namespace) == EPERM
    assert does(socket, 1, 1) == ALLOW and does(socket, 1, 1, code=closed) == EPERM
    assert all(does(socket, family, 1) == EPERM for family in range(50) if family != 1)
    pair = (53, 199)
    assert does(pair, 1, 1, code=closed) == ALLOW and does(pair, 40, 1) == EPERM
    assert does(fcntl, 3, 1031, 1 << 20) == EPERM and does(fcntl, 3, 1030) == ALLOW
    assert does((16, 29), 0, 0x5412) == EPERM and does((16, 29), 0, 0x5401) == ALLOW
    assert does((302, 261), 0, 7) == ALLOW and does((302, 261), 1234, 7) == EPERM
    assert does((54, 208), 3, 1, 7) == EPERM and does((54, 208), 3, 1, 20) == ALLOW
    # Other ABIs of the machine, in which these numbers are other calls.
    assert result(program, I386, read[column]) == KILL
    if machine == "x86_64":
        assert result(program, X86, 0x40000000) == ENOSYS


def test_a_machine_with_unknown_calls_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "riscv64")
    with pytest.raises(NotImplementedError, match="riscv64"):
        filter_program(unix_sockets=True)
