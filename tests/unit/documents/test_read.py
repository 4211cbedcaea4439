"""Documents of each kind as blocks, and as passages that know their place."""

from __future__ import annotations

from pathlib import Path

import pytest

from llm_ray.documents.document import Block, Document
from llm_ray.documents.passages import LEAST, split
from llm_ray.documents.read import find, read
from llm_ray.errors import DataError
from tests.unit.documents.conftest import MakePdf

MARKDOWN = """\
---
title: ignored
---
# Pumps

A pump moves water.
It has a motor.

<!-- not for readers -->

Parts
-----

- rotor
- seal

| part | price |
| --- | --- |
| seal | 3 |

```
# no heading
```
"""

HTML = """\
<html><head><title>Pumps</title><style>p {}</style></head>
<body><nav>Home | About</nav>
<main><h1>All <em>about</em> pumps</h1>
<p>A pump moves
   <b>water</b>.<br>It has a motor.</p>
<div>Loose text <!-- hidden --> here<ul><li>rotor</li>
<li><p>seal</p><p>of rubber</p></li></ul></div>
<table><tr><th>part</th><th>price</th></tr><tr><td>seal</td><td>3</td></tr></table>
<pre>  a
    b</pre><script>alert(1)</script></main><footer>(c)</footer></body></html>
"""


def blocks(path: Path) -> list[tuple[int, int, str]]:
    return [(block.at, block.last, block.text) for block in read(path, path.name).blocks]


def test_markdown(tmp_path: Path) -> None:
    (tmp_path / "a.md").write_text(MARKDOWN)
    assert read(tmp_path / "a.md", "a.md").title == "Pumps"
    assert blocks(tmp_path / "a.md") == [
        (4, 4, "# Pumps"),
        (6, 7, "A pump moves water.\nIt has a motor."),
        (11, 11, "## Parts"),
        (14, 15, "- rotor\n- seal"),
        (17, 19, "| part | price |\n| --- | --- |\n| seal | 3 |"),
        (21, 23, "```\n# no heading\n```"),
    ]


def test_html(tmp_path: Path) -> None:
    (tmp_path / "a.html").write_text(HTML)
    assert read(tmp_path / "a.html", "a.html").title == "Pumps"
    assert [(at, text) for at, _, text in blocks(tmp_path / "a.html")] == [
        (3, "# All about pumps"),
        (4, "A pump moves water.\nIt has a motor."),
        (6, "Loose text here"),
        (6, "- rotor"),
        (7, "- seal"),
        (7, "of rubber"),
        (8, "| part | price |"),
        (8, "| seal | 3 |"),
        (9, "```\n  a\n    b\n```"),
    ]


def test_html_in_the_encoding_that_it_names(tmp_path: Path) -> None:
    (tmp_path / "a.htm").write_bytes('<meta charset="iso-8859-1"><p>Größe</p>'.encode("iso-8859-1"))
    assert [text for _, _, text in blocks(tmp_path / "a.htm")] == ["Größe"]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_text(tmp_path: Path, encoding: str) -> None:
    (tmp_path / "a.txt").write_bytes("\nErste Zeile\r\nzweite Größe\n \n\nNoch eine".encode(encoding))
    assert blocks(tmp_path / "a.txt") == [(2, 3, "Erste Zeile\nzweite Größe"), (6, 6, "Noch eine")]


def test_pdf(tmp_path: Path, make_pdf: MakePdf) -> None:
    document = read(make_pdf(tmp_path / "a.pdf", ["A pump moves wa-\nter.", "", "It has a motor."]), "a.pdf")
    assert [(block.at, block.text) for block in document.blocks] == [(1, "A pump moves water."), (3, "It has a motor.")]
    assert document.paged and document.note == "1 of 3 pages have no text (scanned?)"


def test_a_pdfs_headers_and_footers_are_left_out(tmp_path: Path, make_pdf: MakePdf) -> None:
    pages = [f"Pump manual\nText number {n} of the page.\nPage {n} of 5" for n in "12345"]
    assert [text for _, _, text in blocks(make_pdf(tmp_path / "a.pdf", pages))] == [
        f"Text number {n} of the page." for n in "12345"
    ]


