"""
The command line as shells, init containers and Jobs use it.
"""

import hashlib
import json
import os
import pty
import re
import signal
import subprocess
import termios
from contextlib import suppress
from datetime import UTC, datetime, timedelta

import pytest
import shell
from sources import FakeBackend
from trees import listing, model_files, read_tree, write_files
from waiting import until

import kserve_pvc
from kserve_pvc import ModelStore, SourceNotFoundError
from kserve_pvc._cli.main import main

BUCKET = "models"
FILES = model_files(seed=41)
SIZE = sum(map(len, FILES.values()))
READONLY = "storage.kserve.io/readonly"


@pytest.fixture
def uri(tmp_path):
    """
    The model of `FILES` in a directory, which is not in the store.
    """
    write_files(tmp_path / "origin", FILES)
    return f"file://{tmp_path}/origin"


@pytest.fixture
def model(root, uri):
    """
    The model of `FILES`, which is in the store.
    """
    return ModelStore(root, mode="rw").ensure(uri, progress=False)


@pytest.fixture
def s3_env(origin, proxy):
    """
    The environment of a command that reaches the S3 server through the proxy.
    """
    return {**origin.environ, "AWS_ENDPOINT_URL": proxy.endpoint}


@pytest.fixture
def in_process(root, monkeypatch, capsys):
    """
    Run a verb inside this process, which gets its signal handler back, and return its exit code and outputs.
    """
    for name in [name for name in os.environ if name.startswith("KSERVE_PVC_")]:
        monkeypatch.delenv(name)
    handler = signal.getsignal(signal.SIGTERM)

    def run(*arguments, env=None):
        with monkeypatch.context() as patched:
            for variable, value in (env or {}).items():
                patched.setenv(variable, value)
            try:
                code = main(["--store", str(root), *arguments])
            except SystemExit as leaving:
                code = leaving.code
        return code, *capsys.readouterr()

    yield run
    signal.signal(signal.SIGTERM, handler)


def identity(model) -> dict[str, str]:
    return {"uri": model.uri, "key": model.key, "version": model.version, "path": str(model.path)}


def damage(model) -> None:
    """
    Change one byte of a file and nothing about its size.
    """
    path = model.path / "weights/a.bin"
    data = bytearray(path.read_bytes())
    data[1000] ^= 1
    path.unlink()
    path.write_bytes(data)


def test_ensure_prints_the_directory(root, uri):
    """
    The only line of stdout is the directory, first downloaded and then present; people read stderr.
    """
    first, second = (shell.kserve_pvc(root, "ensure", uri) for _ in range(2))

    (path,) = first.stdout.splitlines()
    assert read_tree(root / path) == FILES
    assert (first.returncode, second.returncode, second.stdout) == (0, 0, first.stdout)
    assert first.stderr.splitlines() == [
        f"kserve-pvc: downloading {uri}: 4 files, 684.6 KiB",
        f"kserve-pvc: {uri}: downloaded",
    ]
    assert second.stderr == ""


def test_ensure_prints_the_pinned_document(root, upload, s3_env):
    """
    `--json ensure` prints exactly the eight pinned fields, for a download from S3 and for a hit.
    """
    uri = upload(FILES)

    first, second = (shell.kserve_pvc(root, "--json", "ensure", uri, env=s3_env) for _ in range(2))

    document, model = shell.document(first), ModelStore(root).get(uri)
    rest = {"status": "downloaded", "size_bytes": SIZE, "bytes_fetched": SIZE, "seconds": document["seconds"]}
    assert document == {**identity(model), **rest}
    assert document["key"].endswith(hashlib.sha256(uri.encode()).hexdigest()[:16])
    assert document["seconds"] > 0
    again = shell.document(second)
    assert again == {**document, "status": "present", "bytes_fetched": 0, "seconds": again["seconds"]}


def test_ensure_takes_what_the_method_takes(root, uri):
    """
    Patterns may be repeated, and make the same model as in Python; forcing makes another directory.
    """
    selection = ["--allow", "*.json", "--allow", "weights/", "--ignore", "*/a.bin"]

    first = shell.kserve_pvc(root, "ensure", uri, *selection)
    forced = shell.kserve_pvc(root, "ensure", uri, *selection, "--force-download", "--max-workers", "1")

    model = ModelStore(root).get(uri, allow_patterns=["*.json", "weights/"], ignore_patterns="*/a.bin")
    assert forced.stdout.splitlines() == [str(model.path)] != first.stdout.splitlines()
    assert read_tree(model.path) == {name: FILES[name] for name in ("config.json", "weights/b.bin")}


