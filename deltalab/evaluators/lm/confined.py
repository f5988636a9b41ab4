"""One program that is not trusted, run alone: started by `run_code`, as a script of its own.

    python -I confined.py DIRECTORY SECONDS MEMORY alone|here < PROGRAM

exits with 0 where the program claims to have reached its end, with 1 where it does not, and with 3
where it cannot be confined. With `alone` the program has a user, processes, files and a network of
its own (Linux namespaces): it sees what Python needs, for reading, and an empty directory in
memory. The supervisor is the first process of its namespace: when it ends, so does all that the
program has begun. With `here` the supervisor adopts whatever the program leaves, and kills it.

The standard library alone: nothing of this package may be in reach of the program.
"""

import ctypes
import os
import resource
import select
import signal
import sys
import time
from collections.abc import Iterator

PROCESSES = 32
FILE = 16 << 20
DISK = 64 << 20
EVERY = 0.01
"""Seconds between two looks at what runs."""
_USER, _MOUNTS, _PIDS, _NETWORK, _IPC, _NAMES = (
    0x10000000, 0x00020000, 0x20000000, 0x40000000, 0x08000000, 0x04000000,
)  # fmt: skip
_BIND, _RECURSIVE, _PRIVATE, _NO_SUID, _NO_DEVICES = 0x1000, 0x4000, 1 << 18, 2, 4
_MOUNT_SETATTR, _AT_RECURSIVE, _HERE = 442, 0x8000, -100
_READ_ONLY_NO_SUID = 1 | 2
_DEATH_SIGNAL, _DUMPABLE, _SUBREAPER, _NO_NEW_PRIVILEGES = 1, 4, 36, 38


def main() -> None:
    """Run the program of stdin under the limits of the command line."""
    directory, seconds, memory, way = sys.argv[1:5]
    program = sys.stdin.buffer.read()
    try:
        if way == "alone":
            _enter_namespaces()
            supervisor = os.fork()
            if supervisor:
                _, status = os.waitpid(supervisor, 0)
                os._exit(os.waitstatus_to_exitcode(status) & 0xFF)
            _control(_DEATH_SIGNAL, signal.SIGKILL)
            _enter_root(directory)
            _drop_privileges()
            directory = "/box"
        elif sys.platform == "linux":
            _control(_SUBREAPER, 1)
        os.chdir(directory)
    except OSError as error:
        print(error, file=sys.stderr, flush=True)
        os._exit(3)
    claimed = supervise(program, float(seconds), int(memory))
    os._exit(0 if claimed else 1)


def supervise(program: bytes, seconds: float, memory: int) -> bool:
    """Run the program in a child and return what it claims; nothing of it is left running."""
    said, done = os.pipe()
    child = os.fork()
    if not child:
        try:
            _run(program, done, seconds, memory)
        finally:
            os._exit(1)
    os.close(done)
    end, claimed, dead = time.monotonic() + seconds, False, False
    while not (claimed or dead) and time.monotonic() < end:
        dead = os.waitpid(child, os.WNOHANG)[0] == child
        if select.select([said], [], [], 0 if dead else EVERY)[0]:
            claimed = bool(os.read(said, 1))
            if not claimed and not dead:  # it has closed its side, and runs on
                time.sleep(EVERY)
        if _too_much(memory):
            claimed = False
            break
    _kill_all(child)
    return claimed


