"""A prompt is computed by one server and decoded by another, as a proxy asks with vLLM's `kv_transfer_params`."""

import json
import os
import subprocess
import sys
import threading

import httpx
import pytest

import labkit as lk
from labkit.engine.kv_connector import MOST_AT_ONCE
from tests.server.talk import until

PROMPT = "import os\nimport sys\n\n\ndef main():\n    for name in os.listdir('.'):\n        print(name)\n" * 2
ASK = {"max_tokens": 12, "ignore_eos": True}
MODEL = {"num_blocks": 64, "max_num_seqs": 4, "max_model_len": 256, "dtype": "float32"}
REMOTE = {"do_remote_decode": True, "do_remote_prefill": False, "remote_host": None, "remote_port": None}


@pytest.fixture(scope="module")
def key_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("kv") / "key"
    path.touch(mode=0o600)
    path.write_text("a key of more than 16 bytes")
    return path


@pytest.fixture(scope="module")
def decode(key_file):
    engine = lk.Engine(**MODEL, num_host_blocks=64, kv_offloading=True)
    connector = lk.KVConnector(engine, role="kv_consumer", key_file=key_file, timeout=20.0)
    with lk.serve(engine) as server, httpx.Client(base_url=server.url, timeout=60) as client:
        yield client, engine
    connector.close()
    engine.check()
    assert engine.close().ok


@pytest.fixture(scope="module")
def prefill(key_file):
    """A server in a process of its own, from the command line."""
    config = {
        "kv_connector": "LabkitConnector", "kv_role": "kv_producer",
        "kv_connector_extra_config": {"key_file": str(key_file)},
    }  # fmt: skip
    command = [sys.executable, "-m", "labkit.cli", "serve", "--port", "0", "--num-gpu-blocks-override", "64",
               "--max-num-seqs", "4", "--max-model-len", "256", "--dtype", "float32",
               "--kv-transfer-config", json.dumps(config)]  # fmt: skip
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=os.environ)
    lines, url = [], None
    while url is None and (line := process.stderr.readline()):
        lines.append(line)
        url = line.split("running on ")[1].split()[0] if "running on " in line else None
    assert url is not None, "".join(lines)
    assert any("KVConnector(kv_producer at 127.0.0.1:" in line for line in lines)
    with httpx.Client(base_url=url, timeout=60) as client:
        yield client, process
    process.kill()
    process.wait()
    process.stderr.close()


def through(prefill, decode, path, body):
    """What a proxy does."""
    first = prefill.post(path, json={**body, "max_tokens": 1, "stream": False, "kv_transfer_params": REMOTE})
    assert first.status_code == 200, first.text
    found = decode.post(path, json={**body, "kv_transfer_params": first.json()["kv_transfer_params"]})
    assert found.status_code == 200, found.text
    return first.json()["kv_transfer_params"], found.json()


def metric(client, name):
    line = next(line for line in client.get("/metrics").text.splitlines() if line.startswith(name))
    return float(line.split()[-1])


def test_a_completion_and_a_chat_are_decoded_by_another_server(prefill, decode):
    (client, _), (other, engine) = prefill, decode
    for path, prompt in (
        ("/v1/completions", {"prompt": PROMPT}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": PROMPT}]}),
    ):
        for more in ({"temperature": 0}, {"temperature": 1.0, "seed": 5}):
            alone = client.post(path, json={**prompt, **ASK, **more, "cache_salt": "alone"}).json()
            engine.reset_prefix_cache()
            told, found = through(client, other, path, {**prompt, **ASK, **more})
            assert told["do_remote_prefill"] and told["remote_block_ids"]
            cached = found["usage"]["prompt_tokens_details"]["cached_tokens"]
            assert cached == (found["usage"]["prompt_tokens"] - 1) // 16 * 16 > 16
            texts = [(one.get("text"), one.get("message")) for one in (alone["choices"][0], found["choices"][0])]
            assert texts[0] == texts[1]
    until(lambda: metric(client, "labkit:kv_blocks_exported_total") == metric(other, "labkit:kv_blocks_imported_total"))
    assert metric(other, "labkit:kv_bytes_imported_total") > 0
    assert metric(other, "labkit:kv_transfers_failed_total") == 0


def test_what_cannot_be_handed_over_is_refused_by_name(prefill, decode):
    (client, _), (other, _) = prefill, decode
    body = {"prompt": PROMPT, **ASK}

    def refused(server, **params):
        answer = server.post("/v1/completions", json={**body, **params})
        assert answer.status_code == 400 and answer.json()["error"]["param"].startswith("kv_transfer_params")
        return answer.json()["error"]["message"]

    assert "stream" in refused(client, stream=True, kv_transfer_params=REMOTE)
    assert "one prompt" in refused(client, prompt=[PROMPT, "x"], kv_transfer_params=REMOTE)
    assert "kv_consumer" in refused(other, kv_transfer_params=REMOTE)
    pull = {"do_remote_prefill": True, "remote_host": "10.1.1.1", "remote_port": 80, "remote_request_id": "x"}
    assert "peers" in refused(other, kv_transfer_params=pull)
    assert "remote_host" in refused(other, kv_transfer_params={"do_remote_prefill": True})
    assert "unknown" in refused(other, kv_transfer_params={"unknown": 1})


def test_the_wait_for_a_thread_counts_into_the_timeout(prefill, decode, monkeypatch):
    """So that those who ask for what never comes do not keep others waiting."""
    other, engine = decode
    connector, go = engine.kv_connector, threading.Event()
    monkeypatch.setattr(connector, "timeout", 0.3)
    for _ in range(MOST_AT_ONCE):
        connector.threads.submit(go.wait, 20)
    pull = {"do_remote_prefill": True, "remote_host": "127.0.0.1", "remote_port": 1, "remote_request_id": "x"}
    timer = threading.Timer(0.8, go.set)
    timer.start()
    answer = other.post("/v1/completions", json={"prompt": PROMPT, "max_tokens": 1, "kv_transfer_params": pull})
    timer.join()
    assert answer.status_code == 200
    assert "did not come within 0.3 s" in engine.log.events("TransferFailed")[-1].reason, "it asked all the same"


def test_a_prefill_server_that_is_killed_costs_the_decode_server_a_computation(prefill, decode):
    (client, process), (other, engine) = prefill, decode
    body = {"prompt": PROMPT, **ASK, "temperature": 0}
    alone = client.post("/v1/completions", json=body).json()
    first = client.post("/v1/completions", json={**body, "max_tokens": 1, "kv_transfer_params": REMOTE}).json()
    process.kill()
    process.wait()
    engine.reset_prefix_cache()
    before = metric(other, "labkit:kv_transfers_failed_total")
    found = other.post("/v1/completions", json={**body, "kv_transfer_params": first["kv_transfer_params"]}).json()
    assert found["choices"][0]["text"] == alone["choices"][0]["text"]
    assert found["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
    assert metric(other, "labkit:kv_transfers_failed_total") == before + 1
    assert "refused" in engine.log.events("TransferFailed")[-1].reason
    engine.check()
