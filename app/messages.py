"""What crosses between the API process and a worker: msgspec structs, packed as msgpack, over ZeroMQ.

Every request carries an ``id`` made by the API and is answered by messages with that ``id``, the last of
which is final: ``Finished``, ``Updated``, ``Scored``, ``Reply`` or ``Failed``. One frame holds a list of
messages, so that a step of the worker sends one frame however many sequences it moved.
"""

from __future__ import annotations

import msgspec

WORKER_LAST_SECONDS = 5.0
"""After the time to drain: for blocks that are on their way to the store, and for telling about the rest."""


class Message(msgspec.Struct, frozen=True, tag=True, omit_defaults=True):
    """Base of all messages; msgspec writes the class name as the tag."""


# ---------------------------------------------------------------- API -> worker


class Sampling(msgspec.Struct, frozen=True, omit_defaults=True):
    """How tokens are chosen. ``temperature`` 0 is greedy; ``top_k`` 0 and ``top_p`` 1 switch those off.

    ``logprobs`` is the number of most likely tokens reported beside each chosen one (None: none at all).
    ``stop_tokens`` end a generation and are not part of its text.
    """

    max_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    logprobs: int | None = None
    stop_tokens: tuple[int, ...] = ()


class Generate(Message, frozen=True):
    """Generate from ``tokens``. ``deadline`` is Unix time, in seconds; ``weight`` the tenant's share among others."""

    id: str
    tenant: str
    tokens: list[int]
    sampling: Sampling
    deadline: float | None = None
    priority: int = 0
    weight: int = 1


class Context(msgspec.Struct, frozen=True, omit_defaults=True):
    """One context of an update: it becomes one block. ``text`` is kept with the block if the store keeps it."""

    tokens: list[int]
    text: str | None = None


class Update(Message, frozen=True):
    """Inject ``contexts`` one after another. Once begun it completes, whether or not the client waits.

    It does not begin if the tenant has taken in ``updates_per_day`` contexts within 24 hours with it, or has more than
    ``most_bytes`` in the store (0: no limit).
    """

    id: str
    tenant: str
    contexts: list[Context]
    idempotency_key: str | None = None
    updates_per_day: int = 0
    most_bytes: int = 0
    weight: int = 1


class Score(Message, frozen=True):
    """Log-probabilities of ``continuation`` after ``prompt``."""

    id: str
    tenant: str
    prompt: list[int]
    continuation: list[int]
    deadline: float | None = None
    weight: int = 1


class Cancel(Message, frozen=True):
    """Ends the generation or score ``id`` at the next step; unknown ids and updates are left alone.

    ``reason`` is what a generation is counted under: "stop" when the API has found a stop string in its text.
    """

    id: str
    reason: str = "cancelled"


class CreateTenant(Message, frozen=True):
    """Makes a tenant. Without a ``seed`` it is drawn from the tenant's name. Reply: TenantInfo."""

    id: str
    tenant: str
    seed: int | None = None


class ListTenants(Message, frozen=True):
    """A page of tenants' names in order, after ``after``. Reply: TenantList.

    ``only``: of these alone, as if there were no others: names, or beginnings of names with a ``*`` behind them.
    """

    id: str
    after: str = ""
    limit: int = 100
    only: list[str] | None = None


class GetTenant(Message, frozen=True):
    """Reply: TenantInfo."""

    id: str
    tenant: str


class EraseTenant(Message, frozen=True):
    """Fails the tenant's open requests with TenantErased and removes it everywhere. Reply: Erased.

    With ``updates_per_day`` (0: no limit) the worker goes on counting what it took in before, until it restarts.
    """

    id: str
    tenant: str
    updates_per_day: int = 0


class GetMemory(Message, frozen=True):
    """Reply: MemoryView."""

    id: str
    tenant: str


class GetHistory(Message, frozen=True):
    """Reply: History: the newest ``limit`` committed updates before version ``before`` (None: the newest)."""

    id: str
    tenant: str
    limit: int = 100
    before: int | None = None


class ForkTenant(Message, frozen=True):
    """Makes ``target`` with the memory ``tenant`` has at ``version`` (None: now). Reply: TenantInfo of ``target``.

    ``most_bytes``: what ``target`` may take in the store (0: no limit).
    """

    id: str
    tenant: str
    target: str
    version: int | None = None
    most_bytes: int = 0


class RollbackTenant(Message, frozen=True):
    """Goes back to ``version``, in the tenant's order of arrival as an update. Reply: TenantInfo."""

    id: str
    tenant: str
    version: int


class GetTexts(Message, frozen=True):
    """What a rebuild needs. Reply: Texts."""

    id: str
    tenant: str


