"""Run as a script: confine this process for good, then run a script in it.

usage: confine.py NAMESPACES CPU_SECONDS MEMORY_BYTES FILE_BYTES PROCESSES DISK_BYTES SCRIPT

With NAMESPACES (1, else 0) it must have been started in user, mount, PID, network and IPC namespaces of its own. Then
all that was mounted is read-only, the working folder is an empty disk in memory of DISK_BYTES, and the only devices are
those of numbers and nothing. This process stays as the first of its PID namespace, counts the others, and ends them all
when they are more than PROCESSES or the script has ended: the kernel's own limit does not count root's processes.
Either way no capability is left, and system calls that reach other processes or sockets outside are refused.

A script of its own, because none of this is safe between fork and exec in a process that has threads.
"""

from __future__ import annotations

import ctypes
import os
import resource
import runpy
import struct
import sys
import time

_LIBC = ctypes.CDLL(None, use_errno=True)
_RDONLY, _NOSUID, _NODEV, _BIND, _MOVE = 1, 2, 4, 4096, 8192  # of mount(2)
_ALL_BELOW, _HERE, _MOUNT_SETATTR = 0x8000, -100, 442
_DEVICES = ("null", "zero", "full", "random", "urandom")
_POLL_SECONDS = 0.02


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
        _limit(resource.RLIMIT_NPROC, processes)
    if sys.platform == "linux":
        _drop_capabilities()
        _filter_calls()
    if namespaces:
        _watch(processes)
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
_MACHINES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}
_NEW_NAMESPACES = 0x7E020080
_INTERNET_AND_NETLINK = (2, 10, 16)


def _filter_calls() -> None:
    """Refuse calls by number (seccomp): sockets but of the internet, new namespaces, other processes, hidden memory.

    A network namespace holds internet sockets; it does not hold those of the file system, on which databases and
    container daemons listen. A pair of connected streams is allowed.
    """
    load, jump, greater, any_bit, give, mask = 0x20, 0x15, 0x35, 0x45, 0x06, 0x54
    allow, kill, refuse, absent = 0x7FFF0000, 0x80000000, 0x00050001, 0x00050026
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
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *line) for line in program))
    header = struct.pack("HxxxxxxP", len(program), ctypes.addressof(code))
    set_seccomp, by_filter = 22, 2
    _checked(_LIBC.prctl(set_seccomp, by_filter, ctypes.c_char_p(header), 0, 0), "filter system calls")


def _watch(processes: int) -> None:
    """Go on as a child; its parent ends, and with it the whole PID namespace, when there are too many processes."""
    undumpable = 4
    child = os.fork()
    if child == 0:
        return
    _LIBC.prctl(undumpable, 0, 0, 0, 0)  # so that /proc/1/mem is closed to the others
    while True:
        ended, status = os.waitpid(-1, os.WNOHANG)
        if ended == child:
            os._exit(os.waitstatus_to_exitcode(status) & 0xFF)
        if ended == 0:
            if sum(name.isdecimal() for name in os.listdir("/proc")) > processes:
                os._exit(1)
            time.sleep(_POLL_SECONDS)


if __name__ == "__main__":
    main()
