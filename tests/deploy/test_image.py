"""The Dockerfile, docker-compose.yml and the manifest: what they name exists, and what they run works."""

from __future__ import annotations

import fnmatch
import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import check_jsonschema
import jsonschema_rs
import kubernetes_validate
import pytest
import yaml

from deploy.make_secrets import make
from server.config import FIELDS, resolve, variable
from server.http.routes import METRICS, ROLE_OF
from server.keys import find_entry, parse_keys, read_keys
from tests.deploy import files
from tests.deploy.conftest import Running

ROOT = files.ROOT
IMAGES = ("cpu", "gpu", "loadtest")
PINNED = re.compile(r"[\w/.-]+:v?\d+\.\d+\.\d+[\w.-]*")
SETTINGS = {variable(name) for name in FIELDS}


def project() -> dict[str, Any]:
    found: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return found


def ignored(path: str) -> bool:
    """Whether .dockerignore keeps a path out of the build: its last line that matches the path or a parent decides."""
    found = False
    for line in (ROOT / ".dockerignore").read_text().splitlines():
        pattern = line.removeprefix("!").removeprefix("**/")
        parents = [path, *(str(parent) for parent in Path(path).parents)]
        if line and not line.startswith("#") and any(fnmatch.fnmatch(each, pattern) for each in parents):
            found = not line.startswith("!")
    return found


# The Dockerfile


def test_the_stages_hang_together() -> None:
    stages, arguments = files.stages(), files.global_arguments()
    assert list(stages)[-1] == "cpu", "what is built when nothing else is said"
    for name, stage in stages.items():
        before = list(stages)[: list(stages).index(name)]
        base = re.fullmatch(r"\$\{(\w+)\}", stage.base)
        assert stage.base in before or (base is not None and PINNED.fullmatch(arguments[base[1]]))
        for flags, words in stage.of("COPY"):
            if flags:
                (origin,) = flags
                assert origin.removeprefix("--from=") in before
                continue
            for source in words[:-1]:
                assert (ROOT / source).exists(), source
                assert not ignored(source.rstrip("/")), f"{source} is in .dockerignore"


@pytest.mark.parametrize("image", IMAGES)
def test_an_image_holds_what_it_runs(image: str) -> None:
    held, environment = files.contents(image), files.image_environment(image)
    programs = environment["PATH"].split(":")[0]
    assert held.holds(programs)
    for stage in files.lineage(image):
        for flags, words in stage.of("COPY"):
            assert not flags or words[0] == words[1], "a virtual environment names its own place"
    if "PYTHONPATH" in environment:
        source = (ROOT / "loadtests" / "locust" / "locustfile.py").read_text()
        for module in re.findall(r"^from ((?:loadtests|server)[\w.]*) import", source, re.MULTILINE):
            path = f"{environment['PYTHONPATH']}/{module.replace('.', '/')}"
            assert held.holds(path) or held.holds(f"{path}.py"), module
    workdir = Path(files.last(image, "WORKDIR")[0])
    commands = [files.last(image, "ENTRYPOINT"), files.last(image, "CMD")]
    commands += [words for stage in files.lineage(image) for _, words in stage.of("HEALTHCHECK")]
    for word in (word for words in commands for word in words if "/" in word and "://" not in word):
        assert held.holds(str(workdir / word)), word


@pytest.mark.parametrize("image", IMAGES)
def test_no_image_runs_as_root(image: str) -> None:
    assert re.fullmatch(r"[1-9]\d+:[1-9]\d+", files.last(image, "USER")[0])


@pytest.mark.parametrize("path", ["deploy/secrets/keys.toml", ".git", ".venv/bin", "kernels/cpu/lib/x.so", "tests"])
def test_what_stays_out_of_the_image(path: str) -> None:
    assert ignored(path)


def test_the_entry_point_serves(running: Running) -> None:
    assert project()["scripts"][files.last("cpu", "ENTRYPOINT")[0]] == "server.cli:main"
    environment = files.image_environment("cpu")
    assert {name for name in environment if name.startswith("STET_")} <= SETTINGS
    assert files.last("cpu", "EXPOSE") == (environment["STET_PORT"],)
    assert resolve({}, {**environment, "STET_API_KEYS": "x"}).host == "0.0.0.0"
    assert running.generate(prompt="A fox", max_new_tokens=4).status_code == 200


