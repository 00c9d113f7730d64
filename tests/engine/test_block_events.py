"""Prefix cache events over ZMQ: a reader's mirror equals the cache, also when messages were dropped and replayed."""

import random
import time

import pytest

import labkit as lk
from labkit.core.messagepack import pack, unpack
from labkit.engine.block_events import END, publisher_of
from tests.core.test_tiers import offloading
from tests.harness import params, run

zmq = pytest.importorskip("zmq")
ANY = "tcp://127.0.0.1:*"


def connect(publisher, **options):
    """A reader that is connected: it has what was published so far, from the replay."""
    reader = lk.BlockEventSubscriber(publisher.endpoint, publisher.replay_endpoint, **options)
    deadline = time.monotonic() + 10
    while reader.last < publisher.num_batches - 1 and time.monotonic() < deadline:
        reader.poll(0.05)
        reader.replay()
    return reader


def catch_up(reader, publisher):
    deadline = time.monotonic() + 10
    while reader.last < publisher.num_batches - 1 and time.monotonic() < deadline:
        if not reader.poll(0.2):
            reader.replay()
    assert reader.last == publisher.num_batches - 1, reader


def caches(eng):
    found = {"gpu": eng.blocks.prefix}
    return found | {tier.medium: tier.prefix for tier in eng.blocks.offload.tiers} if eng.blocks.offload else found


def assert_mirrors(reader, eng):
    for medium, cache in caches(eng).items():
        mine = reader.stored.get(medium, {})
        assert mine.keys() == cache.block_of.keys(), medium
        for digest, place in cache.block_of.items():
            assert mine[digest][1] == tuple(cache.tokens_of[place].tolist())
            parent = cache.parent_hash_of(place)
            assert mine[digest][0] == (None if cache.depth_of[place] == 0 else parent)


def soak(eng, rng, num=30):
    prompts = [[rng.randrange(50) for _ in range(20)] for _ in range(6)]
    for i in range(num):
        eng.submit(
            [*rng.choice(prompts)[: rng.randrange(4, 20)], i % 50], params(4), salt=rng.choice([None, None, "s"])
        )
        if i % 3 == 0:
            run(eng)
    run(eng)


@pytest.mark.parametrize("array_like", [True, False])
def test_the_mirror_equals_the_cache_after_a_soak(array_like):
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    eng = offloading(blocks=12, host=8, disk=20)
    soak(eng, random.Random(seed), 6)  # before anybody listens
    publisher = lk.BlockEventPublisher(eng, endpoint=ANY, replay_endpoint=ANY, array_like=array_like)
    reader = connect(publisher)
    assert_mirrors(reader, eng)
    soak(eng, random.Random(seed + 1))
    catch_up(reader, publisher)
    assert_mirrors(reader, eng)
    assert {"gpu", "cpu", "disk"} <= reader.stored.keys() and not reader.num_lost
    eng.reset_prefix_cache()
    catch_up(reader, publisher)
    assert not any(reader.stored.values())
    reader.close()
    publisher.close()


def test_dropped_messages_are_noticed_and_replayed():
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    rng = random.Random(seed)
    eng = offloading(blocks=12, host=8)
    publisher = lk.BlockEventPublisher(eng, endpoint=ANY, replay_endpoint=ANY)
    reader = connect(publisher)
    receive = reader.receive
    reader.receive = lambda number, payload: receive(number, payload) if rng.random() < 0.6 else None
    for i in range(5):
        soak(eng, random.Random(seed + i), 12)
        reader.poll(0.3)
    reader.receive = receive
    catch_up(reader, publisher)
    assert_mirrors(reader, eng)
    assert reader.num_gaps and reader.num_replayed and not reader.num_lost and not reader.last_lost
    reader.close()
    publisher.close()


def test_what_is_no_longer_in_the_buffer_is_counted_as_lost():
    eng = offloading(blocks=12, host=8)
    publisher = lk.BlockEventPublisher(eng, endpoint=ANY, replay_endpoint=ANY, buffer_steps=3)
    soak(eng, random.Random(1), 12)
    time.sleep(0.3)
    reader = lk.BlockEventSubscriber(publisher.endpoint, publisher.replay_endpoint)
    assert reader.replay() == 3 and reader.num_lost == publisher.num_batches - 3
    reader.close()
    publisher.close()


