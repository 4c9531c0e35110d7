"""The server as a separate process, used through HTTP, gradio_client and OpenAI's library."""

import concurrent.futures
import contextlib
import itertools
import json
import os
import socket
import subprocess
import sys
import threading
import time

import pytest

from smollm_jax.cli.serve import secret
from smollm_jax.runtime.errors import run_main
from tests.support.paths import ROOT
from tests.support.server import CONFIG, Server

pytest.importorskip("gradio")
httpx = pytest.importorskip("httpx")

LONG = 1_000


@pytest.fixture(scope="module")
def gradio(server):
    from gradio_client import Client

    return Client(server.url, verbose=False)


@pytest.fixture(scope="module")
def openai(server):
    library = pytest.importorskip("openai")
    return library.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=120)


def post(server, body, path="/v1/completions", **options):
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    headers = {"Content-Type": "application/json"} | options.pop("headers", {})
    return httpx.post(f"{server.url}{path}", content=content, headers=headers, timeout=120, **options)


def answers(server):
    """Whether a plain request is served."""
    reply = post(server, {"prompt": "Once", "max_tokens": 4, "temperature": 0})
    return reply.status_code == 200 and reply.json()["usage"]["completion_tokens"] == 4


def command(*arguments, **environment):
    return subprocess.run(
        [sys.executable, str(ROOT / "serve.py"), *arguments], capture_output=True, text=True, check=False,
        env=os.environ | {"PYTHONPATH": str(ROOT)} | environment, timeout=120,
    )  # fmt: skip


def test_help_answers_at_once_and_names_the_flags():
    best = 9.0
    for _ in range(3):
        started = time.monotonic()
        result = command("--help")
        best = min(best, time.monotonic() - started)
    assert result.returncode == 0
    assert all(f"--{flag}" in result.stdout for flag in ("backend", "host", "port", "auth", "api-key", "dtype"))
    assert best < 1.0


def mistake(capsys, monkeypatch, *arguments):
    """Run the command in this process: the one line it prints."""
    import serve

    monkeypatch.setattr(sys, "argv", ["serve.py", *arguments])
    with contextlib.suppress(SystemExit):
        assert run_main(serve.main) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    (line,) = printed.err.strip().splitlines()
    return line


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["/no/such/folder"], "no folder"),
        ([], "PATH"),
        ([".", "--port", "70000"], "--port 70000"),
        ([".", "--port", "x"], "--port"),
        ([".", "--backend", "tensorflow"], "tensorflow"),
        ([".", "--auth", "nobody"], "USER:PASSWORD"),
        ([".", "--auth", "a:b", "--auth-file", "x"], "not both"),
        ([".", "--auth-file", "/no/such/file"], "/no/such/file"),
        ([".", "--api-key", ""], "--api-key is empty"),
        ([".", "--host", "no.such.host.invalid"], "cannot listen"),
        ([".", "--port", "0"], "config.json"),
    ],
)
def test_a_mistake_on_the_command_line_is_one_line(capsys, monkeypatch, arguments, words):
    assert words in mistake(capsys, monkeypatch, *arguments)


def test_a_secret_may_stand_in_a_file_or_the_environment(tmp_path, monkeypatch, capsys):
    (tmp_path / "key").write_text("s3cret\n")
    assert secret("api-key", None, tmp_path / "key") == "s3cret"
    assert secret("api-key", None, None) is None
    monkeypatch.setenv("SMOLLM_JAX_API_KEY", "of the environment")
    assert secret("api-key", None, None) == "of the environment"
    assert secret("api-key", "of the flag", None) == "of the flag"
    monkeypatch.setenv("SMOLLM_JAX_AUTH", "")
    assert "SMOLLM_JAX_AUTH is empty" in mistake(capsys, monkeypatch, ".")
    monkeypatch.setenv("SMOLLM_JAX_AUTH", "nobody")
    assert "USER:PASSWORD" in mistake(capsys, monkeypatch, ".")


def test_a_mistake_on_the_command_line_exits_with_2():
    for arguments in (["/no/such/folder"], [".", "--port", "x"]):
        result = command(*arguments)
        assert (result.returncode, result.stdout) == (2, "")
        assert len(result.stderr.strip().splitlines()) == 1


def test_a_port_that_is_taken_is_reported_before_the_model_is_loaded(capsys, monkeypatch, folder_of_chat_model):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert "cannot listen" in mistake(capsys, monkeypatch, str(folder_of_chat_model), "--port", port)


