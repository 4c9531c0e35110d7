"""Log-probabilities, echo, several prompts and several texts over HTTP, against the uncached model."""

import json
import math
import time
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from smollm_jax.hf.export import load_hf
from smollm_jax.serving.openai_choices import offsets_of
from smollm_jax.tokenizer.streaming import CONTEXT_IDS, TextOfIds
from tests.support.api_server import serving
from tests.support.server import CONFIG, export_model

httpx = pytest.importorskip("httpx")
pytest.importorskip("fastapi")
TEXT = "The water cycle moves. 🦀 Größe"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return export_model(tmp_path_factory.mktemp("scored"), config=replace(CONFIG, num_layers=1, max_seq_len=256))


@pytest.fixture(scope="module", params=["jax", pytest.param("torch", marks=pytest.mark.release)])
def api(request, folder):
    if request.param == "torch":
        pytest.importorskip("torch")
    with serving(folder, backend=request.param) as (url, scheduler):
        yield url, scheduler


def post(api, body, path="/v1/completions", **headers):
    reply = httpx.post(f"{api[0]}{path}", json=body, headers=headers, timeout=120)
    assert reply.status_code == 200, reply.text
    return reply.json()


def refused(api, body, path="/v1/completions"):
    reply = httpx.post(f"{api[0]}{path}", json=body, timeout=120)
    assert reply.status_code == 400, reply.text
    return reply.json()["error"]["message"]


@pytest.fixture(scope="module")
def logprobs_of(folder):
    """The log-softmax of the whole model at every id but the first."""
    model = load_hf(folder)

    def of(ids):
        logits_TV = model(jnp.asarray([ids]))[0]
        return np.asarray(jax.nn.log_softmax(logits_TV.astype(jnp.float32)))[:-1]

    return of


def ids_of(api, text):
    return post(api, {"prompt": text}, "/tokenize")["tokens"]


@pytest.mark.slow
def test_echo_scores_every_token_but_the_first_as_the_whole_model_does(api, logprobs_of):
    ids = ids_of(api, TEXT)
    asked = {"prompt": TEXT, "max_tokens": 3, "temperature": 0, "logprobs": 2, "echo": True}
    reply = post(api, asked)
    choice, found = reply["choices"][0], reply["choices"][0]["logprobs"]
    assert choice["text"].startswith(TEXT)
    assert reply["usage"] == {"prompt_tokens": len(ids), "completion_tokens": 3, "total_tokens": len(ids) + 3}
    assert found["token_logprobs"][0] is found["top_logprobs"][0] is None
    new = [t for t, text in enumerate(found["tokens"]) if t >= len(ids)]
    assert len(new) == 3
    whole = ids_of(api, choice["text"])
    if whole[: len(ids)] == ids and len(whole) == len(found["tokens"]):  # the new tokens spell themselves
        ids = whole
    expected = logprobs_of(ids)
    for i, row in enumerate(expected, 1):
        assert found["token_logprobs"][i] == pytest.approx(row[ids[i]], abs=1e-4)
        likely = found["top_logprobs"][i]
        assert len(likely) in (2, 3) if "�" not in found["tokens"][i] else likely
        assert max(likely.values()) == pytest.approx(row.max(), abs=1e-4)
        is_likeliest = found["token_logprobs"][i] == max(likely.values())  # the very same number
        assert is_likeliest == (row.argmax() == ids[i])
    for i in new:
        assert found["token_logprobs"][i] == max(found["top_logprobs"][i].values())  # greedy