def test_the_bytes_on_the_wire_are_those_that_routers_read():
    eng = offloading(blocks=12)
    publisher = lk.BlockEventPublisher(eng, endpoint=ANY, replay_endpoint=ANY, topic="kv@pod@model", rank=2)
    handle = eng.submit(list(range(9)), params(1), adapter="sql")
    run(eng)
    socket = zmq.Context.instance().socket(zmq.REQ)
    socket.connect(publisher.replay_endpoint)
    socket.send((0).to_bytes(8, "big"))  # as vLLM's example client asks; its REQ socket adds the empty frame
    assert socket.poll(5000)
    number, payload = socket.recv_multipart()
    assert number == bytes(8)
    when, events, rank = unpack(payload)
    assert abs(when - time.time()) < 60 and events == [["AllBlocksCleared"]] and rank == 2
    socket.close(linger=0)
    reader = connect(publisher, topic="kv@pod@model")
    (digest, (parent, ids)), *_ = reader.stored["gpu"].items()
    assert parent is None and ids == (0, 1, 2, 3) and len(digest) == 32 and handle.ended
    last = publisher._buffer[-1][1]
    stored = unpack(last)[1][0]
    assert stored[0] == "BlockStored" and len(stored[1]) == 2 and stored[3] == list(range(8)) and stored[4] == 4
    assert stored[5:] == [None, "GPU", "sql"]
    reader.close()
    publisher.close()


def test_messages_of_others_and_damaged_ones_do_not_end_the_reader():
    publisher = lk.BlockEventPublisher(lk.EventLog(), endpoint=ANY)
    reader = lk.BlockEventSubscriber(publisher.endpoint)
    stored = [
        "BlockStored",
        [1, 2],
        None,
        [5, 6, 7, 8],
        2,
        None,
        "CPU",
        None,
        None,
        7,
    ]  # of a newer vLLM, hashes as ints
    reader.receive(0, pack([0.0, [stored], None]))
    assert reader.stored == {"cpu": {1: (None, (5, 6)), 2: (1, (7, 8))}}
    with pytest.warns(UserWarning, match="batch 1 .* cannot be read"):
        reader.receive(1, b"\xc1")
    assert reader.last == 1 and reader.last_lost
    reader.receive(2, pack({"ts": 0.0, "events": [{"type": "AllBlocksCleared"}]}))
    assert not reader.stored and not reader.last_lost
    reader.close()
    publisher.close()


def test_a_restored_engine_is_told_anew():
    eng = offloading(blocks=12, host=8)
    publisher = lk.BlockEventPublisher(eng, endpoint=ANY, replay_endpoint=ANY)
    soak(eng, random.Random(1), 6)
    snapshot = eng.snapshot()
    soak(eng, random.Random(2), 6)
    eng.restore(snapshot)
    soak(eng, random.Random(3), 6)
    reader = connect(publisher)
    assert_mirrors(reader, eng)
    reader.close()
    publisher.close()


def test_the_config_has_vllms_keys():
    eng = offloading()
    assert publisher_of(eng, {}) is None
    assert publisher_of(eng, {"enable_kv_cache_events": True, "publisher": "null"}) is None
    publisher = publisher_of(
        eng, {"enable_kv_cache_events": True, "publisher": "zmq", "endpoint": ANY, "buffer_steps": 5, "topic": "t"}
    )
    assert publisher.endpoint.startswith("tcp://127.0.0.1:") and publisher.topic == b"t"
    with pytest.raises(ValueError, match="cannot be bound"):
        lk.BlockEventPublisher(eng, endpoint=publisher.endpoint)
    publisher.close()
    with pytest.raises(TypeError, match="did you mean 'endpoint'"):
        publisher_of(eng, {"endpont": ANY})
    with pytest.raises(ValueError, match="publisher is zmq or null"):
        publisher_of(eng, {"publisher": "kafka"})
    assert (-1).to_bytes(8, "big", signed=True) == END


def test_llm_takes_vllms_kv_events_config():
    config = {"enable_kv_cache_events": True, "publisher": "zmq", "endpoint": ANY, "replay_endpoint": ANY}
    with lk.LLM(num_blocks=64, kv_events_config=config) as llm:
        publisher = llm.block_events
        reader = connect(publisher)
        llm.generate(["def f(x):\n    return x + 1\n" * 3], lk.SamplingParams(max_tokens=4))
        catch_up(reader, publisher)
        assert_mirrors(reader, llm.engine)
        reader.close()
    assert not publisher._thread.is_alive()
    with lk.LLM(num_blocks=64, kv_events_config='{"enable_kv_cache_events": false}') as llm:
        assert llm.block_events is None
