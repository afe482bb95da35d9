"""Ten times the load that the server can bear: who is accepted waits a bounded time, the rest is told when to return.

The bound. A prediction is accepted while the rows before it fit the queue (``queue_rows``) and its expected wait is
at most ``max_wait_s``; so at most Q = ``queue_rows`` rows are before it, besides those that compute or are decoded, and
its latency is at most (Q + some batches) / (rows per second). Tested as a ratio, so that it holds on a machine of any
speed: with r rows a request, fewer than (Q + BATCHES batches) / r others are answered between the arrival of a request
and its answer (99 of 100), and in time p99 <= SLACK * t * Q / r, with t the time per answer in the slowest moment of
the same load. An adaptation has at most ``adapt_queue`` others before it: likewise.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch

from moe.backbones import build_classifier, classifier_to_student
from moe.specs import BackboneSpec
from serve.config import ServeConfig
from serve.loading import Network, Parts, write_bundle
from tests.serve.http_support import npy
from tests.serve.load import Outcome, drive, message
from tests.serve.serving import ROOT, Serving
from tests.support.ports import free_port
from workers.modelfile import MODEL_FILE, model_meta, save_tensors

ROWS, SIDE = 32, 28  # of one prediction
SUPPORT = 16  # images of one adaptation
CLIENTS = 8  # who measure the capacity
TIMES = 10
SLACK = 2.0  # the generator, the adaptations and the predictions share two cores
BATCHES = 8  # computing, being decoded, in the sockets
BATCH_ROWS, ADAPT_QUEUE = (ServeConfig.model_fields[name].default for name in ("batch_rows", "adapt_queue"))
QUEUE_ROWS = ServeConfig.model_fields["queue_rows"].default


@pytest.fixture(scope="module")
def heavy(tmp_path_factory):
    """A model whose forward pass outweighs everything around it; untrained, since only time matters here."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("heavy")
    backbone = BackboneSpec(name="tiny_cnn", channels=1, width=96)
    classifier = build_classifier(backbone, 10)
    meta = {**model_meta("student", backbone, 10, list(classifier.parameters())[-2].shape[1], "rotated14")}
    save_tensors(folder / "parts" / MODEL_FILE, classifier_to_student(backbone, classifier.state_dict()))
    write_bundle(Parts("heavy", "0" * 64, Network(folder / "parts", {**meta, "image_size": SIDE})), folder / "bundle")
    return folder / "bundle"


def predictions(state: str = "") -> list[bytes]:
    images = np.random.default_rng(0).integers(0, 256, (ROWS, SIDE, SIDE, 1), dtype=np.uint8)
    tensor = {"name": "image", "shape": list(images.shape), "datatype": "UINT8"}
    tensor["parameters"] = {"binary_data_size": images.nbytes}
    asked = {"inputs": [tensor], "outputs": [{"name": "logits", "parameters": {"binary_data": True}}]}
    head = json.dumps(asked).encode()
    headers = {"Inference_Header_Content_Length": str(len(head)), "Content_Type": "application/octet-stream"}
    version = f"/versions/{state}" if state else ""
    return [message("POST", f"/v2/models/heavy{version}/infer", head + images.tobytes(), **headers)]


def adaptations(names: int = 20) -> list[bytes]:
    images = np.random.default_rng(1).integers(0, 256, (SUPPORT, SIDE, SIDE, 1), dtype=np.uint8)
    headers = {"Content_Type": "application/x-npy"}
    return [message("POST", f"/v1/states/s{n}?method=bn&wait=true", npy(images), **headers) for n in range(names)]