def test_ensure_refreshes(root, uri, tmp_path):
    """
    With `--refresh` a newer version is fetched beside the old one, and an unchanged one is present.
    """
    shell.kserve_pvc(root, "ensure", uri)
    unchanged = shell.document(shell.kserve_pvc(root, "--json", "ensure", "--refresh", uri))
    write_files(tmp_path / "origin", {"config.json": b"newer"})

    newer = shell.document(shell.kserve_pvc(root, "--json", "ensure", "--refresh", uri))

    assert (unchanged["status"], newer["status"]) == ("present", "downloaded")
    assert (newer["path"] != unchanged["path"], newer["version"] != unchanged["version"]) == (True, True)
    assert (root / unchanged["path"] / "config.json").read_bytes() == FILES["config.json"]


def test_path_prints_the_directory_of_what_is_present(root, model):
    """
    `path` prints the directory, or the four fields that name a model, and never asks the source.
    """
    plain, document = shell.kserve_pvc(root, "path", model.uri), shell.kserve_pvc(root, "--json", "path", model.uri)

    assert (plain.returncode, plain.stdout, plain.stderr) == (0, f"{model.path}\n", "")
    assert shell.document(document) == identity(model)


def test_ls_prints_the_pinned_documents(root, model):
    """
    `--json ls` prints a list with exactly the eight pinned fields for each model.
    """
    (row,) = shell.document(shell.kserve_pvc(root, "--json", "ls"))

    assert row == {
        **identity(model),
        "size_bytes": SIZE,
        "files": 4,
        "created_at": model.created_at.isoformat(),
        "pinned": False,
    }


def test_ls_prints_a_table(root, model):
    """
    Every model is one row under a head, and a summary goes to stderr unless it is quiet.
    """
    shown, quiet = shell.kserve_pvc(root, "ls"), shell.kserve_pvc(root, "-q", "ls")

    head, row = shown.stdout.splitlines()
    assert head.split() == ["URI", "SIZE", "FILES", "CREATED", "KEY"]
    assert row.split() == [
        model.uri,
        "684.6",
        "KiB",
        "4",
        *model.created_at.strftime("%Y-%m-%d %H:%M").split(),
        model.key,
    ]
    assert [head.index(name) for name in ("SIZE", "KEY")] == [row.index("684.6"), row.index(model.key)]
    assert shown.stderr == f"kserve-pvc: 1 model, 684.6 KiB at {root}\n"
    assert (quiet.stdout, quiet.stderr) == (shown.stdout, "")


def test_an_empty_store_is_an_empty_list(root):
    """
    A store without models is no error, and nothing is added to it.
    """
    ModelStore(root, mode="rw")
    before = read_tree(root)

    results = [shell.kserve_pvc(root, "--json", *verb) for verb in (["ls"], ["locks"], ["verify", "--all"])]

    assert [shell.document(result) for result in results] == [[], [], {"ok": True, "models": []}]
    assert [result.returncode for result in results] == [0, 0, 0]
    assert read_tree(root) == before


def test_info_says_what_is_known(root, model):
    """
    `info` names source, version, time, writer and every file with its digest, in a table and in JSON.
    """
    plain = shell.kserve_pvc(root, "info", model.uri)
    document = shell.document(shell.kserve_pvc(root, "--json", "info", model.uri))

    digests = [hashlib.sha256(FILES[name]).hexdigest() for name in sorted(FILES)]
    assert plain.returncode == 0
    assert [
        word for word in (model.uri, model.key, model.version, str(model.path), *digests) if word not in plain.stdout
    ] == []
    assert {name: document[name] for name in identity(model)} == identity(model)
    assert [(file["path"], file["size_bytes"], file["sha256"]) for file in document["files"]] == [
        (name, len(FILES[name]), digest) for name, digest in zip(sorted(FILES), digests, strict=True)
    ]
    assert datetime.fromisoformat(document["created_at"]) == model.created_at
    assert document["writer"]["pid"] == os.getpid()


