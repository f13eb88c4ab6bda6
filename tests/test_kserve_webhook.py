"""
The webhook as a process: real TLS, a real client, and everything that is not an AdmissionReview.
"""

import asyncio
import json
import re
import signal
import socket
import ssl
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from waiting import until

httpx = pytest.importorskip("httpx", reason="`httpx` is not installed, which asks the webhook")
pytest.importorskip("uvicorn", reason="the extra `webhook` is not installed")
trustme = pytest.importorskip("trustme", reason="`trustme` is not installed, which makes the certificates")

from kserve_pvc.kserve import Policy, _webhook  # noqa: E402

POLICY = """
version: 1
rules:
  - namespaces: [team]
    claim: models
    access: download
  - namespaces: [others]
    claim: secret-models
"""
SOURCE = "internal.serving.kserve.io/storage-initializer-sourceuri"
CANARY = "canary-of-a-secret"
JSON = {"Content-Type": "application/json"}


def review(claim="models", namespace="team", **request):
    pod = {
        "kind": "Pod",
        "metadata": {"annotations": {SOURCE: f"https://host/m?sig={CANARY}", "kserve-pvc/claim": claim}},
        "spec": {"containers": [{"name": "kserve-container", "env": [{"name": "TOKEN", "value": CANARY}]}]},
    }
    kind = {"group": "", "version": "v1", "kind": "Pod"}
    request = {"uid": "u1", "kind": kind, "namespace": namespace, "operation": "CREATE", "object": pod, **request}
    return {"apiVersion": "admission.k8s.io/v1", "kind": "AdmissionReview", "request": request}


class Secret:
    """
    A directory as the kubelet keeps one: files are links into a directory that is swapped as a whole.
    """

    def __init__(self, place, authority):
        self.place, self.authority, self.swaps = place, authority, 0
        self.place.mkdir()
        self.renew()
        for name in ("tls.crt", "tls.key"):
            (place / name).symlink_to(f"..data/{name}")

    def renew(self):
        certificate = self.authority.issue_cert("localhost", "127.0.0.1")
        self.swap(b"".join(blob.bytes() for blob in certificate.cert_chain_pems), certificate.private_key_pem.bytes())

    def swap(self, certificate, key):
        self.swaps += 1
        new = self.place / f"..{self.swaps}"
        new.mkdir()
        (new / "tls.crt").write_bytes(certificate)
        (new / "tls.key").write_bytes(key)
        (self.place / "..next").symlink_to(new.name)
        (self.place / "..next").replace(self.place / "..data")


class Running:
    """
    A webhook that runs, and what it prints.
    """

    def __init__(self, process, context):
        self.process, self.context = process, context
        self.said, self.audited, self.port = [], [], None
        self._readers = [
            threading.Thread(target=lambda: self.said.extend(iter(process.stderr.readline, "")), daemon=True),
            threading.Thread(target=self._audit, daemon=True),
        ]
        for reader in self._readers:
            reader.start()

    def _audit(self):
        for line in self.process.stdout:
            self.audited.append(line)

    def listens(self):
        found = re.search(r"listening on https://127\.0\.0\.1:(\d+)", "".join(self.said))
        self.port = int(found[1]) if found else None
        return self.port is not None or self.process.poll() is not None

    @property
    def url(self):
        return f"https://127.0.0.1:{self.port}"

    def client(self, **options):
        return httpx.Client(base_url=self.url, verify=self.context, timeout=30, **options)

    def serial(self):
        """The number of the certificate that is shown now."""
        with (
            socket.create_connection(("127.0.0.1", self.port), 30) as plain,
            self.context.wrap_socket(plain, server_hostname="localhost") as tls,
        ):
            return tls.getpeercert()["serialNumber"]

    def metric(self, name):
        with self.client() as client:
            lines = client.get("/metrics").text.splitlines()
        return float(next(line.rpartition(" ")[2] for line in lines if line.startswith(f"{name} ")))

    def stop(self):
        self.process.send_signal(signal.SIGTERM)
        self.process.wait(30)
        for reader in self._readers:
            reader.join(30)


