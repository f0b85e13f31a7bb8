"""The ComfyUI node: its logic, without ComfyUI, gives what the package itself inserts."""

from __future__ import annotations

import importlib.util
import sys
import types
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from ipgo_opt.conditioning import Conditioning
from ipgo_opt.spaces.tokens import inserted

FOLDER = Path(__file__).parent.parent / "integrations" / "comfyui"
RANDOM = torch.Generator().manual_seed(0)
TOKENS = {"prefix": torch.randn(2, 16, generator=RANDOM), "suffix": torch.randn(3, 16, generator=RANDOM)}
ABOUT = {"format": "ipgo-opt conditioning 1", "attend": "1"}


@pytest.fixture
def node(monkeypatch, tmp_path):
    """The package as ComfyUI loads it, with the one module of ComfyUI that it asks for file names."""
    paths = types.ModuleType("folder_paths")
    paths.get_filename_list = lambda kind: ["a.safetensors"]  # type: ignore[attr-defined]
    paths.get_full_path = lambda kind, name: str(tmp_path / name)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "folder_paths", paths)
    spec = importlib.util.spec_from_file_location(
        "comfy_ipgo", FOLDER / "__init__.py", submodule_search_locations=[str(FOLDER)]
    )
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "comfy_ipgo", module)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("how", [{}, {"attend": True}, {"anchor": True}, {"attend": True, "anchor": True}], ids=str)
@pytest.mark.parametrize("masked", [False, True])
def test_the_node_inserts_what_the_package_inserts(node, tmp_path, how, masked):
    states = torch.randn(2, 5, 16, generator=RANDOM)
    mask = torch.ones(2, 5) if masked else None
    save_file(TOKENS, tmp_path / "a.safetensors", ABOUT | {"attend": "0"} | dict.fromkeys(how, "1"))
    made = node.NODE_CLASS_MAPPINGS["IpgoInsertTokens"]()
    pooled = torch.ones(2, 3)
    options = {"pooled_output": pooled} | ({"attention_mask": mask} if masked else {})
    ((entry,),) = made.run([[states, options]], "a.safetensors", 0.7)
    expected = inserted(
        {name: V[None] for name, V in TOKENS.items()}, Conditioning(states, mask=mask), **how,
        strength=torch.tensor([0.7]),
    )  # fmt: skip
    assert torch.allclose(entry[0], expected.prompt_embeds, atol=1e-6)
    assert entry[1]["pooled_output"] is pooled
    if masked:
        assert torch.equal(entry[1]["attention_mask"], expected.mask)
    assert options.keys() == entry[1].keys()
    assert states.shape == (2, 5, 16)


def test_what_the_node_refuses(node, tmp_path):
    made = node.InsertTokens()
    save_file(TOKENS, tmp_path / "a.safetensors", ABOUT)
    with pytest.raises(ValueError, match=r"16 wide.*24 wide"):
        made.run([[torch.zeros(1, 5, 24), {}]], "a.safetensors", 1.0)
    save_file(TOKENS, tmp_path / "a.safetensors", {})
    with pytest.raises(ValueError, match="no conditioning file"):
        made.run([[torch.zeros(1, 5, 16), {}]], "a.safetensors", 1.0)
    save_file({"prompt_embeds": torch.zeros(1)}, tmp_path / "a.safetensors", ABOUT)
    with pytest.raises(ValueError, match="no learned tokens"):
        made.run([[torch.zeros(1, 5, 16), {}]], "a.safetensors", 1.0)
    assert node.InsertTokens.INPUT_TYPES()["required"]["file"] == (["a.safetensors"],)
