"""Blocks are pulled from a prefill engine by a decode engine over a connection: the same tokens, and whatever fails,
nothing is lost, nothing stays held, and the books balance."""

import socket
import threading
import time

import pytest

import labkit as lk
from labkit.engine import kv_connector
from labkit.engine.kv_settings import engine_options, read_config, read_key
from labkit.parallel.sealed import Broken, Sealed
from tests.core.test_tiers import offloading
from tests.harness import assert_right, params

PROMPT = list(range(1, 46))  # 11 full blocks of 4, and a token


@pytest.fixture
def key_file(tmp_path):
    path = tmp_path / "key"
    path.touch(mode=0o600)
    path.write_text("a key of more than 16 bytes\n")
    return path


@pytest.fixture
def pair(key_file):
    made = []

    def make(decode_key=key_file, seed=1, host=32, **options):
        prefill = offloading(blocks=32, runner=lk.FakeRunner(seed=1, vocab_size=50))
        decode = offloading(blocks=32, host=host, runner=lk.FakeRunner(seed=seed, vocab_size=50))
        producer = lk.KVConnector(prefill, role="kv_producer", key_file=key_file, **options)
        consumer = lk.KVConnector(decode, role="kv_consumer", key_file=decode_key, timeout=options.get("timeout", 5.0))
        made.extend([producer, consumer])
        return producer, consumer

    yield make
    for connector in made:
        connector.close()
        connector.engine.check()
        connector.engine.close()


def wait(what, seconds=5.0):
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.01)


def test_the_decode_engine_pulls_what_it_lacks_and_the_blocks_are_released(pair):
    producer, consumer = pair()
    prefill, decode = producer.engine, consumer.engine
    told = producer.prefill(PROMPT)
    assert told["do_remote_prefill"] and len(told["remote_block_ids"]) == 11 and told["remote_port"] == producer.port
    assert prefill.blocks.num_used == 11, "the blocks are not held"
    found = consumer.fetch(told, decode.chain_of(PROMPT), "r1")
    assert (found.num_blocks, found.num_bytes, found.reason) == (11, 11 * 16, None)
    request = decode.generate(PROMPT, params(4))
    assert request.num_cached == 44
    assert_right(decode, request)
    wait(lambda: not producer.held and prefill.blocks.num_used == 0)
    (went,), (came,) = prefill.log.events("Exported"), decode.log.events("Imported")
    assert went.num_blocks == came.num_blocks == 11
    assert (went.peer, came.peer) == (consumer.engine_id, producer.engine_id)
    again = consumer.fetch(producer.prefill(PROMPT), decode.chain_of(PROMPT))
    assert again.reason is None and again.num_blocks == 0, "what is there is sent again"
    assert prefill.fork().kv_connector is None, "a fork has no connection of its own"
    wait(lambda: not producer.held)
    late = consumer.fetch(told, decode.chain_of(PROMPT))
    assert "not held" in late.reason and decode.log.events("TransferFailed")[0].reason == late.reason


def test_blocks_are_held_for_a_time_only(pair):
    producer, _ = pair(hold=0.3)
    producer.prefill(PROMPT)
    assert producer.held
    wait(lambda: producer.num_expired == 1)
    assert not producer.held and producer.engine.blocks.num_used == 0


def test_a_producer_without_file_descriptors_releases_blocks_and_listens_again(pair, monkeypatch):
    producer, consumer = pair(hold=0.3)
    accept = socket.socket.accept

    def full(sock):
        raise OSError(24, "Too many open files")

    monkeypatch.setattr(socket.socket, "accept", full)
    producer.prefill(PROMPT)
    wait(lambda: producer.num_expired == 1)
    monkeypatch.setattr(socket.socket, "accept", accept)
    producer.hold = 60.0
    found = consumer.fetch(producer.prefill(PROMPT), consumer.engine.chain_of(PROMPT))
    assert (found.num_blocks, found.reason) == (11, None)
    wait(lambda: not producer.held)


def fails(consumer, told, reason, num_blocks=0, prompt=PROMPT, **options):
    """The fetch fails for this reason, and the request computes what did not come."""
    decode = consumer.engine
    found = consumer.fetch(told, decode.chain_of(prompt, **options), "r1")
    assert reason in found.reason and found.num_blocks == num_blocks, found
    request = decode.generate(prompt, params(4), **options)
    assert request.num_cached == 4 * num_blocks
    assert_right(decode, request)
    assert consumer.num_failed == 1
    decode.check()


