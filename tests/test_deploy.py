"""What deploy/ holds: valid by schema, and in agreement with the server."""

import json
import re
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest
import yaml
from prometheus_client import generate_latest

import labkit as lk
from labkit.server.arguments import read
from labkit.server.metrics import registry_of
from labkit.server.service import Service
from labkit.server.settings import Settings
from tests.harness import engine

DEPLOY = Path(__file__).parents[1] / "deploy"
MANIFESTS = [path for path in sorted((DEPLOY / "k8s").glob("*.yaml")) if path.name != "kustomization.yaml"]


def load(name: str):
    return yaml.safe_load((DEPLOY / name).read_text())


def container():
    return load("k8s/deployment.yaml")["spec"]["template"]["spec"]["containers"][0]


def seconds(flag: str) -> int:
    return next(int(arg.partition("=")[2]) for arg in container()["args"] if arg.startswith(f"--{flag}="))


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: path.name)
def test_manifests_match_kubernetes_schema(path):
    validator = pytest.importorskip("kubernetes_validate", reason="it comes with labkit[dev]")
    for document in yaml.safe_load_all(path.read_text()):
        validator.validate(document, "1.31", strict=True)
        broken = json.loads(json.dumps(document)) | {"spce": {}}
        with pytest.raises(validator.ValidationError):
            validator.validate(broken, "1.31", strict=True)


def test_the_kustomization_names_every_manifest_and_makes_the_secret_that_the_server_reads():
    found = load("k8s/kustomization.yaml")
    assert sorted(found["resources"]) == [path.name for path in MANIFESTS]
    (secret,) = found["secretGenerator"]
    key = next(one for one in container()["env"] if one["name"] == "VLLM_API_KEY")["valueFrom"]["secretKeyRef"]
    assert key == {"name": secret["name"], "key": "key"} and secret["envs"] == ["key.env"]
    assert found["generatorOptions"]["disableNameSuffixHash"]
    assert "deploy/k8s/key.env" in (DEPLOY.parent / ".gitignore").read_text().split()
    assert not (DEPLOY / "k8s/key.env").exists()


def test_pods_are_drained_within_their_grace_and_probed_where_the_server_answers():
    pod = load("k8s/deployment.yaml")["spec"]["template"]["spec"]
    waits = int(container()["lifecycle"]["preStop"]["exec"]["command"][1])
    assert waits + seconds("shutdown-timeout") + 5 < pod["terminationGracePeriodSeconds"]
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert container()[probe]["httpGet"] == {"path": "/health", "port": "http"}
    assert container()["ports"] == [{"name": "http", "containerPort": seconds("port")}]
    service = load("k8s/service.yaml")["spec"]
    assert service["selector"].items() <= load("k8s/deployment.yaml")["spec"]["template"]["metadata"]["labels"].items()
    assert service["ports"][0]["targetPort"] == "http"
    claims = [
        volume["persistentVolumeClaim"]["claimName"] for volume in pod["volumes"] if "persistentVolumeClaim" in volume
    ]
    assert claims == [load("k8s/models.yaml")["metadata"]["name"]]
    assert container()["resources"]["limits"] and pod["securityContext"]["runAsNonRoot"]


def test_caches_lie_in_volumes_that_the_containers_user_can_write():
    pod = load("k8s/deployment.yaml")["spec"]["template"]["spec"]
    assert container()["securityContext"]["readOnlyRootFilesystem"]
    mounts = [mount["mountPath"] for mount in container()["volumeMounts"]]
    values = {one["name"]: one.get("value", "") for one in container()["env"]}
    for name in ("HF_HOME", "LABKIT_CACHE", "TRITON_CACHE_DIR"):
        assert any(Path(values[name]).is_relative_to(mount) for mount in mounts), name
    assert "/tmp" in mounts and pod["securityContext"]["fsGroup"] == pod["securityContext"]["runAsUser"]
    lines = (DEPLOY / "Dockerfile").read_text()
    assert "ENV HF_HOME=/models" in lines and re.search(r"chown labkit [^\n]*/models", lines)
    cache = re.search(r"^ENV LABKIT_CACHE=(\S+)$", lines, re.MULTILINE)[1]
    assert f"chown -R labkit {cache}" in lines  # what was built into it as root is in a folder below
    assert lines.index("RUN labkit doctor") < lines.index("chown -R labkit") < lines.index("USER 1000")


