"""The application for Ray Serve, with a stand-in for Serve that keeps what it is given."""

import sys
from types import ModuleType, SimpleNamespace

import pytest
from starlette.testclient import TestClient

from labkit.server.ray_serve import application


@pytest.fixture
def serve(monkeypatch):
    def ingress(build):
        def decorate(cls):
            cls.build = staticmethod(build)
            return cls

        return decorate

    def deployment(**options):
        return lambda cls: SimpleNamespace(bind=lambda: SimpleNamespace(cls=cls, options=options))

    ray = ModuleType("ray")
    ray.serve = SimpleNamespace(ingress=ingress, deployment=deployment)
    monkeypatch.setitem(sys.modules, "ray", ray)


def test_a_replica_answers_as_the_server_and_fails_its_check_with_the_engine(serve):
    made = application(
        engine={"num_blocks": 64, "max_num_seqs": 16}, server={"served_model_name": "tiny"}, num_replicas=2
    )
    assert made.options == {
        "name": "labkit", "max_ongoing_requests": 32, "graceful_shutdown_timeout_s": 30.0, "num_replicas": 2,
    }  # fmt: skip
    replica = made.cls()
    replica.check_health()  # while it is loading
    app = replica.build()
    with TestClient(app) as client:
        body = {"model": "tiny", "prompt": "x = ", "max_tokens": 4, "stream": True}
        lines = [line for line in client.post("/v1/completions", json=body).iter_lines() if line]
        assert lines[-1] == "data: [DONE]" and len(lines) > 2
        replica.check_health()
        app.state.service.engine.close()
        with pytest.raises(RuntimeError, match="the engine has stopped"):
            replica.check_health()


def test_wrong_names_are_errors_before_anything_is_started(serve):
    with pytest.raises(TypeError, match="engine has no option 'max_modellen'; did you mean 'max_model_len'"):
        application(engine={"max_modellen": 4096})
    with pytest.raises(TypeError, match="server has no option 'api_keys'; did you mean 'api_key'"):
        application(server={"api_keys": ["k"]})
    with pytest.raises(ValueError, match="max_num_seqs must be at least 1"):
        application(engine={"max_num_seqs": 0})


def test_without_ray_serve_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ImportError, match=r"pip install 'labkit\[server\]' 'ray\[serve\]'"):
        application()
