"""The scorer server and its client over loopback: faults, load, limits, fuzzing."""

import asyncio
import base64
import contextlib
import json
import math
import random
import resource
import socket
import threading
import time
from http.server import BaseHTTPRequestHandler

import httpx2
import numpy as np
import pytest
import uvicorn
from hypothesis import given, settings
from hypothesis import strategies as st
from openai_server import Server as Sockets
from tiny_runs import train_config

from qirl.config import load
from qirl.config_rewards import Serve, ServerOptions
from qirl.data.images import encode
from qirl.errors import UserError
from qirl.policy import trainer as training
from qirl.rewards.client import ServerReward
from qirl.rewards.protocol import NoisyScore, Sample, noise_of
from qirl.rewards.server.app import make_app
from qirl.rewards.server.batching import Batcher, Full
from qirl.rewards.server.wire import request_of, result, scores_of


def picture(number, size=8):
    """A picture that says its number, below 2**16."""
    image = np.zeros((size, size, 3), np.uint8)
    image[0, 0] = number % 256, number // 256, 7
    return image


def number_of(image):
    return int(image[0, 0, 0]) + 256 * int(image[0, 0, 1])


def numbers(samples):
    """The scores encode the sample."""
    return [{"low": float(s.image[0, 0, 0]) / 255, "high": float(s.image[0, 0, 1]) / 255} for s in samples]


numbers.components = ("low", "high")


def sources(samples):
    return [{"sources": len(s.sources) / 4} if s.sources else {} for s in samples]


