"""
Settings as they come out of secrets: with a line break or blanks around them, or under a name that means another kind.
"""

from __future__ import annotations

import pytest
from trees import read_tree
from weather import StormyS3
from webserver import WebServer, page

from kserve_pvc import ModelStore
from kserve_pvc._source.ref import parse_ref
from kserve_pvc.backends._login.azure import AccountKey, Signature, find_account, read_credential
from kserve_pvc.backends._options import TrimmedEnvironment
from kserve_pvc.backends.azure import AzureBackend
from kserve_pvc.backends.gs import GSBackend
from kserve_pvc.backends.hf import HFBackend

ENDS = ["\n", "\r\n", " \n", "\t"]
SIGNATURE = "sv=2021-02-12&sr=c&sp=rl&se=2030-01-01T00%3A00%3A00Z&sig=abc%3D"
KEY = "a2V5a2V5"


@pytest.fixture
def storm():
    """
    An S3 server that checks signatures.
    """
    with StormyS3() as server:
        server.put("bkt", "m/w.bin", b"weights")
        yield server


@pytest.mark.parametrize("with_file", [False, True])
@pytest.mark.parametrize("end", ENDS)
def test_variables_of_s3_may_end_in_a_line_break(end, with_file, root, tmp_path, storm, monkeypatch):
    """
    Key, secret, session token, region and endpoint count without what is around them, with AWS's files and without.
    """
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_DEFAULT_REGION"):
        value = {"AWS_ACCESS_KEY_ID": storm.key, "AWS_SECRET_ACCESS_KEY": storm.secret}.get(name, storm.token)
        monkeypatch.setenv(name, ("us-east-1" if name.endswith("REGION") else value) + end)
    monkeypatch.setenv("AWS_ENDPOINT_URL", storm.endpoint + end)
    if with_file:
        (tmp_path / "config").write_text("[default]\n")
        monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))

    assert read_tree(ModelStore(root, mode="rw").ensure("s3://bkt/m", progress=False).path) == {"w.bin": b"weights"}


@pytest.mark.parametrize("scheme", ["s3", "fsspec+s3"])
@pytest.mark.parametrize("end", ENDS)
def test_options_may_end_in_a_line_break(end, scheme, root, storm):
    """
    What a program reads from a mounted secret is taken as it is meant, through fsspec too.
    """
    options = {name: f"{value}{end}" for name, value in storm.options.items()}

    model = ModelStore(root, mode="rw", storage_options=options).ensure(f"{scheme}://bkt/m", progress=False)

    assert read_tree(model.path) == {"w.bin": b"weights"}


@pytest.mark.parametrize("end", ENDS)
def test_variables_of_azure_may_end_in_a_line_break(end):
    """
    Name, key, signature and connection string count without what is around them.
    """
    for environ in (
        {"AZURE_STORAGE_ACCOUNT_NAME": f"acct{end}", "AZURE_STORAGE_ACCOUNT_KEY": KEY + end},
        {"AZURE_STORAGE_ACCOUNT_NAME": f"acct{end}", "AZURE_STORAGE_ACCESS_KEY": KEY + end},
        {"AZURE_STORAGE_ACCOUNT_NAME": f"acct{end}", "AZURE_STORAGE_SAS_TOKEN": SIGNATURE + end},
        {"AZURE_STORAGE_CONNECTION_STRING": f"AccountName=acct;AccountKey={KEY}{end}"},
    ):
        backend = AzureBackend({}, environ)
        place = backend.service.place(parse_ref("az://models/m"))
        target, headers = backend.service.read(place, {}, renewed=False)
        assert (target.host, "\n" in target.path, bool(headers)) == ("acct.blob.core.windows.net", False, True)


@pytest.mark.parametrize("text", [SIGNATURE, f"?{SIGNATURE}", f"{SIGNATURE}\n"])
def test_a_signature_is_accepted_where_azure_expects_a_key(text):
    """
    Azure's SDK recognises a signature by its `sig=`, and KServe's documentation relies on that.
    """
    for name in ("AZURE_STORAGE_ACCESS_KEY", "AZURE_STORAGE_ACCOUNT_KEY"):
        assert find_account({}, TrimmedEnvironment({name: text})).login == Signature(SIGNATURE)
    for options in ({"account_key": text}, {"credential": text}):
        assert find_account(options, {}).login == Signature(SIGNATURE)
    assert isinstance(read_credential(f"{KEY}\n"), AccountKey)


@pytest.mark.parametrize("end", ENDS)
def test_settings_of_the_hub_and_of_google_may_end_in_a_line_break(end):
    """
    The endpoint counts without what is around it, and so does a token.
    """
    environ = {"HF_ENDPOINT": f"http://hub.example{end}", "HF_TOKEN": f"hf_token{end}"}
    backend = HFBackend({}, environ)
    target = backend.place("/api")
    assert (target.host, backend.headers(target)["Authorization"]) == ("hub.example", "Bearer hf_token")

    service = GSBackend({"token": f"ya29.token{end}", "endpoint_url": f"http://127.0.0.1:1{end}"}, {}).service
    assert service.read(service.place(parse_ref("gs://bkt/m")), {"generation": "1"}, renewed=False)[1] == {
        "Authorization": "Bearer ya29.token"
    }


@pytest.mark.parametrize("end", [r"\n", r"\r\n", " "])
def test_headers_for_a_host_may_end_in_a_line_break(end, root, monkeypatch):
    """
    A header whose value was read from a secret goes out without the line break.
    """
    with WebServer() as server:
        server.pages["/m.bin"] = page(b"weights", wants={"Authorization": "Bearer x"})
        monkeypatch.setenv("127.0.0.1-headers", '{"Authorization": "Bearer x' + end + '"}\n')
        store = ModelStore(root, mode="rw", storage_options={"allow_private": True})

        assert read_tree(store.ensure(f"{server.endpoint}/m.bin", progress=False).path) == {"m.bin": b"weights"}