@pytest.mark.release
def test_offsets_point_at_the_tokens_in_the_text(api):
    asked = {"prompt": "Once upon a time", "max_tokens": 12, "temperature": 0, "logprobs": 0}
    plain, echoed = (post(api, asked | {"echo": echo})["choices"][0] for echo in (False, True))
    for choice in (plain, echoed):
        found, text = choice["logprobs"], choice["text"]
        assert found["text_offset"] == sorted(found["text_offset"])
        ends = [*found["text_offset"][1:], len(text)]
        for token, start, end in zip(found["tokens"], found["text_offset"], ends, strict=True):
            assert text[start:end] == token or "�" in token or "\ufffd" in text
        assert {len(likely) for likely in found["top_logprobs"] if likely} == {1}  # the token itself
    assert echoed["text"] == "Once upon a time" + plain["text"]
    skip = len(echoed["logprobs"]["tokens"]) - len(plain["logprobs"]["tokens"])
    assert echoed["logprobs"]["token_logprobs"][skip:] == pytest.approx(
        plain["logprobs"]["token_logprobs"], abs=1e-4
    )


@pytest.mark.release
def test_a_prompt_is_scored_without_a_new_token_up_to_the_whole_context(api, logprobs_of):
    reply = post(api, {"prompt": TEXT, "max_tokens": 0, "logprobs": 5, "echo": True})
    choice, ids = reply["choices"][0], ids_of(api, TEXT)
    assert (choice["text"], choice["finish_reason"]) == (TEXT, "length")
    assert reply["usage"]["completion_tokens"] == 0
    expected = [row[i] for row, i in zip(logprobs_of(ids), ids[1:], strict=True)]
    assert choice["logprobs"]["token_logprobs"][1:] == pytest.approx(expected, abs=1e-4)
    plain = post(api, {"prompt": TEXT, "max_tokens": 0, "echo": True})["choices"][0]
    assert (plain["text"], plain["logprobs"]) == (TEXT, None)
    long = list(np.random.default_rng(0).integers(3, 290, 256).tolist())
    found = post(api, {"prompt": long, "max_tokens": 0, "logprobs": 0, "echo": True})["choices"][0]["logprobs"]
    expected = [row[i] for row, i in zip(logprobs_of(long), long[1:], strict=True)]
    assert found["token_logprobs"][1:] == pytest.approx(expected, abs=1e-3)
    assert "1 to 255" in refused(api, {"prompt": long, "max_tokens": 1, "echo": True})


@pytest.mark.slow
def test_prompts_are_texts_or_ids_one_or_several(api):
    drawn = {"max_tokens": 8, "temperature": 0.8, "seed": 3}
    texts = ["Once upon a time", "The water"]
    ids = [ids_of(api, text) for text in texts]
    alone = [post(api, drawn | {"prompt": text})["choices"][0]["text"] for text in texts]
    for prompt in (texts, ids):
        reply = post(api, drawn | {"prompt": prompt})
        assert [choice["index"] for choice in reply["choices"]] == [0, 1]
        assert [choice["text"] for choice in reply["choices"]] == alone
        assert reply["usage"]["prompt_tokens"] == sum(map(len, ids))
        assert reply["usage"]["completion_tokens"] == 16
    assert post(api, drawn | {"prompt": ids[1]})["choices"][0]["text"] == alone[1]
    assert post(api, drawn | {"prompt": texts[:1]})["choices"][0]["text"] == alone[0]


def test_a_special_token_in_an_echoed_prompt_has_its_place(api):
    before, special, after = ids_of(api, "The water"), ids_of(api, "<|im_end|>"), ids_of(api, " moves on")
    assert len(special) == 1, "parsed"
    ids = before + special + after
    asked = {"prompt": ids, "echo": True, "logprobs": 0, "max_tokens": 0}
    [choice] = post(api, asked)["choices"]
    offsets = choice["logprobs"]["text_offset"]
    assert choice["text"][offsets[len(before)] : offsets[len(before) + 1]] == "<|im_end|>"
    assert choice["text"][offsets[len(before) + 1] :] == " moves on"


def test_a_run_of_special_tokens_costs_nothing(api):
    """Each was decoded with all before it, which took minutes."""
    tokenizer = api[1].completer.tokenizer
    [special] = ids_of(api, "<|im_end|>")
    decoder = TextOfIds(tokenizer, [5, 6, 7] + [special] * 5_000)
    assert len(decoder._window) <= CONTEXT_IDS
    began = time.monotonic()
    assert offsets_of(tokenizer, [special] * 20_000, "") == [0] * 20_000
    assert time.monotonic() - began < 1


