"""The Hub, played by a server on this machine: what is sent and fetched, and errors in one line."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
from torch import nn

import hub_stub
import thriftnet as tn
from thriftnet.cli.common import open_network
from thriftnet.errors import CheckpointError, ConfigError
from thriftnet.store.hub import parse_name


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[hub_stub.Hub]:
    with hub_stub.running() as running:
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", running.address)
        template = running.address + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda _: None)  # between attempts
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setenv("HF_TOKEN", "a-token")
        yield running


def network(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    model = tn.create_model("convmixer", dim=8, depth=4, patch_size=2, kernel_size=3, num_classes=3)
    return tn.convert(model, "soft-sharing(templates=2, pointwise=True)").eval()


def same(one: nn.Module, other: nn.Module) -> bool:
    """The same bits are stored; a layer this small computes the last bit differently from one call to the next."""
    states = one.state_dict(), other.state_dict()
    images = torch.randn(2, 3, 8, 8)
    return (
        list(states[0]) == list(states[1])
        and all(torch.equal(states[0][name], states[1][name]) for name in states[0])
        and torch.allclose(one(images), other(images), rtol=1e-5, atol=1e-6)
    )


def test_a_network_goes_to_the_hub_and_back(hub: hub_stub.Hub, tmp_path: Path):
    model = network()
    url = tn.push_to_hub(
        model, "someone/thin", private=True, metadata={"class_names": ["a", "b", "c"]}, commit_message="First"
    )
    assert url.startswith(f"{hub.address}/someone/thin/commit/")
    assert hub.private == {"someone/thin": True}
    assert hub.commits[0]["summary"] == "First"
    stored = hub.repos["someone/thin"]["main"]
    assert set(stored) == {"model.safetensors", "config.json", "README.md"}
    assert json.loads(stored["config.json"])["class_names"] == ["a", "b", "c"]
    stored["pickled.bin"] = b"not ours"
    for name in ("someone/thin", "hf-hub:someone/thin", "hf-hub:someone/thin@main"):
        assert same(tn.from_pretrained(name, cache_dir=tmp_path / "elsewhere"), model)
    assert not list((tmp_path / "elsewhere").rglob("pickled.bin"))
    assert same(tn.load("hf-hub:someone/thin"), model)
    assert same(open_network("hf-hub:someone/thin", {}), model)
    with pytest.raises(ConfigError, match="takes no arguments but num_classes"):
        open_network("hf-hub:someone/thin", {"depth": 5})


def test_what_was_downloaded_is_there_without_the_hub(hub: hub_stub.Hub):
    model = network()
    tn.push_to_hub(model, "someone/thin")
    tn.from_pretrained("someone/thin")
    asked = len(hub.requests)
    assert same(tn.from_pretrained("someone/thin", local_files_only=True), model)
    assert len(hub.requests) == asked
    with pytest.raises(CheckpointError, match=r"someone/other cannot be read: the Hub cannot be reached"):
        tn.from_pretrained("someone/other", local_files_only=True)


def test_revisions(hub: hub_stub.Hub):
    first, second = network(0), network(1)
    tn.push_to_hub(first, "someone/thin")
    tn.push_to_hub(second, "someone/thin", revision="v2")
    assert same(tn.from_pretrained("someone/thin"), first)
    assert same(tn.from_pretrained("someone/thin", revision="v2"), second)
    assert same(tn.from_pretrained("hf-hub:someone/thin@v2"), second)
    assert not same(first, second)
    with pytest.raises(CheckpointError, match="no revision 'v3'"):
        tn.from_pretrained("someone/thin@v3")
    with pytest.raises(ConfigError, match=r"'v2'.*'v1'"):
        tn.from_pretrained("someone/thin@v2", revision="v1")


def test_a_folder_is_loaded_and_pushed_as_it_is(hub: hub_stub.Hub, tmp_path: Path):
    model = network()
    folder = tn.save(model, tmp_path / "m", metadata={"metrics": {"top1": 91.5}})
    (folder / "notes.txt").write_text("mine")
    assert same(tn.from_pretrained(folder), model)
    tn.push_to_hub(folder, "someone/thin")
    stored = hub.repos["someone/thin"]["main"]
    assert stored == {name: (folder / name).read_bytes() for name in ("model.safetensors", "config.json", "README.md")}
    with pytest.raises(CheckpointError, match="no model folder"):
        tn.push_to_hub(tmp_path, "someone/thin")
    with pytest.raises(ConfigError, match="its metadata"):
        tn.push_to_hub(folder, "someone/thin", metadata={"top1": 1})


def test_a_network_outside_the_zoo(hub: hub_stub.Hub):
    def plain() -> nn.Module:
        return nn.Sequential(*[nn.Conv2d(3, 3, 3, padding=1) for _ in range(4)])

    model = tn.convert(plain(), "soft-sharing(templates=2)").eval()
    tn.push_to_hub(model, "someone/own")
    with pytest.raises(CheckpointError, match="model="):
        tn.from_pretrained("someone/own")
    assert same(tn.from_pretrained("someone/own", model=plain()), model)


@pytest.mark.parametrize(
    ("refusal", "message"),
    [
        ((404, "RepoNotFound"), "no such repository, or it is private.*hf auth login"),
        ((403, "GatedRepo"), "is gated: ask for access on its page"),
        ((403, ""), r"access denied \(403\).*token"),
        ((500, ""), "the Hub answers 500"),
    ],
    ids=["not found", "gated", "forbidden", "broken"],
)
@pytest.mark.parametrize("verb", ["read", "write"])
def test_refusals_are_one_line(verb: str, refusal: tuple[int, str], message: str, hub: hub_stub.Hub):
    hub.refusal = refusal
    with pytest.raises(CheckpointError, match=message) as caught:
        tn.from_pretrained("someone/thin") if verb == "read" else tn.push_to_hub(network(), "someone/thin")
    assert "\n" not in str(caught.value)
    assert "someone/thin" in str(caught.value)


def test_no_connection_is_one_line(hub: hub_stub.Hub, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")  # nobody listens there
    for act in (lambda: tn.from_pretrained("someone/thin"), lambda: tn.push_to_hub(network(), "someone/thin")):
        with pytest.raises(CheckpointError, match="the Hub cannot be reached") as caught:
            act()
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["a/b/c", "hf-hub:", "no spaces/here", "hf-hub:../../etc"])
def test_what_is_no_repository(name: str, hub: hub_stub.Hub):
    with pytest.raises(CheckpointError, match="neither a folder nor a repository"):
        tn.from_pretrained(name)


def test_something_else_on_the_hub(hub: hub_stub.Hub):
    hub.repos["someone/bert"] = {"main": {"config.json": b'{"model_type": "bert"}'}}
    with pytest.raises(CheckpointError, match="no model folder"):
        tn.from_pretrained("someone/bert")
    hub.repos["someone/empty"] = {"main": {}}
    with pytest.raises(CheckpointError, match=r"no model folder|cannot be read"):
        tn.from_pretrained("someone/empty")


def test_a_trainings_folder_is_pushed_and_an_odd_file_is_not(hub: hub_stub.Hub, tmp_path: Path):
    model = network()
    folder = tn.save(model, tmp_path / "run" / "model")
    (tmp_path / "run" / "run.json").write_text("{}")
    tn.push_to_hub(tmp_path / "run", "someone/trained")
    assert same(tn.from_pretrained("someone/trained"), model)
    odd = (folder / "model.safetensors").rename(tmp_path / "net.safetensors")
    with pytest.raises(CheckpointError, match=r"is not called model\.safetensors"):
        tn.push_to_hub(odd, "someone/odd")


def test_names():
    assert parse_name("hf-hub:a/b@c/d") == ("a/b", "c/d")
    assert parse_name("a/b") == ("a/b", None)
