"""accelerate on a GPU: its replacements on CPU tensors, and on a GPU where there is one."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from test_accelerate import LIBRARIES, VARIANTS, distance, inputs, make, oracle, run
from torch import Tensor, nn

import difusores
from difusores.acceleration import cuda_blocks, cuda_layers, merged, prompts, transformer_blocks
from difusores.acceleration.engine import SESSION, install
from difusores.acceleration.prompts import Prompts
from difusores.acceleration.report import Report
from difusores.models.lora import LowRank, make_adapters
from difusores.ops import dispatch

BOUND = 2e-5  # of a whole network in float32, relative L2, against float64
CROSS = "down_blocks.0.attentions.0.transformer_blocks.0.attn2"
SELF = "down_blocks.0.attentions.0.transformer_blocks.0.attn1"
GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device was found")


def accelerate(model: nn.Module) -> Report:
    """As on a GPU, wherever the parameters are."""
    install(model, next(model.parameters()).device.type, cuda=True)
    return Report({"": model})


def declined(report: Report) -> dict[str, int]:
    return {reason: count for layer in report.layers for reason, count in layer.declined.items()}


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(params=list(LIBRARIES))
def library(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def model(library: str) -> Iterator[nn.Module]:
    made = make(library, "latents")
    yield made
    difusores.restore(made)


@pytest.mark.parametrize("variant", list(VARIANTS))
def test_agrees_and_comes_back(library: str, variant: str) -> None:
    model = make(library, variant)
    cases = [inputs(variant), inputs(variant, 3), inputs(variant, 2, (16, 8))]
    before = [run(model, *case) for case in cases]
    wanted = [oracle(model, *case) for case in cases]
    state = {key: (value.clone(), value.stride()) for key, value in model.state_dict().items()}
    report = accelerate(model)
    for case, want in zip(cases, wanted, strict=True):
        got = run(model, *case)
        assert got.is_contiguous() and distance(got, want) <= BOUND
        assert torch.equal(got, run(model, *case))
        last = case[0].to(memory_format=torch.channels_last)
        assert torch.equal(run(model, last, *case[1:]), got)
    assert not declined(report)
    assert all(layer.replaced or "already" in layer.how for layer in report.layers)
    assert all(torch.equal(value, state[key][0]) for key, value in model.state_dict().items())
    difusores.restore(model)
    for case, old in zip(cases, before, strict=True):
        assert torch.equal(run(model, *case), old)
    assert not any("forward" in module.__dict__ for module in model.modules())
    for key, value in model.state_dict().items():
        assert torch.equal(value, state[key][0]) and value.stride() == state[key][1]
        assert value.untyped_storage().nbytes() == value.numel() * value.element_size(), key


@pytest.mark.parametrize("variant", ["latents", "linear", "pixels"])
def test_residuals_in_the_products(library: str, variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As where the kernel of `linear` takes the call: the norms then have no residuals."""
    monkeypatch.setattr(transformer_blocks, "fused", lambda *_: True)
    residuals: list[bool] = []
    layer_norm = transformer_blocks.layer_norm

    def watched(*args: Any, residual: Tensor | None = None, **options: Any) -> Any:
        residuals.append(residual is not None)
        return layer_norm(*args, residual=residual, **options)

    monkeypatch.setattr(transformer_blocks, "layer_norm", watched)
    model = make(library, variant)
    cases = [inputs(variant), inputs(variant, 3)]
    accelerate(model)
    for case in cases:
        assert distance(run(model, *case), oracle(model, *case)) <= BOUND
    assert not any(residuals) and (variant == "pixels" or residuals)
    difusores.restore(model)