class RebuiltContext(msgspec.Struct, frozen=True):
    """One context of a rebuild: a piece of the KeptText that began at ``memory_version``."""

    tokens: list[int]
    text: str
    memory_version: int


class RebuildTenant(Message, frozen=True):
    """Tells ``contexts`` to a new memory and puts that in the place of the old one, all at once.

    The old one must be at ``lineage`` and ``memory_version`` still. ``most_bytes``: what the tenant may take in the
    store (0: no limit). Answered by UpdateProgress, then a Reply: TenantInfo.
    """

    id: str
    tenant: str
    lineage: int
    memory_version: int
    contexts: list[RebuiltContext]
    most_bytes: int = 0


class ExportTenant(Message, frozen=True):
    """Writes the memory into the file at ``path``, which is there and empty, with the history if ``texts``.

    Taking the file's name away ends it. Reply: Exported.
    """

    id: str
    tenant: str
    path: str
    texts: bool = False


class ImportTenant(Message, frozen=True):
    """Makes a tenant of the exported memory in the file at ``path``. Reply: TenantInfo.

    ``most_bytes``: what the tenant may take in the store (0: no limit).
    """

    id: str
    tenant: str
    path: str
    most_bytes: int = 0


class Drain(Message, frozen=True):
    """Take nothing new, finish what runs within ``seconds``, fail the rest, then exit 0."""

    seconds: float


Question = (
    Generate
    | Update
    | Score
    | CreateTenant
    | ListTenants
    | GetTenant
    | EraseTenant
    | GetMemory
    | GetHistory
    | ForkTenant
    | RollbackTenant
    | ExportTenant
    | ImportTenant
    | GetTexts
    | RebuildTenant
)
Request = Question | Cancel | Drain

# ---------------------------------------------------------------- worker -> API


class ModelInfo(msgspec.Struct, frozen=True, omit_defaults=True):
    """What the API needs to know of the model. Sizes are in tokens, but for ``memory_file_bytes``: the most that an
    exported memory can take."""

    name: str
    path: str
    fingerprint: str
    vocab_size: int
    num_blocks: int
    num_tokens: int
    min_context: int
    max_context: int
    max_sequence: int
    stop_tokens: tuple[int, ...]
    temperature: float
    top_p: float
    top_k: int
    repetition_penalty: float
    device: str
    dtype: str
    memory_file_bytes: int


class Fetching(Message, frozen=True):
    """The model is being downloaded, or is there now: the time to start counts from here. Sent every few seconds."""


class Ready(Message, frozen=True):
    """The worker serves. Sent once, after weights and store are open."""

    model: ModelInfo
    pid: int


class TokenLogprob(msgspec.Struct, frozen=True, omit_defaults=True):
    """Natural-log probability of the chosen token, and the likeliest tokens (id, logprob), best first.

    Taken from the model's own distribution, before temperature and the sampling filters.
    """

    logprob: float
    top: list[tuple[int, float]] = []


class Tokens(Message, frozen=True):
    """New tokens of generation ``id``, where there is more to say than ``Decoded`` does.

    ``logprobs`` matches ``tokens`` when they were asked for. ``memory_version`` is the version the whole generation
    reads; it is set on the first message.
    """

    id: str
    tokens: list[int]
    logprobs: list[TokenLogprob] | None = None
    memory_version: int | None = None


class Decoded(Message, frozen=True):
    """A step's tokens, the n-th that of generation ``ids[n]``: of those who have had a Tokens and want no logprobs."""

    ids: list[str]
    tokens: list[int]

    def each(self) -> list[Tokens]:
        """The same as messages of their own."""
        return [Tokens(id, [token]) for id, token in zip(self.ids, self.tokens, strict=True)]


class Timings(msgspec.Struct, frozen=True, omit_defaults=True):
    """Seconds: waiting in the queue (``load`` of it for the memory), until the first token, in all."""

    queue: float = 0.0
    load: float = 0.0
    first_token: float = 0.0
    total: float = 0.0


class Finished(Message, frozen=True):
    """The generation is over. ``reason``: ``stop`` (a stop token), ``length``, or ``cancelled``.

    ``stop_token`` is the token that ended it; it was not sent in ``Tokens``.
    """

    id: str
    reason: str
    memory_version: int
    prompt_tokens: int
    completion_tokens: int
    timings: Timings
    stop_token: int | None = None


class UpdateProgress(Message, frozen=True):
    """``done`` of ``total`` contexts are durable, the last as ``memory_version``."""

    id: str
    done: int
    total: int
    memory_version: int


class Updated(Message, frozen=True):
    """Every context is durable and published. ``replayed``: the idempotency key had done it before.

    ``surviving_share`` is the expected share of this update's memory tokens still in the pool when it ended
    (its own later blocks push out some of its earlier ones), by the closed form (1 - K/N)^t of the paper.
    """

    id: str
    memory_version: int
    blocks: int
    tokens: int
    surviving_share: float
    timings: Timings
    replayed: bool = False