@pytest.fixture
def authority():
    return trustme.CA()


@pytest.fixture
def secret(tmp_path, authority):
    return Secret(tmp_path / "tls", authority)


@pytest.fixture
def policy_file(tmp_path):
    (tmp_path / "policy.yaml").write_text(POLICY)
    return tmp_path / "policy.yaml"


def command(policy_file, secret, *options):
    files = ["--policy", policy_file, "--tls-cert", secret.place / "tls.crt", "--tls-key", secret.place / "tls.key"]
    return [
        sys.executable,
        "-Im",
        "kserve_pvc",
        "webhook",
        *map(str, files),
        "--host",
        "127.0.0.1",
        "--port",
        "0",
        *options,
    ]


@pytest.fixture
def webhook(policy_file, secret, authority):
    """
    A webhook that looks for changed files often.
    """
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command(policy_file, secret, "--reload-seconds", "0.05"), **pipes) as process:
        context = ssl.create_default_context()
        authority.configure_trust(context)
        running = Running(process, context)
        try:
            until(running.listens, seconds=60)
            assert running.port, "".join(running.said)
            yield running
        finally:
            running.stop()


def test_a_pod_is_mutated_over_tls(webhook):
    """
    A review over TLS gets a patch, probes are answered, the decision is counted, and one line is written, without
    secrets.
    """
    with webhook.client() as client:
        answer = client.post("/mutate-pods", json=review())
        probes = [client.get(path).status_code for path in ("/readyz", "/livez")]
        metrics = client.get("/metrics").text

    assert answer.status_code == 200
    assert answer.headers["content-type"] == "application/json"
    assert {**answer.json()["response"], "patch": "…"} == {
        "uid": "u1",
        "allowed": True,
        "patchType": "JSONPatch",
        "patch": "…",
    }
    assert probes == [200, 200]
    assert 'kserve_pvc_admission_decisions_total{decision="mutated"} 1.0' in metrics
    assert 'kserve_pvc_admission_decisions_total{decision="denied"} 0.0' in metrics
    assert "kserve_pvc_admission_seconds_count 1.0" in metrics
    webhook.stop()
    (line,) = map(json.loads, webhook.audited)
    assert (line["decision"], line["namespace"], line["claim"], line["dry_run"]) == ("mutated", "team", "models", False)
    assert set(line) >= {"time", "seconds", "uid", "pod", "user"}
    assert CANARY not in "".join([*webhook.audited, *webhook.said, metrics])


def test_no_part_of_an_answer_waits_for_an_acknowledgement():
    """
    Connections that are accepted send what they are given at once, which asyncio sees to only for sockets that it makes
    itself.
    """
    with _webhook._listen("127.0.0.1", 0) as listener, socket.create_connection(listener.getsockname(), 30):
        accepted, _ = listener.accept()
        with accepted:
            assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


def test_what_is_not_granted_is_denied_over_tls(webhook):
    """
    Another tenant's claim, a directory that climbs and a pod that is none are answered with 200 and not allowed.
    """
    climbing = review()
    climbing["request"]["object"]["metadata"]["annotations"]["kserve-pvc/sub-path"] = "../x"

    with webhook.client() as client:
        answers = [
            client.post("/mutate-pods", json=asked) for asked in (review("secret-models"), climbing, review(object=[]))
        ]

    assert [answer.status_code for answer in answers] == [200, 200, 200]
    assert [answer.json()["response"]["status"]["code"] for answer in answers] == [403, 403, 400]
    webhook.stop()
    assert [json.loads(line)["decision"] for line in webhook.audited] == ["denied"] * 3


