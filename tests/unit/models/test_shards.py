"""Is it one rule that names the files of a checkpoint, before its weights are here and after?"""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from fate_moe.errors import ModelError
from fate_moe.models.shards import INDEX_FILE, SINGLE_FILE, Shards, promised_files

SHARD = "model-00001-of-00001.safetensors"


@pytest.mark.parametrize("has_index", [False, True])
@pytest.mark.parametrize("has_single", [False, True])
def test_what_is_promised_is_what_is_read(
    has_single: bool, has_index: bool, tmp_path: Path
) -> None:
    published = {SHARD, "config.json"}
    if has_index:
        published.add(INDEX_FILE)
        (tmp_path / INDEX_FILE).write_text(json.dumps({"weight_map": {"a": SHARD}}))
    if has_single:
        published.add(SINGLE_FILE)
    if not published & {SINGLE_FILE, INDEX_FILE}:
        with pytest.raises(ModelError, match="only safetensors are read"):
            promised_files(tmp_path, published)
        with pytest.raises(ModelError, match="only safetensors are read"):
            Shards(tmp_path)
        return
    promised = promised_files(tmp_path, published)
    for name in published & {SINGLE_FILE, SHARD}:
        save_file({"a": torch.zeros(2)}, tmp_path / name)
    assert promised == ((SINGLE_FILE,) if has_single else (SHARD,))
    assert tuple(Shards(tmp_path).digests) == promised
