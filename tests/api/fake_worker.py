"""A worker without a model, for tests of the API: it speaks the worker's messages and is deterministic.

A generation repeats its prompt's tokens for ever, so that a test chooses the text it wants back. A tenant's name
chooses what else happens: see ``FakeWorker``. Run as a process it is started as the real worker is.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import threading
import time
from dataclasses import dataclass, field
from itertools import cycle, islice
from pathlib import Path

from app import messages as m
from app.errors import (
    InvalidMemoryFile,
    ServerBusy,
    StoreFull,
    TenantBusy,
    TenantExists,
    TenantNotFound,
    TextsNotKept,
    VersionConflict,
    VersionNotKept,
)
from app.settings import Settings
from app.store.names import chosen

VOCAB = 600
MIN_CONTEXT = 4
MAX_CONTEXT = 32
NUM_TOKENS = 8
MAX_SEQUENCE = 512
MEMORY_FILE = 3 << 20
EOS = 1


def model_info(path: str = "") -> m.ModelInfo:
    return m.ModelInfo(
        name="fake",
        path=path,
        fingerprint="f" * 16,
        vocab_size=VOCAB,
        num_blocks=4,
        num_tokens=NUM_TOKENS,
        min_context=MIN_CONTEXT,
        max_context=MAX_CONTEXT,
        max_sequence=MAX_SEQUENCE,
        stop_tokens=(EOS,),
        temperature=0.0,
        top_p=1.0,
        top_k=0,
        repetition_penalty=1.0,
        device="cpu",
        dtype="float32",
        memory_file_bytes=MEMORY_FILE,
    )


@dataclass
class FakeWorker:
    """Answers requests at once, except for tenants called

    - ``hold…``: a generation stops after its first token and waits for Cancel, an update before its last block,
      an export before its file is written;
    - ``busy``, ``overloaded``, ``full``: fail with that error; ``full-later``: an update fails after a block;
    - ``mute``: never answered; ``hold-on``: not ended by a Drain either.
    """

    memories: dict[str, int] = field(default_factory=dict)
    seeds: dict[str, int] = field(default_factory=dict)
    lineages: dict[str, int] = field(default_factory=dict)
    keys: dict[tuple[str, str], m.Updated] = field(default_factory=dict)
    seen: list[m.Request] = field(default_factory=list)
    held: dict[str, m.Generate | m.Update | m.ExportTenant] = field(default_factory=dict)
    imported: list[bytes] = field(default_factory=list)
    export_bytes: int = 100
    texts: list[m.KeptText] = field(default_factory=list)
    interrupted: int = 0

    def handle(self, request: m.Request) -> list[m.Answer]:
        self.seen.append(request)
        if isinstance(request, m.Cancel):
            return self._cancel(request)
        if isinstance(request, m.Drain | m.ListTenants):
            return self._list(request) if isinstance(request, m.ListTenants) else []
        error = {
            "busy": TenantBusy("this tenant's queue is full", retry_after=2.0),
            "overloaded": ServerBusy("the queue is full", retry_after=3.0),
            "full": StoreFull("the disk is full"),
        }.get(request.tenant)
        if error is not None:
            return [m.Failed(request.id, error.code, error.message, retry_after=error.retry_after)]
        if request.tenant == "mute":
            return []
        if isinstance(request, m.Generate):
            return self._generate(request)
        if isinstance(request, m.Update):
            return self._update(request)
        if isinstance(request, m.Score):
            self.memories.setdefault(request.tenant, 0)
            greedy = [token - token % 2 for token in request.continuation]
            logprobs = [-float(place) for place in range(len(greedy))]
            return [m.Scored(request.id, logprobs, greedy, self.memories[request.tenant])]
        return self._tenant(request)

    def _generate(self, request: m.Generate) -> list[m.Answer]:
        version = self.memories.setdefault(request.tenant, 0)
        tokens = list(islice(cycle(request.tokens), request.sampling.max_tokens))
        reason, stop_token = "length", None
        for place, token in enumerate(tokens):
            if token in request.sampling.stop_tokens:
                tokens, reason, stop_token = tokens[:place], "stop", token
                break
        logprobs = None
        if request.sampling.logprobs is not None:
            top = [(token, -0.5 * token) for token in range(request.sampling.logprobs)]
            logprobs = [m.TokenLogprob(-0.25, top) for _ in tokens]
        if request.tenant.startswith("hold"):
            self.held[request.id] = request
            return [m.Tokens(request.id, tokens[:1], logprobs and logprobs[:1], version)]
        answers: list[m.Answer] = []
        for place, token in enumerate(tokens):
            if place and logprobs is None:
                answers.append(m.Decoded([request.id, "somebody else's"], [token, token + 1]))
                continue
            answers.append(
                m.Tokens(request.id, [token], logprobs and [logprobs[place]], version if place == 0 else None)
            )
        done = self._finished(request, reason, len(tokens), stop_token)
        return [*answers, done]

    def _finished(self, request: m.Generate, reason: str, count: int, stop: int | None = None) -> m.Finished:
        return m.Finished(
            request.id,
            reason,
            self.memories[request.tenant],
            len(request.tokens),
            count,
            m.Timings(0.001, 0.0, 0.002, 0.003),
            stop,
        )

    def _update(self, request: m.Update) -> list[m.Answer]:
        if request.idempotency_key is not None:
            done = self.keys.get((request.tenant, request.idempotency_key))
            if done is not None:
                return [
                    m.Updated(
                        request.id,
                        done.memory_version,
                        done.blocks,
                        done.tokens,
                        done.surviving_share,
                        done.timings,
                        replayed=True,
                    )
                ]
        version = self.memories.get(request.tenant, 0)
        answers: list[m.Answer] = []
        total = len(request.contexts)
        for number in range(1, total + 1):
            if request.tenant == "full-later" and number == 2:
                error = StoreFull("the disk is full")
                return [*answers, m.Failed(request.id, error.code, error.message)]
            if request.tenant.startswith("hold") and number == total:
                self.held[request.id] = request
                return answers
            self.memories[request.tenant] = version + number
            answers.append(m.UpdateProgress(request.id, number, total, version + number))
        tokens = sum(len(context.tokens) for context in request.contexts)
        updated = m.Updated(request.id, version + total, total, tokens, 0.75, m.Timings(total=0.01))
        if request.idempotency_key is not None:
            self.keys[request.tenant, request.idempotency_key] = updated
        return [*answers, updated]

    def _cancel(self, request: m.Cancel) -> list[m.Answer]:
        held = self.held.get(request.id)
        if not isinstance(held, m.Generate):
            return []
        del self.held[request.id]
        return [self._finished(held, "cancelled", 1)]

    def _list(self, request: m.ListTenants) -> list[m.Answer]:
        known = sorted(self.memories)
        if request.only is not None:
            known = chosen(known, request.only)
        names = [name for name in known if name > request.after]
        page = names[: request.limit]
        following = page[-1] if len(names) > len(page) and page else None
        return [m.Reply(request.id, m.TenantList(page, following, len(known)))]

    def _info(self, request: m.Request, name: str) -> m.Reply:
        seed, version, lineage = self.seeds.get(name, 0), self.memories[name], self.lineages.get(name, 0)
        return m.Reply(request.id, m.TenantInfo(name, seed, version, 1.0, 2.0, 100, "resident", lineage))  # type: ignore[union-attr]

    def _changed(self, request: m.ForkTenant | m.RollbackTenant) -> list[m.Answer]:
        name, version = request.tenant, request.version
        if version is not None and version > self.memories[name]:
            error = VersionNotKept("this version is not kept")
            return [m.Failed(request.id, error.code, error.message)]
        if isinstance(request, m.RollbackTenant):
            self.memories[name] = request.version
            self.lineages[name] = self.lineages.get(name, 0) + 1
            return [self._info(request, name)]
        if request.target in self.memories:
            exists = TenantExists("there is such a tenant already")
            return [m.Failed(request.id, exists.code, exists.message)]
        self.memories[request.target] = self.memories[name] if version is None else version
        self.seeds[request.target] = self.seeds.get(name, 0)
        return [self._info(request, request.target)]

    def _rebuild(self, request: m.GetTexts | m.RebuildTenant) -> list[m.Answer]:
        """``texts`` are those of every tenant; ``interrupted`` rebuilds find that an update has come before."""
        name = request.tenant
        version, lineage = self.memories[name], self.lineages.get(name, 0)
        if isinstance(request, m.GetTexts):
            if name == "untold":
                missing = TextsNotKept("the texts are not kept")
                return [m.Failed(request.id, missing.code, missing.message)]
            current = not name.startswith("foreign")
            return [m.Reply(request.id, m.Texts(name, version, lineage, current, self.texts))]
        if self.interrupted:
            self.interrupted -= 1
            error = VersionConflict("updated meanwhile", retry_after=0.1)
            return [m.Failed(request.id, error.code, error.message, retry_after=error.retry_after)]
        self.lineages[name] = lineage + 1
        total = self.memories[name] = len(request.contexts)
        progress = [m.UpdateProgress(request.id, done, total, done) for done in range(1, total + 1)]
        return [*progress, self._info(request, name)]

    def _exported(self, request: m.ExportTenant) -> list[m.Answer]:
        """A file of ``export_bytes`` that begins with tenant, version and texts."""
        if request.tenant.startswith("hold"):
            self.held[request.id] = request
            return []
        told = f"{request.tenant} {self.memories[request.tenant]} {request.texts} ".encode()
        data = told + bytes(self.export_bytes - len(told))
        assert Path(request.path).stat().st_mode & 0o777 == 0o600
        Path(request.path).write_bytes(data)
        return [m.Reply(request.id, m.Exported(request.tenant, self.memories[request.tenant], len(data)))]

    def _imported(self, request: m.ImportTenant) -> list[m.Answer]:
        """Takes what ``_exported`` gave."""
        data = Path(request.path).read_bytes()
        self.imported.append(data)
        parts = data.split()[:2]
        if len(parts) < 2 or not parts[1].isdigit():
            error = InvalidMemoryFile("this is no memory")
            return [m.Failed(request.id, error.code, error.message)]
        self.memories[request.tenant] = int(parts[1])
        return [self._info(request, request.tenant)]

    def _tenant(
        self,
        request: m.CreateTenant
        | m.GetTenant
        | m.EraseTenant
        | m.GetMemory
        | m.GetHistory
        | m.ForkTenant
        | m.RollbackTenant
        | m.ExportTenant
        | m.ImportTenant
        | m.GetTexts
        | m.RebuildTenant,
    ) -> list[m.Answer]:
        name = request.tenant
        if isinstance(request, m.ImportTenant) and name not in self.memories:
            return self._imported(request)
        if isinstance(request, m.CreateTenant | m.ImportTenant):
            if name in self.memories:
                error = TenantExists("there is such a tenant already", param="id")
                return [m.Failed(request.id, error.code, error.message, error.param)]
            self.memories[name] = 0
            self.seeds[name] = getattr(request, "seed", None) or 0
        elif name not in self.memories:
            missing = TenantNotFound("there is no such tenant")
            return [m.Failed(request.id, missing.code, missing.message)]
        if isinstance(request, m.ForkTenant | m.RollbackTenant):
            return self._changed(request)
        if isinstance(request, m.GetTexts | m.RebuildTenant):
            return self._rebuild(request)
        version = self.memories[name]
        if isinstance(request, m.ExportTenant):
            return self._exported(request)
        if isinstance(request, m.EraseTenant):
            del self.memories[name]
            return [m.Reply(request.id, m.Erased(name, version, version + 1, 100, 0, ["warm"]))]
        if isinstance(request, m.GetMemory):
            born = [[0] * 24 + [version] * 8, [0] * 26 + [version] * 6]
            return [m.Reply(request.id, m.MemoryView(name, version, 4, 8, born))]
        if isinstance(request, m.GetHistory):
            newest = version if request.before is None else min(version, request.before - 1)
            versions = range(newest, max(0, newest - request.limit), -1)
            items = [m.HistoryItem(v, 1.0, 10, None, None, 0.5) for v in versions]
            following = versions[-1] if versions and versions[-1] > 1 else None
            return [m.Reply(request.id, m.History(name, version, items, following))]
        return [self._info(request, name)]


def main() -> int:
    """As a process. The environment variable FAKE_WORKER chooses a fault: ``fatal``, ``exit`` or ``loading``.

    A tenant called ``crash`` makes it end at once, ``hang-once`` makes it stop, in one life only. FAKE_WORKER_LOG, a
    file, gets a line for each start and drain.
    """
    import zmq

    parser = argparse.ArgumentParser()
    parser.add_argument("--endpoint", required=True)
    endpoint = parser.parse_args().endpoint
    Settings.model_validate_json(sys.stdin.buffer.readline())

    def exit_with_parent() -> None:
        while sys.stdin.buffer.read(4096):
            pass
        os._exit(0)

    threading.Thread(target=exit_with_parent, daemon=True).start()
    log = os.environ.get("FAKE_WORKER_LOG")
    hung = Path(f"{log}.hung")

    def note(line: str) -> None:
        if log:
            with Path(log).open("a") as file:
                file.write(line + "\n")

    note(f"start {os.getpid()}")
    fault = os.environ.get("FAKE_WORKER")
    if fault == "exit":
        return 3
    socket = zmq.Context().socket(zmq.DEALER)
    socket.connect(endpoint)
    if fault == "loading":
        threading.Event().wait()
    if fault == "fatal":
        socket.send(m.encode([m.Fatal("there is no such model")]))
        socket.close(linger=1000)
        return 1
    worker = FakeWorker()
    info = model_info(os.environ.get("FAKE_WORKER_MODEL", ""))
    socket.send(m.encode([m.Ready(info, pid=os.getpid())]))
    beat = 0.0
    draining = False
    while True:
        if time.monotonic() - beat > 0.2:
            beat = time.monotonic()
            numbers = {"num_requests_running": float(len(worker.held)), "memories:resident": 1.0}
            socket.send(
                m.encode([m.Stats(beat, numbers, {"prompt_tokens_total": 5.0}, {"step_seconds": [0.01]})])
            )
        if not socket.poll(50):
            continue
        answers: list[m.Answer] = []
        for request in m.decode_requests(socket.recv()):
            tenant = getattr(request, "tenant", None)
            if tenant == "crash":
                os._exit(9)
            if tenant == "hang-once" and not hung.exists():
                hung.touch()
                os.kill(os.getpid(), signal.SIGSTOP)
            if isinstance(request, m.Drain):
                note("drain")
                draining = True
                for held in list(worker.held.values()):
                    if isinstance(held, m.Generate) and held.tenant != "hold-on":
                        answers.append(worker._finished(held, "length", 1))
            answers += worker.handle(request)
        if answers:
            socket.send(m.encode(answers))
        if draining and not any(held.tenant == "hold-on" for held in worker.held.values()):
            socket.close(linger=1000)
            return 0


if __name__ == "__main__":
    code = main()
    os._exit(code)