@pytest.mark.parametrize("variant", ["latents", "pixels"])
def test_shortcuts_that_add(library: str, variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As where the kernel of `linear` takes the call: a shortcut's product is the block's sum."""
    sums: list[bool] = []
    linear = cuda_blocks.linear

    def watched(*args: Any, **residual: Tensor) -> Any:
        sums.append(True)
        return linear(*args, **residual)

    monkeypatch.setattr(cuda_blocks, "linear", watched)
    model = make(library, variant)
    case = inputs(variant)
    accelerate(model)
    without = run(model, *case)
    assert not sums  # in float32 no kernel takes it
    monkeypatch.setattr(cuda_blocks, "fused", lambda *_: True)
    want = oracle(model, *case)
    assert distance(run(model, *case), want) <= BOUND
    shortcuts = [m for m in model.modules() if getattr(m, "conv_shortcut", None) is not None]
    assert len(sums) == len(shortcuts) > 1
    hook = shortcuts[0].conv2.register_forward_hook(lambda *_: None)  # whose bias cannot be left out
    sums.clear()
    assert distance(run(model, *case), without.double()) <= BOUND and len(sums) == len(shortcuts) - 1
    hook.remove()
    difusores.restore(model)


def test_the_last_activation(model: nn.Module, library: str) -> None:
    """Diffusers' own is computed by the normalisation before it, within the network and unwatched."""
    case = inputs("latents")
    count: list[str] = []

    class Activations(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func.overloadpacket.__name__ == "silu" and args[0].ndim == 4:
                count.append("silu")
            return func(*args, **(kwargs or {}))

    x = torch.randn(1, model.conv_norm_out.num_channels, 4, 4)
    with torch.no_grad():
        alone = model.conv_norm_out(x)
    accelerate(model)
    with Activations():
        want = run(model, *case)
    assert distance(want, oracle(model, *case)) <= BOUND
    if dispatch.status("cpu") is None:  # the reference of the op has an activation of its own
        assert not count
    with torch.no_grad():
        torch.testing.assert_close(model.conv_norm_out(x), alone)
    if library == "difusores":
        return
    with torch.no_grad():
        torch.testing.assert_close(model.conv_act(x), nn.functional.silu(x))
    seen: list[Tensor] = []
    for part in (model.conv_act, model.conv_norm_out):
        hook = part.register_forward_hook(lambda m, i, out: seen.append(out))
        assert distance(run(model, *case), want.double()) <= BOUND
        hook.remove()
    assert (seen[1] < -0.5).any() and not (seen[0] < -0.5).any()  # SiLU is above -0.28
    act, model.conv_act = model.conv_act, nn.Tanh()
    assert distance(run(model, *case), oracle(model, *case)) <= BOUND
    model.conv_act = act
    assert torch.equal(run(model, *case), want)
    with torch.no_grad():
        assert torch.equal(model(*case).sample, want)


def test_what_is_one_product(model: nn.Module) -> None:
    """Products of a step: time projections once, q k v once, a prompt's keys and values not at all."""
    case = inputs("latents")
    count = {"plain": 0, "first": 0, "second": 0}

    class Products(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            count[now] += func.overloadpacket.__name__ in ("mm", "addmm", "addmm_")
            return func(*args, **(kwargs or {}))

    now = "plain"
    with Products():
        run(model, *case)
    accelerate(model)
    now = "first"
    with Products():
        run(model, *case)
    now = "second"
    with Products():
        run(model, *case)
    blocks = sum(type(m).__name__ == "ResnetBlock2D" for m in model.modules())
    attentions = sum(type(m).__name__ == "BasicTransformerBlock" for m in model.modules())
    shortcuts = sum(getattr(m, "conv_shortcut", None) is not None for m in model.modules())
    projections = 2 * attentions  # 1x1 convolutions of the plain model are no products
    saved = (blocks - 1) + 2 * attentions + attentions
    assert count["first"] == count["plain"] - saved + projections + shortcuts
    assert count["second"] == count["first"] - attentions


def test_prompts_that_change(model: nn.Module) -> None:
    """Another tensor, the same one in place, another length, one that died, several in turn."""
    x, t, states = inputs("latents")
    accelerate(model)
    run(model, x, t, states)
    other = torch.randn_like(states)
    for prompt in (other, torch.randn(1, 5, 24), states, other):
        assert distance(run(model, x, t, prompt), oracle(model, x, t, prompt)) <= BOUND
    first = run(model, x, t, states)
    with torch.no_grad():
        states[0, 1] += 1
    assert distance(run(model, x, t, states), oracle(model, x, t, states)) <= BOUND
    assert distance(run(model, x, t, states), first.double()) > 1e-4
    states.resize_(1, 4, 24)
    assert distance(run(model, x, t, states), oracle(model, x, t, states)) <= BOUND
    for _ in range(3):
        assert distance(run(model, x, t, p := torch.randn(1, 7, 24)), oracle(model, x, t, p)) <= BOUND
    with torch.inference_mode():
        p = torch.randn(1, 7, 24)
        run(model, x, t, p)
        p.mul_(2)
        got = model(x, t, p).sample.clone()
    assert distance(got, oracle(model, x, t, p.clone())) <= BOUND


def test_prompts_are_bounded_and_die(model: nn.Module) -> None:
    x, t, _ = inputs("latents")
    accelerate(model)
    held = [torch.randn(1, 7, 24) for _ in range(prompts.MOST + 2)]
    for prompt in held:
        run(model, x, t, prompt)
    forward = model.get_submodule(CROSS).__dict__["forward"]
    made = weakref.ref(next(iter(forward.prompts._entries.values())).made[0]._base)
    assert len(forward.prompts._entries) == prompts.MOST and made() is not None
    del prompt
    held.clear()
    gc.collect()
    assert not forward.prompts._entries and made() is None
    run(model, x, t, keep := torch.randn(1, 7, 24))
    made = weakref.ref(next(iter(forward.prompts._entries.values())).made[0]._base)
    del forward
    difusores.restore(model)
    gc.collect()
    assert made() is None and keep is not None


def test_while_a_graph_is_captured(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing that was remembered is used, and nothing is kept or moved."""
    x, t, states = inputs("latents")
    accelerate(model)
    made: list[Tensor] = []
    get = Prompts.get

    def watched(self: Prompts, prompt: Tensor, weights: Any, make: Callable[[], Any]) -> Any:
        def counted() -> Any:
            made.append(prompt)
            return make()

        return get(self, prompt, weights, counted)

    monkeypatch.setattr(Prompts, "get", watched)
    want = run(model, x, t, states)
    first = len(made)
    assert torch.equal(run(model, x, t, states), want) and len(made) == first > 0
    pointers = [p.data_ptr() for p in model.parameters()]
    token: list[object] = [object()]
    for module in (merged, prompts, cuda_layers):
        monkeypatch.setattr(module, "capturing", lambda: token[0])
    for _ in range(2):  # the steps of one captured loop share what the first of them computed
        assert torch.equal(run(model, x, t, states), want) and len(made) == 2 * first
    token[0] = object()
    assert torch.equal(run(model, x, t, states), want) and len(made) == 3 * first
    assert pointers == [p.data_ptr() for p in model.parameters()]
    layer = model.get_submodule(SELF).to_k
    layer.weight.data = layer.weight.data * 2  # other memory: nothing can be gathered now
    pointers = [p.data_ptr() for p in model.parameters()]
    assert distance(run(model, x, t, states), oracle(model, x, t, states)) <= BOUND
    assert pointers == [p.data_ptr() for p in model.parameters()]


def test_own_lora() -> None:
    """Loaded, scaled, fused and unloaded on layers that are part of a product, of all three kinds."""
    model, case = make("difusores", "latents"), inputs("latents")
    before = run(model, *case)
    accelerate(model)
    unchanged = run(model, *case)
    names = [
        f"{CROSS}.to_k",
        f"{SELF}.to_v",
        "mid_block.resnets.0.time_emb_proj",
        "mid_block.resnets.0.conv1",
    ]
    names += ["down_blocks.0.attentions.0.proj_out", "mid_block.resnets.1.conv2"]
    names += ["down_blocks.0.attentions.0.transformer_blocks.0.ff.net.2"]
    changes = {}
    for name in names:
        weight = model.get_submodule(name).weight
        assert isinstance(weight, Tensor)
        shapes = ((2, *weight.shape[1:]), (weight.shape[0], 2, *[1] * (weight.ndim - 2)))
        changes[name] = LowRank(torch.randn(shapes[0]), torch.randn(shapes[1]), 0.1)
    adapters = make_adapters(model)
    adapters.load("one", changes)
    for weight in (1.0, 0.3):
        adapters.activate({"one": weight})
        got = run(model, *case)
        difusores.restore(model)
        want = run(model, *case)
        accelerate(model)
        assert distance(got, want.double()) <= BOUND and distance(got, before.double()) > 1e-3
        adapters.fuse(1.0)
        assert distance(run(model, *case), want.double()) <= BOUND
        adapters.unfuse()
    adapters.delete("one")
    assert torch.equal(run(model, *case), unchanged)
    difusores.restore(model)
    assert torch.equal(run(model, *case), before)


def test_weights_that_change(model: nn.Module) -> None:
    """In place, through `.data` as peft merges, by a new parameter, by load_state_dict, by another dtype."""
    case = inputs("latents")
    state = copy.deepcopy(model.state_dict())
    accelerate(model)
    first = run(model, *case)
    attention, block = model.get_submodule(SELF), model.mid_block.resnets[0]

    def through_data() -> None:
        for layer in (attention.to_q, attention.to_v, block.time_emb_proj, block.conv2):
            layer.weight.data += 0.03 * torch.randn(layer.weight.shape)

    def of_keys() -> None:
        with torch.no_grad():
            model.get_submodule(CROSS).to_v.weight.mul_(1.5)

    def new_parameter() -> None:
        attention.to_k.weight = nn.Parameter(attention.to_k.weight.detach() * 1.5)

    def new_bias() -> None:
        with torch.no_grad():
            block.conv1.bias.add_(torch.randn(64))
            block.time_emb_proj.bias.sub_(torch.randn(64))

    for change in (through_data, of_keys, new_parameter, new_bias):
        before = run(model, *case)
        change()
        got = run(model, *case)
        assert distance(got, oracle(model, *case)) <= BOUND, change.__name__
        assert distance(got, before.double()) > 1e-3, change.__name__
    model.load_state_dict(state, assign=True)
    assert distance(run(model, *case), first.double()) <= 1e-6
    model.to(torch.bfloat16)
    half = tuple(t.bfloat16() if t.is_floating_point() else t for t in case)
    got = run(model, *half)
    assert got.dtype is torch.bfloat16 and distance(got, first.double()) < 5e-2


def test_blocks_alone(library: str) -> None:
    """A block that is called outside its network projects the time embedding itself."""
    model = make(library, "pixels")
    block, x, temb = model.mid_block.resnets[0], torch.randn(2, 64, 5, 7), torch.randn(2, 128)
    with torch.no_grad():
        want = block(x, temb)
        accelerate(model)
        run(model, *inputs("pixels"))
        assert distance(block(x, temb), want.double()) <= BOUND
        assert distance(block(x, 2 * temb), want.double()) > 1e-3
    difusores.restore(model)


def test_watched_layers_are_called(model: nn.Module) -> None:
    case = inputs("latents")
    accelerate(model)
    want = run(model, *case)
    seen: list[str] = []
    kinds = (nn.Linear, nn.Conv2d, nn.GroupNorm, nn.LayerNorm)
    watched = [name for name, m in model.named_modules() if isinstance(m, kinds)]
    hooks = [
        model.get_submodule(name).register_forward_hook(lambda m, i, o, name=name: seen.append(name))
        for name in watched
    ]
    got = run(model, *case)
    assert set(seen) == set(watched) and distance(got, want.double()) <= BOUND
    for hook in hooks:
        hook.remove()
    assert torch.equal(run(model, *case), want)


def test_gradients_training_and_backends(model: nn.Module) -> None:
    case = inputs("latents")

    def gradient() -> Tensor:
        model.zero_grad()
        model(*case).sample.square().sum().backward()
        weight = model.conv_in.weight.grad
        assert isinstance(weight, Tensor)
        return weight.clone()

    want = gradient()
    report = accelerate(model)
    run(model, *case)
    assert distance(gradient(), want.double()) <= BOUND
    model.train()
    run(model, *case)
    model.eval()
    with difusores.use_backend("reference"):
        run(model, *case)
    reasons = declined(report)
    for reason in (
        "gradients are recorded",
        "the module is in training mode",
        "another backend was asked for",
    ):
        assert reasons[reason], reason


def test_compiles_without_the_replacements(model: nn.Module) -> None:
    """What torch.compile traces are the classes' own forwards."""
    module = model.get_submodule("time_proj")
    times = torch.tensor([3, 7])
    want = module(times)
    accelerate(model)
    torch.compiler.reset()
    compiled = torch.compile(module, backend="eager", fullgraph=True)
    assert torch.equal(compiled(times), want)
    torch.testing.assert_close(module(times), want, rtol=0, atol=1e-6)


def test_copies_and_pickles(model: nn.Module) -> None:
    case = inputs("latents")
    accelerate(model)
    want = run(model, *case)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert other.__dict__[SESSION] is not model.__dict__[SESSION]
        with torch.no_grad():
            other.get_submodule(SELF).to_k.weight.zero_()
        assert distance(run(other, *case), oracle(other, *case)) <= BOUND
    assert torch.equal(run(model, *case), want)


def test_the_wrong_dtype_is_refused_by_the_class(model: nn.Module) -> None:
    x, t, states = inputs("latents")
    accelerate(model)
    with pytest.raises(RuntimeError), torch.no_grad():
        model.half()(x, t, states)


@GPU
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("variant", list(VARIANTS))
def test_on_a_gpu(library: str, variant: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """No farther from float64 than twice the plain model in the same dtype."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)
    model = make(library, variant)
    cases = [inputs(variant), inputs(variant, 3), inputs(variant, 2, (16, 8))]
    wanted = [oracle(model, *case) for case in cases]
    model.to("cuda", dtype)
    cases = [tuple(t.to("cuda", dtype if t.is_floating_point() else None) for t in case) for case in cases]
    before = [run(model, *case) for case in cases]
    report = difusores.accelerate(model)
    for case, old, want in zip(cases, before, wanted, strict=True):
        got = run(model, *case)
        assert got.dtype is dtype and got.is_cuda
        bound = max(2 * distance(old.cpu(), want), BOUND)
        assert distance(got.cpu(), want) <= bound
        assert torch.equal(got, run(model, *case))
    assert not declined(report)
    difusores.restore(model)
    for case, old in zip(cases, before, strict=True):
        assert distance(run(model, *case).cpu(), old.double().cpu()) <= 1e-3


@GPU
def test_the_dtype_is_the_parameters() -> None:
    with pytest.raises(ValueError, match=r"dtype is torch\.bfloat16, and UNet2DModel is on a GPU"):
        difusores.accelerate(make("difusores", "pixels").cuda(), dtype="bfloat16")


@GPU
def test_a_captured_graph_follows_the_prompt(library: str) -> None:
    """The prompt's memory is written anew between replays: no Python runs that could see it."""
    model = make(library, "latents").cuda().half()
    difusores.accelerate(model)
    x, t, states = (v.cuda().half() if v.is_floating_point() else v.cuda() for v in inputs("latents"))
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            run(model, x, t, states)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run(model, x, t, states)
    for _ in range(2):
        states.copy_(torch.randn_like(states))
        graph.replay()
        assert torch.equal(out, run(model, x, t, states))
