"""Programs that know nothing of Forebay take locks and ask limits: curl and Node.js.

Two node processes, and a holder in Python in this one; the programs talk to either node.
"""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import anyio
import anyio.to_thread
import pytest

import forebay
from forebay.schemas.errors_locks import LeaseLost
from forebay.schemas.settings import Http, NodeSettings, Settings, Valkey
from support.eventually import wait_until
from support.node_process import NodeProcess, Shop, environ
from support.programs import tool
from support.valkey_server import ValkeyServer

TOKEN = "a-token-for-these-tests"
#: fetch(METHOD, URL, BODY) with what is in Node.js; prints the status and the body.
NODE_JS = """
const [method, url, body, token] = process.argv.slice(1);
const headers = { "Content-Type": "application/json", Authorization: `Bearer ${token}` };
const request = require("http").request(url, { method, headers }, (response) => {
  let text = "";
  response.on("data", (part) => (text += part));
  response.on("end", () => console.log(`${text}\\n${response.statusCode}`));
});
request.end(body);
"""


class Told(NamedTuple):
    status: int
    body: Any


class Program:
    """A program of the machine that speaks HTTP."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._path = tool(name)

    def start(
        self, method: str, url: str, body: Any = None, *, token: str = TOKEN
    ) -> subprocess.Popen[str]:
        text = "" if body is None else json.dumps(body)
        if self.name == "node":
            words = ["-e", NODE_JS, method, url, text, token]
        else:
            words = ["-sS", "-X", method, "-w", "\n%{http_code}", url]
            words += ["-H", f"Authorization: Bearer {token}", "--json", text]
        return subprocess.Popen(
            [self._path, *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )

    def ask(self, method: str, url: str, body: Any = None, *, token: str = TOKEN) -> Told:
        return told(self.start(method, url, body, token=token))


def told(process: subprocess.Popen[str]) -> Told:
    out, err = process.communicate(timeout=40)
    text, _, status = out.strip().rpartition("\n")
    assert status.isdigit(), (out, err)
    return Told(int(status), json.loads(text))


@pytest.fixture(scope="module")
def shop(valkey_server: ValkeyServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shop]:
    directory = tmp_path_factory.mktemp("locks")
    token = directory / "token"
    token.write_text(TOKEN)
    (directory / "forebay.toml").write_text("[limits.api]\nrate = 1\nper = 3600\nburst = 5\n")
    settings = {"valkey__url": valkey_server.url, "http__token_file": str(token)}
    with Shop(directory, f"locks-{directory.name}", **settings) as shop:
        yield shop


@pytest.fixture(scope="module")
def nodes(shop: Shop) -> list[NodeProcess]:
    nodes = [shop.node(f"node-{number}").spawn() for number in (1, 2)]
    for node in nodes:
        node.until_ready()
    return nodes


@pytest.fixture(params=["curl", "node"])
def program(request: pytest.FixtureRequest) -> Program:
    return Program(request.param)


@pytest.fixture
def own(shop: Shop, nodes: list[NodeProcess], valkey_server: ValkeyServer) -> forebay.Node:
    """A node in this process, of the same namespace."""
    settings = Settings(
        valkey=Valkey(url=valkey_server.url),
        node=NodeSettings(namespace=shop.namespace),
        http=Http(enabled=False),
    )
    return forebay.Node(settings=settings)


def shown(node: NodeProcess, path: str) -> Any:
    request = urllib.request.Request(f"{node.url}{path}")
    request.add_header("Authorization", f"Bearer {TOKEN}")
    with urllib.request.urlopen(request, timeout=20) as response:
        return json.load(response)


def waiting(node: NodeProcess, name: str) -> int:
    return int(shown(node, f"/v1/locks/{name}")["waiting"])


async def test_a_lock_goes_from_python_to_a_program_and_back(
    own: forebay.Node, nodes: list[NodeProcess], program: Program
) -> None:
    """Each waits until the other releases; the tokens grow, and nobody waits for a lease to end."""
    name = f"hand-over-{program.name}"
    url = f"{nodes[0].url}/v1/locks/{name}"
    async with own:
        async with own.lock(name, lease=30) as first:
            process = program.start("POST", url, {"timeout": 30, "lease": 30})
            await anyio.to_thread.run_sync(
                lambda: wait_until(
                    lambda: waiting(nodes[1], name) == 1, what="the program in the queue"
                )
            )
        status, lease = await anyio.to_thread.run_sync(told, process)
        assert (status, lease["name"]) == (200, name)
        assert lease["token"] > first.token
        assert await own.try_lock(name) is None

        release = f"{nodes[1].url}/v1/locks/{name}?nonce={lease['nonce']}"
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(_hold, own, name, lease["token"])
            await anyio.to_thread.run_sync(
                lambda: wait_until(lambda: waiting(nodes[0], name) == 1, what="Python in the queue")
            )
            answer = await anyio.to_thread.run_sync(program.ask, "DELETE", release)
            assert answer == (200, {"name": name, "released": True})


async def _hold(node: forebay.Node, name: str, after: int) -> None:
    async with node.lock(name, timeout=20) as lease:
        assert lease.token > after


def test_programs_take_turns(nodes: list[NodeProcess], program: Program) -> None:
    """Six at two nodes: each has the lock once, with a token of its own, none overlaps."""
    name = f"turns-{program.name}"
    tokens: list[int] = []
    inside = threading.Semaphore(1)

    def turn(number: int) -> None:
        url = f"{nodes[number % 2].url}/v1/locks/{name}"
        status, lease = program.ask("POST", url, {"timeout": 30, "lease": 30})
        assert status == 200
        assert inside.acquire(blocking=False)
        tokens.append(lease["token"])
        inside.release()
        assert program.ask("DELETE", f"{url}?nonce={lease['nonce']}").status == 200

    threads = [threading.Thread(target=turn, args=(number,)) for number in range(6)]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    assert len(tokens) == 6
    assert tokens == sorted(set(tokens))


def test_a_program_that_is_killed_waits_no_more(nodes: list[NodeProcess], program: Program) -> None:
    """Its place goes at once; the next one need not wait for it."""
    name = f"killed-{program.name}"
    url = f"{nodes[0].url}/v1/locks/{name}"
    held = program.ask("POST", url, {"lease": 30}).body
    process = program.start("POST", url, {"timeout": 60, "lease": 30})
    wait_until(lambda: waiting(nodes[1], name) == 1, what="the program in the queue")
    process.kill()
    process.communicate()
    wait_until(lambda: waiting(nodes[1], name) == 0, what="its place given up")
    assert program.ask("DELETE", f"{url}?nonce={held['nonce']}").status == 200
    assert program.ask("POST", url, {}).status == 200


def test_a_limit_is_one_for_all_nodes(nodes: list[NodeProcess], program: Program) -> None:
    """Five tokens, whichever node is asked; what is reserved is settled."""
    limits = [f"{node.url}/v1/limits/api" for node in nodes]
    body = {"subject": program.name}
    answers = [program.ask("POST", f"{limits[n % 2]}/take", body).status for n in range(7)]
    assert answers == [200] * 5 + [429] * 2

    body = {"subject": f"{program.name}-2", "cost": 5}
    held = program.ask("POST", f"{limits[0]}/reserve", body).body
    settling = {"subject": body["subject"], "id": held["id"], "actual": 0}
    assert program.ask("POST", f"{limits[1]}/settle", settling) == (200, {"settled": True})
    assert program.ask("POST", f"{limits[1]}/settle", settling).status == 404
    assert program.ask("POST", f"{limits[1]}/take", body).status == 200


def test_without_the_token_nothing_is_done(
    nodes: list[NodeProcess], program: Program, shop: Shop
) -> None:
    """401 for each way to change anything; the token is in no log."""
    for path in ("locks/l", "locks/l/renew", "limits/api/take", "limits/api/settle", "events"):
        refused = program.ask("POST", f"{nodes[0].url}/v1/{path}", {}, token="a-token-for-others")
        assert (refused.status, refused.body["error"]["code"]) == (401, "unauthorized")
    assert shown(nodes[0], "/v1/locks/l")["holders"] == []
    assert program.ask("GET", f"{nodes[0].url}/openapi.json").body["openapi"] == "3.1.0"
    assert TOKEN not in "".join(node.said() for node in nodes)


def test_the_document_says_what_works(nodes: list[NodeProcess], tmp_path: Path) -> None:
    """The first program of docs/http.md runs as it stands, but for the address."""
    text = (Path(__file__).parents[2] / "docs" / "http.md").read_text()
    script = text.split("```sh\n")[1].split("```")[0]
    assert script.count("$api/") == 7
    tool("curl")
    (tmp_path / "token").write_text(TOKEN)
    script = script.replace("http://127.0.0.1:8642", nodes[0].url)
    words = ["sh", "-e", "-c", script]
    done = subprocess.run(words, capture_output=True, text=True, timeout=20, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, ""), done
    assert done.stdout.endswith('{"settled":true}')
    assert shown(nodes[0], "/v1/locks/rebuild")["holders"] == []


def test_a_body_of_10_mb_is_refused(nodes: list[NodeProcess], tmp_path: Path) -> None:
    """413, and the node goes on."""
    body = tmp_path / "body"
    body.write_bytes(b"{" + b" " * 10_000_000)
    curl = tool("curl")
    words = [curl, "-sS", "-H", f"Authorization: Bearer {TOKEN}", "--json", f"@{body}"]
    words += ["-o", "/dev/null", "-w", "%{http_code}", f"{nodes[0].url}/v1/locks/large"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=20)
    assert done.stdout == "413", done
    assert shown(nodes[0], "/v1/locks/large")["token"] == 0


async def test_a_lock_taken_from_a_program_is_lost_to_it(
    own: forebay.Node, nodes: list[NodeProcess]
) -> None:
    """By force, as an operator does; its renewal says so, and so does that of one in Python."""
    curl, url = Program("curl"), f"{nodes[0].url}/v1/locks/forced"
    lease = curl.ask("POST", url, {"lease": 30}).body
    async with own:
        assert await own.locks.force_release("forced") == 1
        refused = curl.ask("POST", f"{url}/renew", {"nonce": lease["nonce"]})
        assert (refused.status, refused.body["error"]["code"]) == (409, "not_held")
        with pytest.raises(LeaseLost):
            async with own.lock("forced"):
                words = ["-m", "forebay.nodes.cli", "locks", "release", "forced"]
                await anyio.run_process([sys.executable, *words, *_there(own)], env=environ())
                await anyio.sleep(20)


def _there(node: forebay.Node) -> list[str]:
    return ["--url", node.settings.valkey.url, "--namespace", node.namespace]
