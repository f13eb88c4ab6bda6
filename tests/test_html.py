"""
What a notebook shows of a store, a model, a plan and a verification.
"""

import html.parser
from datetime import UTC, datetime
from pathlib import Path

import pytest
from sources import FakeBackend
from trees import model_files, write_files

from kserve_pvc import ModelStore, Plan, Problem, Verification
from kserve_pvc._show.html import MAX_ROWS, show_model, show_store, show_verification

PLAIN = 'class="mathjax_ignore tex2jax_ignore"'

FILES = model_files(seed=75)
HOSTILE = "<script>alert(1)</script>\"'&<img src=x>\x1b[31m\u202e"
ESCAPED = "&lt;script&gt;alert(1)&lt;/script&gt;&quot;&#x27;&amp;&lt;img src=x&gt;\\x1b[31m\\u202e"
CREATED = datetime(2026, 2, 3, 4, 5, 6, tzinfo=UTC)
ALLOWED = {"table", "caption", "thead", "tbody", "tr", "th", "td", "p"}


class Reader(html.parser.HTMLParser):
    """
    Reads a page as a browser does, and complains about tags that stay open.
    """

    def __init__(self, page: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self._open: list[str] = []
        self.feed(page)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        self._open.append(tag)

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)


@pytest.fixture
def model(root, tmp_path):
    """
    A model of four files in a store.
    """
    write_files(tmp_path / "model", FILES)
    return ModelStore(root, mode="rw").ensure(f"file://{tmp_path}/model", progress=False)


def shown() -> list[str]:
    """
    Everything that can be shown, with hostile text wherever a remote or another tenant has a say.
    """
    facts = {"uri": HOSTILE, "key": HOSTILE, "version": HOSTILE}
    sizes = {"files": 1, "size_bytes": 10**9}
    chosen = {"revision": HOSTILE, "allow_patterns": (HOSTILE,), "ignore_patterns": (HOSTILE,)}
    got = {
        "path": Path(f"/mnt/{HOSTILE}"),
        "status": "downloaded",
        "created_at": CREATED,
        "bytes_fetched": 1,
        "seconds": 1.0,
    }
    plan = {
        "files": 1,
        "size_bytes": 10**9,
        "bytes_to_fetch": 1,
        "bytes_reusable": 2,
        "free_bytes": 3,
        "seconds": None,
        "bytes_shared": 2,
    }
    problem = Problem(path=HOSTILE, kind="digest", detail=HOSTILE)
    return [
        show_store(HOSTILE, "r", [{**facts, **sizes, **chosen, **got}]),
        show_model(**facts, **sizes, **chosen, **got),
        Plan(**facts, action="download", **plan)._repr_html_(),
        Plan(**facts, action="nothing", **plan)._repr_html_(),
        Verification(uri=HOSTILE, level="full", files=1, bytes=1, problems=(problem,))._repr_html_(),
        Verification(uri=HOSTILE, level="size", files=1, bytes=1, problems=())._repr_html_(),
    ]


@pytest.mark.parametrize("page", shown())
def test_text_is_only_text(page):
    """
    Markup and control characters in names are shown, not obeyed: no tag, attribute or resource comes from them.
    """
    seen = Reader(page)

    assert ESCAPED in page
    assert {tag for tag, _ in seen.tags} <= ALLOWED
    said = {(name, value) for _, attributes in seen.tags for name, value in attributes.items()}
    assert {name for name, _ in said} <= {"scope", "class", "style"}
    assert {value for name, value in said if name == "scope"} <= {"row", "col"}
    assert not any(
        word in value for name, value in said if name == "style" for word in ("url", "color", "background", "font", "(")
    )
    assert all(text.isprintable() for text in seen.texts)


@pytest.mark.parametrize("page", shown())
def test_names_are_not_typeset(page):
    """
    What stands between dollar signs in a name is no formula for a notebook, neither for MathJax 2 nor for later ones.
    """
    (_, outermost), *_ = Reader(page).tags

    assert set(outermost["class"].split()) == {"mathjax_ignore", "tex2jax_ignore"}


@pytest.mark.parametrize("page", shown())
def test_text_begins_at_the_left_and_breaks(page):
    """
    Notebooks set cells to the right; names are to be read from their beginning, however long, and amounts from their
    end.
    """
    cells = [attributes["style"] for tag, attributes in Reader(page).tags if tag in ("td", "th", "caption")]

    assert all(style.startswith(("text-align:left;", "text-align:right;white-space:nowrap")) for style in cells)
    assert not cells or any("overflow-wrap:anywhere" in style for style in cells)