def test_plan_says_what_ensure_would_do(root, uri):
    """
    A plan for an absent model has every byte to fetch, for a present one nothing; it writes nothing.
    """
    before = shell.kserve_pvc(root, "--json", "plan", uri), shell.kserve_pvc(root, "plan", uri)
    planned = list(root.iterdir())
    shell.kserve_pvc(root, "ensure", uri)
    after = shell.kserve_pvc(root, "--json", "plan", uri), shell.kserve_pvc(root, "plan", uri)

    absent, present = shell.document(before[0]), shell.document(after[0])
    assert (absent["action"], absent["bytes_to_fetch"], absent["bytes_reusable"], absent["files"]) == (
        "download",
        SIZE,
        0,
        4,
    )
    assert (absent["seconds"], absent["fits"], planned) == (None, True, [])
    assert (present["action"], present["bytes_to_fetch"], present["version"]) == ("nothing", 0, absent["version"])
    assert "would download 684.6 KiB of 684.6 KiB in 4 files" in before[1].stdout
    assert after[1].stdout == f"nothing to do: {uri} is present (684.6 KiB)\n"


@pytest.mark.parametrize("scope", ["--all", "URI"])
def test_verify_prints_the_pinned_document(root, model, scope):
    """
    `--json verify` prints `ok` and a list with exactly the five pinned fields, and ends with 1 if anything differs.
    """
    arguments = ["--json", "verify", "--full", scope.replace("URI", model.uri)]
    fine = shell.kserve_pvc(root, *arguments)
    damage(model)
    quick = shell.kserve_pvc(root, "--json", "verify", scope.replace("URI", model.uri))
    bad = shell.kserve_pvc(root, *arguments)

    report = {"uri": model.uri, "ok": True, "files": 4, "bytes": SIZE, "problems": []}
    (problem,) = shell.document(bad)["models"][0]["problems"]
    assert [fine.returncode, quick.returncode, bad.returncode] == [0, 0, 1]
    assert [shell.document(result) for result in (fine, quick)] == [{"ok": True, "models": [report]}] * 2
    assert shell.document(bad) == {"ok": False, "models": [{**report, "ok": False, "problems": [problem]}]}
    assert (sorted(problem), problem["path"], problem["kind"]) == (
        ["detail", "kind", "path"],
        "weights/a.bin",
        "digest",
    )


def test_verify_prints_a_line_for_each_model_and_problem(root, model):
    """
    A person sees which model is fine, which is not, and why.
    """
    fine = shell.kserve_pvc(root, "verify", model.uri)
    (model.path / "extra").write_bytes(b"x")
    bad = shell.kserve_pvc(root, "verify", "--all")
    quiet = shell.kserve_pvc(root, "-q", "verify", "--all")

    assert fine.stdout == f"ok   {model.uri}  (4 files, 684.6 KiB, sizes)\n"
    assert bad.stdout.splitlines() == [
        f"BAD  {model.uri}  (4 files, 684.6 KiB, sizes)",
        "     extra: extra: not in the manifest",
    ]
    assert [(result.returncode, result.stdout) for result in (quiet,)] == [(1, "")]


def test_rm_removes(root, model):
    """
    A removed model is gone, its bytes with `--now` too, and removing it again is an error.
    """
    removed = shell.kserve_pvc(root, "--json", "rm", model.uri)
    in_the_trash = read_tree(root / ".kserve-pvc/trash")
    ModelStore(root, mode="rw").ensure(model.uri, progress=False)
    now = shell.kserve_pvc(root, "rm", "--now", model.uri)
    again = shell.kserve_pvc(root, "rm", model.uri)

    assert (removed.returncode, shell.document(removed)) == (0, {"uri": model.uri, "removed": True})
    assert sorted(map(len, in_the_trash.values())) == sorted(map(len, FILES.values()))
    assert (now.returncode, now.stdout, read_tree(root / ".kserve-pvc/trash"), read_tree(root / "models")) == (
        0,
        "",
        {},
        {},
    )
    assert again.returncode == 3


@pytest.fixture
def downloading(root, upload, s3_env, proxy):
    """
    A command that downloads in a pod called `server-0`, slowly, and the URI of its model.
    """
    ModelStore(root, mode="rw", lease_seconds=2)
    uri = upload(FILES)
    proxy.limit_bytes_per_second = 50_000
    env = {**s3_env, "POD_NAME": "server-0", "NODE_NAME": "node-a"}
    process = shell.start(root, "ensure", uri, env=env)
    until(lambda: any(lock.bytes_done for lock in ModelStore(root).locks()))
    yield process, uri
    process.kill()
    process.communicate()


