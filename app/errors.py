"""Every error the service can answer with: a code, an HTTP status, a type, and nothing of what was sent.

The shape on the wire is OpenAI's ``{"error": {"message", "type", "code", "param"}}``; it is built in
``app.api.errors`` from these classes. Messages are written for the caller and never repeat his text.
"""

from __future__ import annotations

SHUT_DOWN = (
    "the server shut down while this was waiting or under way; of an update the blocks that are durable stay, and a "
    "retry with its idempotency key goes on behind them"
)


class ServiceError(Exception):
    """An error with a stable ``code`` that crosses from the worker to the API and from there to the caller.

    Attributes: ``status`` HTTP status; ``type`` OpenAI's error type; ``code`` a stable word a program can
    test for; ``param`` the request field at fault; ``retry_after`` seconds after which a retry may help.
    ``serious``: who runs the server should see it in the log; neither the caller is at fault nor will it pass.
    """

    status = 500
    type = "server_error"
    code = "internal_error"

    def __init__(self, message: str, *, param: str | None = None, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.retry_after = retry_after

    @property
    def serious(self) -> bool:
        # the worker is away or has too much to do; the caller named the deadline
        return self.status >= 500 and self.status not in (503, 504)


class InvalidRequest(ServiceError):
    status, type, code = 422, "invalid_request_error", "invalid_request"


class MalformedBody(ServiceError):
    status, type, code = 400, "invalid_request_error", "malformed_body"


class MalformedRequest(ServiceError):
    """What came is no HTTP."""

    status, type, code = 400, "invalid_request_error", "malformed_request"


class HeadersTooLarge(ServiceError):
    status, type, code = 431, "invalid_request_error", "headers_too_large"


class BodyTooLarge(ServiceError):
    status, type, code = 413, "invalid_request_error", "body_too_large"


class UnsupportedMediaType(ServiceError):
    status, type, code = 415, "invalid_request_error", "unsupported_media_type"


class ContextTooShort(InvalidRequest):
    code = "context_too_short"


class TooManyTokens(InvalidRequest):
    code = "too_many_tokens"


class ContextLengthExceeded(ServiceError):
    """``TooManyTokens`` of a prompt, as OpenAI's protocol tells it: clients look for this code, and for the first words
    of the message, to shorten the conversation."""

    status, type, code = 400, "invalid_request_error", "context_length_exceeded"


class NoTokenizer(InvalidRequest):
    code = "no_tokenizer"


class InvalidMemoryFile(InvalidRequest):
    """An imported file is no memory of this model, or is damaged."""

    code = "invalid_memory_file"


class Unauthorized(ServiceError):
    """No API key, or none that this server knows."""

    status, type, code = 401, "authentication_error", "invalid_api_key"


class Forbidden(ServiceError):
    """The API key is good, but not for this call."""

    status, type, code = 403, "permission_error", "forbidden"


class HostNotAllowed(Forbidden):
    """The request came under a name that may be a stranger's, to a server that asks nobody for a key."""

    code = "host_not_allowed"


class NotFound(ServiceError):
    """There is no such route."""

    status, type, code = 404, "not_found_error", "not_found"


class MethodNotAllowed(ServiceError):
    """The route does not take this method."""

    status, type, code = 405, "invalid_request_error", "method_not_allowed"


class TenantNotFound(ServiceError):
    status, type, code = 404, "not_found_error", "tenant_not_found"


class ModelNotFound(ServiceError):
    """A request in OpenAI's protocol names a model that is not the served one."""

    status, type, code = 404, "not_found_error", "model_not_found"


class TenantExists(ServiceError):
    status, type, code = 409, "conflict_error", "tenant_exists"


class TenantErased(ServiceError):
    """The tenant was erased while the request was queued or running."""

    status, type, code = 409, "conflict_error", "tenant_erased"


class IdempotencyConflict(ServiceError):
    """The idempotency key was used before with another text."""

    status, type, code = 409, "conflict_error", "idempotency_conflict"


class VersionConflict(ServiceError):
    """Another writer committed this tenant's next version first."""

    status, type, code = 409, "conflict_error", "version_conflict"


class VersionNotKept(ServiceError):
    """The store no longer holds this version of the memory, or never did."""

    status, type, code = 404, "not_found_error", "version_not_kept"


class TextsNotKept(ServiceError):
    """A rebuild needs the texts of the updates, and the store does not have them."""

    status, type, code = 409, "conflict_error", "texts_not_kept"


class TenantQuarantined(ServiceError):
    """A committed blob of this tenant is damaged; nobody else is affected.

    ``file`` is the name that the store has given to what is damaged, for the log: no answer has it.
    """

    status, type, code = 409, "conflict_error", "tenant_quarantined"
    serious = True

    def __init__(
        self,
        message: str,
        *,
        param: str | None = None,
        retry_after: float | None = None,
        file: str | None = None,
    ) -> None:
        super().__init__(message, param=param, retry_after=retry_after)
        self.file = file


class FingerprintMismatch(ServiceError):
    """The stored pool was written with other weights or another config."""

    status, type, code = 409, "conflict_error", "model_mismatch"


class TenantBusy(ServiceError):
    """This tenant's own queue is full."""

    status, type, code = 429, "rate_limit_error", "tenant_queue_full"


class QuotaExceeded(ServiceError):
    """A limit set for this tenant (updates a day, bytes, requests at once) is reached."""

    status, type, code = 429, "rate_limit_error", "quota_exceeded"


class ServerBusy(ServiceError):
    """The server as a whole has too much under way, whoever asks.

    503 and not 429, which says that whoever asks does so too often: by the status a tenant can tell whether the limit
    is its own (``TenantBusy``, ``QuotaExceeded``), and what balances load whether another server may have room.
    """

    status, type, code = 503, "overloaded_error", "server_overloaded"


class WorkerUnavailable(ServiceError):
    """The worker is starting, has died, or is draining; nothing acknowledged is lost."""

    status, type, code = 503, "overloaded_error", "worker_unavailable"


class RequestCrashed(ServiceError):
    """The worker ended twice with this request in it; it is not tried again."""

    code = "request_crashed"


class ClientTooSlow(ServiceError):
    """The client does not read its stream as fast as it is made; what it has got stands."""

    status, type, code = 408, "timeout_error", "client_too_slow"


class RequestTooSlow(ServiceError):
    """The request does not come in as fast as it has to. Its connection is closed: the rest of it may yet come."""

    status, type, code = 408, "timeout_error", "request_too_slow"


class TenantElsewhere(ServiceError):
    """Another server on the same store is at work for this tenant."""

    status, type, code = 503, "overloaded_error", "tenant_elsewhere"


class DeadlineExceeded(ServiceError):
    status, type, code = 504, "timeout_error", "deadline_exceeded"


FULL_SECONDS = 30.0
"""After which asking again may help where a disk is full: somebody has to make room, and nobody knows when."""


class StoreFull(ServiceError):
    """No room left in the store: updates are refused, reading goes on."""

    status, type, code = 507, "server_error", "store_full"


class StoreFailed(ServiceError):
    status, type, code = 500, "server_error", "store_failed"


def _subclasses(cls: type[ServiceError]) -> list[type[ServiceError]]:
    return [cls, *(s for c in cls.__subclasses__() for s in _subclasses(c))]


BY_CODE: dict[str, type[ServiceError]] = {cls.code: cls for cls in _subclasses(ServiceError)}


def from_code(
    code: str, message: str, *, param: str | None = None, retry_after: float | None = None
) -> ServiceError:
    """The error that ``code`` names, as the other process raised it; an unknown code is an internal error."""
    return BY_CODE.get(code, ServiceError)(message, param=param, retry_after=retry_after)
