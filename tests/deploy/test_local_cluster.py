"""deploy/local-cluster.sh with a tiny model: Prometheus says what the daemons' replies said, and nothing is lost on a restart."""

import contextlib
import dataclasses
import json
import pathlib
import re
import signal
import subprocess
import threading
import time
import urllib.parse
import urllib.request
from collections.abc import Callable
from typing import Any

import coppice
import pytest
import yaml
from conftest import ROOT

README = ROOT / "deploy/README.md"
DEADLINE_S = 60
# rate() extrapolates each series to the edges of its window by itself.
RATE_TOLERANCE = 0.05
SHORT = {"n": 2, "max_tokens": 8, "return_text": False}  # the tiny model has no tokenizer


def get(url: str) -> str:
    """The body of an HTTP answer."""
    with urllib.request.urlopen(url, timeout=DEADLINE_S) as response:
        body: bytes = response.read()
    return body.decode()


def until(what: str, condition: Callable[[], object]) -> None:
    """Waits until the condition holds; fails after the deadline."""
    deadline, never = time.monotonic() + DEADLINE_S, threading.Event()
    while not condition():
        assert time.monotonic() < deadline, f"not within {DEADLINE_S} s: {what}"
        never.wait(0.05)


@dataclasses.dataclass
class Cluster:
    """A running deploy/local-cluster.sh."""

    process: subprocess.Popen[str]
    directory: pathlib.Path
    lines: list[str] = dataclasses.field(default_factory=list)

    def read_until(self, text: str) -> None:
        """Reads what the script prints up to the line that holds `text`."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append(line)
            if text in line:
                return
        raise AssertionError(f"the cluster ended before '{text}':\n" + "".join(self.lines))

    @property
    def state(self) -> dict[str, Any]:
        """cluster.json."""
        state: dict[str, Any] = json.loads((self.directory / "cluster.json").read_text())
        return state

    def query(self, promql: str) -> list[dict[str, Any]]:
        """An instant query's vector."""
        url = f"{self.state['prometheus']}/api/v1/query?query={urllib.parse.quote(promql)}"
        answer = json.loads(get(url))
        assert answer["status"] == "success", (promql, answer)
        vector: list[dict[str, Any]] = answer["data"]["result"]
        return vector

    def value(self, promql: str) -> float | None:
        """The one value of a query, None if there is none yet."""
        vector = self.query(promql)
        return float(vector[0]["value"][1]) if vector else None


@contextlib.contextmanager
def running(coppiced, directory, *options):
    """A cluster that is killed in the end, if it has not stopped before."""
    script = [ROOT / "deploy/local-cluster.sh", "--geometry", "tiny-llama", "--coppiced", coppiced]
    ports = ["--port", "0", "--prometheus-port", "0", "--out", directory]
    with subprocess.Popen(
        [str(word) for word in (*script, *ports, *options)],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    ) as process:  # fmt: skip
        try:
            cluster = Cluster(process, directory)
            cluster.read_until("local-cluster: ready")
            yield cluster
        finally:
            process.kill()


@pytest.fixture(scope="module")
def cluster(coppiced, tmp_path_factory):
    """One cluster for all tests; each reads it from where the test before left it."""
    with running(coppiced, tmp_path_factory.mktemp("cluster")) as started:
        yield started