def test_locks_show_who_downloads(root, downloading):
    """
    A claim is one row with its state, holder, time and progress, and one JSON object with all its fields.
    """
    process, uri = downloading
    now = datetime.now(UTC)
    plain, document = shell.kserve_pvc(root, "locks"), shell.kserve_pvc(root, "--json", "locks")

    (lock,) = shell.document(document)
    holder = f"pod server-0 on node-a (uid {os.geteuid()}, pid {process.pid})"
    fields = [
        "bytes_done",
        "bytes_per_second",
        "bytes_total",
        "epoch",
        "holder",
        "key",
        "since",
        "state",
        "uri",
        "pod",
        "node",
        "uid",
    ]
    assert [name for name in fields if name not in lock] == []
    assert (lock["uri"], lock["state"], lock["holder"], lock["bytes_total"]) == (uri, "held", holder, SIZE)
    assert (lock["pod"], lock["node"], lock["uid"]) == ("server-0", "node-a", os.geteuid())
    assert 0 < lock["age_seconds"] < 3600
    assert timedelta(0) < now - datetime.fromisoformat(lock["since"]) < timedelta(hours=1)
    head, row = plain.stdout.splitlines()
    assert {"URI", "STATE", "HOLDER", "SINCE", "AGE", "PROGRESS"} <= set(head.split())
    assert [word for word in (uri, " held ", holder, " of 684.6 KiB") if word not in row] == []
    assert plain.stderr == "kserve-pvc: 1 claim held or left behind\n"


def test_breaking_a_claim_lets_another_download(root, downloading, proxy, s3_env):
    """
    `locks --break` supersedes the claim of a process that is stopped, so that the next command downloads at once.
    """
    process, uri = downloading
    os.kill(process.pid, signal.SIGSTOP)
    proxy.limit_bytes_per_second = None

    broken = shell.kserve_pvc(root, "--json", "locks", "--break", uri)
    ensured = shell.kserve_pvc(root, "--json", "ensure", uri, env=s3_env)

    assert (broken.returncode, shell.document(broken)) == (0, [])
    assert shell.document(ensured)["status"] == "downloaded"
    os.kill(process.pid, signal.SIGCONT)
    stdout, _ = process.communicate(timeout=60)
    assert (process.returncode, stdout) == (0, shell.document(ensured)["path"] + "\n")


def test_who_waits_is_shown_for_whom(root, downloading, s3_env):
    """
    A command that waits says at once who downloads and how far that is, and ends with 5 when its time is over.
    """
    _, uri = downloading

    waited = shell.kserve_pvc(root, "ensure", "--timeout", "1", uri, env=s3_env)

    first, *_, last = waited.stderr.splitlines()
    assert (waited.returncode, waited.stdout) == (5, "")
    assert first.startswith("kserve-pvc: waiting for pod server-0 on node-a (uid ")
    assert last.startswith("kserve-pvc: waited 1 s for pod server-0 on node-a")


def test_sigterm_gives_the_claim_back(root, upload, s3_env, proxy):
    """
    A command that is told to end stops at once, leaves no claim, and what it fetched is not fetched again.
    """
    files = {f"{number}.bin": bytes([number]) * 100_000 for number in range(12)}
    uri = upload(files)
    proxy.limit_bytes_per_second = 400_000
    process = shell.start(root, "ensure", uri, "--max-workers", "2", env=s3_env)
    until(lambda: proxy.body_bytes() > 500_000)

    process.terminate()
    stdout, _ = process.communicate(timeout=60)

    claims = shell.document(shell.kserve_pvc(root, "--json", "locks"))
    proxy.limit_bytes_per_second = None
    ensured = shell.document(shell.kserve_pvc(root, "--json", "ensure", uri, env=s3_env))
    assert (process.returncode, stdout, claims) == (143, "", [])
    assert (ensured["status"], read_tree(root / ensured["path"])) == ("downloaded", files)
    assert ensured["bytes_fetched"] <= 12 * 100_000 - 300_000
    # Two workers had at most one file each under way.
    assert proxy.body_bytes() <= 12 * 100_000 + 2 * 100_000


