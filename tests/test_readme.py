"""What a newcomer reads first: short, in short sentences, with links that lead somewhere."""

import re

from conftest import REPOSITORY

README = (REPOSITORY / "README.md").read_text()


def sentences(text: str) -> list[str]:
    """The sentences of paragraphs and lists; a code block ends a sentence, a table has none."""
    text = re.sub(r"```.*?```|<[^>]*>", "\n\n", text, flags=re.S)
    text = re.sub(r"^( {4}.*|\|.*|#.*|- )", "\n\n", text, flags=re.M)
    blocks = (" ".join(block.split()) for block in text.split("\n\n"))
    return [each for block in blocks for each in re.split(r"(?<=[.:;?!])\s", block) if each]


def test_it_has_fewer_than_200_lines():
    assert len(README.splitlines()) < 200


def test_no_sentence_is_longer_than_30_words():
    found = sentences(README)
    assert len(found) > 60
    assert [each for each in found if len(each.split()) > 30] == []


def test_its_links_lead_to_files():
    links = re.findall(r'\]\(([^)]+)\)|src(?:set)?="([^"]+)"', README)
    files = [link or source for link, source in links if not link.startswith("http")]
    assert len(files) > 12
    assert [file for file in files if not (REPOSITORY / file).exists()] == []
