"""From a service to a listening port, and back: what Ctrl-C does."""

from __future__ import annotations

import errno
import socket
from collections.abc import Callable

import uvicorn

from dither.errors import DitherError
from dither.serve.app import create_app
from dither.serve.service import Service

_GRACE = 5  # seconds that open connections have to end


def bind(host: str, port: int) -> socket.socket:
    """A socket on a free port (0: any). Raises DitherError where it is taken or the address is not of this machine."""
    try:
        family, kind, proto, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        found = socket.socket(family, kind, proto)
    except OSError as error:
        raise DitherError(f"--host {host}: is no address ({error.strerror or error})") from None
    try:
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a port whose last owner has just ended is free
        found.bind(address)
    except OSError as error:
        found.close()
        raise _no_port(host, port, error) from None
    return found


def _no_port(host: str, port: int, error: OSError) -> DitherError:
    if error.errno == errno.EADDRINUSE:
        return DitherError(f"port {port} of {host} is taken; choose another with --port, or 0 for any")
    return DitherError(f"cannot listen at port {port} of {host}: {error.strerror}")


class Server(uvicorn.Server):
    """Serves ``service`` on ``bound``. ``ready`` is called once it answers."""

    def __init__(self, service: Service, bound: socket.socket, *, api_key: str | None = None, ready: Callable[[], None] | None = None) -> None:
        super().__init__(uvicorn.Config(
            create_app(service, api_key), log_level="warning", access_log=False, server_header=False, lifespan="off",
            timeout_graceful_shutdown=_GRACE,
        ))  # fmt: skip
        self.service, self.bound, self.ready = service, bound, ready

    def serve_until_stopped(self) -> None:
        """Until SIGINT or SIGTERM, or until ``should_exit`` is set; a signal is raised again afterwards. Raises DitherError where the port was lost
        to another between `bind` and now."""
        try:
            self.run(sockets=[self.bound])
        except OSError as error:
            host, port = self.bound.getsockname()[:2]
            raise _no_port(host, port, error) from None
        finally:
            self.service.close()
            self.service.scheduler.join(_GRACE)
            self.bound.close()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        self.service.start()
        await super().startup(sockets)
        if self.started and self.ready is not None:
            self.ready()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Every stream gets its last event before connections are closed."""
        self.service.close()
        await super().shutdown(sockets)
