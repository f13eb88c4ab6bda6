"""
One suite for every locker: who downloads, who is taken over, and what a service does that fails.
"""

from __future__ import annotations

import json
import os
import re
import signal
from collections.abc import Iterator, Mapping
from pathlib import Path

import actors
import attrs
import pytest
from lock_services import KUBECONFIG, NAMESPACE, LeaseServer, Redis, lease_server
from trees import model_files, read_tree
from waiting import until

from kserve_pvc import LockerMismatchError, LockServiceError, ModelStore, SettingsError
from kserve_pvc.locks.choice import check_confirmed, external_lock, parse_locker
from kserve_pvc.locks.lease import HEARTBEATS_PER_LEASE, RENEW_DEADLINE

KINDS = ["lease", "flock", "redis", "kubernetes"]
LEASE_SECONDS = 1.5
PASSWORD = "KSERVE_PVC_REDIS_PASSWORD"
FILES = model_files(seed=50, big=2_000_000)
SIZE = sum(map(len, FILES.values()))


@attrs.frozen
class Service:
    """
    A locker, and what a test needs to disturb what stands behind it.
    """

    kind: str
    locker: str
    redis: Redis | None = None
    leases: LeaseServer | None = None


@pytest.fixture(scope="module")
def redis(tmp_path_factory) -> Iterator[Redis]:
    server = Redis(tmp_path_factory.mktemp("redis"))
    yield server
    server.kill()


@pytest.fixture
def service(request, monkeypatch, tmp_path) -> Iterator[Service]:
    """
    What keeps the locks of one kind, as the environment of a pod describes it.
    """
    kind = request.param
    if kind == "redis":
        pytest.importorskip("redis", reason="the extra `redis` is not installed")
        redis = request.getfixturevalue("redis")
        monkeypatch.setenv(PASSWORD, Redis.password)
        yield Service(kind, redis.url, redis=redis)
    elif kind == "kubernetes":
        pytest.importorskip("kubernetes", reason="the extra `kubernetes` is not installed")
        with lease_server(tmp_path) as (leases, config):
            monkeypatch.setenv("KUBECONFIG", str(config))
            yield Service(kind, f"kubernetes://{NAMESPACE}", leases=leases)
    else:
        yield Service(kind, kind)


each = pytest.mark.parametrize("service", KINDS, indirect=True)
outside = pytest.mark.parametrize("service", KINDS[1:], indirect=True)
remote = pytest.mark.parametrize("service", ["redis", "kubernetes"], indirect=True)


def create(root: Path, service: Service) -> None:
    ModelStore(root, mode="rw", locker=service.locker, lease_seconds=LEASE_SECONDS)


def arguments(service: Service, s3: Mapping[str, object]) -> dict[str, object]:
    return {**s3, "locker": service.locker, "part_bytes": 64 * 1024}


def start(*arguments: object):
    """
    Ask for a model in a process of its own, which finds the services as this one does.
    """
    environ = {name: os.environ[name] for name in (PASSWORD, "KUBECONFIG") if name in os.environ}
    return actors.start(actors.with_environ, environ, actors.ensure, *arguments)


def a_lock(root: Path, service: Service):
    """
    The lock of one model, as another pod has it.
    """
    store = ModelStore(root, mode="rw", locker=service.locker)
    place = root / ".kserve-pvc/keys/model-0123456789abcdef"
    place.mkdir(parents=True, exist_ok=True)
    path = place / "lock"
    lock = external_lock(
        store._writing[1], place.name, holder="pod-1", open_file=lambda: os.open(path, os.O_RDWR | os.O_CREAT)
    )
    assert lock is not None
    return lock


