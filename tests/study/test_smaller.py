"""The table of what smaller KV costs."""

import pytest

import labkit as lk

TEXT = "import os\n\n\ndef read(path):\n    with open(path) as file:\n        return file.read()\n\n\n" * 12


def test_every_way_is_judged_on_the_same_tokens():
    eng = lk.Engine(num_blocks=64, dtype="float32")
    ways = {"all of it": lk.SnapKV(1.0), "a window": lk.StreamingLLM(40, every=8)}
    table = lk.study.smaller_kv(eng, ways, [TEXT], num_prompt=120, num_output=12, needles=1)
    assert list(table.index) == ["whole", "all of it", "a window"]
    assert table.loc["all of it", "perplexity"] == table.loc["whole", "perplexity"] > 1
    assert table.agreement["whole"] == table.agreement["all of it"] == 1
    assert table["keys"]["whole"] == 1 and table["keys"]["a window"] < 0.5
    assert table.blocks["a window"] < table.blocks["whole"]
    assert table.mib["whole"] == table.blocks["whole"] * eng.runner.bytes_per_block(16) / 2**20
    assert table.speed["whole"] == 1 and (table.speed > 0.1).all()
    with pytest.raises(ValueError, match="raise max_num_seqs"):
        lk.study.smaller_kv(eng, ways, [TEXT] * 1000)
    with pytest.raises(ValueError, match="a text has"):
        lk.study.smaller_kv(eng, ways, ["short"])
    eng.close()
