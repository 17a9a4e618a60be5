"""Does a manifest say what became of packed weights, and nothing else in that place?"""

from dataclasses import replace
from typing import Any

import pytest

from fate_moe.errors import FormatError
from fate_moe.store.format import MAX_PACKINGS, parse_manifest, write_manifest
from tests.unit.store.test_manifest import make_manifest


def written(source: Any) -> bytes:
    manifest = replace(make_manifest(), quantization={"bits": 4, "source": source})
    return write_manifest(manifest)


def test_what_became_of_each_packing_is_read_back() -> None:
    source = {"Q4_0": "kept", "Q6_K": "requantized", "MXFP4": "dequantized"}
    assert parse_manifest(written(source)).quantization == {"bits": 4, "source": source}


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("kept", "source: must be an object"),
        ({"Q4_0": "lost"}, "Q4_0 is 'lost', must be one of kept, requantized, dequantized"),
        ({"Q4_0": 4}, "Q4_0 is 4"),
        ({f"Q{i}": "kept" for i in range(MAX_PACKINGS + 1)}, "33 fields, the limit is 32"),
        ({"Q\n": "kept"}, "'Q.n' is no name of a packing"),
        ({"Q" * 65: "kept"}, "is no name of a packing"),
    ],
)
def test_anything_else_is_refused(source: Any, says: str) -> None:
    with pytest.raises(FormatError, match=says) as caught:
        parse_manifest(written(source))
    assert "\n" not in str(caught.value)