@each
def test_each_byte_is_fetched_once_whoever_asks(root, s3, proxy, upload, service):
    """
    Of four processes one downloads, and the others wait for it.
    """
    uri = upload(FILES)
    create(root, service)
    context = actors.context()
    gate, results = context.Barrier(4), context.Queue()
    processes = [start(str(root), uri, arguments(service, s3), {}, results, gate) for _ in range(4)]
    outcomes = [results.get(timeout=60) for _ in processes]
    actors.run_all(processes)

    assert sorted(outcome[1] for outcome in outcomes) == ["downloaded", "waited", "waited", "waited"]
    assert proxy.body_bytes() == SIZE
    assert read_tree(ModelStore(root).get(uri).path) == FILES


@each
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "stopped"])
def test_a_holder_that_is_gone_is_taken_over(root, s3, proxy, upload, service, number):
    """
    Whoever was killed, or stands still while it holds the lock, is not waited for longer than its lease.
    """
    uri = upload(FILES)
    create(root, service)
    proxy.limit_bytes_per_second = 1_000_000
    holder = start(str(root), uri, arguments(service, s3), {})
    until(lambda: proxy.body_bytes() > 300_000)
    os.kill(holder.pid, number)
    proxy.limit_bytes_per_second = None

    model = ModelStore(root, mode="rw", **arguments(service, s3)).ensure(uri, progress=False, timeout=30)
    holder.kill()
    holder.join()

    assert model.status == "downloaded"
    assert read_tree(model.path) == FILES


@outside
def test_one_holds_it_until_it_is_given_back(root, service):
    """
    A second lock on the same model is refused until the first is released.
    """
    create(root, service)
    first, second = a_lock(root, service), a_lock(root, service)
    until(first.try_acquire)

    refused = second.try_acquire()
    again = first.try_acquire()
    first.release()

    assert (refused, again) == (False, True)
    assert until(second.try_acquire)
    second.release()


@each
def test_its_kind_is_in_the_store_and_no_other_is_taken(root, service):
    """
    Whoever opens the store for writing uses its locker, and whoever says another one is refused.
    """
    create(root, service)
    written = json.loads((root / ".kserve-pvc/store.json").read_text())["locker"]
    other = "lease" if service.kind != "lease" else "flock"

    with pytest.raises(LockerMismatchError) as refused:
        ModelStore(root, mode="rw", locker=other)

    assert written == service.locker
    assert (refused.value.stored, refused.value.requested) == (service.locker, other)
    assert ModelStore(root).list() == []


@remote
def test_a_service_that_is_gone_leaves_it_to_the_claims(root, s3, proxy, upload, service, capfd):
    """
    Where no lock is to be had the model is still downloaded once, and whoever waits is told.
    """
    uri = upload(FILES)
    create(root, service)
    if service.leases is None and service.redis is None:
        pytest.skip(f"`{KUBECONFIG}` is a real server, which is not stopped")
    if service.redis is not None:
        service.redis.kill()
    else:
        service.leases.trouble = 503
    context = actors.context()
    gate, results = context.Barrier(4), context.Queue()
    processes = [start(str(root), uri, arguments(service, s3), {}, results, gate) for _ in range(4)]
    outcomes = [results.get(timeout=60) for _ in processes]
    actors.run_all(processes)
    if service.redis is not None:
        service.redis.start()

    assert sorted(outcome[1] for outcome in outcomes) == ["downloaded", "waited", "waited", "waited"]
    assert proxy.body_bytes() == SIZE


@remote
def test_a_service_that_dies_meanwhile_disturbs_no_download(root, s3, proxy, upload, service):
    """
    Whoever downloads goes on by its claim when the lock is lost.
    """
    uri = upload(FILES)
    create(root, service)
    if service.leases is None and service.redis is None:
        pytest.skip(f"`{KUBECONFIG}` is a real server, which is not stopped")
    proxy.limit_bytes_per_second = 1_000_000
    results = actors.context().Queue()
    holder = start(str(root), uri, arguments(service, s3), {}, results)
    until(lambda: proxy.body_bytes() > 300_000)
    if service.redis is not None:
        service.redis.kill()
    else:
        service.leases.trouble = b"<html>"
    outcome = results.get(timeout=60)
    holder.join()
    if service.redis is not None:
        service.redis.start()

    assert outcome[1] == "downloaded"
    assert proxy.body_bytes() == SIZE


