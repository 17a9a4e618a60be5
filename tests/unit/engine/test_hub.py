"""From a hub id to a store: what is fetched, kept, taken up again, and said when it fails."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import constants
from safetensors.torch import load_file, save_file

from fate_moe.engine.hub import commit_of, download
from fate_moe.engine.prepare import convert_model
from fate_moe.errors import FormatError, ModelError, StoreError
from fate_moe.models.shards import Shards
from fate_moe.store import small_files, space
from fate_moe.store.format import read_manifest
from fate_moe.store.verify import verify
from tests.unit.engine.hub_server import COMMIT, NAME, Hub, serve
from tests.unit.models.test_checkpoint import edit_config, save, shard

FIND = """
import json, sys
from pathlib import Path
from fate_moe.engine.prepare import find_store

model, cache_dir, commit = sys.argv[1:]
found = []
for revision in (None, commit):
    steps = []
    store = find_store(
        model, cache_dir=Path(cache_dir), revision=revision, bits=16,
        progress=lambda *step: steps.append(step),
    )
    found.append({"store": str(store), "steps": steps})
print(json.dumps(found))
"""


@pytest.fixture
def hub(tiny_checkpoint: Path, tmp_path: Path) -> Iterator[Hub]:
    """The tiny checkpoint in three shards, among files that nobody asked for."""
    folder = shutil.copytree(tiny_checkpoint, tmp_path / "published")
    shard(folder)
    for name in ("pytorch_model.bin", "model.pt", "modeling.py", "README.md", "weights.gguf",
                 "consolidated.safetensors", "original/model.safetensors", "original/config.json",
                 "metal/model.bin", "onnx/tokenizer.json"):  # fmt: skip
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"not for us")
    (folder / "LICENSE").write_text("as you like")
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tool.jinja").write_text("{{ messages }}")
    with serve(folder) as server:
        yield server


@pytest.fixture
def online(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let this process speak to the hub, as if it had been started with these settings."""
    set_up(monkeypatch, hub.url, tmp_path / "home")
    yield
    huggingface_hub.close_session()


