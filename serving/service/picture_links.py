"""Pictures that clients fetch by an address, which is signed and expires.

An address names the hour after which its file is deleted, so that whole folders go at a time, and no listing
of single files is needed.
"""

import hashlib
import hmac
import logging
import time
from collections.abc import Callable
from datetime import UTC, datetime
from functools import cached_property

from cluster.storage import Storage
from serving.encoding import Format
from serving.schemas import APIError

PATH = "v1/pictures"
HOUR = "%Y%m%d%H"
LATE = 3600  # seconds by which a folder outlives its last address

log = logging.getLogger("ray.serve")


class PictureLinks:
    """Store of pictures with signed addresses. Methods block, and may be called from any thread.

    Args:
        folder: holds one folder per hour of expiry.
        secret: returns the key of the signatures; called once.
        minutes: how long an address is valid.
        clock: time in seconds since 1970.
    """

    def __init__(
        self,
        folder: Storage,
        secret: Callable[[], bytes],
        minutes: float,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.folder, self.minutes = folder, minutes
        self._make_secret, self._clock = secret, clock

    @cached_property
    def _secret(self) -> bytes:
        return self._make_secret()

    def store(self, image_id: str, file: bytes, kind: Format) -> str:
        """Store a picture, and return its address below that of the application.

        Raises:
            APIError: 503, it cannot be stored.
        """
        expires = int(self._clock() + 60 * self.minutes)
        name = f"{datetime.fromtimestamp(expires, UTC):{HOUR}}/{image_id}.{kind}"
        address = f"{PATH}/{name}?expires={expires}&signature={self._signature(name, expires)}"
        try:
            self.folder.write_bytes(name, file)
        except OSError as error:
            log.error("a picture was not stored for its address: %s", error)
            message = "the picture cannot be stored; send response_format b64_json, or try again later"
            raise APIError(503, message, code="storage_unavailable") from error
        return address

    def read(self, name: str, expires: int, signature: str) -> bytes:
        """Return the file of an address.

        Raises:
            APIError: 404, there is none; 410, the address has expired; 503, the storage does not answer.
        """
        if not hmac.compare_digest(signature.encode(), self._signature(name, expires).encode()):
            raise _missing(404, "no picture has this address; copy it whole")
        if self._clock() >= expires:
            reason = f"the address has expired: it was valid for {self.minutes:g} minutes"
            raise _missing(410, f"{reason}; request the picture again")
        try:
            return self.folder.read_bytes(name)
        except FileNotFoundError:
            raise _missing(404, "the picture is no longer stored; request it again") from None
        except OSError as error:
            log.error("a stored picture was not read: %s", error)
            raise APIError(
                503, "the picture cannot be read; try again", code="storage_unavailable"
            ) from error

    def delete_expired(self) -> None:
        """Delete the pictures whose addresses have all expired."""
        before = f"{datetime.fromtimestamp(self._clock() - LATE, UTC):{HOUR}}"
        for hour in self.folder.folders():
            if len(hour) == len(before) and hour.isdecimal() and hour < before:
                self.folder.delete(hour)

    def _signature(self, name: str, expires: int) -> str:
        return hmac.new(self._secret, f"{name} {expires}".encode(), hashlib.sha256).hexdigest()


def _missing(status: int, message: str) -> APIError:
    return APIError(status, message, code="picture_not_found" if status == 404 else "picture_expired")