@pytest.mark.parametrize("service", ["redis"], indirect=True)
def test_a_service_that_hangs_is_not_waited_for(root, s3, upload, service):
    """
    A Redis that stands still counts as a lock that is not to be had, and nobody learns its password from an error.
    """
    uri = upload(FILES)
    create(root, service)
    service.redis.pause()

    model = ModelStore(root, mode="rw", **arguments(service, s3)).ensure(uri, progress=False, timeout=60)
    service.redis.kill()
    service.redis.start()

    assert read_tree(model.path) == FILES


@pytest.mark.parametrize("service", ["redis"], indirect=True)
def test_a_wrong_password_is_told_without_it(root, source, service, monkeypatch):
    """
    Redis refuses for good: that is an error, which names the service and the variables.
    """
    create(root, service)
    monkeypatch.setenv(PASSWORD, "wrong-password-3141")

    with pytest.raises(LockServiceError) as refused:
        ModelStore(root, mode="rw", locker=service.locker).ensure(f"file://{source}", progress=False)

    assert (refused.value.service, PASSWORD in str(refused.value)) == (service.locker, True)
    assert "3141" not in str(refused.value) + (root / ".kserve-pvc/store.json").read_text()


@pytest.mark.parametrize("service", ["redis"], indirect=True)
def test_the_address_of_a_service_is_not_taken_from_the_volume(root, source, service):
    """
    Whoever was not told of the Redis does not send its password to an address that stands on the volume.
    """
    create(root, service)

    with pytest.raises(SettingsError, match="KSERVE_PVC_LOCKER"):
        ModelStore(root, mode="rw").ensure(f"file://{source}", progress=False)


@pytest.mark.parametrize("service", ["kubernetes"], indirect=True)
@pytest.mark.parametrize("status", [401, 403])
def test_a_server_that_refuses_names_the_right_that_is_missing(root, source, service, status):
    """
    A service account without the right to Leases is told which, where, and nothing of its token.
    """
    create(root, service)
    if service.leases is None:
        pytest.skip(f"`{KUBECONFIG}` is a real server, which does not refuse")
    service.leases.trouble = status

    with pytest.raises(LockServiceError) as refused:
        ModelStore(root, mode="rw", locker=service.locker).ensure(f"file://{source}", progress=False)

    words = [f"kubernetes://{NAMESPACE}", str(status), "leases.coordination.k8s.io", NAMESPACE]
    assert [word for word in words if word not in str(refused.value)] == []
    assert "token-of-the-tests" not in str(refused.value)
    assert service.leases.tokens == {"Bearer token-of-the-tests"}


@pytest.mark.parametrize("service", ["kubernetes"], indirect=True)
def test_a_lease_says_who_holds_it_and_is_left_free(root, service):
    """
    As client-go writes it: holder, whole seconds, times with six digits, one transition more for each new holder.
    """
    create(root, service)
    if service.leases is None:
        pytest.skip(f"`{KUBECONFIG}` is a real server, whose Leases are not read here")
    for _ in range(2):
        lock = a_lock(root, service)
        until(lock.try_acquire)
        ((name, held),) = [(name, dict(lease["spec"])) for name, lease in service.leases.leases.items()]
        until(lambda held=held, name=name: service.leases.leases[name]["spec"]["renewTime"] != held["renewTime"])
        renewed = dict(service.leases.leases[name]["spec"])
        lock.release()
    left = service.leases.leases[name]["spec"]

    assert name.startswith("kserve-pvc-")
    assert name.endswith("-0123456789abcdef")
    assert held["holderIdentity"].startswith("pod-1_")
    assert (held["leaseDurationSeconds"], held["leaseTransitions"], left["leaseTransitions"]) == (2, 1, 1)
    assert renewed["acquireTime"] == held["acquireTime"] < renewed["renewTime"]
    assert (left["holderIdentity"], left["leaseDurationSeconds"]) == ("", 1)