def test_the_image_is_built_from_what_the_build_context_lets_in():
    lines = (DEPLOY / "Dockerfile").read_text()
    ignored = (DEPLOY.parent / ".dockerignore").read_text().split("\n")
    allowed = {line.removeprefix("!") for line in ignored if line.startswith("!")}
    copied = {name for line in re.findall(r"^COPY (.*) \S+$", lines, re.MULTILINE) for name in line.split()}
    assert "*" in ignored and copied == allowed
    assert all((DEPLOY.parent / name).exists() for name in copied)
    extras = re.search(r"'\.\[(.*)\]'", lines)[1].split(",")
    known = tomllib.loads((DEPLOY.parent / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert set(extras) <= set(known) and {"server", "lab", "otel"} <= set(extras)
    assert re.search(r"^torch==", (DEPLOY.parent / "constraints.txt").read_text(), re.MULTILINE)
    exposed = re.search(r"^EXPOSE (\d+)$", lines, re.MULTILINE)[1]
    assert f"127.0.0.1:{exposed}/health" in lines  # of the health check


def test_commands_in_the_dockerfile_and_the_pages_are_labkits():
    text = "\n".join(
        (DEPLOY.parent / name).read_text() for name in ("deploy/Dockerfile", "docs/deployment.md", "docs/install.md")
    )
    text = re.sub(r"\\\n[# ]*", "", text)
    runs = re.findall(r"docker run [^\n]*? labkit(?: +([^\n#]*?))?(?: +#.*)?$", text, re.MULTILINE)
    assert len(runs) >= 8
    for command in filter(None, runs):
        verb, *words = command.split()
        assert verb in ("serve", "doctor", "lab"), command
        if verb == "serve":
            assert read(words, {}).process["host"] == "0.0.0.0"  # what is published must listen there


def test_arguments_of_containers_are_flags_of_the_server():
    assert container()["args"][0] == "serve"
    assert read(container()["args"][1:], {}).process["host"] == "0.0.0.0"
    command = load("compose.yaml")["services"]["labkit"]["command"]
    assert command[0] == "serve" and read(command[1:], {}).server == {"shutdown_timeout": 20.0}
    docker = re.findall(r"^(?:ENTRYPOINT|CMD) (\[.*\])$", (DEPLOY / "Dockerfile").read_text(), re.MULTILINE)
    assert json.loads(docker[0]) == ["labkit"] and json.loads(docker[1])[0] == "serve"
    assert read(json.loads(docker[1])[1:], {}).process == {"host": "0.0.0.0"}


def test_compose_listens_on_loopback_and_mounts_what_exists():
    found = load("compose.yaml")
    assert set(found) == {"name", "services", "volumes", "secrets"}
    for name, service in found["services"].items():
        assert set(service) <= {"build", "image", "command", "environment", "ports", "volumes", "stop_grace_period",
                                "restart", "secrets", "depends_on"}, name  # fmt: skip
        assert all(port.startswith("127.0.0.1:") for port in service["ports"])
        assert ":latest" not in service["image"]
        for volume in service["volumes"]:
            source = volume.partition(":")[0]
            assert source in found["volumes"] or (DEPLOY / source).is_file(), volume
        assert set(service.get("secrets", ())) <= set(found["secrets"])
    assert (DEPLOY / found["services"]["labkit"]["build"]["context"] / "deploy/Dockerfile").is_file()
    grace = int(found["services"]["labkit"]["stop_grace_period"].removesuffix("s"))
    assert grace > read(found["services"]["labkit"]["command"][1:], {}).server["shutdown_timeout"] + 5
    (target,) = load("prometheus.yml")["scrape_configs"][0]["static_configs"][0]["targets"]
    assert target == "labkit:8000"
    for secret in found["secrets"]:
        assert (
            load("prometheus.yml")["scrape_configs"][0]["authorization"]["credentials_file"] == f"/run/secrets/{secret}"
        )


@pytest.mark.skipif(shutil.which("promtool") is None, reason="there is no promtool: apt-get install prometheus")
def test_prometheus_accepts_its_configuration():
    checked = subprocess.run(
        ["promtool", "check", "config", "--syntax-only", str(DEPLOY / "prometheus.yml")], capture_output=True, text=True
    )
    assert checked.returncode == 0, checked.stderr


def test_every_metric_of_the_grafana_dashboard_exists():
    found = load("grafana/labkit.json")
    served = generate_latest(registry_of(Service(Settings(), engine(tokenizer=lk.ByteTokenizer())))).decode()
    names = set(re.findall(r"^# TYPE (\S+)", served, re.MULTILINE))
    names |= {f"{name}_{end}" for name in names for end in ("bucket", "sum", "count")}
    asked = [target["expr"] for panel in found["panels"] for target in panel["targets"]]
    asked += [one["query"] for one in found["templating"]["list"] if one["type"] == "query"]
    wanted = {name for text in asked for name in re.findall(r"\b(?:vllm:|labkit:|http_)\w+", text)}
    assert len(wanted) > 15 and wanted <= names, wanted - names
    assert len({panel["id"] for panel in found["panels"]}) == len(found["panels"])
    places = {(panel["gridPos"]["x"], panel["gridPos"]["y"]) for panel in found["panels"]}
    assert len(places) == len(found["panels"])
    assert load("grafana/datasource.yml")["datasources"][0]["url"] == "http://prometheus:9090"


@pytest.mark.skipif(shutil.which("promtool") is None, reason="there is no promtool: apt-get install prometheus")
def test_prometheus_parses_every_query_of_the_dashboard(tmp_path):
    found = load("grafana/labkit.json")
    asked = [target["expr"] for panel in found["panels"] for target in panel["targets"]]
    plain = [text.replace("$__rate_interval", "1m").replace("$model", ".*") for text in asked]
    rules = [{"record": f"r{i}", "expr": text} for i, text in enumerate(plain)]
    (tmp_path / "rules.yml").write_text(yaml.safe_dump({"groups": [{"name": "all", "rules": rules}]}))
    checked = subprocess.run(
        ["promtool", "check", "rules", str(tmp_path / "rules.yml")], capture_output=True, text=True
    )
    assert checked.returncode == 0, checked.stderr


def test_the_dockerfile_is_clean():
    hadolint = shutil.which("hadolint") or _beside_python("hadolint")
    if hadolint is None:
        pytest.skip("there is no hadolint: it comes with labkit[dev] on Linux")
    checked = subprocess.run([hadolint, str(DEPLOY / "Dockerfile")], capture_output=True, text=True)
    assert checked.returncode == 0, checked.stdout


def _beside_python(name: str) -> str | None:
    import sys

    return shutil.which(name, path=str(Path(sys.executable).parent))
