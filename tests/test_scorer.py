"""Scoring in the background: hidden behind sampling, patient with failures, strict with nonsense."""

import asyncio
import json
import math
import threading
import time
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
from tiny_runs import colours, train_config

from qirl.config_sections import Scoring
from qirl.errors import UserError
from qirl.policy import trainer as training
from qirl.rewards.protocol import Sample
from qirl.rewards.scorer import Scorer, score

QUICK = Scoring(retries=2, backoff=0.01, timeout=0.3)


def samples(count: int, start: int = 0) -> list[Sample]:
    return [Sample(start + i, 0, "a 7", np.full((2, 2, 3), start + i, np.uint8)) for i in range(count)]


def brightness(group):
    return [{"light": float(s.image.mean() / 255)} for s in group]


def test_results_come_in_the_order_of_submission_whatever_finishes_first():
    def slow_first(group):
        time.sleep(0.2 if group[0].id == 0 else 0)
        return brightness(group)

    with Scorer([slow_first], Scoring(workers=4)) as scorer:
        for start in (0, 2, 4, 6):
            scorer.submit(samples(2, start))
        found, _ = scorer.collect()
    assert [row["light"] * 255 for row in found] == pytest.approx(list(range(8)))


def test_reward_time_is_hidden_behind_sampling():
    """One worker, reward time proportional to images and as long as the rollout, 8 micro-groups."""
    images, groups, each = 4, 8, 0.05

    def judge(group):
        time.sleep(each * len(group))
        return brightness(group)

    spent = []
    with Scorer([judge], Scoring(workers=1)) as scorer:
        for _ in range(3):
            begun = time.monotonic()
            for place in range(groups):
                time.sleep(each * images)  # the rollout of the next micro-group
                scorer.submit(samples(images, place * images))
            _, record = scorer.collect()
            spent.append(time.monotonic() - begun)
    longer = each * images * groups
    assert min(spent) <= 1.15 * longer, f"{spent} s against {longer:.3f} s"
    assert record["timing/reward_hidden"] > 0.8 and record["timing/reward_latency"] >= each * images


def test_a_training_step_costs_little_more_than_the_longer_of_rollout_and_reward(opened):
    """The same with a real rollout: 16 micro-groups, and a reward that takes as long as they do."""
    many = {"flow": {"rollout_tokens": 48, "steps": 24}, "policy": {"prompts": 16}}
    plain = opened(many)
    training.train_step(plain, 0)
    pace = min(training.train_step(plain, step)["time/rollout"] for step in (1, 2, 3)) / 48

    def judge(group):
        time.sleep(pace * len(group))
        return colours(group)

    trainer = opened(many, reward=judge)
    training.train_step(trainer, 0)
    records = [training.train_step(trainer, step) for step in (1, 2, 3, 4)]
    best = min((r["time/rollout"] + r["time/reward"]) / max(r["time/rollout"], 48 * pace) for r in records)
    assert best <= 1.15


def test_scores_of_a_run_do_not_depend_on_the_number_of_workers(tmp_path, tiny_model):
    found = []
    for workers in (1, 3):
        out = tmp_path / str(workers)
        parts = {"scoring": {"workers": workers}, "flow": {"rollout_tokens": 32}}
        training.train(train_config(out, tiny_model, parts), [colours], quiet=True)
        found.append((out / "scores.jsonl").read_bytes())
    assert found[0] == found[1]


def test_an_error_is_tried_again():
    calls = []

    def shaky(group):
        calls.append(len(group))
        if len(calls) < 3:
            raise ConnectionError("reset by peer")
        return brightness(group)

    with Scorer([shaky], QUICK) as scorer:
        scorer.submit(samples(2))
        found, record = scorer.collect()
    assert [set(row) for row in found] == [{"light"}] * 2 and not any(math.isnan(row["light"]) for row in found)
    assert (record["scoring/retries"], record["scoring/failed"], len(calls)) == (2, 0, 3)


def test_a_micro_group_that_never_succeeds_is_nan_and_never_zero():
    def picky(group):
        if group[0].id == 2:
            raise ValueError("no")
        return brightness(group)

    with Scorer([picky], QUICK) as scorer:
        for start in (0, 2, 4):
            scorer.submit(samples(2, start))
        found, record = scorer.collect()
    assert [math.isnan(row["light"]) for row in found] == [False, False, True, True, False, False]
    assert record["scoring/failed"] == 1


@pytest.mark.parametrize("kind", ["function", "coroutine"])
def test_a_reward_that_hangs_runs_out_of_time(kind):
    def hangs(group):
        time.sleep(5 if group[0].id else 0)
        return brightness(group)

    async def waits(group):
        await asyncio.sleep(5 if group[0].id else 0)
        return brightness(group)

    begun = time.monotonic()
    options = Scoring(timeout=0.1, retries=1, backoff=0.01)
    with Scorer([hangs if kind == "function" else waits], options) as scorer:
        for start in (0, 1):
            scorer.submit(samples(1, start))
        found, _ = scorer.collect()
    assert [math.isnan(row["light"]) for row in found] == [False, True]
    assert time.monotonic() - begun < 2


def test_a_reward_that_always_fails_is_named_with_its_error():
    def broken(group):
        raise RuntimeError("weights not found")

    with pytest.raises(UserError, match="broken failed on every call .RuntimeError: weights not found."):
        score([broken], samples(2), QUICK)


def test_nonsense_is_not_tried_again():
    calls = []

    def wrong(group):
        calls.append(1)
        return [{"light": "bright"} for _ in group]

    with pytest.raises(UserError, match="light='bright' is no number"):
        score([wrong], samples(2), QUICK)
    assert len(calls) == 1


def test_a_step_goes_on_without_the_samples_that_failed(opened):
    def picky(group):
        if any(s.id % 12 == 0 for s in group):
            raise OSError("judge is away")
        return colours(group)

    parts = {"scoring": {"retries": 0}, "flow": {"rollout_tokens": 16}, "advantage": {"max_failed": 0.5}}
    record = training.train_step(opened(parts, reward=picky), 0)
    assert record["scoring/failed"] == 1 and record["dropped_samples"] == 1 and record["valid_samples"] == 11


def test_a_remote_judge_is_asked_over_http_while_others_wait():
    together, busy = [], threading.Semaphore(100)

    class Judge(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with busy:
                together.append(100 - busy._value)
                time.sleep(0.1)
            answer = json.dumps([value / 255 for value in body]).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Judge)
    threading.Thread(target=server.serve_forever, daemon=True).start()

    def remote(group):
        body = json.dumps([int(s.image[0, 0, 0]) for s in group]).encode()
        request = urllib.request.Request(f"http://127.0.0.1:{server.server_port}", body)
        return [{"light": value} for value in json.load(urllib.request.urlopen(request))]

    with Scorer([remote], Scoring(workers=4)) as scorer:
        for start in range(0, 16, 2):
            scorer.submit(samples(2, start))
        found, _ = scorer.collect()
    server.shutdown()
    assert [row["light"] * 255 for row in found] == pytest.approx(list(range(16)))
    assert 1 < max(together) <= 4
