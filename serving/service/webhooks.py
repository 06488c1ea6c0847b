"""Announce the end of jobs at their clients' addresses, signed as Standard Webhooks are.

    webhook-signature: v1,base64(HMAC-SHA256(secret, "{webhook-id}.{webhook-timestamp}.{body}"))

(https://github.com/standard-webhooks/standard-webhooks; OpenAI's clients check it with `webhooks.unwrap`.) An
address is looked up once for each attempt, checked, and connected to as it was found, so that no name can
lead into the server's own network. Redirects are not followed.
"""

import asyncio
import base64
import hashlib
import hmac
import http.client
import ipaddress
import json
import logging
import socket
import ssl
import time
from collections.abc import Callable, Sequence
from functools import cached_property
from urllib.parse import SplitResult, urlsplit

from serving.schemas import APIError

TIMEOUT_S = 10.0
RETRIES_S = (0.0, 5.0, 60.0, 600.0, 3600.0)  # pauses before the attempts, in seconds
NAT64 = ipaddress.ip_network("64:ff9b::/96")  # addresses that stand for IPv4 ones

log = logging.getLogger("ray.serve")


class Webhooks:
    """Sender of webhooks.

    Args:
        secret: returns the key that all clients' secrets are made from; called once.
        allow_private: also send to addresses that are not public, on the server's own network.
        retries_s: pauses before the attempts, in seconds.
    """

    def __init__(
        self, secret: Callable[[], bytes], *, allow_private: bool, retries_s: Sequence[float] = RETRIES_S
    ) -> None:
        self._make_secret, self.allow_private, self.retries_s = secret, allow_private, retries_s

    @cached_property
    def _secret(self) -> bytes:
        return self._make_secret()

    def secret_of(self, key_id: str) -> str:
        """Return the secret of the client with an API key, in Standard Webhooks' form."""
        return f"whsec_{base64.b64encode(self._key_of(key_id)).decode()}"

    async def check(self, url: str) -> None:
        """Raise APIError 400 for an address that no webhook is sent to."""
        try:
            await asyncio.to_thread(self._resolved, urlsplit(url))
        except (OSError, ValueError) as error:
            reason = str(error) if isinstance(error, ValueError) else "its host was not found"
            message = f"webhook_url: {reason}; send a public http or https address"
            raise APIError(400, message, "webhook_url", "invalid_value") from None

    async def send(self, url: str, event_id: str, event: dict[str, object], key_id: str) -> bool:
        """Send an event until it is taken, with pauses; return False if all attempts fail."""
        body = json.dumps(event).encode()
        for attempt, pause in enumerate(self.retries_s, start=1):
            await asyncio.sleep(pause)
            try:
                status = await asyncio.to_thread(self._post, urlsplit(url), event_id, body, key_id)
            except (OSError, ValueError, http.client.HTTPException) as error:
                log.info("webhook %s: attempt %d failed: %s", event_id, attempt, type(error).__name__)
                continue
            if 200 <= status < 300:
                return True
            log.info("webhook %s: attempt %d was answered with %d", event_id, attempt, status)
            if status == 410:  # the receiver wants no more
                return False
        return False

    def headers(self, event_id: str, body: bytes, key_id: str, now: int) -> dict[str, str]:
        """Return the headers that sign a body."""
        content = f"{event_id}.{now}.".encode() + body
        signature = hmac.new(self._key_of(key_id), content, hashlib.sha256).digest()
        return {
            "content-type": "application/json",
            "webhook-id": event_id,
            "webhook-timestamp": str(now),
            "webhook-signature": f"v1,{base64.b64encode(signature).decode()}",
        }

    def _key_of(self, key_id: str) -> bytes:
        return hmac.new(self._secret, key_id.encode(), hashlib.sha256).digest()

    def _post(self, url: SplitResult, event_id: str, body: bytes, key_id: str) -> int:
        """Send one attempt, and return the status of its answer."""
        address, port = self._resolved(url)
        connected = socket.create_connection((address, port), TIMEOUT_S)
        try:
            if url.scheme == "https":
                context = ssl.create_default_context()
                connected = context.wrap_socket(connected, server_hostname=url.hostname)
            connection = http.client.HTTPConnection(url.hostname or "", port, timeout=TIMEOUT_S)
            connection.sock = connected
            path = f"{url.path or '/'}{'?' + url.query if url.query else ''}"
            headers = {"host": url.netloc, **self.headers(event_id, body, key_id, int(time.time()))}
            connection.request("POST", path, body, headers)
            return connection.getresponse().status
        finally:
            connected.close()

    def _resolved(self, url: SplitResult) -> tuple[str, int]:
        """Return the address and port to connect to.

        Raises:
            ValueError: nothing is sent to such an address; says why.
            OSError: the host was not found.
        """
        if url.scheme not in ("http", "https") or not url.hostname or url.username or url.password:
            raise ValueError("not an http or https address without user and password")
        port = url.port or (443 if url.scheme == "https" else 80)
        found = socket.getaddrinfo(url.hostname, port, type=socket.SOCK_STREAM)
        addresses = [str(entry[4][0]) for entry in found]
        if not self.allow_private and not all(map(is_public, addresses)):
            raise ValueError("it leads to a private address")
        return addresses[0], port


def is_public(address: str) -> bool:
    """Return whether an IP address belongs to the public internet, also the IPv4 address that it may hold."""
    found = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(found, ipaddress.IPv6Address):
        held = found.ipv4_mapped or found.sixtofour or (found.teredo or (None, None))[1]
        if found in NAT64:
            held = ipaddress.IPv4Address(int(found) & 0xFFFF_FFFF)
        if held is not None:
            return is_public(str(held))
    return found.is_global and not found.is_multicast