def test_an_interrupt_says_how_much_is_kept(root, downloading, proxy):
    """
    Ctrl-C ends with 130, gives the claim back, prints no trace, and says how much the next call need not fetch.
    """
    process, _ = downloading

    process.send_signal(signal.SIGINT)
    proxy.limit_bytes_per_second = None
    _, stderr = process.communicate(timeout=20)

    assert (process.returncode, "Traceback" in stderr) == (130, False)
    said, kept = stderr.splitlines()[-2:]
    assert said == "kserve-pvc: interrupted"
    assert re.fullmatch(r"kserve-pvc: \d.* of `s3://\S+` are kept; the next call fetches the rest", kept), kept
    assert list(ModelStore(root).locks()) == []


def test_sigterm_does_not_wait_for_a_source_that_stalls(root, downloading, proxy):
    """
    A command that is told to end does so within seconds, and gives its claim back, although its source sends nothing.
    """
    process, _ = downloading
    proxy.limit_bytes_per_second = 1_000

    process.terminate()
    with suppress(subprocess.TimeoutExpired):
        process.wait(30)

    assert process.returncode == 143
    assert list(ModelStore(root).locks()) == []


def exit_codes(model, tmp_path):
    """
    A command for each exit code that needs no server.
    """
    (tmp_path / "unsafe").mkdir()
    (tmp_path / "unsafe/link").symlink_to("nowhere")
    closed = {"AWS_ENDPOINT_URL": "http://127.0.0.1:9", "AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret"}
    absent = f"file://{tmp_path}/absent"
    return [
        (1, "StoreRootError", ["--store", str(tmp_path / "missing"), "ls"], {}),
        (2, "InvalidURIError", ["ensure", "model"], {}),
        (2, "UnknownSchemeError", ["ensure", "oci://registry/model"], {}),
        (2, "SettingsError", ["ls"], {"KSERVE_PVC_MODE": "write"}),
        (2, "LockerMismatchError", ["ensure", absent], {"KSERVE_PVC_LOCKER": "flock"}),
        (3, "ModelNotFoundError", ["path", absent], {}),
        (3, "ModelNotFoundError", ["info", absent], {}),
        (3, "ModelNotFoundError", ["verify", absent], {}),
        (3, "ModelNotFoundError", ["rm", absent], {}),
        (3, "OfflineError", ["ensure", "--local-files-only", absent], {}),
        (4, "ReadOnlyStoreError", ["ensure", absent], {"KSERVE_PVC_MODE": "r"}),
        (4, "ReadOnlyStoreError", ["rm", model.uri], {"KSERVE_PVC_MODE": "r"}),
        (4, "ReadOnlyStoreError", ["locks", "--break", model.uri], {"KSERVE_PVC_MODE": "r"}),
        (7, "SourceNotFoundError", ["ensure", absent], {}),
        (7, "SourceNotFoundError", ["plan", absent], {}),
        (7, "SourceUnavailableError", ["ensure", f"s3://{BUCKET}/model"], closed),
        (8, "PolicyError", ["ensure", "s3://key:secret@bucket/model"], {}),
        (8, "UnsafePathError", ["ensure", f"file://{tmp_path}/unsafe"], {}),
    ]


def test_each_class_of_error_has_its_exit_code(in_process, model, tmp_path):
    """
    An error is one line on stderr, its pinned document on stdout with `--json`, and its exit code.
    """
    for code, name, arguments, env in exit_codes(model, tmp_path):
        returned, out, err = in_process("--json", *arguments, env=env)

        error = json.loads(out)["error"]
        assert (returned, error["type"], err.splitlines()[-1]) == (code, name, f"kserve-pvc: {error['message']}")


def test_an_error_for_people_leaves_stdout_empty(root, tmp_path):
    """
    Without `--json` an error is one line on stderr and nothing on stdout.
    """
    result = shell.kserve_pvc(root, "ensure", f"file://{tmp_path}/absent")

    assert (result.returncode, result.stdout) == (7, "")
    assert (
        result.stderr
        == f"kserve-pvc: {SourceNotFoundError(f'file://{tmp_path}/absent', 'No such file or directory')}\n"
    )


def test_the_document_of_an_error_has_its_fields(root, tmp_path):
    """
    What a program needs to know about an error are fields beside type and message.
    """
    uri = f"file://{tmp_path}/absent"
    ModelStore(root, mode="rw")

    document = shell.document(shell.kserve_pvc(root, "--json", "path", uri))

    message = (
        f"`{uri}` is not in the store at `{root}`; `ensure` it from a read-write store, or `import` a bundle of it"
    )
    assert document == {"error": {"type": "ModelNotFoundError", "message": message, "ref": uri, "root": str(root)}}