class Scored(Message, frozen=True):
    """Per continuation token: its natural-log probability and the id of the model's own first choice."""

    id: str
    logprobs: list[float]
    greedy: list[int]
    memory_version: int


class TenantInfo(msgspec.Struct, frozen=True, tag=True):
    """``bytes`` in the store; ``tier`` is resident, warm or cold; times are Unix seconds.

    ``lineage`` counts rollbacks and rebuilds; with ``memory_version`` it names one content of the memory.
    """

    tenant: str
    seed: int
    memory_version: int
    created: float
    updated: float
    bytes: int
    tier: str
    lineage: int = 0


class TenantList(msgspec.Struct, frozen=True, tag=True):
    """``next``: pass it as ``after`` for the following page; None at the end. ``total`` tenants in all."""

    tenants: list[str]
    next: str | None
    total: int


class Erased(msgspec.Struct, frozen=True, tag=True):
    """The receipt: what was removed from the store, and how many open requests were failed.

    ``tiers`` are those that the pool was found in, of ``resident`` and ``warm``; what it left there is overwritten.
    """

    tenant: str
    memory_version: int
    blobs: int
    bytes: int
    cancelled: int
    tiers: list[str] = []


class Exported(msgspec.Struct, frozen=True, tag=True):
    """The file is whole: ``bytes`` of it, the memory as it was at ``memory_version``."""

    tenant: str
    memory_version: int
    bytes: int


class KeptText(msgspec.Struct, frozen=True):
    """The text of one update, or of one block where the update is not known: ``memory_version`` is its first.

    ``tokens`` it had when it was told.
    """

    memory_version: int
    tokens: int
    text: str


class Texts(msgspec.Struct, frozen=True, tag=True):
    """All that a memory was told and may still hold, oldest first. ``current``: by the model that is served."""

    tenant: str
    memory_version: int
    lineage: int
    current: bool
    texts: list[KeptText]


class MemoryView(msgspec.Struct, frozen=True, tag=True):
    """Which updates the pool holds. ``born[layer][rank]`` is the version that wrote the token at that rank.

    0 is the checkpoint's own pool. ``num_blocks`` x ``num_tokens`` ranks a layer, oldest first. ``born`` has
    one row if all layers share their draws, else one a layer.
    """

    tenant: str
    memory_version: int
    num_blocks: int
    num_tokens: int
    born: list[list[int]]


class HistoryItem(msgspec.Struct, frozen=True):
    """One committed block. ``surviving_share`` is counted in the pool, over all layers; ``text`` if kept."""

    memory_version: int
    time: float
    tokens: int
    text: str | None
    idempotency_key: str | None
    surviving_share: float


class History(msgspec.Struct, frozen=True, tag=True):
    tenant: str
    memory_version: int
    updates: list[HistoryItem]
    next: int | None


class Reply(Message, frozen=True):
    """The answer to a tenant request."""

    id: str
    body: TenantInfo | TenantList | Erased | Exported | Texts | MemoryView | History


class Failed(Message, frozen=True):
    """Request ``id`` ends in the error ``code`` of ``app.errors``; nothing it did not acknowledge happened."""

    id: str
    code: str
    message: str
    param: str | None = None
    retry_after: float | None = None


class Stats(Message, frozen=True):
    """The worker's heartbeat, about once a second and once when idle begins.

    ``gauges`` and ``counters`` are Prometheus names without the ``memoryllm_`` prefix, counters counted
    since the worker started. ``observations`` are histogram samples since the last heartbeat.
    """

    time: float
    gauges: dict[str, float]
    counters: dict[str, float]
    observations: dict[str, list[float]] = {}


class Fatal(Message, frozen=True):
    """The worker cannot start or go on (no such model, a store that is locked, ...) and exits."""

    message: str


Answer = (
    Fetching
    | Ready
    | Tokens
    | Decoded
    | Finished
    | UpdateProgress
    | Updated
    | Scored
    | Reply
    | Failed
    | Stats
    | Fatal
)

_encoder = msgspec.msgpack.Encoder()
_requests = msgspec.msgpack.Decoder(list[Request])
_answers = msgspec.msgpack.Decoder(list[Answer])


def encode(messages: list[Request] | list[Answer]) -> bytes:
    return _encoder.encode(messages)


def decode_requests(frame: bytes) -> list[Request]:
    """Raises msgspec.DecodeError on anything but a list of requests."""
    return _requests.decode(frame)


def decode_answers(frame: bytes) -> list[Answer]:
    """Raises msgspec.DecodeError on anything but a list of answers."""
    return _answers.decode(frame)