@pytest.mark.parametrize(
    ("name", "data", "reason"),
    [
        ("a.txt", b"\xff\xfeG\xdf\xdf", "not UTF-8"),
        ("a.md", b"Gr\xf6\xdfe", "not UTF-8"),
        ("a.txt", b"a\0b text", "not a text file"),
        ("a.md", b"  \n", "contains no text"),
        ("a.html", b"<script>x</script>", "contains no text"),
        ("a.pdf", b"%PDF-1.4 and no more", "not a complete PDF"),
        ("a.pdf", b"", "not a complete PDF"),
    ],
)
def test_what_cannot_be_read_names_the_file(tmp_path: Path, name: str, data: bytes, reason: str) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(DataError, match=f"{name}: {reason}"):
        read(tmp_path / name, name)


def test_a_scanned_pdf(tmp_path: Path, make_pdf: MakePdf) -> None:
    with pytest.raises(DataError, match=r"none of its 2 pages has text: if they were scanned, .* OCR"):
        read(make_pdf(tmp_path / "a.pdf", ["", ""]), "a.pdf")


def test_an_encrypted_pdf(tmp_path: Path, make_pdf: MakePdf) -> None:
    import pypdf

    writer = pypdf.PdfWriter(clone_from=make_pdf(tmp_path / "plain.pdf", ["A secret."]))
    writer.encrypt("word", algorithm="AES-256")
    writer.write(tmp_path / "a.pdf")
    with pytest.raises(DataError, match=r"a\.pdf: encrypted"):
        read(tmp_path / "a.pdf", "a.pdf")


def test_documents_are_found_in_folders(tmp_path: Path) -> None:
    for name in ("b.md", "in/a.TXT", ".git/c.md", ".hidden.md", "d.docx", "Makefile"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    found = find(tmp_path)
    assert list(found.files) == ["b.md", "in/a.TXT"]
    assert found.others == {".docx": 1, "Makefile": 1}
    assert list(find(tmp_path / "b.md").files) == ["b.md"]


def test_where_nothing_is_found(tmp_path: Path) -> None:
    (tmp_path / "d.docx").touch()
    with pytest.raises(DataError, match=r"contains no documents \(.*\.pdf\); it has 1 \.docx"):
        find(tmp_path)
    with pytest.raises(DataError, match="not a document of a known kind"):
        find(tmp_path / "d.docx")
    with pytest.raises(DataError, match="no such folder"):
        find(tmp_path / "none")


# Passages -------------------------------------------------------------------------------------------------------------


def document(*parts: tuple[int, str], paged: bool = False) -> Document:
    made = [
        Block(text, at, at + text.count("\n") * (not paged), len(text) - len(text.lstrip("#"))) for at, text in parts
    ]
    return Document("a.md", "A", tuple(made), paged)


def test_headings_begin_passages_and_stay_with_their_text() -> None:
    text = "word " * 30
    made = split(document((1, "# A"), (2, text), (3, "## B"), (4, text), (5, "## C"), (6, text)), 400)
    assert [(p.first, p.last, p.heading) for p in made] == [(1, 4, ("A",)), (5, 6, ("A", "C"))]
    made = split(document((1, "# A"), (2, text), (3, "## B"), (4, text), (5, "## C"), (6, text)), 290)
    assert [(p.first, p.last, p.heading) for p in made] == [(1, 2, ("A",)), (3, 4, ("A", "B")), (5, 6, ("A", "C"))]


def test_a_long_block_is_cut_between_lines_sentences_words() -> None:
    lines = "\n".join(f"Line {n} has some words of its own." for n in range(20))
    made = split(document((10, lines)), 200)
    assert "\n".join(p.text for p in made) == lines
    assert all(len(p.text) <= 200 and p.last - p.first == p.text.count("\n") for p in made)
    assert (made[0].first, made[1].first, made[-1].last) == (10, made[0].last + 1, 29)
    made = split(document((1, "This is a sentence of many words. " * 20)), 200)
    assert all(p.text.strip().endswith(".") and p.first == p.last == 1 for p in made)
    made = split(document((1, "x" * 500)), 200)
    assert [len(p.text) for p in made] == [200, 200, 100]


def test_passages_do_not_cross_pages() -> None:
    text = "y" * LEAST
    made = split(document((1, text), (2, text), (2, text), paged=True), 1000)
    assert [(p.place, len(p.text)) for p in made] == [("a.md, page 1", LEAST), ("a.md, page 2", 2 * LEAST + 2)]


def test_too_little_text_is_no_passage() -> None:
    assert split(document((1, "# A long heading that is long " * 5), (2, "short")), 1000) == []


def test_a_link_that_leads_nowhere(tmp_path: Path) -> None:
    (tmp_path / "a.md").symlink_to("nowhere")
    with pytest.raises(DataError, match=r"a\.md: cannot be read: No such file"):
        read(tmp_path / "a.md", "a.md")