def test_it_listens_on_loopback_alone_unless_it_is_on_a_space(server):
    psutil = pytest.importorskip("psutil")
    listening = [c.laddr.ip for c in psutil.Process(server.process.pid).net_connections() if c.status == "LISTEN"]
    assert listening == ["127.0.0.1"]
    assert "default: 0.0.0.0" in command("--help", SPACE_ID="me/space").stdout


@pytest.mark.slow
def test_the_page_says_which_back_end_serves(server, folder_of_chat_model):
    config = httpx.get(f"{server.url}/config").text
    assert "PyTorch, float32" in config
    with Server(folder_of_chat_model, "--backend", "jax") as other:
        assert "JAX, float32" in httpx.get(f"{other.url}/config").text
        asked = {"prompt": "Once upon a time", "max_tokens": 40, "temperature": 0}
        texts = [post(one, asked).json()["choices"][0]["text"] for one in (server, other)]
    assert texts[0] == texts[1] != ""


def test_gradio_streams_and_a_seed_gives_its_text_again(gradio):
    job = gradio.submit("Once upon a time", max_new_tokens=100, temperature=1.0, seed=5, api_name="/generate")
    whole, steps = job.result(), [step["text"] for step in job.outputs()]
    assert len(steps) > 3
    assert all(later.startswith(earlier) for earlier, later in itertools.pairwise(steps))
    assert (whole["seed"], whole["tokens"], whole["stop_reason"]) == (5, 100, "length")
    again, other = (
        gradio.predict("Once upon a time", max_new_tokens=100, temperature=1.0, seed=s, api_name="/generate")
        for s in (5, 6)
    )
    assert again["text"] == whole["text"] != other["text"]


def test_a_drawn_seed_is_told_and_gives_its_text_again(gradio):
    drawn = [gradio.predict("Once", max_new_tokens=30, api_name="/generate") for _ in range(2)]
    assert drawn[0]["seed"] != drawn[1]["seed"]
    again = gradio.predict("Once", max_new_tokens=30, seed=drawn[0]["seed"], api_name="/generate")
    assert again["text"] == drawn[0]["text"]


def test_the_documented_gradio_api_is_generate_alone(gradio):
    assert list(gradio.view_api(return_format="dict")["named_endpoints"]) == ["/generate"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"prompt": ""}, "prompt is empty"),
        ({"prompt": "x" * 2**20}, "1,048,576 characters"),
        ({"prompt": "a\0b"}, "NUL"),
        ({"prompt": "水 " * 9_000}, "tokens"),
        ({"prompt": {"a": 1}}, "must be text"),
        ({"prompt": "x", "max_new_tokens": -1}, "max_new_tokens=-1"),
        ({"prompt": "x", "max_new_tokens": 10**30}, "max_new_tokens=1000"),
        ({"prompt": "x", "temperature": -0.5}, "temperature=-0.5"),
        ({"prompt": "x", "temperature": "hot"}, "temperature='hot'"),
        ({"prompt": "x", "top_k": 1e300}, "top_k="),
        ({"prompt": "x", "top_p": 0}, "top_p=0"),
        ({"prompt": "x", "seed": -7}, "seed=-7"),
        ({"prompt": "x", "repetition_penalty": True}, "repetition_penalty=True"),
        ({"prompt": "x", "stop": [""]}, "stop takes"),
    ],
)
def test_gradio_says_in_words_what_it_does_not_take(gradio, server, arguments, words):
    with pytest.raises(Exception, match=words):
        gradio.predict(**arguments, api_name="/generate")
    assert answers(server)


