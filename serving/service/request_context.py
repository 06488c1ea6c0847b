"""Facts about one HTTP request that the HTTP layers and the service share."""

from dataclasses import dataclass

ANONYMOUS = "anonymous"


@dataclass
class RequestContext:
    """Facts about a request, which each layer adds as it learns them; the log line and the metrics are made
    from them. None: not known.

    Attributes:
        key_id: id of the checked API key, or ANONYMOUS; None on public paths.
        model, version: the version that generates the images, both `base` for the bare base.
        alias: the version's alias, champion or candidate.
        n: number of images.
        reason: code of the error that was answered.
        base_url: address of the application, as the client reached it, with a slash at its end.
        stream_status: HTTP status of an error after a stream has begun with 200.
    """

    request_id: str | None = None
    key_id: str | None = None
    model: str | None = None
    version: int | str | None = None
    alias: str | None = None
    steps: int | None = None
    n: int | None = None
    reason: str | None = None
    prompt: str | None = None
    stream_status: int | None = None
    base_url: str = ""

    @property
    def key(self) -> str | None:
        """Id of the request's API key; None if it has none."""
        return None if self.key_id == ANONYMOUS else self.key_id

    @property
    def owner(self) -> str:
        """Id of the key under which the client's jobs are kept; ANONYMOUS without one."""
        return self.key_id or ANONYMOUS
