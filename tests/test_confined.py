"""Programs of a model: what they see, how long they live, and what they can claim."""

import logging
import os
import resource
import subprocess
import sys
import time

import pytest

from deltalab.evaluators.lm import confined, run_code

WAYS = [run_code._way(), "here"] if run_code._way() == "alone" else ["here"]
alone = pytest.mark.skipif(WAYS == ["here"], reason="this system has no namespaces")


@pytest.fixture(params=WAYS)
def way(request, monkeypatch):
    monkeypatch.setattr(run_code, "_way", lambda: request.param)
    return request.param


def said(program):
    """Whether a program runs to its end, and so whether its assertions hold."""
    return run_code.passes(program)


def test_no_variable_of_the_person_is_in_the_environment(way, monkeypatch):
    for name in ("OPENAI_API_KEY", "HF_TOKEN", "HARMLESS", "PYTHONPATH", "LD_PRELOAD_"):
        monkeypatch.setenv(name, "sk-secret")
    known = {"PATH", "LANG", "HOME", "TMPDIR", "OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"}
    known |= {"LD_LIBRARY_PATH", "LC_CTYPE", "PWD"}
    assert said(f"import os\nassert set(os.environ) <= {known}, os.environ")


CHEATS = {
    "prints": "print('passed'); exit(0)",
    "leaves": "import os; os._exit(0)",
    "raises": "raise SystemExit(0)",
    "writes everywhere": """
import os
for fd in range(3, 64):
    try: os.write(fd, b'.' * 100)
    except OSError: pass
os._exit(0)""",
    "steals the last word of its caller": """
import sys, os
frame = sys._getframe()
while frame:
    names = frame.f_locals
    if 'done' in names:
        os.write(names['done'], b'.'); os._exit(0)
    frame = frame.f_back""",
    "kills its supervisor": "import os; os.kill(os.getppid(), 9)",
    "replaces what a test raises": "class AssertionError(Exception): pass\nexit(0)",
}


@pytest.mark.parametrize("cheat", CHEATS.values(), ids=CHEATS)
def test_a_claim_without_the_tests_is_not_believed(way, cheat):
    """On the code before, a program that read its caller's frame passed without any test."""
    assert not said(f"{cheat}\nassert False, 'the tests'")


def test_programs_pass_as_before(way):
    for program in ("x = {'a': 1}\nassert x['a'] == 1", "import sys\nsys.stdout.write('{}')",
                    "def f():\n    '''open'''\n    return 1\nassert f() == 1\n    # comment",
                    "from collections import namedtuple\nnamedtuple('P', 'x')(1)",
                    "import threading\nt = threading.Thread(target=print)\nt.start(); t.join()"):  # fmt: skip  # noqa: E501
        assert said(program), program
    for program in ("assert False", "1/0", "(", "import nothing_of_the_kind", "x = '''", "\x00"):
        assert not said(program), program


def test_time_ends_what_ignores_the_alarm(way, monkeypatch):
    monkeypatch.setattr(run_code, "SECONDS", 0.5)
    stubborn = "import signal\nfor n in (14, 15, 2, 24):\n signal.signal(n, signal.SIG_IGN)\n"
    begun = time.monotonic()
    assert not said(stubborn + "import time\ntime.sleep(60)")
    assert time.monotonic() - begun < 20


def test_a_daemon_does_not_outlive_its_program(way, monkeypatch):
    """On the code before, a child in a session of its own lived on, without any limit."""
    monkeypatch.setattr(run_code, "SECONDS", 2.0)
    name = f"deltalab-daemon-{os.getpid()}-{way}"
    daemon = f"""
import os, sys, time
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        for fd in range(3, 64):
            try: os.close(fd)
            except OSError: pass
        os.execv(sys.executable, [sys.executable, '-c', 'import time; time.sleep(60) # {name}'])
    os._exit(0)
time.sleep(0.3)
"""
    said(daemon)
    listed = subprocess.run(["ps", "axww", "-o", "args"], capture_output=True, text=True).stdout
    assert name not in listed.replace(daemon, "")