@pytest.mark.slow
def test_equal_prompts_without_a_seed_have_other_texts(api):
    asked = {"prompt": [TEXT] * 3, "max_tokens": 12, "temperature": 2.0, "ignore_eos": True}
    assert len({choice["text"] for choice in post(api, asked)["choices"]}) == 3
    assert len({choice["text"] for choice in post(api, asked | {"seed": 7})["choices"]}) == 1


def test_the_texts_of_a_request_have_the_weights_of_its_begin(api, monkeypatch):
    scheduler = api[1]
    taken = []
    exact = scheduler.weights.take_loaded
    monkeypatch.setattr(scheduler.weights, "take_loaded", lambda choice: taken.append(choice) or exact(choice))
    post(api, {"prompt": [TEXT] * 3, "n": 2, "max_tokens": 2})
    assert len(taken) == 1


@pytest.mark.release
def test_several_texts_of_a_prompt_have_seeds_that_follow_each_other(api):
    asked = {"prompt": ["Once", "The water"], "max_tokens": 9, "temperature": 0.9}
    found = post(api, asked | {"n": 2, "seed": 7})["choices"]
    for i, (prompt, seed) in enumerate([("Once", 7), ("Once", 8), ("The water", 7), ("The water", 8)]):
        alone = post(api, asked | {"prompt": prompt, "seed": seed})["choices"][0]
        assert (found[i]["index"], found[i]["text"]) == (i, alone["text"])
    assert found[0]["text"] != found[1]["text"]


def events(api, body, path="/v1/completions"):
    with httpx.stream("POST", f"{api[0]}{path}", json=body | {"stream": True}, timeout=120) as reply:
        assert reply.status_code == 200
        lines = [line.removeprefix("data: ") for line in reply.iter_lines() if line]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


@pytest.mark.slow
def test_a_stream_adds_up_to_the_whole(api):
    asked = {"prompt": ["Once upon", TEXT], "n": 2, "max_tokens": 20, "temperature": 0.9, "seed": 5, "logprobs": 2}
    asked |= {"echo": True, "stop": ["qu"]}
    whole = post(api, asked)
    parts = events(api, asked | {"stream_options": {"include_usage": True}})
    assert parts[-1]["usage"] == whole["usage"]
    for choice in whole["choices"]:
        own = [one for part in parts for one in part["choices"] if one["index"] == choice["index"]]
        assert "".join(one["text"] for one in own) == choice["text"]
        for name in ("tokens", "text_offset"):
            assert [x for one in own for x in one["logprobs"][name]] == choice["logprobs"][name]
        logprobs = [x for one in own for x in one["logprobs"]["token_logprobs"]]
        assert logprobs[1:] == pytest.approx(choice["logprobs"]["token_logprobs"][1:], abs=1e-4)
        assert own[-1]["finish_reason"] == choice["finish_reason"]
        assert len(choice["logprobs"]["tokens"]) >= len(choice["logprobs"]["token_logprobs"])


@pytest.mark.slow
def test_a_chat_has_logprobs(api):
    asked = {"messages": [{"role": "user", "content": "Who?"}], "max_tokens": 12, "seed": 1, "temperature": 0}
    plain = post(api, asked, "/v1/chat/completions")["choices"][0]
    assert plain["logprobs"] is None
    for top in (0, 3):
        chat = post(api, asked | {"logprobs": True, "top_logprobs": top}, "/v1/chat/completions")["choices"][0]
        content = chat["logprobs"]["content"]
        assert chat["message"]["content"] == plain["message"]["content"]
        assert len(content) == 12
        for token in content:
            assert token["logprob"] <= 0
            assert len(token["top_logprobs"]) == top
            assert token["bytes"] in (None, list(token["token"].encode()))
            if top:
                assert token["top_logprobs"][0]["logprob"] == token["logprob"]
    parts = events(api, asked | {"logprobs": True, "top_logprobs": 1, "n": 2}, "/v1/chat/completions")
    for index in range(2):
        own = [one for part in parts for one in part["choices"] if one["index"] == index]
        assert own[0]["delta"]["role"] == "assistant"
        assert [one["delta"].get("role") for one in own[1:]] == [None] * (len(own) - 1)
        assert len([token for one in own for token in one["logprobs"]["content"]]) == 12


