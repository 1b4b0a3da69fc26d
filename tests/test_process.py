"""Process trees: the real `deepspeed` launcher on ranks that do nothing, fail, hang or refuse to die."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

import psutil
import pytest
from helpers import MACHINE, make_config

from harness.launch import attempts
from harness.launch.attempts import run_attempt
from harness.launch.backends import local
from harness.launch.backends.local import child_environment, command
from harness.machine import Machine, process_started
from harness.record import diagnose
from harness.record.diagnose import Death, Outcome, Remains, judge, read_remains
from harness.record.heartbeat import DONE, Heart
from harness.record.store import Attempt, SweepDirectory, environment, read_json, write_json
from harness.run.instruments.memory import peak_memory_bytes

RANK = """
import json, os, signal, sys, time
from pathlib import Path

attempt, rank = Path(sys.argv[1]), int(os.environ["RANK"])
kind = (attempt / "kind").read_text()
os.write(1, f"rank {rank} is here\\n".encode())
(attempt / f"pid{rank}").write_text(f"{os.getpid()} {os.getppid()}")
errors = [attempt / "errors" / f"rank{number:05d}.json" for number in range(2)]

def wait_for(file):
    while not file.exists():
        time.sleep(0.01)

def fail(rank, type, message, oom=False):
    (attempt / "errors").mkdir(exist_ok=True)
    error = dict(rank=rank, type=type, message=message, oom=oom, time=time.time(), traceback="")
    errors[rank].write_text(json.dumps(error))
    sys.exit(1)

if kind == "ok":
    if rank == 0:
        wait_for(attempt / "pid1")
        (attempt / "result.json.tmp").write_text('{"row": {}}')
        (attempt / "result.json.tmp").replace(attempt / "result.json")
    time.sleep(60)  # an interpreter that is slow to end
elif kind == "measured":
    if rank == 0:
        (attempt / "partial.tmp").write_text('{"row": {"step_seconds": 1.0}, "missing": ["the rest"]}')
        (attempt / "partial.tmp").replace(attempt / "result.partial.json")
    wait_for(attempt / "result.partial.json")
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)  # as the kernel does without memory
    time.sleep(600)
elif kind == "crash":
    if rank == 0:
        wait_for(errors[1])
        fail(0, "RuntimeError", "[gloo] Connection closed by peer [127.0.0.1]:1234")
    fail(1, "ValueError", "the cause\\nand more")
elif kind == "stuck":
    from harness.record.heartbeat import Heart
    (attempt / f"ready{rank}").touch()
    wait_for(attempt / f"ready{1 - rank}")
    heart = Heart(attempt, rank)
    for _ in range(20):  # a while of progress
        heart.mark(3, rank, 0, b"backward" if rank else b"recv_gradient")
        time.sleep(0.1)
    time.sleep(600)
elif kind == "stuck early":
    from harness.record.heartbeat import Heart
    if rank == 0:
        Heart(attempt, rank).phase("joining the other ranks")
    time.sleep(600)
elif kind == "lost":
    if rank == 1:
        wait_for(errors[0])
        os.kill(os.getpid(), signal.SIGKILL)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # deepspeed waits half a minute for such a rank
    try:
        fail(0, "RuntimeError", "Connection closed by peer [127.0.0.1]:1234")
    except SystemExit:
        time.sleep(600)
elif kind in ("hang", "stubborn"):
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if kind == "stubborn" and os.fork() == 0:
        os.setsid()  # a grandchild that leaves the session
        (attempt / f"child{rank}").write_text(str(os.getpid()))
    time.sleep(600)