def test_a_wrong_key_opens_nothing(pair, tmp_path):
    other = tmp_path / "other"
    other.touch(mode=0o600)
    other.write_text("another key of many bytes")
    producer, consumer = pair(decode_key=other)
    fails(consumer, producer.prefill(PROMPT), "")
    assert producer.held, "a stranger can make the prefill engine release blocks"


def test_another_model_is_refused(pair):
    producer, consumer = pair(seed=2)
    fails(consumer, producer.prefill(PROMPT), "the model or its weights differ")


def test_another_prompt_or_salt_gets_nothing_and_a_longer_one_what_it_shares(pair):
    producer, consumer = pair()
    fails(consumer, producer.prefill(PROMPT), "salt", salt="x")
    longer = PROMPT[:20] + [7] * 30
    found = consumer.fetch(producer.prefill(PROMPT), consumer.engine.chain_of(longer))
    assert found.num_blocks == 5 and "5 of 12 blocks" in found.reason


def test_a_producer_that_has_gone_or_says_nothing_costs_the_timeout_at_most(pair):
    producer, consumer = pair(timeout=0.5)
    told = producer.prefill(PROMPT)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        begin = time.monotonic()
        fails(consumer, {**told, "remote_port": silent.getsockname()[1]}, "did not come within 0.5 s")
        assert 0.4 < time.monotonic() - begin < 3.0
    late = consumer.fetch(told, consumer.engine.chain_of([9] * 20), since=time.monotonic() - 0.6)
    assert "did not come within 0.5 s" in late.reason, "a fetch that waited for its turn waits once more"
    producer.close()
    assert consumer.fetch(told, consumer.engine.chain_of([9] * 20)).reason is not None


@pytest.mark.parametrize("how", ["ends", "slow", "damaged", "too long"])
def test_a_transfer_that_breaks_leaves_whole_blocks_and_the_rest_is_computed(pair, monkeypatch, how):
    monkeypatch.setattr("labkit.engine.handing.PIECE", 16 * 4)  # four blocks
    producer, consumer = pair(timeout=1.0)
    told = producer.prefill(PROMPT)
    send, sent = Sealed.send, []

    def broken(link, kind, *parts):
        if kind != "B":
            return send(link, kind, *parts)
        sent.append(kind)
        if len(sent) < 2:
            return send(link, kind, *parts)
        if how == "ends":
            link.socket.shutdown(socket.SHUT_RDWR)
            raise Broken("gone")
        if how == "slow":
            time.sleep(1.2)
        if how == "too long":
            return send(link, kind, bytes(64 * 20))
        if how == "damaged":
            whole = link._send_all

            def flip(data):
                whole(bytes(data[:9]) + bytes([data[9] ^ 1]) + bytes(data[10:]) if len(data) == 64 else data)

            monkeypatch.setattr(link, "_send_all", flip)
        return send(link, kind, *parts)

    monkeypatch.setattr(Sealed, "send", broken)
    reasons = {"ends": "closed", "slow": "within 1 s", "damaged": "damaged", "too long": "more blocks than the prompt"}
    fails(consumer, told, reasons[how], num_blocks=4)
    wait(lambda: not producer.held and producer.engine.blocks.num_used == 0)


def test_a_consumer_that_dies_in_the_middle_releases_the_blocks(pair, key_file):
    producer, _ = pair()
    told = producer.prefill(PROMPT)
    chain = producer.engine.chain_of(PROMPT)
    link = Sealed(socket.create_connection(("127.0.0.1", producer.port)), read_key(key_file), time.monotonic() + 5)
    link.prove()
    ask = {"id": told["remote_request_id"], "first": 0, "hashes": b"".join(chain.hashes)}
    link.send("Q", kv_connector.pack({**ask, "form": list(producer.form), "peer": "x"}))
    assert link.receive(10_000)[0] == "B"
    link.close()
    wait(lambda: not producer.held and producer.engine.blocks.num_used == 0)
    assert not producer.engine.log.events("Exported")


def test_what_has_no_room_in_host_memory_is_computed(pair):
    producer, consumer = pair(host=5)
    fails(consumer, producer.prefill(PROMPT), "no room in host memory", num_blocks=5)