@pytest.mark.release
def test_the_end_of_a_text_has_its_score_in_a_completion(api):
    """lm-eval drops the last score, and that must be the new token's, whatever it is."""
    asked = {"prompt": "Once", "temperature": 0, "logprobs": 1, "echo": True, "logit_bias": {"301": 100}}
    choice = post(api, asked | {"max_tokens": 1})["choices"][0]
    assert (choice["text"], choice["finish_reason"]) == ("Once", "stop")
    assert len(choice["logprobs"]["tokens"]) == len(ids_of(api, "Once")) + 1
    assert choice["logprobs"]["tokens"][-1] == "<|im_end|>"
    assert choice["logprobs"]["token_logprobs"][-1] < math.log(0.5)  # of the logits before the bias
    going = post(api, asked | {"max_tokens": 4, "ignore_eos": True, "echo": False})
    assert (going["usage"]["completion_tokens"], going["choices"][0]["finish_reason"]) == (4, "length")


REFUSED = [
    ({"n": 0}, "n=0 must be a whole number"),
    ({"n": True}, "n=True"),
    ({"n": 129}, "make too many texts; the most is 128"),
    ({"n": 2, "prompt": ["x"] * 65}, "65 prompts and n=2"),
    ({"n": 100, "max_tokens": 200}, "a request may have 3,200"),
    ({"best_of": 3}, "best_of=3 must be n"),
    ({"logprobs": 6}, "logprobs=6 must be a whole number from 0 to 5"),
    ({"logprobs": True}, "logprobs=True"),
    ({"logprobs": "many"}, "logprobs='many'"),
    ({"prompt": [[1], "x"]}, "prompt must be a text, a list of texts"),
    ({"prompt": [[1], [True]]}, "prompt must be"),
    ({"prompt": [[1], []]}, "the prompt has 0 tokens"),
    ({"prompt": [[1], [320]]}, "token id 320 is outside"),
    ({"prompt": ["x", ""]}, "the prompt is empty"),
    ({"prompt": ["x" * 60_000, "y" * 60_000]}, "the prompts have 120,000 characters"),
    ({"max_tokens": 0}, "max_tokens=0"),
    ({"logit_bias": {"320": 1}}, "'320' is no token id, 0 to 301"),
    ({"logit_bias": {"x": 1}}, "'x' is no token id"),
    ({"logit_bias": {"1": 101}}, "101 must be a number from -100 to 100"),
    ({"logit_bias": {"1": "a"}}, "'a' must be a number"),
    ({"logit_bias": {str(i): 1 for i in range(301)}}, "logit_bias has 301 ids; the most is 300"),
    ({"logit_bias": [5]}, "logit_bias takes an object"),
    ({"presence_penalty": 3}, "presence_penalty=3 must be a number from -2.0 to 2.0"),
    ({"frequency_penalty": "x"}, "frequency_penalty='x'"),
    ({"stop": ["a"] * 17}, "stop takes up to 16"),
    ({"suffix": "x"}, "suffix"),
]


@pytest.mark.parametrize(("fields", "words"), REFUSED, ids=range(len(REFUSED)))
def test_what_goes_beyond_the_limits_is_refused_before_any_work(api, fields, words, monkeypatch):
    monkeypatch.setattr(api[1], "stream", lambda *_, **__: pytest.fail("work"))
    assert words in refused(api, {"prompt": "Once", "max_tokens": 2} | fields)


