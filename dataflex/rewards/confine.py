"""Run as a script: confine this process for good, then run a script in it.

usage: confine.py NAMESPACES CPU_SECONDS MEMORY_BYTES FILE_BYTES PROCESSES DISK_BYTES SCRIPT

With NAMESPACES (1, else 0) it must have been started in user, mount, PID, network and IPC namespaces of its own. Then
all that was mounted is read-only, the working folder is an empty disk in memory of DISK_BYTES, and the only devices are
those of numbers and nothing. This process stays as the first of its PID namespace. No other begins a process or thread
before this one has counted them, so at most a few of those that begin at once are too many; it ends them all when they
are PROCESSES or the script has ended. (The kernel's own limit does not count root's processes, and whoever counts now
and then finds tens of thousands.)
Either way no capability is left, and system calls that reach other processes or sockets outside are refused.

A script of its own, because none of this is safe between fork and exec in a process that has threads.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import resource
import runpy
import select
import signal
import socket
import struct
import sys

_LIBC = ctypes.CDLL(None, use_errno=True)
_RDONLY, _NOSUID, _NODEV, _BIND, _MOVE = 1, 2, 4, 4096, 8192  # of mount(2)
_ALL_BELOW, _HERE, _MOUNT_SETATTR = 0x8000, -100, 442
_DEVICES = ("null", "zero", "full", "random", "urandom")
_POLL_MS = 20


def main() -> None:
    """Confine this process, and run the script."""
    namespaces, cpu, memory, size, processes, disk = map(int, sys.argv[1:7])
    script = sys.argv[7]
    if namespaces:  # first, as it takes the capabilities that are dropped below
        _mount(os.getcwd(), disk)
    for limit, value in (
        (resource.RLIMIT_CPU, cpu),
        (resource.RLIMIT_AS, memory),
        (resource.RLIMIT_FSIZE, size),
        (resource.RLIMIT_CORE, 0),
    ):
        _limit(limit, value)
    if namespaces:  # outside, all processes and threads of the user would count, ours too
        # Twice, so that the watch acts first: where the kernel refuses a fork, the code goes on, and may answer.
        _limit(resource.RLIMIT_NPROC, 2 * processes)
    if sys.platform == "linux":
        _drop_capabilities()
        _filter_calls()
    if namespaces:
        _watch(processes)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # what went wrong until here is ours to tell; the script has no errors
    sys.argv = [script]
    sys.path.insert(0, os.path.join(os.path.dirname(__file__), "isolated"))
    runpy.run_path(script, run_name="__main__")


def _limit(limit: int, value: int) -> None:
    hard = resource.getrlimit(limit)[1]
    value = value if hard == resource.RLIM_INFINITY else min(value, hard)
    resource.setrlimit(limit, (value, value))


def _checked(result: int, what: str) -> None:
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")


def _mount(folder: str, disk: int) -> None:
    """Leave one place to write to, and no device or other process in sight."""

    def mount(source: str, target: str, kind: str, flags: int, options: str = "") -> None:
        texts = [text.encode() for text in (source, target, kind)]
        _checked(_LIBC.mount(*texts, ctypes.c_ulong(flags), options.encode()), f"mount {target}")

    attributes = struct.pack("QQQQ", _RDONLY | _NOSUID, 0, 0, 0)
    called = _LIBC.syscall(_MOUNT_SETATTR, _HERE, b"/", _ALL_BELOW, attributes, len(attributes))
    _checked(called, "make all mounts read-only")
    mount("tmpfs", folder, "tmpfs", _NOSUID | _NODEV, "size=1m")
    os.mkdir(devices := os.path.join(folder, "dev"))
    mount("tmpfs", devices, "tmpfs", _NOSUID, "size=64k")
    for name in _DEVICES:
        with open(os.path.join(devices, name), "wb"):
            pass
        mount(f"/dev/{name}", os.path.join(devices, name), "", _BIND)
    mount(devices, "/dev", "", _MOVE)
    mount("proc", "/proc", "proc", _NOSUID | _NODEV)
    mount("tmpfs", folder, "tmpfs", _NOSUID | _NODEV, f"size={disk},nr_inodes=4096")
    os.chdir(folder)


def _drop_capabilities() -> None:
    """Give up every capability, also for programs that are started later."""
    bounding_drop, no_new_privileges, version = 24, 38, 0x20080522
    for capability in range(64):
        if _LIBC.prctl(bounding_drop, capability, 0, 0, 0) != 0:
            break  # the last that this kernel knows, or none to drop
    _checked(_LIBC.prctl(no_new_privileges, 1, 0, 0, 0), "no new privileges")
    _checked(_LIBC.capset(struct.pack("Ii", version, 0), bytes(24)), "drop capabilities")


# number of each call: on x86-64, on ARM64
_REFUSED = {
    "ptrace": (101, 117),
    "mount": (165, 40),
    "umount2": (166, 39),
    "unshare": (272, 97),
    "setns": (308, 268),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "kcmp": (312, 272),
    "bpf": (321, 280),
    "userfaultfd": (323, 282),
    "add_key": (248, 217),
    "request_key": (249, 218),
    "keyctl": (250, 219),
    "shmget": (29, 194),  # memory that no limit counts
    "memfd_create": (319, 279),  # likewise
    "io_uring_setup": (425, 425),  # would open sockets past this filter
    "io_uring_enter": (426, 426),
    "io_uring_register": (427, 427),
    "open_tree": (428, 428),
    "move_mount": (429, 429),
    "fsopen": (430, 430),
    "fsmount": (432, 432),
    "pidfd_getfd": (438, 438),
    "mount_setattr": (442, 442),
}
_SOCKET, _SOCKETPAIR, _CLONE, _CLONE3 = (41, 198), (53, 199), (56, 220), (435, 435)
_FORK, _VFORK, _SECCOMP = (57, None), (58, None), (317, 277)  # ARM64 forks by clone alone
_MACHINES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}
_LOAD, _JUMP, _GIVE, _ALLOW = 0x20, 0x15, 0x06, 0x7FFF0000  # of the kernel's packet filters
_NEW_NAMESPACES = 0x7E020080
_INTERNET_AND_NETLINK = (2, 10, 16)


def _filter_calls() -> None:
    """Refuse calls by number (seccomp): sockets but of the internet, new namespaces, other processes, hidden memory.

    A network namespace holds internet sockets; it does not hold those of the file system, on which databases and
    container daemons listen. A pair of connected streams is allowed.
    """
    load, jump, greater, any_bit, give, mask = _LOAD, _JUMP, 0x35, 0x45, _GIVE, 0x54
    allow, kill, refuse, absent = _ALLOW, 0x80000000, 0x00050001, 0x00050026
    column, architecture = _MACHINES[os.uname().machine]
    # Each: code, steps to jump if true, if false, operand. 0 is the call's number, 4 its machine, 16 and 24 arguments.
    program = [(load, 0, 0, 4), (jump, 1, 0, architecture), (give, 0, 0, kill), (load, 0, 0, 0)]
    program += [(greater, 0, 1, 0x40000000), (give, 0, 0, refuse)]  # x86-64's other numbering
    for numbers in _REFUSED.values():
        program += [(jump, 0, 1, numbers[column]), (give, 0, 0, refuse)]
    program += [(jump, 0, 1, _CLONE3[column]), (give, 0, 0, absent)]  # its flags cannot be seen; clone is used instead
    program += [(jump, 0, 4, _CLONE[column]), (load, 0, 0, 16), (any_bit, 0, 1, _NEW_NAMESPACES)]
    program += [(give, 0, 0, refuse), (give, 0, 0, allow)]
    program += [(jump, 0, 5, _SOCKETPAIR[column]), (load, 0, 0, 24), (mask, 0, 0, 0xF), (jump, 0, 1, 1)]
    program += [(give, 0, 0, allow), (give, 0, 0, refuse)]
    program += [(jump, 1, 0, _SOCKET[column]), (give, 0, 0, allow), (load, 0, 0, 16)]
    for family in _INTERNET_AND_NETLINK:
        program += [(jump, 0, 1, family), (give, 0, 0, allow)]
    program += [(give, 0, 0, refuse)]
    _install(program, flags=0)


def _install(program: list[tuple[int, int, int, int]], flags: int) -> int:
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *line) for line in program))
    header = struct.pack("HxxxxxxP", len(program), ctypes.addressof(code))
    number, by_filter = _SECCOMP[_MACHINES[os.uname().machine][0]], 1
    found = _LIBC.syscall(number, by_filter, flags, ctypes.c_char_p(header))
    _checked(min(found, 0), "filter system calls")
    return int(found)


def _ask_before_forks() -> int:
    """Have each call that makes a process or thread wait for an answer; return the file that is asked and answers."""
    column = _MACHINES[os.uname().machine][0]
    ask, new_listener = 0x7FC00000, 8
    program = [(_LOAD, 0, 0, 0)]
    for number in (_CLONE[column], _FORK[column], _VFORK[column]):
        if number is not None:
            program += [(_JUMP, 0, 1, number), (_GIVE, 0, 0, ask)]
    return _install([*program, (_GIVE, 0, 0, _ALLOW)], new_listener)


def _watch(processes: int) -> None:
    """Go on as a child; its parent ends, and with it the whole PID namespace, when there are too many processes."""
    undumpable = 4
    here, there = socket.socketpair()
    child = os.fork()
    if child == 0:
        here.close()
        with there:
            listener = _ask_before_forks()
            socket.send_fds(there, [b"x"], [listener])
        os.close(listener)
        return
    there.close()
    _LIBC.prctl(undumpable, 0, 0, 0, 0)  # so that /proc/1/mem is closed to the others
    with here:
        listeners = socket.recv_fds(here, 1, 1)[1]
    asked = select.poll()
    for listener in listeners:  # none if the child has died of an error, which it has told
        asked.register(listener, select.POLLIN)
    while True:
        ended, status = os.waitpid(-1, os.WNOHANG)
        if ended == child:
            os._exit(os.waitstatus_to_exitcode(status) & 0xFF)
        if ended == 0 and any(events & select.POLLIN for _, events in asked.poll(_POLL_MS)):
            if _running() >= processes:
                os.kill(-1, signal.SIGKILL)  # before the file is closed: what waits for an answer would go on without
                os._exit(1)
            _admit(listeners[0])


def _running() -> int:
    """Count the processes of this PID namespace with all their threads."""
    running = 0
    for name in os.listdir("/proc"):
        if name.isdecimal():
            try:
                running += len(os.listdir(f"/proc/{name}/task"))
            except (FileNotFoundError, ProcessLookupError):
                continue  # it has ended meanwhile
    return running


def _admit(listener: int) -> None:
    """Let one of the calls that wait go on, as it was made."""
    receive, send, go_on = 0xC0502100, 0xC0182101, 1
    try:
        question = bytearray(80)
        fcntl.ioctl(listener, receive, question)
        fcntl.ioctl(listener, send, struct.pack("QqiI", struct.unpack_from("Q", question)[0], 0, 0, go_on))
    except OSError as error:
        if error.errno not in (errno.ENOENT, errno.EINTR):  # who asked has been killed meanwhile
            raise


if __name__ == "__main__":
    main()
