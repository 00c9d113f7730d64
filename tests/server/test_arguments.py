"""`labkit serve`'s command line: vLLM's flags, what they set, and what is said of the others."""

import re
from pathlib import Path

import pytest

from labkit.engine.build import Options
from labkit.server.arguments import help_text, read
from labkit.server.flags import BY_NAME, ENGINE, FLAGS, HARMLESS, PROCESS, REFUSED, SERVER
from labkit.server.settings import Settings

ROOT = Path(__file__).parents[2]


def test_flags_of_tutorials_set_options_of_the_engine_and_the_server():
    found = read(
        [
            "org/model",
            "--served-model-name",
            "a",
            "b",
            "--api-key",
            "k",
            "--host",
            "0.0.0.0",
            "--port",
            "9000",
            "--dtype",
            "half",
            "--max-model-len",
            "4K",
            "--gpu-memory-utilization=0.8",
            "--max-num-seqs",
            "16",
            "--max-num-batched-tokens",
            "2k",
            "--tensor-parallel-size",
            "1",
            "--quantization",
            "int8",
            "--kv-cache-dtype",
            "fp8",
            "--no-enable-prefix-caching",
            "--trust_remote_code",
            "--seed",
            "3",
            "--kv-offloading-size",
            "1.5",
            "--swap-space",
            "4",
            "--scheduling-policy",
            "priority",
            "--enforce-eager",
            "--disable-log-requests",
            "-tp",
            "1",
        ],
        {},
    )
    assert found.process == {"model": "org/model", "host": "0.0.0.0", "port": 9000}
    assert found.server == {"served_model_name": ["a", "b"], "api_key": ["k"], "log_requests": False}
    assert found.engine == {
        "dtype": "half", "max_model_len": 4096, "gpu_memory_utilization": 0.8, "max_num_seqs": 16,
        "max_num_batched_tokens": 2000, "quantization": "int8", "kv_cache_dtype": "fp8", "prefix_caching": False,
        "trust_remote_code": True, "seed": 3, "order": "priority", "graphs": False,
        "kv_offloading_size": 1.5, "tensor_parallel_size": 1,
    }  # fmt: skip
    assert found.remarks == ["--swap-space has no effect here: labkit's flag for it is --num-host-blocks"]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("--max-model-length 5", "did you mean --max-model-len?"),
        ("--frobnicate", "there is no flag --frobnicate"),
        ("--port", "--port needs a value"),
        ("--port many", "--port takes a whole number"),
        ("--api-server-count 2", "--api-server-count 1 is accepted"),
        ("--distributed-executor-backend rays", "--distributed-executor-backend takes mp"),
        ("--fully-sharded-loras", "--fully-sharded-loras is not served"),
        ("--speculative-config ngram", "--speculative-config takes JSON, got 'ngram'"),
        ("--speculative-config []", "--speculative-config takes a JSON object"),
        ("--speculative-config {}", "--speculative-config needs a method, one of ngram, suffix, draft_model"),
        ('--speculative-config={"method":"ngram","num_spec":3}', "--speculative-config has no 'num_spec'"),
        ('--speculative-config={"method":"eagle9"}', "method of --speculative-config"),
        ('--speculative-config={"method":"ngram","num_speculative_tokens":0}', "--speculative-config: num_spec"),
        ("--limit-mm-per-prompt image=2", "--limit-mm-per-prompt takes JSON, got 'image=2'"),
        ("--limit-mm-per-prompt 2", '--limit-mm-per-prompt takes a JSON object, such as {"image": 4}, got 2'),
        ('--limit-mm-per-prompt {"images":2}', "--limit-mm-per-prompt takes a JSON object"),
        ('--limit-mm-per-prompt={"image":-1}', "--limit-mm-per-prompt: image must be a whole number from 0, got -1"),
        ('--limit-mm-per-prompt={"image":{"width":9}}', "--limit-mm-per-prompt: image must be a whole number"),
        ("--mm-processor-kwargs []", "--mm-processor-kwargs takes a JSON object"),
        ("--media-io-kwargs {}", "--media-io-kwargs is not read"),
        ("--allowed-local-media-path", "--allowed-local-media-path needs a value"),
        ("--num-speculative-tokens 4", "is a key of --speculative-config"),
        ("--kv-offloading-backend lmcache", "--kv-offloading-backend takes native"),
        ("--task score", "--task takes auto or generate"),
        ("--trust-remote-code=maybe", "takes no value"),
        ("--allowed-origins x", "takes JSON"),
        ("--config /no/such.yaml", "cannot be read"),
        ("--chat-template /no/such.jinja", "cannot be read"),
    ],
)
def test_what_is_wrong_names_the_flag(words, told):
    with pytest.raises(ValueError, match=re.escape(told)):
        read(words.split(), {})