@pytest.mark.parametrize(
    ("env", "uri"),
    [
        ({"AWS_ACCESS_KEY_ID": "nokey", "AWS_SECRET_ACCESS_KEY": "nosecret"}, f"s3://{BUCKET}/model"),
        ({}, "s3://no-such-bucket-here/model"),
        ({}, f"s3://{BUCKET}/no/such/model"),
    ],
)
def test_what_a_server_refuses_ends_with_seven(in_process, s3_env, env, uri):
    """
    Denied and missing are the source's fault.
    """
    code, out, _ = in_process("ensure", uri, env={**s3_env, **env})

    assert (code, out) == (7, "")


def test_a_full_volume_ends_with_six(mount, uri):
    """
    A model that does not fit says how much is needed and how much is free.
    """
    place = mount("-t", "tmpfs", "-o", "size=300k", "tmpfs")

    result = shell.kserve_pvc(place, "--json", "ensure", uri)

    error = shell.document(result)["error"]
    assert (result.returncode, error["type"], error["needed_bytes"]) == (6, "InsufficientSpaceError", SIZE)
    assert 0 < error["free_bytes"] < 300 * 1024


def test_a_damaged_record_ends_with_three_and_is_verified_with_one(root, model):
    """
    For a reader the model is absent; `verify` says that it is damaged.
    """
    (record,) = (root / ".kserve-pvc/keys" / model.key / "log").iterdir()
    record.unlink()
    record.write_text("{}")

    codes = [shell.kserve_pvc(root, *verb).returncode for verb in (["path", model.uri], ["ls"], ["verify", "--all"])]

    assert codes == [3, 0, 1]


WRITING = [["ensure", "URI"], ["rm", "URI"], ["locks", "--break", "URI"]]


@pytest.mark.parametrize(
    ("annotations", "allowed"),
    [
        (None, True),
        ('app="server"', True),
        (f'{READONLY}="false"', True),
        (f'{READONLY}="true"', False),
        (f'{READONLY}="False"', False),
        (f'{READONLY}=""', False),
    ],
)
def test_the_pods_annotation_may_forbid_writing(in_process, root, uri, tmp_path, annotations, allowed):
    """
    A verb that writes is the wish to write, unless the annotation has any other value than `"false"`.
    """
    path = tmp_path / "annotations"
    if annotations is not None:
        path.write_text(annotations)
    before = listing(root)

    codes = [
        in_process(*(a.replace("URI", uri) for a in verb), env={"KSERVE_PVC_ANNOTATIONS": str(path)})[0]
        for verb in (WRITING[0], WRITING[2], WRITING[1])
    ]

    assert codes == ([0, 0, 0] if allowed else [4, 4, 4])
    assert (listing(root) == before) == (not allowed)


@pytest.mark.parametrize("verb", WRITING, ids=lambda verb: verb[0])
def test_a_read_only_mode_forbids_every_verb_that_writes(root, model, tmp_path, verb):
    """
    With `KSERVE_PVC_MODE=r` nothing is written, whatever the annotation allows; reading goes on.
    """
    (tmp_path / "annotations").write_text(f'{READONLY}="false"')
    env = {"KSERVE_PVC_MODE": "r", "KSERVE_PVC_ANNOTATIONS": str(tmp_path / "annotations")}
    uri = model.uri if verb[0] != "ensure" else f"{model.uri}/config.json"
    before = listing(root)

    refused = shell.kserve_pvc(root, *(a.replace("URI", uri) for a in verb), env=env)
    hit = shell.kserve_pvc(root, "ensure", model.uri, env=env)

    assert (refused.returncode, hit.returncode, hit.stdout) == (4, 0, f"{model.path}\n")
    assert "read-only" in refused.stderr
    assert listing(root) == before


@pytest.mark.parametrize(
    "verb", [["path", "URI"], ["ls"], ["info", "URI"], ["plan", "URI"], ["verify", "--all", "--full"], ["locks"]]
)
def test_verbs_that_read_write_nothing(root, model, verb):
    """
    Looking changes nothing on the volume, also where writing is allowed.
    """
    before = listing(root)

    result = shell.kserve_pvc(root, *(a.replace("URI", model.uri) for a in verb), env={"KSERVE_PVC_MODE": "rw"})

    assert result.returncode == 0
    assert listing(root) == before