def test_no_more_processes_than_a_few(way):
    children = "import os, time\nfor _ in range(N):\n  if os.fork() == 0: time.sleep(9)\n"
    children += "time.sleep(0.5)\n"
    assert said(children.replace("N", "4"))
    assert not said(children.replace("N", str(confined.PROCESSES + 1)))


def test_memory_is_bounded_in_all_processes_together(way, monkeypatch):
    monkeypatch.setattr(run_code, "MEMORY", 512 << 20)
    hold = "import os, time\nx = b'1' * (200 << 20)\n"
    assert said(hold)
    assert not said("x = b'1' * (600 << 20)")
    fork = "for _ in range(3):\n  if os.fork() == 0:\n    y = b'2' * (150 << 20); time.sleep(9)\n"
    assert not said(hold + fork + "time.sleep(2)")


def test_no_file_is_larger_than_it_may_be(way):
    grow = "f = open('x', 'wb')\nfor _ in range(N): f.write(b'0' * (1 << 20)); f.flush()\n"
    assert said(grow.replace("N", str((confined.FILE >> 20) - 1)))
    assert not said(grow.replace("N", str((confined.FILE >> 20) + 1)))


def test_what_a_program_writes_does_not_fill_the_memory_of_this_process(way):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    flood = "import os\nfor fd in range(64):\n  try:\n"
    flood += "    for _ in range(300): os.write(fd, b'0' * 1_000_000)\n  except OSError: pass\n"
    said(flood)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # KiB


@alone
def test_apart_a_program_sees_neither_files_nor_network(tmp_path):
    secret = tmp_path / "secret"
    secret.write_text("s")
    places = [str(secret), "/etc/passwd", "/sys/kernel", "/run"]
    assert said(f"import os\nfor p in {places}: assert not os.path.exists(p), p")
    assert said("import os\nassert os.getcwd() == '/box' and os.listdir('/box') == []")
    assert said("import os\nassert os.getuid() == 65534\nassert os.getpid() < 10")
    for forbidden in (
        "open('/usr/here', 'w')",
        "import socket; socket.create_connection(('127.0.0.1', 22), 1)",
        "import ctypes, os; c = ctypes.CDLL(None, use_errno=True)\n"
        "assert c.mount(b'none', b'/usr', None, 32 | 4096, None) == 0",
        "import ctypes; assert ctypes.CDLL(None).unshare(0x10000000) == 0",
        "open('/proc/1/mem', 'rb').read(1)",
    ):
        assert not said(forbidden), forbidden


def test_a_system_without_namespaces_is_told_once(monkeypatch, caplog):
    real, asked = run_code._run, []

    def refusing(program, way, seconds):
        asked.append(way)
        if way == "alone":
            error = b"Operation not permitted: unshare"
            return subprocess.CompletedProcess([], 3, stderr=error)
        return real(program, way, seconds)

    monkeypatch.setattr(run_code, "_run", refusing)
    run_code._way.cache_clear()
    with caplog.at_level(logging.WARNING):
        assert run_code.passes("x = 1")
        assert run_code.passes("x = 2")
    run_code._way.cache_clear()
    assert [r.message for r in caplog.records if "programs cannot be run apart" in r.message] == [
        "evaluator.run_code: programs cannot be run apart on this system (Operation not permitted:"
        " unshare): those of the model run as you, in reach of your files and of the network"
    ]
    assert asked == ["alone", "here", "here", "here", "here"]


def test_what_cannot_be_confined_is_not_run(tmp_path):
    command = [sys.executable, "-I", confined.__file__, str(tmp_path / "nowhere"), "3", "1", "here"]
    done = subprocess.run(command, input=b"", capture_output=True)
    assert done.returncode == 3
    assert b"No such file or directory" in done.stderr
