"""The live page of commands that run for long."""

import contextlib
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from fedproxy.cli.output import console
from fedproxy.errors import MissingExtraError

if TYPE_CHECKING:
    from fedproxy.deployment.address import Address

_log = logging.getLogger(__name__)


@contextlib.contextmanager
def live_page(run: Path, address: "Address | None" = None) -> Iterator[Callable[[], None]]:
    """Keep RUN/report.html up to date, and serve it if an address is given.

    Yields:
        To be called once the run directory is this process' own, and as often as one likes.

    Raises:
        UsageError: one cannot listen at the address.
        MissingExtraError: the page is to be served, and the extra `report` is not installed.
    """
    from fedproxy.reporting.live import LivePage

    try:
        page = LivePage(run)
    except MissingExtraError:
        if address is not None:
            raise
        yield lambda: None
        return
    with contextlib.ExitStack() as stack:
        if address is not None:
            from fedproxy.deployment.page import PageServer

            if not address.is_loopback:
                _log.warning("Whoever reaches %s can read the page: its clients' names, losses and settings.", address)
            server = PageServer(address, lambda: page.content)
            stack.callback(server.close)
            console().print(f"The page of the run: http://{server.address}/", soft_wrap=True)
        complete = False
        try:
            yield page.begin
            complete = (run / "results.json").is_file()
        finally:
            page.close(last=not complete)