def test_it_writes_nowhere_but_where_it_may(running: Running) -> None:
    if not running.jailed:
        pytest.skip("no mounts of one's own here: unshare --mount is not allowed, or util-linux is missing")
    status = Path(f"/proc/{running.server.process.pid}/status").read_text()
    assert re.search(r"^CapEff:\s+0+$", status, re.MULTILINE)
    assert re.search(r"^NoNewPrivs:\s+1$", status, re.MULTILINE)
    mounts = Path(f"/proc/{running.server.process.pid}/mountinfo").read_text()
    assert re.search(r"^\S+ \S+ \S+ \S+ / ro\b", mounts, re.MULTILINE)
    assert running.generate(prompt="A fox", max_new_tokens=4).status_code == 200


def test_the_health_check(running: Running) -> None:
    kind, python, isolated, path = files.last("cpu", "HEALTHCHECK")
    assert (kind, python) == ("CMD", "python")
    (source,) = (words[0] for stage in files.lineage("cpu") for _, words in stage.of("COPY") if words[-1] == path)

    def check(port: int) -> subprocess.CompletedProcess[str]:
        environment = {"STET_PORT": str(port), "http_proxy": "http://192.0.2.1:1"}
        return subprocess.run(
            [sys.executable, isolated, ROOT / source], env=environment, capture_output=True, text=True, timeout=10
        )

    good = check(running.server.port)
    assert (good.returncode, json.loads(good.stdout)) == (0, {"status": "ready"})
    bad = check(1)
    assert (bad.returncode, bad.stderr.count("\n")) == (1, 1)


def test_the_steps_of_the_build() -> None:
    script = ROOT / "deploy" / "image" / "install.sh"
    assert os.access(script, os.X_OK)
    subprocess.run(["sh", "-n", script], check=True)
    steps = set(re.findall(r"^([\w-]+)\)$", script.read_text(), re.MULTILINE))
    called = set(re.findall(r"install\.sh ([\w-]+)", (ROOT / "Dockerfile").read_text()))
    assert called == steps
    assert subprocess.run([script, "launch"], capture_output=True).returncode == 2
    constraints = (ROOT / "constraints.txt").read_text()
    assert re.search(r"^hatchling==", constraints, re.MULTILINE)


