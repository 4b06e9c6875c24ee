"""The parts of the breaking bench by name. Each takes (scale, seed, progress) and gives its rows of the table."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

from loadtest.rows import Row
from tests.faults import damage, exploration, figures, full_disk, mutants, redis_mutants, worker_mutants
from tests.faults.cuts import Cuts, Cutting
from tests.faults.kills import Bench, Kills
from tests.faults.ledger import Violation
from tests.faults.oracle import Oracle
from tests.faults.servers import zygote
from tests.faults.sleepers import LEASE, Sleepers
from tests.faults.worker import WorkerBench
from tests.harness import load_backbone
from tests.store.redisserver import RedisServer

Progress = Callable[[str], None]
Part = Callable[[float, int, Progress], list[Row]]


def scaled(number: int, scale: float) -> int:
    return max(1, round(number * scale))


def states(scale: float, seed: int, progress: Progress) -> list[Row]:
    wanted = scaled(100_000, scale)
    progress(f"{wanted} states")
    details = {}
    try:
        found = exploration.explore(wanted, first_seed=seed * 1_000_000)
        good, reached = found.states >= wanted, f"{found.states:,} states, 0"
        details = {"crashes": found.crashes, "scripts": found.scripts, "failures": found.failures}
    except exploration.Violation as error:
        good, reached = False, f"broken: {error}"
    return [
        Row(
            "crash states explored with the fake file system, acknowledged updates lost or doubled",
            "100,000 states, 0",
            "1,000,000, 0",
            reached,
            good,
            details,
        )
    ]


def seeded(scale: float, seed: int, progress: Progress) -> list[Row]:
    oracle = Oracle(load_backbone("plain")[0])
    catch: dict[str, Callable[[str, Path], object]] = {
        **dict.fromkeys(mutants.MUTANTS, lambda name, _: mutants.caught(name)),
        **dict.fromkeys(redis_mutants.MUTANTS, redis_mutants.caught),
        **dict.fromkeys(worker_mutants.MUTANTS, lambda name, at: worker_mutants.caught(name, oracle, at)),
    }
    names = list(catch)[: scaled(len(catch), scale)]
    missed = []
    for count, name in enumerate(names):
        progress(f"{count} of {len(names)}")
        with tempfile.TemporaryDirectory(prefix="faults-") as folder:
            if not catch[name](name, Path(folder)):
                missed.append(name)
    reached = f"{len(names) - len(missed)} of {len(names)}"
    return [Row("seeded bugs caught", "10 of 10", "30 of 30", reached, not missed, {"missed": missed})]


def worker(scale: float, seed: int, progress: Progress) -> list[Row]:
    wanted, broken = scaled(1000, scale), ""
    with tempfile.TemporaryDirectory(prefix="faults-") as name:
        bench = WorkerBench(Oracle(load_backbone("plain")[0]), Path(name))
        try:
            while bench.done.scripts < wanted:
                bench.run(seed * 1_000_000 + bench.done.scripts)
                progress(f"{bench.done.scripts} of {wanted} scripts")
        except Violation as error:
            broken = str(error)
    done = bench.done
    result = broken or (
        f"{done.acknowledged:,} updates acknowledged, {done.crashes:,} crashes, {done.failures:,} failed calls, 0"
    )
    return [
        Row(
            "a worker's random requests on a failing disk, updates lost, doubled or read otherwise",
            "1,000 scripts, 0",
            "",
            f"{done.scripts:,} scripts: {result}",
            not broken and done.scripts >= wanted,
            vars(done),
        )
    ]


def kills(scale: float, seed: int, progress: Progress) -> list[Row]:
    wanted = scaled(500, scale)
    broken = ""

    def told(done: Kills) -> None:
        progress(f"{done.cycles} of {wanted} cycles, {done.updates} updates acknowledged")

    with tempfile.TemporaryDirectory(prefix="faults-") as name, zygote(Path(name)) as forks:
        store = Path(name) / "store"
        bench = Bench(f"disk://{store}", store, forks, seed)
        try:
            bench.run(wanted, told, cold_every=max(2, wanted // 20))
        except Violation as error:
            broken = str(error)
    return [row_of(bench.done, "on disk", wanted, broken)]


def kills_redis(scale: float, seed: int, progress: Progress) -> list[Row]:
    wanted, broken = scaled(500, scale), ""

    def told(done: Kills) -> None:
        progress(f"{done.cycles} of {wanted} cycles, {done.updates} updates acknowledged")

    with tempfile.TemporaryDirectory(prefix="faults-") as name, zygote(Path(name)) as forks:
        redis = RedisServer(Path(name))
        try:
            bench = Bench(f"{redis.url}?lease={LEASE}", None, forks, seed)
            bench.run(wanted, told, cold_every=max(2, wanted // 20))
        except Violation as error:
            broken = str(error)
        finally:
            redis.stop()
    return [row_of(bench.done, "in Redis", wanted, broken)]


def sleepers(scale: float, seed: int, progress: Progress) -> list[Row]:
    wanted, broken = scaled(100, scale), ""
    with tempfile.TemporaryDirectory(prefix="faults-") as name, zygote(Path(name)) as forks:
        redis = RedisServer(Path(name))
        pair = Sleepers(redis.url, forks, seed)
        try:
            pair.run(wanted, lambda done: progress(f"{done.cycles} of {wanted} cycles"))
        except Violation as error:
            broken = str(error)
        finally:
            pair.close()
            redis.stop()
    done = pair.done
    return [
        Row(
            "SIGSTOP of a lease holder while another server takes its tenant",
            "0 written over, 0 stale answers",
            "",
            f"{done.cycles} cycles, {done.caught} with an update under way: "
            f"{broken or '0 written over, 0 stale answers'}",
            not broken and done.cycles >= wanted,
            vars(done),
        )
    ]


def row_of(done: Kills, where: str, wanted: int, broken: str) -> Row:
    kinds = (
        f"API {done.by.get('API', 0)}, worker {done.by.get('worker', 0)}, both {done.by.get('both', 0)}; "
        f"{done.cold} servers started cold, the others forked"
    )
    result = broken or f"{done.updates:,} updates acknowledged, 0 lost, 0 doubled"
    return Row(
        f"`kill -9` of the server under load, memories {where}",
        "500 cycles, 0 lost, 0 doubled",
        "10,000",
        f"{done.cycles:,} cycles ({kinds}): {result}",
        not broken and done.cycles >= wanted,
        vars(done),
    )


def cuts(scale: float, seed: int, progress: Progress) -> list[Row]:
    wanted, broken = scaled(2000, scale), ""

    def told(done: Cuts) -> None:
        progress(f"{done.cycles} of {wanted} cycles")

    with tempfile.TemporaryDirectory(prefix="faults-") as name:
        cutting = Cutting(Path(name), seed)
        try:
            cutting.run(wanted, told)
        except Violation as error:
            broken = str(error)
        finally:
            cutting.close()
    done = cutting.found
    kinds = ", ".join(f"{count} × {kind}" for kind, count in sorted(done.by.items()))
    return [
        Row(
            "Redis cut or killed at random points",
            "2,000 cycles, 0 lost, 0 mixed between tenants",
            "10,000",
            f"{done.cycles:,} cycles ({kinds}): {broken or '0 lost, 0 doubled, 0 mixed'}",
            not broken and done.cycles >= wanted,
            vars(done),
        )
    ]


def bits(scale: float, seed: int, progress: Progress) -> list[Row]:
    """All eight bits of every byte on a disk (one of each where less than everything is asked for), one in Redis."""
    with tempfile.TemporaryDirectory(prefix="faults-") as name:
        disk = damage.on_disk(Path(name), bits=8 if scale >= 1 else 1, progress=progress)
    with tempfile.TemporaryDirectory(prefix="faults-") as name:
        server = RedisServer(Path(name))
        try:
            redis = damage.in_redis(server, bits=1, progress=progress)
        finally:
            server.stop()
    reached = ", ".join(
        f"{len(found.unnoticed)} of {found.tried:,} {where} ({found.harmless:,} without effect)"
        for where, found in (("on disk", disk), ("in Redis", redis))
    )
    unnoticed = disk.unnoticed + redis.unnoticed
    what = "bit flips or truncations of stored bytes that go unnoticed"
    demanded = "0 of every byte of a small store"
    return [Row(what, demanded, "", reached, not unnoticed, {"unnoticed": unnoticed[:100]})]


def room(scale: float, seed: int, progress: Progress) -> list[Row]:
    progress("filling disks")
    with tempfile.TemporaryDirectory(prefix="faults-") as name:
        told = f"{full_disk.limited(Path(name) / 'store')} updates refused by a limit of file sizes"
    with tempfile.TemporaryDirectory(prefix="faults-") as name:
        try:
            with full_disk.small_disk(Path(name)):
                told += f", {full_disk.fill(Path(name) / 'store')} by a full tmpfs"
        except PermissionError:
            told += "; no tmpfs: mounting is not allowed here"
    return [Row("a full disk: acknowledged updates lost", "0", "", f"0; {told}", True)]


def restart(scale: float, seed: int, progress: Progress) -> list[Row]:
    tenants = scaled(10_000, scale)
    progress(f"{tenants} tenants")
    with tempfile.TemporaryDirectory(prefix="faults-") as name:
        found = figures.restart(Path(name), tenants)
    reached = (
        f"{found['warm']:.2f} s, {found['cold']:.2f} s with nothing in the page cache; "
        f"{found['one']:.2f} s of it with one tenant"
    )
    what = f"restart with {tenants:,} tenants until ready"
    return [Row(what, "≤ 3 s", "1 s", reached, max(found["warm"], found["cold"]) <= 3.0, found)]


def loading(scale: float, seed: int, progress: Progress) -> list[Row]:
    progress("cold loads")
    with tempfile.TemporaryDirectory(prefix="faults-") as name:
        found = figures.loading(Path(name), times=scaled(15, scale))
    store, slot = found["store"] / found["disk"], found["slot"] / found["disk"]
    reached = (
        f"{store:.0%} into host memory, {slot:.0%} with K and V projected, of {found['disk'] / 1e6:,.0f} MB/s"
    )
    what = "loading a cold tenant, of the disk's own read bandwidth measured beside it"
    return [Row(what, "≥ 60 %", "85 %", reached, store >= 0.6, found)]


def updating(scale: float, seed: int, progress: Progress) -> list[Row]:
    progress("durable updates")
    with tempfile.TemporaryDirectory(prefix="faults-") as name:
        found = figures.updating(Path(name), "pocket", times=max(10, scaled(150, scale)))
    above = found["durable"] - found["memory"]
    reached = f"{above / found['syncs']:.2f} × ({above * 1e3:.2f} of {found['syncs'] * 1e3:.2f} ms)"
    what = (
        "durable update, time above the model's own work, of two fsyncs of the same bytes measured beside it"
    )
    return [Row(what, "≤ 1.5 ×", "1.1 ×", reached, above <= 1.5 * found["syncs"], found)]


def space(scale: float, seed: int, progress: Progress) -> list[Row]:
    updates = scaled(1000, scale)
    progress(f"{updates} updates")
    with tempfile.TemporaryDirectory(prefix="faults-") as name:
        found = figures.bytes_in_pools(Path(name), updates)
    reached = f"{found['most']:.2f} pools at the most on the way, {found['after']:.2f} at the end"
    what = f"bytes on disk per tenant after {updates:,} updates"
    return [Row(what, "≤ 2.2 pools", "", reached, found["most"] <= 2.2, found)]


PARTS: dict[str, Part] = {
    "states": states,
    "seeded": seeded,
    "worker": worker,
    "kills": kills,
    "kills-redis": kills_redis,
    "cuts": cuts,
    "sleepers": sleepers,
    "bits": bits,
    "room": room,
    "restart": restart,
    "loading": loading,
    "updating": updating,
    "space": space,
}