def test_flags_of_images_are_those_of_vllm():
    limits = '{"image": {"count": 5, "width": 512, "height": 512}, "video": 0}'
    found = read(
        ["m", "--limit-mm-per-prompt", limits, "--mm-processor-kwargs", '{"max_dynamic_patch": 4}',
         "--allowed-media-domains", "a.b", "c.d:8443", "--allowed-local-media-path", "/pictures"],
        {},
    )  # fmt: skip
    assert found.engine == {
        "limit_mm_per_prompt": {"image": 5, "video": 0},
        "mm_processor_kwargs": {"max_dynamic_patch": 4},
    }
    assert found.server == {"allowed_media_domains": ["a.b", "c.d:8443"], "allowed_local_media_path": "/pictures"}
    with pytest.raises(ValueError, match=r"allowed_media_domains takes names of hosts, .* got 'https://a.b'"):
        Settings(allowed_media_domains=["https://a.b"])
    with pytest.raises(ValueError, match="allowed_local_media_path must be a folder"):
        Settings(allowed_local_media_path="/no/such/folder")


def test_every_flag_sets_an_option_that_exists_or_says_why_not():
    engine, server = set(Options.__dataclass_fields__), set(Settings.__dataclass_fields__)
    assert len(BY_NAME) == len(FLAGS)
    for flag in FLAGS:
        assert flag.help, flag.name
        if flag.where == ENGINE:
            assert flag.target in engine | {"data_parallel_size", "router"}, flag.name  # of make_engine
        elif flag.where == SERVER:
            assert flag.target in server, flag.name
        else:
            assert flag.where in (PROCESS, HARMLESS, REFUSED)
        assert f"--{flag.name}" in help_text() or flag.name in help_text()


def test_drafts_are_configured_as_for_an_engine():
    found = read(["--speculative-config", '{"method": "ngram", "num_speculative_tokens": 4}'], {})
    assert found.engine == {"speculative_config": {"method": "ngram", "num_speculative_tokens": 4}}
    assert read(["--speculative-config", "null"], {}).engine == {"speculative_config": None}


def test_a_refused_flag_is_accepted_where_it_asks_for_nothing():
    assert (
        read(["--pipeline-parallel-size", "1", "--no-enable-lora", "--no-enable-expert-parallel"][:2], {}).remarks == []
    )
    assert read(["--no-enable-expert-parallel"], {}).engine == {}


def test_a_yaml_file_gives_flags_and_the_command_line_goes_first(tmp_path):
    path = tmp_path / "serve.yaml"
    path.write_text(
        "model: org/a\nport: 1234\nmax-num-seqs: 7\nenable_prefix_caching: false\nserved-model-name: [x, y]\n"
        "allowed-origins: ['https://a.example']\n"
    )
    found = read(["org/b", "--config", str(path), "--port", "5"], {})
    assert found.process == {"model": "org/b", "port": 5, "config": str(path)}
    assert found.engine == {"max_num_seqs": 7, "prefix_caching": False}
    assert found.server == {"served_model_name": ["x", "y"], "allowed_origins": ["https://a.example"]}
    for text, told in (("prot: 1", "did you mean --port"), ("- 1", "must map flags"), ("a: [", "is not YAML"),
                       ("trust-remote-code: 3", "is true or false")):  # fmt: skip
        path.write_text(text)
        with pytest.raises(ValueError, match=told):
            read(["--config", str(path)], {})


def test_the_key_may_come_from_the_environment_or_a_file(tmp_path):
    assert "api_key" not in read([], {}, str(tmp_path)).server
    (tmp_path / ".env").write_text("OTHER=1\nexport VLLM_API_KEY='of the file'\n")
    assert read([], {}, str(tmp_path)).server["api_key"] == ["of the file"]
    assert read([], {"VLLM_API_KEY": "of the shell"}, str(tmp_path)).server["api_key"] == ["of the shell"]
    assert read(["--api-key", "given"], {"VLLM_API_KEY": "no"}, str(tmp_path)).server["api_key"] == ["given"]


def test_a_template_is_a_file_or_itself(tmp_path):
    (tmp_path / "t.jinja").write_text("{{ messages }}")
    assert read(["--chat-template", str(tmp_path / "t.jinja")], {}).server["chat_template"] == "{{ messages }}"
    assert read(["--chat-template", "{{ x }}"], {}).server["chat_template"] == "{{ x }}"


def test_the_commands_of_the_pages_are_understood():
    lines = [
        line.partition("labkit serve")[2].partition("#")[0].split()
        for page in ("README.md", "docs/server.md")
        for block in re.findall(r"```bash\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)
        for line in block.splitlines()
        if "labkit serve" in line and "--config" not in line
    ]
    assert lines
    for words in lines:
        read(words, {})


def test_sampling_defaults_come_from_the_models_file(tmp_path):
    from labkit.engine.defaults import sampling_defaults

    (tmp_path / "generation_config.json").write_text('{"temperature": 0.6, "top_k": 20, "max_new_tokens": 64, "x": 1}')
    wanted = {"temperature": 0.6, "top_k": 20, "max_tokens": 64}
    assert sampling_defaults(str(tmp_path)) == wanted == sampling_defaults(None, str(tmp_path))
    assert sampling_defaults(str(tmp_path), "vllm") == {} == sampling_defaults(None)
    with pytest.raises(ValueError, match=r"there is no generation_config\.json"):
        sampling_defaults(None, str(tmp_path / "none"))
