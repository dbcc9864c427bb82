"""What a scrape answers, in the format that the scraper asks for.

The formats are the library's business, yet it takes some 6 us for each sample, and a large policy has twenty thousand
of them. So the library writes the text of the counters once, with holes (`counted`); a scrape cuts it there and fills in
the values. What is not a counter of workers or kernel is little, and the library writes it each time.
"""

from __future__ import annotations

import gzip
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain

from prometheus_client import CollectorRegistry, PlatformCollector, ProcessCollector
from prometheus_client.core import Metric
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from gatekeeper.observer.collector import ServiceCollector
from gatekeeper.observer.counted import Holes, Layout, read
from gatekeeper.observer.state import Service
from gatekeeper.snapshot.bindings import Bindings

IN_A_HOLE = " NaN\n"  # so the library writes a value that is none; a label's value cannot hold it
END = "# EOF\n"  # what OpenMetrics ends with
FORMATS = 4  # whose text is kept; scrapers ask for one or two, strangers may ask for any number
PLAIN_BELOW = 1e6  # where Python and Go write floats alike


class Others(Collector):
    """What is not counted in slots."""

    def __init__(self, service: ServiceCollector) -> None:
        self._service = service

    def collect(self) -> Iterator[Metric]:
        """Yield the families."""
        return self._service.others()


class Exposition:
    """Writes metrics of a `Service` and of the observer's own process. Not for two threads at once."""

    def __init__(self, service: Service, lost: Callable[[], Sequence[tuple[str, int]]]) -> None:
        self._service = service
        collector = ServiceCollector(service, lost)
        self._all = make_registry(collector)
        self._others = make_registry(Others(collector))
        self._names = Bindings()
        self._kernel = False
        self._cells: list[int] = []
        self._texts: dict[str, list[str]] = {}  # content type -> what stands between the holes, for these names

    def answer(self, accept: str, encodings: str, wanted: Iterable[str]) -> tuple[bytes, str, str]:
        """Return body, content type and content encoding of a scrape, as its headers ask for them; ``wanted``: only these names."""
        try:
            encoder, content_type = choose_encoder(accept)
        except TypeError:  # a version that is no number
            encoder, content_type = choose_encoder("")
        names = list(wanted)
        if names:
            body = encoder(self._all.restricted_registry(names))
        else:
            body = self._counted(encoder, content_type) + encoder(self._others)
        if any(part.split(";")[0].strip().lower() == "gzip" for part in encodings.split(",")):
            return gzip.compress(body, compresslevel=1, mtime=0), content_type, "gzip"
        return body, content_type, ""

    def _counted(self, encoder: Callable[[Collector], bytes], content_type: str) -> bytes:
        service = self._service.frozen()
        names, totals = service.bindings, service.totals()
        self._forget_other_names(names, kernel=service.kernel is not None)
        between = self._texts.get(content_type)
        if between is None:
            layout = Layout(names, kernel=self._kernel)
            between = encoder(Holes(layout.families)).decode().removesuffix(END).split(IN_A_HOLE)
            if len(between) != len(layout.cells) + 1:  # another library, which writes other holes
                return encoder(Holes(layout.filled(totals))).removesuffix(END.encode())
            if len(self._texts) >= FORMATS:
                self._texts.clear()
            self._texts[content_type] = between
            self._cells = layout.cells
        return fill(between, read(names, totals, self._cells)).encode()

    def _forget_other_names(self, names: Bindings, *, kernel: bool) -> None:
        """Keep the texts only if these names call for the same samples; a reload rarely brings new ones."""
        ours = self._names
        if names is not ours and (names.listeners != ours.listeners or names.verdicts != ours.verdicts):
            self._texts.clear()
        if kernel != self._kernel:
            self._texts.clear()
        self._names, self._kernel = names, kernel


def make_registry(collector: Collector) -> CollectorRegistry:
    """Return a registry of this and of the observer's own process."""
    registry = CollectorRegistry(auto_describe=True)  # so that scrapes can ask for some names only
    registry.register(collector)
    ProcessCollector(registry=registry)
    PlatformCollector(registry=registry)
    return registry


def fill(between: Sequence[str], values: Iterable[float]) -> str:
    """Return the text with values in its holes, each at the end of a line, written as Prometheus does."""
    go = floatToGoString
    shown = [f" {float(value)!r}\n" if value < PLAIN_BELOW else f" {go(value)}\n" for value in values]  # type: ignore[no-untyped-call]
    return "".join(chain.from_iterable(zip(between, shown, strict=False))) + between[-1]
