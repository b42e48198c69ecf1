"""A small server that speaks the part of the OpenAI protocol that judges use, as vLLM documents it, on a real socket.

    GET  /v1/models              {"data": [{"id": NAME}]}
    POST /v1/chat/completions    messages (images as data addresses), n=1, max_tokens, temperature, seed, stop, logprobs,
                                 top_logprobs, continue_final_message, add_generation_prompt
    -> {"choices": [{"message": {"content"}, "finish_reason": "stop" | "length", "logprobs": {"content": [{"top_logprobs"}]}}]}

A brain answers: write(body, images) -> (text, finished), tokens(body, images) -> {token: log-probability}. `faults` are
taken from the front, one a request: "400", "413", "422", "429", "500", "hang", "truncated", "count", "nan", "no_logprobs",
None for none.
"""

import base64
import contextlib
import io
import json
import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
from PIL import Image

MODEL = "judge"


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_GET(self):
        self.answer(200, {"object": "list", "data": [{"id": MODEL, "object": "model"}]})

    def do_POST(self):
        length = int(self.headers["Content-Length"])
        body = json.loads(self.rfile.read(length))
        own = self.server
        with own.lock:
            own.requests.append(body)
            fault = own.faults.pop(0) if own.faults else None
        if own.token and self.headers.get("Authorization") != f"Bearer {own.token}":
            return self.answer(401, {"error": {"message": "invalid token"}})
        if fault == "hang":
            time.sleep(own.hang)
            self.close_connection = True
            return None
        if fault in ("400", "413", "422", "500", "429"):
            return self.answer(
                int(fault), {"error": {"message": "fault"}}, {"Retry-After": "0"} if fault == "429" else {}
            )
        assert body["model"] == MODEL and body["n"] == 1, body
        choice = self.choice(body)
        if fault == "nan" and choice["logprobs"]:
            choice["logprobs"]["content"][0]["top_logprobs"][0]["logprob"] = float("nan")
        if fault == "no_logprobs":
            choice["logprobs"] = None
        choices = {"count": [choice, choice]}.get(fault, [choice])
        return self.answer(
            200, {"object": "chat.completion", "model": MODEL, "choices": choices}, cut=fault == "truncated"
        )

    def choice(self, body: dict) -> dict:
        assert body["continue_final_message"] and not body["add_generation_prompt"]
        assert body["messages"][-1]["role"] == "assistant"
        images = [image_of(part["image_url"]["url"]) for message in body["messages"] if not isinstance(message["content"], str)
                  for part in message["content"] if part["type"] == "image_url"]  # fmt: skip
        if not body.get("logprobs"):
            text, finished = self.server.brain.write(body, images)
            return {"index": 0, "message": {"role": "assistant", "content": text}, "logprobs": None,
                    "finish_reason": "stop" if finished else "length"}  # fmt: skip
        assert body["max_tokens"] == 1
        best = sorted(self.server.brain.tokens(body, images).items(), key=lambda pair: -pair[1])[: body["top_logprobs"]]
        top = [{"token": token, "logprob": value, "bytes": list(token.encode())} for token, value in best]
        return {"index": 0, "message": {"role": "assistant", "content": best[0][0]}, "finish_reason": "length",
                "logprobs": {"content": [top[0] | {"top_logprobs": top}]}}  # fmt: skip

    def answer(self, status: int, value: dict, headers=(), cut: bool = False) -> None:
        data = json.dumps(value).encode()
        data = data[: len(data) // 2] if cut else data
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            for name, text in dict(headers).items():
                self.send_header(name, text)
            self.end_headers()
            self.wfile.write(data)


def image_of(address: str) -> np.ndarray:
    head, _, data = address.partition(",")
    assert head == "data:image/png;base64", head
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(data))))


class Server(ThreadingHTTPServer):
    daemon_threads, request_queue_size = True, 128

    def __init__(self, brain, port: int = 0, faults=(), token: str | None = None, hang: float = 5.0):
        super().__init__(("127.0.0.1", port), Handler)
        self.brain, self.faults, self.token, self.hang = brain, list(faults), token, hang
        self.requests: list[dict] = []
        self.connections: list[socket.socket] = []
        self.lock = threading.Lock()
        self.port = self.server_address[1]
        self.address = f"http://127.0.0.1:{self.port}/v1"
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()

    def __enter__(self):
        return self

    def get_request(self):
        connection, address = super().get_request()
        self.connections.append(connection)
        return connection, address

    def __exit__(self, *_):
        """Ends as a killed process does: open connections break."""
        self.shutdown()
        self.server_close()
        for connection in self.connections:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def handle_error(self, request, client_address):
        pass


class ModelBrain:
    """Answers with a LocalChat: a judge behind HTTP as vLLM would serve it."""

    def __init__(self, chat):
        self.chat = chat

    def parts(self, body: dict) -> tuple[list[dict], str]:
        messages, prefix = body["messages"][:-1], body["messages"][-1]["content"]
        plain = [
            m | {"content": [{"type": "image"} if p["type"] == "image_url" else p for p in m["content"]]}
            for m in messages
        ]
        return plain, prefix

    def write(self, body, images):
        messages, prefix = self.parts(body)
        written = self.chat._write(messages, images, prefix, body["stop"][0], body["seed"])
        return written.text, written.finished

    def tokens(self, body, images):
        messages, prefix = self.parts(body)
        found = self.chat.next_tokens(messages, images, prefix)
        best = found.topk(body["top_logprobs"])
        return {
            self.chat.processor.tokenizer.decode([i]): v
            for v, i in zip(best.values.tolist(), best.indices.tolist(), strict=True)
        }
