"""A user's file, for the type checkers: each line marked ``# error`` is refused, no other is.

It is checked by tests/test_typing.py, and never run.
"""

from __future__ import annotations

from collections.abc import Mapping

import forebay

node = forebay.Node("shop")


@node.cached("price:{item}", ttl=60)
async def price(item: int) -> int | None:
    return item


@node.cached("offer:{item}:{region}", ttl=60)
async def offer(item: int, region: str = "eu") -> str:
    return f"{item} {region}"


@node.cached("slot:{a}:{b}:{c}", ttl=60)
async def slot(a: int, b: str, c: bool) -> float:
    return 1.0


@node.cached("wide:{a}:{b}:{c}:{d}", ttl=60)
async def wide(a: int, b: int, c: int, d: int) -> str:
    return ""


@node.cached("rates", ttl=60)
async def rates() -> Mapping[str, float]:
    return {}


@price.batch
async def prices(items: list[int]) -> dict[int, int | None]:
    return dict.fromkeys(items)


@node.sink("price:{item}")
async def save(writes: list[forebay.Write[int]]) -> None:
    for write in writes:
        value: int | None = write.value
        print(write.params["item"], value)


async def read() -> int:
    found: int | None = await price(42)
    await price(item=42)
    await price("42")  # error
    text: str = await offer(1)
    await offer(1, region="us")
    await offer(region="us")  # error
    number: int = await offer(1)  # error
    many: list[int | None] = await price.many([1, 2])
    await price.many(["1"])  # error
    await price.many_with_info([1.5])  # error
    await offer.many([1, 2])
    await offer.many([(1, "us"), (2, "eu")])
    await offer.many([("us", 1)])  # error
    await slot.many_with_info([(1, "b", True)])
    await slot.many_with_info([(1, "b")])  # error
    await wide.many([(1, 2, 3, 4)])
    hit = await price.get_with_info(42)
    stale: bool = hit.stale
    print(text, number, many, stale)
    return found or 0


async def write() -> None:
    await price.put(1, 2)
    await price.put(1, None, ttl=5, until="replicated")
    await price.put(1, "not an int")  # error
    await price.put("1", 2)  # error
    await price.put(1, 2, until="sink")  # error
    await price.write_behind(1, 2, until="sink", invalidates_tags=["catalog"])
    await price.write_behind(1, object())  # error
    await price.write_through(1, 2, timeout=1)
    await price.write_through(1, 2.5)  # error
    await price.write_around(1, b"")  # error
    await offer.put(1, "text")
    await offer.put(1, "us", "text")
    await offer.put(1, 5)  # error
    await offer.put(1, 5, "text")  # error
    await slot.write_behind(1, "b", True, 2.5)
    await slot.write_behind(1, "b", True, "text")  # error
    await wide.put(1, 2, 3, 4, "text")
    await rates.put({"eur": 1.0})
    await rates.put(5)  # error
    receipt = await price.write_behind(1, 2)
    number: int = receipt.shard
    print(number)


async def locked() -> int:
    async with node.lock("rebuild", lease=10) as lease:
        return lease.token


async def held() -> int:
    lease = await node.try_lock("rebuild")
    if lease is None:
        return 0
    async with lease:
        return lease.token


async def among() -> int:
    async with node.semaphore("few", capacity=3).acquire():
        return 1


async def reading() -> int:
    async with node.rwlock("book").reading() as lease:
        return lease.token


async def several() -> int:
    async with node.lock_all(["a", "b"]) as leases:
        return leases["a"].token


async def limited() -> bool:
    verdict = await node.limit("api", rate=100, per=1).take("tenant")
    return verdict.allowed


async def running() -> int:
    async with node:
        return await read()
