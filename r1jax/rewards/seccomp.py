"""The system calls that no program in a sandbox may make, as a seccomp filter.

`filter_program` is a classic BPF program (`linux/seccomp.h`, `linux/filter.h`) that the kernel runs
on each system call of a process and of its descendants. It denies what lets a program

- hold memory that no process limit counts: files in memory, System V and POSIX IPC, large pipes
  and sockets, mounts, rings of io_uring;
- leave something behind: IPC objects, keyrings;
- reach more of the kernel or the machine: namespaces, mounts, sockets but Unix ones, BPF, tracing,
  terminals, virtual machine sockets, the memory and the limits of other processes.

A denied call fails with EPERM; clone3, whose flags a filter cannot see, with ENOSYS, so that the C
library takes clone. A call of another ABI of the machine (32-bit) ends the program.
"""

from __future__ import annotations

import errno
import platform
import struct

# Per architecture: the audit number, then where a call's number differs, its column below.
_ARCHITECTURES = {"x86_64": (0xC000003E, 0), "aarch64": (0xC00000B7, 1)}
_X32 = 0x40000000  # on x86-64, calls from this number are of the x32 ABI

# Name, number on x86-64 and on aarch64 (asm/unistd_64.h, asm-generic/unistd.h); -1: no such call.
_DENIED = """
memfd_create 319 279, memfd_secret 447 447, shmget 29 194, shmctl 31 195, shmat 30 196,
msgget 68 186, msgctl 71 187, msgrcv 70 188, msgsnd 69 189, semget 64 190, semctl 66 191,
semtimedop 220 192, semop 65 193, mq_open 240 180, mq_unlink 241 181, vmsplice 278 75,
io_uring_setup 425 425, io_uring_enter 426 426, io_uring_register 427 427, add_key 248 217,
request_key 249 218, keyctl 250 219, unshare 272 97, setns 308 268, chroot 161 51, mount 165 40,
umount2 166 39, pivot_root 155 41, open_tree 428 428, move_mount 429 429, fsopen 430 430,
fsconfig 431 431, fsmount 432 432, fspick 433 433, mount_setattr 442 442, open_tree_attr 467 467,
name_to_handle_at 303 264, open_by_handle_at 304 265, fanotify_init 300 262, bpf 321 280,
perf_event_open 298 241, userfaultfd 323 282, ptrace 101 117, process_vm_readv 310 270,
process_vm_writev 311 271, process_madvise 440 440, process_mrelease 448 448,
pidfd_getfd 438 438, kcmp 312 272, move_pages 279 239, migrate_pages 256 238, seccomp 317 277,
syslog 103 116, acct 163 89, swapon 167 224, swapoff 168 225, reboot 169 142, kexec_load 246 104,
kexec_file_load 320 294, init_module 175 105, finit_module 313 273, delete_module 176 106,
quotactl 179 60, settimeofday 164 170, clock_settime 227 112, modify_ldt 154 -1, iopl 172 -1,
ioperm 173 -1
"""
_CLONE, _CLONE3 = (56, 220), (435, 435)
_FCNTL, _IOCTL, _PRLIMIT = (72, 25), (16, 29), (302, 261)
_SOCKET, _SOCKETPAIR, _SETSOCKOPT = (41, 198), (53, 199), (54, 208)

# CLONE_NEWNS, NEWCGROUP, NEWUTS, NEWIPC, NEWUSER, NEWPID, NEWNET.
_NEW_NAMESPACES = 0x7E020000
_SET_PIPE_SIZE, _SET_BUFFER_SIZE = 1031, (7, 32)  # F_SETPIPE_SZ; SO_SNDBUF, SO_SNDBUFFORCE
_TERMINAL_INPUT = (0x5412, 0x541C)  # TIOCSTI, TIOCLINUX
_AF_UNIX = 1

_LOAD, _JUMP_EQUAL, _JUMP_AT_LEAST, _JUMP_SET, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_ALLOW, _KILL, _ERROR = 0x7FFF0000, 0x80000000, 0x00050000
_NUMBER, _ARCHITECTURE, _ARGUMENTS = 0, 4, 16  # offsets in struct seccomp_data


def _instruction(code: int, value: int, if_true: int = 0, if_false: int = 0) -> bytes:
    return struct.pack("=HBBI", code, if_true, if_false, value)


def _result(value: int) -> bytes:
    return _instruction(_RETURN, value)


_DENY = _result(_ERROR | errno.EPERM)


def _for_call(number: int, body: bytes) -> bytes:
    """`body`, which ends in a result, for one system call; the others go on behind it."""
    return _instruction(_JUMP_EQUAL, number, 0, len(body) // 8) + body


def _argument(index: int) -> bytes:
    """Loads the lower half of an argument; the kernel takes these arguments as 32 bits, too."""
    return _instruction(_LOAD, _ARGUMENTS + 8 * index)


def _each(values: tuple[int, ...], result: bytes) -> bytes:
    return b"".join(_instruction(_JUMP_EQUAL, value, 0, 1) + result for value in values)


def filter_program(*, unix_sockets: bool) -> bytes:
    """The filter for this machine, as an array of `struct sock_filter`.

    Args:
      unix_sockets: sockets of the family AF_UNIX may be made; a pair of connected ones always.

    Raises:
      NotImplementedError: the numbers of the machine's system calls are not known here.
    """
    machine = platform.machine()
    if machine not in _ARCHITECTURES:
        raise NotImplementedError(
            f"no seccomp filter for {machine}; there are {sorted(_ARCHITECTURES)}"
        )
    audit, column = _ARCHITECTURES[machine]
    allow, families = _result(_ALLOW), (_AF_UNIX,) if unix_sockets else ()
    program = _instruction(_LOAD, _ARCHITECTURE)
    program += _instruction(_JUMP_EQUAL, audit, 1, 0) + _result(_KILL)
    program += _instruction(_LOAD, _NUMBER)
    if machine == "x86_64":
        program += _instruction(_JUMP_AT_LEAST, _X32, 0, 1) + _result(_ERROR | errno.ENOSYS)
    numbers = [int(call.split()[1 + column]) for call in _DENIED.split(",")]
    program += _each(tuple(number for number in numbers if number >= 0), _DENY)
    program += _for_call(_CLONE3[column], _result(_ERROR | errno.ENOSYS))
    namespaces = _instruction(_JUMP_SET, _NEW_NAMESPACES, 0, 1) + _DENY
    program += _for_call(_CLONE[column], _argument(0) + namespaces + allow)
    program += _for_call(_SOCKET[column], _argument(0) + _each(families, allow) + _DENY)
    program += _for_call(_SOCKETPAIR[column], _argument(0) + _each((_AF_UNIX,), allow) + _DENY)
    program += _for_call(_SETSOCKOPT[column], _argument(2) + _each(_SET_BUFFER_SIZE, _DENY) + allow)
    program += _for_call(_FCNTL[column], _argument(1) + _each((_SET_PIPE_SIZE,), _DENY) + allow)
    program += _for_call(_IOCTL[column], _argument(1) + _each(_TERMINAL_INPUT, _DENY) + allow)
    # Limits of the process itself (0) only.
    program += _for_call(_PRLIMIT[column], _argument(0) + _each((0,), allow) + _DENY)
    return program + allow