def test_many_pull_at_the_same_time_while_both_engines_serve(pair):
    producer, consumer = pair()
    prefill, decode = producer.engine.start(), consumer.engine.start()
    prompts = [[i] * 9 + PROMPT[:12] for i in range(1, 6)]  # all fit into both pools
    done = {}

    def one(i):
        found = consumer.fetch(producer.prefill(prompts[i]), decode.chain_of(prompts[i]))
        done[i] = (found, decode.generate(prompts[i], params(6)))

    threads = [threading.Thread(target=one, args=(i,)) for i in range(len(prompts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert len(done) == 5
    assert all(found.reason is None and request.num_cached == 20 for found, request in done.values())
    assert_right(decode, *(request for _, request in done.values()))
    wait(lambda: not producer.held)
    prefill.check(), decode.check()


def test_what_is_asked_for_wrongly_is_refused_by_name(pair, key_file, tmp_path):
    producer, consumer = pair()
    chain = consumer.engine.chain_of(PROMPT)
    told = producer.prefill(PROMPT)
    for change, said in (
        ({"remote_host": "10.1.2.3"}, "not among the peers"), ({"remote_host": None}, "needs remote_host"),
        ({"remote_port": 0}, "remote_port"), ({"remote_request_id": 5}, "remote_request_id"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=said):
            consumer.fetch({**told, **change}, chain)
    with pytest.raises(ValueError, match="kv_producer and takes no blocks"):
        producer.fetch(told, chain)
    with pytest.raises(ValueError, match="kv_consumer and holds no blocks"):
        consumer.prefill(PROMPT)
    with pytest.raises(ValueError, match="kv_offloading_size=1"):
        lk.KVConnector(
            lk.Engine(scheduler=lk.Scheduler(lk.BlockManager(8, 4)), runner=lk.FakeRunner()), key_file=key_file
        )
    with pytest.raises(ValueError, match="cannot be listened on"):
        lk.KVConnector(producer.engine, role="kv_producer", port=producer.port, key_file=key_file)
    open_to_all = tmp_path / "open"
    open_to_all.write_text("x" * 32)
    open_to_all.chmod(0o644)
    for path, said in ((open_to_all, "chmod 600"), (tmp_path / "none", "cannot be read")):
        with pytest.raises(ValueError, match=said):
            read_key(path)


def test_the_config_has_vllms_keys():
    config = {"kv_connector": "LabkitConnector", "kv_role": "kv_consumer", "kv_port": 7000, "kv_buffer_size": 2**30}
    assert read_config({**config, "kv_connector_extra_config": {"timeout": 3}})["timeout"] == 3
    assert engine_options(config, {}) == {"kv_offloading_size": 1.0}
    assert engine_options(config, {"kv_offloading_size": 4}) == {}
    assert engine_options({**config, "kv_role": "kv_producer"}, {}) == {}
    for change, said in (
        ({"kv_connector": "NixlConnector"}, "LabkitConnector"), ({"kv_role": "both"}, "kv_both"),
        ({"kv_prot": 1}, "kv_port"), ({"kv_connector_extra_config": {"time": 1}}, "timeout"),
    ):  # fmt: skip
        with pytest.raises((ValueError, TypeError), match=said):
            read_config({**config, **change})


def test_messages_are_sealed_both_ways():
    def ends(keys):
        left, right = socket.socketpair()
        made = [Sealed(sock, key, time.monotonic() + 5) for sock, key in zip((left, right), keys, strict=True)]
        errors = []

        def other():
            try:
                made[1].demand()
            except (Broken, OSError) as error:
                errors.append(error)
                made[1].close()

        thread = threading.Thread(target=other)
        thread.start()
        try:
            made[0].prove()
        except (Broken, OSError) as error:
            errors.append(error)
            made[0].close()
        thread.join()
        return made, errors

    (a, b), errors = ends((b"k" * 16, b"k" * 16))
    assert not errors
    a.send("B", b"one", b"two")
    assert b.receive(6) == ("B", bytearray(b"onetwo"))
    b.send("X", b"reply")
    assert a.receive(5)[1] == b"reply"
    a.send("B", bytes(7))
    with pytest.raises(Broken, match="6 were expected"):
        b.receive(6)
    others, errors = ends((b"k" * 16, b"l" * 16))
    for one in (a, b, *others):
        one.close()
    assert len(errors) == 2, "one side took the other's key for right"
