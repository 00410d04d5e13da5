"""Hugging Face's model within accelerate(): SAELens's activations, from one function."""

import contextlib
import copy
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from sae_lens.load_model import HookedProxyLM
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    masking_utils,
)

import sae_lens_flex
from sae_lens_flex.acceleration import language_model as ours

WORDS, LENGTH = 80, 24
SIZES: dict[str, Any] = {
    "vocab_size": WORDS,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
}
GROUPED: dict[str, Any] = SIZES | {"num_key_value_heads": 2}
WINDOW: dict[str, Any] = {"sliding_window": 8, "head_dim": 8}
MODELS = {  # a config, the layers' name, and whether its masks are left out under compilation
    "gpt2": (GPT2Config(vocab_size=WORDS, n_embd=32, n_head=4, n_layer=3), "transformer.h", True),
    "llama": (LlamaConfig(**GROUPED), "model.layers", True),
    "neox": (GPTNeoXConfig(**SIZES), "gpt_neox.layers", True),
    "mistral": (MistralConfig(**GROUPED, **WINDOW), "model.layers", False),
    "gemma2": (Gemma2Config(**GROUPED, **WINDOW), "model.layers", False),
}
every_model = pytest.mark.parametrize("name", MODELS)


def new_proxy(name: str = "gpt2", *hooked: str, every: bool = False, **fields: Any) -> Any:
    """Return SAELens's wrapper of a model, with hooks on the modules `hooked`, or on all."""
    torch.manual_seed(0)
    attention = {"attn_implementation": "eager"} if name == "gemma2" else {}
    config = copy.deepcopy(MODELS[name][0])
    for key, value in fields.items():
        setattr(config, key, value)
    model = AutoModelForCausalLM.from_config(config, **attention)
    proxy = HookedProxyLM(
        model.eval().requires_grad_(False),
        None,  # type: ignore[arg-type]
        hook_names=None if every else list(hooked) or [layer(name)],
    )
    return proxy


def layer(name: str = "gpt2", i: int = 1) -> str:
    return f"{MODELS[name][1]}.{i}"


def some_tokens(n: int = 2, length: int = LENGTH) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(1, WORDS, (n, length), generator=generator)