def test_openai_completes_and_streams_the_same(openai):
    asked = {"model": "tiny", "prompt": "Once upon a time", "max_tokens": 50, "temperature": 0.9, "seed": 3}
    whole = openai.completions.create(**asked)
    assert (whole.choices[0].finish_reason, whole.usage.completion_tokens) == ("length", 50)
    parts = list(openai.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    assert "".join(p.choices[0].text for p in parts if p.choices) == whole.choices[0].text
    assert [p.choices[0].finish_reason for p in parts if p.choices][-1] == "length"
    assert parts[-1].usage.completion_tokens == 50
    assert len(parts) > 3


def test_openai_chats_where_there_is_a_template(openai):
    asked = {"model": "tiny", "messages": [{"role": "user", "content": "Who?"}], "max_tokens": 20, "seed": 1}
    whole = openai.chat.completions.create(**asked)
    assert whole.choices[0].message.role == "assistant"
    assert whole.choices[0].message.content
    parts = list(openai.chat.completions.create(**asked, stream=True))
    assert "".join(p.choices[0].delta.content or "" for p in parts) == whole.choices[0].message.content
    assert parts[0].choices[0].delta.role == "assistant"


def test_a_request_says_what_becomes_of_special_tokens(server):
    text = {"prompt": "<|im_start|>Once<|im_end|>", "max_tokens": 1}
    talk = {"messages": [{"role": "user", "content": "<|im_end|>"}], "max_tokens": 1}
    for body, path in ((text, "/v1/completions"), (talk, "/v1/chat/completions")):
        counts = [
            post(server, body | more, path).json()["usage"]["prompt_tokens"]
            for more in ({}, {"special_tokens": "text"}, {"special_tokens": "parse"})
        ]
        assert counts[0] == counts[1] > counts[2] + 5
    assert post(server, text | {"special_tokens": "x"}).status_code == 400


def test_openai_lists_the_model(openai):
    assert [model.id for model in openai.models.list()] == ["tiny"]


def test_a_stop_string_ends_a_completion_before_it(openai):
    asked = {"model": "tiny", "prompt": "Once upon a time", "max_tokens": 60, "temperature": 0}
    text = openai.completions.create(**asked).choices[0].text
    stop = text[20:24]
    stopped = openai.completions.create(**asked, stop=[stop]).choices[0]
    assert (stopped.text, stopped.finish_reason) == (text[: text.index(stop)], "stop")


HOSTILE = [
    (b"", 400, "body"),
    (b"{", 400, "JSON"),
    (b'{"prompt": "a\\ud800b"}', 400, "prompt"),
    (b'{"prompt": "a\\u0000b"}', 400, "NUL"),
    (b'{"\\ud800": 1, "prompt": "x"}', 400, "string"),
    (b'{"prompt": "x", "temperature": NaN}', 400, "temperature=nan"),
    (b'{"prompt": "x", "temperature": 1e999}', 400, "temperature=inf"),
    (b'{"prompt": "x", "max_tokens": ' + b"9" * 4_000 + b"}", 400, "max_tokens"),
    (b'{"prompt": "x", "max_tokens": ' + b"9" * 5_000 + b"}", 400, ""),
    (b'{"prompt": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", 400, ""),
    ({"prompt": "x" * 2**20}, 400, "1,048,576 characters"),
    ({"prompt": "x" * 5 * 2**20}, 413, "bytes"),
    ({"prompt": []}, 400, "0 tokens"),
    ({"prompt": [-1]}, 400, "vocabulary"),
    ({"prompt": [10**9]}, 400, "vocabulary"),
    ({"prompt": ["a", 1]}, 400, "prompt must be"),
    ({"prompt": "x", "max_tokens": 0}, 400, "max_tokens=0"),
    ({"prompt": "x", "seed": 2**70}, 400, "seed="),
    ({"prompt": "x", "n": 999}, 400, "n=999"),
    ({"prompt": "x", "stop": ["a"] * 99}, 400, "stop takes"),
    ({"prompt": "x", "logprobs": 50}, 400, "logprobs"),
    (b'{"prompt": "x", "stop": [' + b"1," * 99_000 + b"1]}", 400, "stop takes"),
    (b'{"prompt": "x", "stop": [' + b"[]," * 99_000 + b"1]}", 400, "objects"),
    (b'{"prompt": [' + b'"x",' * 99_000 + b"1]}", 400, "prompt must be"),
    (b'{"prompt": "x", "stream_options": {' + b'"a": 1, ' * 2_900 + b'"b": 1}}', 400, "stream_options"),
    ({"prompt": {"a": 1}}, 400, "prompt must be"),
    ({"prompt": [True]}, 400, "prompt must be"),
    ({"prompt": "x", "stop": {"a": 1}}, 400, "stop takes"),
    ({"prompt": "x", "logit_bias": {"x": 5}}, 400, "logit_bias"),
    ({"prompt": "x", "model": "gpt-4"}, 404, "gpt-4"),
    ({"prompt": "x", "tools": []}, 400, "tools"),
]


@pytest.mark.parametrize(("body", "code", "words"), HOSTILE, ids=range(len(HOSTILE)))
def test_hostile_input_gets_a_clear_error_and_the_server_serves_on(server, body, code, words):
    reply = post(server, body)
    assert reply.status_code == code, reply.text[:300]
    error = reply.json()["error"]
    assert words in error["message"]
    assert len(error["message"]) < 400
    assert answers(server)


def test_nothing_asked_for_is_not_refused(server):
    """As OpenAI's clients send: null, or the value that means no."""
    fields = (
        "model temperature top_p stream stop n seed user tools logprobs best_of stream_options suffix echo min_p"
    )
    asked = {"prompt": "Once", "max_tokens": 4} | dict.fromkeys(fields.split())
    noes = {"logit_bias": {}, "response_format": {"type": "text"}, "store": False, "logprobs": False, "suffix": ""}
    noes |= {"metadata": {}, "service_tier": "auto", "stop": "", "model": "", "stream_options": {}}
    parts = [{"type": "text", "text": "hi", "annotations": None}]
    chat = {"messages": [{"role": "user", "content": parts, "name": None}], "max_tokens": 4, "tools": []}
    chat |= {"max_completion_tokens": None, "top_logprobs": 0, "tool_choice": "none", "temperature": None}
    chat |= {"functions": [], "function_call": "auto", "parallel_tool_calls": True, "modalities": ["text"]}
    for body, path in ((asked, "/v1/completions"), (asked | noes, "/v1/completions"),
                       (chat | {"tool_choice": "auto"}, "/v1/chat/completions"),
                       (chat, "/v1/chat/completions")):  # fmt: skip
        reply = post(server, body, path)
        assert reply.status_code == 200, reply.text
        assert reply.json()["usage"]["completion_tokens"] <= 4


def test_one_client_does_not_hold_up_another(server):
    """The heaviest bodies that are let through take less than 0.2 s of a processor each."""
    process = pytest.importorskip("psutil").Process(server.process.pid)
    bodies = [
        b'{"prompt": "x", "stop": [' + b"1," * 99_000 + b"1]}",
        b'{"prompt": "x", "stop": [' + b'"",' * 99_000 + b"1]}",
        b'{"prompt": "x", "stream_options": {' + b",".join(b'"%d": 1' % i for i in range(2_900)) + b"}}",
        b'{"messages": [' + b"{}," * 2_900 + b"{}]}",
        json.dumps({"data": [[]] * 2_900}).encode(),
        json.dumps({"prompt": "x" * 1_200_000}).encode(),
    ]

    def seconds_for(body):
        before = process.cpu_times()
        path = "completions" if b"prompt" in body else "chat/completions" if b"mess" in body else None
        post(server, body, f"/v1/{path}" if path else "/gradio_api/call/generate")
        after = process.cpu_times()
        return after.user + after.system - before.user - before.system

    for body in bodies:
        assert min(seconds_for(body) for _ in range(3)) < 0.2


def test_a_body_without_its_type_is_told_which(server):
    reply = httpx.post(f"{server.url}/v1/completions", content=b'{"prompt": "The"}')
    assert reply.status_code == 400
    assert "Content-Type: application/json" in reply.json()["error"]["message"]


@pytest.mark.parametrize("body", [b"{prompt: 1}", b"[1]", b"", b'"x"'])
def test_a_body_that_is_no_object_is_told_so(server, body):
    reply = httpx.post(f"{server.url}/v1/completions", content=body, headers={"content-type": "application/json"})
    assert reply.status_code == 400
    assert reply.json()["error"]["message"].startswith("the body must be a JSON object: ")


def test_a_foreign_page_gets_nothing_and_may_not_frame_this_one(server):
    asked = {"data": ["Once", 2]}
    assert post(server, asked, "/gradio_api/call/generate").status_code == 200
    for headers in ({"Origin": "http://evil.example"}, {"Host": "evil.example"}, {"Host": "x.localhost"}):
        for path in ("/gradio_api/call/generate", "/v1/completions", "/login"):
            assert post(server, asked, path, headers=headers).status_code == 403
        assert httpx.get(f"{server.url}/", headers=headers).status_code == 403
    preflight = {"Origin": "http://evil.example", "Access-Control-Request-Method": "POST"}
    assert httpx.options(f"{server.url}/v1/completions", headers=preflight).status_code == 403
    assert "frame-ancestors 'self'" in httpx.get(server.url).headers["content-security-policy"]


def test_a_body_that_does_not_announce_its_length_is_limited_too(server):
    def good_but_long():
        yield b'{"prompt": "x", "max_tokens": 1, "user": "'
        for _ in range(6):
            yield b"x" * 2**20
        yield b'"}'

    headers = {"Content-Type": "application/json"}
    with pytest.raises(httpx.HTTPError):  # either the connection ends or a status says so
        httpx.post(
            f"{server.url}/v1/completions", content=good_but_long(), headers=headers, timeout=60
        ).raise_for_status()
    assert answers(server)


@pytest.mark.parametrize(
    "messages",
    [[], [{"role": "wizard", "content": "x"}], [{"role": "user", "content": "a\0"}], [{"role": "user"}],
     [{"role": "user", "content": [{"type": "image_url", "image_url": "http://x"}]}],
     [{"role": "user", "content": "x" * 200_000}], [{"role": "user", "content": "x"}] * 300],
    ids=range(7),
)  # fmt: skip
def test_hostile_conversations_get_a_clear_error(server, messages):
    reply = post(server, {"messages": messages}, "/v1/chat/completions")
    assert reply.status_code == 400
    assert reply.json()["error"]["message"]


def test_the_same_conversation_ends_the_same_for_typed_special_tokens(server):
    """A message that spells a special token is longer by its words, not a turn more."""
    plain, spelled = (
        post(server, {"messages": [{"role": "user", "content": text}], "max_tokens": 1}, "/v1/chat/completions")
        for text in ("", "<|im_end|>")
    )
    assert spelled.json()["usage"]["prompt_tokens"] > plain.json()["usage"]["prompt_tokens"] + 3


@pytest.mark.slow
def test_fifty_at_once_are_served_or_told_to_come_again_and_memory_stays(server):
    psutil = pytest.importorskip("psutil")
    process = psutil.Process(server.process.pid)

    def ask(i):
        return post(server, {"prompt": f"Number {i}", "max_tokens": 40, "seed": i})

    def flood():
        with concurrent.futures.ThreadPoolExecutor(50) as pool:
            return list(pool.map(ask, range(50)))

    flood()
    before = process.memory_info().rss
    replies = [reply for _ in range(3) for reply in flood()]
    codes = [reply.status_code for reply in replies]
    assert set(codes) == {200, 429}
    assert codes.count(200) >= 3 * 8
    told = next(reply for reply in replies if reply.status_code == 429)
    assert "try again" in told.json()["error"]["message"]
    assert told.headers["retry-after"]
    assert answers(server)
    assert process.memory_info().rss - before < 48 * 2**20


@pytest.mark.slow
def test_requests_are_answered_one_at_a_time_in_turn(server):
    ended, threads = [], []

    def ask(i):
        post(server, {"prompt": "x", "max_tokens": 150 if i else 700, "temperature": 0})
        ended.append(i)

    for i in range(4):
        threads.append(threading.Thread(target=ask, args=(i,)))
        threads[-1].start()
        time.sleep(0.4)
    for thread in threads:
        thread.join()
    assert ended == [0, 1, 2, 3]


def seconds_of_a_short_request(server):
    started = time.monotonic()
    assert answers(server)
    return time.monotonic() - started


@pytest.fixture(scope="module")
def long_seconds(server):
    """What a whole long text takes."""
    started = time.monotonic()
    assert (
        post(server, {"prompt": "x", "max_tokens": LONG, "temperature": 0}).json()["usage"]["completion_tokens"]
        == LONG
    )
    return time.monotonic() - started


@pytest.mark.slow
@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_vanishes_stops_its_text(server, long_seconds, stream):
    body = json.dumps({"prompt": "x", "max_tokens": LONG, "temperature": 0, "stream": stream}).encode()
    host, port = server.url.removeprefix("http://").split(":")
    for _ in range(5):  # one is under way, four wait
        connection = socket.create_connection((host, int(port)))
        connection.sendall(
            b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            b"Content-Length: %d\r\n\r\n%s" % (len(body), body)
        )
        time.sleep(0.2)
        connection.close()
    assert seconds_of_a_short_request(server) < max(1.5, long_seconds / 3)


@pytest.mark.slow
def test_a_gradio_client_that_cancels_or_vanishes_stops_its_text(server, gradio, long_seconds):
    from gradio_client import Client

    job = gradio.submit("x", max_new_tokens=LONG, temperature=0, api_name="/generate")
    while not job.outputs():
        time.sleep(0.05)
    job.cancel()
    assert seconds_of_a_short_request(server) < max(1.5, long_seconds / 3)
    code = (
        "import os, sys, time; from gradio_client import Client; c = Client(sys.argv[1], verbose=False)\n"
        f"j = c.submit('x', max_new_tokens={LONG}, temperature=0, api_name='/generate')\n"
        "while not j.outputs(): time.sleep(.05)\n"
        "os._exit(0)"
    )
    subprocess.run([sys.executable, "-c", code, server.url], check=True, timeout=60)
    assert seconds_of_a_short_request(server) < max(1.5, long_seconds / 3)
    assert isinstance(gradio, Client)


CLOSED = ("upload", "file=/etc/passwd", "file/etc/passwd", "proxy=http://x", "run/generate", "process_recording",
          "vibe-edit", "component_server", "run-history/connect")  # fmt: skip


@pytest.mark.parametrize("path", CLOSED)
def test_gradios_other_doors_are_closed(server, path):
    assert httpx.post(f"{server.url}/gradio_api/{path}", files={"files": b"x"}).status_code == 403
    assert httpx.get(f"{server.url}/gradio_api/{path}").status_code == 403


def ask_page(server, number, data):
    """The last message of Gradio's queue to event `number` of the page, asked past the page."""
    visitor = f"visitor{time.monotonic_ns()}"
    asked = {"data": data, "fn_index": number, "session_hash": visitor}
    joined = post(server, json.dumps(asked).encode(), "/gradio_api/queue/join")
    assert joined.status_code == 200, joined.text
    with httpx.stream("GET", f"{server.url}/gradio_api/queue/data?session_hash={visitor}", timeout=60) as reply:
        for line in reply.iter_lines():
            message = json.loads(line.removeprefix("data:")) if line else {}
            if message.get("msg") in ("process_completed", "unexpected_error"):
                return message
    raise AssertionError("the queue ended without an answer")


# the last inputs of a press: weights, and of a chat its system prompt
LAST = {"continue": ["newest"], "send": ["newest", ""]}


def page_event(server, target):
    """The event that follows a press of the button `target`."""
    config = httpx.get(f"{server.url}/config").json()
    button = next(c["id"] for c in config["components"] if c["props"].get("elem_id") == target)
    pressed = next(d["id"] for d in config["dependencies"] if [button, "click"] in d["targets"])
    return next(d["id"] for d in config["dependencies"] if d["trigger_after"] == pressed)


@pytest.mark.parametrize("path", ["/etc/passwd", "http://127.0.0.1:9/x"])
def test_a_request_that_names_a_file_is_refused(server, tmp_path_factory, path):
    secret = tmp_path_factory.mktemp("secret") / "secret.txt"
    secret.write_text("secret")
    for named in (path, str(secret)):
        file = {"path": named, "meta": {"_type": "gradio.FileData"}}
        for target in ("continue", "send"):
            event = page_event(server, target)
            reply = ask_page(server, event, [file, None, 0.6, 0.9, 50, 1.1, 5, "", 0, "", *LAST[target]])
            assert reply["output"]["error"] == "this page accepts no files"
    assert not list(server.cache.rglob("secret.txt")) + list(server.cache.rglob("passwd"))


@pytest.mark.parametrize(
    ("target", "data", "words"),
    [
        ("continue", ["x\0", None, 0.6, 0.9, 50, 1.1, 10, "", 0, ""], "NUL"),
        ("continue", ["\ud800", None, 0.6, 0.9, 50, 1.1, 10, "", 0, ""], "half a character"),
        ("continue", ["x", None, 0.6, 0.9, 50, 1.1, 10**9, "", 0, ""], "greater than maximum"),
        ("continue", ["x", None, -1, 0.9, 50, 1.1, 10, "", 0, ""], "less than minimum"),
        ("continue", ["x", None, 0.6, 0.9, 50, 1.1, 10, "9" * 5_000, 0, ""], "seed="),
        ("send", ["\ud800", None, 0.6, 0.9, 50, 1.1, 10, "", 0, ""], "half a character"),
        ("send", ["x" * 10**6, None, 0.6, 0.9, 50, 1.1, 10, "", 0, ""], "1,000,000 characters"),
        ("send", [" ", None, 0.6, 0.9, 50, 1.1, 10, "", 0, ""], "message is empty"),
        ("send", ["x", [{"role": "system"}], 0.6, 0.9, 50, 1.1, 10, "", 0, ""], "conversation is damaged"),
        ("continue", ["x", None, 0.6, 0.9, 50, 1.1, 10, "", 0, "a\n" * 17], "stop takes up to 16"),
        ("again-continue", ["x", None, 0.6, 0.9, 50, 1.1, 10, "", 0, ""], "nothing to regenerate"),
        ("again-send", ["x", None, 0.6, 0.9, 50, 1.1, 10, "", 0, ""], "nothing to regenerate"),
        ("continue", ["x", None, 0.6, 0.9, 50, 1.1, 10, "", 0, "", "../x"], "no checkpoint '../x'"),
        ("continue", ["x", None, 0.6, 0.9, 50, 1.1, 10, "", 0, "", {"a": 1}], "no checkpoint {'a': 1}"),
        ("continue", ["x", None, 0.6, 0.9, 50, 1.1, 10, "", 0, "", "9" * 5_000], "no checkpoint '999"),
        ("send", ["x", None, 0.6, 0.9, 50, 1.1, 10, "", 0, "", "newest", "\ud800"], "half a character"),
    ],
    ids=range(16),
)
def test_the_page_is_checked_on_the_server_too(server, target, data, words):
    left_out = LAST[target.removeprefix("again-")][max(len(data) - 10, 0) :]
    reply = ask_page(server, page_event(server, target), [*data, *left_out])
    assert words in reply["output"]["error"]
    assert answers(server)


def test_the_page_may_fetch_from_here_alone(server):
    assert httpx.get(server.url).headers["content-security-policy"].startswith("default-src 'self'")
    assert httpx.get(f"{server.url}/docs").status_code == 404


@pytest.mark.slow
def test_auth_guards_the_page_and_a_key_guards_v1(folder_of_chat_model):
    from gradio_client import Client

    with Server(folder_of_chat_model, "--auth", "ann:se:cret") as server:
        key = server.log.read_text().split("API key for /v1: ")[1].split()[0]
        assert httpx.get(f"{server.url}/config").status_code == 401
        assert post(server, {"data": []}, "/gradio_api/queue/join").status_code == 401
        for route in ("/v1/models", "/v1/completions", "/v1/chat/completions"):
            for headers in ({}, {"Authorization": "Bearer no"}, {"Authorization": "Bearer \xff".encode("latin1")}):
                reply = httpx.request(
                    "GET" if route.endswith("models") else "POST", server.url + route, headers=headers
                )
                assert reply.status_code == 401
                assert "key" in reply.json()["error"]["message"]
        assert httpx.get(f"{server.url}/v1/models", headers={"Authorization": f"Bearer {key}"}).status_code == 200
        client = Client(server.url, auth=("ann", "se:cret"), verbose=False)
        assert client.predict("Once", max_new_tokens=3, api_name="/generate")["tokens"] == 3
        with pytest.raises(Exception, match=r"(?i)auth|401|login|credentials"):
            Client(server.url, auth=("ann", "wrong"), verbose=False).predict("x", api_name="/generate")


@pytest.mark.slow
def test_an_interrupt_ends_the_server_with_0_even_under_way(folder_of_chat_model):
    with Server(folder_of_chat_model) as server:
        threading.Thread(target=lambda: post_quietly(server), daemon=True).start()
        time.sleep(1)
        started = time.monotonic()
        assert server.close() == 0
        assert time.monotonic() - started < 10


def post_quietly(server):
    with contextlib.suppress(httpx.HTTPError):
        post(server, {"prompt": "x", "max_tokens": 2_000, "temperature": 0})


@pytest.mark.slow
def test_a_model_without_a_template_has_no_chat(tmp_path):
    from smollm_jax.hf import export as convert
    from smollm_jax.model.transformer import init_params
    from smollm_jax.tokenizer.load import train_tokenizer

    train_tokenizer(["plain text"] * 4, 300).save(tmp_path / "tokenizer")
    convert.export_folder(
        init_params(CONFIG, 0), CONFIG, tmp_path / "plain", tokenizer_folder=tmp_path / "tokenizer", verify=False
    )
    with Server(tmp_path / "plain") as server:
        assert (
            post(server, {"messages": [{"role": "user", "content": "x"}]}, "/v1/chat/completions").status_code
            != 200
        )
        assert '"Chat"' not in httpx.get(f"{server.url}/config").text