class Sampler:
    """Resident bytes of processes, five times a second, until it is stopped."""

    def __init__(self, measure):
        self.measure, self.bytes, self._stop = measure, [], None

    def __enter__(self):
        self._stop = threading.Event()

        def sample():
            while not self._stop.wait(0.2):
                self.bytes.append(self.measure())

        self._thread = threading.Thread(target=sample, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._stop.set()
        self._thread.join()

    @property
    def growth(self) -> int:
        """From the level of the second quarter, when everything was used once, to that of the last.

        By the smaller of the two steps: what is lost is lost all the time, while the many requests that a pause of
        the machine leaves in the sockets are held at the same time once.
        """
        _, second, third, last = (float(np.median(part)) for part in np.array_split(self.bytes, 4))
        return int(2 * min(third - second, last - third))

    @property
    def levels(self) -> str:
        """At the beginning, in the middle, at the end."""
        chosen = (self.bytes[0], self.bytes[len(self.bytes) // 2], self.bytes[-1])
        return " -> ".join(f"{count / 1e6:.0f}" for count in chosen) + " MB"


def told(outcome: Outcome, name: str, seconds: float) -> str:
    kept = outcome.accepted
    return (
        f"{name}: offered {len(outcome.shots) / seconds:.1f}/s, accepted {len(kept) / seconds:.1f}/s, "
        f"p50 {outcome.quantile(0.5):.3f} s, p99 {outcome.quantile(0.99):.3f} s, "
        f"answers {outcome.statuses}, generator late by {outcome.late():.3f} s"
    )


def meanwhile(outcome: Outcome, share: float = 0.99) -> float:
    """How many others were accepted and answered while an accepted request waited in the server's queue.

    From when somebody who was sent later had an answer, mostly a refusal, which comes at once: a server that the
    machine holds up finds many requests in its sockets, and those are not in its queue.
    """
    shots = sorted(outcome.shots, key=lambda shot: shot.sent)
    until = np.array([shot.due + shot.seconds for shot in shots])
    begun = np.minimum.accumulate(until[::-1])[::-1]
    taken = np.array([shot.status == 200 for shot in shots])
    ends = np.sort(until[taken])
    return float(np.quantile(np.searchsorted(ends, until[taken]) - np.searchsorted(ends, begun[taken]), share))


def slowest(outcome: Outcome, window: int = 20) -> float:
    """Seconds per answer while it went slowest, over ``window`` accepted ones."""
    ends = np.sort([shot.due + shot.seconds for shot in outcome.accepted])
    window = min(window, len(ends) - 1)
    return float(np.max(ends[window:] - ends[:-window])) / window


def usual(outcome: Outcome) -> float:
    """Seconds per answer of clients that wait for each: a pause of the machine is in few of the windows."""
    ends = np.sort([shot.due + shot.seconds for shot in outcome.accepted])
    window = min(CLIENTS, len(ends) - 1)
    return float(np.median(ends[window:] - ends[:-window])) / window


def bounded(outcome: Outcome, ahead: float) -> str:
    """Assert that at most ``ahead`` requests were before each, in numbers and in time."""
    before, pace, p99 = meanwhile(outcome), slowest(outcome), outcome.quantile(0.99)
    assert before <= ahead, (before, ahead)
    assert p99 <= SLACK * pace * ahead, (p99, pace, ahead)
    in_time = f"p99 {p99:.2f} s of at most {SLACK * pace * ahead:.2f} s"
    return f"answered meanwhile {before:.0f} of at most {ahead:.0f}; {in_time}"


def honest(outcome: Outcome) -> None:
    """Everything was answered: accepted, or refused with a time to come back."""
    assert set(outcome.statuses) <= {200, 429, 503}, outcome.statuses
    assert all(shot.retry_after >= 1 for shot in outcome.shots if shot.status != 200)


def offered(outcome: Outcome) -> None:
    """Assert that it was an overload, whatever the machine did between measuring the capacity and this."""
    assert len(outcome.shots) >= 3 * len(outcome.accepted), "The generator cannot offer this load."


def recovery(port: int, folder: Path, normal: float, loaded: float) -> float:
    """Seconds after the load until the median of a lone client's next five requests is back at twice the normal.

    Or at half of that under the load: where the machine became slower meanwhile, a queue that stayed shows anyway.
    """
    begin, enough = time.monotonic(), max(2 * normal, loaded / 2)
    while True:
        since = time.monotonic() - begin
        after = drive(port, folder, {"predict": predictions()}, {}, 3, clients=1).shots
        assert all(shot.status == 200 for shot in after[-5:])
        for first in range(len(after) - 4):
            if statistics.median(shot.seconds for shot in after[first : first + 5]) <= enough:
                return since + after[first].due
        assert since < 60, f"Not back at {enough:.3f} s: {after[-5:]}"


def storm(port: int, folder: Path, seconds: float, memory, busy, queue_rows: int = QUEUE_ROWS) -> None:
    """Predictions only: measure, overload, watch, measure again."""
    asked = {"predict": predictions()}
    alone = drive(port, folder, asked, {}, 3 if seconds > 20 else 1, clients=1)
    unloaded = alone.quantile(0.5)
    used = [busy()]
    full = drive(port, folder, asked, {}, 6 if seconds > 20 else 3, clients=CLIENTS)
    used.append(busy())
    capacity = 1 / usual(full)
    with Sampler(memory) as sampler:
        loaded = drive(port, folder, asked, {"predict": TIMES * capacity}, seconds)
    used.append(busy())
    # Answers per processor second, which other processes and pauses of the machine do not change.
    useful = len(loaded.accepted) / (used[2] - used[1]) / (len(full.accepted) / (used[1] - used[0]))
    back = recovery(port, folder, unloaded, loaded.quantile(0.5))
    print(f"\nalone p50 {unloaded:.4f} s p99 {alone.quantile(0.99):.4f} s; capacity {capacity:.1f}/s")
    print(told(loaded, "predictions", seconds))
    print(f"p99 / alone {loaded.quantile(0.99) / unloaded:.1f}; memory {sampler.levels}; back after {back:.2f} s")
    print(f"answers per processor second: {useful:.2f} of those at capacity")
    honest(loaded)
    offered(loaded)
    assert useful >= 0.3, "Work is thrown away instead of done."
    print(bounded(loaded, (queue_rows + BATCHES * BATCH_ROWS) / ROWS))
    assert sampler.growth < 32 << 20, sampler.levels


@contextmanager
def bare(model: Path, folder: Path, queue_rows: int):
    """The same surface in one process without Ray: a port, and ways to see its memory and its processor seconds."""
    port = free_port()
    command = [sys.executable, "-m", "tests.serve.test_overload", str(model), str(folder), str(port), str(queue_rows)]
    process = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        assert process.stdout.readline()
        seen = psutil.Process(process.pid)
        yield port, lambda: seen.memory_info().rss, lambda: sum(seen.cpu_times()[:2])
        assert process.poll() is None
    finally:
        process.kill()
        process.wait()


def test_ten_times_the_capacity(heavy, tmp_path):
    """Nine seconds, one process; the real thing is below."""
    with bare(heavy, tmp_path / "states", 8 * ROWS) as (port, memory, busy):
        storm(port, tmp_path / "load", 5, memory, busy, 8 * ROWS)


@pytest.mark.slow
@pytest.mark.timeout(1200)
class TestMoepipeServe:
    """A minute against ``moepipe serve``."""

    SECONDS = 60

    @pytest.fixture(scope="class")
    def server(self, heavy, tmp_path_factory):
        with Serving(heavy, tmp_path_factory.mktemp("serving")) as found:
            yield found

    def test_predictions(self, server, tmp_path):
        pids = [process.pid for process in server.replicas("inference")]
        storm(server.port, tmp_path, self.SECONDS, server.memory, server.busy)
        assert [process.pid for process in server.replicas("inference")] == pids, "A replica died."

    def test_predictions_and_adaptations(self, server, tmp_path):
        pids = sorted(process.pid for name in ("inference", "adaptation") for process in server.replicas(name))
        kinds = {"predict": predictions(), "adapt": adaptations()}
        single = {kind: drive(server.port, tmp_path, {kind: kinds[kind]}, {}, 4, clients=1) for kind in kinds}
        most = {
            kind: 1 / usual(drive(server.port, tmp_path, {kind: kinds[kind]}, {}, 6, clients=CLIENTS)) for kind in kinds
        }
        rates = {kind: TIMES * rate / 2 for kind, rate in most.items()}  # together ten times
        with Sampler(server.memory) as sampler:
            loaded = drive(server.port, tmp_path, kinds, rates, self.SECONDS)
        loaded_for = loaded.of("predict").quantile(0.5)
        back = recovery(server.port, tmp_path, single["predict"].quantile(0.5), loaded_for)
        print()
        for kind in kinds:
            print(f"{kind}: alone p50 {single[kind].quantile(0.5):.4f} s, capacity {most[kind]:.1f}/s")
            print(told(loaded.of(kind), kind, self.SECONDS))
        print(f"memory {sampler.levels}, back after {back:.2f} s")
        honest(loaded)
        offered(loaded)
        predict, adapt = (loaded.of(kind) for kind in ("predict", "adapt"))
        print(bounded(predict, (QUEUE_ROWS + BATCHES * BATCH_ROWS) / ROWS))
        print(bounded(adapt, ADAPT_QUEUE + BATCHES))
        assert predict.accepted and adapt.accepted
        assert sampler.growth < 48 << 20, sampler.levels
        now = sorted(process.pid for name in ("inference", "adaptation") for process in server.replicas(name))
        assert now == pids, "A replica died."


def _serve(model: str, folder: str, port: str, queue_rows: str) -> None:
    from serve.batching import BatchLimits
    from serve.catalogue import Catalogue
    from serve.front import Front
    from serve.http.api import make_api
    from serve.local import LocalBackend
    from serve.model import ServedModel

    torch.set_num_threads(1)
    loaded = ServedModel.load(model)
    backend = LocalBackend(loaded, Catalogue(folder), batch=BatchLimits(queue_rows=int(queue_rows)))
    Front(make_api(backend), "127.0.0.1", int(port))
    print("ready", flush=True)
    sys.stdin.read()  # ends with whoever started this


if __name__ == "__main__":
    _serve(*sys.argv[1:])