def test_an_image_installs_what_the_project_asks_for() -> None:
    command = [sys.executable, "deploy/image/requirements.py", "", "tracing"]
    printed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    assert printed == project()["dependencies"] + project()["optional-dependencies"]["tracing"]
    pinned = re.findall(r"^([\w.-]+)==", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    for requirement in printed:
        name = re.match(r"[\w.-]+", requirement)[0]  # type: ignore[index]
        assert re.sub(r"[-_.]+", "-", name).lower() in {re.sub(r"[-_.]+", "-", each).lower() for each in pinned}


def test_pruning_takes_tests_and_headers_only(tmp_path: Path) -> None:
    kept = [
        "torch/testing/a.py",
        "torch/lib/libtorch.so",
        "torch/bin/torch_shm_manager",
        "torch/bin/ptxas",
        "numpy/core.py",
    ]
    gone = ["torch/test/a", "torch/include/ATen/a.h", "torch/bin/protoc", "numpy/linalg/tests/a.py", "sympy/tests/b.py"]
    packages = tmp_path / "lib" / "python3.11" / "site-packages"
    for name in kept + gone:
        (packages / name).parent.mkdir(parents=True, exist_ok=True)
        (packages / name).write_text("x")
    subprocess.run([sys.executable, ROOT / "deploy" / "image" / "prune.py", tmp_path], check=True, capture_output=True)
    assert all((packages / name).exists() for name in kept)
    assert not any((packages / name).exists() for name in gone)


# docker-compose.yml


def test_compose_follows_its_schema() -> None:
    vendored = Path(check_jsonschema.__file__).parent / "builtin_schemas" / "vendor" / "compose-spec.json"
    validator = jsonschema_rs.validator_for(json.loads(vendored.read_text()))
    assert [str(error) for error in validator.iter_errors(files.compose())] == []
    assert not validator.is_valid({"services": {"server": {"red_only": True}}})


@pytest.mark.parametrize(("name", "service"), files.compose()["services"].items())
def test_every_service_is_locked_in(name: str, service: dict[str, Any]) -> None:
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert "cap_add" not in service
    assert "privileged" not in service
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert any(mount.startswith("/tmp") for mount in service["tmpfs"])
    for port in service["ports"]:
        assert port.startswith("127.0.0.1:"), f"{name} can be reached by other machines"
    if "build" in service:
        stages = files.lineage(service["build"]["target"])
        assert stages
        declared = {
            words[0].partition("=")[0] for words in (w for s in files.stages().values() for _, w in s.of("ARG"))
        }
        assert set(service["build"].get("args", {})) <= declared
    else:
        assert PINNED.fullmatch(service["image"])


@pytest.mark.parametrize("profile", ["cpu", "gpu", "loadtest", "loadtest-gpu"])
def test_each_profile_has_one_server(profile: str) -> None:
    services = files.enabled(profile)
    servers = [
        service
        for service in services.values()
        if "server" in service.get("networks", {}).get("default", {}).get("aliases", [])
    ]
    (server,) = servers
    assert server["build"]["target"] == ("gpu" if "gpu" in profile else "cpu")
    assert ("deploy" in server) == ("gpu" in profile)
    assert {"prometheus", "grafana"} <= set(services)
    assert ("loadtest" in services) == profile.startswith("loadtest")
    assert files.environment_file()["COMPOSE_PROFILES"] == "cpu"


def test_names_in_compose_exist() -> None:
    loaded = files.compose()
    exposed = {"server": "8000", "server-gpu": "8000", "prometheus": "9090", "grafana": "3000", "loadtest": "8089"}
    for name, service in loaded["services"].items():
        for volume in service.get("volumes", ()):
            source = volume.split(":")[0]
            assert source in loaded["volumes"] or (ROOT / source).exists(), source
        for port in service["ports"]:
            assert port.endswith(f":{exposed[name]}")
        if "build" in service:
            assert files.last(service["build"]["target"], "EXPOSE") == (exposed[name],)
        mentioned = {key for key in service.get("environment", {}) if key.startswith("STET_")}
        assert mentioned - {"STET_API_KEY_FILE"} <= SETTINGS
        for key, value in service.get("environment", {}).items():
            if str(value).startswith("/run/secrets/"):
                assert str(value).removeprefix("/run/secrets/") in service["secrets"], key
        assert set(service.get("secrets", ())) <= set(loaded["secrets"])
    server = loaded["services"]["server"]
    assert "model-cache:/cache" in server["volumes"]
    assert files.last("cpu", "VOLUME") == ("/cache",)
    drain = resolve({}, {}).drain_timeout
    assert float(server["stop_grace_period"].removesuffix("s")) > drain


def test_prometheus_looks_where_the_server_is() -> None:
    service = files.compose()["services"]["prometheus"]
    config = yaml.safe_load((files.DEPLOY / "prometheus" / "prometheus.yml").read_text())
    (job,) = config["scrape_configs"]
    (target,) = job["static_configs"][0]["targets"]
    assert target == f"server:{files.image_environment('cpu')['STET_PORT']}"
    assert ROLE_OF[job["metrics_path"]] == METRICS
    assert job["authorization"]["credentials_file"].removeprefix("/run/secrets/") in service["secrets"]
    mounts = dict(volume.split(":")[:2] for volume in service["volumes"])
    assert f"--config.file={mounts['./deploy/prometheus/prometheus.yml']}" in service["command"]
    assert mounts["./deploy/prometheus/rules"] == "/etc/prometheus/rules"
    assert config["rule_files"] == ["rules/*.yml"]
    assert f"--storage.tsdb.path={mounts['prometheus-data']}" in service["command"]


def test_the_load_test_has_its_file_and_its_key() -> None:
    command = files.last("loadtest", "CMD")
    source = (ROOT / command[command.index("-f") + 1]).read_text()
    assert "STET_API_KEY_FILE" in source
    assert command[command.index("--host") + 1] == "http://server:8000"
    assert any(requirement.startswith("locust") for requirement in project()["optional-dependencies"]["loadtest"])


def test_the_secrets_are_made_as_they_are_read(tmp_path: Path) -> None:
    folder = tmp_path / "secrets"
    mine = make(folder)
    assert mine is not None
    named = {Path(secret["file"]).name for secret in files.compose()["secrets"].values()}
    assert named == {path.name for path in folder.iterdir()}
    assert folder.stat().st_mode & 0o777 == 0o700
    assert {path.stat().st_mode & 0o777 for path in folder.iterdir()} == {0o644}
    entries = parse_keys(read_keys(folder / "keys.toml"))

    def roles(key: str) -> frozenset[str]:
        entry = find_entry(entries, key)
        assert entry is not None
        return entry.roles

    assert roles(mine) == roles((folder / "loadtest.key").read_text()) == {"infer"}
    assert roles((folder / "prometheus.key").read_text()) == {"metrics"}
    before = {path: path.read_text() for path in folder.iterdir()}
    assert make(folder) is None
    assert before == {path: path.read_text() for path in folder.iterdir()}
    assert "deploy/secrets/" in (ROOT / ".gitignore").read_text().splitlines()


# Kubernetes


def manifests() -> dict[str, dict[str, Any]]:
    loaded = yaml.safe_load_all((files.DEPLOY / "kubernetes" / "stet.yaml").read_text())
    return {manifest["kind"]: manifest for manifest in loaded}


@pytest.mark.parametrize("kind", ["Deployment", "Service", "HorizontalPodAutoscaler", "PodDisruptionBudget"])
@pytest.mark.parametrize("version", ["1.31", "1.37"])
def test_the_manifest_follows_the_schema(kind: str, version: str) -> None:
    kubernetes_validate.validate(manifests()[kind], version, strict=True)
    broken = {**manifests()[kind], "spec": {**manifests()[kind]["spec"], "replica": 1}}
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(broken, version, strict=True)


def test_the_manifest_fits_the_image_and_the_server(running: Running) -> None:
    found = manifests()
    pod = found["Deployment"]["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert container["args"] == list(files.last("cpu", "CMD"))
    assert container["image"] == files.compose()["services"]["server"]["image"]
    variables = {each["name"]: each["value"] for each in container["env"]}
    assert set(variables) <= SETTINGS
    user, group = files.last("cpu", "USER")[0].split(":")
    context = pod["securityContext"]
    assert [context["runAsUser"], context["runAsGroup"], context["fsGroup"]] == [int(user), int(group), int(group)]
    assert container["securityContext"] == {
        "readOnlyRootFilesystem": True,
        "allowPrivilegeEscalation": False,
        "capabilities": {"drop": ["ALL"]},
    }
    (port,) = container["ports"]
    assert str(port["containerPort"]) == files.image_environment("cpu")["STET_PORT"]
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        asked = container[probe]["httpGet"]
        assert asked["port"] == port["name"]
        assert running.server.get(asked["path"])[0] == 200, "a probe has no key"
    pause = float(container["lifecycle"]["preStop"]["exec"]["command"][1])
    assert pod["terminationGracePeriodSeconds"] > pause + float(variables["STET_DRAIN_TIMEOUT"])
    assert container["resources"]["limits"]["cpu"] == variables["STET_THREADS"]
    mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    assert set(mounts) == {volume["name"] for volume in pod["volumes"]}
    assert {mounts["cache"], mounts["tmp"]} == {"/cache", "/tmp"}
    assert variables["STET_API_KEYS"] == f"{mounts['keys']}/keys.toml"

    selector = found["Deployment"]["spec"]["selector"]["matchLabels"]
    assert found["Deployment"]["spec"]["template"]["metadata"]["labels"] == selector
    assert found["Service"]["spec"]["selector"] == selector
    assert found["PodDisruptionBudget"]["spec"]["selector"]["matchLabels"] == selector
    assert found["Service"]["spec"]["ports"][0]["targetPort"] == port["name"]
    scaler = found["HorizontalPodAutoscaler"]["spec"]
    assert scaler["scaleTargetRef"]["name"] == found["Deployment"]["metadata"]["name"]
    metric = scaler["metrics"][0]["pods"]["metric"]["name"]
    assert f"\n{metric} " in running.get("/metrics", running.metrics).text