def test_prompts_have_a_limit_in_sum_over_all_texts(api, monkeypatch):
    monkeypatch.setattr("smollm_jax.serving.openai_prompts.MOST_PROMPT_TOKENS", 100)
    asked = {"prompt": list(range(40)), "max_tokens": 0, "echo": True, "logprobs": 0}
    assert refused(api, asked | {"n": 3}) == "the prompts have 120 tokens for 3 texts each; the most is 100"


def test_prompts_have_a_limit_in_sum(api, monkeypatch):
    monkeypatch.setattr("smollm_jax.serving.openai_prompts.MOST_PROMPT_TOKENS", 20)
    assert "the prompts have 21 tokens; the most is 20" in refused(api, {"prompt": [[5] * 7] * 3, "max_tokens": 1})
    assert "needs logprobs" in refused(
        api, {"messages": [{"role": "user", "content": "x"}], "top_logprobs": 2}, "/v1/chat/completions"
    )


def test_texts_become_ids_and_ids_texts(api):
    for text in (TEXT, "", "<|im_end|>x"):
        whole = post(api, {"prompt": text}, "/tokenize")
        assert whole["count"] == len(whole["tokens"])
        assert whole["max_model_len"] == 256
        assert post(api, {"tokens": whole["tokens"]}, "/detokenize")["prompt"] == text
    assert ids_of(api, "<|im_end|>") == [301]
    assert len(post(api, {"prompt": "<|im_end|>", "special_tokens": "text"}, "/tokenize")["tokens"]) > 3
    assert "outside the vocabulary" in refused(api, {"tokens": [1, 320]}, "/detokenize")
    assert "list of token ids" in refused(api, {"tokens": ["x"]}, "/detokenize")
    assert "must be text" in refused(api, {"prompt": 3}, "/tokenize")
    assert "characters" in refused(api, {"prompt": "x" * 200_000}, "/tokenize")
    info = httpx.get(f"{api[0]}/tokenizer_info").json()
    assert info["eos_token"] == "<|im_end|>"
    assert "im_start" in info["chat_template"]


def test_the_server_tells_its_health_and_its_model(api):
    assert httpx.get(f"{api[0]}/health").json() == {"status": "ok"}
    assert httpx.get(f"{api[0]}/v1/models/tiny").json()["id"] == "tiny"
    missing = httpx.get(f"{api[0]}/v1/models/OWNER/NAME")
    assert (missing.status_code, missing.json()["error"]["type"]) == (404, "not_found_error")


@pytest.mark.release
def test_a_key_guards_all_but_the_health(folder):
    with serving(folder, api_key="s3cret") as (url, scheduler):
        for path in ("/v1/models/tiny", "/tokenizer_info"):
            assert httpx.get(f"{url}{path}").status_code == 401
            assert httpx.get(f"{url}{path}", headers={"Authorization": "Bearer s3cret"}).status_code == 200
        for path in ("/tokenize", "/detokenize"):
            assert httpx.post(f"{url}{path}", json={}).status_code == 401
        assert httpx.get(f"{url}/health").status_code == 200
        scheduler.close()
        assert httpx.get(f"{url}/health").status_code == 503


@pytest.mark.release
def test_openais_own_client_reads_the_scores(api):
    openai = pytest.importorskip("openai")
    client = openai.OpenAI(base_url=f"{api[0]}/v1", api_key="none", max_retries=0)
    choices = client.completions.create(
        model="tiny", prompt=["Once", "The"], max_tokens=4, logprobs=3, echo=True, n=2, seed=1
    ).choices
    assert [choice.index for choice in choices] == [0, 1, 2, 3]
    assert len(choices[0].logprobs.token_logprobs) == len(choices[0].logprobs.top_logprobs)
    chat = client.chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": "x"}], max_tokens=4, logprobs=True, top_logprobs=2
    )
    assert len(chat.choices[0].logprobs.content[0].top_logprobs) == 2