def test_global_options_stand_before_or_after_the_verb(root, model):
    """
    The store, JSON and the amount of talk may be chosen on either side, and the later one counts.
    """
    other = root.parent / "other"
    other.mkdir()
    commands = [
        [*shell.COMMAND, "--store", str(root), "--json", "ls"],
        [*shell.COMMAND, "ls", "--store", str(root), "--json"],
        [*shell.COMMAND, "--json", "ls", "--store", str(root)],
        [*shell.COMMAND, "--store", str(other), "ls", "--json", "--store", str(root)],
    ]

    answers = [shell.run(command) for command in commands]

    assert [[row["uri"] for row in shell.document(answer)] for answer in answers] == [[model.uri]] * 4


def test_the_store_comes_from_the_environment(root, model, tmp_path):
    """
    `KSERVE_PVC_STORE` is the store unless `--store` names another.
    """
    (tmp_path / "empty").mkdir()
    ModelStore(tmp_path / "empty", mode="rw")

    chosen = shell.run([*shell.COMMAND, "--json", "ls"], env={"KSERVE_PVC_STORE": str(root)})
    other = shell.run(
        [*shell.COMMAND, "--json", "ls", "--store", str(tmp_path / "empty")], env={"KSERVE_PVC_STORE": str(root)}
    )

    assert [len(shell.document(answer)) for answer in (chosen, other)] == [1, 0]


@pytest.mark.parametrize("place", ["before", "after"])
def test_quiet_and_verbose(root, uri, place):
    """
    `-q` shows no progress, and `-v` shows where an error was raised, on either side of the verb.
    """
    quiet, verbose = (
        [option, *verb] if place == "before" else [*verb, option]
        for option, verb in (("-q", ["ensure", uri]), ("-v", ["path", f"{uri}/x"]))
    )

    silent, talkative = shell.kserve_pvc(root, *quiet), shell.kserve_pvc(root, *verbose)

    assert (silent.returncode, silent.stderr, len(silent.stdout.splitlines())) == (0, "", 1)
    assert talkative.stderr.startswith("Traceback")
    assert talkative.stderr.splitlines()[-1].startswith("kserve_pvc.errors.ModelNotFoundError: ")


def test_verbose_says_why_settings_are_not_plain(root, tmp_path):
    """
    `-v` logs which way a source is reached and why, and `doctor` reports the same reason.
    """
    (tmp_path / "config").write_text("[profile other]\nregion = eu-west-1\n")
    env = {"AWS_CONFIG_FILE": str(tmp_path / "config"), "AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b"}
    closed = {**env, "AWS_ENDPOINT_URL": "http://127.0.0.1:9"}

    verbose = shell.kserve_pvc(root, "-v", "plan", "s3://bucket/model", env=closed)
    silent = shell.kserve_pvc(root, "plan", "s3://bucket/model", env=closed)
    report = shell.document(shell.kserve_pvc(root, "--json", "doctor", env=env))

    assert "`AWS_CONFIG_FILE`" in verbose.stderr
    assert "AWS_CONFIG_FILE" not in silent.stderr
    assert "`AWS_CONFIG_FILE`" in " ".join(report["sources"]["s3"])


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["fetch"],
        ["ensure"],
        ["ensure", "s3://a/b", "s3://c/d"],
        ["ensure", "--timeout", "soon", "s3://a/b"],
        ["ensure", "--max-workers", "two", "s3://a/b"],
        ["ls", "--nonsense"],
        ["locks", "--break"],
        ["verify"],
    ],
    ids=" ".join,
)
def test_wrong_usage_ends_with_two(in_process, root, arguments):
    """
    What cannot be understood says so on stderr, prints nothing on stdout and touches nothing.
    """
    code, out, err = in_process(*arguments)

    assert (code, out) == (2, "")
    assert err.splitlines()[-1].startswith("kserve-pvc: ")
    assert list(root.iterdir()) == []


@pytest.mark.parametrize("timeout", ["-5", "nan"])
def test_a_senseless_number_ends_with_two(root, uri, timeout):
    """
    A negative timeout is wrong usage, not a failure of the program.
    """
    result = shell.kserve_pvc(root, "ensure", "--timeout", timeout, uri)

    assert (result.returncode, "Traceback" in result.stderr) == (2, False)


def test_the_version_is_printed():
    """
    `--version` prints the installed version.
    """
    result = shell.run([*shell.COMMAND, "--version"])

    assert (result.returncode, result.stdout) == (0, f"kserve-pvc {kserve_pvc.__version__}\n")