@pytest.mark.parametrize(
    ("method", "path", "headers", "body", "status"),
    [
        ("POST", "/mutate-pods", JSON, b"{", 400),
        ("POST", "/mutate-pods", JSON, b"", 400),
        ("POST", "/mutate-pods", JSON, b"[" * 1_000_000, 400),
        ("POST", "/mutate-pods", JSON, json.dumps({**review(), "apiVersion": "admission.k8s.io/v2"}).encode(), 400),
        ("POST", "/mutate-pods", JSON, json.dumps(review(uid="")).encode(), 400),
        ("POST", "/mutate-pods", JSON, b" " * 10_000_000, 413),
        ("POST", "/mutate-pods", JSON, b" " * 3 * 1024 * 1024 + b" ", 413),
        ("POST", "/mutate-pods", {}, json.dumps(review()).encode(), 415),
        ("POST", "/mutate-pods", {"Content-Type": "application/yaml"}, json.dumps(review()).encode(), 415),
        (
            "POST",
            "/mutate-pods",
            {"Content-Type": "Application/JSON; charset=utf-8"},
            json.dumps(review()).encode(),
            200,
        ),
        ("GET", "/mutate-pods", {}, b"", 405),
        ("PUT", "/mutate-pods", JSON, json.dumps(review()).encode(), 405),
        ("POST", "/", JSON, json.dumps(review()).encode(), 404),
        ("POST", "/readyz", JSON, b"", 405),
    ],
)
def test_what_is_no_review_gets_the_status_that_says_so(webhook, method, path, headers, body, status):
    """
    A bad body, a large one, a wrong type, method or path are told by their status, and the next review is answered.
    """
    with webhook.client() as client:
        answer = client.request(method, path, headers=headers, content=body)
        following = client.post("/mutate-pods", json=review())

    assert answer.status_code == status
    assert following.json()["response"]["allowed"] is True


def test_a_body_without_a_length_is_limited_too(webhook):
    """
    A body that comes in chunks is refused once it is too large.
    """
    with webhook.client() as client:
        answer = client.post("/mutate-pods", headers=JSON, content=(b" " * 65536 for _ in range(100)))

    assert answer.status_code == 413


def test_a_huge_body_is_refused_before_it_comes(webhook):
    """
    A length beyond all reason is answered at once.
    """
    head = (
        b"POST /mutate-pods HTTP/1.1\r\nHost: x\r\nContent-Type: "
        b"application/json\r\nContent-Length: 99999999999\r\n\r\n"
    )

    with (
        socket.create_connection(("127.0.0.1", webhook.port), 30) as plain,
        webhook.context.wrap_socket(plain, server_hostname="localhost") as tls,
    ):
        tls.sendall(head)
        answer = tls.recv(4096)

    assert answer.startswith(b"HTTP/1.1 413 ")


@pytest.mark.filterwarnings("ignore:ssl.TLSVersion:DeprecationWarning")
def test_old_versions_of_tls_and_plain_http_are_refused(webhook):
    """
    TLS 1.1 is not spoken, and neither is HTTP without TLS.
    """
    old = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    old.check_hostname, old.verify_mode = False, ssl.CERT_NONE
    old.set_ciphers("ALL:@SECLEVEL=0")
    old.minimum_version, old.maximum_version = ssl.TLSVersion.TLSv1, ssl.TLSVersion.TLSv1_1

    with (
        socket.create_connection(("127.0.0.1", webhook.port), 30) as plain,
        pytest.raises(ssl.SSLError, match=r"EOF|ALERT_PROTOCOL"),
    ):
        old.wrap_socket(plain)
    with pytest.raises(httpx.TransportError):
        httpx.get(webhook.url.replace("https", "http") + "/readyz", timeout=30)