def _run(program: bytes, done: int, seconds: float, memory: int) -> None:
    """Be the program: with limits, no open file but the one for the claim, and a last word."""
    os.setsid()
    nothing = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(nothing, stream)
    os.closerange(3, done)
    os.closerange(done + 1, 1 << 16)
    if sys.platform == "linux":
        _control(_DUMPABLE, 1)
    for kind, most in (
        (resource.RLIMIT_AS, memory),
        (resource.RLIMIT_FSIZE, FILE),
        (resource.RLIMIT_CPU, int(seconds) + 1),
        (resource.RLIMIT_NOFILE, 128),
        (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(kind, (most, most))
    write, leave = os.write, os._exit
    sys.argv[:] = ["program"]
    exec(compile(program, "program", "exec"), {})
    write(done, b".")
    leave(0)


def _processes() -> Iterator[tuple[int, int, int]]:
    """Yield every process below this one: its number, its parent's, and its pages in memory."""
    me, found = os.getpid(), {}
    for name in os.listdir("/proc") if os.path.isdir("/proc") else ():
        if name.isdigit():
            try:
                with open(f"/proc/{name}/stat", "rb") as file:
                    fields = file.read().rpartition(b")")[2].split()
                found[int(name)] = int(fields[1]), int(fields[21])
            except OSError:  # it has just ended
                continue
    below = {me}
    while more := {pid for pid, (parent, _) in found.items() if parent in below} - below:
        below |= more
    yield from ((pid, *found[pid]) for pid in below - {me} if pid in found)


def _too_much(memory: int) -> bool:
    """Whether the program has more processes, or more memory in all of them, than it may."""
    running = list(_processes())
    used = sum(pages for _, _, pages in running) * resource.getpagesize()
    return len(running) > PROCESSES or used > memory


def _kill_all(child: int) -> None:
    """Kill the program and all that it has begun; the system does the rest in a namespace."""
    end = time.monotonic() + 2
    while True:
        for pid in {child, *(pid for pid, _, _ in _processes())}:
            try:
                os.kill(pid, signal.SIGKILL)
            except OSError:
                continue
        try:
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        except ChildProcessError:
            return
        if time.monotonic() > end:
            return
        time.sleep(0.001)


def _enter_namespaces() -> None:
    user, group = os.getuid(), os.getgid()
    _done(_libc().unshare(_USER | _MOUNTS | _PIDS | _NETWORK | _IPC | _NAMES), "unshare")
    for name, text in (
        ("setgroups", "deny"),
        ("uid_map", f"65534 {user} 1"),
        ("gid_map", f"65534 {group} 1"),
    ):
        with open(f"/proc/self/{name}", "w") as file:
            file.write(text)


def _enter_root(directory: str) -> None:
    """Make a root of what Python needs, read-only, with an empty `/box`, and enter it."""
    _mount("none", "/", None, _RECURSIVE | _PRIVATE)
    _mount("tmpfs", directory, "tmpfs", _NO_SUID | _NO_DEVICES, f"size={DISK},mode=755")
    for place in _needed():
        target = directory + place
        os.makedirs(os.path.dirname(target), exist_ok=True)
        if os.path.islink(place):
            os.symlink(os.readlink(place), target)
            continue
        if os.path.isdir(place):
            os.makedirs(target, exist_ok=True)
        else:
            open(target, "w").close()
        _mount(place, target, None, _BIND | _RECURSIVE)
        if not place.startswith("/dev/"):
            _make_read_only(target)
    for name, mode in (("proc", 0o755), ("box", 0o777)):
        os.mkdir(f"{directory}/{name}", mode)
    _mount("proc", f"{directory}/proc", "proc", _NO_SUID | _NO_DEVICES)
    os.chroot(directory)


def _needed() -> list[str]:
    """Return what a Python program needs to see: no home, no project, nothing of this package."""
    places = ["/usr", "/lib", "/lib64", "/lib32", "/bin", "/etc/ld.so.cache", "/etc/localtime"]
    places += [sys.base_prefix, sys.prefix, sys.exec_prefix]
    places += [p for p in sys.path if p.endswith(("site-packages", "dist-packages"))]
    places += os.environ.get("LD_LIBRARY_PATH", "").split(":")
    places += ["/dev/null", "/dev/zero", "/dev/random", "/dev/urandom"]
    found: list[str] = []
    for place in sorted(filter(os.path.lexists, filter(None, places)), key=len):
        place = os.path.abspath(place)
        if place != "/" and not any(place == p or place.startswith(f"{p}/") for p in found):
            found.append(place)
    return found


def _make_read_only(target: str) -> None:
    attributes = (ctypes.c_uint64 * 4)(_READ_ONLY_NO_SUID, 0, 0, 0)
    size = ctypes.sizeof(attributes)
    name = os.fsencode(target)
    call = _libc().syscall
    done = call(_MOUNT_SETATTR, _HERE, name, _AT_RECURSIVE, ctypes.byref(attributes), size)
    _done(done, f"read-only {target}")


def _drop_privileges() -> None:
    """Give up what the namespace's creator may do in it, for good; hide from the program."""
    _control(_NO_NEW_PRIVILEGES, 1)
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)
    _done(_libc().capset(ctypes.byref(header), ctypes.byref((ctypes.c_uint32 * 6)())), "capset")
    _control(_DUMPABLE, 0)


def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def _mount(source: str, target: str, kind: str | None, flags: int, options: str = "") -> None:
    names = [os.fsencode(source), os.fsencode(target), kind.encode() if kind else None]
    _done(_libc().mount(*names, ctypes.c_ulong(flags), options.encode() or None), target)


def _control(option: int, value: int) -> None:
    _done(_libc().prctl(option, ctypes.c_ulong(value), 0, 0, 0), f"prctl {option}")


def _done(status: int, what: str) -> None:
    if status:
        number = ctypes.get_errno()
        raise OSError(number, f"{os.strerror(number)}: {what}")


if __name__ == "__main__":
    main()
