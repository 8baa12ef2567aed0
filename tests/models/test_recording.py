"""The tape against plain forward hooks, for every kind of site."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FluxPipeline
from torch import Tensor, nn

from fluxsae.models.load import load_pipeline
from fluxsae.models.recording import TapeIsFull, record
from fluxsae.models.streams import find_module, read_stream, replace_stream, stream_order
from fluxsae.records.spec import parse_site
from fluxsae.steering.intervention import intervene

N_TEXT, N_IMAGE, N_STEPS = 16, 12, 4
CALL: dict[str, Any] = {
    "height": 48,
    "width": 64,
    "num_inference_steps": N_STEPS,
    "max_sequence_length": N_TEXT,
    "output_type": "latent",
}


def by_hand(pipe: FluxPipeline, path: str, prompts: list[str], **options: Any) -> list[Any]:
    """What the module returned in each forward pass."""
    outputs: list[Any] = []
    handle = pipe.transformer.get_submodule(path).register_forward_hook(lambda m, i, out: outputs.append(out))
    try:
        pipe(prompts, generator=torch.Generator().manual_seed(0), **CALL, **options)
    finally:
        handle.remove()
    return outputs


def on_tape(pipe: FluxPipeline, site: str, step: int, prompts: list[str], **options: Any) -> Tensor:
    with record(pipe, [site], [step]) as tape:
        pipe(prompts, generator=torch.Generator().manual_seed(0), **CALL, **options)
    return tape[site, step]


SINGLE = "single_transformer_blocks.1"
SITES = {
    "transformer_blocks.1.ff": lambda out: out,
    "transformer_blocks.1.ff.net.0": lambda out: out,
    "transformer_blocks.1.ff_context": lambda out: out,
    "transformer_blocks.1.norm1": lambda out: out[0],
    "transformer_blocks.1.norm1_context": lambda out: out[0],
    "transformer_blocks.1.attn": lambda out: out[0],
    "transformer_blocks.1.attn:text": lambda out: out[1],
    "transformer_blocks.1.attn.to_add_out": lambda out: out,
    "transformer_blocks.0": lambda out: out[1],
    "transformer_blocks.0:text": lambda out: out[0],
    SINGLE: lambda out: out[1],
    f"{SINGLE}:text": lambda out: out[0],
    f"{SINGLE}.attn": lambda out: out[:, N_TEXT:],
    f"{SINGLE}.attn:text": lambda out: out[:, :N_TEXT],
    f"{SINGLE}.proj_mlp": lambda out: out[:, N_TEXT:],
    f"{SINGLE}.norm:text": lambda out: out[0][:, :N_TEXT],
    "x_embedder": lambda out: out,
    "context_embedder:text": lambda out: out,
    "proj_out": lambda out: out,
}


@pytest.mark.parametrize("site", SITES)
def test_tape_holds_what_a_plain_hook_sees(tiny_pipe: FluxPipeline, site: str) -> None:
    prompts, step = ["a fox", "two red apples"], 2
    expected = SITES[site](by_hand(tiny_pipe, parse_site(site).path, prompts)[step])
    tokens = on_tape(tiny_pipe, site, step, prompts)
    n_tokens = N_IMAGE if parse_site(site).stream == "image" else N_TEXT
    assert tokens.shape[:2] == (2, n_tokens)
    assert torch.equal(tokens, expected)


def test_true_guidance_records_the_pass_on_the_prompt(tiny_pipe: FluxPipeline) -> None:
    site, options = "transformer_blocks.1.ff", {"negative_prompt": "blurred", "true_cfg_scale": 2.0}
    outputs = by_hand(tiny_pipe, site, ["a fox"], **options)
    assert len(outputs) == 2 * N_STEPS
    for step in range(N_STEPS):
        assert torch.equal(on_tape(tiny_pipe, site, step, ["a fox"], **options), outputs[2 * step])


def test_several_sites_and_steps_and_another_call_starts_anew(tiny_pipe: FluxPipeline) -> None:
    sites, steps = ["transformer_blocks.0.ff", f"{SINGLE}:text"], [0, 3]
    with record(tiny_pipe, sites, steps) as tape:
        assert len(tape) == 0
        with pytest.raises(KeyError, match="call the pipeline inside the context first"):
            tape[sites[0], 0]
        tiny_pipe(["a", "b"], **CALL)
        assert set(tape) == {(site, step) for site in sites for step in steps}
        tiny_pipe("c", **{**CALL, "num_inference_steps": 2})
        assert set(tape) == {(site, 0) for site in sites}
        assert tape["transformer_blocks.0.ff:image", 0].shape[0] == 1
    with pytest.raises(KeyError, match=r"step 3 never came: the schedule had 2 steps \(0-1\)"):
        tape[sites[0], 3]
    with pytest.raises(KeyError, match="step 1 was not recorded; recorded are the steps 0, 3"):
        tape[sites[0], 1]
    with pytest.raises(KeyError, match=r"was not recorded; recorded are transformer_blocks.0.ff"):
        tape["transformer_blocks.1.ff", 0]


def test_a_call_after_one_that_failed_counts_from_zero(tiny_pipe: FluxPipeline) -> None:
    site = "transformer_blocks.0.ff"

    def fail(*_: Any) -> None:
        raise RuntimeError("stopped")

    with record(tiny_pipe, [site], [0]) as tape:
        handle = tiny_pipe.transformer.get_submodule("transformer_blocks.1").register_forward_pre_hook(fail)
        with pytest.raises(RuntimeError, match="stopped"):
            tiny_pipe("a fox", **CALL)
        handle.remove()
        tiny_pipe(["a fox", "an owl"], **CALL)
        assert tape[site, 0].shape[0] == 2


def test_hooks_are_gone_afterwards_even_after_an_error(tiny_pipe: FluxPipeline) -> None:
    with pytest.raises(RuntimeError), record(tiny_pipe, ["transformer_blocks.0.ff"], [0]):
        raise RuntimeError
    for module in tiny_pipe.transformer.modules():
        assert not module._forward_hooks and not module._forward_pre_hooks


@pytest.mark.parametrize(
    ("site", "message"),
    [
        ("transformer_blocks.7.ff", r"is no module .* 'transformer_blocks.\d.ff'.*transformer_blocks.0 to .1"),
        ("transformer_blocks.1.fff", "'transformer_blocks.1.ff'"),
        ("transformer_blocks", "is no module"),
        ("nonsense", "is no module"),
        ("transformer_blocks.1.ff:text", "holds image tokens only"),
        ("transformer_blocks.1.ff_context:image", "holds text tokens only"),
        ("transformer_blocks.1.ff:picture", "is not a module path"),
    ],
)
def test_a_wrong_site_is_refused_before_the_pipeline_runs(tiny_pipe: FluxPipeline, site: str, message: str) -> None:
    with pytest.raises(ValueError, match=message), record(tiny_pipe, [site], [0]):
        pass


def test_a_module_without_tokens_is_refused(tiny_pipe: FluxPipeline) -> None:
    with (
        pytest.raises(ValueError, match=r"returns a tensor of shape \[1, 192\], not tokens"),
        record(tiny_pipe, ["transformer_blocks.0.norm1.linear"], [0]),
    ):
        tiny_pipe("a fox", **CALL)


OUTPUTS: dict[str, Any] = {
    "transformer_blocks.0": (torch.zeros(2, 3, 4), torch.ones(2, 5, 4)),
    "transformer_blocks.0.attn": (torch.ones(2, 5, 4), torch.zeros(2, 3, 4)),
    "single_transformer_blocks.0": (torch.zeros(2, 3, 4), torch.ones(2, 5, 4)),
    "single_transformer_blocks.0.attn": torch.cat([torch.zeros(2, 3, 4), torch.ones(2, 5, 4)], dim=1),
    "single_transformer_blocks.0.norm": (torch.cat([torch.zeros(2, 3, 4), torch.ones(2, 5, 4)], dim=1), torch.ones(2)),
}


@pytest.mark.parametrize("stream", ["image", "text"])
@pytest.mark.parametrize("path", OUTPUTS)
def test_replacing_a_stream_changes_that_stream_alone(path: str, stream: str) -> None:
    site, other = parse_site(f"{path}:{stream}"), parse_site(f"{path}:{'text' if stream == 'image' else 'image'}")
    output = OUTPUTS[path]
    new = torch.full_like(read_stream(output, site, 3), 7.0)
    replaced = replace_stream(output, site, 3, new)
    assert type(replaced) is type(output)
    assert torch.equal(read_stream(replaced, site, 3), new)
    assert torch.equal(read_stream(replaced, other, 3), read_stream(output, other, 3))
    assert read_stream(output, site, 3).max() <= 1, "the output itself is left alone"


def test_an_older_single_block_that_returns_one_tensor_reads_the_same() -> None:
    site = parse_site("single_transformer_blocks.0:text")
    pair = OUTPUTS["single_transformer_blocks.0"]
    assert torch.equal(read_stream(torch.cat(pair, dim=1), site, 3), read_stream(pair, site, 3))


def test_every_module_of_a_block_has_a_stream_order(tiny_pipe: FluxPipeline) -> None:
    for path in ("transformer_blocks.0.ff", "transformer_blocks.0.attn.to_q"):
        assert stream_order(path) == "image"
        find_module(tiny_pipe.transformer, parse_site(path))
    assert stream_order("transformer_blocks.0.attn.add_k_proj") == "text"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        find_module(tiny_pipe.transformer, parse_site("single_transformer_blocks.0.proj_out:text"))


def test_a_full_tape_may_end_the_call_behind_the_last_site(tiny_pipe: FluxPipeline) -> None:
    sites, steps = ["transformer_blocks.0.ff", "transformer_blocks.1.attn:text"], [0, 2]
    with record(tiny_pipe, sites, steps) as whole:
        tiny_pipe("a fox", generator=torch.Generator().manual_seed(0), **CALL)
    passes: list[str] = []
    handles = [
        tiny_pipe.transformer.get_submodule(path).register_forward_hook(lambda m, i, o, path=path: passes.append(path))
        for path in ("transformer_blocks.0", "transformer_blocks.1.ff", "single_transformer_blocks.0")
    ]
    with record(tiny_pipe, sites, steps, stop_when_full=True) as tape:
        for _ in range(2):  # a call that was left does not disturb the next
            with pytest.raises(TapeIsFull):
                tiny_pipe("a fox", generator=torch.Generator().manual_seed(0), **CALL)
            assert tape.is_full
    for handle in handles:
        handle.remove()
    assert [passes.count(path) for path in dict.fromkeys(passes)] == [6, 4, 4]
    for key in tape:
        assert torch.equal(tape[key], whole[key])


def test_hooks_work_in_a_pipeline_with_compiled_blocks(tiny_flux: Path) -> None:
    """A compiled block that ran before does not hide its modules from hooks, and is compiled again afterwards."""
    pipe, (site, other) = load_pipeline(tiny_flux), ("transformer_blocks.1.ff", "single_transformer_blocks.0")
    expected = by_hand(pipe, site, ["a fox"])
    calls: list[nn.Module] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        calls.append(graph)
        return graph.forward

    pipe.transformer.compile_repeated_blocks(backend=backend)
    pipe("a fox", generator=torch.Generator().manual_seed(0), **CALL)
    assert calls
    for step in (1, 2):
        assert torch.equal(on_tape(pipe, site, step, ["a fox"]), expected[step])
    n_compiled = len(calls)
    shift = {"direction": torch.ones(32), "strength": 1.0, "mean_norm": 1.0, "site": site}
    with intervene(pipe, steps=[0], **shift):
        assert not torch.equal(
            on_tape(pipe, other, 2, ["a fox"]), on_tape(load_pipeline(tiny_flux), other, 2, ["a fox"])
        )
    block = pipe.transformer.get_submodule("transformer_blocks.1")
    assert block._compiled_call_impl is not None and len(calls) <= n_compiled + 2


def test_a_block_runs_compiled_in_passes_that_are_not_recorded(tiny_flux: Path) -> None:
    pipe, site = load_pipeline(tiny_flux), "transformer_blocks.1.ff"
    expected = by_hand(pipe, site, ["a fox"])
    runs: list[int] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        def run(*args: Any) -> Any:
            runs.append(1)
            return graph.forward(*args)

        return run

    pipe.transformer.transformer_blocks[1].compile(backend=backend)
    for seen in ([1, 2], [0], []):  # also when it is first compiled between two passes that are recorded
        runs.clear()
        with record(pipe, [site], seen) as tape:
            pipe("a fox", generator=torch.Generator().manual_seed(0), **CALL)
        assert len(runs) == N_STEPS - len(seen)
        assert all(torch.equal(tape[site, step], expected[step]) for step in seen)


def test_hooks_run_in_the_order_in_which_they_were_entered(tiny_pipe: FluxPipeline) -> None:
    site, step = "transformer_blocks.1.ff", 2
    plain = on_tape(tiny_pipe, site, step, ["a fox"])
    edit = {"direction": torch.ones(32), "strength": 1.0, "mean_norm": 1.0, "site": site, "steps": [step]}
    before, after = record(tiny_pipe, [site], [step]), record(tiny_pipe, [site], [step])
    with before as unedited, intervene(tiny_pipe, **edit), after as edited:
        tiny_pipe("a fox", generator=torch.Generator().manual_seed(0), **CALL)
    assert torch.equal(unedited[site, step], plain)
    assert not torch.equal(edited[site, step], plain)