elif kind == "killed":
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(600)
elif kind.endswith(" at work"):
    import types
    from harness.run import worker

    def join():
        (attempt / f"joins{rank}").touch()
        wait_for(attempt / f"joins{1 - rank}")
        if rank == 1 and kind == "killed at work":
            os.kill(os.getpid(), signal.SIGKILL)
        elif rank == 1 and kind.startswith("launcher"):
            os.kill(os.getppid(), signal.SIGKILL if "killed" in kind else signal.SIGTERM)
        elif rank == 1:
            if (child := os.fork()) == 0:
                (attempt / "child").touch()
                time.sleep(30)
                os._exit(0)
            wait_for(attempt / "child")
            os.kill(child, signal.SIGTERM)
            (attempt / "child").write_text(str(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])))
            os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(600)  # without a look at its peer

    name = "harness.run.engines.deepspeed.join"
    sys.modules[name] = types.ModuleType(name)
    sys.modules[name].initialize_distributed = join
    worker.main([str(attempt)])
elif kind == "import":
    if rank == 0:
        raise ImportError("no module of that name")
    time.sleep(600)
"""


@pytest.fixture(scope="module")
def fake_rank(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Ranks run the script above."""
    folder = tmp_path_factory.mktemp("modules")
    (folder / "fake_rank.py").write_text(RANK)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(folder))
        patch.setattr(local, "WORKER", "fake_rank")
        yield


@pytest.fixture
def attempt(fake_rank: None, tmp_path: Path) -> Attempt:
    return new_attempt(tmp_path)


def new_attempt(folder: Path) -> Attempt:
    return SweepDirectory(folder, "runs").point(make_config(), "00000000").new_attempt()


def run(attempt: Attempt, kind: str, *overrides: str, echo: bool = False) -> Outcome:
    (attempt.path / "kind").write_text(kind)
    config = make_config("parallel.dp=2", *overrides)
    attempt.write_config(config)
    outcome = run_attempt(attempt, config, MACHINE, echo)
    assert attempt.status()["status"] == outcome.status
    assert attempt.status()["reason"] == outcome.reason
    assert running(attempt) == []
    return outcome


Ended = dict[str, tuple[Attempt, Outcome]]


def run_side_by_side(folder: Path, kinds: dict[str, list[str]]) -> Ended:
    """A run of each kind, with its overrides: waiting and the imports of `deepspeed` take most of the time."""
    for overrides in kinds.values():
        make_config("parallel.dp=2", *overrides)  # Hydra composes in one thread only
    chosen = {kind: new_attempt(folder / kind) for kind in kinds}
    with ThreadPoolExecutor(len(kinds)) as pool:
        runs = {kind: pool.submit(run, chosen[kind], kind, *overrides) for kind, overrides in kinds.items()}
    return {kind: (chosen[kind], outcome.result()) for kind, outcome in runs.items()}


@pytest.fixture(scope="module")
def failed(fake_rank: None, tmp_path_factory: pytest.TempPathFactory) -> Ended:
    works = [f"{what} at work" for what in ("killed", "stopped", "launcher killed", "launcher stopped")]
    kinds: dict[str, list[str]] = {kind: [] for kind in ("crash", "killed", *works)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attempts, "ERROR_SECONDS", 60.0)  # for deepspeed to say whom it saw end, on a busy machine
        return run_side_by_side(tmp_path_factory.mktemp("failed"), kinds)


@pytest.fixture(scope="module")
def ended(fake_rank: None, tmp_path_factory: pytest.TempPathFactory) -> Ended:
    """Of the kinds that only slow tests ask for."""
    hang = ["launch.hang_seconds=2.0"]
    kinds = {
        "measured": [],
        "stubborn": ["launch.timeout_seconds=90.0"],
        "stuck": hang,
        "stuck early": hang,
        "import": [],
    }
    return run_side_by_side(tmp_path_factory.mktemp("ended"), kinds)


def running(attempt: Attempt) -> list[str]:
    """Commands of the processes that work on an attempt."""
    processes = [process.info for process in psutil.process_iter(["cmdline", "status"])]
    commands = [" ".join(info["cmdline"] or []) for info in processes if info["status"] != psutil.STATUS_ZOMBIE]
    return [command for command in commands if str(attempt.path) in command]