def test_times_keep_the_rule_of_client_go():
    """
    Duration > renew deadline > 1.2 retry periods, for every lease.
    """
    assert 1 > RENEW_DEADLINE > 1.2 / HEARTBEATS_PER_LEASE


@pytest.mark.parametrize(
    ("text", "stored"),
    [
        ("lease", "lease"),
        ("redis://Cache", "redis://cache:6379/0"),
        ("REDISS://10.0.0.1:6380/3", "rediss://10.0.0.1:6380/3"),
        ("redis://[::1]:7000/", "redis://[::1]:7000/0"),
        ("kubernetes", "kubernetes"),
        ("kubernetes://team-a", "kubernetes://team-a"),
    ],
)
def test_a_locker_has_one_spelling(text, stored):
    """
    What is left out is filled in, and what was filled in is understood again.
    """
    assert str(parse_locker(text)) == stored
    assert parse_locker(stored) == parse_locker(text)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "redis",
        "redis://",
        "redis://user:secret@cache",
        "redis://cache?password=secret",
        "redis://cache/secret",
        "redis://cache:99999",
    ]
    + ["redis:/user:secret@cache", "redis:user:secret@cache", "redis//user:secret@cache", "user:secret@cache:6379"]
    + ["redis:/user:secret", "redis://user:secret/0", "REDIS:\\user:secret@cache", " redis://user:secret@cache"]
    + ["http://cache", "kubernetes://", "kubernetes://Team", "kubernetes://a/b", "lease://", "redis://cache\nsecret"],
)
def test_what_is_no_locker_is_refused_without_its_secrets(text):
    """
    The error names the setting and the rule, and repeats no password.
    """
    with pytest.raises(SettingsError) as refused:
        parse_locker(text)

    assert refused.value.name == "locker"
    assert "secret" not in f"{refused.value} {refused.value!r}"


def test_leases_are_in_the_namespace_of_the_pod(root, monkeypatch):
    """
    `kubernetes` alone means the namespace in which the store is created, and every pod that says so agrees with it.
    """
    monkeypatch.setenv("POD_NAMESPACE", "team-a")
    ModelStore(root, mode="rw", locker="kubernetes")
    monkeypatch.setenv("POD_NAMESPACE", "team-b")
    ModelStore(root, mode="rw", locker="kubernetes")

    with pytest.raises(LockerMismatchError):
        ModelStore(root, mode="rw", locker="kubernetes://team-b")

    assert json.loads((root / ".kserve-pvc/store.json").read_text())["locker"] == "kubernetes://team-a"


def test_outside_of_a_pod_a_namespace_is_asked_for(root, monkeypatch):
    """
    Nothing is guessed, and no store is made.
    """
    monkeypatch.delenv("POD_NAMESPACE", raising=False)

    with pytest.raises(SettingsError, match="kubernetes://NAMESPACE"):
        ModelStore(root, mode="rw", locker="kubernetes")

    assert list(root.rglob("store.json")) == []


@pytest.mark.parametrize(
    ("stored", "requested", "refused"),
    [
        ("lease", None, False),
        ("flock", None, False),
        ("redis://cache:6379/0", None, True),
        ("redis://cache:6379/0", "redis://cache:6379/0", False),
        ("kubernetes://team-a", None, False),
        ("kubernetes://team-b", None, True),
        ("kubernetes://team-b", "kubernetes://team-b", False),
    ],
)
def test_a_volume_names_no_service_that_was_not_confirmed(monkeypatch, stored, requested, refused):
    """
    What `store.json` says leads a process to no server, and to no namespace but its own, of which it was not told.
    """
    monkeypatch.setenv("POD_NAMESPACE", "team-a")

    if refused:
        with pytest.raises(SettingsError, match=re.escape(stored)):
            check_confirmed(stored, requested)
    else:
        check_confirmed(stored, requested)