@pytest.mark.parametrize("page", shown())
def test_tables_can_be_heard(page):
    """
    Each table has a caption that says what it is, and each head says whether it heads a row or a column.
    """
    tags = Reader(page).tags

    names = [tag for tag, _ in tags]
    assert names.count("caption") == names.count("table")
    assert [attributes for tag, attributes in tags if tag == "th" and "scope" not in attributes] == []


def test_a_store_shows_its_models(root, model):
    """
    The caption counts, and each model has a row with its size for people.
    """
    texts = Reader(ModelStore(root)._repr_html_()).texts

    assert texts == [
        *(f"ModelStore at {root}, read-only: 1 model, 684.6 KiB", "URI", "Which", "Size", "Files", "Created", "Key"),
        *(model.uri, "684.6 KiB", "4", f"{model.created_at:%Y-%m-%d %H:%M}", model.key),
    ]


def test_what_makes_another_model_is_shown(root, model):
    """
    Two models of one URI are told apart by what was asked for.
    """
    part = ModelStore(root, mode="rw").ensure(
        model.uri, allow_patterns=["*.json", "empty"], ignore_patterns="weights/", progress=False
    )

    texts = Reader(ModelStore(root)._repr_html_()).texts

    assert "only *.json empty without weights/*" in texts
    assert Reader(part._repr_html_()).texts[1:5] == ["Only", "*.json empty", "Without", "weights/*"]


def test_an_empty_store_is_a_sentence(root):
    """
    Without models there is no empty table.
    """
    assert (
        ModelStore(root, mode="rw")._repr_html_() == f"<p {PLAIN}>ModelStore at {root}, read-write: 0 models, 0 B</p>"
    )


def test_a_model_shows_where_it_is(root, model):
    """
    A model that was downloaded says what that cost, and one that was there only that it was.
    """
    first, again = (Reader(found._repr_html_()).texts for found in (model, ModelStore(root).get(model.uri)))

    facts = ["Size", "684.6 KiB in 4 files", "Path", str(model.path), "Version", model.version, "Key", model.key]
    created = ["Created", f"{model.created_at:%Y-%m-%d %H:%M} UTC"]
    fetched = f"downloaded, 684.6 KiB fetched in {model.seconds:.1f} s"
    assert first == [f"Model {model.uri}", "Status", fetched, *facts, *created]
    assert again == [f"Model {model.uri}", "Status", "present", *facts, *created]


def test_showing_a_model_reads_nothing(root, model):
    """
    A notebook may show a model whose volume is gone.
    """
    root.rename(root.with_name("gone"))

    assert str(model.path) in model._repr_html_()


def test_a_plan_says_whether_it_fits(root, model):
    """
    What is present needs nothing; what is not is shown with the bytes to fetch.
    """
    big = FakeBackend({"a": b"a" * 5000})
    store = ModelStore(root, mode="rw", backends={"fake": big.factory})

    nothing, download = (Reader(plan._repr_html_()).texts for plan in (store.plan(model.uri), store.plan("fake://x/y")))

    assert nothing == [f"Plan for {model.uri}", "Action", "nothing, it is present", "Size", "684.6 KiB in 4 files"]
    assert download[:7] == [
        "Plan for fake://x/y",
        "Action",
        "download",
        "Size",
        "4.9 KiB in 1 file",
        "To fetch",
        "4.9 KiB",
    ]
    assert download[download.index("Free") + 1].endswith(": it fits")


def test_a_verification_shows_what_differs(root, model):
    """
    All well is one sentence; a difference is a row with its kind, path and detail.
    """
    store = ModelStore(root)
    well = store.verify(model.uri, "full")._repr_html_()
    (model.path / "weights/b.bin").unlink()

    texts = Reader(store.verify(model.uri)._repr_html_()).texts

    assert well == f"<p {PLAIN}>Verification of {model.uri}: ok, no difference (4 files, 684.6 KiB, digests)</p>"
    assert texts == [
        *(f"Verification of {model.uri}: BAD, 1 problem (4 files, 684.6 KiB, sizes)", "Kind", "Path", "Detail"),
        *("missing", "weights/b.bin", "missing"),
    ]


def test_a_long_table_is_cut():
    """
    A model with thousands of differences does not fill a notebook; how many are not shown is said.
    """
    page = show_verification("s3://b/m", "size", 1, 1, [("missing", str(number), "") for number in range(MAX_ROWS + 5)])

    texts = Reader(page.replace('colspan="3"', "")).texts
    assert (f"{MAX_ROWS - 1}" in texts, f"{MAX_ROWS}" in texts, texts[-1]) == (True, False, "and 5 more")