def pids(attempt: Attempt, rank: int) -> tuple[int, int]:
    """Process and parent (launch.py) of a rank that has begun."""
    file = attempt.path / f"pid{rank}"
    deadline = time.monotonic() + 60
    while not (file.exists() and file.read_text()) and time.monotonic() < deadline:
        time.sleep(0.02)
    pid, parent = file.read_text().split()
    return int(pid), int(parent)


def test_a_result_ends_the_attempt(attempt: Attempt, capfd: pytest.CaptureFixture[str]) -> None:
    assert run(attempt, "ok", echo=True) == Outcome("ok")
    printed = capfd.readouterr().out
    assert sorted(printed.splitlines()) == ["rank 0 is here", "rank 1 is here"]
    assert "rank 1 is here" in attempt.log_file.read_text()
    assert attempt.status()["environment"]["hardware"]["device_name"] == MACHINE.device_name


@pytest.mark.slow
def test_ranks_that_end_after_the_measurement_lose_nothing(ended: Ended) -> None:
    attempt, outcome = ended["measured"]
    assert outcome == Outcome("ok")
    assert attempt.result() == {"row": {"step_seconds": 1.0}, "missing": ["the rest"]}
    assert not attempt.partial_result_file.exists()


def test_what_an_earlier_attempt_left_is_ended(fake_rank: None, tmp_path: Path) -> None:
    """Its harness and its guard were killed, before or after it had measured; a rank of it goes on."""
    make_config("parallel.dp=2")
    attempts = {measured: new_attempt(tmp_path / str(measured)) for measured in (False, True)}
    with ThreadPoolExecutor() as pool:
        for done in [pool.submit(check_that_it_is_ended, *case) for case in attempts.items()]:
            done.result()


def check_that_it_is_ended(measured: bool, attempt: Attempt) -> None:
    attempt.write_status("running", environment=environment(MACHINE), guard={"pid": 1, "started": -1})
    gone = {"pid": 1, "pid_started": -1}
    write_json(attempt.status_file, (read_json(attempt.status_file) or {}) | gone)
    if measured:
        write_json(attempt.partial_result_file, {"row": {}, "missing": []})
    left = subprocess.Popen(["sleep", "600"], env=os.environ | {local.MARK: str(attempt.path.resolve())})
    try:
        assert attempt.status()["status"] == ("ok" if measured else "interrupted")
        run(attempt.point.new_attempt(), "ok")
        assert left.wait(5) < 0
    finally:
        left.kill()


def test_the_first_real_error_is_the_reason(failed: Ended) -> None:
    assert failed["crash"][1] == Outcome("crashed", "rank 1: ValueError: the cause")


@pytest.mark.slow
def test_a_hanging_run_is_given_up_and_nothing_remains(ended: Ended) -> None:
    attempt, outcome = ended["stubborn"]
    assert outcome == Outcome("timeout", "no result after launch.timeout_seconds=90; no step was done")
    assert attempt.status_file.stat().st_mtime - attempt.config_file.stat().st_mtime < 100
    for rank in (0, 1):
        assert process_started(int((attempt.path / f"child{rank}").read_text())) is None


@pytest.mark.slow
def test_ranks_that_make_no_progress_are_given_up(ended: Ended) -> None:
    attempt, outcome = ended["stuck"]
    stood = "rank 0 in recv_gradient of micro-batch 0, step 3; rank 1 in backward of micro-batch 1, step 3"
    assert outcome == Outcome("hang", f"no progress for launch.hang_seconds=2; {stood}")
    assert attempt.status()["ranks_stood"] == {part[5]: part[7:] for part in stood.split("; ")}
    assert "rank 0 is here" in attempt.status()["log_end"]