@torch.no_grad()
def activations(
    proxy: Any, *names: str, tokens: torch.Tensor | None = None, call: Any = None, **options: Any
) -> dict[str, torch.Tensor]:
    """Return what the store gets."""
    defaults = {"names_filter": list(names), "stop_at_layer": 2, "prepend_bos": False}
    call = proxy.run_with_cache if call is None else call
    return call(some_tokens() if tokens is None else tokens, **(defaults | options))[1]


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Return a list that gets an entry for every run of the model as one function."""
    found: list[Any] = []
    own = ours._outputs
    monkeypatch.setattr(ours, "_outputs", lambda *args: (found.append(args), own(*args))[1])
    return found


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    torch.testing.assert_close(dict(found), dict(expected), rtol=0, atol=0)


@every_model
@pytest.mark.parametrize("use_cache", [True, False])
def test_activations_are_saelens_bit_for_bit(name, use_cache, runs) -> None:
    first, second = layer(name, 0), layer(name, 1)
    inside = f"{second}.mlp"
    for hooked in ((first,), (inside,), (first, second), (second, inside, first)):
        proxy = new_proxy(name, *hooked, use_cache=use_cache)
        expected = activations(proxy, *hooked)
        with sae_lens_flex.accelerate():
            for _ in range(2):
                assert_same(activations(proxy, *hooked), expected)
            shorter = some_tokens(3, 7)
            found = activations(proxy, *hooked, tokens=shorter)
        assert_same(found, activations(proxy, *hooked, tokens=shorter))
        assert len(expected) == len(hooked)
    assert len(runs) == 12


def test_every_module_may_be_hooked(runs) -> None:
    proxy = new_proxy(every=True)
    for hooked in ((layer(),), (layer(i=0), f"{layer()}.attn"), ("transformer.ln_f", "lm_head")):
        expected = activations(proxy, *hooked)
        with sae_lens_flex.accelerate():
            assert_same(activations(proxy, *hooked), expected)
    assert len(runs) == 3


class Graphs:
    """A backend of torch.compile that runs what it gets, and counts."""

    def __init__(self) -> None:
        self.n = 0
        self.masks: list[Any] = []

    def __call__(self, graph: Any, inputs: Any) -> Callable[..., Any]:
        self.n += 1
        calls = [node for node in graph.graph.nodes if "scaled_dot" in str(node.target)]
        self.masks += [call.kwargs.get("attn_mask") for call in calls]
        return graph.forward


@pytest.fixture
def compiled() -> Iterator[Callable[[Any], tuple[Any, Graphs]]]:
    """Return a function that compiles `run_with_cache` of a model as `compile_llm` does."""

    def compile_llm(proxy: Any) -> tuple[Any, Graphs]:
        torch._dynamo.reset()
        graphs = Graphs()
        return torch.compile(proxy.run_with_cache, backend=graphs), graphs

    yield compile_llm
    torch._dynamo.reset()


@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma2"])
def test_compile_llm_compiles_one_graph(name, compiled) -> None:
    is_without_mask = MODELS[name][2]
    names = (layer(name, 0), layer(name, 1))
    proxy = new_proxy(name, *names)
    expected = activations(proxy, *names)
    with sae_lens_flex.accelerate():
        call, graphs = compiled(proxy)
        for _ in range(3):
            torch.testing.assert_close(activations(proxy, *names, call=call), expected)
    # A runner that was made within the block may go on after it.
    torch.testing.assert_close(activations(proxy, *names, call=call), expected)
    assert graphs.n == 1
    assert not is_without_mask or graphs.masks == [None, None]


def test_hooks_that_come_after_compilation_act(compiled) -> None:
    proxy = new_proxy()
    expected = activations(proxy, layer())
    with sae_lens_flex.accelerate():
        call, _ = compiled(proxy)
        assert_same(activations(proxy, layer(), call=call), expected)
        seen: list[torch.Size] = []
        # Compiled, SAELens's own way does not see such a hook either; it is the choice that counts.
        handle = proxy.hook_dict[layer()].register_forward_hook(
            lambda module, inputs, output: seen.append(output.shape)
        )
        assert not ours._is_plain(proxy, (some_tokens(),), call_of_the_store())
        handle.remove()
        assert ours._is_plain(proxy, (some_tokens(),), call_of_the_store())


def call_of_the_store() -> dict[str, Any]:
    return {"names_filter": [layer()], "stop_at_layer": 2, "prepend_bos": False}


def twice(module: Any, inputs: Any, output: torch.Tensor) -> torch.Tensor:
    return 2 * output


def doubled_input(module: Any, inputs: Any) -> Any:
    return (2 * inputs[0], *inputs[1:])


HOOKS = {
    "of the hook point": lambda p: p.hook_dict[layer()].register_forward_hook(twice),
    "of the hook point, by TransformerLens": lambda p: p.hook_dict[layer()].add_hook(
        lambda tensor, hook: 2 * tensor, is_permanent=True
    ),
    "of the module": lambda p: p.model.transformer.h[1].register_forward_hook(twice),
    "of a module before": lambda p: p.model.transformer.h[0].register_forward_hook(twice),
    "before the module": lambda p: p.model.transformer.h[1].register_forward_pre_hook(
        doubled_input
    ),
    "of the model": lambda p: p.model.register_forward_pre_hook(lambda m, a: (a[0] // 2,)),
    "of all modules": lambda p: torch.nn.modules.module.register_module_forward_hook(
        lambda module, inputs, output: 2 * output if isinstance(module, torch.nn.GELU) else None
    ),
}


@pytest.mark.parametrize("hang", HOOKS.values(), ids=HOOKS)
def test_hooks_of_others_are_honoured(hang, runs) -> None:
    proxy = new_proxy()
    without = activations(proxy, layer())
    handle = hang(proxy)
    try:
        expected = activations(proxy, layer())
        with sae_lens_flex.accelerate():
            assert_same(activations(proxy, layer()), expected)
    finally:
        if handle is not None:
            handle.remove()
    assert not runs
    # A hook that changes nothing that is seen here would show nothing.
    changes = [key for key in HOOKS if key not in ("of the module", "of all modules")]
    if hang in [HOOKS[key] for key in changes]:
        assert not torch.equal(expected[layer()], without[layer()])


OTHER_CALLS = {
    "to its end": {"stop_at_layer": None},
    "a function as filter": {"names_filter": lambda name: name == layer()},
    "a name": {"names_filter": layer()},
    "another argument": {"return_type": "logits"},
    "to a device": {"device": "cpu"},
}


@pytest.mark.parametrize("options", OTHER_CALLS.values(), ids=OTHER_CALLS)
def test_other_calls_are_saelens(options, runs) -> None:
    proxy = new_proxy()
    found = []
    for block in (contextlib.nullcontext, sae_lens_flex.accelerate):
        with block():
            try:
                found.append(activations(proxy, layer(), **options))
            except Exception as error:
                found.append({"error": (type(error), str(error))})
    if "error" in found[0]:
        assert found[1] == found[0]
    else:
        assert_same(found[1], found[0])
    assert not runs


def test_module_that_does_not_run_raises_as_in_saelens() -> None:
    proxy = new_proxy("gpt2", layer(), "transformer.h.0.mlp.dropout")
    proxy.model.transformer.h[0].mlp.dropout = torch.nn.Identity()  # The hooked one is out.
    names = (layer(), "transformer.h.0.mlp.dropout")
    expected = activations(proxy, *names)
    with sae_lens_flex.accelerate():
        found = activations(proxy, *names)
    assert found.keys() == expected.keys() == {layer()}
    assert_same(found, expected)


def test_forward_of_a_subclass_is_called(runs) -> None:
    class Doubled(HookedProxyLM):
        def forward(self, tokens: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            return super().forward(tokens // 2, *args, **kwargs)

    proxy = Doubled(new_proxy().model, None)  # type: ignore[arg-type]
    with sae_lens_flex.accelerate():
        found = activations(proxy, layer())
    assert_same(found, activations(proxy, layer()))
    assert not runs


def state(proxy: Any) -> list[Any]:
    """Return everything that a call changes."""
    masking = [getattr(masking_utils, name) for name in ours._MASKING]
    points = [dict(point._forward_hooks) for point in proxy.hook_dict.values()]
    return [masking, points, [dict(module._forward_hooks) for module in proxy.modules()]]


def test_model_and_transformers_are_as_before(runs) -> None:
    proxy = new_proxy()
    before = state(proxy)
    with sae_lens_flex.accelerate():
        activations(proxy, layer())
        assert state(proxy) == before
        with pytest.raises(Exception, match="index out of range"):
            activations(proxy, layer(), tokens=some_tokens() + WORDS)
        assert state(proxy) == before
    assert len(runs) == 2
    assert set(ours._MASKING) == {"is_tracing", "find_packed_sequence_indices"}


def test_activations_carry_no_graph() -> None:
    proxy = new_proxy()
    proxy.model.requires_grad_(True)
    with sae_lens_flex.accelerate():
        _, cache = proxy.run_with_cache(some_tokens(), **call_of_the_store())
    assert not cache[layer()].requires_grad


def test_cache_of_a_call_stays_what_it_was() -> None:
    proxy = new_proxy()
    with sae_lens_flex.accelerate():
        first = activations(proxy, layer())
        copy = first[layer()].clone()
        activations(proxy, layer(), tokens=some_tokens() // 2)
    assert torch.equal(first[layer()], copy)


def test_model_in_bfloat16_and_autocast() -> None:
    proxy = new_proxy()
    for dtype in (torch.bfloat16, torch.float32):
        proxy.model.to(dtype)
        found = []
        for block in (contextlib.nullcontext, sae_lens_flex.accelerate):
            with block(), torch.autocast("cpu", torch.bfloat16, enabled=dtype is torch.float32):
                found.append(activations(proxy, layer()))
        assert_same(found[1], found[0])


def test_threads_do_not_disturb_each_other() -> None:
    proxy = new_proxy("gpt2", layer(i=0), layer())
    expected = {name: activations(proxy, name)[name] for name in (layer(i=0), layer())}
    before = state(proxy)
    wrong: list[Any] = []

    def work(name: str) -> None:
        for _ in range(15):
            found = activations(proxy, name)
            if found.keys() != {name} or not torch.equal(found[name], expected[name]):
                wrong.append(name)

    with sae_lens_flex.accelerate():
        threads = [threading.Thread(target=work, args=(name,)) for name in 2 * list(expected)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(timeout=60)
    assert not wrong
    assert state(proxy) == before


@pytest.mark.gpu
def test_compiled_on_a_gpu() -> None:
    proxy = new_proxy().to("cuda")
    tokens = some_tokens().cuda()
    expected = activations(proxy, layer(), tokens=tokens)
    with sae_lens_flex.accelerate():
        assert_same(activations(proxy, layer(), tokens=tokens), expected)
        call = torch.compile(proxy.run_with_cache)
        found = activations(proxy, layer(), tokens=tokens, call=call)
    torch.testing.assert_close(dict(found), dict(expected), rtol=1e-4, atol=1e-4)