def samples(count, **more):
    return [Sample(i, i // 4, f"number {i}", picture(i), **more) for i in range(count)]


class Running:
    """`make_app` on uvicorn in a thread, on a free port."""

    def __init__(self, *rewards, port=0, **options):
        self.options = Serve(port=port, **options)
        config = uvicorn.Config(make_app(list(rewards), self.options), host="127.0.0.1", port=port, log_level="error")
        self.server = uvicorn.Server(config)
        self.thread = threading.Thread(target=self.server.run, daemon=True)
        self.thread.start()
        while not self.server.started:
            time.sleep(0.005)
        self.port = self.server.servers[0].sockets[0].getsockname()[1]
        self.address = f"http://127.0.0.1:{self.port}"

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.server.should_exit = True
        self.thread.join(10)


def client(*servers, **options):
    quick = dict(backoff=0.01, timeout=5.0, retries=3, batch=8)
    return ServerReward("r", ServerOptions(servers=tuple(s.address for s in servers), **quick | options))


def ask(reward, asked):
    return asyncio.run(reward(asked))


def exact(rows, asked):
    return all(
        row["low"] == (s.id % 256) / 255 and row["high"] == (s.id // 256) / 255
        for row, s in zip(rows, asked, strict=True)
    )


def test_scores_come_back_to_their_samples_whatever_the_order():
    asked = samples(300)
    random.Random(0).shuffle(asked)
    with Running(numbers, batch=7) as a, Running(numbers, sources) as b:
        reward = client(a, b, components=("low", "high"))
        assert reward.components == ("low", "high") and exact(ask(reward, asked), asked)


def test_edits_travel_with_their_sources_and_absent_components_stay_absent():
    own = samples(3) + samples(2, sources=(picture(1), picture(2)))
    with Running(sources) as server:
        assert ask(client(server, components=()), own) == [{}] * 3 + [{"sources": 0.5}] * 2


def test_a_reward_that_fails_fails_alone_and_says_why():
    def broken(given):
        raise RuntimeError("no weights")

    broken.components = ("broken",)
    with Running(numbers, broken) as server:
        answer = httpx2.post(f"{server.address}/v1/score", json=request_of(samples(2), [5, 9])).json()
        assert [r["id"] for r in answer["results"]] == [5, 9]
        assert answer["results"][1]["scores"] == {"low": 1 / 255, "high": 0.0, "broken": None}
        assert answer["results"][1]["errors"] == {"broken": "RuntimeError: no weights"}
        rows = ask(client(server), samples(2))
        assert all(math.isnan(row["broken"]) for row in rows) and rows[1]["low"] == 1 / 255
        shown = httpx2.get(f"{server.address}/metrics").text
        assert 'qirl_failures_total{component="broken"} 4.0' in shown and "qirl_samples_total 4.0" in shown


def test_the_cache_asks_once_for_the_same_content():
    calls = []

    def counted(given):
        calls.extend(s.prompt for s in given)
        return [{"c": 0.5} for _ in given]

    counted.components = ("c",)
    with Running(counted) as server:
        reward = client(server, cache=6)
        for _ in range(2):
            assert ask(reward, samples(5)) == [{"c": 0.5}] * 5
        assert len(calls) == 5
        ask(reward, [Sample(0, 0, "another prompt", picture(0))])
        assert len(calls) == 6 and len(reward._kept) == 6
        ask(reward, samples(9)[5:])
        assert len(reward._kept) == 6


# faults


class Faulty(Sockets):
    """The same answers over a bare socket, with faults taken from the front of a list."""

    def __init__(self, faults=(), hang=0.6, port=0, slow=0.0):
        super().__init__(None, port, faults)
        self.RequestHandlerClass, self.hang, self.slow, self.refuses = FaultyHandler, hang, slow, None
        self.address = f"http://127.0.0.1:{self.port}"


class FaultyHandler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_GET(self):
        self.answer(200, {"components": ["low", "high"], "read_noise": {"low": 0.01}})

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            self.server.requests.append(body)
            fault = self.server.faults.pop(0) if self.server.faults else None
        time.sleep(self.server.slow)
        results = []
        for own in body["samples"]:
            from qirl.rewards.server.wire import WireSample

            sample = WireSample(**own).sample(10_000)
            results.append(result(sample.id, numbers([sample])[0], {}))
        random.Random(len(self.server.requests)).shuffle(results)  # ids match, not places
        if fault == "hang":
            time.sleep(self.server.hang)
        refused = int(
            self.server.refuses is not None and any(s["prompt"] == self.server.refuses for s in body["samples"])
        )
        if fault in ("400", "500", "429", "503") or refused:
            fault = fault or "413"
            return self.answer(int(fault), {}, {"Retry-After": "0.01"})
        if fault == "count":
            results.pop()
        if fault == "ids":
            results[0]["id"] += 1000
        if fault == "twice" and len(results) > 1:
            results[0]["id"] = results[1]["id"]
        if fault == "infinite":
            results[0]["scores"]["low"] = float("inf")
        if fault == "text":
            results[0]["scores"]["low"] = "much"
        if fault == "nan":
            results[0]["scores"]["low"] = float("nan")
        return self.answer(200, {"results": results}, cut=fault == "truncated")

    def answer(self, status, value, headers=(), cut=False):
        data = json.dumps(value).encode()
        data = data[: len(data) // 2] if cut else data
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            for name, text in dict(headers).items():
                self.send_header(name, text)
            self.end_headers()
            self.wfile.write(data)


FAULTS = ["500", "503", "429", "hang", "truncated", "count", "ids", "twice", "infinite", "text", "nan"]


def test_no_fault_moves_a_score_to_another_sample():
    asked, draw = samples(400), random.Random(3)
    with Faulty([draw.choice([*FAULTS, None]) for _ in range(15)]) as bad, Faulty() as good:
        reward = client(bad, good, timeout=0.4, retries=8)
        assert reward.read_noise == {"low": 0.01}
        assert exact(ask(reward, asked), asked) and not bad.faults


@pytest.mark.parametrize("fault", FAULTS)
def test_a_server_that_always_fails_gives_nan_and_a_reason(fault):
    with Faulty([fault] * 100, hang=0.3) as server:
        reward = client(server, timeout=0.2, retries=1, batch=2)
        rows = ask(reward, samples(2))
    assert all(math.isnan(v) for row in rows for v in row.values()) and sum(reward.failures.values()) == 2


def test_a_restart_in_mid_step_is_waited_for():
    asked = samples(60)
    first = Faulty(slow=0.02)
    reward, again = client(first, batch=2, retries=8, backoff=0.1, concurrency=2), []

    def restart():
        while len(first.requests) < 8:
            time.sleep(0.005)
        first.__exit__()
        time.sleep(0.3)
        again.append(Faulty(port=first.port))

    thread = threading.Thread(target=restart)
    thread.start()
    try:
        assert exact(ask(reward, asked), asked)
        thread.join()
        assert again[0].requests
    finally:
        again[0].__exit__()


def run_config(folder, tiny_model, server, **advantage):
    reward = {"kind": "server", "servers": [server.address], "retries": 1, "backoff": 0.01, "timeout": 0.5, "batch": 4}
    return train_config(folder, tiny_model, {"rewards": {"r": reward}, "advantage": advantage})


def test_training_goes_on_through_faults_and_counts_what_failed(tmp_path, tiny_model):
    with Faulty(["500", None, "count", "hang", "500", "truncated", "nan", "ids"] * 3, hang=0.8) as server:
        training.train(run_config(tmp_path / "run", tiny_model, server, max_failed=1.0), quiet=True)
    rows = [json.loads(line) for line in (tmp_path / "run/scores.jsonl").read_text().splitlines()]
    assert 0 < sum(row["scores"]["low"] is None for row in rows) < len(rows)


def test_of_a_batch_that_is_refused_only_the_sample_to_blame_fails():
    with Faulty() as server:
        asked = samples(6)
        server.refuses = asked[4].prompt
        reward = client(server, batch=6)
        rows = ask(reward, asked)
    failed = [s.prompt for s, row in zip(asked, rows, strict=True) if all(map(math.isnan, row.values()))]
    assert failed == [s.prompt for s in asked if s.prompt == server.refuses] and len(failed) < 6
    assert "refused a request (413" in reward.refusal


def test_a_refused_request_ends_a_run_only_where_nothing_was_ever_scored(tmp_path, tiny_model):
    one = tmp_path / "run"
    with Faulty(["400"] * 1000) as server:  # the user's mistake: said at once, whatever max_failed is
        with pytest.raises(
            UserError,
            match="reward ServerReward of high, low has no score so far: .*refused a request \\(400.*check its options",
        ):
            training.train(run_config(one, tiny_model, server, max_failed=1.0), quiet=True)
    with Faulty() as server:
        config = run_config(one, tiny_model, server, max_failed=0.5)
        training.train(config.model_copy(update={"run": config.run.model_copy(update={"steps": 1})}), quiet=True)
    with Faulty(["400"] * 8) as server:  # of the continued run: the first thing that it meets
        training.train(run_config(one, tiny_model, server, max_failed=1.0), quiet=True)
    rows = [json.loads(line) for line in (one / "scores.jsonl").read_text().splitlines()]
    failed = [row["step"] for row in rows if row["scores"]["low"] is None]
    assert failed and set(failed) == {2}


def test_the_noise_of_a_reading_travels_with_its_score():
    def measured(given):
        return [{"m": NoisyScore(0.25, 0.01 * s.id), "plain": 0.5} for s in given]

    with Running(measured) as server:
        rows = ask(client(server), samples(3))
    assert [noise_of(row["m"]) for row in rows] == [0.01 * s.id for s in samples(3)]
    assert all(row["m"] == 0.25 and math.isnan(noise_of(row["plain"])) for row in rows)


def test_training_stops_cleanly_above_the_limit(tmp_path, tiny_model):
    with Faulty(["500"] * 10_000) as server:
        with pytest.raises(UserError, match="100% of the samples could not be scored"):
            training.train(run_config(tmp_path / "run", tiny_model, server, max_failed=0.2), quiet=True)


# load


def test_five_hundred_images_cost_little_and_memory_stays_bounded():
    """512 images of 64 x 64 with three components: client, server and queue together, beside a trivial scorer."""

    def three(given):
        return [{"a": 0.1, "b": float(s.image[0, 0, 0]) / 255, "c": 0.3} for s in given]

    three.components = ("a", "b", "c")
    draw = np.random.default_rng(0)
    asked = [Sample(i, i, "p", draw.integers(0, 255, (64, 64, 3), dtype=np.uint8)) for i in range(512)]
    with Running(three) as server:
        reward = client(server, batch=16, cache=0)
        ask(reward, asked[:16])
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        begun = time.perf_counter()
        rows = ask(reward, asked)
        spent = time.perf_counter() - begun
    assert [row["b"] for row in rows] == [float(s.image[0, 0, 0]) / 255 for s in asked]
    assert spent / 512 < 0.005, f"{spent / 512 * 1e3:.2f} ms an image"
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200 * 1024  # KiB


def test_requests_share_batches():
    sizes = []

    def sized(given):
        sizes.append(len(given))
        time.sleep(0.02)
        return [{"x": 0.0} for _ in given]

    with Running(sized, batch=32) as server:
        ask(client(server, batch=2, components=()), samples(64))
    assert sum(sizes) == 64 and max(sizes) > 8 and max(sizes) <= 32


def test_a_full_queue_says_when_to_come_again():
    async def run():
        begun = asyncio.Event()

        async def slow(given):
            begun.set()
            await asyncio.sleep(0.2)
            return [{"x": 0.0} for _ in given]

        batcher = Batcher([slow], 4, 0.0, 8, 5.0)
        first = [asyncio.create_task(batcher.score(samples(4))) for _ in range(2)]
        await begun.wait()
        with pytest.raises(Full) as caught:
            await batcher.score(samples(4))
        assert caught.value.seconds >= 1
        assert [len(own) for own in await asyncio.gather(*first)] == [4, 4]
        await batcher.close()

    asyncio.run(run())


def test_more_clients_than_the_queue_holds_are_all_served_in_the_end():
    def slow(given):
        time.sleep(0.002 * len(given))
        return numbers(given)

    slow.components = ("low", "high")
    asked = samples(96)
    with Running(slow, batch=4, queue=8) as server:
        assert exact(ask(client(server, batch=4, retries=30, concurrency=16), asked), asked)


# bad requests


def post(server, body, **more):
    return httpx2.post(
        f"{server.address}/v1/score", content=body if isinstance(body, bytes) else json.dumps(body), **more
    )


def one(**changes):
    return {"samples": [{"id": 1, "prompt": "p", "image": base64.b64encode(encode(picture(1))).decode()} | changes]}


JPEG = base64.b64encode(b"\xff\xd8\xff\xe0\x00\x10JFIF\x00" + bytes(64)).decode()


@pytest.mark.parametrize(
    "body,status,message",
    [
        (b"{", 400, "Invalid JSON"),
        (b"\x80\x04\x95pickle", 400, ""),
        ({"samples": []}, 400, "at least 1 item"),
        (one(id="1"), 400, "samples.0.id"),
        (one(extra=1), 400, "samples.0.extra"),
        (one(image="###"), 400, "is no base64"),
        (one(image=base64.b64encode(b"no image").decode()), 400, "is no image of format PNG, WEBP"),
        (one(image=JPEG), 400, "is no image of format PNG, WEBP"),
        (one(image=base64.b64encode(encode(picture(1, 40))[:600]).decode()), 400, "truncated or damaged"),
        (one(image=base64.b64encode(encode(picture(1, 101))).decode()), 400, "101 x 101 pixels"),
        (one(sources=["x"] * 17), 400, "at most 16 items"),
        ({"samples": one()["samples"] * 2}, 400, "the same id"),
        ({"samples": [one(id=i)["samples"][0] for i in range(9)]}, 413, "9 images in a request"),
        (one(prompt="x" * 90_000), 413, "longer than"),
    ],
)  # fmt: skip
def test_bad_requests_are_told_and_nothing_breaks(limited, body, status, message):
    answer = post(limited, body)
    assert answer.status_code == status and message in answer.json()["error"]
    assert post(limited, one()).status_code == 200


@pytest.fixture(scope="module")
def limited():
    with Running(numbers, max_pixels=10_000, max_images=8, max_body=80_000) as server:
        yield server


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
fields = st.sampled_from(["id", "prompt", "prompt_id", "category", "image", "sources", "metadata"])


@given(st.binary(max_size=200) | json_values.map(lambda v: json.dumps(v).encode()))
@settings(max_examples=80, deadline=None)
def test_fuzzed_bodies_are_refused_and_never_crash(limited, body):
    assert post(limited, body).status_code in (400, 413)


@given(fields, json_values)
@settings(max_examples=80, deadline=None)
def test_fuzzed_fields_are_scored_or_refused(limited, name, value):
    answer = post(limited, json.dumps(one(**{name: value})).encode())
    assert answer.status_code in (200, 400, 413)
    if answer.status_code == 200:
        assert all(0 <= v <= 1 for r in answer.json()["results"] for v in r["scores"].values())


@given(json_values)
@settings(max_examples=150, deadline=None)
def test_fuzzed_answers_are_no_scores(value):
    from qirl.rewards.remote import ServerError

    for answer in (value, {"results": value}, {"results": [value]}, {"results": [{"id": 0, "scores": value}]}):
        try:
            found = scores_of(answer, [0])
        except ServerError:
            continue
        assert not any(math.isinf(v) for v in found[0].values())


def test_a_public_address_needs_a_token(monkeypatch):
    rewards = {"rewards": {"n": {"kind": "python", "target": "test_scorer_server:numbers"}}}
    with pytest.raises(UserError, match="set serve.token_variable"):
        load("serve", rewards | {"serve": {"host": "0.0.0.0"}})
    monkeypatch.delenv("QIRL_SERVE_TOKEN", raising=False)
    with pytest.raises(UserError, match="QIRL_SERVE_TOKEN: this environment variable is not set"):
        make_app([numbers], Serve(host="0.0.0.0", token_variable="QIRL_SERVE_TOKEN"))


def test_without_its_token_nothing_is_told(monkeypatch):
    monkeypatch.setenv("QIRL_SERVE_TOKEN", "secret")
    with Running(numbers, token_variable="QIRL_SERVE_TOKEN") as server:
        assert post(server, one()).status_code == 401
        assert post(server, one(), headers={"Authorization": "Bearer secreT"}).status_code == 401
        assert httpx2.get(f"{server.address}/v1/components").status_code == 401
        assert httpx2.get(f"{server.address}/health/ready").status_code == 200
        with pytest.raises(UserError, match="does not answer"):
            client(server)
        assert ask(client(server, token_variable="QIRL_SERVE_TOKEN"), samples(1))[0]["low"] == 0


def test_a_missing_component_and_a_missing_server_are_told_at_the_start():
    with Running(numbers) as server:
        with pytest.raises(UserError, match="has no component 'beauty'; it has high, low"):
            client(server, components=("beauty",))
    with pytest.raises(UserError, match="does not answer"):
        client(server)


def test_what_is_under_way_is_finished_when_the_server_stops():
    begun = threading.Event()

    def slow(given):
        begun.set()
        time.sleep(0.4)
        return numbers(given)

    server = Running(slow)
    answers = []
    thread = threading.Thread(target=lambda: answers.append(post(server, one())))
    thread.start()
    begun.wait(5)
    server.__exit__()
    thread.join(5)
    assert answers[0].status_code == 200
    with pytest.raises(OSError):
        socket.create_connection(("127.0.0.1", server.port), timeout=0.5)