def prompt(i, length=96):
    """A prompt of token ids, equal to others in its first half."""
    half = range(length // 2)
    return [7 + j % 50 for j in half] + [11 + (i * 13 + j) % 40 for j in half]


def test_the_hit_rate_in_prometheus_is_that_of_the_replies(cluster):
    until("every target scraped", lambda: cluster.value("count(up == 1)") == 4)
    with coppice.Client(cluster.state["router"], timeout=DEADLINE_S) as client:
        groups = [client.generate(prompt(i % 4), **SHORT) for i in range(24)]
    prompt_tokens = sum(group.usage.prompt_tokens for group in groups)
    cached_tokens = sum(group.usage.cached_tokens for group in groups)
    assert 0 < cached_tokens < prompt_tokens
    until(
        "all requests scraped",
        lambda: cluster.value("sum(coppice_prompt_tokens_total)") == prompt_tokens,
    )
    ratio = "sum(coppice_prompt_tokens_hit_total) / sum(coppice_prompt_tokens_total)"
    assert cluster.value(ratio) == cached_tokens / prompt_tokens
    # The figure an operator sees, word for word from the README.
    (shown,) = re.findall(r"`(sum\(rate\(coppice_prompt_tokens_hit_total.*?)`", README.read_text())
    assert cluster.value(shown) == pytest.approx(cached_tokens / prompt_tokens, abs=RATE_TOLERANCE)


def expressions():
    """Every PromQL expression of dashboard and rules, variables filled in."""
    dashboard = json.loads((ROOT / "deploy/grafana/coppice.json").read_text())
    found = [t["expr"] for panel in dashboard["panels"] for t in panel.get("targets", [])]
    found += [a["expr"] for a in dashboard["annotations"]["list"]]
    for group in yaml.safe_load((ROOT / "deploy/prometheus/alerts.yaml").read_text())["groups"]:
        found += [rule["expr"] for rule in group["rules"]]
    assert len(found) > 60
    return [
        re.sub(r"\$(namespace|instance)", ".*", e).replace("$__rate_interval", "1m") for e in found
    ]


def exported(cluster):
    """Names of all samples in /metrics of a replica and of the router."""
    urls = [cluster.state["replicas"][0]["http"], cluster.state["router_http"]]
    text = "".join(get(f"http://{url}/metrics") for url in urls)
    return {re.match(r"\w+", line)[0] for line in text.splitlines() if line[:1].isalpha()}


def test_every_metric_of_dashboard_and_rules_is_exported(cluster):
    named = {name for e in expressions() for name in re.findall(r"\bcoppice_\w+", e)}
    assert len(named) > 30
    assert named - exported(cluster) == set()


def test_a_replica_that_dies_comes_back_on_its_port(cluster):
    ports = cluster.directory / "replica-1/ports.json"
    before = json.loads(ports.read_text())
    subprocess.run(["kill", "-KILL", str(before["pid"])], check=True)

    def another_process():
        return ports.exists() and json.loads(ports.read_text())["pid"] != before["pid"]

    until("replica-1 is ready again", another_process)
    after = json.loads(ports.read_text())
    assert (after["grpc"], after["http"]) == (before["grpc"], before["http"])
    assert get(f"http://127.0.0.1:{after['http']}/readyz") == "ready\n"


def test_a_rolling_restart_under_load_fails_no_request(cluster):
    stop, failures, done = threading.Event(), [], []

    def load(worker):
        with coppice.Client(cluster.state["router"], timeout=DEADLINE_S) as client:
            while not stop.is_set():
                try:
                    done.append(client.generate(prompt(worker), **SHORT))
                except coppice.CoppiceError as error:
                    failures.append(error)

    workers = [threading.Thread(target=load, args=(i,)) for i in range(4)]
    for worker in workers:
        worker.start()
    cluster.process.send_signal(signal.SIGHUP)
    cluster.read_until("all replicas restarted")
    stop.set()
    for worker in workers:
        worker.join()
    assert failures == [] and len(done) > 4


def test_every_panel_has_data_and_every_rule_is_healthy(cluster):
    replica = cluster.state["replicas"][0]["grpc"]
    with coppice.Client(replica, timeout=DEADLINE_S) as client:
        group = client.generate(prompt(0), retain=True, **SHORT)
        client.train_step([group], [[1.0, 0.0]], lr=1e-4)
    until("the step scraped", lambda: cluster.value("sum(rate(coppice_train_steps_total[1m]))"))
    dashboard = json.loads((ROOT / "deploy/grafana/coppice.json").read_text())
    panels = len([t for panel in dashboard["panels"] for t in panel.get("targets", [])])
    empty = [e for e in expressions()[:panels] if not cluster.query(e)]
    assert empty == []
    rules = f"{cluster.state['prometheus']}/api/v1/rules"

    def health():
        groups = json.loads(get(rules))["data"]["groups"]
        return {rule["health"] for group in groups for rule in group["rules"]}

    until("all rules evaluated", lambda: "unknown" not in health())
    assert health() == {"ok"}


def test_ctrl_c_stops_everything(cluster):
    state = cluster.state
    pids = [
        json.loads((cluster.directory / name / "ports.json").read_text())["pid"]
        for name in ("router", *(replica["name"] for replica in state["replicas"]))
    ]
    cluster.process.send_signal(signal.SIGINT)
    assert cluster.process.wait(DEADLINE_S) == 0, "".join(cluster.lines)
    assert not [pid for pid in pids if pathlib.Path(f"/proc/{pid}").exists()]
    assert not (cluster.directory / "cluster.json").exists()


def test_a_stopped_cluster_s_directory_is_used_again_and_its_leftovers_go(cluster, coppiced):
    assert cluster.process.poll() == 0  # stopped by the test before
    leftover = cluster.directory / "replica-7/log"
    leftover.parent.mkdir()
    leftover.write_text("of an earlier cluster")
    with running(coppiced, cluster.directory, "--replicas", "1"):
        assert not leftover.parent.exists()


def test_a_directory_that_is_not_a_cluster_s_is_left_alone(coppiced, tmp_path):
    precious = [tmp_path / name for name in ("replica-0/weights", "router/notes", "lock")]
    for path in precious:
        path.parent.mkdir(exist_ok=True)
        path.write_text("precious")
    with pytest.raises(AssertionError, match=re.escape(f"--out {tmp_path} is not empty")):
        with running(coppiced, tmp_path):
            pass
    assert [path.read_text() for path in precious] == ["precious"] * len(precious)
    assert {path.name for path in tmp_path.iterdir()} == {"replica-0", "router", "lock"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--replica", "3"], "unknown argument --replica"),
        (["--replicas", "none"], "want a number, got 'none'"),
        (["--model", "m.gguf"], "want one of --model and --geometry, got both"),
        (["--", "--kv_byte=1"], "bad flag: --kv_byte"),
    ],
)
def test_a_bad_option_ends_with_the_reason(coppiced, tmp_path, options, message):
    with pytest.raises(AssertionError, match=re.escape(message)):
        with running(coppiced, tmp_path, *options):
            pass