def set_up(monkeypatch: pytest.MonkeyPatch, url: str, home: Path, *, offline: bool = False) -> None:
    huggingface_hub.close_session()
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(constants, "ENDPOINT", url)
    template = url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(home / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
    monkeypatch.setattr(constants, "HF_HUB_ETAG_TIMEOUT", 5)


def refusal(revision: str | None = None) -> str:
    """Return the one line that a download ends with."""
    with pytest.raises((ModelError, FormatError)) as caught:
        download(NAME, revision)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def environment(hub: Hub, tmp_path: Path, **more: str) -> dict[str, str]:
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING"))}
    return kept | {
        "HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "HF_TOKEN": "hf_secret",
        "NO_PROXY": "127.0.0.1", "OMP_NUM_THREADS": "1", "HF_HUB_DISABLE_TELEMETRY": "1",
    } | more  # fmt: skip


def find(hub: Hub, tmp_path: Path, **env: str) -> list[dict[str, Any]]:
    """Find the model's store in a process of its own: by branch, then by commit."""
    run = subprocess.run(
        [sys.executable, "-c", FIND, NAME, str(tmp_path), COMMIT],
        env=environment(hub, tmp_path, **env), capture_output=True, text=True, timeout=120,
        check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    assert not run.stderr
    found: list[dict[str, Any]] = json.loads(run.stdout)
    return found


def test_the_environment_is_kept_online_and_offline(
    hub: Hub, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    first, _ = find(hub, tmp_path)
    manifest = read_manifest(Path(first["store"]))
    assert (manifest.source.id, manifest.source.revision) == (NAME, COMMIT)
    assert verify(Path(first["store"])).is_intact
    assert (Path(first["store"]) / "additional_chat_templates" / "tool.jinja").is_file()
    _, local = convert_model(str(tiny_checkpoint), tmp_path / "own", cache_dir=tmp_path, bits=16)
    assert [x.checksums for x in manifest.layers] == [x.checksums for x in local.layers]
    assert hub.tokens == {"Bearer hf_secret"}
    assert list((tmp_path / "home" / "hub").glob("models--*"))
    steps = [step for step in first["steps"] if step[0] == "downloading"]
    size = sum(path.stat().st_size for name, path in hub.files().items() if "-of-" in name)
    assert steps[-1][1:] == [size, size]
    assert [done for _, done, _ in steps] == sorted(done for _, done, _ in steps)

    shutil.rmtree(tmp_path / "stores")
    before = len(hub.asked)
    by_branch, by_commit = find(hub, tmp_path, HF_HUB_OFFLINE="1")
    assert by_branch["store"] != by_commit["store"]
    for found in (by_branch, by_commit):
        assert read_manifest(Path(found["store"])).source.revision == COMMIT
    assert len(hub.asked) == before


@pytest.mark.usefixtures("online")
def test_only_what_is_read_is_fetched(hub: Hub) -> None:
    folder = download(NAME, None)
    assert commit_of(folder) == COMMIT
    assert hub.fetched() == {
        "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json",
        "chat_template.jinja", "additional_chat_templates/tool.jinja", "LICENSE",
        "model.safetensors.index.json", *(f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)),
    }  # fmt: skip


@pytest.mark.usefixtures("online")
def test_a_branch_is_pinned_to_its_commit(tmp_path: Path) -> None:
    store, manifest = convert_model(NAME, None, cache_dir=tmp_path, revision="v1")
    assert store.name == "owner--model@v1"
    assert manifest.source.revision == COMMIT


@pytest.mark.usefixtures("online")
def test_a_commit_needs_no_hub_once_it_is_here(hub: Hub) -> None:
    folder = download(NAME, COMMIT)
    assert not [path for _, path in hub.asked if "/revision/" in path]
    before = len(hub.asked)
    assert download(NAME, COMMIT) == folder
    assert len(hub.asked) == before


@pytest.mark.usefixtures("online")
def test_a_single_file(hub: Hub) -> None:
    shutil.rmtree(hub.folder)
    save("qwen3_moe", hub.folder)
    assert (download(NAME, None) / "model.safetensors").is_file()


@pytest.mark.usefixtures("online")
def test_the_single_file_comes_before_an_index_that_was_left_over(hub: Hub) -> None:
    index = (hub.folder / "model.safetensors.index.json").read_bytes()
    shutil.rmtree(hub.folder)
    save("qwen3_moe", hub.folder)
    (hub.folder / "model.safetensors.index.json").write_bytes(index)
    folder = download(NAME, None)
    assert list(Shards(folder).digests) == ["model.safetensors"]
    assert not [name for name in hub.fetched() if "-of-" in name]


@pytest.mark.usefixtures("online")
def test_a_large_file_that_nobody_needs_is_not_fetched(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    largest = max(path.stat().st_size for path in hub.folder.glob("*.json"))
    monkeypatch.setattr(small_files, "MAX_SMALL_BYTES", largest)
    for name in ("training_log.txt", "results [1].json"):
        (hub.folder / name).write_text("x" * (largest + 1))
    (hub.folder / "notes [1].txt").write_text("brackets are no pattern")
    folder = download(NAME, None)
    assert not {"training_log.txt", "results [1].json"} & {x.name for x in folder.iterdir()}
    assert not [path for method, path in hub.asked if method == "GET" and "training_log" in path]
    assert (folder / "notes [1].txt").is_file()
    set_up(monkeypatch, hub.url, tmp_path / "home", offline=True)
    before = len(hub.asked)
    assert download(NAME, None) == download(NAME, COMMIT) == folder
    assert len(hub.asked) == before


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors.index.json"])
@pytest.mark.usefixtures("online")
def test_a_file_that_is_needed_and_too_large_is_refused_unread(
    name: str, hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    largest = max(path.stat().st_size for path in hub.folder.glob("*.json"))
    monkeypatch.setattr(small_files, "MAX_SMALL_BYTES", largest)
    (hub.folder / name).write_text("x" * (largest + 1))
    line = f"{NAME}: {name} has {largest + 1} bytes, need at most {largest}"
    assert refusal().startswith(line)
    assert not hub.fetched()


@pytest.mark.usefixtures("online")
def test_a_folder_that_was_mistyped_is_spoken_of(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for offline in (False, True):
        set_up(monkeypatch, hub.url, tmp_path / "home", offline=offline)
        with pytest.raises(ModelError, match="; no folder my/nothere here$"):
            download("my/nothere", None)


@pytest.mark.usefixtures("online")
def test_a_lost_connection_is_taken_up_where_it_broke(
    hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 10_000)  # 10 MB
    hub.cut_after = 105_000
    folder = download(NAME, None)
    assert hub.ranges == ["bytes=100000-"] * 3
    for path in folder.glob("*.safetensors"):
        assert path.read_bytes() == (hub.folder / path.name).read_bytes()


@pytest.mark.usefixtures("online")
def test_a_download_that_was_stopped_keeps_its_files(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, *others = (name for name in hub.files() if "-of-" in name)
    hub.broken = set(others)
    assert "finished files are kept" in refusal()
    assert first in hub.fetched()
    set_up(monkeypatch, hub.url, tmp_path / "home", offline=True)
    assert "not, or not completely, on this machine" in refusal()
    set_up(monkeypatch, hub.url, tmp_path / "home")
    hub.broken.clear()
    hub.asked.clear()
    download(NAME, None)
    assert hub.fetched() == set(others)


@pytest.mark.usefixtures("online")
def test_what_does_not_fit_on_the_disk_is_not_fetched(
    hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    need = sum(path.stat().st_size for name, path in hub.files().items() if "-of-" in name)
    disk = SimpleNamespace(free=need - 1)
    monkeypatch.setattr(space.shutil, "disk_usage", lambda path: disk)
    with pytest.raises(StoreError, match=r"more, have .* free; owner/model is downloaded") as no:
        download(NAME, None)
    assert "HF_HOME" in str(no.value)
    assert not [name for name in hub.fetched() if name.endswith(".safetensors")]
    disk.free = need
    download(NAME, None)
    disk.free = 0  # what is there already needs no space
    download(NAME, None)


@pytest.mark.skipif(os.name != "posix", reason="sends a signal")
def test_ctrl_c_stops_a_download_within_a_piece(hub: Hub, tmp_path: Path) -> None:
    big = hub.folder / "model-00002-of-00003.safetensors"
    save_file(load_file(big), big, metadata={"format": "pt", "filler": "x" * (60 << 20)})
    hub.pause_s = 0.02  # the large file takes 20 s, a piece of 10 MB three
    process = subprocess.Popen(
        [sys.executable, "-c", FIND, NAME, str(tmp_path / "cache"), COMMIT],
        env=environment(hub, tmp_path), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    until = time.monotonic() + 60
    while big.name not in hub.fetched() and time.monotonic() < until:
        time.sleep(0.05)
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    asked = time.monotonic()
    _, stderr = process.communicate(timeout=60)
    assert time.monotonic() - asked < 10
    assert "KeyboardInterrupt" in stderr
    assert process.returncode != 0


@pytest.mark.parametrize(
    ("refuse", "message"),
    [
        ((403, "GatedRepo"), "is gated: accept its terms on its page of the hub, then log in"),
        ((401, "GatedRepo"), "is gated: accept its terms"),
        ((401, "RepoNotFound"), "no such model, or it is private; check the name, or log in"),
        ((404, "RepoNotFound"), "no such model, or it is private"),
        ((401, ""), "log in with `hf auth login` or set HF_TOKEN"),
        ((403, ""), "the hub answers 403: log in with `hf auth login` or set HF_TOKEN"),
        ((500, ""), "the hub answers 500; check the network"),
    ],
)
@pytest.mark.usefixtures("online")
def test_refusals_say_what_to_do(refuse: tuple[int, str], message: str, hub: Hub) -> None:
    hub.refuse = refuse
    error = refusal()
    assert error.startswith(f"{NAME}: ")
    assert message in error


@pytest.mark.parametrize("revision", ["no-such-branch", "f" * 40])
@pytest.mark.usefixtures("online")
def test_a_wrong_revision_is_named(revision: str) -> None:
    have = f"{NAME}: the hub has no revision {revision!r} of it"
    assert refusal(revision) == f"{have}; give a branch, a tag or a whole commit"


@pytest.mark.usefixtures("online")
def test_no_hub_at_all(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    line = "on this machine and the hub cannot be reached; check the network"
    set_up(monkeypatch, hub.url, tmp_path / "home", offline=True)
    assert line in refusal()
    set_up(monkeypatch, "http://127.0.0.1:9", tmp_path / "home")
    assert line in refusal()
    assert not hub.asked


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"quantization_config": {"quant_method": "gptq"}}, "already quantized (gptq)"),
        ({"model_type": "llama"}, "llama is not a Mixture-of-Experts model"),
        ({"model_type": "no_such"}, "'no_such' is unknown to transformers"),
    ],
)
@pytest.mark.usefixtures("online")
def test_what_cannot_be_converted_is_refused_before_its_weights_are_fetched(
    change: dict[str, object], message: str, hub: Hub
) -> None:
    edit_config(hub.folder, **change)
    assert message in refusal()
    assert "config.json" in hub.fetched()
    assert not [name for name in hub.fetched() if name.endswith(".safetensors")]


@pytest.mark.usefixtures("online")
def test_repositories_without_safetensors(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for path in (*hub.folder.glob("model-*"), hub.folder / "model.safetensors.index.json"):
        path.unlink()
    with pytest.raises(ModelError, match="only safetensors are read"):
        convert_model(NAME, None, cache_dir=tmp_path)
    (hub.folder / "config.json").unlink()
    set_up(monkeypatch, hub.url, tmp_path / "second home")
    assert "the repository has no config.json" in refusal()
    assert not {"pytorch_model.bin", "model.pt", "modeling.py"} & hub.fetched()


@pytest.mark.parametrize(
    "name", ["*.safetensors", "../x.safetensors", "original/model.safetensors", "modeling.py"]
)
@pytest.mark.usefixtures("online")
def test_an_index_cannot_ask_for_other_files(name: str, hub: Hub) -> None:
    index = hub.folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": name}}))
    assert "no plain safetensors file" in refusal()
    assert not [name for name in hub.fetched() if name.endswith((".safetensors", ".py"))]


def test_only_folders_of_the_hubs_cache_have_a_commit(tmp_path: Path) -> None:
    snapshot = tmp_path / "models--a--b" / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    assert commit_of(snapshot) == COMMIT
    assert commit_of(tmp_path) is None
    (tmp_path / COMMIT).mkdir()
    assert commit_of(tmp_path / COMMIT) is None