def test_a_new_certificate_is_shown_under_load(webhook, secret):
    """
    While clients ask, over connections that stay and over new ones, the certificate changes several times and no
    request fails.
    """
    done, statuses = threading.Event(), []

    def ask(stays):
        with webhook.client() as lasting:
            while not done.is_set():
                if stays:
                    statuses.append(lasting.post("/mutate-pods", json=review()).status_code)
                else:
                    with webhook.client() as fresh:
                        statuses.append(fresh.post("/mutate-pods", json=review()).status_code)

    with ThreadPoolExecutor(4) as pool:
        asking = [pool.submit(ask, stays) for stays in (True, True, False, False)]
        try:
            serials = [webhook.serial()]
            for _ in range(4):
                secret.renew()
                until(lambda: webhook.serial() not in serials, seconds=60)
                serials.append(webhook.serial())
        finally:
            done.set()
        for one in asking:
            one.result(60)

    assert len(set(serials)) == 5
    assert set(statuses) == {200}
    assert webhook.metric('kserve_pvc_webhook_reloads_total{file="certificate",result="reloaded"}') >= 4


def test_a_bad_certificate_does_not_replace_a_good_one(webhook, secret, authority):
    """
    A key that does not belong to its certificate is told and counted; the old pair is shown until a good one comes.
    """
    before = webhook.serial()
    one, other = authority.issue_cert("localhost"), authority.issue_cert("localhost")

    secret.swap(one.cert_chain_pems[0].bytes(), other.private_key_pem.bytes())
    until(lambda: "the previous one stays in use" in "".join(webhook.said), seconds=60)

    assert webhook.serial() == before
    assert webhook.metric('kserve_pvc_webhook_reloads_total{file="certificate",result="failed"}') == 1
    secret.renew()
    until(lambda: webhook.serial() != before, seconds=60)


def test_a_new_policy_is_taken_over_and_a_bad_one_is_not(webhook, policy_file):
    """
    A changed policy decides from then on; one that means nothing leaves the old one in force, and is told with its
    field.
    """

    def allowed():
        with webhook.client() as client:
            return client.post("/mutate-pods", json=review()).json()["response"]["allowed"]

    assert allowed()
    policy_file.write_text(POLICY.replace("download", "all"))
    until(lambda: "invalid value `all` for `rules[0].access`" in "".join(webhook.said), seconds=60)
    assert allowed()
    policy_file.write_text(POLICY.replace("[team]", "[elsewhere]"))
    until(lambda: not allowed(), seconds=60)


def asked_in_process(receive):
    """
    What the application sends when it is asked without a server, and the body is what `receive` gives.
    """
    sent = []

    async def send(message):
        sent.append(message)

    scope = {
        "type": "http",
        "method": "POST",
        "path": "/mutate-pods",
        "query_string": b"",
        "headers": [(b"content-type", b"application/json")],
    }
    application = _webhook.Webhook(policy=Policy(), body_seconds=0.05).application((), reload_seconds=60)
    asyncio.run(asyncio.wait_for(application(scope, receive, send), 60))
    return sent[0]["status"], b"".join(message.get("body", b"") for message in sent[1:])


def test_a_body_that_does_not_come_is_not_waited_for():
    """
    A client that stalls in the middle of a body gets 408, and one that disconnects 400.
    """

    async def silence():
        await asyncio.Event().wait()

    async def leaving():
        return {"type": "http.disconnect"}

    assert [asked_in_process(receive)[0] for receive in (silence, leaving)] == [408, 400]


def test_an_error_that_nobody_foresaw_is_told_without_its_text(monkeypatch, capsys):
    """
    A defect of ours is answered 500 and audited by the type of the error, as its text may hold parts of the pod.
    """

    def decide(*_):
        raise KeyError(CANARY)

    async def body():
        return {"type": "http.request", "body": json.dumps(review()).encode(), "more_body": False}

    monkeypatch.setattr(_webhook, "decide", decide)

    status, text = asked_in_process(body)

    out, err = capsys.readouterr()
    assert (status, text, err) == (500, b"the webhook failed; see its log\n", "")
    assert {**json.loads(out), "time": 0, "seconds": 0} == {
        "decision": "error",
        "reason": "KeyError",
        "time": 0,
        "seconds": 0,
    }