@pytest.mark.parametrize(
    "verb", ["ensure", "path", "ls", "info", "plan", "verify", "rm", "export", "import", "warm", "locks"]
)
def test_each_verb_has_its_help(in_process, verb):
    """
    `--help` of a verb names its options and the global ones.
    """
    code, out, err = in_process(verb, "--help")

    assert (code, err) == (0, "")
    assert [word for word in ("--store", "--json", "--quiet", "--verbose") if word not in out] == []


def test_a_program_that_stops_reading_is_no_crash(root, model):
    """
    `kserve-pvc info … | head -1` prints its line and no trace.
    """
    many = FakeBackend({f"{number:05d}": b"" for number in range(3000)})
    ModelStore(root, mode="rw", backends={"fake": many.factory}).ensure("fake://many/files", progress=False)

    with shell.start(root, "info", "fake://many/files") as process:
        line = process.stdout.readline()
        process.stdout.close()
        stderr = process.stderr.read()

    assert (line.split(), "Traceback" in stderr) == (["uri", "fake://many/files"], False)


def test_progress_in_a_log_is_lines(root, upload, s3_env):
    """
    Where stderr is no terminal the first line comes at once, and nothing is drawn.
    """
    uri = upload(FILES)

    result = shell.kserve_pvc(root, "ensure", uri, env=s3_env)

    assert result.stderr.splitlines() == [
        f"kserve-pvc: downloading {uri}: 4 files, 684.6 KiB",
        f"kserve-pvc: {uri}: downloaded",
    ]
    assert "\r" not in result.stderr


@pytest.mark.parametrize("quiet", [False, True])
def test_progress_on_a_terminal_is_a_bar(root, upload, s3_env, proxy, quiet):
    """
    On a terminal one line is drawn again and again and cleared at the end; `-q` draws nothing; stdout stays clean.
    """
    uri = upload(FILES)
    proxy.limit_bytes_per_second = 1_000_000
    terminal, end = pty.openpty()
    termios.tcsetwinsize(end, (50, 200))
    process = shell.start(root, "ensure", uri, *(["-q"] if quiet else []), env=s3_env, stderr=end)
    os.close(end)

    drawn = read_terminal(terminal)
    stdout, _ = process.communicate(timeout=60)

    assert (process.returncode, len(stdout.splitlines())) == (0, 1)
    if quiet:
        assert drawn == ""
    else:
        assert (f"downloading {uri}: " in drawn, "%|" in drawn, drawn.count("\r") > 2) == (True, True, True)
        assert "kserve-pvc: downloading" not in drawn


def read_terminal(terminal: int) -> str:
    """
    Read what is drawn until the other end is closed.
    """
    drawn = b""
    while True:
        try:
            piece = os.read(terminal, 4096)
        except OSError:  # EIO: nobody has the other end any more.
            piece = b""
        if not piece:
            os.close(terminal)
            return drawn.decode()
        drawn += piece


def test_documents_stay_clean_on_failure_half_way(root, tmp_path):
    """
    With `--json` stdout holds exactly one document also when progress was shown before an error.
    """
    write_files(tmp_path / "model", {"a": b"a"})
    (tmp_path / "model/b").symlink_to("nowhere")

    result = shell.kserve_pvc(root, "--json", "ensure", f"file://{tmp_path}/model")

    assert list(json.loads(result.stdout)) == ["error"]


@pytest.mark.parametrize(
    ("arguments", "environ", "code"),
    [
        (["ensure", "s3://key:secret@bucket/m"], {}, 8),
        (["ensure", "no-uri"], {}, 2),
        (["rm", "s3://bucket/m?versionId=1"], {}, 8),
        (["ensure", "s3://bucket/m", "--local-files-only"], {}, 3),
        (["ensure", "s3://bucket/m"], {"KSERVE_PVC_OFFLINE": "1"}, 3),
        (["warm", "s3://bucket/m"], {"KSERVE_PVC_OFFLINE": "1"}, 3),
        (["warm"], {}, 2),
    ],
)
def test_a_command_that_is_refused_writes_nothing(root, arguments, environ, code):
    """
    What is bound to be refused makes no store: the volume is as empty as it was.
    """
    done = shell.kserve_pvc(root, *arguments, env=environ)

    assert (done.returncode, [*root.iterdir()]) == (code, [])