@pytest.mark.slow
def test_a_hang_before_the_first_instruction_is_given_up(ended: Ended) -> None:
    assert ended["stuck early"][1] == Outcome(
        "hang", "no progress for launch.hang_seconds=2; rank 0 in joining the other ranks; rank 1 yet to begin"
    )


def test_a_hang_before_the_first_rank_begins_is_given_up(attempt: Attempt, monkeypatch: pytest.MonkeyPatch) -> None:
    asleep = [sys.executable, "-c", "import time; time.sleep(600)"]
    monkeypatch.setattr(local, "command", lambda *_: asleep)
    monkeypatch.setattr(attempts, "START_SECONDS", 1.0)
    began = time.monotonic()
    assert run(attempt, "never", "launch.hang_seconds=1.0") == Outcome(
        "hang", "no progress for launch.hang_seconds=1; ranks 0 and 1 yet to begin"
    )
    assert 2 < time.monotonic() - began < 20


@pytest.mark.slow
def test_a_lost_peer_is_not_the_reason_while_deepspeed_has_not_ended(
    attempt: Attempt, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts = iter([0, 1])
    monkeypatch.setattr(local, "count_oom_kills", lambda: next(counts))
    monkeypatch.setattr(attempts, "ERROR_SECONDS", 1.0)
    assert run(attempt, "lost") == Outcome("oom", f"rank 1 was ended by SIGKILL: {KERNEL}")


def test_of_several_ranks_that_are_gone_the_first_counts(attempt: Attempt) -> None:
    watch = attempts._Watch(attempt, world_size=3)
    for rank in range(3):
        Heart(attempt.path, rank)
    assert watch.remains().gone == []
    pretend_to_be_gone(attempt, 1)
    assert watch.remains().gone == [1]
    pretend_to_be_gone(attempt, 2)  # ended by deepspeed, as it ends what is left
    remains = watch.remains()
    assert (remains.gone, remains.silent) == ([1], [0, 1, 2])


@pytest.mark.slow
def test_a_killed_guard_leaves_nothing_and_is_no_success(attempt: Attempt) -> None:
    def kill() -> None:
        pids(attempt, rank=1)
        os.kill(attempt.status()["guard"]["pid"], signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    outcome = run(attempt, "stubborn")
    killer.join()
    assert outcome == Outcome("crashed", "the guard was ended by SIGKILL")


def guarded(code: str, grace: float = 1.0, memory: str = "", cores: str = "") -> subprocess.Popen[str]:
    command = [sys.executable, "-I", "-S", str(local.GUARD), str(grace), memory, cores, sys.executable, "-c", code]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.parametrize(
    ("code", "status"),
    [("raise SystemExit(7)", 7), ("import os; os.kill(os.getpid(), 11)", 128 + 11), ("pass", 0)],
)
def test_a_guard_passes_on_how_its_command_ended(code: str, status: int) -> None:
    assert guarded(code).wait(20) == status


DAEMON = """
import os, signal, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:  # no parent, no session in common
        print(os.getpid(), flush=True)
        time.sleep(600)
    os._exit(0)
os.wait()
"""


@pytest.mark.parametrize("how", ["command ends", "pipe ends", "at once", "SIGTERM"])
def test_a_guard_ends_whatever_its_command_left(how: str) -> None:
    grace, began = 10.0 if how == "at once" else 1.0, time.monotonic()
    guard = guarded(DAEMON + ("" if how == "command ends" else "time.sleep(600)"), grace)
    assert guard.stdin
    assert guard.stdout
    daemon = int(guard.stdout.readline())
    if how != "command ends":
        began = time.monotonic()
    if how == "at once":
        guard.stdin.write("0")
        guard.stdin.flush()
    elif how == "SIGTERM":
        guard.terminate()
    if how in ("at once", "pipe ends"):
        guard.stdin.close()
    guard.wait(20)
    assert process_started(daemon) is None
    assert (time.monotonic() - began >= grace) == (how != "at once")


def test_a_guard_limits_memory_and_cores() -> None:
    core = str(min(os.sched_getaffinity(0)))
    code = "import os; print(os.sched_getaffinity(0)); bytearray(10**9)"
    guard = guarded(code, memory=str(5 * 10**8), cores=core)
    assert guard.wait(30) == 1
    output, errors = guard.communicate()
    assert output == f"{{{core}}}\n"
    assert errors.endswith("MemoryError\n")


@pytest.mark.slow
def test_a_killed_launcher_is_no_success(attempt: Attempt) -> None:
    def kill() -> None:
        os.kill(pids(attempt, rank=1)[1], signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    outcome = run(attempt, "stubborn")
    killer.join()
    assert outcome.status == "crashed"
    assert outcome.reason is not None
    assert outcome.reason.startswith("the run ended with exit status 0 and without a result; the log ends with 'rank")


def test_a_killed_rank_is_named_by_its_signal(failed: Ended) -> None:
    assert failed["killed"][1] == Outcome("crashed", "a rank was ended by SIGKILL")


def test_ranks_that_are_stopped_tell_so_that_the_killed_one_is_known(failed: Ended) -> None:
    attempt, outcome = failed["killed at work"]
    assert outcome == Outcome("crashed", "rank 1 was ended by SIGKILL")
    assert [error["signal"] for error in read_remains(attempt, 2).errors] == ["SIGTERM"]


def test_the_end_of_the_launcher_stops_no_sweep(failed: Ended) -> None:
    assert failed["launcher stopped at work"][1] == Outcome("crashed", "rank 0 was ended by SIGTERM")
    outcome = failed["launcher killed at work"][1]
    assert outcome.status == "crashed"
    assert outcome.reason is not None
    assert outcome.reason.startswith("the run ended with exit status 0 and without a result")


def test_a_rank_can_tell_its_memory_while_it_imports_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.cuda", ModuleType("torch.cuda"))
    assert peak_memory_bytes() > 0


def test_a_rank_that_was_stopped_is_named_and_its_children_are_none_the_wiser(failed: Ended) -> None:
    attempt, outcome = failed["stopped at work"]
    assert outcome == Outcome("crashed", "rank 1 was ended by SIGTERM")
    assert [error["rank"] for error in read_remains(attempt, 2).errors] == [1, 0]
    assert (attempt.path / "child").read_text() == str(-signal.SIGTERM)


def test_a_signal_to_the_harness_ends_the_tree(attempt: Attempt) -> None:
    def stop() -> None:
        pids(attempt, rank=1)
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)  # the impatient send it twice

    stopper = threading.Thread(target=stop)
    stopper.start()
    outcome = run(attempt, "stubborn")
    stopper.join()
    assert outcome == Outcome("interrupted", "stopped by SIGTERM before it finished")


def test_ranks_do_not_outlive_a_killed_harness(attempt: Attempt) -> None:
    (attempt.path / "kind").write_text("hang")
    attempt.write_config(make_config("parallel.dp=2"))
    code = """
import sys
from pathlib import Path
from harness.launch.attempts import run_attempt
from harness.launch.backends import local
from harness.machine import detect_machine
from harness.record.store import Attempt
local.WORKER, attempt = "fake_rank", Attempt(Path(sys.argv[1]))
run_attempt(attempt, attempt.config(), detect_machine(), echo=False)
"""
    environment = child_environment(make_config(), MACHINE)
    harness = subprocess.Popen([sys.executable, "-c", code, str(attempt.path)], env=environment)
    for rank in (0, 1):
        pids(attempt, rank)
    harness.kill()
    harness.wait()
    deadline = time.monotonic() + 10
    while running(attempt) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert running(attempt) == []


@pytest.mark.slow
def test_without_error_files_the_log_is_read(ended: Ended) -> None:
    assert ended["import"][1] == Outcome("crashed", "ImportError: no module of that name")


def test_a_taken_port_is_tried_once_more(attempt: Attempt, monkeypatch: pytest.MonkeyPatch) -> None:
    starts = []

    def start(backend: object, attempt: Attempt, *_: object) -> Outcome:
        starts.append(sorted(path.name for path in attempt.path.glob("errors/*")))
        attempt.log_file.touch()
        attempt.error_file(0).parent.mkdir(exist_ok=True)
        write_json(attempt.error_file(0), {"type": "DistNetworkError", "message": "EADDRINUSE", "time": 1.0})
        return Outcome("crashed", "port")

    monkeypatch.setattr(attempts, "_run_once", start)
    run_attempt(attempt, make_config(), MACHINE, echo=False)
    assert starts == [[], []]
    run_attempt(attempt, make_config("launch.master_port=29501"), MACHINE, echo=False)
    assert len(starts) == 3


def pretend_to_be_gone(attempt: Attempt, rank: int) -> None:
    """Put a process that has ended into a rank's heartbeat."""
    with subprocess.Popen(["true"]) as ended:
        pass
    file = attempt.path / "heartbeat" / f"rank{rank:05d}"
    here, there = f'"pid": {os.getpid()},', f'"pid": {ended.pid},'
    assert here.encode() in file.read_bytes()
    file.write_bytes(file.read_bytes().replace(here.encode(), there.encode()))


def error(rank: int, type: str, message: str, oom: bool = False) -> dict[str, object]:
    return {"rank": rank, "type": type, "message": message, "oom": oom, "time": float(rank)}


LOST = error(0, "RuntimeError", "Connection closed by peer [127.0.0.1]:1")
SAID = "rank 0: RuntimeError: Connection closed by peer [127.0.0.1]:1"
ALL_LOST = [LOST, error(1, "RuntimeError", "Broken pipe")]
STOPPED = [error(rank, "_Stopped", "SIGTERM") | {"signal": "SIGTERM"} for rank in (0, 1)]
KERNEL = "the kernel ran out of memory"


@pytest.mark.parametrize(
    ("errors", "gone", "exit_status", "oom_killed", "log", "expected"),
    [
        ([LOST, error(1, "OutOfMemoryError", "CUDA out of memory", oom=True)], [], 1, False, "",
         Outcome("oom", "rank 1: OutOfMemoryError: CUDA out of memory")),
        ([error(0, "ValueError", "other"), error(1, "MemoryError", "", oom=True)], [], 1, False, "",
         Outcome("oom", "rank 1: MemoryError: ")),
        ([LOST], [], 247, True, "", Outcome("oom", f"rank 1 was ended by SIGKILL: {KERNEL}")),
        ([LOST], [], 245, False, "", Outcome("crashed", "rank 1 was ended by SIGSEGV")),
        ([], [], 128 + 15, False, "", Outcome("crashed", "the deepspeed launcher was ended by SIGTERM")),
        ([], [], -9, False, "", Outcome("crashed", "the guard was ended by SIGKILL")),
        ([], [], 128 + 6, False, "terminate called after throwing an instance of 'std::bad_alloc'\n",
         Outcome("oom", "the deepspeed launcher was ended by SIGABRT: it could not allocate memory")),
        ([], [], 128 + 6, False, "terminate called\n",
         Outcome("crashed", "the deepspeed launcher was ended by SIGABRT")),
        ([], [], 1, False, "Traceback (most recent call last):\nMemoryError\n", Outcome("oom", "MemoryError")),
        ([error(0, "ValidationError", "1 validation error for Comet\nenabled\n  a boolean [type=bool]\n    For more")],
         [], 1, False, "",
         Outcome("crashed", "rank 0: ValidationError: 1 validation error for Comet enabled a boolean [type=bool]")),
        ([], [], 247, False, "", Outcome("crashed", "a rank was ended by SIGKILL")),
        ([], [1], 247, True, "", Outcome("oom", f"rank 1 was ended by SIGKILL: {KERNEL}")),
        ([], [], 1, False, "RuntimeError: DefaultCPUAllocator: can't allocate memory",
         Outcome("oom", "RuntimeError: DefaultCPUAllocator: can't allocate memory")),
        # deepspeed saw the end of the one that lost its peer first, or none yet
        ([LOST], [], 1, False, "", Outcome("crashed", f"rank 1 ended without a word; {SAID}")),
        ([LOST], [], None, True, "", Outcome("oom", f"rank 1 was ended by SIGKILL: {KERNEL}")),
        ([LOST], [1], 1, True, "", Outcome("oom", f"rank 1 was ended by SIGKILL: {KERNEL}")),
        (ALL_LOST, [], None, True, "",
         Outcome("crashed", f"the ranks lost each other, and none reports another cause; {SAID}")),
        # runs that the user's own deepspeed started
        (STOPPED, [], None, False, "", Outcome("interrupted", "stopped by SIGTERM before it finished")),
        (STOPPED[:1], [], None, False, "", Outcome("interrupted", "stopped by SIGTERM before it finished")),
        # and of others
        ([LOST, STOPPED[1]], [], 1, False, "", Outcome("crashed", "rank 1 was ended by SIGTERM")),
        (STOPPED, [], 1, False, "", Outcome("crashed", "rank 0 was ended by SIGTERM")),
        (STOPPED, [], 0, False, "", Outcome("crashed", "the run ended with exit status 0 and without a result")),
        (STOPPED[:1], [1], 247, False, "", Outcome("crashed", "rank 1 was ended by SIGKILL")),
        (STOPPED[:1], [], 247, False, "", Outcome("crashed", "rank 1 was ended by SIGKILL")),
        (STOPPED[::-1], [], 1, False, "", Outcome("crashed", "rank 1 was ended by SIGTERM")),
        (STOPPED[:1], [1], None, False, "",
         Outcome("crashed", "rank 1 ended without a word; deepspeed ended the others by SIGTERM")),
        ([STOPPED[0], error(1, "ValueError", "after that")], [], None, False, "",
         Outcome("interrupted", "stopped by SIGTERM before it finished")),
        ([error(0, "ValueError", "before that"), STOPPED[1]], [], None, False, "",
         Outcome("crashed", "rank 0: ValueError: before that")),
        ([], [], 1, False, "a\nRuntimeError: b\n[2026-01-01 00:00:00,0] [ERROR] [launch.py] c\n\n",
         Outcome("crashed", "RuntimeError: b")),
        ([], [], 3, False, "", Outcome("crashed", "the run ended with exit status 3 and without a result")),
    ],
)  # fmt: skip
def test_diagnosis(
    errors: list[dict[str, object]],
    gone: list[int],
    exit_status: int | None,
    oom_killed: bool,
    log: str,
    expected: Outcome,
    tmp_path: Path,
) -> None:
    (tmp_path / "log.txt").write_text(log)
    silent = sorted({0, 1} - {error["rank"] for error in errors})
    remains = Remains(errors, silent, gone, absent=[])
    death = local.death(exit_status)
    watched = exit_status is not None
    assert expected == judge(
        Attempt(tmp_path), remains, exit_status=exit_status, death=death, oom_killed=oom_killed, watched=watched
    )


def test_a_result_outweighs_how_the_processes_ended(tmp_path: Path) -> None:
    write_json(tmp_path / "result.json", {"row": {}})
    assert judge(Attempt(tmp_path), Remains([LOST], [1], [1], []), death=Death(signal.SIGKILL)) == Outcome("ok")


def test_a_rank_that_never_began_is_named(tmp_path: Path) -> None:
    remains = Remains(STOPPED[:1], [1], [], absent=[1])
    outcome = judge(Attempt(tmp_path), remains)
    assert outcome == Outcome("crashed", "rank 1 had not joined when rank 0 was ended by SIGTERM")
    (tmp_path / "log.txt").write_text("Traceback (most recent call last):\nImportError: no torch\n")
    outcome = judge(Attempt(tmp_path), remains, exit_status=1, watched=True)
    assert outcome == Outcome("crashed", "ImportError: no torch")


def test_of_ranks_that_somebody_stopped_the_first_is_named(tmp_path: Path) -> None:
    """Also while deepspeed has not ended."""
    remains = Remains(STOPPED, silent=[], gone=[], absent=[])
    assert judge(Attempt(tmp_path), remains, watched=True) == Outcome("crashed", "rank 0 was ended by SIGTERM")


def test_what_ranks_left_is_read_from_their_files(tmp_path: Path) -> None:
    attempt = Attempt(tmp_path)
    for rank in range(6):
        Heart(tmp_path, rank)
    Heart(tmp_path, 5).phase(DONE)
    for rank in (2, 3, 5):
        pretend_to_be_gone(attempt, rank)
    (tmp_path / "errors").mkdir()
    for later_first in (error(3, "ValueError", "b"), error(0, "ValueError", "a")):
        write_json(attempt.error_file(int(str(later_first["rank"]))), later_first)
    (tmp_path / "errors" / "rank00001.json").write_text("{")  # cut off: as good as nothing
    (tmp_path / "heartbeat" / "rank00004").write_bytes(bytes(64))  # of another format
    remains = read_remains(attempt, 7)
    assert [error["message"] for error in remains.errors] == ["a", "b"]
    assert (remains.silent, remains.gone, remains.absent) == ([1, 2, 4, 6], [2], [4, 6])


def test_out_of_memory_of_other_jobs_does_not_count(tmp_path: Path) -> None:
    def group(line: str) -> list[str]:
        (tmp_path / "own").write_text(line + "\n")
        return [str(f.relative_to(tmp_path)) for f in diagnose._control_group_files(tmp_path, tmp_path / "own")]

    assert group("0::/job/step") == ["job/step/memory.events"]
    assert group("4:memory:/job") == ["memory/job/memory.oom_control"]
    assert group("9:cpuset,memory:/\n0::/") == ["memory/memory.oom_control", "memory.events"]
    assert group("1:cpu:/") == []
    assert diagnose._control_group_files(tmp_path, tmp_path / "none") == []
    (tmp_path / "memory.events").write_text("low 0\noom 9\noom_kill 2\noom_group_kill 7\n")
    assert diagnose.count_oom_kills([tmp_path / "none", tmp_path / "memory.events"]) == 2
    assert diagnose.count_oom_kills([tmp_path / "none"]) == 0


def test_gpus_are_started_by_number(attempt: Attempt) -> None:
    machine = Machine("cuda", "some GPU", 3, 8, 2**33, visible_devices=(1, 3, 5))
    arguments = command(attempt, make_config("parallel.tp=2"), machine, 1234)
    assert arguments[arguments.index("--include") + 1] == "localhost:1,3"
    assert "--num_gpus" not in arguments


def test_ranks_inherit_no_other_job(monkeypatch: pytest.MonkeyPatch) -> None:
    foreign = "RANK WORLD_SIZE LOCAL_RANK LOCAL_SIZE MASTER_ADDR MASTER_PORT CROSS_RANK CUDA_VISIBLE_DEVICES".split()
    for name in foreign:
        monkeypatch.setenv(name, "3")
    monkeypatch.setenv("NCCL_DEBUG", "INFO")
    environment = child_environment(make_config("launch.threads_per_rank=2"), MACHINE)
    assert not set(foreign) & set(environment)
    assert environment["NCCL_DEBUG"] == "INFO"
    assert environment["OMP_NUM_THREADS"] == "2"
    assert environment["PYTHONPATH"].startswith(str(local.REPOSITORY))
    assert environment["PATH"].startswith(str(Path(sys.executable).parent))