def test_a_signal_ends_it_after_the_requests_that_run(webhook):
    """
    A request whose body is still coming when the signal arrives is answered before the process ends.
    """
    body = json.dumps(review()).encode()

    async def ask():
        reader, writer = await asyncio.open_connection(
            "127.0.0.1", webhook.port, ssl=webhook.context, server_hostname="localhost"
        )
        head = (
            "POST /mutate-pods HTTP/1.1\r\nHost: x\r\nContent-Type: "
            f"application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        writer.write(head.encode() + body[:10])
        await writer.drain()
        # The answer to another request says that the first one's head has been read.
        async with httpx.AsyncClient(verify=webhook.context, timeout=30) as client:
            await client.get(f"{webhook.url}/readyz")
        webhook.process.send_signal(signal.SIGTERM)
        writer.write(body[10:])
        await writer.drain()
        answer = await reader.read()
        writer.close()
        return answer

    answer = asyncio.run(asyncio.wait_for(ask(), 60))

    assert answer.startswith(b"HTTP/1.1 200 ")
    assert b'"allowed":true' in answer
    assert webhook.process.wait(60) == 143


@pytest.mark.parametrize(
    ("change", "code", "message"),
    [
        (
            lambda policy, _: policy.write_text("version: 1\nrules: [{claim: a}]"),
            2,
            "`rules[0].namespaces` is missing; expected a list of names",
        ),
        (
            lambda policy, _: policy.write_text("version: 1\nversion: 1\nrules: []"),
            2,
            "line 2: duplicate key `version`",
        ),
        (lambda policy, _: policy.write_text("{"), 2, "invalid YAML"),
        (lambda policy, _: policy.write_text(""), 2, "expected exactly one YAML document"),
        (lambda policy, _: policy.unlink(), 2, "it cannot be read: No such file or directory"),
        (
            lambda policy, _: policy.write_text(POLICY.replace("claim: models", "claim: models\n    subPath: /x")),
            8,
            "must be relative",
        ),
        (
            lambda _, secret: (secret.place / "tls.key").unlink(),
            2,
            "for `--tls-cert and --tls-key`; cannot load them",
        ),
        (lambda _, secret: secret.swap(b"no certificate", b"no key"), 2, "cannot load them"),
    ],
    ids=range(8),
)
def test_what_cannot_work_is_said_at_once(policy_file, secret, change, code, message):
    """
    A policy or certificate that cannot be used ends the command with the reason, before it listens.
    """
    change(policy_file, secret)

    found = subprocess.run(command(policy_file, secret), capture_output=True, text=True, timeout=60)

    assert (found.returncode, found.stdout) == (code, "")
    assert message in found.stderr


def test_an_encrypted_key_is_refused_instead_of_asking_for_a_password(policy_file, secret):
    """
    Nobody can type a password into a pod, so a key that needs one is an error.
    """
    serialization = pytest.importorskip("cryptography.hazmat.primitives.serialization")
    certificate, key = ((secret.place / name).read_bytes() for name in ("tls.crt", "tls.key"))
    encrypted = serialization.load_pem_private_key(key, None).private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.BestAvailableEncryption(b"password"),
    )
    secret.swap(certificate, encrypted)

    found = subprocess.run(
        command(policy_file, secret), capture_output=True, text=True, timeout=60, stdin=subprocess.DEVNULL
    )

    assert (found.returncode, found.stdout) == (2, "")
    assert "the key is encrypted" in found.stderr


def test_a_missing_library_is_told(policy_file, secret):
    """
    Without what the extra brings, the command says what to install.
    """
    arguments = command(policy_file, secret)[3:]
    program = (
        "import sys\nsys.modules['uvicorn'] = None\nfrom "
        f"kserve_pvc._cli.main import main\nsys.exit(main({arguments!r}))"
    )

    found = subprocess.run([sys.executable, "-Ic", program], capture_output=True, text=True, timeout=60)

    assert (found.returncode, found.stdout) == (2, "")
    assert "the webhook needs uvicorn: `pip install 'kserve-pvc[webhook]'`" in found.stderr
